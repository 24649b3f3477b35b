"""A variant of the ResNet-18 of ``ClassifierNetwork.py``, made in place before training. Another one is in ``MirroredFilters.py``.

    strided_downsampling(model)  # the network of He et al. and of the reference

References
----------
He et al. (2016), Deep residual learning for image recognition.
"""

from torch import nn


def strided_downsampling(model):
    """Halve images by convolutions of stride 2 instead of averaging 2x2 places.

    Parameters
    ----------
    model : ResNet18
        Changed in place. Its weights and the number of its operations stay the same.
    """
    model.downsampling = "strides"  # so that its files and checkpoints are not taken for another network's
    for block in model.blocks:
        if isinstance(block.pool, nn.AvgPool2d):
            block.pool = nn.Identity()
            block.conv1.stride = block.shortcut[0].stride = (2, 2)

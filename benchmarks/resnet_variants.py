"""Variants of the ResNet-18 of ``ClassifierNetwork.py``, made in place before training.

    strided_downsampling(model)  # the network of He et al. and of the reference
    mirrored_filters(model)      # an image and its mirror image get the same logits

References
----------
He et al. (2016), Deep residual learning for image recognition. Cohen and Welling (2016), Group equivariant
convolutional networks: here for the group of two elements, the identity and the mirroring.
"""

import torch
import torch.nn.functional as F
from torch import nn


def strided_downsampling(model):
    """Halve images by convolutions of stride 2 in place of averaging 2x2 places.

    Parameters
    ----------
    model : ResNet18
        Changed in place. Its weights and the number of its operations stay what they are.
    """
    model.downsampling = "strides"  # so that its files and checkpoints don't pass for another network's
    for block in model.blocks:
        if isinstance(block.pool, nn.AvgPool2d):
            block.pool = nn.Identity()
            block.conv1.stride = block.shortcut[0].stride = (2, 2)


class MirroredConv2d(nn.Conv2d):
    """A convolution, the second half of whose filters are the mirror images of the first half.

    Its input is either an image or the output of such a layer, whose second half of channels then is
    mirrored too: mirrored filters therefore see the two halves exchanged.

    Parameters
    ----------
    convolution : Conv2d
        Without bias, with an even number of output channels. The first half of its kernels is kept.
    on_image : bool, default False
        Whether the input is an image.
    """

    def __init__(self, convolution, on_image=False):
        super().__init__(
            convolution.in_channels, convolution.out_channels, convolution.kernel_size,
            convolution.stride, convolution.padding, bias=False,
        )  # fmt: skip
        if self.out_channels % 2:
            raise ValueError(
                f"Filters come in pairs: an even width is needed, got {self.out_channels} channels."
            )
        self.on_image = on_image
        self.weight = nn.Parameter(convolution.weight.detach()[: self.out_channels // 2].clone())

    def forward(self, x):
        exchanged = self.weight
        if not self.on_image:
            exchanged = exchanged.roll(self.in_channels // 2, dims=1)
        kernels = torch.cat([self.weight, exchanged.flip(-1)])
        return F.conv2d(x, kernels, None, self.stride, self.padding)


class MirroredBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics, scale and shift are shared by a channel and its mirrored partner.

    Parameters
    ----------
    num_features : int
        Channels of the input; there are half as many scales and shifts.
    """

    def __init__(self, num_features):
        super().__init__(num_features // 2)

    def forward(self, x):
        # Partners side by side along the width: in channels_last order this moves nothing in memory.
        n, channels, height, width = x.shape
        x = x.permute(0, 2, 3, 1).reshape(n, height, 2 * width, channels // 2).permute(0, 3, 1, 2)
        x = super().forward(x)
        return x.permute(0, 2, 3, 1).reshape(n, height, width, channels).permute(0, 3, 1, 2)


class MirroredLinear(nn.Linear):
    """A linear layer on the mean of each channel and its mirrored partner.

    Parameters
    ----------
    linear : Linear
        Its bias and the weights of the first half of its inputs are kept.
    """

    def __init__(self, linear):
        super().__init__(linear.in_features // 2, linear.out_features)
        self.weight = nn.Parameter(linear.weight.detach()[:, : self.in_features].clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        return super().forward(x.unflatten(1, (2, -1)).mean(dim=1))


def mirrored_filters(model):
    """Make every filter's mirror image a filter too, so that the logits do not change with mirroring.

    This holds exactly (but for rounding) for images whose sides are multiples of 8. There are as many
    operations as before, and half of the weights.

    Parameters
    ----------
    model : ResNet18
        Of even width, without strides. Changed in place.

    Raises
    ------
    ValueError
        If the network has strides, or its width is odd.
    """
    if any(block.conv1.stride != (1, 1) for block in model.blocks):
        raise ValueError(
            "A stride does not commute with mirroring: a network with average pooling is needed."
        )
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d):
                setattr(parent, name, MirroredConv2d(layer, on_image=layer is model.conv))
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, MirroredBatchNorm2d(layer.num_features))
    model.head = MirroredLinear(model.head)
    model.to(model.mean.device)  # new norms begin on the CPU

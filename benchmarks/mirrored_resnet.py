"""Two changes to the ResNet-18 of ``ClassifierNetwork.py``, made in place before training.

    pooled_downsampling(model)
    mirrored_filters(model)   # needs the first

Together they make a network that gives an image and its mirror image the same logits, with half of the
parameters and as many operations as the network that it was.

References
----------
Zhang (2019), Making convolutional networks shift-invariant again. Cohen and Welling (2016), Group
equivariant convolutional networks: here for the group of two elements, the identity and the mirroring.
"""

import torch
import torch.nn.functional as F
from torch import nn


def pooled_downsampling(model):
    """Halve images by averaging 2x2 places in place of leaving places out.

    Where a block of the network had convolutions of stride 2, its input is now average-pooled and its
    convolutions have stride 1: as many operations, the same parameters. A stride keeps every other place
    and so depends on where the image's first column lies: it aliases, and does not commute with mirroring.

    Parameters
    ----------
    model : ResNet18
        Changed in place.
    """
    for block in model.blocks:
        if block.conv1.stride == (2, 2):
            block.conv1.stride = block.shortcut[0].stride = (1, 1)
            # With a side of odd length the last place stands for itself: the sides are those of a stride.
            block.register_forward_pre_hook(lambda block, inputs: F.avg_pool2d(inputs[0], 2, ceil_mode=True))


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

    This holds exactly (but for rounding) for images whose sides are multiples of 8.

    Parameters
    ----------
    model : ResNet18
        Of even width, with :func:`pooled_downsampling`. Changed in place.

    Raises
    ------
    ValueError
        If the network still has strides, or its width is odd.
    """
    if any(block.conv1.stride != (1, 1) for block in model.blocks):
        raise ValueError("A stride does not commute with mirroring: call pooled_downsampling first.")
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d):
                setattr(parent, name, MirroredConv2d(layer, on_image=layer is model.conv))
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, MirroredBatchNorm2d(layer.num_features))
    model.head = MirroredLinear(model.head)
    model.to(model.mean.device)  # new norms begin on the CPU

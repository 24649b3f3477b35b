"""A network that cannot tell an image from its mirror image: every filter's mirror image is a filter too.

    mirrored_filters(model, HalvedMirroredConv2d)  # the network of create_classifier(..., mirrored=True)
    mirrored_filters(model)  # the same network for twice the operations

References
----------
Cohen and Welling (2016), Group equivariant convolutional networks (here for the group of two elements, the identity
and the mirroring). Bökman, Nordström and Kahl (2025), Flopping for FLOPs: leveraging equivariance for computational
efficiency.
"""

import torch
import torch.nn.functional as F
from torch import nn

from GhostBatchNorm import GhostBatchNorm2d


class MirroredConv2d(nn.Conv2d):
    """A convolution whose second half of filters are the mirror images of the first half.

    Its input is either an image or the output of such a layer. The second half of that output's channels is
    mirrored too, so a mirrored filter must see the two halves exchanged.

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


class EvenAndOddColumns(torch.autograd.Function):
    """What the kernels of :class:`HalvedMirroredConv2d` multiply: sums and differences.

    ``x`` (n, 2c, height, width), the second half of whose channels is mirrored -> two tensors (n, 3c, height,
    width). Let ``even`` be the sum of a channel and its partner, and ``odd`` the difference. The first tensor
    holds ``even``, then the sum of its left and right neighbours, then the right neighbour of ``odd`` minus the
    left one. The second is the same with ``even`` and ``odd`` exchanged. Beyond the image are zeros.

    The gradient is written out because autograd would fill an image with zeros for each slice.
    """

    @staticmethod
    def forward(ctx, x):
        first, second = F.pad(x, (1, 1)).chunk(2, dim=1)
        even, odd = first + second, first - second
        (even_left, even, even_right), (odd_left, odd, odd_right) = (
            (part[..., :-2], part[..., 1:-1], part[..., 2:]) for part in (even, odd)
        )
        with_even = torch.cat([even, even_left + even_right, odd_right - odd_left], dim=1)
        with_odd = torch.cat([odd, odd_left + odd_right, even_right - even_left], dim=1)
        return with_even, with_odd

    @staticmethod
    def backward(ctx, with_even, with_odd):
        even, even_sums, odd_differences = with_even.chunk(3, dim=1)
        odd, odd_sums, even_differences = with_odd.chunk(3, dim=1)
        even, odd = (part.clone(memory_format=torch.channels_last) for part in (even, odd))
        for part, sums, differences in (
            (even, even_sums, even_differences),
            (odd, odd_sums, odd_differences),
        ):
            part[..., 1:].add_((sums + differences)[..., :-1])
            part[..., :-1].add_((sums - differences)[..., 1:])
        return torch.cat([even + odd, even - odd], dim=1)


class HalvedMirroredConv2d(MirroredConv2d):
    """A :class:`MirroredConv2d` for half of the operations (Bökman et al. 2025).

    The sum of an output channel and its partner depends on the sums of the inputs through a kernel that equals
    its mirror image. It depends on their differences through a kernel that equals its mirror image except for
    the sign. The difference of an output channel and its partner behaves likewise. If the left and the right
    column are added or subtracted first, such a kernel multiplies with three or six numbers instead of nine.
    Takes 1x1 and 3x3 kernels of stride 1 that keep the image's size.
    """

    def __init__(self, convolution, on_image=False):
        super().__init__(convolution, on_image)
        size = self.kernel_size
        if size not in ((1, 1), (3, 3)) or self.stride != (1, 1) or self.padding != (size[0] // 2,) * 2:
            raise ValueError(
                f"A kernel of 1x1 or 3x3 that keeps the image's size is needed, got {convolution}."
            )

    def forward(self, x):
        if self.on_image:  # an image has no partners to add
            return super().forward(x)
        own, of_partners = self.weight.chunk(2, dim=1)
        mirrored = of_partners.flip(-1)
        kernels = torch.stack([own + mirrored, own - mirrored]) / 2  # for sums and for differences
        if self.kernel_size == (1, 1):
            first, second = x.chunk(2, dim=1)
            columns = first + second, first - second
        else:
            left, middle, right = kernels.split(1, dim=-1)
            kernels = torch.cat([middle, (right + left) / 2, (right - left) / 2], dim=2)
            columns = EvenAndOddColumns.apply(x)  # holds the neighbours to the left and right already
        even, odd = (
            F.conv2d(part, kernel, padding=(self.padding[0], 0))
            for part, kernel in zip(columns, kernels, strict=True)
        )
        return torch.cat([even + odd, even - odd], dim=1)


class MirroredBatchNorm2d(GhostBatchNorm2d):
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


def mirrored_filters(model, convolution=MirroredConv2d):
    """Make every filter's mirror image a filter too, so that the logits do not change with mirroring.

    This holds up to rounding, for images whose sides are multiples of 8. There are half as many weights as
    before. The network's attribute ``mirrored`` becomes True, and its features become the means of each channel and
    its mirrored partner.

    Parameters
    ----------
    model : ResNet18
        Of even width, without strides. Changed in place.
    convolution : type, default MirroredConv2d
        Or :class:`HalvedMirroredConv2d`, which computes the same with half of the operations.

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
                setattr(parent, name, convolution(layer, on_image=layer is model.conv))
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, MirroredBatchNorm2d(layer.num_features))
    model.mirrored = True
    model.head.in_features //= 2  # the means of pairs
    model.head.weight = nn.Parameter(model.head.weight.detach()[:, : model.head.in_features].clone())
    model.to(model.mean.device)  # new norms begin on the CPU

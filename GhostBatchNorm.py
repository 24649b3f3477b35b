"""Batch norm of several micro-batches that pass through a network together.

    with micro_batches(network, sizes=[128, 128], tracked=[True, True]):
        logits = network(images)                     # 256 images; each half is normalised by its own statistics

One pass of 256 images launches fewer operators than two of 128. The outcome is the same up to rounding.

References
----------
Hoffer et al. (2017), Train longer, generalize better (ghost batch normalisation).
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn


class GhostBatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` that can normalise parts of a batch by themselves: see :func:`micro_batches`.

    Attributes
    ----------
    parts : tuple of pairs (int, float), or None
        Number of images and momentum of the running statistics of each part. None: all images are one batch.
    scales_and_shifts : list of pairs of tensors, or None
        Weight and bias for each part. None: those of the layer.
    """

    parts = None
    scales_and_shifts = None

    def forward(self, x):
        if self.parts is None or not self.training:
            return super().forward(x)
        affine = self.scales_and_shifts or [(self.weight, self.bias)] * len(self.parts)
        normalised = [
            # Without running statistics where they are not to follow: 0 times infinity would be NaN.
            F.batch_norm(
                part,
                self.running_mean if momentum else None,
                self.running_var if momentum else None,
                *weight_bias,
                True,
                momentum,
                self.eps,
            )
            for part, (_, momentum), weight_bias in zip(
                x.split([size for size, _ in self.parts]), self.parts, affine, strict=True
            )
        ]
        return normalised[0] if len(normalised) == 1 else torch.cat(normalised)


@contextlib.contextmanager
def micro_batches(model, sizes, tracked, compiled=False):
    """Context in which each part of a batch is normalised by its own statistics in training.

    Parameters
    ----------
    model : nn.Module
        Its batch norms are :class:`GhostBatchNorm2d`.
    sizes : list of int
        Number of images of each part, in the batch's order.
    tracked : list of bool
        Whether the running statistics follow each part.
    compiled : bool, default False
        Whether the network is compiled. If not, the weights are shared as views of
        one tensor, which saves operators in the backward pass.

    Raises
    ------
    TypeError
        If the network has other batch norms.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if others := [norm for norm in norms if not isinstance(norm, GhostBatchNorm2d)]:
        raise TypeError(f"Micro-batches need GhostBatchNorm2d, but the network has {others[0]}.")
    for norm in norms:
        momenta = [norm.momentum if follow else 0.0 for follow in tracked]
        norm.parts = tuple(zip(sizes, momenta, strict=True))
        # In the layer itself, because torch.compile compiles again when it appears there.
        norm.scales_and_shifts = None
    if len(sizes) > 1 and not compiled:
        _give_each_part_its_own(norms, len(sizes))
    if norms:
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], len(sizes))
    try:
        yield
    finally:
        for norm in norms:
            norm.parts = norm.scales_and_shifts = None


@contextlib.contextmanager
def shared_statistics(model, world_size):
    """Context in which the running statistics follow a part of each batch as fast as the whole batch.

    Each of ``world_size`` processes sees its part. The mean of their running statistics then remembers as many
    training steps as those of one process that sees all parts one after another.

    Parameters
    ----------
    model : nn.Module
    world_size : int
    """
    if world_size == 1:  # the formula would round the momentum
        yield
        return
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1 - (1 - norm.momentum) ** world_size
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def _give_each_part_its_own(norms, count):
    """Give each norm its weight and bias once for each part, as views of one tensor.

    So their gradients are added up together, in one operator. Otherwise each weight's would be added by itself.
    """
    values = [value for norm in norms for value in (norm.weight, norm.bias)]
    together = torch.cat(values).expand(count, -1)
    split = [part.split([len(value) for value in values]) for part in together.unbind()]
    for number, norm in enumerate(norms):
        norm.scales_and_shifts = [(part[2 * number], part[2 * number + 1]) for part in split]

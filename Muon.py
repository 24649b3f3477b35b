"""Muon for convolution kernels: the optimiser of the classifier's residual blocks.

    optimizer = KernelMuon(kernels, lr=0.045, momentum=0.9, weight_decay=0.03, iterations=3)

Kernels of one shape are orthogonalised together, as a stack of matrices, so that a GPU gets one product of many
matrices where it would otherwise get many small ones.

References
----------
Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from Precision import half_precision


class KernelMuon(torch.optim.Optimizer):
    """Muon for convolution kernels: each kernel is one matrix with a row per output channel.

    It equals :class:`torch.optim.Muon` up to rounding. PyTorch's takes matrices only, one after another, and always
    multiplies them in bfloat16. A processor without bfloat16 instructions takes as long for that as for the rest of
    the training, so this class multiplies in the type in which convolutions run. The order of a matrix's columns does
    not matter to Muon.

    Parameters
    ----------
    kernels : list of Parameter of shape (out, in, height, width)
        Their memory must not be moved while they are trained.
    lr : float
        Learning rate.
    momentum : float
        Nesterov's.
    weight_decay : float
        Decoupled: it is multiplied by ``lr``.
    iterations : int
        Newton-Schulz iterations.
    """

    def __init__(self, kernels, *, lr, momentum, weight_decay, iterations):
        self.kernels = list(kernels)
        super().__init__(
            [nn.Parameter(_as_matrix(kernel.detach(), kernel)) for kernel in self.kernels],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations},
        )
        self._stacks = None

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._stacks = None  # they are made again, from the loaded momentum

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        if self._stacks is None:
            # A CPU computes the zeros that fill up a stack as slowly as other numbers. A GPU waits for launches.
            # On "meta", operations are counted, and those with the zeros do not count.
            filled = self.kernels[0].device.type not in ("cpu", "meta")
            self._stacks = _make_stacks(group["params"], self.state, filled)
        gradients = [stack.collect(_as_matrix(k.grad, k) for k in self.kernels) for stack in self._stacks]
        means = [stack.momentum for stack in self._stacks]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, means, group["momentum"])
        torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
        together = defaultdict(list)
        for stack, gradient in zip(self._stacks, gradients, strict=True):
            updates = stack.spread(nearly_orthogonal(gradient, group["iterations"]))
            for matrix, update in zip(stack.matrices, updates, strict=True):
                rows, columns = matrix.shape
                alpha = -group["lr"] * math.sqrt(max(1, rows / columns))
                if update.is_contiguous():
                    together[alpha].append((matrix, update))
                else:  # in a list it would make a GPU add each of the others by itself, too
                    matrix.add_(update, alpha=alpha)
        for alpha, pairs in together.items():
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=alpha)


def _as_matrix(values, kernel):
    """A kernel's values, or its gradient's, as a matrix with a row per output channel: a view if possible."""
    # A kernel lies in memory in channels_last or in the usual order. In each case one of these is a view.
    if not kernel.is_contiguous():
        values = values.permute(0, 2, 3, 1)
    return values.reshape(len(kernel), -1)


@dataclass
class _Stack:
    """Kernels whose matrices are multiplied together. Tall matrices are turned, narrow ones filled up with zeros.

    Zeros to the right of a matrix change neither its singular values nor the other columns of a product.
    """

    numbers: list  # of the kernels, in the optimiser's order
    matrices: list
    momentum: torch.Tensor  # float32, shape (matrices, rows, columns), at most as many rows as columns

    def collect(self, gradients):
        """The kernels' gradients as a tensor of the shape of ``momentum``."""
        gradients, width = list(gradients), self.momentum.shape[2]
        parts = [_lying(gradients[number]) for number in self.numbers]
        return torch.stack([F.pad(p, (0, width - p.shape[1])) if p.shape[1] < width else p for p in parts])

    def spread(self, together):
        """Views of a tensor of the shape of ``momentum``, each of the shape of its kernel's matrix."""
        for part, matrix in zip(together, self.matrices, strict=True):
            part = part[:, : max(matrix.shape)]
            yield part.T if matrix.shape[0] > matrix.shape[1] else part


def _lying(matrix):
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _make_stacks(matrices, state, filled):
    """The stacks of an optimiser's matrices. The momentum in ``state`` becomes views of them.

    ``filled`` also puts matrices together that have the same shorter side only.
    """
    numbers = defaultdict(list)
    for number, matrix in enumerate(matrices):
        numbers[min(matrix.shape) if filled else tuple(_lying(matrix).shape)].append(number)
    stacks = []
    for together in numbers.values():
        members = [matrices[number] for number in together]
        shape = len(members), min(members[0].shape), max(max(matrix.shape) for matrix in members)
        stack = _Stack(together, members, torch.zeros(shape, device=members[0].device))
        for matrix, view in zip(members, stack.spread(stack.momentum), strict=True):
            if (kept := state[matrix].get("momentum_buffer")) is not None:
                view.copy_(kept)
            state[matrix]["momentum_buffer"] = view
        stacks.append(stack)
    return stacks


def nearly_orthogonal(matrices, iterations):
    """Move the singular values near one (0.5 to 1.5), by a polynomial instead of a decomposition.

    Parameters
    ----------
    matrices : float32 tensor, shape (n, rows, columns), at most as many rows as columns
    iterations : int

    Returns
    -------
    float32 tensor of the same shape
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steepest at zero
    dtype = half_precision(matrices.device) or torch.float32
    # Gradients can be too small for float16. All other types hold them, and bfloat16 is read twice as fast.
    x = matrices if dtype == torch.float16 else matrices.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.to(dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)

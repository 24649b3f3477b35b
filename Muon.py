"""Muon for convolution kernels: the optimiser of the classifier's residual blocks.

    optimizer = KernelMuon(kernels, lr=0.045, momentum=0.9, weight_decay=0.03, iterations=3)

References
----------
Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks.
"""

import math

import torch
from torch import nn

from Runtime import uses_bfloat16


class KernelMuon(torch.optim.Optimizer):
    """Muon for convolution kernels: each kernel is one matrix with a row per output channel.

    Where convolutions run in bfloat16 it equals :class:`torch.optim.Muon` to the last bit. PyTorch's takes
    matrices only, and always multiplies them in bfloat16. A processor without bfloat16 instructions takes as
    long for that as for the rest of the training, so there this class computes in float32. The order of a
    matrix's columns does not matter to Muon.

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
            [nn.Parameter(self._as_matrix(kernel.detach())) for kernel in self.kernels],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations},
        )

    @staticmethod
    def _as_matrix(kernel):
        # A kernel lies in memory in channels_last or in the usual order. In each case one of these is a view.
        if kernel.is_contiguous():
            return kernel.view(len(kernel), -1)
        return kernel.permute(0, 2, 3, 1).view(len(kernel), -1)

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        for kernel, matrix in zip(self.kernels, group["params"], strict=True):
            gradient = kernel.grad if kernel.is_contiguous() else kernel.grad.permute(0, 2, 3, 1)
            gradient = gradient.reshape(matrix.shape)
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            update = self._nearly_orthogonal(gradient.lerp(mean, group["momentum"]), group["iterations"])
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            rows, columns = matrix.shape
            matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    @staticmethod
    def _nearly_orthogonal(matrix, iterations):
        """Move the singular values near one (0.5 to 1.5), by a polynomial instead of a decomposition."""
        a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steepest at zero
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x.to(torch.bfloat16 if uses_bfloat16(matrix.device) else torch.float32)
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(iterations):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x

"""Spectral norm of all layers of a network together, with few operators.

    for layer in layers:
        parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    with normalised(layers, half={layers[0]: torch.bfloat16}):
        x = layers[0](images)                         # each weight is divided by its largest singular value

PyTorch's ``spectral_norm`` computes the same layer by layer, with about thirty operators for each, forwards and
backwards. A GPU waits for each operator's launch.

References
----------
Miyato et al. (2018), Spectral normalization for generative adversarial networks.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn

TINY = 1e-12  # no vector is divided by less


def _as_matrix(weight):
    """A weight with a row per output. Convolution kernels lie in memory in this order of columns: no copy is made."""
    if weight.ndim == 4:
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(len(weight), -1)


def _as_weight(matrix, shape):
    """The reverse of :func:`_as_matrix`: a view of the given shape."""
    if len(shape) == 2:
        return matrix
    out, channels, height, width = shape
    return matrix.view(out, height, width, channels).permute(0, 3, 1, 2)


class SpectralNorm(nn.Module):
    """Parametrization that divides a weight by its largest singular value, estimated by power iterations.

    Parameters
    ----------
    weight : tensor, shape (out, in) or (out, in, height, width)
        Start of the iterations, 16 of them as in PyTorch.

    Attributes
    ----------
    left, right : float32 tensors
        The singular vectors, as far as the iterations got.
    current : tensor or None
        What :func:`normalised` computed for this weight. None: it is computed by itself, without an iteration.
    """

    def __init__(self, weight):
        super().__init__()
        self.current = None
        with torch.no_grad():
            matrix = _as_matrix(weight)
            left = F.normalize(torch.randn(len(matrix)), dim=0, eps=TINY)
            right = torch.randn(matrix.shape[1]).view(weight[0].shape)
            right = F.normalize(_as_matrix(right[None])[0], dim=0, eps=TINY)
            for _ in range(16):
                left = F.normalize(matrix @ right, dim=0, eps=TINY)
                right = F.normalize(left @ matrix, dim=0, eps=TINY)
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, weight):
        """The normalised weight, of the shape of ``weight``."""
        if self.current is not None:
            return self.current
        return weight / (self.left @ _as_matrix(weight) @ self.right)


@contextlib.contextmanager
def normalised(layers, half=None):
    """Context in which the layers have their normalised weights, computed once and together.

    Layers in training mode do one power iteration first.

    Parameters
    ----------
    layers : list of nn.Module
        Each with a :class:`SpectralNorm` of its ``weight``.
    half : dict, optional
        Layer -> data type of its normalised weight, where that is not the weight's own. Norms are always float32:
        bfloat16 has 8 bits, too few for the iteration.
    """
    half = half or {}
    weights = [layer.parametrizations.weight.original for layer in layers]
    norms = [layer.parametrizations.weight[0] for layer in layers]
    with torch.autocast(weights[0].device.type, enabled=False):
        if layers[0].training:
            values = _iterate([_as_matrix(weight.detach()) for weight in weights], norms)
        else:
            values = torch.stack([
                norm.left @ _as_matrix(weight.detach()) @ norm.right
                for norm, weight in zip(norms, weights, strict=True)
            ])  # fmt: skip
        vectors = [(norm.left, norm.right) for norm in norms]
        dtypes = [half.get(layer, weight.dtype) for layer, weight in zip(layers, weights, strict=True)]
        for norm, current in zip(norms, _Divide.apply(values, vectors, dtypes, *weights), strict=True):
            norm.current = current
    try:
        yield
    finally:
        for norm in norms:
            norm.current = None


@torch.no_grad()
def _iterate(matrices, norms):
    """Do one power iteration, all layers together; return the largest singular values."""
    # W v and W^T W v of each layer W, in one tensor, divided by their lengths at the end.
    sizes = [size for side in (0, 1) for size in (matrix.shape[side] for matrix in matrices)]
    together = torch.empty(sum(sizes), device=matrices[0].device)
    vectors = together.split(sizes)
    lefts, rights = vectors[: len(norms)], vectors[len(norms) :]
    for matrix, norm, left, right in zip(matrices, norms, lefts, rights, strict=True):
        torch.mv(matrix, norm.right, out=left)
        torch.mv(matrix.T, left, out=right)
    lengths = torch.stack(torch._foreach_norm(vectors)).clamp_(min=TINY)
    together /= _spread(lengths, sizes)
    for norm, left, right in zip(norms, lefts, rights, strict=True):
        norm.left, norm.right = left, right
    return lengths[len(norms) :] / lengths[: len(norms)]


def _spread(values, sizes):
    """Repeat the first value ``sizes[0]`` times, and so on."""
    return values[_numbers(tuple(sizes), values.device)]


@functools.cache
def _numbers(sizes, device):
    # Kept, because copying it to a GPU takes longer than using it.
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)


class _Divide(torch.autograd.Function):
    """Divide weights by their singular values. The singular vectors count as constants, as in PyTorch."""

    @staticmethod
    def forward(ctx, values, vectors, dtypes, *weights):
        ctx.save_for_backward(values, *(v for pair in vectors for v in pair), *weights)
        divided = []
        for weight, value, dtype in zip(weights, values, dtypes, strict=True):
            divided.append(torch.empty_like(weight, dtype=dtype))
            torch.div(weight, value, out=divided[-1])  # divides in float32, then rounds
        return tuple(divided)

    @staticmethod
    def backward(ctx, *gradients):
        values, *rest = ctx.saved_tensors
        n = len(gradients)
        pairs, weights = list(zip(rest[: 2 * n : 2], rest[1 : 2 * n : 2], strict=True)), rest[2 * n :]
        matrices = [w.new_empty((len(w), w[0].numel())) for w in weights]
        results = [_as_weight(matrix, w.shape) for matrix, w in zip(matrices, weights, strict=True)]
        torch._foreach_copy_(results, list(gradients))
        # With W the weight, s its value, u and v its vectors, and G the gradient of W / s, the gradient of W is
        # G / s - <G / s, W> / s u v^T.
        for matrix, value in zip(matrices, values, strict=True):
            matrix /= value
        products = [
            torch.dot(matrix.flatten(), _as_matrix(weight).flatten())
            for matrix, weight in zip(matrices, weights, strict=True)
        ]
        sizes = [len(left) for left, _ in pairs]
        scaled = torch.cat([left for left, _ in pairs]) * _spread(torch.stack(products) / values, sizes)
        for matrix, left, (_, right) in zip(matrices, scaled.split(sizes), pairs, strict=True):
            matrix.addr_(left, right, alpha=-1)
        return None, None, None, *results

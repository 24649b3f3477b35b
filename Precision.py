"""In which type of number a device multiplies, and what training in float16 needs.

    with mixed_precision(device):
        loss = network(images).square().mean()
    steps = ScaledSteps(network.parameters(), [optimizer], device)
    steps.backward(loss)
    steps.step()

All networks follow the one decision of :func:`half_precision`.

References
----------
Micikevicius et al. (2018), Mixed precision training (the scaled loss).
"""

import contextlib
import platform

import torch
from torch import nn

# Of layers that multiply by their weights as they are. A layer that computes its kernels from them has its own.
FORWARDS = nn.Conv2d.forward, nn.ConvTranspose2d.forward, nn.Linear.forward


def half_precision(device):
    """The type in which convolutions run on a device, if it multiplies faster in it than in float32.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    torch.dtype or None
        ``torch.bfloat16`` where the hardware multiplies in it (not where PyTorch emulates it), else ``torch.float16``
        on a CUDA GPU that multiplies faster in it, else None: float32.
    """
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported asks the same, but of the current device. AMD's GPUs all have it.
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip or capability >= (8, 0):
            return torch.bfloat16
        # Of the GPUs before Volta, only these multiply faster in it. A GTX 1080 has 1/64 of its rate in float32.
        has_fast_float16 = capability >= (7, 0) or capability in ((5, 3), (6, 0), (6, 2))
        return torch.float16 if has_fast_float16 else None
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_in_bfloat16() else None


def _cpu_multiplies_in_bfloat16():
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # oneDNN supports bfloat16 on every CPU with AVX-512, but without instructions of its own it converts to float32 and back.
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_dtype(dtype, device):
    """Raise ValueError if a CUDA GPU only emulates a data type: bfloat16 on GPUs before Ampere, such as a T4.

    Parameters
    ----------
    dtype : torch.dtype
    device : torch.device
    """
    if dtype == torch.bfloat16 and device.type == "cuda" and half_precision(device) != torch.bfloat16:
        raise ValueError(f"The GPU {device} does not multiply in bfloat16. Choose float16 or float32.")


def precision_name(device):
    """Name of the type in which convolutions run: ``bfloat16``, ``float16`` or ``float32``."""
    return dtype_name(half_precision(device) or torch.float32)


def dtype_name(dtype):
    """Name of a :class:`torch.dtype`, such as ``float16``."""
    return str(dtype).removeprefix("torch.")


def mixed_precision(device):
    """Context in which convolutions run in the type that :func:`half_precision` chooses."""
    dtype = half_precision(device)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def half_weights(module):
    """Context under autocast in which convolutions and linear layers have their weights in half precision.

    Autocast does the same, but weight by weight, with an operator for each, forwards and backwards. Without autocast,
    nothing is changed.

    Parameters
    ----------
    module : nn.Module
        Its layers are changed within the block, not their parameters.
    """
    slots = [
        (layer._parameters, name)
        for layer in module.modules()
        if type(layer).forward in FORWARDS
        for name, parameter in layer._parameters.items()
        if parameter is not None
    ]
    parameters = [owner[name] for owner, name in slots]
    if not (parameters and _is_autocast(parameters[0].device.type)):
        yield
        return
    dtype = torch.get_autocast_dtype(parameters[0].device.type)
    for (owner, name), cast in zip(slots, _Cast.apply(dtype, *parameters), strict=True):
        owner[name] = cast
    try:
        yield
    finally:
        for (owner, name), parameter in zip(slots, parameters, strict=True):
            owner[name] = parameter


def _is_autocast(device_type):
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class _Cast(torch.autograd.Function):
    """Cast tensors to another type, all in one operator."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(cast, tensors)
        return tuple(cast)

    @staticmethod
    def backward(ctx, *gradients):
        results = [
            None if gradient is None else torch.empty_like(gradient, dtype=dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        given = [gradient for gradient in gradients if gradient is not None]
        torch._foreach_copy_([result for result in results if result is not None], given)
        return None, *results


class ScaledSteps:
    """Gradients and optimiser steps. In float16, the loss is scaled so that small gradients do not become zero.

    If a scaled gradient overflows, the step is skipped and the scale is halved (Micikevicius et al. 2018). In other
    types nothing is scaled or skipped.

    Parameters
    ----------
    parameters : iterable of Parameter
        All that the optimisers change.
    optimizers : list of torch.optim.Optimizer
        They step one after another, or none does.
    device : torch.device

    Attributes
    ----------
    optimizers : list of torch.optim.Optimizer
    skipped : int
        Number of steps that were skipped so far.
    """

    def __init__(self, parameters, optimizers, device):
        self.optimizers, self.skipped = optimizers, 0
        self._together = _Together(list(parameters), optimizers)
        self._scaler = torch.amp.GradScaler(device.type, enabled=half_precision(device) == torch.float16)

    def backward(self, loss):
        """Add the (scaled) gradient of ``loss``. Do so as often as a step has losses."""
        self._scaler.scale(loss).backward()

    def step(self):
        """Let all optimisers change the weights once, unless a gradient overflowed."""
        if not self._scaler.is_enabled():
            self._together.step()
            return
        self._scaler.unscale_(self._together)
        stepped = self._scaler.step(self._together)
        self._scaler.update()
        self.skipped += not stepped

    def state_dict(self):
        """The scale and the number of skipped steps; the optimisers are not in it."""
        return {"scaler": self._scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state):
        """Take over what :meth:`state_dict` returned, also on a device of another type of number."""
        self.skipped = state["skipped"]
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])


class _Together:
    """Several optimisers as the one that a GradScaler asks for. KernelMuon's own parameters have no gradients."""

    def __init__(self, parameters, optimizers):
        self.param_groups = [{"params": parameters}]
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()
        return True  # GradScaler returns None if it skips the step

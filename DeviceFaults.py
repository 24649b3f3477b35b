"""A GPU that fails in the middle of a run ends it with one clear line.

with device_faults("The training of cat-50/stable-seed0", checkpoint="models/stable-seed0.pt"):
    ...                                   # lack of memory, a failed launch, a lost device: DeviceFaultError
"""

import contextlib
from pathlib import Path

import torch

# How messages of PyTorch begin, or what they contain, if not the program but the device failed.
MARKS = "CUDA error", "CUDA driver error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL error", "MPS backend", "HIP error"  # fmt: skip

# What messages contain if memory is lacking. cuDNN reports a workspace that it cannot allocate as an engine that it
# cannot find.
LACK_OF_MEMORY = "out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "CUDNN_STATUS_NOT_SUPPORTED.", "unable to find an engine to execute this computation"  # fmt: skip


class DeviceFaultError(RuntimeError, OSError):
    """The device failed or has too little memory. The message says how to go on.

    It is also an OSError, like a disk's errors, because every command catches those and ends with their message.
    """


def first_line(error):
    """The first line of an error's message without the full stop, or the error's kind if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def kind_and_first_line(error):
    """The kind of an error and the first line of its message, with one full stop: ``OSError: No such file.``"""
    kind, line = type(error).__name__, first_line(error)
    return f"{kind}." if line == kind else f"{kind}: {line}."


def lacks_memory(error):
    """Whether an error says that the device or the machine has too little memory.

    accelerate's ``should_reduce_batch_size`` asks the same, but does not know all messages of cuDNN and cuBLAS.

    Parameters
    ----------
    error : Exception

    Returns
    -------
    bool
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in LACK_OF_MEMORY)
    )


def describe_fault(error):
    """One line about the device if it is the cause of an error, else None.

    Parameters
    ----------
    error : Exception

    Returns
    -------
    str or None
    """
    reason = first_line(error)
    if lacks_memory(error):
        return f"The device has too little free memory ({reason}). End other programs that use it."
    if _is_fault(error):
        return (
            f"The device failed ({reason}). If it fails again, look with nvidia-smi whether it is still there "
            "and what else uses it, or choose another device."
        )
    return None


def _is_fault(error):
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)
    )


@contextlib.contextmanager
def device_faults(what, checkpoint=None):
    """Context in which a failing device raises :class:`DeviceFaultError`, which says in one line how to go on.

    Parameters
    ----------
    what : str
        What was interrupted: the first words of the message.
    checkpoint : path, optional
        From which the same command goes on. It is written atomically, so that a fault leaves it as it was.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DeviceFaultError) or (line := describe_fault(error)) is None:
            raise
        how = "Then run the same command again"
        if checkpoint is not None and Path(checkpoint).exists():
            how += f": it goes on from the last checkpoint, {checkpoint}"
        elif checkpoint is not None:
            how += ": it starts again, because there was no checkpoint yet"
        raise DeviceFaultError(f"{what} was broken off. {line} {how}.") from error

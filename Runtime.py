"""The machine a training runs on: its devices, processes and memory, and what a result says about it.

Nothing here knows about CIFAR-10, a generator or a classifier.

    device = choose_device()          # CUDA, else Apple's MPS, else the CPU
    describe_hardware(device)         # {"device": "cpu", "name": "AMD EPYC", "cpu_threads": 2}
"""

import atexit
import datetime
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import psutil
import torch

from DeviceFaults import first_line
from Hardware import cuda_works


def choose_device(name=None):
    """Return a :class:`torch.device`: the one named, else CUDA if it works, else Apple's MPS, else the CPU.

    Parameters
    ----------
    name : str or torch.device, optional
        Such as ``"cpu"``, ``"cuda:1"`` or ``"mps"``.

    Raises
    ------
    ValueError
        If this machine does not have the named device.
    """
    if name is not None:
        try:
            device = torch.device(name)
            if device == torch.device("cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
                # Each process has a GPU of its own; without this, each would also take memory of the first.
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            torch.zeros(1, device=device).item()  # a device that holds no values is none to compute on
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = first_line(error)
            raise ValueError(f"This machine has no device {str(name)!r} for PyTorch: {reason}") from error
        return device
    if cuda_works():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def start_processes(device=None):
    """The processes that ``torchrun`` or ``accelerate launch`` started, or this process alone.

    Parameters
    ----------
    device : str or torch.device, optional
        Where the processes compute. Default: the fastest device, one GPU per process.

    Returns
    -------
    accelerate.PartialState
    """
    from accelerate import PartialState  # imported here because it takes seconds

    # accelerate joins CPU processes only if told to. One process may wait while another computes alone,
    # which can take longer than the default timeout.
    processes = PartialState(cpu=choose_device(device).type == "cpu", timeout=datetime.timedelta(days=7))
    if processes.use_distributed:
        # A process that ends while its threads of communication run is sometimes aborted, after all its work is done.
        atexit.register(processes.destroy_process_group)
    return processes


def decide_in_main_process(decide, processes):
    """Return in every process what ``decide()`` returns in the main one, or raise the error that it raises there.

    Processes that look at a disk by themselves can see it at different moments. One that decides otherwise than the
    others would let them wait for days.

    Parameters
    ----------
    decide : callable
        It takes no argument. Its return value, or its error, must be picklable.
    processes : accelerate.PartialState or None
        All of them must call this function. None is this process alone.
    """
    if processes is None or processes.num_processes == 1:
        return decide()
    from accelerate.utils import broadcast_object_list  # imported here because it takes seconds

    decision, error = None, None
    if processes.is_main_process:
        try:
            decision = decide()
        except Exception as raised:
            error = raised
    decision, error = broadcast_object_list([decision, error])
    if error is not None:
        raise error
    return decision


def agree_on_error(error, processes):
    """Return in every process the error that any of them has, or None if none has one.

    Parameters
    ----------
    error : Exception or None
        Of this process.
    processes : accelerate.PartialState or None
        All of them must call this function. None is this process alone.
    """
    if processes is None or processes.num_processes == 1:
        return error
    from accelerate.utils import gather_object

    return next((each for each in gather_object([error]) if each is not None), None)


class TooLittleMemoryError(MemoryError, ValueError):
    """A request needs more memory than the machine has. It is refused before any work."""


def require_memory(needed, what):
    """Raise :class:`TooLittleMemoryError` if ``needed`` bytes are more than the machine's whole memory.

    Parameters
    ----------
    needed : int
        A lower bound.
    what : str
        What needs them, for the error message, such as ``"100 images"``.
    """
    total = psutil.virtual_memory().total
    if needed > total:
        raise TooLittleMemoryError(
            f"{what} would take at least {needed / 1e9:,.0f} GB of memory, but this machine has "
            f"{total / 1e9:,.0f} GB. Ask for fewer."
        )


# --- What a result says about its origin -------------------------------------------------------


def describe_hardware(device):
    """Name the hardware behind a result.

    The dict has ``device`` (the type of the given torch.device), ``name`` (of the GPU or CPU) and
    ``cpu_threads`` (int).
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
            name = models[0].partition(":")[2].strip() if models else name
    return {"device": device.type, "name": name, "cpu_threads": torch.get_num_threads()}


def hardware_text(hardware):
    """What :func:`describe_hardware` found, for use in a sentence: ``CPU (AMD EPYC, 2 threads)``."""
    threads = f"{hardware['cpu_threads']} {'' if hardware['device'] == 'cpu' else 'CPU '}thread"
    plural = "s" if hardware["cpu_threads"] != 1 else ""
    return f"{hardware['device'].upper()} ({hardware['name']}, {threads}{plural})"


@cache
def code_version():
    """The git commit of this code, ending in ``-dirty`` if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() or None

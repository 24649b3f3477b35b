"""What every training needs around it: devices, seeds, checked arrays, safe files, downloads.

Nothing here knows about CIFAR-10, a generator or a classifier, and nothing here draws a plot.

    device = choose_device()                    # CUDA, else Apple's MPS, else the CPU
    with atomic_path("results/table.txt") as temporary:
        temporary.write_text("all or nothing")
"""

import contextlib
import datetime
import errno
import http.client
import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import threading
import urllib.request
import zlib
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import filelock
import numpy as np
import psutil
import torch

from DeviceFaults import describe_fault, device_faults, first_line
from Hardware import cuda_works

# --- Randomness ---------------------------------------------------------------------------------


@contextlib.contextmanager
def seeded(seed):
    """Run a block under ``torch.manual_seed(seed)``, then restore the caller's CPU generator.

    This is for library code without a ``generator`` argument, such as weight initialisation and
    torchvision's transforms. Code that takes a :class:`torch.Generator` should get one instead.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def derive_seed(*parts):
    """Mix several non-negative integers into one 63-bit seed.

    ``derive_seed(seed, epoch)`` gives every pair its own random stream. ``seed + epoch`` would not: seed 0
    in epoch 1 and seed 1 in epoch 0 would share one.

    Pass the same number of parts each time, each below 2^32; otherwise seeds can collide.

    Parameters
    ----------
    *parts : int
        The result is an int from 0 to 2^63 - 1.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


# --- Arrays and numbers -------------------------------------------------------------------------


class NotFiniteError(FloatingPointError, ValueError):
    """A network, a file or a measure gave NaN or infinity. The message names the cause and the cure."""


def require_finite(values, what, cure):
    """Raise :class:`NotFiniteError` if a number is NaN or infinite.

    A comparison with NaN is always false, and a cast turns NaN into some number. So numbers are checked where
    they leave a network or a file.

    Parameters
    ----------
    values : float, ndarray or tensor, or a dict of tensors such as a state dict
    what : str
        Whose values they are, for the error message.
    cure : str
        What to do, as a whole sentence.
    """
    for part in values.values() if isinstance(values, dict) else [values]:
        numbers = torch.as_tensor(part)
        if not numbers.isfinite().all():
            share = f" ({int((~numbers.isfinite()).sum()):,} of {numbers.numel():,})" if numbers.ndim else ""
            raise NotFiniteError(f"{what}: NaN or infinity{share}. {cure}")


def plain(value):
    """Turn what files cannot hold into plain Python values.

    NumPy scalars become numbers, arrays become lists, paths become strings, dataclasses become dicts. Dicts,
    lists and tuples are searched. Tensors and everything else stay as they are.
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        items = {plain(key): plain(content) for key, content in value.items()}
        # A state dict carries more than its items, so an unchanged one is returned itself.
        same = all(new is old and items[new] is value[old] for new, old in zip(items, value, strict=False))
        return value if same else items
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(plain(content) for content in value)
    return value


def checksum(*arrays):
    """CRC-32 (int) of the contents of several arrays, in the order given."""
    result = 0
    for array in arrays:
        result = zlib.crc32(np.ascontiguousarray(array), result)
    return result


# --- Device, precision, processes ---------------------------------------------------------------


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
            torch.empty(1, device=device)
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
    return PartialState(cpu=choose_device(device).type == "cpu", timeout=datetime.timedelta(days=7))


@contextlib.contextmanager
def deterministic_convolutions():
    """Context in which cuDNN uses only algorithms that sum in the same order in every run."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    # cudnn.flags() would also allow TensorFloat-32 where the user has forbidden it.
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


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


# --- What a result says about its origin --------------------------------------------------------


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


def describe_differences(found, wanted):
    """Say how settings differ, such as ``steps: 6 there, 7 now``; several are joined by ``; ``.

    Parameters
    ----------
    found : dict
        The settings in a file. It may hold more than ``wanted``.
    wanted : dict
        NumPy scalars equal plain numbers: see :func:`plain`.

    The result is empty if ``found`` has every value of ``wanted``.
    """
    found, wanted = plain(found), plain(wanted)
    return "; ".join(f"{k}: {found.get(k)} there, {v} now" for k, v in wanted.items() if found.get(k) != v)


def require_same_settings(path, found, wanted):
    """Refuse a result that was obtained with other settings than the results beside it.

    The ValueError names its path and each setting that differs: see :func:`describe_differences`.
    """
    if differences := describe_differences(found, wanted):
        raise ValueError(f"{path} was obtained with other settings ({differences}). Remove it to run again.")


# --- Files --------------------------------------------------------------------------------------


def user_path(path):
    """``path`` as a :class:`pathlib.Path`; a leading ``~`` is the user's home folder."""
    return Path(os.path.expanduser(path))


def _temporary_beside(path, make_folders=True):
    """The file that writing ``path`` replaces, and a new empty file beside it.

    Without ``make_folders`` the new file is in the nearest folder that exists.
    """
    # A symbolic link is kept, and what it points to is written, also if that does not exist yet.
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = target.parent
        if make_folders:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = next(f for f in (folder, *folder.parents) if os.path.exists(f))
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        # Cut, because a name that just fits would be too long with the additions.
        descriptor, temporary = tempfile.mkstemp(target.suffix, f".{target.stem[:40]}-", folder)
        os.close(descriptor)
    except OSError as error:
        raise OSError(f"Cannot write {path}: {error}. Choose a folder that you may write to.") from error
    return target, Path(temporary)


def require_writable(*paths):
    """Notice before the work that a file cannot be written after it.

    A file is made for a moment, in the nearest folder that exists. Existing files stay as they are, and nothing is left.

    Raises
    ------
    OSError
        If a folder cannot be written to, or one of the ``paths`` is itself a folder.
    """
    for path in paths:
        _, temporary = _temporary_beside(user_path(path), make_folders=False)
        temporary.unlink()


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside ``path`` that is renamed to ``path`` only if the block succeeds.

    After a kill or an error there is either the old file or the new one, never half of one. Missing parent
    folders are created. If ``path`` is a symbolic link, the file that it points to is written. The temporary name
    has the suffix of ``path``, because some writers (matplotlib) choose the format by it.

    Parameters
    ----------
    path : path
        A leading ``~`` is the user's home folder.

    Raises
    ------
    OSError
        If the folder is not writable or the disk is full. No file is left behind.
    """
    path = user_path(path)
    target, temporary = _temporary_beside(path)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent != temporary.parent:
            raise  # about a file that the block reads, which says nothing about writing
        raise OSError(
            f"Could not finish writing {path}: {error}. Nothing was left behind. Free some disk "
            "space or choose another folder, then run again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_process_at_a_time(path, work):
    """Run a block while no other process runs its block for the same ``path``; the others wait.

    The operating system releases the lock of a killed process, so such a process never blocks the next run.

    Parameters
    ----------
    path : path
        What the block makes, a file or a folder. It need not exist. A symbolic link and its target have the same lock.
    work : str
        What is done, for the line that a waiting process prints, such as ``"trains the GAN"``.

    Raises
    ------
    OSError
        If the folder of ``path`` is not writable.
    """
    path = user_path(path)
    target = Path(os.path.realpath(path))
    file = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(file)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"Another process {work}: waiting until {path} is there.", flush=True)
            lock.acquire()
    except OSError as error:
        raise OSError(f"Cannot write {path}: {error}. Choose a folder that you may write to.") from error
    try:
        yield
    finally:
        # Removed while the lock is held. A process that waits for the removed file notices this and starts over.
        # Windows does not remove an open file; filelock does it there.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()


def save_json(path, content):
    """Write ``content`` (see :func:`plain`) as indented JSON, atomically. NaN and infinity raise ValueError."""
    try:
        text = json.dumps(plain(content), indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path} was not written, because JSON cannot hold its content: {error}.") from error
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_array(path, array):
    """Write a NumPy array as a ``.npy`` file under exactly the name ``path``, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def save_torch_file(path, content):
    """Write a dictionary (see :func:`plain`) with ``torch.save``, atomically: see :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        try:
            torch.save(plain(content), temporary)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            if describe_fault(error):
                raise
            raise OSError(first_line(error)) from error


def load_torch_file(path, keys):
    """Read a dictionary that ``torch.save`` wrote, onto the CPU. It is never unpickled as code.

    Parameters
    ----------
    path : path
    keys : set of str
        What the dictionary must contain.

    Raises
    ------
    FileNotFoundError
    OSError
        If the file may not be read.
    ValueError
        If the file is damaged or holds something else.
    """
    path = user_path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}.") from error
    except (PermissionError, IsADirectoryError) as error:
        raise OSError(f"{path} cannot be read: {error.strerror}. Choose a file that you may read.") from error
    except Exception as error:  # torch.load raises many kinds of errors for a damaged file
        raise ValueError(
            f"{path} is damaged or no file of this project ({type(error).__name__}). Choose another file. Remove it and "
            "run again if this project wrote it."
        ) from error
    missing = keys - content.keys() if isinstance(content, dict) else keys
    if missing:
        raise ValueError(
            f"{path} is not the expected kind of file: it lacks {', '.join(sorted(missing))}. "
            "Choose another file. Remove it and run again if this project wrote it."
        )
    return content


class Checkpoint:
    """The file from which a killed training continues.

    Parameters
    ----------
    path : path or None
        With None nothing is ever written or found.
    identity : dict of plain values
        Everything that decides the outcome: settings, seed, a checksum of the data. The checkpoint of
        another training is refused.
    defaults : dict of plain values, optional
        What a checkpoint had whose identity lacks it, because it was written before there was a choice.
    """

    def __init__(self, path, identity, defaults=None):
        self.path = None if path is None else user_path(path)
        self.identity, self.defaults = plain(identity), defaults or {}

    def require_writable(self):
        """Notice before the training that it could not be saved: see :func:`require_writable`."""
        if self.path is not None:
            require_writable(self.path)

    def load(self, *names):
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        *names : str
            What the checkpoint must contain.

        Returns
        -------
        dict or None
            None if there is no checkpoint.

        Raises
        ------
        ValueError
            If the file is damaged or belongs to another training.
        """
        if self.path is None:
            return None
        try:
            content = load_torch_file(self.path, {"identity", *names})
        except FileNotFoundError:  # or another process has just finished this training
            return None
        if differences := describe_differences(self.defaults | content["identity"], self.identity):
            raise ValueError(
                f"The checkpoint {self.path} belongs to another training ({differences}). Remove it to start again."
            )
        return content

    def device_faults(self, what):
        """Context in which a failing device ends ``what`` and says how to go on: see :func:`DeviceFaults.device_faults`."""
        return device_faults(what, self.path)

    def save(self, **content):
        """Write ``content`` (tensors, state dicts, plain values) with the identity, atomically."""
        if self.path is not None:
            save_torch_file(self.path, {"identity": self.identity, **content})


# --- Downloads ----------------------------------------------------------------------------------


def is_reachable(url, seconds=20):
    """Tell whether ``url`` answers within ``seconds``."""
    answers = []
    finished = threading.Event()

    def request():
        with contextlib.suppress(Exception):
            call = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
            with urllib.request.urlopen(call, timeout=seconds):
                answers.append(True)
        finished.set()

    # In a thread, because a name look-up can hang for longer than any socket timeout.
    threading.Thread(target=request, daemon=True).start()
    finished.wait(seconds)
    return bool(answers)


@contextlib.contextmanager
def downloading():
    """Context in which a download raises OSError if the server stalls or breaks off. It affects all threads."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds; PyTorch and torchvision would wait forever
    try:
        yield
    except http.client.HTTPException as error:
        raise OSError(f"the server broke off its answer ({error!r})") from error
    finally:
        socket.setdefaulttimeout(before)


def require_free_space(folder, gigabytes):
    """Raise OSError if the disk of ``folder`` has less than ``gigabytes`` (10^9 bytes) of free space."""
    folder = user_path(folder).absolute()
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < gigabytes:
        raise OSError(f"{existing} has {free:.2f} GB free, but {gigabytes:.2f} GB are needed.")

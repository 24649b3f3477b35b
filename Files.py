"""Files that are whole or not there at all, one process at a time, and downloads.

After a kill or an error there is the old file or the new one, never half of one.

    with atomic_path("results/table.txt") as temporary:
        temporary.write_text("all or nothing")
    save_json("results/run.json", {"seed": 0, "recall": np.float64(0.5)})
"""

import contextlib
import errno
import http.client
import json
import os
import shutil
import socket
import tempfile
import threading
import urllib.request
from dataclasses import fields, is_dataclass
from pathlib import Path

import filelock
import numpy as np

# --- Safe files --------------------------------------------------------------------------------


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


# --- JSON and arrays ---------------------------------------------------------------------------


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


# --- Downloads ---------------------------------------------------------------------------------


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

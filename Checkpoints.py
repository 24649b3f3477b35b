"""Files of PyTorch, and the one from which a killed training continues.

None of them is ever unpickled as code.

    store = Checkpoint("models/checkpoints/run.pt", identity={"steps": 2000, "seed": 0})
    content = store.load("model", "step")    # None at first; another training's is refused
    store.save(model=model.state_dict(), step=100)
"""

import torch

from DeviceFaults import describe_fault, device_faults, first_line
from Files import atomic_path, describe_differences, plain, require_writable, user_path


def save_torch_file(path, content):
    """Write a dictionary (see :func:`Files.plain`) with ``torch.save``, atomically: see :func:`Files.atomic_path`."""
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
        """Notice before the training that it could not be saved: see :func:`Files.require_writable`."""
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

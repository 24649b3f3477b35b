"""Prepares a notebook on Colab, on Kaggle or in an empty folder: packages, data, and where results are kept.

    from NotebookServices import prepare
    prepare()                       # does nothing on a complete machine

The first code cell of each notebook fetches the repository if it is missing, and calls this.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from packaging.requirements import Requirement

from Hardware import find_driver, unusable_gpu

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# The service's own versions of these fit its GPU and its other packages. Whatever is installed, they stay.
KEPT = ("torch", "torchvision", "torchaudio", "numpy")
# Folders in which the data may lie, and how many folders deep.
DATA_PLACES = {"/kaggle/input": 4, "/content/drive/MyDrive": 1, "/content": 1}
CIFAR10, CIFAR10_ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
FATE = {  # of the files that a run writes
    "Kaggle": "Kaggle keeps them if you save a version of the notebook.",
    "Drive": "They stay in your Google Drive, and a later session goes on with them.",
    "Colab": "They are lost when this session ends. To keep them, mount your Google Drive, restart the session "
    "and run this cell again.",
    None: "They stay in this folder.",
}


def prepare(fetched=False):
    """Install what is missing, find CIFAR-10, and say what was done.

    Parameters
    ----------
    fetched : bool, default False
        Whether the repository has just been fetched into the working directory. Without that, and if neither a
        package is missing nor this is a notebook service, nothing is done or said.

    Raises
    ------
    RuntimeError
        If PyTorch is too old, pip fails, or a package that is in use was replaced.
    """
    missing, here = missing_requirements(), service()
    if not (fetched or missing or here):
        return
    folder = Path.cwd()
    if fetched:
        print(f"The repository is in {folder}.")
    if missing:
        install(missing)
        print(f"Installed: {', '.join(map(str, missing))}. PyTorch is still {version('torch')}.")
    print(find_data(DATA_PLACES))
    kept_by = "Drive" if here == "Colab" and "MyDrive" in folder.parts else here
    print(f"Results, plots and weights go to results, images and models in {folder}. {FATE[kept_by]}")
    if here and find_driver() is None:
        print(
            "This session has no NVIDIA GPU, so the profile auto is quick. Choose one in the session's settings."
        )
    elif message := unusable_gpu():
        print(message)


def service():
    """``"Kaggle"``, ``"Colab"``, or None on any other machine."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "Kaggle"
    return "Colab" if "COLAB_RELEASE_TAG" in os.environ else None


def missing_requirements():
    """What ``requirements.txt`` asks for and this environment lacks, or has in another version.

    Returns
    -------
    list of packaging.requirements.Requirement

    Raises
    ------
    RuntimeError
        If PyTorch itself is too old: replacing it could make the service's GPU useless.
    """
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    missing = []
    for requirement in (Requirement(line) for line in lines if line.strip() and not line.startswith("#")):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            missing.append(requirement)
            continue
        # Builds of NVIDIA and others call themselves pre-releases.
        if not requirement.specifier.contains(found, prereleases=True):
            if requirement.name in KEPT:
                raise RuntimeError(
                    f"{requirement} is needed, but this machine has {found}. It is not replaced, because it belongs "
                    "to the service's GPU and its other packages. Choose a newer image in the session's settings."
                )
            missing.append(requirement)
    return missing


def install(requirements):
    """Install packages with pip into the running Python, and leave those of ``KEPT`` as they are.

    Parameters
    ----------
    requirements : list of packaging.requirements.Requirement

    Raises
    ------
    RuntimeError
        If pip fails, or a package that is in use was replaced: then the session must be restarted.
    """
    wanted = {requirement.name for requirement in requirements}
    in_use = wanted & _packages_in_use()
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("".join(f"{name}=={found}\n" for name, found in _installed(KEPT).items()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                   "--constraint", str(constraints), *map(str, requirements)]  # fmt: skip
        answer = subprocess.run(command, capture_output=True, text=True)
    names = ", ".join(sorted(wanted))
    if answer.returncode:
        errors = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"exit code {answer.returncode}"
        raise RuntimeError(
            f"pip could not install {names} ({reason}). Switch on the internet in the session's settings, or install "
            "them yourself, then run this cell again."
        )
    importlib.invalidate_caches()
    if in_use:
        raise RuntimeError(
            f"{', '.join(sorted(in_use))} had to be replaced and is in use. Restart the session, then run again."
        )


def _installed(names):
    """Name -> version of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _packages_in_use():
    """Names of the packages of which a module has been imported."""
    return {
        name for module, names in packages_distributions().items() if module in sys.modules for name in names
    }


def find_data(places):
    """Let ``$CIFAR10_ROOT`` name a folder that has CIFAR-10, and return a sentence about it.

    Parameters
    ----------
    places : dict
        Folder -> how many folders deep CIFAR-10 may lie in it.
    """
    if root := os.environ.get("CIFAR10_ROOT"):
        return f"CIFAR-10 is read from {root}, as CIFAR10_ROOT says."
    datasets = Path("datasets")
    if not any((datasets / name).exists() for name in (CIFAR10, CIFAR10_ARCHIVE)):
        for name in (CIFAR10, CIFAR10_ARCHIVE):
            for place, depth in places.items():
                if found := _find(name, Path(place), depth):
                    return _use(found)
        return f"CIFAR-10 will be downloaded into {datasets.absolute()}."
    return f"CIFAR-10 is read from {datasets.absolute()}."


def _find(name, place, depth):
    patterns = ["/".join(["*"] * level + [name]) for level in range(depth + 1)]
    return next((path for pattern in patterns for path in sorted(place.glob(pattern))), None)


def _use(found):
    if found.name == CIFAR10:
        os.environ["CIFAR10_ROOT"] = str(found.parent)
        return f"CIFAR-10 is read from {found.parent}."
    # The archive's folder may be read-only, so it is unpacked beside a link.
    Path("datasets").mkdir(exist_ok=True)
    link = Path("datasets", found.name)
    link.unlink(missing_ok=True)  # of an earlier session, whose archive is gone
    link.symlink_to(found)
    return f"CIFAR-10 is unpacked from {found} into {Path('datasets').absolute()}."

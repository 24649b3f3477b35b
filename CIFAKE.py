"""CIFAKE: 50,000 ready images made with Stable Diffusion v1.4, for users who generate none themselves.

    import_cifake("cifake.zip")     # fills datasets/stable_diffusion_dataset.npy, once

References
----------
Bird and Lotfi (2024), CIFAKE: Image classification and explainable identification of AI-generated
synthetic images, IEEE Access (MIT licence).
"""

import hashlib
import io
import re
import tempfile
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from Files import downloading, is_reachable, require_free_space, user_path
from ImageCache import CACHE, check_cache_path, save_generated_images
from ImbalancedCIFAR10 import CIFAR10_CLASSES, DataUnavailableError, default_root

IMAGES_PER_CLASS = 5000
CIFAKE_URL = (
    "https://www.kaggle.com/api/v1/datasets/download/birdy654/cifake-real-and-ai-generated-synthetic-images"
)
# A copy of CIFAKE's training half, for when Kaggle does not answer. Address and checksum name one fixed version.
MIRROR_URL = (
    "https://huggingface.co/datasets/yanbax/CIFAKE_autotrain_compatible/resolve/"
    "f67ae8dedee6bb83e7523f6ce3b715a12147a200/train.zip"
)
MIRROR_SHA256 = "b3ee275f61a1801fb53a8fc4e965fd49823df47c02dc0162a3b9400f843631a0"
# "17.jpg" is airplane, "17 (2).jpg" automobile, ... "17 (10).jpg" truck: CIFAR-10's class order.
CIFAKE_FILE_NAME = re.compile(r"(\d+)(?: \((2|3|4|5|6|7|8|9|10)\))?\.jpg")
LARGEST_FILE = 65_536  # bytes; CIFAKE's largest image has 1,187
# What file managers of macOS and Windows leave in folders and archives. Hidden files are ignored too.
DESKTOP_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}


def import_cifake(source=None, path=CACHE, images_per_class=None):
    """Fill the cache with CIFAKE's Stable Diffusion v1.4 images of each class of CIFAR-10.

    Only ``train/FAKE`` is read. CIFAKE's ``REAL`` folders hold CIFAR-10 itself, including the images that
    an imbalanced split removed. Importing them would be a leak.

    Parameters
    ----------
    source : path, optional
        A folder that contains ``train/FAKE``, or a zip of one. ``~`` is the home folder. Default:
        ``cifake.zip`` in ``$CIFAR10_ROOT`` or ``datasets``. If neither folder has one, an archive is downloaded
        (about 110 MB) and removed after use: from Kaggle, or from a mirror if this fails.
    path : path
        The cache to write.
    images_per_class : int, optional
        The first so many images of each class are imported. Default: all 5,000. Of a downloaded archive, all are.

    Returns
    -------
    int
        Number of images written.

    Raises
    ------
    FileNotFoundError, ValueError
        If the source is missing, truncated or encrypted, has foreign files in ``train/FAKE``, has an image of
        another size, or has too few images of a class. No cache is written then.
    DataUnavailableError
        If there is no source and no archive can be downloaded.
    OSError
        If the cache cannot be written, or the disk is too full for the download.
    """
    check_cache_path(path)
    images, labels = read_cifake(source, images_per_class) if source else fetch_cifake(images_per_class)
    save_generated_images(images, labels, path)
    return len(images)


def fetch_cifake(images_per_class=None):
    """Images and labels of the ``cifake.zip`` that is here, or of a download: see :func:`import_cifake`."""
    source = local_cifake()
    return _read_download() if source is None else read_cifake(source, images_per_class)


def local_cifake():
    """Path of the first ``cifake.zip`` in ``$CIFAR10_ROOT`` and ``datasets``, or None."""
    return next((f for f in (default_root() / "cifake.zip", Path("datasets/cifake.zip")) if f.exists()), None)


def read_cifake(source, images_per_class=None):
    """Read images and labels, class after class; see :func:`import_cifake`, also for the errors.

    Returns
    -------
    images : ndarray of uint8, shape (n, 32, 32, 3)
    labels : ndarray of int64, shape (n,)
    """
    source = user_path(source)
    if images_per_class is not None and not 1 <= images_per_class <= IMAGES_PER_CLASS:
        raise ValueError(
            f"images_per_class must be a number from 1 to {IMAGES_PER_CLASS:,}, or None for all: got {images_per_class}."
        )
    if not source.exists():
        raise FileNotFoundError(f"There is no {source}. Pass the path of CIFAKE's folder or zip.")
    read = _read_folder if source.is_dir() else _read_zip
    images, labels = read(source, images_per_class)
    return np.stack(images), np.asarray(labels)


def _read_folder(source, images_per_class):
    """Images (list of arrays) and labels (list of int) of an unpacked CIFAKE."""
    files = [f for f in (source / "train" / "FAKE").glob("*") if f.is_file() and not _is_desktop_file(f.name)]
    readers = {f.name: (f.stat().st_size, partial(open, f, "rb")) for f in files}
    return _read_images(source, readers, images_per_class)


def _read_zip(source, images_per_class):
    """The same from a zip, which is not unpacked."""
    try:
        archive = zipfile.ZipFile(source)
    except OSError:
        raise
    except Exception as error:  # BadZipFile, and others for a damaged list of contents
        raise ValueError(
            f"{source} is truncated, damaged or no zip archive ({error}). Get it again."
        ) from error
    with archive:
        return _read_images(source, _find_members(source, archive), images_per_class)


def _find_members(source, archive):
    """Name -> size and a function that opens it, of each image in ``train/FAKE``.

    The archive may have a folder above ``train``. If it has no ``train``, ``FAKE`` itself is taken.
    """
    found = {"train/FAKE": {}, "FAKE": {}}
    for member in archive.infolist():
        folder, _, name = member.filename.replace("\\", "/").rpartition("/")
        kind = next((k for k in found if f"/{folder}".endswith(f"/{k}")), None)
        parts = folder.split("/")
        if (
            not name
            or _is_desktop_file(name)
            or kind is None
            or "__MACOSX" in parts
            or (kind == "FAKE" and "test" in parts)
        ):
            continue
        if name in found[kind]:
            raise ValueError(f"{source} has the file {name!r} twice, in {folder} too. Get it again.")
        if member.flag_bits & 1:
            raise ValueError(f"{name} in {source} is encrypted. Get the archive without a password.")
        found[kind][name] = member.file_size, partial(archive.open, member)
    return found["train/FAKE"] or found["FAKE"]


def _read_images(source, readers, images_per_class):
    """Images and labels, class after class; ``readers`` maps a file's name to its size and what opens it."""
    chosen = _choose(source, readers, images_per_class)
    images = [
        _decode(source, name, *readers[name])
        for name in tqdm(chosen, desc="reading CIFAKE", unit="image", mininterval=2)
    ]
    return images, [_cifake_class(name) for name in chosen]


def _cifake_class(name):
    return int(CIFAKE_FILE_NAME.fullmatch(name)[2] or 1) - 1


def _choose(source, names, images_per_class):
    """Names of the first files of each class by number, class after class."""
    foreign = sorted(n for n in names if not CIFAKE_FILE_NAME.fullmatch(n))
    if foreign:
        raise ValueError(
            f"{source} has {len(foreign)} files in train/FAKE that CIFAKE does not have, such as "
            f"{foreign[0]!r}. Expected names like '17.jpg' or '17 (4).jpg'."
        )
    chosen = []
    for c, class_name in enumerate(CIFAR10_CLASSES):
        of_class = sorted(
            (n for n in names if _cifake_class(n) == c), key=lambda n: int(CIFAKE_FILE_NAME.fullmatch(n)[1])
        )
        if len(of_class) < IMAGES_PER_CLASS:
            raise ValueError(
                f"{source} has {len(of_class)} images of class {class_name} in train/FAKE, but "
                f"{IMAGES_PER_CLASS} are needed. Get it again."
            )
        chosen += of_class[: images_per_class or IMAGES_PER_CLASS]
    return chosen


def _is_desktop_file(name):
    return name.startswith(".") or name.lower() in DESKTOP_FILES


def _decode(source, name, size, open_file):
    """Read one image. Sizes are checked before anything large is read or decoded."""
    try:
        if size <= LARGEST_FILE:
            with open_file() as file:
                content = file.read(LARGEST_FILE + 1)
            size = len(content)
        if size > LARGEST_FILE:
            raise ValueError(
                f"it has {size:,} bytes or more, but CIFAKE's images have fewer than {LARGEST_FILE:,}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked here
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
                width, height = image.size
                if (width, height) != (32, 32):
                    raise ValueError(f"it has {width}x{height} pixels, but CIFAKE's images have 32x32")
                return np.asarray(image.convert("RGB"))
    except Exception as error:  # zipfile, its decompressors and Pillow raise many kinds for damaged files
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{name} in {source} is damaged or no image of CIFAKE: {reason}. Get it again."
        ) from error


# --- Download -----------------------------------------------------------------------------------


def _read_download():
    """Download an archive from the first source that sends CIFAKE, and read all its images."""
    failures = []
    for url, sha256 in ((CIFAKE_URL, None), (MIRROR_URL, MIRROR_SHA256)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                return read_cifake(_download(url, sha256, Path(folder)))
            except DataUnavailableError as error:
                failures.append(str(error))
            except ValueError as error:
                failures.append(f"What {url} sent is not CIFAKE: {error}")
    raise DataUnavailableError(
        f"There is no cifake.zip in {default_root()} or datasets, and none could be downloaded. "
        + " ".join(failures)
        + " Download CIFAKE by hand, put it there as cifake.zip, and run again."
    )


def _download(url, sha256, folder):
    if not is_reachable(url):
        raise DataUnavailableError(f"{url} does not answer.")
    require_free_space(folder, gigabytes=0.3)
    archive = folder / "cifake.zip"
    try:
        with downloading():
            torch.hub.download_url_to_file(url, str(archive), progress=True)
    except OSError as error:
        raise DataUnavailableError(f"The download from {url} failed: {error}.") from error
    if sha256 is not None and hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        raise DataUnavailableError(f"What {url} sent is not CIFAKE: its checksum is wrong.")
    return archive

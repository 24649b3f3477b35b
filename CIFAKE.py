"""CIFAKE: 50,000 ready images made with Stable Diffusion v1.4, for users who generate none themselves.

    import_cifake("cifake.zip")     # fills datasets/stable_diffusion_dataset.npy, once

References
----------
Bird and Lotfi (2024), CIFAKE: Image classification and explainable identification of AI-generated
synthetic images, IEEE Access (MIT licence).
"""

import http.client
import io
import re
import socket
import tempfile
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ImageCache import CACHE, save_generated_images
from ImbalancedCIFAR10 import CIFAR10_CLASSES, DataUnavailableError, default_root
from Runtime import is_reachable, require_free_space

IMAGES_PER_CLASS = 5000
CIFAKE_URL = (
    "https://www.kaggle.com/api/v1/datasets/download/birdy654/cifake-real-and-ai-generated-synthetic-images"
)
# "17.jpg" is airplane, "17 (2).jpg" automobile, ... "17 (10).jpg" truck: CIFAR-10's class order.
CIFAKE_FILE_NAME = re.compile(r"(\d+)(?: \((2|3|4|5|6|7|8|9|10)\))?\.jpg")


def import_cifake(source=None, path=CACHE):
    """Fill the cache with CIFAKE's Stable Diffusion v1.4 images, 5,000 of each class of CIFAR-10.

    Only ``train/FAKE`` is read. CIFAKE's ``REAL`` folders hold CIFAR-10 itself, including the images that
    an imbalanced split removed. Importing them would be a leak.

    Parameters
    ----------
    source : path, optional
        A folder that contains ``train/FAKE``, or a zip of one. Default: ``cifake.zip`` in
        ``$CIFAR10_ROOT`` or ``datasets``. If neither folder has one, the public archive is downloaded
        (about 110 MB) and removed after use.
    path : path
        The cache to write.

    Returns
    -------
    int
        Number of images written.

    Raises
    ------
    FileNotFoundError, ValueError
        If the source is missing or truncated, has foreign files in ``train/FAKE``, has an image of another
        size, or has too few images of a class. No cache is written then.
    DataUnavailableError
        If there is no source and the archive cannot be downloaded.
    """
    if source is None:
        source = next(
            (f for f in (default_root() / "cifake.zip", Path("datasets/cifake.zip")) if f.exists()), None
        )
    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            archive = _download_cifake(Path(folder))
            try:
                return import_cifake(archive, path)
            except ValueError as error:
                raise DataUnavailableError(f"What {CIFAKE_URL} sent is not CIFAKE: {error}") from error
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"There is no {source}. Pass the path of CIFAKE's folder or zip.")
    images, labels = _read_folder(source) if source.is_dir() else _read_zip(source)
    save_generated_images(np.stack(images), np.asarray(labels), path)
    return len(images)


def _read_folder(source):
    """Images (list of arrays) and labels (list of int) of an unpacked CIFAKE."""
    readers = {f.name: f.read_bytes for f in (source / "train" / "FAKE").glob("*") if f.is_file()}
    return _read_images(source, readers)


def _read_zip(source):
    """The same from a zip, which is not unpacked."""
    try:
        with zipfile.ZipFile(source) as archive:
            # The archive may have a folder above "train".
            members = [n for n in archive.namelist() if re.search(r"(^|/)train/FAKE/[^/]+$", n)]
            return _read_images(source, {n.rpartition("/")[2]: partial(archive.read, n) for n in members})
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise ValueError(
            f"{source} is truncated, damaged or no zip archive ({error}). Get it again."
        ) from error


def _read_images(source, readers):
    """Images and labels, class after class; ``readers`` maps a file's name to a function that reads it."""
    chosen = _choose(source, readers)
    images = [
        _decode(source, name, readers[name])
        for name in tqdm(chosen, desc="reading CIFAKE", unit="image", mininterval=2)
    ]
    return images, [_cifake_class(name) for name in chosen]


def _cifake_class(name):
    return int(CIFAKE_FILE_NAME.fullmatch(name)[2] or 1) - 1


def _choose(source, names):
    """Names of the first :data:`IMAGES_PER_CLASS` files of each class by number, class after class."""
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
        chosen += of_class[:IMAGES_PER_CLASS]
    return chosen


def _decode(source, name, read):
    try:
        with Image.open(io.BytesIO(read())) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{name} in {source} is damaged: {error}") from error
    if pixels.shape != (32, 32, 3):
        height, width = pixels.shape[:2]
        raise ValueError(f"{name} in {source} has {width}x{height} pixels, but CIFAKE's images have 32x32.")
    return pixels


def _download_cifake(folder):
    if not is_reachable(CIFAKE_URL):
        raise DataUnavailableError(
            f"There is no cifake.zip in {default_root()} or datasets, and {CIFAKE_URL} does not answer. "
            "Download CIFAKE by hand, put it there as cifake.zip, and run again."
        )
    require_free_space(folder, gigabytes=0.3)
    archive = folder / "cifake.zip"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)
    try:
        torch.hub.download_url_to_file(CIFAKE_URL, str(archive), progress=True)
    except (OSError, http.client.HTTPException) as error:
        raise DataUnavailableError(
            f"The download of CIFAKE from {CIFAKE_URL} failed: {error}. Run again."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return archive

"""CIFAKE: 50,000 ready images made with Stable Diffusion v1.4, for those who generate none themselves.

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
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ImbalancedCIFAR10 import CIFAR10_CLASSES, DataUnavailableError, default_root
from Runtime import is_reachable, require_free_space
from StableDiffusionGeneration import CACHE, save_generated_images

CIFAKE_URL = (
    "https://www.kaggle.com/api/v1/datasets/download/birdy654/cifake-real-and-ai-generated-synthetic-images"
)
# "17.jpg" is airplane, "17 (2).jpg" automobile, ... "17 (10).jpg" truck: CIFAR-10's class order.
CIFAKE_FILE_NAME = re.compile(r"(\d+)(?: \((2|3|4|5|6|7|8|9|10)\))?\.jpg")


def import_cifake(source=None, path=CACHE, images_per_class=5000):
    """Fill the cache with CIFAKE's Stable Diffusion v1.4 images.

    Only ``train/FAKE`` is read. CIFAKE's ``REAL`` folders hold CIFAR-10 itself, with the images that
    an imbalanced split removed: importing them would be a leak.

    Parameters
    ----------
    source : path, optional
        A folder that contains ``train/FAKE``, or a zip of one. Default: ``cifake.zip`` in
        ``$CIFAR10_ROOT`` or ``datasets`` if there is one, else the public archive is downloaded
        (about 110 MB) and removed after use.
    path : path
        Where the cache goes.
    images_per_class : int, default 5000
        How many images each of the ten classes must have; the first ones by number are taken.

    Returns
    -------
    int
        Number of images written.

    Raises
    ------
    FileNotFoundError, ValueError
        If the source is missing, truncated, has foreign files in ``train/FAKE``, an image of another
        size or too few images of a class. No cache is written then.
    DataUnavailableError
        If there is no source and the archive cannot be downloaded.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be at least 1: got {images_per_class}.")
    if source is None:
        source = next(
            (f for f in (default_root() / "cifake.zip", Path("datasets/cifake.zip")) if f.exists()), None
        )
    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            archive = _download_cifake(Path(folder))
            try:
                return import_cifake(archive, path, images_per_class)
            except ValueError as error:
                raise DataUnavailableError(f"What {CIFAKE_URL} sent is not CIFAKE: {error}") from error
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"There is no {source}: give CIFAKE's folder or zip.")
    if source.is_dir():
        members = {f.name: f.read_bytes for f in (source / "train" / "FAKE").glob("*") if f.is_file()}
        chosen = _choose(source, members, images_per_class)
        images = [
            _decode(source, name, members[name])
            for name in tqdm(chosen, desc="reading CIFAKE", unit="image", mininterval=2)
        ]
    else:
        try:
            with zipfile.ZipFile(source) as archive:
                # The archive may have a folder above "train".
                names = {
                    n.rpartition("/")[2]: n for n in archive.namelist()
                    if re.search(r"(^|/)train/FAKE/[^/]+$", n)
                }  # fmt: skip
                chosen = _choose(source, names, images_per_class)
                images = [
                    _decode(source, name, lambda name=name: archive.read(names[name]))
                    for name in tqdm(chosen, desc="reading CIFAKE", unit="image", mininterval=2)
                ]
        except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
            raise ValueError(
                f"{source} is truncated, damaged or no zip archive ({error}). Get it again."
            ) from error
    labels = [_cifake_class(name) for name in chosen]
    save_generated_images(np.stack(images), np.asarray(labels), path)
    return len(images)


def _cifake_class(name):
    return int(CIFAKE_FILE_NAME.fullmatch(name)[2] or 1) - 1


def _choose(source, names, images_per_class):
    """Names of the first ``images_per_class`` files of each class, class after class."""
    foreign = sorted(n for n in names if not CIFAKE_FILE_NAME.fullmatch(n))
    if foreign:
        raise ValueError(
            f"{source} has {len(foreign)} files in train/FAKE that CIFAKE does not have, such as "
            f"{foreign[0]!r}: expected names like '17.jpg' or '17 (4).jpg'."
        )
    chosen = []
    for c, class_name in enumerate(CIFAR10_CLASSES):
        of_class = sorted(
            (n for n in names if _cifake_class(n) == c), key=lambda n: int(CIFAKE_FILE_NAME.fullmatch(n)[1])
        )
        if len(of_class) < images_per_class:
            raise ValueError(
                f"{source} has {len(of_class)} images of class {class_name} in train/FAKE, but "
                f"{images_per_class} are asked for."
            )
        chosen += of_class[:images_per_class]
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

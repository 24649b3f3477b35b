"""The cache: one file of generated images with their classes, and a table that says how each image was made.

    images, labels = load_generated_images()     # reads datasets/stable_diffusion_dataset.npy
    print(describe_cache())                      # such as "50,000 images imported"

The file is a NumPy array of records. Each record is an image and its class number. It holds no pickled object
and can be memory-mapped. The table has the same name with the suffix ``.csv`` and one row per generated
image: prompt, seed, model and settings. Imported images have no table.
"""

import csv
import tokenize
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from Runtime import atomic_path, check_images, checksum, save_array

CACHE = Path("datasets/stable_diffusion_dataset.npy")
RECORD = np.dtype([("image", np.uint8, (32, 32, 3)), ("label", np.int64)])
METADATA = (
    "class", "label", "index", "prompt", "seed", "model", "preset", "steps", "guidance_scale", "lora",
    "source", "strength", "clip_margin", "job", "crc32",
)  # fmt: skip


def save_generated_images(images, labels, path=CACHE, metadata=None):
    """Write generated images with their classes, atomically.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, 32, 32, 3)
    labels : ndarray of int, shape (n,)
        Class numbers.
    path : path
        The cache to write. An existing file is replaced.
    metadata : list of dict, optional
        How each image was made, by the names in :data:`METADATA` (``crc32`` is added here). A generated image
        needs at least its ``label``, ``model`` and ``preset``. The rows are written beside ``path`` as
        ``.csv``. Without metadata an existing table is removed, because it describes other images.

    Raises
    ------
    TypeError, ValueError
        If an array has another dtype or shape. Nothing is converted silently.
    OSError
        If the folder is not writable or the disk is full.
    """
    images, labels = check_images(images, labels)
    if images.shape[1:] != RECORD["image"].shape:
        raise ValueError(f"The cache holds images of 32x32 pixels, but these have the shape {images.shape}.")
    records = np.empty(len(images), dtype=RECORD)
    records["image"], records["label"] = images, labels
    if metadata is None:
        _table_path(path).unlink(missing_ok=True)
    else:
        with (
            atomic_path(_table_path(path)) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, METADATA, restval="", lineterminator="\n")
            writer.writeheader()
            for image, row in zip(images, metadata, strict=True):
                writer.writerow(row | {"crc32": checksum(image)})
    save_array(path, records)


def load_generated_images(path=CACHE):
    """Read the images that :func:`save_generated_images` wrote.

    Parameters
    ----------
    path : path
        The cache to read.

    Returns
    -------
    images : ndarray of uint8, shape (n, 32, 32, 3)
    labels : ndarray of int64, shape (n,)
        Class numbers.

    Raises
    ------
    FileNotFoundError
    ValueError
        If the file is truncated, holds another dtype, or asks for pickle.
    """
    records = _open_cache(path)
    return records["image"].copy(), records["label"].copy()


def load_metadata(path=CACHE):
    """Read how each image of a cache was made.

    Parameters
    ----------
    path : path
        The cache, not its table.

    Returns
    -------
    list of dict
        One per image, in the cache's order, by the names in :data:`METADATA`. All values are text. A value is
        empty if nothing is known, as for imported images.

    Raises
    ------
    FileNotFoundError, ValueError
        See :func:`load_generated_images`.
    """
    records = _open_cache(path)
    table = _table_path(path)
    if not table.exists():
        return [dict.fromkeys(METADATA, "") for _ in range(len(records))]
    with open(table, newline="", encoding="utf-8") as file:
        known = {(row["label"], row["crc32"]): row for row in csv.DictReader(file)}
    # Rows are found by the image's own checksum. A kill between writing the two files can leave the table of
    # other images, and none of its rows may be given to an image that it does not describe.
    keys = [(str(record["label"]), str(checksum(record["image"]))) for record in records]
    return [known.get(key, dict.fromkeys(METADATA, "")) for key in keys]


def describe_cache(path=CACHE):
    """Say in one line where the images of a cache come from, such as ``50,000 images imported``.

    Parameters
    ----------
    path : path

    Returns
    -------
    str
    """
    origins = Counter(
        f"by the preset {row['preset']} of {row['model']}" if row["model"] else "imported"
        for row in load_metadata(path)
    )
    return ", ".join(f"{count:,} images {origin}" for origin, count in origins.items())


def count_foreign_images(label, job, path=CACHE):
    """Count the images of a class that were imported or that another job generated.

    Parameters
    ----------
    label : int
        Class number.
    job : str
        Name of the job whose images do not count, see :func:`CandidateImages.name_job`.
    path : path
        The cache. It need not exist.

    Returns
    -------
    int
        0 if there is no cache.
    """
    if not Path(path).exists():
        return 0
    labels = _open_cache(path)["label"].tolist()
    metadata = load_metadata(path)
    return sum(c == label and row["job"] != job for c, row in zip(labels, metadata, strict=True))


def replace_class(label, images, metadata, path=CACHE):
    """Replace the images of one class in a cache. Images of other classes stay. The cache is made if missing.

    Parameters
    ----------
    label : int
        Class number.
    images : ndarray of uint8, shape (n, 32, 32, 3)
        All images that the cache shall hold of the class.
    metadata : list of dict, length n
        How each image was made, see :func:`save_generated_images`.
    path : path
    """
    labels = np.full(len(images), label, dtype=np.int64)
    if Path(path).exists():
        old_images, old_labels = load_generated_images(path)
        old_metadata = load_metadata(path)
        kept = np.flatnonzero(old_labels != label)
        images = np.concatenate([old_images[kept], images])
        labels = np.concatenate([old_labels[kept], labels])
        metadata = [old_metadata[row] for row in kept] + metadata
    order = np.argsort(labels, kind="stable")
    save_generated_images(images[order], labels[order], path, [metadata[row] for row in order])


def _table_path(path):
    return Path(path).with_suffix(".csv")


def _open_cache(path):
    """Check a cache and return its records. They are mapped into memory and read only when they are used."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}. Make it with import_cifake(), generate_images() or save_generated_images()."
        )
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, tokenize.TokenError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is truncated, damaged, or no plain NumPy array ({error}). Remove it and make it again."
        ) from error
    if not isinstance(records, np.ndarray) or records.dtype != RECORD or records.ndim != 1:
        found = getattr(records, "dtype", type(records).__name__)
        raise ValueError(
            f"{path} must hold one record of {RECORD} for each image, but it holds {found}. "
            "Remove it and make it again."
        )
    return records

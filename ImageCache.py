"""The cache: one file of generated images with their classes, and a table that says how each image was made.

    images, labels = load_generated_images()     # reads datasets/stable_diffusion_dataset.npy
    print(describe_cache())                      # such as "50,000 images imported"

The file is a NumPy array of records. Each record is an image and its class number. It holds no pickled object
and can be memory-mapped. The table has the same name with the suffix ``.csv`` and one row per generated
image: prompt, seed, model and settings. Imported images have no table. If the cache is a symbolic link, the table
lies beside the file that it points to, so that every link to a file shows the same table.

Several processes may write one cache: each waits until the others have finished. ``~`` in a path is the home
folder.
"""

import csv
import hashlib
import io
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from Checks import check_images
from Files import atomic_path, one_process_at_a_time, require_writable, save_array, user_path
from Repeatability import checksum

CACHE = Path("datasets/stable_diffusion_dataset.npy")
METADATA = (
    "class", "label", "index", "prompt", "seed", "model", "preset", "steps", "guidance_scale", "lora",
    "source", "strength", "real_images", "clip_margin", "job", "crc32",
)  # fmt: skip


def record_type(height, width):
    """The dtype of a cache's records: an image of so many pixels, uint8, and its class number, int64."""
    return np.dtype([("image", np.uint8, (height, width, 3)), ("label", np.int64)])


def fingerprint(images):
    """SHA-256 (str of hexadecimal digits) of a set of images, an array of uint8."""
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


# --- The cache ----------------------------------------------------------------------------------


def check_cache_path(path):
    """Refuse the name of a cache that cannot be written, or that would overwrite another file.

    Nothing is created. This can be called before hours of work.

    Parameters
    ----------
    path : path

    Raises
    ------
    ValueError
        If ``path`` is a folder, has the name of its own table, or would replace a table that is not its own.
    OSError
        If its folder is not writable.
    """
    path = user_path(path)
    if path.is_dir() or not path.name:
        raise ValueError(f"{path} is a folder. Give the cache a file name, such as {path / CACHE.name}.")
    for name in (path, _target(path)):
        if name.suffix.lower() == ".csv":
            raise ValueError(
                f"{name} is the name of the cache's own table, which would replace the images. Choose another "
                f"name, such as {name.with_suffix('.npy')}."
            )
    table = _table_path(path)
    if table.exists():
        if _read_table(table) is None:
            raise ValueError(
                f"Writing {path} would replace {table}, which is no table of a cache. Choose another name, or move it."
            )
        for other in () if path.exists() else table.parent.iterdir():
            if other.with_suffix(".csv") == table and _is_array_file(other):
                raise ValueError(
                    f"{path} and {other} would share the table {table}. Choose another name for the cache."
                )
    require_writable(path)


def save_generated_images(images, labels, path=CACHE, metadata=None):
    """Write generated images with their classes, atomically.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, height, width, 3)
    labels : ndarray of int, shape (n,)
        Class numbers.
    path : path
        The cache to write, under exactly this name. An existing cache is replaced.
    metadata : list of dict, optional
        How each image was made, by the names in :data:`METADATA` (``crc32`` is added here). A generated image
        needs at least its ``label``, ``model`` and ``preset``. The rows are written beside the file as
        ``.csv``. Without metadata an existing table is removed, because it describes other images.

    Raises
    ------
    TypeError, ValueError
        If an array has another dtype or shape. Nothing is converted silently. See also
        :func:`check_cache_path`.
    OSError
        If the folder is not writable or the disk is full.
    """
    records = _make_records(images, labels)
    check_cache_path(path)
    if metadata is not None:
        metadata = _check_metadata(metadata, len(records))
    with one_process_at_a_time(path, "writes this cache"):
        _write(records, user_path(path), metadata)


def _check_metadata(metadata, count):
    """Return the rows as a list if they are as :func:`save_generated_images` describes, else raise ValueError."""
    metadata = list(metadata)
    if len(metadata) != count:
        raise ValueError(
            f"metadata must have an entry for each of the {count:,} images: got {len(metadata):,}."
        )
    if unknown := sorted(set().union(*metadata) - set(METADATA)):
        raise ValueError(
            f"Unknown names in metadata: {', '.join(map(str, unknown))}. Choose among {', '.join(METADATA)}."
        )
    return metadata


def _make_records(images, labels):
    images, labels = check_images(images, labels)
    if (labels < 0).any():
        raise ValueError(f"The labels must be class numbers, 0 or more: got {labels.min()}.")
    records = np.empty(len(images), dtype=record_type(*images.shape[1:3]))
    records["image"], records["label"] = images, labels
    return records


def _write(records, path, metadata):
    """Write a cache and its table. The caller holds the lock.

    The table is replaced only after the images are on the disk, so that a full disk costs neither of the old ones.
    """
    target = _target(path)  # a symbolic link stays
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        save_array(unfinished, records)
        if metadata is not None:
            _write_table(records, _table_path(path), metadata)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    if metadata is None:
        _table_path(path).unlink(missing_ok=True)


def _write_table(records, table, metadata):
    with atomic_path(table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, METADATA, restval="", lineterminator="\n")
        writer.writeheader()
        for image, row in zip(records["image"], metadata, strict=True):
            writer.writerow(row | {"crc32": checksum(image)})


def load_generated_images(path=CACHE):
    """Read the images that :func:`save_generated_images` wrote.

    Parameters
    ----------
    path : path
        The cache to read.

    Returns
    -------
    images : ndarray of uint8, shape (n, height, width, 3)
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
        See :func:`load_generated_images`. Also if the table is damaged or another program has saved it.
    """
    records = _open_cache(path)
    table = _table_path(user_path(path))
    if not table.exists():
        return [dict.fromkeys(METADATA, "") for _ in range(len(records))]
    rows = _read_table(table)
    if rows is None:
        raise ValueError(
            f"{table} is no table of a cache: its first line lacks the columns label and crc32. Restore it, or "
            "move it away. Without a table the images count as imported."
        )
    known = {(row["label"], row["crc32"]): row for row in rows}
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


def cache_checksum(path=CACHE):
    """CRC-32 (int) of all images and classes of a cache."""
    return checksum(_open_cache(path))


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
    if not user_path(path).exists():
        return 0
    labels = _open_cache(path)["label"].tolist()
    metadata = load_metadata(path)
    return sum(c == label and row["job"] != job for c, row in zip(labels, metadata, strict=True))


def replace_class(label, images, metadata, path=CACHE, *, job=None):
    """Replace the images of one class in a cache. Images of other classes stay. The cache is made if missing.

    Parameters
    ----------
    label : int
        Class number.
    images : ndarray of uint8, shape (n, height, width, 3)
        All images that the cache shall hold of the class.
    metadata : list of dict, length n
        How each image was made, see :func:`save_generated_images`.
    path : path
    job : str, optional
        If given, only images that this job generated may be replaced.

    Raises
    ------
    ValueError
        If the class has images from elsewhere that must not be replaced, or the cache holds images of another size. See
        also :func:`save_generated_images`.
    """
    new = _make_records(images, np.full(len(images), label, dtype=np.int64))
    check_cache_path(path)
    metadata = _check_metadata(metadata, len(images))
    path = user_path(path)
    # From reading to writing, or what another process adds meanwhile would be lost.
    with one_process_at_a_time(path, "writes this cache"):
        if job is not None:
            refuse_foreign_images(metadata[0]["class"], label, job, path)
        refuse_other_sizes(*new["image"].shape[1:3], path)
        if path.exists():
            old = _open_cache(path)
            kept = np.flatnonzero(old["label"] != label)
            old_metadata = load_metadata(path)
            new = np.concatenate([old[kept], new])
            del old  # Windows replaces no file that is mapped
            metadata = [old_metadata[row] for row in kept] + metadata
        order = np.argsort(new["label"], kind="stable")
        _write(new[order], path, [metadata[row] for row in order])


def refuse_foreign_images(class_name, label, job, path=CACHE, *, replace=False):
    """Raise ValueError if :func:`count_foreign_images` finds images that must not be replaced.

    A damaged cache is refused in any case.

    Parameters
    ----------
    class_name : str
        For the message.
    label, job, path
        See :func:`count_foreign_images`.
    replace : bool
        Whether images from elsewhere may be replaced.
    """
    foreign = count_foreign_images(label, job, path)
    if foreign and not replace:
        raise ValueError(
            f"{path} already has {foreign:,} images of {class_name} that were imported or made with other "
            "settings. Pass --replace (replace=True) to replace them, or --output (path=) for another file."
        )


def refuse_other_sizes(height, width, path=CACHE):
    """Raise ValueError if there is a cache and its images have another size than ``height`` x ``width`` pixels."""
    if not user_path(path).exists():
        return
    found = _open_cache(path)["image"].shape[1:3]
    if found != (height, width):
        raise ValueError(
            f"{path} holds images of {found[0]}x{found[1]} pixels, so none of {height}x{width} can be added. Pass "
            "--output (path=) for another file."
        )


# --- Files --------------------------------------------------------------------------------------


def _target(path):
    """The file that a path means: what a symbolic link points to, which need not exist, or the path itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _table_path(path):
    return _target(path).with_suffix(".csv")


def _read_table(table):
    """Rows (list of dict) of a table, or None if the file is no table of a cache. An empty file has no rows."""
    content = table.read_bytes()
    saved_elsewhere = ValueError(
        f"The table {table} is damaged, or another program has saved it: it must be CSV with commas in UTF-8. Save "
        "it so again, or remove it. Without a table the images stay and count as imported."
    )
    if not content.strip():
        return []
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise saved_elsewhere
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        columns = set(reader.fieldnames or ())
        if len(columns) == 1 and {"label", "crc32"} <= set("".join(columns).replace("\t", ";").split(";")):
            raise saved_elsewhere
        if not {"label", "crc32"} <= columns:
            return None
        rows = [{name: row.get(name) for name in METADATA} for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise saved_elsewhere from error
    return [{name: value or "" for name, value in row.items()} for row in rows]


def _is_array_file(path):
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(6) == b"\x93NUMPY"


def _open_cache(path):
    """Check a cache and return its records. They are mapped into memory and read only when they are used."""
    path = user_path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}. Make it with import_cifake(), generate_images() or save_generated_images()."
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not the file of a cache. Name the file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged header is parsed as Python, which may warn about it
            records = np.load(path, mmap_mode="r", allow_pickle=False)
    except PermissionError as error:
        raise OSError(f"Cannot read {path}: {error}. Choose a file that you may read.") from error
    except Exception as error:  # NumPy parses the header as Python, so a damaged one can raise any error
        reason = (str(error).splitlines() or [""])[0]  # its further lines advise to trust the file
        raise ValueError(
            f"{path} is truncated, damaged, or no plain NumPy array ({type(error).__name__}: {reason}). Remove it "
            "and make it again."
        ) from error
    if not (isinstance(records, np.memmap) and records.ndim == 1 and _is_record_type(records.dtype)):
        found = getattr(records, "dtype", type(records).__name__)
        raise ValueError(
            f"{path} must hold one record for each image, such as {record_type(32, 32)}, but it holds {found}. Choose a file that save_generated_images wrote, or remove it and make it again."
        )
    if records.offset + records.nbytes != path.stat().st_size:
        raise ValueError(
            f"{path} is damaged: its header counts {len(records):,} images, but the file has another size. "
            "Remove it and make it again."
        )
    return records


def _is_record_type(dtype):
    if dtype.names != ("image", "label") or len(dtype["image"].shape) != 3:
        return False
    height, width, _ = dtype["image"].shape
    return dtype == record_type(height, width)

"""The cache of generated images: what is saved is loaded, and nothing else is."""

import io
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest

from ImageCache import (
    CACHE,
    RECORD,
    count_foreign_images,
    describe_cache,
    load_generated_images,
    load_metadata,
    replace_class,
    save_generated_images,
)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, size=(40, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.arange(40) % 10


@pytest.mark.parametrize("n", [1, 40])
def test_what_is_saved_is_loaded(images, labels, n):
    save_generated_images(images[:n], labels[:n])
    loaded_images, loaded_labels = load_generated_images()
    assert CACHE.exists()
    assert np.array_equal(loaded_images, images[:n])
    assert np.array_equal(loaded_labels, labels[:n])
    assert (loaded_images.dtype, loaded_labels.dtype) == (np.uint8, np.int64)
    loaded_images[:] = 0  # a copy: neither read-only nor the file itself
    loaded_labels[:] = 0
    assert np.array_equal(load_generated_images()[0], images[:n])


def test_saving_again_replaces_the_cache(images, labels):
    save_generated_images(images, labels)
    save_generated_images(images[:7], labels[:7])
    assert len(load_generated_images()[0]) == 7
    assert [f.name for f in CACHE.parent.iterdir()] == [CACHE.name]


@pytest.mark.parametrize(
    "change",
    [
        lambda X, y: (X / 255, y),
        lambda X, y: (X.astype(np.int16) + 256, y),
        lambda X, y: (X[..., :1], y),
        lambda X, y: (X[:, :16, :16], y),
        lambda X, y: (X, y[:1]),
        lambda X, y: (X, y + 0.5),
    ],
    ids=["floats", "int16", "one channel", "16x16", "one label", "float labels"],
)
def test_only_images_with_a_label_each_are_saved(images, labels, change):
    with pytest.raises((TypeError, ValueError)):
        save_generated_images(*change(images, labels))
    assert not CACHE.exists()


def test_a_save_that_fails_midway_leaves_the_old_cache_and_nothing_else(images, labels):
    save_generated_images(images, labels)
    before = CACHE.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError, match=CACHE.name):
            save_generated_images(np.tile(images, (10, 1, 1, 1)), np.tile(labels, 10))  # 1.2 MB
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert CACHE.read_bytes() == before
    assert [f.name for f in CACHE.parent.iterdir()] == [CACHE.name]


def test_a_missing_cache_is_named():
    with pytest.raises(FileNotFoundError, match=r"stable_diffusion_dataset\.npy.*import_cifake"):
        load_generated_images()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npz(array):
    buffer = io.BytesIO()
    np.savez(buffer, images=array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: good[:-1],
        lambda good: good[:1000],
        lambda good: good[:60],
        lambda good: b"",
        lambda good: b"<html>not found</html>",
        lambda good: good.replace(b"), }", b"), (", 1),
        lambda good: pickle.dumps(Bomb()),
        lambda good: npy(np.array([Bomb()], dtype=object), allow_pickle=True),
        lambda good: npy(np.zeros((4, 32, 32, 3), dtype=np.uint8)),
        lambda good: npy(np.zeros(4, dtype=[("image", np.uint8, (32, 32, 3)), ("label", np.int32)])),
        lambda good: npy(np.zeros((2, 2), dtype=RECORD)),
        lambda good: npz(np.zeros(4, dtype=RECORD)),
        lambda good: npz(np.zeros(4, dtype=RECORD))[:5000],
    ],
    ids=[
        "last byte gone", "truncated", "truncated header", "empty", "text", "damaged header", "pickle",
        "array of objects", "images only", "other dtype", "two axes", "npz", "truncated npz",
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_cache_is_refused_by_name_and_never_unpickled(images, labels, damage):
    save_generated_images(images, labels)
    CACHE.write_bytes(damage(CACHE.read_bytes()))
    with pytest.raises(ValueError, match=CACHE.name):
        load_generated_images()
    assert not Path("unpickled").exists()


# --- The table ----------------------------------------------------------------------------------


def rows_of(n, class_name="cat", label=3, **values):
    """The metadata of ``n`` images."""
    row = {"class": class_name, "label": label, "model": "m", "preset": "fast"} | values
    return [row | {"index": i} for i in range(n)]


def test_a_kill_between_the_two_files_gives_no_image_a_foreign_row(images):
    save_generated_images(images[:3], np.full(3, 3), metadata=rows_of(3))
    old = CACHE.read_bytes()
    replace_class(5, images[3:7], rows_of(4, "dog", 5))
    CACHE.write_bytes(old)  # the table already describes the dogs
    assert [row["class"] for row in load_metadata()] == ["cat"] * 3
    save_generated_images(images[:3][::-1], np.full(3, 3), metadata=load_metadata()[::-1])
    assert [row["index"] for row in load_metadata()] == ["2", "1", "0"]
    assert describe_cache() == "3 images by the preset fast of m"
    save_generated_images(images[:3], np.full(3, 3))
    assert not CACHE.with_suffix(".csv").exists()
    assert describe_cache() == "3 images imported"


def test_a_class_is_replaced_and_the_others_stay(images, labels):
    save_generated_images(images, labels)
    replace_class(3, images[:2], rows_of(2))
    replaced_images, replaced_labels = load_generated_images()
    assert np.bincount(replaced_labels).tolist() == [4, 4, 4, 2, 4, 4, 4, 4, 4, 4]
    assert replaced_labels.tolist() == sorted(replaced_labels)
    for c in range(10):
        expected = images[:2] if c == 3 else images[labels == c]
        assert np.array_equal(replaced_images[replaced_labels == c], expected)
    assert [row["class"] for row in load_metadata()] == [""] * 12 + ["cat"] * 2 + [""] * 24
    assert describe_cache() == "36 images imported, 2 images by the preset fast of m"


def test_images_of_other_jobs_are_counted(images, labels):
    assert count_foreign_images(3, "cat-fast-1") == 0  # no cache, no images
    save_generated_images(images, labels)
    assert count_foreign_images(3, "cat-fast-1") == 4
    replace_class(3, images[:2], rows_of(2, job="cat-fast-1"))
    assert count_foreign_images(3, "cat-fast-1") == 0
    assert count_foreign_images(3, "cat-fast-2") == 2
    assert count_foreign_images(4, "cat-fast-1") == 4

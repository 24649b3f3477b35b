"""The cache of Stable Diffusion images, and filling it with CIFAKE."""

import io
import os
import pickle
import resource
import shutil
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import CIFAKE
import StableDiffusionGeneration
from CIFAKE import import_cifake
from ImbalancedCIFAR10 import DataUnavailableError
from StableDiffusionGeneration import CACHE, load_generated_images, save_generated_images


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, size=(40, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.arange(40) % 10


# --- The cache ----------------------------------------------------------------------------------


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
        lambda good: npy(np.zeros((2, 2), dtype=StableDiffusionGeneration.RECORD)),
        lambda good: npz(np.zeros(4, dtype=StableDiffusionGeneration.RECORD)),
        lambda good: npz(np.zeros(4, dtype=StableDiffusionGeneration.RECORD))[:5000],
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


# --- A small CIFAKE -----------------------------------------------------------------------------

NUMBERS = (9, 10, 100)  # as text, 100 would come before 9


def colour(c, number):
    """The colour of a small CIFAKE's image: red tells the class, green the number."""
    return 20 + 20 * c, 2 * number, 30


def cifake_name(c, number):
    return f"{number}.jpg" if c == 0 else f"{number} ({c + 1}).jpg"


def save_flat_image(path, rgb, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).save(path)


@pytest.fixture
def folder(tmp_path):
    """CIFAKE's layout with three images a class. Everything outside train/FAKE is white: a poison."""
    root = tmp_path / "cifake"
    for c in range(10):
        for number in NUMBERS:
            save_flat_image(root / "train" / "FAKE" / cifake_name(c, number), colour(c, number))
            for other in ("train/REAL", "test/FAKE", "test/REAL"):
                save_flat_image(root / other / cifake_name(c, number - 5), (255, 255, 255))
    return root


def zip_of(folder, path, parent=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.jpg"), reverse=True):
            archive.write(file, parent + file.relative_to(folder).as_posix())
    return path


SOURCES = {
    "folder": lambda folder: folder,
    "zip": lambda folder: zip_of(folder, folder.parent / "small.zip"),
    "zip with a parent folder": lambda folder: zip_of(folder, folder.parent / "small.zip", "archive/cifake/"),
}


@pytest.mark.parametrize("make_source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("images_per_class", [2, 3])
def test_the_first_images_of_each_class_by_number_are_imported(folder, make_source, images_per_class):
    assert import_cifake(make_source(folder), images_per_class=images_per_class) == 10 * images_per_class
    images, labels = load_generated_images()
    assert np.bincount(labels).tolist() == [images_per_class] * 10
    wanted = [colour(c, number) for c in range(10) for number in NUMBERS[:images_per_class]]
    # JPEG changes a flat colour by a few values.
    assert np.abs(images.astype(int) - np.array(wanted)[:, None, None, :]).max() <= 6
    assert labels.tolist() == [c for c in range(10) for _ in range(images_per_class)]


def test_real_images_do_not_make_up_for_missing_synthetic_ones(folder):
    with pytest.raises(ValueError, match="3 images of class airplane"):
        import_cifake(folder, images_per_class=4)


def test_a_folder_with_real_images_only_is_refused(folder):
    shutil.rmtree(folder / "train" / "FAKE")
    with pytest.raises(ValueError, match="0 images"):
        import_cifake(folder, images_per_class=1)


def break_jpeg(folder):
    file = folder / "train" / "FAKE" / "10 (4).jpg"
    file.write_bytes(file.read_bytes()[:300])


def save_foreign_image(folder, name):
    save_flat_image(folder / "train" / "FAKE" / name, (0, 0, 0))


CONTENT_ERRORS = {
    "foreign file": (lambda f: save_foreign_image(f, "cat.jpg"), r"'cat\.jpg'"),
    "class 11": (lambda f: save_foreign_image(f, "9 (11).jpg"), r"9 \(11\)\.jpg"),
    "class 1": (lambda f: save_foreign_image(f, "9 (1).jpg"), r"9 \(1\)\.jpg"),
    "too large an image": (
        lambda f: save_flat_image(f / "train" / "FAKE" / "9 (3).jpg", (0, 0, 0), (64, 32)),
        r"9 \(3\)\.jpg.*64x32",
    ),
    "damaged image": (break_jpeg, r"10 \(4\)\.jpg.*damaged"),
    "too few images": (lambda f: (f / "train" / "FAKE" / "9 (10).jpg").unlink(), "2 images of class truck"),
}


def assert_refused_without_a_trace(source, error, message):
    """The import fails, once without a cache and once with one that stays as it is."""
    with pytest.raises(error, match=message):
        import_cifake(source, images_per_class=3)
    assert not CACHE.exists()
    save_generated_images(np.zeros((1, 32, 32, 3), dtype=np.uint8), [0])
    before = CACHE.read_bytes()
    with pytest.raises(error, match=message):
        import_cifake(source, images_per_class=3)
    assert CACHE.read_bytes() == before
    assert [f.name for f in CACHE.parent.iterdir()] == [CACHE.name]


@pytest.mark.parametrize("make_source", [SOURCES["folder"], SOURCES["zip"]], ids=["folder", "zip"])
@pytest.mark.parametrize(("damage", "message"), CONTENT_ERRORS.values(), ids=CONTENT_ERRORS)
def test_wrong_content_is_named_and_no_cache_written(folder, make_source, damage, message):
    damage(folder)
    assert_refused_without_a_trace(make_source(folder), ValueError, message)


def damage_a_member(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.getinfo("train/FAKE/9.jpg")
    start = member.header_offset + 30 + len(member.filename)
    return content[:start] + b"\xff" * 20 + content[start + 20 :]  # no valid deflate block


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-100],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"<html>log in first</html>",
        damage_a_member,
    ],
    ids=["end gone", "half gone", "empty", "text", "damaged member"],
)
def test_a_damaged_zip_is_named_and_no_cache_written(folder, damage):
    source = SOURCES["zip"](folder)
    source.write_bytes(damage(source.read_bytes()))
    assert_refused_without_a_trace(source, ValueError, r"small\.zip")


def test_a_missing_source_is_named_and_no_cache_written():
    assert_refused_without_a_trace("nowhere.zip", FileNotFoundError, r"nowhere\.zip")


# --- Where CIFAKE comes from --------------------------------------------------------------------


@pytest.mark.parametrize("place", ["root", "datasets"])
def test_the_archive_is_found_in_the_data_root_or_datasets(folder, tmp_path, monkeypatch, place):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "root"))
    (tmp_path / place).mkdir()
    zip_of(folder, tmp_path / place / "cifake.zip")
    assert import_cifake(images_per_class=3) == 30


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """No archive on this machine, and a folder of the test's own for temporary files."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary


def test_without_a_source_the_archive_is_downloaded_and_removed_after_use(
    folder, nothing_here, server, monkeypatch
):
    server.files["/cifake"] = SOURCES["zip"](folder).read_bytes()
    monkeypatch.setattr(CIFAKE, "CIFAKE_URL", f"{server.url}/cifake")
    assert import_cifake(images_per_class=3) == 30
    assert len(load_generated_images()[0]) == 30
    assert not list(nothing_here.iterdir())
    assert [f.name for f in CACHE.parent.iterdir()] == [CACHE.name]


def test_a_damaged_download_is_refused_and_leaves_nothing(folder, nothing_here, server, monkeypatch):
    server.files["/cifake"] = SOURCES["zip"](folder).read_bytes()[:-100]
    monkeypatch.setattr(CIFAKE, "CIFAKE_URL", f"{server.url}/cifake")
    with pytest.raises(DataUnavailableError, match="not CIFAKE"):
        import_cifake(images_per_class=3)
    assert not CACHE.exists()
    assert not list(nothing_here.iterdir())


def test_a_server_that_is_down_is_noticed_quickly(nothing_here, closed_url, monkeypatch):
    monkeypatch.setattr(CIFAKE, "CIFAKE_URL", closed_url)
    start = time.monotonic()
    with pytest.raises(DataUnavailableError, match=r"cifake\.zip"):
        import_cifake()
    assert time.monotonic() - start < 5
    assert not CACHE.exists()
    assert not list(nothing_here.iterdir())


# --- The real CIFAKE ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_cifake(cifake_zip, tmp_path_factory):
    """The real archive, imported once: number of images written, and the cache's images and labels."""
    path = tmp_path_factory.mktemp("cifake") / "cache.npy"
    written = import_cifake(cifake_zip, path)
    return written, *load_generated_images(path)


def test_the_real_archive_has_5000_images_of_each_class(real_cifake):
    written, images, labels = real_cifake
    assert written == len(images) == 50000
    assert np.bincount(labels).tolist() == [5000] * 10
    assert np.all(images.min(axis=(1, 2, 3)) < images.max(axis=(1, 2, 3)))  # none is blank


@pytest.mark.parametrize(("name", "c"), [("1000.jpg", 0), ("1000 (4).jpg", 3), ("1000 (10).jpg", 9)])
def test_a_real_image_comes_first_in_its_class_and_pixel_for_pixel(real_cifake, cifake_zip, name, c):
    _, images, labels = real_cifake
    with zipfile.ZipFile(cifake_zip) as archive, archive.open(f"train/FAKE/{name}") as file:
        expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(images[np.flatnonzero(labels == c)[0]], expected)

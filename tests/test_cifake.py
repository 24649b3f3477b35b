"""Filling the cache with CIFAKE."""

import io
import shutil
import tempfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

import CIFAKE
from CIFAKE import import_cifake
from ImageCache import CACHE, load_generated_images, save_generated_images
from ImbalancedCIFAR10 import DataUnavailableError

# --- A small CIFAKE -----------------------------------------------------------------------------

NUMBERS = (9, 10, 100)  # as text, 100 would come before 9


@pytest.fixture
def images_per_class(monkeypatch):
    """Sets how many images of each class an import takes."""

    def set_number(number):
        monkeypatch.setattr(CIFAKE, "IMAGES_PER_CLASS", number)

    set_number(len(NUMBERS))
    return set_number


def colour(c, number):
    """The colour of a small CIFAKE's image: red tells the class, green the number."""
    return 20 + 20 * c, 2 * number, 30


def cifake_name(c, number):
    return f"{number}.jpg" if c == 0 else f"{number} ({c + 1}).jpg"


def save_flat_image(path, rgb, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).save(path)


@pytest.fixture
def folder(tmp_path, images_per_class):
    """CIFAKE's layout with three images of each class. Images outside train/FAKE are white: a poison."""
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
@pytest.mark.parametrize("n", [2, 3])
def test_the_first_images_of_each_class_by_number_are_imported(folder, make_source, images_per_class, n):
    images_per_class(n)
    assert import_cifake(make_source(folder)) == 10 * n
    images, labels = load_generated_images()
    assert np.bincount(labels).tolist() == [n] * 10
    wanted = [colour(c, number) for c in range(10) for number in NUMBERS[:n]]
    # JPEG changes a flat colour by a few values.
    assert np.abs(images.astype(int) - np.array(wanted)[:, None, None, :]).max() <= 6
    assert labels.tolist() == [c for c in range(10) for _ in range(n)]


def test_real_images_do_not_replace_missing_synthetic_ones(folder, images_per_class):
    images_per_class(4)
    with pytest.raises(ValueError, match="3 images of class airplane"):
        import_cifake(folder)


def test_a_folder_with_real_images_only_is_refused(folder, images_per_class):
    images_per_class(1)
    shutil.rmtree(folder / "train" / "FAKE")
    with pytest.raises(ValueError, match="0 images"):
        import_cifake(folder)


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
    """The import fails, once without a cache and once with a cache, which stays as it is."""
    with pytest.raises(error, match=message):
        import_cifake(source)
    assert not CACHE.exists()
    save_generated_images(np.zeros((1, 32, 32, 3), dtype=np.uint8), [0])
    before = CACHE.read_bytes()
    with pytest.raises(error, match=message):
        import_cifake(source)
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


@pytest.mark.parametrize("parent", ["root", "datasets"])
def test_the_archive_is_found_in_the_data_root_or_datasets(folder, tmp_path, monkeypatch, parent):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "root"))
    (tmp_path / parent).mkdir()
    zip_of(folder, tmp_path / parent / "cifake.zip")
    assert import_cifake() == 30


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
    assert import_cifake() == 30
    assert len(load_generated_images()[0]) == 30
    assert not list(nothing_here.iterdir())
    assert [f.name for f in CACHE.parent.iterdir()] == [CACHE.name]


def test_a_damaged_download_is_refused_and_leaves_nothing(folder, nothing_here, server, monkeypatch):
    server.files["/cifake"] = SOURCES["zip"](folder).read_bytes()[:-100]
    monkeypatch.setattr(CIFAKE, "CIFAKE_URL", f"{server.url}/cifake")
    with pytest.raises(DataUnavailableError, match="not CIFAKE"):
        import_cifake()
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

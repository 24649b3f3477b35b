"""Filling the cache with CIFAKE."""

import hashlib
import http.client
import io
import shutil
import socket
import struct
import tempfile
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import CIFAKE
import ImageSources
from CIFAKE import import_cifake
from ImageCache import CACHE, load_generated_images, save_generated_images
from ImageSources import prepare_images
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


def with_backslashes(path):
    content = path.read_bytes()
    for half in (b"train", b"test"):
        for kind in (b"FAKE", b"REAL"):
            content = content.replace(b"/".join([half, kind, b""]), b"\\".join([half, kind, b""]))
    path.write_bytes(content)
    return path


SOURCES = {
    "folder": lambda folder: folder,
    "zip": lambda folder: zip_of(folder, folder.parent / "small.zip"),
    "zip with a parent folder": lambda folder: zip_of(folder, folder.parent / "small.zip", "archive/cifake/"),
    "zip of the training half": lambda folder: zip_of(folder / "train", folder.parent / "small.zip"),
    "zip made on Windows": lambda folder: with_backslashes(zip_of(folder, folder.parent / "small.zip")),
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


@pytest.mark.parametrize("n", [0, -5, 5001])
def test_a_number_of_images_that_cannot_be_is_refused(folder, n):
    with pytest.raises(ValueError, match=f"a number from 1 to .*, or None for all: got {n}"):
        import_cifake(folder, images_per_class=n)


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


def save_bomb(folder, name, size):
    """A PNG of many pixels in few bytes, as Pillow writes it, but without the memory that this takes."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )
    (folder / "train" / "FAKE" / name).write_bytes(content)


CONTENT_ERRORS = {
    "foreign file": (lambda f: save_foreign_image(f, "cat.jpg"), r"'cat\.jpg'"),
    "class 11": (lambda f: save_foreign_image(f, "9 (11).jpg"), r"9 \(11\)\.jpg"),
    "class 1": (lambda f: save_foreign_image(f, "9 (1).jpg"), r"9 \(1\)\.jpg"),
    "too large an image": (
        lambda f: save_flat_image(f / "train" / "FAKE" / "9 (3).jpg", (0, 0, 0), (64, 32)),
        r"9 \(3\)\.jpg.*64x32",
    ),
    "damaged image": (break_jpeg, r"10 \(4\)\.jpg.*damaged"),
    "too many pixels": (
        lambda f: save_bomb(f, "9 (3).jpg", 20_000),
        r"9 \(3\)\.jpg.*20000x20000|400000000 pixels",
    ),
    "many pixels": (lambda f: save_bomb(f, "9 (3).jpg", 10_000), r"9 \(3\)\.jpg.*10000x10000"),
    "too many bytes": (
        lambda f: (f / "train" / "FAKE" / "9 (3).jpg").write_bytes(b"\xff\xd8" + bytes(70_000)),
        r"9 \(3\)\.jpg.*70,002 bytes",
    ),
    "no picture": (
        lambda f: (f / "train" / "FAKE" / "9 (3).jpg").write_bytes(b"GIF87a"),
        r"9 \(3\)\.jpg.*damaged",
    ),
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


@pytest.mark.parametrize("name", ["train/FAKE/9.jpg", "train/REAL/4.jpg"])
def test_a_member_that_grows_to_gigabytes_is_never_decompressed(folder, monkeypatch, name):
    source = SOURCES["zip"](folder)
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.jpg")):
            member = file.relative_to(folder).as_posix()
            archive.writestr(member, bytes(3_000_000) if member == name else file.read_bytes())
    largest = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile, "read", lambda file, n=-1: (c := read(file, n), largest.append(len(c)))[0]
    )
    if "FAKE" in name:
        assert_refused_without_a_trace(source, ValueError, r"9\.jpg in .*small\.zip .*3,000,000 bytes")
    else:
        assert import_cifake(source) == 30
    assert max(largest, default=0) < 100_000


def test_a_member_that_is_longer_than_it_says_is_refused(folder):
    source = SOURCES["zip"](folder)
    with zipfile.ZipFile(source, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/FAKE/8.jpg", bytes(3_000_000))
    source.write_bytes(source.read_bytes().replace(struct.pack("<I", 3_000_000), struct.pack("<I", 900)))
    assert_refused_without_a_trace(source, ValueError, r"8\.jpg in .*small\.zip is damaged")


def test_an_encrypted_archive_is_named_and_not_taken_for_damage(folder):
    source = SOURCES["zip"](folder)
    content = bytearray(source.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + offset] |= 1
            start = content.find(signature, start + 4)
    source.write_bytes(content)
    assert_refused_without_a_trace(source, ValueError, r"small\.zip is encrypted.*without a password")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_named_whatever_compressed_it(folder, method):
    source = folder.parent / "small.zip"
    with zipfile.ZipFile(source, "w", method) as archive:
        for file in sorted(folder.rglob("*.jpg")):
            archive.write(file, file.relative_to(folder).as_posix())
    with zipfile.ZipFile(source) as archive:
        start = archive.getinfo("train/FAKE/9.jpg").header_offset + 30 + len("train/FAKE/9.jpg")
    content = source.read_bytes()
    for damage in (b"\xff" * 20, bytes(20)):
        source.write_bytes(content[:start] + damage + content[start + 20 :])
        assert_refused_without_a_trace(source, ValueError, r"9\.jpg in .*small\.zip is damaged")
        CACHE.unlink()


def test_a_file_that_is_there_twice_is_refused(folder):
    source = SOURCES["zip"](folder)
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("copy/train/FAKE/9.jpg", (folder / "train" / "FAKE" / "10.jpg").read_bytes())
    assert_refused_without_a_trace(source, ValueError, r"small\.zip has the file '9\.jpg' twice")


@pytest.mark.parametrize("make_source", [SOURCES["folder"], SOURCES["zip"]], ids=["folder", "zip"])
def test_what_desktops_leave_in_folders_is_ignored(folder, make_source):
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "Desktop.ini",
        "._9.jpg",
        ".directory",
        "ehthumbs.db",
    ):
        (folder / "train" / "FAKE" / name).write_bytes(b"anything")
    source = make_source(folder)
    if source.is_file():
        with zipfile.ZipFile(source, "a") as archive:
            for file in (folder / "train" / "FAKE").iterdir():
                if file.name[0] in ".TDde" and file.suffix != ".jpg":
                    archive.write(file, f"train/FAKE/{file.name}")
            archive.writestr("__MACOSX/train/FAKE/._9.jpg", b"anything")
            archive.writestr("__MACOSX/train/FAKE/9.jpg", b"anything")
    assert import_cifake(source) == 30


def test_a_tilde_is_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert import_cifake("~/cifake", "~/elsewhere/x.npy") == 30
    assert len(load_generated_images(tmp_path / "elsewhere" / "x.npy")[0]) == 30


def test_a_cache_that_cannot_be_written_is_noticed_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(CIFAKE, "_read_folder", lambda *arguments: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="own table"):
        import_cifake(folder, "x.csv")


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
def cifake_at_hand(folder, tmp_path, monkeypatch, images_per_class):
    """``cifake.zip`` in the data root, with three images of each class."""
    images_per_class(3)
    monkeypatch.setattr(ImageSources, "IMAGES_PER_CLASS", 3)
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    zip_of(folder, tmp_path / "cifake.zip")


def test_a_quick_trial_imports_a_part_and_the_next_run_completes_it(cifake_at_hand):
    assert prepare_images({"cat": 2, "dog": 1}, no_more=True) == f"CIFAKE, 20 images imported into {CACHE}"
    part, _ = load_generated_images()
    assert prepare_images({"cat": 2}) == f"the cache {CACHE}: 20 images imported"
    assert prepare_images({"cat": 3}) == f"CIFAKE, 30 images imported into {CACHE}"
    whole, labels = load_generated_images()
    assert np.array_equal(whole[labels == 3][:2], part[6:8])
    assert prepare_images({"cat": 4}) == f"the cache {CACHE}: 30 images imported"  # there are no more


@pytest.mark.parametrize("count", [1, 2])
def test_a_small_cache_of_the_users_own_is_not_replaced(cifake_at_hand, count):
    images = np.zeros((10 * count, 32, 32, 3), dtype=np.uint8)
    save_generated_images(images, np.arange(10 * count) % 10)
    assert prepare_images({"cat": 3}) == f"the cache {CACHE}: {10 * count} images imported"
    assert not load_generated_images()[0].any()


@pytest.mark.parametrize("label", [10**12, -1])
def test_a_cache_with_any_class_number_is_looked_at_without_counting_up_to_it(cifake_at_hand, label):
    save_generated_images(np.zeros((10, 32, 32, 3), dtype=np.uint8), np.arange(10))
    records = np.load(CACHE)
    records["label"][0] = label
    np.save(CACHE, records)
    assert prepare_images({"cat": 3}) == f"the cache {CACHE}: 10 images imported"


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """No archive on this machine, and a folder of the test's own for temporary files."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary


@pytest.fixture
def sites(server, closed_url, monkeypatch):
    """Set what Kaggle and the mirror send: bytes, or None for a site that does not answer."""

    def set_sites(kaggle, mirror=None, checksum=None):
        for name, content in (("CIFAKE_URL", kaggle), ("MIRROR_URL", mirror)):
            server.files[f"/{name}"] = content
            monkeypatch.setattr(CIFAKE, name, closed_url if content is None else f"{server.url}/{name}")
        monkeypatch.setattr(CIFAKE, "MIRROR_SHA256", checksum or hashlib.sha256(mirror or b"").hexdigest())

    return set_sites


def test_without_a_source_the_archive_is_downloaded_and_removed_after_use(
    folder, nothing_here, sites, server
):
    sites(SOURCES["zip"](folder).read_bytes(), b"not needed")
    assert import_cifake() == 30
    assert len(load_generated_images()[0]) == 30
    assert not list(nothing_here.iterdir())
    assert [f.name for f in CACHE.parent.iterdir()] == [CACHE.name]
    assert set(server.requests) == {"/CIFAKE_URL"}


@pytest.mark.parametrize(
    "kaggle", [None, b"<html>log in first</html>", "damaged"], ids=["down", "login", "damaged"]
)
def test_the_mirror_is_tried_when_kaggle_does_not_send_cifake(folder, nothing_here, sites, kaggle):
    """The mirror has the training half under FAKE and REAL, without a folder above them."""
    if kaggle == "damaged":
        kaggle = SOURCES["zip"](folder).read_bytes()[:-100]
    sites(kaggle, SOURCES["zip of the training half"](folder).read_bytes())
    assert import_cifake() == 30
    wanted = [colour(c, number) for c in range(10) for number in NUMBERS]
    images, _ = load_generated_images()
    assert np.abs(images.astype(int) - np.array(wanted)[:, None, None, :]).max() <= 6
    assert not list(nothing_here.iterdir())


@pytest.mark.parametrize("content", ["another version", "names without a class"])
def test_what_the_mirror_sends_is_checked(folder, nothing_here, sites, content):
    checksum = None
    if content == "another version":
        checksum = "0" * 64
    else:
        for number, file in enumerate((folder / "train" / "FAKE").iterdir()):
            file.rename(file.with_name(f"image_{number}.jpg"))
    sites(b"<html>", SOURCES["zip"](folder).read_bytes(), checksum)
    with pytest.raises(DataUnavailableError, match="MIRROR_URL sent is not CIFAKE.*by hand"):
        import_cifake()
    assert not CACHE.exists()
    assert not list(nothing_here.iterdir())


def test_a_damaged_download_is_refused_and_leaves_nothing(folder, nothing_here, sites):
    sites(SOURCES["zip"](folder).read_bytes()[:-100])
    with pytest.raises(DataUnavailableError, match="CIFAKE_URL sent is not CIFAKE"):
        import_cifake()
    assert not CACHE.exists()
    assert not list(nothing_here.iterdir())


def test_servers_that_are_down_are_noticed_quickly(nothing_here, sites):
    sites(None)
    start = time.monotonic()
    with pytest.raises(DataUnavailableError, match=r"no cifake\.zip .*does not answer.*does not answer"):
        import_cifake()
    assert time.monotonic() - start < 5
    assert not CACHE.exists()
    assert not list(nothing_here.iterdir())


@pytest.mark.parametrize("fault", ["stalls", "breaks off"])
def test_a_server_that_stalls_or_breaks_off_is_given_up(
    nothing_here, hanging_url, little_patience, monkeypatch, fault
):
    monkeypatch.setattr(CIFAKE, "is_reachable", lambda url: True)
    for name in ("CIFAKE_URL", "MIRROR_URL"):
        monkeypatch.setattr(CIFAKE, name, hanging_url)
    if fault == "breaks off":
        monkeypatch.setattr(torch.hub, "download_url_to_file", break_off)
    start = time.monotonic()
    reason = "timed out" if fault == "stalls" else r"broke off its answer .IncompleteRead"
    with pytest.raises(DataUnavailableError, match=f"failed: .*{reason}.*failed: .*{reason}"):
        import_cifake()
    assert time.monotonic() - start < 5 and socket.getdefaulttimeout() is None
    assert not list(nothing_here.iterdir())


def break_off(*arguments, **options):
    raise http.client.IncompleteRead(b"half", 4)


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

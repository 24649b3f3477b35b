"""The cache of generated images: what is saved is loaded, and nothing else is."""

import io
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import ImageCache
from Files import one_process_at_a_time, require_writable
from ImageCache import (
    CACHE,
    check_cache_path,
    count_foreign_images,
    describe_cache,
    load_generated_images,
    load_metadata,
    record_type,
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


def test_a_cache_holds_images_of_any_size_and_of_one_only(images, labels):
    tall = np.concatenate([images[:20], images[20:]], axis=1)[:, :48]
    save_generated_images(tall, labels[:20])
    assert np.array_equal(load_generated_images()[0], tall)
    replace_class(3, tall[:4], [{"label": 3, "model": "m", "preset": "p"}] * 4)
    assert len(load_generated_images()[0]) == 22
    with pytest.raises(ValueError, match="holds images of 48x32 pixels, so none of 32x32 can be added"):
        replace_class(3, images[:4], [{"label": 3, "model": "m", "preset": "p"}] * 4)
    assert len(load_generated_images()[0]) == 22


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
        lambda X, y: (X, y[:1]),
        lambda X, y: (X, y + 0.5),
        lambda X, y: (X, y - 1),
    ],
    ids=["floats", "int16", "one channel", "one label", "float labels", "negative labels"],
)
def test_only_images_with_a_label_each_are_saved(images, labels, change):
    with pytest.raises((TypeError, ValueError)):
        save_generated_images(*change(images, labels))
    assert not CACHE.exists()


def test_a_negative_label_is_named(images):
    with pytest.raises(ValueError, match="labels must be class numbers, 0 or more: got -2"):
        replace_class(-2, images[:2], rows_of(2, label=-2))
    assert not CACHE.exists()


@pytest.mark.parametrize("metadata", [None, 400], ids=["imported", "generated"])
def test_a_save_that_fails_midway_leaves_the_old_cache_with_its_table_and_nothing_else(
    images, labels, metadata
):
    save_generated_images(images, labels, metadata=rows_of(40, label=0))
    before = CACHE.read_bytes(), CACHE.with_suffix(".csv").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError, match=CACHE.name):
            save_generated_images(
                np.tile(images, (10, 1, 1, 1)), np.tile(labels, 10), metadata=metadata and rows_of(metadata)
            )  # 1.2 MB
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (CACHE.read_bytes(), CACHE.with_suffix(".csv").read_bytes()) == before
    assert {f.name for f in CACHE.parent.iterdir()} == {CACHE.name, CACHE.with_suffix(".csv").name}


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


def with_header(good, old, new):
    """A cache whose header says something else and is as long as before, or longer."""
    length = int.from_bytes(good[8:10], "little")
    header = good[10 : 10 + length].replace(old, new, 1).rstrip()
    assert header != good[10 : 10 + length].rstrip()
    header = header.ljust(max(length, len(header) + 1) - 1) + b"\n"
    return good[:8] + len(header).to_bytes(2, "little") + header + good[10 + length :]


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
        lambda good: npy(np.zeros(4, dtype=[("image", np.uint8, (32, 32)), ("label", np.int64)])),
        lambda good: npy(np.zeros(4, dtype=[("image", np.uint8, (32, 32, 4)), ("label", np.int64)])),
        lambda good: npy(np.zeros((2, 2), dtype=record_type(32, 32))),
        lambda good: npz(np.zeros(4, dtype=record_type(32, 32))),
        lambda good: npz(np.zeros(4, dtype=record_type(32, 32)))[:5000],
        lambda good: with_header(good, b"'shape': (40,)", b"'shape': (40,,"),
        lambda good: with_header(good, b"'shape': (40,)", b"'shape': ('a',)"),
        lambda good: with_header(good, b"'shape': (40,)", b"'shape': (4.5,)"),
        lambda good: with_header(good, b"'shape': (40,)", b"'shape': (-40,)"),
        lambda good: with_header(good, b"'shape': (40,)", b"'shape': (10,)"),
        lambda good: with_header(good, b"'shape': (40,)", b"'shape': (%d,)" % 10**25),
        lambda good: with_header(good, b"'shape': (40,)", b"'shape': (%d,)" % 10**15),
        lambda good: with_header(good, b"'|u1'", b"'|q1'"),
        lambda good: with_header(good, b"'|u1'", b"'\\\\u'"),
        lambda good: with_header(good, b"'descr'", b"{1:[]}"),
        lambda good: with_header(good, b"{", b"[" * 100),
        lambda good: with_header(good, b"{", b"\0"),
        lambda good: good[:8] + b"\xff\xff" + good[10:],
        lambda good: good[:6] + b"\x09" + good[7:],
        lambda good: good + b"more",
    ],
    ids=[
        "last byte gone", "truncated", "truncated header", "empty", "text", "damaged header", "pickle",
        "array of objects", "images only", "other dtype", "grey images", "four channels", "two axes", "npz", "truncated npz", "no Python",
        "shape of text", "shape of fractions", "negative shape", "smaller shape", "shape beyond integers",
        "shape beyond memory", "unknown type", "broken escape", "key that cannot be one", "nested", "null byte",
        "length of the header", "version", "more than the header counts",
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_cache_is_refused_by_name_and_never_unpickled(images, labels, damage):
    save_generated_images(images, labels)
    CACHE.write_bytes(damage(CACHE.read_bytes()))
    with pytest.raises(ValueError, match=f"{CACHE.name} .*(Remove it and make it again|must hold)"):
        load_generated_images()
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("read", [load_generated_images, load_metadata, describe_cache])
def test_a_folder_is_not_taken_for_a_damaged_cache(read):
    CACHE.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"stable_diffusion_dataset\.npy is a folder"):
        read()


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


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "an entry for each of the 2 images: got 0"), ([{"kind": "cat"}] * 2, "Unknown names in metadata: kind")],
)  # fmt: skip
def test_a_class_is_not_replaced_without_fitting_metadata(images, labels, rows, message):
    save_generated_images(images, labels)
    with pytest.raises(ValueError, match=message):
        replace_class(3, images[:2], rows, job="cat-fast-1")
    assert len(load_generated_images()[0]) == len(images)


def test_images_of_other_jobs_are_counted(images, labels):
    assert count_foreign_images(3, "cat-fast-1") == 0  # no cache, no images
    save_generated_images(images, labels)
    assert count_foreign_images(3, "cat-fast-1") == 4
    replace_class(3, images[:2], rows_of(2, job="cat-fast-1"))
    assert count_foreign_images(3, "cat-fast-1") == 0
    assert count_foreign_images(3, "cat-fast-2") == 2
    assert count_foreign_images(4, "cat-fast-1") == 4


def rewrite_table(change):
    table = CACHE.with_suffix(".csv")
    table.write_bytes(change(table.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ";").encode(),
        lambda text: text.replace(",", "\t").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.replace("fast", "f\xe4st").encode("latin-1"),
        lambda text: text.replace("fast", "fa\0st").encode(),
        lambda text: (text + '"an open quote').encode(),
        lambda text: text.replace("fast", "x" * 200_000).encode(),
    ],
    ids=["semicolons", "tabs", "UTF-16", "UTF-16 without its mark", "Latin-1", "null byte", "open quote", "long field"],
)  # fmt: skip
def test_a_table_that_another_program_saved_is_named_with_what_to_do(images, change):
    save_generated_images(images[:3], np.full(3, 3), metadata=rows_of(3))
    rewrite_table(change)
    for use in (load_metadata, describe_cache, lambda: count_foreign_images(3, "x")):
        with pytest.raises(ValueError, match=r"stable_diffusion_dataset\.csv.*commas in UTF-8.*remove it"):
            use()
    with pytest.raises(ValueError, match=r"stable_diffusion_dataset\.csv"):
        replace_class(5, images[3:5], rows_of(2, "dog", 5))
    assert len(load_generated_images()[0]) == 3  # the images themselves can be read
    CACHE.with_suffix(".csv").unlink()
    assert describe_cache() == "3 images imported"


def test_a_byte_order_mark_does_not_hide_the_first_column(images):
    save_generated_images(images[:3], np.full(3, 3), metadata=rows_of(3))
    rewrite_table(lambda text: text.encode("utf-8-sig"))
    assert [row["class"] for row in load_metadata()] == ["cat"] * 3


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["outfile", "data.v1", "x.dat", "deep/er/x.npy", "katze-ü"])
def test_the_name_that_is_asked_for_is_the_name_that_is_written(images, labels, name):
    save_generated_images(images, labels, name, rows_of(40, label=0))
    assert np.array_equal(load_generated_images(name)[0], images)
    table = Path(name).with_suffix(".csv")
    assert {p.name for p in Path(name).parent.iterdir()} == {Path(name).name, table.name}


@pytest.mark.parametrize("name", ["x.csv", "x.CSV"])
def test_a_name_that_the_table_would_overwrite_is_refused(images, labels, name):
    for save in (
        lambda: save_generated_images(images, labels, name),
        lambda: replace_class(3, images[:2], rows_of(2), name),
    ):
        with pytest.raises(ValueError, match=r"name of the cache's own table.*such as x\.npy"):
            save()
    assert not list(Path().iterdir())


def test_a_table_of_ones_own_is_neither_replaced_nor_removed(images, labels):
    Path("results.csv").write_text("epoch,loss\n1,0.5\n")
    for metadata in (None, rows_of(40)):
        with pytest.raises(ValueError, match=r"would replace results\.csv, which is no table of a cache"):
            save_generated_images(images, labels, "results.npy", metadata)
    assert Path("results.csv").read_text() == "epoch,loss\n1,0.5\n"
    assert [f.name for f in Path().iterdir()] == ["results.csv"]


def test_a_second_cache_does_not_take_the_table_of_the_first(images):
    save_generated_images(images[:3], np.full(3, 3), "x.npy", rows_of(3))
    for name in ("x", "x.dat"):
        with pytest.raises(ValueError, match=r"x\.npy would share the table x\.csv"):
            save_generated_images(images[:2], np.full(2, 5), name)
    assert describe_cache("x.npy") == "3 images by the preset fast of m"
    save_generated_images(images[:2], np.full(2, 3), "x.npy", rows_of(2))  # the first itself may be replaced


def test_a_folder_or_a_file_in_the_way_is_refused_before_anything_is_written(images, labels):
    Path("folder").mkdir()
    with pytest.raises(ValueError, match=r"folder is a folder.*folder/stable_diffusion_dataset\.npy"):
        save_generated_images(images, labels, "folder")
    Path("file").write_text("text")
    with pytest.raises(OSError, match=r"Cannot write file/x\.npy: .*Choose a folder"):
        check_cache_path("file/x.npy")
    assert list(Path("folder").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused():
    Path("folder").mkdir(mode=0o500)
    with pytest.raises(OSError, match="Cannot write folder/deeper/x: .*Choose a folder"):
        require_writable("folder/deeper/x")


def test_a_tilde_is_the_home_folder(images, labels, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_generated_images(images, labels, "~/x.npy", rows_of(40, label=0))
    replace_class(3, images[:2], rows_of(2), "~/x.npy")
    assert len(load_generated_images("~/x.npy")[0]) == len(load_metadata("~/x.npy")) == 38
    assert {f.name for f in (tmp_path / "home").iterdir()} == {"x.npy", "x.csv"}
    assert not Path("~").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_cache_that_is_a_symbolic_link_stays_one(images, labels, exists):
    Path("large").mkdir()
    if exists:
        save_generated_images(images[:1], labels[:1], "large/target.npy")
    Path("link.npy").symlink_to("large/target.npy")
    replace_class(3, images[:4], rows_of(4), "link.npy")
    assert Path("link.npy").is_symlink()
    assert len(load_generated_images("large/target.npy")[0]) == 4 + exists
    assert not [f for f in Path().rglob(".*")]


def test_a_cache_has_the_same_table_through_every_link_to_it(images):
    Path("large").mkdir()
    Path("link.npy").symlink_to("large/target.npy")
    save_generated_images(images[:3], np.full(3, 3), "large/target.npy", rows_of(3))
    replace_class(5, images[3:5], rows_of(2, "dog", 5), "link.npy")
    for path in ("large/target.npy", "link.npy"):
        assert [row["class"] for row in load_metadata(path)] == ["cat"] * 3 + ["dog"] * 2
    save_generated_images(images[:3], np.full(3, 3), "link.npy")
    assert not Path("large/target.csv").exists()
    assert describe_cache("large/target.npy") == describe_cache("link.npy") == "3 images imported"


def test_what_a_link_points_to_is_checked_like_a_name(images, labels):
    Path("large").mkdir()
    Path("large/results.csv").write_text("epoch,loss\n1,0.5\n")
    for name, target, message in (
        ("a.npy", "x.csv", r"x\.csv is the name of the cache's own table"),
        ("b.npy", "results.npy", r"would replace .*results\.csv, which is no table of a cache"),
    ):
        Path(name).symlink_to(Path("large", target))
        with pytest.raises(ValueError, match=message):
            save_generated_images(images, labels, name, rows_of(40))
    save_generated_images(images[:3], np.full(3, 3), "large/y.npy", rows_of(3))
    Path("c.npy").symlink_to("large/y.dat")
    with pytest.raises(ValueError, match=r"c\.npy and .*y\.npy would share the table .*y\.csv"):
        check_cache_path("c.npy")
    assert {f.name for f in Path("large").iterdir()} == {"results.csv", "y.npy", "y.csv"}


# --- Several writers ----------------------------------------------------------------------------

fork = multiprocessing.get_context("fork")


def test_classes_that_are_written_at_the_same_time_are_all_kept(images, monkeypatch):
    save, started = ImageCache.save_array, fork.Barrier(5)

    def save_slowly(path, array):
        time.sleep(0.05)  # between reading and writing, where another process would write
        save(path, array)

    def write(c):
        started.wait(10)
        replace_class(c, images[2 * c : 2 * c + 2], rows_of(2, "cat", c))

    monkeypatch.setattr(ImageCache, "save_array", save_slowly)
    writers = [fork.Process(target=write, args=(c,)) for c in range(5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert load_generated_images()[1].tolist() == sorted(2 * [0, 1, 2, 3, 4])
    assert all(row["class"] == "cat" for row in load_metadata())
    assert {f.name for f in CACHE.parent.iterdir()} == {CACHE.name, CACHE.with_suffix(".csv").name}


def test_a_lock_that_a_killed_process_held_does_not_block_the_next_one(images, labels):
    def die_with_the_lock():
        with one_process_at_a_time(CACHE, "writes"):
            os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=die_with_the_lock)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    start = time.monotonic()
    save_generated_images(images, labels)
    assert time.monotonic() - start < 1
    assert [f.name for f in CACHE.parent.iterdir()] == [CACHE.name]


def test_a_second_block_waits_until_the_first_has_ended_also_through_a_link():
    Path("target").write_text("")
    Path("link").symlink_to("target")
    order, entered = [], threading.Event()

    def second():
        with one_process_at_a_time("link", "writes"):
            order.append("second")

    with one_process_at_a_time("target", "writes"):
        waiting = threading.Thread(target=second)
        waiting.start()
        entered.wait(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def test_images_that_another_process_imported_meanwhile_are_not_replaced_unasked(images, labels):
    save_generated_images(images, labels)
    before = CACHE.read_bytes()
    with pytest.raises(ValueError, match="already has 4 images of cat .*--replace"):
        replace_class(3, images[:2], rows_of(2, job="cat-fast-1"), job="cat-fast-1")
    assert CACHE.read_bytes() == before


@pytest.mark.parametrize(
    ("metadata", "message"),
    [([{"label": 0}], "for each of the 2 images: got 1"), ([{"label": 0}, {"artist": "me"}], "Unknown names in metadata: artist")],
)  # fmt: skip
def test_metadata_that_do_not_fit_are_refused_before_anything_is_written(metadata, message):
    with pytest.raises(ValueError, match=message):
        save_generated_images(np.zeros((2, 32, 32, 3), dtype=np.uint8), [0, 1], "cache.npy", metadata)
    assert not list(Path().iterdir())

"""Loading CIFAR-10 and cutting imbalanced training sets from it."""

import hashlib
import io
import os
import pickle
import socket
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

import ImbalancedCIFAR10
from ImbalancedCIFAR10 import (
    CIFAR10_CLASSES,
    DataUnavailableError,
    Split,
    class_number,
    default_root,
    load_cifar10,
    load_data,
    load_digits_as_images,
    long_tailed_split,
    minority_split,
    split_from_name,
    step_split,
)
from Repeatability import checksum

CAT, DOG = 3, 5
FOLDER = "cifar-10-batches-py"
Y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))  # labels as CIFAR-10 has them


# --- Splits: counts -----------------------------------------------------------------------------


def test_reference_split_keeps_45050_real_images_of_which_50_are_cats(cifar10):
    X, y = minority_split(cifar10.y_train).cut(cifar10.X_train, cifar10.y_train)
    assert X.shape == (45050, 32, 32, 3)
    assert np.bincount(y).tolist() == [5000, 5000, 5000, 50, 5000, 5000, 5000, 5000, 5000, 5000]


def test_long_tailed_counts_are_those_of_cui_et_al_2019():
    split = long_tailed_split(Y, imbalance_factor=100)
    _, y = split.cut(Y, Y)
    assert np.bincount(y).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert split.minority_classes == (5, 6, 7, 8, 9)  # at most 500


def test_long_tailed_split_always_names_a_minority():
    assert long_tailed_split(Y, imbalance_factor=2).minority_classes == (9,)


@pytest.mark.parametrize(("factor", "kept"), [(1, 5000), (10, 500), (100, 50), (3, 1666)])
def test_step_split_makes_the_second_half_of_the_classes_rare(factor, kept):
    split = step_split(Y, imbalance_factor=factor)
    assert np.bincount(split.cut(Y, Y)[1]).tolist() == [5000] * 5 + [kept] * 5
    assert split.minority_classes == (5, 6, 7, 8, 9)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (50, 50), (1, 1), (5000, 5000), (0.01, 50), (1.0, 5000), (0.0001, 1), (0.01001, 51),
        (0.07, 350),  # 0.07 * 5000 is 350.00000000000006 as a float
    ],
)  # fmt: skip
def test_minority_split_keeps_a_count_or_a_fraction_rounded_up(keep, kept):
    assert np.bincount(minority_split(Y, keep=keep).cut(Y, Y)[1])[CAT] == kept


@pytest.mark.parametrize("make_split", [long_tailed_split, step_split])
@pytest.mark.parametrize("factor", [1, 50])
def test_long_tailed_and_step_splits_fit_classes_of_unequal_size(make_split, factor):
    digits = load_digits_as_images()
    sizes = np.bincount(digits.y_train)  # 139 to 146
    _, y = make_split(digits.y_train, digits.class_names, factor).cut(digits.y_train, digits.y_train)
    kept = np.bincount(y, minlength=10)
    assert np.all((kept >= 1) & (kept <= sizes))
    assert kept[9] == (sizes[9] if factor == 1 else 2)  # 146 / 50 = 2.92


def test_one_percent_of_the_digit_8_are_two_images():
    digits = load_digits_as_images()
    split = split_from_name("8-0.01", digits.y_train, digits.class_names)
    assert split.counts == {8: 2}
    assert split.minority_classes == (8,)


@pytest.mark.parametrize("minority", ["cat", 3, "3", np.int64(3), ["cat"]])
def test_a_minority_class_is_given_by_name_or_number(minority):
    assert minority_split(Y, minority=minority) == minority_split(Y)
    assert minority_split(Y).counts == {CAT: 50}


def test_several_minority_classes():
    split = minority_split(Y, minority=["cat", 5], keep=20)
    assert split.name == "cat+dog-20"
    assert split.minority_classes == (3, 5)
    assert np.bincount(split.cut(Y, Y)[1]).tolist() == [5000] * 3 + [20, 5000, 20] + [5000] * 4


# --- Splits: which images -----------------------------------------------------------------------


def kept_cats(**options):
    rows = minority_split(Y, **options).kept_rows(Y)
    return set(rows[Y[rows] == CAT].tolist())


def test_removed_images_are_not_in_the_result_and_the_others_keep_their_order():
    row_numbers = np.arange(len(Y))
    X, y = minority_split(Y).cut(row_numbers, Y)
    removed = np.setdiff1d(row_numbers, X)
    assert len(removed) == 4950
    assert np.all(Y[removed] == CAT)
    assert np.all(np.diff(X) > 0)
    assert np.array_equal(y, Y[X])


@pytest.mark.parametrize("name", ["cat-50", "cat-5000", "long-tailed-100", "step-1"])
def test_cut_arrays_share_no_memory_with_the_input(name):
    X = np.zeros((len(Y), 2), dtype=np.uint8)
    y = Y.copy()
    X_cut, y_cut = split_from_name(name, y).cut(X, y)
    for result in (X_cut, y_cut):
        assert not np.shares_memory(result, X)
        assert not np.shares_memory(result, y)
        assert result.base is None  # and it is no view of a larger copy


def test_the_same_draw_keeps_the_same_images_and_another_draw_others():
    assert kept_cats(draw=0) == kept_cats(draw=0)
    assert len(kept_cats(draw=0) & kept_cats(draw=1)) < 10  # 0.5 expected


def test_smaller_counts_keep_subsets_of_larger_ones():
    assert kept_cats(keep=1) < kept_cats(keep=50) < kept_cats(keep=100) < kept_cats(keep=0.5)
    assert not kept_cats(keep=50, draw=1) <= kept_cats(keep=100, draw=0)


def test_the_kept_cats_do_not_depend_on_the_other_minority_classes():
    assert kept_cats(minority=["dog", "cat"]) == kept_cats(minority="cat")


def test_classes_are_drawn_independently_of_each_other():
    rows = minority_split(Y, minority=["cat", "dog"]).kept_rows(Y)
    cat_positions = np.flatnonzero(np.isin(np.flatnonzero(Y == CAT), rows))
    dog_positions = np.flatnonzero(np.isin(np.flatnonzero(Y == DOG), rows))
    assert len(cat_positions) == len(dog_positions) == 50
    assert len(np.intersect1d(cat_positions, dog_positions)) < 10  # 0.5 expected


# --- Splits: names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat-50", minority_split(Y)),
        ("cat-0.01", minority_split(Y, keep=0.01)),
        ("cat-1.0", minority_split(Y, keep=1.0)),
        ("cat+dog-0.01", minority_split(Y, minority=["cat", "dog"], keep=0.01)),
        ("long-tailed-100", long_tailed_split(Y)),
        ("step-12.5", step_split(Y, imbalance_factor=12.5)),
        ("cat-50@1", minority_split(Y, draw=1)),
        ("cat+dog-20@12", minority_split(Y, minority=["cat", "dog"], keep=20, draw=12)),
        ("long-tailed-10@3", long_tailed_split(Y, imbalance_factor=10, draw=3)),
        ("step-10@2", step_split(Y, imbalance_factor=10, draw=2)),
    ],
)
def test_a_split_can_be_made_from_its_name(name, expected):
    assert expected.name == name
    assert split_from_name(name, Y) == expected


def test_draw_0_needs_no_suffix():
    assert split_from_name("cat-50@0", Y) == split_from_name("cat-50", Y)


def test_a_class_may_be_given_by_number_in_a_split_name():
    assert split_from_name("3-50", Y) == minority_split(Y)


@pytest.mark.parametrize(
    "name",
    [
        "", "cat", "-50", "cat-", "cat--50", "cat-fifty", "cat-50@", "cat-50@x", "cat-50 ", "cat+-50",
        "cat+cat-50", "lion-50", "cat-0", "cat-5001", "cat-1.5", "cat-0.0", "step-0", "long-tailed-0.5",
        "step-100000", "long-tailed-100000",
    ],
)  # fmt: skip
def test_bad_split_names_are_refused(name):
    with pytest.raises(ValueError):
        split_from_name(name, Y)


def test_the_message_for_a_malformed_name_shows_valid_ones():
    with pytest.raises(ValueError, match=r"cat-50.*long-tailed-100.*step-10"):
        split_from_name("cat", Y)


# --- Splits: bad input --------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", ["lion", "Cat", "", 10, -1, 3.0, "10", None])
def test_an_unknown_class_is_refused_with_the_valid_names(unknown):
    with pytest.raises(ValueError) as caught:
        class_number(unknown, CIFAR10_CLASSES)
    assert all(name in str(caught.value) for name in CIFAR10_CLASSES)


@pytest.mark.parametrize("keep", [0.0002, 0.00002, np.float32(0.01), np.float16(0.01), 1.0, 50])
def test_a_split_is_found_by_its_own_name(keep):
    split = minority_split(Y, keep=keep)
    assert split_from_name(split.name, Y) == split and "e-" not in split.name


@pytest.mark.parametrize("keep", [True, np.True_])
def test_true_is_no_number_of_images(keep):
    with pytest.raises(ValueError, match="Cannot keep True of class cat"):
        minority_split(Y, keep=keep)


@pytest.mark.parametrize("keep", [np.float32(0.01), np.float64(0.01), np.int32(50), np.uint8(50)])
def test_numbers_of_numpy_are_numbers(keep):
    assert minority_split(Y, keep=keep).counts == {CAT: 50}


@pytest.mark.parametrize(
    "name", ["cat-" + "9" * 400, "step-" + "9" * 400, "long-tailed-" + "9" * 400, "cat-0." + "0" * 400]
)
def test_numbers_beyond_floating_point_are_refused_with_a_sentence(name):
    with pytest.raises(ValueError, match="Cannot keep|leaves no image"):
        split_from_name(name, Y)


@pytest.mark.parametrize(
    "keep", [0, -1, 5001, 0.0, -0.5, 1.01, 50.0, float("nan"), float("inf"), np.float32("nan")]
)
def test_impossible_numbers_of_kept_images_are_refused(keep):
    with pytest.raises(ValueError):
        minority_split(Y, keep=keep)


def test_the_message_for_too_many_images_says_how_many_there_are():
    with pytest.raises(ValueError, match=r"cat.*5000"):
        minority_split(Y, keep=5001)


@pytest.mark.parametrize("minority", [[], ["cat", "cat"], ["cat", 3]])
def test_a_missing_or_repeated_minority_class_is_refused(minority):
    with pytest.raises(ValueError, match="once"):
        minority_split(Y, minority=minority)


@pytest.mark.parametrize("make_split", [long_tailed_split, step_split])
@pytest.mark.parametrize("factor", [0.99, 0, -10, float("nan")])
def test_imbalance_factors_below_1_are_refused(make_split, factor):
    with pytest.raises(ValueError, match="imbalance_factor"):
        make_split(Y, imbalance_factor=factor)


@pytest.mark.parametrize("count", [0, -1, 5001])
def test_a_split_with_an_impossible_count_is_refused_when_it_is_cut(count):
    with pytest.raises(ValueError, match="mine.*5000"):
        Split("mine", {CAT: count}, (CAT,)).cut(Y, Y)


# --- Loading the real data ----------------------------------------------------------------------


def test_cifar10_has_50000_training_and_10000_test_images(cifar10):
    assert cifar10.name == "cifar10"
    assert cifar10.class_names == CIFAR10_CLASSES
    assert cifar10.mirrored_images_keep_their_class
    for X, y, n in ((cifar10.X_train, cifar10.y_train, 50000), (cifar10.X_test, cifar10.y_test, 10000)):
        assert X.shape == (n, 32, 32, 3)
        assert X.dtype == np.uint8
        assert X.flags.c_contiguous
        assert y.dtype == np.int64
        assert np.bincount(y).tolist() == [n // 10] * 10


def test_cifar10_has_the_published_channel_means(cifar10):
    means = cifar10.X_train[::10].mean(axis=(0, 1, 2)) / 255  # of every tenth image
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.005)  # red, green, blue


def test_loading_and_cutting_takes_seconds(cifar10, cifar10_root):
    start = time.process_time()
    data = load_cifar10(cifar10_root)
    minority_split(data.y_train).cut(data.X_train, data.y_train)
    assert time.process_time() - start < 10
    assert np.array_equal(data.y_train, cifar10.y_train)


def test_the_default_root_is_cifar10_root_or_else_datasets(monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", "/some/where")
    assert default_root() == Path("/some/where")
    monkeypatch.setenv("CIFAR10_ROOT", "")
    assert default_root() == Path("datasets")
    monkeypatch.delenv("CIFAR10_ROOT")
    assert default_root() == Path("datasets")


def test_a_tilde_in_the_root_is_the_home_folder(small_cifar, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CIFAR10_ROOT", "~/data")
    assert default_root() == tmp_path / "home" / "data"
    small_cifar.write(tmp_path / "home" / "data")
    assert len(load_cifar10().X_train) == len(load_cifar10("~/data").X_train) == 20


# --- Loading, damage and download, on a small archive in CIFAR-10's layout ----------------------


class SmallCifar:
    """Five training batches of 4 images and one of 10 test images, with their archive."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.batches = {}
        for name, n in {**{f"data_batch_{i}": 4 for i in range(1, 6)}, "test_batch": 10}.items():
            self.batches[name] = {
                "data": rng.integers(0, 256, size=(n, 3072), dtype=np.uint8),
                "labels": rng.integers(0, 10, size=n).tolist(),
            }
        self.files = {name: pickle.dumps(batch) for name, batch in self.batches.items()}
        self.files["batches.meta"] = pickle.dumps({"label_names": list(CIFAR10_CLASSES)})
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in self.files.items():
                member = tarfile.TarInfo(f"{FOLDER}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        self.archive = buffer.getvalue()

    def write(self, root):
        (root / FOLDER).mkdir(parents=True)
        for name, content in self.files.items():
            (root / FOLDER / name).write_bytes(content)
        return root / FOLDER


@pytest.fixture
def small_cifar(monkeypatch):
    """A :class:`SmallCifar` that torchvision accepts as the real one."""
    small = SmallCifar()
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in small.files.items()}
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(small.archive).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://never.invalid/asked-for")
    return small


def test_batches_become_images_in_order_with_the_colour_planes_last(small_cifar, tmp_path):
    small_cifar.write(tmp_path)
    data = load_cifar10(tmp_path)
    planes = np.concatenate([small_cifar.batches[f"data_batch_{i}"]["data"] for i in range(1, 6)])
    for channel in range(3):
        plane = planes[:, 1024 * channel : 1024 * (channel + 1)].reshape(-1, 32, 32)
        assert np.array_equal(data.X_train[..., channel], plane)
    assert data.y_train[8:12].tolist() == small_cifar.batches["data_batch_3"]["labels"]
    assert data.y_test.tolist() == small_cifar.batches["test_batch"]["labels"]


def test_a_missing_copy_is_downloaded_once_and_nothing_else_is_left(
    small_cifar, tmp_path, server, monkeypatch
):
    server.files["/cifar.tar.gz"] = small_cifar.archive
    monkeypatch.setattr(CIFAR10, "url", f"{server.url}/cifar.tar.gz")
    root = tmp_path / "a" / "b"
    first = load_cifar10(root)
    assert [f.name for f in root.iterdir()] == [FOLDER]
    assert sorted(f.name for f in (root / FOLDER).iterdir()) == sorted(small_cifar.files)
    asked = len(server.requests)
    assert asked > 0
    second = load_cifar10(root)
    assert len(server.requests) == asked
    assert np.array_equal(first.X_train, second.X_train)
    assert len(first.X_train) == 20


def test_an_archive_in_the_root_is_unpacked_without_a_network(small_cifar, tmp_path, closed_url, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", closed_url)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(small_cifar.archive)
    unpacked = load_cifar10(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [FOLDER, "cifar-10-python.tar.gz"]
    assert len(unpacked.X_train) == 20
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    assert np.array_equal(load_cifar10(tmp_path).X_train, unpacked.X_train)


@pytest.mark.parametrize(
    "damage", [lambda a: a[:-50], lambda a: a + b"\0", lambda a: b"", lambda a: b"<html>"]
)
@pytest.mark.parametrize("load", [load_cifar10, load_data])
def test_a_damaged_archive_in_the_root_is_named_and_not_unpacked(small_cifar, tmp_path, damage, load):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(damage(small_cifar.archive))
    before = archive.read_bytes()
    with pytest.raises(
        ValueError, match=r"cifar-10-python\.tar\.gz is truncated, damaged or another file.*MD5"
    ):
        load(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [archive.name]
    assert archive.read_bytes() == before


def test_two_processes_may_unpack_at_the_same_time(small_cifar, tmp_path, monkeypatch):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(small_cifar.archive)
    rename = Path.rename

    def be_second(source, target):
        small_cifar.write(tmp_path)
        rename(source, target)

    monkeypatch.setattr(Path, "rename", be_second)
    assert len(load_cifar10(tmp_path).X_train) == 20
    assert sorted(f.name for f in tmp_path.iterdir()) == [FOLDER, "cifar-10-python.tar.gz"]


@pytest.mark.parametrize("damage", [lambda a: a[:-50], lambda a: a + b"\0", lambda a: b"<html>busy</html>"])
def test_a_damaged_download_is_refused_and_leaves_nothing(small_cifar, tmp_path, server, monkeypatch, damage):
    server.files["/cifar.tar.gz"] = damage(small_cifar.archive)
    monkeypatch.setattr(CIFAR10, "url", f"{server.url}/cifar.tar.gz")
    root = tmp_path / "root"
    with pytest.raises(DataUnavailableError, match=str(root)):
        load_cifar10(root)
    assert not root.exists() or not list(root.iterdir())


def test_a_server_that_does_not_answer_is_noticed_within_seconds(tmp_path, closed_url, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", closed_url)
    start = time.monotonic()
    with pytest.raises(DataUnavailableError, match="CIFAR10_ROOT"):
        load_cifar10(tmp_path)
    assert time.monotonic() - start < 5
    assert not list(tmp_path.iterdir())


def test_a_download_that_stalls_is_given_up(tmp_path, hanging_url, little_patience, monkeypatch):
    monkeypatch.setattr(ImbalancedCIFAR10, "is_reachable", lambda url: True)
    monkeypatch.setattr(CIFAR10, "url", hanging_url)
    start = time.monotonic()
    with pytest.raises(DataUnavailableError, match="download of CIFAR-10 .* failed: .*timed out"):
        load_cifar10(tmp_path)
    assert time.monotonic() - start < 5 and socket.getdefaulttimeout() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_a_damaged_file_is_named_and_left_as_it_is(small_cifar, tmp_path, name, damage):
    file = small_cifar.write(tmp_path) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + b"!")
    before = sorted((f.name, f.read_bytes()) for f in (tmp_path / FOLDER).iterdir())
    with pytest.raises(ValueError, match=name) as caught:
        load_cifar10(tmp_path)
    assert "data_batch_1" not in str(caught.value)  # only the damaged file is named
    assert sorted((f.name, f.read_bytes()) for f in (tmp_path / FOLDER).iterdir()) == before


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_tampered_batch_is_not_unpickled(small_cifar, tmp_path):
    (small_cifar.write(tmp_path) / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="data_batch_1"):
        load_cifar10(tmp_path)
    assert not Path("unpickled").exists()


def test_load_data_returns_cifar10_if_there_is_a_copy(small_cifar, tmp_path):
    small_cifar.write(tmp_path)
    assert load_data(tmp_path).name == "cifar10"


def test_load_data_without_data_and_network_warns_and_returns_digits(tmp_path, closed_url, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", closed_url)
    with pytest.warns(UserWarning, match="NOT CIFAR-10"):
        data = load_data(tmp_path / "nothing")
    assert data.name == "digits"


def test_load_data_with_a_damaged_copy_still_raises(small_cifar, tmp_path):
    (small_cifar.write(tmp_path) / "data_batch_2").unlink()
    with pytest.raises(ValueError, match="data_batch_2"):
        load_data(tmp_path)


# --- A part -------------------------------------------------------------------------------------


def test_a_part_holds_the_first_images_of_each_class_in_their_order(tiny_data):
    part = tiny_data.part(8)
    assert part.most_images_a_class == 8 and tiny_data.most_images_a_class is None
    for X, y, whole_X, whole_y in [
        (part.X_train, part.y_train, tiny_data.X_train, tiny_data.y_train),
        (part.X_test, part.y_test, tiny_data.X_test, tiny_data.y_test),
    ]:
        rows = [row for row, c in enumerate(whole_y) if np.sum(whole_y[:row] == c) < 8]
        assert np.bincount(y).tolist() == [8] * 10
        assert np.array_equal(X, whole_X[rows]) and np.array_equal(y, whole_y[rows])
        assert not np.shares_memory(X, whole_X)
    assert (part.name, part.class_names) == (tiny_data.name, tiny_data.class_names)


def test_a_class_with_fewer_images_keeps_them_all_and_none_means_all(tiny_data):
    part = tiny_data.part(20)
    assert np.bincount(part.y_train).tolist() == [20] * 10 and np.array_equal(part.X_test, tiny_data.X_test)
    assert tiny_data.part(None) is tiny_data


# --- Digits -------------------------------------------------------------------------------------


def test_digits_come_in_the_format_of_cifar10():
    data = load_digits_as_images()
    assert data.X_train.shape == (1437, 32, 32, 3)
    assert data.X_test.shape == (360, 32, 32, 3)
    assert data.class_names == tuple("0123456789")
    assert not data.mirrored_images_keep_their_class
    for X, y in ((data.X_train, data.y_train), (data.X_test, data.y_test)):
        assert X.dtype == np.uint8
        assert y.dtype == np.int64
        assert (X.min(), X.max()) == (0, 255)
        assert np.array_equal(X[..., 0], X[..., 1])
        assert np.array_equal(X[..., 0], X[..., 2])


def test_every_digit_is_in_the_training_or_the_test_set_exactly_once():
    data = load_digits_as_images()
    small = np.concatenate([data.X_train, data.X_test])[:, ::4, ::4, 0]
    original = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(i.tobytes() for i in small) == sorted(i.tobytes() for i in original)
    assert np.array_equal(np.kron(small[0], np.ones((4, 4), dtype=np.uint8)), data.X_train[0, ..., 0])
    sizes = np.bincount(load_digits().target)
    assert np.array_equal(np.bincount(data.y_train) + np.bincount(data.y_test), sizes)
    assert np.all(np.abs(np.bincount(data.y_test) - sizes / 5) < 1)


def test_the_test_set_of_the_digits_is_the_same_in_every_call():
    first = load_digits_as_images()
    again = load_digits_as_images()
    for name in ("X_train", "y_train", "X_test", "y_test"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    # The committed results need this choice of test images.
    assert checksum(first.X_train, first.y_train, first.X_test, first.y_test) == 2770301835


# --- Labels of one's own ------------------------------------------------------------------------


class Series:
    """Labels with an index of their own, by which they are looked up, as those of a pandas Series."""

    def __init__(self, values, index):
        self.values, self.index = values, index

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)

    def __getitem__(self, labels):
        return self.values[np.argsort(self.index)[labels]]


def test_images_keep_their_labels_whatever_the_index_of_a_series():
    y = np.arange(30) % 3
    X = np.repeat(y, 2).reshape(30, 2)  # an image shows its class
    shuffled = Series(y, index=np.random.default_rng(0).permutation(30))
    for labels in (y, shuffled, y.tolist()):
        X_cut, y_cut = minority_split(labels, ("ape", "bee", "cow"), "cow", 4).cut(X, labels)
        assert np.array_equal(X_cut[:, 0], y_cut)
        assert np.bincount(y_cut).tolist() == [10, 10, 4]


def test_labels_that_would_make_another_class_rare_are_refused():
    y, names = np.arange(30) % 3, ("ape", "bee", "cow")
    for make in (
        lambda labels: minority_split(labels, names, "cow", 4),
        lambda labels: long_tailed_split(labels, names, 2),
        lambda labels: step_split(labels, names, 2),
    ):
        with pytest.raises(ValueError, match="Labels run from 1 to 3 in y, but there are classes 0 to 2"):
            make(y + 1)
        with pytest.raises(TypeError, match="class numbers"):
            make(np.array(names)[y])
    with pytest.raises(ValueError, match=r"Split mine keeps images of the classes \[9\], but y has none"):
        Split("mine", {9: 3}, (9,)).cut(np.zeros((30, 1)), y)
    with pytest.raises(ValueError, match="X has 31 images, y has 30"):
        minority_split(y, names, "cow", 4).cut(np.zeros((31, 1)), y)


def test_a_number_is_a_class_even_if_another_has_it_as_its_name():
    grades = ["1", "2", "3", "4"]
    assert class_number(2, grades) == 2 and class_number("2", grades) == 1
    assert minority_split(np.repeat(range(4), 20), grades, 2, 10).name == "3-10"


@pytest.mark.parametrize("make_split", [minority_split, long_tailed_split, step_split])
def test_forgotten_class_names_are_noticed(make_split):
    with pytest.raises(ValueError, match="no image of the classes horse, ship, truck.*class_names"):
        make_split(np.repeat(range(7), 200))


@pytest.mark.parametrize("names", [{"0": "a", "1": "b"}, "ab", [0, 1]])
def test_class_names_are_a_list_of_text(names):
    with pytest.raises(TypeError, match="class_names must be a list of names"):
        minority_split(np.repeat(range(2), 20), names, 0, 10)


@pytest.mark.parametrize("minority", [None, 2.0])
def test_a_minority_that_is_no_class_is_refused(minority):
    with pytest.raises(TypeError, match="minority must be a class's name or number"):
        minority_split(Y, minority=minority)


def test_a_long_tail_needs_classes_that_fall():
    y = np.repeat(range(4), [40, 40, 3, 40])
    with pytest.raises(ValueError, match=r"more images of the classes c \(3 of"):
        long_tailed_split(y, list("abcd"), 4)

"""Metrics, seeding, safe file writing, reachability and plots."""

import json
import os
import socket
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from Runtime import (
    atomic_path,
    checksum,
    choose_device,
    derive_seed,
    describe_hardware,
    deterministic_convolutions,
    hardware_text,
    is_reachable,
    require_free_space,
    save_json,
    seeded,
)
from Utils import (
    COLOURS,
    classification_metrics,
    markdown_table,
    mcnemar_test,
    plot_class_counts,
    plot_comparison,
    plot_confusion_matrix,
    plot_image_rows,
    plot_learning_curves,
    save_figure,
)

# --- Tables -------------------------------------------------------------------------------------


def test_a_table_has_its_first_column_to_the_left_and_the_others_to_the_right():
    table = markdown_table(("arm", "recall", "n"), [("imbalanced", "0.0", "1"), ("SMOTE", "5.6", "2")])
    assert table.splitlines() == [
        "| arm | recall | n |", "| --- | ---: | ---: |", "| imbalanced | 0.0 | 1 |", "| SMOTE | 5.6 | 2 |",
    ]  # fmt: skip


# --- Metrics ------------------------------------------------------------------------------------

# Confusion matrix (rows: true class):   a  b  c     recall
#                                    a   3  1  0     3/4
#                                    b   0  2  1     2/3
#                                    c   2  0  1     1/3
#                             precision  3/5 2/3 1/2
Y_TRUE = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
Y_PRED = np.array([0, 0, 0, 1, 1, 1, 2, 2, 0, 0])
CLASSES = ("a", "b", "c")


def test_metrics_equal_hand_computed_values():
    metrics = classification_metrics(Y_TRUE, Y_PRED, CLASSES, [2])
    assert metrics["confusion_matrix"] == [[3, 1, 0], [0, 2, 1], [2, 0, 1]]
    # F1 of c: 2 * (1/3 * 1/2) / (1/3 + 1/2) = (1/3) / (5/6) = 0.4
    assert metrics["minority"] == {
        "classes": ["c"],
        "recall": pytest.approx(1 / 3),
        "precision": pytest.approx(1 / 2),
        "f1": pytest.approx(0.4),
    }
    assert metrics["accuracy"] == pytest.approx(6 / 10)
    # (3/4 + 2/3 + 1/3) / 3 = (9 + 8 + 4) / 36 = 21/36
    assert metrics["balanced_accuracy"] == pytest.approx(21 / 36)
    # F1 of a: 2 * (3/4 * 3/5) / (3/4 + 3/5) = 0.9 / 1.35 = 2/3; of b: 2/3. (2/3 + 2/3 + 2/5) / 3 = 26/45
    assert metrics["macro_f1"] == pytest.approx(26 / 45)
    # 3/4 * 2/3 * 1/3 = 1/6
    assert metrics["g_mean"] == pytest.approx((1 / 6) ** (1 / 3))
    # (3/4 + 2/3) / 2 = 17/24
    assert metrics["majority_recall"] == pytest.approx(17 / 24)
    assert list(metrics["per_class"]) == ["a", "b", "c"]
    assert metrics["per_class"]["a"] == {
        "recall": pytest.approx(3 / 4),
        "precision": pytest.approx(3 / 5),
        "f1": pytest.approx(2 / 3),
        "support": 4,
    }


def test_scores_of_several_minority_classes_are_averaged():
    metrics = classification_metrics(Y_TRUE, Y_PRED, CLASSES, [2, 1])
    assert metrics["minority"]["classes"] == ["c", "b"]
    assert metrics["minority"]["recall"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert metrics["minority"]["precision"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics["majority_recall"] == pytest.approx(3 / 4)


def test_there_is_no_majority_recall_if_every_class_is_a_minority():
    assert classification_metrics(Y_TRUE, Y_PRED, CLASSES, [0, 1, 2])["majority_recall"] is None


def test_a_class_that_is_never_predicted_scores_zero_without_warnings():
    never_c = np.where(Y_PRED == 2, 0, Y_PRED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = classification_metrics(Y_TRUE, never_c, CLASSES, [2])
    assert metrics["minority"] == {"classes": ["c"], "recall": 0, "precision": 0, "f1": 0}
    assert metrics["g_mean"] == 0
    assert metrics["accuracy"] == pytest.approx(5 / 10)


def test_perfect_predictions_score_one():
    metrics = classification_metrics(Y_TRUE, Y_TRUE, CLASSES, [2])
    for key in ("balanced_accuracy", "macro_f1", "g_mean", "accuracy", "majority_recall"):
        assert metrics[key] == pytest.approx(1)


def test_metrics_can_be_saved_as_json():
    metrics = classification_metrics(Y_TRUE, Y_PRED, CLASSES, [2])
    save_json("metrics.json", metrics)
    assert json.loads(Path("metrics.json").read_text()) == metrics


def predictions(only_first, only_second, both=3, neither=2):
    """True classes and two models' predictions with these numbers of right answers."""
    counts = (only_first, only_second, both, neither)
    first = np.repeat([1, 0, 1, 0], counts)
    second = np.repeat([0, 1, 1, 0], counts)
    return np.ones(sum(counts), dtype=int), first, second


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (0, 5, 2 / 32),  # 2 * C(5,0) / 2^5
        (1, 6, 0.125),  # 2 * (C(7,0) + C(7,1)) / 2^7 = 2 * 8 / 128
        (2, 8, 112 / 1024),  # 2 * (1 + 10 + 45) / 2^10
    ],
)
def test_mcnemar_equals_hand_computed_binomial_values_both_ways_round(only_first, only_second, p_value):
    y_true, first, second = predictions(only_first, only_second)
    expected = {"only_first_right": only_first, "only_second_right": only_second}
    assert mcnemar_test(y_true, first, second) == {**expected, "p_value": pytest.approx(p_value)}
    assert mcnemar_test(y_true, second, first)["p_value"] == pytest.approx(p_value)
    assert mcnemar_test(y_true, second, first)["only_first_right"] == only_second


def test_mcnemar_does_not_depend_on_images_that_both_or_neither_get_right():
    assert mcnemar_test(*predictions(1, 6, both=0, neither=0)) == mcnemar_test(*predictions(1, 6, 90, 70))


@pytest.mark.parametrize("shapes", [(5, 4, 5), (5, 5, 4), (4, 5, 5)])
def test_mcnemar_refuses_predictions_for_other_images(shapes):
    with pytest.raises(ValueError, match="same images"):
        mcnemar_test(*(np.zeros(n, dtype=int) for n in shapes))


# --- Randomness and device ----------------------------------------------------------------------


def test_seeded_restores_the_callers_generator_even_after_an_error():
    before = torch.get_rng_state()
    with seeded(1):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyError), seeded(1):
        assert torch.equal(torch.rand(3), inside)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(2):
        assert not torch.equal(torch.rand(3), inside)


def test_derived_seeds_are_distinct_repeatable_and_have_63_bits():
    parts = [(seed, epoch) for seed in range(40) for epoch in range(40)]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert seeds == [derive_seed(*p) for p in parts]
    assert all(isinstance(s, int) and 0 <= s < 2**63 for s in seeds)
    assert max(seeds) > 2**62
    torch.Generator().manual_seed(max(seeds))  # fits


def test_deterministic_convolutions_leave_a_users_other_choices_alone(monkeypatch):
    cudnn = torch.backends.cudnn
    for name, value in (("benchmark", True), ("deterministic", False), ("allow_tf32", False)):
        monkeypatch.setattr(cudnn, name, value)
    with pytest.raises(KeyError), deterministic_convolutions():
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (False, True, False)
        raise KeyError
    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, False, False)


def test_a_device_can_be_named_and_described():
    assert choose_device("cpu") == torch.device("cpu")
    assert isinstance(choose_device(), torch.device)
    hardware = describe_hardware(torch.device("cpu"))
    assert hardware["device"] == "cpu"
    assert hardware["name"]
    assert hardware["cpu_threads"] == torch.get_num_threads()


# --- Files --------------------------------------------------------------------------------------


def test_a_successful_write_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("old", "new"):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error("stop")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_that_the_umask_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_json(tmp_path / "file.json", {})
        assert os.umask(umask) == umask  # and the umask is left alone
    finally:
        os.umask(before)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("path", ["file/below.json", "file/further/below.json"])
def test_a_place_that_cannot_be_written_to_is_named(path):
    Path("file").write_text("not a folder")
    with pytest.raises(OSError, match=path):
        save_json(path, {})
    assert Path("file").read_text() == "not a folder"


def test_a_folder_in_the_files_place_is_named_and_nothing_left_behind(tmp_path):
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(OSError, match=r"taken\.json"):
        save_json("taken.json", {})
    assert [f.name for f in tmp_path.iterdir()] == ["taken.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan")])
def test_json_refuses_nan_and_infinity_and_keeps_the_old_file(value):
    save_json("file.json", {"x": 1})
    with pytest.raises(ValueError):
        save_json("file.json", {"x": value})
    assert json.loads(Path("file.json").read_text()) == {"x": 1}
    assert len(list(Path().iterdir())) == 1


def test_saved_figures_are_png_and_still_open():
    figure = plot_image_rows({"row": np.zeros((1, 4, 4, 3), dtype=np.uint8)}, "title")
    assert save_figure(figure, "images/plot.png") is figure
    with Image.open("images/plot.png") as image:
        assert image.format == "PNG"
        assert image.width > 100
    assert [f.name for f in Path("images").iterdir()] == ["plot.png"]


def test_too_little_free_space_is_an_error_that_gives_both_numbers(tmp_path):
    require_free_space(tmp_path / "not" / "there" / "yet", 0)
    with pytest.raises(OSError, match=r"1000000000\.00 GB"):
        require_free_space(tmp_path / "not" / "there" / "yet", 1e9)
    assert not (tmp_path / "not").exists()


# --- Reachability -------------------------------------------------------------------------------


def test_an_address_is_reachable_only_where_the_server_has_the_file(server):
    server.files["/file"] = b"content"
    assert is_reachable(f"{server.url}/file", seconds=5)
    assert not is_reachable(f"{server.url}/other", seconds=1)


def test_a_closed_port_is_noticed_at_once(closed_url):
    start = time.monotonic()
    assert not is_reachable(closed_url, seconds=10)
    assert time.monotonic() - start < 3


def test_a_server_that_never_answers_is_given_up_after_the_given_seconds(hanging_url):
    start = time.monotonic()
    assert not is_reachable(hanging_url, seconds=0.5)
    assert 0.3 < time.monotonic() - start < 2


def test_a_name_look_up_that_hangs_is_given_up_after_the_given_seconds(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(3))
    start = time.monotonic()
    assert not is_reachable("http://somewhere.invalid/", seconds=0.3)
    assert time.monotonic() - start < 2


# --- Plots --------------------------------------------------------------------------------------


def test_class_counts_have_a_bar_for_each_class_and_source():
    counts = {
        "imbalanced": (np.array([50, 3, 40]), np.array([0, 0, 0])),
        "balanced": (np.array([50, 3, 40]), np.array([0, 47, 10])),
    }
    figure = plot_class_counts(counts, CLASSES, "Title")
    without, with_synthetic = figure.axes
    assert [bar.get_height() for bar in without.patches] == [50, 3, 40]
    assert [bar.get_height() for bar in with_synthetic.patches] == [50, 3, 40, 0, 47, 10]
    assert with_synthetic.patches[4].get_y() == 3  # stacked on the real images
    assert to_hex(with_synthetic.patches[4].get_facecolor()).upper() == COLOURS["synthetic"]
    assert [t.get_text() for t in without.get_xticklabels()] == list(CLASSES)
    assert without.get_ylabel() == "training images"
    assert figure.get_suptitle() == "Title"


def test_image_rows_show_every_image_beside_its_label():
    rows = {
        "real": np.full((2, 4, 4, 3), 10, dtype=np.uint8),
        "synthetic": np.full((5, 4, 4, 3), 99, dtype=np.uint8),
    }
    figure = plot_image_rows(rows, "Title")
    shown = [int(image.get_array()[0, 0, 0]) for ax in figure.axes for image in ax.images]
    assert shown == [10] * 2 + [99] * 5
    assert [t.get_text() for ax in figure.axes for t in ax.texts] == ["real", "synthetic"]


def test_learning_curves_have_a_line_for_each_run_and_quantity():
    epoch = {
        "train_loss": 1,
        "test_loss": 2,
        "train_accuracy": 0.5,
        "test_accuracy": 0.4,
        "test_minority_recall": 0,
    }
    history = [{"images_seen": n, **epoch} for n in (1000, 2000)]
    left, right = plot_learning_curves([history, history], "Title", chance=0.1).axes
    assert (len(left.lines), len(right.lines)) == (2 * 2, 2 * 3 + 1)
    assert list(left.lines[0].get_xdata()) == [1, 2]  # thousands
    assert list(left.lines[1].get_ydata()) == [2, 2]
    assert right.lines[-1].get_ydata()[0] == 0.1
    assert len(right.get_legend().get_texts()) == 4  # each quantity is named once
    assert "thousands" in left.get_xlabel()
    assert left.get_ylabel() == "loss (nats)"


def test_the_confusion_matrix_shows_the_share_of_each_true_class_in_percent():
    figure = plot_confusion_matrix([[3, 1, 0], [0, 4, 0], [0, 0, 0]], CLASSES, "Title")
    ax = figure.axes[0]
    shown = np.asarray(ax.images[0].get_array())
    assert shown.tolist() == [[75, 25, 0], [0, 100, 0], [0, 0, 0]]  # a class without images: zeros, not NaN
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("predicted class", "true class", "Title")
    assert figure.axes[1].get_ylabel() == "share of the true class (%)"


def test_the_comparison_has_a_bar_for_each_arm_and_a_dot_for_each_run():
    rows = {
        "first": {"minority_recall": [0.1, 0.3], "balanced_accuracy": [0.5, 0.7], "accuracy": [0.8, 0.9]},
        "second": {"minority_recall": [0.6], "balanced_accuracy": [0.7], "accuracy": [0.85]},
    }
    figure = plot_comparison(rows, "Title")
    recall, _, accuracy = figure.axes
    assert [bar.get_width() for bar in recall.patches] == pytest.approx([0.2, 0.6])
    assert [list(line.get_xdata()) for line in recall.lines] == [[0.1, 0.3], [0.6]]
    assert [t.get_text() for t in recall.texts] == ["20.0", "60.0"]
    heights = [bar.get_y() for bar in recall.patches]
    assert heights[0] > heights[1]  # the first arm on top
    labels = dict(zip(recall.get_yticks(), (t.get_text() for t in recall.get_yticklabels()), strict=True))
    assert labels == {1: "first", 0: "second"}
    assert len(accuracy.lines) == 2  # the dots of each arm
    assert all(ax.get_xlabel() for ax in figure.axes)


def test_the_checksum_is_that_of_all_contents_in_order():
    X, y = np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(3)
    assert checksum(y, X) == zlib.crc32(y.tobytes() + X.tobytes())
    assert checksum(y, X[:, ::-1]) == zlib.crc32(y.tobytes() + X[:, ::-1].tobytes()) != checksum(y, X)


def test_hardware_reads_well_in_a_sentence():
    assert (
        hardware_text({"device": "cpu", "name": "AMD EPYC", "cpu_threads": 1}) == "CPU (AMD EPYC, 1 thread)"
    )
    assert (
        hardware_text({"device": "cuda", "name": "H100", "cpu_threads": 16}) == "CUDA (H100, 16 CPU threads)"
    )

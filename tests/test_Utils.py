"""Tables, metrics, saved figures and plots."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from Files import save_json
from ImageStatistics import mean_power
from Utils import (
    COLOURS,
    classification_metrics,
    markdown_table,
    plot_adversarial_training,
    plot_class_counts,
    plot_comparison,
    plot_confusion_matrix,
    plot_generation_quality,
    plot_image_rows,
    plot_learning_curves,
    plot_memorisation,
    plot_power_spectra,
    save_figure,
)

# --- Tables -------------------------------------------------------------------------------------


def test_a_table_aligns_its_first_column_to_the_left_and_the_others_to_the_right():
    table = markdown_table(("arm", "recall", "n"), [("imbalanced", "0.0", "1"), ("SMOTE", "5.6", "2")])
    assert table.splitlines() == [
        "| arm | recall | n |", "| --- | ---: | ---: |", "| imbalanced | 0.0 | 1 |", "| SMOTE | 5.6 | 2 |",
    ]  # fmt: skip


def test_a_table_of_words_is_aligned_to_the_left():
    assert markdown_table(("arm", "loss"), [], align="left").splitlines()[1] == "| --- | --- |"


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


# --- Files --------------------------------------------------------------------------------------


def test_a_saved_figure_is_a_png_file_and_stays_open():
    figure = plot_image_rows({"row": np.zeros((1, 4, 4, 3), dtype=np.uint8)}, "title")
    assert save_figure(figure, "images/plot.png") is figure
    with Image.open("images/plot.png") as image:
        assert image.format == "PNG"
        assert image.width > 100
    assert [f.name for f in Path("images").iterdir()] == ["plot.png"]


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


def test_a_wave_shows_at_its_frequency_in_any_direction():
    wave = 100 + 50 * np.cos(2 * np.pi * 3 * np.arange(16) / 16)
    across = np.broadcast_to(wave[:, None], (16, 16, 3)).astype(np.uint8)
    powers = {"across": mean_power(across[None]), "down": mean_power(across.swapaxes(0, 1)[None])}
    figure = plot_power_spectra(powers, "Title")
    [axes] = figure.axes
    for line in axes.lines:
        assert line.get_xdata().tolist() == list(range(1, 9))
        assert line.get_xdata()[line.get_ydata().argmax()] == 3
    assert np.allclose(*(line.get_ydata() for line in axes.lines))
    assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title() == "Title"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["across", "down"]


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
        "first": {
            "minority_recall": [0.1, 0.3],
            "minority_precision": [0.8, 0.9],
            "balanced_accuracy": [0.5, 0.7],
        },
        "second": {"minority_recall": [0.6], "minority_precision": [0.85], "balanced_accuracy": [0.7]},
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


def test_an_arm_without_a_precision_has_a_dash():
    row = {"minority_recall": [0.0], "minority_precision": [np.nan], "balanced_accuracy": [0.5]}
    _, precision, _ = plot_comparison({"imbalanced": row}, "Title").axes
    assert [t.get_text() for t in precision.texts] == ["–"]


GAN_HISTORY = [
    {
        "step": step,
        "images_seen": 100 * step,
        "discriminator_loss": 1.5,
        "generator_loss": 0.5,
        "score_of_real": 0.75,
        "score_of_generated": -0.25,
        "quality": quality,
    }
    for step, quality in ((10, 9.0), (20, 7.0), (30, 8.0))
]


def test_the_adversarial_training_has_a_line_for_each_loss_and_score():
    figure = plot_adversarial_training(GAN_HISTORY, "Title")
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines[:2]] == [[1.5] * 3, [0.5] * 3]
    assert [list(line.get_ydata()) for line in right.lines] == [[0.75] * 3, [-0.25] * 3]
    assert list(left.lines[0].get_xdata()) == [1, 2, 3]  # thousands
    assert [ax.get_ylabel() for ax in figure.axes] == ["hinge loss", "discriminator's score"]
    assert figure.get_suptitle() == "Title"


def test_the_generation_quality_marks_the_chosen_step():
    [ax] = plot_generation_quality(GAN_HISTORY, 20, "Fréchet distance", "Title").axes
    quality, chosen = ax.lines
    assert list(quality.get_ydata()) == [9, 7, 8]
    assert (list(chosen.get_xdata()), list(chosen.get_ydata())) == ([2], [7])
    assert (ax.get_ylabel(), ax.get_title()) == ("Fréchet distance", "Title")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["chosen: step 20"]


def test_memorisation_shows_each_generated_image_above_its_nearest_real_one():
    def grey(*values):
        return np.stack([np.full((4, 4, 3), value, dtype=np.uint8) for value in values])

    real, generated = grey(10, 20), grey(101, 102, 103, 104, 105)
    memory = SimpleNamespace(nearest=np.array([1, 0, 0, 1, 1]), distances=np.array([5.0, 1.0, 4.0, 2.0, 3.0]))
    figure = plot_memorisation(real, generated, memory, "Title", columns=3)
    shown = [int(image.get_array()[0, 0, 0]) for ax in figure.axes for image in ax.images]
    assert shown[:6] == [102, 104, 105] + [10, 20, 20]  # the three nearest ones
    assert shown[6:] == [102, 105, 101] + [10, 20, 20]  # the nearest, the middle one, the farthest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"y_true": a["y_true"] + 1}, "Labels run from 1 to 3 in y_true"),
        (lambda a: a | {"y_pred": a["y_pred"] - 1}, "Labels run from -1 to 1 in y_pred"),
        (lambda a: a | {"y_pred": a["y_pred"][1:]}, "5 predictions of 6 images"),
        (lambda a: a | {"minority_classes": []}, "one or more numbers of classes"),
        (lambda a: a | {"minority_classes": [-1]}, r"must be from 0 to 2: got \[-1\]"),
        (
            lambda a: a | {"class_names": "abcd", "minority_classes": [3]},
            r"No image in y_true is of the minority classes \[3\]",
        ),
        (lambda a: a | {"minority_classes": [2, 2]}, "each only once"),
        (lambda a: a | {"class_names": "aba"}, "same name"),
    ],
)
def test_metrics_of_labels_or_classes_that_do_not_fit_are_refused(change, message):
    arguments = {
        "y_true": np.array([0, 0, 1, 1, 2, 2]), "y_pred": np.array([0, 1, 1, 1, 2, 0]),
        "class_names": "abc", "minority_classes": [2],
    }  # fmt: skip
    assert classification_metrics(**arguments)["minority"]["recall"] == 0.5
    with pytest.raises(ValueError, match=message):
        classification_metrics(**change(arguments))


def test_a_class_without_test_images_enters_no_average():
    scores = classification_metrics([0, 0, 1, 1], [0, 0, 1, 1], ["a", "b", "c"], [1])
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "g_mean", "majority_recall"):
        assert scores[name] == 1, name
    assert scores["per_class"]["c"] == {"recall": None, "precision": None, "f1": None, "support": 0}
    wrong = classification_metrics([0, 0, 1, 1], [0, 2, 1, 1], ["a", "b", "c"], 1)
    assert wrong["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert wrong["majority_recall"] == 0.5 and wrong["minority"]["recall"] == 1


def test_a_confusion_matrix_may_hold_fractions():
    figure = plot_confusion_matrix([[0.3, 0.1], [0, 0]], ["a", "b"], "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "0", "0"]


def test_pictures_of_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="a set needs two arrays of 2 numbers"):
        plot_class_counts({"a set": np.array([50, 5])}, ["healthy", "ill"], "title")
    with pytest.raises(ValueError, match="must have the shape"):
        plot_image_rows({"grey": np.zeros((2, 8, 8), dtype=np.uint8)}, "title")

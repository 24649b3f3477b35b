"""Probabilities are judged by what happens: ranking, calibration error, reliability."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from Calibration import plot_reliability, probability_metrics
from Files import save_json


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, dtype=np.float64))


def test_the_calibration_error_is_the_distance_of_confidence_and_accuracy():
    """Four images at 70 %, of which three are right, and two at 90 %, of which one is: (4 * 0.05 + 2 * 0.4) / 6."""
    logits = logits_of([[0.7, 0.3]] * 4 + [[0.1, 0.9]] * 2)
    scores = probability_metrics(logits, np.array([0, 0, 0, 1, 1, 0]), [1])
    assert scores["expected_calibration_error"] == pytest.approx(1 / 6, abs=1e-6)


def test_a_confidence_of_exactly_1_is_in_the_last_bin():
    """Two images at 1, of which one is right, and two right ones at 0.95: one bin of confidence 0.975 and accuracy 0.75."""
    logits = np.concatenate([np.array([[100.0, 0.0]] * 2), logits_of([[0.95, 0.05]] * 2)])
    scores = probability_metrics(logits, np.array([0, 1, 0, 0]), [1])
    assert scores["expected_calibration_error"] == pytest.approx(0.225, abs=1e-6)


def test_the_ranking_does_not_depend_on_where_the_decision_falls():
    logits = logits_of([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.95, 0.05]])
    y = np.array(
        [0, 1, 1, 0]
    )  # none is predicted as class 1, and the two of class 1 are the most probable ones
    scores = probability_metrics(logits, y, [1])["minority"]
    assert scores["average_precision"] == scores["roc_auc"] == 1
    shifted = probability_metrics(logits + np.array([0.0, 2.0]), y, [1])["minority"]
    assert shifted["average_precision"] == scores["average_precision"]
    worse = probability_metrics(logits, np.array([0, 1, 0, 1]), [1])["minority"]
    assert worse["average_precision"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert worse["roc_auc"] == pytest.approx(1 / 4)


def test_reliability_counts_the_minority_among_images_of_like_probability():
    logits = logits_of([[0.99, 0.01]] * 6 + [[0.5, 0.5]] * 4)
    y = np.array([0] * 5 + [1] + [1, 1, 1, 0])
    low, middle = probability_metrics(logits, y, [1])["minority"]["reliability"]
    assert low == {
        "images": 6, "mean_probability": pytest.approx(0.01), "share_of_minority": pytest.approx(1 / 6),
    }  # fmt: skip
    assert middle == {
        "images": 4, "mean_probability": pytest.approx(0.5), "share_of_minority": pytest.approx(3 / 4),
    }  # fmt: skip


def test_several_rare_classes_are_asked_for_together():
    logits = logits_of([[0.2, 0.4, 0.4], [0.8, 0.1, 0.1]])
    scores = probability_metrics(logits, np.array([2, 0]), [1, 2])["minority"]
    assert [entry["mean_probability"] for entry in scores["reliability"]] == pytest.approx([0.2, 0.8])
    assert scores["average_precision"] == 1


def test_sure_predictions_stay_apart():
    """In float32 both probabilities would be 1, and the ranking a tie."""
    logits = np.array([[0.0, 20.0], [0.0, 30.0]], dtype=np.float32)
    assert probability_metrics(logits, np.array([0, 1]), [1])["minority"]["roc_auc"] == 1


@pytest.mark.parametrize("minority", [[2], [0, 1]])
def test_without_an_image_of_the_minority_or_of_others_there_is_no_ranking(minority):
    scores = probability_metrics(np.zeros((4, 3)), np.array([0, 1, 0, 1]), minority)
    assert scores["minority"] is None and 0 <= scores["expected_calibration_error"] <= 1


def test_the_scores_can_be_saved_as_json():
    scores = probability_metrics(2 * np.eye(3, dtype=np.float32), np.arange(3), [2])
    save_json("scores.json", scores)
    assert json.loads(Path("scores.json").read_text()) == scores


@pytest.mark.parametrize(
    ("shape", "n", "minority", "message"),
    [((4,), 4, [0], "One row of logits"), ((4, 2), 5, [0], "One row"), ((0, 2), 0, [0], "One row"),
     ((4, 2), 4, [2], "from 0 to 1: got \\[2\\]"), ((4, 2), 4, [-1], "from 0 to 1"), ((4, 2), 4, [], "one or more"),
     ((4, 2), 4, [1, 1], "only once")],
)  # fmt: skip
def test_other_images_and_unknown_classes_are_refused(shape, n, minority, message):
    with pytest.raises(ValueError, match=message):
        probability_metrics(np.zeros(shape), np.zeros(n, dtype=int), minority)


def test_the_diagram_pools_runs_and_leaves_out_bins_of_few_images():
    def entry(images, probability, share):
        return {"images": images, "mean_probability": probability, "share_of_minority": share}

    runs = [[entry(30, 0.21, 0.5), entry(8, 0.9, 1.0)], [entry(10, 0.25, 0.1), entry(9, 0.9, 0.0)]]
    figure = plot_reliability({"an arm": runs, "another": [[entry(9, 0.5, 0.5)]]}, "title")
    [axes] = figure.axes
    _, line = axes.lines  # the first is the diagonal; the other bins have fewer than ten images a run
    assert line.get_label() == "an arm"
    assert line.get_xydata() == pytest.approx(np.array([[0.22, 0.4]]))
    [band] = axes.collections
    # Wilson's interval of 8 in 20, the mean of both runs: (8 + z²/2 ± z sqrt(8 * 12 / 20 + z²/4)) / (20 + z²).
    extent = band.get_datalim(axes.transData)
    assert (extent.y0, extent.y1) == pytest.approx((0.2188, 0.6134), abs=1e-4)
    plt.close(figure)


def test_labels_without_a_logit_and_logits_that_are_no_numbers_are_refused():
    logits, y = 2 * np.eye(3, dtype=np.float32), np.arange(3)
    with pytest.raises(ValueError, match="Labels run from 1 to 3 in y_true, but there are classes 0 to 2"):
        probability_metrics(logits, y + 1, [2])
    logits[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        probability_metrics(logits, y, [2])

"""What a classifier's probabilities are worth: how well they rank the rare class, and whether they can be believed.

    evaluation = evaluate_classifier(model, X_test, y_test)
    scores = probability_metrics(evaluation.logits, y_test, minority_classes=[3])
    scores["minority"]["average_precision"], scores["expected_calibration_error"]

Recall and precision depend on the decision threshold. Average precision does not, so it separates a shifted threshold
from a better ranking.

References
----------
Guo et al. (2017), On calibration of modern neural networks (expected calibration error). Davis and
Goadrich (2006), The relationship between precision-recall and ROC curves. Niculescu-Mizil and Caruana (2005), Predicting
good probabilities with supervised learning (reliability diagrams). Wilson (1927), Probable inference, the law of
succession, and statistical inference (the intervals).
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import PercentFormatter
from sklearn.metrics import average_precision_score, roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from Checks import check_classes, check_labels
from Utils import COLOURS

BINS = 15  # of equal width, as in Guo et al. (2017)
FEWEST = 10  # test images of a run that a point of the figure stands for


def probability_metrics(logits, y_true, minority_classes):
    """Judge a classifier's probabilities, those of the rare classes apart.

    With several rare classes, the question is whether an image belongs to any of them. Its probability is the sum of
    theirs.

    Parameters
    ----------
    logits : ndarray of float, shape (n, classes)
        Logits, not probabilities: their softmax is judged. A network that was trained with an adjusted loss needs no
        further adjustment: its probabilities are for a test set in which the classes are equally frequent (Menon et al. 2021).
    y_true : ndarray of int, shape (n,)
    minority_classes : int or sequence of int

    Returns
    -------
    dict
        - ``expected_calibration_error``: mean distance between confidence and accuracy, 0 to 1, over 15 bins of the
          confidence, each weighted by its images.
        - ``minority``: ``average_precision`` and ``roc_auc`` of ranking the images by the rare classes' probability;
          ``reliability``: for each of 15 bins of that probability that has images, a dict of ``images``,
          ``mean_probability`` and ``share_of_minority``. None if all images are of rare classes, or none is.

    Raises
    ------
    TypeError, ValueError
        If the two arrays are not of the same images, there is no such class, a logit is not finite, or the logits are
        probabilities.
    """
    from torchmetrics.functional.classification import (  # imported here because it takes seconds
        multiclass_calibration_error,
    )

    logits, y_true = np.asarray(logits), np.asarray(y_true)
    if logits.ndim != 2 or len(logits) != len(y_true) or not len(y_true):
        raise ValueError(
            f"One row of logits an image is needed, but the logits have the shape {logits.shape} and y_true {y_true.shape}."
        )
    if not np.isfinite(logits).all():
        raise ValueError("The logits have NaN or infinity.")
    if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        raise ValueError("These are probabilities, but logits are needed: pass np.log(np.maximum(p, 1e-12)).")
    classes = logits.shape[1]
    y_true = check_labels(y_true, classes, "y_true")
    minority_classes = check_classes(minority_classes, classes)
    # In float64, so that probabilities near 1 do not all become 1 and tie in the ranking.
    probabilities = torch.from_numpy(logits).double().softmax(1)
    # It counts a confidence of exactly 1 in a bin of its own.
    below_1 = probabilities.clamp(max=1 - 1e-7)
    error = multiclass_calibration_error(below_1, torch.from_numpy(y_true), classes, n_bins=BINS)
    is_minority = np.isin(y_true, minority_classes)
    minority = None
    if is_minority.any() and not is_minority.all():
        probability = probabilities[:, minority_classes].sum(1).clamp(max=1).numpy()
        minority = {
            "average_precision": float(average_precision_score(is_minority, probability)),
            "roc_auc": float(roc_auc_score(is_minority, probability)),
            "reliability": _reliability(is_minority, probability),
        }
    return {"expected_calibration_error": float(error), "minority": minority}


def _reliability(is_minority, probability):
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    return [
        {
            "images": int(rows.sum()),
            "mean_probability": float(probability[rows].mean()),
            "share_of_minority": float(is_minority[rows].mean()),
        }
        for rows in (bins == b for b in np.unique(bins))
    ]


def plot_reliability(arms, title):
    """Reliability diagram of the rare class: how often an image that gets a probability is of that class.

    Parameters
    ----------
    arms : dict
        Title of an arm -> its ``reliability`` (see :func:`probability_metrics`), one list per run. Bins of several runs
        are put together.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        A curve above the diagonal is of a classifier that finds the class too improbable. The bands are Wilson's 95 %
        intervals over test images. Several runs see the same test images, so they count as one. Bins of fewer than ten
        images are left out.
    """
    figure, ax = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    ax.plot([0, 1], [0, 1], color=COLOURS["total"], linestyle="--", label="calibrated")
    for name, runs in arms.items():
        if points := _pooled(runs):
            probabilities, shares, images = map(np.array, zip(*points, strict=True))
            [line] = ax.plot(probabilities, shares, marker="o", markersize=4, label=name)
            interval = proportion_confint(shares * images, images, method="wilson")
            ax.fill_between(probabilities, *interval, color=line.get_color(), alpha=0.12, linewidth=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    ax.set(
        xlabel="predicted probability of the minority class",
        ylabel="share of images of the minority class",
        title=title,
        xlim=(0, 1),
        ylim=(0, 1),
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    return figure


def _pooled(runs):
    """Points (mean probability, share of the minority, mean number of images a run) of the bins of all runs."""
    bins = {}
    for entry in (entry for run in runs for entry in run):
        bins.setdefault(min(int(entry["mean_probability"] * BINS), BINS - 1), []).append(entry)
    points = []
    for _, entries in sorted(bins.items()):
        images = np.array([entry["images"] for entry in entries])
        of_a_run = images.sum() / len(runs)
        if of_a_run >= FEWEST:
            means = (
                float(np.average([entry[key] for entry in entries], weights=images))
                for key in ("mean_probability", "share_of_minority")
            )
            points.append((*means, of_a_run))
    return points

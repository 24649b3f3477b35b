"""Metrics, confusion matrix and plots: how predictions and images are judged and shown.

Nothing here knows about CIFAR-10, a generator or a network. Accuracies, recalls and precisions are
fractions between 0 and 1; only plots and tables turn them into percent.
"""

import matplotlib.pyplot as plt
import numpy as np
from imblearn.metrics import geometric_mean_score
from matplotlib.ticker import PercentFormatter
from scipy.stats import binomtest
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from Runtime import atomic_path

# Okabe and Ito's colours stay apart for colour-blind readers and in greyscale print.
COLOURS = {"real": "#0072B2", "synthetic": "#E69F00", "minority": "#D55E00", "total": "#999999"}


# --- Files and tables -------------------------------------------------------------------------


def save_figure(figure, path):
    """Write a matplotlib figure as PNG at 120 dpi, atomically, and return the figure still open."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    return figure


def markdown_table(head, rows):
    """Markdown table with its first column to the left and the others to the right.

    Parameters
    ----------
    head : sequence of str
    rows : iterable of sequence of str

    Returns
    -------
    str
    """
    alignment = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, alignment, *rows))


# --- Metrics ------------------------------------------------------------------------------------


def classification_metrics(y_true, y_pred, class_names, minority_classes):
    """Judge predictions, the minority classes first.

    Total accuracy is the last thing to look at on imbalanced data: with one of ten classes missing,
    a model that never predicts it still scores up to 90 %.

    Parameters
    ----------
    y_true, y_pred : array of int, shape (n,)
        Class numbers below ``len(class_names)``.
    class_names : sequence of str
    minority_classes : sequence of int
        The classes that were made rare; their scores are averaged under ``minority``.

    Returns
    -------
    dict
        ``minority`` (recall, precision, f1), ``balanced_accuracy`` (mean recall), ``macro_f1``,
        ``g_mean`` (geometric mean of the recalls, Kubat and Matwin 1997; 0 as soon as one class is
        never found), ``accuracy``, ``majority_recall`` (mean recall of the other classes; None if
        every class is a minority), ``per_class`` and ``confusion_matrix`` (rows: true class).
        Precision and F1 of a class that is never predicted count as 0.
    """
    labels = np.arange(len(class_names))
    precision, recall, f1, support = precision_recall_fscore_support(
        y_true, y_pred, labels=labels, zero_division=0
    )
    minority = np.asarray(minority_classes, dtype=int)
    majority = np.setdiff1d(labels, minority)
    return {
        "minority": {
            "classes": [class_names[c] for c in minority],
            "recall": float(recall[minority].mean()),
            "precision": float(precision[minority].mean()),
            "f1": float(f1[minority].mean()),
        },
        "balanced_accuracy": float(balanced_accuracy_score(y_true, y_pred)),
        "macro_f1": float(f1_score(y_true, y_pred, labels=labels, average="macro", zero_division=0)),
        "g_mean": float(geometric_mean_score(y_true, y_pred, labels=labels, average="multiclass")),
        "accuracy": float(accuracy_score(y_true, y_pred)),
        "majority_recall": float(recall[majority].mean()) if majority.size else None,
        "per_class": {
            class_names[c]: {
                "recall": float(recall[c]),
                "precision": float(precision[c]),
                "f1": float(f1[c]),
                "support": int(support[c]),
            }
            for c in labels
        },
        "confusion_matrix": confusion_matrix(y_true, y_pred, labels=labels).tolist(),
    }


def mcnemar_test(y_true, first, second):
    """Exact McNemar test: do two models err differently on the same images?

    Only images that exactly one of the models gets right carry information; under the null
    hypothesis each model wins half of them (McNemar 1947; recommended for comparing classifiers on
    one test set by Dietterich 1998). It covers the choice of test images, not the choice of seed.

    Parameters
    ----------
    y_true, first, second : array of int, shape (n,)
        The true classes and the two models' predictions, row by row for the same images.

    Returns
    -------
    dict with ``only_first_right``, ``only_second_right`` (counts) and ``p_value`` (two-sided).
    """
    y_true, first, second = map(np.asarray, (y_true, first, second))
    if not y_true.shape == first.shape == second.shape:
        raise ValueError(
            f"The predictions must be for the same images: shapes {y_true.shape}, {first.shape}, "
            f"{second.shape}."
        )
    only_first = int(np.sum((first == y_true) & (second != y_true)))
    only_second = int(np.sum((second == y_true) & (first != y_true)))
    discordant = only_first + only_second
    p_value = binomtest(only_first, discordant).pvalue if discordant else 1.0
    return {
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": float(p_value),
    }


# --- Plots: each returns a figure, none reads or writes a file ----------------------------------


def plot_class_counts(counts_by_data_set, class_names, title):
    """Bars of real and synthetic images per class, one panel per data set.

    Parameters
    ----------
    counts_by_data_set : dict
        Name of the data set -> pair of integer arrays of shape (n_classes,): real and synthetic.
    class_names : sequence of str
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    n = len(counts_by_data_set)
    figure, axes = plt.subplots(
        1, n, figsize=(3.4 * n + 0.6, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    positions = np.arange(len(class_names))
    for ax, (name, (real, synthetic)) in zip(axes[0], counts_by_data_set.items(), strict=True):
        ax.bar(positions, real, color=COLOURS["real"], label="real")
        if np.any(synthetic):
            ax.bar(positions, synthetic, bottom=real, color=COLOURS["synthetic"], label="synthetic")
        ax.set_title(name, fontsize=11)
        ax.set_xticks(positions, class_names, rotation=60, ha="right")
    axes[0, -1].legend(loc="upper center", ncols=2)
    axes[0, 0].set_ylim(top=1.25 * axes[0, 0].get_ylim()[1])
    axes[0, 0].set_ylabel("training images")
    figure.suptitle(title)
    return figure


def plot_image_rows(rows, title):
    """A grid of images, one labelled row per source, for looking at real beside synthetic images.

    Parameters
    ----------
    rows : dict
        Label of the row -> uint8 array of shape (n, height, width, 3).
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(0.95 * columns + 2.2, 1.0 * len(rows) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(row, images, strict=False):
            ax.imshow(image, interpolation="nearest")
        row[0].text(-0.15, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=11)
    figure.suptitle(title)
    return figure


def plot_learning_curves(histories, title, chance=None):
    """Loss, accuracy and minority recall over training, one line per run.

    Parameters
    ----------
    histories : list of list of dict
        One list per run; each dict is one epoch with ``images_seen``, ``train_loss``,
        ``train_accuracy``, ``test_loss``, ``test_accuracy`` and ``test_minority_recall``; the last three
        only where the test set was looked at.
    title : str
    chance : float, optional
        Recall by guessing, drawn as a dotted line.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for run, history in enumerate(histories):
        for ax, key, colour, name in (
            (left, "train_loss", COLOURS["total"], "training loss (as optimised)"),
            (left, "test_loss", COLOURS["real"], "test cross-entropy"),
            (right, "train_accuracy", COLOURS["total"], "training accuracy"),
            (right, "test_accuracy", COLOURS["real"], "test accuracy"),
            (right, "test_minority_recall", COLOURS["minority"], "test recall, minority class"),
        ):
            points = [(epoch["images_seen"] / 1000, epoch[key]) for epoch in history if key in epoch]
            ax.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=".",
                label=name if run == 0 else None,
            )
    if chance is not None:
        right.axhline(chance, color="black", linestyle=":", linewidth=1, label="guessing")
    left.set_ylabel("loss (nats)")
    left.set_ylim(bottom=0)
    right.set_ylabel("fraction right")
    right.set_ylim(-0.02, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for ax in (left, right):
        ax.set_xlabel("training images shown (thousands)")
        ax.grid(alpha=0.3)
        # Below the axes: inside it would hide the curves of one arm or another.
        ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def plot_adversarial_training(history, title):
    """Losses of the two networks, and the discriminator's mean scores, over training.

    Parameters
    ----------
    history : list of dict
        As :func:`GANGeneration.train_gan` gives it.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    thousands = [record["images_seen"] / 1000 for record in history]
    for ax, key, colour, name in (
        (left, "discriminator_loss", COLOURS["real"], "discriminator"),
        (left, "generator_loss", COLOURS["synthetic"], "generator"),
        (right, "score_of_real", COLOURS["real"], "real images"),
        (right, "score_of_generated", COLOURS["synthetic"], "generated images"),
    ):
        ax.plot(thousands, [record[key] for record in history], color=colour, marker=".", label=name)
    left.axhline(2, color="black", linestyle=":", linewidth=1, label="discriminator that cannot tell")
    left.set_ylabel("hinge loss")
    right.set_ylabel("discriminator's score")
    for ax in (left, right):
        ax.set_xlabel("real images shown (thousands)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9)
    figure.suptitle(title)
    return figure


def plot_generation_quality(history, best_step, measure, title):
    """The quality of generated images over training, with the record that was chosen.

    Parameters
    ----------
    history : list of dict
        As :func:`GANGeneration.train_gan` gives it, with a quality measure.
    best_step : int
    measure : str
        What the quality is, for the axis.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    thousands = [record["images_seen"] / 1000 for record in history]
    quality = [record["quality"] for record in history]
    ax.plot(thousands, quality, color=COLOURS["synthetic"], marker=".")
    best = [record["step"] for record in history].index(best_step)
    ax.plot(
        thousands[best], quality[best], "o", color=COLOURS["minority"], label=f"chosen: step {best_step:,}"
    )
    ax.set_ylim(bottom=0)
    ax.set_xlabel("real images shown (thousands)")
    ax.set_ylabel(measure)
    ax.grid(alpha=0.3)
    ax.legend()
    ax.set_title(title)
    return figure


def plot_confusion_matrix(matrix, class_names, title):
    """Confusion matrix with the share of each true class, in percent.

    Parameters
    ----------
    matrix : array of shape (n_classes, n_classes)
        Counts; rows are true classes. Several runs may have been added up.
    class_names : sequence of str
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    matrix = np.asarray(matrix, dtype=float)
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure, ax = plt.subplots(figsize=(7, 6.2), layout="constrained")
    ConfusionMatrixDisplay(share, display_labels=class_names).plot(
        ax=ax,
        cmap="Blues",
        values_format=".0f",
        xticks_rotation=60,
        im_kw={"vmin": 0, "vmax": 100},
    )
    ax.images[0].colorbar.set_label("share of the true class (%)")
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    ax.set_title(title)
    return figure


def plot_comparison(rows, title):
    """Minority recall, balanced accuracy and accuracy of each arm, with every single run as a dot.

    Parameters
    ----------
    rows : dict
        Title of the arm -> dict of ``minority_recall``, ``balanced_accuracy`` and ``accuracy``, each
        a list with one fraction per run. Drawn from top to bottom in the order given.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    panels = (
        ("minority_recall", "recall of the minority class", COLOURS["minority"]),
        ("balanced_accuracy", "balanced accuracy", COLOURS["real"]),
        ("accuracy", "accuracy", COLOURS["total"]),
    )
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.42 * len(rows) + 1.5), sharey=True, layout="constrained")
    positions = np.arange(len(rows))[::-1]
    for ax, (key, label, colour) in zip(axes, panels, strict=True):
        for position, runs in zip(positions, rows.values(), strict=True):
            mean = float(np.mean(runs[key]))
            ax.barh(position, mean, color=colour, alpha=0.75)
            ax.plot(runs[key], [position] * len(runs[key]), "k.", markersize=5)
            ax.text(max(max(runs[key]), mean) + 0.015, position, f"{100 * mean:.1f}", va="center")
        ax.set_xlim(0, 1.12)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlabel(label)
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(positions, list(rows))
    figure.suptitle(title)
    return figure

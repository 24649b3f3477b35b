"""Metrics, confusion matrix and plots of predictions and images.

Nothing here knows about CIFAR-10, a generator or a network. Accuracies, recalls and precisions are
fractions between 0 and 1; only plots and tables turn them into percent.
"""

import matplotlib.pyplot as plt
import numpy as np
from imblearn.metrics import geometric_mean_score
from matplotlib.ticker import PercentFormatter
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from Checks import check_classes, check_labels, check_pixels
from Files import atomic_path

# Okabe and Ito's colours can be told apart by colour-blind readers and in greyscale print.
COLOURS = {"real": "#0072B2", "synthetic": "#E69F00", "minority": "#D55E00", "total": "#999999"}


# --- Files and tables -------------------------------------------------------------------------


def save_figure(figure, path):
    """Write a matplotlib figure at 120 dpi, atomically, and return the figure still open.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : path
        Its suffix chooses the format, such as ``.png``.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    OSError
        If the folder is not writable or the disk is full.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    return figure


def markdown_table(head, rows, align="right"):
    """Make a Markdown table. Its first column is aligned to the left.

    Parameters
    ----------
    head : sequence of str
        The titles of the columns.
    rows : iterable of sequence of str
        The cells of each row, as many as there are titles.
    align : {'right', 'left'}
        Side of the other columns: right for numbers, left for words.

    Returns
    -------
    str
        Without a line break at the end.
    """
    alignment = ["---"] + ["---:" if align == "right" else "---"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, alignment, *rows))


# --- Metrics ------------------------------------------------------------------------------------


def classification_metrics(y_true, y_pred, class_names, minority_classes):
    """Compute the metrics of predictions, the minority classes first.

    Accuracy is the least useful metric on imbalanced data. If one of ten classes is missing, a model that
    never predicts it still scores up to 90 %.

    Parameters
    ----------
    y_true, y_pred : array of int, shape (n,)
        Class numbers below ``len(class_names)``.
    class_names : sequence of str
        The name at position c belongs to class number c.
    minority_classes : int or sequence of int
        The classes that were made rare. ``minority`` holds the averages of their scores.

    Returns
    -------
    dict
        All scores are fractions between 0 and 1.

        - ``minority``: ``classes`` (names), ``recall``, ``precision`` and ``f1`` of the minority classes.
        - ``balanced_accuracy``: the mean recall of all classes.
        - ``macro_f1``: the mean F1 of all classes.
        - ``g_mean``: the geometric mean of the recalls (Kubat and Matwin 1997). It is 0 if one class is
          never found.
        - ``accuracy``.
        - ``majority_recall``: the mean recall of the other classes. None if every class is a minority.
        - ``per_class``: name of the class -> its ``recall``, ``precision``, ``f1`` and ``support`` (number
          of images).
        - ``confusion_matrix``: list of lists of counts. Rows are true classes, columns are predicted ones.

        Precision and F1 of a class that is never predicted are 0. A class without an image in ``y_true`` enters no average,
        and its own recall, precision and F1 are None.

    Raises
    ------
    TypeError, ValueError
        If a label is no class, there are not as many predictions as labels, two classes have the same name, or no image is
        of a minority class.
    """
    labels = np.arange(len(class_names))
    if len(set(class_names)) < len(labels):
        raise ValueError(f"Two classes have the same name: {list(class_names)}.")
    y_true, y_pred = check_labels(y_true, len(labels), "y_true"), check_labels(y_pred, len(labels), "y_pred")
    if y_true.shape != y_pred.shape:
        raise ValueError(f"There are {len(y_pred):,} predictions of {len(y_true):,} images.")
    minority = check_classes(minority_classes, len(labels))
    if missing := sorted(set(minority.tolist()) - set(y_true.tolist())):
        raise ValueError(
            f"No image in y_true is of the minority classes {missing}, so their recall is unknown."
        )
    present = np.unique(y_true)
    precision, recall, f1, support = precision_recall_fscore_support(
        y_true, y_pred, labels=labels, zero_division=0
    )
    majority = np.setdiff1d(present, minority)
    return {
        "minority": {
            "classes": [class_names[c] for c in minority],
            "recall": float(recall[minority].mean()),
            "precision": float(precision[minority].mean()),
            "f1": float(f1[minority].mean()),
        },
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "g_mean": float(geometric_mean_score(y_true, y_pred, labels=present, average="multiclass")),
        "accuracy": float(accuracy_score(y_true, y_pred)),
        "majority_recall": float(recall[majority].mean()) if majority.size else None,
        "per_class": {
            class_names[c]: {
                score: float(values[c]) if support[c] else None
                for score, values in (("recall", recall), ("precision", precision), ("f1", f1))
            }
            | {"support": int(support[c])}
            for c in labels
        },
        "confusion_matrix": confusion_matrix(y_true, y_pred, labels=labels).tolist(),
    }


# --- Plots: each returns a figure, none reads or writes a file ----------------------------------


def plot_class_counts(counts_by_data_set, class_names, title):
    """Bars of the numbers of real and synthetic images per class, one panel per data set.

    Parameters
    ----------
    counts_by_data_set : dict
        Name of the data set -> two integer arrays of shape (n_classes,): the number of real images of each
        class, and of synthetic ones.
    class_names : sequence of str
    title : str
        Of the whole figure.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If a data set does not have two numbers for each class.
    """
    n = len(counts_by_data_set)
    for name, counts in counts_by_data_set.items():
        if np.shape(counts) != (2, len(class_names)):
            raise ValueError(
                f"{name} needs two arrays of {len(class_names)} numbers, of real and of synthetic images: got the shape "
                f"{np.shape(counts)}."
            )
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


def plot_image_rows(rows, title, captions=None):
    """A grid of images with one labelled row per source, to compare real with synthetic images by eye.

    Parameters
    ----------
    rows : dict
        Label of the row -> uint8 array of shape (n, height, width, 3). Rows may differ in n, and may be empty.
    title : str
        Of the whole figure.
    captions : dict, optional
        Label of the row -> n texts, one below each image.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    TypeError, ValueError
        If a row has images that are not uint8 with three channels.
    """
    for images in rows.values():
        if len(images):
            check_pixels(images)
    columns = max(1, *(len(images) for images in rows.values()))
    captions = captions or {}
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(0.95 * columns + 2.2, (1.2 if captions else 1.0) * len(rows) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(row, images, strict=False):
            ax.imshow(image, interpolation="nearest")
        for ax, text in zip(row, captions.get(label, ()), strict=False):
            ax.text(0.5, -0.04, text, transform=ax.transAxes, ha="center", va="top", fontsize=9)
        row[0].text(-0.15, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=11)
    figure.suptitle(title)
    return figure


def plot_power_spectra(powers, title):
    """Power at each spatial frequency, averaged over directions and colour channels.

    Parameters
    ----------
    powers : dict
        Name of a set of images -> its mean power, as :func:`ImageStatistics.mean_power` returns it: float, shape
        (side, side // 2 + 1, channels).
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, axes = plt.subplots(figsize=(6, 3.5), constrained_layout=True)
    for number, (name, power) in enumerate(powers.items()):
        side, columns, _ = power.shape
        rows = np.minimum(
            np.arange(side), side - np.arange(side)
        )  # the second half holds negative frequencies
        frequency = np.rint(np.hypot(rows[:, None], np.arange(columns))).astype(int)
        # The other half of the plane is left out of ``power``. Each inner column stands for one there, too.
        times = np.where((np.arange(columns) == 0) | (2 * np.arange(columns) == side), 1, 2)
        times = np.broadcast_to(times, frequency.shape).ravel()
        means = np.bincount(frequency.ravel(), times * power.mean(axis=2).ravel())
        means /= np.bincount(frequency.ravel(), times)
        frequencies = np.arange(1, columns)
        # The first line is wide, so that it can be seen behind one that lies on it.
        axes.semilogy(frequencies, means[frequencies], label=name, linewidth=2 if number else 5)
    axes.set(xlabel="frequency (cycles per image)", ylabel="mean power", title=title)
    axes.legend()
    return figure


def plot_learning_curves(histories, title, chance=None):
    """Loss, accuracy and minority recall over training, one line per run.

    Parameters
    ----------
    histories : list of list of dict
        One list per run. Each dict is one epoch with ``images_seen`` (number of training images so far),
        ``train_loss``, ``train_accuracy``, ``test_loss``, ``test_accuracy`` and ``test_minority_recall``. The
        last three are missing if the model was not evaluated on the test set after that epoch.
    title : str
        Of the whole figure.
    chance : float, optional
        The recall that guessing reaches, between 0 and 1. It is drawn as a dotted line.

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
        # The legend is below the axes, because inside it would hide the curves of some arms.
        ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def plot_adversarial_training(history, title):
    """Losses of generator and discriminator, and the discriminator's mean scores, over training.

    Parameters
    ----------
    history : list of dict
        As :func:`GANGeneration.train_gan` returns it.
    title : str
        Of the whole figure.

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
    """The quality of generated images over training, with the chosen training step marked.

    Parameters
    ----------
    history : list of dict
        As :func:`GANGeneration.train_gan` returns it when it is given a quality measure.
    best_step : int
        The training step of the generator that was chosen. The history must have a record of it.
    measure : str
        Name of the quality measure, for the axis.
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
    """Confusion matrix in percent of each true class.

    Parameters
    ----------
    matrix : array of shape (n_classes, n_classes)
        Counts. Rows are true classes, columns are predicted ones. It may be the sum over several runs.
    class_names : sequence of str
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    matrix = np.asarray(matrix, dtype=float)
    images = matrix.sum(axis=1, keepdims=True)
    share = 100 * matrix / np.where(images > 0, images, 1)
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
    """Recall and precision of the minority and balanced accuracy of each arm: bars of the means, and a dot for each run.

    Parameters
    ----------
    rows : dict
        Title of the arm -> dict of ``minority_recall``, ``minority_precision`` and ``balanced_accuracy``. Each is a
        list with one fraction between 0 and 1 per run, NaN if there is none. The first arm is drawn at the top.
    title : str
        Of the whole figure.

    Returns
    -------
    matplotlib.figure.Figure
    """
    panels = (
        ("minority_recall", "recall of the minority class", COLOURS["minority"]),
        ("minority_precision", "precision of the minority class", COLOURS["real"]),
        ("balanced_accuracy", "balanced accuracy", COLOURS["total"]),
    )
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.42 * len(rows) + 1.5), sharey=True, layout="constrained")
    positions = np.arange(len(rows))[::-1]
    for ax, (key, label, colour) in zip(axes, panels, strict=True):
        for position, runs in zip(positions, rows.values(), strict=True):
            mean = float(np.mean(runs[key]))
            ax.barh(position, mean, color=colour, alpha=0.75)
            ax.plot(runs[key], [position] * len(runs[key]), "k.", markersize=5)
            text = "–" if np.isnan(mean) else f"{100 * mean:.1f}"
            ax.text(np.nanmax([0, *runs[key]]) + 0.015, position, text, va="center")
        ax.set_xlim(0, 1.2)  # leaves room for a label at 100 %
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlabel(label)
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(positions, list(rows))
    figure.suptitle(title)
    return figure


def plot_memorisation(real, generated, memory, title, columns=10):
    """Generated images, each above the real training image nearest to it.

    The two upper rows show the generated images that are nearest to a real one. The two lower rows go from the
    nearest to the farthest in equal steps.

    Parameters
    ----------
    real, generated : ndarray of uint8, shape (n, height, width, 3)
        As given to :func:`GenerationQuality.memorisation`.
    memory : GenerationQuality.Memorisation
        What it returned.
    title : str
    columns : int
        Images in a row.

    Returns
    -------
    matplotlib.figure.Figure
    """
    order = np.argsort(memory.distances, kind="stable")
    typical = order[np.linspace(0, len(order) - 1, columns).astype(int)]
    return plot_image_rows(
        {
            "generated, nearest ones": generated[order[:columns]],
            "their nearest real image": real[memory.nearest[order[:columns]]],
            "generated, nearest to farthest": generated[typical],
            "nearest real image of these": real[memory.nearest[typical]],
        },
        title,
    )

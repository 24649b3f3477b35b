"""Beyond the reference split, from ``results/``: other numbers of images, other classes, other imbalances.

    python Experiment.py --profile cpu --arm stable@500 stable-source-aware@500      # fewer synthetic images
    python Experiment.py --profile cpu --arm stable --split cat-250                  # more real ones
    python Experiment.py --profile cpu --arm stable --split truck-50 long-tailed-100 cat-50@1
    python Sweeps.py            # draw images/number_of_images.png, images/other_splits.png, the tables of docs/results.md
    python Sweeps.py --check    # write nothing; fail if a table is not current

Nothing here trains. What was not run yet is left out.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from Arms import ARMS, BEST_WITH_STABLE_DIFFUSION, BEST_WITHOUT_IMAGES
from Comparison import SCORES as COMPARED_SCORES
from Comparison import compare_arms, difference_in_words, mean_in_words, ranking_in_words
from Documents import NOT_RUN, report_parser, run_report
from Report import COLUMNS, minority_precisions, percent
from Results import COMMITTED, Study, minority_of
from Utils import COLOURS, markdown_table, save_figure

DOCUMENT = Path("docs", "results.md")
PICTURE = "number_of_images.png"
SPLITS_PICTURE = "other_splits.png"
ARM_COLOURS = {
    "stable": COLOURS["synthetic"],
    BEST_WITHOUT_IMAGES: COLOURS["real"],
    BEST_WITH_STABLE_DIFFUSION: COLOURS["minority"],
}
WITHOUT_IMAGES = {
    "stable": "imbalanced",
    BEST_WITH_STABLE_DIFFUSION: BEST_WITHOUT_IMAGES,
}  # same loss, no image
PAIR = (BEST_WITHOUT_IMAGES, BEST_WITH_STABLE_DIFFUSION)
FIRST, SECOND = (ARMS[name].title for name in PAIR)
REAL_COUNTS = (5, 10, 25, 50, 100, 250, 500)
SCORES = {  # list of results -> one value each
    "minority recall": lambda runs: [run["metrics"]["minority"]["recall"] for run in runs],
    "minority precision": minority_precisions,
    "accuracy": lambda runs: [run["metrics"]["accuracy"] for run in runs],
}


def by_synthetic_images(study):
    """Runs of each arm with synthetic images, by how many of them the minority has.

    Parameters
    ----------
    study : Results.Study

    Returns
    -------
    dict
        Arm name -> number of synthetic images of the minority -> list of results. With 0, the runs of the arm that has
        the same loss and no image.
    """
    curves = {}
    for name, without in WITHOUT_IMAGES.items():
        points = {0: study.load_runs(without)}
        for path in study.record_path("").glob(f"{name}@*-seed*.json"):
            arm_name = path.name.rpartition("-seed")[0]
            points[int(arm_name.partition("@")[2])] = study.load_runs(arm_name)
        if runs := study.load_runs(name):
            points[max(runs[0]["training_images"]["synthetic"][c] for c in minority_of(runs[0]))] = runs
        curves[name] = {count: runs for count, runs in sorted(points.items()) if runs}
    return curves


def by_real_images(study):
    """Runs of each arm on splits that keep other numbers of the minority's real images.

    Parameters
    ----------
    study : Results.Study
        Of a split such as ``cat-50``; the others are ``cat-5`` to ``cat-500``.

    Returns
    -------
    dict
        Arm name -> number of real images of the minority -> list of results.
    """
    classes = study.split.rpartition("-")[0]
    return {
        name: {
            count: runs
            for count in REAL_COUNTS
            if (runs := Study(study.profile, study.data, f"{classes}-{count}").load_runs(name))
        }
        for name in ARM_COLOURS
    }


def counts_figure(sweeps, title):
    """Recall, precision and accuracy against the number of images of the minority.

    Parameters
    ----------
    sweeps : dict
        ``"synthetic"`` or ``"real"``, one row of panels each, -> what :func:`by_synthetic_images` or
        :func:`by_real_images` returns.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        Lines are means over seeds, dots single runs.
    """
    size = (12, 1 + 3 * len(sweeps))
    figure, axes = plt.subplots(
        len(sweeps), 3, figsize=size, sharey="col", layout="constrained", squeeze=False
    )
    for row, (kind, curves) in zip(axes, sweeps.items(), strict=True):
        for ax, (score, value) in zip(row, SCORES.items(), strict=True):
            for name, points in curves.items():
                scores = {count: value(runs) for count, runs in points.items()}
                means = {count: np.mean(values) for count, values in scores.items()}
                colour = ARM_COLOURS[name]
                ax.plot(list(means), list(means.values()), color=colour, label=ARMS[name].title)
                for count, values in scores.items():
                    ax.plot([count] * len(values), values, ".", color=colour)
            ax.set_xscale("symlog", linthresh=50 if kind == "synthetic" else 5)
            counts = sorted({count for points in curves.values() for count in points})
            ax.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45)
            ax.minorticks_off()
            ax.set(xlabel=f"{kind} images of the minority", ylabel=score)
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
            ax.grid(alpha=0.3)
    figure.legend(*axes[-1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def counts_table(sweeps):
    """Markdown table of the points of :func:`counts_figure`: scores in percent, means over seeds."""
    rows = []
    for kind, curves in sweeps.items():
        for name, points in curves.items():
            for count, runs in points.items():
                scores = (percent(value(runs)) for value in SCORES.values())
                rows.append((ARMS[name].title, kind, f"{count:,}", *scores, str(len(runs))))
    return markdown_table(("arm", "images of the minority", "number", *SCORES, "seeds"), rows)


def splits_table(study):
    """Markdown table of all results on other splits than the study's, and on other choices of its kept images.

    Parameters
    ----------
    study : Results.Study

    Returns
    -------
    str
        A row for each split and arm; an empty string if there is no such result.
    """
    of_counts = {f"{study.split.rpartition('-')[0]}-{count}" for count in REAL_COUNTS}
    rows = []
    for split, results in _other_splits(study):
        for name, runs in results.items():
            if split in of_counts and name in ARM_COLOURS:  # it is in the other table
                continue
            rare = runs[0]["minority_classes"]
            minority = ", ".join(rare) if len(rare) < 4 else f"{len(rare)} classes"
            rows.append((split, minority, ARMS[name].title, *(cell(runs) for cell in COLUMNS.values())))
    return markdown_table(("split", "minority", "arm", *COLUMNS), rows) if rows else ""


def gains(study):
    """What the best arm with images has more than the best without, on each split with both.

    Parameters
    ----------
    study : Results.Study
        Its own split comes first.

    Returns
    -------
    dict
        Name of the split -> :class:`Comparison.ArmComparison` on the seeds that both arms have.
    """
    return {
        split: comparison
        for split, results in _all_splits(study)
        for comparison in compare_arms(results, {PAIR: ""})
    }


def gains_by_choice(study):
    """What :func:`gains` says of seed 0 alone, on the study's split and on other choices of its kept images.

    Parameters
    ----------
    study : Results.Study

    Returns
    -------
    list of Comparison.ArmComparison
        One for each choice (``cat-50``, ``cat-50@1``, ...) that has seed 0 of both arms.
    """
    return [
        comparison
        for split, results in _all_splits(study)
        if split == study.split or split.startswith(f"{study.split}@")
        for comparison in compare_arms(
            {name: [run for run in runs if run["seed"] == 0] for name, runs in results.items()}, {PAIR: ""}
        )
    ]


def gains_table(comparisons, by_choice):
    """Markdown table of what :func:`gains` returns, and a last row for the mean of what :func:`gains_by_choice` returns.

    Parameters
    ----------
    comparisons : dict
    by_choice : list of Comparison.ArmComparison

    Returns
    -------
    str
        Differences in percentage points. The last row is left out if there is only one choice.
    """
    rows = []
    for split, comparison in comparisons.items():
        differences = (difference_in_words(comparison, key) for key in COMPARED_SCORES)
        rows.append((split, str(len(comparison.seeds)), *differences, ranking_in_words(comparison)))
    if len(by_choice) > 1:
        means = (mean_in_words([each.difference(key) for each in by_choice]) for key in COMPARED_SCORES)
        ranking = [difference for each in by_choice for difference in each.average_precision]
        ranks = mean_in_words(ranking) if len(ranking) == len(by_choice) else ""
        rows.append((f"{len(by_choice)} choices of the kept images", "1 each", *means, ranks))
    return markdown_table(("split", "seeds", *COMPARED_SCORES.values(), "average precision"), rows)


def gains_figure(comparisons, title):
    """What :func:`gains` returns as a picture: a panel a score, a row a split.

    Parameters
    ----------
    comparisons : dict
        Name of the split -> :class:`Comparison.ArmComparison`.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        Dots are differences, wide bars their 95 % bootstrap intervals over test images, thin bars their 95 % intervals over
        seeds (three seeds or more).
    """
    names = [
        f"{split} ({len(comparison.seeds)} seed{'s' if len(comparison.seeds) > 1 else ''})"
        for split, comparison in comparisons.items()
    ]
    rows = np.arange(len(names))
    size = (12, 2 + 0.4 * len(names))
    figure, axes = plt.subplots(1, len(COMPARED_SCORES), figsize=size, sharey=True, layout="constrained")
    colour = ARM_COLOURS[BEST_WITH_STABLE_DIFFUSION]
    for ax, (key, score) in zip(axes, COMPARED_SCORES.items(), strict=True):
        for row, comparison in zip(rows, comparisons.values(), strict=True):
            difference, over_seeds = 100 * comparison.difference(key), comparison.over_seeds[key]
            low, high = (100 * bound for bound in comparison.bootstrap[key])
            ax.plot([low, high], [row, row], color=colour, linewidth=6, alpha=0.4, solid_capstyle="butt")
            if over_seeds is not None:
                ax.errorbar(difference, row, xerr=100 * over_seeds, color=colour, capsize=4)
            ax.plot(difference, row, "o", color=colour)
        ax.axvline(0, color="black", linewidth=1)
        ax.set(xlabel=f"{score} (points)")
        ax.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(rows, names)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    return figure


def _other_splits(study):
    """Name and results of each other split of the same data that has some."""
    for folder in sorted(study.record_path("").parent.glob("*/")):
        if folder.name == study.split:
            continue
        results = Study(study.profile, study.data, folder.name).load_results()
        if results and next(iter(results.values()))[0]["data"] == study.data:
            yield folder.name, results


def _all_splits(study):
    """Name and results of the study's own split, then of the others."""
    yield study.split, study.load_results()
    yield from _other_splits(study)


def _sweeps():
    """What :func:`counts_figure` shows: the sweeps that have a run beyond those of the arms."""
    sweeps = {}
    if any(COMMITTED.record_path("").glob("*@*-seed*.json")):
        sweeps["synthetic"] = by_synthetic_images(COMMITTED)
    real = by_real_images(COMMITTED)
    own_count = int(COMMITTED.split.rpartition("-")[2])
    if any(points.keys() - {own_count} for points in real.values()):
        sweeps["real"] = real
    return sweeps


def generated_parts():
    """Document -> name of each generated part -> its text."""
    counts = NOT_RUN
    if sweeps := _sweeps():
        counts = f"{counts_table(sweeps)}\n\n![Scores against numbers of images](../images/{PICTURE})"
    splits = splits_table(COMMITTED) or NOT_RUN
    if len(comparisons := gains(COMMITTED)) > 1:
        by_choice = gains_by_choice(COMMITTED)
        table = gains_table(comparisons, by_choice)
        last_row = ""
        if len(by_choice) > 1:
            last_row = (
                " The last row is the mean of seed 0 over the choices of the kept images; "
                "the number after ± (three choices or more) covers that choice."
            )
        splits += (
            f"\n\n*{SECOND}* minus *{FIRST}*, in percentage points. The number after ± covers the choice of seed (three "
            f"seeds or more), the bootstrap interval in brackets that of test images.{last_row}\n\n{table}\n\n"
            f"![What the images add on each split](../images/{SPLITS_PICTURE})\n\n"
            "Wide bars are the 95 % intervals over test images, thin ones those over seeds (three seeds or more)."
        )
    return {DOCUMENT: {"counts": counts, "splits": splits}}


def draw_plots():
    """Draw the pictures of the numbers of images and of other splits, if there are such runs."""
    if sweeps := _sweeps():
        title = f"How many images? {COMMITTED.split.rpartition('-')[0]}, profile {COMMITTED.profile}"
        plt.close(save_figure(counts_figure(sweeps, title), COMMITTED.image_path(PICTURE)))
    if len(comparisons := gains(COMMITTED)) > 1:
        title = f"{SECOND}, minus: {FIRST}. Profile {COMMITTED.profile}"
        plt.close(save_figure(gains_figure(comparisons, title), COMMITTED.image_path(SPLITS_PICTURE)))


def main(arguments=None):
    parser = report_parser("Results beyond the reference split: picture and tables.")
    run_report(parser, parser.parse_args(arguments).check, generated_parts, draw_plots)


if __name__ == "__main__":
    main()

"""Beyond the reference split, from ``results/``: other numbers of images, other classes, other imbalances.

    python Experiment.py --profile cpu --arm stable@500 stable-source-aware@500      # fewer synthetic images
    python Experiment.py --profile cpu --arm stable --split cat-250                  # more real ones
    python Experiment.py --profile cpu --arm stable --split truck-50 long-tailed-100 cat-50@1
    python Sweeps.py            # draw images/number_of_images.png, write the tables of docs/results.md
    python Sweeps.py --check    # write nothing; fail if a table is not current

Nothing here trains. What was not run yet is left out.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from Arms import ARMS, BEST_WITH_STABLE_DIFFUSION, BEST_WITHOUT_IMAGES
from Comparison import SCORES as COMPARED_SCORES
from Comparison import compare_arms, difference_in_words, ranking_in_words
from Documents import NOT_RUN, report_parser, run_report
from Report import COLUMNS, minority_precisions, percent
from Results import COMMITTED, Study, minority_of
from Utils import COLOURS, markdown_table, save_figure

DOCUMENT = Path("docs", "results.md")
PICTURE = "number_of_images.png"
ARM_COLOURS = {
    "stable": COLOURS["synthetic"],
    BEST_WITHOUT_IMAGES: COLOURS["real"],
    BEST_WITH_STABLE_DIFFUSION: COLOURS["minority"],
}
WITHOUT_IMAGES = {
    "stable": "imbalanced",
    BEST_WITH_STABLE_DIFFUSION: BEST_WITHOUT_IMAGES,
}  # same loss, no image
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


def gains_table(study):
    """Markdown table of what the best arm with images has more than the best without, on each split with both.

    Parameters
    ----------
    study : Results.Study
        Its own split is the first row.

    Returns
    -------
    str
        Differences on the seeds that both arms have; an empty string without another split.
    """
    pair = (BEST_WITHOUT_IMAGES, BEST_WITH_STABLE_DIFFUSION)
    rows = []
    for split, results in [(study.split, study.load_results()), *_other_splits(study)]:
        for comparison in compare_arms(results, {pair: ""}):
            differences = (difference_in_words(comparison, key) for key in COMPARED_SCORES)
            rows.append((split, str(len(comparison.seeds)), *differences, ranking_in_words(comparison)))
    head = ("split", "seeds", *COMPARED_SCORES.values(), "average precision")
    return markdown_table(head, rows) if len(rows) > 1 else ""


def _other_splits(study):
    """Name and results of each other split of the same data that has some."""
    for folder in sorted(study.record_path("").parent.glob("*/")):
        if folder.name == study.split:
            continue
        results = Study(study.profile, study.data, folder.name).load_results()
        if results and next(iter(results.values()))[0]["data"] == study.data:
            yield folder.name, results


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
    if gains := gains_table(COMMITTED):
        first, second = (ARMS[name].title for name in (BEST_WITHOUT_IMAGES, BEST_WITH_STABLE_DIFFUSION))
        splits += (
            f"\n\n*{second}* minus *{first}*, in percentage points. The number after ± covers the choice of seed (three "
            f"seeds or more), the bootstrap interval in brackets that of test images:\n\n{gains}"
        )
    return {DOCUMENT: {"counts": counts, "splits": splits}}


def draw_plots():
    """Draw the picture of the numbers of images, if there are such runs."""
    if sweeps := _sweeps():
        title = f"How many images? {COMMITTED.split.rpartition('-')[0]}, profile {COMMITTED.profile}"
        plt.close(save_figure(counts_figure(sweeps, title), COMMITTED.image_path(PICTURE)))


def main(arguments=None):
    parser = report_parser("Results beyond the reference split: picture and tables.")
    run_report(parser, parser.parse_args(arguments).check, generated_parts, draw_plots)


if __name__ == "__main__":
    main()

"""Do the usual measures of added images predict what the images are worth to a classifier?

    python ImageMeasures.py        # first: measure the images of every arm of MEASURED
    python Usefulness.py           # draw images/usefulness.png, write the tables of docs/results.md
    python Usefulness.py --check   # write nothing; fail if a table is not current

Each arm of :data:`MEASURED` adds images to the minority alone and trains with cross-entropy, so the arms differ in their
images only. A rank correlation compares each measure of the images with the recall of the classifier that is trained on
them. Nothing here trains.

Reference: Ravuri and Vinyals (2019), Classification accuracy score for conditional generative models. They find that the
usual measures do not predict it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from Arms import ARMS
from Documents import NOT_RUN, report_parser, run_report
from Results import COMMITTED, CUES, read_json
from Significance import holm, rank_correlation
from Utils import COLOURS, markdown_table, save_figure

MEASURED = (
    "random-oversampling",
    "smote",
    "non-synthetic-reference",
    "non-synthetic-black-corners",
    "non-synthetic",
    "gan",
    "stable",
)
DOCUMENT, PICTURE = Path("docs", "results.md"), "usefulness.png"


def measures_and_recall(study):
    """The measures of each arm's images, and the recall of its classifier.

    Parameters
    ----------
    study : Results.Study

    Returns
    -------
    measures : dict
        Name of the measure -> values, one for each arm, ndarray of float, shape (arms,).
    recall : ndarray of float, shape (arms,)
        The classifiers' recall of the minority, means over seeds.
    arms : list of str
        The arms that were measured and run. Empty, like the rest, if nothing was measured.
    """
    paths = [study.record_path(name) for name in ("cues.json", "generated-images.json")]
    if not all(path.exists() for path in paths):
        return {}, np.empty(0), []
    judged, auc = study.read_judgement()["methods"], read_json(paths[0], CUES)["auc"]
    runs = {name: study.load_runs(name) for name in MEASURED if name in judged and name in auc}
    arms = [name for name in runs if runs[name]]
    recall = [np.mean([run["metrics"]["minority"]["recall"] for run in runs[name]]) for name in arms]
    inception = any("fid" in judged[name] for name in arms)
    keys = {
        "FID" if inception else "Fréchet distance": "fid" if inception else "frechet_distance",
        "KID" if inception else "kernel distance": "kid" if inception else "kernel_distance",
        "precision of the images": "precision",
        "recall of the images": "recall",
        "share of near copies": "share_of_copies",
    }
    measures = {measure: np.array([judged[name][key] for name in arms]) for measure, key in keys.items()} | {
        "AUC of the cue": np.array([auc[name] for name in arms]).round(3)  # finer differences are noise
    }
    return measures, np.array(recall), arms


def usefulness_table(study):
    """Markdown: the measures beside the classifiers' recall, and their rank correlations.

    Parameters
    ----------
    study : Results.Study

    Returns
    -------
    str
        Says that nothing was run if fewer than three arms were.
    """
    measures, recall, arms = measures_and_recall(study)
    if len(arms) < 3:
        return NOT_RUN
    order = np.argsort(-recall)
    rows = [
        (
            ARMS[arms[k]].title,
            f"**{100 * recall[k]:.1f}**",
            *(f"{values[k]:.3f}" for values in measures.values()),
        )
        for k in order
    ]
    correlations = {measure: rank_correlation(values, recall) for measure, values in measures.items()}
    tested = [measure for measure, (_, p) in correlations.items() if np.isfinite(p)]  # the others do not vary
    corrected = dict(zip(tested, holm([correlations[measure][1] for measure in tested]), strict=True))
    answers = []
    for measure, (rho, p) in correlations.items():
        numbers = (
            (f"{rho:+.2f}", f"{p:.3f}", f"{corrected[measure]:.3f}") if measure in corrected else ("–",) * 3
        )
        answers.append((measure, *numbers))
    head = ("images added to the minority alone", "minority recall of the classifier (%)", *measures)
    return (
        markdown_table(head, rows)
        + f"\n\nRank correlation with the classifier's recall over these {len(arms)} kinds of images. The p-values are of all orders of the kinds, then corrected for the number of measures (Holm 1979):\n\n"
        + markdown_table(("measure", "Spearman's rho", "p", "p, corrected"), answers)
    )


def usefulness_figure(study):
    """The classifier's recall against each measure, one panel a measure and one dot an arm.

    Parameters
    ----------
    study : Results.Study

    Returns
    -------
    matplotlib.figure.Figure or None
        None if fewer than three arms were measured.
    """
    measures, recall, arms = measures_and_recall(study)
    if len(arms) < 3:
        return None
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharey=True, layout="constrained")
    markers = dict(zip(arms, "osD^v*P", strict=False))
    for ax, (measure, values) in zip(axes.flat, measures.items(), strict=True):
        for name, value, found in zip(arms, values, recall, strict=True):
            generated = ARMS[name].needs_gan or ARMS[name].needs_stable_diffusion
            ax.plot(
                value, found, markers[name], color=COLOURS["synthetic" if generated else "real"],
                label=ARMS[name].title, markersize=9,
            )  # fmt: skip
        rho, p = rank_correlation(values, recall)
        ax.set(xlabel=measure, title=f"rank correlation {rho:+.2f} (p = {p:.2f}, n = {len(arms)})")
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.grid(alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("minority recall of the classifier")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"What added images are worth: {study.split}, profile {study.profile}")
    return figure


def draw_plots():
    """Draw the picture of the measures, if there are enough arms."""
    figure = usefulness_figure(COMMITTED)
    if figure is not None:
        plt.close(save_figure(figure, COMMITTED.image_path(PICTURE)))


def main(arguments=None):
    parser = report_parser("Compare measures of added images with what they are worth.")
    run_report(
        parser,
        parser.parse_args(arguments).check,
        lambda: {DOCUMENT: {"usefulness": usefulness_table(COMMITTED)}},
        draw_plots,
    )


if __name__ == "__main__":
    main()

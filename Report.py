"""Tables, sentences and figures made from ``results/``. Nothing here trains, rebalances or downloads.

    python Report.py           redraw the committed plots, write the tables of README.md and docs/results.md
    python Report.py --check   fail if a table does not show what results/ says
    python Report.py --profile headline    print the tables of another profile

The tables stand between markers in the documents.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from imblearn.utils import check_sampling_strategy
from scipy.stats import binomtest

from Arms import ARMS, PROFILES, REFERENCE_SPLIT, find_arm
from Calibration import plot_reliability
from Comparison import about_answers, about_differences, compare_arms, findings, paired_table, strictness
from Documents import NOT_RUN, report_parser, run_report
from Files import describe_differences
from ModelCard import CLASSIFIERS, DISCRIMINATOR, GENERATOR
from Results import (
    COMMITTED,
    HEADLINE,
    Study,
    configuration_of,
    minority_of,
    network_name,
    precision_of,
    read_result,
)
from Runtime import hardware_text
from Significance import mean_interval
from Utils import (
    markdown_table,
    plot_comparison,
    plot_confusion_matrix,
    plot_learning_curves,
    save_figure,
)

README_ARMS = (
    "imbalanced",
    "non-synthetic",
    "gan",
    "stable",
    "logit-adjusted",
    "stable-source-aware",
)


# --- Titles -------------------------------------------------------------------------------------


def data_warning(data_name):
    """What every title begins with if the data is not CIFAR-10; else nothing."""
    return "" if data_name == "cifar10" else f"{data_name.upper()}, NOT CIFAR-10 - "


def title(study, subject):
    """A plot's title: the subject, split and profile, and a warning if the data is not CIFAR-10."""
    return f"{data_warning(study.data)}{subject}: {study.split}, profile {study.profile}"


def caption(results, seeds=None):
    """The runs behind a plot: data, split, profile, seeds.

    Parameters
    ----------
    results : list of dict
        One result per seed.
    seeds : str, optional
        What to say about the seeds. Default: how many there are.
    """
    first, numbers = results[0], [result["seed"] for result in results]
    seeds = seeds or (f"{len(numbers)} seeds" if len(numbers) > 1 else f"1 seed ({numbers[0]})")
    return f"{data_warning(first['data'])}{first['split']}, profile {first['profile']}, {seeds}"


def banner(study, data, split):
    """Markdown that opens a notebook: data, split and profile.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet
    split : ImbalancedCIFAR10.Split
    """
    minority = ", ".join(data.class_names[c] for c in split.minority_classes)
    kept = ", ".join(
        f"{split.counts[c]:,} of {int((data.y_train == c).sum()):,}" for c in split.minority_classes
    )
    text = (
        f"Data: **{data.name}**, {len(data.y_train):,} training and {len(data.y_test):,} test images. "
        f"Split **{study.split}**: {kept} training images of class {minority} stay. "
        f"Profile **{study.profile}**: {study.settings.purpose}."
    )
    if data.name != "cifar10":
        text = (
            "> **This is not CIFAR-10.** CIFAR-10 is not on this machine and could not be downloaded. The study "
            "runs on scikit-learn's bundled digits instead. Set `CIFAR10_ROOT` or connect to the internet to get "
            "CIFAR-10. What the text says about cats and photographs does not apply to digits.\n\n" + text
        )
    return text


# --- Tables of arms -----------------------------------------------------------------------------


def percent(fractions):
    """``94.0 ± 0.1``: mean over seeds in percent and, with three or more, half the width of its 95 % interval; – for NaN."""
    mean, half_width = mean_interval(fractions)
    if np.isnan(mean):
        return "–"
    interval = "" if half_width is None else f" ± {100 * half_width:.1f}"
    return f"{100 * mean:.1f}{interval}"


def _metric(*keys, show=percent):
    """A column: one metric of all runs."""

    def cell(runs):
        values = []
        for value in runs:
            for key in keys:
                value = value.get(key) if value is not None else None
            if value is not None:
                values.append(value)
        if not values:
            return ""
        lacking = "" if len(values) == len(runs) else f" ({len(values)} of {len(runs)} seeds)"
        return show(values) + lacking  # older results may lack a metric

    return cell


def minority_precisions(runs):
    """One a run: NaN if it never predicts the minority, because then it has none."""
    predicted = [np.sum(run["metrics"]["confusion_matrix"], axis=0) for run in runs]
    minority = minority_of(runs[0])
    return [
        run["metrics"]["minority"]["precision"] if counts[minority].all() else np.nan
        for run, counts in zip(runs, predicted, strict=True)
    ]


def _standard_deviation(fractions):
    return f"{100 * np.std(fractions, ddof=1):.1f}" if len(fractions) > 1 else ""


COLUMNS = {
    "images added": lambda runs: f"{sum(runs[0]['training_images']['synthetic']):,}",
    "minority recall": lambda runs: f"**{_metric('metrics', 'minority', 'recall')(runs)}**",
    "minority precision": lambda runs: percent(minority_precisions(runs)),
    "minority F1": _metric("metrics", "minority", "f1"),
    "average precision": _metric("probabilities", "minority", "average_precision"),
    "balanced accuracy": _metric("metrics", "balanced_accuracy"),
    "accuracy": _metric("metrics", "accuracy"),
    "seeds": lambda runs: str(len(runs)),
}
# In CIFAR-10's test set all classes are equally frequent, so accuracy is balanced accuracy.
SUMMARY_COLUMNS = {head: cell for head, cell in COLUMNS.items() if head != "balanced accuracy"}
MORE_COLUMNS = {
    "recall of the other classes": _metric("metrics", "majority_recall"),
    "macro F1": _metric("metrics", "macro_f1"),
    "G-mean": _metric("metrics", "g_mean"),
    "accuracy, averaged flips": _metric("metrics_with_averaged_flips", "accuracy"),
    "accuracy, best evaluation in training": _metric("best_look_at_test", "test_accuracy"),
    "expected calibration error": _metric("probabilities", "expected_calibration_error"),
    "standard deviation of the recall": _metric("metrics", "minority", "recall", show=_standard_deviation),
}


def results_table(results, columns=COLUMNS):
    """Markdown table of all arms, the minority class first.

    Parameters
    ----------
    results : dict
        Arm name -> list of results, as :meth:`Results.Study.load_results` returns them.
    columns : dict
        Column head -> function of an arm's runs that returns the cell. A column without any value is left out.

    Returns
    -------
    str
        All scores in percent. With three seeds or more, half the width of the 95 % interval follows the mean.
    """
    cells = {head: [cell(runs) for runs in results.values()] for head, cell in columns.items()}
    cells = {"arm": [ARMS[name].title for name in results]} | {
        head: column for head, column in cells.items() if any(column)
    }
    return markdown_table(tuple(cells), zip(*cells.values(), strict=True))


def arms_table(names):
    """Markdown table of what arms differ in: the sampler, the classes that get its images, the loss, the batches.

    Parameters
    ----------
    names : sequence of str
        Keys of :data:`Arms.ARMS`.

    Returns
    -------
    str
    """
    rows = []
    for name in names:
        arm = ARMS[name]
        sampler, classes = "none", ""
        if (made_by := arm.method.sampler) is not None:
            match = getattr(made_by, "match", None)
            sampler = f"`{type(made_by).__name__}`" + (f", {match} matched" if match else "")
            sampler += ", labels shuffled" if arm.method.shuffled else ""
            classes = _classes_with_images(made_by.sampling_strategy)
        rows.append((arm.title, sampler, classes, arm.method.loss_in_words, arm.method.batches_in_words))
    return markdown_table(("arm", "sampler", "adds images to", "loss", "batches"), rows, align="left")


def _classes_with_images(strategy):
    """Which classes a ``sampling_strategy`` adds images to, where one class is rare."""
    y = np.repeat(np.arange(10), [50] + 9 * [5000])
    new = check_sampling_strategy(strategy, y, "over-sampling")
    return "the minority" if sum(count > 0 for count in new.values()) == 1 else "every class"


def conditions(results):
    """The conditions under which results were obtained, in a few sentences.

    Parameters
    ----------
    results : dict
        Arm name -> list of results.

    Raises
    ------
    ValueError
        If two arms were trained with different recipes or networks, or there is no result.
    """
    runs = [run for arm in results.values() for run in arm]
    if not runs:
        raise ValueError("There is no result yet: run an arm first.")
    first = runs[0]
    configuration = configuration_of(first)
    shared = configuration.keys() - {"logit_adjusted", "processes", "precision", "bfloat16"}
    for run in runs:
        if differences := describe_differences(
            configuration_of(run), {key: configuration[key] for key in shared}
        ):
            raise ValueError(
                f"The arms {first['arm']} and {run['arm']} of profile {run['profile']} were trained in different "
                f"ways ({differences}). Remove the older result and run the arm again."
            )
    hardware = ", ".join(dict.fromkeys(hardware_text(run["hardware"]) for run in runs))
    precision = " and ".join(sorted({precision_of(run["configuration"]) for run in runs}))
    torch_versions = ", ".join(dict.fromkeys(run["versions"]["torch"] for run in runs))
    seeds = sorted({run["seed"] for run in runs})
    uneven = "" if len(runs) == len(seeds) * len(results) else " (not every arm has all of them)"
    most = configuration.get("most_images_a_class")  # older results do not have it: they are of all images
    part = "" if most is None else f"At most {most:,} images of each class were used, also of the test set. "
    minutes = np.median([run["seconds"]["training"] for run in runs]) / 60
    time = f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"
    support = sum(first["metrics"]["per_class"][c]["support"] for c in first["minority_classes"])
    recall = binomtest(support // 2, support).proportion_ci(method="wilson")
    return (
        f"Split `{first['split']}` of {'CIFAR-10' if first['data'] == 'cifar10' else first['data']} "
        f"(minority: {', '.join(first['minority_classes'])}), profile `{first['profile']}`. {part}"
        f"Every arm trains a {network_name(configuration)} "
        f"({configuration['parameters']:,} parameters) for {configuration['steps']:,} steps of "
        f"{configuration['batch_size']} images ({first['training_pflops']:.2g} PFLOPs). "
        f"Its last weights are evaluated, with one view of each test image unless the column says otherwise. {_caches_text(runs)}"
        f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}{uneven}. "
        f"PyTorch {torch_versions} on {hardware}, convolutions in {precision}; the median training took {time}, possibly "
        "beside other work on the machine. All scores are percentages. "
        f"There are {support:,} test images of the minority, so a recall near one half is uncertain by "
        f"{100 * (recall.high - recall.low) / 2:.0f} points (95 %) from the choice of test images alone. "
        "The choice of the seed adds to that."
    )


def _caches_text(runs):
    """Where Stable Diffusion images come from, a sentence; empty if no run says it, as older ones do not."""
    caches = [run["stable_diffusion_images"] for run in runs if "stable_diffusion_images" in run]
    if not caches:
        return ""
    count = len({cache["checksum"] for cache in caches})
    several = f" (of {count} different caches)" if count > 1 else ""
    return f"Stable Diffusion images: {', or '.join(dict.fromkeys(cache['source'] for cache in caches))}{several}. "


# --- Figures of arms ----------------------------------------------------------------------------


def confusion_figure(results):
    """Confusion matrix of one arm, added up over its seeds.

    Parameters
    ----------
    results : list of dict
        The arm's results, one per seed.

    Returns
    -------
    matplotlib.figure.Figure
    """
    first = results[0]
    matrix = np.sum([result["metrics"]["confusion_matrix"] for result in results], axis=0)
    return plot_confusion_matrix(matrix, first["class_names"], _arm_title(results))


def learning_curves_figure(results):
    """Learning curves of one arm, one line per seed; parameters as for :func:`confusion_figure`."""
    histories = [result["history"] for result in results]
    title = _arm_title(results)
    if find_arm(results[0]["arm"]).method.finish is not None:
        title += ", before the last layer is changed"  # the final scores are those after it
    return plot_learning_curves(histories, title, chance=1 / len(results[0]["class_names"]))


def _arm_title(results):
    return f"{find_arm(results[0]['arm']).title}\n{caption(results)}"


def save_arm_plots(study, arm_name):
    """Draw ``cm_<tag>.png`` and ``test_<tag>.png`` of an arm from all its finished seeds."""
    results = study.load_runs(arm_name)
    figures = confusion_figure(results), learning_curves_figure(results)
    for path, figure in zip(study.plot_paths(arm_name), figures, strict=True):
        save_figure(figure, path)
        plt.close(figure)


def comparison_figure(results):
    """Bars of all arms: recall and precision of the minority class, balanced accuracy.

    Parameters
    ----------
    results : dict
        Arm name -> list of results.

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = {
        ARMS[name].title: {
            "minority_recall": [run["metrics"]["minority"]["recall"] for run in runs],
            "minority_precision": minority_precisions(runs),
            "balanced_accuracy": [run["metrics"]["balanced_accuracy"] for run in runs],
        }
        for name, runs in results.items()
    }
    return plot_comparison(rows, _caption_of_arms(results))


def _caption_of_arms(results):
    fewest, most = (count(map(len, results.values())) for count in (min, max))
    words = f"{fewest} to {most} seeds an arm" if fewest < most else None
    if fewest == most and len({run["seed"] for runs in results.values() for run in runs}) > most:
        words = f"{most} seed{'s' * (most > 1)} an arm, not the same"
    return caption(max(results.values(), key=len), words)


def reliability_figure(results):
    """Reliability diagram of the arms of the README that have probabilities, or None: older results have none.

    With fewer than two arms there is nothing to compare.

    Parameters
    ----------
    results : dict
        Arm name -> list of results.

    Returns
    -------
    matplotlib.figure.Figure or None
    """
    runs = {
        name: [run for run in results.get(name, ()) if (run.get("probabilities") or {}).get("minority")]
        for name in README_ARMS
    }
    runs = {name: some for name, some in runs.items() if some}
    if len(runs) < 2:
        return None
    reliability = {
        ARMS[name].title: [run["probabilities"]["minority"]["reliability"] for run in some]
        for name, some in runs.items()
    }
    return plot_reliability(reliability, _caption_of_arms(runs))


# --- The GAN and the quality of generated images ------------------------------------------------


def gan_conditions(record):
    """What was trained, on what, for how much: a few sentences.

    Parameters
    ----------
    record : dict
        The content of ``gan.json``.
    """
    settings, parameters, last = record["settings"], record["parameters"], record["history"][-1]
    best = next(entry for entry in record["history"] if entry["step"] == record["best_step"])
    return (
        f"The generator has {parameters['generator']:,} parameters, the discriminator "
        f"{parameters['discriminator']:,}. The generator was updated {settings['steps']:,} times. Each update of "
        f"the discriminator saw {settings['batch_size']} real images, every class equally often: "
        f"{last['images_seen']:,} in all. The training took {record['petaflops']:.2g} PFLOPs and "
        f"{record['seconds']['training'] / 60:.0f} minutes on {hardware_text(record['hardware'])}. The generator "
        f"of step {record['best_step']:,} was chosen. It has the smallest quality measure, {best['quality']:.3g}: "
        f"{record['chosen_by']}."
    )


def generation_table(judged):
    """Markdown table of the quality of each method's images of the minority class.

    Parameters
    ----------
    judged : dict
        As :func:`QualityExperiment.judge_generated_images` returns it.

    Returns
    -------
    str
    """
    first = next(iter(judged["methods"].values()))
    inception = "fid" in first
    frechet, kernel = ("fid", "kid") if inception else ("frechet_distance", "kernel_distance")
    head = (
        "method",
        "FID" if inception else "Fréchet distance",
        "KID" if inception else "kernel distance",
        "precision",
        "recall",
        "near copies (%)",
    )
    rows = [
        (
            ARMS[name].title,
            f"{scores[frechet]:.3g}",
            f"{scores[kernel]:.3g}",
            f"{scores['precision']:.2f}",
            f"{scores['recall']:.2f}",
            f"{100 * scores['share_of_copies']:.1f}",
        )
        for name, scores in judged["methods"].items()
    ]
    new = judged["share_of_copies_among_new_real_images"]
    rows.append(("new real images (the test set's)", "", "", "", "", f"{100 * new:.1f}"))
    return (
        f"Images of class {judged['class']}: {first['generated_images']:,} of each method are compared with "
        f"{first['real_images']:,} test images. Near copies are counted among all images of the method. "
        f"Features: {first['features']}. With so few images all distances are too large, so compare them only "
        "with each other.\n\n" + markdown_table(head, rows)
    )


# --- Generated parts of the documents -----------------------------------------------------------


def arms_report(results):
    """Markdown of all that is said about the arms of a study: conditions, scores, tests, answers.

    Parameters
    ----------
    results : dict
        Arm name -> list of results.
    """
    if not results:
        return NOT_RUN
    comparisons = compare_arms(results)
    parts = (
        conditions(results),
        results_table(results, COLUMNS | MORE_COLUMNS),
        about_differences(results, comparisons),
        paired_table(comparisons),
        about_answers(comparisons),
        findings(comparisons),
        strictness(comparisons),
    )
    return "\n\n".join(filter(None, parts))


def _headline_summary(results):
    """The table of the README: few columns, because it must be short."""
    if not results:
        return NOT_RUN
    heads = ("minority recall", "minority precision", "minority F1", "accuracy", "seeds")
    return results_table(results, {head: COLUMNS[head] for head in heads})


def weights_table():
    """Markdown table of the committed networks: file, what it is, and its scores in percent."""
    rows = []
    for study, name in CLASSIFIERS:
        path = study.result_path(name)
        if not path.exists():
            continue
        result = read_result(path)
        configuration = configuration_of(result)
        rows.append(
            (
                f"`{study.weights_path(name).relative_to('models')}`",
                f"{network_name(configuration)}, {configuration['parameters']:,} parameters",
                f"{ARMS[name].title}, profile `{study.profile}`",
                percent([result["metrics"]["minority"]["recall"]]),
                COLUMNS["minority precision"]([result]),
                COLUMNS["accuracy"]([result]),
            )
        )
    if COMMITTED.record_path("gan.json").exists():
        parameters = COMMITTED.read_gan_record()["parameters"]
        for path in (GENERATOR, DISCRIMINATOR):
            network = f"{path.stem} of the GAN, {parameters[path.stem]:,} parameters"
            rows.append((f"`{path.name}`", network, f"profile `{COMMITTED.profile}`", "", "", ""))
    if not rows:
        return NOT_RUN
    head = ("file", "network", "trained by", "minority recall", "minority precision", "accuracy")
    return markdown_table(head, rows, "left")


def _few(results):
    return {name: results[name] for name in (*README_ARMS, "balanced") if name in results}


def generated_parts():
    """Document -> name of each generated part -> its text, made from the committed study's ``results/``."""
    results, gan = COMMITTED.load_results(), []
    gan_path, judged_path = (COMMITTED.record_path(name) for name in ("gan.json", "generated-images.json"))
    if gan_path.exists():
        gan.append(f"Profile `{COMMITTED.profile}`. {gan_conditions(COMMITTED.read_gan_record())}")
    if judged_path.exists():
        gan.append(generation_table(COMMITTED.read_judgement()))
    summary = NOT_RUN
    if results:
        summary = f"Profile `{COMMITTED.profile}`, all scores in percent:\n\n{results_table(_few(results), SUMMARY_COLUMNS)}"
    headline = HEADLINE.load_results()
    return {
        Path("README.md"): {"summary": summary, "headline": _headline_summary(headline)},
        Path("docs", "results.md"): {
            "summary": summary,
            "results": arms_report(results),
            "headline": arms_report(headline),
            "gan": "\n\n".join(gan) or NOT_RUN,
        },
        Path("models", "README.md"): {"weights": weights_table()},
    }


def draw_plots():
    """Draw the committed study's plots into ``images/``."""
    results = COMMITTED.load_results()
    for name in results:
        save_arm_plots(COMMITTED, name)
    figures = {"reliability.png": reliability_figure(results)}
    if results:
        figures["comparison.png"] = comparison_figure(results)
        figures["summary.png"] = comparison_figure(_few(results))
    if headline := HEADLINE.load_results():
        figures["headline.png"] = comparison_figure(headline)
    for name, figure in figures.items():
        if figure is not None:
            plt.close(save_figure(figure, COMMITTED.image_path(name)))


def main(arguments=None):
    parser = report_parser("Make plots and the documents' tables from results/.")
    parser.add_argument(
        "--profile",
        choices=list(PROFILES),
        help=f"print the tables of a profile's results on CIFAR-10's {REFERENCE_SPLIT}, and write nothing",
    )
    options = parser.parse_args(arguments)
    if not options.profile:
        return run_report(parser, options.check, generated_parts, draw_plots)
    try:
        print(arms_report(Study(options.profile, "cifar10", REFERENCE_SPLIT).load_results()))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()

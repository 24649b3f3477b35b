"""Tables and plots made from ``results/``, and the part of the README that shows them.

python Report.py           redraw images/ and write the README's results
python Report.py --check   fail if the README does not show what results/ says
"""

import argparse
import contextlib
from dataclasses import fields
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binomtest

from ClassifierNetwork import Recipe, ResNet18
from Experiment import (
    ARMS,
    PROFILES,
    REFERENCE_SPLIT,
    ArmUnavailableError,
    caption,
    classifier_features,
    gan_path,
    generated_minority_images,
    generation_path,
    load_results,
    load_test_labels,
    make_training_set,
    output_path,
    prepare_generator,
    prepare_stable_diffusion_images,
    read_result,
    save_arm_plots,
    warning,
)
from GANGeneration import load_generator, sample_images
from GenerationQuality import memorisation, memorisation_figure
from Runtime import atomic_path, describe_differences, hardware_text
from Utils import (
    markdown_table,
    mcnemar_test,
    plot_adversarial_training,
    plot_comparison,
    plot_generation_quality,
    plot_image_rows,
    save_figure,
)

README = Path("README.md")
NOT_RUN = "*Not run yet.*"

# The questions that the study asks of pairs of arms: does the second do better than the first?
PAIRS = (
    ("imbalanced", "non-synthetic"),
    ("imbalanced", "stable"),
    ("imbalanced", "gan"),
    ("non-synthetic", "gan"),
    ("gan", "stable"),
    ("gan", "gan-source-balanced"),
    ("stable", "stable-source-balanced"),
    ("stable", "logit-adjusted"),
    ("logit-adjusted", "gan-source-balanced-adjusted"),
    ("logit-adjusted", "stable-source-balanced-adjusted"),
    ("gan-source-balanced-adjusted", "stable-source-balanced-adjusted"),
)


# --- Tables -------------------------------------------------------------------------------------


def percent(fractions, digits=1):
    """``94.0 ± 0.1``: mean and, if there are several, sample standard deviation, in percent."""
    values = 100 * np.asarray(fractions, dtype=float)
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def results_table(results):
    """Markdown table of all arms, the minority class first.

    Parameters
    ----------
    results : dict
        Arm name -> list of results, as :func:`Experiment.load_results` gives them.

    Returns
    -------
    str
        All scores in percent; mean and sample standard deviation over seeds if there are several.
    """
    head = (
        "arm", "images added", "minority recall", "minority precision", "balanced accuracy",
        "macro F1", "accuracy", "accuracy, best look at test", "accuracy, averaged flips", "seeds",
    )  # fmt: skip
    rows = []
    for name, runs in results.items():
        metrics = [run["metrics"] for run in runs]
        flips = [run["metrics_with_averaged_flips"] for run in runs]
        cells = (
            ARMS[name].title,
            f"{sum(runs[0]['training_images']['synthetic']):,}",
            f"**{percent([m['minority']['recall'] for m in metrics])}**",
            percent([m["minority"]["precision"] for m in metrics]),
            percent([m["balanced_accuracy"] for m in metrics]),
            percent([m["macro_f1"] for m in metrics]),
            percent([m["accuracy"] for m in metrics]),
            percent([run["best_look_at_test"]["test_accuracy"] for run in runs]),
            percent([f["accuracy"] for f in flips]) if all(flips) else "",
            str(len(runs)),
        )
        rows.append(cells)
    return markdown_table(head, rows)


def paired_table(results):
    """Markdown table of exact McNemar tests between arms, on the minority's test images and on all.

    The first seed of each arm is compared, image by image.

    Parameters
    ----------
    results : dict
        Arm name -> list of results.

    Returns
    -------
    str
    """
    head = (
        "compared arms", "minority images that only the first / only the second finds", "p",
        "all images that only the first / only the second gets right", "p",
    )  # fmt: skip
    rows = []
    for first, second in PAIRS:
        if first not in results or second not in results:
            continue
        run = results[first][0]
        y_true = load_test_labels(run["profile"], run["data"], run["split"])
        predicted_first, predicted_second = (
            np.array(results[name][0]["test_predictions"].split(), dtype=int) for name in (first, second)
        )
        rare = [run["class_names"].index(c) for c in run["minority_classes"]]
        minority = np.isin(y_true, rare)
        cells = [f"{ARMS[first].title} / {ARMS[second].title}"]
        for judged in (minority, np.ones_like(minority)):
            test = mcnemar_test(y_true[judged], predicted_first[judged], predicted_second[judged])
            p = test["p_value"]
            cells.append(f"{test['only_first_right']:,} / {test['only_second_right']:,}")
            cells.append("< 0.0001" if p < 1e-4 else f"{p:.4f}")
        rows.append(cells)
    return markdown_table(head, rows)


def conditions(results):
    """One sentence: under which conditions the results were obtained."""
    runs = [run for arm in results.values() for run in arm]
    first = runs[0]
    configuration = first["configuration"] | {"downsampling": ResNet18.downsampling}
    shared = [field.name for field in fields(Recipe)] + ["width", "downsampling"]
    for run in runs:
        if differences := describe_differences(
            run["configuration"], {key: configuration.get(key) for key in shared}
        ):
            raise ValueError(
                f"The arms {first['arm']} and {run['arm']} of profile {run['profile']} were trained in different "
                f"ways ({differences}). Remove the older result and run the arm again."
            )
    hardware = ", ".join(dict.fromkeys(hardware_text(run["hardware"]) for run in runs))
    torch_versions = ", ".join(dict.fromkeys(run["versions"]["torch"] for run in runs))
    seeds = sorted({run["seed"] for run in runs})
    minutes = np.median([run["seconds"]["training"] for run in runs]) / 60
    minority = ", ".join(first["minority_classes"])
    support = sum(first["metrics"]["per_class"][c]["support"] for c in first["minority_classes"])
    recall = binomtest(support // 2, support).proportion_ci(method="wilson")
    return (
        f"Split `{first['split']}` of {'CIFAR-10' if first['data'] == 'cifar10' else first['data']} "
        f"(minority: {minority}), profile `{first['profile']}`: ResNet-18 of width "
        f"{configuration['width']} with {configuration['downsampling']} ({configuration['parameters']:,} parameters), "
        f"{configuration['steps']:,} steps of {configuration['batch_size']} images "
        f"({first['training_pflops']:.2g} PFLOPs) in every arm, last weights, no test-time augmentation "
        f"unless the column says so; seed"
        f"{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; PyTorch "
        f"{torch_versions} on {hardware}, median {minutes:.0f} minutes of training an arm, "
        f"whatever else the machine did meanwhile. All scores are percentages. With {support:,} test images of the "
        f"minority, a recall near a half is uncertain by {100 * (recall.high - recall.low) / 2:.0f} points "
        "(95 %) from the choice of test images alone; the choice of seed comes on top."
    )


# --- What the notebook says in words ------------------------------------------------------------


def title(subject, data, split):
    """A plot's title: the subject, the split, and a warning if the data is not CIFAR-10."""
    return f"{warning(data.name)}{subject}: {split.name}"


def banner(data, split, profile_name):
    """Markdown that opens the notebook: data, split and profile."""
    rare = ", ".join(data.class_names[c] for c in split.minority_classes)
    kept = ", ".join(
        f"{split.counts[c]:,} of {int((data.y_train == c).sum()):,}" for c in split.minority_classes
    )
    text = (
        f"Data: **{data.name}**, {len(data.y_train):,} training and {len(data.y_test):,} test images. Split "
        f"**{split.name}**: of class {rare}, {kept} training images stay. Profile **{profile_name}**: "
        f"{PROFILES[profile_name].purpose}."
    )
    if data.name != "cifar10":
        text = (
            "> **This is not CIFAR-10.** CIFAR-10 was neither found nor could it be downloaded, so the study "
            "runs on scikit-learn's bundled digits. Set `CIFAR10_ROOT` or connect to the internet for the "
            "real one. What is said about cats and photographs below does not apply.\n\n" + text
        )
    return text


def skipped(outcomes):
    """Markdown list of the arms that :func:`Experiment.run_arms` skipped, with the reasons."""
    reasons = [
        f"- **{ARMS[arm].title}** was skipped: {outcome}."
        for (arm, _, _), outcome in outcomes.items()
        if isinstance(outcome, str)
    ]
    return "\n".join(reasons) or "Every arm of the story ran."


def story_of(results, *names):
    """Those of ``names`` that have results."""
    return [name for name in names if name in results]


# --- Pictures -----------------------------------------------------------------------------------


def comparison_figure(results):
    """Bars of all arms: recall of the minority class, balanced accuracy, accuracy."""
    rows = {
        ARMS[name].title: {
            "minority_recall": [run["metrics"]["minority"]["recall"] for run in runs],
            "balanced_accuracy": [run["metrics"]["balanced_accuracy"] for run in runs],
            "accuracy": [run["metrics"]["accuracy"] for run in runs],
        }
        for name, runs in results.items()
    }
    everything = [run for runs in results.values() for run in runs]
    distinct = {run["seed"]: run for run in everything}
    return plot_comparison(rows, caption(list(distinct.values())))


def class_counts(data, split):
    """Real and synthetic images per class of the sets that the story compares.

    Returns
    -------
    dict
        Name -> pair of int arrays of shape (n_classes,), for :func:`Utils.plot_class_counts`.
    """
    names = {
        "imbalanced": "imbalanced",
        "non-synthetic": "one class filled up",
        "stable-source-balanced": "every class gets some",
    }
    counts = {}
    for name, label in names.items():
        try:
            counts[label] = make_training_set(name, data, split).counts(len(data.class_names))
        except ArmUnavailableError:
            continue
    return counts


def stable_diffusion_source(data, split):
    """Markdown that says where the Stable Diffusion images come from, or why there are none."""
    try:
        return f"Stable Diffusion images: {prepare_stable_diffusion_images(data, split)}."
    except ArmUnavailableError as error:
        return f"**No Stable Diffusion images:** {error}. Their arms are skipped."


def sample_figure(data, split, columns=10):
    """Real images of the minority class beside what the methods add to it.

    Methods that are not to be had are left out.
    """
    c = split.minority_classes[0]
    X, y = split.cut(data.X_train, data.y_train)
    real = X[y == c]
    rows = {f"real ({min(columns, len(real))} of {len(real)} left)": real[:columns]}
    for name in ("non-synthetic-reference", "non-synthetic", "stable"):
        with contextlib.suppress(ArmUnavailableError):
            rows[ARMS[name].title] = generated_minority_images(name, data, split)[:columns]
    subject = f"{data.class_names[c]}, real images and what each method adds"
    return plot_image_rows(rows, title(subject, data, split))


# --- The GAN ------------------------------------------------------------------------------------


def load_gan_result(profile_name, data_name, split_name):
    """What :func:`Experiment.prepare_generator` wrote to ``gan.json``."""
    return read_result(gan_path(profile_name, data_name, split_name))


def gan_conditions(result):
    """One paragraph: what was trained, on what, for how much."""
    settings, parameters, last = result["settings"], result["parameters"], result["history"][-1]
    best = next(record for record in result["history"] if record["step"] == result["best_step"])
    return (
        f"{settings['steps']:,} generator steps with {settings['batch_size']} real images each time the "
        f"discriminator was updated, {last['images_seen']:,} in all, every class equally often; "
        f"{parameters['generator']:,} and {parameters['discriminator']:,} parameters (generator, discriminator); "
        f"{result['petaflops']:.2g} PFLOPs in {result['seconds']['training'] / 60:.0f} minutes on "
        f"{hardware_text(result['hardware'])}. The generator of step {result['best_step']:,} was "
        f"taken (quality {best['quality']:.3g}), by this measure: {result['chosen_by']}."
    )


def gan_training_figure(data, split, profile_name):
    """Losses and scores over the adversarial training."""
    result = load_gan_result(profile_name, data.name, split.name)
    return plot_adversarial_training(result["history"], title(f"GAN, profile {profile_name}", data, split))


def gan_quality_figure(data, split, profile_name):
    """The Fréchet distance over the adversarial training."""
    result = load_gan_result(profile_name, data.name, split.name)
    return plot_generation_quality(
        result["history"], result["best_step"], "Fréchet distance, ResNet-18 features\n(not comparable with FID)",
        title("Distance to the kept training images", data, split),
    )  # fmt: skip


def gan_progress_figure(data, split, profile_name):
    """The same latents over training: a row for some records, a column for each class."""
    result = load_gan_result(profile_name, data.name, split.name)
    path = gan_path(profile_name, data.name, split.name).with_name("gan-snapshots.npy")
    snapshots = np.load(path, allow_pickle=False)
    shown = np.unique(np.linspace(0, len(snapshots) - 1, 5).astype(int))
    rows = {f"step {result['history'][k]['step']:,}": snapshots[k] for k in shown}
    return plot_image_rows(rows, title(f"Columns: {', '.join(data.class_names)}", data, split))


def gan_sample_figure(data, split, profile_name, device=None, columns=8):
    """Generated images of each class, and the kept real images of the first minority class on top."""
    c = split.minority_classes[0]
    X, y = split.cut(data.X_train, data.y_train)
    generator = load_generator(prepare_generator(data, split, profile_name, device), device)
    rows = {f"real {data.class_names[c]}": X[y == c][:columns]}
    for label, name in enumerate(data.class_names):
        rows[f"generated {name}"] = sample_images(generator, [label] * columns, seed=label)
    return plot_image_rows(rows, title(f"Samples of the GAN, profile {profile_name}", data, split))


def gan_memorisation_figure(data, split, profile_name, device=None):
    """Generated images of the first minority class above the kept real image nearest to each."""
    c = split.minority_classes[0]
    X, y = split.cut(data.X_train, data.y_train)
    kept = X[y == c]
    generated = generated_minority_images("gan", data, split, profile_name, device)
    features = classifier_features(data, split, profile_name, device)
    memory = memorisation(kept, generated, features)
    subject = (
        f"Generated {data.class_names[c]} images and the nearest of the {len(kept)} real ones; near copies: "
        f"{memory.share_of_copies:.1%}\n({features.name})"
    )
    return memorisation_figure(kept, generated, memory, title(subject, data, split))


def generation_table(judged):
    """Markdown table of the quality of each method's images of the minority class.

    Parameters
    ----------
    judged : dict
        As :func:`Experiment.judge_generated_images` gives it.

    Returns
    -------
    str
    """
    first = next(iter(judged["methods"].values()))
    frechet, kernel = ("fid", "kid") if "fid" in first else ("frechet_distance", "kernel_distance")
    inception = frechet == "fid"
    head = (
        "method", "FID" if inception else "Fréchet distance", "KID" if inception else "kernel distance",
        "precision", "recall", "near copies (%)",
    )  # fmt: skip
    rows = [
        (
            ARMS[name].title, f"{scores[frechet]:.3g}", f"{scores[kernel]:.3g}", f"{scores['precision']:.2f}",
            f"{scores['recall']:.2f}", f"{100 * scores['share_of_copies']:.1f}",
        )
        for name, scores in judged["methods"].items()
    ]  # fmt: skip
    new = judged["share_of_copies_among_new_real_images"]
    rows.append(("new real images (the test set's)", "", "", "", "", f"{100 * new:.1f}"))
    return (
        f"Images of class {judged['class']}: {first['generated_images']:,} of each method against "
        f"{first['real_images']:,} test images; near copies are counted among all that were generated. Features: "
        f"{first['features']}. With so few images the distances come out too large: compare them with each other "
        "only.\n\n" + markdown_table(head, rows)
    )


# --- README -------------------------------------------------------------------------------------


def evidence():
    """Results of each evidence profile on the reference split: profile name -> results."""
    found = {
        name: load_results(name, "cifar10", REFERENCE_SPLIT) for name in PROFILES if PROFILES[name].evidence
    }
    return {name: results for name, results in found.items() if results}


def readme_sections():
    """Name of each generated part of the README -> its text, made from ``results/``."""
    arms, gan = [], []
    for profile_name, results in evidence().items():
        place = (profile_name, "cifar10", REFERENCE_SPLIT)
        arms += [conditions(results), results_table(results), "Paired tests (exact McNemar, first seed):",
                 paired_table(results)]  # fmt: skip
        if gan_path(*place).exists():
            gan.append(f"Profile `{profile_name}`: {gan_conditions(load_gan_result(*place))}")
        if generation_path(*place).exists():
            gan.append(generation_table(read_result(generation_path(*place))))
    return {name: "\n\n".join(parts) or NOT_RUN for name, parts in (("results", arms), ("gan", gan))}


def with_section(text, name, section):
    """``text`` with everything between the two markers ``name`` replaced by ``section``.

    Raises
    ------
    ValueError
        If the markers are not there.
    """
    begin, end = f"<!-- {name}:begin (generated) -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"There must be one line {begin!r} and one {end!r}.")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{section}\n\n{end}{rest.partition(end)[2]}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Make the README's results and the plots from results/.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the README is not current"
    )
    options = parser.parse_args(arguments)
    current = text = README.read_text(encoding="utf-8")
    for name, section in readme_sections().items():
        current = with_section(current, name, section)
    if options.check:
        if current != text:
            parser.exit(1, "README.md does not show what results/ says. Run 'make report' and commit.\n")
        print("README.md shows what results/ says.")
        return
    for profile_name, results in evidence().items():
        place = (profile_name, "cifar10", REFERENCE_SPLIT)
        for name in results:
            save_arm_plots(name, *place)
        plt.close(save_figure(comparison_figure(results), output_path("images", *place, "comparison.png")))
    with atomic_path(README) as temporary:
        temporary.write_text(current, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The study's questions: do two arms differ by more than chance? Nothing here trains, rebalances or downloads.

    comparisons = compare_arms(Study("cpu", "cifar10", "cat-50").load_results())
    print(paired_table(comparisons))
    print(findings(comparisons))

Two arms are compared on the seeds that both have, image by image. ``Significance.py`` has the statistics.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from Arms import ARMS, PROFILES, QUESTIONS
from Results import Study, minority_of, predictions_of
from Significance import (
    bootstrap_weights,
    half_width_over_seeds_and_images,
    holm,
    mcnemar_over_seeds,
    mean_interval,
    minority_scores,
    t_test_over_seeds,
)
from Utils import markdown_table

SCORES = {
    "recall": "minority recall",
    "precision": "minority precision",
    "f1": "minority F1",
    "accuracy": "accuracy",
}


@dataclass(frozen=True)
class ArmComparison:
    """What the second of two arms has more than the first, over the seeds that both have.

    Attributes
    ----------
    question : str
    titles : tuple of str
        Of the two arms.
    seeds : tuple of int
    means : dict
        Score (a key of :data:`SCORES`) -> its means over the seeds, one for each arm: fractions. The precision is NaN if
        an arm never predicts the minority, and so is what follows from it.
    bootstrap : dict
        Score -> the 95 % bootstrap interval of the difference, second minus first, over test images: low and high.
    over_seeds : dict
        Score -> half the width of the 95 % interval of the difference over seeds; None with fewer than three.
    f1_over_both : float or None
        The same for F1, over seeds and test images.
    p_value : float
        Of an exact sign-flip test on the minority's test images, all seeds together (McNemar's test if there is one seed).
        It takes the trained networks as given.
    corrected_p_value : float
        Corrected for the number of questions (Holm 1979).
    p_over_seeds : dict
        ``"recall"`` and ``"f1"`` -> the p-value of Student's t-test over seeds, corrected for the number of questions with three
        seeds or more; None with fewer. It covers what ``p_value`` takes as given.
    average_precision : tuple of float
        The differences in the minority's average precision, one for each seed whose results both have it.
    profile : str
    """

    question: str
    titles: tuple
    seeds: tuple
    means: Mapping
    bootstrap: Mapping
    over_seeds: Mapping
    f1_over_both: float | None
    p_value: float
    corrected_p_value: float
    p_over_seeds: Mapping
    average_precision: tuple
    profile: str

    def difference(self, score):
        """Second minus first: a float."""
        first, second = self.means[score]
        return second - first

    def varies_with_the_seed(self):
        """Whether the 95 % interval over seeds of the difference in recall contains zero; False with fewer than three seeds."""
        half_width = self.over_seeds["recall"]
        return half_width is not None and abs(self.difference("recall")) <= half_width

    def answer(self):
        """``"Yes"`` or ``"No"``: the second arm finds more or fewer of the minority's images. Else ``"Undecided"``.

        A difference must be too large for the choice of test images (a corrected p-value below 0.05) and for the choice of
        seeds. With one or two seeds nothing covers the latter. Then it is ``"Higher"`` or ``"Lower"``, of these trained
        networks and not of the arms.
        """
        if self.corrected_p_value >= 0.05 or self.varies_with_the_seed():
            return "Undecided"
        more, fewer = ("Higher", "Lower") if self.over_seeds["recall"] is None else ("Yes", "No")
        return more if self.difference("recall") > 0 else fewer


def _true_classes(run):
    """True classes of the test images of a result, int array of shape (n,); ValueError if they do not fit it."""
    study = Study(run["profile"], run["data"], run["split"])
    y_true = study.load_test_labels()
    images = np.sum(run["metrics"]["confusion_matrix"], axis=1)
    if not np.array_equal(np.bincount(y_true, minlength=len(images)), images):
        raise ValueError(
            f"{study.record_path('test-labels.txt')} is damaged: the results beside it are of other test images. Remove it and "
            "run an arm beside it again: that writes it."
        )
    return y_true


def compare_arms(results, questions=QUESTIONS):
    """Compare the arms of each question that has results.

    Parameters
    ----------
    results : dict
        Arm name -> list of results of one study, as :meth:`Results.Study.load_results` returns them.
    questions : dict
        Names of two arms -> the question.

    Returns
    -------
    list of ArmComparison
    """
    asked, scores, y_true, weights = [], {}, None, None
    for pair, question in questions.items():
        by_seed = [{run["seed"]: run for run in results.get(name, ())} for name in pair]
        seeds = tuple(sorted(by_seed[0].keys() & by_seed[1].keys()))
        if not seeds:
            continue
        run = by_seed[0][seeds[0]]
        if y_true is None:
            y_true = _true_classes(run)
            # The first row is the test set as it is.
            weights = np.concatenate([np.ones((1, len(y_true)), np.float32), bootstrap_weights(y_true)])
        minority = minority_of(run)
        for name, runs in zip(pair, by_seed, strict=True):
            for seed in seeds:
                if (name, seed) not in scores:
                    scores[name, seed] = minority_scores(
                        y_true, predictions_of(runs[seed]), minority, weights
                    )
        rare = np.isin(y_true, minority)
        p_value = mcnemar_over_seeds(
            y_true[rare], *([predictions_of(runs[seed])[rare] for seed in seeds] for runs in by_seed)
        )
        asked.append(
            {"question": question, "pair": pair, "seeds": seeds, "by_seed": by_seed, "p_value": p_value}
        )
    corrected = holm([each["p_value"] for each in asked])
    over_seeds = [_p_over_seeds(asked, scores, key) for key in ("recall", "f1")]
    return [
        _comparison(**each, scores=scores, corrected_p_value=p, p_over_seeds={"recall": recall, "f1": f1})
        for each, p, recall, f1 in zip(asked, corrected, *over_seeds, strict=True)
    ]


def _p_over_seeds(asked, scores, key):
    """For each question the p-value over seeds, corrected for the number of questions that have one; else None."""
    p_values = [
        t_test_over_seeds(np.subtract(*([scores[name, s][key][0] for s in each["seeds"]] for name in each["pair"])))
        for each in asked
    ]  # fmt: skip
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(corrected) for p in p_values]


def _average_precisions(by_seed, seeds):
    """The second arm's average precision of the minority minus the first's, for each seed; older results have none."""
    pairs = [[(runs[seed].get("probabilities") or {}).get("minority") for runs in by_seed] for seed in seeds]
    return tuple(
        second["average_precision"] - first["average_precision"]
        for first, second in pairs
        if first and second
    )


def _comparison(question, pair, seeds, by_seed, scores, p_value, corrected_p_value, p_over_seeds):
    means, bootstrap, over_seeds = {}, {}, {}
    for key in SCORES:
        # Arm, seed, resample; the first resample is the test set itself.
        values = np.array([[scores[name, seed][key] for seed in seeds] for name in pair])
        means[key] = tuple(values[:, :, 0].mean(axis=1).tolist())
        differences = values[1] - values[0]
        resampled = differences[:, 1:].mean(axis=0)
        resampled = resampled[~np.isnan(resampled)]  # without an image that is taken for the minority
        interval = np.quantile(resampled, [0.025, 0.975]).tolist() if resampled.size else (np.nan, np.nan)
        bootstrap[key] = tuple(interval)
        over_seeds[key] = mean_interval(differences[:, 0])[1]
        if key == "f1":
            f1_over_both = half_width_over_seeds_and_images(differences[:, 0], resampled)
    return ArmComparison(
        question=question,
        titles=tuple(ARMS[name].title for name in pair),
        seeds=seeds,
        means=means,
        bootstrap=bootstrap,
        over_seeds=over_seeds,
        f1_over_both=f1_over_both,
        p_value=p_value,
        corrected_p_value=corrected_p_value,
        p_over_seeds=p_over_seeds,
        average_precision=_average_precisions(by_seed, seeds),
        profile=by_seed[0][seeds[0]]["profile"],
    )


def differences_between_seeds(results):
    """How often the test finds a difference between two seeds of the same arm, where the method has none.

    Parameters
    ----------
    results : dict
        Arm name -> list of results of one study.

    Returns
    -------
    found, pairs : int
        Pairs of seeds with a p-value below 0.05, without any correction, and all pairs.
    """
    pairs = [pair for runs in results.values() for pair in itertools.combinations(runs, 2)]
    if not pairs:
        return 0, 0
    run = pairs[0][0]
    y_true = _true_classes(run)
    rare = np.isin(y_true, minority_of(run))
    p_values = [
        mcnemar_over_seeds(y_true[rare], *(predictions_of(each)[rare] for each in pair)) for pair in pairs
    ]
    return sum(p < 0.05 for p in p_values), len(p_values)


def between_seeds_in_words(results):
    """What :func:`differences_between_seeds` found, to end a sentence; empty if no arm has two seeds.

    Parameters
    ----------
    results : dict
        Arm name -> list of results of one study.
    """
    found, pairs = differences_between_seeds(results)
    if not pairs:
        return ""
    return f": between two seeds of the same arm it is below 0.05, before correction, in {found} of {pairs} pairs"


def _points(value):
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # adding 0 makes -0.0 positive


def _plus_minus(half_width):
    return "" if half_width is None else f" ± {100 * half_width:.1f}"


def mean_in_words(differences):
    """A cell: the mean of differences in percentage points, with three or more ± half the width of its 95 % interval.

    Parameters
    ----------
    differences : sequence of float
        Fractions, such as one for each seed. A dash stands for a mean that is not defined.
    """
    mean, half_width = mean_interval(differences)
    return "–" if np.isnan(mean) else f"{_points(mean)}{_plus_minus(half_width)}"


def difference_in_words(comparison, key):
    """A cell: second minus first in percentage points, ± over seeds, and in brackets the interval over test images.

    Parameters
    ----------
    comparison : ArmComparison
    key : str
        Of :data:`SCORES`.
    """
    if np.isnan(comparison.difference(key)):
        return "–"
    low, high = comparison.bootstrap[key]
    seeds = _plus_minus(comparison.over_seeds[key])
    return f"{_points(comparison.difference(key))}{seeds} ({_points(low)} to {_points(high)})"


def ranking_in_words(comparison):
    """A cell: the difference in average precision in percentage points, ± over seeds; empty if no result has it.

    Parameters
    ----------
    comparison : ArmComparison
    """
    differences = comparison.average_precision
    if not differences:
        return ""
    lacking = len(differences) < len(comparison.seeds)
    seeds = f" ({len(differences)} of {len(comparison.seeds)} seeds)" if lacking else ""
    return mean_in_words(differences) + seeds


def _p_value(p):
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _found_in_words(recall, precision, f1):
    if np.isnan(precision):
        return f"{recall:.1%} of the minority"
    return f"{recall:.1%} of the minority (precision {precision:.1%}, F1 {f1:.1%})"


def _f1_over_seeds(comparison):
    difference, half_width = comparison.difference("f1"), comparison.over_seeds["f1"]
    if half_width is None or np.isnan(difference):
        return ""
    both, seeds = comparison.f1_over_both, len(comparison.seeds)
    return (
        f" Difference in F1 over the {seeds} seeds: {_points(difference)}{_plus_minus(half_width)} points; "
        f"over seeds and test images: {_points(difference)}{_plus_minus(both)}."
    )


def paired_table(comparisons):
    """Markdown table of what the second of two arms has more than the first.

    Parameters
    ----------
    comparisons : list of ArmComparison
        See :func:`compare_arms`.

    Returns
    -------
    str
        Differences in percentage points with their 95 % bootstrap intervals over test images; with three seeds or more also
        half the width of the 95 % interval over seeds. The average precision, which no threshold enters, has the latter only. The
        p-values are those of :class:`ArmComparison`. Columns that no result fills are left out.
    """
    columns = {
        "compared arms": [" → ".join(comparison.titles) for comparison in comparisons],
        "seeds": [str(len(comparison.seeds)) for comparison in comparisons],
        **{
            title: [difference_in_words(comparison, key) for comparison in comparisons]
            for key, title in SCORES.items()
        },
        "average precision": [ranking_in_words(comparison) for comparison in comparisons],
        "p, recall": [_p_value(comparison.p_value) for comparison in comparisons],
        "p, corrected": [_p_value(comparison.corrected_p_value) for comparison in comparisons],
        **{
            f"p over seeds, {name}": [_p_value(comparison.p_over_seeds[key]) for comparison in comparisons]
            for key, name in (("recall", "recall"), ("f1", "F1"))
        },
    }
    optional = "average precision", "p over seeds, recall", "p over seeds, F1"
    columns = {title: cells for title, cells in columns.items() if title not in optional or any(cells)}
    return markdown_table(tuple(columns), zip(*columns.values(), strict=True))


def strictness(comparisons):
    """A sentence: how many answers would keep a p-value below 0.05 over seeds; empty if none is *yes* or *no*.

    Parameters
    ----------
    comparisons : list of ArmComparison
        See :func:`compare_arms`.
    """
    decided = [comparison for comparison in comparisons if comparison.answer() in ("Yes", "No")]
    if not decided:
        return ""
    kept = {
        key: sum(comparison.p_over_seeds[key] < 0.05 for comparison in decided) for key in ("recall", "f1")
    }
    return (
        f"Of the {len(decided)} answers *yes* or *no*, {kept['recall']} keep a corrected p-value over seeds below 0.05 by recall, "
        f"and {kept['f1']} by F1."
    )


def _have_three_seeds(comparisons):
    return any(len(comparison.seeds) >= 3 for comparison in comparisons)


def about_differences(results, comparisons):
    """What :func:`paired_table` shows: a str. Of the seeds it speaks only if a comparison has three or more.

    Parameters
    ----------
    results : dict
        Arm name -> list of results of one study.
    comparisons : list of ArmComparison
        See :func:`compare_arms`.
    """
    over_seeds = _have_three_seeds(comparisons)
    text = (
        "The second arm's score minus the first's, in percentage points, on the seeds that both arms have. So a mean here may differ "
        "from the table above. In brackets: the 95 % bootstrap interval over test images. "
    )
    if over_seeds:
        text += "The number after ± is half the width of the 95 % interval over seeds (three seeds or more). "
    text += (
        "The average precision does not depend on a threshold, so it tells whether the minority is ranked better. The p-value is of an "
        "exact sign-flip test on the minority's images, all seeds together (McNemar's test if there is one seed), then corrected for "
        f"the number of questions (Holm 1979). It takes the trained networks as given{between_seeds_in_words(results)}"
    )
    if over_seeds:
        text += (
            ". The p-values over seeds do not: they are of Student's t-test on the differences of three seeds or more, corrected for "
            "the number of questions that have so many"
        )
    return f"{text}:"


def about_answers(comparisons):
    """How :func:`findings` answers the study's questions: a str.

    Parameters
    ----------
    comparisons : list of ArmComparison
        See :func:`compare_arms`.
    """
    few = "the answer is only *higher* or *lower*: these networks differ, which may be the seed's doing:"
    if not _have_three_seeds(comparisons):
        return (
            "The study's questions, answered by the recall of the minority. With one or two seeds an answer needs a corrected p-value "
            f"below 0.05, else it is *undecided*, and {few}"
        )
    return (
        "The study's questions, answered by the recall of the minority. *Yes* means that the arm in question finds more of the "
        "minority, *no* that it finds fewer. Both need a corrected p-value below 0.05 and a 95 % interval over seeds without zero. "
        "Else the answer is *undecided*. The interval is not corrected for the number of questions; the p-values over seeds "
        f"are. With one or two seeds {few}"
    )


def findings(comparisons):
    """The study's questions, each answered from the results: a markdown list.

    Each line has the answer (see :meth:`ArmComparison.answer`) with the number of seeds, the scores of both arms as means over the seeds
    that both have, and the corrected p-value. With three seeds or more, the difference in F1 and its 95 % intervals over seeds alone and
    over seeds and test images follow: recall can be bought with precision, F1 less so.

    Parameters
    ----------
    comparisons : list of ArmComparison
        See :func:`compare_arms`.

    Returns
    -------
    str
    """
    lines = []
    for comparison in comparisons:
        first, second = map(
            _found_in_words, *(comparison.means[key] for key in ("recall", "precision", "f1"))
        )
        seeds, p = len(comparison.seeds), comparison.corrected_p_value
        reason = ""
        if p < 0.05 and comparison.varies_with_the_seed():
            reason = (
                " The difference in recall varies with the seed: its 95 % interval over seeds contains zero."
            )
        lines.append(
            f"- **{comparison.question}** {comparison.answer()} ({seeds} seed{'s' * (seeds > 1)}). *{comparison.titles[1]}* finds "
            f"{second}, *{comparison.titles[0]}* {first}; p {'' if p < 1e-4 else '= '}{_p_value(p)}.{reason}{_f1_over_seeds(comparison)}"
        )
    warnings = {
        f"*The profile `{comparison.profile}` is too short to conclude anything from these answers.*\n"
        for comparison in comparisons
        if not PROFILES[comparison.profile].evidence
    }
    return "\n".join([*warnings, *lines])

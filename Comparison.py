"""The study's questions: do two arms differ by more than chance? Nothing here trains, resamples images or downloads.

    results = Study("cpu", "cifar10", "cat-50").load_results()
    print(paired_table(results))
    print(findings(results))

Two arms are compared on the seeds that both have, image by image. ``Significance.py`` has the statistics.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from Arms import ARMS, PROFILES, QUESTIONS
from Results import Study, predictions_of
from Significance import (
    bootstrap_weights,
    combined_mcnemar,
    holm,
    mcnemar_test,
    mean_interval,
    minority_scores,
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
    p_value : float
        Of exact McNemar tests on the minority's test images, one a seed, combined.
    average_precision : tuple of float
        The differences in the minority's average precision, one for each seed whose results both have it.
    """

    question: str
    titles: tuple
    seeds: tuple
    means: Mapping
    bootstrap: Mapping
    over_seeds: Mapping
    p_value: float
    average_precision: tuple

    def difference(self, score):
        """Second minus first: a float."""
        first, second = self.means[score]
        return second - first


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
    comparisons, scores, y_true, weights = [], {}, None, None
    for pair, question in questions.items():
        by_seed = [{run["seed"]: run for run in results.get(name, ())} for name in pair]
        seeds = tuple(sorted(by_seed[0].keys() & by_seed[1].keys()))
        if not seeds:
            continue
        run = by_seed[0][seeds[0]]
        if y_true is None:
            y_true = Study(run["profile"], run["data"], run["split"]).load_test_labels()
            # The first row is the test set as it is.
            weights = np.concatenate([np.ones((1, len(y_true)), np.float32), bootstrap_weights(y_true)])
        minority = [run["class_names"].index(c) for c in run["minority_classes"]]
        for name, runs in zip(pair, by_seed, strict=True):
            for seed in seeds:
                if (name, seed) not in scores:
                    scores[name, seed] = minority_scores(
                        y_true, predictions_of(runs[seed]), minority, weights
                    )
        rare = np.isin(y_true, minority)
        tests = [
            mcnemar_test(y_true[rare], *(predictions_of(runs[seed])[rare] for runs in by_seed))
            for seed in seeds
        ]
        ranking = _average_precisions(by_seed, seeds)
        comparisons.append(_comparison(question, pair, seeds, scores, combined_mcnemar(tests), ranking))
    return comparisons


def _average_precisions(by_seed, seeds):
    """The second arm's average precision of the minority minus the first's, for each seed; older results have none."""
    pairs = [[(runs[seed].get("probabilities") or {}).get("minority") for runs in by_seed] for seed in seeds]
    return tuple(
        second["average_precision"] - first["average_precision"]
        for first, second in pairs
        if first and second
    )


def _comparison(question, pair, seeds, scores, p_value, ranking):
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
    titles = tuple(ARMS[name].title for name in pair)
    return ArmComparison(question, titles, seeds, means, bootstrap, over_seeds, p_value, ranking)


def _points(value):
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # adding 0 makes -0.0 positive


def _plus_minus(half_width):
    return "" if half_width is None else f" ± {100 * half_width:.1f}"


def _difference_in_words(comparison, key):
    if np.isnan(comparison.difference(key)):
        return "–"
    low, high = comparison.bootstrap[key]
    seeds = _plus_minus(comparison.over_seeds[key])
    return f"{_points(comparison.difference(key))}{seeds} ({_points(low)} to {_points(high)})"


def _ranking_in_words(comparison):
    differences = comparison.average_precision
    if not differences:
        return ""
    mean, half_width = mean_interval(differences)
    lacking = len(differences) < len(comparison.seeds)
    seeds = f" ({len(differences)} of {len(comparison.seeds)} seeds)" if lacking else ""
    return f"{_points(mean)}{_plus_minus(half_width)}{seeds}"


def _p_value(p):
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _found_in_words(recall, precision, f1):
    if np.isnan(precision):
        return f"{recall:.1%} of the minority"
    return f"{recall:.1%} of the minority (precision {precision:.1%}, F1 {f1:.1%})"


def _f1_over_seeds(comparison):
    difference, half_width = comparison.difference("f1"), comparison.over_seeds["f1"]
    if half_width is None or np.isnan(difference):
        return ""
    seeds = len(comparison.seeds)
    return f" Difference in F1 over the {seeds} seeds: {_points(difference)}{_plus_minus(half_width)} points."


def paired_table(results, questions=QUESTIONS):
    """Markdown table of what the second of two arms has more than the first.

    Parameters
    ----------
    results : dict
        Arm name -> list of results.
    questions : dict
        Names of two arms -> the question.

    Returns
    -------
    str
        Differences in percentage points with their 95 % bootstrap intervals over test images; with three seeds or more also
        half the width of the 95 % interval over seeds. The average precision, which no threshold enters, has the latter only; it
        is left out if no result has it. The p-value is of exact McNemar tests on the minority's test
        images, combined over seeds, and then corrected for the number of questions (Holm 1979).
    """
    comparisons = compare_arms(results, questions)
    corrected = holm([comparison.p_value for comparison in comparisons])
    columns = {
        "compared arms": [" → ".join(comparison.titles) for comparison in comparisons],
        "seeds": [str(len(comparison.seeds)) for comparison in comparisons],
        **{
            title: [_difference_in_words(comparison, key) for comparison in comparisons]
            for key, title in SCORES.items()
        },
        "average precision": [_ranking_in_words(comparison) for comparison in comparisons],
        "p, recall": [_p_value(comparison.p_value) for comparison in comparisons],
        "p, corrected": [_p_value(p) for p in corrected],
    }
    if not any(columns["average precision"]):
        del columns["average precision"]
    return markdown_table(tuple(columns), zip(*columns.values(), strict=True))


def findings(results, questions=QUESTIONS):
    """The study's questions, each answered from the results: a markdown list.

    The answer, with the number of seeds, is *yes* or *no* if the two arms' recalls of the minority differ at p < 0.05 after the correction for the
    number of questions, else *undecided*. With three seeds or more, the difference in F1 and its 95 % interval over seeds follow: recall can be
    bought with precision, F1 less so. The scores are means over the seeds that both arms have.

    Parameters
    ----------
    results : dict
        Arm name -> list of results.
    questions : dict
        Names of two arms -> the question.

    Returns
    -------
    str
    """
    comparisons = compare_arms(results, questions)
    lines = []
    for comparison, p in zip(comparisons, holm([c.p_value for c in comparisons]), strict=True):
        answer = "Undecided" if p >= 0.05 else "Yes" if comparison.difference("recall") > 0 else "No"
        first, second = map(
            _found_in_words, *(comparison.means[key] for key in ("recall", "precision", "f1"))
        )
        seeds = f" ({len(comparison.seeds)} seed{'s' * (len(comparison.seeds) > 1)})" if p < 0.05 else ""
        lines.append(
            f"- **{comparison.question}** {answer}{seeds}. *{comparison.titles[1]}* finds {second}, *{comparison.titles[0]}* "
            f"{first}; p {'' if p < 1e-4 else '= '}{_p_value(p)}.{_f1_over_seeds(comparison)}"
        )
    warnings = {
        f"*The profile `{run['profile']}` is too short to conclude anything from these answers.*\n"
        for runs in results.values()
        for run in runs
        if not PROFILES[run["profile"]].evidence
    }
    return "\n".join([*warnings, *lines])

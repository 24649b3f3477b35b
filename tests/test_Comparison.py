"""Two arms are compared on the same images and seeds, and the answers follow from the numbers."""

import dataclasses

import numpy as np
import pytest

from Arms import ARMS, PROFILES
from Comparison import compare_arms, differences_between_seeds, findings, paired_table, strictness
from Significance import mcnemar_over_seeds, t_test_over_seeds

QUESTION = {("imbalanced", "logit-adjusted"): "Does it help?", ("imbalanced", "stable"): "Not run"}


def set_predictions(run, predictions):
    run["test_predictions"] = " ".join(map(str, predictions))


def find(run, y_test, found, wrong=0):
    """Let a run find the first so many cats, and take so many other images for cats."""
    predictions = np.where(y_test == 3, 0, y_test)
    predictions[np.flatnonzero(y_test == 3)[:found]] = 3
    predictions[np.flatnonzero(y_test != 3)[:wrong]] = 3
    set_predictions(run, predictions)


def three_seeds(results, tiny_data, found, wrong=(0, 0)):
    """Three runs of both arms. The first finds ``found[0]`` cats in each, the second as the seeds of ``found[1]`` say."""
    for number, name in enumerate(("imbalanced", "logit-adjusted")):
        runs = [dict(results[name][0], seed=seed) for seed in range(3)]
        for run, count in zip(runs, found[number], strict=True):
            find(run, tiny_data.y_test, count, wrong[number])
        results[name] = runs
    return results


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_differences_are_means_over_the_seeds_that_both_arms_have(results, tiny_data):
    three_seeds(results, tiny_data, [(2, 2, 2), (5, 6, 8)], wrong=(0, 10))
    results["imbalanced"].append(dict(results["imbalanced"][0], seed=7))
    [comparison] = compare_arms(results, QUESTION)
    assert comparison.seeds == (0, 1, 2)
    assert comparison.titles == tuple(ARMS[name].title for name in ("imbalanced", "logit-adjusted"))
    assert comparison.means["recall"] == pytest.approx((0.2, 19 / 30))
    assert comparison.difference("recall") == pytest.approx(19 / 30 - 0.2)
    assert comparison.means["precision"] == pytest.approx((1, np.mean([5 / 15, 6 / 16, 8 / 18])))
    assert comparison.means["accuracy"] == pytest.approx((0.92, np.mean([0.85, 0.86, 0.88])))
    deviation = np.std([0.3, 0.4, 0.6], ddof=1)
    assert comparison.over_seeds["recall"] == pytest.approx(4.3027 * deviation / np.sqrt(3), rel=1e-4)
    low, high = comparison.bootstrap["recall"]
    assert 0 < low < comparison.difference("recall") < high < 1


def test_the_p_value_is_of_the_minoritys_images_over_all_seeds(results, tiny_data):
    three_seeds(results, tiny_data, [(0, 0, 0), (9, 9, 9)], wrong=(0, 50))
    [same] = compare_arms(results, QUESTION)
    assert same.p_value == pytest.approx(2 / 2**9)  # nine images gain, none loses: two sides
    three_seeds(results, tiny_data, [(9, 0, 0), (0, 9, 0)])
    [opposite] = compare_arms(results, QUESTION)
    assert opposite.p_value == 1
    single = {name: runs[:1] for name, runs in results.items()}
    [one] = compare_arms(single, QUESTION)
    y, rare = tiny_data.y_test, tiny_data.y_test == 3
    first, second = (
        np.array(single[name][0]["test_predictions"].split(), dtype=int) for name in list(QUESTION)[0]
    )
    assert one.p_value == mcnemar_over_seeds(y[rare], first[rare], second[rare])
    assert one.over_seeds["recall"] is None


def test_the_p_values_over_seeds_are_corrected_for_the_questions_with_three_seeds(results, tiny_data):
    three_seeds(results, tiny_data, [(2, 2, 2), (5, 6, 8)])
    [alone] = compare_arms(results, QUESTION)
    assert alone.p_over_seeds["recall"] == pytest.approx(t_test_over_seeds([0.3, 0.4, 0.6]), rel=1e-5)
    f1 = [10 / 15 - 4 / 12, 12 / 16 - 4 / 12, 16 / 18 - 4 / 12]
    assert alone.p_over_seeds["f1"] == pytest.approx(t_test_over_seeds(f1), rel=1e-5)
    results["stable"] = results["imbalanced"][:1]
    questions = {**QUESTION, ("logit-adjusted", "imbalanced"): "The other way round?"}
    first, single, second = compare_arms(results, questions)
    for each in (first, second):
        assert each.p_over_seeds["recall"] == pytest.approx(2 * alone.p_over_seeds["recall"], rel=1e-4)
    assert single.p_over_seeds == {"recall": None, "f1": None}
    rows = paired_table([alone, single]).splitlines()
    assert cells(rows[0])[-2:] == ["p over seeds, recall", "p over seeds, F1"]
    assert cells(rows[2])[-2] == f"{alone.p_over_seeds['recall']:.4f}"
    assert cells(rows[3])[-2:] == ["", ""]
    assert "over seeds" not in paired_table([single])


def test_arms_that_agree_differ_by_nothing(results, tiny_data):
    three_seeds(results, tiny_data, [(4, 4, 4), (4, 4, 4)])
    [comparison] = compare_arms(results, QUESTION)
    assert comparison.bootstrap == {key: (0, 0) for key in ("recall", "precision", "f1", "accuracy")}
    assert comparison.p_value == 1
    assert "+0.0 ± 0.0 (+0.0 to +0.0)" in paired_table(compare_arms(results, QUESTION))


def test_arms_are_compared_by_runs_of_the_same_seed(results):
    """Seed 0 of one arm is gone: seed 1 of it is not paired with seed 0 of the other."""
    assert [comparison.seeds for comparison in compare_arms(results, QUESTION)] == [(0,)]
    del results["imbalanced"][0]
    assert compare_arms(results, QUESTION) == []
    assert len(paired_table(compare_arms(results, QUESTION)).splitlines()) == 2
    assert findings(compare_arms(results, QUESTION)).count("**") == 0
    results["logit-adjusted"][0]["seed"] = 1
    assert len(paired_table(compare_arms(results, QUESTION)).splitlines()) == 3


def test_the_table_shows_differences_intervals_and_corrected_p_values(results, tiny_data):
    three_seeds(results, tiny_data, [(2, 2, 2), (8, 8, 8)])
    questions = QUESTION | {("logit-adjusted", "imbalanced"): "And back?"}
    head, _, *rows = map(cells, paired_table(compare_arms(results, questions)).splitlines())
    assert [row[0] for row in rows] == [
        "Imbalanced → Logit-adjusted loss, no added image", "Logit-adjusted loss, no added image → Imbalanced",
    ]  # fmt: skip
    there, back = (dict(zip(head, row, strict=True)) for row in rows)
    assert there["seeds"] == "3" and there["minority recall"].startswith("+60.0 ± 0.0 (+")
    assert back["minority recall"].startswith("-60.0 ± 0.0 (-") and back["accuracy"].startswith("-6.0")
    p = 2 / 2**6
    assert [float(there[key]) for key in ("p, recall", "p, corrected")] == pytest.approx([p, 2 * p], abs=1e-4)
    f1 = 2 * 0.8 / 1.8 - 2 * 0.2 / 1.2  # with a precision of 1
    line = findings(compare_arms(results, QUESTION)).splitlines()[-1]
    assert (
        f" Difference in F1 over the 3 seeds: +{100 * f1:.1f} ± 0.0 points; over seeds and test images: "
        in line
    )
    low, high = compare_arms(results, QUESTION)[0].bootstrap["f1"]  # all that varies are the test images
    half_width = float(line.rpartition("±")[2].rstrip("."))
    assert half_width == pytest.approx(100 * (high - low) / 2, rel=0.1)


def test_the_table_shows_how_much_better_the_minority_is_ranked(results, tiny_data):
    three_seeds(results, tiny_data, [(2, 2, 2), (8, 8, 8)])
    for name, precisions in (("imbalanced", (0.2, 0.3, 0.4)), ("logit-adjusted", (0.5, 0.7, 0.6))):
        for run, value in zip(results[name], precisions, strict=True):
            run["probabilities"] = {"minority": {"average_precision": value}}
    head, _, row = map(cells, paired_table(compare_arms(results, QUESTION)).splitlines())
    half = 4.3027 * np.std([30, 40, 20], ddof=1) / np.sqrt(3)
    assert row[head.index("average precision")] == f"+30.0 ± {half:.1f}"
    del results["imbalanced"][0]["probabilities"]  # as in older results
    head, _, row = map(cells, paired_table(compare_arms(results, QUESTION)).splitlines())
    assert row[head.index("average precision")] == "+30.0 (2 of 3 seeds)"
    for run in results["imbalanced"]:
        run["probabilities"] = {"minority": None}
    head, _, row = map(cells, paired_table(compare_arms(results, QUESTION)).splitlines())
    assert "average precision" not in head and len(head) == len(row) == 10


@pytest.mark.parametrize(
    ("found", "answer"), [((0, 9), "Higher"), ((9, 0), "Lower"), ((5, 6), "Undecided"), ((0, 0), "Undecided")]
)
def test_questions_are_answered_by_the_minoritys_images(found, answer, results, tiny_data):
    """Ten cats, of which each arm finds the first so many."""
    for name, count in zip(("imbalanced", "logit-adjusted"), found, strict=True):
        find(results[name][0], tiny_data.y_test, count, wrong=10)
    warning, _, line = findings(compare_arms(results, QUESTION)).splitlines()
    assert "`smoke` is too short to conclude anything" in warning
    assert line.startswith(f"- **Does it help?** {answer} (1 seed). *Logit-adjusted")
    first, second = (
        f"{n / 10:.1%} of the minority (precision {n / (n + 10):.1%}, F1 {2 * n / (n + 20):.1%})"
        for n in found
    )
    assert f"finds {second}, *Imbalanced* {first}; p = 0." in line or "p = 1.0" in line


def test_the_test_also_finds_differences_between_seeds_of_one_arm(results, tiny_data):
    three_seeds(results, tiny_data, [(0, 0, 9), (5, 5, 6)])
    assert differences_between_seeds(results) == (2, 6)
    assert differences_between_seeds({name: runs[:1] for name, runs in results.items()}) == (0, 0)


def test_an_arm_that_never_predicts_the_minority_has_no_precision(results, tiny_data):
    three_seeds(results, tiny_data, [(0, 0, 0), (8, 8, 8)])
    head, _, row = map(cells, paired_table(compare_arms(results, QUESTION)).splitlines())
    row = dict(zip(head, row, strict=True))
    assert row["minority precision"] == "–" and row["minority F1"].startswith("+88.9")
    line = findings(compare_arms(results, QUESTION)).splitlines()[-1]
    assert "*Imbalanced* 0.0% of the minority; p = " in line and "Yes (3 seeds)" in line


def test_without_results_there_is_no_answer():
    assert (
        findings(compare_arms({}, QUESTION)) == ""
        and len(paired_table(compare_arms({}, QUESTION)).splitlines()) == 2
    )


def test_an_answer_needs_a_p_value_that_survives_the_number_of_questions(results, tiny_data):
    for name, count in (("imbalanced", 0), ("logit-adjusted", 6)):
        find(results[name][0], tiny_data.y_test, count)  # p = 2 / 2^6
    assert "Higher" in findings(compare_arms(results, QUESTION))
    questions = QUESTION | {("logit-adjusted", "imbalanced"): "And back?"}
    assert findings(compare_arms(results, questions)).count("Undecided") == 2


def test_evidence_is_answered_without_a_warning(results, monkeypatch):
    evidence = dataclasses.replace(PROFILES["smoke"], evidence=True)
    monkeypatch.setitem(PROFILES, "smoke", evidence)
    assert findings(compare_arms(results, QUESTION)).startswith("- **Does it help?**")


@pytest.mark.parametrize(
    ("second", "answer"), [((7, 8, 9), "Yes"), ((1, 9, 9), "Undecided"), ((1, 9), "Higher")]
)
def test_an_answer_needs_seeds_that_agree(second, answer, results, tiny_data):
    """Six to nine more of ten cats are significant for the images; with three seeds the seeds have a say."""
    three_seeds(results, tiny_data, [(0, 0, 0), (*second, 0)[:3]])
    for name in results:
        results[name] = results[name][: len(second)]
    [comparison] = compare_arms(results, QUESTION)
    assert comparison.corrected_p_value < 0.05
    assert comparison.answer() == answer
    line = findings([comparison])
    assert (f"{answer} ({len(second)} seeds)" in line) and ("varies with the seed" in line) == (
        answer == "Undecided"
    )


def test_a_sentence_counts_the_answers_that_the_seeds_alone_support(results, tiny_data):
    assert strictness(compare_arms(results, QUESTION)) == "", "one seed gives no yes or no"
    three_seeds(results, tiny_data, [(0, 0, 0), (9, 9, 10)])
    comparisons = compare_arms(results, QUESTION)
    assert comparisons[0].answer() == "Yes"
    assert "Of the 1 answers *yes* or *no*, 1 keep" in strictness(comparisons)
    weak = dataclasses.replace(comparisons[0], p_over_seeds={"recall": 0.05, "f1": 0.04})
    assert (
        "Of the 2 answers *yes* or *no*, 1 keep a corrected p-value over seeds below 0.05 by recall, and 2 by F1"
        in (strictness([*comparisons, weak]))
    )

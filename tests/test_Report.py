"""Tables, sentences and figures say what results/ says."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import REPOSITORY, smoke, smoke_study

import Report
from Arms import ARMS, STORY, Arm
from Documents import NOT_RUN
from Experiment import run_arms
from Methods import METHODS
from Results import Study


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- Tables and sentences -----------------------------------------------------------------------


def test_the_table_shows_each_arm_with_the_minority_first(results):
    head, _, *rows = Report.results_table(results).splitlines()
    assert cells(head)[2:5] == ["minority recall", "minority precision", "minority F1"]
    assert [cells(row)[0] for row in rows] == [ARMS[name].title for name in results]
    run = results["logit-adjusted"][0]
    row = dict(zip(cells(head), cells(rows[1]), strict=True))
    assert row["minority recall"] == f"**{100 * run['metrics']['minority']['recall']:.1f}**"
    assert row["minority F1"] == f"{100 * run['metrics']['minority']['f1']:.1f}"
    assert row["accuracy"] == f"{100 * run['metrics']['accuracy']:.1f}"


def test_several_seeds_are_shown_as_mean_and_interval(results):
    runs = results["imbalanced"]
    accuracies = [100 * run["metrics"]["accuracy"] for run in runs]
    columns = Report.COLUMNS | Report.MORE_COLUMNS

    def row():
        head, _, first, _ = Report.results_table(results, columns).splitlines()
        return dict(zip(cells(head), cells(first), strict=True))

    assert row()["accuracy"] == f"{np.mean(accuracies):.1f}" and row()["seeds"] == "2"  # two have no interval
    assert row()["standard deviation of the recall"] == "0.0"
    third = copy.deepcopy(runs[0])
    third["metrics"]["minority"]["recall"] += 0.03
    results["imbalanced"] = [*runs, third]
    accuracies.append(accuracies[0])
    half_width = 4.3027 * np.std(accuracies, ddof=1) / np.sqrt(3)
    assert row()["accuracy"] == f"{np.mean(accuracies):.1f} ± {half_width:.1f}"
    recalls = [run["metrics"]["minority"]["recall"] for run in results["imbalanced"]]
    assert row()["standard deviation of the recall"] == f"{100 * np.std(recalls, ddof=1):.1f}"


def test_every_stored_score_has_a_column(results):
    head, _, *rows = Report.results_table(results, Report.COLUMNS | Report.MORE_COLUMNS).splitlines()
    run = results["logit-adjusted"][0]
    row = dict(zip(cells(head), cells(rows[1]), strict=True))
    for column, value in [
        ("recall of the other classes", run["metrics"]["majority_recall"]),
        ("macro F1", run["metrics"]["macro_f1"]),
        ("G-mean", run["metrics"]["g_mean"]),
        ("accuracy, averaged flips", run["metrics_with_averaged_flips"]["accuracy"]),
        ("accuracy, best evaluation in training", run["best_look_at_test"]["test_accuracy"]),
        ("average precision", run["probabilities"]["minority"]["average_precision"]),
        ("expected calibration error", run["probabilities"]["expected_calibration_error"]),
    ]:
        assert row[column] == f"{100 * value:.1f}"
    results["logit-adjusted"][0]["metrics_with_averaged_flips"] = None  # as for the digits
    *_, last = Report.results_table(results, Report.MORE_COLUMNS).splitlines()
    assert cells(last)[4] == ""
    for run in results["imbalanced"]:
        run["metrics_with_averaged_flips"] = None
    head, *_ = Report.results_table(results, Report.MORE_COLUMNS).splitlines()
    assert "averaged flips" not in head and "G-mean" in head  # a column without any value


def test_an_arm_that_never_predicts_the_minority_has_no_precision(results):
    run = results["logit-adjusted"][0]
    matrix = np.array(run["metrics"]["confusion_matrix"])
    for column, precision in ((0, "–"), (5, f"{100 * run['metrics']['minority']['precision']:.1f}")):
        matrix[:, 3] = column
        run["metrics"]["confusion_matrix"] = matrix.tolist()
        *_, last = Report.results_table(results).splitlines()
        assert cells(last)[3] == precision
        bars = Report.comparison_figure(results).axes[1]
        assert bars.texts[-1].get_text() == precision


def test_the_table_of_arms_says_what_they_differ_in():
    rows = [cells(row) for row in Report.arms_table(STORY).splitlines()[2:]]
    alike = "shuffled, sources mixed"
    assert rows == [
        ["Imbalanced", "none", "", "cross-entropy", alike],
        ["Non-synthetic, mild augmentation", "`AugmentationOverSampler`", "the minority", "cross-entropy", alike],
        ["Stable Diffusion, minority only", "`StableDiffusionOverSampler`", "the minority", "cross-entropy", alike],
        ["Logit-adjusted loss, no added image", "none", "", "logit-adjusted cross-entropy", alike],
        ["Stable Diffusion, source-balanced, logit-adjusted per source", "`StableDiffusionOverSampler`",
         "every class", "logit-adjusted cross-entropy", alike],
        ["Stable Diffusion, source-aware", "`StableDiffusionOverSampler`, spectrum matched",
         "every class", "logit-adjusted cross-entropy",
         "25% synthetic, none in the last 15% of the steps, batch-norm statistics per source"],
    ]  # fmt: skip
    others = ("to-the-end", "shared-statistics", "placebo", "unmatched", "cross-entropy")
    rows = [
        cells(row)
        for row in Report.arms_table([f"stable-source-aware-{name}" for name in others]).splitlines()[2:]
    ]
    assert [row[4] for row in rows[:2]] == [
        "25% synthetic, batch-norm statistics per source", "25% synthetic, none in the last 15% of the steps",
    ]  # fmt: skip
    assert [row[1].count("shuffled") for row in rows] == [0, 0, 1, 0, 0]
    assert [row[1].count("spectrum") for row in rows] == [1, 1, 1, 0, 1]
    assert [row[3] == "cross-entropy" for row in rows] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("ldam-deferred", ["none", "", "LDAM", "shuffled, sources mixed"]),
        ("class-balanced", ["none", "", "class-balanced cross-entropy", "shuffled, sources mixed"]),
        ("last-layer", ["none", "", "cross-entropy; then retrain last layer", "shuffled, sources mixed"]),
        ("mixup", ["none", "", "cross-entropy", "mixup"]),
        ("adjusted-oversampled", ["`PixelOverSampler`", "the minority",
         "logit-adjusted cross-entropy, one prior for all rows", "shuffled, sources mixed"]),
        ("stable-matched-statistics", ["`StableDiffusionOverSampler`, statistics matched", "the minority",
         "cross-entropy", "shuffled, sources mixed"]),
    ],
)  # fmt: skip
def test_any_method_can_be_told_in_the_table_of_arms(method, expected, monkeypatch):
    monkeypatch.setitem(ARMS, "new", Arm("New", "new", "new", METHODS[method]))
    assert cells(Report.arms_table(["new"]).splitlines()[2])[1:] == expected


def test_conditions_without_a_result_are_one_line():
    with pytest.raises(ValueError, match="There is no result yet: run an arm first"):
        Report.conditions({})


def test_uneven_seeds_are_said(results):
    assert "Seeds 0, 1 (not every arm has all of them)." in Report.conditions(results)
    figure = Report.comparison_figure(results)
    assert figure.get_suptitle() == "cat-3, profile smoke, 1 to 2 seeds an arm"
    del results["imbalanced"][1]
    assert "Seed 0. " in Report.conditions(results)
    assert Report.comparison_figure(results).get_suptitle() == "cat-3, profile smoke, 1 seed (0)"


def test_the_conditions_say_in_which_types_convolutions_ran(results):
    first, second, third = (
        run["configuration"] for run in (*results["imbalanced"], *results["logit-adjusted"])
    )
    first["precision"] = second["precision"] = "float32"
    del third["precision"]
    third["bfloat16"] = True  # as in older results
    assert "convolutions in bfloat16 and float32; " in Report.conditions(results)
    third["bfloat16"] = False
    assert "convolutions in float32; " in Report.conditions(results)


def test_the_conditions_say_where_stable_diffusion_images_come_from(results):
    first, second, third = (*results["imbalanced"], *results["logit-adjusted"])
    assert "Stable Diffusion images" not in Report.conditions(results)
    first["stable_diffusion_images"] = {"source": "9 images imported", "checksum": 1}
    second["stable_diffusion_images"] = {"source": "9 images imported", "checksum": 1}
    assert "Stable Diffusion images: 9 images imported. " in Report.conditions(results)
    third["stable_diffusion_images"] = {"source": "8 images imported", "checksum": 2}
    two = " (of 2 different caches). "
    assert f"Stable Diffusion images: 9 images imported, or 8 images imported{two}" in Report.conditions(
        results
    )
    third["stable_diffusion_images"]["source"] = "9 images imported"
    assert f"Stable Diffusion images: 9 images imported{two}" in Report.conditions(results)


def test_results_from_before_a_metric_show_an_empty_cell(results):
    del results["logit-adjusted"][0]["metrics"]["g_mean"]
    *_, last = Report.results_table(results, Report.MORE_COLUMNS).splitlines()
    assert cells(last)[3] == ""
    del results["imbalanced"][0]["metrics"]["g_mean"]
    _, _, row, _ = Report.results_table(results, Report.MORE_COLUMNS).splitlines()
    g_mean = results["imbalanced"][1]["metrics"]["g_mean"]
    assert cells(row)[3] == f"{100 * g_mean:.1f} (1 of 2 seeds)"


@pytest.mark.parametrize(("key", "other"), [("downsampling", "strides"), ("steps", 7), ("width", 8)])
def test_the_conditions_name_the_network_and_refuse_arms_trained_in_different_ways(results, key, other):
    assert "ResNet-18 of width 4 with average pooling" in Report.conditions(results)
    results["logit-adjusted"][0]["configuration"][key] = other
    with pytest.raises(ValueError, match=rf"logit-adjusted of profile smoke .*different ways \({key}: "):
        Report.conditions(results)


def test_the_reliability_diagram_shows_the_arms_that_have_probabilities(results):
    figure = Report.reliability_figure(results)
    assert figure.axes[0].get_title() == "cat-3, profile smoke, 1 to 2 seeds an arm"
    del results["imbalanced"][0]["probabilities"]  # as in older results
    figure = Report.reliability_figure(results)
    assert figure.axes[0].get_title() == "cat-3, profile smoke, 1 seed an arm, not the same"
    del results["imbalanced"][1]["probabilities"]
    assert Report.reliability_figure(results) is None


# --- Generated parts of the documents -----------------------------------------------------------


def test_a_document_that_is_not_current_fails_the_check(monkeypatch, capsys):
    documents = {Path("README.md"): {"summary": "true"}, Path("current.md"): {"a": "true"}}
    monkeypatch.setattr(Report, "generated_parts", lambda: documents)
    Path("README.md").write_text("<!-- summary:begin (generated) -->\n\nfalse\n\n<!-- summary:end -->\n")
    Path("current.md").write_text("<!-- a:begin (generated) -->\n\ntrue\n\n<!-- a:end -->\n")
    with pytest.raises(SystemExit) as stop:
        Report.main(["--check"])
    assert stop.value.code == 1
    assert "not in README.md. Run" in capsys.readouterr().err
    assert "false" in Path("README.md").read_text()
    Report.main([])
    Report.main(["--check"])


def test_documents_without_evidence_say_so():
    assert all(part == NOT_RUN for parts in Report.generated_parts().values() for part in parts.values())


def test_the_readme_shows_the_committed_results_in_a_row_for_each_arm(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    summary = Report.generated_parts()[Path("README.md")]["summary"]
    names = (*Report.README_ARMS, "balanced")
    assert len(re.findall(r"(?m)^\| [A-Z]", summary)) == len(names) == 7
    results = Study("cpu", "cifar10", "cat-50").load_results()
    for name in names:
        recall = 100 * np.mean([run["metrics"]["minority"]["recall"] for run in results[name]])
        assert f"**{recall:.1f}" in next(li for li in summary.splitlines() if ARMS[name].title in li)


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_what_the_prose_says_with_an_interval_stands_in_a_table(document):
    """A new seed changes the tables; prose that still has the old numbers fails here."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    tables = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    tables = " ".join(re.findall(r"<!-- \w+:begin \(generated\) -->(.*?)<!--", tables, re.DOTALL))
    prose = re.sub(r"<!-- \w+:begin \(generated\) -->.*?<!--", "", text, flags=re.DOTALL)
    said = re.findall(r"[\d.]+ ± [\d.]*\d", prose)
    assert len(said) >= 2
    assert [number for number in said if number not in tables] == []


def test_results_of_another_profile_do_not_change_the_documents(tiny_data, monkeypatch):
    """After a run on a GPU, the tests of the repository still pass."""
    monkeypatch.setattr(Report, "COMMITTED", Study("cpu", "cifar10", "cat-3"))
    run_arms([Study("smoke", "cifar10", "cat-3")], tiny_data, ["imbalanced"])
    assert Report.generated_parts()[Path("README.md")]["summary"] == NOT_RUN


def test_the_strongest_network_has_its_own_tables_and_picture(tiny_data, headline, monkeypatch):
    monkeypatch.setattr(Report, "COMMITTED", Study("smoke", "cifar10", "cat-5"))
    monkeypatch.setattr(Report, "HEADLINE", headline)
    run_arms([headline], tiny_data, ["imbalanced", "logit-adjusted"])
    document = Path("docs", "results.md")
    parts = Report.generated_parts()
    assert parts[document]["headline"].count("| Logit-adjusted loss, no added image |") == 1
    assert parts[document]["results"] == NOT_RUN
    for path, names in parts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"<!-- {n}:begin (generated) -->\n<!-- {n}:end -->\n" for n in names))
    Report.main([])
    assert Path("images/smoke/cat-5/headline.png").exists()


@pytest.mark.parametrize("script", ["Report.py", "benchmarks/report.py"])
def test_another_working_directory_is_one_line(script):
    answer = subprocess.run([sys.executable, str(REPOSITORY / script)], capture_output=True, text=True)
    assert answer.returncode == 1
    [line] = answer.stderr.splitlines()
    assert "README.md in" in line and "Run this from the repository's folder" in line


def test_every_arm_has_a_row_in_the_table_of_arms():
    rows = [cells(row) for row in Report.arms_table(ARMS).splitlines()[2:]]
    assert [row[0] for row in rows] == [arm.title for arm in ARMS.values()]
    assert all(row[3] and row[4] for row in rows)


def test_the_tables_of_a_profile_are_printed_and_nothing_is_written(tiny_data, capsys, monkeypatch):
    monkeypatch.setattr(Report, "REFERENCE_SPLIT", "cat-3")
    run_arms([Study("smoke", "cifar10", "cat-3")], tiny_data, ["imbalanced"])
    capsys.readouterr()
    Report.main(["--profile", "smoke"])
    assert "| Imbalanced | 0 |" in capsys.readouterr().out
    Report.main(["--profile", "headline"])
    assert capsys.readouterr().out.strip() == NOT_RUN
    assert not Path("README.md").exists()


def test_the_readme_can_be_read_in_five_minutes():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_curves_say_that_they_end_before_the_last_layer_is_changed(tiny_data):
    for name, ends_before in (("imbalanced", False), ("adjusted-after-training", True)):
        smoke(name, tiny_data)
        figure = Report.learning_curves_figure(smoke_study(tiny_data).load_runs(name))
        assert ("before the last layer is changed" in figure.get_suptitle()) is ends_before
        plt.close(figure)

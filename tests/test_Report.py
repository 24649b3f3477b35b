"""The report says what results/ says, and the notebook runs from top to bottom."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import Experiment
import Report
from ImbalancedCIFAR10 import split_from_name
from RunNotebooks import NOTEBOOKS

REPOSITORY = Path(Report.__file__).parent


@pytest.fixture
def results(tiny_data, tiny_cache):
    """Two seeds of one arm and one of another, under smoke."""
    Experiment.run_arms(["imbalanced", "logit-adjusted"], tiny_data, ["cat-3"], [0], "smoke", "cpu")
    Experiment.run_arms(["imbalanced"], tiny_data, ["cat-3"], [1], "smoke", "cpu")
    return Experiment.load_results("smoke", "cifar10", "cat-3")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_shows_each_arm_with_the_minority_first(results):
    head, _, *rows = Report.results_table(results).splitlines()
    assert cells(head)[2:4] == ["minority recall", "minority precision"]
    assert [cells(row)[0] for row in rows] == [Experiment.ARMS[name].title for name in results]
    run = results["logit-adjusted"][0]
    assert cells(rows[1])[2] == f"**{100 * run['metrics']['minority']['recall']:.1f}**"
    assert cells(rows[1])[6] == f"{100 * run['metrics']['accuracy']:.1f}"


def test_several_seeds_are_shown_as_mean_and_spread(results):
    accuracies = [100 * run["metrics"]["accuracy"] for run in results["imbalanced"]]
    row = cells(Report.results_table(results).splitlines()[2])
    assert row[6] == f"{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}"
    assert row[-1] == "2"


def test_paired_counts_agree_with_the_predictions(results, tiny_data, monkeypatch):
    monkeypatch.setattr(Report, "PAIRS", (("imbalanced", "logit-adjusted"), ("imbalanced", "stable")))
    lines = Report.paired_table(results).splitlines()
    assert len(lines) == 3  # there is no result of the second pair
    first, second = (
        np.array(results[name][0]["test_predictions"].split(), dtype=int) == tiny_data.y_test
        for name in ("imbalanced", "logit-adjusted")
    )
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    assert cells(lines[2])[3] == f"{only_first} / {only_second}"


@pytest.mark.parametrize(("key", "other"), [("downsampling", "strides"), ("steps", 7), ("width", 8)])
def test_the_conditions_name_the_network_and_arms_trained_in_different_ways_are_refused(results, key, other):
    assert "ResNet-18 of width 4 with average pooling" in Report.conditions(results)
    results["logit-adjusted"][0]["configuration"][key] = other
    with pytest.raises(ValueError, match=rf"logit-adjusted of profile smoke .*different ways \({key}: "):
        Report.conditions(results)


def test_the_readme_is_replaced_between_its_markers_only():
    begin, end = "<!-- a:begin (generated) -->", "<!-- a:end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    new = Report.with_section(text, "a", "new")
    assert new == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert Report.with_section(new, "a", "new") == new
    for lacking in ("no markers", begin, text + text, text.replace("a:", "b:")):
        with pytest.raises(ValueError, match="There must be one line .*a:begin"):
            Report.with_section(lacking, "a", "new")


def test_a_readme_that_is_not_current_fails_the_check(monkeypatch):
    monkeypatch.setattr(Report, "readme_sections", lambda: {"results": "true"})
    Path("README.md").write_text("<!-- results:begin (generated) -->\n\nfalse\n\n<!-- results:end -->\n")
    with pytest.raises(SystemExit) as stop:
        Report.main(["--check"])
    assert stop.value.code == 1
    assert "false" in Path("README.md").read_text()
    Report.main([])
    Report.main(["--check"])


def test_counts_shown_are_those_trained_on(tiny_data, tiny_cache):
    split = split_from_name("cat-3", tiny_data.y_train)
    counts = Report.class_counts(tiny_data, split)
    real, synthetic = counts["one class filled up"]
    largest = np.bincount(tiny_data.y_train).max()
    assert real[3] == 3
    assert synthetic[3] == largest - 3
    assert synthetic.sum() == synthetic[3]
    assert (counts["every class gets some"][1] > 0).all()


def test_the_notebooks_run_from_top_to_bottom_and_name_their_data():
    """On the digits: a proxy that refuses keeps the test from downloading CIFAR-10."""
    for name in NOTEBOOKS:
        shutil.copy(REPOSITORY / name, name)
    refusing = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | refusing | {
        "PYTHONPATH": str(REPOSITORY), "CIFAR10_ROOT": str(Path("none").absolute()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "RunNotebooks.py"), "--profile", "smoke"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "NOT CIFAR-10" in run.stdout
    executed = json.loads(Path("results/smoke/digits_Main.ipynb").read_text())
    text = json.dumps(executed)
    assert "This is not CIFAR-10" in text
    assert "was skipped: there are no Stable Diffusion images of digits" in text
    names = {path.name for path in Path("images").rglob("*.png")}
    assert {
        "digits_class_counts.png",
        "digits_samples.png",
        "digits_comparison.png",
        "digits_cm_nsd.png",
        "digits_gan_training_loss.png",
        "digits_gan_samples.png",
        "digits_gan_progress.png",
        "digits_gan_memorisation.png",
        "digits_fid.png",
        "digits_cm_gan.png",
        "digits_test_gan.png",
    } <= names
    assert all(name.startswith("digits_") for name in names)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_in_the_repository_have_no_output(name):
    notebook = json.loads((REPOSITORY / name).read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    tags = [cell["metadata"].get("tags", []) for cell in notebook["cells"]]
    assert tags.count(["parameters"]) == 1

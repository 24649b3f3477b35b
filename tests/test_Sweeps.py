"""Results beyond the reference split: which runs are found, and what is drawn of them."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import Report
import Sweeps
from Experiment import run_arms
from Results import Study

STUDY = Study("smoke", "cifar10", "cat-5")
DOCUMENT = "".join(
    f"<!-- {part}:begin (generated) -->\n\nold\n\n<!-- {part}:end -->\n" for part in ("counts", "splits")
)


@pytest.fixture
def document(monkeypatch):
    monkeypatch.setattr(Sweeps, "COMMITTED", STUDY)
    Path("docs").mkdir()
    Sweeps.DOCUMENT.write_text(DOCUMENT)
    return Sweeps.DOCUMENT


def test_runs_are_found_by_their_numbers_of_synthetic_and_of_real_images(tiny_data, tiny_cache, document):
    run_arms(
        [STUDY], tiny_data, ["imbalanced", "logit-adjusted", "stable@12", "stable", "stable-source-aware@7"]
    )
    run_arms([STUDY], tiny_data, ["stable@12"], [1])
    run_arms([Study("smoke", "cifar10", "cat-10")], tiny_data, ["stable"])
    synthetic = Sweeps.by_synthetic_images(STUDY)
    assert {name: list(points) for name, points in synthetic.items()} == {
        "stable": [0, 12, 25], "stable-source-aware": [0, 7],
    }  # fmt: skip
    assert [run["seed"] for run in synthetic["stable"][12]] == [0, 1]
    assert synthetic["stable"][12][0]["training_images"]["synthetic"][3] == 12
    assert synthetic["stable"][0][0]["arm"] == "imbalanced"  # the same loss and no image
    assert synthetic["stable-source-aware"][0][0]["arm"] == "logit-adjusted"
    real = Sweeps.by_real_images(STUDY)
    assert {name: list(points) for name, points in real.items()} == {
        "stable": [5, 10], "logit-adjusted": [5], "stable-source-aware": [],
    }  # fmt: skip

    figure = Sweeps.counts_figure({"synthetic": synthetic, "real": real}, "title")
    above, below = (figure.axes[k] for k in (0, 3))
    assert [tick.get_text() for tick in above.get_xticklabels()] == ["0", "7", "12", "25"]
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["5", "10"]
    expected = [run["metrics"]["minority"]["recall"] for run in (synthetic["stable"][25][0],)]
    assert above.lines[0].get_ydata()[-1] == expected[0]
    plt.close(figure)

    Sweeps.main([])
    text = document.read_text()
    assert text.count("| Stable Diffusion, minority only | synthetic | 12 |") == 1
    [without] = re.findall(r"\| Stable Diffusion, minority only \| synthetic \| 0 \|.*", text)
    expected = Report.COLUMNS["minority precision"](synthetic["stable"][0])
    assert without.split("|")[5].strip() == expected  # a dash if no image is taken for the minority
    assert Path("images/smoke/cat-5/number_of_images.png").exists()
    Sweeps.main(["--check"])
    document.write_text(DOCUMENT)
    with pytest.raises(SystemExit, match="1"):
        Sweeps.main(["--check"])


def test_a_sweep_that_was_not_run_has_no_row(tiny_data, tiny_cache, document):
    run_arms([STUDY], tiny_data, ["logit-adjusted", "stable-source-aware@7"])
    assert list(Sweeps._sweeps()) == ["synthetic"]
    Sweeps.main([])
    assert "| synthetic | 7 |" in document.read_text()
    assert "| real |" not in document.read_text()


def test_the_arms_alone_make_no_curve(tiny_data, document):
    run_arms([STUDY], tiny_data, ["imbalanced", "logit-adjusted"])
    Sweeps.main([])
    assert document.read_text().count("*Not run yet.*") == 2
    assert not list(Path().glob("images/**/number_of_images.png"))


def test_other_splits_have_a_row_for_each_arm_and_other_counts_of_the_same_class_have_none(
    tiny_data, document
):
    for split in ("cat-5", "cat-10", "cat-5@1", "dog-5", "step-10"):
        run_arms([Study("smoke", "cifar10", split)], tiny_data, ["logit-adjusted"])
    run_arms([Study("smoke", "cifar10", "cat-10")], tiny_data, ["imbalanced"])  # has no curve
    digits = Path("results/smoke/digits-5-3")
    digits.mkdir()
    result = json.loads(Path("results/smoke/dog-5/logit-adjusted-seed0.json").read_text())
    (digits / "logit-adjusted-seed0.json").write_text(json.dumps(result | {"data": "digits"}))
    Sweeps.main([])
    _, text = document.read_text().split("<!-- splits:begin")
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], row[1]) for row in cells] == [
        ("cat-10", "cat"), ("cat-5@1", "cat"), ("dog-5", "dog"), ("step-10", "5 classes"),
    ]  # fmt: skip
    assert [row[2] for row in cells] == ["Imbalanced", *["Logit-adjusted loss, no added image"] * 3]
    assert {row[-1] for row in cells} == {"1"}


def test_each_split_with_both_best_arms_shows_what_images_add(tiny_data, tiny_cache, document):
    other = Study("smoke", "cifar10", "dog-5")
    run_arms([STUDY, other], tiny_data, ["logit-adjusted", "stable-source-aware"])
    run_arms([Study("smoke", "cifar10", "step-10")], tiny_data, ["logit-adjusted"])
    Sweeps.main([])
    rows = [line for line in document.read_text().splitlines() if re.match(r"\| \S+-5 \| 1 \|", line)]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["cat-5", "dog-5"]
    for row, study in zip(cells, (STUDY, other), strict=True):
        first, second = (
            study.load_runs(name)[0]["metrics"]["accuracy"]
            for name in ("logit-adjusted", "stable-source-aware")
        )
        assert row[5].split()[0] == f"{100 * (second - first) + 0.0:+.1f}"
    assert Path("images/smoke/cat-5/other_splits.png").exists()


def test_the_picture_of_the_splits_shows_differences_and_both_intervals(tiny_data, tiny_cache):
    run_arms([STUDY], tiny_data, ["logit-adjusted", "stable-source-aware"], [0, 1, 2])
    run_arms([Study("smoke", "cifar10", "dog-5")], tiny_data, ["logit-adjusted", "stable-source-aware"])
    comparisons = Sweeps.gains(STUDY)
    figure = Sweeps.gains_figure(comparisons, "title")
    accuracy = figure.axes[-1]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [
        "cat-5 (3 seeds)", "dog-5 (1 seed)",
    ]  # fmt: skip
    dots = [list(line.get_xdata()) for line in accuracy.lines if line.get_marker() == "o"]
    assert dots == [[pytest.approx(100 * each.difference("accuracy"))] for each in comparisons.values()]
    wide = [list(line.get_xdata()) for line in accuracy.lines if line.get_linewidth() == 6]
    assert wide == [[100 * bound for bound in each.bootstrap["accuracy"]] for each in comparisons.values()]
    [over_seeds] = accuracy.collections  # the second split has one seed, so it has no such interval
    [[[low, _], [high, _]]] = over_seeds.get_segments()
    assert (high - low) / 2 == pytest.approx(100 * comparisons["cat-5"].over_seeds["accuracy"])
    plt.close(figure)


def test_the_gain_is_averaged_over_the_choices_of_the_kept_images(tiny_data, tiny_cache, document):
    arms = ["logit-adjusted", "stable-source-aware"]
    choices = [STUDY, *(Study("smoke", "cifar10", name) for name in ("cat-5@1", "cat-5@2"))]
    run_arms(choices, tiny_data, arms)
    run_arms([STUDY], tiny_data, arms, [1])  # another seed of one choice does not weigh more
    run_arms([Study("smoke", "cifar10", "dog-5")], tiny_data, arms)
    Sweeps.main([])
    [row] = [line for line in document.read_text().splitlines() if "3 choices of the kept images" in line]
    gains = []
    for study in choices:
        first, second = (study.load_runs(name)[0]["metrics"]["accuracy"] for name in arms)
        gains.append(100 * (second - first))
    mean, half_width = (float(word) for word in row.split("|")[6].split(" ± "))
    assert mean == pytest.approx(np.mean(gains), abs=0.051)
    # Student's t for 3 values and 95 %
    assert half_width == pytest.approx(4.303 * np.std(gains, ddof=1) / 3**0.5, abs=0.051)


def test_without_another_split_no_gains_are_compared(tiny_data, tiny_cache, document):
    run_arms([STUDY], tiny_data, ["logit-adjusted", "stable-source-aware"])
    Sweeps.main([])
    assert "minus" not in document.read_text()
    assert not list(Path().glob("images/**/other_splits.png"))

"""Scores against numbers of images: which runs are found, and what is drawn of them."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import ImageCounts
from Experiment import run_arms
from Results import Study

STUDY = Study("smoke", "cifar10", "cat-5")
DOCUMENT = "<!-- counts:begin (generated) -->\n\nold\n\n<!-- counts:end -->\n"


@pytest.fixture
def document(monkeypatch):
    monkeypatch.setattr(ImageCounts, "COMMITTED", STUDY)
    Path("docs").mkdir()
    ImageCounts.DOCUMENT.write_text(DOCUMENT)
    return ImageCounts.DOCUMENT


def test_runs_are_found_by_their_numbers_of_synthetic_and_of_real_images(tiny_data, tiny_cache, document):
    run_arms(
        [STUDY], tiny_data, ["imbalanced", "logit-adjusted", "stable@12", "stable", "stable-source-aware@7"]
    )
    run_arms([STUDY], tiny_data, ["stable@12"], [1])
    run_arms([Study("smoke", "cifar10", "cat-10")], tiny_data, ["stable"])
    synthetic = ImageCounts.by_synthetic_images(STUDY)
    assert {name: list(points) for name, points in synthetic.items()} == {
        "stable": [0, 12, 25], "stable-source-aware": [0, 7],
    }  # fmt: skip
    assert [run["seed"] for run in synthetic["stable"][12]] == [0, 1]
    assert synthetic["stable"][12][0]["training_images"]["synthetic"][3] == 12
    assert synthetic["stable"][0][0]["arm"] == "imbalanced"  # the same loss and no image
    assert synthetic["stable-source-aware"][0][0]["arm"] == "logit-adjusted"
    real = ImageCounts.by_real_images(STUDY)
    assert {name: list(points) for name, points in real.items()} == {
        "stable": [5, 10], "logit-adjusted": [5], "stable-source-aware": [],
    }  # fmt: skip

    figure = ImageCounts.counts_figure(synthetic, real, "title")
    above, below = (figure.axes[k] for k in (0, 3))
    assert [tick.get_text() for tick in above.get_xticklabels()] == ["0", "7", "12", "25"]
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["5", "10"]
    expected = [run["metrics"]["minority"]["recall"] for run in (synthetic["stable"][25][0],)]
    assert above.lines[0].get_ydata()[-1] == expected[0]
    plt.close(figure)

    ImageCounts.main([])
    text = document.read_text()
    assert text.count("| Stable Diffusion, minority only | synthetic | 12 |") == 1
    assert Path("images/smoke/cat-5/number_of_images.png").exists()
    ImageCounts.main(["--check"])
    document.write_text(DOCUMENT)
    with pytest.raises(SystemExit, match="1"):
        ImageCounts.main(["--check"])


def test_the_arms_alone_make_no_curve(tiny_data, document):
    run_arms([STUDY], tiny_data, ["imbalanced", "logit-adjusted"])
    ImageCounts.main([])
    assert "*Not run yet.*" in document.read_text()
    assert not list(Path().glob("images/**/number_of_images.png"))

"""What images are worth beside their measures: what is measured, what is kept, and what the tables say of it."""

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import smoke_study, with_other_removed_images

import ImageMeasures
import Usefulness
from Arms import ArmUnavailableError
from ClassifierTraining import Recipe
from Experiment import run_arms
from ImageCache import load_generated_images, save_generated_images
from ImageMeasures import measure_images
from ImbalancedCIFAR10 import split_from_name

ARMS = ("random-oversampling", "smote", "non-synthetic", "stable")


@pytest.fixture
def study(tiny_data, monkeypatch):
    """The tiny study, its cue network trained for six steps and tested on six images of each source."""
    short = Recipe(steps=6, batch_size=32, scales=(1.0,))

    def short_cue(*arguments, tested, device):
        assert tested == 10  # as many as there are test images of the class
        return cue_strength(*arguments, recipe=short, width=4, tested=3, device=device)

    cue_strength = ImageMeasures.cue_strength
    monkeypatch.setattr(ImageMeasures, "cue_strength", short_cue)
    study = smoke_study(tiny_data)
    monkeypatch.setattr(Usefulness, "COMMITTED", study)
    Path("docs").mkdir()
    Usefulness.DOCUMENT.write_text("<!-- usefulness:begin (generated) -->\n<!-- usefulness:end -->\n")
    return study


def test_measures_and_recalls_are_compared(study, tiny_data, tiny_cache):
    Usefulness.main([])
    assert Usefulness.DOCUMENT.read_text().count("*Not run yet.*") == 1
    measure_images(study, tiny_data, ARMS)
    Usefulness.main([])  # measured, but no classifier was trained
    assert Usefulness.DOCUMENT.read_text().count("*Not run yet.*") == 1
    run_arms([study], tiny_data, ARMS, [0, 1])

    measures, recall, arms = Usefulness.measures_and_recall(study)
    assert tuple(arms) == ARMS
    for name, found in zip(arms, recall, strict=True):
        runs = study.load_runs(name)
        assert found == np.mean([run["metrics"]["minority"]["recall"] for run in runs]) and len(runs) == 2
    judged = json.loads(study.record_path("generated-images.json").read_text())["methods"]
    assert measures["share of near copies"].tolist() == [judged[name]["share_of_copies"] for name in ARMS]
    assert measures["share of near copies"][0] > 0.9  # random oversampling adds nothing but copies
    assert len(measures) == 6

    Usefulness.main([])
    Usefulness.main(["--check"])
    text = Usefulness.DOCUMENT.read_text()
    assert text.count("| Random oversampling |") == 1 and "these 4 kinds of images" in text
    assert Path("images/smoke/cat-5/usefulness.png").exists()
    Usefulness.DOCUMENT.write_text(text.replace("Spearman", "Pearson"))
    with pytest.raises(SystemExit, match="1"):
        Usefulness.main(["--check"])
    assert "Pearson" in Usefulness.DOCUMENT.read_text()


def test_a_dot_lies_where_measure_and_recall_say(study, monkeypatch):
    recall = np.array([0.1, 0.3, 0.2, 0.4])
    measures = {f"measure {k}": recall * k for k in range(6)}
    monkeypatch.setattr(Usefulness, "measures_and_recall", lambda study: (measures, recall, list(ARMS)))
    figure = Usefulness.usefulness_figure(study)
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[2].lines]
    assert dots == [(2 * found, found) for found in recall]
    assert "+1.00 (p = 0.08, n = 4)" in figure.axes[2].get_title()
    plt.close(figure)
    table = Usefulness.usefulness_table(study)
    assert "| measure 0 | – | – | – |" in table  # it is the same for all
    assert "| measure 1 | +1.00 | 0.083 | 0.417 |" in table  # corrected for the five that vary
    assert table.index("Stable Diffusion, minority only") < table.index("Random oversampling")  # by recall


def test_what_was_measured_is_not_measured_again(study, tiny_data, tiny_cache, monkeypatch):
    measure_images(study, tiny_data, ARMS[:2])
    path = study.record_path("cues.json")
    before = json.loads(path.read_text())["auc"]
    asked = []
    monkeypatch.setattr(ImageMeasures, "cue_strength", lambda *arguments, **options: asked.append(1) or 0.5)
    measure_images(study, tiny_data, ARMS[:3])
    assert len(asked) == 1
    assert json.loads(path.read_text())["auc"] == before | {"non-synthetic": 0.5}


def test_cues_of_other_settings_are_refused(study, tiny_data):
    measure_images(study, tiny_data, ARMS[:1])
    path = study.record_path("cues.json")
    content = json.loads(path.read_text())
    content["configuration"]["width"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cues.json.*width: 99 there, 8 now"):
        measure_images(study, tiny_data, ARMS[:2])


def test_cues_of_another_generator_are_refused(study, tiny_data, monkeypatch):
    measure_images(study, tiny_data, ["gan"])
    monkeypatch.setattr(type(study), "generator_checksum", lambda self: 1)
    with pytest.raises(ValueError, match="gan: .* there, 1 now"):
        measure_images(study, tiny_data, ["gan"])


def test_cues_of_another_cache_are_refused_and_those_of_other_arms_stay(study, tiny_data, tiny_cache):
    measure_images(study, tiny_data, ["smote"])
    study.record_path("generated-images.json").unlink()  # it would ask for all methods at once
    measure_images(study, tiny_data, ["smote", "stable"])
    images, labels = load_generated_images()
    save_generated_images(255 - images, labels)
    measure_images(study, tiny_data, ["smote"])
    with pytest.raises(ValueError, match="stable: .* there, .* now"):
        measure_images(study, tiny_data, ["smote", "stable"])


def test_no_removed_image_takes_part(study, tiny_data):
    measure_images(study, tiny_data, ARMS[:3])
    paths = [study.record_path(name) for name in ("cues.json", "generated-images.json")]
    before = [json.loads(path.read_text()) for path in paths]
    shutil.rmtree(
        "models", ignore_errors=True
    )  # the network whose features judge is trained again, on the other data
    shutil.rmtree(study.record_path("").parent)
    split = split_from_name(study.split, tiny_data.y_train, tiny_data.class_names)
    measure_images(study, with_other_removed_images(tiny_data, split), ARMS[:3])
    assert [json.loads(path.read_text()) for path in paths] == before


def test_missing_images_are_named(study, tiny_data, monkeypatch):
    monkeypatch.setattr(ImageMeasures, "load_cifar10", lambda: tiny_data)

    def no_images(*arguments, **options):
        raise ArmUnavailableError("there are no images")

    monkeypatch.setattr(ImageMeasures, "make_training_set", no_images)
    with pytest.raises(SystemExit, match="1"):
        ImageMeasures.main(["--profile", "smoke"])

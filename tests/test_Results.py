"""Where results, plots and weights lie, and how results are read."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from Arms import ARMS, PROFILES, REFERENCE_SPLIT
from ClassifierTraining import Recipe
from Results import Study, predictions_of, read_json

COMPLETE = {  # what a result file must have, as short as possible
    "arm": "stable", "seed": 0, "profile": "cpu", "data": "cifar10", "split": "cat-50", "minority_classes": [],
    "class_names": [], "metrics": {}, "best_look_at_test": {}, "training_images": {}, "configuration": {},
    "training_pflops": 0.1, "seconds": {}, "hardware": {}, "versions": {}, "history": [], "test_predictions": "",
}  # fmt: skip


def test_the_committed_results_have_the_references_file_names():
    study = Study("cpu", "cifar10", "cat-50")
    for arm_name, tag, weights in [
        ("non-synthetic", "nsd", "resnet_non_synthetic"),
        ("stable", "stable", "resnet_stable_diffusion"),
    ]:
        assert study.plot_paths(arm_name) == [Path(f"images/cm_{tag}.png"), Path(f"images/test_{tag}.png")]
        assert study.weights_path(arm_name) == Path(f"models/{weights}.pt")
        assert study.weights_path(arm_name, 3) == Path(f"models/{weights}-seed3.pt")
        assert study.result_path(arm_name, 3) == Path(f"results/cpu/cat-50/{arm_name}-seed3.json")


@pytest.mark.parametrize(
    ("profile", "split", "folder"),
    [
        ("smoke", "cat-50", "smoke/cat-50"),
        ("quick", "cat-50", "quick/cat-50"),
        ("full", "cat-50", "full/cat-50"),  # a run on a user's GPU replaces no committed plot
        ("cpu", "cat-50@1", "cpu/cat-50@1"),
        ("full", "long-tailed-100", "full/long-tailed-100"),
    ],
)
def test_everything_else_lies_below_its_profile_and_split(profile, split, folder):
    study = Study(profile, "cifar10", split)
    assert study.image_path("cm_nsd.png") == Path("images", folder, "cm_nsd.png")
    assert study.model_path("generator.pt") == Path("models", folder, "generator.pt")
    assert study.checkpoint_path("gan") == Path("models/checkpoints", folder, "gan.pt")


@pytest.mark.parametrize("profile", PROFILES)
def test_no_output_of_the_digits_can_be_mistaken_for_cifar10s(profile):
    study = Study(profile, "digits", "8-0.01")
    folder = Path(profile, "digits-8-0.01")
    assert study.image_path("cm_nsd.png") == "images" / folder / "digits_cm_nsd.png"
    assert study.model_path("generator.pt") == "models" / folder / "digits_generator.pt"
    assert study.result_path("smote", 2) == "results" / folder / "smote-seed2.json"


def test_results_are_read_by_arm_and_ascending_seed():
    study = Study("cpu", "cifar10", "cat-50")
    for arm_name, seed in [
        ("stable", 0),
        ("imbalanced", 10),
        ("imbalanced", 2),
        ("stable-source-balanced", 0),
    ]:
        path = study.result_path(arm_name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(COMPLETE | {"arm": arm_name, "seed": seed}))
    results = study.load_results()
    assert list(results) == ["imbalanced", "stable", "stable-source-balanced"]
    assert [result["seed"] for result in results["imbalanced"]] == [2, 10]
    assert results["stable"] == [COMPLETE | {"arm": "stable", "seed": 0}]
    assert Study("full", "cifar10", "cat-50").load_results() == {}


def test_test_labels_are_written_once_and_read_back():
    study = Study("smoke", "cifar10", "cat-5")
    study.save_test_labels([3, 1, 2])
    written = study.record_path("test-labels.txt").stat().st_mtime_ns
    study.save_test_labels(np.array([3, 1, 2]))
    assert study.record_path("test-labels.txt").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"test-labels\.txt .* of other test images. Remove the folder"):
        study.save_test_labels([0, 0, 0])
    assert study.load_test_labels().tolist() == [3, 1, 2]
    assert predictions_of({"test_predictions": "3 1 9"}).tolist() == [3, 1, 9]


def test_a_damaged_file_is_named():
    Path("gan.json").write_text('{"arm": "imbal')
    with pytest.raises(ValueError, match=r"gan\.json is no valid JSON .*Remove it"):
        read_json("gan.json")


@pytest.mark.parametrize("content", ["{}", "[]", "null", "3", '"text"', '{"settings": null}'])
def test_a_file_that_holds_something_else_is_named(content):
    Path("gan.json").write_text(content)
    with pytest.raises(ValueError, match=r"gan\.json (holds|is damaged).*Remove it"):
        read_json("gan.json", {"settings": dict})


@pytest.mark.parametrize("name", COMPLETE)
def test_a_result_that_lacks_a_part_or_has_a_wrong_one_is_named(name):
    study = Study("cpu", "cifar10", "cat-50")
    path = study.result_path("stable")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(COMPLETE))
    assert study.load_runs("stable") == [COMPLETE]
    for damaged in ({k: v for k, v in COMPLETE.items() if k != name}, COMPLETE | {name: None}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=rf"stable-seed0\.json is damaged: {name} missing or wrong"):
            study.load_results()


def test_the_committed_results_can_be_read_and_belong_to_the_present_recipe(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    study = Study("cpu", "cifar10", REFERENCE_SPLIT)
    results = study.load_results()
    assert list(results) == list(ARMS)
    y = study.load_test_labels()
    recipe = PROFILES["cpu"].recipe(45_050, flip=True).as_json()
    assert recipe.keys() == Recipe(steps=1).as_json().keys()
    for [result] in results.values():
        assert recipe.items() <= result["configuration"].items()
        accuracy = (predictions_of(result) == y).mean()
        assert accuracy == pytest.approx(result["metrics"]["accuracy"])

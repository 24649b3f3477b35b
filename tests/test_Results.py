"""Where results, plots and weights lie, and how results are read."""

import json
import re
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from Arms import ARMS, PROFILES, REFERENCE_SPLIT
from ClassifierTraining import Recipe
from Results import Study, predictions_of, read_json

HARDWARE = {"device": "cpu", "name": "AMD", "cpu_threads": 1}
COMPLETE = {  # what a result file must have, as short as possible
    "arm": "stable", "seed": 0, "profile": "cpu", "data": "cifar10", "split": "cat-50", "minority_classes": ["cat"],
    "class_names": ["cat"],
    "metrics": {
        "minority": {"recall": 0.5, "precision": 0.5}, "balanced_accuracy": 0.5, "accuracy": 0.5, "per_class": {"cat": {"support": 2}},
        "confusion_matrix": [[2]],
    },
    "best_look_at_test": {}, "training_images": {"real": [50], "synthetic": [0]},
    "configuration": {"width": 4, "downsampling": "strides", "parameters": 9, "steps": 6, "batch_size": 8},
    "training_pflops": 0.1, "seconds": {"training": 3}, "hardware": HARDWARE, "versions": {"torch": "2"},
    "history": [{"images_seen": 48, "train_loss": 2.3, "train_accuracy": 0}], "test_predictions": "0 0",
}  # fmt: skip
GAN = {
    "settings": {"steps": 6, "batch_size": 8}, "parameters": {"generator": 1, "discriminator": 2}, "petaflops": 0.1,
    "chosen_by": "Fréchet distance", "best_step": 6, "seconds": {"training": 3}, "hardware": HARDWARE,
    "history": [
        {
            "step": 6, "images_seen": 48, "discriminator_loss": 2.0, "generator_loss": 0.1, "score_of_real": 0.2,
            "score_of_generated": -0.2, "quality": 1.5,
        }
    ],
}  # fmt: skip
JUDGEMENT = {
    "class": "cat", "share_of_copies_among_new_real_images": 0.1,
    "methods": {
        "gan": {
            "features": "Inception", "real_images": 9, "generated_images": 9, "fid": 1.0, "kid": 0.1, "precision": 0.5,
            "recall": 0.5, "share_of_copies": 0,
        }
    },
}  # fmt: skip
STUDY = Study("cpu", "cifar10", "cat-50")


def save(file_name, content):
    """Write a file of the committed study's results; return its path."""
    path = STUDY.record_path(file_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def paths_into(content):
    """The keys that lead to every part of a record, at every level."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *deeper) for deeper in paths_into(value))


def damaged(content, keys, value):
    """A copy of a record in which the part at ``keys`` is ``value``, or missing if that is None."""
    copy = json.loads(json.dumps(content))
    *others, last = keys
    part = reduce(lambda part, key: part[key], others, copy)
    if value is None and isinstance(part, dict):
        del part[last]
    else:
        part[last] = value
    return copy


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


@pytest.mark.parametrize("content", [b"", b"3 1 x\n", b"3 -1 2\n", b"\xff\xfe", b"3 1"])
def test_damaged_test_labels_are_named_and_not_the_folder(content):
    study = Study("smoke", "cifar10", "cat-5")
    study.save_test_labels([3, 1, 2])
    study.record_path("test-labels.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"test-labels\.txt is damaged: .* Remove it and run again\."):
        study.save_test_labels([3, 1, 2])


def test_missing_test_labels_are_named_with_what_writes_them():
    with pytest.raises(ValueError, match=r"There is no .*test-labels\.txt\. Run an arm beside it again"):
        STUDY.load_test_labels()


def test_predictions_are_read_as_class_numbers():
    assert predictions_of({"test_predictions": "3 1 9"}).tolist() == [3, 1, 9]


def test_a_damaged_file_is_named():
    Path("gan.json").write_text('{"arm": "imbal')
    with pytest.raises(ValueError, match=r"gan\.json is no valid JSON .*Remove it"):
        read_json("gan.json")


@pytest.mark.parametrize(
    "content", ['{"accuracy": NaN}', '{"loss": -Infinity}', pytest.param("[" * 100_000, id="nested")]
)
def test_what_json_does_not_allow_is_damage(content):
    Path("gan.json").write_text(content)
    with pytest.raises(ValueError, match=r"gan\.json is no valid JSON .*Remove it"):
        read_json("gan.json")


@pytest.mark.parametrize("content", ["{}", "[]", "null", "3", '"text"', '{"settings": null}'])
def test_a_file_that_holds_something_else_is_named(content):
    Path("gan.json").write_text(content)
    with pytest.raises(ValueError, match=r"gan\.json (holds|is damaged).*Remove it"):
        read_json("gan.json", {"settings": dict})


PROBABILITIES = {
    "expected_calibration_error": 0.1,
    "minority": {
        "average_precision": 0.5, "reliability": [{"images": 3, "mean_probability": 0.1, "share_of_minority": 0.3}],
    },
}  # fmt: skip


def test_a_result_whose_classes_are_all_rare_has_no_majority_recall():
    save("stable-seed0.json", COMPLETE | {"metrics": COMPLETE["metrics"] | {"majority_recall": None}})
    assert STUDY.load_results()["stable"][0]["metrics"]["majority_recall"] is None


@pytest.mark.parametrize("probabilities", [None, PROBABILITIES, PROBABILITIES | {"minority": None}])
def test_results_may_have_probabilities(probabilities):
    save("stable-seed0.json", COMPLETE | {"probabilities": probabilities})
    assert STUDY.load_results()["stable"][0]["probabilities"] == probabilities


READERS = {
    "stable-seed0.json": (COMPLETE, STUDY.load_results),
    "gan.json": (GAN, STUDY.read_gan_record),
    "generated-images.json": (JUDGEMENT, STUDY.read_judgement),
}
PLACES = [(name, keys) for name, (content, _) in READERS.items() for keys in paths_into(content)]


@pytest.mark.parametrize("value", [None, {"x": []}])
@pytest.mark.parametrize(("file_name", "keys"), PLACES)
def test_damage_at_any_depth_is_named_with_its_file_and_place(file_name, keys, value):
    content, read = READERS[file_name]
    save(file_name, content)
    assert read()
    if value == {"x": []} and keys == ("best_look_at_test",):
        value = "text"  # a dict of other contents would be right
    save(file_name, damaged(content, keys, value))
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
    if keys[-2:] == ("per_class", "cat") and value is None:
        place = "minority_classes"  # a class of which nothing is known is no minority class
    if keys in {("methods", "gan"), ("methods", "gan", "fid")} and value is None:
        place = "methods"  # without any, or with the other distances missing too
    with pytest.raises(
        ValueError, match=rf"{file_name} is damaged: {re.escape(place)}.* missing or wrong. Remove"
    ):
        read()


@pytest.mark.parametrize(
    ("file_name", "part", "wrong"),
    [
        ("stable-seed0.json", {"arm": "smote"}, "arm"),
        ("stable-seed0.json", {"minority_classes": ["dog"]}, "minority_classes"),
        ("stable-seed0.json", {"test_predictions": "0 x"}, "test_predictions"),
        ("stable-seed0.json", {"test_predictions": "0"}, "test_predictions"),  # one is missing
        ("stable-seed0.json", {"test_predictions": "0 1"}, "test_predictions"),  # there is no class 1
        ("stable-seed0.json", {"history": []}, "history"),
        ("stable-seed0.json", {"metrics": COMPLETE["metrics"] | {"g_mean": "0.5"}}, "metrics"),
        ("stable-seed0.json", {"metrics": COMPLETE["metrics"] | {"majority_recall": "0.5"}}, "metrics"),
        ("stable-seed0.json", {"metrics_with_averaged_flips": {"accuracy": None}}, "metrics_with_averaged_flips"),
        ("stable-seed0.json", {"best_look_at_test": {"test_accuracy": []}}, "best_look_at_test"),
        ("stable-seed0.json", {"metrics": COMPLETE["metrics"] | {"confusion_matrix": [[1, 1]]}}, "confusion_matrix"),
        ("stable-seed0.json", {"metrics_with_averaged_flips": 0.5}, "metrics_with_averaged_flips"),
        ("stable-seed0.json", {"probabilities": {}}, "probabilities"),
        ("stable-seed0.json", {"stable_diffusion_images": {"source": "9 images"}}, "stable_diffusion_images"),
        ("stable-seed0.json", {"probabilities": PROBABILITIES | {"minority": {}}}, "probabilities"),
        ("gan.json", {"best_step": 7}, "best_step"),
        ("generated-images.json", {"methods": {}}, "methods"),
    ],
)  # fmt: skip
def test_parts_that_contradict_each_other_are_named(file_name, part, wrong):
    content, read = READERS[file_name]
    save(file_name, content | part)
    with pytest.raises(ValueError, match=rf"{file_name} is damaged: .*{wrong}.* missing or wrong"):
        read()


def test_a_long_list_of_damage_is_cut():
    save("gan.json", GAN | {"history": 9 * [{"step": 6, "quality": None}]})
    with pytest.raises(
        ValueError, match=r"damaged: history\[0\]\.images_seen, .* and 42 more missing or wrong"
    ):
        STUDY.read_gan_record()


def test_the_committed_results_can_be_read_and_belong_to_the_present_recipe(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    study = Study("cpu", "cifar10", REFERENCE_SPLIT)
    results = study.load_results()
    assert list(results) == list(ARMS)
    y = study.load_test_labels()
    recipe = PROFILES["cpu"].recipe(45_050, flip=True).as_json()
    assert recipe.keys() == Recipe(steps=1).as_json().keys()
    for result in (run for runs in results.values() for run in runs):
        # What could not be chosen yet when a result was obtained has its default.
        configuration = Recipe(steps=1).as_json() | result["configuration"]
        assert recipe == {key: configuration[key] for key in recipe}
        accuracy = (predictions_of(result) == y).mean()
        assert accuracy == pytest.approx(result["metrics"]["accuracy"])

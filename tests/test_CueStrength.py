"""The strength of the cue by which added images can be told from real ones."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from imblearn.over_sampling import RandomOverSampler

import CueStrength
from ClassifierTraining import Recipe
from CueStrength import SAMPLERS, cue_strength
from DevelopmentReport import cue_table, generated_parts
from DevelopmentSplits import DevelopmentData
from Documents import NOT_RUN
from ImageOverSampler import ImageOverSampler, source_balanced_strategy
from Methods import METHODS, sampling_seed
from MethodTraining import Budget
from NonSyntheticGeneration import PixelOverSampler

SHORT = {"recipe": Recipe(steps=12, batch_size=64, scales=(1.0,)), "width": 4, "tested": 20}


class MarkedCopies(ImageOverSampler):
    """Copies with a black corner."""

    def _make_images(self, X, c, count, seed):
        images = X[np.random.default_rng(seed).integers(len(X), size=count)].copy()
        images[:, :8, :8] = 0
        return images


def strength(development, sampler, **options):
    unseen = development.X_val[development.y_val == development.minority]
    return cue_strength(
        development.X, development.y, unseen, development.minority, sampler, **SHORT | options
    )


@pytest.fixture(scope="module")
def development():
    rng = np.random.default_rng(0)

    def images(n):
        return rng.integers(60, 200, (n, 32, 32, 3), dtype=np.uint8)

    y, y_val = np.repeat([0, 1, 2], [120, 120, 10]), np.repeat([0, 1, 2], [10, 10, 40])
    return DevelopmentData(images(250), y, images(60), y_val, np.ones(60), minority=2)


def test_a_mark_is_a_strong_cue_and_a_plain_copy_is_none(development):
    assert strength(development, MarkedCopies()) > 0.95
    # New noise and copies of old noise look alike to a network that has learned nothing about them.
    assert 0.2 < strength(development, PixelOverSampler(RandomOverSampler())) < 0.8


def test_training_images_have_as_many_real_as_added_ones_of_each_class(development, monkeypatch):
    seen = {}

    def train(model, X, y, recipe, seed):
        seen["labels"] = y

    monkeypatch.setattr(CueStrength, "train_classifier", train)
    strength(development, MarkedCopies())
    assert np.bincount(seen["labels"]).tolist() == [30 + 30 + 10] * 2


class NewNoise(ImageOverSampler):
    """Images of which no two are alike."""

    def _make_images(self, X, c, count, seed):
        return np.random.default_rng(seed).integers(0, 256, (count, *X.shape[1:]), dtype=np.uint8)


@pytest.mark.parametrize("rare", [1, 2])
def test_no_image_that_is_tested_on_is_trained_on_and_the_difference_of_logits_ranks(
    rare, development, monkeypatch
):
    """Also if the class in question is not the rarest one."""
    seen = {}

    def train(model, X, y, recipe, seed):
        seen["trained"] = {image.tobytes() for image in X}

    def predict(model, X):
        seen["tested"] = [image.tobytes() for image in X]
        added = np.repeat([1, 0], len(X) // 2)
        # An added image has the larger difference, and the smaller second logit.
        return np.stack([-2.0 * added, -1.0 * added], axis=1)

    monkeypatch.setattr(CueStrength, "train_classifier", train)
    monkeypatch.setattr(CueStrength, "predict_logits", predict)
    unseen = development.X_val[development.y_val == 2]
    options = SHORT | {"tested": 15}
    assert cue_strength(development.X, development.y, unseen, rare, NewNoise(), **options) == 1
    assert len(seen["tested"]) == 30 and not seen["trained"] & set(seen["tested"])
    X_res, y_res = NewNoise(
        sampling_strategy=partial(source_balanced_strategy, share=0.25), random_state=sampling_seed(0)
    ).fit_resample(development.X, development.y)
    of_class = {image.tobytes() for image in X_res[len(development.y) :][y_res[len(development.y) :] == rare]}
    assert set(seen["tested"][:15]) <= of_class


def test_too_few_images_to_test_on_are_refused(development):
    with pytest.raises(
        ValueError, match="60 images of each source are to be tested, but there are 110 added"
    ):
        strength(development, MarkedCopies(), tested=60)


def test_the_table_has_strength_and_recall(monkeypatch, development, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CueStrength, "held_out_set", lambda data: None)
    monkeypatch.setattr(CueStrength, "development_data", lambda data, name: development)
    monkeypatch.setattr(CueStrength, "cue_strength", lambda *arguments, **options: 0.75)
    for split_name in ("dog-50", "ship-50"):
        CueStrength.measure(None, "SMOTE", split_name, 0)
    budget = Budget(4, 2)
    scores = dict.fromkeys(("precision", "f1", "accuracy"), 0.5)
    hardware = {"device": "cpu", "name": "CPU", "cpu_threads": 1}
    for split_name, recall in (("dog-50", 0.125), ("ship-50", 0.375)):
        # Of two splits with a cue, one result of the method says nothing yet.
        assert all(line.split(" | ")[3:4] != ["12.5"] for line in cue_table().splitlines())
        path = budget.path("smote", split_name, 0)
        path.parent.mkdir(parents=True)
        run = {"method": "smote", "what": "SMOTE", "split": split_name, "seed": 0, "recipe": {}}
        path.write_text(json.dumps(run | {"validation": scores | {"recall": recall}, "hardware": hardware}))
    assert cue_table().splitlines()[2] == "| SMOTE | 0.750 | `smote` | 25.0 | dog-50 seed 0, ship-50 seed 0 |"
    monkeypatch.setattr(CueStrength, "cue_strength", None)
    assert CueStrength.measure(None, "SMOTE", "dog-50", 0)["auc"] == 0.75  # finished


def test_a_mistake_in_the_last_split_is_noticed_before_anything_is_prepared(tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(CueStrength, "load_cifar10", lambda: tiny_data)
    monkeypatch.setattr(CueStrength, "held_out_set", lambda data: data)
    monkeypatch.setattr(CueStrength, "prepare_images", lambda *arguments: pytest.fail("it reads images"))
    with pytest.raises(SystemExit):
        CueStrength.main(["--split", "dog-5", "unicorn-5"])
    assert "unicorn" in capsys.readouterr().err


def test_folders_without_a_result_and_of_other_names_have_no_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("width4-steps2", "width4-steps2-old", "widthless", "cpu"):
        Path("results", "development", name).mkdir(parents=True)
    Path("results", "development", "width4-steps2-old", "smote").mkdir()
    Path("results", "development", "width4-steps2-old", "smote", "dog-50-seed0.json").write_text("{}")
    assert generated_parts() == {"methods": NOT_RUN, "cues": NOT_RUN}


def test_the_methods_beside_the_samplers_exist():
    assert all(METHODS[name].sampler is not None and METHODS[name].loss is None for name in SAMPLERS.values())

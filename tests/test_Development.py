"""The comparison of methods on development splits: what it may see, what it writes, and its command line."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import Development
import DevelopmentSplits
import Methods
import MethodTraining
from Arms import PROFILES, ArmUnavailableError
from ClassifierNetwork import channel_statistics, create_classifier
from ClassifierTraining import AugmentedBatches, Recipe
from DevelopmentReport import generated_parts, methods_table
from DevelopmentReport import main as report
from DevelopmentSplits import SPLITS, development_data, held_out_set, validation_scores
from ImageCache import fingerprint, save_generated_images
from ImbalancedCIFAR10 import CIFAR10_CLASSES, split_from_name
from Methods import IMAGE_FREE, METHODS, Method, find_method
from MethodTraining import Budget, run_method

TINY = Budget(width=4, steps=2)
REAL_GAN = DevelopmentSplits.DEVELOPMENT_GAN  # the tests train a smaller one


@pytest.fixture
def few(cifar10):
    """120 training images of each class, and a test set that nobody may look at."""
    rows = np.concatenate([np.flatnonzero(cifar10.y_train == c)[:120] for c in range(10)])
    return dataclasses.replace(
        cifar10, X_train=cifar10.X_train[rows], y_train=cifar10.y_train[rows], X_test=None, y_test=None
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (Development, MethodTraining):
        monkeypatch.setattr(module, "held_out_set", lambda data: held_out_set(data, 40))
    monkeypatch.setattr(DevelopmentSplits, "COMMITTED_PROFILE", "smoke")  # of the features that judge the GAN
    monkeypatch.setattr(
        DevelopmentSplits, "DEVELOPMENT_GAN", dataclasses.replace(PROFILES["smoke"].gan, steps=4)
    )


@pytest.fixture
def cache():
    """Generated images enough for a source-balanced training set of ``few``."""
    images = np.random.default_rng(0).integers(0, 256, (1200, 32, 32, 3), dtype=np.uint8)
    save_generated_images(images, np.repeat(np.arange(10), 120))


def test_the_gan_of_a_development_split_is_trained_as_the_studys_for_half_of_the_steps(few):
    path = DevelopmentSplits.development_generator(held_out_set(few, 40), "dog-10", "cpu")
    record = json.loads(Path("results/smoke/development-dog-10/gan.json").read_text())
    assert path.exists() and path.is_relative_to("models/smoke/development-dog-10")
    assert record["settings"]["steps"] == 4
    study = PROFILES["cpu"].gan
    assert (2 * REAL_GAN.steps, 2 * REAL_GAN.records) == (study.steps, study.records)
    assert dataclasses.replace(REAL_GAN, steps=study.steps, records=study.records) == study


# --- Data ---------------------------------------------------------------------------------------


def test_images_made_from_images_that_validate_are_refused(few):
    """dog-10 of the whole training set keeps other dogs than dog-10 of what is not held out."""
    rest, dog = held_out_set(few, 40), CIFAR10_CLASSES.index("dog")
    labels = np.repeat(np.arange(10), 120)
    images = np.random.default_rng(0).integers(0, 256, (1200, 32, 32, 3), dtype=np.uint8)
    for data, is_refused in ((rest, False), (few, True)):
        X, y = split_from_name("dog-10", data.y_train).cut(data.X_train, data.y_train)
        rows = [{"label": c, "real_images": fingerprint(X[y == dog]) if c == dog else ""} for c in labels]
        save_generated_images(images, labels, metadata=rows)
        with (
            pytest.raises(ArmUnavailableError, match="class dog") if is_refused else contextlib.nullcontext()
        ):
            DevelopmentSplits.prepare_images(rest, ["dog-10"])


@pytest.mark.parametrize("name", SPLITS)
def test_validation_images_are_held_out_or_removed(cifar10, name):
    development = development_data(held_out_set(cifar10), name)
    rare = CIFAR10_CLASSES.index(name.split("-")[0])
    assert development.minority == rare
    assert np.bincount(development.y).tolist() == [50 if c == rare else 4000 for c in range(10)]
    assert np.bincount(development.y_val).tolist() == [4950 if c == rare else 1000 for c in range(10)]
    assert np.bincount(development.y_val, development.weights) == pytest.approx(np.full(10, 1000))
    everything = np.concatenate([development.X, development.X_val])
    assert {x.tobytes() for x in everything} == {x.tobytes() for x in cifar10.X_train}


def test_all_splits_hold_out_the_same_images(cifar10):
    first, second = (development_data(held_out_set(cifar10), name) for name in SPLITS)
    held = [{x.tobytes() for x in d.X_val[d.weights == 1]} for d in (first, second)]
    assert len(held[0] & held[1]) >= 8000


@pytest.mark.parametrize("name", ["cat-50", "dog+ship-50", "long-tailed-10"])
def test_a_split_that_the_study_reports_is_no_development_split(cifar10, name):
    with pytest.raises(ValueError, match=f"{name.replace('+', '.')} is no development split"):
        development_data(held_out_set(cifar10), name)


def test_a_class_must_have_more_images_than_are_held_out(few):
    with pytest.raises(ValueError, match="Cannot hold out 120 of the 120 images of class 0"):
        held_out_set(few, 120)


def test_scores_count_each_class_alike(few):
    development = development_data(held_out_set(few, 40), "dog-10")
    predictions = development.y_val.copy()
    dogs = np.flatnonzero(predictions == 5)
    assert len(dogs) == 110
    predictions[dogs[:55]] = 3  # half of the dogs are missed
    predictions[np.flatnonzero(development.y_val == 0)[:20]] = 5  # and half of 40 airplanes taken for dogs
    scores = validation_scores(development, predictions)
    assert scores == pytest.approx({"recall": 0.5, "precision": 0.5, "f1": 0.5, "accuracy": 0.9})


# --- Runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_without_the_test_set_and_leaves_a_result(few, cache, name):
    result = run_method(few, name, "dog-10", 0, TINY)
    path = TINY.path(name, "dog-10", 0)
    assert json.loads(path.read_text()) == result
    method = METHODS[name]
    assert result["training_images"]["real"] == 9 * 80 + 10
    gets_images = name != "adjusted-oversampled"  # it asks for a tenth of 80 images, and there are 10
    assert bool(result["training_images"]["synthetic"]) == (method.sampler is not None and gets_images)
    assert (name in IMAGE_FREE) != (method.needs_stable_diffusion or method.needs_gan)
    assert result["recipe"]["steps"] == round(2 / method.compute)
    assert not list(path.parent.glob("*.pt"))


def test_what_is_special_in_the_batches_is_said_of_every_method():
    words = {name: method.batches_in_words for name, method in METHODS.items()}
    assert all(words.values())
    assert words["adjusted"] == "shuffled, sources mixed" and words["mixup"] == "mixup"
    assert words["stable-spectrum-light"].startswith("50% synthetic of weight 0.3, none in the last 15%")


def test_a_profile_with_the_usual_network_and_recipe_shares_the_results_of_its_width_and_steps():
    assert Budget.of_profile("cpu") == Budget(16, 2000)
    assert Budget.of_profile("headline").folder.name == "headline"


def test_rare_images_can_be_repeated_to_a_tenth_of_the_others(few):
    kept = np.concatenate([np.flatnonzero(few.y_train == c)[: 2 if c == 5 else 80] for c in range(10)])
    X, y = few.X_train[kept], few.y_train[kept]
    X_res, y_res = METHODS["adjusted-oversampled"].fit_resample(X, y, seed=0)
    assert np.bincount(y_res).tolist() == [80] * 5 + [8] + [80] * 4
    loss = METHODS["adjusted-oversampled"].loss(y_res, 10, np.arange(len(y_res)) >= len(y))
    assert np.allclose(loss.log_prior_of_row.exp()[0], np.bincount(y_res) / len(y_res))


def test_removed_images_have_no_influence_on_the_training(few, cache):
    held = development_data(held_out_set(few, 40), "dog-10")
    result = run_method(few, "stable-spectrum-quarter", "dog-10", 0, TINY)
    # The validation images, removed ones among them, become noise; the kept ones stay.
    validation = {x.tobytes() for x in held.X_val}
    noise = np.random.default_rng(1).integers(0, 256, few.X_train.shape, dtype=np.uint8)
    changed = np.array([x.tobytes() in validation for x in few.X_train])
    rest = dataclasses.replace(few, X_train=np.where(changed[:, None, None, None], noise, few.X_train))
    TINY.path("stable-spectrum-quarter", "dog-10", 0).unlink()
    other = run_method(rest, "stable-spectrum-quarter", "dog-10", 0, TINY)
    assert other["final_train_loss"] == result["final_train_loss"]
    assert changed.sum() == 10 * 40 + 70


def test_a_finished_run_is_read_and_one_of_another_recipe_refused(few, monkeypatch):
    first = run_method(few, "plain", "dog-10", 0, TINY)
    monkeypatch.setattr(AugmentedBatches, "epoch", None)  # training would fail
    assert run_method(few, "plain", "dog-10", 0, TINY) == first
    monkeypatch.setitem(METHODS, "plain", Method(changes={"padding": 4}))
    with pytest.raises(ValueError, match="other settings .padding: 2 there, 4 now"):
        run_method(few, "plain", "dog-10", 0, TINY)
    monkeypatch.setitem(METHODS, "plain", Method(loss=METHODS["adjusted"].loss))
    with pytest.raises(ValueError, match="other settings .definition: Method"):
        run_method(few, "plain", "dog-10", 0, TINY)


def test_the_placebo_shuffles_synthetic_labels_only(few, cache, monkeypatch):
    X, y = split_from_name("dog-10", few.y_train).cut(few.X_train, few.y_train)
    real, seen = len(y), []
    monkeypatch.setattr(Methods, "train_classifier", lambda model, X, y, recipe, **options: seen.append(y))
    for name in ("stable-spectrum-quarter", "stable-placebo"):
        X_res, y_res = METHODS[name].fit_resample(X, y, seed=0)
        given, model = y_res.copy(), create_classifier(10, 4, channel_statistics(X_res), seed=0)
        METHODS[name].train(model, X_res, y_res, real, Recipe(steps=4, batch_size=16), seed=0)
        assert np.array_equal(y_res, given)  # what the caller has stays
    first, second = seen
    assert np.array_equal(first[:real], y) and np.array_equal(second[:real], y)
    assert np.array_equal(np.bincount(first), np.bincount(second))
    assert np.mean(first[real:] == second[real:]) < 0.4


def test_sharpness_aware_steps_cost_twice_and_differ(few):
    sam, plain = (run_method(few, name, "dog-10", 0, TINY) for name in ("adjusted-sam", "adjusted"))
    assert (sam["recipe"]["steps"], plain["recipe"]["steps"]) == (1, 2)


def test_damage_in_a_result_is_named(few):
    result = run_method(few, "plain", "dog-10", 0, TINY)
    del result["validation"]["f1"]
    TINY.path("plain", "dog-10", 0).write_text(json.dumps(result))
    for read in (lambda: run_method(few, "plain", "dog-10", 0, TINY), lambda: methods_table(TINY.folder)):
        with pytest.raises(ValueError, match=r"plain-seed0.json.*validation.f1"):
            read()


# --- Tables and the command line ----------------------------------------------------------------


def test_the_table_shows_means_over_runs_and_the_best_first(few):
    results = {
        name: [run_method(few, name, split, 0, TINY) for split in ("dog-10", "ship-10")]
        for name in ("plain", "adjusted")
    }
    for name, f1 in (("plain", 0.25), ("adjusted", 0.75)):
        for result, change in zip(results[name], (-0.1, 0.1), strict=True):
            result["validation"]["f1"] = f1 + change
            TINY.path(name, result["split"], 0).write_text(json.dumps(result))
    lines = methods_table(TINY.folder).splitlines()
    assert lines[0] == "Means over dog-10 seed 0, ship-10 seed 0:"
    assert [line.split(":")[0] for line in lines[4:]] == ["| `adjusted`", "| `plain`"]
    assert "| 75.0 |" in lines[4]
    run_method(few, "class-balanced", "dog-10", 0, TINY)  # cannot be compared with them
    first, second = methods_table(TINY.folder).split("\n\nMeans over dog-10 seed 0:")
    assert first == "\n".join(lines)
    for name in ("`plain`", "`adjusted`", "`class-balanced`"):  # the others were run on these splits, too
        assert name in second
    assert "| 65.0 |" in second  # of adjusted on dog-10 alone


def test_the_command_runs_the_list_and_prints_the_table(few, monkeypatch, capsys):
    monkeypatch.setattr(Development, "load_cifar10", lambda: few)
    arguments = ["--method", "plain", "--split", "dog-10", "ship-10", "--steps", "2", "--width", "4"]
    Development.main(arguments)
    output = capsys.readouterr().out
    assert "plain, dog-10, seed 0: recall" in output and "| `plain`: cross-entropy |" in output
    document = Path("docs", "development.md")
    document.parent.mkdir()
    parts = "".join(
        f"<!-- {name}:begin (generated) -->\n<!-- {name}:end -->\n" for name in ("methods", "cues")
    )
    document.write_text(parts)
    with pytest.raises(SystemExit):
        report(["--check"])
    report([])
    report(["--check"])
    assert (
        "| `plain`: cross-entropy |" in document.read_text()
        and "Width 4, 2 training steps" in document.read_text()
    )


def test_methods_are_compared_with_the_network_and_recipe_of_a_profile(few, headline, monkeypatch, capsys):
    monkeypatch.setattr(Development, "load_cifar10", lambda: few)
    arguments = ["--method", "plain", "adjusted-cutout", "--split", "dog-10", "--profile"]
    Development.main([*arguments, "headline"])
    results = {
        name: json.loads(Path(f"results/development/headline/dog-10/{name}-seed0.json").read_text())
        for name in ("plain", "adjusted-cutout")
    }
    for name, result in results.items():
        assert (result["width"], result["mirrored"]) == (4, True)
        wanted = {"steps": 4, "padding": 4, "flip": False, "cutout": 10 if name == "plain" else 8}
        assert wanted.items() <= result["recipe"].items()
    assert (
        "Profile `headline`: width 4, filters in mirrored pairs, 4 training steps"
        in generated_parts()["methods"]
    )
    changed = dataclasses.replace(PROFILES["headline"], mirrored=False)
    monkeypatch.setitem(PROFILES, "headline", changed)
    with pytest.raises(SystemExit):
        Development.main([*arguments, "headline"])
    assert "mirrored: True there, False now" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        Development.main([*arguments, "cpu", "--steps", "3"])
    assert "leave out --steps and --width" in capsys.readouterr().err


def test_a_result_from_before_filters_could_be_mirrored_is_read(few):
    result = run_method(few, "plain", "dog-10", 0, TINY)
    path = TINY.path("plain", "dog-10", 0)
    assert path.parts[:3] == ("results", "development", "width4-steps2")
    del result["mirrored"], result["recipe"]["norm_shift_rate"]
    path.write_text(json.dumps(result))
    assert run_method(few, "plain", "dog-10", 0, TINY) == result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nonsense"], "Unknown method 'nonsense'. Choose one of plain,"),
        (["--method", "plain", "--split", "cat-50"], "cat-50 is no development split"),
        (["--method", "plain", "--split", "dog-10", "nonsense"], "Unknown split 'nonsense'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(few, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(Development, "load_cifar10", lambda: few)
    monkeypatch.setattr(Development, "run_method", None)
    with pytest.raises(SystemExit) as stop:
        Development.main(arguments)
    assert stop.value.code == 1 and message in capsys.readouterr().err


def test_methods_are_found_by_name():
    assert find_method("plain") is METHODS["plain"]
    assert torch.is_tensor(METHODS["adjusted"].loss(np.arange(10), 10, np.zeros(10, int)).log_prior_of_row)


# --- A method alone -----------------------------------------------------------------------------


def test_a_method_trains_with_its_own_changes_of_the_recipe(monkeypatch):
    recipes = []
    monkeypatch.setattr(
        Methods, "train_classifier", lambda model, X, y, recipe, **options: recipes.append(recipe)
    )
    X, y = np.zeros((20, 16, 16, 3), dtype=np.uint8), np.arange(20) % 10
    model = create_classifier(10, 4, channel_statistics(X), seed=0)
    for name in ("adjusted", "adjusted-cutout", "adjusted-sam"):
        METHODS[name].train(model, X, y, len(y), Recipe(steps=1, batch_size=4), seed=0)
    assert [(recipe.cutout, recipe.sam_radius) for recipe in recipes] == [(0, 0), (8, 0), (0, 0.1)]


@pytest.mark.parametrize("real_rows", [-1, 0, 21])
def test_the_number_of_real_rows_must_be_possible(real_rows):
    X, y = np.zeros((20, 16, 16, 3), dtype=np.uint8), np.arange(20) % 10
    model = create_classifier(10, 4, channel_statistics(X), seed=0)
    with pytest.raises(ValueError, match=f"real_rows must be from 1 to the 20 rows of y: got {real_rows}"):
        METHODS["adjusted"].train(model, X, y, real_rows, Recipe(steps=1, batch_size=4), seed=0)

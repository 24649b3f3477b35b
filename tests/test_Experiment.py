import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ClassifierNetwork
import Experiment
from ClassifierNetwork import Evaluation, Recipe, ResNet18, evaluate_classifier, load_classifier
from Experiment import (
    ARMS,
    MOST_PASSES,
    PROFILES,
    STORY,
    ArmUnavailableError,
    caption,
    default_split,
    load_results,
    make_training_set,
    number_of_looks,
    output_path,
    resolve_profile,
    result_path,
    run_arm,
    run_arms,
)
from ImbalancedCIFAR10 import CIFAR10_CLASSES, DataUnavailableError, load_digits_as_images, split_from_name
from StableDiffusionGeneration import save_generated_images

REPOSITORY = Path(__file__).resolve().parents[1]
CAT = CIFAR10_CLASSES.index("cat")
SPLIT = "cat-5"  # of the 30 images of each class in tiny_data
REBALANCING_ARMS = [name for name, arm in ARMS.items() if not arm.whole_training_set]


@pytest.fixture(scope="module")
def digits():
    return load_digits_as_images()


@pytest.fixture
def move_to_another_folder(tmp_path_factory, monkeypatch):
    return lambda: monkeypatch.chdir(tmp_path_factory.mktemp("another"))


def smoke(arm_name, data, split_name=SPLIT, seed=0):
    return run_arm(arm_name, data, split_name, seed, profile="smoke")


def files(folder="."):
    return {path.as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def predictions_of(result):
    return np.array([int(number) for number in result["test_predictions"].split()])


def outcome_of(result):
    """What two runs of the same thing must agree in."""
    history = [{k: v for k, v in epoch.items() if not k.startswith("seconds")} for epoch in result["history"]]
    return result["metrics"], result["metrics_with_averaged_flips"], result["test_predictions"], history


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def with_other_removed_images(data, split):
    """The same data, except that the images that the split removes have other pixels."""
    removed = np.setdiff1d(np.arange(len(data.y_train)), split.kept_rows(data.y_train))
    X_train = data.X_train.copy()
    X_train[removed] = 255 - X_train[removed]
    return dataclasses.replace(data, X_train=X_train)


# --- Every arm ----------------------------------------------------------------------------------


def expected_counts(arm_name):
    """Real and synthetic images of each class, with 5 cats and 30 images of every other class."""
    real, synthetic = np.full(10, 30), np.zeros(10, dtype=int)
    if arm_name == "balanced":
        return real.tolist(), synthetic.tolist()
    real[CAT] = 5
    if "source-balanced" in arm_name:
        synthetic[:] = 12  # 0.4 x 30
    if arm_name not in ("imbalanced", "logit-adjusted"):
        synthetic[CAT] = 25
    return real.tolist(), synthetic.tolist()


@pytest.mark.parametrize("arm_name", ARMS)
def test_an_arm_leaves_its_result_weights_and_two_plots(arm_name, tiny_data, tiny_cache):
    result = smoke(arm_name, tiny_data)

    arm = ARMS[arm_name]
    weights, json_path = (
        f"models/smoke/cat-5/{arm.weights_name}.pt",
        f"results/smoke/cat-5/{arm_name}-seed0.json",
    )
    plots = {f"images/smoke/cat-5/{kind}_{arm.image_tag}.png" for kind in ("cm", "test")}
    labels = "results/smoke/cat-5/test-labels.txt"
    generator = set()
    if arm.needs_gan:  # and the network that judges it
        generator = {
            f"models/smoke/cat-5/{name}.pt" for name in ("generator", "discriminator", "resnet_imbalanced")
        }
        generator |= {f"results/smoke/cat-5/{name}" for name in ("gan.json", "gan-snapshots.npy")}
    expected = {weights, json_path, labels, "datasets/stable_diffusion_dataset.npy"} | plots | generator
    assert files() == expected
    assert Experiment.load_test_labels("smoke", "cifar10", "cat-5").tolist() == tiny_data.y_test.tolist()
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG\r\n") for plot in plots)

    text = Path(json_path).read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse_constant) == result
    assert (result["arm"], result["data"], result["split"], result["seed"], result["profile"]) == (
        arm_name, "cifar10", "cat-5", 0, "smoke",
    )  # fmt: skip
    assert result["minority_classes"] == ["cat"] and result["class_names"] == list(CIFAR10_CLASSES)
    assert {"torch", "numpy", "imbalanced-learn", "python", "commit"} <= result["versions"].keys()
    assert result["hardware"].keys() == {"device", "name", "cpu_threads"}
    assert all(seconds >= 0 for seconds in result["seconds"].values())
    looked_at = [epoch["test_accuracy"] for epoch in result["history"] if "test_accuracy" in epoch]
    assert result["best_look_at_test"]["test_accuracy"] == max(looked_at)
    assert result["best_look_at_test"]["looks"] == len(looked_at)
    assert 0 < result["training_pflops"] < 1e-3

    configuration = result["configuration"]
    assert (configuration["steps"], configuration["width"]) == (6, 4), "every arm gets the same compute"
    assert result["history"][-1]["step"] == 6
    assert configuration["logit_adjusted"] == arm_name.endswith("adjusted")
    assert configuration["label_smoothing"] == 0

    real, synthetic = expected_counts(arm_name)
    assert result["training_images"] == {"real": real, "synthetic": synthetic}

    predictions, y = predictions_of(result), tiny_data.y_test
    right = predictions == y
    assert len(predictions) == len(y) == 100
    assert result["metrics"]["accuracy"] == pytest.approx(right.mean())
    assert result["metrics"]["minority"]["recall"] == pytest.approx(right[y == CAT].mean())
    matrix = np.zeros((10, 10), dtype=int)
    np.add.at(matrix, (y, predictions), 1)
    assert result["metrics"]["confusion_matrix"] == matrix.tolist()

    network = load_classifier(weights)
    evaluation = evaluate_classifier(network, tiny_data.X_test, y)
    assert np.array_equal(evaluation.predictions, predictions)
    assert evaluation.loss == pytest.approx(result["metrics"]["loss"], rel=1e-5)
    assert configuration["parameters"] == sum(p.numel() for p in network.parameters())
    assert network.width == 4


def test_both_ways_of_judging_are_kept_apart(tiny_data, monkeypatch):
    right = np.eye(10)[tiny_data.y_test]

    def evaluate(model, X, y, **options):
        # Slightly wrong on the images as they are, and surely right on their mirror images.
        mirrored = np.array_equal(X, tiny_data.X_test[:, :, ::-1])
        logits = 9 * right if mirrored else np.roll(right, 1, axis=1)
        return Evaluation(0.5, logits.argmax(axis=1), logits)

    monkeypatch.setattr(Experiment, "evaluate_classifier", evaluate)
    result = smoke("imbalanced", tiny_data)
    assert result["metrics"]["accuracy"] == 0
    assert result["metrics_with_averaged_flips"]["accuracy"] == 1
    assert np.array_equal(predictions_of(result), (tiny_data.y_test + 1) % 10)


@pytest.mark.parametrize(
    ("arm_name", "adjusted", "synthetic"),
    [("stable-source-balanced", False, 133), ("stable-source-balanced-adjusted", True, 133),
     ("imbalanced", False, 0), ("logit-adjusted", True, 0)],
)  # fmt: skip
def test_the_training_is_told_the_loss_and_the_source_of_each_row(
    arm_name, adjusted, synthetic, tiny_data, tiny_cache, monkeypatch
):
    calls = []

    def spy(model, X, y, recipe, **options):
        calls.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "train_classifier", spy)
    with pytest.raises(KeyboardInterrupt):
        smoke(arm_name, tiny_data)
    assert calls[0]["logit_adjusted"] is adjusted
    assert calls[0]["groups"].tolist() == [0] * 275 + [1] * synthetic
    assert calls[0]["minority_classes"] == (CAT,)


# --- No leak ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm_name", REBALANCING_ARMS)
def test_no_removed_image_reaches_a_sampler(arm_name, tiny_data, tiny_cache):
    split = split_from_name(SPLIT, tiny_data.y_train)
    other_data = with_other_removed_images(tiny_data, split)
    first, second = (make_training_set(arm_name, data, split, 1, "smoke") for data in (tiny_data, other_data))
    assert np.array_equal(first.X, second.X)
    assert np.array_equal(first.y, second.y)
    assert first.real_rows == second.real_rows == 275


def test_only_the_ceiling_sees_the_removed_images(tiny_data):
    split = split_from_name(SPLIT, tiny_data.y_train)
    other_data = with_other_removed_images(tiny_data, split)
    first, second = (make_training_set("balanced", data, split) for data in (tiny_data, other_data))
    differing = np.flatnonzero((first.X != second.X).any(axis=(1, 2, 3)))
    assert len(differing) == 25 and set(tiny_data.y_train[differing]) == {CAT}


def test_no_removed_image_reaches_the_network(tiny_data, move_to_another_folder):
    other_data = with_other_removed_images(tiny_data, split_from_name(SPLIT, tiny_data.y_train))
    first = smoke("non-synthetic", tiny_data)
    move_to_another_folder()
    assert outcome_of(smoke("non-synthetic", other_data)) == outcome_of(first)


@pytest.mark.parametrize("arm_name", REBALANCING_ARMS)
def test_the_kept_images_come_first_and_unchanged(arm_name, tiny_data, tiny_cache):
    split = split_from_name(SPLIT, tiny_data.y_train)
    X, y = split.cut(tiny_data.X_train, tiny_data.y_train)
    training_set = make_training_set(arm_name, tiny_data, split, 0, "smoke")
    assert training_set.X.dtype == np.uint8 and training_set.y.dtype == np.int64
    assert np.array_equal(training_set.X[:275], X)
    assert np.array_equal(training_set.y[:275], y)
    assert training_set.groups.tolist() == [0] * 275 + [1] * (len(training_set.y) - 275)


@pytest.mark.parametrize("arm_name", [name for name, arm in ARMS.items() if arm.resample])
def test_samplers_follow_the_seed(arm_name, tiny_data, tiny_cache):
    split = split_from_name(SPLIT, tiny_data.y_train)
    first, same, other = (
        make_training_set(arm_name, tiny_data, split, seed, "smoke").X for seed in (0, 0, 1)
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_smote_images_lie_between_the_real_images_of_their_class(tiny_data):
    training_set = make_training_set("smote", tiny_data, split_from_name(SPLIT, tiny_data.y_train))
    cats = training_set.X[training_set.y == CAT]
    real, synthetic = cats[:5], cats[5:]
    assert (synthetic >= real.min(axis=0)).all()
    assert (synthetic <= real.max(axis=0)).all()


def test_random_oversampling_repeats_kept_cats(tiny_data):
    training_set = make_training_set(
        "random-oversampling", tiny_data, split_from_name(SPLIT, tiny_data.y_train)
    )
    cats = training_set.X[training_set.y == CAT].reshape(30, -1)
    assert len(np.unique(cats, axis=0)) == 5


# --- Finished, killed and repeated runs ---------------------------------------------------------


def test_a_finished_arm_is_not_run_again(tiny_data, monkeypatch):
    result = smoke("imbalanced", tiny_data)
    written = {name: Path(name).stat().st_mtime_ns for name in files()}

    def fail(*arguments, **options):
        pytest.fail("it was trained again")

    monkeypatch.setattr(Experiment, "train_classifier", fail)
    assert smoke("imbalanced", tiny_data) == result
    assert {name: Path(name).stat().st_mtime_ns for name in files()} == written


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_an_arm_interrupted_in_training_continues_to_the_same_result(
    tiny_data, move_to_another_folder, monkeypatch
):
    watch, epochs = ClassifierNetwork._watch, []

    def interrupted_watch(*arguments):
        epochs.append(None)
        return interrupt() if len(epochs) == 2 else watch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierNetwork, "_watch", interrupted_watch)
        with pytest.raises(KeyboardInterrupt):
            smoke("logit-adjusted", tiny_data)
    assert files() == {"models/checkpoints/smoke/cat-5/logit-adjusted-seed0.pt"}

    resumed = smoke("logit-adjusted", tiny_data)
    assert not files("models/checkpoints")
    move_to_another_folder()
    assert outcome_of(resumed) == outcome_of(smoke("logit-adjusted", tiny_data))


def test_an_arm_killed_before_its_result_is_written_is_not_trained_again(tiny_data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "save_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smoke("imbalanced", tiny_data)
    monkeypatch.setattr(ClassifierNetwork.AugmentedBatches, "epoch", None)  # one more epoch would fail
    assert smoke("imbalanced", tiny_data)["history"][-1]["step"] == 6
    assert not files("models/checkpoints")


def test_a_result_of_another_recipe_is_neither_used_nor_overwritten(tiny_data, monkeypatch):
    run_arm("imbalanced", tiny_data, SPLIT, profile="smoke", device="cpu")
    other = dataclasses.replace(Experiment.PROFILES["smoke"], steps=7)
    monkeypatch.setitem(Experiment.PROFILES, "smoke", other)
    with pytest.raises(
        ValueError, match="imbalanced-seed0.json was obtained with other settings .steps: 6 there, 7"
    ):
        run_arm("imbalanced", tiny_data, SPLIT, profile="smoke", device="cpu")


def test_a_result_of_a_network_with_strides_is_not_used(tiny_data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ResNet18, "downsampling", "strides")
        run_arm("imbalanced", tiny_data, SPLIT, profile="smoke", device="cpu")
    with pytest.raises(ValueError, match="downsampling: strides there, average pooling now"):
        run_arm("imbalanced", tiny_data, SPLIT, profile="smoke", device="cpu")


def test_an_arm_killed_before_its_result_was_written_has_none_and_can_be_run_again(tiny_data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "save_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smoke("imbalanced", tiny_data)
    assert load_results("smoke", "cifar10", SPLIT) == {}
    assert not [name for name in files("results") if name.endswith(".json")] and not files("images")
    assert Path("models/smoke/cat-5/resnet_imbalanced.pt").exists(), "a result must never lack its weights"

    result = smoke("imbalanced", tiny_data)
    assert load_results("smoke", "cifar10", SPLIT) == {"imbalanced": [result]}
    assert len(files("images")) == 2


def test_an_arm_killed_before_its_plots_were_drawn_gets_them_in_the_next_run(tiny_data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "save_arm_plots", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smoke("imbalanced", tiny_data)
    smoke("imbalanced", tiny_data)
    assert len(files("images")) == 2


def test_seeds_repeat_in_another_folder_and_differ_from_each_other(tiny_data, move_to_another_folder):
    first, other = smoke("non-synthetic", tiny_data), smoke("non-synthetic", tiny_data, seed=1)
    assert files("models") == {
        "models/smoke/cat-5/resnet_non_synthetic.pt", "models/smoke/cat-5/resnet_non_synthetic-seed1.pt",
    }  # fmt: skip
    results = load_results("smoke", "cifar10", SPLIT)["non-synthetic"]
    assert results == [first, other]
    assert caption(results) == "cat-5, profile smoke, 2 seeds"
    assert outcome_of(first) != outcome_of(other)

    move_to_another_folder()
    assert outcome_of(smoke("non-synthetic", tiny_data)) == outcome_of(first)


def test_a_numpy_seed_is_as_good_as_a_plain_one(tiny_data):
    assert smoke("imbalanced", tiny_data, seed=np.int64(1))["seed"] == 1


def test_results_are_read_by_arm_and_ascending_seed():
    for arm_name, seed in [
        ("stable", 0),
        ("imbalanced", 10),
        ("imbalanced", 2),
        ("stable-source-balanced", 0),
    ]:
        path = result_path("cpu", "cifar10", "cat-50", arm_name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"arm": arm_name, "seed": seed}))
    results = load_results("cpu", "cifar10", "cat-50")
    assert list(results) == ["imbalanced", "stable", "stable-source-balanced"]
    assert [result["seed"] for result in results["imbalanced"]] == [2, 10]
    assert results["stable"] == [{"arm": "stable", "seed": 0}]
    assert load_results("full", "cifar10", "cat-50") == {}


# --- The digits ---------------------------------------------------------------------------------


def test_digits_results_say_so_everywhere_and_skip_stable_diffusion(digits):
    outcomes = run_arms(["logit-adjusted", "stable"], digits, profile="smoke")

    reason = outcomes["stable", "8-0.01", 0]
    assert isinstance(reason, str) and "no Stable Diffusion images of digits" in reason
    result = outcomes["logit-adjusted", "8-0.01", 0]
    assert (result["data"], result["split"]) == ("digits", "8-0.01")
    assert result["training_images"]["real"][8] == 2
    assert len(predictions_of(result)) == len(digits.y_test) == 360
    assert result["configuration"]["flip"] is False and result["metrics_with_averaged_flips"] is None
    assert caption([result]) == "DIGITS, NOT CIFAR-10 - 8-0.01, profile smoke, 1 seed (0)"
    assert files() == {
        "results/smoke/digits-8-0.01/logit-adjusted-seed0.json",
        "results/smoke/digits-8-0.01/test-labels.txt",
        "models/smoke/digits-8-0.01/digits_resnet_logit_adjusted.pt",
        "images/smoke/digits-8-0.01/digits_cm_logit_adjusted.png",
        "images/smoke/digits-8-0.01/digits_test_logit_adjusted.png",
    }


@pytest.mark.parametrize("arm_name", [name for name, arm in ARMS.items() if arm.needs_stable_diffusion])
def test_stable_diffusion_arms_are_not_to_be_had_for_digits(arm_name, digits, tiny_cache):
    with pytest.raises(ArmUnavailableError, match="no Stable Diffusion images of digits"):
        smoke(arm_name, digits, split_name=None)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["images", "models"])
def test_no_digits_output_can_be_mistaken_for_cifar10s(profile, kind):
    path = output_path(kind, profile, "digits", "8-0.01", "cm_nsd.png")
    assert path == Path(kind, profile, "digits-8-0.01", "digits_cm_nsd.png")
    assert result_path(profile, "digits", "8-0.01", "smote", 2) == Path(
        "results", profile, "digits-8-0.01", "smote-seed2.json"
    )


def test_the_story_is_told_on_cat_50_and_on_8_with_the_digits(tiny_data, digits):
    assert default_split(tiny_data) == "cat-50"
    assert default_split(digits) == "8-0.01"


# --- Places -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["cpu", "full"])
def test_evidence_on_the_reference_split_has_the_references_file_names(profile):
    place = (profile, "cifar10", "cat-50")
    for arm_name, tag, weights in [
        ("non-synthetic", "nsd", "resnet_non_synthetic"),
        ("stable", "stable", "resnet_stable_diffusion"),
    ]:
        arm = ARMS[arm_name]
        for name in (f"cm_{tag}.png", f"test_{tag}.png"):
            assert name.endswith(f"_{arm.image_tag}.png")
            assert output_path("images", *place, name) == Path("images", name)
        assert output_path("models", *place, f"{arm.weights_name}.pt") == Path("models", f"{weights}.pt")


@pytest.mark.parametrize(
    ("profile", "split", "folder"),
    [
        ("smoke", "cat-50", "smoke/cat-50"),
        ("quick", "cat-50", "quick/cat-50"),
        ("cpu", "cat-50@1", "cpu/cat-50@1"),
        ("full", "long-tailed-100", "full/long-tailed-100"),
    ],
)
def test_everything_else_lies_below_its_profile_and_split(profile, split, folder):
    assert output_path("images", profile, "cifar10", split, "cm_nsd.png") == Path(
        "images", folder, "cm_nsd.png"
    )


def test_no_two_arms_write_the_same_file():
    assert len({arm.image_tag for arm in ARMS.values()}) == len(ARMS)
    assert len({arm.weights_name for arm in ARMS.values()}) == len(ARMS)


# --- Profiles and names -------------------------------------------------------------------------


@pytest.mark.parametrize(("cuda", "expected"), [(False, "quick"), (True, "full")])
def test_auto_is_full_with_cuda_and_quick_without(monkeypatch, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert resolve_profile("auto") == (expected, PROFILES[expected])


@pytest.mark.parametrize(("profile", "steps"), [("quick", MOST_PASSES * 5), ("smoke", 6)])
def test_small_data_sets_are_not_passed_over_more_than_sixty_times(digits, monkeypatch, profile, steps):
    recipes = []

    def spy(model, X, y, recipe, **options):
        recipes.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "train_classifier", spy)
    with pytest.raises(KeyboardInterrupt):
        run_arm("imbalanced", digits, profile=profile)  # 1,298 kept images are 5 batches of 256
    assert recipes[0].steps == steps


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ({"arm_name": "smoter"}, "Unknown arm 'smoter'.*imbalanced.*smote.*balanced"),
        ({"profile": "fast"}, "Unknown profile 'fast'.*auto, smoke, quick, cpu, full"),
        ({"split_name": "cats"}, "Unknown split 'cats'.*cat-50, .*long-tailed-100, step-10"),
        ({"split_name": "lion-5"}, "Unknown class 'lion'.*airplane.*truck"),
        ({"split_name": "cat-31"}, "Cannot keep 31 of class cat, which has 30"),
    ],
)
def test_unknown_names_are_answered_with_the_valid_ones(arguments, valid, tiny_data):
    with pytest.raises(ValueError, match=valid):
        run_arm(
            **{"arm_name": "imbalanced", "data": tiny_data, "split_name": SPLIT, "profile": "smoke"}
            | arguments
        )
    assert files() == set()


def test_a_wrong_last_arm_is_refused_before_anything_runs(tiny_data):
    with pytest.raises(ValueError, match="Unknown arm 'stabel'"):
        run_arms(["imbalanced", "stabel"], tiny_data, [SPLIT], profile="smoke")
    assert files() == set()


def test_a_wrong_last_split_is_refused_before_anything_runs(tiny_data):
    with pytest.raises(ValueError, match="Unknown class 'lion'"):
        run_arms(["imbalanced"], tiny_data, [SPLIT, "lion-5"], profile="smoke")
    assert files() == set()


# --- What an arm cannot do ----------------------------------------------------------------------


def test_smote_needs_two_images_of_a_class_and_does_not_keep_other_arms_from_running(tiny_data):
    with pytest.raises(ArmUnavailableError, match="SMOTE interpolates.*has only one"):
        smoke("smote", tiny_data, "cat-1")
    assert files() == set()
    outcomes = run_arms(["smote", "imbalanced"], tiny_data, ["cat-1"], profile="smoke", device="cpu")
    assert "only one" in outcomes["smote", "cat-1", 0]
    assert outcomes["imbalanced", "cat-1", 0]["history"][-1]["step"] == 6


@pytest.mark.parametrize("arm_name", [name for name, arm in ARMS.items() if arm.needs_stable_diffusion])
def test_too_few_cached_images_are_an_error(arm_name, tiny_data):
    save_generated_images(np.zeros((50, 32, 32, 3), dtype=np.uint8), np.tile(np.arange(10), 5))
    with pytest.raises(ValueError, match=r"has 5 images of class \d, but (12|25) are asked for"):
        smoke(arm_name, tiny_data)
    assert not files("results")


def test_without_stable_diffusion_images_the_other_arms_still_run(tiny_data, monkeypatch):
    def refuse():
        raise DataUnavailableError("no network")

    monkeypatch.setattr(Experiment, "import_cifake", refuse)
    outcomes = run_arms(["stable", "imbalanced"], tiny_data, [SPLIT], profile="smoke")
    assert outcomes["stable", SPLIT, 0].startswith("no Stable Diffusion images could be had: no network. Nor")
    assert outcomes["imbalanced", SPLIT, 0]["arm"] == "imbalanced"


# --- Many runs ----------------------------------------------------------------------------------


class Processes:
    """What run_arms asks of accelerate's PartialState."""

    def __init__(self, process_index, num_processes):
        self.process_index, self.num_processes = process_index, num_processes


def test_runs_are_spread_over_the_processes_and_none_is_forgotten_or_run_twice(tiny_data, monkeypatch):
    monkeypatch.setattr(Experiment, "run_arm", lambda *arguments: "not run here")
    runs = [
        key
        for index in range(3)
        for key in run_arms(STORY, tiny_data, [SPLIT, "cat-3"], [0, 1], processes=Processes(index, 3))
    ]
    assert len(runs) == len(set(runs)) == len(STORY) * 2 * 2
    assert set(runs) == set(run_arms(STORY, tiny_data, [SPLIT, "cat-3"], [0, 1]))


def test_what_is_named_twice_is_run_once(tiny_data, monkeypatch):
    """Two processes would write to the same checkpoint at once."""
    seen = []
    monkeypatch.setattr(Experiment, "run_arm", lambda *arguments: seen.append(arguments[0]) or "not run")
    arms = ["imbalanced", "smote", "imbalanced"]
    for process in range(2):
        run_arms(arms, tiny_data, [SPLIT, SPLIT], [0, 0], processes=Processes(process, 2))
    assert seen == ["imbalanced", "smote"]


def test_in_data_parallel_every_process_takes_part_in_every_run(tiny_data, monkeypatch):
    seen = []
    monkeypatch.setattr(Experiment, "run_arm", lambda *arguments: seen.append(arguments[-1]) or "not run")
    processes = Processes(1, 2)
    assert len(run_arms(STORY, tiny_data, [SPLIT], processes=processes, data_parallel=True)) == len(STORY)
    assert seen == [processes] * len(STORY)


def launch(*arguments):
    """Run Experiment.py on the digits in two processes."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    Path("program.py").write_text(
        "import os, Experiment, ImbalancedCIFAR10\n"
        "Experiment.load_data = ImbalancedCIFAR10.load_digits_as_images\n"
        "save_json = Experiment.save_json\n"
        "def logged(path, content):\n"
        "    print(f'{path.name} written by process {os.environ[\"RANK\"]}')\n"
        "    save_json(path, content)\n"
        "Experiment.save_json = logged\n"
        "Experiment.main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "program.py", "--profile", "smoke", *arguments],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_two_processes_share_a_list_of_runs():
    answer = launch("--arm", "imbalanced", "logit-adjusted", "--seed", "0", "1")
    assert answer.returncode == 0, answer.stderr
    assert sorted(path for path in files("results") if path.endswith(".json")) == [
        f"results/smoke/digits-8-0.01/{arm}-seed{seed}.json"
        for arm in ("imbalanced", "logit-adjusted") for seed in (0, 1)
    ]  # fmt: skip
    assert answer.stdout.count("written by process 0") == answer.stdout.count("written by process 1") == 2
    assert answer.stdout.count("minority recall") == 4


def test_two_processes_train_one_run_together_and_one_writes_it(digits, move_to_another_folder):
    answer = launch("--arm", "imbalanced", "--data-parallel")
    assert answer.returncode == 0, answer.stderr
    [together] = load_results("smoke", "digits", "8-0.01")["imbalanced"]
    move_to_another_folder()
    alone = run_arm("imbalanced", digits, profile="smoke", device="cpu")
    assert answer.stdout.count("written by process") == 1 and "written by process 0" in answer.stdout
    for key in ("step", "train_loss"):
        expected = [epoch.get(key) for epoch in alone["history"]]
        assert [epoch.get(key) for epoch in together["history"]] == pytest.approx(expected, rel=1e-3), key
    assert together["configuration"]["processes"] == 2 and alone["configuration"]["processes"] == 1


def test_looking_at_the_test_set_costs_about_two_percent_but_makes_a_curve():
    # An image judged costs about half of one trained on.
    for steps, looks in [(6, 3), (1000, 3), (10_000, 5), (40_000, 20)]:
        assert number_of_looks(Recipe(steps=steps, batch_size=128), 10_000) == looks


# --- Command line -------------------------------------------------------------------------------


def run_command_line(*arguments):
    damaged = Path("damaged", "cifar-10-batches-py")  # so that the data is refused without a network
    damaged.mkdir(parents=True)
    environment = os.environ | {"CIFAR10_ROOT": "damaged", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "Experiment.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_help_lists_every_arm_and_profile():
    answer = run_command_line("--help")
    assert answer.returncode == 0
    words = set(answer.stdout.split())
    assert ARMS.keys() <= words and PROFILES.keys() <= words


def test_damaged_data_is_one_clear_line_without_a_traceback():
    answer = run_command_line("--arm", "imbalanced", "--profile", "smoke")
    assert answer.returncode == 1 and answer.stdout == ""
    [line] = answer.stderr.splitlines()
    assert line.startswith("Experiment.py: CIFAR-10 in damaged") and "data_batch_1" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "stabel"], "Unknown arm 'stabel'. Choose one of imbalanced, "),
        (["--arm", "imbalanced", "--profile", "fast"], "Unknown profile 'fast'. Choose one of auto, smoke"),
        (["--arm", "imbalanced", "--split", "lion-5"], "Unknown class 'lion'. Choose one of 0, 1, "),
    ],
)
def test_a_wrong_name_ends_with_one_line_that_lists_the_right_ones(
    arguments, message, digits, monkeypatch, capsys
):
    monkeypatch.setattr(Experiment, "load_data", lambda: digits)
    with pytest.raises(SystemExit) as end:
        Experiment.main(["--profile", "smoke", *arguments])
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("arguments", [["--arm", "stabel"], ["--profile", "fast"], ["--seed", "0", "-1"]])
def test_wrong_names_are_found_before_the_data_is_loaded(arguments, monkeypatch):
    monkeypatch.setattr(Experiment, "load_data", lambda: pytest.fail("the data was loaded"))
    with pytest.raises(SystemExit):
        Experiment.main(arguments)


def test_an_unknown_device_is_one_line_without_a_traceback(digits, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: digits)
    with pytest.raises(SystemExit) as end:
        Experiment.main(["--arm", "imbalanced", "--profile", "smoke", "--device", "abacus"])
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "abacus" in line


def test_each_arm_is_reported_in_a_line(digits, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: digits)
    Experiment.main(["--arm", "imbalanced", "stable", "--profile", "smoke", "--seed", "3"])
    ran, skipped = capsys.readouterr().out.splitlines()
    [result] = load_results("smoke", "digits", "8-0.01")["imbalanced"]
    metrics = result["metrics"]
    assert ran == (
        f"imbalanced, 8-0.01, seed 3: minority recall {metrics['minority']['recall']:.1%}, "
        f"balanced accuracy {metrics['balanced_accuracy']:.1%}, accuracy {metrics['accuracy']:.1%}"
    )
    assert skipped.startswith(
        "stable, 8-0.01, seed 3: skipped, there are no Stable Diffusion images of digits"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], STORY),
        (["--arm", "story"], STORY),
        (["--arm", "all"], tuple(ARMS)),
        (["--arm", "smote"], ("smote",)),
    ],
)
def test_story_is_the_default_and_all_means_every_arm(arguments, expected, digits, monkeypatch):
    ran, prepared = [], []
    monkeypatch.setattr(Experiment, "load_data", lambda: digits)
    monkeypatch.setattr(Experiment, "run_arm", lambda arm_name, *rest: ran.append(arm_name) or "not run here")
    monkeypatch.setattr(Experiment, "prepare_generator", lambda *arguments: prepared.append(arguments))
    Experiment.main(arguments)
    assert tuple(ran) == expected
    # Once, before the arms: processes that ran them at the same time would each train the GAN.
    assert len(prepared) == any(ARMS[name].needs_gan for name in expected)


def test_the_story_needs_neither_smote_nor_the_ceiling():
    assert STORY == (
        "imbalanced", "non-synthetic", "stable", "logit-adjusted", "stable-source-balanced-adjusted",
    )  # fmt: skip


def test_a_damaged_result_is_named(tiny_data):
    path = result_path("smoke", "cifar10", "cat-3", "imbalanced", 0)
    path.parent.mkdir(parents=True)
    path.write_text('{"arm": "imbal')
    with pytest.raises(ValueError, match=r"imbalanced-seed0\.json is no valid JSON .*Remove it"):
        run_arm("imbalanced", tiny_data, "cat-3", 0, "smoke", "cpu")

"""Profiles and arms: what each arm trains on, and that no removed image is in it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SPLIT, files, smoke, smoke_study, with_other_removed_images
from imblearn.over_sampling import SMOTE

import Arms
from Arms import (
    ARMS,
    MOST_PASSES,
    PROFILES,
    STORY,
    ArmUnavailableError,
    default_split,
    expand_arms,
    find_arm,
    resolve_profile,
)
from ClassifierNetwork import create_classifier
from ClassifierTraining import Recipe, count_training_flops
from Experiment import make_training_set, run_arms
from GANGeneration import GANSettings
from ImageCache import save_generated_images
from ImbalancedCIFAR10 import CIFAR10_CLASSES, split_from_name
from Methods import Method, sampling_seed
from NonSyntheticGeneration import PixelOverSampler
from Results import Study

CAT = CIFAR10_CLASSES.index("cat")
HALVED = "results/benchmarks/time_to_accuracy/balanced-94-halved-seed0.json"
REBALANCING_ARMS = [name for name, arm in ARMS.items() if not arm.whole_training_set]
STABLE_DIFFUSION_ARMS = [name for name, arm in ARMS.items() if arm.needs_stable_diffusion]


# --- Profiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cuda", "expected"), [(False, "quick"), (True, "full")])
def test_auto_is_full_with_cuda_and_quick_without(monkeypatch, cuda, expected):
    monkeypatch.setattr("Runtime.cuda_works", lambda: cuda)
    assert resolve_profile("auto") == (expected, PROFILES[expected])
    assert resolve_profile("auto", "cpu") == ("quick", PROFILES["quick"]), (
        "a full study would take days there"
    )


@pytest.mark.parametrize(("profile", "steps"), [("quick", MOST_PASSES * 5), ("smoke", 6)])
def test_small_data_sets_are_not_passed_over_more_than_sixty_times(profile, steps):
    recipe = PROFILES[profile].recipe(1298, flip=False)  # 1,298 kept digits are 5 batches of 256
    assert recipe.steps == steps and recipe.flip is False


@pytest.mark.parametrize(("data", "kept"), [("cifar10", 50), ("digits", 2)])
def test_smoke_uses_a_part_of_the_data_in_which_the_default_split_leaves_enough_for_a_gan(
    data, kept, request
):
    part = request.getfixturevalue(data).part(PROFILES["smoke"].most_images_a_class)
    _, y = split_from_name(default_split(part), part.y_train, part.class_names).cut(
        part.X_train, part.y_train
    )
    assert np.bincount(y).min() == kept


def test_evidence_uses_all_data():
    assert all(profile.most_images_a_class is None for profile in PROFILES.values() if profile.evidence)


def test_the_gan_of_the_cpu_profile_has_the_default_settings():
    assert PROFILES["cpu"].gan == PROFILES["headline"].gan == GANSettings()


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_the_arms_of_a_profile_exist_and_the_recipe_treats_all_classes_alike(profile):
    arms = tuple(ARMS) if profile.arms is None else profile.arms
    assert set(arms) <= ARMS.keys() and len(set(arms)) == len(arms)
    recipe = profile.recipe(45_050, flip=True)
    assert recipe.label_smoothing == 0
    assert recipe.steps == profile.steps, "MOST_PASSES is for small data sets"


def test_the_headline_is_the_mirrored_network_of_the_benchmarks_for_five_arms():
    headline = PROFILES["headline"]
    assert headline.arms == (
        "imbalanced", Arms.BEST_WITHOUT_IMAGES, "stable", Arms.BEST_WITH_STABLE_DIFFUSION, "balanced",
    )  # fmt: skip
    assert not ARMS[Arms.BEST_WITHOUT_IMAGES].method.sampler
    assert ARMS[Arms.BEST_WITH_STABLE_DIFFUSION].needs_stable_diffusion
    changed = {"padding": 4, "flip": False, "cutout": 10, "norm_shift_rate": 16.0, "muon_learning_rate": 0.07}
    assert headline.recipe(45_050, flip=True) == Recipe(steps=3000, **changed)
    assert headline.network(flip=True) == {"width": 32, "mirrored": True}
    result = json.loads(Path(REPOSITORY, HALVED).read_text())
    passes = 3000 * 256 / 50_000
    model = create_classifier(10, **headline.network(True), mean_std=((0.0,) * 3, (1.0,) * 3), seed=0)
    flops = count_training_flops(model, headline.recipe(45_050, flip=True))
    assert flops / 1e15 == pytest.approx(result["pflops"] * passes / result["passes"], rel=5e-3)


def test_a_network_must_tell_digits_from_their_mirror_images():
    assert PROFILES["headline"].network(flip=False) == {"width": 32, "mirrored": False}
    assert not PROFILES["headline"].recipe(1298, flip=False).flip


def test_a_profile_of_few_arms_has_them_for_all_and_story_and_no_others():
    few = list(PROFILES["headline"].arms)
    assert expand_arms(["all"], "headline") == expand_arms(["story"], "headline") == few
    assert expand_arms(["stable", "imbalanced"], "headline") == ["stable", "imbalanced"]
    assert expand_arms(["story", "gan"], "cpu") == [*STORY, "gan"]
    with pytest.raises(
        ValueError, match=f"headline does not run the arm 'smote'. Choose one of {', '.join(few)}"
    ):
        expand_arms(["stable", "smote"], "headline")
    with pytest.raises(ValueError, match="Unknown arm 'smoter'"):
        expand_arms(["smoter"], "headline")


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("find", "name", "valid"),
    [
        (find_arm, "smoter", "Unknown arm 'smoter'.*imbalanced.*smote.*balanced"),
        (resolve_profile, "fast", "Unknown profile 'fast'.*auto, smoke, quick, cpu, full"),
    ],
)
def test_unknown_names_are_answered_with_the_valid_ones(find, name, valid):
    with pytest.raises(ValueError, match=valid):
        find(name)


def test_an_arm_with_fewer_synthetic_images_is_the_same_arm_otherwise(tiny_data, tiny_cache):
    split = split_from_name("cat-5", tiny_data.y_train, tiny_data.class_names)
    X, y = split.cut(tiny_data.X_train, tiny_data.y_train)
    for name, others in (("stable", 0), ("stable-source-aware", 12 * 7 // 25)):
        arm, fewer = ARMS[name], find_arm(f"{name}@7")
        _, y_res = fewer.fit_resample(X, y, seed=0)
        new = np.bincount(y_res[len(y) :], minlength=10)
        assert new[3] == 7 and set(np.delete(new, 3)) == {others}
        assert fewer.method.loss is arm.method.loss and fewer.method.batches is arm.method.batches
        assert fewer.title == f"{arm.title}, 7 synthetic images of the minority"
        assert {fewer.image_tag, fewer.weights_name} == {f"{arm.image_tag}_7", f"{arm.weights_name}_7"}
    _, all_of_them = ARMS["stable"].fit_resample(X, y, seed=0)
    _, as_many = find_arm("stable@25").fit_resample(X, y, seed=0)
    assert (all_of_them == as_many).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stable@", "After stable@ a whole number of images from 1 on is needed, not ''"),
        ("stable@0", "from 1 on"),
        ("stable@007", "from 1 on"),
        ("stable@-5", "from 1 on"),
        ("stable@1e3", "from 1 on"),
        ("imbalanced@5", "adds no image, so no number of images can follow it: got @5"),
        ("stabel@5", "Unknown arm 'stabel'"),
    ],
)
def test_a_number_of_images_must_be_one_and_of_an_arm_that_has_images(name, message):
    with pytest.raises(ValueError, match=message):
        find_arm(name)


def any_loss(y, num_classes, sources):
    return None


def test_a_method_is_made_of_functions_that_have_a_name():
    assert (
        "any_loss" in Method(loss=any_loss).definition and Method(loss=any_loss).loss_in_words == "any_loss"
    )
    assert Method(batches=any_loss, what="of its own").batches_in_words == "of its own"
    with pytest.raises(ValueError, match="write a function, no lambda"):
        Method(loss=lambda *arguments: None)


def test_no_two_arms_write_the_same_file():
    assert len({arm.image_tag for arm in ARMS.values()}) == len(ARMS)
    assert len({arm.weights_name for arm in ARMS.values()}) == len(ARMS)


def test_the_story_needs_neither_smote_nor_the_ceiling():
    assert STORY == (
        "imbalanced", "non-synthetic", "stable", "logit-adjusted", "stable-source-balanced-adjusted",
        "stable-source-aware",
    )  # fmt: skip


def test_the_notebooks_use_cat_50_and_8_of_the_digits(tiny_data, digits):
    assert default_split(tiny_data) == "cat-50"
    assert default_split(digits) == "8-0.01"


def test_a_new_arm_is_one_entry(tiny_data, monkeypatch):
    """As docs/contributing.md says."""
    entry = Arms.Arm(
        "SMOTE, 2 neighbours", "smote_2", "resnet_smote_2", Method(PixelOverSampler(SMOTE(k_neighbors=2)))
    )
    monkeypatch.setitem(ARMS, "smote-2", entry)
    result = smoke("smote-2", tiny_data)
    assert result["training_images"]["synthetic"][CAT] == 25
    assert {"images/smoke/cat-5/cm_smote_2.png", "models/smoke/cat-5/resnet_smote_2.pt"} <= files()


def test_an_arm_cannot_change_the_recipe_of_all_arms():
    for method in (Method(changes={"cutout": 8}), Method(compute=2.0)):
        with pytest.raises(ValueError, match="changes the recipe, but all arms of a study have the same one"):
            Arms.Arm("Cutout", "cutout", "resnet_cutout", method)


# --- Training sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("arm_name", REBALANCING_ARMS)
def test_no_removed_image_reaches_a_sampler(arm_name, tiny_data, tiny_cache):
    other_data = with_other_removed_images(tiny_data, split_from_name(SPLIT, tiny_data.y_train))
    study = smoke_study(tiny_data)
    first = make_training_set(study, tiny_data, arm_name, 1)
    shutil.rmtree("models", ignore_errors=True)  # a GAN is trained again, on the other data
    shutil.rmtree("results", ignore_errors=True)
    second = make_training_set(study, other_data, arm_name, 1)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_only_the_ceiling_sees_the_removed_images(tiny_data):
    other_data = with_other_removed_images(tiny_data, split_from_name(SPLIT, tiny_data.y_train))
    study = smoke_study(tiny_data)
    first, second = (make_training_set(study, data, "balanced")[0] for data in (tiny_data, other_data))
    differing = np.flatnonzero((first != second).any(axis=(1, 2, 3)))
    assert len(differing) == 25 and set(tiny_data.y_train[differing]) == {CAT}


@pytest.mark.parametrize("arm_name", REBALANCING_ARMS)
def test_the_kept_images_come_first_and_unchanged(arm_name, tiny_data, tiny_cache):
    split = split_from_name(SPLIT, tiny_data.y_train)
    X, y = split.cut(tiny_data.X_train, tiny_data.y_train)
    X_res, y_res = make_training_set(smoke_study(tiny_data), tiny_data, arm_name)
    assert X_res.dtype == np.uint8 and y_res.dtype == np.int64 and len(X_res) == len(y_res)
    assert np.array_equal(X_res[:275], X)
    assert np.array_equal(y_res[:275], y)


@pytest.mark.parametrize("arm_name", [name for name, arm in ARMS.items() if arm.method.sampler])
def test_samplers_follow_the_seed(arm_name, tiny_data, tiny_cache):
    study = smoke_study(tiny_data)
    first, same, other = (make_training_set(study, tiny_data, arm_name, seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_the_sampler_does_not_get_the_seed_of_the_network():
    assert sampling_seed(0) != 0 and sampling_seed(0) != sampling_seed(1)
    assert sampling_seed(0) < 2**32


def test_an_arms_sampler_is_left_as_it_is(tiny_data):
    X, y = split_from_name(SPLIT, tiny_data.y_train).cut(tiny_data.X_train, tiny_data.y_train)
    ARMS["non-synthetic"].fit_resample(X, y, seed=3)
    assert ARMS["non-synthetic"].method.sampler.random_state is None


def test_the_loss_of_an_adjusted_arm_knows_the_source_of_each_row():
    y = np.array([0, 0, 1, 1, 1, 0])
    assert ARMS["stable-source-balanced"].method.loss is None
    loss = ARMS["stable-source-balanced-adjusted"].method.loss(y, 2, np.array([0, 0, 0, 1, 1, 1]))
    logits, targets = torch.zeros(6, 2), torch.from_numpy(y)
    # Real rows: 2 of class 0, 1 of class 1. Synthetic rows: 1 and 2.
    expected = -np.log(np.array([2, 2, 1, 2, 2, 1]) / 3)
    for row, value in enumerate(expected):
        rows = torch.tensor([row])
        assert loss(logits[rows], targets[rows], rows).item() == pytest.approx(value, abs=1e-6)


def test_the_ceiling_is_not_trained_on_a_cut_set(tiny_data):
    X, y = split_from_name(SPLIT, tiny_data.y_train).cut(tiny_data.X_train, tiny_data.y_train)
    with pytest.raises(ValueError, match=r"trains on data\.X_train and data\.y_train"):
        ARMS["balanced"].fit_resample(X, y, seed=0)


def test_a_gan_arm_trains_no_gan_of_its_own(tiny_data):
    X, y = split_from_name(SPLIT, tiny_data.y_train).cut(tiny_data.X_train, tiny_data.y_train)
    with pytest.raises(ValueError, match="needs a generator: pass generator=prepare_generator"):
        ARMS["gan"].fit_resample(X, y, seed=0)


# --- What an arm cannot do ----------------------------------------------------------------------


def test_smote_needs_two_images_of_a_class_and_other_arms_still_run(tiny_data):
    with pytest.raises(ArmUnavailableError, match="SMOTE interpolates.*has only one"):
        make_training_set(smoke_study(tiny_data, "cat-1"), tiny_data, "smote")
    assert files() == set()
    studies = [smoke_study(tiny_data, "cat-1")]
    outcomes = run_arms(studies, tiny_data, ["smote", "imbalanced"])
    assert "only one" in outcomes["smote", "cat-1", 0]
    assert outcomes["imbalanced", "cat-1", 0]["history"][-1]["step"] == 6


@pytest.mark.parametrize("arm_name", STABLE_DIFFUSION_ARMS)
def test_too_few_cached_images_make_the_arm_unavailable(arm_name, tiny_data):
    save_generated_images(np.zeros((50, 32, 32, 3), dtype=np.uint8), np.tile(np.arange(10), 5))
    reason = r"has 5 images of class \d, but (12|25) are asked for"
    with pytest.raises(ArmUnavailableError, match=reason):
        smoke(arm_name, tiny_data)
    assert not files("results")
    outcomes = run_arms([smoke_study(tiny_data)], tiny_data, [arm_name, "imbalanced"])
    assert outcomes["imbalanced", SPLIT, 0]["arm"] == "imbalanced", "other arms still run"


@pytest.mark.parametrize("arm_name", STABLE_DIFFUSION_ARMS)
def test_stable_diffusion_arms_are_unavailable_for_digits(arm_name, digits, tiny_cache):
    with pytest.raises(ArmUnavailableError, match="no Stable Diffusion images of digits"):
        make_training_set(Study("smoke", "digits", "8-0.01"), digits, arm_name)

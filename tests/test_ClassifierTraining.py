"""Recipe, the training loop, its checkpoint and what it calls after each epoch; plain batches and losses."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_ClassifierNetwork import (
    BAD_FILES,
    REFUSED,
    X,
    equal_weights,
    noise,
    pixels_for,
    small_model,
    weights_of,
    write_bad_file,
    y,
)
from torch.utils._python_dispatch import TorchDispatchMode

import ClassifierTraining
from Batches import AugmentedBatches, MicroBatch, split_evenly
from Checkpoints import Checkpoint
from ClassifierNetwork import (
    EpochEvaluator,
    ResNet18,
    channel_statistics,
    create_classifier,
    evaluate_classifier,
)
from ClassifierTraining import (
    Recipe,
    count_training_flops,
    seconds_between_checkpoints,
    train_classifier,
)
from Losses import ClassBalancedLoss, CrossEntropy, LogitAdjustedLoss, class_log_priors
from Runtime import choose_device

SHORT = Recipe(steps=7, batch_size=8)  # 20 images are 2 batches: epochs of 2, 2, 2 and 1 steps


@pytest.fixture
def float32(monkeypatch):
    """Compute in float32, so that numbers can be compared closely."""
    monkeypatch.setattr("Precision.half_precision", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def train(model, recipe=SHORT, *, seed=0, **options):
    return train_classifier(model, X, y, recipe, seed=seed, **options)


def evaluator(recipe=SHORT, evaluations=99, minority_classes=(), X_test=X, y_test=y):
    return EpochEvaluator(X_test, y_test, minority_classes, steps=recipe.steps, evaluations=evaluations)


def without_seconds(history):
    return [{k: v for k, v in epoch.items() if not k.startswith("seconds")} for epoch in history]


# --- Sharpness-aware steps ----------------------------------------------------------------------


def test_a_sharpness_aware_step_takes_the_gradient_at_the_highest_loss_nearby():
    """At (3, 4) the gradient of x * x / 2 is (3, 4), of length 5: the highest loss within 0.5 is near (3.3, 4.4)."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4.0]])
    (layer.weight**2 / 2).sum().backward()
    with ClassifierTraining._moved_uphill(layer, 0.5):
        assert torch.allclose(layer.weight.data, torch.tensor([[3.3, 4.4]]))
        layer.zero_grad()
        (layer.weight**2 / 2).sum().backward()
    assert torch.equal(layer.weight.data, torch.tensor([[3.0, 4.0]]))
    assert torch.allclose(layer.weight.grad, torch.tensor([[3.3, 4.4]]))


def test_sharpness_aware_training_gives_other_weights():
    weights = []
    for radius in (0.0, 0.05):
        model = small_model()
        train(model, dataclasses.replace(SHORT, sam_radius=radius))
        weights.append(model.head.weight.detach())
    assert not torch.allclose(*weights, rtol=1e-3)


# --- Augmentation -------------------------------------------------------------------------------


def batches_of(images, batch_size=8, seed=0, **options):
    return AugmentedBatches(images, batch_size, choose_device(), seed, **options)


def one_epoch(batches, number=1):
    """Images as (n, height, width, 3) and their rows, as NumPy arrays."""
    parts = list(batches.epoch(number))
    images = torch.cat([images for images, _ in parts]).permute(0, 2, 3, 1)
    return images.cpu().numpy(), torch.cat([rows for _, rows in parts]).cpu().numpy()


def test_without_padding_and_flips_the_images_come_unchanged_in_another_order():
    images, rows = one_epoch(batches_of(X, batch_size=5, padding=0, flip=False))
    assert sorted(rows) == list(range(20)) and list(rows) != list(range(20))
    assert np.array_equal(images, X[rows])


@pytest.mark.parametrize("flip", [True, False])
def test_every_image_is_a_crop_of_its_own_reflection_padded_row(flip):
    source = noise(120, size=8, seed=1)
    padded = np.pad(source, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="reflect")
    images, rows = one_epoch(batches_of(source, batch_size=40, padding=3, flip=flip))
    found = []
    for image, row in zip(images, rows, strict=True):
        crops = {
            (top, left, mirrored): padded[row, top : top + 8, left : left + 8][:, :: -1 if mirrored else 1]
            for top in range(7) for left in range(7) for mirrored in (False, True)
        }  # fmt: skip
        matching = [place for place, crop in crops.items() if np.array_equal(crop, image)]
        assert len(matching) == 1
        found += matching
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(7))
    assert len({(top, left) for top, left, _ in found}) > 30, "of 49 places, so both are drawn freely"
    assert {mirrored for _, _, mirrored in found} == ({False, True} if flip else {False})


def test_each_epoch_mirrors_about_half_of_the_images_and_not_the_same_half():
    source = noise(400, size=4)
    batches = batches_of(source, batch_size=400, padding=0)
    mirrored = []
    for number in (1, 2):
        images, rows = one_epoch(batches, number)
        mirrored.append((images[np.argsort(rows)] == source[:, :, ::-1]).all(axis=(1, 2, 3)))
    assert 0.4 < np.mean(mirrored[0]) < 0.6
    assert 0.4 < np.mean(mirrored[0] == mirrored[1]) < 0.6


def test_no_row_comes_twice_in_an_epoch_and_the_incomplete_batch_is_left_out():
    batches = batches_of(X, batch_size=8)
    epochs = [one_epoch(batches, number)[1] for number in range(1, 9)]
    assert len(batches) == 2
    assert all(len(rows) == len(set(rows)) == 16 for rows in epochs)
    assert set(np.concatenate(epochs)) == set(range(20)), "the same rows are left out in every epoch"


def test_fewer_images_than_a_batch_make_one_batch_of_all():
    batches = batches_of(X, batch_size=128)
    assert len(batches) == 1
    assert sorted(one_epoch(batches)[1]) == list(range(20))


def test_an_epoch_is_the_same_in_whatever_order_it_is_asked_for():
    forward, backward = batches_of(X), batches_of(X)
    first = {number: one_epoch(forward, number) for number in (1, 2, 3)}
    second = {number: one_epoch(backward, number) for number in (3, 1, 2)}
    for number in first:
        assert np.array_equal(first[number][0], second[number][0])
        assert np.array_equal(first[number][1], second[number][1])


def test_epochs_and_seeds_differ_from_each_other():
    # Seed 0 at epoch 2 must not be seed 1 at epoch 1, as with seed + epoch.
    orders = {(s, e): tuple(one_epoch(batches_of(X, seed=s), e)[1]) for s in (0, 1) for e in (1, 2)}
    assert len(set(orders.values())) == 4


def test_the_parts_of_all_processes_are_the_batches_of_one_process():
    whole = list(batches_of(X).epoch(1))
    parts = [list(batches_of(X, rank=rank, world_size=2).epoch(1)) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 2
    for batch, first, second in zip(whole, *parts, strict=True):
        for together, half, other_half in zip(batch, first, second, strict=True):
            assert len(half) == len(other_half) == 4
            assert torch.equal(together, torch.cat([half, other_half]))


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(ValueError, match="3 processes cannot share batches of 8 images"):
        batches_of(X, rank=0, world_size=3)


@pytest.mark.parametrize("flip", [True, False])
def test_batches_are_uint8_in_channels_last_order(flip):
    images, rows = next(batches_of(X, flip=flip).epoch(1))
    assert images.dtype == torch.uint8 and images.shape == (8, 3, 16, 16)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert rows.dtype == torch.int64


def test_the_batches_of_a_recipe_are_augmented_as_it_says():
    recipe = Recipe(steps=1, batch_size=6, padding=3, flip=False)
    ours = list(recipe.batches(X, 5, choose_device(), rank=1, world_size=2).epoch(2))
    options = {"padding": 3, "flip": False, "rank": 1, "world_size": 2}
    theirs = list(batches_of(X, batch_size=6, seed=5, **options).epoch(2))
    for (images, rows), (expected_images, expected_rows) in zip(ours, theirs, strict=True):
        assert torch.equal(images, expected_images) and torch.equal(rows, expected_rows)


@pytest.mark.parametrize("n", [8, 20, 64])
def test_the_test_set_is_evaluated_as_often_as_wished_whatever_an_epoch_is(n):
    recipe = Recipe(steps=21, batch_size=8)
    images, labels = np.resize(X, (n, *X.shape[1:])), np.resize(y, n)
    options = {"after_epoch": evaluator(recipe, 3)}
    history = train_classifier(small_model(), images, labels, recipe, seed=0, **options)
    steps = [record["step"] for record in history if "test_accuracy" in record]
    steps_of_an_epoch = n // 8
    assert steps == [steps_of_an_epoch * math.ceil(step / steps_of_an_epoch) for step in (7, 14)] + [21]


def test_more_evaluations_than_epochs_are_one_after_each_epoch():
    history = train(small_model(), after_epoch=evaluator(evaluations=99))
    assert all("test_accuracy" in record for record in history) and len(history) > 2


# --- Class priors -------------------------------------------------------------------------------


def test_log_priors_are_the_class_frequencies_of_each_source():
    labels = np.array([0, 0, 0, 1, 2, 2, 1, 1])
    sources = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    priors = class_log_priors(labels, 3, sources)
    assert priors.dtype == np.float32
    assert np.allclose(np.exp(priors), [[3 / 4, 1 / 4, 0], [0, 1 / 2, 1 / 2]])
    assert priors[0, 2] == priors[1, 0] == -np.inf


def test_a_source_without_rows_has_no_priors():
    assert class_log_priors(np.array([0, 1]), 2, np.array([1, 1]))[0].tolist() == [-np.inf, -np.inf]


def test_without_sources_all_rows_have_the_same_source():
    priors = LogitAdjustedLoss(np.array([0, 0, 0, 1]), 2).log_prior_of_row
    assert np.allclose(np.exp(priors.numpy()), [[3 / 4, 1 / 4]] * 4)


def test_the_priors_move_with_the_loss():
    loss = LogitAdjustedLoss(y, 10).to("meta")
    assert loss(torch.empty((2, 10), device="meta"), *torch.zeros((2, 2), dtype=int, device="meta")).is_meta


# --- Logit adjustment ---------------------------------------------------------------------------


def test_adjusting_by_equal_priors_changes_nothing(float32):
    plain, adjusted = small_model(), small_model()
    # SGD: Muon turns rounding errors of small gradients into large ones.
    recipe = Recipe(steps=5, batch_size=8, learning_rate=0.02, optimizer="sgd")
    train(plain, recipe)
    train(adjusted, recipe, loss=LogitAdjustedLoss(y, 10))
    plain, adjusted = weights_of(plain), weights_of(adjusted)
    for name in plain:
        assert torch.allclose(plain[name].float(), adjusted[name].float(), rtol=1e-2, atol=1e-3), name


def first_logits(model, flip=True):
    """Logits before the first step of a run with all 20 images in one batch, and their rows."""
    [(images, rows)] = batches_of(X, batch_size=20, padding=2, flip=flip).epoch(1)
    with torch.no_grad():
        logits = model.train()(images)
    return logits.cpu().double().numpy(), rows.cpu().numpy()


def test_each_row_is_adjusted_by_the_prior_of_its_own_source(float32):
    # The loss before the first step, computed by hand from the logits of the same augmented images.
    labels = np.array([0] * 9 + [1] * 3 + [1] * 6 + [2] * 2)
    sources = np.array([0] * 12 + [1] * 8)
    prior = np.array([[9 / 12, 3 / 12, 0], [0, 6 / 8, 2 / 8]])
    model = small_model(num_classes=3)
    history = train_classifier(
        model,
        X,
        labels,
        Recipe(steps=1, batch_size=20, scales=(1.0,)),
        seed=0,
        loss=LogitAdjustedLoss(labels, 3, sources),
    )
    logits, rows = first_logits(small_model(num_classes=3))
    likelihood = np.exp(logits) * prior[sources[rows]]
    of_the_label = likelihood[np.arange(20), labels[rows]] / likelihood.sum(axis=1)
    assert history[0]["train_loss"] == pytest.approx(-np.log(of_the_label).mean(), rel=1e-3)


def test_the_adjustment_takes_the_priors_of_both_sources_out_of_what_is_learnt(float32):
    # Dark images are real, bright ones synthetic, and nothing in them tells the class: what is left
    # to learn is the prior of the source. The adjusted network must not learn it.
    rng = np.random.default_rng(0)
    sources = np.repeat([0, 1], 300)
    priors = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    labels = np.concatenate([np.repeat(np.arange(3), (300 * p).round().astype(int)) for p in priors])

    def make_images(sources):
        shape = (len(sources), 8, 8, 3)
        return (rng.integers(0, 100, shape) + 150 * sources[:, None, None, None]).astype(np.uint8)

    images, fresh = make_images(sources), make_images(sources)
    recipe = Recipe(steps=100, batch_size=100, optimizer="sgd", learning_rate=0.05)
    softmax = {}
    for adjusted in (False, True):
        model = create_classifier(3, 4, channel_statistics(images), seed=0)
        loss = LogitAdjustedLoss(labels, 3, sources) if adjusted else None
        train_classifier(model, images, labels, recipe, seed=0, loss=loss)
        logits = torch.from_numpy(evaluate_classifier(model, fresh, labels).logits)
        probabilities = logits.softmax(dim=1).numpy()
        softmax[adjusted] = np.stack([probabilities[sources == s].mean(axis=0) for s in (0, 1)])
    assert softmax[False] == pytest.approx(priors, abs=0.05)
    assert softmax[True] == pytest.approx(np.full((2, 3), 1 / 3), abs=0.05)


def test_label_smoothing_contradicts_the_adjustment():
    with pytest.raises(ValueError, match="set label_smoothing=0"):
        train(small_model(), Recipe(steps=1, label_smoothing=0.1), loss=LogitAdjustedLoss(y, 10))


def test_sources_may_be_told_by_truth_values():
    assert repr(LogitAdjustedLoss(y, 10, y % 2 == 1)) == repr(LogitAdjustedLoss(y, 10, y % 2))


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (y[:-1] % 2, ValueError, r"sources must have the shape \(20,\)"),
        (y % 2 - 1, ValueError, "sources must not be negative, but the smallest is -1"),
        (y / 2, TypeError, "sources must hold integers"),
    ],
)
def test_unusable_sources_are_refused(sources, error, message):
    with pytest.raises(error, match=message):
        LogitAdjustedLoss(y, 10, sources)


def test_a_loss_that_was_made_for_other_rows_is_refused():
    with pytest.raises(ValueError, match="The loss was made for 19 rows, but y has 20"):
        train(small_model(), loss=LogitAdjustedLoss(y[:-1], 10))


def test_the_repr_of_a_loss_tells_its_priors_and_smoothing():
    assert repr(LogitAdjustedLoss(y, 10, y % 2)) != repr(LogitAdjustedLoss(y, 10, y // 5))
    assert repr(LogitAdjustedLoss(y, 10)).startswith("LogitAdjustedLoss(rows=20, classes=10, checksum=")
    assert repr(CrossEntropy(0.1)) == "CrossEntropy(label_smoothing=0.1)"


# --- Training -----------------------------------------------------------------------------------


def test_a_learnable_data_set_is_learnt(tiny_data):
    model = create_classifier(10, 8, channel_statistics(tiny_data.X_train), seed=0)
    recipe = Recipe(steps=80, batch_size=50)
    history = train_classifier(model, tiny_data.X_train, tiny_data.y_train, recipe, seed=0)
    assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]
    predictions = evaluate_classifier(model, tiny_data.X_test, tiny_data.y_test).predictions
    assert (predictions == tiny_data.y_test).mean() > 0.5, "chance is 0.1"


def test_the_number_of_steps_is_exact_though_the_last_epoch_is_cut_short():
    model = small_model()
    history = train(model, Recipe(steps=5, batch_size=8))
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    assert [epoch["step"] for epoch in history] == [2, 4, 5]
    assert [epoch["images_seen"] for epoch in history] == [16, 32, 40]
    assert model.norm.num_batches_tracked == 5
    assert not model.training


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    rates = [epoch["learning_rate"] for epoch in train(small_model(), Recipe(steps=20, batch_size=20))]
    peak = int(np.argmax(rates))
    assert max(rates) == pytest.approx(Recipe.learning_rate, rel=0.1)
    assert peak <= 2, "warm-up is a tenth of the steps"
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.001
    falls = -np.diff(rates[peak + 1 :])
    assert falls == pytest.approx(np.full(len(falls), falls.mean()), rel=1e-3), "in a straight line"


def test_the_same_seed_trains_the_same_weights_and_another_seed_others():
    models = [small_model() for _ in range(3)]
    histories = [train(model, seed=seed) for model, seed in zip(models, (0, 0, 1), strict=True)]
    assert equal_weights(models[0], models[1])
    assert without_seconds(histories[0]) == without_seconds(histories[1])
    assert not equal_weights(models[0], models[2])


@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_only_if_the_recipe_says_so(float32, flip):
    history = train(small_model(), Recipe(steps=1, batch_size=20, flip=flip, scales=(1.0,)))
    loss = {}
    for mirrored in (True, False):
        logits, rows = first_logits(small_model(), flip=mirrored)
        loss[mirrored] = -np.log(np.exp(logits)[np.arange(20), y[rows]] / np.exp(logits).sum(axis=1)).mean()
    assert abs(loss[True] - loss[False]) > 0.01
    assert history[0]["train_loss"] == pytest.approx(loss[flip], rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_any_small_number_of_steps_can_be_trained(steps):
    assert train(small_model(), Recipe(steps=steps, batch_size=8))[-1]["step"] == steps


def test_weight_decay_spares_norms_and_biases():
    # One step without momentum: decay must move a weight by learning rate x decay x weight, no more.
    initial, plain, decayed = small_model(), small_model(), small_model()
    for model, weight_decay in ((plain, 0.0), (decayed, 0.5)):
        recipe = Recipe(steps=1, batch_size=20, optimizer="sgd", momentum=0.0, weight_decay=weight_decay)
        train(model, recipe)
    rates, spared = [], 0
    for (name, start), without, with_decay in zip(
        initial.named_parameters(), plain.parameters(), decayed.parameters(), strict=True
    ):
        start, without, with_decay = (weights.detach().cpu() for weights in (start, without, with_decay))
        if start.ndim > 1:
            rates.append(((without - with_decay) / (0.5 * start)).median().item())
            assert torch.allclose(without - with_decay, rates[0] * 0.5 * start, rtol=1e-3, atol=1e-6), name
        else:
            assert torch.equal(without, with_decay) and not torch.equal(without, start), name
            spared += 1
    assert 0.001 < rates[0] <= 0.1 and len(rates) == 21, "20 convolutions and the head"
    assert spared == 41, "20 norms with 2 parameters each, and the bias of the head"


def test_a_single_image_can_be_trained_on_and_evaluated():
    model = small_model()
    history = train_classifier(model, X[:1], y[:1], Recipe(steps=2), seed=0)
    assert [epoch["images_seen"] for epoch in history] == [1, 2]
    assert evaluate_classifier(model, X[:1], y[:1]).logits.shape == (1, 10)


def test_every_step_starts_without_the_gradient_of_the_last_one(monkeypatch):
    forward_and_backward, gradients = ClassifierTraining._forward_and_backward, []

    def spy(model, *arguments, **options):
        gradients.append([p.grad is None for p in model.parameters()])
        return forward_and_backward(model, *arguments, **options)

    monkeypatch.setattr(ClassifierTraining, "_forward_and_backward", spy)
    train(small_model(), Recipe(steps=3, batch_size=20))
    assert len(gradients) == 3 and all(map(all, gradients))


def test_muon_gets_the_kernels_of_the_blocks_and_sgd_all_other_weights():
    muon, sgd = small_model(), small_model()
    still = {"learning_rate": 0.0}
    train(muon, Recipe(steps=2, batch_size=20, **still))
    train(sgd, Recipe(steps=2, batch_size=20, optimizer="sgd", **still))
    initial = small_model()
    assert equal_parameters(sgd, initial) == set(dict(initial.named_parameters()))
    moved = set(dict(initial.named_parameters())) - equal_parameters(muon, initial)
    assert moved == {n for n, p in initial.named_parameters() if n.startswith("blocks.") and p.ndim == 4}


def equal_parameters(first, second):
    pairs = zip(first.named_parameters(), second.parameters(), strict=True)
    return {name for (name, one), other in pairs if torch.equal(one.cpu(), other.cpu())}


def test_micro_batches_add_up_to_the_gradient_of_the_batch(float32):
    # In evaluation mode batch norm does not couple the images, so only the averaging is compared.
    gradients = []
    for size in (20, 8):  # 8, 8 and 4
        model = small_model().eval()
        images, labels = pixels_for(model, X), torch.from_numpy(y).to(model.mean.device)
        rows = torch.arange(20, device=model.mean.device)
        for part in split_evenly(images, rows, size):
            ClassifierTraining._forward_and_backward(model, CrossEntropy(), [part], labels, 0.5)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


def test_images_that_pass_together_share_their_statistics():
    losses = {
        size: train(small_model(), Recipe(steps=1, batch_size=20, micro_batch_size=size))[0]["train_loss"]
        for size in (20, 10, 128)
    }
    assert losses[20] == losses[128] and losses[10] != losses[20]


@pytest.mark.parametrize(
    ("side", "expected"),
    [(32, [16, 16, 24, 24, 32, 32]), (20, [16, 16, 16, 16, 20, 20]), (12, [12] * 6)],
    ids=["half, three quarters, all", "not below 16", "smaller ones stay"],
)
def test_images_grow_in_equal_parts_of_the_run(side, expected, monkeypatch):
    sides, features = [], ResNet18.features

    def spy(self, x):
        assert x.shape[2] == x.shape[3]
        sides.append(x.shape[2])
        return features(self, x)

    monkeypatch.setattr(ResNet18, "features", spy)
    recipe = Recipe(steps=6, batch_size=20, scales=(0.5, 0.75, 1.0))
    train_classifier(small_model(), noise(20, side), y, recipe, seed=0)
    assert sides == expected


def test_shrunk_images_keep_their_colours(float32):
    seen, model = [], small_model()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    grey = pixels_for(model, np.full((2, 32, 32, 3), 200, dtype=np.uint8))
    rows = torch.tensor([0, 1], device=grey.device)
    part = MicroBatch(grey, rows, weight=1.0)
    ClassifierTraining._forward_and_backward(model, CrossEntropy(), [part], rows, scale=0.5)
    assert seen[0].shape == (2, 3, 16, 16) and (seen[0] - 200).abs().max() < 1e-2


def test_an_epoch_reads_no_value_from_the_device_in_each_step():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            Reads.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*arguments, **(options or {}))

    counts = []
    for batch_size in (20, 4):  # an epoch of 1 and of 5 steps
        Reads.count = 0
        with Reads():
            train(small_model(), Recipe(steps=20 // batch_size, batch_size=batch_size))
        counts.append(Reads.count)
    assert counts[0] == counts[1] > 0


def test_flops_are_those_of_convolutions_and_matrix_products():
    # Forward and backward of a convolution: 3 products, the first layer's input needs no gradient.
    model, recipe = small_model(), Recipe(steps=10, batch_size=5, optimizer="sgd", scales=(1.0,))
    products = []

    def count(module, inputs, output):
        weights = module.weight.numel()
        places = output.shape[2:].numel() if output.ndim == 4 else 1
        products.append(weights * places * (2 if module is model.conv else 3))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros((1, 3, 16, 16), device=model.mean.device))
    expected = 2 * sum(products) * 10 * 5
    assert count_training_flops(small_model(), recipe, (16, 16)) == pytest.approx(expected, rel=1e-3)


def test_small_images_and_muon_show_in_the_flops():
    model = small_model()
    costs = {
        name: count_training_flops(model, Recipe(steps=10, **options), image_size=(32, 32))
        for name, options in {
            "sgd": {"optimizer": "sgd", "scales": (1.0,)}, "muon": {"scales": (1.0,)},
            "half": {"optimizer": "sgd", "scales": (0.5, 1.0)},
        }.items()
    }  # fmt: skip
    assert costs["sgd"] < costs["muon"] < 1.2 * costs["sgd"]
    assert costs["half"] == pytest.approx(0.625 * costs["sgd"], rel=0.01), "a quarter for half of the run"
    assert next(model.parameters()).device.type != "meta"


DISTRIBUTED_PROGRAM = """
import json, sys
import numpy as np
import torch
import Precision
from ClassifierNetwork import EpochEvaluator, channel_statistics, create_classifier, evaluate_classifier
from ClassifierTraining import Recipe, train_classifier
from Losses import LogitAdjustedLoss
from Runtime import start_processes

state = start_processes("cpu")
torch.set_num_threads(1)
Precision.half_precision = lambda device: None
data = np.load("data.npz")
X, y = data["X"], data["y"]
model = create_classifier(10, 4, channel_statistics(X), seed=0, device="cpu")
recipe = Recipe(steps=8, batch_size=8, micro_batch_size=4)
history = train_classifier(
    model, X, y, recipe, seed=0, loss=LogitAdjustedLoss(y, 10, y % 2),
    batches=recipe.batches(X, 0, torch.device("cpu"), state.process_index, state.num_processes),
    after_epoch=EpochEvaluator(X, y, [], steps=recipe.steps, evaluations=4),
    checkpoint=f"run-{state.num_processes}.pt" if state.is_main_process or sys.argv[1:] == [] else "elsewhere.pt",
)
accuracy = float((evaluate_classifier(model, X, y).predictions == y).mean())
weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
with open(f"outcome-{state.num_processes}-{state.process_index}.json", "w") as file:
    variances = model.state_dict()["norm.running_var"].tolist()
    json.dump({"history": history, "accuracy": accuracy, "weights": weights.tolist(), "variances": variances}, file)
"""


def test_two_processes_train_as_one_process_does_and_continue_from_one_checkpoint():
    np.savez("data.npz", X=X, y=y)
    Path("program.py").write_text(DISTRIBUTED_PROGRAM)
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable], launch):
        answer = subprocess.run(
            [*command, "program.py"], env=environment, capture_output=True, text=True, timeout=180
        )
        assert answer.returncode == 0, answer.stderr
        assert answer.stderr.count(" 0/8 ") == 1, "only the first process shows a progress bar"
    alone, first, second = (
        json.loads(Path(f"outcome-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert first["weights"] == second["weights"], "all processes hold the same weights"
    for outcome in (first, second):
        for epoch, expected in zip(outcome["history"], alone["history"], strict=True):
            assert epoch["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
            assert epoch["train_accuracy"] == expected["train_accuracy"]
            assert epoch["step"] == expected["step"]
    assert first["weights"] == pytest.approx(alone["weights"], abs=2e-3)
    # One process updates them twice a step with a tenth, two processes once with 1 - 0.9² = 0.19.
    assert first["variances"] == second["variances"] == pytest.approx(alone["variances"], rel=0.05)
    assert torch.load("run-2.pt", weights_only=True)["history"] == first["history"], "one process writes it"
    answer = subprocess.run(
        [*launch, "program.py", "again"], env=environment, capture_output=True, text=True, timeout=180
    )
    assert answer.returncode == 0, answer.stderr
    for rank in range(2):
        again = json.loads(Path(f"outcome-2-{rank}.json").read_text())
        assert again["weights"] == first["weights"], "and one reads it, the other need not see it"


# --- Parts that can be replaced -----------------------------------------------------------------


def test_a_loss_gets_float32_logits_targets_and_the_rows_of_the_training_set(float32):
    class Spy(torch.nn.Module):
        rows = []

        def forward(self, logits, targets, rows):
            assert logits.dtype == torch.float32 and logits.shape == (len(rows), 10)
            assert targets.dtype == rows.dtype == torch.int64
            assert np.array_equal(targets.cpu(), y[rows.cpu()])
            self.rows += rows.tolist()
            return CrossEntropy(0.1)(logits, targets, rows)

    replaced, usual = small_model(), small_model()
    # SGD: Muon turns rounding errors of small gradients into large ones. A GPU adds up the two losses in another order.
    options = {"steps": 2, "batch_size": 10, "micro_batch_size": 4, "optimizer": "sgd", "learning_rate": 0.02}
    train(replaced, Recipe(**options), loss=Spy())
    train(usual, Recipe(**options, label_smoothing=0.1))
    assert sorted(Spy.rows) == list(range(20)), "an epoch"
    replaced, usual = weights_of(replaced), weights_of(usual)
    for name in usual:
        torch.testing.assert_close(replaced[name], usual[name], rtol=1e-3, atol=1e-4, msg=name)


def test_batches_may_be_of_any_kind():
    class EveryEpochTheFirst:
        batch_size = 8

        def epoch(self, number):
            return batches_of(X).epoch(1)

    model = small_model()
    history = train(model, batches=EveryEpochTheFirst())
    assert [epoch["images_seen"] for epoch in history] == [16, 32, 48, 56]
    usual = small_model()
    assert without_seconds(train(usual)[:1]) == without_seconds(history[:1])
    assert not equal_weights(model, usual), "later epochs differ"


def test_an_epoch_without_a_batch_is_refused():
    class Nothing:
        batch_size = 8

        def epoch(self, number):
            return iter(())

    with pytest.raises(ValueError, match="Epoch 1 has no batch"):
        train(small_model(), batches=Nothing())


def test_what_is_returned_after_an_epoch_joins_its_record_the_checkpoint_and_the_bar(capsys):
    calls = []

    def after_epoch(model, record):
        calls.append(dict(record))
        kept = torch.load("run.pt", weights_only=True)["history"] if Path("run.pt").exists() else []
        assert len(kept) == record["epoch"] - 1, "called before the checkpoint is written"
        return {"epochs_called": len(calls), "seconds_called": 1.0} if record["epoch"] > 1 else None

    history = train(small_model(), checkpoint="run.pt", after_epoch=after_epoch)
    assert [epoch["epoch"] for epoch in calls] == [1, 2, 3, 4]
    assert [list(epoch) for epoch in history] == [list(calls[0])] + 3 * [
        [*calls[0], "epochs_called", "seconds_called"]
    ]
    assert torch.load("run.pt", weights_only=True)["history"] == history
    bar = capsys.readouterr().err.split("\r")[-1]
    assert bar.startswith("run: 100%") and "epochs_called=4" in bar and "seconds_called" not in bar


def test_a_record_keeps_the_order_of_its_keys():
    history = train(small_model(), after_epoch=evaluator(evaluations=1))
    keys = ["epoch", "step", "images_seen", "learning_rate", "train_loss", "train_accuracy", "skipped_steps"]
    keys.append("seconds")
    of_test = ["test_loss", "test_accuracy", "test_minority_recall", "seconds_of_test"]
    assert list(history[0]) == keys and list(history[-1]) == keys + of_test


# --- Evaluation during training -----------------------------------------------------------------


def test_the_test_set_decides_nothing_and_the_last_weights_are_the_result(float32):
    # The test labels are wrong on purpose: the better the training, the worse the test.
    colours = np.random.default_rng(0).integers(0, 256, (10, 1, 1, 3), dtype=np.uint8)
    images, wrong = (colours[y] // 2 + X // 2), (y + 1) % 10
    recipe = Recipe(steps=24, batch_size=20)
    watched, alone = small_model(), small_model()
    evaluate = evaluator(recipe, X_test=images, y_test=wrong)
    history = train_classifier(watched, images, y, recipe, seed=0, after_epoch=evaluate)
    plain_history = train_classifier(alone, images, y, recipe, seed=0)
    assert equal_weights(watched, alone)
    assert [epoch["train_loss"] for epoch in history] == [epoch["train_loss"] for epoch in plain_history]
    assert history[-1]["test_loss"] > min(epoch["test_loss"] for epoch in history) + 0.1
    assert evaluate_classifier(watched, images, wrong).loss == pytest.approx(
        history[-1]["test_loss"], rel=1e-4
    )


def test_the_history_holds_the_mean_recall_of_the_minority_classes():
    labels = np.repeat([0, 1, 2], [10, 8, 2])
    model = small_model()
    history = train(model, after_epoch=evaluator(minority_classes=[0, 2], y_test=labels))
    predictions = evaluate_classifier(model, X, labels).predictions
    recalls = [np.mean(predictions[labels == c] == c) for c in (0, 2)]
    assert history[-1]["test_minority_recall"] == pytest.approx(np.mean(recalls))
    assert history[-1]["test_accuracy"] == pytest.approx(np.mean(predictions == labels))


def test_evaluations_are_as_many_as_asked_for_evenly_spread_with_the_last_epoch_among_them():
    epochs = {}
    for evaluations in (1, 2, 3, 99):
        history = train(small_model(), after_epoch=evaluator(evaluations=evaluations))
        epochs[evaluations] = [epoch["epoch"] for epoch in history if "test_accuracy" in epoch]
    assert epochs == {1: [4], 2: [2, 4], 3: [2, 3, 4], 99: [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"X_test": X / 255}, TypeError, "uint8"),
        ({"y_test": y[:-1]}, ValueError, r"shape \(20,\)"),
        (
            {"X_test": X[y != 3], "y_test": y[y != 3], "minority_classes": [3, 4]},
            ValueError,
            r"test set has no image of the minority classes \[3\]",
        ),
    ],
)
def test_an_unusable_test_set_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        evaluator(**change)


# --- Killed and resumed -------------------------------------------------------------------------


SLOW_PROGRAM = """
import time
import numpy as np
import torch
from ClassifierNetwork import channel_statistics, create_classifier
from Batches import AugmentedBatches
from ClassifierTraining import Recipe, train_classifier

def slow_epoch(self, number, epoch=AugmentedBatches.epoch):
    for batch in epoch(self, number):
        yield batch
        time.sleep(0.1)  # so that the kill comes in the middle of an epoch

AugmentedBatches.epoch = slow_epoch
torch.set_num_threads(1)
data = np.load("data.npz")
X, y = data["X"], data["y"]
model = create_classifier(10, 4, channel_statistics(X), seed=0)
train_classifier(model, X, y, Recipe(steps=20, batch_size=10), seed=0, checkpoint="run.pt")
"""


def test_a_killed_process_is_continued_to_the_same_weights():
    recipe = Recipe(steps=20, batch_size=10)
    np.savez("data.npz", X=X, y=y)
    command = [sys.executable, "-c", SLOW_PROGRAM]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while not Path("run.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert 0 < torch.load("run.pt", weights_only=True)["history"][-1]["step"] < recipe.steps

    # A model with other initial weights: all that counts must come from the checkpoint.
    resumed, uninterrupted = small_model(seed=99), small_model()
    resumed_history = train(resumed, recipe, checkpoint="run.pt")
    history = train(uninterrupted, recipe)
    assert equal_weights(resumed, uninterrupted)
    assert without_seconds(resumed_history) == without_seconds(history)
    assert torch.load("run.pt", weights_only=True)["history"] == resumed_history


@pytest.mark.parametrize("adjusted", [False, True])
def test_runs_interrupted_in_different_epochs_continue_to_the_same_weights(monkeypatch, adjusted):
    evaluate = evaluator(minority_classes=[3])
    options = {"loss": LogitAdjustedLoss(y, 10, y % 2) if adjusted else None}
    uninterrupted = small_model()
    history = train(uninterrupted, after_epoch=evaluate, **options)

    for allowed_epochs in (1, 2):
        calls = iter(range(allowed_epochs))

        def interrupted_evaluation(model, record, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return evaluate(model, record)

        with pytest.raises(KeyboardInterrupt):
            train(small_model(), checkpoint="run.pt", after_epoch=interrupted_evaluation, **options)

    assert len(torch.load("run.pt", weights_only=True)["history"]) == 3
    options |= {"checkpoint": "run.pt", "after_epoch": evaluate}
    resumed = small_model(seed=99)
    assert without_seconds(train(resumed, **options)) == without_seconds(history)
    assert equal_weights(resumed, uninterrupted)

    # The checkpoint holds the finished run until whoever asked for it has saved the outcome.
    monkeypatch.setattr(ClassifierTraining, "_forward_and_backward", None)  # one more step would fail
    again = small_model(seed=98)
    assert without_seconds(train(again, **options)) == without_seconds(history)
    assert equal_weights(again, uninterrupted)
    assert [path.name for path in Path().iterdir()] == ["run.pt"]


def interrupted_run(monkeypatch, path="run.pt", **options):
    """Leave the checkpoint of a run that was interrupted in its second epoch."""
    epoch = AugmentedBatches.epoch

    def interrupted_epoch(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(AugmentedBatches, "epoch", interrupted_epoch)
        with contextlib.suppress(KeyboardInterrupt):
            train(small_model(), checkpoint=path, **options)
    assert Path(path).exists()


class NoBatches:
    batch_size = 8

    def epoch(self, number):
        raise AssertionError("nothing may be trained")


@pytest.mark.parametrize(
    ("difference", "name"),
    [
        ({"width": 8}, "width: 4 there, 8 now"),
        ({"X": noise(20, seed=9)}, "checksum"),
        ({"y": (y + 1) % 10}, "checksum"),
        ({"recipe": Recipe(steps=9, batch_size=8)}, "steps: 7 there, 9 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"loss": LogitAdjustedLoss(y, 10)}, r"loss: CrossEntropy\(.*\) there, LogitAdjustedLoss\(.*\) now"),
        ({"batches": NoBatches()}, r"batches: AugmentedBatches\(.*\) there, NoBatches now"),
    ],
    ids=[
        "another width",
        "other images",
        "other labels",
        "another recipe",
        "another seed",
        "another loss",
        "other batches",
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_stays(monkeypatch, difference, name):
    interrupted_run(monkeypatch)
    before = Path("run.pt").read_bytes()
    run = {"width": 4, "X": X, "y": y, "recipe": SHORT, "seed": 0} | difference
    model = small_model(width=run.pop("width"))
    with pytest.raises(ValueError, match=rf"run\.pt belongs to another training.*{name}.*Remove it"):
        train_classifier(model, run.pop("X"), run.pop("y"), run.pop("recipe"), checkpoint="run.pt", **run)
    assert Path("run.pt").read_bytes() == before


def test_a_run_does_not_go_on_in_another_type_of_numbers(monkeypatch):
    monkeypatch.setattr(ClassifierTraining, "precision_name", lambda device: "bfloat16")
    interrupted_run(monkeypatch)
    monkeypatch.setattr(ClassifierTraining, "precision_name", lambda device: "float32")
    with pytest.raises(ValueError, match="another training .precision: bfloat16 there, float32 now"):
        train(small_model(), checkpoint="run.pt")


def test_a_checkpoint_of_other_sources_is_refused_by_the_adjusted_loss(monkeypatch):
    interrupted_run(monkeypatch, loss=LogitAdjustedLoss(y, 10, y % 2))
    with pytest.raises(
        ValueError, match=r"loss: LogitAdjustedLoss\(.*checksum=.*\) there, LogitAdjustedLoss"
    ):
        train(small_model(), checkpoint="run.pt", loss=LogitAdjustedLoss(y, 10, y // 5))


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_never_run_as_code(kind):
    write_bad_file(kind)
    with pytest.raises(ValueError, match=REFUSED):
        train(small_model(), checkpoint="bad.pt")
    assert [path.name for path in Path().iterdir()] == ["bad.pt"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["states"][0].pop("head.weight"),
        lambda content: content["states"].pop(0),
        lambda content: content["states"].__setitem__(1, {}),
        lambda content: content.update(states=None),
        lambda content: content.update(history=[]),
    ],
)
def test_a_checkpoint_with_parts_that_do_not_fit_is_named(monkeypatch, damage):
    interrupted_run(monkeypatch)
    content = torch.load("run.pt")
    damage(content)
    torch.save(content, "run.pt")
    with pytest.raises(ValueError, match=r"checkpoint run\.pt is damaged \(.*\)\. Remove it to start again"):
        train(small_model(), checkpoint="run.pt")


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("models/cat-50/my-run.pt", "cat-50/my-run"), ("run.pt", "run"), (None, "training")],
)
def test_a_diverging_run_stops_with_advice_and_keeps_its_checkpoint(checkpoint, name):
    recipe = Recipe(steps=20, batch_size=20, learning_rate=1e30)
    advice = rf"The loss of {name} became .*Lower the learning rates: .*learning_rate=1e\+30"
    with pytest.raises(FloatingPointError, match=advice):
        train(small_model(), recipe, checkpoint=checkpoint)
    assert checkpoint is None or Path(checkpoint).exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": y - 1}, ValueError, "Labels run from -1 to 8"),
        ({"y": y + 1}, ValueError, "Labels run from 1 to 10 in y, but there are classes 0 to 9"),
        ({"y": y[:-1]}, ValueError, r"shape \(20,\)"),
        ({"y": y / 1.0}, TypeError, "integers"),
        ({"X": X / 255}, TypeError, "uint8"),
        ({"X": X.transpose(0, 3, 1, 2)}, ValueError, r"\(n, height, width, 3\)"),
    ],
)
def test_unusable_input_is_refused_before_anything_is_trained(change, error, message):
    arguments = {"X": X, "y": y, "recipe": SHORT} | change
    model = small_model()
    with pytest.raises(error, match=message):
        train_classifier(model, **arguments, seed=0)
    assert equal_weights(model, small_model())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be whole and at least 1: got 0"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be whole and at least 1"),
        ({"steps": 1, "micro_batch_size": 0}, "micro_batch_size must be whole and at least 1"),
        ({"steps": 1, "muon_iterations": 0}, "muon_iterations must be whole and at least 1"),
        ({"steps": 1, "padding": -1}, "padding must be whole and at least 0"),
        ({"steps": 1, "cutout": 2.5}, "cutout must be whole and at least 0"),
        ({"steps": 1, "warmup": 1.0}, "warmup must be at least 0 and below 1"),
        ({"steps": 1, "warmup": -0.1}, "warmup must be at least 0 and below 1"),
        ({"steps": 1, "optimizer": "adam"}, "Unknown optimizer 'adam'.*'muon' or 'sgd'"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


@pytest.mark.parametrize("step", [2, -1])
def test_every_other_or_reversed_rows_can_be_trained_on(step):
    views, copies = small_model(), small_model()
    train_classifier(views, X[::step], y[::step], SHORT, seed=0)
    train_classifier(copies, X[::step].copy(), y[::step].copy(), SHORT, seed=0)
    assert equal_weights(views, copies)


def test_a_numpy_seed_can_be_resumed(monkeypatch):
    seed = np.int64(0)
    interrupted_run(monkeypatch, seed=seed)
    resumed, uninterrupted = small_model(), small_model()
    train(resumed, seed=seed, checkpoint="run.pt")
    train(uninterrupted, seed=0)
    assert equal_weights(resumed, uninterrupted)


def test_a_recipe_of_numpy_values_trains_the_same_and_can_be_resumed(monkeypatch):
    values = {"steps": np.logspace(1, 2, 2)[0].astype(int), "batch_size": np.int32(8), "warmup": np.float32(0.25),
              "learning_rate": np.logspace(-2, -1, 2)[1], "flip": np.bool_(True), "scales": np.array([0.5, 1.0])}  # fmt: skip
    recipe, plain = Recipe(**values), Recipe(10, 8, warmup=0.25, learning_rate=0.1, scales=(0.5, 1.0))
    assert recipe == plain and json.loads(json.dumps(recipe.as_json())) == plain.as_json()
    interrupted_run(monkeypatch, recipe=recipe)
    resumed, uninterrupted = small_model(), small_model()
    train(resumed, plain, checkpoint="run.pt")
    train(uninterrupted, recipe)
    assert equal_weights(resumed, uninterrupted)


def test_numpy_values_that_are_returned_after_an_epoch_come_back_from_the_checkpoint():
    first = train(small_model(), checkpoint="run.pt", after_epoch=lambda *a: {"recall": np.float64(0.5)})
    again = train(small_model(), checkpoint="run.pt")
    assert again == first and type(again[0]["recall"]) is float


@pytest.mark.parametrize("steps", [2.5, 100.0, float("nan"), np.float64(10)])
def test_a_number_of_steps_that_is_not_whole_is_refused(steps):
    with pytest.raises(ValueError, match="steps must be whole and at least 1"):
        Recipe(steps=steps)


def test_a_checkpoint_that_cannot_be_written_is_noticed_before_the_training():
    Path("file").touch()
    with pytest.raises(OSError, match=r"Cannot write file/run\.pt"):
        train(small_model(), checkpoint="file/run.pt", batches=NoBatches())


def test_a_network_that_cannot_be_evaluated_stops_the_training_and_keeps_the_last_checkpoint(monkeypatch):
    evaluate, original = evaluator(), EpochEvaluator.__call__

    def broken(self, model, record):
        if record["epoch"] == 2:
            model.head.bias.data[0] = float("nan")
        return original(self, model, record)

    monkeypatch.setattr(EpochEvaluator, "__call__", broken)
    with pytest.raises(FloatingPointError, match="Logits of the classifier: NaN"):
        train(small_model(), after_epoch=evaluate, checkpoint="run.pt")
    assert len(torch.load("run.pt", weights_only=True)["history"]) == 1


def test_weights_that_the_last_step_broke_are_no_result():
    with pytest.raises(FloatingPointError, match="last step"):
        train(small_model(), Recipe(steps=1, batch_size=20, learning_rate=1e300))


# --- Fast shifts --------------------------------------------------------------------------------


@pytest.mark.cpu(reason="the order of a GPU's sums is not that of the other run")
@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_only_the_shifts_of_batch_norm_learn_faster(optimizer):
    """For SGD without decay, a larger gradient is a higher learning rate."""
    fast, hooked, usual = (small_model(device="cpu") for _ in range(3))
    for module in hooked.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.register_hook(lambda gradient: 16 * gradient)
    recipe = Recipe(steps=5, batch_size=8, optimizer=optimizer)
    train(hooked, recipe)
    train(usual, recipe)
    history = train(fast, dataclasses.replace(recipe, norm_shift_rate=16))
    assert equal_weights(fast, hooked) and not equal_weights(fast, usual)
    assert history[-1]["learning_rate"] == train(small_model(device="cpu"), recipe)[-1]["learning_rate"]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_of_the_shifts_that_is_not_positive_is_refused(rate):
    with pytest.raises(ValueError, match="norm_shift_rate must be a positive number"):
        Recipe(steps=1, norm_shift_rate=rate)


def test_a_checkpoint_from_before_a_setting_could_be_chosen_is_resumed():
    def kill(model, record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    whole = small_model()
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(small_model(), after_epoch=kill, checkpoint="run.pt")
    content = torch.load("run.pt")
    for name in ("mirrored", "norm_shift_rate", "cutout", "precision"):
        del content["identity"][name]
    torch.save(content, "run.pt")
    with pytest.raises(ValueError, match="another training .norm_shift_rate: 1.0 there, 4.0 now"):
        train(small_model(), dataclasses.replace(SHORT, norm_shift_rate=4.0), checkpoint="run.pt")
    resumed = small_model(seed=9)
    train(resumed, checkpoint="run.pt")
    assert equal_weights(resumed, whole)


@pytest.mark.parametrize(
    "loss", [torch.nn.CrossEntropyLoss(), torch.nn.functional.cross_entropy, "cross-entropy", CrossEntropy]
)
def test_a_loss_of_another_kind_is_refused(loss):
    with pytest.raises(TypeError, match=r"called as loss\(logits, targets, rows\)"):
        train(small_model(), loss=loss)


def test_batches_of_other_images_are_refused():
    recipe = Recipe(steps=1, batch_size=8)
    batches = recipe.batches(X[:-1], 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"made from {len(X) - 1} images, but X has {len(X)}"):
        train_classifier(small_model(), X, y, recipe, seed=0, batches=batches)


def test_weights_for_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match="has 11 classes, but the network 10"):
        train(small_model(), loss=ClassBalancedLoss(np.arange(11), 11))


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": -0.1}, {"muon_learning_rate": float("nan")}, {"weight_decay": -1}, {"label_smoothing": 1.0},
     {"momentum": 1.0}, {"muon_weight_decay": float("inf")}],
)  # fmt: skip
def test_rates_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Recipe(steps=1, **options)


def test_a_checkpoint_is_not_written_more_often_than_the_device_is_worth(monkeypatch):
    assert seconds_between_checkpoints(torch.device("cuda:0")) == 30
    assert seconds_between_checkpoints(torch.device("cpu")) == 0
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda store, history, states: saved.append(history[-1]["step"]))
    recipe = Recipe(steps=5, batch_size=10)
    train(small_model(), recipe, checkpoint="run.pt")
    assert saved == [2, 4, 5]
    monkeypatch.setattr("ClassifierTraining.seconds_between_checkpoints", lambda device: 1000)
    train(small_model(), recipe, checkpoint="run.pt")
    assert saved[3:] == [5], "the finished training is always written"

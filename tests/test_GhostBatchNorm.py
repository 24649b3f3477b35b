"""Micro-batches that pass through the network together give what they give one after another."""

import numpy as np
import pytest
import torch
from test_ClassifierNetwork import X, small_model, y

import ClassifierTraining
from Batches import MicroBatch, MixedBatches, SourceBatches, split_evenly
from ClassifierTraining import Recipe, train_classifier
from GhostBatchNorm import GhostBatchNorm2d, micro_batches
from Losses import ClassBalancedLoss, CrossEntropy, LogitAdjustedLoss

CPU = torch.device("cpu")
SOURCES = np.arange(20) >= 14
LOSSES = {
    "plain": CrossEntropy(),
    "smoothed": CrossEntropy(0.1),
    "adjusted": LogitAdjustedLoss(y, 10, SOURCES),
    "not a mean over images": ClassBalancedLoss(np.minimum(y, 4), 10, beta=0.9),
}


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr("Precision.half_precision", lambda device: None)
    monkeypatch.setattr("Muon.half_precision", lambda device: None)


def evenly():
    rows = torch.arange(20)
    return split_evenly(torch.from_numpy(X).permute(0, 3, 1, 2), rows, 8)  # 8, 8 and 4


def by_source():
    recipe = Recipe(steps=4, batch_size=16, micro_batch_size=6)
    batches = SourceBatches(X, SOURCES, recipe, CPU, 0, phases=((1.0, 0.25),))
    parts = next(batches.epoch(1))
    assert [len(part.rows) for part in parts] == [6, 6, 4]
    assert [part.tracked for part in parts] == [True, True, False]
    return parts


def mixed():
    batches = Recipe(steps=1, batch_size=20).batches(X, 0, CPU)
    return next(MixedBatches(batches, "mixup", micro_batch_size=12, seed=0).epoch(1))


def weighted():
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    return [
        MicroBatch(images[:12], torch.arange(12), weight=0.9),
        MicroBatch(images[12:], torch.arange(12, 20), weight=0.1, tracked=False),
    ]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("make", [evenly, by_source, mixed, weighted])
@pytest.mark.parametrize("scale", [0.75, 1.0])
def test_one_pass_gives_gradients_loss_and_statistics_of_one_after_another(float32, make, loss, scale):
    outcomes, targets = [], torch.from_numpy(np.minimum(y, 4))
    for together in (True, False):
        model, parts = small_model(device="cpu").train(), make()
        groups = [parts] if together else [[part] for part in parts]
        done = [
            ClassifierTraining._forward_and_backward(model, loss, group, targets, scale) for group in groups
        ]
        outcomes.append({
            "loss": sum(loss for loss, _ in done),
            "right": sum(right for _, right in done),
            **{f"gradient of {name}": p.grad for name, p in model.named_parameters()},
            **{name: value.clone() for name, value in model.state_dict().items()},
        })  # fmt: skip
    for name, value in outcomes[0].items():
        torch.testing.assert_close(value, outcomes[1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{}, {"sam_radius": 0.05}, {"optimizer": "sgd"}], ids=str)
def test_a_training_in_one_pass_is_one_of_micro_batches(float32, monkeypatch, options):
    recipe = Recipe(steps=3, batch_size=20, micro_batch_size=8, learning_rate=0.01, muon_learning_rate=1e-3, **options)  # fmt: skip
    weights = []
    for together in (True, False):
        monkeypatch.setattr(ClassifierTraining, "in_one_pass", lambda device, answer=together: answer)
        passes, model = [], small_model(device="cpu")
        model.conv.register_forward_hook(lambda *a, passes=passes: passes.append(len(a[2])))
        history = train_classifier(model, X, y, recipe, seed=0)
        assert passes == ([20] if together else [8, 8, 4]) * 3 * (2 if "sam_radius" in options else 1)
        assert sum(epoch["skipped_steps"] for epoch in history) == 0
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=2e-2, atol=2e-3, msg=name)


def test_each_part_is_normalised_by_its_own_statistics():
    norm = GhostBatchNorm2d(3).train()
    x = torch.randn(10, 3, 4, 4) + torch.arange(10.0).view(10, 1, 1, 1)
    with micro_batches(norm, [4, 6], [True, False]):
        normalised = norm(x)
    for part in normalised.split([4, 6]):
        torch.testing.assert_close(part.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
        torch.testing.assert_close(part.var((0, 2, 3)), torch.ones(3), rtol=0, atol=0.05)
    torch.testing.assert_close(norm.running_mean, 0.1 * x[:4].mean((0, 2, 3)))
    assert norm.num_batches_tracked == 2
    assert norm.parts is None and norm.scales_and_shifts is None
    whole = norm(x)
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)


def test_a_network_with_other_batch_norms_is_refused():
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    refused = pytest.raises(TypeError, match="need GhostBatchNorm2d, but the network has BatchNorm2d")
    with refused, micro_batches(network, [4, 6], [True, True]):
        pass


def test_evaluation_within_the_context_uses_the_running_statistics():
    norm = GhostBatchNorm2d(3).eval()
    x = torch.randn(10, 3, 4, 4)
    with micro_batches(norm, [4, 6], [True, True]):
        torch.testing.assert_close(norm(x), x, rtol=1e-3, atol=1e-3)

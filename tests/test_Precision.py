"""The type in which networks compute, and float16 with scaled gradients, on the CPU."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_images
from test_ClassifierNetwork import X, equal_weights, small_model, y
from test_GANGeneration import TINY
from test_GANNetworks import equal

import GANTrainingStep
import Precision
from ClassifierTraining import Recipe, train_classifier
from GANGeneration import train_gan
from Precision import ScaledSteps, check_dtype, half_precision, mixed_precision, precision_name

RECIPE = Recipe(steps=6, batch_size=8)  # 20 images are 2 batches


@pytest.fixture
def float16(monkeypatch):
    """Compute as a CUDA GPU without bfloat16 does."""
    monkeypatch.setattr("Precision.half_precision", lambda device: torch.float16)
    monkeypatch.setattr("Muon.half_precision", lambda device: torch.float16)


@pytest.mark.parametrize(
    ("hip", "capability", "expected", "name"),
    [
        (None, (9, 0), torch.bfloat16, "bfloat16"),
        (None, (8, 0), torch.bfloat16, "bfloat16"),  # A100
        (None, (7, 5), torch.float16, "float16"),  # T4
        (None, (6, 0), torch.float16, "float16"),  # P100
        (None, (6, 1), None, "float32"),  # GTX 1080
        (None, (5, 2), None, "float32"),
        ("6.4", (7, 5), torch.bfloat16, "bfloat16"),  # AMD
    ],
)
def test_a_gpu_computes_in_the_best_type_that_it_has(monkeypatch, hip, capability, expected, name):
    """The GPU that is asked about, which need not be the current one."""
    monkeypatch.setattr("torch.version.hip", hip)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: {1: capability}[device.index])
    assert half_precision(torch.device("cuda:1")) == expected
    assert precision_name(torch.device("cuda:1")) == name


def test_other_devices_compute_in_bfloat16_or_float32(monkeypatch):
    assert half_precision(torch.device("mps")) is None
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    for machine, mkldnn, avx512_bf16, amx, expected in (
        ("x86_64", True, True, False, torch.bfloat16),
        ("AMD64", True, False, True, torch.bfloat16),
        ("x86_64", True, False, False, None),  # AVX-512 alone
        ("x86_64", False, True, True, None),
        ("aarch64", True, False, False, torch.bfloat16),
    ):
        monkeypatch.setattr("platform.machine", lambda answer=machine: answer)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda answer=mkldnn: answer)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=avx512_bf16: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=amx: answer)
        assert half_precision(torch.device("cpu")) == expected


def test_autocast_follows_the_decision(float16):
    with mixed_precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16


# --- Scaled gradients ---------------------------------------------------------------------------


def test_a_step_whose_gradient_overflows_is_skipped_and_counted(float16):
    weight, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD([p], lr=0.5) for p in (weight, other)]
    steps = ScaledSteps([weight, other], optimizers, torch.device("cpu"))
    scale = steps._scaler.get_scale()
    steps.backward((weight * torch.tensor([1.0, 1e38])).sum() + other.sum())
    steps.step()
    assert steps.skipped == 1 and weight.tolist() == [1, 1] and other.tolist() == [1], "no optimiser steps"
    assert steps._scaler.get_scale() == scale / 2
    weight.grad = other.grad = None
    steps.backward(weight.sum() + 2 * other.sum())
    steps.step()
    assert steps.skipped == 1 and weight.tolist() == [0.5, 0.5] and other.tolist() == [0]


def test_in_other_types_nothing_is_scaled(monkeypatch):
    monkeypatch.setattr("Precision.half_precision", lambda device: torch.bfloat16)
    weight = torch.nn.Parameter(torch.ones(2))
    steps = ScaledSteps([weight], [torch.optim.SGD([weight], lr=0.5)], torch.device("cpu"))
    steps.backward((1e-30 * weight).sum())
    assert weight.grad.tolist() == pytest.approx([1e-30] * 2)
    steps.step()
    assert steps.skipped == 0 and steps.state_dict() == {"scaler": {}, "skipped": 0}


def test_the_scale_comes_back_also_from_a_run_in_another_type(float16):
    def make():
        weight = torch.nn.Parameter(torch.ones(1))
        return ScaledSteps([weight], [torch.optim.SGD([weight], lr=1.0)], torch.device("cpu"))

    first, second = make(), make()
    first.backward(first._together.param_groups[0]["params"][0].sum() * float("inf"))
    first.step()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() and second.skipped == 1
    make().load_state_dict({"scaler": {}, "skipped": 3})


def test_a_checkpoint_from_before_gradients_were_scaled_is_continued():
    whole = small_model(device="cpu")
    train_classifier(whole, X, y, RECIPE, seed=0)

    def kill(model, record):
        if record["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train_classifier(
            small_model(device="cpu"), X, y, RECIPE, seed=0, after_epoch=kill, checkpoint="run.pt"
        )
    content = torch.load("run.pt", weights_only=True)
    assert content["states"].pop().keys() == {"scaler", "skipped"}
    torch.save(content, "run.pt")
    resumed = small_model(seed=9, device="cpu")
    train_classifier(resumed, X, y, RECIPE, seed=0, checkpoint="run.pt")
    assert equal_weights(resumed, whole)


# --- Trainings in float16 -----------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.filterwarnings("error")
def test_a_classifier_learns_in_float16_and_a_killed_run_continues_to_the_same_weights(float16, monkeypatch):
    # A scale at which the first gradients overflow.
    monkeypatch.setattr(torch.amp, "GradScaler", scaler_that_starts_at(2.0**40))
    whole = small_model(device="cpu")
    history = train_classifier(whole, X, y, RECIPE, seed=0)
    skipped = [epoch["skipped_steps"] for epoch in history]
    assert skipped[0] > 0, "the first steps overflow"

    def kill(model, record):
        if record["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train_classifier(
            small_model(device="cpu"), X, y, RECIPE, seed=0, after_epoch=kill, checkpoint="run.pt"
        )
    resumed = small_model(seed=9, device="cpu")
    again = train_classifier(resumed, X, y, RECIPE, seed=0, checkpoint="run.pt")
    assert equal_weights(resumed, whole)
    assert [epoch["skipped_steps"] for epoch in again] == skipped
    assert [epoch["train_loss"] for epoch in again] == [epoch["train_loss"] for epoch in history]


def scaler_that_starts_at(scale, scaler=torch.amp.GradScaler):
    return lambda device, enabled: scaler(device, enabled=enabled, init_scale=scale)


def test_float16_trains_a_classifier_like_float32(float16, monkeypatch):
    colours = np.random.default_rng(0).integers(0, 256, (10, 1, 1, 3), dtype=np.uint8)
    images, recipe = colours[y] // 2 + X // 4, Recipe(steps=30, batch_size=20, scales=(1.0,))
    losses = []
    for half in (torch.float16, None):
        monkeypatch.setattr("Precision.half_precision", lambda device, half=half: half)
        model = small_model(device="cpu")
        history = train_classifier(model, images, y, recipe, seed=0)
        losses.append([epoch["train_loss"] for epoch in history])
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=0.15)
    assert min(losses[0]) < 0.5 * losses[0][0] and min(losses[1]) < 0.5 * losses[1][0]


def test_a_gan_trains_in_float16_and_a_killed_run_continues_to_the_same_weights(float16, monkeypatch):
    y = np.repeat([0, 1, 2], [20, 20, 4])
    X, settings = make_images(y, 0), dataclasses.replace(TINY, steps=6, records=3)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler_that_starts_at(2.0**40))
    whole = train_gan(X, y, settings, seed=0, device="cpu")
    assert whole.history[0]["skipped_steps"] > 0
    step = GANTrainingStep.Adversaries.step

    def killed(self, batches, number, seed):
        if number == 4:
            raise Killed
        return step(self, batches, number, seed)

    with monkeypatch.context() as patch:
        patch.setattr(GANTrainingStep.Adversaries, "step", killed)
        with pytest.raises(Killed):
            train_gan(X, y, settings, seed=0, device="cpu", checkpoint="gan.pt")
    resumed = train_gan(X, y, settings, seed=0, device="cpu", checkpoint="gan.pt")
    assert equal(resumed.generator.state_dict(), whole.generator.state_dict())
    assert equal(resumed.discriminator.state_dict(), whole.discriminator.state_dict())
    assert [r["skipped_steps"] for r in resumed.history] == [r["skipped_steps"] for r in whole.history]


def test_a_layer_that_computes_its_kernels_from_its_weights_keeps_them():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            assert self.weight.dtype == torch.float32
            return torch.nn.functional.linear(x, 2 * self.weight)

    network = torch.nn.Sequential(torch.nn.Linear(2, 2), Doubled(2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16), Precision.half_weights(network):
        assert network[0].weight.dtype == torch.bfloat16
        assert network(torch.ones(1, 2)).dtype == torch.bfloat16


def test_weights_in_half_precision_are_gone_after_an_error():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(Killed), torch.autocast("cpu", dtype=torch.bfloat16), Precision.half_weights(layer):
        assert layer.weight.dtype == torch.bfloat16
        raise Killed
    assert layer.weight.dtype == torch.float32 and isinstance(layer.weight, torch.nn.Parameter)


def test_a_type_that_a_gpu_only_emulates_is_refused(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr("Precision.half_precision", lambda device: torch.float16)
    with pytest.raises(ValueError, match="cuda:0 does not multiply in bfloat16. Choose float16 or float32"):
        check_dtype(torch.bfloat16, gpu)
    check_dtype(torch.float16, gpu)
    check_dtype(torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr("Precision.half_precision", lambda device: torch.bfloat16)
    check_dtype(torch.bfloat16, gpu)

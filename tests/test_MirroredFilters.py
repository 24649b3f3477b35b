"""The network whose filters come in mirrored pairs: what it computes, its cost, its files and its training."""

import copy

import numpy as np
import pytest
import torch

import ClassifierTraining
from ClassifierNetwork import (
    channel_statistics,
    create_classifier,
    evaluate_classifier,
    load_classifier,
    save_classifier,
)
from ClassifierTraining import Recipe, count_training_flops, train_classifier
from LastLayer import retrain_last_layer
from Losses import LDAMLoss
from Methods import METHODS
from MirroredFilters import HalvedMirroredConv2d, MirroredBatchNorm2d, MirroredConv2d, mirrored_filters


def untrained(width=4, modify=None, seed=0, **options):
    model = create_classifier(10, width, ((127.5,) * 3, (63.75,) * 3), seed, "cpu", **options)
    if modify:
        modify(model)
    return model


def equal_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- What it computes ---------------------------------------------------------------------------


def with_random_norms(model, images):
    """Scales and shifts as after training, and the images' statistics: the initial values would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(0, 0.3, generator=generator)
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model


def pixels(n, side):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", [16, 24, 32])
def test_mirrored_filters_cannot_tell_an_image_from_its_mirror_image(side, training):
    images = pixels(5, side)
    both = torch.cat([images, images.flip(-1)])

    def logits(modify):
        model = with_random_norms(untrained(modify=modify), images)
        return model.train(training)(both).chunk(2)

    of_images, of_mirror_images = logits(mirrored_filters)
    torch.testing.assert_close(of_images, of_mirror_images, rtol=1e-4, atol=1e-5)
    assert of_images.std(dim=0).min() > 1e-2, "but it can tell images apart"
    of_images, of_mirror_images = logits(None)
    assert (of_images - of_mirror_images).abs().max() > 1e-2, "pooling alone is not enough"


def test_the_mirrored_network_stays_mirrored_and_in_step_with_its_optimisers(tiny_data):
    X, y = tiny_data.X_train, tiny_data.y_train
    model = untrained(modify=mirrored_filters)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    train_classifier(model, X, y, Recipe(steps=3, batch_size=20), seed=0)
    unchanged = [name for name, weights in model.named_parameters() if torch.equal(weights, before[name])]
    assert unchanged == []
    kernels = [name for name, weights in model.named_parameters() if weights.ndim == 4]
    assert len(kernels) == 20 and model.width == 4, (
        "18 weighted layers except for the head, and three shortcuts"
    )
    images = pixels(5, 32)
    torch.testing.assert_close(model(images), model(images.flip(-1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8, 6, 6), (5, 8, 3, 2)])  # in the second, no place has two neighbours
@pytest.mark.parametrize("side_of_kernel", [1, 3])
def test_half_of_the_operations_give_the_same_and_the_same_gradients(side_of_kernel, shape):
    random = torch.Generator().manual_seed(0)
    usual = torch.nn.Conv2d(8, 12, side_of_kernel, padding=side_of_kernel // 2, bias=False)
    usual.weight.data = torch.randn(usual.weight.shape, generator=random, dtype=torch.float64)
    maps = torch.randn(shape, generator=random, dtype=torch.float64)
    direction = torch.randn((5, 12, *shape[2:]), generator=random, dtype=torch.float64)
    outcomes = []
    for kind in (MirroredConv2d, HalvedMirroredConv2d):
        layer, of_maps = kind(usual), maps.clone().requires_grad_()
        output = layer(of_maps)
        output.backward(direction)
        outcomes.append((output, of_maps.grad, layer.weight.grad))
    torch.testing.assert_close(*outcomes)


def test_the_mirrored_network_is_the_same_for_half_of_the_operations():
    def network(convolution):
        return with_random_norms(
            untrained(modify=lambda model: mirrored_filters(model, convolution)), pixels(5, 32)
        ).eval()

    usual, halved = network(MirroredConv2d), network(HalvedMirroredConv2d)
    assert usual.state_dict().keys() == halved.state_dict().keys()
    torch.testing.assert_close(usual(pixels(5, 32)), halved(pixels(5, 32)), rtol=1e-4, atol=1e-5)
    recipe = Recipe(steps=1, batch_size=1, optimizer="sgd", scales=(1.0,))
    of_stem = 2 * 2 * 32 * 32 * 4 * 27  # two operations a product, forward and for the kernels' gradient
    ratio = (count_training_flops(halved, recipe) - of_stem) / (count_training_flops(usual, recipe) - of_stem)
    assert ratio == pytest.approx(0.5, abs=0.01)


def test_the_mirrored_network_costs_no_more_and_has_half_of_the_weights():
    def cost(model):
        return count_training_flops(model, Recipe(steps=1, optimizer="sgd"))

    def weights(model):
        return sum(parameter.numel() for parameter in model.parameters())

    usual, mirrored = untrained(), untrained(modify=mirrored_filters)
    head = cost(usual) - cost(mirrored)
    assert 0 <= head < 1e-3 * cost(usual), "the head alone has half of the inputs"
    assert weights(mirrored) == (weights(usual) - 10) // 2 + 10, "except for the ten biases of the head"


def test_a_layer_that_cannot_be_mirrored_is_refused():
    with pytest.raises(ValueError, match="even width is needed, got 3 channels"):
        create_classifier(10, 3, ((127.5,) * 3, (63.75,) * 3), 0, "cpu", mirrored=True)
    for options in ({"stride": 2, "padding": 1}, {"padding": 0}):
        with pytest.raises(ValueError, match="keeps the image's size"):
            HalvedMirroredConv2d(torch.nn.Conv2d(4, 4, 3, bias=False, **options))
    with pytest.raises(ValueError, match="1x1 or 3x3"):
        HalvedMirroredConv2d(torch.nn.Conv2d(4, 4, 5, padding=2, bias=False))


def test_micro_batches_are_normalised_by_their_own_statistics_and_real_ones_are_followed(float32):
    norm = MirroredBatchNorm2d(6).train()
    x = torch.randn(10, 6, 4, 4) + torch.arange(10.0).view(10, 1, 1, 1)
    with ClassifierTraining.micro_batches(norm, [4, 6], [True, False]):
        normalised = norm(x)
    for part in normalised.split([4, 6]):
        pairs = part.unflatten(1, (2, 3))
        torch.testing.assert_close(pairs.mean((0, 1, 3, 4)), torch.zeros(3), rtol=0, atol=1e-5)
        torch.testing.assert_close(pairs.var((0, 1, 3, 4)), torch.ones(3), rtol=0, atol=0.05)
    torch.testing.assert_close(norm.running_mean, 0.1 * x[:4].unflatten(1, (2, 3)).mean((0, 1, 3, 4)))
    assert norm.num_batches_tracked == 2


# --- A network of create_classifier -------------------------------------------------------------


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr("Precision.half_precision", lambda device: None)
    monkeypatch.setattr("Muon.half_precision", lambda device: None)


def test_the_created_network_is_the_one_of_the_benchmarks():
    created = untrained(mirrored=True)
    made = untrained(modify=lambda model: mirrored_filters(model, HalvedMirroredConv2d))
    assert equal_weights(created, made) and created.mirrored and not untrained().mirrored
    kinds = {type(layer) for layer in created.modules() if isinstance(layer, torch.nn.Conv2d)}
    assert kinds == {HalvedMirroredConv2d}


@pytest.mark.parametrize("cosine_head", [False, True])
def test_a_mirrored_network_comes_back_from_a_file_and_from_a_copy(float32, cosine_head):
    model = with_random_norms(untrained(mirrored=True, cosine_head=cosine_head), pixels(5, 32)).eval()
    save_classifier(model, "model.pt")
    logits = model(pixels(5, 32))
    torch.testing.assert_close(logits, model(pixels(5, 32).flip(-1)), rtol=1e-4, atol=1e-5)
    assert model.features(pixels(5, 32)).shape == (5, 16)
    for other in (load_classifier("model.pt", "cpu"), copy.deepcopy(model)):
        assert other.mirrored and (other.width, other.num_classes) == (4, 10)
        assert equal_weights(other, model) and torch.equal(other(pixels(5, 32)), logits)


def test_files_of_one_kind_are_not_taken_for_those_of_the_other():
    for mirrored, name in ((True, "filters in mirrored pairs"), (False, "usual filters")):
        save_classifier(untrained(mirrored=not mirrored), "model.pt")
        content = torch.load("model.pt")
        torch.save(content | {"mirrored": mirrored}, "model.pt")
        with pytest.raises(
            ValueError, match=rf"model\.pt does not fit a ResNet-18 of width 4 with {name}: .*Remove it"
        ):
            load_classifier("model.pt")
    save_classifier(untrained(), "old.pt")
    content = torch.load("old.pt")
    del content["mirrored"]
    torch.save(content, "old.pt")
    assert equal_weights(load_classifier("old.pt", "cpu"), untrained()), "older files say nothing about it"


# --- Training -----------------------------------------------------------------------------------

HEADLINE = {"padding": 4, "cutout": 10, "flip": False, "muon_learning_rate": 0.07, "norm_shift_rate": 16.0}


def train_by_source(data, model, after_epoch=None, checkpoint=None, **changes):
    """Train by a method whose micro-batches hold real images only, or added ones only."""
    X, y = data.X_train, data.y_train
    recipe = Recipe(steps=4, batch_size=100, micro_batch_size=40, **HEADLINE | changes)
    return METHODS["stable-spectrum-quarter-real-last"].train(
        model, X, y, 200, recipe, seed=0, after_epoch=after_epoch, checkpoint=checkpoint
    )


def test_a_mirrored_training_with_two_sources_resumes_to_the_same_weights(tiny_data, tmp_path):
    whole, checkpoint = untrained(mirrored=True), tmp_path / "run.pt"
    train_by_source(tiny_data, whole)

    def kill(model, record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_by_source(tiny_data, untrained(mirrored=True), after_epoch=kill, checkpoint=checkpoint)
    resumed = untrained(mirrored=True, seed=9)
    history, _ = train_by_source(tiny_data, resumed, checkpoint=checkpoint)
    assert history[-1]["step"] == 4 and equal_weights(resumed, whole)
    logits = whole(pixels(5, 32)), whole(pixels(5, 32).flip(-1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="another training .mirrored: True there, False now"):
        train_by_source(tiny_data, untrained(), checkpoint=checkpoint)


def test_all_micro_batches_in_one_pass_give_the_same(float32, tiny_data, monkeypatch):
    models = []
    for together in (True, False):
        monkeypatch.setattr(ClassifierTraining, "in_one_pass", lambda device, answer=together: answer)
        models.append(untrained(mirrored=True))
        recipe = Recipe(
            steps=2, batch_size=20, micro_batch_size=8, learning_rate=0.01, muon_learning_rate=1e-3
        )
        train_classifier(models[-1], tiny_data.X_train, tiny_data.y_train, recipe, seed=0)
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[1].state_dict()[name], rtol=2e-2, atol=2e-3, msg=name)


def test_a_mirrored_training_can_be_compiled(float32, tiny_data, monkeypatch, capsys):
    """As on a GPU: in one pass, but by a backend that a CPU has."""
    monkeypatch.setattr(ClassifierTraining, "in_one_pass", lambda device: True)
    models = []
    for backend in ("aot_eager", "none"):
        monkeypatch.setenv("COMPILE_BACKEND", backend)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        models.append(untrained(mirrored=True))
        train_by_source(tiny_data, models[-1], scales=(0.5,), learning_rate=0.01, muon_learning_rate=1e-3)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs > 0) == (backend != "none")
    torch._dynamo.reset()
    assert "not compiled" not in capsys.readouterr().out
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[1].state_dict()[name], rtol=2e-2, atol=2e-3, msg=name)


def test_methods_that_need_another_head_or_a_new_last_layer_run(tiny_data):
    X, y = tiny_data.X_train, tiny_data.y_train
    recipe = Recipe(steps=1, batch_size=20)
    model = create_classifier(10, 4, channel_statistics(X), 0, "cpu", cosine_head=True, mirrored=True)
    train_classifier(model, X, y, recipe, seed=0, loss=LDAMLoss(y, 10))
    assert np.abs(evaluate_classifier(model, X, y).logits).max() <= 1.01
    model = create_classifier(10, 4, channel_statistics(X), 0, "cpu", mirrored=True)
    retrain_last_layer(model, X, y, recipe, 0)
    assert (evaluate_classifier(model, X, y).predictions == y).mean() > 0.2

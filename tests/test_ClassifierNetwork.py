"""The network, the optimiser of its kernels, its evaluation and its files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import Muon
from ClassifierNetwork import (
    ResNet18,
    channel_statistics,
    create_classifier,
    evaluate_classifier,
    load_classifier,
    predict_logits,
    save_classifier,
)
from Muon import KernelMuon


@pytest.fixture
def float32(monkeypatch):
    """Compute in float32, so that numbers can be compared closely."""
    monkeypatch.setattr("Precision.half_precision", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def noise(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


X = noise(20)
y = np.arange(20) % 10


def small_model(seed=0, width=4, num_classes=10, device=None):
    return create_classifier(num_classes, width, channel_statistics(X), seed, device)


def pixels_for(model, images):
    """uint8 images (n, height, width, 3) as the network takes them, on its device."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(model.mean.device)


def used_model(**options):
    """A network whose batch-norm statistics are those of ``X``."""
    model = small_model(**options).train()
    with torch.no_grad():
        for _ in range(3):
            model(pixels_for(model, X))
    return model


def weights_of(model):
    return {name: value.cpu().clone() for name, value in model.state_dict().items()}


def equal_weights(first, second):
    first, second = weights_of(first), weights_of(second)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def parameter_count(model):
    return sum(p.numel() for p in model.parameters())


# --- Network ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "count"), [(64, 11_173_962), (42, 4_815_940)])
def test_resnet18_has_the_published_number_of_parameters(width, count):
    assert parameter_count(ResNet18(10, width)) == count


def test_one_logit_comes_out_per_class_and_features_are_eight_widths_wide():
    model = small_model(width=5, num_classes=7).eval()
    images = pixels_for(model, noise(3, size=32))
    assert model(images).shape == (3, 7)
    assert model.features(images).shape == (3, 40)
    assert (model.num_classes, model.width) == (7, 5)


def test_an_image_is_halved_by_averaging_and_an_odd_side_keeps_its_last_place():
    halving = [block for block in small_model().blocks if not isinstance(block.pool, torch.nn.Identity)]
    assert len(halving) == 3
    maps = torch.arange(10.0).view(1, 1, 2, 5)
    for block in halving:
        assert block.pool(maps).tolist() == [[[[3.0, 5.0, 6.5]]]]
        assert block.conv1.stride == block.shortcut[0].stride == (1, 1)


def test_uint8_and_float_pixels_give_the_same_logits():
    model = small_model().eval()
    images = pixels_for(model, X)
    assert torch.equal(model(images), model(images.float()))


def test_normalisation_belongs_to_the_saved_state():
    mean, std = channel_statistics(X)
    other = ResNet18(10, 4)
    other.load_state_dict(small_model().state_dict())
    assert other.mean.flatten().tolist() == pytest.approx(mean)
    assert other.std.flatten().tolist() == pytest.approx(std)


def test_a_normalised_network_ignores_an_affine_change_of_pixels(float32):
    model = small_model().eval()
    images = pixels_for(model, X).float()
    mean, std = torch.tensor(channel_statistics(X), device=images.device).view(2, 1, 3, 1, 1)
    same = create_classifier(10, 4, ([0.0] * 3, [1.0] * 3), seed=0).eval()
    assert torch.allclose(model(images), same((images - mean) / std), atol=1e-5)


def test_initial_weights_follow_the_seed_alone_and_leave_the_callers_generator():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = small_model(seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert equal_weights(first, small_model(seed=0))
    assert not equal_weights(first, small_model(seed=1))


@pytest.mark.parametrize(("num_classes", "width"), [(1, 4), (10, 0)])
def test_a_network_without_width_or_with_one_class_is_refused(num_classes, width):
    with pytest.raises(ValueError, match="width must be at least 1 and num_classes at least 2"):
        ResNet18(num_classes, width)


def test_channel_statistics_are_numpys_in_float64():
    images = np.random.default_rng(0).integers((0, 50, 190), (60, 256, 203), (9, 8, 6, 3)).astype(np.uint8)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx(images.astype(np.float64).mean(axis=(0, 1, 2)), rel=1e-12)
    assert std == pytest.approx(images.astype(np.float64).std(axis=(0, 1, 2)), rel=1e-10)


def test_constant_images_can_be_normalised():
    grey = np.full((4, 16, 16, 3), 255, dtype=np.uint8)
    model = create_classifier(10, 4, channel_statistics(grey), seed=0)
    assert channel_statistics(grey) == ([255] * 3, [1] * 3)
    assert np.isfinite(evaluate_classifier(model, grey, np.zeros(4, dtype=int)).logits).all()


# --- Muon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_muon_moves_each_kernel_by_a_nearly_orthogonal_matrix(layout):
    # Kernels of 6 rows and 2 x 3 x 3 columns. All singular values of the update are near the rate.
    kernel = torch.nn.Parameter(torch.randn(6, 2, 3, 3).contiguous(memory_format=layout))
    before, kernel.grad = kernel.detach().clone(), torch.randn(6, 2, 3, 3).contiguous(memory_format=layout)
    optimizer = KernelMuon([kernel], lr=0.1, momentum=0.0, weight_decay=0.0, iterations=5)
    optimizer.step()
    update = (before - kernel.detach()).flatten(1)
    assert torch.linalg.svdvals(update) == pytest.approx(np.full(6, 0.1), rel=0.4)
    assert (update * kernel.grad.flatten(1)).sum() > 0, "it goes down the gradient"
    # The polar factor of the gradient, found by another way than Muon's iteration.
    u, _, v = torch.linalg.svd(kernel.grad.flatten(1), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(update.flatten(), (u @ v).flatten(), dim=0) > 0.95


class PlainMuon:
    """One kernel after another, in float32: what :class:`KernelMuon` computes for many together."""

    def __init__(self, kernels, lr, momentum, weight_decay, iterations):
        self.kernels, self.lr, self.momentum, self.weight_decay = kernels, lr, momentum, weight_decay
        self.iterations = iterations
        self.means = [torch.zeros_like(kernel.flatten(1)) for kernel in kernels]

    @torch.no_grad()
    def step(self):
        for kernel, mean in zip(self.kernels, self.means, strict=True):
            gradient = kernel.grad.flatten(1)
            mean.lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(mean, self.momentum)
            tall = len(x) > x.shape[1]
            x = x.T if tall else x
            x = x / x.norm()
            for _ in range(self.iterations):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            x = (x.T if tall else x).reshape(kernel.shape)
            kernel.mul_(1 - self.lr * self.weight_decay)
            kernel.sub_(self.lr * max(1, len(kernel) / (kernel[0].numel())) ** 0.5 * x)


# Two that can be put together as they are, one of the same rows, a tall one, one that is like no other.
SHAPES = ((6, 2, 3, 3), (6, 2, 3, 3), (6, 1, 3, 3), (9, 6, 1, 1), (4, 5, 3, 3))
OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "iterations": 3}


def random_kernels(layout=torch.contiguous_format):
    random = torch.Generator().manual_seed(0)
    kernels = [torch.randn(shape, generator=random).contiguous(memory_format=layout) for shape in SHAPES]
    return list(map(torch.nn.Parameter, kernels))


def step_with_random_gradients(optimizers, seed):
    random = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=random) for shape in SHAPES]
    for optimizer in optimizers:
        for kernel, gradient in zip(optimizer.kernels, gradients, strict=True):
            kernel.grad = gradient.clone()
        optimizer.step()


def fill_up_stacks(monkeypatch):
    """Put kernels together as on a GPU."""
    make = Muon._make_stacks
    monkeypatch.setattr(Muon, "_make_stacks", lambda matrices, state, filled: make(matrices, state, True))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("filled", [True, False])
def test_kernels_together_move_as_one_after_another(monkeypatch, filled, layout):
    monkeypatch.setattr("Muon.half_precision", lambda device: None)
    if filled:
        fill_up_stacks(monkeypatch)
    together = KernelMuon(random_kernels(layout), **OPTIONS)
    alone = PlainMuon(random_kernels(), **OPTIONS)
    for seed in range(4):
        step_with_random_gradients([together, alone], seed)
    assert len(together._stacks) == (2 if filled else 3)
    for kernel, expected in zip(together.kernels, alone.kernels, strict=True):
        torch.testing.assert_close(kernel, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_muon_is_that_of_pytorch(half, monkeypatch):
    monkeypatch.setattr("Muon.half_precision", lambda device: half)
    ours = KernelMuon(random_kernels(), **OPTIONS)
    matrices = [torch.nn.Parameter(kernel.detach().flatten(1)) for kernel in random_kernels()]
    theirs = torch.optim.Muon(matrices, lr=0.05, momentum=0.9, weight_decay=0.1, ns_steps=3)
    for seed in range(4):
        step_with_random_gradients([ours], seed)
        for kernel, matrix in zip(ours.kernels, matrices, strict=True):
            matrix.grad = kernel.grad.flatten(1)
        theirs.step()
    for kernel, matrix in zip(ours.kernels, matrices, strict=True):
        torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=4e-3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16, None])
def test_tiny_gradients_move_kernels_as_much_as_large_ones(half, monkeypatch):
    """Muon's steps do not depend on the gradients' size; float16 would make zeros of these."""
    monkeypatch.setattr("Muon.half_precision", lambda device: half)
    tiny = KernelMuon(random_kernels(), **OPTIONS | {"weight_decay": 0.0})
    before = [kernel.detach().clone() for kernel in tiny.kernels]
    for kernel in tiny.kernels:
        kernel.grad = 1e-7 * torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1))
    tiny.step()
    for kernel, old in zip(tiny.kernels, before, strict=True):
        moved = torch.linalg.svdvals((kernel.detach() - old).flatten(1))
        assert moved.max() > 0.5 * 0.05


@pytest.mark.parametrize("filled", [True, False])
def test_muons_state_has_a_momentum_for_each_kernel_and_comes_back(monkeypatch, filled):
    first, second = (KernelMuon(random_kernels(), **OPTIONS) for _ in range(2))
    step_with_random_gradients([first], 0)
    state = first.state_dict()["state"]
    assert [tuple(state[n]["momentum_buffer"].shape) for n in range(len(SHAPES))] == [
        (shape[0], math.prod(shape[1:])) for shape in SHAPES
    ]
    if filled:  # a checkpoint of a CPU goes on on a GPU
        fill_up_stacks(monkeypatch)
    torch.save(first.state_dict(), "muon.pt")
    for kernel, other in zip(second.kernels, first.kernels, strict=True):
        kernel.data.copy_(other)
    second.load_state_dict(torch.load("muon.pt", weights_only=True))
    step_with_random_gradients([first, second], 1)
    for kernel, other in zip(second.kernels, first.kernels, strict=True):
        torch.testing.assert_close(kernel, other, rtol=0, atol=1e-3)


# --- Evaluation ---------------------------------------------------------------------------------


def test_evaluation_equals_a_direct_computation(float32):
    model = used_model()
    evaluation = evaluate_classifier(model, X, y)
    with torch.no_grad():
        logits = model.eval()(pixels_for(model, X)).cpu().double().numpy()
    likelihood = np.exp(logits)
    probability = likelihood[np.arange(20), y] / likelihood.sum(axis=1)
    assert np.allclose(evaluation.logits, logits, rtol=1e-3, atol=1e-4)
    assert evaluation.loss == pytest.approx(-np.log(probability).mean(), rel=1e-3)
    assert np.array_equal(evaluation.predictions, evaluation.logits.argmax(axis=1))
    assert evaluation.predictions.dtype == np.int64


def test_images_of_unknown_classes_have_the_same_logits():
    model = used_model()
    logits = predict_logits(model, X[::-1], batch_size=7)
    assert logits.dtype == np.float32
    assert np.array_equal(logits, evaluate_classifier(model, X[::-1], y[::-1], batch_size=7).logits)
    with pytest.raises(TypeError, match="X must hold uint8 pixels"):
        predict_logits(model, X / 255)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(training):
    model = small_model().train(training)
    before = weights_of(model)
    evaluate_classifier(model, X, y)
    assert model.training is model.blocks.training is training
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())


@pytest.mark.parametrize("batch_size", [1, 7, 20])
def test_evaluation_does_not_depend_on_the_batch_size(float32, batch_size):
    model = small_model()
    whole, parts = evaluate_classifier(model, X, y), evaluate_classifier(model, X, y, batch_size=batch_size)
    assert np.allclose(whole.logits, parts.logits, atol=1e-4)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-4)


@pytest.mark.parametrize("step", [2, -1])
def test_every_other_or_reversed_rows_can_be_evaluated(step):
    model = small_model()
    views = evaluate_classifier(model, X[::step], y[::step])
    copies = evaluate_classifier(model, X[::step].copy(), y[::step].copy())
    assert views.loss == copies.loss and np.array_equal(views.logits, copies.logits)


def test_a_network_can_be_trained_after_its_evaluation():
    """Its weights must not have become inference tensors, which have no gradient."""
    model = small_model()
    evaluate_classifier(model, X, y)
    model(pixels_for(model, X)).sum().backward()
    assert all(weights.grad is not None for weights in model.parameters())


@pytest.mark.parametrize("name", ["cpu", None])
def test_evaluation_stays_on_the_device_of_the_model(device, name):
    model = small_model(device=name)
    evaluate_classifier(model, X, y)
    assert {value.device.type for value in model.state_dict().values()} == {name or device.type}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_predictions(value):
    """argmax takes NaN for the largest, and so every image for one class."""
    model = small_model()
    model.head.bias.data[3] = value
    with pytest.raises(ValueError, match="Logits of the classifier: NaN or infinity.*train or load it again"):
        evaluate_classifier(model, X, y)


# --- Files --------------------------------------------------------------------------------------


class Intruder:
    """Its pickle creates a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("intruded"),)


def write_bad_file(kind, path="bad.pt"):
    if kind == "truncated":
        save_classifier(small_model(), path)
        Path(path).write_bytes(Path(path).read_bytes()[:-2000])
    elif kind == "empty":
        Path(path).touch()
    elif kind == "text":
        Path(path).write_text("accuracy,0.9\n")
    elif kind == "another torch file":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "a pickled object":
        torch.save(Intruder(), path)


BAD_FILES = ["truncated", "empty", "text", "another torch file", "a pickled object"]
REFUSED = (
    r"bad\.pt is (damaged or no file of this project|not the expected kind of file: it lacks ).*Remove it"
)


def test_a_saved_network_predicts_as_before():
    model = used_model(width=6)
    save_classifier(model, "deep/down/model.pt")
    loaded = load_classifier("deep/down/model.pt")
    assert not loaded.training
    assert equal_weights(model, loaded)
    assert np.array_equal(evaluate_classifier(loaded, X, y).logits, evaluate_classifier(model, X, y).logits)


def test_numpy_integers_as_shape_come_back_from_a_file():
    save_classifier(ResNet18(np.int64(7), np.int64(4)), "model.pt")
    loaded = load_classifier("model.pt")
    assert (loaded.num_classes, loaded.width) == (7, 4)


def test_the_number_of_classes_of_numpy_labels_comes_back_from_a_file():
    save_classifier(
        create_classifier(y.max() + 1, np.int32(4), channel_statistics(X), np.int64(0)), "model.pt"
    )
    assert equal_weights(load_classifier("model.pt"), small_model())


@pytest.mark.parametrize(
    ("name", "value"), [("head.weight", "nan"), ("norm.running_var", "inf"), ("std", "nan")]
)
def test_weights_that_are_not_finite_are_neither_written_nor_read(name, value):
    model = small_model()
    save_classifier(model, "model.pt")
    content = torch.load("model.pt")
    for weights in (model.state_dict(), content["model"]):
        weights[name].view(-1)[0] = float(value)
    with pytest.raises(ValueError, match="classifier's weights: NaN or infinity.*Train it again"):
        save_classifier(model, "broken.pt")
    assert not Path("broken.pt").exists()
    torch.save(content, "broken.pt")
    with pytest.raises(ValueError, match=r"weights in broken\.pt: NaN or infinity.*Remove it and run again"):
        load_classifier("broken.pt")


@pytest.mark.parametrize(
    "change", [{"width": "wide"}, {"num_classes": None}, {"width": 0}, {"model": [1]}], ids=str
)
def test_a_file_with_impossible_sizes_is_refused_in_one_line(change):
    save_classifier(small_model(), "model.pt")
    torch.save(torch.load("model.pt") | change, "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt does not fit a ResNet-18 .*Remove it") as caught:
        load_classifier("model.pt")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.pt"):
        load_classifier("nowhere.pt")


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_damaged_or_foreign_file_is_refused_and_never_run_as_code(kind):
    write_bad_file(kind)
    with pytest.raises(ValueError, match=REFUSED):
        load_classifier("bad.pt")
    assert not Path("intruded").exists()


def test_weights_of_another_width_than_stated_are_refused():
    save_classifier(small_model(width=4), "mixed.pt")
    torch.save(torch.load("mixed.pt") | {"width": 8}, "mixed.pt")
    with pytest.raises(ValueError, match=r"mixed\.pt does not fit a ResNet-18 of width 8"):
        load_classifier("mixed.pt")


def test_weights_of_a_network_that_may_have_had_strides_are_refused():
    """They would fit, and be wrong: the shapes of the weights do not tell strides from pooling."""
    save_classifier(small_model(), "old.pt")
    content = torch.load("old.pt")
    torch.save(content | {"downsampling": "strides"}, "strided.pt")
    with pytest.raises(ValueError, match=r"strided\.pt holds a network with strides .*Remove it"):
        load_classifier("strided.pt")
    del content["downsampling"]
    torch.save(content, "old.pt")
    with pytest.raises(ValueError, match=r"old\.pt .*lacks downsampling.*Remove it"):
        load_classifier("old.pt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(monkeypatch):
    save_classifier(small_model(seed=0), "model.pt")

    def fill_the_disk(content, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match=r"model\.pt.*No space left"):
        save_classifier(small_model(seed=1), "model.pt")
    assert [path.name for path in Path().iterdir()] == ["model.pt"]
    assert equal_weights(load_classifier("model.pt"), small_model(seed=0))


# --- Cosine head --------------------------------------------------------------------------------


def test_a_cosine_head_gives_cosines_and_survives_a_file():
    model = create_classifier(7, 4, channel_statistics(X), 0, "cpu", cosine_head=True).eval()
    images = torch.from_numpy(noise(3, 32)).permute(0, 3, 1, 2)
    features, weight = model.features(images), model.head.weight
    expected = features @ weight.T / features.norm(dim=1, keepdim=True) / weight.norm(dim=1)
    assert torch.allclose(model(images), expected, atol=1e-5) and model(images).abs().max() <= 1
    save_classifier(model, "cosine.pt")
    assert torch.equal(load_classifier("cosine.pt", "cpu")(images), model(images))


def test_labels_that_the_network_lacks_and_images_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="Labels run from .* to 10 in y, but there are classes 0 to 9"):
        evaluate_classifier(small_model(), X, y + 1)
    for images in (X[..., 0], X / 255, X.transpose(0, 3, 1, 2)):
        with pytest.raises((TypeError, ValueError), match="X must h"):
            channel_statistics(images)

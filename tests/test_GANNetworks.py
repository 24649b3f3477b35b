"""The GAN's networks, its augmentation, the averaged generator, and the files of both networks."""

import contextlib
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

import GANNetworks
from ClassifierNetwork import create_classifier, save_classifier
from GANNetworks import (
    ConditionalBatchNorm,
    Discriminator,
    Generator,
    diff_augment,
    load_discriminator,
    load_generator,
    sample_images,
    save_discriminator,
    save_generator,
    settle_statistics,
    update_average,
)
from Runtime import choose_device


def tiny_generator(trained=(0, 1, 2), num_classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = Generator(num_classes, latent_size=8, channels=4).eval()
    generator.trained_classes[list(trained)] = True
    return generator.to(choose_device())  # the one under test, and load_generator's default


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def random(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


# --- Networks -------------------------------------------------------------------------------------


def test_the_generator_makes_32x32_images_from_minus_1_to_1(device):
    latents, labels = torch.randn((5, 8), device=device), torch.tensor([0, 1, 2, 0, 1], device=device)
    images = tiny_generator()(10 * latents, labels)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert images.std() > 0


def test_the_score_follows_its_definition(device, monkeypatch):
    """Score and projection: psi(phi(x)) + <embedding of the class, phi(x)> with sum-pooled phi."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    discriminator = Discriminator(3, channels=4).eval().to(device)
    images = torch.randn((2, 3, 32, 32), device=device).clamp(-1, 1)
    labels = torch.tensor([0, 2], device=device)
    x = discriminator.blocks(images)
    phi = torch.relu(x).sum(dim=(2, 3))
    expected = phi @ discriminator.score.weight[0] + discriminator.score.bias
    expected = expected + (phi * discriminator.embedding.weight[labels]).sum(dim=1)
    assert torch.allclose(discriminator(images, labels), expected, atol=1e-5)


def with_pytorchs_spectral_norm(discriminator, monkeypatch):
    """A copy with the same weights and vectors whose layers are normalised one by one, by PyTorch."""
    monkeypatch.setattr(GANNetworks, "_spectral_norm", torch.nn.utils.parametrizations.spectral_norm)
    copy = Discriminator(discriminator.num_classes, discriminator.channels)
    layers = zip(discriminator.normalised_layers(), copy.normalised_layers(), strict=True)
    for ours, theirs in layers:
        theirs.parametrizations.weight.original.data.copy_(ours.parametrizations.weight.original)
        norm, shape = ours.parametrizations.weight[0], theirs.parametrizations.weight.original.shape
        right = norm.right
        if len(shape) == 4:  # PyTorch's columns follow the channels first
            _, channels, height, width = shape
            right = right.view(height, width, channels).permute(2, 0, 1).flatten()
        theirs.parametrizations.weight[0]._u.copy_(norm.left)
        theirs.parametrizations.weight[0]._v.copy_(right)
        if getattr(ours, "bias", None) is not None:
            theirs.bias.data.copy_(ours.bias)
    return copy


def plain_scores(discriminator, images, labels):
    with parametrize.cached():
        features = torch.relu(discriminator.blocks(images)).sum(dim=(2, 3))
        return discriminator.score(features)[:, 0] + (discriminator.embedding(labels) * features).sum(dim=1)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_layers_normalised_together_are_those_of_pytorch_with_the_same_gradients(layout, monkeypatch):
    discriminator = Discriminator(3, channels=4).to(memory_format=layout)
    plain = with_pytorchs_spectral_norm(discriminator, monkeypatch)
    labels = torch.tensor([0, 2, 1])
    for seed in range(3):  # each time with one more power iteration
        images = torch.rand(3, 3, 32, 32, generator=random(seed)) * 2 - 1
        ours, theirs = discriminator(images, labels), plain_scores(plain, images, labels)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    discriminator.zero_grad(), plain.zero_grad()
    for scores in (ours, theirs):
        scores.sin().sum().backward()
    for (name, value), other in zip(discriminator.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
    plain.eval()
    for layer, other in zip(discriminator.eval().normalised_layers(), plain.normalised_layers(), strict=True):
        torch.testing.assert_close(layer.weight, other.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_power_iteration_runs_in_float32_under_autocast(half):
    discriminator = Discriminator(3, channels=4)
    plain = deepcopy(discriminator)
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    seen = []
    discriminator.blocks[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.dtype))
    with torch.autocast("cpu", dtype=half):
        scores = discriminator(images, labels)
    expected = plain(images, labels)
    assert seen == [half], "the convolutions' weights are cast"
    for layer, other in zip(discriminator.normalised_layers(), plain.normalised_layers(), strict=True):
        assert torch.equal(layer.parametrizations.weight[0].left, other.parametrizations.weight[0].left)
        assert layer.parametrizations.weight[0].left.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.1)


def test_weights_are_cast_together_as_autocast_does_one_by_one(device):
    generator, plain = tiny_generator(), tiny_generator()
    latents, labels = torch.randn((5, 8), device=device), torch.tensor([0, 1, 2, 0, 1], device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = generator(latents, labels)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GANNetworks, "half_weights", lambda module: contextlib.nullcontext())
            theirs = plain(latents, labels)
    assert torch.equal(ours, theirs)
    ours.sum().backward(), theirs.sum().backward()
    for (name, value), other in zip(generator.named_parameters(), plain.parameters(), strict=True):
        assert value.dtype == torch.float32 and isinstance(value, torch.nn.Parameter)
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-2, atol=1e-3, msg=name)


def test_each_conditional_norm_gets_the_gains_and_biases_of_its_labels(device):
    generator = tiny_generator()
    norms = [norm for block in generator.blocks for norm in (block.norm1, block.norm2)]
    for norm in norms:
        torch.nn.init.normal_(norm.gain.weight), torch.nn.init.normal_(norm.bias.weight)
    labels = torch.tensor([2, 0, 2, 1], device=device)
    expected = [table(labels) for norm in norms for table in (norm.gain, norm.bias)]
    got = generator._look_up(labels, torch.float32)
    assert len(got) == len(expected) and all(map(torch.equal, got, expected))
    x = torch.randn((4, 8, 3, 3), device=device, requires_grad=True)
    gain, bias = torch.randn((2, 4, 8), device=device, requires_grad=True)
    norm = ConditionalBatchNorm(8, 3).to(device).train()
    expected = norm.norm(x) * gain[:, :, None, None] + bias[:, :, None, None]
    torch.testing.assert_close(norm(x, gain, bias), expected)
    gradients = [torch.autograd.grad(y.sin().sum(), (x, gain, bias)) for y in (norm(x, gain, bias), expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


# --- Differentiable augmentation ------------------------------------------------------------------


def test_diff_augment_leaves_images_unchanged_at_strength_0(device):
    images = torch.rand((6, 3, 32, 32), generator=random(0, device), device=device) * 2 - 1
    assert torch.equal(diff_augment(images, random(1, device), strength=0.0), images)


def test_diff_augment_is_differentiable_and_random(device):
    images = (torch.rand((8, 3, 32, 32), generator=random(0, device), device=device) * 2 - 1).requires_grad_()
    augmented = diff_augment(images, random(1, device))
    assert augmented.shape == images.shape
    augmented.square().sum().backward()
    assert images.grad.isfinite().all()
    assert ((images.grad != 0).float().mean(dim=(1, 2, 3)) > 0.3).all()
    assert torch.equal(diff_augment(images, random(1, device)), augmented)
    assert not torch.equal(diff_augment(images, random(2, device)), augmented)
    same_image_four_times = diff_augment(images[:1].repeat(4, 1, 1, 1), random(0, device))
    assert len({tuple(image.flatten().tolist()) for image in same_image_four_times}) == 4


def plain_augmentation(images, random, strength):
    """Zhao et al.'s three colour changes, the shift and the square, one after another."""
    n, _, size, _ = images.shape
    u = torch.rand((3, n, 1, 1, 1), generator=random) - 0.5
    moved = round(strength * size / 8)
    rows, columns = torch.randint(-moved, moved + 1, (2, n), generator=random).tolist()
    side = round(strength * size / 2)
    tops, lefts = torch.randint(0, size + 1 - side % 2, (2, n), generator=random).tolist()
    images = images + strength * u[0]
    grey = images.mean(dim=1, keepdim=True)
    images = images + (images - grey) * 2 * strength * u[1]
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = images + (images - mean) * strength * u[2]
    padded = torch.nn.functional.pad(images, (size, size, size, size))
    results = []
    for k in range(n):
        top, left = size + rows[k], size + columns[k]
        image = padded[k, :, top : top + size, left : left + size].clone()
        top, left = tops[k] - side // 2, lefts[k] - side // 2
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
        results.append(image)
    return torch.stack(results)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_diff_augment_equals_the_steps_of_the_paper(strength):
    images = (torch.rand(8, 3, 32, 32, generator=random()) * 2 - 1).requires_grad_()
    ours, plain = diff_augment(images, random(1), strength), plain_augmentation(images, random(1), strength)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(result.sin().sum(), images)[0] for result in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_diff_augment_cuts_a_square_of_half_the_size_and_moves_by_an_eighth():
    ones = torch.ones(200, 3, 32, 32)
    augmented = diff_augment(ones, random())
    zeros = (augmented == 0).all(dim=1)
    assert zeros.sum(dim=(1, 2)).max() <= 16 * 16 + 2 * 4 * 32
    assert zeros.sum(dim=(1, 2)).min() >= 8 * 8, "at least a quarter of the square lies inside"
    rows_moved_in = zeros.all(dim=2).sum(dim=1)
    assert rows_moved_in.max() == 4 and rows_moved_in.min() == 0


def test_diff_augment_changes_brightness_by_the_papers_range(device):
    flat = torch.zeros((500, 3, 32, 32), device=device)
    values = diff_augment(flat, random(0, device)).flatten(1)
    shift = torch.where(values.max(dim=1).values > 0, values.max(dim=1).values, values.min(dim=1).values)
    assert shift.min().item() == pytest.approx(-0.5, abs=0.02)
    assert shift.max().item() == pytest.approx(0.5, abs=0.02)


# --- The averaged generator -----------------------------------------------------------------------


def test_the_average_equals_its_definition():
    model, average = tiny_generator(), tiny_generator()
    expected = [p.detach().clone() for p in average.parameters()]
    for step in range(40):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=random(step, p.device), device=p.device))
        update_average(average, model, step, decay=0.6)
        d = min(0.6, (1 + step) / (10 + step))
        expected = [d * e + (1 - d) * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for got, wanted in zip(average.parameters(), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


def test_settled_statistics_normalise_the_generators_own_activations(device):
    generator = tiny_generator()
    labels = torch.arange(3, device=device).repeat(32)
    first = generator.blocks[0].norm1.norm
    first.running_mean.fill_(100.0)
    settle_statistics(generator, labels, seed=0)
    assert not generator.training
    with torch.no_grad():
        x = generator.project(torch.randn((2000, 8), device=device)).view(2000, -1, 4, 4)
    assert torch.allclose(first.running_mean, x.mean(dim=(0, 2, 3)), atol=0.1)
    assert torch.allclose(first.running_var, x.var(dim=(0, 2, 3)), rtol=0.25)


def test_samples_are_seeded_uint8_images_of_any_batch_size(monkeypatch):
    generator = tiny_generator()
    labels = np.array([0, 1, 2, 2, 1])
    images = sample_images(generator, labels, seed=3)
    assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(sample_images(generator, labels, seed=3), images)
    assert not np.array_equal(sample_images(generator, labels, seed=4), images)
    monkeypatch.setattr(GANNetworks, "SAMPLING_BATCH", 2)
    in_twos = sample_images(generator, labels, seed=3).astype(int)
    assert np.abs(in_twos - images).max() <= 1, "up to rounding"


def test_pixels_are_rounded_from_the_generators_range(monkeypatch, device):
    values = torch.tensor([-1.0, 0.0, 1.0], device=device)
    monkeypatch.setattr(
        Generator, "forward", lambda self, z, y: values.view(1, 3, 1, 1).expand(len(y), 3, 32, 32)
    )
    pixels = sample_images(tiny_generator(), [0], seed=0)[0, 0, 0].tolist()
    assert pixels == [0, 128, 255]


def test_truncation_cuts_off_latents_and_makes_images_more_alike(monkeypatch):
    seen, original = [], Generator.forward

    def forward(self, latents, labels):
        seen.append(latents)
        return original(self, latents, labels)

    monkeypatch.setattr(Generator, "forward", forward)
    generator = tiny_generator()
    plain = sample_images(generator, [0] * 300, seed=0)
    truncated = sample_images(generator, [0] * 300, seed=0, truncation=0.5)
    assert seen[0].abs().max() > 2.5
    assert 0.45 < seen[1].abs().max() <= 0.5
    # A standard normal cut off at 0.5 has this standard deviation.
    assert seen[1].std().item() == pytest.approx(0.2834, abs=0.01)
    assert truncated.std(axis=0).mean() < 0.6 * plain.std(axis=0).mean()


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="not trained on class 2; it knows 0, 1"):
        sample_images(tiny_generator(trained=(0, 1)), [0, 2], seed=0)
    with pytest.raises(ValueError, match="truncation is a positive number.* got 0"):
        sample_images(tiny_generator(), [0], seed=0, truncation=0)


def broken(network, name, value=float("nan")):
    """The network with one weight that is not finite."""
    network.state_dict()[name].view(-1)[0] = value
    return network


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_generator_whose_images_are_not_finite_makes_none(value):
    """A cast to uint8 would make a red channel of zeros of this bias."""
    generator = broken(tiny_generator(), "to_image.bias", value)
    if value == float("inf"):
        generator.to_image.weight.data[0] = float("-inf")  # tanh maps infinity alone to a pixel
    with pytest.raises(ValueError, match="generator's images: NaN or infinity.*train or load it again"):
        sample_images(generator, [0, 1], seed=0)


def test_a_numpy_seed_gives_the_same_images():
    images = sample_images(tiny_generator(), [0, 1], seed=3)
    assert np.array_equal(sample_images(tiny_generator(), np.array([0, 1]), seed=np.int64(3)), images)


def test_more_images_than_fit_the_memory_are_refused_before_any_is_made(monkeypatch):
    monkeypatch.setattr(Generator, "forward", lambda *arguments: pytest.fail("an image was made"))
    labels = np.broadcast_to(np.int64(0), 10**8)  # takes no memory itself
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 16 * 10**9}))
    with pytest.raises(MemoryError, match="100,000,000 generated images would take at least .* GB"):
        sample_images(tiny_generator(), labels, seed=0)


# --- Files ----------------------------------------------------------------------------------------


def test_files_give_back_the_same_networks(device):
    generator = tiny_generator(trained=(0, 2))
    save_generator(generator, "generator.pt")
    loaded = load_generator("generator.pt")
    assert not loaded.training and equal(loaded.state_dict(), generator.state_dict())
    discriminator = Discriminator(3, channels=4).eval().to(device, memory_format=torch.channels_last)
    save_discriminator(discriminator, "discriminator.pt")
    loaded = load_discriminator("discriminator.pt")
    images, labels = torch.randn((2, 3, 32, 32), device=device), torch.tensor([0, 1], device=device)
    with torch.no_grad():
        assert torch.equal(loaded(images, labels), discriminator(images, labels))


def test_wrong_files_are_refused():
    with pytest.raises(FileNotFoundError, match=r"no file none\.pt"):
        load_generator("none.pt")
    save_discriminator(Discriminator(3, channels=4), "discriminator.pt")
    with pytest.raises(ValueError, match="not the expected kind of file: it lacks generator, latent_size"):
        load_generator("discriminator.pt")
    save_classifier(create_classifier(3, 4, ((127.5,) * 3, (63.75,) * 3), seed=0), "resnet.pt")
    with pytest.raises(ValueError, match="not the expected kind of file"):
        load_generator("resnet.pt")
    save_generator(tiny_generator(), "generator.pt")
    content = torch.load("generator.pt", weights_only=True)
    torch.save(content | {"channels": 8}, "other.pt")
    with pytest.raises(ValueError, match=r"weights in other\.pt do not fit the generator"):
        load_generator("other.pt")
    for name, value in (
        ("channels", "many"),
        ("latent_size", -1),
        ("generator", [1, 2]),
        ("num_classes", None),
    ):
        torch.save(content | {name: value}, "other.pt")
        with pytest.raises(
            ValueError, match=r"weights in other\.pt do not fit the generator.*Remove it"
        ) as caught:
            load_generator("other.pt")
        assert "\n" not in str(caught.value)
    whole = Path("generator.pt").read_bytes()
    Path("half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pt is damaged"):
        load_generator("half.pt")


@pytest.mark.parametrize(
    ("network", "save", "load", "name"),
    [
        (lambda: tiny_generator(), save_generator, load_generator, "to_image.bias"),
        (lambda: tiny_generator(), save_generator, load_generator, "norm.running_var"),
        (lambda: Discriminator(3, channels=4), save_discriminator, load_discriminator, "score.bias"),
    ],
)
def test_weights_that_are_not_finite_are_neither_written_nor_read(network, save, load, name):
    with pytest.raises(ValueError, match="weights: NaN or infinity.*Train it again"):
        save(broken(network(), name), "broken.pt")
    assert not list(Path().iterdir())
    save(network(), "network.pt")
    content = torch.load("network.pt", weights_only=True)
    content["generator" if save is save_generator else "discriminator"][name].view(-1)[0] = float("nan")
    torch.save(content, "broken.pt")
    with pytest.raises(
        ValueError, match=r"weights in broken\.pt: NaN or infinity.*Remove it and train again"
    ):
        load("broken.pt")


def test_numpy_integers_as_sizes_come_back_from_a_file():
    sizes = np.int64(3), np.int64(8), np.int64(4)
    save_generator(Generator(*sizes), "generator.pt")
    save_discriminator(Discriminator(np.int64(3), np.int64(4)), "discriminator.pt")
    assert load_generator("generator.pt").num_classes == 3
    assert load_discriminator("discriminator.pt").channels == 4

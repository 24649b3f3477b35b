"""The GAN: its networks, its augmentation, its training, its sampler."""

import dataclasses
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images

import Experiment
import GANGeneration
from ClassifierNetwork import create_classifier, save_classifier
from GANGeneration import (
    GAN_SETTINGS,
    Adversaries,
    BalancedBatches,
    Discriminator,
    GANCollapseError,
    GANOverSampler,
    GANSettings,
    Generator,
    count_flops,
    diff_augment,
    load_discriminator,
    load_generator,
    sample_images,
    save_discriminator,
    save_generator,
    settle_statistics,
    train_gan,
    update_average,
)
from GenerationQuality import ImageFeatures, frechet_distance_to
from ImbalancedCIFAR10 import split_from_name
from Runtime import choose_device

CPU = torch.device("cpu")
TINY = GANSettings(steps=4, batch_size=8, channels=4, latent_size=8, records=4, quality_images=12)


@pytest.fixture
def toy():
    """Three classes told apart by their colour, of 20, 20 and 4 images."""
    y = np.repeat([0, 1, 2], [20, 20, 4])
    return make_images(y, 0), y


def tiny_generator(trained=(0, 1, 2), num_classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = Generator(num_classes, latent_size=8, channels=4).eval()
    generator.trained_classes[list(trained)] = True
    return generator


def weights_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def without_seconds(history):
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in history]


# --- Networks -----------------------------------------------------------------------------------


def test_the_generator_makes_32x32_images_from_minus_1_to_1():
    images = tiny_generator()(10 * torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1]))
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert images.std() > 0


def test_labels_change_the_image_and_the_score(toy):
    adversaries = Adversaries(3, TINY, 0, CPU)
    batches = BalancedBatches(*toy, CPU, flip=True)
    for step in range(3):  # before the first step all classes have the same gains
        adversaries.step(batches, 9, step, 0)
    latents = torch.randn(4, 8)
    first, second = (adversaries.generator.eval()(latents, torch.full((4,), c)) for c in (0, 1))
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    discriminator = adversaries.discriminator.eval()
    scores = [discriminator(first, torch.full((4,), c)) for c in (0, 1)]
    assert scores[0].shape == (4,)
    assert (scores[0] - scores[1]).abs().min() > 1e-6


def test_every_layer_of_the_discriminator_has_a_singular_value_near_1_after_training(toy):
    settings = dataclasses.replace(TINY, steps=30, discriminator_learning_rate=2e-3)
    adversaries = Adversaries(3, settings, 0, CPU)
    before = [layer.weight.detach().clone() for layer in adversaries.discriminator.eval().normalised_layers()]
    batches = BalancedBatches(*toy, CPU, flip=True)
    for step in range(30):
        adversaries.step(batches, 9, step, 0)
    discriminator = adversaries.discriminator.eval()
    layers = discriminator.normalised_layers()
    weighted = [m for m in discriminator.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding))]  # fmt: skip
    assert layers == weighted and len(layers) == 9
    for layer, old in zip(layers, before, strict=True):
        largest = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item()
        assert largest == pytest.approx(1, abs=0.1)
        assert not torch.equal(layer.weight, old)


def test_the_score_follows_its_definition():
    """Score and projection: psi(phi(x)) + <embedding of the class, phi(x)> with sum-pooled phi."""
    discriminator = Discriminator(3, channels=4).eval()
    images, labels = torch.randn(2, 3, 32, 32).clamp(-1, 1), torch.tensor([0, 2])
    x = discriminator.blocks(images)
    phi = torch.relu(x).sum(dim=(2, 3))
    expected = phi @ discriminator.score.weight[0] + discriminator.score.bias
    expected = expected + (phi * discriminator.embedding.weight[labels]).sum(dim=1)
    assert torch.allclose(discriminator(images, labels), expected, atol=1e-5)


def test_the_power_iteration_runs_in_float32_under_autocast(monkeypatch):
    discriminator = Discriminator(3, channels=4)
    seen = []
    original = torch.nn.utils.parametrizations._SpectralNorm.forward

    def spy(self, weight):
        seen.append((weight.dtype, torch.is_autocast_enabled("cpu")))
        return original(self, weight)

    monkeypatch.setattr(torch.nn.utils.parametrizations._SpectralNorm, "forward", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        discriminator(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
    assert seen == [(torch.float32, False)] * 9, "once for each layer"


# --- Differentiable augmentation ----------------------------------------------------------------


def test_diff_augment_leaves_images_unchanged_at_strength_0():
    images = torch.rand(6, 3, 32, 32, generator=random()) * 2 - 1
    assert torch.equal(diff_augment(images, random(1), strength=0.0), images)


def test_diff_augment_is_differentiable_and_random():
    images = (torch.rand(8, 3, 32, 32, generator=random()) * 2 - 1).requires_grad_()
    augmented = diff_augment(images, random(1))
    assert augmented.shape == images.shape
    augmented.square().sum().backward()
    assert images.grad.isfinite().all()
    assert ((images.grad != 0).float().mean(dim=(1, 2, 3)) > 0.3).all()
    assert torch.equal(diff_augment(images, random(1)), augmented)
    assert not torch.equal(diff_augment(images, random(2)), augmented)
    assert (
        len(
            {
                tuple(image.flatten().tolist())
                for image in diff_augment(images[:1].repeat(4, 1, 1, 1), random())
            }
        )
        == 4
    )


def test_diff_augment_cuts_a_square_of_half_the_size_and_moves_by_an_eighth():
    ones = torch.ones(200, 3, 32, 32)
    augmented = diff_augment(ones, random())
    zeros = (augmented == 0).all(dim=1)
    assert zeros.sum(dim=(1, 2)).max() <= 16 * 16 + 2 * 4 * 32
    assert zeros.sum(dim=(1, 2)).min() >= 8 * 8, "a quarter of the square at least lies inside"
    rows_moved_in = zeros.all(dim=2).sum(dim=1)
    assert rows_moved_in.max() == 4 and rows_moved_in.min() == 0


def test_diff_augment_changes_brightness_by_the_papers_range():
    flat = torch.zeros(500, 3, 32, 32)
    values = diff_augment(flat, random()).flatten(1)
    shift = torch.where(values.max(dim=1).values > 0, values.max(dim=1).values, values.min(dim=1).values)
    assert shift.min() == pytest.approx(-0.5, abs=0.02) and shift.max() == pytest.approx(0.5, abs=0.02)


# --- Batches, average, statistics ---------------------------------------------------------------


def test_batches_hold_every_class_equally_often_and_only_given_images(toy):
    X, y = toy
    batches = BalancedBatches(X, y, CPU, flip=False)
    given = {(int(label), image.tobytes()) for image, label in zip(X, y, strict=True)}
    counts = np.zeros(3, dtype=int)
    rare = set()
    for seed in range(20):
        images, labels = batches.draw(9, random(seed))
        counts += np.bincount(labels, minlength=3)
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        drawn = [(int(label), image.tobytes()) for image, label in zip(pixels, labels, strict=True)]
        assert set(drawn) <= given
        rare |= {item for item in drawn if item[0] == 2}
    assert counts.tolist() == [60, 60, 60]
    assert len(rare) == 4, "all images of the rare class are used"


def test_half_of_the_real_images_are_mirrored(toy):
    X, y = toy
    plain, _ = BalancedBatches(X, y, CPU, flip=False).draw(300, random())
    mirrored, _ = BalancedBatches(X, y, CPU, flip=True).draw(300, random())
    same = (plain == mirrored).all(dim=(1, 2, 3))
    other = (plain.flip(-1) == mirrored).all(dim=(1, 2, 3))
    assert (same | other).all()
    assert 110 < same.sum() < 190


def test_the_average_equals_its_definition():
    model, average = tiny_generator(), tiny_generator()
    expected = [p.detach().clone() for p in average.parameters()]
    for step in range(40):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=random(step)))
        update_average(average, model, step, decay=0.6)
        d = min(0.6, (1 + step) / (10 + step))
        expected = [d * e + (1 - d) * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for got, wanted in zip(average.parameters(), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


def test_training_averages_the_generator_at_every_step(toy):
    adversaries = Adversaries(3, TINY, 0, CPU)
    batches = BalancedBatches(*toy, CPU, flip=True)
    expected = deepcopy(adversaries.average)
    for step in range(3):
        adversaries.step(batches, 9, step, 0)
        update_average(expected, adversaries.generator, step, TINY.ema_decay)
    assert equal(dict(adversaries.average.named_parameters()), dict(expected.named_parameters()))
    assert not equal(dict(expected.named_parameters()), dict(adversaries.generator.named_parameters()))


def test_settled_statistics_normalise_the_generators_own_activations():
    generator = tiny_generator()
    labels = torch.arange(3).repeat(32)
    first = generator.blocks[0].norm1.norm
    first.running_mean.fill_(100.0)
    settle_statistics(generator, labels, seed=0)
    assert not generator.training
    with torch.no_grad():
        x = generator.project(torch.randn(2000, 8)).view(2000, -1, 4, 4)
    assert torch.allclose(first.running_mean, x.mean(dim=(0, 2, 3)), atol=0.1)
    assert torch.allclose(first.running_var, x.var(dim=(0, 2, 3)), rtol=0.25)


# --- Training -----------------------------------------------------------------------------------


def test_history_and_snapshots_describe_the_run(toy):
    run = train_gan(*toy, TINY, seed=0)
    assert [record["step"] for record in run.history] == [1, 2, 3, 4]
    assert [record["images_seen"] for record in run.history] == [8, 16, 24, 32]
    assert run.snapshots.shape == (4, 3, 32, 32, 3) and run.snapshots.dtype == np.uint8
    assert not np.array_equal(run.snapshots[0], run.snapshots[-1])
    assert run.best_step == 4 and all(record["quality"] is None for record in run.history)
    assert run.generator.trained_classes.tolist() == [True] * 3


def test_the_same_seed_gives_the_same_generator(toy):
    first, same, other = (train_gan(*toy, TINY, seed=seed).generator.state_dict() for seed in (1, 1, 2))
    assert equal(first, same)
    assert not equal(first, other)


def test_the_best_record_by_the_given_measure_is_returned(toy):
    judged = []

    def quality(images, labels):
        assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8
        assert np.bincount(labels).tolist() == [4, 4, 4]
        judged.append(images)
        return [3.0, 1.0, 2.0, 2.0][len(judged) - 1]

    run = train_gan(*toy, TINY, seed=0, quality=quality)
    assert run.best_step == 2
    assert [record["quality"] for record in run.history] == [3.0, 1.0, 2.0, 2.0]
    # The chosen weights make the very images that were judged best.
    labels = np.resize([0, 1, 2], 12)
    images = sample_images(run.generator, labels, seed=GANGeneration.derive_seed(0, 3))
    assert np.array_equal(images, judged[1])


@pytest.mark.parametrize("killed_at", [3, 4, 7])
def test_a_killed_training_continues_to_the_same_generator(toy, monkeypatch, killed_at):
    settings = dataclasses.replace(TINY, steps=9, records=3)

    def quality(images, labels):
        return float(images.mean())

    whole = train_gan(*toy, settings, seed=0, quality=quality)

    class KilledError(Exception):
        pass

    original, steps = Adversaries.step, []

    def step(self, batches, batch_size, step, seed):
        steps.append(step)
        if len(steps) == killed_at + 1:
            raise KilledError
        return original(self, batches, batch_size, step, seed)

    monkeypatch.setattr(Adversaries, "step", step)
    with pytest.raises(KilledError):
        train_gan(*toy, settings, seed=0, quality=quality, checkpoint="gan.pt")
    assert Path("gan.pt").exists()
    resumed = train_gan(*toy, settings, seed=0, quality=quality, checkpoint="gan.pt")
    last_record = killed_at // 3 * 3
    assert steps == [*range(killed_at + 1), *range(last_record, 9)], "finished records are not repeated"
    assert equal(resumed.generator.state_dict(), whole.generator.state_dict())
    assert equal(resumed.discriminator.state_dict(), whole.discriminator.state_dict())
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert np.array_equal(resumed.snapshots, whole.snapshots)
    # The checkpoint holds the finished run until whoever asked for it has saved the outcome.
    del steps[:]
    again = train_gan(*toy, settings, seed=0, quality=quality, checkpoint="gan.pt")
    assert not steps and equal(again.generator.state_dict(), whole.generator.state_dict())


def test_a_checkpoint_keeps_the_halved_batch_and_the_dead_steps(toy, monkeypatch):
    monkeypatch.setattr(GANGeneration, "DEAD_STEPS", 4)
    sizes = []

    def step(self, batches, batch_size, step, seed):
        sizes.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if step == 3 and len(sizes) < 6:
            raise KeyboardInterrupt
        return torch.tensor([0.0, 1.0, 0.0, 0.0], device=batches.device)

    monkeypatch.setattr(Adversaries, "step", step)
    with pytest.raises(KeyboardInterrupt), pytest.warns(RuntimeWarning, match="halved to 4"):
        train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")
    with pytest.raises(GANCollapseError, match="for 4 steps up to step 4"):
        train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")
    assert sizes == [8, 4, 4, 4, 4, 4]


def test_a_checkpoint_of_other_networks_is_refused(toy, monkeypatch):
    leave_checkpoint(toy, monkeypatch)
    content = torch.load("gan.pt", weights_only=True)
    del content["adversaries"]["discriminator"]["score.bias"]
    torch.save(content, "gan.pt")
    with pytest.raises(
        ValueError, match=r"networks in the checkpoint gan\.pt are built differently. Remove it"
    ):
        train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")


def leave_checkpoint(toy, monkeypatch):
    original = Adversaries.step

    def step(self, batches, batch_size, step, seed):
        if step == 2:
            raise KeyboardInterrupt
        return original(self, batches, batch_size, step, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Adversaries, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")


def test_a_checkpoint_of_another_run_is_refused(toy, monkeypatch):
    leave_checkpoint(toy, monkeypatch)
    with pytest.raises(ValueError, match="belongs to another run .seed: 0 there, 1 now.*Remove it"):
        train_gan(*toy, TINY, seed=1, checkpoint="gan.pt")
    X, y = toy
    with pytest.raises(ValueError, match="checksum"):
        train_gan(255 - X, y, TINY, seed=0, checkpoint="gan.pt")


def test_a_damaged_checkpoint_is_named(toy):
    Path("gan.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match=r"gan\.pt is damaged"):
        train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")


def test_a_few_hundred_steps_on_a_toy_set_beat_the_untrained_generator():
    y = np.repeat([0, 1, 2], [60, 60, 10])
    X = make_images(y, 0)
    settings = GANSettings(
        steps=250, batch_size=12, channels=8, latent_size=8, records=2, ema_decay=0.9, quality_images=150,
        generator_learning_rate=2e-3, discriminator_learning_rate=4e-3,
    )  # fmt: skip

    def pooled(pixels):
        return torch.nn.functional.avg_pool2d(pixels.float() / 255, 16).flatten(1)

    distance = frechet_distance_to(X[np.resize(np.argsort(y), 150)], ImageFeatures(pooled, "2x2 means", CPU))
    run = train_gan(X, y, settings, seed=0, quality=lambda images, labels: distance(images))
    untrained = Adversaries(3, settings, 0, CPU).average
    untrained.trained_classes[:] = True
    settle_statistics(untrained, torch.arange(3).repeat(20), 0)
    labels = np.resize([0, 1, 2], 150)
    assert distance(sample_images(run.generator, labels, seed=1)) < 0.3 * distance(
        sample_images(untrained, labels, seed=1)
    )
    # Each class's images have that class's colours.
    real = np.stack([X[y == c].mean(axis=(0, 1, 2)) for c in range(3)])
    made = np.stack([sample_images(run.generator, [c] * 20, seed=2).mean(axis=(0, 1, 2)) for c in range(3)])
    apart = np.linalg.norm(made[:, None] - real[None], axis=2)
    assert apart.argmin(axis=1).tolist() == [0, 1, 2]


def test_flops_are_counted_and_grow_with_batch_and_width():
    flops = count_flops(TINY)
    assert count_flops(dataclasses.replace(TINY, batch_size=16)) == 2 * flops
    assert count_flops(dataclasses.replace(TINY, channels=8)) > 2 * flops
    assert 5e14 < count_flops(GAN_SETTINGS["cpu"]) * GAN_SETTINGS["cpu"].steps < 7e14


# --- Bad input, collapse, memory ----------------------------------------------------------------


def test_bad_training_data_is_one_clear_error(toy):
    X, y = toy
    with pytest.raises(ValueError, match="32x32 pixels, but X has the shape .44, 28, 28, 3."):
        train_gan(np.ascontiguousarray(X[:, :28, :28]), y, TINY, seed=0)
    with pytest.raises(ValueError, match="Class 2 has one image.*at least 2"):
        train_gan(X[:41], y[:41], TINY, seed=0)
    with pytest.raises(ValueError, match="Labels run from 0 to 2, but a GAN of 2 classes"):
        train_gan(X, y, TINY, seed=0, num_classes=2)
    with pytest.raises(TypeError, match="uint8"):
        train_gan(X / 255, y, TINY, seed=0)
    for field, value, least in (
        ("batch_size", 1, 4), ("records", 0, 1), ("discriminator_steps", 0, 1), ("quality_images", 2, 3),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{field} must be at least {least}: got {value}"):
            train_gan(X, y, dataclasses.replace(TINY, **{field: value}), seed=0)


def with_losses(monkeypatch, values):
    original = Adversaries.step

    def step(self, batches, batch_size, step, seed):
        return original(self, batches, batch_size, step, seed).new_tensor(values)

    monkeypatch.setattr(Adversaries, "step", step)


def test_a_loss_that_is_not_finite_is_a_collapse(toy, monkeypatch):
    with_losses(monkeypatch, [1.0, float("nan"), 0.0, 0.0])
    with pytest.raises(GANCollapseError, match="stopped being finite by step 1.*learning rates"):
        train_gan(*toy, TINY, seed=0)


def test_a_discriminator_at_zero_loss_for_long_is_a_collapse_but_not_for_short(toy, monkeypatch):
    monkeypatch.setattr(GANGeneration, "DEAD_STEPS", 4)
    with_losses(monkeypatch, [0.0, 1.0, 0.0, 0.0])
    settings = dataclasses.replace(TINY, records=1)
    with pytest.raises(GANCollapseError, match="was below 0.001 for 4 steps up to step 4"):
        train_gan(*toy, settings, seed=0)
    train_gan(*toy, dataclasses.replace(settings, steps=3), seed=0)


def test_zero_loss_is_counted_across_records(toy, monkeypatch):
    monkeypatch.setattr(GANGeneration, "DEAD_STEPS", 4)
    with_losses(monkeypatch, [0.0, 1.0, 0.0, 0.0])
    with pytest.raises(GANCollapseError, match="for 4 steps"):
        train_gan(*toy, TINY, seed=0)  # four records of one step


def test_a_generator_that_ignores_its_latent_is_a_collapse(toy, monkeypatch):
    monkeypatch.setattr(
        Generator, "forward", lambda self, latents, labels: latents.new_zeros(len(labels), 3, 32, 32) + self.norm.weight.sum() * 0,
    )  # fmt: skip
    monkeypatch.setattr(GANGeneration, "settle_statistics", lambda *arguments: None)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)  # hardly any weight has a gradient
    with pytest.raises(
        GANCollapseError, match="By step 1 the generator makes the same image of class 0, 1, 2"
    ):
        train_gan(*toy, TINY, seed=0)


def test_a_single_class_that_ignores_its_latent_is_a_collapse():
    generator, original = tiny_generator(), Generator.forward

    def forward(latents, labels):
        images = original(generator, latents, labels)
        return torch.where((labels == 2)[:, None, None, None], torch.zeros(()), images)

    generator.forward = forward
    with pytest.raises(GANCollapseError, match="same image of class 2 whatever"):
        GANGeneration._snapshot(generator, torch.arange(3), 0, 7)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory (...)")]
)
def test_a_full_memory_halves_the_batch_and_says_so(toy, monkeypatch, error):
    sizes, original = [], Adversaries.step

    def step(self, batches, batch_size, step, seed):
        sizes.append((step, batch_size))
        if batch_size > 4:
            raise error
        return original(self, batches, batch_size, step, seed)

    monkeypatch.setattr(Adversaries, "step", step)
    with pytest.warns(RuntimeWarning, match="ran out of memory: the batch is halved to 4 from step 0 on"):
        run = train_gan(*toy, TINY, seed=0)
    assert sizes == [(0, 8), (0, 4), (1, 4), (2, 4), (3, 4)]
    assert run.history[-1]["batch_size"] == 4 and run.history[-1]["images_seen"] == 16


def test_other_errors_and_a_batch_that_is_small_already_are_raised(toy, monkeypatch):
    def step(self, batches, batch_size, step, seed):
        raise RuntimeError(message)

    monkeypatch.setattr(Adversaries, "step", step)
    message = "a shape is wrong"
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        train_gan(*toy, TINY, seed=0)
    message = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        train_gan(*toy, dataclasses.replace(TINY, batch_size=4), seed=0)


# --- Sampling and files -------------------------------------------------------------------------


def test_samples_are_seeded_uint8_images_whatever_the_batch_size():
    generator = tiny_generator()
    labels = np.array([0, 1, 2, 2, 1])
    images = sample_images(generator, labels, seed=3)
    assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    in_twos = sample_images(generator, labels, seed=3, batch_size=2).astype(int)
    assert np.abs(in_twos - images).max() <= 1, "up to rounding"
    assert np.array_equal(sample_images(generator, labels, seed=3), images)
    assert not np.array_equal(sample_images(generator, labels, seed=4), images)


def test_pixels_are_rounded_from_the_generators_range(monkeypatch):
    values = torch.tensor([-1.0, 0.0, 1.0])
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
    assert seen[1].std() == pytest.approx(0.2834, abs=0.01)
    assert truncated.std(axis=0).mean() < 0.6 * plain.std(axis=0).mean()


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="not trained on class 2; it knows 0, 1"):
        sample_images(tiny_generator(trained=(0, 1)), [0, 2], seed=0)
    with pytest.raises(ValueError, match="truncation is a positive number.* got 0"):
        sample_images(tiny_generator(), [0], seed=0, truncation=0)


def test_sampling_halves_its_batch_if_the_memory_is_full(monkeypatch):
    sizes, original = [], Generator.forward

    def forward(self, latents, labels):
        sizes.append(len(labels))
        if len(labels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, latents, labels)

    expected = sample_images(tiny_generator(), [0] * 7, seed=0)
    monkeypatch.setattr(Generator, "forward", forward)
    with pytest.warns(RuntimeWarning, match="3 images are generated at a time"):
        images = sample_images(tiny_generator(), [0] * 7, seed=0, batch_size=6)
    assert sizes == [6, 3, 3, 1]
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_files_give_back_the_same_networks():
    generator = tiny_generator(trained=(0, 2))
    save_generator(generator, "generator.pt")
    loaded = load_generator("generator.pt", "cpu")
    assert not loaded.training and equal(loaded.state_dict(), generator.state_dict())
    discriminator = Discriminator(3, channels=4).eval()
    save_discriminator(discriminator, "discriminator.pt")
    loaded = load_discriminator("discriminator.pt", "cpu")
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(loaded(images, labels), discriminator(images, labels))


def test_wrong_files_are_refused():
    with pytest.raises(FileNotFoundError, match=r"no file none\.pt"):
        load_generator("none.pt")
    save_discriminator(Discriminator(3, channels=4), "discriminator.pt")
    with pytest.raises(
        ValueError, match="no file of this project for this purpose: it lacks generator, latent_size"
    ):
        load_generator("discriminator.pt")
    save_classifier(create_classifier(3, 4, ((127.5,) * 3, (63.75,) * 3), seed=0), "resnet.pt")
    with pytest.raises(ValueError, match="no file of this project for this purpose"):
        load_generator("resnet.pt")
    save_generator(tiny_generator(), "generator.pt")
    content = torch.load("generator.pt", weights_only=True)
    torch.save(content | {"channels": 8}, "other.pt")
    with pytest.raises(ValueError, match=r"weights in other\.pt do not fit the generator"):
        load_generator("other.pt")
    whole = Path("generator.pt").read_bytes()
    Path("half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pt is damaged"):
        load_generator("half.pt")


# --- The sampler --------------------------------------------------------------------------------


def test_the_sampler_appends_generated_images_of_the_smaller_class(toy):
    X, y = toy
    generator = tiny_generator().to(choose_device())  # where one from a file is taken to
    X_res, y_res = GANOverSampler(generator=generator, random_state=0).fit_resample(X, y)
    assert np.array_equal(X_res[:44], X) and np.array_equal(y_res[:44], y)
    assert X_res.shape == (60, 32, 32, 3) and X_res.dtype == np.uint8
    assert y_res[44:].tolist() == [2] * 16
    save_generator(generator, "generator.pt")
    from_file, _ = GANOverSampler(generator="generator.pt", random_state=0).fit_resample(X, y)
    assert np.array_equal(from_file, X_res)
    other, _ = GANOverSampler(generator=generator, random_state=1).fit_resample(X, y)
    assert not np.array_equal(other, X_res)
    truncated, _ = GANOverSampler(generator=generator, random_state=0, truncation=0.5).fit_resample(X, y)
    assert not np.array_equal(truncated, X_res)


def test_the_sampler_trains_itself_once_for_the_same_images(toy, monkeypatch):
    X, y = toy
    trained, original = [], GANGeneration.train_gan
    monkeypatch.setattr(
        GANGeneration, "train_gan", lambda *a, **o: trained.append(len(a[0])) or original(*a, **o)
    )
    sampler = GANOverSampler(settings=TINY, random_state=0)
    assert sampler.fit(X, y) is sampler
    assert trained == [44]
    first, _ = sampler.fit_resample(X, y)
    assert trained == [44], "fit has trained it"
    sampler.fit_resample(X[:43], y[:43])
    assert trained == [44, 43], "other images need another GAN"
    again, _ = GANOverSampler(settings=TINY, random_state=0).fit_resample(X, y)
    assert np.array_equal(first, again)


def test_the_sampler_refuses_what_does_not_fit(toy):
    X, y = toy
    with pytest.raises(ValueError, match=r"trained on 2 classes \(0, 1\), but y has 3 \(0, 1, 2\)"):
        GANOverSampler(generator=tiny_generator(trained=(0, 1))).fit_resample(X, y)
    with pytest.raises(ValueError, match="trained on 3 classes .*but y has 2"):
        GANOverSampler(generator=tiny_generator()).fit(X[:30], y[:30])
    with pytest.raises(ValueError, match="32x32 pixels"):
        GANOverSampler(generator=tiny_generator()).fit_resample(X[:, :16], y)
    with pytest.raises(ValueError, match="Class 2 has one image"):
        GANOverSampler(settings=TINY).fit(X[:41], y[:41])
    with pytest.raises(FileNotFoundError):
        GANOverSampler(generator="none.pt").fit(X, y)


# --- In the study -------------------------------------------------------------------------------


def test_no_removed_image_and_no_test_image_reaches_the_gan(tiny_data, monkeypatch):
    """Poisoned removed images and a poisoned test set change nothing, and no poison is ever scored."""
    split = split_from_name("cat-5", tiny_data.y_train)
    removed = np.setdiff1d(np.arange(len(tiny_data.y_train)), split.kept_rows(tiny_data.y_train))
    X_train = tiny_data.X_train.copy()
    X_train[removed] = (255, 0, 255)
    poisoned = dataclasses.replace(
        tiny_data, X_train=X_train, X_test=np.full_like(tiny_data.X_test, 255), y_test=tiny_data.y_test[::-1]
    )
    drawn, original = [], BalancedBatches.draw

    def draw(self, size, random):
        images, labels = original(self, size, random)
        drawn.append(images)
        return images, labels

    monkeypatch.setattr(BalancedBatches, "draw", draw)
    weights = []
    for folder, data in (("clean", tiny_data), ("poisoned", poisoned)):
        Path(folder).mkdir()
        monkeypatch.chdir(folder)
        path = Experiment.prepare_generator(data, split, "smoke", "cpu")
        weights.append(torch.load(path, weights_only=True)["generator"])
        monkeypatch.chdir("..")
    assert equal(*weights)
    magenta = torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1)
    assert len(drawn) == 14  # 6 steps and one to count operations, twice
    assert not any((batch == magenta).all(dim=(1, 2, 3)).any() for batch in drawn)


def test_one_gan_serves_every_seed_of_the_arms(tiny_data, monkeypatch):
    Experiment.run_arm("gan", tiny_data, "cat-5", 0, "smoke", "cpu")
    monkeypatch.setattr(Experiment, "train_gan", lambda *a, **o: pytest.fail("it was trained again"))
    Experiment.run_arm("gan-source-balanced", tiny_data, "cat-5", 1, "smoke", "cpu")


def test_a_training_that_could_not_be_saved_is_not_lost(tiny_data, monkeypatch):
    split = split_from_name("cat-5", tiny_data.y_train)

    def no_space(*arguments):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "save_json", no_space)
        with pytest.raises(OSError, match="No space"):
            Experiment.prepare_generator(tiny_data, split, "smoke", "cpu")
    monkeypatch.setattr(Experiment, "count_flops", lambda *arguments: 1)  # it makes a step too
    monkeypatch.setattr(Adversaries, "step", lambda *arguments: pytest.fail("it was trained again"))
    assert Experiment.prepare_generator(tiny_data, split, "smoke", "cpu").exists()
    assert not list(Path("models/checkpoints").rglob("gan.pt"))


def test_a_gan_of_other_settings_is_neither_used_nor_overwritten(tiny_data, monkeypatch):
    split = split_from_name("cat-5", tiny_data.y_train)
    path = Experiment.prepare_generator(tiny_data, split, "smoke", "cpu")
    content = path.read_bytes()
    other = dataclasses.replace(GAN_SETTINGS["smoke"], steps=7)
    monkeypatch.setitem(GAN_SETTINGS, "smoke", other)
    with pytest.raises(
        ValueError, match=r"gan\.json was obtained with other settings .steps: 6 there, 7 now"
    ):
        Experiment.prepare_generator(tiny_data, split, "smoke", "cpu")
    assert path.read_bytes() == content


def test_profiles_that_share_a_place_do_not_share_a_generator(tiny_data, monkeypatch):
    """cpu and full write their generators to the same plain name; each recognises the other's."""
    monkeypatch.setattr(Experiment, "REFERENCE_SPLIT", "cat-5")
    for name, channels in (("cpu", 4), ("full", 5)):
        profile = dataclasses.replace(Experiment.PROFILES["smoke"], evidence=True, width=channels)
        monkeypatch.setitem(Experiment.PROFILES, name, profile)
        settings = dataclasses.replace(GAN_SETTINGS["smoke"], channels=channels)
        monkeypatch.setitem(GAN_SETTINGS, name, settings)
    split = split_from_name("cat-5", tiny_data.y_train)
    for name, channels in (("cpu", 4), ("full", 5), ("cpu", 4)):
        path = Experiment.prepare_generator(tiny_data, split, name, "cpu")
        assert path == Path("models/generator.pt")
        assert load_generator(path).channels == channels
        assert Path(f"results/{name}/cat-5/gan.json").exists()
        assert Experiment.classifier_features(tiny_data, split, name, "cpu").name.startswith(
            f"ResNet-18 of width {channels} with"
        )


def test_a_collapsed_gan_stops_its_own_arms_only(tiny_data, monkeypatch):
    with_losses(monkeypatch, [1.0, float("nan"), 0.0, 0.0])
    outcomes = Experiment.run_arms(["gan", "imbalanced"], tiny_data, ["cat-5"], profile="smoke", device="cpu")
    assert re.search("the GAN collapsed.*stopped being finite.*remove models", outcomes["gan", "cat-5", 0])
    assert outcomes["imbalanced", "cat-5", 0]["arm"] == "imbalanced"


def test_a_class_with_one_image_makes_the_arm_unavailable(tiny_data):
    outcomes = Experiment.run_arms(["gan"], tiny_data, ["cat-1"], profile="smoke")
    assert "a GAN needs 2 images of each class" in outcomes["gan", "cat-1", 0]


def test_the_command_line_trains_the_gan_alone(tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    Experiment.main(["--train-gan", "--profile", "smoke", "--split", "cat-5"])
    assert "models/smoke/cat-5/generator.pt" in capsys.readouterr().out
    assert not list(Path("results").rglob("*-seed0.json"))


def test_without_a_second_image_the_command_line_says_so_in_a_line(tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    with pytest.raises(SystemExit):
        Experiment.main(["--train-gan", "--profile", "smoke", "--split", "cat-1"])
    assert "a GAN needs 2 images of each class" in capsys.readouterr().err


def test_every_method_is_judged_against_unseen_images(tiny_data, tiny_cache):
    split = split_from_name("cat-5", tiny_data.y_train)
    judged = Experiment.judge_generated_images(tiny_data, split, "smoke", "cpu")
    assert judged["class"] == "cat"
    assert list(judged["methods"]) == ["non-synthetic", "gan", "stable"]
    for scores in judged["methods"].values():
        assert scores["real_images"] == scores["generated_images"] == 10
        assert scores["features"] == "ResNet-18 of width 4 with average pooling, trained on cat-5 of cifar10"
        assert "frechet_distance" in scores and "fid" not in scores
    assert Experiment.judge_generated_images(tiny_data, split, "smoke", "cpu") == judged

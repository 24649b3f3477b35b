"""The GAN: its batches, its training step, its training, its sampler."""

import dataclasses
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from test_GANNetworks import equal, random, tiny_generator

import GANGeneration
from GANGeneration import (
    GANCollapseError,
    GANOverSampler,
    train_gan,
)
from GANNetworks import (
    Generator,
    counting,
    diff_augment,
    sample_images,
    save_generator,
    settle_statistics,
    update_average,
)
from GANTrainingStep import Adversaries, BalancedBatches, GANSettings, count_flops
from GenerationQuality import ImageFeatures, frechet_distance_to
from ImageOverSampler import TooFewImagesError
from Repeatability import derive_seed
from Runtime import choose_device

DEVICE = choose_device()  # the one under test
TINY = GANSettings(steps=4, batch_size=8, channels=4, latent_size=8, records=4, quality_images=12)
NINE = dataclasses.replace(TINY, batch_size=9)  # three of each class


@pytest.fixture
def toy():
    """Three classes told apart by their colour, of 20, 20 and 4 images."""
    y = np.repeat([0, 1, 2], [20, 20, 4])
    return make_images(y, 0), y


def without_seconds(history):
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in history]


# --- Batches --------------------------------------------------------------------------------------


def test_batches_hold_every_class_equally_often_and_only_given_images(toy):
    X, y = toy
    batches = BalancedBatches(X, y, DEVICE, flip=False)
    given = {(int(label), image.tobytes()) for image, label in zip(X, y, strict=True)}
    counts = np.zeros(3, dtype=int)
    rare = set()
    for seed in range(20):
        images, labels = batches.draw(9, random(seed))
        counts += np.bincount(labels.cpu(), minlength=3)
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        drawn = [(int(label), image.tobytes()) for image, label in zip(pixels, labels, strict=True)]
        assert set(drawn) <= given
        rare |= {item for item in drawn if item[0] == 2}
    assert counts.tolist() == [60, 60, 60]
    assert len(rare) == 4, "all images of the rare class are used"


def test_half_of_the_real_images_are_mirrored(toy):
    X, y = toy
    plain, _ = BalancedBatches(X, y, DEVICE, flip=False).draw(300, random())
    mirrored, _ = BalancedBatches(X, y, DEVICE, flip=True).draw(300, random())
    same = (plain == mirrored).all(dim=(1, 2, 3))
    other = (plain.flip(-1) == mirrored).all(dim=(1, 2, 3))
    assert (same | other).all()
    assert 110 < same.sum() < 190


# --- One training step ----------------------------------------------------------------------------


def test_labels_change_the_image_and_the_score(toy):
    adversaries = Adversaries(3, NINE, 0, DEVICE)
    batches = BalancedBatches(*toy, DEVICE, flip=True)
    for step in range(3):  # before the first training step all classes have the same gains
        adversaries.step(batches, step, 0)
    latents = torch.randn((4, 8), device=DEVICE)
    zeros, ones = (torch.full((4,), c, device=DEVICE) for c in (0, 1))
    first, second = (adversaries.generator.eval()(latents, labels) for labels in (zeros, ones))
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    discriminator = adversaries.discriminator.eval()
    scores = [discriminator(first, labels) for labels in (zeros, ones)]
    assert scores[0].shape == (4,)
    assert (scores[0] - scores[1]).abs().min() > 1e-6


def test_every_layer_of_the_discriminator_has_a_singular_value_near_1_after_training(toy):
    settings = dataclasses.replace(NINE, steps=30, discriminator_learning_rate=2e-3)
    adversaries = Adversaries(3, settings, 0, DEVICE)
    before = [layer.weight.detach().clone() for layer in adversaries.discriminator.eval().normalised_layers()]
    batches = BalancedBatches(*toy, DEVICE, flip=True)
    for step in range(30):
        adversaries.step(batches, step, 0)
    discriminator = adversaries.discriminator.eval()
    layers = discriminator.normalised_layers()
    weighted = [m for m in discriminator.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding))]  # fmt: skip
    assert layers == weighted and len(layers) == 9
    for layer, old in zip(layers, before, strict=True):
        largest = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item()
        assert largest == pytest.approx(1, abs=0.1)
        assert not torch.equal(layer.weight, old)


def test_training_averages_the_generator_at_every_step(toy):
    adversaries = Adversaries(3, NINE, 0, DEVICE)
    batches = BalancedBatches(*toy, DEVICE, flip=True)
    expected = deepcopy(adversaries.average)
    for step in range(3):
        adversaries.step(batches, step, 0)
        update_average(expected, adversaries.generator, step, TINY.ema_decay)
    assert equal(dict(adversaries.average.named_parameters()), dict(expected.named_parameters()))
    assert not equal(dict(expected.named_parameters()), dict(adversaries.generator.named_parameters()))


def test_flops_are_counted_and_grow_with_batch_and_width():
    flops = count_flops(TINY)
    assert count_flops(dataclasses.replace(TINY, batch_size=16)) == 2 * flops
    assert count_flops(dataclasses.replace(TINY, channels=8)) > 2 * flops
    assert 5e14 < count_flops(GANSettings()) * GANSettings().steps < 7e14


# --- Training -------------------------------------------------------------------------------------


def test_history_and_snapshots_describe_the_run(toy):
    run = train_gan(*toy, TINY, seed=0)
    assert [record["step"] for record in run.history] == [1, 2, 3, 4]
    assert [record["images_seen"] for record in run.history] == [8, 16, 24, 32]
    assert [record["batch_size"] for record in run.history] == [8] * 4
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
    images = sample_images(run.generator, labels, seed=derive_seed(0, 3))
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

    def step(self, batches, step, seed):
        steps.append(step)
        if len(steps) == killed_at + 1:
            raise KilledError
        return original(self, batches, step, seed)

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
    # The checkpoint holds the finished run until the caller has saved its outcome.
    del steps[:]
    again = train_gan(*toy, settings, seed=0, quality=quality, checkpoint="gan.pt")
    assert not steps and equal(again.generator.state_dict(), whole.generator.state_dict())


def test_a_checkpoint_keeps_the_dead_steps(toy, monkeypatch):
    monkeypatch.setattr(GANGeneration, "DEAD_STEPS", 4)
    steps = []

    def step(self, batches, step, seed):
        steps.append(step)
        if steps == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return torch.tensor([0.0, 1.0, 0.0, 0.0], device=batches.device)

    monkeypatch.setattr(Adversaries, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")
    with pytest.raises(GANCollapseError, match="for 4 steps up to step 4"):
        train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")
    assert steps == [0, 1, 2, 3, 3]


def leave_checkpoint(toy, monkeypatch):
    original = Adversaries.step

    def step(self, batches, step, seed):
        if step == 2:
            raise KeyboardInterrupt
        return original(self, batches, step, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Adversaries, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")


def test_a_checkpoint_of_other_networks_is_refused(toy, monkeypatch):
    leave_checkpoint(toy, monkeypatch)
    content = torch.load("gan.pt", weights_only=True)
    del content["adversaries"]["discriminator"]["score.bias"]
    torch.save(content, "gan.pt")
    with pytest.raises(
        ValueError, match=r"networks in the checkpoint gan\.pt are built differently. Remove it"
    ):
        train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")


def test_a_checkpoint_of_another_training_is_refused(toy, monkeypatch):
    leave_checkpoint(toy, monkeypatch)
    with pytest.raises(ValueError, match="belongs to another training .seed: 0 there, 1 now.*Remove it"):
        train_gan(*toy, TINY, seed=1, checkpoint="gan.pt")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="precision: .* there, other now"):
        patch.setattr(GANGeneration, "precision_name", lambda device: "other")
        train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")
    X, y = toy
    with pytest.raises(ValueError, match="checksum"):
        train_gan(255 - X, y, TINY, seed=0, checkpoint="gan.pt")


def test_a_training_does_not_go_on_with_another_measure(toy):
    def quality(images, labels):
        return float(images.mean())

    quality.description = "brightness"
    run = train_gan(*toy, TINY, seed=0, quality=quality, checkpoint="gan.pt")
    again = train_gan(*toy, TINY, seed=0, quality=quality, checkpoint="gan.pt")
    assert again.best_step == run.best_step
    quality.description = "darkness"
    with pytest.raises(ValueError, match="measure: brightness there, darkness now"):
        train_gan(*toy, TINY, seed=0, quality=quality, checkpoint="gan.pt")


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

    distance = frechet_distance_to(
        X[np.resize(np.argsort(y), 150)], ImageFeatures(pooled, "2x2 means", DEVICE)
    )
    run = train_gan(X, y, settings, seed=0, quality=lambda images, labels: distance(images))
    untrained = Adversaries(3, settings, 0, DEVICE).average
    untrained.trained_classes[:] = True
    settle_statistics(untrained, torch.arange(3, device=DEVICE).repeat(20), 0)
    labels = np.resize([0, 1, 2], 150)
    assert distance(sample_images(run.generator, labels, seed=1)) < 0.3 * distance(
        sample_images(untrained, labels, seed=1)
    )
    # Each class's images have that class's colours.
    real = np.stack([X[y == c].mean(axis=(0, 1, 2)) for c in range(3)])
    made = np.stack([sample_images(run.generator, [c] * 20, seed=2).mean(axis=(0, 1, 2)) for c in range(3)])
    apart = np.linalg.norm(made[:, None] - real[None], axis=2)
    assert apart.argmin(axis=1).tolist() == [0, 1, 2]


# --- A quality measure that fails -----------------------------------------------------------------


def failing_at(calls, failure):
    """A measure that fails at its calls of these numbers, from 1, and the numbers it was called with."""
    called = []

    def quality(images, labels):
        called.append(len(called) + 1)
        if called[-1] not in calls:
            return float(images.mean())
        if isinstance(failure, Exception):
            raise failure
        return failure

    return quality


@pytest.fixture(scope="module")
def uninterrupted():
    """A training whose measure never fails."""
    y = np.repeat([0, 1, 2], [20, 20, 4])
    return train_gan(make_images(y, 0), y, TINY, seed=0, quality=failing_at([], None))


@pytest.mark.parametrize(
    ("record", "failure"),
    [
        (1, float("nan")),
        (4, float("nan")),
        (2, float("inf")),
        (2, np.float32("nan")),
        (2, torch.tensor(float("nan"))),
        (2, KeyError("broken")),
    ],
    ids=repr,
)
def test_a_measure_that_fails_once_stops_the_training_and_no_step_is_lost(
    toy, monkeypatch, uninterrupted, record, failure
):
    whole = uninterrupted
    steps, original = [], Adversaries.step

    def step(self, batches, step, seed):
        steps.append(step)
        return original(self, batches, step, seed)

    monkeypatch.setattr(Adversaries, "step", step)
    if isinstance(failure, KeyError):
        expected = pytest.raises(KeyError, match="broken")
    else:
        expected = pytest.raises(
            ValueError, match=f"quality measured at step {record} is .*Repair the measure"
        )
    with expected:
        train_gan(*toy, TINY, seed=0, quality=failing_at([record], failure), checkpoint="gan.pt")
    assert steps == list(range(record)), "it stopped at once"
    run = train_gan(*toy, TINY, seed=0, quality=failing_at([], None), checkpoint="gan.pt")
    assert steps == [0, 1, 2, 3], "no training step is repeated"
    assert equal(run.generator.state_dict(), whole.generator.state_dict())
    assert without_seconds(run.history) == without_seconds(whole.history)
    assert np.array_equal(run.snapshots, whole.snapshots) and run.best_step == whole.best_step


def test_a_measure_that_stays_broken_says_so_again(toy):
    for _ in range(2):
        with pytest.raises(ValueError, match="quality measured at step 1 is nan"):
            train_gan(*toy, TINY, seed=0, quality=failing_at([1], float("nan")), checkpoint="gan.pt")


def test_a_checkpoint_whose_weights_are_not_finite_is_refused(toy):
    train_gan(*toy, TINY, seed=0, quality=failing_at([], None), checkpoint="gan.pt")
    content = torch.load("gan.pt", weights_only=True)
    content["adversaries"]["average"]["to_image.bias"][0] = float("nan")
    torch.save(content, "gan.pt")
    with pytest.raises(ValueError, match=r"Weights in the checkpoint gan\.pt: NaN or infinity.*Remove it"):
        train_gan(*toy, TINY, seed=0, quality=failing_at([], None), checkpoint="gan.pt")


# --- NumPy scalars --------------------------------------------------------------------------------


def test_numpy_scalars_as_settings_classes_and_seed_train_the_same_and_can_be_resumed(toy):
    X, y = toy
    of_numpy = {
        name: np.asarray(value)[()] for name, value in dataclasses.asdict(TINY).items()
    }  # fmt: skip
    settings = GANSettings(**of_numpy)
    run = train_gan(X, y, settings, seed=np.int64(0), num_classes=y.max() + 1, checkpoint="gan.pt")
    same = train_gan(X, y, TINY, seed=0, num_classes=3, checkpoint="gan.pt")  # read from the checkpoint
    assert equal(run.generator.state_dict(), same.generator.state_dict())
    save_generator(run.generator, "generator.pt")
    assert GANOverSampler(generator="generator.pt", random_state=0).fit_resample(X, y)[0].shape[0] == 60


# --- Bad input and collapse -----------------------------------------------------------------------


def test_bad_training_data_is_one_clear_error(toy):
    X, y = toy
    with pytest.raises(ValueError, match="32x32 pixels, but X has the shape .44, 28, 28, 3."):
        train_gan(np.ascontiguousarray(X[:, :28, :28]), y, TINY, seed=0)
    with pytest.raises(TooFewImagesError, match="Class 2 has one image.*at least 2"):
        train_gan(X[:41], y[:41], TINY, seed=0)
    with pytest.raises(ValueError, match="Labels run from 0 to 2, but a GAN of 2 classes"):
        train_gan(X, y, TINY, seed=0, num_classes=2)
    with pytest.raises(TypeError, match="uint8"):
        train_gan(X / 255, y, TINY, seed=0)
    for field, value, least in (
        ("batch_size", 1, 4), ("records", 0, 1), ("discriminator_steps", 0, 1), ("quality_images", 2, 3),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{field} must be at least {least}: got {value}"):
            train_gan(X, y, dataclasses.replace(TINY, **{field: value}), seed=0, quality=lambda *judged: 1.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": float("nan")}, "steps must be at least 1: got nan"),
        ({"steps": 2.5}, "steps must be a whole number: got 2.5"),
        (
            {"generator_learning_rate": float("nan")},
            "generator_learning_rate must be a finite number, 0 or more: got nan",
        ),
        (
            {"discriminator_learning_rate": float("inf")},
            "discriminator_learning_rate must be a finite number, 0 or more: got inf",
        ),
        (
            {"generator_learning_rate": -1e-3},
            "generator_learning_rate must be a finite number, 0 or more: got -0.001",
        ),
        ({"ema_decay": float("nan")}, "ema_decay must be a finite number, 0 to 1: got nan"),
        ({"ema_decay": -0.1}, "ema_decay must be a finite number, 0 to 1: got -0.1"),
        ({"augmentation": float("nan")}, "augmentation must be a finite number, 0 to 1"),
        ({"augmentation": 2.0}, "augmentation must be a finite number, 0 to 1: got 2.0"),
    ],
)
def test_a_setting_that_is_no_such_number_is_refused(toy, setting, message):
    with pytest.raises(ValueError, match=message):
        train_gan(*toy, dataclasses.replace(TINY, **setting), seed=0)


def nothing_is_trained(monkeypatch):
    monkeypatch.setattr(Adversaries, "step", lambda *arguments: pytest.fail("it was trained"))


@pytest.mark.parametrize("setting", [{"quality_images": 10**9}, {"batch_size": 10**9}])
def test_more_images_than_fit_the_memory_are_refused_before_the_training(toy, monkeypatch, setting):
    nothing_is_trained(monkeypatch)
    settings = dataclasses.replace(TINY, **setting)
    with pytest.raises(MemoryError, match="1,000,000,000.* images would take at least"):
        train_gan(*toy, settings, seed=0, quality=lambda *judged: 1.0)


def test_a_checkpoint_that_cannot_be_written_is_noticed_before_the_training(toy, monkeypatch):
    nothing_is_trained(monkeypatch)
    Path("file").touch()
    with pytest.raises(OSError, match=r"Cannot write file/gan\.pt"):
        train_gan(*toy, TINY, seed=0, checkpoint="file/gan.pt")


def test_weights_that_are_not_finite_are_a_collapse(toy, monkeypatch):
    original = Adversaries.step

    def step(self, batches, step, seed):
        losses = original(self, batches, step, seed)
        if step == 1:
            self.generator.to_image.bias.data[0] = float("nan")  # after the losses
        return losses

    monkeypatch.setattr(Adversaries, "step", step)
    with pytest.raises(
        GANCollapseError, match="weight of the GAN stopped being finite by step 2.*learning rates"
    ):
        train_gan(*toy, TINY, seed=0, checkpoint="gan.pt")
    assert len(torch.load("gan.pt", weights_only=True)["history"]) == 1


def with_losses(monkeypatch, values):
    original = Adversaries.step

    def step(self, batches, step, seed):
        return original(self, batches, step, seed).new_tensor(values)

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
        train_gan(*toy, TINY, seed=0)  # four records of one training step


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
        return images.masked_fill((labels == 2)[:, None, None, None], 0)

    generator.forward = forward
    with pytest.raises(GANCollapseError, match="same image of class 2 whatever"):
        GANGeneration._snapshot(generator, torch.arange(3, device=DEVICE), 0, 7)


# --- The sampler ----------------------------------------------------------------------------------


def test_the_sampler_appends_generated_images_of_the_smaller_class(toy):
    X, y = toy
    generator = tiny_generator()
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
    sampler.set_params(settings=dataclasses.replace(TINY, steps=TINY.steps + 1)).fit(X[:43], y[:43])
    assert trained == [44, 43, 43], "other settings need another GAN"
    sampler.set_params(random_state=1).fit(X[:43], y[:43])
    assert trained == [44, 43, 43, 43], "another seed gives another GAN"
    given = tiny_generator()
    assert sampler.set_params(generator=given).fit(X, y).generator_ is given
    assert sampler.set_params(generator=None).fit(X[:43], y[:43]).generator_ is not given
    assert len(trained) == 5
    again, _ = GANOverSampler(settings=TINY, random_state=0).fit_resample(X, y)
    assert np.array_equal(first, again)


def test_the_sampler_trains_with_the_default_settings_and_its_integer_seed(toy, monkeypatch):
    asked = []

    def train_gan(X, y, settings, *, seed, device):
        asked.append((settings, seed))
        return GANGeneration.GANRun(tiny_generator(), None, [], None, 0)

    monkeypatch.setattr(GANGeneration, "train_gan", train_gan)
    GANOverSampler(random_state=3).fit(*toy)
    GANOverSampler().fit(*toy)
    assert asked == [(GANSettings(), 3), (GANSettings(), 0)]


def test_no_gan_is_trained_if_no_class_needs_images(toy, monkeypatch):
    X, y = toy
    monkeypatch.setattr(GANGeneration, "train_gan", None)
    X_res, y_res = GANOverSampler(settings=TINY).fit_resample(X[:40], y[:40])
    assert np.array_equal(X_res, X[:40]) and np.array_equal(y_res, y[:40])


def test_training_works_after_sampling_of_equally_many_images():
    """What is made once and kept must not be of inference mode, or no gradient could pass."""
    counting.cache_clear()
    with torch.inference_mode():
        diff_augment(torch.rand(3, 3, 32, 32), torch.Generator().manual_seed(0))
    images = torch.rand(3, 3, 32, 32, requires_grad=True)
    diff_augment(images, torch.Generator().manual_seed(0)).sum().backward()
    assert images.grad is not None


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


@pytest.mark.parametrize("settings", ["smoke", {}, {"steps": 4}, 4])
def test_settings_of_another_type_are_refused(toy, settings):
    with pytest.raises(TypeError, match="settings must be GANSettings, such as "):
        GANOverSampler(settings=settings).fit_resample(*toy)
    with pytest.raises(TypeError, match="settings must be GANSettings"):
        GANOverSampler(generator=tiny_generator(), settings=settings).fit(*toy)
    with pytest.raises(TypeError, match="settings must be GANSettings"):
        train_gan(*toy, settings, seed=0)


def test_labels_that_are_no_class_numbers_get_a_message_about_labels(toy):
    X, y = toy
    for labels in (y + 100, y * 1000, y + 10**9):
        with pytest.raises(ValueError, match="Labels run from .* but y has 3 classes.*return_inverse"):
            GANOverSampler(settings=TINY).fit_resample(X, labels)
    with pytest.raises(ValueError, match="Labels run from -1 to 1"):
        GANOverSampler(settings=TINY).fit_resample(X, y - 1)


def test_a_class_number_that_is_left_out_is_no_mistake(toy):
    X, y = toy
    X_res, y_res = GANOverSampler(settings=TINY, random_state=0).fit_resample(X, y + 1)
    assert np.bincount(y_res).tolist() == [0, 20, 20, 20]


def test_without_a_measure_the_number_of_judged_images_does_not_matter(toy):
    X, y = toy
    few = dataclasses.replace(TINY, quality_images=1)
    assert len(GANOverSampler(settings=few, random_state=0).fit_resample(X, y)[0]) == 60


def test_a_mistake_that_shows_without_a_training_is_reported_before_it(toy, monkeypatch):
    nothing_is_trained(monkeypatch)
    for truncation in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="truncation is a positive number"):
            GANOverSampler(settings=TINY, truncation=truncation).fit(*toy)
    with pytest.raises(MemoryError, match="asks for 1,000,000,040 images in all, which need"):
        GANOverSampler(settings=TINY, sampling_strategy={2: 10**9}).fit(*toy)
    with pytest.raises((MemoryError, ValueError)):
        GANOverSampler(settings=TINY, sampling_strategy={2: 10**9}).fit_resample(*toy)

"""Batches: augmentation, micro-batches of one source, mixed images, and how the training loop uses them."""

import numpy as np
import pytest
import torch
from test_ClassifierNetwork import X, equal_weights, noise, small_model, y

from Batches import AugmentedBatches, MicroBatch, MixedBatches, PastedBatches, SourceBatches, split_evenly
from ClassifierTraining import Recipe, train_classifier
from Runtime import choose_device

SOURCES = np.repeat([0, 1], [12, 8])  # of 20 rows


def source_batches(steps=10, batch_size=8, seed=0, images=X, sources=SOURCES, **options):
    names = {"micro_batch_size", "padding", "flip", "cutout"} & options.keys()
    recipe = Recipe(steps, batch_size, **{name: options.pop(name) for name in names})
    return SourceBatches(images, sources, recipe, choose_device(), seed, **options)


def all_steps(batches, epochs):
    return [step for number in range(1, epochs + 1) for step in batches.epoch(number)]


# --- Cutout -------------------------------------------------------------------------------------


def test_cutout_greys_one_square_of_each_image_and_nothing_else():
    options = {"batch_size": 20, "device": choose_device(), "seed": 0, "padding": 0, "flip": False}
    images = noise(20, 16)
    [(whole, rows)] = AugmentedBatches(images, **options).epoch(1)
    [(cut, same_rows)] = AugmentedBatches(images, cutout=6, **options).epoch(1)
    assert torch.equal(rows, same_rows)
    changed = (whole != cut).any(dim=1).cpu().numpy()
    grey = np.round(images.mean(axis=(0, 1, 2)))
    for image, square in zip(cut.cpu().numpy(), changed, strict=True):
        down, across = np.flatnonzero(square.any(axis=1)), np.flatnonzero(square.any(axis=0))
        assert np.ptp(down) < 6 and np.ptp(across) < 6  # smaller at the border
        assert np.abs(image[:, square].mean(axis=1) - grey).max() < 1e-3
    assert changed.sum(axis=(1, 2)).max() > 30 and len({square.tobytes() for square in changed}) > 15


@pytest.mark.parametrize("cutout", [-1, 17])
def test_a_square_larger_than_the_image_is_refused(cutout):
    with pytest.raises(ValueError, match="cutout must be from 0 to the images' side, 16 pixels"):
        AugmentedBatches(X, 8, choose_device(), 0, cutout=cutout)


# --- Micro-batches of one source ----------------------------------------------------------------


def test_a_micro_batch_holds_one_source_and_only_real_ones_are_tracked():
    for step in all_steps(source_batches(phases=((1.0, 0.25),), micro_batch_size=4), epochs=5):
        assert [len(part.rows) for part in step] == [3, 3, 2]  # 6 real images in two equal parts, 2 synthetic
        assert [part.tracked for part in step] == [True, True, False]
        for part in step:
            assert set(SOURCES[part.rows.cpu()]) == {0 if part.tracked else 1}
            assert len(part.images) == len(part.rows) and part.weight == len(part.rows) / 8


def test_micro_batches_of_both_sources_have_the_batch_s_proportion_and_are_tracked():
    options = {"phases": ((0.5, 0.25), (1.0, 0.0)), "micro_batch_size": 4}
    together = all_steps(source_batches(statistics_per_source=False, **options), epochs=5)
    for step, apart in zip(together, all_steps(source_batches(**options), epochs=5), strict=True):
        assert [(len(part.rows), part.weight, part.tracked) for part in step] == [(4, 0.5, True)] * 2
        synthetic = [int(SOURCES[part.rows.cpu()].sum()) for part in step]
        assert synthetic == [1, 1] or synthetic == [0, 0]
        images, images_apart = (
            sorted((int(row), image.tolist()) for part in parts for row, image in zip(part.rows, part.images, strict=True))
            for parts in (step, apart)
        )  # fmt: skip
        assert images == images_apart


def test_micro_batches_of_both_sources_have_almost_one_size_if_it_does_not_divide_the_batch():
    options = {"phases": ((1.0, 0.25),), "micro_batch_size": 6, "batch_size": 20}
    for step in all_steps(source_batches(steps=3, statistics_per_source=False, **options), epochs=3):
        assert [len(part.rows) for part in step] == [5] * 4 and [part.weight for part in step] == [0.25] * 4
        assert {int(SOURCES[part.rows.cpu()].sum()) for part in step} <= {1, 2}


def test_sources_of_different_weight_do_not_share_micro_batches():
    with pytest.raises(ValueError, match="A synthetic_weight needs micro-batches of one source"):
        source_batches(statistics_per_source=False, synthetic_weight=0.3)


def test_each_row_of_a_source_comes_equally_often():
    steps = all_steps(source_batches(steps=12, phases=((1.0, 0.5),)), epochs=6)
    counts = np.bincount(torch.cat([part.rows for step in steps for part in step]).cpu(), minlength=20)
    assert len(steps) == 12 and counts.tolist() == [4] * 12 + [6] * 8  # 48 real and 48 synthetic


def test_phases_follow_each_other_and_the_last_one_can_be_real_only():
    steps = all_steps(source_batches(steps=10, phases=((0.3, 1.0), (0.8, 0.5), (1.0, 0.0))), epochs=5)
    synthetic = [sum(len(part.rows) for part in step if not part.tracked) for step in steps]
    assert synthetic == [8] * 3 + [4] * 5 + [0] * 2


def test_an_epoch_is_the_same_whatever_was_drawn_before():
    whole = all_steps(source_batches(), epochs=5)
    later = [part for step in source_batches().epoch(4) for part in step]
    expected = [part for step in whole[6:8] for part in step]
    assert all(torch.equal(a.images, b.images) for a, b in zip(later, expected, strict=True))
    other = [part for step in source_batches(seed=1).epoch(4) for part in step]
    assert not all(torch.equal(a.rows, b.rows) for a, b in zip(later, other, strict=True))


@pytest.mark.parametrize(
    "phases",
    [(), ((0.5, 0.5),), ((0.5, 0.5), (0.4, 0.1), (1.0, 0.0)), ((1.0, 1.5),), ((1.0, float("nan")),), ((0.0, 1), (1.0, 0))],
)  # fmt: skip
def test_impossible_phases_are_refused(phases):
    with pytest.raises(ValueError, match="phases must be pairs"):
        source_batches(phases=phases)


def test_a_source_without_rows_is_refused_if_it_is_needed():
    with pytest.raises(ValueError, match="need synthetic images, but no row is synthetic"):
        source_batches(sources=np.zeros(20, dtype=int))
    source_batches(sources=np.zeros(20, dtype=int), phases=((1.0, 0.0),))


@pytest.mark.parametrize(
    "sources", [SOURCES[:-1], np.repeat([0, 1, 2], [10, 5, 5]), np.append(SOURCES, 1), SOURCES - 1]
)
def test_each_row_has_a_source_and_it_is_0_or_1(sources):
    with pytest.raises(
        ValueError, match="sources must be 20 numbers, 0 for a real row and 1 for a synthetic one"
    ):
        source_batches(sources=sources)


def test_running_statistics_follow_real_images_only():
    trained = []
    for pixel in (255, 0):  # every synthetic image is white, or black
        images = X.copy()
        images[12:] = pixel
        model = small_model()
        train_classifier(
            model, images, y, Recipe(steps=1, batch_size=8), seed=0, batches=source_batches(1, images=images)
        )
        trained.append(model)
        assert all(norm.momentum == 0.1 for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d))
    # In the first step, no weight was changed by a synthetic image yet.
    assert torch.equal(*(model.norm.running_mean for model in trained))
    assert not torch.equal(*(model.head.weight for model in trained))
    assert not torch.equal(trained[0].norm.running_mean, small_model().norm.running_mean)


def test_a_killed_training_on_micro_batches_continues_to_the_same_weights():
    recipe, trained, resumed = Recipe(steps=10, batch_size=8), small_model(), small_model()
    phases = ((0.6, 0.5), (1.0, 0.0))
    train_classifier(trained, X, y, recipe, seed=0, batches=source_batches(phases=phases))

    def stop(model, record):
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    options = {"seed": 0, "checkpoint": "run.pt"}
    with pytest.raises(KeyboardInterrupt):
        train_classifier(
            resumed, X, y, recipe, batches=source_batches(phases=phases), after_epoch=stop, **options
        )
    with pytest.raises(ValueError, match="belongs to another training"):
        train_classifier(small_model(), X, y, recipe, batches=source_batches(), **options)
    resumed = small_model()
    train_classifier(resumed, X, y, recipe, batches=source_batches(phases=phases), **options)
    assert equal_weights(trained, resumed)


# --- Mixed images -------------------------------------------------------------------------------


def mixed(kind, seed=0, alpha=1.0):
    inner = AugmentedBatches(X, 20, choose_device(), 0, padding=0, flip=False)
    return MixedBatches(inner, kind, micro_batch_size=10, seed=seed, alpha=alpha)


def test_mixup_averages_an_image_and_its_partner():
    [[first, second]] = mixed("mixup").epoch(1)
    images = torch.from_numpy(X).permute(0, 3, 1, 2).to(first.images.device).float()
    for part in (first, second):
        expected = part.kept * images[part.rows] + (1 - part.kept) * images[part.partners]
        assert torch.allclose(part.images, expected, atol=1e-3) and 0 < part.kept < 1
        assert sorted(part.partners.tolist()) == sorted(part.rows.tolist())
    assert first.kept != second.kept


def test_cutmix_pastes_a_box_and_keeps_what_the_box_leaves():
    boxes = set()
    for seed in range(6):
        for part in next(iter(mixed("cutmix", seed).epoch(1))):
            images = torch.from_numpy(X).permute(0, 3, 1, 2).to(part.images.device)
            own = (part.images == images[part.rows]).all(dim=1)
            pasted = (part.images == images[part.partners]).all(dim=1)
            assert (own | pasted).all()
            other = part.rows != part.partners
            kept = own[other].float().mean(dim=(1, 2)).cpu()
            assert torch.allclose(kept, torch.tensor(part.kept), atol=0.01)
            boxes.add(round(part.kept, 3))
    assert len(boxes) > 6


def test_the_loss_of_mixed_images_weighs_both_labels():
    class Fixed:
        batch_size = 20

        def __init__(self, kept):
            self.kept = kept

        def epoch(self, number):
            images = torch.from_numpy(X).permute(0, 3, 1, 2).to(choose_device())
            rows = torch.arange(20, device=images.device)
            yield [MicroBatch(images, rows, 1.0, partners=rows.flip(0), kept=self.kept)]

    def loss(kept):
        recipe = Recipe(steps=1, batch_size=20)
        return train_classifier(small_model(), X, y, recipe, seed=0, batches=Fixed(kept))[0]["train_loss"]

    assert loss(0.25) == pytest.approx(0.25 * loss(1.0) + 0.75 * loss(0.0), rel=1e-4)
    assert loss(1.0) != pytest.approx(loss(0.0), rel=1e-4)


def test_unknown_kinds_and_impossible_alphas_are_refused():
    with pytest.raises(ValueError, match="Unknown kind of mixing 'mix': choose 'mixup' or 'cutmix'"):
        mixed("mix")
    for alpha in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="alpha must be a positive number"):
            mixed("mixup", alpha=alpha)


def test_an_even_split_weighs_parts_by_their_size():
    parts = split_evenly(torch.zeros(20, 3, 4, 4), torch.arange(20), 8)
    assert [part.weight for part in parts] == [0.4, 0.4, 0.2] and all(part.tracked for part in parts)


# --- Synthetic images in real ones --------------------------------------------------------------


def test_synthetic_images_weigh_as_they_are_told():
    [step, *_] = all_steps(source_batches(phases=((1.0, 0.5),), synthetic_weight=0.25), epochs=1)
    assert [part.weight for part in step] == pytest.approx([0.8, 0.2])
    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="synthetic_weight must be a finite number"):
            source_batches(synthetic_weight=weight)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_only_parts_of_synthetic_images_are_trained_on(kind):
    inner = {
        "batch_size": 10,
        "phases": ((0.5, 0.2), (1.0, 0.0)),
        "padding": 0,
        "flip": False,
        "micro_batch_size": 4,
    }
    batches = PastedBatches(source_batches(**inner), kind, seed=0)
    images = torch.from_numpy(X).permute(0, 3, 1, 2).to(choose_device()).float()
    steps = all_steps(batches, epochs=5)
    assert [sum(len(part.rows) for part in step) for step in steps] == [8] * 10
    for number, step in enumerate(steps):
        assert sum(part.weight for part in step) == pytest.approx(1)
        assert set(SOURCES[torch.cat([part.rows for part in step]).cpu()]) == {0}
        assert [part.partners is None for part in step] == [True, True] + [False] * (number < 5)
        for part in step:
            assert part.tracked == (part.partners is None)
            if part.tracked:
                assert torch.equal(part.images.float(), images[part.rows])
            else:
                assert set(SOURCES[part.partners.cpu()]) == {1} and len(part.rows) == 2
                means = [images[rows].mean() for rows in (part.rows, part.partners)]
                expected = part.kept * means[0] + (1 - part.kept) * means[1]
                assert part.images.float().mean().item() == pytest.approx(expected.item(), rel=0.05)


def test_more_synthetic_than_real_images_cannot_be_pasted():
    with pytest.raises(ValueError, match="at least as many real images as synthetic ones"):
        PastedBatches(source_batches(phases=((1.0, 0.75),)), "cutmix", seed=0)


def test_pasting_needs_one_fraction_and_whole_weights():
    for options in (
        {"phases": ((0.5, 0.5), (1.0, 0.25))},
        {"phases": ((1.0, 0.0),)},
        {"synthetic_weight": 0.5},
    ):
        with pytest.raises(ValueError, match="Pasting needs batches with one synthetic fraction"):
            PastedBatches(source_batches(**options), "cutmix", seed=0)


def test_pasting_needs_micro_batches_of_one_source():
    with pytest.raises(ValueError, match="Pasting needs micro-batches of one source"):
        PastedBatches(source_batches(statistics_per_source=False), "cutmix", seed=0)


# --- What the training checks -------------------------------------------------------------------


def test_batches_of_another_length_of_training_are_refused():
    for batches in (
        source_batches(steps=9),
        MixedBatches(source_batches(steps=9), "mixup", micro_batch_size=8, seed=0),
    ):
        with pytest.raises(ValueError, match="made for 9 training steps, but the recipe has 10"):
            train_classifier(small_model(), X, y, Recipe(steps=10, batch_size=8), seed=0, batches=batches)


def test_synthetic_batches_need_a_weight():
    with pytest.raises(
        ValueError, match="synthetic_weight is 0, but the phases have batches that are synthetic only"
    ):
        source_batches(phases=((0.5, 1.0), (1.0, 0.0)), synthetic_weight=0)


def test_descriptions_differ_wherever_the_batches_do():
    plain = {"batch_size": 8, "device": choose_device(), "seed": 0}
    changes = ({}, {"batch_size": 9}, {"seed": 1}, {"padding": 4}, {"flip": False}, {"cutout": 4})
    names = [AugmentedBatches(X, **plain | change).description for change in changes]
    more = (
        {"micro_batch_size": 4},
        {"steps": 9},
        {"phases": ((1.0, 0.25),)},
        {"synthetic_weight": 0.5},
        {"sources": 1 - SOURCES},
    )
    names += [source_batches(**change).description for change in (*changes, *more)]
    names += [
        MixedBatches(source_batches(), kind, micro_batch_size=8, seed=seed, alpha=alpha).description
        for kind, seed, alpha in (("mixup", 0, 1.0), ("cutmix", 0, 1.0), ("mixup", 1, 1.0), ("mixup", 0, 0.5))
    ]
    assert len(set(names)) == len(names)


def test_an_infinite_synthetic_image_leaves_the_running_statistics_finite():
    class Infinite(SourceBatches):
        def epoch(self, number):
            for step in super().epoch(number):
                images = torch.full_like(step[-1].images, torch.inf, dtype=torch.float32)
                yield [*step[:-1], MicroBatch(images, step[-1].rows, step[-1].weight, tracked=False)]

    model = small_model()
    batches = Infinite(X, SOURCES, Recipe(steps=1, batch_size=8), choose_device(), 0)
    with pytest.raises(FloatingPointError):
        train_classifier(model, X, y, Recipe(steps=1, batch_size=8), seed=0, batches=batches)
    assert model.norm.running_mean.isfinite().all() and model.norm.running_var.isfinite().all()


def test_batches_too_small_for_a_synthetic_image_are_refused():
    with pytest.raises(ValueError, match="Batches of 2 images are too small for the synthetic fractions"):
        source_batches(batch_size=2, phases=((0.85, 0.25), (1.0, 0.0)))
    with pytest.raises(ValueError, match="Batches of 8 images are too small for the synthetic fractions"):
        source_batches(batch_size=8, phases=((1.0, 0.95),))  # no real image would be seen


@pytest.mark.parametrize(
    "change", [lambda X: X / 255, lambda X: X.transpose(0, 3, 1, 2), lambda X: X[..., 0]]
)
def test_batches_are_made_of_images_alone(change):
    images = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    with pytest.raises((TypeError, ValueError), match="X must"):
        AugmentedBatches(change(images), 4, torch.device("cpu"), seed=0)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        AugmentedBatches(images, 0, torch.device("cpu"), seed=0)


def test_epochs_of_sources_end_with_the_steps():
    images, sources = np.zeros((8, 16, 16, 3), dtype=np.uint8), np.repeat([0, 1], 4)
    recipe = Recipe(steps=3, batch_size=4)
    batches = SourceBatches(images, sources, recipe, torch.device("cpu"), seed=0)
    assert [len(list(batches.epoch(number))) for number in (1, 2, 3, 20)] == [2, 1, 0, 0]
    with pytest.raises(ValueError, match="counted from 1"):
        list(batches.epoch(0))

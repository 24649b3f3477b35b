"""From prompts to the cache: candidates, shards, selection, several processes, kills, and every bad input."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from conftest import REPOSITORY

import CandidateImages
import ImageSources
import Prompts
import StableDiffusionGeneration
from CandidateImages import (
    MOST_DRAWS,
    SHARDS,
    CandidateMaker,
    GenerationSettings,
    find_missing,
    name_job,
    read_candidates,
    read_shards,
    write_shard,
)
from DiffusionPipelines import ModelUnavailableError
from Files import one_process_at_a_time
from ImageCache import (
    CACHE,
    METADATA,
    describe_cache,
    fingerprint,
    load_generated_images,
    load_metadata,
    save_generated_images,
)
from ImageOverSampler import source_balanced_strategy
from ImageSelection import Selection, SelectionError
from ImageSources import ImagesUnavailableError, prepare_images
from ImbalancedCIFAR10 import CIFAR10_CLASSES, DataUnavailableError, minority_split
from LoRATraining import STATE, WEIGHTS, LoRARecipe, train_lora
from Painter import Painter
from Repeatability import derive_seed
from StableDiffusionGeneration import generate_images, main
from StableDiffusionSampler import StableDiffusionOverSampler


@pytest.fixture(scope="module")
def settings(models):
    return GenerationSettings("turbo", models["turbo"], size=64, clip_model=models["clip"])


@pytest.fixture(scope="module")
def loaded(settings):
    """A maker whose models are loaded once for all tests."""
    maker = CandidateMaker(settings, device="cpu", dtype=torch.float32, batch_size=4)
    assert maker.painter and maker.clip_filter
    return maker


def make_maker(loaded, batch_size=4, shards=SHARDS, **changes):
    """A maker with other settings, batches or shards, and the models of ``loaded``."""
    maker = CandidateMaker(
        replace(loaded.settings, **changes), device="cpu", dtype=torch.float32, shards=shards
    )
    maker.painter = Painter(loaded.painter._text_to_image, "turbo", size=64, batch_size=batch_size)
    maker.clip_filter = None if maker.settings.clip_model == "none" else loaded.clip_filter
    return maker


def generate(maker, count=10, class_name="cat", margin=-1, match=False, **options):
    """Generate images. The tiny CLIP never sees a cat, so by default every margin passes."""
    selection = Selection(margin=margin, match=match)
    return generate_images(class_name, count, maker, selection=selection, **options)


def shards_of(class_name="cat"):
    [folder] = SHARDS.glob(f"{class_name}-*")
    return folder


def command_line(models, *arguments):
    return [
        "--class", "cat", "--preset", "turbo", "--model", models["turbo"], "--size", "64", "--margin", "-1",
        "--clip-model", models["clip"], "--device", "cpu", "--dtype", "float32", "--batch-size", "4", *arguments,
    ]  # fmt: skip


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(CandidateImages, "SHARD_SIZE", 4)


# --- From prompts to a training set -------------------------------------------------------------


def test_from_prompts_to_a_balanced_training_set(loaded, tiny_data):
    report = generate(loaded, 26)
    assert report["kept"] == 26
    images, labels = load_generated_images()
    assert (images.shape, images.dtype, labels.tolist()) == ((26, 32, 32, 3), np.uint8, [3] * 26)
    assert len(np.unique(images.reshape(26, -1), axis=0)) == 26
    X, y = minority_split(tiny_data.y_train, keep=4).cut(tiny_data.X_train, tiny_data.y_train)
    X_res, y_res = StableDiffusionOverSampler(random_state=0).fit_resample(X, y)
    assert np.bincount(y_res).tolist() == [30] * 10
    assert np.array_equal(X_res[: len(X)], X)
    assert {x.tobytes() for x in X_res[len(X) :]} == {x.tobytes() for x in images}


def test_images_of_another_size_get_candidates_and_a_cache_of_their_own(loaded, models):
    usual = loaded.describe_job("cat", 3)
    assert "pixels" not in usual, "or candidates from before there was a choice would be drawn again"
    main(command_line(models, "--count", "5", "--pixels", "16"))
    images, _ = load_generated_images()
    assert images.shape == (5, 16, 16, 3)
    folder = shards_of()
    assert (
        folder.name != name_job(usual) and json.loads((folder / "settings.json").read_text())["pixels"] == 16
    )
    with pytest.raises(
        ValueError, match="holds images of 16x16 pixels, so none of 32x32 can be added.*--output"
    ):
        generate(loaded, 4, class_name="dog")
    assert not list(SHARDS.glob("dog-*")), "that is noticed before anything is drawn"
    with pytest.raises(
        ValueError, match=r"16x16 pixels \(--pixels\), but these have the shape \(3, 32, 32, 3\)"
    ):
        generate(make_maker(loaded, pixels=16), 4, real_images=real(), match=True)
    for pixels in (0, 65):
        with pytest.raises(ValueError, match=f"64 pixels can be reduced to 1 to 64 pixels, not to {pixels}"):
            make_maker(loaded, pixels=pixels)


def test_the_table_beside_the_cache_says_how_each_image_was_made(loaded, models):
    generate(loaded, 5)
    with open(CACHE.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == METADATA
    images, _ = load_generated_images()
    for i, row in enumerate(rows):
        assert row["prompt"] == Prompts.make_prompts("cat", 5)[i]
        assert int(row["seed"]) == derive_seed(0, 3, i, 0)
        assert (row["class"], row["label"], row["index"], row["steps"]) == ("cat", "3", str(i), "1")
        assert (row["model"], row["preset"], row["source"], row["lora"]) == (models["turbo"], "turbo", "", "")
        assert -1 <= float(row["clip_margin"]) <= 1
        # Enough to draw the very image again.
        [again], _ = loaded.painter.draw([row["prompt"]], [int(row["seed"])])
        small = CandidateImages.downsample([again])[0].astype(int)
        assert np.abs(small - images[i]).max() <= 1
        assert row["crc32"] == str(zlib.crc32(images[i].tobytes()))
    assert load_metadata() == rows
    assert describe_cache() == f"5 images by the preset turbo of {models['turbo']}"


def test_an_image_does_not_depend_on_the_batch_size(loaded):
    generate(make_maker(loaded, shards="four"), 10, path="four.npy")
    generate(make_maker(loaded, batch_size=1, shards="one"), 10, path="one.npy")
    four, one = (load_generated_images(f"{name}.npy")[0].astype(int) for name in ("four", "one"))
    assert np.abs(four - one).max() <= 1
    assert np.abs(four[1:] - four[:-1]).max() > 10


def test_another_seed_makes_other_images_and_a_larger_count_keeps_the_first_ones(loaded):
    generate(loaded, 6)
    first, _ = load_generated_images()
    generate(loaded, 9)
    more, _ = load_generated_images()
    assert np.array_equal(more[:6], first)
    generate(make_maker(loaded, seed=1), 6, path="other.npy")
    other, _ = load_generated_images("other.npy")
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_classes_come_into_the_cache_one_after_the_other(loaded):
    generate(loaded, 3)
    cats, _ = load_generated_images()
    generate(loaded, 4, "airplane")
    images, labels = load_generated_images()
    assert labels.tolist() == [0] * 4 + [3] * 3
    assert np.array_equal(images[4:], cats)
    assert [row["class"] for row in load_metadata()] == ["airplane"] * 4 + ["cat"] * 3
    generate(loaded, 5)
    assert load_generated_images()[1].tolist() == [0] * 4 + [3] * 5


def test_a_class_of_ones_own(loaded, monkeypatch):
    entry = {"kind": ("a zebra", "a foal"), "pose": ("grazing",), "scene": ("in the sun", "in the shade")}
    monkeypatch.setitem(Prompts.PROMPTS, "zebra", entry)
    generate(loaded, 3, "zebra", label=10)
    assert load_generated_images()[1].tolist() == [10] * 3


# --- Selection ----------------------------------------------------------------------------------


def test_further_candidates_are_drawn_for_those_that_clip_rejects(loaded):
    margins = loaded.make("cat", 3, range(40))["margin"]
    bar = float(np.median(margins))
    report = generate(loaded, 12, margin=bar)
    metadata = load_metadata()
    assert len(metadata) == report["kept"] == 12
    assert report["rejected"]["CLIP sees another class"] > 0
    assert [int(row["index"]) for row in metadata] == np.flatnonzero(margins >= bar)[:12].tolist()
    assert json.loads((shards_of() / "report.json").read_text()) == report
    # The bar can be moved without drawing anything again.
    before = sorted(f.name for f in shards_of().glob("*.npz"))
    assert generate(loaded, 12)["rejected"]["CLIP sees another class"] == 0
    assert sorted(f.name for f in shards_of().glob("*.npz")) == before
    assert [int(row["index"]) for row in load_metadata()] == list(range(12))


def test_when_too_few_pass_the_reasons_are_given_and_nothing_is_written(loaded):
    with pytest.raises(
        SelectionError, match=r"Only 0 of 12 .* of cat .*CLIP sees another class: 12.*--margin"
    ):
        generate(loaded, 3, margin=1.0)
    assert not CACHE.exists()
    assert len(read_shards(shards_of())["index"]) == 12


# --- The safety checker -------------------------------------------------------------------------


@pytest.fixture
def strict(models):
    """A maker whose safety checker, of the real class, flags about half of all images."""
    settings = GenerationSettings("fast", models["stable"], steps=2, size=64, clip_model="none")
    maker = CandidateMaker(settings, device="cpu", dtype=torch.float32, batch_size=4)
    images, _ = maker.painter.draw(Prompts.make_prompts("dog", 16), range(16))
    tiny_models.make_strict(maker.painter._text_to_image, images)
    return maker


def test_a_flagged_image_is_drawn_again_with_another_seed(strict):
    table = strict.make("cat", 3, range(16))
    flagged = table["flagged"]
    assert 0 < np.count_nonzero(flagged) < 16
    assert flagged.max() >= 2  # at least one was flagged twice
    for i, draws in enumerate(flagged):
        attempt = min(draws, MOST_DRAWS - 1)
        assert table["seed"][i] == derive_seed(0, 3, i, int(attempt))
    assert np.array_equal(table["usable"], flagged < MOST_DRAWS)
    assert table["image"][table["usable"]].std(axis=(1, 2, 3)).min() > 0  # no black image among them
    report = generate(strict, 8)
    assert report["drawn again after the safety checker"] == read_shards(shards_of())["flagged"].sum()


def test_an_image_that_is_always_flagged_is_given_up_and_counted(strict):
    strict.painter._text_to_image.safety_checker.concept_embeds_weights.data[0] = -1.0
    table = strict.make("cat", 3, range(3))
    assert table["flagged"].tolist() == [MOST_DRAWS] * 3
    assert not table["usable"].any() and not table["image"].any()
    with pytest.raises(SelectionError, match="safety checker: 8"):
        generate(strict, 2)


# --- From images --------------------------------------------------------------------------------


def real(n=3, seed=7):
    return np.random.default_rng(seed).integers(0, 256, size=(n, 32, 32, 3), dtype=np.uint8)


def test_drawing_starts_from_every_real_image_at_every_strength(loaded):
    maker = make_maker(loaded, strengths=(0.5, 1.0))
    generate(maker, 12, real_images=real())
    rows = load_metadata()
    assert [(int(r["source"]), float(r["strength"])) for r in rows[:6]] == [
        (source, strength) for strength in (0.5, 1.0) for source in range(3)
    ]
    first, _ = load_generated_images()
    generate(maker, 12, real_images=real(seed=8), path="others.npy")
    others, _ = load_generated_images("others.npy")
    assert not np.array_equal(first[0], others[0])


def test_matched_images_have_the_statistics_of_the_real_ones(loaded):
    goal = (120 + real(20) * 0.1).astype(np.uint8)
    report = generate(loaded, 12, real_images=goal, match=True)["statistics"]
    assert report["matched"]["mean"] == pytest.approx(report["real"]["mean"], abs=0.01)
    assert report["generated"]["mean"] != pytest.approx(report["real"]["mean"], abs=0.05)
    plain = generate(make_maker(loaded, shards="plain"), 12, path="plain.npy")
    assert "statistics" not in plain
    assert not np.array_equal(load_generated_images()[0], load_generated_images("plain.npy")[0])


@pytest.mark.parametrize("options", [{"match": True}, {"strengths": (0.5,)}])
def test_what_needs_real_images_says_so(loaded, options):
    strengths = options.pop("strengths", ())
    with pytest.raises(ValueError, match="need real_images"):
        generate(make_maker(loaded, strengths=strengths), 3, **options)


@pytest.mark.parametrize("arguments", [["--from-images", "0.5", "1"], ["--match-statistics"]])
def test_no_removed_image_has_any_influence(models, tiny_data, monkeypatch, arguments):
    split = minority_split(tiny_data.y_train, keep=4)
    poisoned = tiny_data.X_train.copy()
    poisoned[np.setdiff1d(np.arange(300), split.kept_rows(tiny_data.y_train))] = 255
    results = {}
    for name, X in (("clean", tiny_data.X_train), ("poisoned", poisoned), ("kept", tiny_data.X_train // 2)):
        data = replace(tiny_data, X_train=X)
        monkeypatch.setattr(StableDiffusionGeneration, "load_cifar10", lambda data=data: data)
        main(command_line(models, "--count", "6", "--split", "cat-4", *arguments, "--output", f"{name}.npy"))
        results[name] = load_generated_images(f"{name}.npy")[0]
        kept = split.cut(X, tiny_data.y_train)
        seen = fingerprint(kept[0][kept[1] == CIFAR10_CLASSES.index("cat")])
        assert {row["real_images"] for row in load_metadata(f"{name}.npy")} == {seen}
        shutil.rmtree("datasets")
    assert np.array_equal(results["clean"], results["poisoned"])
    assert not np.array_equal(results["clean"], results["kept"])  # the kept ones do have influence


def test_the_table_says_which_real_images_an_adapter_has_seen_or_that_nobody_knows(models, loaded):
    recipe = LoRARecipe(models["turbo"], rank=2, steps=1, size=64)
    train_lora(real(), "cat", "trained", recipe, device="cpu")
    Path("copied").mkdir()
    shutil.copy(Path("trained", WEIGHTS), "copied")
    seen = {}
    for folder in ("trained", "copied"):
        maker = CandidateMaker(
            replace(loaded.settings, lora=folder, clip_model="none"), device="cpu", batch_size=4
        )
        generate(maker, 2, path=f"{folder}.npy")
        seen[folder] = {row["real_images"] for row in load_metadata(f"{folder}.npy")}
    assert seen == {"trained": {fingerprint(real())}, "copied": {"unknown"}}
    maker = make_maker(loaded, lora="copied", clip_model="none")
    generate(maker, 2, path="both.npy", real_images=real(), match=True)
    assert {row["real_images"] for row in load_metadata("both.npy")} == {f"{fingerprint(real())}+unknown"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"half", r"training_state\.pt is damaged"),
        ({"step": 1}, r"training_state\.pt .*lacks identity"),
        ({"identity": {"seed": 0}}, r"training_state\.pt does not say which images.*Train the adapter again"),
        ({"identity": "cat"}, r"training_state\.pt does not say which images"),
    ],
    ids=["damaged", "without identity", "without images", "another identity"],
)
def test_an_adapter_with_a_damaged_checkpoint_is_refused_before_anything_is_drawn(
    loaded, monkeypatch, state, message
):
    Path("adapter").mkdir()
    Path("adapter", WEIGHTS).write_bytes(b"weights")
    if isinstance(state, bytes):
        Path("adapter", STATE).write_bytes(state)
    else:
        torch.save(state, Path("adapter", STATE))
    maker = make_maker(loaded, lora="adapter")
    drawn = count_draws(maker, monkeypatch)
    with pytest.raises(ValueError, match=message):
        generate(maker, 3)
    assert not drawn and not SHARDS.exists()


# --- Shards and continuing ------------------------------------------------------------------------


def count_draws(maker, monkeypatch):
    drawn = []
    draw = maker.painter.draw
    monkeypatch.setattr(
        maker.painter, "draw", lambda prompts, *rest: drawn.extend(prompts) or draw(prompts, *rest)
    )
    return drawn


def test_only_what_is_missing_is_drawn(loaded, monkeypatch, small_shards):
    maker = make_maker(loaded)
    generate(maker, 10)
    whole = CACHE.read_bytes(), CACHE.with_suffix(".csv").read_bytes()
    (shards_of() / "000004-000007.npz").unlink()
    (shards_of() / ".000004-000007-abc.npz").write_bytes(b"half")
    drawn = count_draws(maker, monkeypatch)
    generate(maker, 10)
    assert drawn == Prompts.make_prompts("cat", 8)[4:]
    assert (CACHE.read_bytes(), CACHE.with_suffix(".csv").read_bytes()) == whole
    assert sorted(f.name for f in shards_of().iterdir()) == [
        "000000-000003.npz", "000004-000007.npz", "000008-000009.npz", "report.json", "settings.json",
    ]  # fmt: skip
    drawn.clear()
    generate(maker, 10)
    assert drawn == []
    generate(maker, 13)
    assert drawn == Prompts.make_prompts("cat", 13)[10:]


def test_missing_candidates_are_grouped_by_shard(small_shards):
    def write(*indices):
        write_shard("folder", {"index": np.array(indices)})

    assert find_missing("folder", 10) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    write(4, 5, 6, 7)
    write(8)
    assert find_missing("folder", 11) == [[0, 1, 2, 3], [9, 10]]
    assert find_missing("folder", 4) == [[0, 1, 2, 3]]


def test_other_settings_have_shards_of_their_own(loaded, monkeypatch):
    generate(loaded, 3)
    for k, changes in enumerate(({"seed": 1}, {"downsampling": "lanczos"}, {"clip_model": "none"})):
        generate(make_maker(loaded, **changes), 3, path=f"{k}.npy")
    monkeypatch.setitem(Prompts.PROMPTS, "cat", Prompts.PROMPTS["cat"] | {"view": ("from above",)})
    generate(loaded, 3, path="words.npy")
    folders = list(SHARDS.iterdir())
    assert len(folders) == 5
    assert all(json.loads((f / "settings.json").read_text())["class"] == "cat" for f in folders)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:200], lambda b: b"", lambda b: b[:300] + b"x" * 99 + b[399:]]
)
def test_a_damaged_shard_is_named_and_the_others_stay(loaded, damage, small_shards):
    generate(loaded, 8)
    before = CACHE.read_bytes()
    shard = shards_of() / "000004-000007.npz"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(
        ValueError, match=r"shard .*000004-000007\.npz is truncated or damaged.*Remove it and run"
    ):
        generate(loaded, 8)
    assert CACHE.read_bytes() == before
    shard.unlink()
    generate(loaded, 8)
    assert CACHE.read_bytes() == before


def test_a_full_disk_is_noticed_before_anything_is_loaded(loaded, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(OSError, match=r"0\.00 GB free, but 0\.05 GB are needed"):
        generate(loaded, 3)
    assert not Path("datasets").exists()


def test_a_disk_that_fills_up_costs_only_the_shard_that_does_not_fit(loaded, small_shards, monkeypatch):
    savez, written = np.savez, []

    def fail_on_the_second(*arguments, **options):
        written.append(1)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        savez(*arguments, **options)

    monkeypatch.setattr(np, "savez", fail_on_the_second)
    with pytest.raises(
        OSError, match=r"Could not finish writing .*000004-000007\.npz: .*No space left.*run again"
    ):
        generate(loaded, 10)
    assert [f.name for f in shards_of().glob("*.npz")] == ["000000-000003.npz"]
    assert not list(shards_of().glob(".*"))
    generate(loaded, 10)
    assert len(load_generated_images()[0]) == 10


def test_a_job_of_which_nothing_was_drawn_leaves_no_folder(loaded, monkeypatch):
    def fail(*arguments):
        raise OSError("the model is unavailable")

    monkeypatch.setattr(StableDiffusionGeneration, "draw_candidates", fail)
    with pytest.raises(OSError, match="unavailable"):
        generate(loaded, 3)
    assert not list(SHARDS.iterdir())


# --- Images for the study -----------------------------------------------------------------------


@pytest.fixture
def no_cifake(monkeypatch):
    def refuse(images_per_class):
        raise DataUnavailableError("no CIFAKE here.")

    monkeypatch.setattr(ImageSources, "fetch_cifake", refuse)


@pytest.fixture
def tiny_turbo(loaded, no_cifake, monkeypatch):
    """Generation is the only source, with the tiny models."""
    monkeypatch.setattr(ImageSources, "preset_at_hand", lambda: "turbo")

    def make_tiny_maker(settings, device):
        assert settings == GenerationSettings("turbo")
        return make_maker(loaded, clip_model="none")

    monkeypatch.setattr(ImageSources, "CandidateMaker", make_tiny_maker)


def test_a_cache_comes_first_and_is_described(tiny_cache, no_cifake):
    assert prepare_images({"cat": 5}) == f"the cache {CACHE}: 600 images imported"


def test_cifake_comes_second(monkeypatch):
    monkeypatch.setattr(ImageSources, "fetch_cifake", lambda images_per_class: (real(7), np.arange(7)))
    assert prepare_images({"cat": 5}) == f"CIFAKE, 7 images imported into {CACHE}"
    assert load_generated_images()[1].tolist() == list(range(7))


def test_a_cache_that_cannot_be_written_is_noticed_before_the_download(monkeypatch):
    monkeypatch.setattr(ImageSources, "fetch_cifake", lambda images_per_class: pytest.fail("it downloads"))
    CACHE.parent.mkdir()
    CACHE.with_suffix(".csv").write_text("a table of something else")
    with pytest.raises((OSError, ValueError), match=r"stable_diffusion_dataset\.csv"):
        prepare_images({"cat": 5})


def test_a_model_that_is_here_in_part_is_a_reason(no_cifake, monkeypatch):
    def fail(*arguments, **options):
        raise ModelUnavailableError("its weights are missing")

    monkeypatch.setattr(ImageSources, "preset_at_hand", lambda: "turbo")
    monkeypatch.setattr(ImageSources, "generate_images", fail)
    with pytest.raises(ImagesUnavailableError, match="generating .* failed: its weights are missing"):
        prepare_images({"cat": 5})


def test_a_full_disk_is_an_error_and_no_reason_to_generate(monkeypatch):
    monkeypatch.setattr(ImageSources, "fetch_cifake", lambda images_per_class: (real(7), np.arange(7)))
    monkeypatch.setattr(ImageSources, "preset_at_hand", lambda: pytest.fail("it looked for a model"))

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ImageSources, "save_generated_images", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare_images({"cat": 5})


def test_generation_comes_third_and_makes_what_the_sampler_needs(tiny_turbo, tiny_data):
    X, y = minority_split(tiny_data.y_train, keep=4).cut(tiny_data.X_train, tiny_data.y_train)
    strategy = source_balanced_strategy(y)
    counts = {CIFAR10_CLASSES[c]: wanted - int(np.sum(y == c)) for c, wanted in strategy.items()}
    source = prepare_images(counts)
    # 26 cats that were removed, and 0.4 times 30 of each other class.
    assert source == f"the preset turbo, 134 images generated into {CACHE}"
    assert np.bincount(load_generated_images()[1]).tolist() == [12, 12, 12, 26, 12, 12, 12, 12, 12, 12]
    assert len(load_metadata()) == 134 and all(row["model"] for row in load_metadata())
    assert sorted(f.suffix for f in Path("datasets").iterdir() if f.is_file()) == [".csv", ".npy"]
    for sampling_strategy in ("auto", strategy):
        StableDiffusionOverSampler(sampling_strategy=sampling_strategy).fit_resample(X, y)


def test_a_generation_that_breaks_off_leaves_no_cache_and_is_continued(tiny_turbo, monkeypatch):
    generate_whole = ImageSources.generate_images

    def break_off_at_dogs(class_name, *arguments, **options):
        if class_name == "dog":
            raise SelectionError("Only 0 of 12 candidates pass")
        return generate_whole(class_name, *arguments, **options)

    monkeypatch.setattr(ImageSources, "generate_images", break_off_at_dogs)
    with pytest.raises(ImagesUnavailableError, match="generating .* failed: Only 0 of 12"):
        prepare_images({"cat": 3, "dog": 2})
    assert not CACHE.exists() and not CACHE.with_suffix(".csv").exists()
    monkeypatch.setattr(ImageSources, "generate_images", generate_whole)
    assert prepare_images({"cat": 3, "dog": 2}) == f"the preset turbo, 5 images generated into {CACHE}"
    assert load_generated_images()[1].tolist() == [3] * 3 + [5] * 2


def test_a_cache_that_is_a_symbolic_link_to_nothing_yet_is_filled_where_it_points(tiny_turbo):
    Path("elsewhere").mkdir()
    CACHE.parent.mkdir()
    CACHE.symlink_to(Path("elsewhere/images.npy").absolute())
    prepare_images({"cat": 3, "dog": 2})
    assert CACHE.is_symlink()
    assert load_generated_images("elsewhere/images.npy")[1].tolist() == [3] * 3 + [5] * 2
    assert [row["class"] for row in load_metadata()] == ["cat"] * 3 + ["dog"] * 2


def test_numbers_that_are_not_finite_are_a_reason_and_no_traceback(tiny_turbo, loaded):
    hook = loaded.painter._text_to_image.unet.conv_out.register_forward_hook(overflow)
    try:
        with pytest.raises(
            ImagesUnavailableError, match="generating .* failed: What the diffusion network drew"
        ):
            prepare_images({"cat": 3})
    finally:
        hook.remove()
    assert not CACHE.exists()


def test_of_several_processes_the_first_makes_the_images_alone(tiny_turbo, monkeypatch):
    """The others wait for the lock that it holds, so it would wait for them forever."""
    monkeypatch.setattr(
        StableDiffusionGeneration, "start_processes", lambda device: pytest.fail("it waits for the others")
    )
    assert prepare_images({"cat": 3}) == f"the preset turbo, 3 images generated into {CACHE}"


def test_a_second_study_waits_for_the_images_of_the_first(no_cifake, monkeypatch):
    monkeypatch.setattr(ImageSources, "preset_at_hand", lambda: pytest.fail("it did not wait"))

    def first_study():
        with one_process_at_a_time(CACHE.with_name("stable_diffusion_sources"), "imports"):
            started.set()
            time.sleep(0.3)
            save_generated_images(real(3), np.full(3, 3))

    started = threading.Event()
    first = threading.Thread(target=first_study)
    first.start()
    started.wait(10)
    assert prepare_images({"cat": 5}) == f"the cache {CACHE}: 3 images imported"
    first.join()


def test_a_folder_that_cannot_be_written_is_one_clear_error(no_cifake):
    CACHE.parent.write_text("a file")
    with pytest.raises(OSError, match="Cannot write"):
        prepare_images({"cat": 5})


def test_without_any_source_both_reasons_are_given(no_cifake, monkeypatch):
    monkeypatch.setattr(ImageSources, "preset_at_hand", lambda: None)
    with pytest.raises(ImagesUnavailableError, match=r"no CIFAKE here\. Generating images needs a GPU"):
        prepare_images({"cat": 5})


@pytest.mark.parametrize(
    ("device", "here", "expected"),
    [
        ("cpu", ("sd-turbo", "taesd", "clip", "v1-4"), None),
        ("cuda", ("sd-turbo", "taesd", "clip", "v1-4"), "turbo"),
        ("cuda", ("taesd", "clip", "v1-4"), "fast"),
        ("cuda", ("sd-turbo", "v1-4", "taesd"), None),
        ("cuda", (), None),
    ],
)
def test_generation_needs_a_gpu_and_every_model_of_a_preset(monkeypatch, device, here, expected):
    monkeypatch.setattr(ImageSources, "choose_device", lambda: torch.device(device))
    monkeypatch.setattr(ImageSources, "is_on_this_machine", lambda model: any(part in model for part in here))
    assert ImageSources.preset_at_hand() == expected


# --- What is refused ----------------------------------------------------------------------------


def test_images_from_elsewhere_are_not_overwritten_unasked(loaded, tiny_cache):
    before = tiny_cache.read_bytes()
    with pytest.raises(ValueError, match=r"already has 60 images of cat .*imported.*--replace"):
        generate(loaded, 3)
    assert tiny_cache.read_bytes() == before and not SHARDS.exists()
    generate(loaded, 3, replace=True)
    assert np.bincount(load_generated_images()[1]).tolist() == [60] * 3 + [3] + [60] * 6
    assert [row["model"] != "" for row in load_metadata()] == [False] * 180 + [True] * 3 + [False] * 360
    with pytest.raises(ValueError, match="already has 3 images of cat"):
        generate(make_maker(loaded, seed=1), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "best"}, "Unknown preset 'best'"),
        ({"downsampling": "nearest"}, "Unknown downsampling 'nearest'"),
        ({"prompts": "reference"}, "no 'reference' prompts for the class 'dog'"),
        ({"strengths": (0.5, 1.5)}, "Strengths must be above 0 and at most 1: got 0.5, 1.5"),
        ({"seed": -1}, "seed must not be negative"),
        ({"lora": "nowhere"}, "no adapter .* in nowhere"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(settings, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        maker = CandidateMaker(replace(settings, **change), device="cpu")
        generate_images("dog", 3, maker, real_images=real())
    assert not Path("datasets").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count must be at least 1"),
        (["--count", "3", "--class", "zebra"], "no 'varied' prompts for the class 'zebra'"),
        (["--count", "3", "--class", "dog", "--prompts", "reference"], "no 'reference' prompts"),
        (["--count", "3", "--device", "abacus"], "no device 'abacus'"),
        (["--count", "3", "--model", "./nowhere"], r"no model folder \./nowhere"),
        (["--count", "3", "--clip-model", "./nowhere"], r"no model folder \./nowhere"),
        (["--count", "3", "--margin", "1"], "Only 0 of 12 candidates"),
        (["--count", "3", "--split", "cat", "--from-images"], "Unknown split 'cat'"),
        (["--count", "3", "--lora", "nowhere"], "no adapter"),
    ],
)
def test_the_command_line_answers_with_one_clear_line(
    models, tiny_data, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(StableDiffusionGeneration, "load_cifar10", lambda: tiny_data)
    with pytest.raises(SystemExit) as caught:
        main(command_line(models, *arguments))
    assert caught.value.code == 1
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(message, line), line
    assert not CACHE.exists()


def test_generation_is_imported_without_the_heavy_libraries():
    code = (
        "import sys, StableDiffusionGeneration; "
        "print([m for m in ('diffusers', 'transformers', 'accelerate', 'peft') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100"], "size a multiple of 8: got steps 1, size 100"),
        (["--steps", "0"], "steps and batch size must be at least 1"),
        (["--steps", "1001"], "steps must be at most 1000"),
        (["--batch-size", "0"], "steps and batch size must be at least 1"),
        (["--count", "0"], "count must be at least 1"),
        (["--count", "-5"], "count must be at least 1"),
        (["--margin", "nan"], "margin .* from -1 to 1: got nan"),
        (["--margin", "2"], "margin .* from -1 to 1: got 2"),
        (["--similarity", "nan"], "similarity must be a number"),
        (["--from-images", "nan"], "Strengths must be above 0 and at most 1: got nan"),
        (["--from-images", "0"], "Strengths must be above 0"),
        (["--from-images", "1.5"], "Strengths must be above 0"),
        (["--seed", "-1"], "seed must not be negative"),
        (["--downsampling", "nearest"], "Unknown downsampling 'nearest'"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--label", "-1"], "label must be a class number, 0 or more: got -1"),
        (
            ["--class", "cat", "dog", "--label", "10"],
            "--label 10 is the number of one class, but 2 are given .cat, dog.",
        ),
        (["--class", "all", "--label", "10"], "--label 10 is the number of one class, but 10 are given"),
        (["--output", "x.csv"], "x.csv is the name of the cache's own table"),
        (["--output", "."], "is a folder"),
        (["--output", "file/x.npy"], "file is a file"),
        (["--shards", "file/shards"], "file is a file"),
        (["--lora", "nowhere"], "no adapter"),
    ],
)
def test_what_was_typed_is_checked_before_a_model_is_loaded(models, monkeypatch, capsys, arguments, message):
    for name in ("load_pipeline", "ClipFilter"):
        monkeypatch.setattr(CandidateImages, name, lambda *rest: pytest.fail("a model was loaded"))
    Path("file").write_text("text")
    with pytest.raises(SystemExit) as caught:
        main(command_line(models, "--count", "3", *arguments))
    assert caught.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert [f.name for f in Path().iterdir()] == ["file"]


def test_a_class_that_cifar10_lacks_needs_a_number(models, monkeypatch, capsys):
    monkeypatch.setitem(Prompts.PROMPTS, "zebra", Prompts.PROMPTS["cat"])
    with pytest.raises(SystemExit):
        main(command_line(models, "--count", "3", "--class", "zebra"))
    assert (
        "CIFAR-10 has no class 'zebra'. Give it a number in the cache with --label" in capsys.readouterr().err
    )


def test_a_damaged_cache_is_noticed_before_anything_is_drawn_even_if_it_may_be_replaced(loaded, monkeypatch):
    CACHE.parent.mkdir()
    CACHE.write_bytes(b"damaged")
    drawn = count_draws(make_maker(loaded), monkeypatch)
    with pytest.raises(ValueError, match=r"stable_diffusion_dataset\.npy is truncated, damaged"):
        generate(loaded, 3, replace=True)
    assert not drawn


def test_tildes_on_the_command_line_are_the_home_folder(models, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("turbo", "clip"):
        (tmp_path / "home" / name).symlink_to(models[name])
    own = ["--model", "~/turbo", "--clip-model", "~/clip", "--output", "~/out.npy", "--shards", "~/shards"]
    main(command_line(models, "--count", "2", *own))
    assert {f.name for f in (tmp_path / "home").iterdir()} == {
        "turbo",
        "clip",
        "out.npy",
        "out.csv",
        "shards",
    }
    assert not Path("~").exists()
    settings = GenerationSettings("turbo", "~/turbo", lora="~/adapter", clip_model="~/clip").completed()
    for path in (settings.model, settings.lora, settings.clip_model):
        assert path.startswith(str(tmp_path / "home"))


@pytest.mark.parametrize("output", ["outfile", "data.v1"])
def test_the_output_has_the_name_that_was_asked_for(models, output):
    main(command_line(models, "--count", "2", "--output", output))
    assert len(load_generated_images(output)[0]) == 2
    assert {f.name for f in Path().iterdir()} == {output, Path(output).with_suffix(".csv").name, "datasets"}


# --- Numbers that are not finite ----------------------------------------------------------------


def overflow(module, inputs, output):
    return output * float("nan")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda m: m.painter._text_to_image.unet.conv_out, "What the diffusion network drew"),
        (lambda m: m.painter._text_to_image.vae.decoder, "What the decoder made"),
        (lambda m: m.clip_filter._network.visual_projection, "The judgement"),
    ],
    ids=["diffusion network", "decoder", "CLIP"],
)
def test_numbers_that_are_not_finite_stop_the_generation_and_nothing_is_written(loaded, part, message):
    hook = part(loaded).register_forward_hook(overflow)
    try:
        with pytest.raises(FloatingPointError, match=f"{message}.* not finite"):
            generate(loaded, 3)
    finally:
        hook.remove()
    assert not CACHE.exists() and not list(SHARDS.glob("cat-*"))
    assert generate(loaded, 3)["kept"] == 3


def test_the_command_line_names_the_cause_and_the_cure_in_one_line(models, monkeypatch, capsys):
    load = CandidateImages.load_pipeline

    def load_overflowing(*arguments):
        pipeline = load(*arguments)
        pipeline.unet.conv_out.register_forward_hook(overflow)
        return pipeline

    monkeypatch.setattr(CandidateImages, "load_pipeline", load_overflowing)
    with pytest.raises(SystemExit) as caught:
        main(command_line(models, "--count", "3", "--dtype", "bfloat16"))
    assert caught.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        "in bfloat16 has numbers that are not finite" in line and "Choose float32 (--dtype float32)" in line
    )
    assert not CACHE.exists()


def test_candidates_that_clip_should_have_judged_and_did_not_are_not_let_in(loaded):
    generate(loaded, 4)
    before = CACHE.read_bytes()
    [shard] = shards_of().glob("*.npz")
    for margin in (np.full(4, np.nan), np.array([0.5, np.nan, 0.5, 0.5])):
        write_shard(shards_of(), read_shards(shards_of()) | {"margin": margin.astype(np.float32)})
        with pytest.raises(
            FloatingPointError, match="gave no judgement .NaN. of . candidates .*Remove the shards"
        ):
            generate(loaded, 4)
    assert CACHE.read_bytes() == before


@pytest.fixture
def job_on(settings, monkeypatch):
    """Function that finds the job of a device whose default is float16 or float32, with or without a wish."""

    def find(default, dtype=None):
        monkeypatch.setattr(CandidateImages, "choose_dtype", lambda device: default)
        return CandidateMaker(settings, device="cpu", dtype=dtype).describe_job("cat", 3)

    return find


def test_a_job_names_its_dtype_also_if_the_device_decides_it(settings, job_on):
    jobs = {dtype: job_on(torch.float32, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    assert len({name_job(job) for job in jobs.values()}) == 3
    for default in jobs:
        assert job_on(default) == jobs[default]
    assert jobs[torch.float16]["dtype"] == "float16"
    with pytest.raises(ValueError, match="Unknown dtype 'float64'. Choose one of float16, bfloat16, float32"):
        CandidateMaker(settings, dtype=torch.float64)


def test_numbers_of_numpy_name_the_same_job_as_plain_ones(settings):
    plain = replace(settings, seed=1, steps=2, size=64, strengths=(0.25, 0.5))
    numpy = replace(
        settings,
        seed=np.int64(1),
        steps=np.int32(2),
        size=np.uint16(64),
        strengths=np.array([0.25, 0.5], np.float32),
    )
    jobs = [
        CandidateMaker(each, device="cpu").describe_job("cat", label, real())
        for each, label in ((plain, 3), (numpy, np.int64(3)))
    ]
    assert name_job(jobs[0]) == name_job(jobs[1])
    assert json.loads(json.dumps(jobs[1])) == json.loads(json.dumps(jobs[0]))


def test_float32_is_not_answered_from_the_shards_of_float16(models):
    arguments = command_line(models, "--count", "2", "--output", "first.npy")
    main([*arguments, "--dtype", "bfloat16"])
    main([*arguments, "--dtype", "float32", "--output", "second.npy"])
    assert len(list(SHARDS.iterdir())) == 2
    first, second = (load_generated_images(name)[0] for name in ("first.npy", "second.npy"))
    assert not np.array_equal(first, second)


# --- Several runs of one job --------------------------------------------------------------------


def test_shards_of_two_runs_that_overlap_give_each_candidate_once(loaded, small_shards):
    generate(loaded, 10)
    expected = CACHE.read_bytes()
    whole = read_shards(shards_of())
    write_shard(shards_of(), {name: column[8:] for name, column in whole.items()})
    write_shard(shards_of(), {name: column[6:9] for name, column in whole.items()})
    write_shard(shards_of(), {name: column[:10] for name, column in whole.items()})
    assert read_shards(shards_of())["index"].tolist() == list(range(10))
    assert find_missing(shards_of(), 12) == [[10, 11]]
    generate(loaded, 10)
    assert CACHE.read_bytes() == expected


def test_a_second_run_of_a_job_waits_and_leaves_the_files_of_the_first_alone(loaded):
    folder = SHARDS / name_job(loaded.describe_job("cat", 3))
    unfinished = folder / ".000000-000002-abc.npz"
    seen = []

    def first_run():
        with one_process_at_a_time(folder, "draws"):
            folder.mkdir(parents=True)
            unfinished.write_bytes(b"half")
            started.set()
            time.sleep(0.4)
            seen.append(unfinished.exists())

    started = threading.Event()
    first = threading.Thread(target=first_run)
    first.start()
    started.wait(10)
    generate(loaded, 3)
    first.join()
    assert seen == [True]
    assert {f.name for f in folder.iterdir()} == {"000000-000002.npz", "settings.json", "report.json"}
    assert [f.name for f in SHARDS.iterdir()] == [folder.name]


def test_images_that_were_imported_while_the_generation_ran_are_not_replaced_unasked(loaded, monkeypatch):
    maker = make_maker(loaded)
    draw = maker.painter.draw

    def import_meanwhile(*arguments):
        save_generated_images(real(4), np.full(4, 3))
        return draw(*arguments)

    monkeypatch.setattr(maker.painter, "draw", import_meanwhile)
    with pytest.raises(ValueError, match="already has 4 images of cat .*imported"):
        generate(maker, 3)
    assert describe_cache() == "4 images imported"
    assert len(read_shards(shards_of())["index"]) == 3  # what was drawn stays


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: {name: column for name, column in shard.items() if name != "margin"},
        lambda shard: shard | {"margin": shard["margin"][:2]},
        lambda shard: shard | {"image": shard["image"][:, :16]},
        lambda shard: shard | {"image": shard["image"].astype(np.float32)},
    ],
    ids=["a column less", "a shorter column", "smaller images", "images of another type"],
)
def test_a_shard_that_does_not_fit_the_others_is_named(loaded, damage, small_shards):
    generate(loaded, 8)
    whole = read_shards(shards_of())
    write_shard(shards_of(), damage({name: column[4:] for name, column in whole.items()}))
    with pytest.raises(ValueError, match=r"shard .*000004-000007\.npz is truncated or damaged"):
        read_shards(shards_of())


def test_candidates_of_another_machine_may_appear_late(loaded, small_shards, monkeypatch):
    generate(loaded, 8)
    late = next(shards_of().glob("000004-*.npz"))
    hidden = late.rename("hidden.npz")
    monkeypatch.setattr(
        CandidateImages.time, "sleep", lambda seconds: hidden.exists() and hidden.rename(late)
    )
    assert len(read_candidates(shards_of(), 8)["index"]) == 8


def test_candidates_that_another_process_wrote_elsewhere_are_missed(loaded, small_shards, monkeypatch):
    monkeypatch.setattr(CandidateImages, "PATIENCE", 0)
    generate(loaded, 8)
    assert len(read_candidates(shards_of(), 6)["index"]) == 6
    with pytest.raises(OSError, match="has 8 of the 9 candidates .* must see the same disk"):
        read_candidates(shards_of(), 9)
    with pytest.raises(OSError, match="has 0 of the 4 candidates"):
        read_candidates("nowhere", 4)


# --- Several processes, and kills ---------------------------------------------------------------


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def test_two_processes_make_what_one_makes(models):
    count = ("--count", "150")
    main(command_line(models, *count, "--output", "one.npy", "--shards", "one"))
    # With --cpu accelerate always starts one process. With --multi_gpu it starts two, as on a machine with
    # two GPUs. They compute on the CPU because of our own --device.
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(REPOSITORY / "StableDiffusionGeneration.py"),
        *command_line(models, *count, "--output", "two.npy", "--shards", "two"),
    ]  # fmt: skip
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert answer.stdout.count("150 images of cat from 150 candidates") == 1  # only one process prints
    assert "86/86" in answer.stderr  # the first process drew shards 0 and 2: 64 + 22 images
    assert Path("two.npy").read_bytes() == Path("one.npy").read_bytes()
    assert Path("two.csv").read_bytes() == Path("one.csv").read_bytes()
    names = {f.name for f in Path("two").rglob("*")}
    assert names == {f.name for f in Path("one").rglob("*")}
    assert sum(name.endswith(".npz") for name in names) == 3


def test_after_a_kill_the_result_is_the_same_byte_for_byte(models):
    arguments = command_line(models, "--count", "256", "--batch-size", "8")
    script = str(REPOSITORY / "StableDiffusionGeneration.py")
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while process.poll() is None and len(list(Path("datasets").rglob("0*.npz"))) < 1:
            time.sleep(0.02)
        assert process.poll() is None, process.stdout.read().decode()[-3000:]
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    finished = {f: f.stat().st_mtime_ns for f in Path("datasets").rglob("0*.npz")}
    assert 1 <= len(finished) < 4
    assert not CACHE.exists()
    main(arguments)
    assert all(f.stat().st_mtime_ns == then for f, then in finished.items())  # none was drawn again
    main([*arguments, "--output", "whole.npy", "--shards", "whole"])
    assert CACHE.read_bytes() == Path("whole.npy").read_bytes()
    assert CACHE.with_suffix(".csv").read_bytes() == Path("whole.csv").read_bytes()
    assert len(load_generated_images()[0]) == 256

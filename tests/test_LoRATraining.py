"""Training adapters on the real images of a class."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import LoRATraining
from CandidateImages import CandidateMaker, GenerationSettings, name_job
from DiffusionPipelines import ModelUnavailableError, load_pipeline
from Files import one_process_at_a_time
from ImageCache import fingerprint
from ImbalancedCIFAR10 import minority_split
from LoRATraining import STATE, WEIGHTS, LoRARecipe, images_of_adapter, main, train_lora
from Painter import Painter


@pytest.fixture
def recipe(models):
    return LoRARecipe(models["stable"], rank=2, steps=4, batch_size=4, learning_rate=1e-2, size=64)


@pytest.fixture
def X():
    """A few similar images: dark on the left, bright on the right."""
    ramp = np.linspace(0, 255, 32)[None, None, :, None]
    noise = np.random.default_rng(0).normal(0, 10, size=(5, 32, 32, 3))
    return np.clip(ramp + noise, 0, 255).astype(np.uint8)


def train(X, recipe, folder="adapter", **options):
    return train_lora(X, "cat", folder, recipe, device="cpu", **options)


def weights(folder="adapter"):
    return load_file(Path(folder, WEIGHTS))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def in_float32(monkeypatch):
    """Small losses are compared here; bfloat16 would blur them."""
    monkeypatch.setattr("Precision.half_precision", lambda device: None)


def test_the_loss_falls(X, recipe, in_float32):
    # Every step has its own noise, which is the same in both runs. Only what was learned differs.
    trained = train(X, replace(recipe, steps=40, rank=8))
    untrained = train(X, replace(recipe, steps=40, rank=8, learning_rate=0), "untrained")
    assert len(trained) == 40 and trained[0] == untrained[0]
    assert np.mean(trained[-10:]) < 0.9 * np.mean(untrained[-10:])


def test_the_pipelines_own_function_reads_the_adapter_and_it_changes_the_images(models, X, recipe):
    train(X, replace(recipe, steps=20))
    plain = load_pipeline("fast", models["stable"], device="cpu", dtype=torch.float32)
    before, _ = Painter(plain, "fast", 4, size=64).draw(["a cat"], [0])
    plain.load_lora_weights("adapter")
    loaded, _ = Painter(plain, "fast", 4, size=64).draw(["a cat"], [0])
    merged = load_pipeline("fast", models["stable"], "adapter", "cpu", torch.float32)
    ours, _ = Painter(merged, "fast", 4, size=64).draw(["a cat"], [0])
    before, loaded, ours = (np.asarray(images[0]).astype(int) for images in (before, loaded, ours))
    assert np.abs(loaded - ours).max() <= 1  # merged into the weights it is the same adapter
    assert np.abs(loaded - before).max() > 5
    assert all("lora" in name for name in weights())


def test_only_the_adapter_is_trained(X, recipe):
    train(X, recipe)
    shapes = {tuple(w.shape) for w in weights().values()}
    assert all(min(shape) == recipe.rank for shape in shapes)  # matrices of the rank, nothing else
    assert sum(w.numel() for w in weights().values()) < 20_000


def test_after_a_kill_training_continues_to_the_same_adapter(X, recipe, monkeypatch):
    history = train(X, recipe, "whole")
    monkeypatch.setattr(LoRATraining, "SAVE_EVERY", 2)

    class Killed(BaseException):
        pass

    steps = iter(range(100))
    backward = LoRATraining._backward

    def killed_in_step_four(*arguments):
        if next(steps) == 3:
            raise Killed
        return backward(*arguments)

    monkeypatch.setattr(LoRATraining, "_backward", killed_in_step_four)
    with pytest.raises(Killed):
        train(X, recipe)
    assert [f.name for f in Path("adapter").iterdir()] == [STATE]
    trained = []
    monkeypatch.setattr(LoRATraining, "_backward", lambda *a: trained.append(1) or backward(*a))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="precision: .* there, other now"):
        patch.setattr("Precision.precision_name", lambda device: "other")
        train(X, recipe)
    assert train(X, recipe) == history
    assert len(trained) == 2  # the first two steps were kept
    assert same(weights(), weights("whole"))
    trained.clear()
    monkeypatch.setattr("Precision.precision_name", lambda device: "other")
    assert train(X, recipe) == history and not trained  # finished, so any device may use it


def test_the_same_seed_gives_the_same_adapter_whatever_the_caller_draws(X, recipe):
    torch.manual_seed(1)
    train(X, recipe, "first")
    torch.manual_seed(2)
    train(X, recipe, "second")
    train(X, recipe, "other", seed=1)
    assert same(weights("first"), weights("second"))
    assert not same(weights("first"), weights("other"))


def test_out_of_memory_continues_with_smaller_portions_to_nearly_the_same_loss(
    X, recipe, monkeypatch, capsys, in_float32
):
    expected = train(X, recipe, "whole")
    backward = LoRATraining._backward

    def limited(unet, batch, text, portion, *rest):
        if portion > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return backward(unet, batch, text, portion, *rest)

    monkeypatch.setattr(LoRATraining, "_backward", limited)
    assert train(X, recipe) == pytest.approx(expected, rel=1e-3)
    said = capsys.readouterr().out
    assert "portions of 2 images" in said and "portions of 1 images" in said and "twice" not in said

    def limited_further(unet, *rest):
        if not unet.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return backward(unet, *rest)

    monkeypatch.setattr(LoRATraining, "_backward", limited_further)
    assert train(X, recipe, "second") == pytest.approx(expected, rel=1e-3)
    said = capsys.readouterr().out
    assert "portions of 1 images" in said and "activations computed twice" in said

    def never(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LoRATraining, "_backward", never)
    with pytest.raises(MemoryError, match=r"too little memory on cpu to train with a single image of 64x64"):
        train(X, recipe, "third")


def test_a_second_training_in_the_same_folder_waits_for_the_first(X, recipe, monkeypatch):
    history = train(X, replace(recipe, steps=1), "whole")
    finished = [Path("whole", name).read_bytes() for name in (STATE, WEIGHTS)]
    monkeypatch.setattr(LoRATraining, "_load_base_model", lambda *rest: pytest.fail("it did not wait"))

    def first_training():
        with one_process_at_a_time("adapter", "trains this adapter"):
            started.set()
            time.sleep(0.3)
            Path("adapter").mkdir()
            for name, content in zip((STATE, WEIGHTS), finished, strict=True):
                Path("adapter", name).write_bytes(content)

    started = threading.Event()
    first = threading.Thread(target=first_training)
    first.start()
    started.wait(10)
    assert train(X, replace(recipe, steps=1)) == history
    first.join()
    assert {f.name for f in Path().iterdir()} == {"whole", "adapter"}


def test_a_folder_keeps_the_adapter_it_has(X, recipe):
    train(X, recipe)
    before = Path("adapter", WEIGHTS).read_bytes()
    for images, options, different in (
        (X[:3], {}, "images"),
        (X, {"seed": 1}, "seed"),
        (X, {"rank": 3}, "rank"),
    ):
        seed = options.pop("seed", 0)
        with pytest.raises(
            ValueError, match=rf"belongs to another training \({different}: .* there, .* now\)\. Remove it"
        ):
            train(images, replace(recipe, **options), seed=seed)
    Path("adapter", STATE).unlink()
    with pytest.raises(ValueError, match="has an adapter from elsewhere"):
        train(X, recipe)
    assert Path("adapter", WEIGHTS).read_bytes() == before


def test_the_adapter_of_a_finished_training_is_written_again_if_it_is_missing(X, recipe, monkeypatch):
    history = train(X, recipe)
    before = Path("adapter", WEIGHTS).read_bytes()
    Path("adapter", WEIGHTS).unlink()
    monkeypatch.setattr(LoRATraining, "_load_base_model", lambda *rest: pytest.fail("it was trained again"))
    monkeypatch.setattr("Precision.precision_name", lambda device: "other")
    assert train(X, recipe) == history
    assert Path("adapter", WEIGHTS).read_bytes() == before


def test_a_damaged_state_is_named(X, recipe):
    train(X, recipe)
    Path("adapter", STATE).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"training_state\.pt is damaged"):
        train(X, recipe)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "at least 1"),
        ({"rank": 0}, ValueError, "at least 1"),
        ({"size": 100}, ValueError, "size must be a multiple of 8 pixels: got 100"),
        ({"size": 0}, ValueError, "size must be a multiple of 8"),
        (
            {"learning_rate": float("nan")},
            ValueError,
            "learning rate must be a finite number, 0 or more: got nan",
        ),
        ({"learning_rate": float("inf")}, ValueError, "learning rate must be a finite number"),
        ({"learning_rate": -1.0}, ValueError, "learning rate must be a finite number"),
        ({"model": "./nowhere"}, ModelUnavailableError, "no model folder"),
        ({"learning_rate": 1e30}, FloatingPointError, r"The loss of step \d is .*Lower the learning rate"),
    ],
)
def test_what_cannot_be_trained_is_refused(X, recipe, change, error, message):
    with pytest.raises(error, match=message):
        train(X, replace(recipe, **change))
    assert not Path("adapter", WEIGHTS).exists()


@pytest.mark.parametrize("name", ["rank", "steps", "batch_size", "size"])
def test_a_number_that_must_be_whole_and_is_not_is_refused(name):
    for value in (2.5, 8.0, float("nan"), "8", None):
        with pytest.raises(ValueError, match=f"{name} must be a whole number: got {value!r}"):
            LoRARecipe(**{name: value}).check()
    LoRARecipe(**{name: np.int64(8)}).check()


@pytest.mark.parametrize("class_name", ["", "   ", None])
def test_a_class_without_a_name_is_refused(X, recipe, class_name):
    with pytest.raises(ValueError, match="A class needs a name for the prompt"):
        train_lora(X, class_name, "adapter", recipe, device="cpu")
    assert not Path("adapter").exists()


def test_a_negative_seed_or_a_file_in_the_way_is_refused_before_a_model_is_loaded(X, recipe, monkeypatch):
    monkeypatch.setattr(LoRATraining, "_load_base_model", lambda *arguments: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="seed must not be negative: got -1"):
        train(X, recipe, seed=-1)
    Path("file").write_text("text")
    with pytest.raises(OSError, match="Cannot write file/adapter.*Choose a folder"):
        train(X, recipe, "file/adapter")


def test_a_tilde_in_the_output_folder_is_the_home_folder(X, recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train(X, replace(recipe, steps=1), "~/adapter")
    assert (tmp_path / "home" / "adapter" / WEIGHTS).exists() and not Path("~").exists()


# --- Numbers that are not finite ----------------------------------------------------------------


def overflow(module, inputs, output):
    values = output if torch.is_tensor(output) else output[0]
    return (values * float("nan"),) if isinstance(output, tuple) else values * float("nan")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda p: p.vae.encoder, "encoding of the images by the model .* not finite"),
        (
            lambda p: p.text_encoder.final_layer_norm,
            "prompt's encoding by the model .* not finite",
        ),
        (
            lambda p: p.unet.conv_out,
            "loss of the first step is nan, before anything was learned, so the model",
        ),
    ],
)
def test_a_network_that_overflows_is_named_and_not_the_learning_rate(X, recipe, monkeypatch, part, message):
    load = LoRATraining._load_base_model

    def load_overflowing(*arguments):
        pipeline = load(*arguments)
        part(pipeline).register_forward_hook(overflow)
        return pipeline

    monkeypatch.setattr(LoRATraining, "_load_base_model", load_overflowing)
    with pytest.raises(FloatingPointError, match=message) as caught:
        train(X, recipe)
    assert "learning rate" not in str(caught.value)
    assert not [f for f in Path("adapter").glob("*")]


@pytest.mark.parametrize("steps", [1, 2])
def test_an_adapter_that_the_last_step_broke_is_not_saved(X, recipe, monkeypatch, steps):
    """The loss is computed before the step, so it cannot tell."""
    step = torch.optim.AdamW.step

    def break_in_the_last(optimizer, *arguments):
        step(optimizer, *arguments)
        done.append(1)
        if len(done) == steps:
            optimizer.param_groups[0]["params"][0].data[0, 0] = float("nan")

    done = []
    monkeypatch.setattr(torch.optim.AdamW, "step", break_in_the_last)
    with pytest.raises(FloatingPointError, match=f"After step {steps} the adapter is no longer finite"):
        train(X, replace(recipe, steps=steps))
    assert not [f for f in Path("adapter").glob("*")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100"], "size must be a multiple of 8"),
        (["--learning-rate", "nan"], "learning rate must be a finite number"),
        (["--rank", "0"], "at least 1"),
        (["--seed", "-1"], "seed must not be negative"),
        (["--class", ""], "Unknown class ''"),
        (["--model", "./nowhere", "--split", "cat"], "Unknown split 'cat'"),
    ],
)
def test_what_was_typed_is_checked_before_a_model_is_loaded(
    tiny_data, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(LoRATraining, "load_cifar10", lambda: tiny_data)
    monkeypatch.setattr(LoRATraining, "_load_base_model", lambda *rest: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit) as caught:
        main(["--class", "cat", "--output", "adapter", "--device", "cpu", "--split", "cat-4", *arguments])
    assert caught.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_images_of_another_type_are_refused(X, recipe):
    with pytest.raises(TypeError, match="dtype is float"):
        train(X / 255, recipe)


def test_a_full_disk_is_noticed_before_the_training(X, recipe, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(OSError, match=r"0\.10 GB are needed"):
        train(X, recipe)


def test_another_adapter_makes_another_job_of_the_same_settings():
    settings = GenerationSettings("fast", "model", lora="adapter")
    Path("adapter").mkdir()
    names = set()
    for content in (b"first", b"second", b"first"):
        Path("adapter", WEIGHTS).write_bytes(content)
        names.add(name_job(CandidateMaker(settings, device="cpu").describe_job("cat", 3)))
    assert len(names) == 2


def test_the_command_line_trains_on_the_kept_images_alone(models, tiny_data, monkeypatch, capsys):
    split = minority_split(tiny_data.y_train, keep=4)
    poisoned = tiny_data.X_train.copy()
    poisoned[np.setdiff1d(np.arange(300), split.kept_rows(tiny_data.y_train))] = 255
    for name, X in (("clean", tiny_data.X_train), ("poisoned", poisoned), ("kept", tiny_data.X_train // 2)):
        monkeypatch.setattr(LoRATraining, "load_cifar10", lambda X=X: replace(tiny_data, X_train=X))
        main(
            ["--class", "cat", "--split", "cat-4", "--output", name, "--model", models["stable"], "--rank", "2",
             "--steps", "3", "--size", "64", "--device", "cpu"]
        )  # fmt: skip
    kept, labels = split.cut(tiny_data.X_train, tiny_data.y_train)
    assert images_of_adapter("clean") == fingerprint(kept[labels == 3])
    assert images_of_adapter("elsewhere") is None
    assert same(weights("clean"), weights("poisoned"))
    assert not same(weights("clean"), weights("kept"))
    assert "clean: adapter of rank 2 from 4 images, loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--class", "zebra", "--output", "x"])
    assert "Unknown class 'zebra'" in capsys.readouterr().err

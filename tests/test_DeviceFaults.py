"""A device that fails in the middle of a run: one line, and the same command goes on."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from test_ClassifierNetwork import X, equal_weights, small_model, y
from test_GANGeneration import TINY
from test_GANNetworks import equal

import ClassifierTraining
import Experiment
import LoRATraining
from Checkpoints import load_torch_file, save_torch_file
from ClassifierTraining import Recipe, train_classifier
from DeviceFaults import DeviceFaultError, describe_fault, device_faults
from DiffusionPipelines import load_pipeline
from GANGeneration import train_gan
from GANTrainingStep import Adversaries
from Painter import Painter

LAUNCH = torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
LOST = RuntimeError("CUDA error: device is lost or was reset\nmore")
CUDNN = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
RECIPE = Recipe(steps=7, batch_size=8)  # four epochs


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LAUNCH, "The device failed (CUDA error: unspecified launch failure)."),
        (LOST, "The device failed (CUDA error: device is lost or was reset)."),
        (CUDNN, "The device failed (cuDNN error: CUDNN_STATUS_EXECUTION_FAILED)."),
        (MEMORY, "The device has too little free memory (CUDA out of memory. Tried to allocate 2.00 GiB)."),
        (
            RuntimeError("GET was unable to find an engine to execute this computation"),
            "The device has too little free memory (GET was unable",
        ),
        (RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "The device has too little"),
        (RuntimeError("CUDA error: out of memory"), "The device has too little free memory (CUDA error: out"),
        (
            RuntimeError("MPS backend out of memory (used: 1 GB)"),
            "The device has too little free memory (MPS",
        ),
    ],
    ids=str,
)
def test_faults_of_a_device_are_told_in_one_line(error, said):
    line = describe_fault(error)
    assert line.startswith(said) and "\n" not in line


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("CUDA error: no"), KeyError("x")]
)
def test_other_errors_are_left_as_they_are(error):
    assert describe_fault(error) is None
    with pytest.raises(type(error)) as caught, device_faults("The run"):
        raise error
    assert caught.value is error


def test_an_adapters_training_and_drawing_end_with_a_clear_line(monkeypatch, models):
    pipeline = load_pipeline("fast", models["stable"], device="cpu", dtype=torch.float32)
    monkeypatch.setattr(type(pipeline.unet), "forward", failing_at(1, None, LAUNCH))
    with pytest.raises(
        DeviceFaultError, match=r"Drawing images was broken off\..*run the same command again\.$"
    ):
        Painter(pipeline, "fast", size=64).draw(["a cat"], [0])
    monkeypatch.setattr(LoRATraining, "_backward", failing_at(1, None, LOST))
    recipe = LoRATraining.LoRARecipe(models["stable"], rank=2, steps=2, batch_size=2, size=64)
    with pytest.raises(OSError, match="The training of the adapter was broken off.*no checkpoint yet"):
        LoRATraining.train_lora(X, "cat", "adapter", recipe, device="cpu")


def failing_at(calls, function, error):
    """The function, except that its call of that number, from 1, raises the error."""
    made = []

    def failing(*arguments, **options):
        made.append(1)
        if len(made) == calls:
            raise error
        return function(*arguments, **options)

    return failing


@pytest.mark.parametrize("error", [LAUNCH, MEMORY, LOST], ids=["launch", "memory", "lost"])
def test_a_classifiers_training_goes_on_after_a_fault(monkeypatch, error):
    whole = small_model(device="cpu")
    train_classifier(whole, X, y, RECIPE, seed=0)
    with monkeypatch.context() as patch:
        step = ClassifierTraining._forward_and_backward
        patch.setattr(ClassifierTraining, "_forward_and_backward", failing_at(4, step, error))
        with pytest.raises(
            DeviceFaultError, match=r"The training run was broken off\..*same command.*run\.pt"
        ):
            train_classifier(small_model(device="cpu"), X, y, RECIPE, seed=0, checkpoint="run.pt")
    assert torch.load("run.pt", weights_only=True)["history"][-1]["step"] == 2
    resumed = small_model(seed=9, device="cpu")
    train_classifier(resumed, X, y, RECIPE, seed=0, checkpoint="run.pt")
    assert equal_weights(resumed, whole)


def test_a_fault_before_the_first_checkpoint_says_that_there_is_none(monkeypatch):
    monkeypatch.setattr(ClassifierTraining, "_forward_and_backward", failing_at(1, None, LAUNCH))
    with pytest.raises(DeviceFaultError, match="starts again, because there was no checkpoint yet"):
        train_classifier(small_model(device="cpu"), X, y, RECIPE, seed=0, checkpoint="run.pt")
    assert not list(Path().iterdir())


def test_a_gans_training_goes_on_after_a_fault(monkeypatch):
    labels = np.repeat([0, 1, 2], [20, 20, 4])
    images, settings = make_images(labels, 0), dataclasses.replace(TINY, steps=4, records=4)
    whole = train_gan(images, labels, settings, seed=0, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Adversaries, "step", failing_at(3, Adversaries.step, LAUNCH))
        with pytest.raises(DeviceFaultError, match=r"The training of the GAN was broken off\..*gan\.pt"):
            train_gan(images, labels, settings, seed=0, device="cpu", checkpoint="gan.pt")
    resumed = train_gan(images, labels, settings, seed=0, device="cpu", checkpoint="gan.pt")
    assert equal(resumed.generator.state_dict(), whole.generator.state_dict())


def test_a_fault_while_a_checkpoint_is_written_is_no_full_disk_and_leaves_the_last_one(monkeypatch):
    save_torch_file("run.pt", {"step": 1})
    monkeypatch.setattr(torch, "save", failing_at(1, None, LAUNCH))
    with pytest.raises(torch.AcceleratorError):
        save_torch_file("run.pt", {"step": 2})
    assert load_torch_file("run.pt", {"step"}) == {"step": 1}
    assert [path.name for path in Path().iterdir()] == ["run.pt"]


def test_the_command_line_ends_with_one_line(monkeypatch, capsys, tiny_data):
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    monkeypatch.setattr(ClassifierTraining, "_forward_and_backward", failing_at(1, None, LAUNCH))
    with pytest.raises(SystemExit) as ended:
        Experiment.main(["--arm", "imbalanced", "--split", "cat-5", "--profile", "smoke", "--device", "cpu"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1
    assert (
        "imbalanced-seed0 was broken off. The device failed (CUDA error: unspecified launch failure)" in last
    )

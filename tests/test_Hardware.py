"""What is said about an NVIDIA GPU that PyTorch cannot use. nvidia-smi is a script here, and the driver a text."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import Hardware
from Hardware import Driver, _has_kernels, find_driver, unusable_gpu
from Runtime import choose_device

T4, H100 = ("Tesla T4", "7.5"), ("NVIDIA H100 80GB HBM3", "9.0")
V100 = ("Tesla V100-SXM2-16GB", "7.0")
OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@host)  Tue Sep 23\n"
    "GCC version:  gcc version 13.3.0\n"
)
CLOSED_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc\n"


@pytest.fixture
def nvidia_smi(own_folder, monkeypatch):
    """Put an nvidia-smi on the path that knows these GPUs, (name, compute capability) each."""

    def install(*gpus, driver="580.95.05", status=0, knows_capability=True):
        folder = own_folder / "bin"
        folder.mkdir()
        names = "\n".join(f"{driver}, {name}" for name, _ in gpus)
        capabilities = "\n".join(capability for _, capability in gpus)
        if not knows_capability:
            capabilities = 'Field "compute_cap" is not a valid field to query.'
        script = folder / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncase \"$1\" in *compute_cap) echo '{capabilities}';; *) echo '{names}';; esac\n"
                          f"exit {status}\n")  # fmt: skip
        script.chmod(0o755)

    # Whatever this machine has is not found.
    monkeypatch.setenv("PATH", str(own_folder / "bin"))
    monkeypatch.setattr(Hardware, "PROC", own_folder / "proc")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


@pytest.fixture
def pytorch(monkeypatch):
    """Make PyTorch one that was built for a CUDA version, and that finds no GPU unless told otherwise."""

    def become(version, cuda, finds_gpu=False, architectures=("sm_75", "sm_80", "sm_90", "sm_120")):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: finds_gpu)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))

    return become


def proc(folder, version, models):
    for number, model in enumerate(models):
        gpu = folder / "proc" / "gpus" / f"0000:0{number}:00.0"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 24\n")
    (folder / "proc").mkdir(exist_ok=True)
    (folder / "proc" / "version").write_text(version)


# --- The driver ---------------------------------------------------------------------------------


def test_nvidia_smi_tells_driver_gpus_and_the_lowest_capability(nvidia_smi):
    nvidia_smi(H100, T4)
    assert find_driver() == Driver("580.95.05", (H100[0], T4[0]), (7, 5))
    assert find_driver().major == 580


def test_an_older_nvidia_smi_does_not_know_the_capability(nvidia_smi):
    nvidia_smi(T4, driver="470.57.02", knows_capability=False)
    assert find_driver() == Driver("470.57.02", (T4[0],), None)


@pytest.mark.parametrize(
    ("text", "version"), [(OPEN_DRIVER, "580.95.05"), (CLOSED_DRIVER, "535.104.05")], ids=["open", "closed"]
)
@pytest.mark.parametrize("broken_nvidia_smi", [False, True])
def test_without_nvidia_smi_the_kernel_tells(nvidia_smi, own_folder, broken_nvidia_smi, text, version):
    if broken_nvidia_smi:
        nvidia_smi(("Failed to initialize NVML", "9.0"), status=9)
    proc(own_folder, text, ["NVIDIA L4"])
    found = find_driver()
    assert (found.version, found.gpus) == (version, ("NVIDIA L4",))


def test_a_machine_without_an_nvidia_gpu_has_none(nvidia_smi, own_folder):
    assert find_driver() is None
    proc(own_folder, OPEN_DRIVER, [])
    assert find_driver() is None, "a driver without a GPU"
    nvidia_smi(("No devices were found", "9.0"), status=6)
    assert find_driver() is None and unusable_gpu() is None


# --- What is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "driver", "version", "cuda", "cause", "mend"),
    [
        (T4, "535.104.05", "2.14.1+cu130", "13.0", "CUDA 13.0 needs driver 580", "TORCH_INDEX=.*/cu126$"),
        (H100, "535.104.05", "2.14.1+cu130", "13.0", "CUDA 13.0 needs driver 580", "apt install nvidia-driver-580"),
        (T4, "470.57.02", "2.9.0+cu126", "12.6", "CUDA 12.6 needs driver 525", "apt install nvidia-driver-580"),
        (H100, "580.95.05", "2.14.1+cpu", None, "this build has no CUDA", "TORCH_INDEX=.*/cu130$"),
        (V100, "580.95.05", "2.14.1+cpu", None, "this build has no CUDA", "TORCH_INDEX=.*/cu126$"),
    ],
)  # fmt: skip
def test_versions_cause_and_mend_are_named(nvidia_smi, pytorch, gpu, driver, version, cuda, cause, mend):
    nvidia_smi(gpu, driver=driver)
    pytorch(version, cuda)
    message = unusable_gpu()
    for part in (
        gpu[0],
        f"driver {driver}",
        f"PyTorch {version}",
        f"CUDA {cuda}" if cuda else "no CUDA",
        cause,
    ):
        assert part in message
    assert re.search(mend, message)


@pytest.mark.parametrize("value", ["", "-1", "3", "-1,0"])
def test_a_hidden_gpu_is_said(nvidia_smi, pytorch, monkeypatch, value):
    nvidia_smi(H100)
    pytorch("2.14.1+cu130", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU. Run: unset CUDA" in unusable_gpu()


@pytest.mark.parametrize("value", [None, "0", "0,5", "GPU-8932f937"])
def test_another_cause_is_what_pytorch_says(nvidia_smi, pytorch, monkeypatch, value):
    def init():
        raise RuntimeError("CUDA unknown error - this may be due to a fork.\nMore about it.")

    nvidia_smi(H100)
    pytorch("2.14.1+cu130", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert "cannot use it: CUDA unknown error - this may be due to a fork. See what" in unusable_gpu()


def test_a_container_without_the_gpu_is_said(nvidia_smi, pytorch, own_folder, monkeypatch):
    proc(own_folder, OPEN_DRIVER, ["NVIDIA L4"])
    pytorch("2.14.1+cu130", "13.0")
    monkeypatch.setattr(
        Hardware, "find_driver", lambda: Driver("580.95.05", ("NVIDIA L4",), accessible=False)
    )
    assert "no access to it (there is no /dev/nvidia0). Start the container" in unusable_gpu()


def test_a_gpu_older_than_the_wheels_kernels_is_not_chosen_and_said(nvidia_smi, pytorch, monkeypatch):
    nvidia_smi(V100)
    pytorch("2.14.1+cu130", "13.0", finds_gpu=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device().type == "cpu"
    assert "no kernels for compute capability 7.0. Run: make main TORCH_INDEX=" in unusable_gpu()
    pytorch("2.14.1+cu126", "12.6", finds_gpu=True, architectures=("sm_50", "sm_60", "sm_70"))
    assert choose_device().type == "cuda"
    assert unusable_gpu() is None


def test_a_gpu_that_does_not_start_is_not_chosen(nvidia_smi, pytorch, monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    nvidia_smi(H100)
    pytorch("2.14.1+cu130", "13.0", finds_gpu=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device().type == "cpu"
    assert "busy or unavailable. See what this prints: nvidia-smi" in unusable_gpu()


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["sm_75", "sm_80"], (8, 6), True),  # machine code of the same major version
        (["sm_75", "sm_86"], (8, 0), False),
        (["sm_75", "sm_80"], (9, 0), False),
        (["sm_75", "compute_80"], (9, 0), True),
        (["sm_90a", "sm_100f"], (10, 0), True),
        (["sm_75"], (7, 0), False),
        ([], (7, 0), True),  # nothing is known
    ],
)
def test_which_kernels_run_on_which_gpu(architectures, capability, expected):
    assert _has_kernels(architectures, capability) is expected


def test_the_command_says_nothing_without_a_gpu_and_asks_nothing(nvidia_smi):
    command = [sys.executable, str(REPOSITORY / "Hardware.py")]
    if not Path("/proc/driver/nvidia").exists():
        answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    nvidia_smi(T4, driver="390.48")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment
    )
    assert answer.returncode == 0 and answer.stderr == ""
    first, second = answer.stdout.splitlines()
    assert "Tesla T4, driver 390.48" in first
    assert second == "Until then, the profile auto computes without this GPU."

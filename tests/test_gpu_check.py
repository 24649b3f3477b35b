"""`make gpu-check`: its parts on the device under test with tiny settings, and what it says about failures."""

import importlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, make_images

from Arms import PROFILES
from Checkpoints import save_torch_file
from GANGeneration import GANSettings
from Hardware import cuda_works
from ImbalancedCIFAR10 import CIFAR10_CLASSES, ImageDataSet

CONFTEST = "def pytest_addoption(parser):\n    parser.addoption('--device')\n"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("gpu_check")


def sixty_of_each():
    """A data set under CIFAR-10's name that is large enough for the reference split."""
    y_train, y_test = np.repeat(np.arange(10), 60), np.arange(20) % 10
    return ImageDataSet(
        "cifar10", CIFAR10_CLASSES, make_images(y_train, 0), y_train, make_images(y_test, 1), y_test
    )


# --- Parts --------------------------------------------------------------------------------------


def test_the_machine_is_described_and_multiplies_rightly(gpu_check, device, monkeypatch):
    text, numbers = gpu_check.check_machine(device.type, 64)
    assert "TFLOP/s in " in text and numbers["peak_tflops"] > 0
    monkeypatch.setattr("torch.allclose", lambda *arguments, **options: False)
    with pytest.raises(ArithmeticError, match="product of matrices is wrong"):
        gpu_check.check_machine(device.type, 64)


def test_a_step_of_the_classifier_is_timed_and_counted(gpu_check, device):
    text, numbers = gpu_check.check_classifier_step(device.type, width=2, batch_size=8, epochs=2, size=64)
    assert numbers.keys() == {"milliseconds", "operators", "gflops", "share_of_peak"}
    assert 100 < numbers["operators"] < 3000, "of one step, not of an epoch"
    assert f"{numbers['milliseconds']:,.2f} ms, " in text and numbers["gflops"] > 0


def test_a_step_of_the_gan_is_timed_and_counted(gpu_check, device):
    settings = GANSettings(steps=9, batch_size=4, channels=4, latent_size=8)
    _, numbers = gpu_check.check_gan_step(device.type, settings, steps=1, size=64)
    assert 100 < numbers["operators"] < 5000 and numbers["milliseconds"] > 0


def test_the_measured_width_is_that_of_the_profile(gpu_check):
    assert PROFILES["full"].width == gpu_check.WIDTH


def test_tests_on_the_device_are_counted_and_named(gpu_check, device, own_folder):
    Path("conftest.py").write_text(CONFTEST)
    Path("test_it.py").write_text(
        "import pytest\n"
        "def test_good(pytestconfig): assert pytestconfig.getoption('--device') == "
        + repr(device.type)
        + "\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('why not')\n"
    )
    Path("test_lacking.py").write_text("import no_such_package\ndef test_nothing(): pass\n")
    finding = gpu_check.check_tests(
        device.type, 60, [own_folder / "test_it.py", own_folder / "test_lacking.py"]
    )
    assert finding.status == "failed"
    assert (
        "1 passed, 1 failed, 1 skipped in " in finding.text and "failed: test_it::test_bad;" in finding.text
    )
    assert "because the package no_such_package is missing" in finding.text


@pytest.mark.parametrize(
    ("conftest", "status", "text"),
    [
        ("import no_such_package\n", "skipped", "the package no_such_package is missing"),
        ("raise KeyError('broken')\n", "failed", "KeyError: 'broken'"),
    ],
    ids=["a missing package", "another failure"],
)
def test_tests_that_do_not_start_are_a_finding(gpu_check, own_folder, conftest, status, text):
    Path("conftest.py").write_text(conftest + CONFTEST)
    Path("test_it.py").write_text("def test_good(): pass\n")
    finding = gpu_check.check_tests("cpu", 60, [own_folder / "test_it.py"])
    assert finding.status == status and text in finding.text and "\n" not in finding.text


def test_tests_that_take_too_long_are_stopped(gpu_check, own_folder):
    Path("conftest.py").write_text(CONFTEST)
    Path("test_it.py").write_text("import time\ndef test_slow(): time.sleep(60)\n")
    finding = gpu_check.check_tests("cpu", 1, [own_folder / "test_it.py"])
    assert (finding.status, finding.text) == ("unfinished", "stopped after 1 s")


def test_the_tests_that_touch_the_device_exist(gpu_check, monkeypatch):
    asked = []

    def run(command, **options):
        asked.extend(Path(part).name for part in command if part.endswith(".py"))
        return gpu_check.subprocess.CompletedProcess(command, 5, "", "")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    assert gpu_check.check_tests("cuda", 60).status == "failed"
    assert {"test_ClassifierNetwork.py", "test_ClassifierTraining.py", "test_GANGeneration.py"} < set(asked)
    assert len(asked) == len(set(asked)), "each file once"


# --- The arm ------------------------------------------------------------------------------------


def test_the_balanced_arm_runs_to_its_end_and_is_read_the_next_time(gpu_check, device, monkeypatch):
    check = partial(gpu_check.check_balanced_arm, device.type, "smoke", 120, sixty_of_each)
    first = check(least_accuracy=0.0)

    def in_this_process(name, part, seconds):
        return gpu_check.Finding(name, "passed", *part())

    monkeypatch.setattr(gpu_check, "in_a_process", in_this_process)  # faster
    second = check(least_accuracy=1.1)
    assert (
        first.status == "passed" and "accuracy, 6 steps in " in first.text and first.text.endswith("run now")
    )
    result = json.loads(Path("results/smoke/cat-50/balanced-seed0.json").read_text())
    assert first.numbers["accuracy"] == result["metrics"]["accuracy"]
    assert second.status == "failed" and "an earlier run; at least 110% was expected" in second.text
    assert second.numbers == first.numbers


def test_an_arm_without_time_says_where_it_goes_on(gpu_check, monkeypatch):
    check = partial(gpu_check.check_balanced_arm, "cpu", "smoke", load_data=partial(time.sleep, 60))
    assert "no time was left" in check(10).text
    monkeypatch.setattr(gpu_check, "SHORTEST_ARM", 0)
    finding = check(1)
    assert finding.status == "unfinished"
    assert finding.text == "stopped after 1 s, nothing was saved yet; the same command goes on from there"
    save_torch_file("models/checkpoints/smoke/cat-50/balanced-seed0.pt", {"history": [{"step": 4200}]})
    assert "stopped after 1 s, saved up to step 4,200; the same" in check(1).text


# --- Processes, the file and the exit status ----------------------------------------------------


@pytest.mark.parametrize(
    ("part", "status", "text"),
    [
        (partial(divmod, 7, 2), "passed", "3"),
        (partial(int, "x"), "failed", "ValueError: invalid literal"),
        (partial(importlib.import_module, "no_such_package"), "skipped", "the package no_such_package is missing"),
        (partial(os._exit, 3), "failed", "its process ended with exit code 3"),
        (partial(time.sleep, 60), "unfinished", "stopped after 1 s"),
    ],
    ids=["passed", "failed", "skipped", "dead", "hanging"],
)  # fmt: skip
def test_whatever_a_part_does_is_a_finding(gpu_check, part, status, text):
    finding = gpu_check.in_a_process("a part", part, 1 if status == "unfinished" else 60)
    assert finding.status == status and text in str(finding.text)


def test_each_finding_is_a_line_and_kept_at_once(gpu_check, capsys):
    path = gpu_check.result_path("NVIDIA H100 80GB HBM3")
    assert path == Path("results/benchmarks/gpu-check-nvidia-h100-80gb-hbm3.json")

    def first(left):
        assert 0 < left <= gpu_check.SECONDS
        return gpu_check.Finding("first", "skipped", "nothing")

    def second(left):
        assert [f["name"] for f in json.loads(path.read_text())["findings"]] == ["first"]
        return gpu_check.Finding("second", "passed", "fine", {"milliseconds": 1.5})

    assert gpu_check.check([first, second], path, time.monotonic())
    assert capsys.readouterr().out.splitlines()[:2] == [
        "skipped    first: nothing",
        "passed     second: fine",
    ]
    assert json.loads(path.read_text())["findings"][1]["numbers"] == {"milliseconds": 1.5}
    assert list(path.parent.iterdir()) == [path]
    for status in ("failed", "unfinished"):
        third = gpu_check.Finding("third", status, "not good")
        assert not gpu_check.check([first, lambda left, third=third: third], path, time.monotonic())


@pytest.mark.skipif(cuda_works(), reason="This machine has a GPU.")
def test_without_a_gpu_it_says_so_and_fails(gpu_check, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit) as end:
        gpu_check.main([])
    assert end.value.code == 1 and "This machine has no CUDA GPU." in capsys.readouterr().err
    monkeypatch.setattr(gpu_check, "unusable_gpu", lambda: "The driver is too old.")
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "The driver is too old." in capsys.readouterr().err


def test_the_whole_plan_is_at_most_ten_minutes(gpu_check, monkeypatch):
    """Each part gets a limit, and the arm what is left."""
    given = []
    monkeypatch.setattr(gpu_check, "in_a_process", lambda name, part, seconds: given.append(seconds))
    monkeypatch.setattr(gpu_check, "check_tests", lambda device, seconds: given.append(seconds))
    monkeypatch.setattr(
        gpu_check, "check_balanced_arm", lambda device, profile, seconds: given.append(seconds)
    )
    left = gpu_check.SECONDS
    for part in gpu_check.plan("cuda"):
        part(left)
        left -= given[-1]
    assert len(given) == 5 and given[-1] >= 0 and left >= 0 and gpu_check.SECONDS <= 590
    assert given[-1] > gpu_check.SHORTEST_ARM

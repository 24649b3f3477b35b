"""The option --device decides where the tests compute."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from Hardware import cuda_works
from Runtime import choose_device


def test_the_device_under_test_is_chosen_here_and_in_programs_that_a_test_starts(device, pytestconfig):
    assert device == choose_device() and device.type == pytestconfig.getoption("--device")
    program = "from Runtime import choose_device; print(choose_device().type)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    if device.type != "mps":  # MPS cannot be hidden from another program, so that may choose it
        assert answer.stdout.strip() == device.type, answer.stderr


@pytest.mark.skipif(cuda_works(), reason="CUDA works here.")
def test_a_device_that_is_missing_is_one_line():
    options = ["-p", "no:cacheprovider", "--device", "cuda", "tests/test_Prompts.py"]
    command = [sys.executable, "-m", "pytest", *options]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == pytest.ExitCode.USAGE_ERROR, answer.stdout
    [line] = [line for line in answer.stderr.splitlines() if line.strip()]
    assert line.startswith("ERROR: --device cuda: PyTorch would compute on cpu here. Run python Hardware.py")

"""What a machine has, how it is described, and the code's version."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import Runtime
from Runtime import (
    TooLittleMemoryError,
    agree_on_error,
    choose_device,
    code_version,
    decide_in_main_process,
    describe_hardware,
    hardware_text,
    require_memory,
)


def test_a_device_can_be_named_and_described():
    assert choose_device("cpu") == torch.device("cpu")
    assert isinstance(choose_device(), torch.device)
    hardware = describe_hardware(torch.device("cpu"))
    assert hardware["device"] == "cpu"
    assert hardware["name"]
    assert hardware["cpu_threads"] == torch.get_num_threads()


@pytest.mark.parametrize("name", ["meta", "cuda:99", "gpu"])
def test_a_device_on_which_nothing_can_be_computed_is_refused(name):
    with pytest.raises(ValueError, match=f"This machine has no device '{name}' for PyTorch"):
        choose_device(name)


def test_hardware_is_described_for_a_sentence():
    assert (
        hardware_text({"device": "cpu", "name": "AMD EPYC", "cpu_threads": 1}) == "CPU (AMD EPYC, 1 thread)"
    )
    assert (
        hardware_text({"device": "cuda", "name": "H100", "cpu_threads": 16}) == "CUDA (H100, 16 CPU threads)"
    )


PROGRAM = """
import sys
from Runtime import agree_on_error, decide_in_main_process, start_processes

processes = start_processes("cpu")
rank = processes.process_index
assert processes.num_processes == 2
assert decide_in_main_process(lambda: f"seen by {rank}", processes) == "seen by 0"
try:
    decide_in_main_process(lambda: [][0] if rank == 0 else "fine", processes)
except IndexError as error:
    assert str(error) == "list index out of range"
else:
    sys.exit("the error was lost")
assert agree_on_error(None, processes) is None
assert str(agree_on_error(ValueError("no images") if rank == 1 else None, processes)) == "no images"
"""


def test_processes_do_what_the_main_one_decides_and_stop_for_the_error_of_any():
    Path("program.py").write_text(PROGRAM)
    environment = os.environ | {
        "PYTHONPATH": str(Path(Runtime.__file__).parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    answer = subprocess.run(
        [*command, "program.py"], env=environment, capture_output=True, text=True, timeout=180
    )
    assert answer.returncode == 0, answer.stderr


def test_a_process_alone_decides_for_itself():
    assert decide_in_main_process(lambda: 3, None) == 3
    assert agree_on_error(None, None) is None
    error = ValueError("no images")
    assert agree_on_error(error, None) is error


def test_more_memory_than_the_machine_has_is_refused():
    require_memory(1000, "10 images")
    with pytest.raises(
        TooLittleMemoryError, match="10 images would take at least 1,000,000 GB.*Ask for fewer"
    ):
        require_memory(10**15, "10 images")
    assert issubclass(TooLittleMemoryError, MemoryError) and issubclass(TooLittleMemoryError, ValueError)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A new git repository with one committed file, in which ``Runtime`` seems to lie."""
    if shutil.which("git") is None:
        pytest.skip("There is no git.")
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "Runtime.py").write_text("committed")
    name = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org"]
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-q", "-m", "First"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    monkeypatch.setattr(Runtime, "__file__", str(folder / "Runtime.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    code_version.cache_clear()
    yield folder
    code_version.cache_clear()


def test_the_code_version_is_the_commit(checkout):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout
    assert code_version() == head[:12]


def test_the_code_version_says_that_files_differ_from_the_commit(checkout):
    (checkout / "Runtime.py").write_text("changed")
    assert code_version().endswith("-dirty")
    assert len(code_version()) == 12 + len("-dirty")


def test_the_code_version_is_that_of_the_first_call(checkout):
    first = code_version()
    (checkout / "Runtime.py").write_text("changed during a training")
    assert code_version() == first


def test_there_is_no_code_version_outside_a_checkout(checkout):
    shutil.rmtree(checkout / ".git")
    assert code_version() is None


def test_there_is_no_code_version_without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert code_version() is None

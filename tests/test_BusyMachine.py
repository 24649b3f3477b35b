"""Waiting threads sleep on a busy machine, and only there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import RunNotebooks
from BusyMachine import passive_waiting

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
CHOICES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture
def load(monkeypatch):
    """Sets the load average of a machine with four cores, on which the user has chosen nothing."""
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return lambda value: monkeypatch.setattr(os, "getloadavg", lambda: (value, 0.0, 0.0), raising=False)


@pytest.mark.parametrize(("value", "expected"), [(0.3, {}), (3.9, {}), (4.0, PASSIVE), (11.5, PASSIVE)])
def test_threads_wait_passively_if_the_load_reaches_the_number_of_cores(value, expected, load, capsys):
    load(value)
    assert passive_waiting() == expected
    line = (
        f"The machine is busy (load {value}, 4 cores), so waiting threads sleep: OMP_WAIT_POLICY=PASSIVE.\n"
    )
    assert capsys.readouterr().out == (line if expected else "")


@pytest.mark.parametrize("name", CHOICES)
def test_the_users_choice_stays(name, load, monkeypatch, capsys):
    load(9.0)
    monkeypatch.setenv(name, "2")
    assert passive_waiting() == {}
    assert capsys.readouterr().out == ""


def test_a_system_without_a_load_average_is_left_alone(load, monkeypatch):
    load(9.0)
    monkeypatch.delattr(os, "getloadavg")
    assert passive_waiting() == {}


def test_a_busy_program_starts_again_once_with_its_arguments():
    Path("program.py").write_text(
        "import os, sys\n"
        "os.getloadavg, os.cpu_count = lambda: (9.0, 9.0, 9.0), lambda: 4\n"
        "from BusyMachine import start_again_if_busy\n"
        "print('started', flush=True)\n"
        "start_again_if_busy()\n"
        "print(sys.argv[1:], sys.flags.utf8_mode, os.environ['OMP_WAIT_POLICY'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    answer = subprocess.run(
        [sys.executable, "-X", "utf8", "program.py", "--arm", "a b"],
        env=environment | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = answer.stdout.splitlines()
    assert lines[0] == lines[2] == "started" and lines[1].startswith("The machine is busy"), answer.stderr
    assert lines[3:] == ["['--arm', 'a b'] 1 PASSIVE"]


@pytest.mark.parametrize(("value", "expected"), [(9.0, "PASSIVE"), (0.5, None)])
def test_the_notebooks_kernels_wait_passively_on_a_busy_machine(
    value, expected, load, tiny_data, monkeypatch
):
    load(value)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    seen = []
    monkeypatch.setattr(RunNotebooks, "load_data", lambda: tiny_data)
    monkeypatch.setattr(
        RunNotebooks, "run_notebooks", lambda *arguments: seen.append(os.environ.get("OMP_WAIT_POLICY"))
    )
    RunNotebooks.main(["--profile", "smoke"])
    assert seen == [expected]

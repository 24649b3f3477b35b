"""Ranges for notebook services, exact versions for `make`: both name the same packages, and they agree."""

import ast
import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

RANGES = ("requirements.txt", "requirements-tools.txt")


def read(name):
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({requirement.name for requirement in found}) == len(found), "no package twice"
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_each_package_is_pinned_and_each_pin_satisfies_its_range():
    ranges, pins = read(RANGES[0]) | read(RANGES[1]), read("requirements.lock")
    assert pins.keys() == ranges.keys()
    for name, pin in pins.items():
        [specifier] = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"{pin} is no exact version"
        assert specifier.version in ranges[name].specifier, f"{pin} is outside of {ranges[name]}"


def test_the_ranges_leave_a_notebook_service_its_own_pytorch():
    ranges = read(RANGES[0])
    for version in ("2.9.0", "2.11.0+cu128", "2.14.1+cu130", "3.0.0"):
        assert version in ranges["torch"].specifier
    assert "2.8.0" not in ranges["torch"].specifier
    assert "2.0.2" in ranges["numpy"].specifier


def imported_packages(pattern):
    """Distributions that provide what the files import: the standard library and the repository's are left out."""
    names = set()
    for path in REPOSITORY.glob(pattern):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    own = {
        path.stem for folder in (".", "benchmarks", "tests") for path in (REPOSITORY / folder).glob("*.py")
    }
    providers = packages_distributions()
    others = sorted(names - own - sys.stdlib_module_names)
    return {canonicalize_name(providers[name][0]) for name in others if name in providers}


@pytest.mark.parametrize(("pattern", "files"), [("*.py", RANGES), ("benchmarks/*.py", RANGES[:1])])
def test_what_is_imported_is_required(pattern, files):
    required = set().union(*(read(name) for name in files))
    imported = imported_packages(pattern)
    assert "torch" in imported and imported <= required, f"missing: {sorted(imported - required)}"


def what_make_would_do(*arguments):
    command = ["make", "--dry-run", "lint", *arguments]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TORCH_INDEX", "MAKEFLAGS")
    }
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_one_variable_chooses_the_index_of_pytorchs_wheels(own_folder):
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(REPOSITORY / name, name)
    wheels = "https://download.pytorch.org/whl/cu126"
    default, chosen = what_make_would_do(), what_make_would_do(f"TORCH_INDEX={wheels}")
    assert "pip install --quiet --requirement requirements.lock" in default and "index" not in default
    torch, rest = (line for line in chosen.splitlines() if "pip install" in line)
    assert f"--index-url '{wheels}' " in torch and rest in default, "PyTorch comes from there, first"

    mark = own_folder / ".venv" / "installed"
    mark.parent.mkdir()
    mark.write_text(f"{wheels}\n")
    assert "pip" not in what_make_would_do() + what_make_would_do(f"TORCH_INDEX={wheels}"), (
        "nothing to install"
    )
    for other in ("TORCH_INDEX=", "TORCH_INDEX=https://example.org"):
        assert "pip uninstall --quiet --yes torch torchvision" in what_make_would_do(other)
    os.utime(mark, (0, 0))
    assert f"--index-url '{wheels}' " in what_make_would_do(), "an update keeps the index"

"""The first cell of the notebooks: nothing on a complete machine; elsewhere repository, packages and data."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

import NotebookServices
from NotebookServices import find_data, install, missing_requirements, prepare
from RunNotebooks import NOTEBOOKS

LACKING = "a-package-that-is-lacking"


def cells(name):
    return json.loads((REPOSITORY / name).read_text(encoding="utf-8"))["cells"]


def first_code(name):
    return "".join(next(cell["source"] for cell in cells(name) if cell["cell_type"] == "code"))


@pytest.fixture(autouse=True)
def no_service(monkeypatch):
    """No variable of a notebook service, and no chosen data."""
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "CIFAR10_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(NotebookServices, "find_driver", lambda: None)


# --- The cell -----------------------------------------------------------------------------------


def test_every_notebook_begins_with_the_same_short_cell():
    first, *others = map(first_code, NOTEBOOKS)
    assert others == [first, first]
    assert len(first.splitlines()) <= 25


def test_the_repositorys_address_is_the_same_everywhere():
    [address] = re.findall(r'"(https://\S+?)"', first_code("Main.ipynb"))
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f'repository-code: "{address}"' in citation
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    path = address.removeprefix("https://github.com/")
    for name in NOTEBOOKS:
        assert f"(https://colab.research.google.com/github/{path}/blob/main/{name})" in readme
        assert f"(https://kaggle.com/kernels/welcome?src={address}/blob/main/{name})" in readme


def run_first_cells(folder, code, **environment):
    """Execute the first cells of Main.ipynb and then ``code`` in an empty folder; return all that they printed."""
    notebook = nbformat.read(REPOSITORY / "Main.ipynb", as_version=4)
    last = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells = [*notebook.cells[: last + 1], nbformat.v4.new_code_cell(code)]
    folder.mkdir()
    nbformat.write(notebook, folder / "short.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        for name, value in environment.items():
            patch.setenv(name, str(value))
        executed = papermill.execute_notebook(
            folder / "short.ipynb", folder / "executed.ipynb", parameters={"profile": "smoke"},
            cwd=folder, progress_bar=False, kernel_name="python3", language="python",
        )  # fmt: skip
    return "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", []))


def write_wheel(folder):
    """A wheel of LACKING with nothing but a module, and where pip finds it."""
    folder.mkdir()
    name, info = LACKING.replace("-", "_"), f"{LACKING.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "answer = 42\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {LACKING}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def local_repository(folder):
    """This checkout as it lies here, in a git repository of its own, with one requirement more."""
    folder.mkdir()
    for path in [*REPOSITORY.glob("*.py"), REPOSITORY / "requirements.txt"]:
        shutil.copy(path, folder)
    with open(folder / "requirements.txt", "a", encoding="utf-8") as file:
        file.write(f"{LACKING}>=1\n")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


@pytest.mark.skipif(shutil.which("git") is None, reason="git is missing")
def test_in_an_empty_folder_the_cell_fetches_the_repository_and_a_lacking_package(own_folder):
    wheels, repository = write_wheel(own_folder / "wheels"), local_repository(own_folder / "repository")
    site = own_folder / "site"
    environment = {
        "STUDY_REPOSITORY": repository, "KAGGLE_KERNEL_RUN_TYPE": "Interactive", "PYTHONPATH": site,
        # pip installs from the folder alone, and not into this machine's environment.
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels, "PIP_TARGET": site,
    }  # fmt: skip
    code = (
        "import a_package_that_is_lacking, ImbalancedCIFAR10\n"
        "print(a_package_that_is_lacking.answer, profile, ImbalancedCIFAR10.__file__, os.getcwd())"
    )
    service = own_folder / "service"
    printed = run_first_cells(service, code, **environment)
    study = service / "imbalance-study"
    assert f"42 smoke {study}/ImbalancedCIFAR10.py {study}\n" in printed, (
        "papermill's parameter reaches the notebook"
    )
    assert f"The repository is in {study}.\n" in printed
    assert f"Installed: {LACKING}>=1. PyTorch is still {version('torch')}.\n" in printed
    assert f"CIFAR-10 will be downloaded into {study}/datasets.\n" in printed
    assert (
        f"Results, plots and weights go to results, images and models in {study}. Kaggle keeps them"
        in printed
    )
    assert [path.name for path in site.glob("*.py")] == ["a_package_that_is_lacking.py"], "nothing else"


def test_on_a_complete_machine_the_cell_does_nothing(own_folder):
    code = "print(os.getcwd())"
    printed = run_first_cells(
        own_folder / "complete", code, PYTHONPATH=REPOSITORY, STUDY_REPOSITORY="nowhere"
    )
    assert printed == f"{own_folder / 'complete'}\n"
    assert sorted(path.name for path in (own_folder / "complete").iterdir()) == [
        "executed.ipynb",
        "short.ipynb",
    ]


def test_a_repository_that_cannot_be_fetched_is_named(own_folder):
    with pytest.raises(
        papermill.PapermillExecutionError, match="git could not fetch nowhere. Set REPOSITORY"
    ):
        run_first_cells(own_folder / "empty", "", STUDY_REPOSITORY="nowhere")


# --- Packages -----------------------------------------------------------------------------------


def installed(monkeypatch, **versions):
    """Pretend that these packages have these versions, and that None is missing."""
    original = version

    def pretend(name):
        found = versions[name] if name in versions else original(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(NotebookServices, "version", pretend)


def test_a_missing_and_an_old_package_are_found_and_a_services_pytorch_is_enough(monkeypatch):
    assert missing_requirements() == []
    installed(monkeypatch, tqdm=None, peft="0.1.0", torch="2.10.0+cu128", torchvision="0.25.0+cu128")
    assert [requirement.name for requirement in missing_requirements()] == ["peft", "tqdm"]
    installed(monkeypatch, torch="2.10.0a0+nv25.12")
    assert missing_requirements() == []


def test_an_old_pytorch_is_never_replaced(monkeypatch):
    installed(monkeypatch, torch="2.6.0+cu124", tqdm=None)
    with pytest.raises(RuntimeError, match=r"torch>=2\.9 is needed, but this machine has 2\.6\.0\+cu124"):
        prepare()


@pytest.fixture
def pip(monkeypatch):
    """Record what pip is asked for, with the content of its constraints. Its answer can be set."""

    class Pip:
        asked, status, errors = None, 0, ""

    def run(command, **options):
        constraints = Path(command[command.index("--constraint") + 1])
        Pip.asked = command, constraints.read_text().splitlines()
        return subprocess.CompletedProcess(command, Pip.status, "", Pip.errors)

    monkeypatch.setattr(subprocess, "run", run)
    return Pip


def test_pip_may_not_replace_the_services_pytorch(pip, monkeypatch):
    installed(monkeypatch, torch="2.10.0+cu128", torchaudio=None)
    install([Requirement(f"{LACKING}>=1")])
    command, constraints = pip.asked
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and command[-1] == f"{LACKING}>=1"
    assert constraints == ["torch==2.10.0+cu128", f"torchvision=={version('torchvision')}",
                           f"numpy=={version('numpy')}"]  # fmt: skip


def test_a_failure_of_pip_is_one_line(pip):
    pip.status, pip.errors = 1, "WARNING: Retrying\nERROR: No matching distribution found for it\n"
    with pytest.raises(
        RuntimeError, match=rf"pip could not install {LACKING} \(ERROR: No matching.*internet"
    ):
        install([Requirement(LACKING)])


def test_a_package_in_use_that_was_replaced_needs_a_restart(pip):
    with pytest.raises(RuntimeError, match="numpy had to be replaced and is in use. Restart the session"):
        install([Requirement("numpy>=99"), Requirement(LACKING)])
    assert pip.asked is not None, "it was installed"


# --- Where results are kept ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "folder", "fate"),
    [
        ("KAGGLE_KERNEL_RUN_TYPE", "working", "Kaggle keeps them if you save a version"),
        (
            "COLAB_RELEASE_TAG",
            "content",
            "They are lost when this session ends. To keep them, mount your Google",
        ),
        ("COLAB_RELEASE_TAG", "drive/MyDrive/study", "They stay in your Google Drive"),
        (None, "elsewhere", "They stay in this folder."),
    ],
)
def test_it_is_said_where_results_are_kept(monkeypatch, own_folder, capsys, variable, folder, fate):
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(NotebookServices, "DATA_PLACES", {})
    (own_folder / folder).mkdir(parents=True)
    monkeypatch.chdir(folder)
    prepare(fetched=True)
    printed = capsys.readouterr().out
    assert f"go to results, images and models in {own_folder / folder}. {fate}" in printed
    assert ("This session has no NVIDIA GPU" in printed) == (variable is not None)


def test_a_gpu_that_pytorch_cannot_use_is_said(monkeypatch, capsys):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    monkeypatch.setattr(NotebookServices, "find_driver", lambda: "a driver")
    monkeypatch.setattr(NotebookServices, "unusable_gpu", lambda: "The driver is too old.")
    prepare()
    assert capsys.readouterr().out.endswith("\nThe driver is too old.\n")


# --- Data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", ["", "one", "one/two"])
def test_data_that_is_there_is_found(own_folder, monkeypatch, deep):
    monkeypatch.setenv("CIFAR10_ROOT", "")
    places = {str(own_folder / "none"): 2, str(own_folder / "input"): 2}
    assert "will be downloaded" in find_data(places)
    (own_folder / "input" / deep / "cifar-10-batches-py").mkdir(parents=True)
    root = own_folder / "input" / deep
    assert find_data(places) == f"CIFAR-10 is read from {root}."
    assert Path(os.environ["CIFAR10_ROOT"]) == root
    assert find_data(places) == f"CIFAR-10 is read from {root}, as CIFAR10_ROOT says."


def test_an_archive_is_unpacked_beside_a_link(own_folder):
    archive = own_folder / "input" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    archive.write_text("an archive in a folder that may be read-only")
    assert "is unpacked from" in find_data({str(own_folder / "input"): 1})
    assert Path("datasets/cifar-10-python.tar.gz").read_text() == archive.read_text()
    assert find_data({}) == f"CIFAR-10 is read from {own_folder / 'datasets'}."
    other = archive.parent.rename(own_folder / "later")  # another session mounts it elsewhere
    assert "is unpacked from" in find_data({str(other): 1})
    assert Path("datasets/cifar-10-python.tar.gz").exists()

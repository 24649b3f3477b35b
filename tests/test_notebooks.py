"""The notebooks run from top to bottom, and show the study in the field's own names."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY

import RunNotebooks
from RunNotebooks import NOTEBOOKS, Kernel, run_notebook, run_notebooks

PLOTS = {
    "class_counts", "samples", "comparison", "cm_nsd", "test_nsd", "gan_training_loss", "gan_samples",
    "gan_progress", "gan_memorisation", "fid", "cm_gan", "test_gan", "gan_comparison",
}  # fmt: skip
STEPS = {
    "Main.ipynb": (
        "split.cut(", "fit_resample(", "create_classifier(", "train_classifier(", "evaluate_classifier(",
        "classification_metrics(", "plot_learning_curves(", "plot_confusion_matrix(", "run_arm(",
    ),
    "GAN_Main.ipynb": ("split.cut(", "train_gan(", "sample_images(", "memorisation(", "fit_resample("),
    "GAN_Classification.ipynb": ("split.cut(", "fit_resample(", "run_arm("),
}  # fmt: skip


def read(name):
    return json.loads((REPOSITORY / name).read_text(encoding="utf-8"))


def run(folder):
    """Execute the notebooks under smoke, on the digits: a proxy that refuses prevents any download."""
    refusing = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | refusing | {
        "PYTHONPATH": str(REPOSITORY), "CIFAR10_ROOT": str(Path(folder, "none")), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "RunNotebooks.py"), "--profile", "smoke"]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return answer


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Folder in which the notebooks were executed, and what the run printed."""
    folder = tmp_path_factory.mktemp("notebooks")
    for name in NOTEBOOKS:
        shutil.copy(REPOSITORY / name, folder / name)
    return folder, run(folder)


def test_the_notebooks_run_from_top_to_bottom_and_name_their_data(executed):
    folder, answer = executed
    assert "NOT CIFAR-10" in answer.stdout
    text = (folder / "results/smoke/digits_Main.ipynb").read_text(encoding="utf-8")
    assert "This is not CIFAR-10" in text
    assert "no Stable Diffusion images of digits" in text and "arms that need them are not run now" in text
    names = {path.name for path in (folder / "images").rglob("*.png")}
    assert {f"digits_{plot}.png" for plot in PLOTS} <= names
    assert all(name.startswith("digits_") for name in names)


def test_no_cell_shows_an_address_in_memory(executed):
    folder, _ = executed
    for name in NOTEBOOKS:
        assert " at 0x" not in (folder / f"results/smoke/digits_{name}").read_text(encoding="utf-8")


def test_running_the_notebooks_again_trains_nothing(executed):
    folder, _ = executed
    kept = {
        path: path.stat().st_mtime_ns
        for kind in ("results/smoke/digits-8-0.01", "models")
        for path in (folder / kind).rglob("*")
        if path.is_file()
    }
    assert not any("checkpoints" in path.parts for path in kept)
    run(folder)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def small_notebook(code, **metadata):
    """A notebook of one cell, in the working directory."""
    notebook = nbformat.v4.new_notebook(metadata=metadata)
    notebook.cells = [
        nbformat.v4.new_code_cell("profile = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
        nbformat.v4.new_markdown_cell("Read on [here](docs/results.md)."),
    ]
    nbformat.write(notebook, "small.ipynb")


@pytest.fixture
def kernel():
    kernel = Kernel()
    yield kernel
    kernel.stop()


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"kernelspec": {"name": "conda-of-another-machine", "display_name": "Python", "language": "python"}},
    ],
)
def test_a_notebook_runs_whatever_kernel_it_was_saved_with(metadata, kernel, capfd):
    small_notebook("print(profile)", **metadata)
    failed = Path("results/smoke/failed-small.ipynb")
    failed.parent.mkdir(parents=True)
    failed.touch()
    output = run_notebook("small.ipynb", "smoke", "cifar10", kernel)
    assert output == Path("results/smoke/small.ipynb") and output.exists()
    assert not failed.exists(), "it was of an earlier run"
    assert "[here](../../docs/results.md)" in output.read_text()
    captured = capfd.readouterr()
    assert "smoke" in captured.out and "WARNING" not in captured.err


def test_a_failing_cell_is_one_sentence_and_the_copy_is_kept(kernel):
    small_notebook("raise ValueError('the cell is wrong.')")
    with pytest.raises(
        RuntimeError, match=r"A cell of small.ipynb failed with ValueError: the cell is wrong\. .*fai"
    ):
        run_notebook("small.ipynb", "smoke", "digits", kernel)
    assert Path("results/smoke/failed-digits_small.ipynb").exists()
    assert not Path("results/smoke/digits_small.ipynb").exists()


def test_each_notebook_gets_a_kernel_of_its_own_and_none_stays(monkeypatch):
    kernels, used = [], []

    class RecordedKernel(Kernel):
        def __init__(self):
            super().__init__()
            kernels.append(self)

    def fail_at_the_second(name, profile_name, data_name, kernel):
        used.append(kernel)
        if name == "second":
            raise RuntimeError("a cell failed")

    monkeypatch.setattr(RunNotebooks, "Kernel", RecordedKernel)
    monkeypatch.setattr(RunNotebooks, "run_notebook", fail_at_the_second)
    with pytest.raises(RuntimeError, match="a cell failed"):
        run_notebooks(("first", "second", "third"), "smoke", "cifar10")
    assert used == kernels[:2] and len(kernels) == 3
    assert not any(kernel.manager.has_kernel for kernel in kernels)


@pytest.mark.parametrize("content", [None, "", "<html>", "{}"])
def test_a_missing_or_damaged_notebook_is_one_line(content, tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(RunNotebooks, "load_data", lambda: tiny_data)
    if content is not None:
        Path("Main.ipynb").write_text(content)
    with pytest.raises(SystemExit) as end:
        RunNotebooks.main(["--profile", "smoke"])
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert ("There is no Main.ipynb in" if content is None else "Main.ipynb is no notebook") in line
    assert "disk space" not in line


def test_the_notebooks_refuse_a_profile_without_their_arms(monkeypatch, capsys):
    monkeypatch.setattr(RunNotebooks, "load_data", lambda: pytest.fail("the data was loaded"))
    with pytest.raises(SystemExit) as end:
        RunNotebooks.main(["--profile", "headline"])
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "runs the arms imbalanced, " in line and line.endswith("python Experiment.py --profile headline")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_steps_of_the_study_stand_in_the_cells(name):
    code = "".join("".join(c["source"]) for c in read(name)["cells"] if c["cell_type"] == "code")
    assert [step for step in STEPS[name] if step not in code] == []
    assert "plt.close" not in code, "no figure is made only to be closed"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_in_the_repository_have_no_output_and_one_parameter_cell(name):
    notebook = read(name)
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    tags = [cell["metadata"].get("tags", []) for cell in notebook["cells"]]
    assert tags.count(["parameters"]) == 1


def test_links_in_executed_copies_lead_somewhere():
    for path in (REPOSITORY / "results").glob("*/*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                for link in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
                    assert link.startswith("https://") or (path.parent / link).exists(), (path, link)


def test_executed_copies_say_nothing_of_the_machine():
    copies = sorted((REPOSITORY / "results" / "cpu").glob("*.ipynb"))
    assert len(copies) == 3
    for copy in copies:
        assert "site-packages" not in copy.read_text(encoding="utf-8")

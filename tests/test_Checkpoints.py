"""Files of PyTorch, and the checkpoints from which a killed training continues."""

import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import python

from Checkpoints import Checkpoint, load_torch_file, save_torch_file


def test_an_error_of_torch_save_is_an_oserror_and_the_old_file_stays(monkeypatch):
    save_torch_file("model.pt", {"step": 1})

    def fill_the_disk(content, path):
        Path(path).write_bytes(b"half of the file")
        raise RuntimeError("PytorchStreamWriter failed writing file\nsecond line")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match=r"model\.pt.*failed writing file") as caught:
        save_torch_file("model.pt", {"step": 2})
    assert "second line" not in str(caught.value)
    assert load_torch_file("model.pt", {"step"}) == {"step": 1}
    assert [f.name for f in Path().iterdir()] == ["model.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size.")
def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_the_old_one_and_one_line():
    Checkpoint("run.pt", IDENTITY).save(step=7)
    answer = python(
        "import resource, torch\n"
        "from Checkpoints import Checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        f"    Checkpoint('run.pt', {IDENTITY}).save(step=8, weights=torch.zeros(1_000_000))\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    [line] = answer.stdout.splitlines()
    assert line.startswith("Could not finish writing run.pt: ") and "Free some disk space" in line
    assert Checkpoint("run.pt", IDENTITY).load("step")["step"] == 7
    assert [f.name for f in Path().iterdir()] == ["run.pt"]


def test_a_missing_torch_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"model\.pt"):
        load_torch_file("model.pt", {"step"})


def test_a_torch_file_that_may_not_be_read_is_not_called_damaged():
    Path("model.pt").mkdir()
    with pytest.raises(OSError, match=r"model\.pt cannot be read: Is a directory"):
        load_torch_file("model.pt", {"step"})


@pytest.mark.parametrize("content", [{"step": 1}, [1, 2]])
def test_a_torch_file_with_other_content_is_refused_with_what_it_lacks(content):
    save_torch_file("model.pt", content)
    with pytest.raises(ValueError, match=r"model\.pt.*lacks.*history"):
        load_torch_file("model.pt", {"step", "history"})


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_torch_file_with_code_is_refused_and_not_run():
    torch.save({"step": Bomb()}, "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt is damaged"):
        load_torch_file("model.pt", {"step"})
    Path("plain.pt").write_bytes(pickle.dumps({"step": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match=r"plain\.pt is damaged"):
        load_torch_file("plain.pt", {"step"})
    assert not Path("unpickled").exists()


IDENTITY = {"steps": 100, "seed": 0}


def test_without_a_file_there_is_no_checkpoint_to_load():
    assert Checkpoint("folder/checkpoint.pt", IDENTITY).load("step") is None
    assert not Path("folder").exists()


def test_a_checkpoint_is_loaded_as_it_was_saved():
    model = torch.nn.Linear(3, 2)
    history = [{"loss": 0.5, "step": 7}]
    Checkpoint("folder/checkpoint.pt", IDENTITY).save(step=7, model=model.state_dict(), history=history)
    content = Checkpoint(Path("folder", "checkpoint.pt"), dict(IDENTITY)).load("step", "model", "history")
    assert content.keys() == {"identity", "step", "model", "history"}
    assert (content["step"], content["history"], content["identity"]) == (7, history, IDENTITY)
    assert content["model"].keys() == {"weight", "bias"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(content["model"][name], tensor)


def test_numpy_scalars_in_settings_and_content_come_back_as_plain_numbers():
    identity = {"seed": np.int64(0), "rate": np.logspace(-1, 0, 2)[0], "scales": (np.float32(0.5),)}
    Checkpoint("checkpoint.pt", identity).save(step=np.int64(7), history=[{"loss": np.float64(0.5)}])
    same = {"seed": 0, "rate": 0.1, "scales": (0.5,)}
    content = Checkpoint("checkpoint.pt", same).load("step", "history")
    assert (content["identity"], content["step"], content["history"]) == (same, 7, [{"loss": 0.5}])
    assert Checkpoint("checkpoint.pt", identity).load("step")
    with pytest.raises(ValueError, match="rate: 0.1 there, 0.2 now"):
        Checkpoint("checkpoint.pt", identity | {"rate": np.float64(0.2)}).load("step")


def test_a_checkpoint_that_vanishes_while_it_is_looked_for_is_none(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: True)  # another process finishes and removes it now
    assert Checkpoint("checkpoint.pt", IDENTITY).load("step") is None


def test_saving_again_replaces_the_checkpoint():
    checkpoint = Checkpoint("checkpoint.pt", IDENTITY)
    for step in (1, 2):
        checkpoint.save(step=step)
    assert checkpoint.load("step")["step"] == 2
    assert [f.name for f in Path().iterdir()] == ["checkpoint.pt"]


def test_the_checkpoint_of_another_training_is_refused_with_the_settings_that_differ():
    Checkpoint("checkpoint.pt", IDENTITY).save(step=7)
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*seed: 0 there, 1 now") as caught:
        Checkpoint("checkpoint.pt", {**IDENTITY, "seed": 1}).load("step")
    assert "steps" not in str(caught.value)
    assert Checkpoint("checkpoint.pt", IDENTITY).load("step")["step"] == 7  # the file is left as it is


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint"])
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(damage):
    checkpoint = Checkpoint("checkpoint.pt", IDENTITY)
    checkpoint.save(model={"weight": torch.arange(1000)})
    damaged = damage(Path("checkpoint.pt").read_bytes())
    Path("checkpoint.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        checkpoint.load("model")
    assert Path("checkpoint.pt").read_bytes() == damaged


def test_a_checkpoint_without_an_expected_part_is_refused():
    checkpoint = Checkpoint("checkpoint.pt", IDENTITY)
    checkpoint.save(step=7)
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*lacks.*history"):
        checkpoint.load("step", "history")


def test_without_a_path_no_checkpoint_is_written_or_found():
    checkpoint = Checkpoint(None, IDENTITY)
    checkpoint.save(step=7)
    assert checkpoint.load("step") is None
    assert not list(Path().iterdir())


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one():
    checkpoint = Checkpoint("checkpoint.pt", IDENTITY)
    checkpoint.save(step=7)
    killed = python(
        "import os, signal, torch\n"
        "from pathlib import Path\n"
        "from Checkpoints import Checkpoint\n"
        "def killed_halfway(content, path):\n"
        "    Path(path).write_bytes(b'half of the file')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = killed_halfway\n"
        f"Checkpoint('checkpoint.pt', {IDENTITY}).save(step=8)\n"
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.load("step")["step"] == 7

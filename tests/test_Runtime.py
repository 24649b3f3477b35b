"""Seeds, checked arrays, devices, the code's version, safe files, checkpoints and downloads."""

import dataclasses
import http.client
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

import Runtime
from Runtime import (
    Checkpoint,
    NotFiniteError,
    TooLittleMemoryError,
    atomic_path,
    checksum,
    choose_device,
    code_version,
    derive_seed,
    describe_differences,
    describe_hardware,
    deterministic_convolutions,
    downloading,
    hardware_text,
    is_reachable,
    load_torch_file,
    one_process_at_a_time,
    plain,
    require_finite,
    require_free_space,
    require_memory,
    require_same_settings,
    require_writable,
    save_array,
    save_json,
    save_torch_file,
    seeded,
    user_path,
)


def python(code):
    """Run Python code in a process of its own that can import the modules of the repository."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


# --- Imports ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["NonSyntheticGeneration", "StableDiffusionSampler", "GANGeneration"])
def test_importing_a_sampler_loads_neither_plots_nor_the_classifier_nor_diffusers(module):
    unwanted = {"matplotlib", "ClassifierNetwork", "ClassifierTraining", "DiffusionPipelines", "diffusers"}
    answer = python(f"import sys, {module}; print(sorted({unwanted} & set(sys.modules)))")
    assert answer.stdout.strip() == "[]", answer.stdout + answer.stderr


# --- Randomness ---------------------------------------------------------------------------------


def test_seeded_restores_the_generator_of_the_caller_even_after_an_error():
    before = torch.get_rng_state()
    with seeded(1):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyError), seeded(1):
        assert torch.equal(torch.rand(3), inside)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(2):
        assert not torch.equal(torch.rand(3), inside)


def test_derived_seeds_are_distinct_repeatable_and_have_63_bits():
    parts = [(seed, epoch) for seed in range(40) for epoch in range(40)]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert seeds == [derive_seed(*p) for p in parts]
    assert all(isinstance(s, int) and 0 <= s < 2**63 for s in seeds)
    assert max(seeds) > 2**62
    torch.Generator().manual_seed(max(seeds))  # fits


# --- Arrays -------------------------------------------------------------------------------------


X = np.random.default_rng(0).integers(0, 256, size=(4, 5, 6, 3), dtype=np.uint8)
Y = np.array([2, 0, 1, 2], dtype=np.int32)


def test_the_checksum_covers_all_contents_in_order():
    X, y = np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(3)
    assert checksum(y, X) == zlib.crc32(y.tobytes() + X.tobytes())
    assert checksum(y, X[:, ::-1]) == zlib.crc32(y.tobytes() + X[:, ::-1].tobytes()) != checksum(y, X)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "kind", [float, np.float32, lambda x: np.array([0, x]), lambda x: torch.tensor([0, x]), lambda x: {"a": torch.ones(1), "b": torch.tensor(x)}],
)  # fmt: skip
def test_a_number_that_is_not_finite_is_refused_with_cause_and_cure(kind, bad):
    with pytest.raises(NotFiniteError, match="Logits: NaN or infinity.*Use float32"):
        require_finite(kind(bad), "Logits", "Use float32.")
    require_finite(kind(1.0), "Logits", "Use float32.")


def test_the_error_for_numbers_that_are_not_finite_is_caught_as_either_kind():
    assert issubclass(NotFiniteError, ValueError) and issubclass(NotFiniteError, FloatingPointError)
    require_finite({"steps": torch.tensor(3), "trained": torch.tensor([True])}, "Weights", "")


@dataclasses.dataclass
class Settings:
    rate: float
    parts: tuple


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.bool_(True), True),
        (np.str_("cat"), "cat"),
        (np.arange(3), [0, 1, 2]),
        (np.array(2.5), 2.5),
        (Path("a/b"), "a/b"),
        ({np.int64(1): [np.float64(0.5), (np.int32(2),)]}, {1: [0.5, (2,)]}),
        (Settings(np.float64(0.1), (np.int64(1), {"deep": np.int64(2)})), {"rate": 0.1, "parts": (1, {"deep": 2})}),
        (None, None),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_numpy_scalars_anywhere_become_plain_values(value, expected):
    def types(content):
        if isinstance(content, dict):
            return {key: (type(key), types(part)) for key, part in content.items()}
        return [types(part) for part in content] if isinstance(content, (list, tuple)) else type(content)

    assert plain(value) == expected
    assert types(plain(value)) == types(expected)


def test_a_state_dict_stays_what_it_is():
    weights = torch.nn.BatchNorm1d(2).state_dict()
    assert plain(weights) is weights
    assert plain({"model": weights, "step": np.int64(1)})["model"] is weights


# --- Device -------------------------------------------------------------------------------------


def test_a_device_can_be_named_and_described():
    assert choose_device("cpu") == torch.device("cpu")
    assert isinstance(choose_device(), torch.device)
    hardware = describe_hardware(torch.device("cpu"))
    assert hardware["device"] == "cpu"
    assert hardware["name"]
    assert hardware["cpu_threads"] == torch.get_num_threads()


def test_deterministic_convolutions_keep_the_other_settings_of_the_user(monkeypatch):
    cudnn = torch.backends.cudnn
    for name, value in (("benchmark", True), ("deterministic", False), ("allow_tf32", False)):
        monkeypatch.setattr(cudnn, name, value)
    with pytest.raises(KeyError), deterministic_convolutions():
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (False, True, False)
        raise KeyError
    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, False, False)


def test_hardware_is_described_for_a_sentence():
    assert (
        hardware_text({"device": "cpu", "name": "AMD EPYC", "cpu_threads": 1}) == "CPU (AMD EPYC, 1 thread)"
    )
    assert (
        hardware_text({"device": "cuda", "name": "H100", "cpu_threads": 16}) == "CUDA (H100, 16 CPU threads)"
    )


def test_more_memory_than_the_machine_has_is_refused():
    require_memory(1000, "10 images")
    with pytest.raises(
        TooLittleMemoryError, match="10 images would take at least 1,000,000 GB.*Ask for fewer"
    ):
        require_memory(10**15, "10 images")
    assert issubclass(TooLittleMemoryError, MemoryError) and issubclass(TooLittleMemoryError, ValueError)


# --- What a result says about its origin --------------------------------------------------------


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


def test_differences_name_every_setting_that_differs():
    found = {"steps": 6, "width": 16, "more": 1}
    assert describe_differences(found, {"steps": 6}) == ""
    differences = describe_differences(found, {"steps": 7, "width": 16, "seed": 0})
    assert differences == "steps: 6 there, 7 now; seed: None there, 0 now"


def test_a_result_with_other_settings_is_refused():
    require_same_settings("result.json", {"steps": 6}, {"steps": 6})
    require_same_settings("result.json", {"rates": [1, 2]}, {"rates": np.array([1, 2])})
    assert describe_differences({"rate": 0.1}, {"rate": np.float64(0.2)}) == "rate: 0.1 there, 0.2 now"
    with pytest.raises(ValueError, match=r"result\.json.*steps: 6 there, 7 now"):
        require_same_settings("result.json", {"steps": 6}, {"steps": 7})


# --- Files --------------------------------------------------------------------------------------


def test_a_successful_write_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("old", "new"):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error("stop")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_through_a_symbolic_link_changes_its_target_and_keeps_the_link(tmp_path):
    Path("large disk").mkdir()
    Path("large disk/cache.json").write_text("old")
    Path("cache.json").symlink_to(Path("large disk", "cache.json"))
    Path("to the link.json").symlink_to("cache.json")
    for name in ("cache.json", "to the link.json"):
        save_json(name, {"name": name})
        assert Path(name).is_symlink() and Path("cache.json").is_symlink()
        assert json.loads(Path("large disk/cache.json").read_text()) == {"name": name}
    assert [f.name for f in Path("large disk").iterdir()] == ["cache.json"]
    assert len(list(Path().iterdir())) == 3


def test_a_dangling_link_gets_its_target():
    Path("cache.json").symlink_to("not/there/yet.json")
    save_json("cache.json", {"x": 1})
    assert Path("cache.json").is_symlink()
    assert json.loads(Path("not/there/yet.json").read_text()) == {"x": 1}


@pytest.mark.parametrize("write", [lambda path: save_json(path, {}), require_writable])
def test_links_in_a_circle_are_refused_and_stay(write):
    Path("a.json").symlink_to("b.json")
    Path("b.json").symlink_to("a.json")
    with pytest.raises(OSError, match=r"Cannot write a\.json.*links"):
        write("a.json")
    assert Path("a.json").is_symlink() and len(list(Path().iterdir())) == 2


def test_a_failed_write_through_a_link_leaves_link_and_target():
    Path("folder").mkdir()
    Path("folder/target.txt").write_text("old")
    Path("link.txt").symlink_to("folder/target.txt")
    with pytest.raises(RuntimeError), atomic_path("link.txt") as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert Path("link.txt").is_symlink() and Path("link.txt").read_text() == "old"
    assert [f.name for f in Path("folder").iterdir()] == ["target.txt"]


def test_a_name_as_long_as_the_system_allows_can_be_written():
    name = "ä" * 120 + ".json"  # 245 of the 255 bytes that a name may have
    save_json(name, {})
    assert [f.name for f in Path().iterdir()] == [name]


def test_a_file_that_a_block_reads_in_vain_is_not_blamed_on_the_disk():
    with (
        pytest.raises(FileNotFoundError, match=r"elsewhere/notebook\.ipynb") as caught,
        atomic_path("copy.ipynb"),
    ):
        Path("elsewhere/notebook.ipynb").read_text()
    assert "disk space" not in str(caught.value)
    assert not list(Path().iterdir())


def test_a_folder_is_tried_before_the_work_and_no_file_stays():
    Path("old.txt").write_text("old")
    require_writable("old.txt", "new.txt", "deep/down/new.txt")
    assert [f.as_posix() for f in Path().rglob("*")] == ["old.txt"]
    assert Path("old.txt").read_text() == "old"


@pytest.mark.parametrize("path", ["old.txt/below.txt", "folder", "old.txt/a/b/c.txt"])
def test_a_path_that_cannot_be_written_is_noticed_before_the_work(path):
    Path("old.txt").write_text("old")
    Path("folder").mkdir()
    with pytest.raises(OSError, match=f"Cannot write {path}.*Choose a folder"):
        require_writable("fine.txt", path)
    assert {f.name for f in Path().iterdir()} == {"old.txt", "folder"}


def test_a_folder_without_permission_is_noticed_before_the_work(monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Runtime.tempfile, "mkstemp", refuse)
    with pytest.raises(OSError, match=r"Cannot write model\.pt: .*Permission denied"):
        require_writable("model.pt")


def test_the_users_home_is_found_in_every_path(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert user_path("~/data") == home / "data"
    assert user_path(Path("a/~/b")) == Path("a/~/b")
    save_json("~/a/file.json", {})
    save_array("~/a/array.npy", X)
    save_torch_file("~/a/model.pt", {"step": 1})
    require_writable("~/a/other.pt")
    require_free_space("~/a", 0)
    assert load_torch_file("~/a/model.pt", {"step"}) == {"step": 1}
    Checkpoint("~/a/run.pt", IDENTITY).save(step=7)
    assert Checkpoint(home / "a/run.pt", IDENTITY).load("step")["step"] == 7
    assert sorted(f.name for f in (home / "a").iterdir()) == ["array.npy", "file.json", "model.pt", "run.pt"]
    assert [f.name for f in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_json(tmp_path / "file.json", {})
        assert os.umask(umask) == umask  # the umask itself is not changed
    finally:
        os.umask(before)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("path", ["file/below.json", "file/further/below.json"])
def test_an_error_names_the_path_that_cannot_be_written(path):
    Path("file").write_text("not a folder")
    with pytest.raises(OSError, match=path):
        save_json(path, {})
    assert Path("file").read_text() == "not a folder"


def test_an_error_names_the_folder_that_has_the_name_of_the_file(tmp_path):
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(OSError, match=r"taken\.json"):
        save_json("taken.json", {})
    assert [f.name for f in tmp_path.iterdir()] == ["taken.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan")])
def test_json_refuses_nan_and_infinity_and_keeps_the_old_file(value):
    save_json("file.json", {"x": 1})
    with pytest.raises(ValueError):
        save_json("file.json", {"x": value})
    assert json.loads(Path("file.json").read_text()) == {"x": 1}
    assert len(list(Path().iterdir())) == 1


def test_the_error_for_nan_in_json_names_the_file():
    with pytest.raises(ValueError, match=r"file\.json was not written.*JSON"):
        save_json("file.json", {"x": float("nan")})


def test_numpy_values_are_saved_as_plain_ones():
    content = {"seed": np.int64(3), "rates": np.logspace(-1, 0, 2), "deep": [{"right": np.bool_(True)}]}
    expected = {"seed": 3, "rates": [0.1, 1.0], "deep": [{"right": True}]}
    save_json("file.json", content)
    assert json.loads(Path("file.json").read_text()) == expected
    save_torch_file("file.pt", content)
    assert load_torch_file("file.pt", {"seed"}) == expected


@pytest.mark.parametrize("name", ["images.npy", "images", "images.part", "images.npy.old"])
def test_an_array_is_saved_under_exactly_the_given_name(name):
    save_array(f"folder/{name}", X)
    assert [f.name for f in Path("folder").iterdir()] == [name]
    with open(f"folder/{name}", "rb") as file:
        assert np.array_equal(np.load(file, allow_pickle=False), X)


def test_an_array_of_python_objects_is_refused_and_the_old_file_stays():
    save_array("array.npy", Y)
    with pytest.raises(ValueError, match="pickle|[Oo]bject"):
        save_array("array.npy", np.array([{}, []], dtype=object))
    assert np.array_equal(np.load("array.npy"), Y)
    assert [f.name for f in Path().iterdir()] == ["array.npy"]


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
        "from Runtime import Checkpoint\n"
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


# --- Checkpoints --------------------------------------------------------------------------------

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
        "from Runtime import Checkpoint\n"
        "def killed_halfway(content, path):\n"
        "    Path(path).write_bytes(b'half of the file')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = killed_halfway\n"
        f"Checkpoint('checkpoint.pt', {IDENTITY}).save(step=8)\n"
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.load("step")["step"] == 7


# --- Several processes --------------------------------------------------------------------------


def in_another_process(work):
    """Start ``work()`` in a copy of this process; it gets a function that says that it has come so far."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work, args=(ready.set,))
    process.start()
    assert ready.wait(20)
    return process


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="Processes cannot be copied here.")


@forks
def test_a_second_process_waits_until_the_first_has_made_the_file(capsys):
    def make(ready):
        with one_process_at_a_time("folder/gan.pt", "trains the GAN"):
            ready()
            time.sleep(0.3)
            Path("folder/gan.pt").write_text("made by the first")

    first = in_another_process(make)
    with one_process_at_a_time("folder/gan.pt", "trains the GAN"):
        assert Path("folder/gan.pt").read_text() == "made by the first"
    assert "Another process trains the GAN: waiting" in capsys.readouterr().out
    first.join()
    assert [f.name for f in Path("folder").iterdir()] == ["gan.pt"], "no lock stays"


@forks
def test_the_lock_of_a_killed_process_blocks_nobody(capsys):
    def be_killed(ready):
        with one_process_at_a_time("gan.pt", "trains the GAN"):
            ready()
            os.kill(os.getpid(), signal.SIGKILL)

    in_another_process(be_killed).join()
    assert [f.name for f in Path().iterdir()] == [".gan.pt.lock"]
    with one_process_at_a_time("gan.pt", "trains the GAN"):
        pass
    assert not list(Path().iterdir())
    assert capsys.readouterr().out == ""


def test_the_lock_ends_with_an_error():
    for _ in range(2):
        with pytest.raises(KeyError), one_process_at_a_time("gan.pt", "trains the GAN"):
            raise KeyError
    assert not list(Path().iterdir())


# --- Downloads ----------------------------------------------------------------------------------


def test_a_url_is_reachable_only_if_the_server_has_the_file(server):
    server.files["/file"] = b"content"
    assert is_reachable(f"{server.url}/file", seconds=5)
    assert not is_reachable(f"{server.url}/other", seconds=1)


def test_a_closed_port_is_noticed_immediately(closed_url):
    start = time.monotonic()
    assert not is_reachable(closed_url, seconds=10)
    assert time.monotonic() - start < 3


def test_a_server_that_never_answers_is_given_up_after_the_given_seconds(hanging_url):
    start = time.monotonic()
    assert not is_reachable(hanging_url, seconds=0.5)
    assert 0.3 < time.monotonic() - start < 2


def test_a_name_lookup_that_hangs_is_given_up_after_the_given_seconds(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(3))
    start = time.monotonic()
    assert not is_reachable("http://somewhere.invalid/", seconds=0.3)
    assert time.monotonic() - start < 2


def test_a_download_waits_a_minute_at_most_and_leaves_the_callers_timeout():
    for before in (None, 7.0):
        socket.setdefaulttimeout(before)
        try:
            with downloading():
                assert socket.getdefaulttimeout() == 60
            with pytest.raises(TimeoutError), downloading():
                raise TimeoutError
            with pytest.raises(OSError, match="broke off its answer .IncompleteRead"), downloading():
                raise http.client.IncompleteRead(b"half", 4)
            assert socket.getdefaulttimeout() == before
        finally:
            socket.setdefaulttimeout(None)


def test_the_error_for_too_little_free_space_gives_the_needed_space(tmp_path):
    require_free_space(tmp_path / "not" / "there" / "yet", 0)
    with pytest.raises(OSError, match=r"1000000000\.00 GB"):
        require_free_space(tmp_path / "not" / "there" / "yet", 1e9)
    assert not (tmp_path / "not").exists()

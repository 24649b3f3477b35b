"""Files that are whole or not there, settings in files, one process at a time, and downloads."""

import dataclasses
import http.client
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import Files
from Checkpoints import Checkpoint, load_torch_file, save_torch_file
from Files import (
    atomic_path,
    describe_differences,
    downloading,
    is_reachable,
    one_process_at_a_time,
    plain,
    require_free_space,
    require_same_settings,
    require_writable,
    save_array,
    save_json,
    user_path,
)

X = np.random.default_rng(0).integers(0, 256, size=(4, 5, 6, 3), dtype=np.uint8)
Y = np.array([2, 0, 1, 2], dtype=np.int32)


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

    monkeypatch.setattr(Files.tempfile, "mkstemp", refuse)
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
    Checkpoint("~/a/run.pt", {"steps": 100}).save(step=7)
    assert Checkpoint(home / "a/run.pt", {"steps": 100}).load("step")["step"] == 7
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

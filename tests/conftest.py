"""Fixtures that all tests share.

Every test runs in an empty folder of its own, because the modules write below the working directory.
The real data is looked for in ``$CIFAR10_ROOT`` (relative paths count from the repository's root), else in
``datasets``. Where it should be (``CI=true`` or ``CIFAR10_ROOT`` set) its absence is a failure, not a skip.

    python -m pytest --device cuda     # whatever chooses its own device computes on the GPU

With any option, ``Runtime.choose_device()`` is the device under test, also in the programs that a test starts. The
default is the CPU, on machines with a GPU too, so that a failure means the same everywhere.
"""

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from ImageCache import save_generated_images
from ImbalancedCIFAR10 import CIFAR10_CLASSES, ImageDataSet, load_cifar10, load_digits_as_images
from Runtime import choose_device

REPOSITORY = Path(__file__).resolve().parents[1]
DATA_ROOT = (REPOSITORY / (os.environ.get("CIFAR10_ROOT") or "datasets")).resolve()
DATA_IS_EXPECTED = os.environ.get("CI") == "true" or bool(os.environ.get("CIFAR10_ROOT"))


# --- The device ---------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda", "mps"),
        help="where the tests compute (default: cpu)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu(reason): this test says something about the CPU alone")
    wanted = config.getoption("--device")
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before PyTorch looks for a GPU
        torch.backends.mps.is_available = lambda: False
    if choose_device().type != wanted:
        raise pytest.UsageError(
            f"--device {wanted}: PyTorch would compute on {choose_device().type} here. "
            "Run python Hardware.py to see why, or leave the option out."
        )


def pytest_runtest_setup(item):
    mark = item.get_closest_marker("cpu")
    if mark is not None and item.config.getoption("--device") != "cpu":
        pytest.skip(f"the CPU alone: {mark.kwargs['reason']}")


@pytest.fixture(scope="session")
def device():
    """The torch.device under test, which is also what choose_device() returns."""
    return choose_device()


# --- Around each test ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads make such small networks slower, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """On CUDA, each size of the images would be compiled for seconds. ``test_Compilation.py`` compiles."""
    monkeypatch.setenv("COMPILE_BACKEND", "none")


@pytest.fixture(autouse=True)
def checkpoints_after_each_epoch(request, monkeypatch):
    """On a GPU, too: what tests see of a run does not depend on how fast it is."""
    if "ClassifierTraining" in sys.modules and request.config.getoption("--device") != "cpu":
        monkeypatch.setattr("ClassifierTraining.seconds_between_checkpoints", lambda device: 0)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Run the test in its own empty folder, and close the figures that it leaves open."""
    if os.environ.get("CIFAR10_ROOT"):
        monkeypatch.setenv("CIFAR10_ROOT", str(DATA_ROOT))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


# --- The real data ------------------------------------------------------------------------------


def _require(path):
    if path.exists():
        return path
    if DATA_IS_EXPECTED:
        pytest.fail(f"There is no {path}, but CI=true or CIFAR10_ROOT says that the data is here.")
    pytest.skip(f"There is no {path}. Set CIFAR10_ROOT to the folder that contains it to run this test.")


@pytest.fixture(scope="session")
def cifar10_root():
    """The folder that contains the real CIFAR-10."""
    return _require(DATA_ROOT / "cifar-10-batches-py").parent


@pytest.fixture(scope="session")
def cifar10(cifar10_root):
    """The real CIFAR-10. Nothing is ever downloaded for it. Shared by all tests: do not change it."""
    return load_cifar10(cifar10_root)


@pytest.fixture(scope="session")
def cifake_zip():
    """Path of the real CIFAKE archive."""
    return _require(DATA_ROOT / "cifake.zip")


# --- Small stand-ins ----------------------------------------------------------------------------


def make_images(y, seed):
    """Noisy 32x32 images whose mean colour tells their class: easy to learn, no two alike."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(0).permutation(np.linspace(40, 215, 30)).reshape(10, 3)
    noise = rng.normal(0, 20, size=(len(y), 32, 32, 3))
    return np.clip(colours[y][:, None, None, :] + noise, 0, 255).astype(np.uint8)


def make_tiny_data():
    """A learnable data set under CIFAR-10's name: 30 training and 10 test images of each class."""
    y_train = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 30))
    y_test = np.random.default_rng(2).permutation(np.repeat(np.arange(10), 10))
    return ImageDataSet(
        "cifar10", CIFAR10_CLASSES, make_images(y_train, 3), y_train, make_images(y_test, 4), y_test
    )


@pytest.fixture
def tiny_data():
    return make_tiny_data()


@pytest.fixture
def tiny_cache(own_folder):
    """``datasets/stable_diffusion_dataset.npy`` in the working folder, 60 random images of each class."""
    images = np.random.default_rng(5).integers(0, 256, size=(600, 32, 32, 3), dtype=np.uint8)
    path = own_folder / "datasets" / "stable_diffusion_dataset.npy"
    save_generated_images(images, np.tile(np.arange(10), 60), path)
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny models of the real classes: ``stable`` and ``turbo`` (pipelines), ``clip``."""
    import tiny_models  # here because diffusers takes seconds to import

    folder = tmp_path_factory.mktemp("models")
    tiny_models.save_pipeline(folder / "stable")
    tiny_models.save_turbo(folder / "turbo", folder / "stable")
    shutil.copytree(folder / "stable" / "tiny_decoder", folder / "turbo" / "tiny_decoder")
    tiny_models.save_clip(folder / "clip")
    return {f.name: str(f) for f in folder.iterdir()}


# --- Runs of the study --------------------------------------------------------------------------

SPLIT = "cat-5"  # of the 30 images of each class in tiny_data


def smoke_study(data, split_name=SPLIT):
    """The study of a split under the profile ``smoke``."""
    from Results import Study  # here because it imports every sampler

    return Study("smoke", data.name, split_name)


def smoke(arm_name, data, split_name=SPLIT, seed=0):
    """Run one arm under ``smoke``, or read its result if it is finished."""
    from Arms import ArmUnavailableError
    from Experiment import run_arms

    [outcome] = run_arms([smoke_study(data, split_name)], data, [arm_name], [seed]).values()
    if isinstance(outcome, str):
        raise ArmUnavailableError(outcome)
    return outcome


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder with two seeds of one arm and one of another, under smoke: trained once for all tests."""
    from Experiment import run_arms  # imported here because most tests need none of what it imports

    data, folder = make_tiny_data(), tmp_path_factory.mktemp("trained")
    study = smoke_study(data, "cat-3")
    with contextlib.chdir(folder):
        run_arms([study], data, ["imbalanced", "logit-adjusted"])
        run_arms([study], data, ["imbalanced"], [1])
    return folder


@pytest.fixture
def results(trained, tiny_data):
    """The results in ``trained``, copied into the test's own folder."""
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    return smoke_study(tiny_data, "cat-3").load_results()


@pytest.fixture
def headline(monkeypatch):
    """The study of :data:`SPLIT` under the profile ``headline``, made tiny: width 4, four steps."""
    from Arms import PROFILES
    from Results import Study

    tiny = dataclasses.replace(PROFILES["headline"], width=4, steps=4)
    monkeypatch.setitem(PROFILES, "headline", tiny)
    return Study("headline", "cifar10", SPLIT)


def files(folder="."):
    """Paths of all files below a folder."""
    return {path.as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def with_other_removed_images(data, split):
    """The same data, except that the images that the split removes have other pixels."""
    removed = np.setdiff1d(np.arange(len(data.y_train)), split.kept_rows(data.y_train))
    X_train = data.X_train.copy()
    X_train[removed] = 255 - X_train[removed]
    return dataclasses.replace(data, X_train=X_train)


@pytest.fixture(scope="session")
def digits():
    return load_digits_as_images()


@pytest.fixture
def move_to_another_folder(tmp_path_factory, monkeypatch):
    return lambda: monkeypatch.chdir(tmp_path_factory.mktemp("another"))


def python(code):
    """Run Python code in a process of its own that can import the modules of the repository."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


# --- Servers on this machine --------------------------------------------------------------------


class LocalServer:
    """An HTTP server on this machine: answers with ``files[path]``, and counts what it was asked for."""

    def __init__(self):
        self.files = {}  # path such as "/a.zip" -> bytes
        self.requests = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                content = outer.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # is_reachable hangs up early
                    self.wfile.write(content or b"")

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def without_proxy(monkeypatch):
    """Reach 127.0.0.1 directly, whatever proxy the machine uses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(without_proxy):
    """A :class:`LocalServer`."""
    server = LocalServer()
    yield server
    server.close()


@pytest.fixture
def closed_url(without_proxy):
    """A URL whose port refuses connections: it is taken, but nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/file"


@pytest.fixture
def little_patience(monkeypatch):
    """Whoever sets a timeout for sockets waits 0.3 seconds."""
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds and 0.3))


@pytest.fixture
def hanging_url(without_proxy):
    """A URL whose server accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}/file"

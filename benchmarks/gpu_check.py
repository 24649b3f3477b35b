"""Does the study work on this machine's CUDA GPU, and how fast? An answer in at most ten minutes.

    make gpu-check

In this order: what the GPU is and what it multiplies; the tests that touch the device; one training step of classifier
and GAN; the arm ``balanced`` of the profile ``full``, to its end. The arm gets what is left of the time. If that is
too short, the same command goes on from the arm's checkpoint, and a finished arm is read.

Each finding is a line. ``results/benchmarks/gpu-check-<device>.json`` has them with their numbers. The exit status is
0 if nothing failed and everything was finished, else 1, also without a GPU. Nothing is installed: what needs a package
that is missing is skipped, and the line names it. PyTorch 2.9 or newer is needed.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from Hardware import cuda_works, find_driver, unusable_gpu

# Everything else is imported by the parts that need it, so that a missing package costs only these.

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = Path("results", "benchmarks")
SECONDS = 570  # of the ten minutes; the rest is for starting and ending processes
SECONDS_FOR_TESTS, SECONDS_FOR_A_STEP = 240, 90
SHORTEST_ARM = 20  # seconds: less is not worth a start
LEAST_ACCURACY = 0.8  # of the balanced arm of `full`; a network that computes rightly exceeds it by far
WIDTH = 64  # of the profile `full`; a test holds the two together
TESTS_ON_THE_DEVICE = (
    "ArmTraining", "Batches", "Classifier", "GAN", "GenerationQuality", "Losses", "Muon", "device",
)  # fmt: skip
EPOCH = 10  # training steps in the classifier's epochs here


@dataclass
class Finding:
    """One line of the answer.

    Attributes
    ----------
    name : str
    status : {'passed', 'failed', 'skipped', 'unfinished'}
    text : str
    numbers : dict
        For the file.
    """

    name: str
    status: str
    text: str
    numbers: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.status:10} {self.name}: {self.text}"


# --- One part in a process of its own -----------------------------------------------------------


def in_a_process(name, part, seconds):
    """Call ``part()``, which returns text and numbers, in a process of its own; return the :class:`Finding`.

    After a launch failure a process can no longer use the GPU, and a part may hang.

    Parameters
    ----------
    name : str
    part : picklable callable
    seconds : float
        After them the process is killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name, part, os.getcwd()))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return Finding(name, "unfinished", f"stopped after {seconds:.0f} s")
    except EOFError:
        process.join()
        return Finding(name, "failed", f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send(sender, name, part, folder):
    os.chdir(folder)  # a new process begins where the first one began
    try:
        finding = Finding(name, "passed", *part())
    except ModuleNotFoundError as error:
        finding = Finding(name, "skipped", f"the package {error.name} is missing")
    except Exception as error:  # whatever it is, the other parts go on
        reason = (str(error).strip() or "no details").splitlines()[0]
        skipped = type(error).__name__ == "DataUnavailableError"
        finding = Finding(name, "skipped" if skipped else "failed", f"{type(error).__name__}: {reason}")
    sender.send(finding)


# --- The machine --------------------------------------------------------------------------------


def check_machine(device_name, size):
    """What the device is, and what a product of two matrices of ``size`` rows reaches on it."""
    import torch

    from Runtime import code_version

    device = torch.device(device_name)
    dtype, peak = compute_dtype(device), measure_peak(device, size)
    numbers = {"torch": torch.__version__, "cuda": torch.version.cuda, "commit": code_version(),
               "python": sys.version.split()[0], "dtype": str(dtype), "peak_tflops": peak / 1e12}  # fmt: skip
    name = device.type
    if device.type == "cuda":
        properties, driver = torch.cuda.get_device_properties(device), find_driver()
        name = properties.name
        numbers |= {
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver and driver.version,
        }
        name += f" ({numbers['memory_gib']:.0f} GiB, driver {numbers['driver']})"
    text = f"{name}, PyTorch {torch.__version__}, {peak / 1e12:,.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}"
    return text, numbers


def compute_dtype(device):
    """The data type in which the classifier multiplies on a torch.device."""
    import numpy as np

    from ClassifierNetwork import create_classifier, evaluate_classifier

    seen = []
    model = create_classifier(10, 4, ((127.5,) * 3, (63.75,) * 3), seed=0, device=device)
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    evaluate_classifier(model, np.zeros((1, 32, 32, 3), dtype=np.uint8), np.zeros(1, dtype=np.int64))
    return seen[0]


def measure_peak(device, size):
    """Operations per second of a product of two matrices (size, size), which are checked.

    The peaks in data sheets are for other clocks than a card keeps, so what a large product reaches is the
    measure here. Of several attempts the fastest counts.
    """
    import torch

    dtype = compute_dtype(device)
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn((size, size), generator=random).to(device, dtype) for _ in range(2))
    exact = a[:8].cpu().double() @ b.cpu().double()
    # A sum of n rounded products: the tolerance is a hundredth of its standard deviation.
    if not torch.allclose((a @ b)[:8].cpu().double(), exact, rtol=0.02, atol=0.01 * size**0.5):
        raise ArithmeticError("a product of matrices is wrong")
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronize(device)
        seconds.append((time.perf_counter() - started) / 5)
    return 2 * size**3 / min(seconds)


def synchronize(device):
    """Wait until a GPU has done what it was told."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- The tests ----------------------------------------------------------------------------------


def check_tests(device_name, seconds, files=None):
    """The :class:`Finding` of the tests that touch the device, run there.

    Parameters
    ----------
    device_name : str
    seconds : float
        After them the tests are stopped.
    files : sequence of path, optional
        Default: all of ``TESTS_ON_THE_DEVICE``.
    """
    if importlib.util.find_spec("pytest") is None:
        return Finding("tests", "skipped", "the package pytest is missing")
    if files is None:
        files = sorted(
            {f for part in TESTS_ON_THE_DEVICE for f in (REPOSITORY / "tests").glob(f"test_{part}*.py")}
        )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", device_name,
                   "--continue-on-collection-errors", f"--junitxml={report}", *map(str, files)]  # fmt: skip
        if importlib.util.find_spec("xdist") is not None and len(files) > 1:
            command += ["--numprocesses", str(min(4, os.cpu_count() or 1)), "--dist", "loadscope"]
        try:
            answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return Finding("tests", "unfinished", f"stopped after {seconds:.0f} s")
        if not report.exists():
            return _nothing_was_tested(answer)
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    return _judge_tests(cases, time.perf_counter() - started)


def _nothing_was_tested(answer):
    """The finding if pytest did not start."""
    output = answer.stdout + answer.stderr
    if missing := sorted(set(re.findall(r"No module named '(\w+)", output))):
        return Finding("tests", "skipped", f"the package {', '.join(missing)} is missing")
    line = (output.strip() or f"pytest ended with exit code {answer.returncode}").splitlines()[-1]
    return Finding("tests", "failed", line)


def _judge_tests(cases, seconds):
    counts, bad, missing = {"passed": 0, "failed": 0, "skipped": 0}, [], set()
    for case in cases:
        broken = [part for part in case if part.tag in ("failure", "error")]
        packages = {
            name for part in broken for name in re.findall(r"No module named '(\w+)", part.text or "")
        }
        if packages and all(part.tag == "error" for part in broken):
            missing |= packages  # a file that cannot be imported
        elif broken:
            bad.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}")
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    counts["failed"] = len(bad)
    text = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped in {seconds:.0f} s"
    if bad:
        text += f"; failed: {', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''}"
    if missing:
        text += f"; some files were skipped, because the package {', '.join(sorted(missing))} is missing"
    status = "failed" if bad else "passed" if counts["passed"] else "skipped"
    return Finding(
        "tests", status, text, counts | {"failures": bad, "missing": sorted(missing), "seconds": seconds}
    )


# --- One training step --------------------------------------------------------------------------


def check_classifier_step(device_name, width, batch_size, epochs, size):
    """A training step of the classifier on images of full size: milliseconds, operators, share of the peak.

    Parameters
    ----------
    device_name : str
    width : int
    batch_size : int
    epochs : int
        Of ten steps each. The first one starts everything up and is not counted; the median of the others counts.
    size : int
        Of the matrices whose product is the peak.
    """
    import numpy as np
    import torch

    from ClassifierNetwork import channel_statistics, create_classifier
    from ClassifierTraining import Recipe, count_training_flops, train_classifier

    device = torch.device(device_name)
    X = np.random.default_rng(0).integers(0, 256, (EPOCH * batch_size, 32, 32, 3), dtype=np.uint8)
    y = np.arange(len(X)) % 10
    options = {"batch_size": batch_size, "micro_batch_size": min(batch_size, 128), "scales": (1.0,)}

    def train(epochs, after_epoch=None):
        model = create_classifier(10, width, channel_statistics(X), seed=0, device=device)
        recipe = Recipe(steps=EPOCH * epochs, **options)
        return model, train_classifier(model, X, y, recipe, seed=0, after_epoch=after_epoch)

    model, history = train(epochs)
    seconds = statistics.median(epoch["seconds"] for epoch in history[1:]) / EPOCH
    with _profile(device) as profiler:
        train(3, lambda *arguments: profiler.step())
    flops = count_training_flops(model, Recipe(steps=1, **options))
    return _describe_step(device, seconds, _count_operators(profiler, device) / EPOCH, flops, size)


def check_gan_step(device_name, settings, steps, size):
    """A training step of the GAN, both networks: see :func:`check_classifier_step`.

    Parameters
    ----------
    device_name : str
    settings : GANTrainingStep.GANSettings or None
        None is the profile ``full``.
    steps : int
        That are timed, after as many for starting up.
    size : int
    """
    import numpy as np
    import torch

    from Arms import PROFILES
    from GANTrainingStep import Adversaries, BalancedBatches, count_flops
    from Repeatability import deterministic_convolutions

    device = torch.device(device_name)
    settings = PROFILES["full"].gan if settings is None else settings
    X = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), dtype=np.uint8)
    batches = BalancedBatches(X, np.arange(500) % 10, device, settings.flip)
    adversaries = Adversaries(10, settings, 0, device)
    with deterministic_convolutions():  # as in a training
        for step in range(steps):
            adversaries.step(batches, step, 0)
        synchronize(device)
        started = time.perf_counter()
        for step in range(steps):
            adversaries.step(batches, step, 0)
        synchronize(device)
        seconds = (time.perf_counter() - started) / steps
        with _profile(device) as profiler:
            for step in range(3):
                adversaries.step(batches, step, 0)
                synchronize(device)
                profiler.step()
    return _describe_step(device, seconds, _count_operators(profiler, device), count_flops(settings), size)


def _profile(device):
    """A profiler that records what lies between its second and its third step()."""
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    return profile(activities=activities, schedule=schedule(wait=0, warmup=2, active=1, repeat=1))


def _count_operators(profiler, device):
    """What a GPU is told to do, one by one; on a CPU, PyTorch's operators that no other operator called."""
    from torch.autograd import DeviceType

    events = profiler.events()
    if device.type == "cuda":
        return sum(event.device_type == DeviceType.CUDA for event in events)

    def is_called_by_another(event):
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("aten::"):
            parent = parent.cpu_parent
        return parent is not None

    return sum(event.name.startswith("aten::") and not is_called_by_another(event) for event in events)


def _describe_step(device, seconds, operators, flops, size):
    share = flops / seconds / measure_peak(device, size)
    text = (
        f"{1000 * seconds:,.2f} ms, {operators:,.0f} operators, {share:.1%} of what a large product reaches"
    )
    numbers = {
        "milliseconds": 1000 * seconds,
        "operators": operators,
        "gflops": flops / 1e9,
        "share_of_peak": share,
    }
    return text, numbers


# --- An arm to its end --------------------------------------------------------------------------


def check_balanced_arm(device_name, profile, seconds, load_data=None, least_accuracy=LEAST_ACCURACY):
    """The :class:`Finding` of the arm ``balanced``, seed 0, on the reference split. It is a result of the study.

    Parameters
    ----------
    device_name, profile : str
    seconds : float
        After them the training is killed. The next call continues from its last epoch.
    load_data : picklable callable, optional
        Returns the :class:`ImbalancedCIFAR10.ImageDataSet`. Default: CIFAR-10.
    least_accuracy : float
        A lower test accuracy is a failure.
    """
    name = f"balanced arm of {profile}"
    if seconds < SHORTEST_ARM:
        return Finding(name, "unfinished", "no time was left; run this again")
    part = partial(_run_balanced_arm, device_name, profile, load_data)
    finding = in_a_process(name, part, seconds)
    if finding.status == "unfinished":
        finding.text += f"{_progress(profile)}; the same command goes on from there"
    elif finding.status == "passed" and not finding.numbers["accuracy"] >= least_accuracy:
        finding.status = "failed"
        finding.text += f"; at least {least_accuracy:.0%} was expected"
    return finding


def _run_balanced_arm(device_name, profile, load_data):
    from Arms import REFERENCE_SPLIT
    from ArmTraining import finished_result, run_arm
    from ImbalancedCIFAR10 import load_cifar10
    from Results import Study

    data = (load_data or load_cifar10)()
    study = Study(profile, data.name, REFERENCE_SPLIT)
    result = finished_result(study, data, "balanced")
    when = "read from an earlier run" if result else "run now"
    if result is None:
        result = run_arm(study, data, "balanced", data.X_train, data.y_train, device=device_name)
    accuracy, seconds = result["metrics"]["accuracy"], result["seconds"]["training"]
    steps = result["history"][-1]["step"]
    numbers = {
        "accuracy": accuracy,
        "seconds": seconds,
        "steps": steps,
        "trained_on": result["hardware"]["name"],
    }
    text = f"{accuracy:.2%} accuracy, {steps:,} steps in {seconds:,.0f} s on {numbers['trained_on']}, {when}"
    return text, numbers


def _progress(profile):
    """Up to which step the killed training is saved."""
    from Arms import REFERENCE_SPLIT
    from Checkpoints import load_torch_file
    from Results import Study

    path = Study(profile, "cifar10", REFERENCE_SPLIT).checkpoint_path("balanced-seed0")
    try:
        return f", saved up to step {load_torch_file(path, {'history'})['history'][-1]['step']:,}"
    except (OSError, ValueError):
        return ", nothing was saved yet"


# --- Everything ---------------------------------------------------------------------------------


def check(parts, path, started):
    """Run the parts one after another; print a line for each and keep them in a file, also if a later one is killed.

    Parameters
    ----------
    parts : sequence of callables
        Each takes the seconds that are left and returns a :class:`Finding`.
    path : path
        Of the JSON file.
    started : float
        The ``time.monotonic()`` from which the seconds count.

    Returns
    -------
    bool
        Whether nothing failed and everything was finished.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    findings = []
    for part in parts:
        findings.append(part(SECONDS - (time.monotonic() - started)))
        print(findings[-1], flush=True)
        content = {
            "seconds": time.monotonic() - started,
            "findings": [asdict(finding) for finding in findings],
        }
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    print(f"The findings are in {path}.")
    return all(finding.status in ("passed", "skipped") for finding in findings)


def result_path(device_name):
    """``results/benchmarks/gpu-check-<name of the device>.json``, in small letters without spaces."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return FOLDER / f"gpu-check-{name}.json"


def plan(device_name):
    """The parts of a whole check."""

    def step(name, part):
        return lambda left: in_a_process(name, part, min(SECONDS_FOR_A_STEP, max(left, 1)))

    classifier = partial(check_classifier_step, device_name, WIDTH, 256, 6, 8192)
    return [
        step("machine", partial(check_machine, device_name, 8192)),
        lambda left: check_tests(device_name, min(SECONDS_FOR_TESTS, max(left, 1))),
        step("classifier's training step", classifier),
        step("GAN's training step", partial(check_gan_step, device_name, None, 50, 8192)),
        lambda left: check_balanced_arm(device_name, "full", left),
    ]


def main(arguments=None):
    started = time.monotonic()
    parser = argparse.ArgumentParser(description="Does the study work on this machine's GPU, and how fast?")
    parser.parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        parser.exit(1, f"{parser.prog}: {sys.executable} has no PyTorch. Run make test to install it.\n")
    if not cuda_works():
        parser.exit(1, f"{parser.prog}: {unusable_gpu() or 'This machine has no CUDA GPU.'}\n")
    import torch

    name = torch.cuda.get_device_name()
    return 0 if check(plan("cuda"), result_path(name), started) else 1


if __name__ == "__main__":
    sys.exit(main())

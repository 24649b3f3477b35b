"""Training steps of this code and of an earlier checkout, timed in turns in one process on the CPU.

    git worktree add /tmp/earlier 70191a59
    OMP_NUM_THREADS=1 python benchmarks/side_by_side.py /tmp/earlier

Each turn times a few steps of one version, then of the other, so that a machine whose speed changes slows both down.
Writes ``results/benchmarks/side-by-side-cpu.json``. The steps are those of the profile ``cpu``.
"""

import argparse
import importlib
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parents[1]
RESULT = Path("results", "benchmarks", "side-by-side-cpu.json")
CPU = torch.device("cpu")


def load(folder, *names):
    """Import modules of a checkout, and forget them, so that another checkout's can follow."""
    ours = {path.stem for path in Path(folder).glob("*.py")}
    for name in ours & sys.modules.keys():
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in ours & sys.modules.keys():
            del sys.modules[name]


def gan_step(folder):
    """One training step of the GAN of ``cpu``."""
    arms, training = load(folder, "Arms", "GANTrainingStep")
    settings = arms.PROFILES["cpu"].gan
    X = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8)
    batches = training.BalancedBatches(X, np.arange(len(X)) % 10, CPU, settings.flip)
    adversaries, numbers = training.Adversaries(10, settings, 0, CPU), iter(range(10**9))
    return lambda: adversaries.step(batches, next(numbers), 0)


def classifier_step(folder):
    """One training step of the classifier of ``cpu``, images of full size, two micro-batches."""
    arms, network, training = load(folder, "Arms", "ClassifierNetwork", "ClassifierTraining")
    X = np.random.default_rng(0).integers(0, 256, (5120, 32, 32, 3), dtype=np.uint8)
    y = np.arange(len(X)) % 10
    recipe = training.Recipe(steps=10**6, scales=(1.0,))
    model = network.create_classifier(10, arms.PROFILES["cpu"].width, ((127.5,) * 3, (63.75,) * 3), 0, "cpu")
    loop = training._Training(model, y, recipe, training.CrossEntropy(), recipe.batches(X, 0, CPU))
    model.train()
    loop.loss_sum, loop.right = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    endless = (batch for number in range(1, 10**6) for batch in loop.batches.epoch(number))
    if not hasattr(training, "split_evenly"):  # an earlier version splits batches within the step
        return lambda: loop.train_step(*next(endless))
    return lambda: loop.train_step(training.split_evenly(*next(endless), recipe.micro_batch_size))


def ratios(make_step, earlier, rounds, steps):
    """Seconds of this version as a fraction of the earlier one's, in each round."""
    versions = [make_step(earlier), make_step(HERE)]
    for step in versions:
        step(), step()
    found = []
    for number in range(rounds):
        seconds = {}
        for step in versions if number % 2 else versions[::-1]:
            started = time.perf_counter()
            for _ in range(steps):
                step()
            seconds[step] = time.perf_counter() - started
        found.append(seconds[versions[1]] / seconds[versions[0]])
    return found


def sentence(result):
    """What a result says, for the README."""
    classifier, gan = (
        f"{result[name]['median']:.2f} ({min(result[name]['ratios']):.2f} to {max(result[name]['ratios']):.2f})"
        for name in ("classifier", "gan")
    )
    return (
        f"The classifier's step takes {classifier} times as long as before, and the GAN's step {gan} times: medians "
        f"of {len(result['gan']['ratios'])} rounds, with their range; {result['hardware']['name']}, one thread."
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Time training steps of two checkouts side by side.")
    parser.add_argument("earlier", type=Path, help="folder of the earlier checkout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="of each version in a round (default: 6)")
    options = parser.parse_args(arguments)
    if not (options.earlier / "ClassifierTraining.py").is_file():
        parser.error(f"{options.earlier} is no checkout of this repository")
    torch.set_num_threads(1)
    result = {}
    for name, make_step in (("classifier", classifier_step), ("gan", gan_step)):
        found = ratios(make_step, options.earlier, options.rounds, options.steps)
        result[name] = {"ratios": found, "median": statistics.median(found)}
        print(f"{name}: this version takes {result[name]['median']:.3f} of the earlier one's time "
              f"({', '.join(f'{ratio:.2f}' for ratio in found)})", flush=True)  # fmt: skip
    files, runtime = load(HERE, "Files", "Runtime")
    result |= {
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "hardware": runtime.describe_hardware(CPU), "torch": torch.__version__, "commit": runtime.code_version(),
    }  # fmt: skip
    files.save_json(RESULT, result)


if __name__ == "__main__":
    main()

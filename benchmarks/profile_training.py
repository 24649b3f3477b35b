"""Where a training step's time goes, by torch.profiler.

    python benchmarks/profile_training.py --width 16

Prints the fraction of each part of a step, the most expensive operators and what an evaluation costs. Writes
``results/benchmarks/profile-<device>-width<w>.json``. On CUDA the fractions are those of the GPU's time, else of the CPU's.
"""

import argparse
import sys
import time
from numbers import Real
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from Batches import AugmentedBatches
from ClassifierNetwork import channel_statistics, create_classifier, evaluate_classifier
from ClassifierTraining import Recipe, train_classifier
from Files import save_json
from ImbalancedCIFAR10 import load_cifar10
from Results import HARDWARE
from Runtime import choose_device, code_version, describe_hardware
from Utils import markdown_table

FOLDER = Path("results", "benchmarks")
PARTS = {  # name in the table -> name in the profile
    "data path": "batches",
    "forward and backward": "forward and backward",
    "SGD": "Optimizer.step#SGD.step",
    "Muon": "Optimizer.step#KernelMuon.step",
}
REST = "everything else"
EVALUATION = "training_images_at_the_cost_of_evaluating_one"
RECORD = {  # what :func:`table` asks of a result, see Results.read_json
    "width": int, "images_per_second": Real, "shares": {part: Real for part in (*PARTS, REST)}, EVALUATION: Real,
    "hardware": HARDWARE,
}  # fmt: skip


class NamedBatches(AugmentedBatches):
    """Batches whose making has a name in the profile. The other parts get theirs from PyTorch and from the loop."""

    def epoch(self, number):
        batches = super().epoch(number)
        while True:
            with record_function("batches"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def table(results):
    """Markdown table of results, one column each."""
    rows = [(part, *(f"{r['shares'][part]:.1%}" for r in results)) for part in (*PARTS, REST)]
    rows.append(("images/s", *(f"{r['images_per_second']:,.0f}" for r in results)))
    rows.append(("evaluating a test image, in training images", *(f"{r[EVALUATION]:.2f}" for r in results)))
    return markdown_table(
        (
            "share of a training step",
            *(f"width {r['width']}, {r['hardware']['device'].upper()}" for r in results),
        ),
        rows,
    )


def main():
    parser = argparse.ArgumentParser(description="Where the time of a training step goes.")
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18 (default: 16)")
    parser.add_argument("--steps", type=int, default=20, help="profiled steps (default: 20)")
    options = parser.parse_args()
    device, data = choose_device(), load_cifar10()
    cuda = device.type == "cuda"

    def train(steps):
        model = create_classifier(10, options.width, channel_statistics(data.X_train), seed=0)
        recipe = Recipe(steps=steps)
        batches = NamedBatches(data.X_train, recipe.batch_size, device, 0, **recipe.augmentation)
        history = train_classifier(model, data.X_train, data.y_train, recipe, seed=0, batches=batches)
        return model, sum(epoch["seconds"] for epoch in history)

    train(3)  # the first steps choose algorithms and fill caches
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        model, seconds = train(options.steps)
    events = profiler.key_averages()
    time_of = {event.key: event.device_time_total if cuda else event.cpu_time_total for event in events}
    shares = {part: time_of.get(key, 0) / 1e6 / seconds for part, key in PARTS.items()}
    shares[REST] = 1 - sum(shares.values())

    evaluate_classifier(model, data.X_test[:1000], data.y_test[:1000])
    started = time.perf_counter()
    evaluate_classifier(model, data.X_test, data.y_test)
    seconds_of_evaluation = time.perf_counter() - started
    images_per_second = options.steps * Recipe.batch_size / seconds
    result = {
        "width": options.width, "steps": options.steps, "images_per_second": images_per_second, "shares": shares,
        "seconds_to_evaluate_the_test_set": seconds_of_evaluation,
        EVALUATION: (
            seconds_of_evaluation / len(data.y_test) * images_per_second
        ),
        "hardware": describe_hardware(device), "torch": torch.__version__, "commit": code_version(),
    }  # fmt: skip
    save_json(FOLDER / f"profile-{device.type}-width{options.width}.json", result)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    print(events.table(sort_by=order, row_limit=12, max_name_column_width=40))
    print(table([result]))


if __name__ == "__main__":
    main()

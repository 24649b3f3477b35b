"""Training speed side by side: the reference study's loop and ours, on the same machine.

    python benchmarks/classifier.py

The two networks have the same weights and operations. The reference's halves images by strides, ours by average
pooling.

The reference's loop is rebuilt from its description: float32, the usual memory layout, a DataLoader with two workers
that augments PIL images one by one, batches of 128, SGD. By PyTorch's default, float32 convolutions on a CUDA GPU
round to TensorFloat-32.

Our loop is timed twice: with images of full size all the time, where both loops do the same work, and as it is by
default, with images that grow. Each loop runs in a process of its own, so that its memory can be measured. The loops
take turns, so that a change of the machine's speed meets all of them. The result goes to
``results/benchmarks/classifier-<cpu, cuda or mps>.json``.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resnet_variants import strided_downsampling

from ClassifierNetwork import channel_statistics, create_classifier
from ClassifierTraining import Recipe, train_classifier
from Files import save_json
from ImbalancedCIFAR10 import default_root, load_cifar10
from Results import HARDWARE
from Runtime import choose_device, code_version, describe_hardware, hardware_text
from Utils import markdown_table

FOLDER = Path("results", "benchmarks")
LOOPS = ("reference", "ours, full size", "ours")
RECORD = {  # what :func:`table` asks of a result, see Results.read_json
    "median": {name: {"images_per_second": Real, "peak_memory_gib": Real} for name in LOOPS},
    "ratios_to_the_reference": {name: [Real] for name in LOOPS},
    "width": int, "hardware": HARDWARE, "torch": str,
}  # fmt: skip
WIDTH = 42  # the reference's
BATCH = 128


def reference_loop(steps, warmup):
    """Images per second of the reference's loop after some steps of warm-up."""
    device = choose_device()
    root = default_root()
    data = CIFAR10(root, train=True)
    mean, std = np.array(channel_statistics(data.data)) / 255
    data.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=2, drop_last=True)
    # The loader normalises the images already, so the network must not.
    model = create_classifier(10, WIDTH, ((0.0,) * 3, (1.0,) * 3), seed=0, device=device)
    strided_downsampling(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps + warmup)
    for step, (images, labels) in enumerate(loader):
        if step == warmup:
            started = time.perf_counter()
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        loss.item()  # the reference shows the running loss
        if step + 1 == steps + warmup:
            break
    return steps * BATCH / (time.perf_counter() - started)


def our_loop(steps, warmup, **options):
    """Images per second of :func:`ClassifierTraining.train_classifier` after some steps of warm-up."""
    data = load_cifar10()
    model = create_classifier(10, WIDTH, channel_statistics(data.X_train), seed=0)
    seconds = {}
    # The first run includes what a process does only once. The difference of the two others leaves out what
    # every run does at its start.
    for count in (warmup, warmup, warmup + steps):
        # Every image size takes the same fraction of the short and of the long run.
        recipe = Recipe(steps=count * BATCH // Recipe.batch_size, **options)
        history = train_classifier(model, data.X_train, data.y_train, recipe, seed=0)
        seconds[recipe.steps] = sum(epoch["seconds"] for epoch in history)
    few, many = seconds
    return (many - few) * Recipe.batch_size / (seconds[many] - seconds[few])


LOOPS = {
    "reference": reference_loop,
    "ours, full size": partial(our_loop, scales=(1.0,)),
    "ours": our_loop,
}


def measure(name, steps, warmup):
    """Run one loop in this process and return images per second and peak memory in GiB.

    The memory is that of the process and its workers. On CUDA it is what PyTorch allocated on the GPU.
    """
    speed = LOOPS[name](steps, warmup)
    if choose_device().type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        # ru_maxrss is in KiB on Linux and in bytes on macOS. Loader workers are processes of their own.
        unit = 1 if sys.platform == "darwin" else 1024
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        peak = unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 2 * children)
    return {"images_per_second": speed, "peak_memory_gib": peak / 2**30}


def table(result):
    """Markdown table of a result."""
    rows = []
    for name, title in (
        ("reference", "the reference's, rebuilt"),
        ("ours, full size", "ours, images of full size all the time"),
        ("ours", "ours as it is by default: images grow"),
    ):
        values, ratios = result["median"][name], result["ratios_to_the_reference"][name]
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        rows.append((
            title, f"{values['images_per_second']:.0f}", f"**{np.median(ratios):.2f}** ({rounds})",
            f"{values['peak_memory_gib']:.2f}",
        ))  # fmt: skip
    hardware = result["hardware"]
    head = ("loop", "images/s", "ratio: median (of each round)", "peak memory (GiB)")
    return markdown_table(head, rows) + (
        f"\n\nResNet-18 of width {result['width']}, {hardware_text(hardware)}, PyTorch {result['torch']}."
    )


def main():
    parser = argparse.ArgumentParser(description="Speed of the reference's training loop and of ours.")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each loop (default: 3)")
    parser.add_argument("--steps", type=int, default=80, help="timed batches of 128 a run (default: 80)")
    parser.add_argument("--warmup", type=int, default=20, help="batches before them (default: 20)")
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)  # what the child processes run
    options = parser.parse_args()
    if options.warmup < 2 or options.steps < 2 or options.warmup + options.steps > 50_000 // BATCH:
        parser.error(
            f"at least 2 of --steps and of --warmup are needed, and {50_000 // BATCH} at most together"
        )
    if options.loop:
        print(json.dumps(measure(options.loop, options.steps, options.warmup)))
        return
    runs = {name: [] for name in LOOPS}
    for _ in tqdm(range(options.rounds), unit="round"):
        for name, outcomes in runs.items():
            command = [sys.executable, __file__, "--loop", name, "--steps", str(options.steps),
                       "--warmup", str(options.warmup)]  # fmt: skip
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            outcomes.append(json.loads(child.stdout.splitlines()[-1]))
    median = {
        name: {key: float(np.median([run[key] for run in outcomes])) for key in outcomes[0]}
        for name, outcomes in runs.items()
    }
    ratios = {
        name: [
            ours["images_per_second"] / theirs["images_per_second"]
            for ours, theirs in zip(outcomes, runs["reference"], strict=True)
        ]
        for name, outcomes in runs.items()
    }
    result = {
        "width": WIDTH, "steps": options.steps, "warmup": options.warmup, "median": median, "ratios_to_the_reference": ratios, "runs": runs,
        "hardware": describe_hardware(choose_device()), "torch": torch.__version__, "commit": code_version(),
    }  # fmt: skip
    save_json(FOLDER / f"classifier-{result['hardware']['device']}.json", result)
    print(table(result))


if __name__ == "__main__":
    main()

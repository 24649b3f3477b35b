"""The speed of a full training step, both networks: our GAN and a DCGAN of the reference's shape.

    python benchmarks/gan.py                    # prints a table, writes results/benchmarks/gan-<device>.json

The DCGAN is what the reference study trains: latent 100, 64 feature maps, CIFAR-10 images enlarged to
64x64 with PIL in a DataLoader, float32, Adam 2e-4 (0.5, 0.999), cross-entropy against 0.9 and 0.1, noise
on the discriminator's input. The two take turns, so that a machine that gets slower slows both down.
Images per second are real images, each with a generated one beside it.

References
----------
Radford et al. (2016), Unsupervised representation learning with deep convolutional GANs.
"""

import argparse
import statistics
import sys
import time
from dataclasses import asdict
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from Arms import PROFILES
from Files import save_json
from GANTrainingStep import Adversaries, BalancedBatches, count_flops
from Precision import precision_name
from Results import HARDWARE
from Runtime import choose_device, code_version, describe_hardware, hardware_text
from Utils import markdown_table

FOLDER = Path("results", "benchmarks")
NAMES = ("reference", "ours")
RECORD = {  # what :func:`table` asks of a result, see Results.read_json
    "rows": {name: {"name": str, "batch_size": int, "gigaflops_per_image": Real} for name in NAMES},
    "median_images_per_second": {name: Real for name in NAMES},
    "ratio": Real, "ratio_of_each_turn": [Real], "hardware": HARDWARE, "torch": str,
}  # fmt: skip
LATENT, MAPS = 100, 64
IMAGES = 5000  # speed does not depend on what they show


class PILImages(Dataset):
    """uint8 images (n, 32, 32, 3), enlarged one by one to float32 (3, 64, 64) from -1 to 1."""

    def __init__(self, X):
        self.X = X
        self.transform = v2.Compose(
            [
                v2.Resize(64),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return self.transform(Image.fromarray(self.X[row]))


def dcgan_generator():
    layers = [nn.ConvTranspose2d(LATENT, 8 * MAPS, 4, bias=False), nn.BatchNorm2d(8 * MAPS), nn.ReLU(True)]
    for factor in (4, 2, 1):
        layers += [
            nn.ConvTranspose2d(2 * factor * MAPS, factor * MAPS, 4, 2, 1, bias=False),
            nn.BatchNorm2d(factor * MAPS),
            nn.ReLU(True),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(MAPS, 3, 4, 2, 1, bias=False), nn.Tanh())


def dcgan_discriminator():
    layers = [nn.Conv2d(3, MAPS, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for factor in (1, 2, 4):
        layers += [
            nn.Conv2d(factor * MAPS, 2 * factor * MAPS, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * factor * MAPS),
            nn.LeakyReLU(0.2, True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(8 * MAPS, 1, 4, bias=False), nn.Flatten(0))


class Reference:
    """The DCGAN's training step."""

    name = "DCGAN of the reference's shape"

    def __init__(self, X, device, batch_size, workers):
        self.device, self.batch_size = device, batch_size
        self.generator, self.discriminator = dcgan_generator().to(device), dcgan_discriminator().to(device)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
            for network in (self.generator, self.discriminator)
        ]
        self.loader = DataLoader(
            PILImages(X), batch_size, shuffle=True, num_workers=workers, drop_last=True,
            persistent_workers=workers > 0,
        )  # fmt: skip
        self.batches = iter(())

    def next_batch(self):
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch.to(self.device)

    def step(self, real=None):
        real = self.next_batch() if real is None else real
        n = len(real)
        high, low = torch.full((n,), 0.9, device=self.device), torch.full((n,), 0.1, device=self.device)
        update_generator, update_discriminator = self.optimizers
        update_discriminator.zero_grad()
        generated = self.generator(torch.randn(n, LATENT, 1, 1, device=self.device))
        for images, target in ((real, high), (generated.detach(), low)):
            noisy = images + 0.1 * torch.randn_like(images)
            F.binary_cross_entropy_with_logits(self.discriminator(noisy), target).backward()
        update_discriminator.step()
        update_generator.zero_grad()
        noisy = generated + 0.1 * torch.randn_like(generated)
        F.binary_cross_entropy_with_logits(self.discriminator(noisy), high).backward()
        update_generator.step()

    def flops_per_image(self):
        with FlopCounterMode(display=False) as counter:
            self.step(torch.zeros(2, 3, 64, 64, device=self.device))
        return counter.get_total_flops() / 2


class Ours:
    """:meth:`GANTrainingStep.Adversaries.step`."""

    def __init__(self, X, device, profile):
        settings = self.settings = PROFILES[profile].gan
        self.name = f"ours, profile {profile}"
        # Real images of one training step: each discriminator update takes a batch.
        self.batch_size = settings.batch_size * settings.discriminator_steps
        self.adversaries = Adversaries(10, settings, 0, device)
        self.batches = BalancedBatches(X, np.arange(len(X)) % 10, device, settings.flip)
        self.steps = 0

    def step(self):
        self.adversaries.step(self.batches, self.steps % self.settings.steps, 0)
        self.steps += 1

    def flops_per_image(self):
        return count_flops(self.settings) / self.batch_size


def contestants(options, device):
    X = np.random.default_rng(0).integers(0, 256, size=(IMAGES, 32, 32, 3), dtype=np.uint8)
    return {
        "reference": lambda: Reference(X, device, options.batch_size, options.workers),
        "ours": lambda: Ours(X, device, options.profile),
    }


def seconds_of(contestant, steps, device):
    started = time.perf_counter()
    for _ in range(steps):
        contestant.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def table(result):
    """Markdown table of a result."""
    median, hardware = result["median_images_per_second"], result["hardware"]
    rows = [
        (
            f"{row['name']}, batch {row['batch_size']}", f"{median[name]:,.0f}",
            f"{row['gigaflops_per_image']:.2f}",
        )
        for name, row in result["rows"].items()
    ]  # fmt: skip
    rounds = ", ".join(f"{ratio:.2f}" for ratio in result["ratio_of_each_turn"])
    return markdown_table(("training step", "images/s", "GFLOPs an image"), rows) + (
        f"\n\nOurs does **{result['ratio']:.2f} times** as many images a second (ratio of the median speeds; of each turn: {rounds}); "
        f"{hardware_text(hardware)}, "
        f"PyTorch {result['torch']}."
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Time a training step of our GAN beside a DCGAN's.")
    parser.add_argument("--profile", default="cpu", choices=PROFILES, help="our settings (default: cpu)")
    parser.add_argument("--batch-size", type=int, default=128, help="the DCGAN's (default: 128)")
    parser.add_argument("--workers", type=int, default=2, help="of its DataLoader (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--seconds", type=float, default=10, help="length of a turn (default: 10)")
    parser.add_argument("--device")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)

    rows, built, steps = {}, {}, {}
    for name, build in contestants(options, device).items():
        built[name] = build()
        seconds_of(built[name], 2, device)  # warm-up
        steps[name] = max(1, round(options.seconds / max(seconds_of(built[name], 1, device), 1e-3)))
        rows[name] = {
            "name": built[name].name, "batch_size": built[name].batch_size, "steps_per_turn": steps[name],
            "images_per_second": [], "gigaflops_per_image": built[name].flops_per_image() / 1e9,
        }  # fmt: skip
    for _ in range(options.rounds):
        for name, contestant in built.items():
            seconds = seconds_of(contestant, steps[name], device)
            rows[name]["images_per_second"].append(steps[name] * contestant.batch_size / seconds)
    median = {name: statistics.median(row["images_per_second"]) for name, row in rows.items()}
    result = {
        "rows": rows,
        "median_images_per_second": median,
        "ratio": median["ours"] / median["reference"],
        "ratio_of_each_turn": [
            ours / reference
            for ours, reference in zip(
                rows["ours"]["images_per_second"], rows["reference"]["images_per_second"], strict=True
            )
        ],
        "our_settings": asdict(built["ours"].settings),
        "precision": precision_name(device),
        "dataloader_workers": options.workers,
        "hardware": describe_hardware(device),
        "torch": torch.__version__,
        "commit": code_version(),
    }
    # The name says the device, so that a GPU's result does not replace the CPU's.
    save_json(FOLDER / f"gan-{device.type}.json", result)
    print(table(result))


if __name__ == "__main__":
    main()

"""What the profile `full` takes on a GPU: estimated from counts, not measured.

    python benchmarks/operators.py          # counts the operators of a step
    python benchmarks/estimate.py           # writes results/benchmarks/estimated-full.json, prints the tables

A step takes the longer one of two times. One is the launches of its operators. The other is its arithmetic, at a
share of the card's peak that small networks reach. Memory is that of what a step keeps for its backward pass, counted
on the CPU at a small batch, and of weights, gradients, optimisers and images.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from operators import RESULT as OPERATORS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ClassifierTraining
from Arms import ARMS, GAN_STORY, PROFILES, STORY
from Batches import split_evenly
from ClassifierNetwork import create_classifier
from ClassifierTraining import count_training_flops
from Files import save_json
from GANTrainingStep import Adversaries, BalancedBatches, count_flops
from Losses import CrossEntropy
from Runtime import code_version
from Utils import markdown_table

RESULT = Path("results", "benchmarks", "estimated-full.json")
DOCUMENT = Path("docs", "gpu-and-clusters.md")
CARDS = {  # name -> (peak in half precision without sparsity, share of it that is reached: an assumption)
    "H100": (989e12, 0.15),  # bfloat16
    "T4": (65e12, 0.30),  # float16
}
LAUNCH = 12e-6  # seconds; seen on an H200 with PyTorch 2.11
REPLAY = 2e-6  # seconds of an operator in a CUDA graph: an assumption
COMPILING = 5.0  # seconds for each size of the images and kind of batches, once in a process: an assumption
PROCESSES = 2  # notebooks of `make main` that train arms
KINDS = 2  # of batches: shuffled, source-aware
EVALUATION = 1.05  # of training: the learning curve and the last evaluation
JUDGING = 2.0  # seconds for the images of a record of the GAN: an assumption
REAL_IMAGES = 45_050  # of the split cat-50
ON_THE_WAY = 1.5  # gradients of activations, beside the activations themselves: an assumption
OVERHEAD = 1.5  # GiB of CUDA's context, cuDNN's workspaces and the allocator's gaps: an assumption


def classifier_seconds(profile, operators, rate):
    """Seconds of one arm, compiled and not."""
    recipe = profile.recipe(REAL_IMAGES, flip=True)
    model = create_classifier(10, profile.width, ((127.5,) * 3, (63.75,) * 3), seed=0, device="cpu")
    steps_of_scale = Counter(map(recipe.scale_at, range(recipe.steps)))
    launched, graphed = operators["classifier"], operators["classifier, CUDA graphs"]
    in_graphs = launched - graphed
    seconds = dict.fromkeys(("CUDA graphs", "not compiled"), 0.0)
    for scale, steps in steps_of_scale.items():
        one_step = replace(recipe, steps=1, scales=(scale,))
        arithmetic = count_training_flops(model, one_step) / rate
        with_graphs = graphed * LAUNCH + in_graphs * REPLAY
        seconds["CUDA graphs"] += steps * max(arithmetic, with_graphs)
        seconds["not compiled"] += steps * max(arithmetic, launched * LAUNCH)
    return {name: EVALUATION * value for name, value in seconds.items()}


def gan_seconds(profile, operators, rate):
    """Seconds of the GAN's training, with the evaluation of its images."""
    arithmetic = count_flops(profile.gan) / rate
    step = max(arithmetic, operators["gan, full"] * LAUNCH)
    return profile.gan.steps * step + profile.gan.records * JUDGING


def kept_bytes(step):
    """Bytes of what a call keeps for backward passes."""
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that no other tensor gets its address
        return tensor

    kept = []
    with (
        mock.patch("Precision.half_precision", lambda device: torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        step()
    return sum(sizes.values())


def classifier_gibibytes(profile):
    """Memory of a training step of the classifier."""
    recipe, few = profile.recipe(REAL_IMAGES, flip=True), 8
    model = create_classifier(10, profile.width, ((127.5,) * 3, (63.75,) * 3), seed=0, device="cpu").train()
    model.to(memory_format=torch.channels_last)
    rows = torch.arange(few)
    parts = split_evenly(torch.zeros((few, 3, 32, 32), dtype=torch.uint8), rows, few // 2)

    def step():
        ClassifierTraining._forward_and_backward(model, CrossEntropy(), parts, rows, 1.0)

    weights = sum(p.numel() for p in model.parameters())
    kept = kept_bytes(step) - 2 * weights  # weights in half precision do not grow with the batch
    images = 2 * REAL_IMAGES * 3 * (32 + 2 * recipe.padding) ** 2  # the largest arm doubles the images
    # Weights, gradients, momentum in float32, weights in half precision, Muon's stacks.
    return (ON_THE_WAY * kept * recipe.batch_size / few + 24 * weights + images) / 2**30 + OVERHEAD


def gan_gibibytes(profile):
    """Memory of a training step of the GAN."""
    settings, few = profile.gan, 4
    adversaries = Adversaries(10, replace(settings, batch_size=few), 0, torch.device("cpu"))
    X = np.zeros((10, 32, 32, 3), np.uint8)
    batches = BalancedBatches(X, np.arange(10), torch.device("cpu"), flip=True)
    weights = sum(p.numel() for p in [*adversaries.generator.parameters(), *adversaries.discriminator.parameters()])  # fmt: skip
    kept = max(kept_bytes(lambda: adversaries.step(batches, 0, 0)) - 8 * weights, 0)
    # Weights, average, gradients, Adam's two moments, weights in half precision.
    images = REAL_IMAGES * 3 * 32 * 32
    return (ON_THE_WAY * kept * settings.batch_size / few + 24 * weights + images) / 2**30 + OVERHEAD


def estimate():
    """The content of the result file."""
    profile = PROFILES["full"]
    operators = json.loads(OPERATORS.read_text(encoding="utf-8"))["after"]
    seconds = {}
    for card, (peak, share) in CARDS.items():
        of_arm = classifier_seconds(profile, operators, peak * share)
        compiling = PROCESSES * KINDS * COMPILING * len(profile.recipe(REAL_IMAGES, flip=True).scales)
        gan = gan_seconds(profile, operators, peak * share)
        seconds[card] = {**of_arm, "gan": gan, "recording CUDA graphs": compiling}
    return {
        "operators": operators,
        "seconds": seconds,
        "gibibytes": {"classifier": classifier_gibibytes(profile), "gan": gan_gibibytes(profile)},
        "gan_steps": profile.gan.steps,
        "torch": torch.__version__,
        "commit": code_version(),
    }


def arms_of_make_main():
    """The arms that the notebooks run, in order."""
    return list(dict.fromkeys([*STORY, *GAN_STORY]))


def total(seconds, kind="CUDA graphs"):
    """Seconds of `make main` on a card, whose network passes are of that kind."""
    once = seconds["recording CUDA graphs"] if kind == "CUDA graphs" else 0
    return len(arms_of_make_main()) * seconds[kind] + seconds["gan"] + once


def table(result):
    """Markdown tables of a result: seconds arm by arm, and memory."""

    def minutes(seconds):
        return f"{seconds / 60:.1f}"

    of_cards = result["seconds"].values()
    rows = [
        [ARMS[name].title, *(minutes(seconds["CUDA graphs"]) for seconds in of_cards)]
        for name in arms_of_make_main()
    ]
    rows.append(["the GAN", *(minutes(seconds["gan"]) for seconds in of_cards)])
    rows.append(
        ["recording CUDA graphs", *(minutes(seconds["recording CUDA graphs"]) for seconds in of_cards)]
    )
    rows.append(
        ["**`make main`, all of these**", *(f"**{minutes(total(seconds))}**" for seconds in of_cards)]
    )
    rows.append(
        ["the same without CUDA graphs", *(minutes(total(seconds, "not compiled")) for seconds in of_cards)]
    )
    head = ["*estimated*, not measured: minutes", *CARDS]
    classifier, gan = (result["gibibytes"][name] for name in ("classifier", "gan"))
    return markdown_table(head, rows) + (
        f"\n\nMemory, estimated in the same way: {classifier:.1f} GiB for the classifier and {gan:.1f} GiB for the GAN. "
        f"A card of 16 GB {'is enough' if max(classifier, gan) < 14.5 else 'is too small'}."
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Estimate what the profile full takes on a GPU.")
    parser.parse_args(arguments)
    result = estimate()
    save_json(RESULT, result)
    print(table(result))


if __name__ == "__main__":
    main()

"""Operators of one full training step, classifier and GAN, counted by torch.profiler on the CPU.

    python benchmarks/operators.py          # prints a table, writes results/benchmarks/operators.json

A GPU waits for the launch of each operator, so that small networks take as long as they have operators. The step is
that of a GPU: all micro-batches in one pass. Channels do not change the number of operators, so the networks are tiny.

An operator counts once, whatever it calls, if it computes something: views, allocations and operators that only call
others do not count. It takes one launch on a GPU, a few of them take several. PyTorch's lists of tensors
(``_foreach_...``) count once too; no list here mixes types or has gaps in memory, which would take a launch each.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ClassifierTraining
import Muon
from Arms import PROFILES
from Batches import split_evenly
from ClassifierNetwork import create_classifier
from ClassifierTraining import Recipe, _Training
from Files import save_json
from GANTrainingStep import Adversaries, BalancedBatches
from Losses import LogitAdjustedLoss
from Precision import precision_name
from Runtime import code_version
from Utils import markdown_table

RESULT = Path("results", "benchmarks", "operators.json")
CPU = torch.device("cpu")
# What this script counted with the code of an earlier commit, which ran micro-batch by micro-batch and kernel by
# kernel, with SGD's default on a GPU.
BEFORE = {"commit": "70191a59", "classifier": 853, "gan, cpu": 829, "gan, full": 1286}
# They compute nothing, or nothing on the device.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "item", "_local_scalar_dense", "resize_",
    "result_type", "lift_fresh", "set_", "detach_", "resolve_conj", "resolve_neg", "_unsafe_view", "is_nonzero",
}  # fmt: skip


def count_operators(step, graphs=()):
    """Count the operators of a call.

    Parameters
    ----------
    step : callable
    graphs : sequence of str
        Names of events that count as one operator each, such as those of a compiled graph.

    Returns
    -------
    collections.Counter
        Name -> number.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    counts = Counter()
    for event in profiler.events():
        if event.cpu_parent is None:
            _count(event, counts, graphs)
    return counts


def _count(event, counts, graphs):
    name = event.name.removeprefix("aten::")
    if name in graphs:
        counts[name] += 1
        return
    calls_others = True
    if name != event.name:
        computes, calls_others = _kind(name)
        if computes:
            counts[name] += 1
    if calls_others:
        for child in event.cpu_children:
            _count(child, counts, graphs)


@functools.cache
def _kind(name):
    """Whether an operator of ATen computes something itself, and whether it only calls others."""
    overloads = _overloads(name)
    if not overloads:
        return False, True
    composite = any(
        torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CompositeImplicitAutograd")
        for overload in overloads
    )
    if composite and name != "_upsample_bilinear2d_aa":  # one of its overloads only calls another one
        return False, True
    returned = [value.alias_info for value in overloads[0]._schema.returns]
    is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return not (is_view or name in FREE), False


def _overloads(name):
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return [overload for overload in overloads if torch._C._dispatch_has_kernel(overload.name())]


# --- The two steps ------------------------------------------------------------------------------


def classifier_step(scale=1.0, backend="none"):
    """A function that does one training step of the classifier as a GPU does it, after two others."""
    y = np.arange(1024) % 10
    X = np.random.default_rng(0).integers(0, 256, (len(y), 32, 32, 3), dtype=np.uint8)
    recipe = Recipe(steps=8, scales=(scale,))
    model = create_classifier(10, 4, ((127.5,) * 3, (63.75,) * 3), seed=0, device=CPU)
    with mock.patch.dict(os.environ, {"COMPILE_BACKEND": backend}):
        training = _Training(model, y, recipe, LogitAdjustedLoss(y, 10), recipe.batches(X, 0, CPU))
    training.model.train()
    training.loss_sum, training.right = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    batches, make_stacks = training.batches.epoch(1), Muon._make_stacks

    def step():
        with contextlib.ExitStack() as patches:
            patch = mock.patch.object
            patches.enter_context(patch(ClassifierTraining, "in_one_pass", lambda device: True))
            patches.enter_context(patch(Muon, "_make_stacks", lambda m, state, filled: make_stacks(m, state, True)))  # fmt: skip
            training.train_step(split_evenly(*next(batches), recipe.micro_batch_size))

    step(), step()
    return step


def gan_step(settings):
    """A function that does one training step of the GAN, after two others."""
    X = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    adversaries = Adversaries(10, replace(settings, channels=4, batch_size=20), 0, CPU)
    batches = BalancedBatches(X, np.arange(len(X)) % 10, CPU, settings.flip)
    numbers = iter(range(10))

    def step():
        adversaries.step(batches, next(numbers), 0)

    step(), step()
    return step


def like_cudagraphs():
    """Name of a backend that compiles as ``cudagraphs`` does, but records nothing, so that it runs on a CPU.

    Like it, it leaves the writing of the running batch-norm statistics outside the graphs.
    """
    from torch._dynamo import list_backends, register_backend  # imported here because it takes seconds
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    name = "like_cudagraphs"
    if name not in list_backends():
        register_backend(
            aot_autograd(fw_compiler=boxed_nop, bw_compiler=boxed_nop, keep_inference_input_mutations=False),
            name=name,
        )
    return name


def measure():
    """Operators of each kind of step: dict of int."""
    graphs = "CompiledFunction", "CompiledFunctionBackward"
    return {
        "classifier": count_operators(classifier_step()).total(),
        "classifier, images of another size": count_operators(classifier_step(0.75)).total(),
        "classifier, CUDA graphs": count_operators(
            classifier_step(backend=like_cudagraphs()), graphs
        ).total(),
        **{f"gan, {name}": count_operators(gan_step(PROFILES[name].gan)).total() for name in ("cpu", "full")},
    }


def table(result):
    """Markdown table of a result."""
    before, after = result["before"], result["after"]
    rows = []
    for name, title, compared in (
        ("classifier", "classifier", "classifier"),
        ("classifier, CUDA graphs", "classifier, the pass as two CUDA graphs (the default on CUDA)", "classifier"),
        ("gan, cpu", "GAN, settings of `cpu`", "gan, cpu"),
        ("gan, full", "GAN, settings of `full`", "gan, full"),
    ):  # fmt: skip
        rows.append(
            (title, f"{before[compared]:,}", f"{after[name]:,}", f"{after[name] / before[compared]:.2f}")
        )
    return markdown_table(("training step", f"before (commit {before['commit']})", "now", "ratio"), rows)


def main(arguments=None):
    argparse.ArgumentParser(description="Operators of one training step.").parse_args(arguments)
    result = {
        "before": BEFORE, "after": measure(), "precision": precision_name(CPU), "torch": torch.__version__,
        "commit": code_version(),
    }  # fmt: skip
    save_json(RESULT, result)
    print(table(result))


if __name__ == "__main__":
    main()

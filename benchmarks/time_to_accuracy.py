"""What does which accuracy cost? Compute, seconds and test accuracy of training recipes.

    python benchmarks/time_to_accuracy.py --series ablation --seed 0 1
    python benchmarks/time_to_accuracy.py --series target --seed 0 1

Each run writes ``results/benchmarks/time_to_accuracy/<name>-seed<k>.json``; what is there is not run
again, and a killed run continues, unless it keeps more than a checkpoint holds. Last weights; balanced
CIFAR-10 unless said otherwise. The test accuracy of the ablation did choose the defaults of
:class:`ClassifierNetwork.Recipe` and average pooling, on the balanced data set, which is the ceiling's; no
other arm of the study did.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resnet_variants import HalvedMirroredConv2d, mirrored_filters, strided_downsampling

import ClassifierNetwork
from ClassifierNetwork import (
    AugmentedBatches,
    Recipe,
    channel_statistics,
    count_training_flops,
    create_classifier,
    evaluate_classifier,
    train_classifier,
)
from Experiment import ARMS, REFERENCE_SPLIT, make_training_set
from ImbalancedCIFAR10 import load_cifar10, split_from_name
from Report import percent
from Runtime import (
    choose_device,
    code_version,
    describe_hardware,
    hardware_text,
    require_same_settings,
    save_json,
    uses_bfloat16,
)
from Utils import markdown_table

FOLDER = Path("results", "benchmarks", "time_to_accuracy")


@dataclass(frozen=True)
class Candidate:
    """A recipe to measure.

    Attributes
    ----------
    what : str
        What it is, or how it differs from the default.
    width : int
    passes : float
        Images that are computed, in units of 50,000. With images left out the data set is gone through more
        often, with more images in it less often.
    changes : dict
        Arguments of :class:`ClassifierNetwork.Recipe` that differ from its defaults.
    modify : callable, optional
        ``(model) -> None``: changes the new network in place.
    around : callable, optional
        ``(model, X) -> context manager`` around the training, for what the training loop does not offer; it may
        yield a function that changes the trained model.
    resumable : bool, default True
        Whether a killed run can continue; not if ``around`` holds what a checkpoint does not.
    arm : str, default 'balanced'
        What to train on: an arm of the study, on the reference's split.
    """

    what: str
    width: int = 16
    passes: float = 6.6
    changes: dict = field(default_factory=dict)
    modify: Callable | None = None
    around: Callable | None = None
    resumable: bool = True
    arm: str = "balanced"

    def recipe(self, n):
        batch_size = self.changes.get("batch_size", Recipe.batch_size)
        return Recipe(steps=round(self.passes * n / batch_size), **self.changes)

    def network(self, X, seed):
        """The untrained network for images ``X``."""
        model = create_classifier(10, self.width, channel_statistics(X), seed)
        if self.modify:
            self.modify(model)
        return model

    def require_same_settings(self, path, result, recipe):
        """Raise ValueError if the settings in a result are not these."""
        wanted = {"width": self.width, "passes": self.passes, "trained_on": self.arm}
        wanted |= recipe.as_json()
        # What the oldest results don't name could not be chosen then.
        require_same_settings(path, wanted | result | result["recipe"], wanted)

    def context(self, model, X):
        """What the model's training, and the count of its operations, take place in."""
        return self.around(model, X) if self.around else contextlib.nullcontext()


# --- What was tried and is not in the training loop ---------------------------------------------


@contextlib.contextmanager
def whitened_stem(model, X):
    """Start from a first layer that whitens 3x3 patches, and keep it (Page 2018; Jordan 2024).

    Each of the leading principal directions comes with both signs, since a ReLU follows.
    """
    images = torch.from_numpy(X[:5000]).permute(0, 3, 1, 2).to(model.mean.device)
    patches = F.unfold((images - model.mean) / model.std, 3)[:, :, ::7].mT.reshape(-1, 27)
    variance, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    kernels = (directions / (variance + 1e-3).sqrt()).T.flip(0)[: (model.width + 1) // 2]
    with torch.no_grad():
        model.conv.weight.copy_(torch.cat([kernels, -kernels])[: model.width].view_as(model.conv.weight))
    model.conv.weight.requires_grad_(False)
    yield


@contextlib.contextmanager
def frozen_norm_scales(model, X):
    """Do not train the scales of batch norm, only the shifts."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.requires_grad_(False)
    yield


@contextlib.contextmanager
def fast_norm_shifts(model, X, times=16):
    """Let the shifts of batch norm learn faster than the other weights (Jordan 2024: 64 times)."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # For SGD without decay, a larger gradient is a higher rate.
            module.bias.register_hook(lambda gradient: times * gradient)
    yield


@contextlib.contextmanager
def compiled(model, X):
    """``torch.compile``; its warm-up counts."""
    model.compile()
    yield


@contextlib.contextmanager
def averaged_weights(model, X, decay=0.99):
    """Judge an exponential moving average of the weights, with batch-norm statistics made for it."""
    average = None

    def update(optimizer, *_):
        nonlocal average
        # One of the two optimisers, once a step, and not while operations are counted.
        counting = optimizer.param_groups[0]["params"][0].is_meta
        if isinstance(optimizer, torch.optim.SGD) and not counting:
            if average is None:
                average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
            average.update_parameters(model)

    def use_average():
        model.load_state_dict(average.module.state_dict())
        batches = AugmentedBatches(X, 500, next(model.parameters()).device, seed=0)
        update_bn((images for images, _ in list(batches.epoch(0))[:20]), model)

    handle = register_optimizer_step_post_hook(update)
    try:
        yield use_average
    finally:
        handle.remove()


@contextlib.contextmanager
def batches_of(kind):
    """Train on these in place of ``ClassifierNetwork.AugmentedBatches``."""
    before = ClassifierNetwork.AugmentedBatches
    ClassifierNetwork.AugmentedBatches = kind
    try:
        yield
    finally:
        ClassifierNetwork.AugmentedBatches = before


@contextlib.contextmanager
def alternating_flips(model, X):
    """Mirror each image in every other epoch, instead of at random (Jordan 2024)."""

    class Alternating(ClassifierNetwork.AugmentedBatches):
        def epoch(self, number):
            self.flip = False
            first = torch.from_numpy(np.random.default_rng(self.seed).random(self.n) < 0.5).to(self.device)
            for images, rows in super().epoch(number):
                mirrored = (first[rows] ^ bool(number % 2)).view(-1, 1, 1, 1)
                yield torch.where(mirrored, images.flip(-1), images), rows

    with batches_of(Alternating):
        yield


@contextlib.contextmanager
def cutout(model, X, side=10):
    """Grey out a square of each image, its middle anywhere in the image (DeVries and Taylor 2017)."""

    class Cut(ClassifierNetwork.AugmentedBatches):
        def epoch(self, number):
            generator = np.random.default_rng((self.seed, 1, number))
            top, left = (
                torch.from_numpy(generator.integers(size, size=self.n) - side // 2).to(self.device)
                for size in (self.height, self.width)
            )
            rows_down, columns = (
                torch.arange(size, device=self.device) for size in (self.height, self.width)
            )
            grey = model.mean.round().to(torch.uint8)
            for images, rows in super().epoch(number):
                down = rows_down - top[rows, None]
                across = columns - left[rows, None]
                inside = ((down >= 0) & (down < side))[:, None, :, None]
                inside = inside & ((across >= 0) & (across < side))[:, None, None, :]
                yield torch.where(inside, grey, images), rows

    with batches_of(Cut):
        yield


@contextlib.contextmanager
def easy_images_skipped(model, X, share=0.5):
    """In each epoch leave out, by chance, a share of the images whose loss was below the mean when last seen.

    After InfoBatch (Qin et al. 2024), but the gradients of those that stay get no larger weight.
    """
    losses = torch.full((len(X),), torch.inf, device=model.mean.device)
    waiting = torch.empty(0, dtype=torch.int64)  # rows of the current batch that were not computed yet
    batches_before, compute_before = (
        ClassifierNetwork.AugmentedBatches,
        ClassifierNetwork._forward_and_backward,
    )

    class Selecting(batches_before):
        def epoch(self, number):
            nonlocal waiting
            drawn = np.random.default_rng((self.seed, number)).random(self.n) < share
            # In the first epoch no mean exists, and nothing is smaller than that.
            easy = losses < losses[losses.isfinite()].mean()
            keep = ~(easy & torch.from_numpy(drawn).to(self.device))
            images, rows = [], []
            for new_images, new_rows in super().epoch(number):
                kept = keep[new_rows]
                images, rows = torch.cat([*images, new_images[kept]]), torch.cat([*rows, new_rows[kept]])
                if len(rows) >= self.part:
                    waiting = rows[: self.part]
                    yield images[: self.part].contiguous(memory_format=torch.channels_last), waiting
                    images, rows = images[self.part :], rows[self.part :]
                images, rows = [images], [rows]

    def compute(model, images, targets, *arguments, **options):
        nonlocal waiting
        loss, logits = compute_before(model, images, targets, *arguments, **options)
        if not images.is_meta:  # not while operations are counted
            losses[waiting[: len(images)]] = F.cross_entropy(logits, targets, reduction="none")
            waiting = waiting[len(images) :]
        return loss, logits

    ClassifierNetwork.AugmentedBatches, ClassifierNetwork._forward_and_backward = Selecting, compute
    try:
        yield
    finally:
        ClassifierNetwork.AugmentedBatches = batches_before
        ClassifierNetwork._forward_and_backward = compute_before


def together(*contexts):
    """Several of these as one; the first is the outermost."""

    @contextlib.contextmanager
    def all_of_them(model, X):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context(model, X))
            yield

    return all_of_them


# --- Candidates ---------------------------------------------------------------------------------

# What the lines of the ablation depart from: the former network and defaults, and Muon and growing images
# as today.
BASE = {"batch_size": 128, "learning_rate": 0.1, "muon_learning_rate": 0.03, "muon_iterations": 5}
BATCH_256 = {"batch_size": 256, "learning_rate": 0.15, "muon_learning_rate": 0.045}
FULL_SIZE = {"scales": (1.0,)}


def departure(what, width=Candidate.width, passes=Candidate.passes, around=None, resumable=True, **changes):
    """A line of the ablation: the base, but for the changes."""
    return Candidate(what, width, passes, BASE | changes, strided_downsampling, around, resumable)


HALVED = Candidate(
    "balanced, filters in mirrored pairs for half of the operations, label smoothing 0.1, crops that move by 4, a "
    "square of 10 pixels greyed out, easy images left out half of the time, batch-norm shifts 16 times as fast, "
    "Muon's learning rate 0.07",
    width=32, passes=25,
    changes={"label_smoothing": 0.1, "padding": 4, "flip": False, "muon_learning_rate": 0.07},
    modify=partial(mirrored_filters, convolution=HalvedMirroredConv2d),
    around=together(cutout, easy_images_skipped, fast_norm_shifts), resumable=False,
)  # fmt: skip

SERIES = {
    # All for about the same compute. Every line differs from the base in what it says and nothing else.
    "ablation": {
        "default": departure("the base: Muon, images that grow, batches of 128"),
        "former": departure(
            "the field's usual one: SGD, images of full size, peak after a fifth, crops that move by 4",
            passes=4, optimizer="sgd", warmup=0.2, padding=4, **FULL_SIZE,
        ),
        "no-muon": departure("SGD for all weights", passes=7, optimizer="sgd"),
        "full-size": departure("images of full size all the time", passes=4, **FULL_SIZE),
        "whitened": departure("whitened, frozen first layer", around=whitened_stem),
        "padding-4": departure("crops that move by 4 pixels instead of 2", padding=4),
        "smoothing": departure("label smoothing 0.1", label_smoothing=0.1),
        "alternating-flips": departure("each image mirrored every other epoch", around=alternating_flips),
        "batch-512": departure(
            "batches of 512, learning rates 2 (SGD) and 4 times (Muon) as high",
            batch_size=512, learning_rate=0.2, muon_learning_rate=0.12,
        ),
        "batch-256": departure("batches of 256, learning rates 1.5 times as high", passes=7, **BATCH_256),
        "three-iterations": departure(
            "three Newton-Schulz iterations in Muon instead of five", passes=6.9, muon_iterations=3
        ),
        "faster": Candidate("the last two together: the default recipe", passes=7.1, modify=strided_downsampling),
        "pooled": Candidate(
            "the default recipe and average pooling in place of strides: the default network", passes=7.1
        ),
        "mirrored": Candidate(
            "the default recipe and network, filters in mirrored pairs", passes=7.3, modify=mirrored_filters
        ),
        "mirrored-20": Candidate(
            "the default recipe and network, filters in mirrored pairs, wider, fewer passes",
            width=20, passes=4.6, modify=mirrored_filters,
        ),
        "muon-rate": departure("twice Muon's learning rate", muon_learning_rate=0.06),
        "muon-decay": departure("four times Muon's weight decay", muon_weight_decay=0.12),
        "muon-rate-decay": departure(
            "twice Muon's learning rate and four times its weight decay",
            muon_learning_rate=0.06, muon_weight_decay=0.12,
        ),
        "smaller-images": departure(
            "images that stay small for longer", passes=7.9, scales=(0.5, 0.5, 0.5, 0.625, 0.75, 0.875, 1.0)
        ),
        "skipping": departure("easy images left out half of the time", around=easy_images_skipped, resumable=False),
        "width-12": departure("narrower, more passes", width=12, passes=11.5),
        "width-20": departure("wider, fewer passes", width=20, passes=4.1),
        "width-24": departure("wider still, fewer passes", width=24, passes=2.8),
        "averaged": departure("moving average of the weights (decay 0.99)", around=averaged_weights, resumable=False),
        "late-peak": departure("peak of the rates after a fifth of the run", warmup=0.2),
        "frozen-scales": departure("batch-norm scales not trained", around=frozen_norm_scales),
        "fast-shifts": departure("batch-norm shifts learn 16 times as fast", around=fast_norm_shifts),
        "fast-shifts-only": departure(
            "batch-norm shifts learn 64 times as fast, scales not trained",
            around=together(partial(fast_norm_shifts, times=64), frozen_norm_scales),
        ),
        "compiled": departure("torch.compile", around=compiled),
    },
    "target": {
        "balanced-94": Candidate(
            "balanced, strides, label smoothing 0.1", width=40, passes=16,
            changes={"label_smoothing": 0.1}, modify=strided_downsampling,
        ),
        "balanced-94-regularised": Candidate(
            "balanced, strides, label smoothing 0.2, crops that move by 4, each image mirrored every other epoch",
            width=40, passes=16, changes={"label_smoothing": 0.2, "padding": 4},
            modify=strided_downsampling, around=alternating_flips,
        ),
        "balanced-94-narrower": Candidate(
            "balanced, strides, label smoothing 0.1, crops that move by 4, each image mirrored every other epoch, easy "
            "images left out half of the time, batch-norm shifts 16 times as fast, Muon's learning rate 0.07",
            width=32, passes=25.5, changes={"label_smoothing": 0.1, "padding": 4, "muon_learning_rate": 0.07},
            modify=strided_downsampling,
            around=together(alternating_flips, easy_images_skipped, fast_norm_shifts), resumable=False,
        ),
        "balanced-94-mirrored": Candidate(
            "balanced, filters in mirrored pairs, label smoothing 0.1, crops that move by 4, easy images left out half of "
            "the time",
            width=40, passes=17, changes={"label_smoothing": 0.1, "padding": 4, "flip": False},
            modify=mirrored_filters, around=easy_images_skipped, resumable=False,
        ),
        "balanced-94-pooled": Candidate(
            "balanced, Muon's learning rate 0.09 and weight decay 0.2, label smoothing 0.1, crops that move by 4, each "
            "image mirrored every other epoch",
            width=32, passes=25.5, around=alternating_flips,
            changes={
                "label_smoothing": 0.1, "padding": 4, "muon_learning_rate": 0.09, "muon_weight_decay": 0.2
            },
        ),
        "balanced-94-halved": HALVED,
        "balanced-94-longer": replace(HALVED, what="the same as the line of 25 passes", passes=50),
        "reference-accuracy": Candidate(
            "cat-50, strides, Stable Diffusion source-balanced, logit-adjusted per source", width=32, passes=10,
            modify=strided_downsampling, arm="stable-source-balanced-adjusted",
        ),
    },
}  # fmt: skip


# --- Running ------------------------------------------------------------------------------------


def run(name, candidate, data, seed, device=None):
    """Train and judge one candidate, or return its result if it is finished.

    Raises
    ------
    ValueError
        If the result was obtained with other settings.
    """
    path = FOLDER / f"{name}-seed{seed}.json"
    recipe = candidate.recipe(len(data.y_train))
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        candidate.require_same_settings(path, result, recipe)
        return result
    device, commit = choose_device(device), code_version()
    split = split_from_name(REFERENCE_SPLIT, data.y_train, data.class_names)
    training_set = make_training_set(candidate.arm, data, split, seed)
    X, y = training_set.X, training_set.y
    model = candidate.network(X, seed).to(device)
    checkpoint = None
    if candidate.resumable:
        checkpoint = Path("models", "checkpoints", path.with_suffix(".pt").name)
    with candidate.context(model, X) as finish:
        flops = count_training_flops(model, recipe)
        history = train_classifier(
            model, X, y, recipe, seed=seed, device=device, description=f"{name}, seed {seed}",
            groups=training_set.groups, logit_adjusted=ARMS[candidate.arm].logit_adjusted,
            checkpoint=checkpoint,
        )  # fmt: skip
        if finish:
            finish()
    plain = evaluate_classifier(model, data.X_test, data.y_test, device=device)
    mirrored = evaluate_classifier(model, data.X_test[:, :, ::-1], data.y_test, device=device)
    averaged = (plain.logits + mirrored.logits).argmax(axis=1)
    result = {
        "name": name,
        "what": candidate.what,
        "seed": seed,
        "width": candidate.width,
        "downsampling": model.downsampling,
        "passes": candidate.passes,
        "trained_on": candidate.arm,
        "recipe": asdict(recipe),
        "pflops": flops / 1e15,
        "seconds": sum(epoch["seconds"] for epoch in history),
        "accuracy": float((plain.predictions == data.y_test).mean()),
        "accuracy_with_averaged_flips": float((averaged == data.y_test).mean()),
        "final_train_loss": history[-1]["train_loss"],
        "bfloat16": uses_bfloat16(device),
        "hardware": describe_hardware(device),
        "torch": torch.__version__,
        "commit": commit,
    }
    save_json(path, result)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return result


# --- Report -------------------------------------------------------------------------------------


def load_runs(series):
    """Finished runs of a series: name -> list of results by ascending seed, in the order of the series."""
    found = {}
    for name in SERIES[series]:
        paths = FOLDER.glob(f"{name}-seed*.json")
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if runs:
            found[name] = sorted(runs, key=lambda run: run["seed"])
    return found


def table(series):
    """Markdown table of a series: what it costs and what it reaches, mean and spread over seeds.

    With the time only for the targets, which ran alone: the lines of the ablation ran two at a time.
    """
    timed = series == "target"
    header = ["recipe", "width", "passes", "PFLOPs", "test accuracy (%)", "with averaged flips (%)", "seeds"]
    if timed:
        header.insert(4, "minutes")
    rows, hardware = [], {}
    for name, runs in load_runs(series).items():
        first = runs[0]
        cells = [
            SERIES[series][name].what, str(first["width"]), f"{first['passes']:g}", f"{first['pflops']:.3f}",
            percent([run["accuracy"] for run in runs], 2),
            percent([run["accuracy_with_averaged_flips"] for run in runs], 2),
            str(len(runs)),
        ]  # fmt: skip
        if timed:
            minutes = f"{np.median([run['seconds'] for run in runs]) / 60:.0f}"
            cells.insert(4, minutes if first["bfloat16"] else f"{minutes} (float32)")
        rows.append(cells)
        hardware |= {hardware_text(run["hardware"]): None for run in runs}
    text = markdown_table(header, rows)
    if not timed:
        return text
    return f"{text}\n\nMinutes of training on {'; '.join(hardware)}, in bfloat16 but where the line says otherwise."


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Compute, seconds and accuracy of training recipes.")
    parser.add_argument("--series", choices=SERIES, default="ablation")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the series; default: all")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], metavar="N")
    options = parser.parse_args(arguments)
    names = options.only or list(SERIES[options.series])
    for name in names:
        if name not in SERIES[options.series]:
            parser.error(f"unknown recipe {name!r}; choose of {', '.join(SERIES[options.series])}")
    data = load_cifar10()
    for seed in options.seed:
        for name in names:
            result = run(name, SERIES[options.series][name], data, seed)
            print(f"{name}, seed {seed}: {result['accuracy']:.2%} for {result['pflops']:.3f} PFLOPs")
    print(table(options.series))


if __name__ == "__main__":
    main()

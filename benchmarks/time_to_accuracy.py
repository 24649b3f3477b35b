"""What does which accuracy cost? Compute, seconds and test accuracy of training recipes.

    python benchmarks/time_to_accuracy.py --series ablation --seed 0 1
    python benchmarks/time_to_accuracy.py --series target --seed 0 1

Each run writes ``results/benchmarks/time_to_accuracy/<name>-seed<k>.json``. A finished run is not run again. A killed
run continues, unless it keeps more than a checkpoint holds. The last weights are evaluated. The training data is
balanced CIFAR-10 unless a line says otherwise.

The test accuracy of the ablation chose the defaults of :class:`ClassifierTraining.Recipe` and average pooling, on the
balanced data set, which is the ceiling's. No other arm of the study took part in that choice.

References
----------
DeVries and Taylor (2017), Improved regularization of convolutional neural networks with Cutout. Jordan (2024), 94% on
CIFAR-10 in 3.29 seconds on a single GPU. Page (2018), How to train your ResNet. Qin et al. (2024), InfoBatch: lossless
training speed up by unbiased dynamic data pruning.
"""

import argparse
import contextlib
import sys
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

from Arms import ARMS, REFERENCE_SPLIT
from ClassifierNetwork import channel_statistics, create_classifier, evaluate_classifier
from ClassifierTraining import AugmentedBatches, CrossEntropy, Recipe, count_training_flops, train_classifier
from Experiment import make_training_set
from ImbalancedCIFAR10 import load_cifar10, split_from_name
from Report import percent
from Results import Study, read_json
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


# --- Changes of the new network -----------------------------------------------------------------


def strided(model, X):
    """Halve images by strides, as He et al. (2016) do."""
    strided_downsampling(model)


def mirrored(model, X, **options):
    """Make every filter's mirror image a filter too."""
    mirrored_filters(model, **options)


def whitened_stem(model, X):
    """Start from a first layer that whitens 3x3 patches, and do not train it (Page 2018; Jordan 2024).

    Each of the leading principal directions comes with both signs, because a ReLU follows.
    """
    images = torch.from_numpy(X[:5000]).permute(0, 3, 1, 2).to(model.mean.device)
    patches = F.unfold((images - model.mean) / model.std, 3)[:, :, ::7].mT.reshape(-1, 27)
    variance, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    kernels = (directions / (variance + 1e-3).sqrt()).T.flip(0)[: (model.width + 1) // 2]
    with torch.no_grad():
        model.conv.weight.copy_(torch.cat([kernels, -kernels])[: model.width].view_as(model.conv.weight))
    model.conv.weight.requires_grad_(False)


def frozen_norm_scales(model, X):
    """Do not train the scales of batch norm, only the shifts."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.requires_grad_(False)


def fast_norm_shifts(model, X, times=16):
    """Let the shifts of batch norm learn faster than the other weights (Jordan 2024: 64 times)."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # For SGD without decay, a larger gradient is a higher learning rate.
            module.bias.register_hook(lambda gradient: times * gradient)


def compiled(model, X):
    """``torch.compile``; its warm-up counts."""
    model.compile()


# --- Changes of the batches: classes that can be combined ---------------------------------------


class AlternatingFlips(AugmentedBatches):
    """Each image is mirrored in every other epoch, not at random (Jordan 2024)."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options | {"flip": False})

    def epoch(self, number):
        first = torch.from_numpy(np.random.default_rng(self.seed).random(self.n) < 0.5).to(self.device)
        for images, rows in super().epoch(number):
            mirrored = (first[rows] ^ bool(number % 2)).view(-1, 1, 1, 1)
            yield torch.where(mirrored, images.flip(-1), images), rows


class Cutout(AugmentedBatches):
    """A square of each image is set to the data set's mean colour (DeVries and Taylor 2017).

    The middle of the square lies anywhere in the image.
    """

    side = 10  # pixels

    def __init__(self, X, *arguments, **options):
        super().__init__(X, *arguments, **options)
        mean = torch.tensor(channel_statistics(X)[0])
        self.grey = mean.round().to(torch.uint8).view(3, 1, 1).to(self.device)

    def epoch(self, number):
        generator = np.random.default_rng((self.seed, 1, number))
        top, left = (
            torch.from_numpy(generator.integers(size, size=self.n) - self.side // 2).to(self.device)
            for size in (self.height, self.width)
        )
        rows_down, columns = (torch.arange(size, device=self.device) for size in (self.height, self.width))
        for images, rows in super().epoch(number):
            down = rows_down - top[rows, None]
            across = columns - left[rows, None]
            inside = ((down >= 0) & (down < self.side))[:, None, :, None]
            inside = inside & ((across >= 0) & (across < self.side))[:, None, None, :]
            yield torch.where(inside, self.grey, images), rows


class EasyImagesSkipped(AugmentedBatches):
    """Each epoch leaves out a random half of the images whose loss was below the mean when last seen.

    After InfoBatch (Qin et al. 2024), but the gradients of the other images get no larger weight. The loss must be
    :class:`RememberingLoss`.

    Attributes
    ----------
    losses : float32 tensor, shape (n,)
        The loss of each image when it was last seen; infinity before that.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.losses = torch.full((self.n,), torch.inf, device=self.device)

    def epoch(self, number):
        drawn = np.random.default_rng((self.seed, number)).random(self.n) < 0.5
        # In the first epoch there is no mean, and no comparison with NaN holds.
        easy = self.losses < self.losses[self.losses.isfinite()].mean()
        keep = ~(easy & torch.from_numpy(drawn).to(self.device))
        images, rows = [], []
        for new_images, new_rows in super().epoch(number):
            kept = keep[new_rows]
            images, rows = torch.cat([*images, new_images[kept]]), torch.cat([*rows, new_rows[kept]])
            if len(rows) >= self.part:
                yield images[: self.part].contiguous(memory_format=torch.channels_last), rows[: self.part]
                images, rows = images[self.part :], rows[self.part :]
            images, rows = [images], [rows]


class EasyImagesSkippedAlternatingFlips(EasyImagesSkipped, AlternatingFlips):
    """Both changes."""


class EasyImagesSkippedCutout(EasyImagesSkipped, Cutout):
    """Both changes."""


class RememberingLoss(CrossEntropy):
    """Cross-entropy that also writes each image's loss, without smoothing, into a tensor.

    Parameters
    ----------
    label_smoothing : float
    losses : float32 tensor, shape (n,)
        One value for each row of the training set; changed in place.
    """

    def __init__(self, label_smoothing, losses):
        super().__init__(label_smoothing)
        self.losses = losses

    def forward(self, logits, targets, rows):
        self.losses[rows] = F.cross_entropy(logits.detach(), targets, reduction="none")
        return super().forward(logits, targets, rows)


# --- A change of the result ---------------------------------------------------------------------


@contextlib.contextmanager
def averaged_weights(model, X, decay=0.99):
    """Follow the weights of a training by an exponential moving average.

    Yields a function that puts the average into ``model``, with batch-norm statistics made for it. The training loop
    does nothing between two steps for its caller, so this is a hook of the optimisers.
    """
    average = None

    def update(optimizer, *_):
        nonlocal average
        if isinstance(optimizer, torch.optim.SGD):  # the one of the two optimisers that every recipe has
            if average is None:
                average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
            average.update_parameters(model)

    def use_average():
        model.load_state_dict(average.module.state_dict())
        batches = AugmentedBatches(X, 500, model.mean.device, seed=0)
        update_bn((images for images, _ in list(batches.epoch(0))[:20]), model)

    handle = register_optimizer_step_post_hook(update)
    try:
        yield use_average
    finally:
        handle.remove()


# --- Candidates ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A recipe to measure.

    Attributes
    ----------
    what : str
        What it is, or how it differs from the default.
    width : int
    passes : float
        Images that are computed, in units of 50,000. If images are left out, there are more epochs. If the data set
        has more images, there are fewer.
    changes : dict
        Arguments of :class:`ClassifierTraining.Recipe` that differ from its defaults.
    modify : tuple of callables
        ``(model, X) -> None``: each changes the new network in place.
    batches : type
        :class:`ClassifierTraining.AugmentedBatches` or a subclass of it: the batches to train on.
    averaged : bool, default False
        Whether the result is an average of the weights: see :func:`averaged_weights`.
    arm : str, default 'balanced'
        What to train on: the training set of an arm of the study, on the reference's split.
    """

    what: str
    width: int = 16
    passes: float = 6.6
    changes: dict = field(default_factory=dict)
    modify: tuple = ()
    batches: type = AugmentedBatches
    averaged: bool = False
    arm: str = "balanced"

    @property
    def resumable(self):
        """Whether a killed run can continue, because a checkpoint holds all that it needs."""
        return not self.averaged and not issubclass(self.batches, EasyImagesSkipped)

    def recipe(self, n):
        batch_size = self.changes.get("batch_size", Recipe.batch_size)
        return Recipe(steps=round(self.passes * n / batch_size), **self.changes)

    def network(self, X, seed, device=None):
        """The untrained network for images ``X``."""
        model = create_classifier(10, self.width, channel_statistics(X), seed, device)
        for modify in self.modify:
            modify(model, X)
        return model

    def train(self, model, X, y, recipe, *, seed, loss=None, checkpoint=None):
        """Train ``model`` in place and return the history. ``loss`` is that of the arm, None for cross-entropy."""
        options = {"padding": recipe.padding, "flip": recipe.flip}
        batches = self.batches(X, recipe.batch_size, model.mean.device, seed, **options)
        if isinstance(batches, EasyImagesSkipped):
            loss = RememberingLoss(recipe.label_smoothing, batches.losses)
        with averaged_weights(model, X) if self.averaged else contextlib.nullcontext() as use_average:
            history = train_classifier(
                model, X, y, recipe, seed=seed, loss=loss, batches=batches, checkpoint=checkpoint
            )
        if use_average:
            use_average()
        return history

    def require_same_settings(self, path, result, recipe):
        """Raise ValueError if the settings in a result are not these."""
        wanted = {"width": self.width, "passes": self.passes, "trained_on": self.arm}
        wanted |= recipe.as_json()
        # The oldest results lack settings that could not be chosen then.
        require_same_settings(path, wanted | result | result["recipe"], wanted)


# The base of the ablation: the former network and defaults, with Muon and growing images.
BASE = {"batch_size": 128, "learning_rate": 0.1, "muon_learning_rate": 0.03, "muon_iterations": 5}
BATCH_256 = {"batch_size": 256, "learning_rate": 0.15, "muon_learning_rate": 0.045}
FULL_SIZE = {"scales": (1.0,)}


def departure(
    what,
    width=Candidate.width,
    passes=Candidate.passes,
    modify=(),
    batches=AugmentedBatches,
    averaged=False,
    **changes,
):
    """A line of the ablation: the base with the changes."""
    return Candidate(what, width, passes, BASE | changes, (strided, *modify), batches, averaged)


HALVED = Candidate(
    "balanced, filters in mirrored pairs for half of the operations, label smoothing 0.1, crops that move by 4, a "
    "square of 10 pixels greyed out, easy images left out half of the time, batch-norm shifts 16 times as fast, "
    "Muon's learning rate 0.07",
    width=32, passes=25,
    changes={"label_smoothing": 0.1, "padding": 4, "flip": False, "muon_learning_rate": 0.07},
    modify=(partial(mirrored, convolution=HalvedMirroredConv2d), fast_norm_shifts), batches=EasyImagesSkippedCutout,
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
        "whitened": departure("whitened, frozen first layer", modify=(whitened_stem,)),
        "padding-4": departure("crops that move by 4 pixels instead of 2", padding=4),
        "smoothing": departure("label smoothing 0.1", label_smoothing=0.1),
        "alternating-flips": departure("each image mirrored every other epoch", batches=AlternatingFlips),
        "batch-512": departure(
            "batches of 512, learning rates 2 (SGD) and 4 times (Muon) as high",
            batch_size=512, learning_rate=0.2, muon_learning_rate=0.12,
        ),
        "batch-256": departure("batches of 256, learning rates 1.5 times as high", passes=7, **BATCH_256),
        "three-iterations": departure(
            "three Newton-Schulz iterations in Muon instead of five", passes=6.9, muon_iterations=3
        ),
        "faster": Candidate("the last two together: the default recipe", passes=7.1, modify=(strided,)),
        "pooled": Candidate(
            "the default recipe and average pooling in place of strides: the default network", passes=7.1
        ),
        "mirrored": Candidate(
            "the default recipe and network, filters in mirrored pairs", passes=7.3, modify=(mirrored,)
        ),
        "mirrored-20": Candidate(
            "the default recipe and network, filters in mirrored pairs, wider, fewer passes",
            width=20, passes=4.6, modify=(mirrored,),
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
        "skipping": departure("easy images left out half of the time", batches=EasyImagesSkipped),
        "width-12": departure("narrower, more passes", width=12, passes=11.5),
        "width-20": departure("wider, fewer passes", width=20, passes=4.1),
        "width-24": departure("wider still, fewer passes", width=24, passes=2.8),
        "averaged": departure("moving average of the weights (decay 0.99)", averaged=True),
        "late-peak": departure("peak of the rates after a fifth of the run", warmup=0.2),
        "frozen-scales": departure("batch-norm scales not trained", modify=(frozen_norm_scales,)),
        "fast-shifts": departure("batch-norm shifts learn 16 times as fast", modify=(fast_norm_shifts,)),
        "fast-shifts-only": departure(
            "batch-norm shifts learn 64 times as fast, scales not trained",
            modify=(partial(fast_norm_shifts, times=64), frozen_norm_scales),
        ),
        "compiled": departure("torch.compile", modify=(compiled,)),
    },
    "target": {
        "balanced-94": Candidate(
            "balanced, strides, label smoothing 0.1", width=40, passes=16,
            changes={"label_smoothing": 0.1}, modify=(strided,),
        ),
        "balanced-94-regularised": Candidate(
            "balanced, strides, label smoothing 0.2, crops that move by 4, each image mirrored every other epoch",
            width=40, passes=16, changes={"label_smoothing": 0.2, "padding": 4},
            modify=(strided,), batches=AlternatingFlips,
        ),
        "balanced-94-narrower": Candidate(
            "balanced, strides, label smoothing 0.1, crops that move by 4, each image mirrored every other epoch, easy "
            "images left out half of the time, batch-norm shifts 16 times as fast, Muon's learning rate 0.07",
            width=32, passes=25.5, changes={"label_smoothing": 0.1, "padding": 4, "muon_learning_rate": 0.07},
            modify=(strided, fast_norm_shifts), batches=EasyImagesSkippedAlternatingFlips,
        ),
        "balanced-94-mirrored": Candidate(
            "balanced, filters in mirrored pairs, label smoothing 0.1, crops that move by 4, easy images left out half of "
            "the time",
            width=40, passes=17, changes={"label_smoothing": 0.1, "padding": 4, "flip": False},
            modify=(mirrored,), batches=EasyImagesSkipped,
        ),
        "balanced-94-pooled": Candidate(
            "balanced, Muon's learning rate 0.09 and weight decay 0.2, label smoothing 0.1, crops that move by 4, each "
            "image mirrored every other epoch",
            width=32, passes=25.5, batches=AlternatingFlips,
            changes={
                "label_smoothing": 0.1, "padding": 4, "muon_learning_rate": 0.09, "muon_weight_decay": 0.2
            },
        ),
        "balanced-94-halved": HALVED,
        "balanced-94-longer": replace(HALVED, what="the same as the line of 25 passes", passes=50),
        "reference-accuracy": Candidate(
            "cat-50, strides, Stable Diffusion source-balanced, logit-adjusted per source", width=32, passes=10,
            modify=(strided,), arm="stable-source-balanced-adjusted",
        ),
    },
}  # fmt: skip


# --- Running ------------------------------------------------------------------------------------


def run(name, candidate, data, seed, device=None):
    """Train and evaluate one candidate, or return its result if it is finished.

    Parameters
    ----------
    name : str
        Of the candidate, for the file of the result.
    candidate : Candidate
    data : ImbalancedCIFAR10.ImageDataSet
    seed : int
    device : str or torch.device, optional
        Default: the fastest there is.

    Returns
    -------
    dict
        The content of the JSON file.

    Raises
    ------
    ValueError
        If the result was obtained with other settings.
    """
    path = FOLDER / f"{name}-seed{seed}.json"
    recipe = candidate.recipe(len(data.y_train))
    if path.exists():
        result = read_json(path)
        candidate.require_same_settings(path, result, recipe)
        return result
    device, commit = choose_device(device), code_version()
    X, y, loss = _training_set_and_loss(candidate.arm, data, seed, device)
    model = candidate.network(X, seed, device)
    flops = count_training_flops(model, recipe)
    checkpoint = Path("models", "checkpoints", FOLDER.name, path.with_suffix(".pt").name)
    history = candidate.train(
        model, X, y, recipe, seed=seed, loss=loss, checkpoint=checkpoint if candidate.resumable else None
    )
    plain = evaluate_classifier(model, data.X_test, data.y_test)
    mirrored = evaluate_classifier(model, data.X_test[:, :, ::-1], data.y_test)
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
    checkpoint.unlink(missing_ok=True)
    return result


def _training_set_and_loss(arm_name, data, seed, device):
    """Images and labels of an arm on the reference's split, and its loss (None for cross-entropy)."""
    study = Study("cpu", data.name, REFERENCE_SPLIT)
    X, y = make_training_set(study, data, arm_name, seed, device)
    real_rows = len(y)
    if not ARMS[arm_name].whole_training_set:
        split = split_from_name(REFERENCE_SPLIT, data.y_train, data.class_names)
        real_rows = len(split.kept_rows(data.y_train))
    return X, y, ARMS[arm_name].loss(y, 10, real_rows)


# --- Report -------------------------------------------------------------------------------------


def load_runs(series):
    """Finished runs of a series: name -> list of results by ascending seed, in the order of the series."""
    found = {}
    for name in SERIES[series]:
        paths = FOLDER.glob(f"{name}-seed*.json")
        runs = [read_json(path) for path in paths]
        if runs:
            found[name] = sorted(runs, key=lambda run: run["seed"])
    return found


def table(series):
    """Markdown table of a series: what each line costs and reaches, mean and spread over seeds.

    Only the targets have a time, because they ran alone. The lines of the ablation ran two at a time.
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

"""The recipes that ``time_to_accuracy.py`` measures: the lines of its two series."""

import contextlib
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import training_variants as variants

from Batches import AugmentedBatches
from ClassifierNetwork import channel_statistics, create_classifier
from ClassifierTraining import Recipe, train_classifier
from Files import require_same_settings
from Losses import CrossEntropy
from MirroredFilters import HalvedMirroredConv2d


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
        :class:`Batches.AugmentedBatches` or a subclass of it: the batches to train on.
    averaged : bool, default False
        Whether the result is an average of the weights: see :func:`training_variants.averaged_weights`.
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
        return not self.averaged and not issubclass(self.batches, variants.EasyImagesSkipped)

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
        """Train ``model`` in place and return the history. ``loss`` is the arm's, None for cross-entropy."""
        batches = self.batches(X, recipe.batch_size, model.mean.device, seed, **recipe.augmentation)
        if isinstance(batches, variants.EasyImagesSkipped):
            loss = variants.RememberingLoss(loss or CrossEntropy(recipe.label_smoothing), batches.losses)
        with (
            variants.averaged_weights(model, X) if self.averaged else contextlib.nullcontext() as use_average
        ):
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
    return Candidate(what, width, passes, BASE | changes, (variants.strided, *modify), batches, averaged)


HALVED = Candidate(
    "balanced, filters in mirrored pairs for half of the operations, label smoothing 0.1, crops that move by 4, a "
    "square of 10 pixels greyed out, easy images left out half of the time, batch-norm shifts 16 times as fast, "
    "Muon's learning rate 0.07",
    width=32, passes=25,
    changes={
        "label_smoothing": 0.1, "padding": 4, "flip": False, "muon_learning_rate": 0.07, "norm_shift_rate": 16.0,
    },
    modify=(partial(variants.mirrored_pairs, convolution=HalvedMirroredConv2d),), batches=variants.EasyImagesSkippedCutout,
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
        "whitened": departure("whitened, frozen first layer", modify=(variants.whitened_stem,)),
        "padding-4": departure("crops that move by 4 pixels instead of 2", padding=4),
        "smoothing": departure("label smoothing 0.1", label_smoothing=0.1),
        "alternating-flips": departure("each image mirrored every other epoch", batches=variants.AlternatingFlips),
        "batch-512": departure(
            "batches of 512, learning rates 2 (SGD) and 4 times (Muon) as high",
            batch_size=512, learning_rate=0.2, muon_learning_rate=0.12,
        ),
        "batch-256": departure("batches of 256, learning rates 1.5 times as high", passes=7, **BATCH_256),
        "three-iterations": departure(
            "three Newton-Schulz iterations in Muon instead of five", passes=6.9, muon_iterations=3
        ),
        "faster": Candidate("the last two together: the default recipe", passes=7.1, modify=(variants.strided,)),
        "pooled": Candidate(
            "the default recipe and average pooling instead of strides: the default network", passes=7.1
        ),
        "mirrored": Candidate(
            "the default recipe and network, filters in mirrored pairs", passes=7.3, modify=(variants.mirrored_pairs,)
        ),
        "mirrored-20": Candidate(
            "the default recipe and network, filters in mirrored pairs, wider, fewer passes",
            width=20, passes=4.6, modify=(variants.mirrored_pairs,),
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
        "skipping": departure("easy images left out half of the time", batches=variants.EasyImagesSkipped),
        "width-12": departure("narrower, more passes", width=12, passes=11.5),
        "width-20": departure("wider, fewer passes", width=20, passes=4.1),
        "width-24": departure("wider still, fewer passes", width=24, passes=2.8),
        "averaged": departure("moving average of the weights (decay 0.99)", averaged=True),
        "late-peak": departure("peak of the rates after a fifth of the run", warmup=0.2),
        "frozen-scales": departure("batch-norm scales not trained", modify=(variants.frozen_norm_scales,)),
        "fast-shifts": departure("batch-norm shifts learn 16 times as fast", norm_shift_rate=16.0),
        "fast-shifts-only": departure(
            "batch-norm shifts learn 64 times as fast, scales not trained",
            modify=(variants.frozen_norm_scales,), norm_shift_rate=64.0,
        ),
        "compiled": departure("torch.compile", modify=(variants.compiled,)),
    },
    "target": {
        "balanced-94": Candidate(
            "balanced, strides, label smoothing 0.1", width=40, passes=16,
            changes={"label_smoothing": 0.1}, modify=(variants.strided,),
        ),
        "balanced-94-regularised": Candidate(
            "balanced, strides, label smoothing 0.2, crops that move by 4, each image mirrored every other epoch",
            width=40, passes=16, changes={"label_smoothing": 0.2, "padding": 4},
            modify=(variants.strided,), batches=variants.AlternatingFlips,
        ),
        "balanced-94-narrower": Candidate(
            "balanced, strides, label smoothing 0.1, crops that move by 4, each image mirrored every other epoch, easy "
            "images left out half of the time, batch-norm shifts 16 times as fast, Muon's learning rate 0.07",
            width=32, passes=25.5, batches=variants.EasyImagesSkippedAlternatingFlips, modify=(variants.strided,),
            changes={
                "label_smoothing": 0.1, "padding": 4, "muon_learning_rate": 0.07, "norm_shift_rate": 16.0,
            },
        ),
        "balanced-94-mirrored": Candidate(
            "balanced, filters in mirrored pairs, label smoothing 0.1, crops that move by 4, easy images left out half of "
            "the time",
            width=40, passes=17, changes={"label_smoothing": 0.1, "padding": 4, "flip": False},
            modify=(variants.mirrored_pairs,), batches=variants.EasyImagesSkipped,
        ),
        "balanced-94-pooled": Candidate(
            "balanced, Muon's learning rate 0.09 and weight decay 0.2, label smoothing 0.1, crops that move by 4, each "
            "image mirrored every other epoch",
            width=32, passes=25.5, batches=variants.AlternatingFlips,
            changes={
                "label_smoothing": 0.1, "padding": 4, "muon_learning_rate": 0.09, "muon_weight_decay": 0.2
            },
        ),
        "balanced-94-halved": HALVED,
        "balanced-94-longer": replace(HALVED, what="the same as the line of 25 passes", passes=50),
        "reference-accuracy": Candidate(
            "cat-50, strides, Stable Diffusion source-balanced, logit-adjusted per source", width=32, passes=10,
            modify=(variants.strided,), arm="stable-source-balanced-adjusted",
        ),
    },
}  # fmt: skip

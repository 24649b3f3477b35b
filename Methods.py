"""Candidates for the study: ways to train with a rare class, with and without synthetic images.

    method = METHODS["stable-spectrum-statistics"]
    X_res, y_res, sources = method.training_set(X, y, seed=0)

``Development.py`` compares them on development splits, and only there. What is chosen becomes an arm of ``Arms.py``.
Methods whose names begin with ``stable`` use the cached Stable Diffusion images; the others use no generated image.

References
----------
Cao et al. (2019), LDAM-DRW. Cui et al. (2019), Class-balanced loss. DeVries and Taylor (2017), Cutout. Foret et al.
(2021), Sharpness-aware minimization. Menon et al. (2021), Long-tail learning via logit adjustment. Shin et al. (2023),
Fill-Up (real images last). Xie et al. (2020), auxiliary batch norm. Yun et al. (2019), CutMix. Zhang et al. (2018), mixup.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from imblearn.base import BaseSampler
from sklearn.base import clone

from Batches import MixedBatches, SourceBatches
from ImageOverSampler import source_balanced_strategy
from Losses import ClassBalancedLoss, LogitAdjustedLoss
from Runtime import derive_seed
from StableDiffusionGeneration import StableDiffusionOverSampler


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes
    ----------
    what : str
        For tables.
    sampler : imbalanced-learn sampler or None
        Makes the images that are added; its ``random_state`` is set for each run.
    loss : callable or None
        ``(y, num_classes, sources) -> loss``; None for cross-entropy.
    batches : callable or None
        ``(X, sources, recipe, device, seed) -> batches``; None for the recipe's own.
    changes : dict
        Arguments of :class:`ClassifierTraining.Recipe` that differ from the other methods'.
    compute : float
        Cost of a step, relative to the other methods'. The number of steps is divided by it.
    shuffled : bool
        Whether the labels of the synthetic images are shuffled: the placebo.
    """

    what: str
    sampler: BaseSampler | None = None
    loss: Callable | None = None
    batches: Callable | None = None
    changes: dict = field(default_factory=dict)
    compute: float = 1.0
    shuffled: bool = False

    @property
    def needs_stable_diffusion(self):
        return isinstance(self.sampler, StableDiffusionOverSampler)

    def training_set(self, X, y, *, seed):
        """Rebalance a training set as this method does.

        Parameters
        ----------
        X, y : ndarrays
            As for ``fit_resample``.
        seed : int

        Returns
        -------
        X, y : ndarrays
            The given images first, then the synthetic ones.
        sources : ndarray of int64, shape (n,)
            0 for given rows, 1 for synthetic ones.
        """
        real = len(y)
        if self.sampler is not None:
            sampler = clone(self.sampler).set_params(random_state=derive_seed(seed, 2) % 2**32)
            X, y = sampler.fit_resample(X, y)
        if self.shuffled:
            np.random.default_rng(derive_seed(seed, 4)).shuffle(y[real:])
        return X, y, (np.arange(len(y)) >= real).astype(np.int64)


# --- Losses -------------------------------------------------------------------------------------


def adjusted(y, num_classes, sources, *, tau=1.0):
    """Each row's loss is adjusted by the class frequencies of its own source."""
    return LogitAdjustedLoss(y, num_classes, sources, tau=tau)


def class_balanced(y, num_classes, sources, *, deferred_until=0.0):
    """Classes weigh by their effective number of images."""
    return ClassBalancedLoss(y, num_classes, deferred_until=deferred_until)


# --- Batches ------------------------------------------------------------------------------------


def by_source(X, sources, recipe, device, seed, *, phases=((1.0, 0.5),)):
    """Micro-batches of one source, each with batch-norm statistics of its own."""
    return SourceBatches(
        X, sources, recipe.batch_size, device, seed, steps=recipe.steps, phases=phases,
        micro_batch_size=recipe.micro_batch_size, **recipe.augmentation,
    )  # fmt: skip


def mixed(X, sources, recipe, device, seed, *, kind, batches=None, alpha=1.0):
    """The images of each micro-batch are mixed with each other."""
    inner = recipe.batches(X, seed, device) if batches is None else batches(X, sources, recipe, device, seed)
    return MixedBatches(inner, kind, micro_batch_size=recipe.micro_batch_size, seed=seed, alpha=alpha)


# --- The methods --------------------------------------------------------------------------------


def _stable(match="spectrum"):
    return StableDiffusionOverSampler(sampling_strategy=source_balanced_strategy, match=match)


def _phases(fraction, real_last=0.0):
    """A constant synthetic fraction of each batch, and none in the last part of the training."""
    return ((1 - real_last, fraction), (1.0, 0.0)) if real_last else ((1.0, fraction),)


def _stable_by_source(what, fraction, real_last=0.0, **options):
    batches = partial(by_source, phases=_phases(fraction, real_last))
    return Method(what, **{"sampler": _stable(), "loss": adjusted, "batches": batches} | options)


IMAGE_FREE = {
    "plain": Method("cross-entropy"),
    "class-balanced": Method("class-balanced weights", loss=class_balanced),
    "class-balanced-deferred": Method(
        "class-balanced weights in the last fifth", loss=partial(class_balanced, deferred_until=0.8)
    ),
    "adjusted": Method("logit-adjusted loss (balanced softmax)", loss=adjusted),
    "adjusted-tau-1.25": Method("logit-adjusted loss, tau 1.25", loss=partial(adjusted, tau=1.25)),
    "adjusted-tau-1.5": Method("logit-adjusted loss, tau 1.5", loss=partial(adjusted, tau=1.5)),
    "adjusted-cutout": Method("logit-adjusted loss, cutout of 8 pixels", loss=adjusted, changes={"cutout": 8}),
    "adjusted-mixup": Method(
        "logit-adjusted loss, mixup", loss=adjusted, batches=partial(mixed, kind="mixup")
    ),
    "adjusted-cutmix": Method(
        "logit-adjusted loss, CutMix", loss=adjusted, batches=partial(mixed, kind="cutmix")
    ),
    "adjusted-sam": Method(
        "logit-adjusted loss, sharpness-aware, half of the steps",
        loss=adjusted, changes={"sam_radius": 0.1}, compute=2.0,
    ),
}  # fmt: skip

WITH_STABLE_DIFFUSION = {
    "stable-adjusted": Method(
        "source-balanced, prior per source (the study's best arm until now)",
        sampler=_stable(match=None), loss=adjusted,
    ),
    "stable-spectrum": Method("the same, spectrum matched", sampler=_stable(), loss=adjusted),
    "stable-statistics": _stable_by_source(
        "statistics per source, half of each batch synthetic", 0.5, sampler=_stable(match=None)
    ),
    "stable-spectrum-half": _stable_by_source("spectrum, statistics per source, half synthetic", 0.5),
    "stable-spectrum-quarter": _stable_by_source("spectrum, statistics per source, a quarter synthetic", 0.25),
    "stable-spectrum-half-real-last": _stable_by_source(
        "spectrum, statistics per source, half synthetic, the last 15 % real only", 0.5, 0.15
    ),
    "stable-spectrum-quarter-real-last": _stable_by_source(
        "spectrum, statistics per source, a quarter synthetic, the last 15 % real only", 0.25, 0.15
    ),
    "stable-placebo": _stable_by_source(
        "spectrum, statistics per source, a quarter synthetic, synthetic labels shuffled", 0.25, shuffled=True
    ),
}  # fmt: skip

METHODS = IMAGE_FREE | WITH_STABLE_DIFFUSION


def find_method(name):
    """Return the method of that name, or raise ValueError with the valid names."""
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}. Choose one of {', '.join(METHODS)}.")
    return METHODS[name]

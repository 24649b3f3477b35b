"""Ways to train with a rare class, with and without synthetic images.

    method = find_method("stable-spectrum-quarter")
    X_res, y_res = method.fit_resample(X, y, seed=0)
    model = create_classifier(10, 16, channel_statistics(X_res), seed=0, cosine_head=method.cosine_head)
    history, settings = method.train(model, X_res, y_res, len(X), recipe, seed=0)

:data:`METHODS` are the candidates. ``Development.py`` compares them on development splits, and only there. What the study
compares is in ``Arms.py``. Methods whose names begin with ``stable`` use the cached Stable Diffusion images, those with
``gan`` a GAN that is trained on the development split; the others use no generated image.

References
----------
Cao et al. (2019), LDAM-DRW. Cui et al. (2019), Class-balanced loss. DeVries and Taylor (2017), Cutout. Foret et al.
(2021), Sharpness-aware minimization. Menon et al. (2021), Long-tail learning via logit adjustment. Shin et al. (2023),
Fill-Up (real images last). Xie et al. (2020), auxiliary batch norm. Yun et al. (2019), CutMix. Zhang et al. (2018), mixup.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from imblearn.base import BaseSampler
from imblearn.over_sampling import SMOTE, RandomOverSampler
from sklearn.base import clone

from Batches import MixedBatches, PastedBatches, SourceBatches
from Checks import check_images
from ClassifierTraining import train_classifier
from GANGeneration import GANOverSampler
from ImageOverSampler import source_balanced_strategy
from LastLayer import adjust_logits, retrain_last_layer
from Losses import ClassBalancedLoss, CrossEntropy, LDAMLoss, LogitAdjustedLoss
from NonSyntheticGeneration import AugmentationOverSampler, PixelOverSampler
from Repeatability import derive_seed
from StableDiffusionSampler import StableDiffusionOverSampler
from SyntheticChoice import most_uncertain, nearest_to_prototypes

CHOOSING_STEPS = 0.25  # of a training: what the network that chooses images is trained for


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes
    ----------
    sampler : imbalanced-learn sampler or None
        Makes the images that are added; its ``random_state`` is set for each run.
    loss : callable or None
        ``(y, num_classes, sources) -> loss``; None for cross-entropy. ``sources`` is 0 for real rows, 1 for synthetic ones.
    batches : callable or None
        ``(X, sources, recipe, device, seed) -> batches``; None for the recipe's own.
    changes : dict
        Arguments of :class:`ClassifierTraining.Recipe` that differ from the other methods'.
    compute : float
        Cost of the whole training per step of the final network, relative to the other methods'. The number of
        steps is divided by it.
    cosine_head : bool
        See :class:`ClassifierNetwork.ResNet18`.
    choose : callable or None
        ``(model, X, y, real_rows) -> rows``: which rows are trained on. Another network is trained first, for
        ``CHOOSING_STEPS`` of the steps; ``compute`` must count it.
    finish : callable or None
        ``(model, X, y, recipe, seed) -> None``: changes the trained network in place, by the real images.
    shuffled : bool
        Whether the labels of the synthetic images are shuffled: the placebo.
    what : str
        For the table of the candidates.

    Raises
    ------
    ValueError
        If a part of it is a lambda.
    """

    sampler: BaseSampler | None = None
    loss: Callable | None = None
    batches: Callable | None = None
    changes: dict = field(default_factory=dict)
    compute: float = 1.0
    cosine_head: bool = False
    choose: Callable | None = None
    finish: Callable | None = None
    shuffled: bool = False
    what: str = ""

    def __post_init__(self):
        if "<lambda>" in repr(self):  # two lambdas look alike, so a changed one would go unnoticed
            raise ValueError(
                "A method is told from others by its functions' names: write a function, no lambda."
            )

    @property
    def definition(self):
        """All that the method decides, in words that are the same in every process."""
        text = repr(dataclasses.replace(self, what=""))
        return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", text))

    @property
    def logit_adjusted(self):
        """Whether the loss is adjusted by the class frequencies of each image's source (real or synthetic)."""
        return getattr(self.loss, "func", self.loss) is adjusted

    @property
    def loss_in_words(self):
        """The loss, and what follows the training, for a table: a str."""
        loss = getattr(self.loss, "func", self.loss)
        words = LOSSES_IN_WORDS.get(loss, getattr(loss, "__name__", str(loss)))
        return words if self.finish is None else f"{words}; then {self.finish.__name__.replace('_', ' ')}"

    @property
    def batches_in_words(self):
        """What is special in the batches, for a table: a str."""
        if self.batches is None:
            return "shuffled, sources mixed"
        options = getattr(self.batches, "keywords", {})
        if getattr(self.batches, "func", self.batches) is not SourceBatches or "phases" not in options:
            return self.what
        phases = options["phases"]
        words = [f"{phases[0][1]:.0%} synthetic"]
        if weight := options.get("synthetic_weight"):
            words[0] += f" of weight {weight:g}"
        if len(phases) > 1 and phases[-1][1] == 0:
            words.append(f"none in the last {1 - phases[-2][0]:.0%} of the steps")
        if options.get("statistics_per_source", True):
            words.append("batch-norm statistics per source")
        return ", ".join(words)

    @property
    def needs_gan(self):
        return isinstance(self.sampler, GANOverSampler)

    @property
    def needs_stable_diffusion(self):
        return isinstance(self.sampler, StableDiffusionOverSampler)

    def fit_resample(self, X, y, *, seed, generator=None):
        """Rebalance a training set as this method does.

        Parameters
        ----------
        X : ndarray of uint8, shape (n, height, width, 3)
        y : ndarray of int64, shape (n,)
        seed : int
            Of the run; the sampler gets ``sampling_seed(seed)``.
        generator : GANNetworks.Generator or path, optional
            The trained generator; only a method that needs a GAN uses it.

        Returns
        -------
        X_res, y_res : ndarrays of shape (m, height, width, 3) and (m,)
            The first n rows are the input, unchanged and in order; the others are synthetic.

        Raises
        ------
        ImageOverSampler.UnsuitableImagesError
            If the sampler cannot make the images from these, or there are too few of them.
        """
        if self.sampler is None:
            return X, y
        parameters = {"random_state": sampling_seed(seed)} | (
            {"generator": generator} if self.needs_gan else {}
        )
        return clone(self.sampler).set_params(**parameters).fit_resample(X, y)

    def train(
        self, model, X, y, real_rows, recipe, *, seed, after_epoch=None, checkpoint=None, rank=0, world_size=1
    ):
        """Train a network in place, on its device, with this method's loss, batches and changes of the recipe.

        The sampler is not used: see :meth:`fit_resample`. Nor is ``compute``: the recipe has the number of steps. It has
        the parameters of :func:`ClassifierTraining.train_classifier` (see there), except for what the method itself
        decides (loss and batches), and three more: ten.

        Parameters
        ----------
        real_rows : int
            How many rows are real, 1 or more. They come first. The others are synthetic.
        rank, world_size : int
            Of the processes that train this network together.

        Returns
        -------
        history : list of dict
        settings : dict
            For the result: ``loss`` and ``batches`` in words, and the number of ``rows`` that were trained on.

        Raises
        ------
        ValueError
            If several processes are to train by a method with batches of its own, or there are not as many rows as are real.
        """
        X, y = check_images(X, y)
        if not 1 <= real_rows <= len(y):
            raise ValueError(f"real_rows must be from 1 to the {len(y):,} rows of y: got {real_rows}.")
        device, recipe = next(model.parameters()).device, dataclasses.replace(recipe, **self.changes)
        if self.shuffled:
            y = y.copy()
            np.random.default_rng(derive_seed(seed, 4)).shuffle(y[real_rows:])
        if self.choose is not None:
            rows = self._chosen_rows(model, X, y, real_rows, recipe, seed, checkpoint)
            X, y = X[rows], y[rows]
        sources = (np.arange(len(y)) >= real_rows).astype(np.int64)
        loss = CrossEntropy(recipe.label_smoothing)
        if self.loss is not None:
            loss = self.loss(y, model.num_classes, sources)
        if self.batches is None:
            batches = recipe.batches(X, seed, device, rank, world_size)
        elif world_size > 1:
            raise ValueError(
                f"{world_size} processes cannot train one network on this method's batches. Run it without "
                "--data-parallel."
            )
        else:
            batches = self.batches(X, sources, recipe, device, seed)
        history = train_classifier(
            model,
            X,
            y,
            recipe,
            seed=seed,
            loss=loss,
            batches=batches,
            after_epoch=after_epoch,
            checkpoint=checkpoint,
        )
        if self.finish is not None:
            self.finish(model, X[:real_rows], y[:real_rows], recipe, seed)
        return history, {"loss": repr(loss), "batches": batches.description, "rows": len(y)}

    def remove_checkpoints(self, checkpoint):
        """Remove what :meth:`train` left at ``checkpoint`` (a pathlib.Path), when its outcome is saved."""
        for path in (checkpoint, _choosing_checkpoint(checkpoint)):
            path.unlink(missing_ok=True)

    def _chosen_rows(self, model, X, y, real_rows, recipe, seed, checkpoint):
        """Train a copy of the network for a part of the steps, and let it choose the rows to train on."""
        first = dataclasses.replace(self, choose=None, finish=None, shuffled=False)
        network = copy.deepcopy(model)
        path = None if checkpoint is None else _choosing_checkpoint(checkpoint)
        steps = max(1, round(CHOOSING_STEPS * recipe.steps))
        first.train(
            network, X, y, real_rows, dataclasses.replace(recipe, steps=steps), seed=seed, checkpoint=path
        )
        return self.choose(network, X, y, real_rows)


def _choosing_checkpoint(checkpoint):
    """The checkpoint of the network that chooses images, beside that of the training."""
    checkpoint = Path(checkpoint)
    return checkpoint.with_stem(checkpoint.stem + "-choosing")


def sampling_seed(seed):
    """The ``random_state`` of a run's sampler: derived from the run's seed, but not equal to it."""
    return derive_seed(seed, 2) % 2**32


# --- Losses -------------------------------------------------------------------------------------


def adjusted(y, num_classes, sources, *, tau=1.0, real_prior_for_all=False):
    """Each row's loss is adjusted by the class frequencies of its own source, or of the real rows."""
    return LogitAdjustedLoss(y, num_classes, sources, tau=tau, real_prior_for_all=real_prior_for_all)


def adjusted_by_all_rows(y, num_classes, sources):
    """One prior: the class frequencies of all rows, added ones included."""
    return LogitAdjustedLoss(y, num_classes)


def class_balanced(y, num_classes, sources, *, deferred_until=0.0):
    """Classes weigh by their effective number of images."""
    return ClassBalancedLoss(y, num_classes, deferred_until=deferred_until)


def ldam(y, num_classes, sources):
    """Margins by rarity, and class-balanced weights in the last fifth. It needs a cosine head."""
    return LDAMLoss(y, num_classes)


LOSSES_IN_WORDS = {
    None: "cross-entropy",
    adjusted: "logit-adjusted cross-entropy",
    adjusted_by_all_rows: "logit-adjusted cross-entropy, one prior for all rows",
    class_balanced: "class-balanced cross-entropy",
    ldam: "LDAM",
}


# --- Batches ------------------------------------------------------------------------------------


def pasted(X, sources, recipe, device, seed, *, kind):
    """A quarter of the images of each batch are real ones into which a synthetic one is mixed; none at the end."""
    count = recipe.batch_size // 4
    phases = _phases(count / (recipe.batch_size + count), real_last=0.15)
    return PastedBatches(
        SourceBatches(X, sources, recipe, device, seed, phases=phases, more=count), kind, seed=seed
    )


def mixed(X, sources, recipe, device, seed, *, kind):
    """The images of each micro-batch are mixed with each other."""
    batches = recipe.batches(X, seed, device)
    return MixedBatches(batches, kind, micro_batch_size=recipe.micro_batch_size, seed=seed)


# --- How many images ----------------------------------------------------------------------------


def at_least_a_tenth(y):
    """A ``sampling_strategy``: each class gets at least a tenth of the largest class's images."""
    classes, sizes = np.unique(y, return_counts=True)
    fewest = math.ceil(sizes.max() / 10)
    return {int(c): max(int(size), fewest) for c, size in zip(classes, sizes, strict=True)}


# --- The methods --------------------------------------------------------------------------------


def _stable(match="spectrum", share=0.4):
    return StableDiffusionOverSampler(
        sampling_strategy=partial(source_balanced_strategy, share=share), match=match
    )


def _gan(match="spectrum"):
    return GANOverSampler(sampling_strategy=source_balanced_strategy, match=match)


def _phases(fraction, real_last=0.0):
    """A constant synthetic fraction of each batch, and none in the last part of the training."""
    return ((1 - real_last, fraction), (1.0, 0.0)) if real_last else ((1.0, fraction),)


def _by_source(what, fraction, real_last=0.0, **options):
    batches = partial(SourceBatches, phases=_phases(fraction, real_last))
    return Method(what=what, **{"sampler": _stable(), "loss": adjusted, "batches": batches} | options)


IMAGE_FREE = {
    "plain": Method(what="cross-entropy"),
    "class-balanced": Method(what="class-balanced weights", loss=class_balanced),
    "class-balanced-deferred": Method(
        what="class-balanced weights in the last fifth", loss=partial(class_balanced, deferred_until=0.8)
    ),
    "ldam-deferred": Method(what="LDAM with deferred re-weighting", loss=ldam, cosine_head=True),
    "augmented": Method(what="mild augmentation of the rare class, cross-entropy", sampler=AugmentationOverSampler()),
    "augmented-black-corners": Method(
        what="mild augmentation of the rare class with black corners, cross-entropy", sampler=AugmentationOverSampler(preset="mild-black-corners")
    ),
    "augmented-spectrum": Method(
        what="mild augmentation of the rare class, spectrum matched", sampler=AugmentationOverSampler(match="spectrum")
    ),
    "smote": Method(what="SMOTE of the rare class, cross-entropy", sampler=PixelOverSampler(SMOTE())),
    "last-layer": Method(what="cross-entropy, last layer retrained on balanced classes", finish=retrain_last_layer),
    "adjusted-after-training": Method(what="cross-entropy, logits adjusted after training", finish=adjust_logits),
    "mixup": Method(what="mixup", batches=partial(mixed, kind="mixup")),
    "mixup-last-layer": Method(
        what="mixup, last layer retrained on balanced classes",
        batches=partial(mixed, kind="mixup"), finish=retrain_last_layer,
    ),
    "adjusted": Method(what="logit-adjusted loss (balanced softmax)", loss=adjusted),
    "adjusted-tau-1.25": Method(what="logit-adjusted loss, tau 1.25", loss=partial(adjusted, tau=1.25)),
    "adjusted-tau-1.5": Method(what="logit-adjusted loss, tau 1.5", loss=partial(adjusted, tau=1.5)),
    "adjusted-oversampled": Method(
        what="logit-adjusted loss, the rare class's images repeated to a tenth of the others'",
        sampler=PixelOverSampler(RandomOverSampler(), sampling_strategy=at_least_a_tenth),
        loss=adjusted_by_all_rows,
    ),
    "copies-quarter-real-last": _by_source(
        "copies of the real images as second source, statistics per source, a quarter copies, the last 15 % without copies", 0.25,
        0.15, sampler=PixelOverSampler(RandomOverSampler(), sampling_strategy=source_balanced_strategy),
    ),
    "adjusted-cutout": Method(what="logit-adjusted loss, cutout of 8 pixels", loss=adjusted, changes={"cutout": 8}),
    "adjusted-mixup": Method(
        what="logit-adjusted loss, mixup", loss=adjusted, batches=partial(mixed, kind="mixup")
    ),
    "adjusted-cutmix": Method(
        what="logit-adjusted loss, CutMix", loss=adjusted, batches=partial(mixed, kind="cutmix")
    ),
    "adjusted-sam": Method(
        what="logit-adjusted loss, sharpness-aware, half of the steps",
        loss=adjusted, changes={"sam_radius": 0.1}, compute=2.0,
    ),
}  # fmt: skip

WITH_STABLE_DIFFUSION = {
    "stable": Method(what="minority only, cross-entropy (the reference's way)", sampler=StableDiffusionOverSampler()),
    "stable-adjusted-after-training": Method(
        what="minority only, cross-entropy, logits adjusted after training",
        sampler=StableDiffusionOverSampler(), finish=adjust_logits,
    ),
    "stable-matched-statistics": Method(
        what="minority only, colours and sharpness matched, cross-entropy",
        sampler=StableDiffusionOverSampler(match="statistics"),
    ),
    "stable-matched-spectrum": Method(
        what="minority only, spectrum matched, cross-entropy", sampler=StableDiffusionOverSampler(match="spectrum")
    ),
    "stable-adjusted": Method(
        what="source-balanced, prior per source (an arm of the study)",
        sampler=_stable(match=None), loss=adjusted,
    ),
    "stable-spectrum": Method(
        what="source-balanced, prior per source, spectrum matched", sampler=_stable(), loss=adjusted
    ),
    "stable-statistics": _by_source(
        "statistics per source, half of each batch synthetic", 0.5, sampler=_stable(match=None)
    ),
    "stable-spectrum-half": _by_source("spectrum, statistics per source, half synthetic", 0.5),
    "stable-spectrum-quarter": _by_source("spectrum, statistics per source, a quarter synthetic", 0.25),
    "stable-spectrum-half-real-last": _by_source(
        "spectrum, statistics per source, half synthetic, the last 15 % real only", 0.5, 0.15
    ),
    "stable-spectrum-quarter-real-last": _by_source(
        "spectrum, statistics per source, a quarter synthetic, the last 15 % real only", 0.25, 0.15
    ),
    "stable-quarter-real-last": _by_source(
        "statistics per source, a quarter synthetic, the last 15 % real only, spectrum not matched", 0.25, 0.15,
        sampler=_stable(match=None),
    ),
    "stable-spectrum-quarter-real-last-shared-statistics": _by_source(
        "spectrum, a quarter synthetic, the last 15 % real only, statistics of both sources together", 0.25, 0.15,
        batches=partial(SourceBatches, phases=_phases(0.25, 0.15), statistics_per_source=False),
    ),
    "stable-spectrum-quarter-real-last-not-adjusted": _by_source(
        "spectrum, statistics per source, a quarter synthetic, the last 15 % real only, cross-entropy", 0.25, 0.15,
        loss=None,
    ),
    "stable-placebo-real-last": _by_source(
        "spectrum, statistics per source, a quarter synthetic, the last 15 % real only, synthetic labels shuffled",
        0.25, 0.15, shuffled=True,
    ),
    "stable-spectrum-quarter-real-last-tau-1.25": _by_source(
        "spectrum, statistics per source, a quarter synthetic, the last 15 % real only, tau 1.25", 0.25, 0.15,
        loss=partial(adjusted, tau=1.25),
    ),
    "stable-spectrum-quarter-real-last-real-prior": _by_source(
        "spectrum, statistics per source, a quarter synthetic, the last 15 % real only, real prior for all", 0.25, 0.15,
        loss=partial(adjusted, real_prior_for_all=True),
    ),
    "stable-spectrum-eighth-real-last": _by_source(
        "spectrum, statistics per source, an eighth synthetic, the last 15 % real only", 0.125, 0.15
    ),
    "stable-spectrum-half-real-half": _by_source(
        "spectrum, statistics per source, half synthetic, the second half of the steps real only", 0.5, 0.5
    ),
    "stable-spectrum-all-classes": _by_source(
        "spectrum, statistics per source, a quarter synthetic, all classes alike, the last 15 % real only", 0.25, 0.15,
        sampler=_stable(share=1.0),
    ),
    "stable-spectrum-light": _by_source(
        "spectrum, statistics per source, half synthetic with weight 0.3, the last 15 % real only", 0.5, 0.15,
        batches=partial(SourceBatches, phases=_phases(0.5, 0.15), synthetic_weight=0.3),
    ),
    "stable-spectrum-pasted": Method(
        what="spectrum, a box of a synthetic image in a quarter of the real ones (CMO), the last 15 % real only",
        sampler=_stable(), loss=adjusted, batches=partial(pasted, kind="cutmix"),
    ),
    "stable-spectrum-mixed": Method(
        what="spectrum, mixup of a synthetic image and a quarter of the real ones, the last 15 % real only",
        sampler=_stable(), loss=adjusted, batches=partial(pasted, kind="mixup"),
    ),
    "stable-spectrum-nearest": _by_source(
        "spectrum, statistics per source, a quarter synthetic: the half nearest to the real ones, the last 15 % real only", 0.25,
        0.15, choose=nearest_to_prototypes, compute=1 + CHOOSING_STEPS,
    ),
    "stable-spectrum-uncertain": _by_source(
        "spectrum, statistics per source, a quarter synthetic: the half that is least certain, the last 15 % real only", 0.25,
        0.15, choose=most_uncertain, compute=1 + CHOOSING_STEPS,
    ),
    "stable-placebo": _by_source(
        "spectrum, statistics per source, a quarter synthetic, synthetic labels shuffled", 0.25, shuffled=True
    ),
}  # fmt: skip

WITH_GAN = {
    "gan-adjusted": Method(what="source-balanced, prior per source", sampler=_gan(match=None), loss=adjusted),
    "gan-spectrum": Method(
        what="source-balanced, prior per source, spectrum matched", sampler=_gan(), loss=adjusted
    ),
    "gan-spectrum-quarter-real-last": _by_source(
        "spectrum, statistics per source, a quarter synthetic, the last 15 % real only", 0.25, 0.15, sampler=_gan()
    ),
    "gan-spectrum-eighth-real-last": _by_source(
        "spectrum, statistics per source, an eighth synthetic, the last 15 % real only", 0.125, 0.15, sampler=_gan()
    ),
    "gan-spectrum-half-real-half": _by_source(
        "spectrum, statistics per source, half synthetic, the second half of the steps real only", 0.5, 0.5,
        sampler=_gan(),
    ),
    "gan-spectrum-pasted": Method(
        what="spectrum, a box of a synthetic image in a quarter of the real ones (CMO), the last 15 % real only",
        sampler=_gan(), loss=adjusted, batches=partial(pasted, kind="cutmix"),
    ),
    "gan-placebo": _by_source(
        "spectrum, statistics per source, a quarter synthetic, synthetic labels shuffled", 0.25, sampler=_gan(), shuffled=True
    ),
}  # fmt: skip

METHODS = IMAGE_FREE | WITH_STABLE_DIFFUSION | WITH_GAN


def find_method(name):
    """Return the method of that name, or raise ValueError with the valid names."""
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}. Choose one of {', '.join(METHODS)}.")
    return METHODS[name]

"""Oversampling with a class-conditional GAN for 32x32 images, trained here from the ground up.

    run = train_gan(X, y, GANSettings(steps=2000), seed=0)         # X, y: the imbalanced training set
    images = sample_images(run.generator, [3] * 100, seed=0)       # 100 generated cats
    X_res, y_res = GANOverSampler(generator=run.generator, random_state=0).fit_resample(X, y)

The networks are in ``GANNetworks.py``, one training step with its settings in ``GANTrainingStep.py``, both with
their papers.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from Checkpoints import Checkpoint
from Checks import check_images
from FiniteNumbers import require_finite
from GANNetworks import (
    Generator,
    check_sampling,
    load_generator,
    sample_images,
    settle_statistics,
)
from GANTrainingStep import (
    Adversaries,
    BalancedBatches,
    GANSettings,
    check_image_size,
    check_settings,
    check_training_data,
)
from ImageOverSampler import ImageOverSampler
from Precision import precision_name
from Repeatability import checksum, derive_seed, deterministic_convolutions
from Runtime import choose_device

# --- Training -----------------------------------------------------------------------------------

DEAD_LOSS = 1e-3  # a discriminator below it tells every image apart and teaches nothing
DEAD_STEPS = 500
CHECK_EVERY = 50  # steps; reading a value each step would make a GPU wait
LOWER_RATES = "Lower both learning rates; the weights of the last checkpoint are finite."


class GANCollapseError(RuntimeError):
    """The two networks no longer teach each other; the message says how that showed."""


@dataclass(frozen=True)
class GANRun:
    """Outcome of :func:`train_gan`.

    Attributes
    ----------
    generator : Generator
        The averaged one, of the record with the best quality. Without a quality measure it is the last one.
    discriminator : Discriminator
        The last one.
    history : list of dict
        One dict for each record: ``step`` and ``images_seen`` (training steps and real images so far),
        ``batch_size``, ``skipped_steps`` (updates since the last record that were left out because a float16
        gradient overflowed), ``discriminator_loss``, ``generator_loss``, ``score_of_real``, ``score_of_generated``
        (means since the last record), ``quality`` (None without a measure), ``seconds`` (of training since
        the last record), ``seconds_of_quality`` (of evaluating the averaged generator).
    snapshots : ndarray of uint8, shape (records, classes, 32, 32, 3)
        One image of each class by the averaged generator at each record, from the same latents each time.
    best_step : int
        Number of training steps after which ``generator`` was taken.
    """

    generator: Generator
    discriminator: torch.nn.Module
    history: list
    snapshots: np.ndarray
    best_step: int


def train_gan(X, y, settings, *, seed, num_classes=None, quality=None, checkpoint=None, device=None):
    """Train a class-conditional GAN on labelled images.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, 32, 32, 3)
        The only images that training ever sees.
    y : ndarray of int, shape (n,)
    settings : GANSettings
    seed : int
        Seed of initial weights, batches, augmentation and latents.
    num_classes : int, optional
        Default: one more than the largest label.
    quality : callable, optional
        ``quality(images, labels) -> float``, smaller is better, for uint8 images (m, 32, 32, 3) with
        equally many of each class. It chooses which record's generator is returned, so it must be
        made from training data alone. Its ``description``, if it has one, tells it from other measures in
        checkpoints. If it fails, the training stops; a run with the same checkpoint continues with the measurement.
    checkpoint : path, optional
        File that is written at each record. A run killed at any moment continues from it to the same
        generator. The last one holds the finished run: remove it when the outcome is saved.
    device : str or torch.device, optional
        Default: the fastest there is.

    Returns
    -------
    GANRun

    Raises
    ------
    TypeError, ValueError
        If an array has another dtype or shape, a setting is too small, a class has fewer than 2 images, a
        quality is not finite, or the checkpoint is damaged or belongs to another training.
    OSError
        If the checkpoint cannot be written. That is noticed before the training.
    MemoryError
        If the machine has too little memory for the batches or the judged images.
    DeviceFaults.DeviceFaultError
        If the device fails or has too little memory. The last checkpoint stays.
    GANCollapseError
        If a loss or weight is not finite, the discriminator's stays near zero, or the generator makes the same
        image of a class whatever the latent. The last checkpoint stays.
    """
    X, y = map(np.ascontiguousarray, check_images(X, y))
    num_classes = check_training_data(X, y, num_classes)
    check_settings(settings, len(np.unique(y)) if quality else 0)
    seed, device = int(seed), choose_device(device)
    adversaries = Adversaries(num_classes, settings, seed, device)
    batches = BalancedBatches(X, y, device, settings.flip)
    for network in (adversaries.generator, adversaries.average):
        network.trained_classes[batches.classes] = True
    data = {"num_classes": num_classes, "checksum": checksum(y, X), "judged": quality is not None}
    # Going on in another type would give other weights, going on with another measure a mixed history.
    newer = {"precision": precision_name(device), "measure": getattr(quality, "description", None)}
    checkpoint = Checkpoint(
        checkpoint, {**dataclasses.asdict(settings), "seed": seed, **data, **newer}, defaults=newer
    )
    checkpoint.require_writable()
    progress, unjudged = _resume(checkpoint, adversaries)
    record_steps = {max(1, settings.steps * k // settings.records) for k in range(1, settings.records + 1)}

    with (
        checkpoint.device_faults("The training of the GAN"),
        tqdm(
            total=settings.steps,
            initial=(unjudged or {}).get("step", progress.step),
            desc="training the GAN",
            unit="step",
            mininterval=2,
        ) as bar,
        deterministic_convolutions(),
    ):
        for end in sorted(step for step in record_steps if step > progress.step):
            record = unjudged or _train_until(end, adversaries, batches, seed, progress, bar)
            unjudged = None
            _add_record(record, adversaries, batches.classes, seed, quality, progress, checkpoint)
            losses = record["discriminator_loss"], record["generator_loss"]
            bar.set_postfix(D=losses[0], G=losses[1], quality=progress.history[-1]["quality"])
    generator, best = adversaries.average, progress.best
    generator.load_state_dict(best["state"])
    snapshots = torch.stack(progress.snapshots).numpy()
    return GANRun(generator, adversaries.discriminator.eval(), progress.history, snapshots, best["step"])


@dataclass
class _Progress:
    """What a training remembers beside its networks: a checkpoint holds both."""

    history: list = field(default_factory=list)
    snapshots: list = field(default_factory=list)  # of tensors, which a checkpoint can hold
    best: dict | None = None  # step, quality and weights of the best record
    dead_steps: int = 0  # in a row, up to now, in which the discriminator's loss was below DEAD_LOSS

    @property
    def step(self):
        return self.history[-1]["step"] if self.history else 0

    def add(self, record, snapshot):
        self.history.append(record)
        self.snapshots.append(snapshot)

    def keep_if_best(self, generator):
        """Remember the weights of the last record, if it is the best one."""
        step, quality = self.history[-1]["step"], self.history[-1]["quality"]
        if self.best is None or quality is None or quality < self.best["quality"]:
            weights = {name: value.detach().cpu().clone() for name, value in generator.state_dict().items()}
            self.best = {"step": step, "quality": quality, "state": weights}


def _resume(checkpoint, adversaries):
    """The progress that the checkpoint holds, else a new one; the networks continue from the same point.

    Also returned is the last record, taken out of the progress, if its quality could not be measured; else None.
    """
    names = [f.name for f in dataclasses.fields(_Progress)]
    content = checkpoint.load("adversaries", *names)
    if content is None:
        return _Progress(), None
    try:
        adversaries.load_state_dict(content["adversaries"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"The networks in the checkpoint {checkpoint.path} are built differently. Remove it to start "
            "again."
        ) from error
    progress, unjudged = _Progress(*(content[name] for name in names)), None
    for weights in (adversaries.network_weights(), (progress.best or {}).get("state", {})):
        require_finite(weights, f"Weights in the checkpoint {checkpoint.path}", "Remove it to start again.")
    quality = progress.history[-1]["quality"]
    if quality is not None and not math.isfinite(quality):
        unjudged = progress.history.pop()
        progress.snapshots.pop()
    return progress, unjudged


def _train_until(end, adversaries, batches, seed, progress, bar):
    """Do the training steps up to number ``end``; return the first part of the record."""
    started, first, settings = time.perf_counter(), progress.step, adversaries.settings
    skipped = adversaries.skipped_steps
    sums = torch.zeros(4, device=adversaries.device)
    dead_steps = torch.tensor(progress.dead_steps, device=adversaries.device)
    for step in range(first, end):
        values = adversaries.step(batches, step, seed)
        sums += values
        dead_steps = torch.where(values[0] < DEAD_LOSS, dead_steps + 1, 0)
        bar.update()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == end:
            _check_losses(sums, dead_steps, step + 1)
    if not all(weights.isfinite().all() for weights in adversaries.network_weights().values()):
        raise GANCollapseError(f"A weight of the GAN stopped being finite by step {end}. {LOWER_RATES}")
    progress.dead_steps = int(dead_steps)
    names = "discriminator_loss", "generator_loss", "score_of_real", "score_of_generated"
    return {
        "step": end,
        "images_seen": end * settings.batch_size * settings.discriminator_steps,
        "batch_size": settings.batch_size,
        "skipped_steps": adversaries.skipped_steps - skipped,
        **dict(zip(names, (sums / (end - first)).tolist(), strict=True)),
        "seconds": time.perf_counter() - started,
    }


def _check_losses(sums, dead_steps, step):
    if not sums.isfinite().all():
        raise GANCollapseError(f"A loss of the GAN stopped being finite by step {step}. {LOWER_RATES}")
    if dead_steps >= DEAD_STEPS:
        raise GANCollapseError(
            f"The discriminator's loss was below {DEAD_LOSS} for {dead_steps} steps up to step {step}: it "
            "tells every generated image from a real one, and the generator learns nothing from it. Lower "
            "discriminator_learning_rate or raise augmentation."
        )


def _add_record(record, adversaries, classes, seed, quality, progress, checkpoint):
    """Evaluate the averaged generator, complete the record by what was found, and write the checkpoint."""
    started, step = time.perf_counter(), record["step"]
    snapshot = _settle_and_sample(adversaries.average, classes, seed, step)
    try:
        score = None if quality is None else _judge(adversaries, classes, seed, step, quality)
    except Exception:
        # The steps are not lost: with the same checkpoint, the next run judges first.
        progress.add(record | {"quality": math.nan, "seconds_of_quality": 0.0}, snapshot)
        checkpoint.save(**vars(progress), adversaries=adversaries.state_dict())
        raise
    progress.add(record | {"quality": score, "seconds_of_quality": time.perf_counter() - started}, snapshot)
    progress.keep_if_best(adversaries.average)
    checkpoint.save(**vars(progress), adversaries=adversaries.state_dict())


def _settle_and_sample(generator, classes, seed, step):
    """Make the averaged generator ready to sample; return its snapshot."""
    settle_statistics(generator, classes.repeat(-(-64 // len(classes))), derive_seed(seed, 2))
    return _snapshot(generator, classes, seed, step)


def _judge(adversaries, classes, seed, step, quality):
    """The quality of the averaged generator, a finite float."""
    labels = np.resize(classes.cpu().numpy(), adversaries.settings.quality_images)
    images = sample_images(adversaries.average, labels, seed=derive_seed(seed, 3))
    score = float(quality(images, labels))
    cure = "Repair the measure, then run again: a checkpoint keeps every training step."
    require_finite(score, f"The quality measured at step {step} is {score}", cure)
    return score


def _snapshot(generator, classes, seed, step):
    """One image of each class from a fixed latent; raises if the latent makes no difference to a class."""
    several = 8
    images = sample_images(generator, classes.cpu().numpy().repeat(several), seed=derive_seed(seed, 4))
    images = images.reshape(len(classes), several, *images.shape[1:])
    constant = (images == images[:, :1]).all(axis=(1, 2, 3, 4))
    if constant.any():
        raise GANCollapseError(
            f"By step {step} the generator makes the same image of class "
            f"{', '.join(map(str, classes.cpu()[constant].tolist()))} whatever the latent. Lower its "
            "learning rate in the settings, or train with another seed."
        )
    return torch.from_numpy(images[:, 0].copy())


# --- The sampler --------------------------------------------------------------------------------


class GANOverSampler(ImageOverSampler):
    """Append generated images of the smaller classes.

    Parameters
    ----------
    generator : Generator or path, optional
        A trained one, or the file that :func:`GANNetworks.save_generator` wrote. It must have been trained on
        exactly the classes of ``y``. Default: ``fit`` or ``fit_resample`` trains one on the given images and
        keeps it as ``generator_``, unless no class needs images. It is trained again only for other images, other
        ``settings`` or another seed.
    settings : GANSettings, optional
        For the training. Default: ``GANSettings()``, about 45 minutes on one CPU core with bfloat16.
    truncation : float, optional
        See :func:`GANNetworks.sample_images`.
    sampling_strategy : str, dict or callable, default 'auto'
        As in imbalanced-learn: see :class:`ImageOverSampler.ImageOverSampler`.
    random_state : int, RandomState instance or None, default None
        Seed of the generated images. An integer is the training's seed too; otherwise that is 0.
    match : {None, 'spectrum', 'statistics'}, default None
        See :class:`ImageOverSampler.ImageOverSampler`.
    device : str or torch.device, optional
        Where a generator is trained, or loaded from a file. Default: the fastest there is. A given Generator
        stays where it is.

    Raises
    ------
    TypeError, ValueError
        In ``fit`` and ``fit_resample``, for images that are not uint8 of 32x32 pixels, a generator of other
        classes than ``y``'s, a class with fewer than 2 images to train on, or labels that are no class numbers.
    MemoryError
        If the machine has too little memory for the images that are wanted. Nothing is trained then.
    """

    def __init__(
        self,
        *,
        generator=None,
        settings=None,
        truncation=None,
        sampling_strategy="auto",
        random_state=None,
        match=None,
        device=None,
    ):
        super().__init__(sampling_strategy=sampling_strategy, random_state=random_state, match=match)
        self.generator = generator
        self.settings = settings
        self.truncation = truncation
        self.device = device

    def fit(self, X, y):
        """Train the generator, or load and check the given one. Return the sampler itself.

        Parameters
        ----------
        X : ndarray of uint8, shape (n, 32, 32, 3)
        y : ndarray of integers, shape (n,)
        """
        super().fit(X, y)
        self._prepare(*check_images(X, y))
        return self

    def _prepare(self, X, y):
        check_image_size(X)
        settings = GANSettings() if self.settings is None else self.settings
        check_settings(settings)
        check_sampling(sum(self.sampling_strategy_.values()), settings.latent_size, self.truncation)
        if self.generator is None:
            if not any(self.sampling_strategy_.values()):
                return  # a training would be for nothing
            seed = self.random_state if isinstance(self.random_state, (int, np.integer)) else 0
            training = checksum(y, X), settings, int(seed)
            if getattr(self, "_training", None) != training:
                self.generator_ = train_gan(X, y, settings, seed=seed, device=self.device).generator
                self._training = training
            return
        given, self._training = self.generator, None
        self.generator_ = given if isinstance(given, Generator) else load_generator(given, self.device)
        known, classes = self.generator_.known_classes(), np.unique(y)
        if not np.array_equal(known, classes):
            raise ValueError(
                f"The generator was trained on {len(known)} classes ({', '.join(map(str, known))}), but y "
                f"has {len(classes)} ({', '.join(map(str, classes))}). Train one on this data."
            )

    def _fit_resample(self, X, y):
        self._prepare(X, y)
        return super()._fit_resample(X, y)

    def _make_images(self, X, c, count, seed):
        return sample_images(self.generator_, [c] * count, seed=seed, truncation=self.truncation)

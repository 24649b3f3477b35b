"""Oversampling with a class-conditional GAN for 32x32 images, trained here from the ground up.

    run = train_gan(X, y, GANSettings(steps=2000), seed=0)         # X, y: the imbalanced training set
    images = sample_images(run.generator, [3] * 100, seed=0)       # 100 generated cats
    X_res, y_res = GANOverSampler(generator=run.generator, random_state=0).fit_resample(X, y)

The networks are in ``GANNetworks.py``. The discriminator sees every class equally often; otherwise it would
hardly meet the 50 images of a rare class. It sees every image, real or generated, through a differentiable
augmentation; otherwise it would learn those 50 by heart. All images lie on the device as one uint8 tensor.

References
----------
Goodfellow et al. (2014), Generative adversarial nets. Miyato et al. (2018), Spectral normalization for
generative adversarial networks. Lim and Ye (2017), Geometric GAN (the hinge loss). Heusel et al. (2017), GANs
trained by a two time-scale update rule. Zhang et al. (2019), Self-attention generative adversarial networks.
"""

import dataclasses
import time
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from GANNetworks import (
    IMAGE_SIZE,
    Discriminator,
    Generator,
    diff_augment,
    load_generator,
    sample_images,
    settle_statistics,
    update_average,
)
from ImageOverSampler import ImageOverSampler, TooFewImagesError
from Runtime import (
    Checkpoint,
    check_images,
    checksum,
    choose_device,
    derive_seed,
    deterministic_convolutions,
    mixed_precision,
    seeded,
)

# --- Settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GANSettings:
    """How to train a GAN.

    Attributes
    ----------
    steps : int
        Generator updates.
    batch_size : int
        Real images in each discriminator update. There are as many generated ones.
    channels : int
        Of the generator at 32x32. The discriminator has twice as many at 16x16.
    latent_size : int
        Numbers that an image is made from: 128 as in Miyato et al. (2018).
    generator_learning_rate, discriminator_learning_rate : float
        Of Adam with betas 0 and 0.9. They fall linearly to 0. Both follow Miyato et al. (2018). With one
        discriminator update in a step, the discriminator's rate is the larger one, so that it keeps up
        (Heusel et al. 2017). In Zhang et al. (2019) it is 4 times the generator's.
    discriminator_steps : int
        Discriminator updates per generator update, which uses the last one's generated images.
    ema_decay : float
        Of the averaged generator. It is smaller at first: see :func:`GANNetworks.update_average`.
    augmentation : float
        Strength of :func:`GANNetworks.diff_augment`, from 0 to 1.
    flip : bool
        Whether each real image is mirrored left to right with probability one half.
    records : int
        How many records the history has. The checkpoint is written with each one.
    quality_images : int
        Images generated for each evaluation of quality.
    """

    steps: int = 20000
    batch_size: int = 32
    channels: int = 32
    latent_size: int = 128
    generator_learning_rate: float = 2e-4
    discriminator_learning_rate: float = 4e-4
    discriminator_steps: int = 1
    ema_decay: float = 0.999
    augmentation: float = 1.0
    flip: bool = True
    records: int = 16
    quality_images: int = 5000


def _check_settings(settings, num_classes):
    ones = dict.fromkeys(("steps", "channels", "latent_size", "discriminator_steps", "records"), 1)
    for name, least in (ones | {"batch_size": 4, "quality_images": num_classes}).items():
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be at least {least}: got {getattr(settings, name)}.")


# --- Data ---------------------------------------------------------------------------------------


class BalancedBatches:
    """Real images on the device, drawn so that every class comes equally often.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, 32, 32, 3)
    y : ndarray of int64, shape (n,)
    device : torch.device
    flip : bool
        Whether each drawn image is mirrored left to right with probability one half.

    Attributes
    ----------
    classes : int64 tensor, shape (classes in y,)
        The class numbers that occur in ``y``, in ascending order, on the device.
    """

    def __init__(self, X, y, device, flip):
        classes, counts = np.unique(y, return_counts=True)
        order = np.argsort(y, kind="stable")
        self.images = torch.from_numpy(X[order]).to(device).permute(0, 3, 1, 2)
        self.classes, self.counts, self.starts = (
            torch.from_numpy(values).to(device) for values in (classes, counts, np.cumsum(counts) - counts)
        )
        self.device, self.flip = device, flip

    def draw(self, size, random):
        """Draw one batch.

        Parameters
        ----------
        size : int
            If it is no multiple of the number of classes, some classes, drawn each time, come once more.
        random : torch.Generator
            On the images' device.

        Returns
        -------
        images : float32 tensor, shape (size, 3, 32, 32)
            From -1 to 1.
        labels : int64 tensor, shape (size,)
        """
        first = torch.randint(len(self.classes), (1,), generator=random, device=self.device)
        index = (first + torch.arange(size, device=self.device)) % len(self.classes)
        u = torch.rand(size, generator=random, device=self.device, dtype=torch.float32)
        within = (u * self.counts[index]).long().clamp(max=self.counts[index] - 1)
        images = self.images[self.starts[index] + within].float() / 127.5 - 1
        if self.flip:
            mirrored = torch.rand(size, generator=random, device=self.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, self.classes[index]


def _check_image_size(X):
    if X.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"The GAN makes images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, but X has the shape {X.shape}. "
            "Resize X."
        )


def _check_training_data(X, y, num_classes):
    _check_image_size(X)
    if y.min() < 0 or y.max() >= num_classes or num_classes < 2:
        raise ValueError(
            f"Labels run from {y.min()} to {y.max()}, but a GAN of {num_classes} classes needs 2 classes or "
            f"more, numbered 0 to {num_classes - 1}."
        )
    classes, counts = np.unique(y, return_counts=True)
    if counts.min() < 2:
        raise TooFewImagesError(
            f"Class {classes[counts.argmin()]} has one image. A GAN can only copy it. Give at least 2, or "
            "use AugmentationOverSampler."
        )


# --- One training step --------------------------------------------------------------------------


class Adversaries:
    """Generator, discriminator, their optimisers and the generator's moving average.

    Parameters
    ----------
    num_classes : int
    settings : GANSettings
    seed : int
        Of the initial weights.
    device : torch.device
    """

    NETWORKS = "generator", "discriminator", "average"

    def __init__(self, num_classes, settings, seed, device):
        self.settings, self.device = settings, device
        with seeded(derive_seed(seed, 0)):
            generator = Generator(num_classes, settings.latent_size, settings.channels)
            discriminator = Discriminator(num_classes, settings.channels)
        self.generator = generator.to(device=device, memory_format=torch.channels_last)
        self.discriminator = discriminator.to(device=device, memory_format=torch.channels_last)
        self.average = deepcopy(self.generator).requires_grad_(False).eval()
        self.rates = settings.generator_learning_rate, settings.discriminator_learning_rate
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.9), fused=True)
            for network, rate in zip((self.generator, self.discriminator), self.rates, strict=True)
        ]

    def step(self, batches, step, seed):
        """Update the discriminator, then the generator, then its average.

        The generator is updated with the images of the last discriminator update, augmented again.

        Parameters
        ----------
        batches : BalancedBatches
        step : int
            Number of this training step, from 0.
        seed : int
            Everything random in the training step follows from it and ``step``.

        Returns
        -------
        float32 tensor, shape (4,)
            Hinge losses of discriminator and generator, mean scores of real and generated images.
        """
        settings = self.settings
        random = torch.Generator(self.device).manual_seed(derive_seed(seed, 1, step))
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / settings.steps)
        update_generator, update_discriminator = self.optimizers
        self.generator.train()
        self.discriminator.train().requires_grad_(True)
        shape = (settings.batch_size, settings.latent_size)
        for number in range(1, settings.discriminator_steps + 1):
            real, labels = batches.draw(settings.batch_size, random)
            latents = torch.randn(shape, generator=random, device=self.device)
            with mixed_precision(self.device):
                with torch.set_grad_enabled(number == settings.discriminator_steps):
                    generated = self.generator(latents, labels)
                shown = diff_augment(torch.cat([real, generated.detach()]), random, settings.augmentation)
                scores = self.discriminator(shown, torch.cat([labels, labels]))
            of_real, of_generated = scores.chunk(2)
            discriminator_loss = F.relu(1 - of_real).mean() + F.relu(1 + of_generated).mean()
            update_discriminator.zero_grad(set_to_none=True)
            discriminator_loss.backward()
            update_discriminator.step()

        self.discriminator.requires_grad_(False)
        with mixed_precision(self.device):
            shown = diff_augment(generated, random, settings.augmentation)
            generator_loss = -self.discriminator(shown, labels).mean()
        update_generator.zero_grad(set_to_none=True)
        generator_loss.backward()
        update_generator.step()
        update_average(self.average, self.generator, step, settings.ema_decay)
        return torch.stack([discriminator_loss, generator_loss, of_real.mean(), of_generated.mean()]).detach()

    def state_dict(self):
        """Everything that training changes: three networks and two optimisers."""
        networks = {name: getattr(self, name).state_dict() for name in self.NETWORKS}
        return networks | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state):
        """Take over what :meth:`state_dict` returned."""
        for name in self.NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)


def count_flops(settings, num_classes=10):
    """Floating-point operations of one training step (a multiplication and an addition are two).

    Parameters
    ----------
    settings : GANSettings
    num_classes : int, default 10

    Returns
    -------
    int
    """
    cpu, few = torch.device("cpu"), dataclasses.replace(settings, batch_size=2)
    X = np.zeros((num_classes, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    batches = BalancedBatches(X, np.arange(num_classes), cpu, flip=False)
    adversaries = Adversaries(num_classes, few, 0, cpu)
    with FlopCounterMode(display=False) as counter:
        adversaries.step(batches, 0, 0)
    # The operations are proportional to the batch.
    return counter.get_total_flops() * settings.batch_size // few.batch_size


# --- Training -----------------------------------------------------------------------------------

DEAD_LOSS = 1e-3  # a discriminator below it tells every image apart and teaches nothing
DEAD_STEPS = 500
CHECK_EVERY = 50  # steps; reading a value each step would make a GPU wait


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
        ``batch_size``, ``discriminator_loss``, ``generator_loss``, ``score_of_real``, ``score_of_generated``
        (means since the last record), ``quality`` (None without a measure), ``seconds`` (of training since
        the last record), ``seconds_of_quality`` (of evaluating the averaged generator).
    snapshots : ndarray of uint8, shape (records, classes, 32, 32, 3)
        One image of each class by the averaged generator at each record, from the same latents each time.
    best_step : int
        Number of training steps after which ``generator`` was taken.
    """

    generator: Generator
    discriminator: Discriminator
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
        made from training data alone.
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
        If an array has another dtype or shape, a setting is too small, a class has fewer than 2 images, or
        the checkpoint is damaged or belongs to another training.
    GANCollapseError
        If a loss is not finite, the discriminator's stays near zero, or the generator makes the same
        image of a class whatever the latent. The last checkpoint stays.
    """
    X, y = map(np.ascontiguousarray, check_images(X, y))
    num_classes = int(y.max()) + 1 if num_classes is None else num_classes
    _check_training_data(X, y, num_classes)
    _check_settings(settings, num_classes)
    seed, device = int(seed), choose_device(device)
    adversaries = Adversaries(num_classes, settings, seed, device)
    batches = BalancedBatches(X, y, device, settings.flip)
    for network in (adversaries.generator, adversaries.average):
        network.trained_classes[batches.classes] = True
    data = {"num_classes": num_classes, "checksum": checksum(y, X), "judged": quality is not None}
    checkpoint = Checkpoint(checkpoint, {**dataclasses.asdict(settings), "seed": seed, **data})
    progress = _resume(checkpoint, adversaries)
    record_steps = {max(1, settings.steps * k // settings.records) for k in range(1, settings.records + 1)}

    with (
        tqdm(
            total=settings.steps, initial=progress.step, desc="training the GAN", unit="step", mininterval=2
        ) as bar,
        deterministic_convolutions(),
    ):
        for end in sorted(step for step in record_steps if step > progress.step):
            record = _train_until(end, adversaries, batches, seed, progress, bar)
            started = time.perf_counter()
            snapshot, score = _evaluate(adversaries, batches.classes, seed, end, quality)
            record |= {"quality": score, "seconds_of_quality": time.perf_counter() - started}
            progress.add(record, snapshot, adversaries.average)
            checkpoint.save(**vars(progress), adversaries=adversaries.state_dict())
            bar.set_postfix(D=record["discriminator_loss"], G=record["generator_loss"], quality=score)
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

    def add(self, record, snapshot, generator):
        self.history.append(record)
        self.snapshots.append(snapshot)
        step, quality = record["step"], record["quality"]
        if self.best is None or quality is None or quality < self.best["quality"]:
            weights = {name: value.detach().cpu().clone() for name, value in generator.state_dict().items()}
            self.best = {"step": step, "quality": quality, "state": weights}


def _resume(checkpoint, adversaries):
    """The progress that the checkpoint holds, else a new one; the networks continue from the same point."""
    names = [f.name for f in dataclasses.fields(_Progress)]
    content = checkpoint.load("adversaries", *names)
    if content is None:
        return _Progress()
    try:
        adversaries.load_state_dict(content["adversaries"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"The networks in the checkpoint {checkpoint.path} are built differently. Remove it to start "
            "again."
        ) from error
    return _Progress(*(content[name] for name in names))


def _train_until(end, adversaries, batches, seed, progress, bar):
    """Do the training steps up to number ``end``; return the first part of the record."""
    started, first, settings = time.perf_counter(), progress.step, adversaries.settings
    sums = torch.zeros(4, device=adversaries.device)
    dead_steps = torch.tensor(progress.dead_steps, device=adversaries.device)
    for step in range(first, end):
        values = adversaries.step(batches, step, seed)
        sums += values
        dead_steps = torch.where(values[0] < DEAD_LOSS, dead_steps + 1, 0)
        bar.update()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == end:
            _check_losses(sums, dead_steps, step + 1)
    progress.dead_steps = int(dead_steps)
    names = "discriminator_loss", "generator_loss", "score_of_real", "score_of_generated"
    return {
        "step": end,
        "images_seen": end * settings.batch_size * settings.discriminator_steps,
        "batch_size": settings.batch_size,
        **dict(zip(names, (sums / (end - first)).tolist(), strict=True)),
        "seconds": time.perf_counter() - started,
    }


def _check_losses(sums, dead_steps, step):
    if not sums.isfinite().all():
        raise GANCollapseError(
            f"A loss of the GAN stopped being finite by step {step}. Lower both learning rates; the weights "
            "of the last checkpoint are finite."
        )
    if dead_steps >= DEAD_STEPS:
        raise GANCollapseError(
            f"The discriminator's loss was below {DEAD_LOSS} for {dead_steps} steps up to step {step}: it "
            "tells every generated image from a real one, and the generator learns nothing from it. Lower "
            "discriminator_learning_rate or raise augmentation."
        )


def _evaluate(adversaries, classes, seed, step, quality):
    """Make the averaged generator ready to sample; return its snapshot and its quality, if measured."""
    generator = adversaries.average
    settle_statistics(generator, classes.repeat(-(-64 // len(classes))), derive_seed(seed, 2))
    snapshot = _snapshot(generator, classes, seed, step)
    if quality is None:
        return snapshot, None
    labels = np.resize(classes.cpu().numpy(), adversaries.settings.quality_images)
    images = sample_images(generator, labels, seed=derive_seed(seed, 3))
    return snapshot, float(quality(images, labels))


def _snapshot(generator, classes, seed, step):
    """One image of each class from a fixed latent; raises if the latent makes no difference to a class."""
    several = 8
    images = sample_images(generator, classes.cpu().numpy().repeat(several), seed=derive_seed(seed, 4))
    images = images.reshape(len(classes), several, IMAGE_SIZE, IMAGE_SIZE, 3)
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
        keeps it as ``generator_``. It is trained again only for other images.
    settings : GANSettings, optional
        For the training. Default: ``GANSettings()``, about 50 minutes on two CPU cores.
    truncation : float, optional
        See :func:`GANNetworks.sample_images`.
    sampling_strategy : str, dict or callable, default 'auto'
        As in imbalanced-learn: see :class:`ImageOverSampler.ImageOverSampler`.
    random_state : int, RandomState instance or None, default None
        Seed of the generated images. An integer is the training's seed too; otherwise that is 0.
    device : str or torch.device, optional
        Where a generator is trained, or loaded from a file. Default: the fastest there is. A given Generator
        stays where it is.

    Raises
    ------
    TypeError, ValueError
        In ``fit`` and ``fit_resample``, for images that are not uint8 of 32x32 pixels, a generator of other
        classes than ``y``'s, or a class with fewer than 2 images to train on.
    """

    def __init__(
        self,
        *,
        generator=None,
        settings=None,
        truncation=None,
        sampling_strategy="auto",
        random_state=None,
        device=None,
    ):
        super().__init__(sampling_strategy=sampling_strategy, random_state=random_state)
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
        _check_image_size(X)
        if self.generator is None:
            training_set = checksum(y, X)
            if getattr(self, "_trained_on", None) != training_set:
                seed = self.random_state if isinstance(self.random_state, (int, np.integer)) else 0
                settings = self.settings or GANSettings()
                self.generator_ = train_gan(X, y, settings, seed=seed, device=self.device).generator
                self._trained_on = training_set
            return
        given = self.generator
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

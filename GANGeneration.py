"""Oversampling with a class-conditional GAN for 32x32 images, built and trained here from the ground up.

    run = train_gan(X, y, GAN_SETTINGS["cpu"], seed=0)            # X, y: the imbalanced training set
    images = sample_images(run.generator, [3] * 100, seed=0)       # 100 generated cats
    X_res, y_res = GANOverSampler(generator=run.generator, random_state=0).fit_resample(X, y)

A residual generator with class-conditional batch norm plays against a projection discriminator with
spectral norm. The discriminator sees every image, real or generated, through a differentiable
augmentation, and every class equally often: with 50 images of a class it would otherwise learn them by
heart, or hardly meet them. All images live on the device as one uint8 tensor.

References
----------
Goodfellow et al. (2014), Generative adversarial nets. Miyato et al. (2018), Spectral normalization for
generative adversarial networks. Miyato and Koyama (2018), cGANs with projection discriminator. Lim and
Ye (2017), Geometric GAN (the hinge loss). Zhao et al. (2020), Differentiable augmentation for
data-efficient GAN training. Zhang et al. (2019), Self-attention generative adversarial networks (two
learning rates). Karras et al. (2018), Progressive growing of GANs (averaged generator). Brock et al.
(2019), Large scale GAN training (truncation, standing statistics). Dumoulin et al. (2017), A learned
representation for artistic style (conditional normalisation). Heusel et al. (2017), GANs trained by a
two time-scale update rule. Radford et al. (2016), Unsupervised representation learning with deep
convolutional GANs.
"""

import time
import warnings
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ImageOverSampler import ImageOverSampler
from Runtime import (
    atomic_path,
    check_images,
    checksum,
    choose_device,
    derive_seed,
    describe_differences,
    deterministic_convolutions,
    load_torch_file,
    mixed_precision,
    seeded,
)

IMAGE_SIZE = 32

# --- Generator ----------------------------------------------------------------------------------


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias are looked up by class (Dumoulin et al. 2017).

    Everything else in the generator is shared, so a class with few images borrows from the others
    how fur, wheels and horizons look.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Embedding(num_classes, channels)
        self.bias = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x, labels):
        x = self.norm(x)
        gain, bias = (table(labels).to(x.dtype)[:, :, None, None] for table in (self.gain, self.bias))
        return torch.addcmul(bias, x, gain)


class GeneratorBlock(nn.Module):
    """Residual block that doubles height and width.

    A transposed 4x4 convolution with stride 2 does the work of upsampling and a 3x3 convolution
    (which is one of its special cases) with 4 multiplications a value in place of 9.
    """

    def __init__(self, in_channels, out_channels, num_classes):
        super().__init__()
        self.norm1 = ConditionalBatchNorm(in_channels, num_classes)
        self.conv1 = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
        self.norm2 = ConditionalBatchNorm(out_channels, num_classes)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, labels):
        out = self.conv1(F.relu(self.norm1(x, labels)))
        out = self.conv2(F.relu(self.norm2(out, labels)))
        return out + F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest")


class Generator(nn.Module):
    """Class-conditional residual generator of 32x32 images (after Miyato and Koyama 2018).

    Parameters
    ----------
    num_classes : int
    latent_size : int, default 128
    channels : int, default 32
        At 32x32; twice as many at each halved resolution down to 4x4. Multiples of 16 are fast.

    Attributes
    ----------
    trained_classes : bool tensor, shape (num_classes,)
        The classes that training saw; kept in the state dict.
    """

    def __init__(self, num_classes, latent_size=128, channels=32):
        super().__init__()
        self.num_classes, self.latent_size, self.channels = num_classes, latent_size, channels
        self.register_buffer("trained_classes", torch.zeros(num_classes, dtype=torch.bool))
        widths = [channels * factor for factor in (8, 4, 2, 1)]
        self.project = nn.Linear(latent_size, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(
            GeneratorBlock(a, b, num_classes) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norm = nn.BatchNorm2d(channels)
        self.to_image = nn.Conv2d(channels, 3, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, latents, labels):
        """Images from -1 to 1: (n, latent_size), (n,) int64 -> float32 (n, 3, 32, 32)."""
        x = self.project(latents).view(len(latents), -1, 4, 4)
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, labels)
        return torch.tanh(self.to_image(F.relu(self.norm(x))).float())


# --- Discriminator ------------------------------------------------------------------------------


class DiscriminatorBlock(nn.Module):
    """Residual block that halves height and width, with spectral norm and no batch norm.

    A 4x4 convolution with stride 2 does the work of a 3x3 convolution and 2x2 average pooling
    (which is one of its special cases) with 16 multiplications a pooled value in place of 36.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(in_channels, in_channels, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x):
        out = self.conv1(F.relu(x))
        return self.conv2(F.relu(out)) + self.shortcut(F.avg_pool2d(x, 2))


class Discriminator(nn.Module):
    """Projection discriminator with spectral norm in every layer (after Miyato and Koyama 2018).

    Its output is a score of the image plus the inner product of the image's features with a vector
    of the class: what is real and what is real *for this class* are learned apart, and the first is
    learned from all classes together. At full resolution there is one strided convolution, as in DCGAN
    (Radford et al. 2016), where theirs has a block: that is where the time would go. Two blocks follow.

    Parameters
    ----------
    num_classes : int
    channels : int, default 32
        Twice as many at 16x16, and twice as many again at each halved resolution down to 4x4.
    """

    def __init__(self, num_classes, channels=32):
        super().__init__()
        self.num_classes, self.channels = num_classes, channels
        self.blocks = nn.Sequential(
            spectral_norm(nn.Conv2d(3, 2 * channels, 4, stride=2, padding=1)),
            DiscriminatorBlock(2 * channels, 4 * channels),
            DiscriminatorBlock(4 * channels, 8 * channels),
        )
        self.score = spectral_norm(nn.Linear(8 * channels, 1))
        self.embedding = spectral_norm(nn.Embedding(num_classes, 8 * channels))

    def normalised_layers(self):
        """The layers under spectral norm, in order."""
        return [layer for layer in self.modules() if parametrize.is_parametrized(layer, "weight")]

    def forward(self, images, labels):
        """Scores, high for real: (n, 3, 32, 32) from -1 to 1, (n,) int64 -> float32 (n,)."""
        with parametrize.cached():
            # Each weight is divided by its singular value once, here, in float32: bfloat16 has
            # 8 bits, too few for the power iteration.
            with torch.autocast(images.device.type, enabled=False):
                for layer in self.normalised_layers():
                    layer.weight  # noqa: B018 - reading it fills the cache
            x = self.blocks(images.contiguous(memory_format=torch.channels_last))
            features = F.relu(x).float().sum(dim=(2, 3))
            with torch.autocast(images.device.type, enabled=False):
                return self.score(features)[:, 0] + (self.embedding(labels) * features).sum(dim=1)


# --- Differentiable augmentation ----------------------------------------------------------------


def diff_augment(images, random, strength=1.0):
    """Random colour, translation and cutout through which gradients flow (Zhao et al. 2020).

    Applied to whatever the discriminator sees, real or generated, so that it cannot learn few images
    by heart, and so that the generator does not learn to make augmented ones.

    Parameters
    ----------
    images : float tensor, shape (n, 3, height, width)
        From -1 to 1.
    random : torch.Generator
        On the images' device.
    strength : float from 0 to 1, default 1
        1 is the paper's: brightness by up to 0.5, saturation by up to 100 %, contrast by up to 50 %,
        a shift by up to an eighth of the size (zeros move in), a zeroed square of half the size. 0
        changes nothing.

    Returns
    -------
    float tensor of the same shape
    """
    n, _, height, width = images.shape
    device = images.device

    def uniform(low, high):
        u = torch.rand((n, 1, 1, 1), generator=random, device=device)
        return low + (high - low) * u

    images = images + strength * uniform(-0.5, 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = images + (images - grey) * (strength * uniform(-1, 1))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = images + (images - mean) * (strength * uniform(-0.5, 0.5))

    def shift(size):
        most = round(strength * size / 8)
        moved = torch.randint(-most, most + 1, (n, 1), generator=random, device=device)
        # Row 0 and row size + 1 of the padded image are zeros: what moves in from outside.
        return (torch.arange(1, size + 1, device=device) + moved).clamp(0, size + 1)

    rows, columns = shift(height), shift(width)
    padded = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    picture = torch.arange(n, device=device)[:, None, None]
    images = padded[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def hole(size):
        side = round(strength * size / 2)
        centre = torch.randint(0, size + 1 - side % 2, (n, 1), generator=random, device=device)
        start = centre - side // 2
        place = torch.arange(size, device=device)
        return (place >= start) & (place < start + side)

    holes = hole(height)[:, None, :, None] & hole(width)[:, None, None, :]
    return images.masked_fill(holes, 0)


# --- Settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GANSettings:
    """How to train a GAN.

    Attributes
    ----------
    steps : int
        Generator updates.
    batch_size : int
        Real images, and as many generated ones, of each discriminator update.
    channels : int
        Of the generator at 32x32; the discriminator has twice as many at 16x16.
    latent_size : int
        128 as in Miyato et al. (2018).
    generator_learning_rate, discriminator_learning_rate : float
        Of Adam with beta 0 and 0.9 (Miyato et al. 2018), falling linearly to 0 as there. Where the
        discriminator is updated once a step, its rate is the larger one, so that it keeps up (Heusel et
        al. 2017; 1 to 4 in Zhang et al. 2019).
    discriminator_steps : int
        Discriminator updates per generator update, which uses the last one's generated images.
    ema_decay : float
        Of the averaged generator; smaller in the first steps, see :func:`update_average`.
    augmentation : float
        Strength of :func:`diff_augment`.
    flip : bool
        Whether real images are mirrored at random.
    records : int
        How often the history notes losses and quality, and the checkpoint is written.
    quality_images : int
        Images generated for each judgement of quality.
    """

    steps: int
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


# The compute is far below what a GAN could use. Small networks and batches then give the most updates; widths
# are multiples of 16, where bfloat16 convolutions are fast.
GAN_SETTINGS = {
    "smoke": GANSettings(steps=6, batch_size=20, channels=4, latent_size=16, records=2, quality_images=60),
    "quick": GANSettings(steps=2000, channels=16, records=6, quality_images=2000),
    "cpu": GANSettings(steps=20000),
    # The width, the batch and the two discriminator updates approach Miyato and Koyama's.
    "full": GANSettings(
        steps=60000, batch_size=64, channels=96, discriminator_steps=2,
        discriminator_learning_rate=2e-4, ema_decay=0.9999, records=30, quality_images=10000,
    ),
}  # fmt: skip


# --- Training -----------------------------------------------------------------------------------

DEAD_LOSS = 1e-3  # a discriminator below it tells every image apart and teaches nothing
DEAD_STEPS = 500
CHECK_EVERY = 50  # steps; reading a value each step would make a GPU wait
SMALLEST_BATCH = 4


class GANCollapseError(RuntimeError):
    """The two networks no longer teach each other; the message says how that showed."""


class BalancedBatches:
    """Real images on the device, drawn so that every class comes equally often.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, 32, 32, 3)
    y : ndarray of int64, shape (n,)
    device : torch.device
    flip : bool
        Whether to mirror half of the images left to right.
    """

    def __init__(self, X, y, device, flip):
        classes, counts = np.unique(y, return_counts=True)
        order = np.argsort(y, kind="stable")
        self.images = torch.from_numpy(X[order]).to(device).permute(0, 3, 1, 2)
        self.classes, self.counts, self.starts = (
            torch.from_numpy(values).to(device) for values in (classes, counts, np.cumsum(counts) - counts)
        )
        self.device, self.flip = device, flip

    def labels(self, size, random):
        """Labels with as many of each class as ``size`` allows: int64, shape (size,)."""
        first = torch.randint(len(self.classes), (1,), generator=random, device=self.device)
        return self.classes[(first + torch.arange(size, device=self.device)) % len(self.classes)]

    def draw(self, size, random):
        """Images from -1 to 1, float32 (size, 3, 32, 32), with their labels, int64 (size,)."""
        labels = self.labels(size, random)
        place = torch.searchsorted(self.classes, labels)
        u = torch.rand(size, generator=random, device=self.device, dtype=torch.float32)
        within = (u * self.counts[place]).long().clamp(max=self.counts[place] - 1)
        images = self.images[self.starts[place] + within].float() / 127.5 - 1
        if self.flip:
            mirrored = torch.rand(size, generator=random, device=self.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, labels


@torch.no_grad()
def update_average(average, model, step, decay):
    """Move ``average`` towards ``model``: average = d * average + (1 - d) * model.

    d is ``decay``, but at most (1 + step) / (10 + step), so that the first weights are soon forgotten.

    Parameters
    ----------
    average, model : nn.Module
        Of the same architecture. Buffers are left alone: :func:`settle_statistics` makes them.
    step : int
        From 0.
    decay : float
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - d)


@torch.no_grad()
def settle_statistics(generator, labels, seed, batches=16):
    """Measure anew the means and variances that batch norm uses when sampling.

    Those that were collected while training belong to other weights than the averaged ones. Brock et
    al. (2019) call the new ones standing statistics.

    Parameters
    ----------
    generator : Generator
    labels : int64 tensor, shape (n,)
        On the generator's device; the classes as they are to be mixed.
    seed : int
    batches : int
        How many batches of n images are averaged.
    """
    norms = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    generator.train()
    random = torch.Generator(labels.device).manual_seed(seed)
    for _ in range(batches):
        latents = torch.randn((len(labels), generator.latent_size), generator=random, device=labels.device)
        with mixed_precision(labels.device):
            generator(latents, labels)
    for norm in norms:
        norm.momentum = 0.1
    generator.eval()


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

    def __init__(self, num_classes, settings, seed, device):
        self.settings, self.device = settings, device
        with seeded(derive_seed(seed, 0)):
            generator = Generator(num_classes, settings.latent_size, settings.channels)
            discriminator = Discriminator(num_classes, settings.channels)
        self.generator = generator.to(device=device, memory_format=torch.channels_last)
        self.discriminator = discriminator.to(device=device, memory_format=torch.channels_last)
        self.average = deepcopy(self.generator).requires_grad_(False).eval()
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.9), fused=True)
            for network, rate in (
                (self.generator, settings.generator_learning_rate),
                (self.discriminator, settings.discriminator_learning_rate),
            )
        ]

    def step(self, batches, batch_size, step, seed):
        """Update the discriminator, then the generator, then its average.

        The generator is updated by the images that the discriminator was last updated by, augmented anew:
        they are drawn once.

        Parameters
        ----------
        batches : BalancedBatches
        batch_size : int
        step : int
            Number of this step, from 0.
        seed : int
            Everything random in the step follows from it and ``step``.

        Returns
        -------
        float32 tensor, shape (4,)
            Hinge losses of discriminator and generator, mean scores of real and generated images.
        """
        settings = self.settings
        random = torch.Generator(self.device).manual_seed(derive_seed(seed, 1, step))
        for optimizer, rate in zip(
            self.optimizers,
            (settings.generator_learning_rate, settings.discriminator_learning_rate),
            strict=True,
        ):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / settings.steps)
        update_generator, update_discriminator = self.optimizers
        self.generator.train()
        self.discriminator.train().requires_grad_(True)
        for number in range(1, settings.discriminator_steps + 1):
            real, labels = batches.draw(batch_size, random)
            latents = torch.randn((batch_size, settings.latent_size), generator=random, device=self.device)
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
        return {
            "generator": self.generator.state_dict(), "discriminator": self.discriminator.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }  # fmt: skip

    def load_state_dict(self, state):
        for name in ("generator", "discriminator", "average"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)


def count_flops(settings, num_classes=10):
    """Floating-point operations of one training step (a multiplication and an addition are two)."""
    few = replace(settings, batch_size=2)  # the count is proportional to the batch
    X, y = np.zeros((2 * num_classes, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), np.arange(2 * num_classes)
    device = torch.device("cpu")
    adversaries = Adversaries(num_classes, few, 0, device)
    batches = BalancedBatches(X, y % num_classes, device, flip=False)
    with FlopCounterMode(display=False) as counter:
        adversaries.step(batches, few.batch_size, 0, 0)
    return counter.get_total_flops() * settings.batch_size // few.batch_size


@dataclass(frozen=True)
class GANRun:
    """Outcome of :func:`train_gan`.

    Attributes
    ----------
    generator : Generator
        The averaged one, of the record with the best quality (the last without a quality measure).
    discriminator : Discriminator
        The last.
    history : list of dict
        One per record: ``step``, ``images_seen`` (real ones), ``batch_size``, ``discriminator_loss``,
        ``generator_loss``, ``score_of_real``, ``score_of_generated`` (means since the last record),
        ``quality`` (None without a measure), ``seconds``, ``seconds_of_quality``.
    snapshots : ndarray of uint8, shape (records, classes, 32, 32, 3)
        One fixed latent a class, drawn by the averaged generator at each record.
    best_step : int
        After which step ``generator`` was taken.
    """

    generator: Generator
    discriminator: Discriminator
    history: list
    snapshots: np.ndarray
    best_step: int


def train_gan(
    X, y, settings, *, seed, num_classes=None, quality=None, checkpoint=None, device=None,
    description="training the GAN",
):  # fmt: skip
    """Train a class-conditional GAN on labelled images.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, 32, 32, 3)
        The only images that training ever sees.
    y : ndarray of int, shape (n,)
    settings : GANSettings
    seed : int
        Initial weights, batches, augmentation and latents.
    num_classes : int, optional
        Default: one more than the largest label.
    quality : callable, optional
        ``quality(images, labels) -> float``, smaller is better, for uint8 images (m, 32, 32, 3) with
        equally many of each class. It chooses which record's generator is returned, so it must be
        made from training data alone.
    checkpoint : path, optional
        Written at each record; a run killed at any moment continues from it to the same generator. The
        last one holds the finished run: remove it when its outcome is saved.
    device : str or torch.device, optional
    description : str
        Shown before the progress bar.

    Returns
    -------
    GANRun

    Raises
    ------
    TypeError, ValueError
        For arrays of another dtype or shape, a class with fewer than 2 images, or a checkpoint that
        is damaged or belongs to another run.
    GANCollapseError
        If a loss is not finite, the discriminator's stays near zero, or the generator makes the same
        image of a class whatever the latent. The last checkpoint stays.

    Warns
    -----
    RuntimeWarning
        If the device runs out of memory: the batch is halved from that step on.
    """
    X, y = map(np.ascontiguousarray, check_images(X, y))
    num_classes = int(y.max()) + 1 if num_classes is None else num_classes
    _check_training_data(X, y, num_classes)
    smallest = {
        "steps": 1, "channels": 1, "latent_size": 1, "discriminator_steps": 1, "records": 1,
        "batch_size": SMALLEST_BATCH, "quality_images": num_classes,
    }  # fmt: skip
    for field, least in smallest.items():
        if getattr(settings, field) < least:
            raise ValueError(f"{field} must be at least {least}: got {getattr(settings, field)}.")
    seed, device = int(seed), choose_device(device)
    adversaries = Adversaries(num_classes, settings, seed, device)
    batches = BalancedBatches(X, y, device, settings.flip)
    for network in (adversaries.generator, adversaries.average):
        network.trained_classes[batches.classes] = True

    run = {  # what a checkpoint must agree with
        **asdict(settings), "seed": seed, "num_classes": num_classes,
        "checksum": checksum(y, X), "judged": quality is not None,
    }  # fmt: skip
    history, snapshots, best = [], [], None
    dead_steps = torch.zeros((), device=device, dtype=torch.int64)
    if checkpoint is not None and Path(checkpoint).exists():
        content = load_torch_file(
            checkpoint, {"run", "history", "snapshots", "best", "dead_steps", "adversaries"}
        )
        if differences := describe_differences(content["run"], run):
            raise ValueError(
                f"The checkpoint {checkpoint} belongs to another run ({differences}). Remove it to start anew."
            )
        try:
            adversaries.load_state_dict(content["adversaries"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"The networks in the checkpoint {checkpoint} are built differently. Remove it to start anew."
            ) from error
        history, best = content["history"], content["best"]
        dead_steps += content["dead_steps"]
        snapshots = list(content["snapshots"].numpy())
    step = history[-1]["step"] if history else 0
    batch_size = history[-1]["batch_size"] if history else settings.batch_size
    images_seen = history[-1]["images_seen"] if history else 0
    record_steps = sorted(
        {max(1, settings.steps * k // settings.records) for k in range(1, settings.records + 1)}
    )

    with (
        tqdm(total=settings.steps, initial=step, desc=description, unit="step", mininterval=2) as bar,
        deterministic_convolutions(),
    ):
        for end in (s for s in record_steps if s > step):
            started, first_step = time.perf_counter(), step
            sums = torch.zeros(4, device=device)
            while step < end:
                try:
                    values = adversaries.step(batches, batch_size, step, seed)
                except RuntimeError as error:
                    if not _is_out_of_memory(error) or batch_size < 2 * SMALLEST_BATCH:
                        raise
                    batch_size //= 2
                    warnings.warn(
                        f"The device {device} ran out of memory: the batch is halved to {batch_size} from "
                        f"step {step} on.", RuntimeWarning, stacklevel=2,
                    )  # fmt: skip
                    values = None
                if values is None:  # outside of the except block, which keeps the failed step's tensors alive
                    _free_memory(adversaries, device)
                    continue
                sums += values
                dead_steps = torch.where(values[0] < DEAD_LOSS, dead_steps + 1, 0)
                step += 1
                images_seen += batch_size * settings.discriminator_steps
                bar.update()
                if step % CHECK_EVERY == 0 or step == end:
                    _check_losses(sums, dead_steps, step)
            means = (sums / (step - first_step)).tolist()
            record = {
                "step": step, "images_seen": images_seen, "batch_size": batch_size,
                **dict(zip(
                    ("discriminator_loss", "generator_loss", "score_of_real", "score_of_generated"),
                    means, strict=True,
                )),
                "seconds": time.perf_counter() - started,
            }  # fmt: skip
            started = time.perf_counter()
            settling = batches.classes.repeat(-(-64 // len(batches.classes)))
            settle_statistics(adversaries.average, settling, derive_seed(seed, 2))
            snapshots.append(_snapshot(adversaries.average, batches.classes, seed, step))
            record["quality"] = None
            if quality is not None:
                labels = np.resize(batches.classes.cpu().numpy(), settings.quality_images)
                images = sample_images(adversaries.average, labels, seed=derive_seed(seed, 3))
                record["quality"] = float(quality(images, labels))
            record["seconds_of_quality"] = time.perf_counter() - started
            history.append(record)
            if best is None or record["quality"] is None or record["quality"] < best["quality"]:
                best = {"step": step, "quality": record["quality"], "state": _copy(adversaries.average)}
            bar.set_postfix(
                D=f"{means[0]:.2f}", G=f"{means[1]:.2f}",
                **({} if quality is None else {"quality": f"{record['quality']:.3g}"}),
            )  # fmt: skip
            if checkpoint is not None:
                content = {
                    "run": run, "history": history, "snapshots": torch.from_numpy(np.stack(snapshots)),
                    "best": best, "dead_steps": int(dead_steps), "adversaries": adversaries.state_dict(),
                }  # fmt: skip
                with atomic_path(checkpoint) as temporary:
                    torch.save(content, temporary)
    generator = adversaries.average
    generator.load_state_dict(best["state"])
    return GANRun(generator, adversaries.discriminator.eval(), history, np.stack(snapshots), best["step"])


def _check_training_data(X, y, num_classes):
    if X.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"The GAN makes images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, but X has the shape {X.shape}. Resize X."
        )
    if y.min() < 0 or y.max() >= num_classes or num_classes < 2:
        raise ValueError(
            f"Labels run from {y.min()} to {y.max()}, but a GAN of {num_classes} classes needs 2 classes or "
            f"more, numbered 0 to {num_classes - 1}."
        )
    classes, counts = np.unique(y, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"Class {classes[counts.argmin()]} has one image. A GAN can only copy it: give at least 2, or use "
            "AugmentationOverSampler."
        )


def _check_losses(sums, dead_steps, step):
    if not sums.isfinite().all():
        raise GANCollapseError(
            f"A loss of the GAN stopped being finite by step {step}. Lower both learning rates; the weights "
            "of the last checkpoint are finite."
        )
    if dead_steps >= DEAD_STEPS:
        raise GANCollapseError(
            f"The discriminator's loss was below {DEAD_LOSS} for {dead_steps} steps up to step {step}: it tells "
            "every generated image from a real one, and the generator learns nothing from it. Lower "
            "discriminator_learning_rate or raise augmentation."
        )


def _snapshot(generator, classes, seed, step):
    """One image of each class from a fixed latent; raises if the latent makes no difference to a class."""
    several = 8
    images = sample_images(
        generator, classes.cpu().numpy().repeat(several), seed=derive_seed(seed, 4)
    ).reshape(len(classes), several, IMAGE_SIZE, IMAGE_SIZE, 3)
    constant = (images == images[:, :1]).all(axis=(1, 2, 3, 4))
    if constant.any():
        raise GANCollapseError(
            f"By step {step} the generator makes the same image of class "
            f"{', '.join(map(str, classes.cpu()[constant].tolist()))} whatever the latent. Lower its learning rate in "
            "the settings, or train with another seed."
        )
    return images[:, 0]


def _copy(network):
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def _is_out_of_memory(error):
    # CUDA has a class of its own; MPS and the CPU's allocator raise a plain RuntimeError.
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "not enough memory" in text


def _free_memory(adversaries, device):
    for optimizer in adversaries.optimizers:
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- Sampling -----------------------------------------------------------------------------------


@torch.inference_mode()
def sample_images(generator, labels, *, seed, truncation=None, batch_size=500):
    """Generate one image for each label.

    Parameters
    ----------
    generator : Generator
    labels : sequence of int, shape (n,)
    seed : int
        The same seed gives the same latents, whatever the batch size and device.
    truncation : float, optional
        Draw the latents from a normal distribution cut off beyond this many standard deviations
        (Brock et al. 2019): typical images for less diversity. Default: not cut off.
    batch_size : int, default 500
        Halved, with a warning, if the device runs out of memory.

    Returns
    -------
    ndarray of uint8, shape (n, 32, 32, 3)

    Raises
    ------
    ValueError
        For a label that the generator was not trained on, or a truncation that is not positive.
    """
    labels = np.asarray(labels, dtype=np.int64)
    known = np.flatnonzero(generator.trained_classes.cpu().numpy())
    unknown = np.setdiff1d(labels, known)
    if unknown.size:
        raise ValueError(
            f"The generator was not trained on class {', '.join(map(str, unknown))}; it knows "
            f"{', '.join(map(str, known)) or 'none'}."
        )
    if truncation is not None and not truncation > 0:
        raise ValueError(f"truncation is a positive number of standard deviations: got {truncation}.")
    device = generator.project.weight.device
    random = torch.Generator().manual_seed(seed)  # on the CPU, so that devices agree
    shape = (len(labels), generator.latent_size)
    if truncation is None:
        latents = torch.randn(shape, generator=random)
    else:
        tail = torch.special.ndtr(torch.tensor(-float(truncation), dtype=torch.float64))
        u = torch.rand(shape, generator=random, dtype=torch.float64)
        latents = torch.special.ndtri(tail + (1 - 2 * tail) * u).float()
    targets = torch.from_numpy(labels)
    was_training = generator.training
    generator.eval()
    images = np.empty((len(labels), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    start = 0
    while start < len(labels):
        rows = slice(start, start + batch_size)
        try:
            with mixed_precision(device), deterministic_convolutions():
                batch = generator(latents[rows].to(device), targets[rows].to(device))
            pixels = ((batch + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            images[rows] = pixels.permute(0, 2, 3, 1).cpu().numpy()
            start += batch_size
        except RuntimeError as error:
            if not _is_out_of_memory(error) or batch_size == 1:
                raise
            batch_size //= 2
            warnings.warn(
                f"The device {device} ran out of memory: {batch_size} images are generated at a time.",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
    generator.train(was_training)
    return images


# --- Files --------------------------------------------------------------------------------------


def save_generator(generator, path):
    """Write the weights with what :func:`load_generator` needs to build the network again."""
    content = {
        "num_classes": generator.num_classes, "latent_size": generator.latent_size,
        "channels": generator.channels, "generator": generator.state_dict(),
    }  # fmt: skip
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_generator(path, device=None):
    """Read a network written by :func:`save_generator`, in evaluation mode.

    Raises
    ------
    FileNotFoundError
    ValueError
        If the file is damaged or holds something else. It is never unpickled as code.
    """
    content = load_torch_file(path, {"num_classes", "latent_size", "channels", "generator"})
    generator = Generator(content["num_classes"], content["latent_size"], content["channels"])
    _load_weights(generator, content["generator"], path)
    return generator.to(device=choose_device(device), memory_format=torch.channels_last).eval()


def save_discriminator(discriminator, path):
    """Write the weights with what :func:`load_discriminator` needs to build the network again."""
    content = {
        "num_classes": discriminator.num_classes, "channels": discriminator.channels,
        "discriminator": discriminator.state_dict(),
    }  # fmt: skip
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_discriminator(path, device=None):
    """Read a network written by :func:`save_discriminator`, in evaluation mode.

    Raises
    ------
    FileNotFoundError
    ValueError
        If the file is damaged or holds something else.
    """
    content = load_torch_file(path, {"num_classes", "channels", "discriminator"})
    discriminator = Discriminator(content["num_classes"], content["channels"])
    _load_weights(discriminator, content["discriminator"], path)
    return discriminator.to(device=choose_device(device), memory_format=torch.channels_last).eval()


def _load_weights(network, weights, path):
    try:
        network.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"The weights in {path} do not fit the {type(network).__name__.lower()} that it describes. Remove "
            f"it and train again. ({str(error).splitlines()[0]})"
        ) from error


# --- The sampler --------------------------------------------------------------------------------


class GANOverSampler(ImageOverSampler):
    """Append generated images of the smaller classes.

    Parameters
    ----------
    generator : Generator or path, optional
        A trained one, or the file that :func:`save_generator` wrote. It must have been trained on the
        classes of ``y``. Default: one is trained on the given images by ``fit`` or ``fit_resample``
        and kept as ``generator_``, and trained anew only for other images.
    settings : GANSettings, optional
        For the training. Default: those of the profile ``cpu`` (about 50 minutes on two CPU cores).
    truncation : float, optional
        See :func:`sample_images`.
    sampling_strategy : str or dict, default 'auto'
        As in imbalanced-learn: see :class:`ImageOverSampler.ImageOverSampler`.
    random_state : int, RandomState instance or None, default None
        Seed of the generated images; the training's too if it is an integer.
    device : str or torch.device, optional

    Raises
    ------
    ValueError
        In ``fit`` and ``fit_resample``, for images that are not 32x32, a generator of other classes
        than ``y``'s, or a class with fewer than 2 images to train on.
    """

    def __init__(
        self, *, generator=None, settings=None, truncation=None, sampling_strategy="auto",
        random_state=None, device=None,
    ):  # fmt: skip
        super().__init__(sampling_strategy=sampling_strategy, random_state=random_state)
        self.generator = generator
        self.settings = settings
        self.truncation = truncation
        self.device = device

    def fit(self, X, y):
        """Train the generator, or load and check the given one.

        Parameters
        ----------
        X : ndarray of uint8, shape (n, 32, 32, 3)
        y : ndarray of integers, shape (n,)

        Returns
        -------
        self
        """
        super().fit(X, y)
        self._prepare(*check_images(X, y))
        return self

    def _prepare(self, X, y):
        if X.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"The GAN makes images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, but X has the shape {X.shape}."
            )
        if self.generator is not None:
            given = self.generator
            self.generator_ = given if isinstance(given, Generator) else load_generator(given, self.device)
            known = np.flatnonzero(self.generator_.trained_classes.cpu().numpy())
            classes = np.unique(y)
            if not np.array_equal(known, classes):
                raise ValueError(
                    f"The generator was trained on {len(known)} classes ({', '.join(map(str, known))}), but y has "
                    f"{len(classes)} ({', '.join(map(str, classes))}). Train one on this data."
                )
            return
        training_set = checksum(y, X)
        if getattr(self, "_trained_on", None) != training_set:
            seed = self.random_state if isinstance(self.random_state, (int, np.integer)) else 0
            settings = self.settings or GAN_SETTINGS["cpu"]
            self.generator_ = train_gan(X, y, settings, seed=seed, device=self.device).generator
            self._trained_on = training_set

    def _fit_resample(self, X, y):
        self._prepare(X, y)
        return super()._fit_resample(X, y)

    def _make_images(self, X, c, count, seed):
        return sample_images(self.generator_, [c] * count, seed=seed, truncation=self.truncation)

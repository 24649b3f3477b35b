"""One training step of the GAN: its settings, its balanced batches, and the update of both networks.

    adversaries = Adversaries(num_classes, GANSettings(), seed=0, device=device)
    batches = BalancedBatches(X, y, device, flip=True)
    losses = adversaries.step(batches, step=0, seed=0)

The discriminator sees every class equally often; otherwise it would hardly meet the 50 images of a rare class. It
sees every image, real or generated, through a differentiable augmentation; otherwise it would learn those 50 by
heart. All images lie on the device as one uint8 tensor. ``GANGeneration.py`` trains with these steps.

References
----------
Goodfellow et al. (2014), Generative adversarial nets. Miyato et al. (2018), Spectral normalization for
generative adversarial networks. Lim and Ye (2017), Geometric GAN (the hinge loss). Heusel et al. (2017), GANs
trained by a two time-scale update rule. Zhang et al. (2019), Self-attention generative adversarial networks.
"""

import dataclasses
import math
import operator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from Files import plain
from GANNetworks import (
    IMAGE_SIZE,
    Discriminator,
    Generator,
    check_sampling,
    counting,
    diff_augment,
    update_average,
)
from ImageOverSampler import TooFewImagesError
from Precision import ScaledSteps, mixed_precision
from Repeatability import derive_seed, seeded
from Runtime import require_memory

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

    def __post_init__(self):
        for name, value in plain(self).items():  # PyTorch refuses some NumPy scalars
            object.__setattr__(self, name, value)


def check_settings(settings, judged_classes=0):
    """Raise an error unless ``settings`` can be followed.

    Parameters
    ----------
    settings : GANSettings
    judged_classes : int, default 0
        Number of classes whose generated images are judged in training.

    Raises
    ------
    TypeError
        If they are no :class:`GANSettings`.
    ValueError
        If a setting is too small, no whole number where one is needed, or not finite.
    MemoryError
        If the machine has too little memory for a batch or for the judged images.
    """
    if not isinstance(settings, GANSettings):
        raise TypeError(f"settings must be GANSettings, such as GANSettings(steps=2000): got {settings!r}.")
    least = dict.fromkeys(("steps", "channels", "latent_size", "discriminator_steps", "records"), 1)
    for name, smallest in (least | {"batch_size": 4, "quality_images": judged_classes}).items():
        value = getattr(settings, name)
        if not value >= smallest:
            raise ValueError(f"{name} must be at least {smallest}: got {value}.")
        if not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number: got {value}.")
    most_of = {
        "generator_learning_rate": math.inf, "discriminator_learning_rate": math.inf, "ema_decay": 1, "augmentation": 1,
    }  # fmt: skip
    for name, most in most_of.items():
        value = getattr(settings, name)
        if not (math.isfinite(value) and 0 <= value <= most):
            up_to = f" to {most}" if most == 1 else " or more"
            raise ValueError(f"{name} must be a finite number, 0{up_to}: got {value}.")
    floats = (6 + settings.channels) * IMAGE_SIZE**2  # a real and a generated image, the last layer's input
    require_memory(4 * floats * settings.batch_size, f"A batch of {settings.batch_size:,} images")
    if judged_classes:
        check_sampling(settings.quality_images, settings.latent_size)


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
        index = (first + counting(0, size, self.device)) % len(self.classes)
        u = torch.rand(size, generator=random, device=self.device, dtype=torch.float32)
        counts = self.counts[index]
        within = torch.minimum((u * counts).long(), counts - 1)  # u * counts may be rounded up to counts
        images = self.images[self.starts[index] + within] / 127.5 - 1
        if self.flip:
            mirrored = torch.rand(size, generator=random, device=self.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, self.classes[index]


def check_image_size(X):
    """Raise ValueError unless ``X``, shape (n, height, width, 3), has images of the GAN's size."""
    if X.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"The GAN makes images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, but X has the shape {X.shape}. "
            "Resize X."
        )


def check_training_data(X, y, num_classes=None):
    """Raise an error unless a GAN can be trained on the images; return the number of classes.

    Parameters
    ----------
    X, y : ndarrays
        As :func:`Checks.check_images` returns them.
    num_classes : int, optional
        Default: one more than the largest label.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If images or labels do not fit, or the labels leave out so many numbers that they are no class numbers.
    TooFewImagesError
        If a class has one image.
    """
    check_image_size(X)
    if num_classes is None:
        num_classes, given = int(y.max()) + 1, len(np.unique(y))
        if num_classes > 10 * given:
            raise ValueError(
                f"Labels run from {y.min()} to {y.max()}, but y has {given} classes. A GAN numbers its classes "
                "from 0: use the labels np.unique(y, return_inverse=True)[1]."
            )
    num_classes = operator.index(num_classes)
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
    return num_classes


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
        # The hinge loss of real images is max(0, 1 - score), of generated ones max(0, 1 + score).
        self.signs = torch.tensor([-1.0, 1.0], device=device).repeat_interleave(settings.batch_size)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.9), fused=True)
            for network, rate in zip((self.generator, self.discriminator), self.rates, strict=True)
        ]
        self.updates = [
            ScaledSteps(network.parameters(), [optimizer], device)
            for network, optimizer in zip((self.generator, self.discriminator), self.optimizers, strict=True)
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
        update_generator, update_discriminator = self.updates
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
            discriminator_loss = 2 * F.relu(self.signs * scores + 1).mean()
            self.discriminator.zero_grad(set_to_none=True)
            update_discriminator.backward(discriminator_loss)
            update_discriminator.step()

        self.discriminator.requires_grad_(False)
        with mixed_precision(self.device):
            shown = diff_augment(generated, random, settings.augmentation)
            generator_loss = -self.discriminator(shown, labels).mean()
        self.generator.zero_grad(set_to_none=True)
        update_generator.backward(generator_loss)
        update_generator.step()
        update_average(self.average, self.generator, step, settings.ema_decay)
        losses = torch.stack([discriminator_loss, generator_loss])
        return torch.cat([losses, scores.view(2, -1).mean(dim=1)]).detach()

    def network_weights(self):
        """The state dicts of the three networks as one dict, by names such as ``generator.to_image.bias``."""
        return {
            f"{name}.{key}": value
            for name in self.NETWORKS
            for key, value in getattr(self, name).state_dict().items()
        }

    def state_dict(self):
        """Everything that training changes: three networks, two optimisers and the scales of their gradients."""
        networks = {name: getattr(self, name).state_dict() for name in self.NETWORKS}
        return networks | {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scales": [update.state_dict() for update in self.updates],
        }

    def load_state_dict(self, state):
        """Take over what :meth:`state_dict` returned."""
        for name in self.NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        for update, content in zip(self.updates, state["scales"], strict=True):
            update.load_state_dict(content)

    @property
    def skipped_steps(self):
        """Number of updates that were left out because a float16 gradient overflowed."""
        return sum(update.skipped for update in self.updates)


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

"""The two networks of a class-conditional GAN for 32x32 images, how to sample from one, and their files.

    generator = load_generator("models/generator.pt")
    images = sample_images(generator, [3] * 100, seed=0)       # 100 generated cats
    scores = discriminator(images_from_minus_1_to_1, labels)    # high for real images

The generator is residual, with class-conditional batch norm. The discriminator is a projection discriminator
with spectral norm. It sees every image, real or generated, through a differentiable augmentation.
``GANGeneration.py`` trains the two.

References
----------
Miyato et al. (2018), Spectral normalization for generative adversarial networks. Miyato and Koyama (2018),
cGANs with projection discriminator. Dumoulin et al. (2017), A learned representation for artistic style
(conditional normalisation). Radford et al. (2016), Unsupervised representation learning with deep
convolutional GANs. Zhao et al. (2020), Differentiable augmentation for data-efficient GAN training. Karras et
al. (2018), Progressive growing of GANs (averaged generator). Brock et al. (2019), Large scale GAN training
(standing statistics, truncation).
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from Checkpoints import load_torch_file, save_torch_file
from FiniteNumbers import require_finite
from Precision import half_weights, mixed_precision
from Repeatability import deterministic_convolutions
from Runtime import choose_device, require_memory
from SpectralNorm import SpectralNorm, normalised

IMAGE_SIZE = 32

# --- Generator ----------------------------------------------------------------------------------


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias are looked up by class (Dumoulin et al. 2017).

    Everything else in the generator is shared by all classes. A class with few images therefore borrows
    from the others how fur, wheels and horizons look.

    Parameters
    ----------
    channels : int
        Of the input.
    num_classes : int
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Embedding(num_classes, channels)
        self.bias = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x, gain, bias):
        """Normalise: float (n, channels, height, width), gain and bias (n, channels) -> the same shape as ``x``."""
        x = self.norm(x)
        return _Affine.apply(x, gain[:, :, None, None].to(x.dtype), bias[:, :, None, None].to(x.dtype))


class _Affine(torch.autograd.Function):
    """gain x + bias, with two operators fewer in the backward pass than torch.addcmul."""

    @staticmethod
    def forward(ctx, x, gain, bias):
        ctx.save_for_backward(x, gain)
        return torch.addcmul(bias, x, gain)

    @staticmethod
    def backward(ctx, gradient):
        x, gain = ctx.saved_tensors
        places = 2, 3
        return gradient * gain, (gradient * x).sum(places, keepdim=True), gradient.sum(places, keepdim=True)


class GeneratorBlock(nn.Module):
    """Residual block that doubles height and width.

    A transposed 4x4 convolution with stride 2 upsamples and convolves at once. Upsampling followed by a 3x3
    convolution is a special case of it, and takes 9 multiplications for each value instead of 4.

    Parameters
    ----------
    in_channels, out_channels : int
    num_classes : int
    """

    def __init__(self, in_channels, out_channels, num_classes):
        super().__init__()
        self.norm1 = ConditionalBatchNorm(in_channels, num_classes)
        self.conv1 = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
        self.norm2 = ConditionalBatchNorm(out_channels, num_classes)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, gains_and_biases):
        """Float (n, in_channels, h, w), gain and bias of each norm -> float (n, out_channels, 2 h, 2 w)."""
        gain1, bias1, gain2, bias2 = gains_and_biases
        out = self.conv1(F.relu(self.norm1(x, gain1, bias1)))
        out = self.conv2(F.relu(self.norm2(out, gain2, bias2)))
        # CUDA's autocast interpolates in float32, and the sum would then stay in it.
        return out + F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest").to(out.dtype)


class Generator(nn.Module):
    """Class-conditional residual generator of 32x32 images (after Miyato and Koyama 2018).

    Parameters
    ----------
    num_classes : int
        Labels run from 0 to ``num_classes - 1``.
    latent_size : int, default 128
        How many standard normal numbers an image is made from.
    channels : int, default 32
        Channels at 32x32. There are twice as many at each halved resolution down to 4x4. Multiples of 16
        are fast.

    Attributes
    ----------
    trained_classes : bool tensor, shape (num_classes,)
        The classes that training saw. It is part of the state dict.
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

    def known_classes(self):
        """Numbers of the classes that training saw: ndarray of int64, in ascending order."""
        return np.flatnonzero(self.trained_classes.cpu().numpy())

    def forward(self, latents, labels):
        """Images from -1 to 1: float (n, latent_size), int64 (n,) -> float32 (n, 3, 32, 32)."""
        with half_weights(self):
            x = self.project(latents).view(len(latents), -1, 4, 4)
            x = x.contiguous(memory_format=torch.channels_last)
            gains_and_biases = self._look_up(labels, x.dtype)
            for number, block in enumerate(self.blocks):
                x = block(x, gains_and_biases[4 * number : 4 * number + 4])
            return torch.tanh(self.to_image(F.relu(self.norm(x))).float())

    def _look_up(self, labels, dtype):
        """Gain and bias of each conditional norm for each label, looked up in all tables at once."""
        norms = [norm for block in self.blocks for norm in (block.norm1, block.norm2)]
        tables = [table.weight for norm in norms for table in (norm.gain, norm.bias)]
        widths = tuple(table.shape[1] for table in tables)
        starts, steps = _places(self.num_classes, widths, labels.device)
        rows = torch.cat([table.flatten() for table in tables])[torch.addcmul(starts, labels[:, None], steps)]
        return rows.to(dtype).split(widths, dim=1)


@functools.cache
def _places(num_classes, widths, device):
    """Where the columns of tables lie if all follow each other in memory: of class 0, and steps between classes."""
    starts = [num_classes * sum(widths[:k]) + column for k, w in enumerate(widths) for column in range(w)]
    steps = [width for width in widths for _ in range(width)]
    return torch.tensor(starts, device=device), torch.tensor(steps, device=device)


# --- Discriminator ------------------------------------------------------------------------------


def _spectral_norm(layer):
    parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return layer


class DiscriminatorBlock(nn.Module):
    """Residual block that halves height and width, with spectral norm and no batch norm.

    A 4x4 convolution with stride 2 convolves and downsamples at once. A 3x3 convolution followed by 2x2
    average pooling is a special case of it, and takes 36 multiplications for each pooled value instead of 16.

    Parameters
    ----------
    in_channels, out_channels : int
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = _spectral_norm(nn.Conv2d(in_channels, in_channels, 3, padding=1))
        self.conv2 = _spectral_norm(nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1))
        self.shortcut = _spectral_norm(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x):
        """Float (n, in_channels, h, w) -> float (n, out_channels, h / 2, w / 2)."""
        out = self.conv1(F.relu(x))
        return self.conv2(F.relu(out)) + self.shortcut(F.avg_pool2d(x, 2))


class Discriminator(nn.Module):
    """Projection discriminator with spectral norm in every layer (after Miyato and Koyama 2018).

    Its output is a score of the image plus the inner product of the image's features with a vector of the
    class. It thus learns separately what looks real and what looks real *for this class*. It learns the first
    from all classes together.

    Miyato and Koyama have a residual block at full resolution. Here one strided convolution stands there, as
    in DCGAN (Radford et al. 2016), because a block would take most of the time. Two blocks follow.

    Parameters
    ----------
    num_classes : int
        Labels run from 0 to ``num_classes - 1``.
    channels : int, default 32
        There are twice as many channels at 16x16, and twice as many again at each halved resolution down to
        4x4.
    """

    def __init__(self, num_classes, channels=32):
        super().__init__()
        self.num_classes, self.channels = num_classes, channels
        self.blocks = nn.Sequential(
            _spectral_norm(nn.Conv2d(3, 2 * channels, 4, stride=2, padding=1)),
            DiscriminatorBlock(2 * channels, 4 * channels),
            DiscriminatorBlock(4 * channels, 8 * channels),
        )
        self.score = _spectral_norm(nn.Linear(8 * channels, 1))
        self.embedding = _spectral_norm(nn.Embedding(num_classes, 8 * channels))

    def normalised_layers(self):
        """The layers under spectral norm, in order."""
        return [layer for layer in self.modules() if parametrize.is_parametrized(layer, "weight")]

    def forward(self, images, labels):
        """Scores, high for real: float (n, 3, 32, 32) from -1 to 1, int64 (n,) -> float32 (n,)."""
        layers, device_type = self.normalised_layers(), images.device.type
        half = {}
        if torch.is_autocast_enabled(device_type):
            half = dict.fromkeys(self.blocks.modules(), torch.get_autocast_dtype(device_type))
        with normalised(layers, half), half_weights(self.blocks):
            x = self.blocks(images.contiguous(memory_format=torch.channels_last))
            features = F.relu(x).sum(dim=(2, 3), dtype=torch.float32)
            with torch.autocast(device_type, enabled=False):
                return self.score(features).squeeze(1) + (self.embedding(labels) * features).sum(dim=1)


# --- Differentiable augmentation ----------------------------------------------------------------


def diff_augment(images, random, strength=1.0):
    """Random colour, translation and cutout through which gradients flow (Zhao et al. 2020).

    It is applied to every image that the discriminator sees. Real images are augmented so that the
    discriminator cannot learn few of them by heart. Generated images are augmented too, so that the generator
    does not learn to make augmented ones.

    Parameters
    ----------
    images : float tensor, shape (n, 3, size, size)
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
    n, device = len(images), images.device
    size, other = images.shape[2:]
    if size != other:
        raise ValueError(f"The images must be square, but they have {size}x{other} pixels.")
    # Everything random is drawn in three tensors.
    u = torch.empty((3, n, 1, 1, 1), device=device).uniform_(-strength / 2, strength / 2, generator=random)
    most, side = round(strength * size / 8), round(strength * size / 2)
    moved = torch.randint(-most, most + 1, (2, n, 1), generator=random, device=device)
    middle = torch.randint(0, size + 1 - side % 2, (2, n, 1), generator=random, device=device)

    # With brightness b, saturation 2 s and contrast c one after another, an image becomes
    # (1 + c) (1 + 2 s) image - 2 (1 + c) s grey + b - c mean.
    b, s, c = u
    grey = images.mean(dim=1, keepdim=True)
    contrast = 1 + c
    saturation = contrast * s
    constant = torch.addcmul(b, c, grey.mean(dim=(1, 2, 3), keepdim=True), value=-1)
    greys = torch.addcmul(constant, saturation, grey, value=-2)
    images = torch.addcmul(greys, torch.add(contrast, saturation, alpha=2), images)

    # Row 0 and row size + 1 of the padded image are zeros: what moves in from outside, and what is cut out.
    position = counting(1, size + 1, device)
    rows, columns = (position + moved).clamp_(0, size + 1)
    start = middle - (side // 2 - 1)
    in_rows, in_columns = (position >= start) & (position < start + side)
    rows = rows[:, :, None].masked_fill(in_rows[:, :, None] & in_columns[:, None, :], 0)
    padded = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    return padded[counting(0, n, device)[:, None, None], rows, columns[:, None, :]].permute(0, 3, 1, 2)


@functools.cache
def counting(start, end, device):
    """``torch.arange(start, end, device=device)``, made once. Do not change it."""
    with torch.inference_mode(False):  # a tensor made in inference mode could never be trained with
        return torch.arange(start, end, device=device)


# --- The averaged generator ---------------------------------------------------------------------

SAMPLING_BATCH = 500  # images generated at once


@torch.no_grad()
def update_average(average, model, step, decay):
    """Move ``average`` towards ``model``: average = d * average + (1 - d) * model (Karras et al. 2018).

    d is ``decay``, but at most (1 + step) / (10 + step), so that the first weights are soon forgotten.

    Parameters
    ----------
    average, model : nn.Module
        Of the same architecture. Buffers are not changed: :func:`settle_statistics` computes them.
    step : int
        Number of the training step, from 0.
    decay : float
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - d)


@torch.no_grad()
def settle_statistics(generator, labels, seed):
    """Measure the means and variances that batch norm uses for sampling, over 16 batches.

    Those collected in training belong to other weights than the averaged ones. Brock et al. (2019) call the
    ones measured here standing statistics.

    Parameters
    ----------
    generator : Generator
        It is in evaluation mode afterwards.
    labels : int64 tensor, shape (n,)
        Labels of each batch, on the generator's device. The statistics are those of this mixture of classes.
    seed : int
        Of the latents.
    """
    norms = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    generator.train()
    random = torch.Generator(labels.device).manual_seed(seed)
    for _ in range(16):
        latents = torch.randn((len(labels), generator.latent_size), generator=random, device=labels.device)
        with mixed_precision(labels.device):
            generator(latents, labels)
    for norm in norms:
        norm.momentum = 0.1
    generator.eval()


@torch.inference_mode()
def sample_images(generator, labels, *, seed, truncation=None):
    """Generate one image for each label.

    Parameters
    ----------
    generator : Generator
    labels : sequence of int, shape (n,)
        Class numbers.
    seed : int
        The same seed gives the same latents on every device.
    truncation : float, optional
        Draw the latents from a normal distribution cut off beyond this many standard deviations
        (Brock et al. 2019). The images become more typical and less diverse. Default: not cut off.

    Returns
    -------
    ndarray of uint8, shape (n, 32, 32, 3)

    Raises
    ------
    ValueError
        If the generator was not trained on a label's class, truncation is not positive, or an image is not
        finite (:class:`FiniteNumbers.NotFiniteError`).
    MemoryError
        If the machine has too little memory for so many images.
    """
    labels = np.asarray(labels, dtype=np.int64)
    check_sampling(len(labels), generator.latent_size, truncation)
    known = generator.known_classes()
    unknown = np.setdiff1d(labels, known)
    if unknown.size:
        raise ValueError(
            f"The generator was not trained on class {', '.join(map(str, unknown))}; it knows "
            f"{', '.join(map(str, known)) or 'none'}."
        )
    device = generator.project.weight.device
    latents = _draw_latents((len(labels), generator.latent_size), seed, truncation)
    targets = torch.from_numpy(labels)
    was_training = generator.training
    generator.eval()
    images = np.empty((len(labels), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for start in range(0, len(labels), SAMPLING_BATCH):
        rows = slice(start, start + SAMPLING_BATCH)
        with mixed_precision(device), deterministic_convolutions():
            batch = generator(latents[rows].to(device), targets[rows].to(device))
        # A cast to uint8 would make black pixels of NaN.
        require_finite(batch, "The generator's images", "Its weights may be damaged: train or load it again.")
        pixels = ((batch + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        images[rows] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    generator.train(was_training)
    return images


def check_sampling(count, latent_size, truncation=None):
    """Raise an error unless ``count`` images can be generated at once: see :func:`sample_images`."""
    if truncation is not None and not truncation > 0:
        raise ValueError(f"truncation is a positive number of standard deviations: got {truncation}.")
    require_memory(count * (3 * IMAGE_SIZE**2 + 4 * latent_size), f"{count:,} generated images")


def _draw_latents(shape, seed, truncation):
    random = torch.Generator().manual_seed(int(seed))  # on the CPU, so that devices agree
    if truncation is None:
        return torch.randn(shape, generator=random)
    tail = torch.special.ndtr(torch.tensor(-float(truncation), dtype=torch.float64))
    u = torch.rand(shape, generator=random, dtype=torch.float64)
    return torch.special.ndtri(tail + (1 - 2 * tail) * u).float()


# --- Files --------------------------------------------------------------------------------------

# What a network is built from again.
GENERATOR_SIZES = ("num_classes", "latent_size", "channels")
DISCRIMINATOR_SIZES = ("num_classes", "channels")


def save_generator(generator, path):
    """Write a generator's weights, with what :func:`load_generator` needs to build the network again.

    Parameters
    ----------
    generator : Generator
    path : path

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If a weight is not finite. Nothing is written.
    """
    _save(generator, GENERATOR_SIZES, path)


def load_generator(path, device=None):
    """Read a file of :func:`save_generator`.

    Parameters
    ----------
    path : path
    device : str or torch.device, optional
        Default: the fastest there is.

    Returns
    -------
    Generator
        In evaluation mode.

    Raises
    ------
    FileNotFoundError
    ValueError
        If the file is damaged, holds something else, or has a weight that is not finite. It is never unpickled
        as code.
    """
    return _load(Generator, GENERATOR_SIZES, path, device)


def save_discriminator(discriminator, path):
    """Write a discriminator's weights, with what :func:`load_discriminator` needs to build the network again.

    Parameters
    ----------
    discriminator : Discriminator
    path : path

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If a weight is not finite. Nothing is written.
    """
    _save(discriminator, DISCRIMINATOR_SIZES, path)


def load_discriminator(path, device=None):
    """Read a file of :func:`save_discriminator`.

    Parameters
    ----------
    path : path
    device : str or torch.device, optional
        Default: the fastest there is.

    Returns
    -------
    Discriminator
        In evaluation mode.

    Raises
    ------
    FileNotFoundError
    ValueError
        If the file is damaged, holds something else, or has a weight that is not finite. It is never unpickled
        as code.
    """
    return _load(Discriminator, DISCRIMINATOR_SIZES, path, device)


def _save(network, sizes, path):
    name = type(network).__name__.lower()
    content = {size: getattr(network, size) for size in sizes} | {name: network.state_dict()}
    require_finite(content[name], f"The {name}'s weights", "Train it again.")
    save_torch_file(path, content)


def _load(network_class, sizes, path, device):
    """The network that a file describes, on a device and in evaluation mode."""
    name = network_class.__name__.lower()
    content = load_torch_file(path, {*sizes, name})
    try:
        network = network_class(*(content[size] for size in sizes))
        network.load_state_dict(content[name])
    except Exception as error:  # what PyTorch raises depends on what is wrong
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"The weights in {path} do not fit the {name} that it describes. "
            f"Remove it and train again. ({reason})"
        ) from error
    require_finite(content[name], f"The {name}'s weights in {path}", "Remove it and train again.")
    return network.to(device=choose_device(device), memory_format=torch.channels_last).eval()

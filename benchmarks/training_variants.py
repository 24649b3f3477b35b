"""What was tried in training: changes of the new network, of the batches, and of the result.

    modify = whitened_stem                            # a change of the new network: f(model, X)
    batches = EasyImagesSkippedCutout                 # a class of batches

Batch classes are combined by inheritance.

References
----------
DeVries and Taylor (2017), Improved regularization of convolutional neural networks with Cutout. Jordan (2024), 94% on
CIFAR-10 in 3.29 seconds on a single GPU. Page (2018), How to train your ResNet. Qin et al. (2024), InfoBatch: lossless
training speed up by unbiased dynamic data pruning.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resnet_variants import strided_downsampling

from Batches import AugmentedBatches
from ClassifierNetwork import channel_statistics
from MirroredFilters import mirrored_filters

# --- Changes of the new network -----------------------------------------------------------------


def strided(model, X):
    """Halve images by strides, as He et al. (2016) do."""
    strided_downsampling(model)


def mirrored_pairs(model, X, **options):
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


class RememberingLoss(torch.nn.Module):
    """A loss that also writes each image's cross-entropy, without smoothing, into a tensor.

    Parameters
    ----------
    loss : torch.nn.Module
        What to train on.
    losses : float32 tensor, shape (n,)
        One value for each row of the training set; changed in place.
    """

    def __init__(self, loss, losses):
        super().__init__()
        self.loss, self.losses = loss, losses

    def forward(self, logits, targets, rows):
        self.losses[rows] = F.cross_entropy(logits.detach(), targets, reduction="none")
        return self.loss(logits, targets, rows)


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

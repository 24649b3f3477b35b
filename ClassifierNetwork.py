"""ResNet-18 for 32x32 images, its training loop and its evaluation.

    model = create_classifier(num_classes=10, width=64, mean_std=channel_statistics(X), seed=0)
    history = train_classifier(model, X, y, Recipe(steps=1600), seed=0)
    evaluation = evaluate_classifier(model, X_test, y_test)

All images live on the device as one uint8 tensor, augmentation works on whole batches there, and the
network takes uint8 images as they are: normalising them is its first layer, so that a saved model
cannot be fed with wrongly scaled input.

References
----------
He et al. (2016), Deep residual learning for image recognition. Menon et al. (2021), Long-tail learning
via logit adjustment. Smith and Topin (2018), Super-convergence (the one-cycle schedule). Zhang (2019),
Making convolutional networks shift-invariant again.
"""

import copy
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

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
    uses_bfloat16,
)

# --- Network ------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them (the basic block of He et al. 2016).

    A block that halves the image averages 2x2 places of its input, where He et al. have convolutions of
    stride 2. That costs no more operations, and no place is left out: the output depends less on where
    the image's first column lies (Zhang 2019).
    """

    def __init__(self, in_channels, out_channels, halve):
        super().__init__()
        # At an odd side the last place stands for itself: the sides are those of a stride of 2.
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if halve else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        x = self.pool(x)
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with the stem for small images (a 3x3 convolution, no max-pooling) and average pooling
    in place of strides.

    Parameters
    ----------
    num_classes : int
    width : int, default 64
        Channels of the first stage; the four stages have width x (1, 2, 4, 8). 64 is the standard
        (11,173,962 parameters for ten classes), 42 the reference study's.
    mean_std : pair of sequences of 3 floats
        Mean and standard deviation of each colour channel, in pixel values from 0 to 255. Kept in
        the state dict.
    """

    # The same weights would fit a network with strides, and be wrong there: files say what they belong to.
    downsampling = "average pooling"

    def __init__(self, num_classes=10, width=64, mean_std=((127.5,) * 3, (63.75,) * 3)):
        super().__init__()
        if width < 1 or num_classes < 2:
            raise ValueError(
                f"width must be at least 1 and num_classes at least 2: got {width}, {num_classes}."
            )
        mean, std = torch.tensor(mean_std, dtype=torch.float32).view(2, 1, 3, 1, 1)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, channels = [], width
        for stage in range(4):
            out_channels = width * 2**stage
            blocks.append(ResidualBlock(channels, out_channels, halve=stage > 0))
            blocks.append(ResidualBlock(out_channels, out_channels, halve=False))
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    @property
    def num_classes(self):
        return self.head.out_features

    @property
    def width(self):
        return self.conv.out_channels

    def features(self, x):
        """Pooled features: (n, 3, height, width) pixels from 0 to 255 -> (n, 8 x width)."""
        x = (x.float() - self.mean) / self.std
        x = F.relu(self.norm(self.conv(x)))
        # A plain mean has a deterministic gradient on CUDA; adaptive pooling's adds atomically.
        return self.blocks(x).mean(dim=(2, 3))

    def forward(self, x):
        """Logits: (n, 3, height, width) pixels from 0 to 255, uint8 or float -> (n, num_classes)."""
        return self.head(self.features(x))


def create_classifier(num_classes, width, mean_std, seed):
    """A :class:`ResNet18` whose initial weights depend on ``seed`` alone."""
    with seeded(derive_seed(seed, 0)):
        return ResNet18(num_classes, width, mean_std)


def channel_statistics(X):
    """Mean and standard deviation of each channel of uint8 images (n, height, width, 3), as lists.

    The deviation is at least 1, so that images of one colour can be normalised.
    """
    # Through the histogram of the 256 values: exact, and needs no float copy of the images.
    values = np.arange(256)
    mean, std = [], []
    for channel in range(3):
        share = np.bincount(X[..., channel].ravel(), minlength=256) / X[..., channel].size
        mean.append(float(share @ values))
        std.append(max(float(np.sqrt(share @ values**2 - mean[-1] ** 2)), 1.0))
    return mean, std


def save_classifier(model, path):
    """Write the weights with what :func:`load_classifier` needs to build the network again."""
    content = {
        "num_classes": model.num_classes, "width": model.width, "downsampling": model.downsampling,
        "model": model.state_dict(),
    }  # fmt: skip
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_classifier(path, device=None):
    """Read a network written by :func:`save_classifier`, in evaluation mode.

    Raises
    ------
    FileNotFoundError
    ValueError
        If the file is damaged or holds something else. It is never unpickled as code.
    """
    content = load_torch_file(path, {"num_classes", "width", "downsampling", "model"})
    if content["downsampling"] != ResNet18.downsampling:
        raise ValueError(
            f"{path} holds a network with {content['downsampling']} in place of {ResNet18.downsampling}. "
            "Remove it and run again."
        )
    model = ResNet18(content["num_classes"], content["width"])
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit a ResNet-18 of width {model.width}: {error}") from error
    return model.to(choose_device(device)).eval()


# --- Data on the device -------------------------------------------------------------------------


class AugmentedBatches:
    """Random crops and flips of a whole data set that stays on the device.

    Epoch ``e`` is the same whenever and wherever it is asked for, so a resumed run sees what an
    uninterrupted one would. The last incomplete batch is left out (other rows each epoch), unless it
    is the only one.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, height, width, 3)
    batch_size : int
    device : torch.device
    seed : int
        Order, crops and flips.
    padding : int, default 2
        Pixels by which crops may move, filled by reflection.
    flip : bool, default True
        Whether to mirror half of the images left to right.
    share : pair of int, default (0, 1)
        ``(process, processes)``: of each batch, yield the part that this process computes. The parts of
        all processes are the batch that one process alone would see.
    """

    def __init__(self, X, batch_size, device, seed, *, padding=2, flip=True, share=(0, 1)):
        self.n, self.height, self.width = X.shape[:3]
        self.batch_size = min(batch_size, self.n)
        self.device, self.seed, self.padding, self.flip = device, seed, padding, flip
        process, processes = share
        if self.batch_size % processes:
            raise ValueError(
                f"{processes} processes cannot share batches of {self.batch_size} images equally. "
                "Start a number of processes that divides the batch."
            )
        self.part = self.batch_size // processes
        self.first = process * self.part
        pad = (padding, padding)
        padded = torch.from_numpy(np.pad(X, ((0, 0), pad, pad, (0, 0)), mode="reflect")).to(device)
        # A view of all crops, shape (n, offsets, offsets, 3, height, width): indexing it gathers and
        # crops in one go, and the result is already in channels_last order.
        self.crops = padded.unfold(1, self.height, 1).unfold(2, self.width, 1)

    def __len__(self):
        return self.n // self.batch_size

    def epoch(self, number):
        """Yield ``(images, rows)``: uint8 (part, 3, height, width) and int64 (part,) on the device."""
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, 1, number))

        def draw(high):
            return torch.randint(high, (self.n,), generator=generator, device=self.device)

        order = torch.randperm(self.n, generator=generator, device=self.device)
        top, left = draw(2 * self.padding + 1), draw(2 * self.padding + 1)
        mirrored = draw(2).bool() if self.flip else None
        for start in range(self.first, len(self) * self.batch_size, self.batch_size):
            rows = order[start : start + self.part]
            images = self.crops[rows, top[rows], left[rows]]
            if self.flip:
                images = torch.where(mirrored[rows].view(-1, 1, 1, 1), images.flip(-1), images)
            yield images, rows


def _to_device(X, device):
    return torch.from_numpy(np.ascontiguousarray(X)).to(device).permute(0, 3, 1, 2)


# --- Loss ---------------------------------------------------------------------------------------


def _check_groups(groups, y):
    """``groups`` as int64, zeros for None, or an error if they are no sources of the rows of ``y``."""
    groups = np.zeros_like(y) if groups is None else np.asarray(groups)
    if groups.shape != y.shape:
        raise ValueError(f"groups must have the shape {y.shape} like y, but it is {groups.shape}.")
    if groups.dtype != bool and not np.issubdtype(groups.dtype, np.integer):
        raise TypeError(f"groups must hold integers, 0 for real rows, but its dtype is {groups.dtype}.")
    if groups.min() < 0:
        raise ValueError(f"groups must not be negative, but the smallest is {groups.min()}.")
    return groups.astype(np.int64, copy=False)


def class_log_priors(y, num_classes, groups=None):
    """Logarithm of the class frequencies within each group of rows.

    Parameters
    ----------
    y : ndarray of int, shape (n,)
    num_classes : int
    groups : ndarray of int or bool, shape (n,), optional
        Where each row comes from: 0 real, 1 synthetic. Default: all from one source.

    Returns
    -------
    ndarray of float32, shape (n_groups, num_classes)
        Minus infinity for a class that a group lacks.
    """
    groups = _check_groups(groups, y)
    counts = np.zeros((groups.max() + 1, num_classes))
    np.add.at(counts, (groups, y), 1)
    with np.errstate(divide="ignore"):
        return np.log(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)


# --- Training -----------------------------------------------------------------------------------


SMALLEST_SIDE = 16  # pixels; the last stage then still has 2x2 places


@dataclass(frozen=True)
class Recipe:
    """How to train. The budget is in steps, so that arms with more images get no more compute.

    ``benchmarks/README.md`` holds the ablations behind the defaults. They were made on the balanced
    data set, the ceiling's; no other arm of the study was looked at.

    Attributes
    ----------
    steps : int
        Optimiser steps in all.
    batch_size : int
        Images per step, over all processes together.
    micro_batch_size : int
        Images that pass through the network at once and share batch-norm statistics (ghost batch
        normalisation, Hoffer et al. 2017). The gradients of a batch's micro-batches are averaged. So
        memory does not grow with the batch, and several processes compute what one would.
    optimizer : {'muon', 'sgd'}
        Muon (Jordan et al. 2024) for the kernels of the residual blocks and SGD for the rest, or SGD for
        everything.
    learning_rate, momentum, weight_decay : float
        SGD's: the peak of the one-cycle schedule, Nesterov's momentum, and the decay, not on norms and
        biases.
    muon_learning_rate, muon_momentum, muon_weight_decay : float
        Muon's: the peak of the same schedule; the decay is decoupled (times the learning rate).
    muon_iterations : int
        Newton-Schulz iterations that make Muon's updates nearly orthogonal; three cost less than the usual
        five and are enough (as Jordan's airbench has it too).
    warmup : float
        Share of the steps until the peak; from there the rates fall in a straight line.
    scales : tuple of float
        Side of the images, relative to the full one, in each equal part of the run: small images first
        cost less (progressive resizing, Howard 2018). No side shrinks below 16 pixels.
    label_smoothing : float
        None in the study: it contradicts the logit adjustment (see :func:`train_classifier`), and
        used in the other arms alone it would be a second difference between them.
    padding : int
        Pixels by which random crops move.
    flip : bool
        Whether images are mirrored at random.
    """

    steps: int
    batch_size: int = 256
    micro_batch_size: int = 128
    optimizer: str = "muon"
    learning_rate: float = 0.15
    momentum: float = 0.9
    weight_decay: float = 5e-4
    muon_learning_rate: float = 0.045
    muon_momentum: float = 0.9
    muon_weight_decay: float = 0.03
    muon_iterations: int = 3
    warmup: float = 0.1
    scales: tuple = (0.5, 0.625, 0.75, 0.875, 1.0)
    label_smoothing: float = 0.0
    padding: int = 2
    flip: bool = True

    def as_json(self):
        """The settings as a dict that equals what a JSON file of them gives back."""
        return asdict(self) | {"scales": list(self.scales)}

    def scale_at(self, step):
        """Relative side of the images in step ``step``, counted from 0."""
        return self.scales[min(step * len(self.scales) // self.steps, len(self.scales) - 1)]


class KernelMuon(torch.optim.Optimizer):
    """Muon for convolution kernels: each is one matrix with a row per output channel.

    The same as :class:`torch.optim.Muon`, to the last bit where convolutions run in bfloat16. PyTorch's takes
    matrices only, and always multiplies them in bfloat16, which a processor that has no such instructions does
    so slowly that it takes as long as the rest of the training; there this one stays in float32. The order
    of a matrix's columns does not matter to Muon.

    Parameters
    ----------
    kernels : list of Parameter of shape (out, in, height, width)
        Must stay where they are in memory while training.
    lr : float
    momentum : float
        Nesterov's.
    weight_decay : float
        Decoupled: times ``lr``.
    iterations : int
        Of Newton and Schulz.

    References
    ----------
    Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks.
    """

    def __init__(self, kernels, *, lr, momentum, weight_decay, iterations):
        self.kernels = list(kernels)
        super().__init__(
            [nn.Parameter(self._as_matrix(kernel.detach())) for kernel in self.kernels],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations},
        )

    @staticmethod
    def _as_matrix(kernel):
        # A kernel lies in memory in channels_last or in the usual order; for each, one of these is a view.
        if kernel.is_contiguous():
            return kernel.view(len(kernel), -1)
        return kernel.permute(0, 2, 3, 1).view(len(kernel), -1)

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        for kernel, matrix in zip(self.kernels, group["params"], strict=True):
            gradient = kernel.grad if kernel.is_contiguous() else kernel.grad.permute(0, 2, 3, 1)
            gradient = gradient.reshape(matrix.shape)
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            update = self._nearly_orthogonal(gradient.lerp(mean, group["momentum"]), group["iterations"])
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            rows, columns = matrix.shape
            matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    @staticmethod
    def _nearly_orthogonal(matrix, iterations):
        """Singular values near one (0.5 to 1.5), by a polynomial in place of a decomposition."""
        a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steepest at zero
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x.to(torch.bfloat16 if uses_bfloat16(matrix.device) else torch.float32)
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(iterations):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x


def _create_optimizers(model, recipe):
    kernels = []
    if recipe.optimizer == "muon":
        kernels = [module.weight for module in model.blocks.modules() if isinstance(module, nn.Conv2d)]
    taken = set(map(id, kernels))
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in taken]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizers = [
        torch.optim.SGD(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others}],
            lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0,
        )
    ]  # fmt: skip
    if kernels:
        optimizers.append(
            KernelMuon(
                kernels, lr=recipe.muon_learning_rate, momentum=recipe.muon_momentum,
                weight_decay=recipe.muon_weight_decay, iterations=recipe.muon_iterations,
            )
        )  # fmt: skip
    return optimizers


def _forward_and_backward(model, images, targets, recipe, step, log_prior=None, share=1.0):
    """Add the gradient of ``share`` times the mean loss; return that loss and the logits."""
    sides = tuple(images.shape[2:])
    size = tuple(min(side, max(SMALLEST_SIDE, round(recipe.scale_at(step) * side))) for side in sides)
    if size != sides:
        images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    with mixed_precision(images.device):
        logits = model(images)
    logits = logits.float()
    adjusted = logits if log_prior is None else logits + log_prior
    loss = share * F.cross_entropy(adjusted, targets, label_smoothing=recipe.label_smoothing)
    loss.backward()
    return loss.detach(), logits.detach()


def count_training_flops(model, recipe, image_size=(32, 32)):
    """Floating-point operations of a whole training run: forward, backward and optimiser.

    Counted by :class:`torch.utils.flop_counter.FlopCounterMode` (matrix products and convolutions, two
    operations per multiplication and addition), one step for each size of the images, without computing.

    Parameters
    ----------
    model : ResNet18
    recipe : Recipe
    image_size : pair of int
        Height and width.

    Returns
    -------
    int
    """
    model = copy.deepcopy(model).to(device="meta", memory_format=torch.channels_last).train()
    optimizers = _create_optimizers(model, recipe)
    images = torch.empty((recipe.batch_size, 3, *image_size), device="meta")
    targets = torch.empty(recipe.batch_size, dtype=torch.int64, device="meta")
    steps_at = Counter(map(recipe.scale_at, range(recipe.steps)))
    flops = 0
    for scale, steps in steps_at.items():
        with FlopCounterMode(display=False) as counter:  # micro-batches would add up to the same
            _forward_and_backward(model, images, targets, replace(recipe, scales=(scale,)), step=0)
            for optimizer in optimizers:
                optimizer.step()
        flops += steps * counter.get_total_flops()
    return flops


def train_classifier(
    model, X, y, recipe, *, seed, groups=None, logit_adjusted=False, test_data=None, looks=None,
    minority_classes=(), checkpoint=None, device=None, data_parallel=False, description="training",
):  # fmt: skip
    """Train ``model`` in place for a fixed number of steps; the last weights are the result.

    Parameters
    ----------
    model : ResNet18
    X : ndarray of uint8, shape (n, height, width, 3)
    y : ndarray of int, shape (n,)
    recipe : Recipe
    seed : int
        Order of the images, crops and flips.
    groups : ndarray of int or bool, shape (n,), optional
        Source of each row: 0 real, 1 synthetic. Only used by the logit adjustment. Default: all from one.
    logit_adjusted : bool
        Train on cross-entropy of ``logits + log P(class | source of the row)`` (Menon et al. 2021,
        tau = 1, extended to several sources). Nothing is added at test time, so the network learns
        what holds under equal class frequencies, and looking synthetic tells nothing about the class.
        Not together with label smoothing, which would give a rare class more probability than its
        prior on every image, and so undo the adjustment.
    test_data : pair (X_test, y_test), optional
        Watched at the end of some epochs and written to the history. It decides nothing.
    looks : int, optional
        At how many epochs, evenly spread with the last one among them. Default: all.
    minority_classes : sequence of int
        Their mean recall on ``test_data`` goes into the history.
    checkpoint : path, optional
        Written after each epoch; a run killed at any moment continues from it to the same weights. After
        the last epoch it holds the finished training: remove it when the outcome is saved. Processes
        that train together must see the same file.
    device : str or torch.device, optional
    data_parallel : bool, default False
        Whether all processes of torch.distributed's group, which must exist, train this one network
        together: each computes its part of every batch, gradients are averaged, and all hold the same
        weights. The loss is that of one process, up to rounding, if ``batch_size`` is a multiple of
        ``micro_batch_size`` times the number of processes.
    description : str
        Shown before the progress bar.

    Returns
    -------
    list of dict
        One per epoch (the last may be a part of one): ``epoch``, ``step``, ``images_seen``,
        ``learning_rate`` (SGD's, of the next step), ``train_loss`` and ``train_accuracy`` (on augmented
        images while training), ``seconds``, and where the test data were looked at also ``test_loss``,
        ``test_accuracy``, ``test_minority_recall`` and ``seconds_of_test``.

    Raises
    ------
    FloatingPointError
        If the loss stops being finite. The last checkpoint stays.
    TypeError, ValueError
        If images, labels, groups or the recipe cannot be used, or if the checkpoint is damaged or belongs to
        another run.
    """
    X, y = map(np.ascontiguousarray, check_images(X, y))
    groups = _check_groups(groups, y)
    if test_data is not None:
        test_data = tuple(map(np.ascontiguousarray, check_images(*test_data)))
        if missing := set(minority_classes) - set(test_data[1].tolist()):
            raise ValueError(f"The test set has no image of the minority classes {sorted(missing)}.")
    seed = int(seed)  # a NumPy integer would not come back from the checkpoint
    if min(recipe.steps, recipe.batch_size, recipe.micro_batch_size) < 1:
        raise ValueError(f"steps, batch_size and micro_batch_size must be at least 1: got {recipe}.")
    if recipe.optimizer not in ("muon", "sgd"):
        raise ValueError(f"Unknown optimizer {recipe.optimizer!r}: choose 'muon' or 'sgd'.")
    if y.min() < 0 or y.max() >= model.num_classes:
        raise ValueError(
            f"Labels run from {y.min()} to {y.max()}, but the network has classes 0 to {model.num_classes - 1}."
        )
    if logit_adjusted and recipe.label_smoothing:
        raise ValueError("Label smoothing contradicts the logit adjustment: set label_smoothing=0.")
    device = choose_device(device)
    process, processes = (dist.get_rank(), dist.get_world_size()) if data_parallel else (0, 1)
    model.to(device=device, memory_format=torch.channels_last)
    batches = AugmentedBatches(
        X, recipe.batch_size, device, seed,
        padding=recipe.padding, flip=recipe.flip, share=(process, processes),
    )  # fmt: skip
    targets = torch.from_numpy(y).to(device)
    log_prior_of_row = None
    if logit_adjusted:
        log_priors = torch.from_numpy(class_log_priors(y, model.num_classes, groups)).to(device)
        log_prior_of_row = log_priors[torch.from_numpy(groups).to(device)]

    optimizers = _create_optimizers(model, recipe)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=optimizer.defaults["lr"], total_steps=recipe.steps + 1,
            pct_start=max(recipe.warmup, 2 / (recipe.steps + 1)),  # a rise takes at least a step
            cycle_momentum=False, anneal_strategy="linear",
        ) for optimizer in optimizers
    ]  # fmt: skip

    run = {  # what a checkpoint must agree with
        **asdict(recipe), "seed": seed, "width": model.width, "num_classes": model.num_classes,
        "downsampling": model.downsampling, "logit_adjusted": logit_adjusted, "rows": len(X),
        "processes": processes, "checksum": checksum(y, X),
        "checksum_of_groups": checksum(groups) if logit_adjusted else 0,
    }  # fmt: skip
    history = []
    if checkpoint is not None and Path(checkpoint).exists():
        history = _resume(checkpoint, run, model, optimizers, schedulers)
    step = history[-1]["step"] if history else 0
    watched = None if test_data is None else (_to_device(test_data[0], device), test_data[1])
    epochs = math.ceil(recipe.steps / len(batches))
    looks = epochs if looks is None else min(looks, epochs)
    epochs_to_look = {math.ceil(look * epochs / looks) for look in range(1, looks + 1)}

    with (
        tqdm(
            total=recipe.steps,
            initial=step,
            desc=description,
            unit="step",
            mininterval=2,
            disable=process > 0,
        ) as bar,
        deterministic_convolutions(),
    ):
        while step < recipe.steps:
            epoch = len(history) + 1
            started = time.perf_counter()
            model.train()
            loss_sum = torch.zeros((), device=device)
            right = torch.zeros((), device=device, dtype=torch.int64)
            steps_before = step
            for images, rows in batches.epoch(epoch):
                model.zero_grad()
                micro_batches = zip(
                    images.split(recipe.micro_batch_size), rows.split(recipe.micro_batch_size), strict=True
                )
                for micro_images, micro_rows in micro_batches:
                    loss, logits = _forward_and_backward(
                        model, micro_images, targets[micro_rows], recipe, step,
                        None if log_prior_of_row is None else log_prior_of_row[micro_rows],
                        share=len(micro_rows) / len(rows),
                    )  # fmt: skip
                    # Summed on the device: reading a value each step would make a GPU wait.
                    loss_sum += loss
                    right += (logits.argmax(1) == targets[micro_rows]).sum()
                if data_parallel:
                    _average([p.grad for p in model.parameters() if p.grad is not None])
                for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                    optimizer.step()
                    scheduler.step()
                step += 1
                bar.update()
                if step == recipe.steps:
                    break
            if data_parallel:
                _average([b for b in model.buffers() if b.is_floating_point()])
                dist.all_reduce(right)
                _average([loss_sum])
            record = {
                "epoch": epoch,
                "step": step,
                "images_seen": step * batches.batch_size,
                "learning_rate": schedulers[0].get_last_lr()[0],
                "train_loss": loss_sum.item() / (step - steps_before),
                "train_accuracy": right.item() / ((step - steps_before) * batches.batch_size),
            }
            record["seconds"] = time.perf_counter() - started
            if not np.isfinite(record["train_loss"]):
                raise FloatingPointError(
                    f"The loss of {description} became {record['train_loss']} in epoch {epoch} (up to "
                    f"step {step}). Lower the learning rates: {recipe}."
                )
            if watched is not None and epoch in epochs_to_look:
                record |= _watch(model, *watched, minority_classes)
                bar.set_postfix(
                    test=f"{record['test_accuracy']:.1%}", rare=f"{record['test_minority_recall']:.1%}"
                )
            history.append(record)
            if checkpoint is not None and process == 0:
                content = {
                    "run": run, "history": history, "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "schedulers": [scheduler.state_dict() for scheduler in schedulers],
                }  # fmt: skip
                with atomic_path(checkpoint) as temporary:
                    torch.save(content, temporary)
    if not all(weights.isfinite().all() for weights in model.state_dict().values()):
        raise FloatingPointError(
            f"The last step of {description} left weights that are not finite. Lower the learning rates: {recipe}."
        )
    model.eval()
    return history


def _average(tensors):
    """Replace each tensor by its mean over all processes, in one message."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))


def _resume(checkpoint, run, model, optimizers, schedulers):
    """Load a checkpoint into the objects and return its history."""
    content = load_torch_file(checkpoint, {"run", "history", "model", "optimizers", "schedulers"})
    if differences := describe_differences(content["run"], run):
        raise ValueError(
            f"The checkpoint {checkpoint} belongs to another run ({differences}). Remove it to start anew."
        )
    model.load_state_dict(content["model"])
    for kind, objects in (("optimizers", optimizers), ("schedulers", schedulers)):
        for thing, state in zip(objects, content[kind], strict=True):
            thing.load_state_dict(state)
    return content["history"]


# --- Evaluation ---------------------------------------------------------------------------------


JUDGED_AT_ONCE = 128  # images


@dataclass(frozen=True)
class Evaluation:
    """Outcome of :func:`evaluate_classifier`.

    Attributes
    ----------
    loss : float
        Mean cross-entropy in nats.
    predictions : ndarray of int64, shape (n,)
    logits : ndarray of float32, shape (n, num_classes)
    """

    loss: float
    predictions: np.ndarray
    logits: np.ndarray


def evaluate_classifier(model, X, y, *, batch_size=JUDGED_AT_ONCE, device=None):
    """Loss and predictions on images.

    For test-time augmentation, average the logits of several calls, such as those on ``X`` and on its
    mirror images ``X[:, :, ::-1]``.

    Parameters
    ----------
    model : ResNet18
        Its training or evaluation mode is left as it was.
    X : ndarray of uint8, shape (n, height, width, 3)
    y : ndarray of int, shape (n,)
    batch_size : int
        Small ones suit a CPU's cache.
    device : str or torch.device, optional

    Returns
    -------
    Evaluation
    """
    X, y = map(np.ascontiguousarray, check_images(X, y))
    device = choose_device(device)
    model.to(device=device, memory_format=torch.channels_last)
    return _evaluate(model, _to_device(X, device), y, batch_size)


@torch.inference_mode()
def _evaluate(model, images, y, batch_size=JUDGED_AT_ONCE):
    was_training = model.training
    model.eval()
    parts = []
    for batch in images.split(batch_size):
        with mixed_precision(images.device):
            parts.append(model(batch).float())
    model.train(was_training)
    logits = torch.cat(parts).cpu()
    loss = F.cross_entropy(logits, torch.from_numpy(y)).item()
    return Evaluation(loss, logits.argmax(1).numpy(), logits.numpy())


def _watch(model, images, y, minority_classes):
    """One look at the test set, for the history."""
    started = time.perf_counter()
    evaluation = _evaluate(model, images, y)
    right = evaluation.predictions == y
    return {
        "test_loss": evaluation.loss,
        "test_accuracy": float(right.mean()),
        # Equal to the mean over classes, since each class is averaged first.
        "test_minority_recall": float(np.mean([right[y == c].mean() for c in minority_classes] or [0])),
        "seconds_of_test": time.perf_counter() - started,
    }

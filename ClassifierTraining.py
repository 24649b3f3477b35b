"""Training of a classifier: recipe, optimiser and loop.

    recipe = Recipe(steps=1600)
    history = train_classifier(model, X, y, recipe, seed=0)

``Batches.py`` makes the batches and ``Losses.py`` holds the losses.

References
----------
Foret et al. (2021), Sharpness-aware minimization for efficiently improving generalization.
Menon et al. (2021), Long-tail learning via logit adjustment. Smith and Topin (2018), Super-convergence (the
one-cycle schedule). Hoffer et al. (2017), Train longer, generalize better (ghost batch normalisation). Howard
(2018), Training ImageNet in 3 hours for 25 minutes (progressive resizing). Jordan (2024), 94% on CIFAR-10 in 3.29
seconds on a single GPU (fast batch-norm shifts).
"""

import contextlib
import copy
import inspect
import math
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from Batches import AugmentedBatches, MicroBatch, split_evenly
from Checkpoints import Checkpoint
from Checks import check_images, check_labels
from ClassifierNetwork import CosineLinear
from Compilation import CompiledNetwork
from DeviceFaults import describe_fault, kind_and_first_line
from Files import plain
from GhostBatchNorm import micro_batches, shared_statistics
from Losses import ClassBalancedLoss, CrossEntropy, LDAMLoss, LogitAdjustedLoss
from Muon import KernelMuon
from Precision import ScaledSteps, half_weights, mixed_precision, precision_name
from Repeatability import checksum, deterministic_convolutions

SMALLEST_SIDE = 16  # pixels; the network's last stage then still has 2x2 places

# --- Recipe -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train. The budget is in training steps, so that arms with more images get no more compute.

    ``benchmarks/README.md`` has the ablations behind the defaults. They were made on the balanced data set, which
    is the ceiling's. No other arm of the study took part in the choice.

    Attributes
    ----------
    steps : int
        Training steps in all.
    batch_size : int
        Images per training step, over all processes together.
    micro_batch_size : int
        Images that share batch-norm statistics (ghost batch normalisation, Hoffer et al. 2017). The gradients of a
        batch's micro-batches are averaged, so several processes compute what one process would. On a CPU,
        micro-batches pass through the network one after another, otherwise all at once.
    optimizer : {'muon', 'sgd'}
        Muon (Jordan et al. 2024) for the kernels of the residual blocks and SGD for the rest, or SGD for all weights.
    learning_rate, momentum, weight_decay : float
        Of SGD: the peak of the one-cycle schedule, Nesterov's momentum, and the decay, not on norms and biases.
    muon_learning_rate, muon_momentum, muon_weight_decay : float
        Of Muon: the peak of the same schedule, the momentum, and the decay, which is multiplied by the learning rate.
    muon_iterations : int
        Newton-Schulz iterations that make Muon's updates nearly orthogonal. Three cost less than the usual five and
        are enough (Jordan's airbench also has three).
    warmup : float
        Fraction of the steps before the peak. After the peak the learning rates fall linearly.
    scales : tuple of float
        Side of the images, relative to the full side, in each equal part of the training. Small images first cost
        less (progressive resizing, Howard 2018). No side shrinks below 16 pixels.
    label_smoothing : float
        0 in the study. It contradicts the logit adjustment (see :class:`LogitAdjustedLoss`), and in the other arms
        alone it would be a second difference between the arms.
    padding, flip, cutout : int, bool and int
        See :class:`Batches.AugmentedBatches`.
    sam_radius : float
        If above 0, each gradient is taken where the loss is highest within about this distance of the weights
        (sharpness-aware minimisation, Foret et al. 2021). A step then costs twice as much.
    norm_shift_rate : float
        The learning rate of the shifts of batch norm, relative to that of SGD (Jordan 2024).

    Raises
    ------
    ValueError
        If there is no step, no image in a batch, no such optimizer, no scale, or a number is out of range.
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
    cutout: int = 0
    sam_radius: float = 0.0
    norm_shift_rate: float = 1.0

    def __post_init__(self):
        for name, value in plain(self).items():  # PyTorch refuses some NumPy scalars
            object.__setattr__(self, name, tuple(value) if name == "scales" else value)
        positive, any_size = (
            ("steps", "batch_size", "micro_batch_size", "muon_iterations"),
            ("padding", "cutout"),
        )
        for name, least in (dict.fromkeys(positive, 1) | dict.fromkeys(any_size, 0)).items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be whole and at least {least}: got {getattr(self, name)}.")
        if self.optimizer not in ("muon", "sgd"):
            raise ValueError(f"Unknown optimizer {self.optimizer!r}: choose 'muon' or 'sgd'.")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be one or more positive numbers: got {self.scales}.")
        for name in (
            "learning_rate",
            "weight_decay",
            "muon_learning_rate",
            "muon_weight_decay",
            "sam_radius",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number, 0 or more: got {getattr(self, name)}.")
        for name in ("momentum", "muon_momentum", "label_smoothing", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1: got {getattr(self, name)}.")
        if not 0 < self.norm_shift_rate < math.inf:
            raise ValueError(f"norm_shift_rate must be a positive number: got {self.norm_shift_rate}.")

    def as_json(self):
        """The settings as a dict that equals what is read back from a JSON file of them."""
        return asdict(self) | {"scales": list(self.scales)}

    def scale_at(self, step):
        """Relative side of the images in step ``step``, counted from 0."""
        return self.scales[min(step * len(self.scales) // self.steps, len(self.scales) - 1)]

    def batches(self, X, seed, device, rank=0, world_size=1):
        """The :class:`Batches.AugmentedBatches` of this recipe; see there for the parameters."""
        options = self.augmentation | {"rank": rank, "world_size": world_size}
        return AugmentedBatches(X, self.batch_size, device, seed, **options)

    @property
    def augmentation(self):
        """The arguments of :class:`Batches.AugmentedBatches` that say how images are changed: a dict."""
        return {"padding": self.padding, "flip": self.flip, "cutout": self.cutout}


# --- Training -----------------------------------------------------------------------------------


def train_classifier(
    model, X, y, recipe, *, seed, loss=None, batches=None, after_epoch=None, checkpoint=None
):
    """Train ``model`` in place, on its device, for a fixed number of steps. The last weights are the result.

    There are nine parameters. Six say what is trained and by which loss; each of the others is None for most callers
    and cannot be derived.

    Parameters
    ----------
    model : ResNet18
    X : ndarray of uint8, shape (n, height, width, 3)
    y : ndarray of int, shape (n,)
    recipe : Recipe
    seed : int
        Order, crops and flips of the default batches.
    loss : torch.nn.Module, optional
        Called like :class:`Losses.CrossEntropy`, the default. It is moved to the model's device. Its ``repr`` must tell it
        from other losses, because checkpoints are compared by it.
    batches : object, optional
        Default: ``recipe.batches(X, seed, device)``. Any other object needs ``batch_size`` and ``epoch(number)``, as
        :class:`Batches.AugmentedBatches` has them, or yields lists of :class:`Batches.MicroBatch`. Its
        ``description``, if it has one, tells it from other batches in checkpoints. With a ``world_size`` above 1, all processes of torch.distributed's group
        train this network together: each computes its part of every batch, gradients are averaged, and all hold the
        same weights. The loss is then that of one process, up to rounding, if ``batch_size`` is a multiple of
        ``micro_batch_size`` times ``world_size``.
    after_epoch : callable, optional
        ``after_epoch(model, record)`` is called by every process after each epoch, before the checkpoint is written.
        If it returns a dict of plain values, they are added to the record.
    checkpoint : path, optional
        Written after each epoch, on a GPU at most every 30 seconds. A killed training continues from it to the same
        weights, whatever weights ``model`` has now: other initial weights need another path. After the last epoch it
        holds the finished training: remove it when the outcome is saved. Of processes that train together, the first
        reads and writes it.

    Returns
    -------
    list of dict
        A record per epoch (the last epoch may be incomplete): ``epoch``, ``step``, ``images_seen``, ``learning_rate``
        (SGD's, of the next step), ``train_loss`` and ``train_accuracy`` (on augmented images during training),
        ``skipped_steps`` (that a float16 gradient overflowed in), ``seconds``, then what ``after_epoch`` returned.

    Raises
    ------
    FloatingPointError, DeviceFaults.DeviceFaultError
        If the loss stops being finite, or the device fails. The last checkpoint stays.
    TypeError, ValueError
        If images, labels or loss cannot be used, or the checkpoint is damaged or belongs to another training.
    """
    X, y = map(np.ascontiguousarray, check_images(X, y))
    seed = int(seed)  # a NumPy integer would not come back from the checkpoint
    loss = CrossEntropy(recipe.label_smoothing) if loss is None else loss
    _check_labels_and_loss(y, model, recipe, loss)
    batches = batches if batches is not None else recipe.batches(X, seed, next(model.parameters()).device)
    _check_batches(batches, recipe, len(y))
    training = _Training(model, y, recipe, loss, batches)
    # An old checkpoint lacks settings that could not be chosen when it was written.
    defaults = asdict(Recipe(steps=1)) | {"mirrored": False, "precision": precision_name(training.device)}
    store = Checkpoint(checkpoint, training.identity() | {"seed": seed, "checksum": checksum(y, X)}, defaults)
    store.require_writable()
    history = training.resume(store)
    pause, saved = seconds_between_checkpoints(training.device), time.monotonic()
    # Such as "cat-50/imbalanced-seed0".
    name = "training" if checkpoint is None else "/".join(Path(checkpoint).with_suffix("").parts[-2:])
    with training.running(name, store) as bar:
        while training.step < recipe.steps:
            record = training.train_epoch(len(history) + 1, bar)
            if not math.isfinite(record["train_loss"]):
                raise FloatingPointError(
                    f"The loss of {name} became {record['train_loss']} in epoch {record['epoch']} (up to step "
                    f"{record['step']}). Lower the learning rates: {recipe}."
                )
            if after_epoch is not None and (returned := after_epoch(model, record)):
                record |= returned
                bar.set_postfix({k: v for k, v in returned.items() if not k.startswith("seconds")})
            history.append(record)
            is_due = training.step == recipe.steps or time.monotonic() - saved >= pause
            if training.rank == 0 and is_due:
                store.save(history=history, states=training.states())
                saved = time.monotonic()
    if not all(weights.isfinite().all() for weights in model.state_dict().values()):
        raise FloatingPointError(
            f"The last step of {name} left weights that are not finite. Lower the learning rates: {recipe}."
        )
    model.eval()
    return history


def seconds_between_checkpoints(device):
    """How long a training computes at least before it writes again. A GPU's epoch may take less time than the writing."""
    return 0 if device.type == "cpu" else 30


def _check_labels_and_loss(y, model, recipe, loss):
    check_labels(y, model.num_classes)
    if not isinstance(loss, torch.nn.Module) or not _takes_three(loss.forward):
        raise TypeError(
            "loss must be a torch.nn.Module that is called as loss(logits, targets, rows), such as those in Losses.py: got "
            f"{loss!r}."
        )
    if isinstance(loss, ClassBalancedLoss | LDAMLoss) and len(loss.weights) != model.num_classes:
        raise ValueError(f"The loss has {len(loss.weights)} classes, but the network {model.num_classes}.")
    if isinstance(loss, LogitAdjustedLoss):
        if recipe.label_smoothing:
            raise ValueError("Label smoothing contradicts the logit adjustment: set label_smoothing=0.")
        priors = loss.log_prior_of_row
        if (rows := len(priors)) != len(y):
            raise ValueError(
                f"The loss was made for {rows} rows, but y has {len(y)}. Make it from the same y."
            )
        if priors.shape[1] != model.num_classes or not priors.cpu()[range(len(y)), y].isfinite().all():
            raise ValueError("The loss was made from other labels or classes than the network's.")
    elif recipe.label_smoothing and isinstance(loss, ClassBalancedLoss | LDAMLoss):
        raise ValueError(f"{type(loss).__name__} has no label smoothing: set label_smoothing=0.")
    if isinstance(loss, LDAMLoss) and not isinstance(model.head, CosineLinear):
        raise ValueError("LDAM needs cosines: create the network with cosine_head=True.")


def _takes_three(function):
    try:
        inspect.signature(function).bind("logits", "targets", "rows")
    except TypeError:
        return False
    return True


def _check_batches(batches, recipe, rows):
    if getattr(batches, "n", rows) != rows:
        raise ValueError(
            f"The batches were made from {batches.n:,} images, but X has {rows:,}. Make them from the same X."
        )
    if getattr(batches, "steps", recipe.steps) != recipe.steps:
        raise ValueError(
            f"The batches are made for {batches.steps} training steps, but the recipe has {recipe.steps}."
        )
    if recipe.sam_radius and getattr(batches, "world_size", 1) > 1:
        raise ValueError(
            "Sharpness-aware steps need the gradient of the whole batch, so one process: set sam_radius=0."
        )


class _Training:
    """The parts of one training, and the stages of its loop: an epoch and a training step."""

    def __init__(self, model, y, recipe, loss, batches):
        self.device = next(model.parameters()).device
        self.model = model.to(memory_format=torch.channels_last)
        self.loss = loss.to(self.device)
        self.targets = torch.from_numpy(y).to(self.device)
        self.recipe, self.batches, self.step = recipe, batches, 0
        self.optimizers = _create_optimizers(model, recipe)
        self.schedulers = [_create_scheduler(optimizer, recipe) for optimizer in self.optimizers]
        self.network = CompiledNetwork(model, self.device)
        self.scaled = ScaledSteps(model.parameters(), self.optimizers, self.device)
        self.parts = [model, *self.optimizers, *self.schedulers, self.scaled]  # what a checkpoint holds
        self.world_size = getattr(batches, "world_size", 1)
        self.rank = dist.get_rank() if self.world_size > 1 else 0

    @contextlib.contextmanager
    def running(self, name, store):
        """Context of the loop, with a progress bar: convolutions repeat, and a failing device says how to go on."""
        options = {"unit": "step", "mininterval": 2, "disable": self.rank > 0}
        with (
            store.device_faults("The training" if store.path is None else f"The training {name}"),
            deterministic_convolutions(),
            shared_statistics(self.model, self.world_size),
            tqdm(total=self.recipe.steps, initial=self.step, desc=name, **options) as bar,
        ):
            yield bar

    def train_epoch(self, number, bar):
        """Train on all batches of an epoch, or on as many as there are steps left; return its record."""
        started = time.perf_counter()
        first_step, skipped = self.step, self.scaled.skipped
        self.model.train()
        # Summed on the device: reading a value in each step would make a GPU wait.
        self.loss_sum = torch.zeros((), device=self.device)
        self.right = torch.zeros((), device=self.device, dtype=torch.int64)
        for batch in self.batches.epoch(number):
            size = self.recipe.micro_batch_size
            self.train_step(batch if isinstance(batch, list) else split_evenly(*batch, size))
            bar.update()
            if self.step == self.recipe.steps:
                break
        if self.world_size > 1:
            _average_over_processes([b for b in self.model.buffers() if b.is_floating_point()])
            dist.all_reduce(self.right)
            _average_over_processes([self.loss_sum])
        if not (steps := self.step - first_step):
            raise ValueError(f"Epoch {number} has no batch. Train on more images or in smaller batches.")
        return {
            "epoch": number,
            "step": self.step,
            "images_seen": self.step * self.batches.batch_size,
            "learning_rate": self.schedulers[0].get_last_lr()[0],
            "train_loss": self.loss_sum.item() / steps,
            "train_accuracy": self.right.item() / (steps * self.batches.batch_size),
            "skipped_steps": self.scaled.skipped - skipped,
            "seconds": time.perf_counter() - started,
        }

    def train_step(self, micro_batches):
        """Change the weights once, by the mean gradient of a batch, computed in micro-batches."""
        self.model.zero_grad()
        self.loss.progress = self.step / self.recipe.steps
        self._add_gradients(micro_batches)
        if self.recipe.sam_radius:
            with _moved_uphill(self.model, self.recipe.sam_radius):
                self.model.zero_grad()
                self._add_gradients([replace(part, tracked=False) for part in micro_batches], counted=False)
        if self.world_size > 1:
            _average_over_processes([p.grad for p in self.model.parameters() if p.grad is not None])
        self.scaled.step()
        with warnings.catch_warnings():
            if self.scaled.skipped:  # the schedule goes on also if the first step was skipped
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for scheduler in self.schedulers:
                scheduler.step()
        self.step += 1

    def _add_gradients(self, micro_batches, counted=True):
        scale = self.recipe.scale_at(self.step)
        for parts in [micro_batches] if in_one_pass(self.device) else [[part] for part in micro_batches]:
            loss, right = _forward_and_backward(
                self.model, self.loss, parts, self.targets, scale, self.scaled.backward, self.network
            )
            if counted:
                self.loss_sum += loss
                self.right += right

    def identity(self):
        """What a checkpoint must agree with."""
        return asdict(self.recipe) | {
            "width": self.model.width,
            "num_classes": self.model.num_classes,
            "downsampling": self.model.downsampling,
            "mirrored": self.model.mirrored,
            "head": type(self.model.head).__name__,
            "loss": repr(self.loss),
            "batches": getattr(self.batches, "description", type(self.batches).__name__),
            "rows": len(self.targets),
            "processes": self.world_size,
            "precision": precision_name(self.device),  # going on in another type would give other weights
        }

    def states(self):
        return [part.state_dict() for part in self.parts]

    def resume(self, store):
        """Continue from the checkpoint, if there is one, and return its history."""
        # One process reads for all: if they saw the disk differently, they would train different steps together.
        content = store.load("history", "states") if self.rank == 0 else None
        if self.world_size > 1:
            contents = [content]
            dist.broadcast_object_list(contents, src=0)
            [content] = contents
        if content is None:
            return []
        try:
            states = content["states"]
            if len(states) == len(self.parts) - 1:  # written before gradients were scaled
                states.append(self.scaled.state_dict())
            for part, state in zip(self.parts, states, strict=True):
                part.load_state_dict(state)
            self.step = int(content["history"][-1]["step"])
        except Exception as error:  # each part raises its own kinds for a state that is not one of its
            if describe_fault(error) or isinstance(error, MemoryError):
                raise
            raise ValueError(
                f"The checkpoint {store.path} is damaged ({kind_and_first_line(error)}). Remove it to start again."
            ) from error
        return content["history"]


def _create_optimizers(model, recipe):
    """SGD, and Muon after it if the recipe has it."""
    kernels = []
    if recipe.optimizer == "muon":
        kernels = [module.weight for module in model.blocks.modules() if isinstance(module, nn.Conv2d)]
    shifts = []
    if recipe.norm_shift_rate != 1:  # else they are among the others, as in older checkpoints
        shifts = [module.bias for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    taken = set(map(id, kernels + shifts))
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in taken]
    others = [p for p in model.parameters() if p.ndim <= 1 and id(p) not in taken]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others}]
    if shifts:
        groups.append({"params": shifts, "lr": recipe.norm_shift_rate * recipe.learning_rate})
    sgd = torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0,
        fused=others[0].device.type in ("cpu", "cuda"),
    )  # fmt: skip
    if not kernels:
        return [sgd]
    muon = KernelMuon(
        kernels, lr=recipe.muon_learning_rate, momentum=recipe.muon_momentum,
        weight_decay=recipe.muon_weight_decay, iterations=recipe.muon_iterations,
    )  # fmt: skip
    return [sgd, muon]


def _create_scheduler(optimizer, recipe):
    """The one-cycle schedule: a linear rise to the optimizer's learning rates, and a linear fall."""
    peaks, total_steps = [group["lr"] for group in optimizer.param_groups], recipe.steps + 1
    warmup = max(recipe.warmup, 2 / total_steps)  # a rise takes at least a step
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps, pct_start=warmup, anneal_strategy="linear", cycle_momentum=False
    )


def in_one_pass(device):
    """Whether all micro-batches of a step pass through the network together. A CPU's cache is too small for that."""
    return device.type != "cpu"


@record_function("forward and backward")  # what torch.profiler shows
def _forward_and_backward(model, loss, parts, targets, scale, backward=torch.Tensor.backward, network=None):
    """Add the gradient of micro-batches' weighted mean losses; return that loss and the number of right answers.

    The images are shrunk to ``scale`` times their side first, but not below ``SMALLEST_SIDE``. ``targets`` are those
    of all rows of the training set. ``backward`` takes the loss. ``network`` is the :class:`CompiledNetwork` of the model.
    """
    images, rows = _together([part.images for part in parts]), _together([part.rows for part in parts])
    sides = tuple(images.shape[2:])
    size = tuple(min(side, max(SMALLEST_SIDE, round(scale * side))) for side in sides)
    if size != sides:
        images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    sizes, tracked = [len(part.rows) for part in parts], [part.tracked for part in parts]
    statistics = partial(micro_batches, model, sizes, tracked)
    if network is not None and network.compiled is not None:
        images = images.float()  # a CUDA graph copies inputs of one type in one operation
    with mixed_precision(images.device):
        if network is not None and network.prepare(images, (*sizes, *tracked), partial(statistics, True)):
            with statistics(compiled=True):
                logits = network(images)
        else:
            with statistics(), half_weights(model):
                logits = model(images)
    logits, wanted = logits.float(), targets[rows]
    if len(parts) > 1 and _is_mean_over_all(loss, parts):
        weighted_loss = sum(part.weight for part in parts) * loss(logits, wanted, rows)
    else:
        weigh = partial(_weighted_loss, loss, targets)
        weighted_loss = sum(map(weigh, parts, logits.split(sizes), wanted.split(sizes)))
    backward(weighted_loss)
    return weighted_loss.detach(), (logits.detach().argmax(1) == wanted).sum()


def _together(tensors):
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _is_mean_over_all(loss, parts):
    """Whether the weighted mean losses of micro-batches add up to the mean loss of all their images."""
    weights = [part.weight / len(part.rows) for part in parts]
    equal = max(weights) - min(weights) < 1e-6 * max(weights)
    return getattr(loss, "mean_over_images", False) and equal and all(part.partners is None for part in parts)


def _weighted_loss(loss, targets, part, logits, wanted):
    weighted_loss = part.weight * loss(logits, wanted, part.rows)
    if part.partners is None:
        return weighted_loss
    partners_loss = part.weight * loss(logits, targets[part.partners], part.partners)
    return part.kept * weighted_loss + (1 - part.kept) * partners_loss


@contextlib.contextmanager
def _moved_uphill(model, radius):
    """Move the weights by ``radius`` along their gradient within the block (Foret et al. 2021).

    They stay where they are if the gradient is not finite, as in float16 it may be: such a step is skipped.
    """
    weights = [p for p in model.parameters() if p.grad is not None]
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        length = nn.utils.get_total_norm([p.grad for p in weights])
        if length.isfinite() and length > 0:
            torch._foreach_add_(weights, torch._foreach_mul([p.grad for p in weights], radius / length))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)


def _average_over_processes(tensors):
    """Replace each tensor by its mean over all processes, in one message."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))


def count_training_flops(model, recipe, image_size=(32, 32)):
    """Count the floating-point operations of a whole training: forward pass, backward pass and optimiser.

    :class:`torch.utils.flop_counter.FlopCounterMode` counts matrix products and convolutions, two operations per
    multiplication and addition. It counts one step for each size of the images, and computes nothing.

    Parameters
    ----------
    model : ResNet18
    recipe : Recipe
    image_size : pair of int, default (32, 32)
        Height and width of the training images in pixels.

    Returns
    -------
    int
    """
    model = copy.deepcopy(model).to(device="meta", memory_format=torch.channels_last).train()
    optimizers, loss = _create_optimizers(model, recipe), CrossEntropy()
    images = torch.empty((recipe.batch_size, 3, *image_size), device="meta")
    targets, rows = torch.empty((2, recipe.batch_size), dtype=torch.int64, device="meta")
    part = MicroBatch(images, rows, weight=1.0)  # the micro-batches would add up to the same
    flops = 0
    for scale, steps in Counter(map(recipe.scale_at, range(recipe.steps))).items():
        with FlopCounterMode(display=False) as counter:
            for _ in range(2 if recipe.sam_radius else 1):
                _forward_and_backward(model, loss, [part], targets, scale)
            for optimizer in optimizers:
                optimizer.step()
        flops += steps * counter.get_total_flops()
    return flops

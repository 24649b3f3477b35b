"""Batches of training images: crops, flips, cutout, and micro-batches of one source.

    batches = AugmentedBatches(X, 256, device, seed=0)
    for images, rows in batches.epoch(1): ...

    batches = SourceBatches(X, sources, recipe, device, seed=0, phases=((1.0, 0.25),))
    for micro_batches in batches.epoch(1): ...        # a list of MicroBatch for each training step

A batch is a pair of images and their rows in the training set, or a list of :class:`MicroBatch`.
``ClassifierTraining.py`` splits a pair into micro-batches of equal size. A list says more: which images share
their batch-norm statistics, how much each part weighs, and which images were mixed.

References
----------
DeVries and Taylor (2017), Improved regularization of convolutional neural networks with Cutout. Hoffer et al. (2017),
Train longer, generalize better (ghost batch normalisation). Park et al. (2022), The majority can help the minority
(CMO). Xie et al. (2020), Adversarial examples improve image
recognition (batch-norm statistics for each source). Ye-Bin et al. (2023), SYNAuG. Yun et al. (2019), CutMix. Zhang et al. (2018), mixup.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from Checks import check_pixels
from Repeatability import checksum, derive_seed


@dataclass(frozen=True)
class MicroBatch:
    """Images that share their batch-norm statistics.

    Attributes
    ----------
    images : tensor of uint8 or float, shape (m, 3, height, width)
        Pixels from 0 to 255.
    rows : int64 tensor, shape (m,)
        The images' rows in the training set.
    weight : float
        Of the micro-batch's mean loss in the loss of the training step. The weights of a step add up to 1.
    tracked : bool, default True
        Whether the running batch-norm statistics, which evaluation uses, follow these images.
    partners : int64 tensor, shape (m,), or None
        If the images were mixed: the rows of the images that were mixed in.
    kept : float, default 1.0
        Fraction of each image that is its own; the rest is its partner's.
    """

    images: torch.Tensor
    rows: torch.Tensor
    weight: float
    tracked: bool = True
    partners: torch.Tensor | None = None
    kept: float = 1.0


def split_evenly(images, rows, size):
    """Split a batch into micro-batches of ``size`` images, the last one possibly smaller: a list of MicroBatch."""
    parts = zip(images.split(size), rows.split(size), strict=True)
    return [MicroBatch(part, part_rows, len(part_rows) / len(rows)) for part, part_rows in parts]


class AugmentedBatches:
    """Random crops and flips of a whole data set that stays on the device.

    Epoch ``e`` is the same in every run, whatever was drawn before, so a resumed training sees what an uninterrupted
    one sees. The last incomplete batch is left out (other rows each epoch), unless it is the only one.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, height, width, 3)
    batch_size : int
        Images in a batch, over all processes together; at most n are used.
    device : torch.device
    seed : int
        Of order, crops, flips and squares.
    padding : int, default 2
        Pixels by which crops may move. The border is filled by reflection.
    flip : bool, default True
        Whether each image is mirrored left to right with probability one half.
    cutout : int, default 0
        Side in pixels of a square of each image that is set to the mean colour of ``X``. The middle of the square
        lies anywhere in the image (DeVries and Taylor 2017). 0 leaves the images whole.
    rank, world_size : int, default 0 and 1
        Number of this process, and of all processes that train together. Each gets its part of every batch. All
        parts together are the batch that a single process would get.

    Raises
    ------
    TypeError, ValueError
        If ``X`` does not hold such images, ``batch_size`` is below 1, ``world_size`` does not divide the batch, or the square
        is larger than the images.
    """

    def __init__(self, X, batch_size, device, seed, *, padding=2, flip=True, cutout=0, rank=0, world_size=1):
        X = check_pixels(X)
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more: got {batch_size}.")
        self.n, self.height, self.width = X.shape[:3]
        self.batch_size = min(batch_size, self.n)
        self.device, self.seed, self.padding, self.flip, self.cutout = device, seed, padding, flip, cutout
        self.world_size = world_size
        if self.batch_size % world_size:
            raise ValueError(
                f"{world_size} processes cannot share batches of {self.batch_size} images equally. "
                "Start a number of processes that divides the batch."
            )
        if not 0 <= cutout <= min(self.height, self.width):
            raise ValueError(
                f"cutout must be from 0 to the images' side, {min(self.height, self.width)} pixels: got {cutout}."
            )
        self.part = self.batch_size // world_size
        self.first = rank * self.part
        pad = (padding, padding)
        padded = torch.from_numpy(np.pad(X, ((0, 0), pad, pad, (0, 0)), mode="reflect")).to(device)
        # A view of all crops, shape (n, offsets, offsets, 3, height, width). Indexing it gathers and crops
        # in one operation, and the result is already in channels_last order.
        self.crops = padded.unfold(1, self.height, 1).unfold(2, self.width, 1)
        if cutout:
            mean = torch.from_numpy(X.mean(axis=(0, 1, 2)))
            self.grey = mean.round().to(torch.uint8).view(3, 1, 1).to(device)

    @property
    def description(self):
        """What the batches of another training must have in common with these."""
        return (
            f"{type(self).__name__}(batch_size={self.batch_size}, seed={self.seed}, padding={self.padding}, "
            f"flip={self.flip}, cutout={self.cutout})"
        )

    def __len__(self):
        return self.n // self.batch_size

    def epoch(self, number):
        """Yield ``(images, rows)``: uint8 (part, 3, height, width) and int64 (part,) on the device."""
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, 1, number))
        order = torch.randperm(self.n, generator=generator, device=self.device)
        augment = self._augmentation(generator, self.n, order)
        for start in range(self.first, len(self) * self.batch_size, self.batch_size):
            rows = order[start : start + self.part]
            yield augment(rows, slice(start, start + self.part)), rows

    def _augmentation(self, generator, n, order=slice(None)):
        """Draw ``n`` augmentations: a function of rows, and of the slice of augmentations that they get, in ``order``."""

        def draw(high):
            return torch.randint(high, (n,), generator=generator, device=self.device)[order]

        top, left = draw(2 * self.padding + 1), draw(2 * self.padding + 1)
        mirrored = draw(2).bool() if self.flip else None
        hole = (draw(self.height), draw(self.width)) if self.cutout else None

        def augment(rows, which):
            images = self.crops[rows, top[which], left[which]]
            if self.flip:
                images = torch.where(mirrored[which].view(-1, 1, 1, 1), images.flip(-1), images)
            if self.cutout:
                images = self._cut_out(images, *(middle[which] for middle in hole))
            return images

        return augment

    def _cut_out(self, images, middle_row, middle_column):
        inside = []
        for size, middle in ((self.height, middle_row), (self.width, middle_column)):
            place = torch.arange(size, device=self.device) - middle[:, None] + self.cutout // 2
            inside.append((place >= 0) & (place < self.cutout))
        return torch.where(inside[0][:, None, :, None] & inside[1][:, None, None, :], self.grey, images)


class SourceBatches(AugmentedBatches):
    """Batches with a given fraction of synthetic images, whose micro-batches hold images of one source.

    So each source is normalised by statistics of its own (Xie et al. 2020, without their second set of scales
    and shifts), and the running statistics, which evaluation uses, are those of real images. Each source weighs by
    its fraction of the batch. The rows of a source come in random order, each as often as the others.

    Parameters
    ----------
    X, device, seed
        See :class:`AugmentedBatches`.
    sources : ndarray of int or bool, shape (n,)
        Source of each row: 0 real, 1 synthetic.
    recipe : ClassifierTraining.Recipe
        Sizes of batches and micro-batches, number of steps, augmentation.
    phases : sequence of pairs of float
        ``(end, fraction)``: until ``end``, a fraction of the training, so much of each batch is synthetic. The
        ends ascend to 1. ``((0.85, 0.25), (1.0, 0.0))`` ends on real images alone.
    synthetic_weight : float, default 1.0
        Weight of a synthetic image in the loss of a step, relative to a real one.
    more : int, default 0
        Images in a batch beyond ``recipe.batch_size``.
    statistics_per_source : bool, default True
        False: every micro-batch holds images of both sources, in the batch's proportion. What the separation is worth
        can be measured that way, except that the micro-batches also have another size: two of 128 images instead of
        two of 96 real and one of 64 synthetic ones, say.

    Raises
    ------
    ValueError
        If the phases are not as above, a source that they need has no row or less than half an image of a batch, the
        weight is negative or not finite, or sources with different weights are to share micro-batches.
    """

    def __init__(
        self, X, sources, recipe, device, seed, *, phases=((1.0, 0.5),), synthetic_weight=1.0, more=0,
        statistics_per_source=True,
    ):  # fmt: skip
        super().__init__(X, recipe.batch_size + more, device, seed, **recipe.augmentation)
        if not 0 <= synthetic_weight < math.inf:
            raise ValueError(f"synthetic_weight must be a finite number, 0 or more: got {synthetic_weight}.")
        if synthetic_weight != 1 and not statistics_per_source:
            raise ValueError(
                "A synthetic_weight needs micro-batches of one source: statistics_per_source=True."
            )
        sources = np.asarray(sources)
        if sources.shape != (len(X),) or not np.isin(sources, (0, 1)).all():
            raise ValueError(
                f"sources must be {len(X):,} numbers, 0 for a real row and 1 for a synthetic one: got the shape "
                f"{sources.shape} and the values {np.unique(sources)[:5].tolist()}."
            )
        self.steps, self.micro_batch_size = recipe.steps, recipe.micro_batch_size
        self.synthetic_weight, self.statistics_per_source = synthetic_weight, statistics_per_source
        self.phases = tuple((float(end), float(fraction)) for end, fraction in phases)
        self.pools = [np.flatnonzero(sources == source) for source in (0, 1)]
        fractions = _fractions(self.phases, self.steps)
        synthetic = np.round(fractions * self.batch_size).astype(int)
        lacks_synthetic = (fractions > 0) & (synthetic == 0)
        lacks_real = (fractions < 1) & (synthetic == self.batch_size)
        if (lacks_synthetic | lacks_real).any():
            raise ValueError(
                f"Batches of {self.batch_size} images are too small for the synthetic fractions of the phases {self.phases}."
            )
        self.counts = np.stack([self.batch_size - synthetic, synthetic], axis=1)
        for name, pool, needed in zip(
            ("real", "synthetic"), self.pools, self.counts.sum(axis=0), strict=True
        ):
            if needed and not len(pool):
                raise ValueError(f"The phases {self.phases} need {name} images, but no row is {name}.")
        if not (self.counts @ (1, synthetic_weight)).all():
            raise ValueError("synthetic_weight is 0, but the phases have batches that are synthetic only.")
        self.before = np.concatenate([[[0, 0]], self.counts.cumsum(axis=0)])  # rows used before each step
        self._orders = {}  # (source, pass) -> its rows in random order

    def epoch(self, number):
        """Yield a list of :class:`MicroBatch` for each training step, real ones first if they are apart.

        Epochs are counted from 1. Together they have the recipe's number of steps; later epochs are empty.
        """
        if number < 1:
            raise ValueError(f"Epochs are counted from 1: got {number}.")
        first = (number - 1) * len(self)
        steps = range(first, min(first + len(self), len(self.counts)))
        if not steps:
            return
        rows = [self._rows(source, step) for step in steps for source in (0, 1)]
        order = torch.from_numpy(np.concatenate(rows)).to(self.device)
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, 1, number))
        augment = self._augmentation(generator, len(order))
        for k, step in enumerate(steps):
            part = slice(k * self.batch_size, (k + 1) * self.batch_size)
            images, rows = augment(order[part], part), order[part]
            yield self._micro_batches(images, rows, int(self.counts[step, 0]))

    @property
    def description(self):
        """What the batches of another training must have in common with these."""
        real, synthetic = (checksum(pool) for pool in self.pools)
        return (
            f"{super().description} phases={self.phases}, steps={self.steps}, micro_batch_size={self.micro_batch_size}, "
            f"synthetic_weight={self.synthetic_weight}, real={real}, synthetic={synthetic}"
            + ("" if self.statistics_per_source else ", statistics of all sources together")
        )

    def _rows(self, source, step):
        """The rows of a source in a step. Its pool is run through again and again, each time in another order."""
        pool, start, end = self.pools[source], self.before[step, source], self.before[step + 1, source]
        if start == end:
            return pool[:0]
        passes = range(start // len(pool), (end - 1) // len(pool) + 1)
        rows = np.concatenate([self._shuffled(source, k) for k in passes])
        offset = passes[0] * len(pool)
        return rows[start - offset : end - offset]

    def _shuffled(self, source, number):
        key = (source, number)
        if key not in self._orders:
            for old in [k for k in self._orders if k[0] == source and k[1] < number - 1]:
                del self._orders[old]
            generator = np.random.default_rng(derive_seed(self.seed, 2, source, number))
            self._orders[key] = generator.permutation(self.pools[source])
        return self._orders[key]

    def _micro_batches(self, images, rows, real):
        if not self.statistics_per_source:
            pieces = math.ceil(len(rows) / self.micro_batch_size)
            dealt = (
                slice(k, None, pieces) for k in range(pieces)
            )  # real rows first: each gets the same proportion
            return [MicroBatch(images[part], rows[part], len(rows[part]) / len(rows)) for part in dealt]
        micro_batches = []
        whole = real + self.synthetic_weight * (len(rows) - real)
        for source, part in ((0, slice(real)), (1, slice(real, None))):
            if count := len(rows[part]):
                pieces = math.ceil(count / self.micro_batch_size)
                weight = (1.0, self.synthetic_weight)[source] / whole
                for x, r in zip(
                    images[part].tensor_split(pieces), rows[part].tensor_split(pieces), strict=True
                ):
                    micro_batches.append(MicroBatch(x, r, weight * len(r), tracked=source == 0))
        return micro_batches


def _fractions(phases, steps):
    """The synthetic fraction of each step's batch."""
    ends = [end for end, _ in phases]
    if (
        not phases
        or ends != sorted(set(ends))
        or not (ends[0] > 0 and ends[-1] == 1)
        or not all(0 <= fraction <= 1 for _, fraction in phases)
    ):
        raise ValueError(
            f"phases must be pairs (end, fraction) with ends that ascend to 1 and fractions from 0 to 1: got {phases}."
        )
    which = np.searchsorted(ends, np.arange(steps) / steps, side="right")
    return np.array([fraction for _, fraction in phases])[which]


class MixedBatches:
    """Mixes each image of a micro-batch with another one of it, as mixup or CutMix do.

    The labels are mixed alike: the loss of :class:`MicroBatch` weighs both. One fraction is drawn for each micro-batch,
    as in the authors' code.

    Parameters
    ----------
    batches : object
        With the attribute ``batch_size`` and the method ``epoch(number)``, which yields for each training step a list of
        :class:`MicroBatch`, or images and rows. It may have ``steps`` and ``world_size``.
    kind : {'mixup', 'cutmix'}
        mixup averages two images (Zhang et al. 2018). CutMix pastes a box of one into the other (Yun et al. 2019).
    micro_batch_size : int
        Images that share batch-norm statistics, where the batches are not yet split.
    seed : int
    alpha : float, default 1.0
        The kept fraction has the distribution Beta(alpha, alpha).

    Raises
    ------
    ValueError
        If the kind is unknown or ``alpha`` is not positive.
    """

    def __init__(self, batches, kind, *, micro_batch_size, seed, alpha=1.0):
        _check_mixing(kind, alpha)
        self.batches, self.kind, self.alpha = batches, kind, alpha
        self.micro_batch_size, self.seed = micro_batch_size, seed
        self.batch_size = batches.batch_size
        self.world_size = getattr(batches, "world_size", 1)
        for name in ("n", "steps"):
            if hasattr(batches, name):
                setattr(self, name, getattr(batches, name))

    @property
    def description(self):
        """What the batches of another training must have in common with these."""
        mixed = getattr(self.batches, "description", type(self.batches).__name__)
        return f"MixedBatches({mixed}, {self.kind}, seed={self.seed}, alpha={self.alpha})"

    def epoch(self, number):
        """Yield a list of mixed :class:`MicroBatch` for each training step."""
        rng = np.random.default_rng(derive_seed(self.seed, 3, number))
        for batch in self.batches.epoch(number):
            micro_batches = batch if isinstance(batch, list) else split_evenly(*batch, self.micro_batch_size)
            yield [self._mixed(part, rng) for part in micro_batches]

    def _mixed(self, part, rng):
        kept = float(rng.beta(self.alpha, self.alpha))
        device = part.rows.device
        order = torch.from_numpy(rng.permutation(len(part.rows)))
        # CUDA copies what it needs of it before the call returns, so the GPU need not be waited for.
        order = order.to(device, non_blocking=device.type == "cuda")
        images, kept = _mix(part.images, part.images[order], self.kind, kept, rng)
        return replace(part, images=images, partners=part.rows[order], kept=kept)


class PastedBatches:
    """Pastes a part of each synthetic image into a real one, so that no whole synthetic image is trained on.

    This is context-rich minority oversampling (CMO, Park et al. 2022) with synthetic foregrounds. A step of the
    given batches has r real and s synthetic images. Then r - s real images stay as they are, and s others each get
    a box of a synthetic one (CutMix), or are averaged with one (mixup, as in SYNAuG, Ye-Bin et al. 2023). The mixed images
    have batch-norm statistics of their own. In steps without synthetic images, only r images are used.

    Parameters
    ----------
    batches : SourceBatches
        With one synthetic fraction, apart from phases without synthetic images, ``synthetic_weight`` 1 and statistics per
        source.
    kind : {'mixup', 'cutmix'}
    seed : int
    alpha : float, default 1.0
        The real image keeps a fraction with the distribution Beta(alpha, alpha).

    Raises
    ------
    ValueError
        If the kind is unknown, ``alpha`` is not positive, a step has fewer real images than synthetic ones, or
        ``batches`` are not as above.
    """

    def __init__(self, batches, kind, *, seed, alpha=1.0):
        self.batches, self.kind, self.alpha, self.seed = batches, kind, alpha, seed
        _check_mixing(kind, alpha)
        if (batches.counts[:, 0] < batches.counts[:, 1]).any():
            raise ValueError(
                f"A step needs at least as many real images as synthetic ones: {batches.phases}."
            )
        if not batches.statistics_per_source:
            raise ValueError("Pasting needs micro-batches of one source: statistics_per_source=True.")
        if batches.synthetic_weight != 1 or len(set(batches.counts[:, 1]) - {0}) != 1:
            raise ValueError(
                "Pasting needs batches with one synthetic fraction, apart from phases without synthetic images, and a "
                f"synthetic_weight of 1: got {batches.phases} and {batches.synthetic_weight}."
            )
        self.n, self.steps = batches.n, batches.steps
        self.batch_size = int(batches.counts[:, 0].min())

    @property
    def description(self):
        """What the batches of another training must have in common with these."""
        return f"PastedBatches({self.batches.description}, {self.kind}, seed={self.seed}, alpha={self.alpha})"

    def epoch(self, number):
        """Yield a list of :class:`MicroBatch` for each training step, real ones first."""
        rng = np.random.default_rng(derive_seed(self.seed, 3, number))
        for step in self.batches.epoch(number):
            real, synthetic = (
                [part for part in step if part.tracked == tracked] for tracked in (True, False)
            )
            images, rows = _joined(real)
            images, rows = images[: self.batch_size], rows[: self.batch_size]
            if not synthetic:
                yield split_evenly(images, rows, self.batches.micro_batch_size)
                continue
            others, partners = _joined(synthetic)
            clean = len(rows) - len(partners)
            mixed, kept = _mix(
                images[clean:], others, self.kind, float(rng.beta(self.alpha, self.alpha)), rng
            )
            pasted = MicroBatch(mixed, rows[clean:], len(partners) / len(rows), False, partners, kept)
            parts = split_evenly(images[:clean], rows[:clean], self.batches.micro_batch_size)
            yield [replace(part, weight=part.weight * clean / len(rows)) for part in parts] + [pasted]


def _joined(parts):
    return torch.cat([part.images for part in parts]), torch.cat([part.rows for part in parts])


def _check_mixing(kind, alpha):
    if kind not in ("mixup", "cutmix"):
        raise ValueError(f"Unknown kind of mixing {kind!r}: choose 'mixup' or 'cutmix'.")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a positive number: got {alpha}.")


def _mix(images, others, kind, kept, rng):
    """Mix in ``others``; return the mixed images and the fraction of each image that was really kept."""
    if kind == "mixup":
        return kept * images.float() + (1 - kept) * others.float(), kept
    sides = images.shape[2:]
    mixed, box = images.clone(), _box(sides, 1 - kept, rng)
    mixed[:, :, box[0], box[1]] = others[:, :, box[0], box[1]]
    return mixed, 1 - math.prod(side.stop - side.start for side in box) / math.prod(sides)


def _box(sides, fraction, rng):
    """A box of that fraction of the area, of the image's shape, anywhere; what lies outside is cut off."""
    box = []
    for side in sides:
        length, middle = int(side * math.sqrt(fraction)), int(rng.integers(side))
        box.append(slice(max(middle - length // 2, 0), min(middle + length // 2, side)))
    return tuple(box)

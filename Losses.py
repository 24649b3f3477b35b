"""Losses for training sets with rare classes and with synthetic images.

    loss = LogitAdjustedLoss(y, num_classes=10)                       # no image needed
    loss = LogitAdjustedLoss(y_res, num_classes=10, sources=sources)   # a prior for real, another for synthetic rows

A loss is a :class:`torch.nn.Module` that is called with the logits, the targets and the rows of a micro-batch. Losses
that change during the training have an attribute ``progress``, the finished fraction of the training, 0 to 1.
``ClassifierTraining.py`` sets it before each training step; a loop of your own must do that, too.

References
----------
Cao et al. (2019), Learning imbalanced datasets with label-distribution-aware margin loss (LDAM-DRW). Cui et al. (2019),
Class-balanced loss based on effective number of samples. Menon et al. (2021), Long-tail learning via logit
adjustment. Ren et al. (2020), Balanced meta-softmax for long-tailed visual recognition. Shin et al. (2023), Fill-Up:
Balancing long-tailed data with generative models.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from Checks import NUMBER_THEM, check_labels
from Repeatability import checksum


class CrossEntropy(nn.Module):
    """Mean cross-entropy, and the interface of every loss.

    ``mean_over_images`` says that the loss of several micro-batches together is the mean of theirs, weighted by their
    sizes. A loss without it is computed micro-batch by micro-batch.

    Parameters
    ----------
    label_smoothing : float, default 0.0
        Fraction of each target that is spread equally over all classes.

    Raises
    ------
    ValueError
        If ``label_smoothing`` is negative, or 1 or more.
    """

    mean_over_images = True

    def __init__(self, label_smoothing=0.0):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1: got {label_smoothing}.")
        self.label_smoothing = label_smoothing

    def forward(self, logits, targets, rows=None):
        """Mean loss of m images: float32 logits (m, classes), int64 targets (m,) and training-set rows (m,).

        Only losses that differ from row to row need the rows.
        """
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def extra_repr(self):
        return f"label_smoothing={self.label_smoothing}"


class LogitAdjustedLoss(nn.Module):
    """Mean cross-entropy of ``logits + tau log P(class | source of the row)``.

    This is the loss of Menon et al. (2021), extended to several sources. With tau = 1 and one source it is the balanced
    softmax of Ren et al. (2020), too. Nothing is added to the logits at test time, so the network learns what holds
    under equal class frequencies, and whether an image looks synthetic tells nothing about its class. Label smoothing
    contradicts it: that would give a rare class more probability than its prior on every image, and so undo the
    adjustment.

    Parameters
    ----------
    y : ndarray of int, shape (n,)
        Labels of the training set.
    num_classes : int
    sources : ndarray of int or bool, shape (n,), optional
        Source of each row: 0 real, 1 synthetic. Default: all rows have the same source.
        The log priors of all rows are kept: n times ``num_classes`` float32 values.
    tau : float, default 1.0
        How much of the adjustment is made. Above 1, rare classes are preferred beyond equal frequencies.
    real_prior_for_all : bool, default False
        Whether synthetic rows are adjusted by the class frequencies of the real rows, too (Shin et al. 2023).

    Raises
    ------
    TypeError, ValueError
        If ``y`` does not hold class numbers below ``num_classes``, a class has no row, all rows of a source are of one class
        (each of them would have the loss 0), ``sources`` are not sources of the rows of ``y``, ``tau`` is negative or
        not finite, or synthetic rows of a class that has no real row are to be adjusted by the real rows.
    """

    mean_over_images = True

    def __init__(self, y, num_classes, sources=None, *, tau=1.0, real_prior_for_all=False):
        super().__init__()
        if not 0 <= tau < float("inf"):
            raise ValueError(f"tau must be a finite number, 0 or more: got {tau}.")
        y = _check_training_labels(y, num_classes)
        sources = _check_sources(sources, y)
        log_priors = class_log_priors(y, num_classes, sources)
        if untrained := np.flatnonzero(np.isneginf(log_priors).all(axis=0)).tolist():
            raise ValueError(
                f"No row is of the classes {untrained}. Their logits would never be trained, but compete with the others. "
                f"{NUMBER_THEM}"
            )
        alone = np.sum(np.isfinite(log_priors), axis=1) == 1  # sources that have one class only
        if not real_prior_for_all and num_classes > 1 and alone.any():
            source = int(alone.argmax())
            raise ValueError(
                f"All rows of source {source} are of class {y[sources == source][0]}, so their loss is always 0 and they teach "
                "nothing. Give the source images of several classes, or set real_prior_for_all=True."
            )
        log_priors = torch.from_numpy(log_priors)
        if tau != 1:  # 0 times -inf would be NaN
            log_priors = torch.where(log_priors.isfinite(), tau * log_priors, log_priors)
        priors = np.zeros_like(sources) if real_prior_for_all else sources
        if missing := sorted(set(y[~np.isfinite(log_priors.numpy()[priors, y])].tolist())):
            raise ValueError(
                f"real_prior_for_all needs a real image of each class, but there is none of {missing}."
            )
        self.register_buffer("log_prior_of_row", log_priors[torch.from_numpy(priors)])
        self._has_one_prior = bool((priors == priors[0]).all())

    def forward(self, logits, targets, rows=None):
        """Mean loss of m images; the parameters are those of :meth:`CrossEntropy.forward`.

        Without several sources, ``rows`` may be None.

        Raises
        ------
        ValueError
            If the rows are missing and their sources differ.
        """
        if rows is None:
            if not self._has_one_prior:
                raise ValueError("Pass the rows: each has the class frequencies of its own source.")
            rows = 0
        return F.cross_entropy(logits + self.log_prior_of_row[rows], targets)

    def extra_repr(self):
        rows, classes = self.log_prior_of_row.shape
        return f"rows={rows}, classes={classes}, checksum={checksum(self.log_prior_of_row.cpu().numpy())}"


def _check_training_labels(y, num_classes):
    """The labels as int64, or an error if there is none or one is no class."""
    if not isinstance(num_classes, int | np.integer) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number, 1 or more: got {num_classes!r}.")
    y = check_labels(y, num_classes)
    if not len(y):
        raise ValueError("There is no label in y.")
    return y


def _check_sources(sources, y):
    """``sources`` as int64, zeros for None, or an error if they are not sources of the rows of ``y``."""
    sources = np.zeros_like(y) if sources is None else np.asarray(sources)
    if sources.shape != y.shape:
        raise ValueError(f"sources must have the shape {y.shape} like y, but it is {sources.shape}.")
    if sources.dtype != bool and not np.issubdtype(sources.dtype, np.integer):
        raise TypeError(f"sources must hold integers, 0 for real rows, but its dtype is {sources.dtype}.")
    if sources.min() < 0:
        raise ValueError(f"sources must not be negative, but the smallest is {sources.min()}.")
    return sources.astype(np.int64, copy=False)


def class_log_priors(y, num_classes, sources):
    """Log class frequencies of each source.

    Parameters
    ----------
    y, sources : ndarray of int, shape (n,)
        Class and source of each row, both from 0 on.
    num_classes : int

    Returns
    -------
    ndarray of float32, shape (n_sources, num_classes)
        -inf for a class that a source lacks.

    Raises
    ------
    TypeError, ValueError
        If a label is no class.
    """
    y = _check_training_labels(y, num_classes)
    counts = np.zeros((sources.max() + 1, num_classes))
    np.add.at(counts, (sources, y), 1)
    with np.errstate(divide="ignore"):
        return np.log(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)


def class_balanced_weights(y, num_classes, beta=0.9999):
    """Weights of the classes by their effective number of images (Cui et al. 2019).

    Parameters
    ----------
    y : ndarray of int, shape (n,)
    num_classes : int
    beta : float, from 0 to below 1
        0 gives equal weights; the nearer to 1, the nearer the weights to the inverse frequencies.

    Returns
    -------
    float32 tensor, shape (num_classes,)
        ``(1 - beta) / (1 - beta^n)``, scaled so that the mean is 1. A class without an image has weight 0.

    Raises
    ------
    TypeError, ValueError
        If ``beta`` is out of range, or a label is no class.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1: got {beta}.")
    y = _check_training_labels(y, num_classes)
    counts = np.bincount(y, minlength=num_classes)
    weights = np.where(counts > 0, (1 - beta) / np.maximum(1 - beta**counts, 1e-12), 0)
    return torch.from_numpy(weights * num_classes / weights.sum()).float()


class ClassBalancedLoss(nn.Module):
    """Cross-entropy with :func:`class_balanced_weights`. The mean over a micro-batch is that of PyTorch: weighted.

    Parameters
    ----------
    y, num_classes, beta
        See :func:`class_balanced_weights`.
    deferred_until : float, default 0.0
        Fraction of the training before which all classes weigh the same (deferred re-weighting, Cao et al. 2019).
        Above 0, the training loop must set ``progress``: see the top of this module.

    Raises
    ------
    TypeError, ValueError
        If a label is no class, or ``beta`` or ``deferred_until`` is out of range.
    RuntimeError
        When the loss is called, if ``progress`` was not set but is needed.
    """

    progress = None

    def __init__(self, y, num_classes, *, beta=0.9999, deferred_until=0.0):
        super().__init__()
        _check_deferred(deferred_until)
        self.beta, self.deferred_until = beta, deferred_until
        self.register_buffer("weights", class_balanced_weights(y, num_classes, beta))

    def forward(self, logits, targets, rows=None):
        """Mean loss of m images; the parameters are those of :meth:`CrossEntropy.forward`."""
        return F.cross_entropy(logits, targets, weight=_deferred_weights(self))

    def extra_repr(self):
        weights = checksum(self.weights.cpu().numpy())
        return f"beta={self.beta}, deferred_until={self.deferred_until}, weights={weights}"


def _check_deferred(deferred_until):
    if not 0 <= deferred_until <= 1:
        raise ValueError(f"deferred_until must be from 0 to 1: got {deferred_until}.")


def _deferred_weights(loss):
    """The class weights of a loss, or None as long as all classes weigh the same."""
    if loss.deferred_until and loss.progress is None:
        raise RuntimeError(
            f"{type(loss).__name__} weighs the classes from {loss.deferred_until:g} of the training on. Before each step, set "
            "loss.progress to the finished fraction: loss.progress = step / steps."
        )
    return loss.weights if (loss.progress or 0) >= loss.deferred_until else None


class LDAMLoss(nn.Module):
    """Margins that grow as a class becomes rarer, with deferred re-weighting: LDAM-DRW of Cao et al. (2019).

    The logits must be cosines: see ``cosine_head`` of :class:`ClassifierNetwork.ResNet18`. The logit of the true class
    is lowered by ``max_margin (n_min / n)^(1/4)``, and all are multiplied by ``scale``.

    Parameters
    ----------
    y : ndarray of int, shape (n,)
        Labels of the training set. Every class needs an image.
    num_classes : int
    max_margin : float, default 0.5
        The rarest class's margin, 0 or more: a difference of cosines.
    scale : float, default 30.0
        Positive.
    beta, deferred_until
        See :class:`ClassBalancedLoss`; the authors re-weight in the last fifth.

    Raises
    ------
    TypeError, ValueError
        If a label is no class, a class has no image, or a number is out of range.
    RuntimeError
        See :class:`ClassBalancedLoss`.
    """

    progress = None

    def __init__(self, y, num_classes, *, max_margin=0.5, scale=30.0, beta=0.9999, deferred_until=0.8):
        super().__init__()
        _check_deferred(deferred_until)
        if not (0 <= max_margin < float("inf") and 0 < scale < float("inf")):
            raise ValueError(
                f"max_margin must be 0 or more and scale above 0, both finite: got {max_margin} and {scale}."
            )
        counts = np.bincount(_check_training_labels(y, num_classes), minlength=num_classes)
        if not counts.all():
            raise ValueError(f"LDAM needs an image of every class; the classes have {counts.tolist()}.")
        self.scale, self.deferred_until = scale, deferred_until
        margins = max_margin * (counts.min() / counts) ** 0.25
        self.register_buffer("margins", torch.from_numpy(margins).float())
        self.register_buffer("weights", class_balanced_weights(y, num_classes, beta))

    def forward(self, logits, targets, rows=None):
        """Mean loss of m images, ``logits`` cosines; the parameters are those of :meth:`CrossEntropy.forward`."""
        lowered = logits - F.one_hot(targets, logits.shape[1]) * self.margins
        return F.cross_entropy(self.scale * lowered, targets, weight=_deferred_weights(self))

    def extra_repr(self):
        both = checksum(self.margins.cpu().numpy(), self.weights.cpu().numpy())
        return f"scale={self.scale}, deferred_until={self.deferred_until}, margins_and_weights={both}"

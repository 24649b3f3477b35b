"""The interface of all samplers here: imbalanced-learn's ``fit_resample``, for images as they are.

imbalanced-learn's own samplers take a matrix of shape (n_samples, n_features). Here ``X`` stays a stack of
images, and a new sampler has to implement one method:

    class Black(ImageOverSampler):
        def _make_images(self, X, c, count, seed):
            return np.zeros((count, *X.shape[1:]), dtype=np.uint8)

    X_res, y_res = Black().fit_resample(X, y)     # the first len(X) rows are X, then the new images
"""

import math
import numbers
from abc import abstractmethod

import numpy as np
import psutil
from imblearn.over_sampling.base import BaseOverSampler
from imblearn.utils import check_sampling_strategy
from sklearn.utils import check_random_state

from Checks import check_images
from ImageStatistics import match_spectrum, match_statistics
from Repeatability import derive_seed

MATCHES = {"spectrum": match_spectrum, "statistics": match_statistics}
# Peak memory that a value of a pixel takes, by match: each class alone and all together, and floats while matching.
BYTES_PER_VALUE = {None: 2, "spectrum": 5, "statistics": 16}


class UnsuitableImagesError(ValueError):
    """The sampler cannot make the wanted images from these images; the message says why."""


class TooFewImagesError(UnsuitableImagesError):
    """A class has too few images for the sampler."""


class TooManyImagesError(ValueError, MemoryError):
    """The result would not fit into memory; the message says how much it needs and how much there is."""


def check_request(sampling_strategy, X, y, bytes_per_value):
    """Refuse a request that cannot be fulfilled, before anything is trained, loaded or made.

    Parameters
    ----------
    sampling_strategy : str, dict or callable
        As in imbalanced-learn.
    X : ndarray of shape (n, height, width, 3)
    y : ndarray of int64, shape (n,)
    bytes_per_value : int
        Memory that a value of a pixel takes while the result is made, copies included.

    Raises
    ------
    TooManyImagesError
        If given and new images need more memory than is available.
    ValueError
        If a number of images is not a whole number, or the strategy is invalid.
    """
    try:
        counts = check_sampling_strategy(sampling_strategy, y, "over-sampling")
    except OverflowError as error:
        raise TooManyImagesError(
            f"sampling_strategy {sampling_strategy} asks for more images than any memory holds. Ask for fewer."
        ) from error
    for c, count in counts.items():
        if not isinstance(count, numbers.Integral):  # a float, which may be NaN
            raise ValueError(
                f"sampling_strategy asks for {count} new images of class {c}. Give a whole number."
            )
    total = len(X) + sum(int(count) for count in counts.values())
    needed = total * math.prod(X.shape[1:]) * bytes_per_value
    available = psutil.virtual_memory().available
    if needed > available:
        raise TooManyImagesError(
            f"sampling_strategy asks for {total:,} images in all, which need {needed / 1e9:,.1f} GB of memory, but "
            f"{available / 1e9:,.1f} GB are available. Ask for fewer images."
        )


class ImageOverSampler(BaseOverSampler):
    """Base class of the samplers: appends new images after the given ones.

    Subclasses implement :meth:`_make_images`.

    Parameters
    ----------
    sampling_strategy : str, dict or callable, default 'auto'
        How many images each class shall have, as in imbalanced-learn. ``'auto'`` brings every class up to the
        size of the largest. A dict maps a class number to the number of images of it wanted *in all*, real
        ones included. A callable returns such a dict from ``y``, as :func:`source_balanced_strategy` does.
    random_state : int, RandomState instance or None, default None
        Seed of the new images.
    match : {None, 'spectrum', 'statistics'}, default None
        What the new images get from the given ones, so that they are harder to tell apart:
        :func:`ImageStatistics.match_spectrum` (power at each frequency), :func:`ImageStatistics.match_statistics` (colours
        and sharpness), or nothing. One map for all new images, made from all given ones. So give every class new images
        (:func:`source_balanced_strategy`), or what distinguishes the class is matched away.
    """

    def __init__(self, *, sampling_strategy="auto", random_state=None, match=None):
        super().__init__(sampling_strategy=sampling_strategy)
        self.random_state = random_state
        self.match = match

    def _check_X_y(self, X, y):
        X, y = check_images(X, y)
        if self.match is not None and self.match not in MATCHES:
            raise ValueError(f"Unknown match {self.match!r}. Choose None or one of {', '.join(MATCHES)}.")
        check_request(self.sampling_strategy, X, y, BYTES_PER_VALUE[self.match])
        return X, y, False

    def fit_resample(self, X, y):
        """Append new images so that the class sizes follow ``sampling_strategy``.

        Parameters
        ----------
        X : ndarray of uint8, shape (n, height, width, 3)
        y : ndarray of integers, shape (n,)

        Returns
        -------
        X_resampled : ndarray of uint8, shape (m, height, width, 3)
        y_resampled : ndarray of int64, shape (m,)
            The first n rows are the input, unchanged and in order. Rows n to m are synthetic, class after
            class in ascending order.

        Raises
        ------
        TypeError, ValueError
            If an array has another dtype or shape, or the strategy asks for fewer images than given.
        TooManyImagesError
            If the result would not fit into memory. This is found out before anything is made.
        """
        # As arrays, or imbalanced-learn would return what kind it was given: lists of lists of numbers.
        return super().fit_resample(*check_images(X, y))

    def _fit_resample(self, X, y):
        # One seed per class, so that the images of a class do not depend on what the others need.
        seed = int(check_random_state(self.random_state).randint(2**31))
        images, labels = [X[:0]], [y]
        for c, count in sorted(self.sampling_strategy_.items()):
            if count > 0:
                class_seed = derive_seed(seed, int(c) % 2**32)  # c may be negative
                made = np.asarray(self._make_images(X[y == c], int(c), count, class_seed))
                if made.dtype != np.uint8 or made.shape != (count, *X.shape[1:]):
                    raise TypeError(
                        f"{type(self).__name__}._make_images must return uint8 of the shape {(count, *X.shape[1:])}, but "
                        f"returned {made.dtype} of the shape {made.shape}."
                    )
                images.append(made)
                labels.append(np.full(count, c, dtype=np.int64))
        new = np.concatenate(images)
        if self.match is not None and len(new):
            new = MATCHES[self.match](new, X)
        return np.concatenate([X, new]), np.concatenate(labels)

    @abstractmethod
    def _make_images(self, X, c, count, seed):
        """Make new images of one class.

        Parameters
        ----------
        X : ndarray of uint8, shape (n, height, width, 3)
            The given images of the class.
        c : int
            The class's number.
        count : int
            How many images to make, at least 1.
        seed : int
            Seed of everything random.

        Returns
        -------
        ndarray of uint8, shape (count, height, width, 3)
        """


def added_images(X_res, y_res, real_images, c):
    """The images of one class that a sampler added.

    Parameters
    ----------
    X_res, y_res : ndarrays of shape (m, height, width, 3) and (m,)
        What ``fit_resample`` returned.
    real_images : int
        Number of images that it was given: the first rows.
    c : int
        The class.

    Returns
    -------
    ndarray of shape (k, height, width, 3)
    """
    return X_res[real_images:][y_res[real_images:] == c]


def fewer_images_strategy(y, *, strategy, count):
    """A ``sampling_strategy`` that makes fewer new images than another one, in the same proportions of the classes.

    Parameters
    ----------
    y : ndarray of int, shape (n,)
    strategy : str, dict or callable
        The other strategy, as in imbalanced-learn.
    count : int
        New images of the class that gets the most, 1 or more.

    Returns
    -------
    dict
        Class number -> number of images wanted in all.

    Raises
    ------
    ValueError
        If ``count`` is below 1, or more than what the other strategy makes.

    Examples
    --------
    >>> y = np.array([0] * 10 + [1] * 2)
    >>> fewer_images_strategy(y, strategy=source_balanced_strategy, count=2)
    {0: 11, 1: 4}
    """
    new = check_sampling_strategy(strategy, y, "over-sampling")
    most = max(new.values(), default=0)
    if not 1 <= count <= most:
        raise ValueError(f"{count:,} new images of a class are wanted, but the strategy makes 1 to {most:,}.")
    sizes = dict(zip(*np.unique(y, return_counts=True), strict=True))
    return {int(c): int(sizes[c]) + round(n * count / most) for c, n in new.items()}


def source_balanced_strategy(y, share=0.4):
    """A ``sampling_strategy`` that gives every class some synthetic images.

    If only the minority class has synthetic images, "looks synthetic" predicts that class, and a classifier
    can learn this shortcut instead of the class. If every class has synthetic images, the shortcut is worth less.

    Parameters
    ----------
    y : ndarray of int, shape (n,)
        Labels of the imbalanced training set.
    share : float, default 0.4
        Number of synthetic images of a class that lacks none, as a fraction of the largest class's size:
        2,000 of 5,000. A finite number, 0 or more.

    Returns
    -------
    dict
        Class number -> number of images wanted in all. Each class gets the images that it lacks to the size of
        the largest class, or ``share`` of that size if this is more.

    Examples
    --------
    >>> source_balanced_strategy(np.array([0] * 10 + [1] * 2))
    {0: 14, 1: 10}
    """
    if not (share >= 0 and math.isfinite(share)):
        raise ValueError(f"share must be a finite number, 0 or more: got {share}.")
    classes, sizes = np.unique(y, return_counts=True)
    largest = int(sizes.max())
    return {
        int(c): int(size) + max(largest - int(size), round(share * largest))
        for c, size in zip(classes, sizes, strict=True)
    }

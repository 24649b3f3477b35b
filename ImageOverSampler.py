"""The interface that all samplers of this project share: imbalanced-learn's, for images as they are.

imbalanced-learn's own samplers want a matrix of shape (n_samples, n_features). Here ``X`` stays a stack
of images, and a sampler only has to say how it makes new images of one class.
"""

from abc import abstractmethod

import numpy as np
from imblearn.over_sampling.base import BaseOverSampler
from sklearn.utils import check_random_state

from Runtime import check_images, derive_seed


class ImageOverSampler(BaseOverSampler):
    """Base class of the samplers: appends new images after the given ones.

    Subclasses implement :meth:`_make_images`.

    Parameters
    ----------
    sampling_strategy : str or dict, default 'auto'
        As in imbalanced-learn. ``'auto'`` brings every class up to the size of the largest. A dict
        maps a class number to the number of images of it wanted *in all*, real ones included.
    random_state : int, RandomState instance or None, default None
        Seed of the new images.
    """

    def __init__(self, *, sampling_strategy="auto", random_state=None):
        super().__init__(sampling_strategy=sampling_strategy)
        self.random_state = random_state

    def _check_X_y(self, X, y):
        return *check_images(X, y), False

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
            The first n rows are the input, unchanged and in order; rows n to m are synthetic, class
            after class in ascending order.

        Raises
        ------
        TypeError, ValueError
            For arrays of another dtype or shape, or a strategy that asks for fewer images than given.
        """
        return super().fit_resample(X, y)

    def _fit_resample(self, X, y):
        # One seed per class, so that the images of a class do not depend on what the others need.
        seed = int(check_random_state(self.random_state).randint(2**31))
        images, labels = [X], [y]
        for c, count in sorted(self.sampling_strategy_.items()):
            if count > 0:
                images.append(self._make_images(X[y == c], int(c), count, derive_seed(seed, int(c))))
                labels.append(np.full(count, c, dtype=np.int64))
        return np.concatenate(images), np.concatenate(labels)

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


def source_balanced_strategy(y, share=0.4):
    """A ``sampling_strategy`` that gives every class some synthetic images.

    If only the minority class has synthetic images, "looks synthetic" predicts that class, and a
    classifier learns this cue in place of the class. With some synthetic images in every class the
    cue loses its worth.

    Parameters
    ----------
    y : ndarray of int, shape (n,)
        Labels of the imbalanced training set.
    share : float, default 0.4
        Synthetic images of a class that is not short of any, as a share of the largest class's size:
        2,000 of 5,000.

    Returns
    -------
    dict
        Class number -> number of images wanted in all. Each class gets what it lacks to the largest
        class's size, or ``share`` of that size if this is more.
    """
    classes, sizes = np.unique(y, return_counts=True)
    largest = int(sizes.max())
    return {
        int(c): int(size) + max(largest - int(size), round(share * largest))
        for c, size in zip(classes, sizes, strict=True)
    }

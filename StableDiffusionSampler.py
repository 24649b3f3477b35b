"""Append cached Stable Diffusion images to a training set.

    X_res, y_res = StableDiffusionOverSampler(random_state=0).fit_resample(X, y)

The cache is filled by ``StableDiffusionGeneration.py``, or by ``CIFAKE.py`` with ready images.

Reference: Rombach et al. (2022), High-resolution image synthesis with latent diffusion models.
"""

import warnings

import numpy as np

from ImageCache import CACHE, load_generated_images
from ImageOverSampler import ImageOverSampler, TooFewImagesError


class StableDiffusionOverSampler(ImageOverSampler):
    """Append cached Stable Diffusion images of the smaller classes.

    The images are drawn from the cache without replacement. They were made from text
    alone, unless they were generated with real images or an adapter.

    Parameters
    ----------
    path : path, default ``datasets/stable_diffusion_dataset.npy``
        The cache, see :func:`ImageCache.save_generated_images`. Its labels are the class numbers in ``y``.
    sampling_strategy : str, dict or callable, default 'auto'
        As in imbalanced-learn. ``'auto'`` fills up every class that is smaller than the largest. On CIFAR-10 with one
        rare class that is the reference study's data set. ``{2: 500}`` fills up class 2 alone, to 500 images.
        :func:`ImageOverSampler.source_balanced_strategy` gives every class some.
    random_state : int, RandomState instance or None, default None
        Which images are drawn.
    match : {None, 'spectrum', 'statistics'}, default None
        See :class:`ImageOverSampler.ImageOverSampler`. CIFAKE's images have 1.3 to 4 times the power of real ones at
        high frequencies.

    Raises
    ------
    FileNotFoundError
        In ``fit_resample``, if there is no cache.
    ValueError
        In ``fit_resample``, if the images are not as large as those of the cache, or the cache is damaged.
    TooFewImagesError
        In ``fit_resample``, if the cache has fewer images of a class than are needed.

    Warns
    -----
    UserWarning
        If the cache has a class below the first in ``y``: the classes may be numbered differently.
    """

    def __init__(self, *, path=CACHE, sampling_strategy="auto", random_state=None, match=None):
        super().__init__(sampling_strategy=sampling_strategy, random_state=random_state, match=match)
        self.path = path

    def _fit_resample(self, X, y):
        self._images, self._labels = load_generated_images(self.path)
        if X.shape[1:] != self._images.shape[1:]:
            height, width = self._images.shape[1:3]
            raise ValueError(
                f"The cache {self.path} holds images of {height}x{width} pixels, but X has the shape {X.shape}. Resize X, or "
                f"make images of {X.shape[1]} pixels (--pixels)."
            )
        if self._labels.min() < y.min():
            warnings.warn(
                f"The classes in {self.path} begin at {self._labels.min()}, those in y at {y.min()}. If they are numbered "
                "differently, the images of wrong classes are added.",
                stacklevel=4,
            )
        try:
            return super()._fit_resample(X, y)
        finally:
            del self._images, self._labels  # the sampler itself stays small

    def _make_images(self, X, c, count, seed):
        rows = np.flatnonzero(self._labels == c)
        if len(rows) < count:
            raise TooFewImagesError(
                f"{self.path} has {len(rows)} images of class {c}, but {count} are asked for. Add images to it, or ask for fewer "
                "with sampling_strategy"
            )
        return self._images[np.random.default_rng(seed).choice(rows, count, replace=False)]

"""Oversampling without a generator: more images of the rare class from the few that are there.

    X_res, y_res = AugmentationOverSampler(random_state=0).fit_resample(X, y)     # augmented copies
    X_res, y_res = PixelOverSampler(SMOTE(), random_state=0).fit_resample(X, y)    # imbalanced-learn's SMOTE

References
----------
Chawla et al. (2002), SMOTE: Synthetic minority over-sampling technique.
"""

import math
import numbers

import numpy as np
from imblearn.over_sampling.base import BaseOverSampler
from PIL import Image
from sklearn.base import clone
from torchvision.transforms import InterpolationMode, v2

from Checks import check_images
from ImageOverSampler import ImageOverSampler, TooFewImagesError, UnsuitableImagesError, check_request
from Repeatability import seeded

# --- Augmentation -------------------------------------------------------------------------------


def mild_augmentation(size):
    """Transforms that vary a small photograph without changing its class.

    They were chosen before any result was seen, except for the corners. Crops and rotations are small because the object fills a
    32x32 image. Hue stays because coat colour is a cue. Nothing is solarised or turned upside down, since no
    test image is. There is no flip, because the training loop flips images already and not every data
    set allows it. The corners that a rotation leaves are filled by reflection. Black ones would tell a
    network which images are copies, and so to which class they belong.

    Parameters
    ----------
    size : pair of int
        Height and width of the images in pixels.

    Returns
    -------
    tuple of torchvision transforms
    """
    crop, rotation, colours = mild_augmentation_with_black_corners(size)
    border = math.ceil(0.1 * max(size))  # a rotation by 10 degrees moves a corner by 8 % of the side
    return crop, v2.Pad(border, padding_mode="reflect"), rotation, v2.CenterCrop(size), colours


def mild_augmentation_with_black_corners(size):
    """As :func:`mild_augmentation`, but the corners that a rotation leaves are black.

    It shows what such a trace costs: see ``CueStrength.py``.
    """
    return (
        v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.85, 1.18)),
        v2.RandomRotation(10, interpolation=InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    )


def reference_augmentation(size):
    """The reference study's transforms: strong changes of colour and geometry, made for large photographs.

    Solarising inverts the brighter half of the pixel values. Rotation and perspective leave black corners.
    Images of every ``size`` keep it.
    """
    return (
        v2.ColorJitter(brightness=0.5, hue=0.3),
        v2.RandomPerspective(distortion_scale=0.2, p=1.0),
        v2.RandomRotation((0, 180)),
        v2.RandomSolarize(threshold=128, p=0.5),
    )


PRESETS = {
    "mild": mild_augmentation,
    "mild-black-corners": mild_augmentation_with_black_corners,
    "reference": reference_augmentation,
}


class AugmentationOverSampler(ImageOverSampler):
    """Append randomly augmented copies of the images of the smaller classes.

    Every image of a class is used as a source equally often (give or take one), in random order.

    Parameters
    ----------
    preset : {'mild', 'mild-black-corners', 'reference'}, default 'mild'
        ``'mild'`` suits 32x32 photographs: crop to 70 to 100 % of the area, rotation by up to 10
        degrees, brightness, contrast and saturation by up to 20 %. Corners that a rotation leaves are reflected, or
        black with ``'mild-black-corners'``. ``'reference'`` is the reference
        study's: brightness 0.5, hue 0.3, perspective 0.2, rotation by 0 to 180 degrees, solarise with
        probability 0.5.
    sampling_strategy : str, dict or callable, default 'auto'
        How many images each class shall have: see :class:`ImageOverSampler.ImageOverSampler`.
    random_state : int, RandomState instance or None, default None
        The same seed gives the same images.
    match : {None, 'spectrum', 'statistics'}, default None
        See :class:`ImageOverSampler.ImageOverSampler`.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.zeros((12, 32, 32, 3), dtype=np.uint8)
    >>> y = np.array([0] * 9 + [1] * 3)
    >>> X_res, y_res = AugmentationOverSampler(random_state=0).fit_resample(X, y)
    >>> X_res.shape, np.bincount(y_res).tolist()
    ((18, 32, 32, 3), [9, 9])
    """

    def __init__(self, *, preset="mild", sampling_strategy="auto", random_state=None, match=None):
        super().__init__(sampling_strategy=sampling_strategy, random_state=random_state, match=match)
        self.preset = preset

    def _check_X_y(self, X, y):
        if self.preset not in PRESETS:
            raise ValueError(f"Unknown preset {self.preset!r}. Choose one of {', '.join(PRESETS)}.")
        return super()._check_X_y(X, y)

    def _make_images(self, X, c, count, seed):
        augment = v2.Compose(PRESETS[self.preset](X.shape[1:3]))
        rng = np.random.default_rng(seed)
        sources = np.concatenate([rng.permutation(len(X)) for _ in range(-(-count // len(X)))])[:count]
        # Image by image, because torchvision draws one set of parameters per call. As PIL images, because
        # at 32x32 pixels they take 0.6 times as long as tensors (both presets).
        with seeded(seed):
            return np.stack([np.asarray(augment(Image.fromarray(X[row]))) for row in sources])


# --- imbalanced-learn's own samplers ------------------------------------------------------------


class PixelOverSampler(BaseOverSampler):
    """Any over-sampler of imbalanced-learn (RandomOverSampler, SMOTE, ADASYN, ...) on the pixels of images.

    Each image becomes one row of pixel values (float32), and each new row becomes an image again, rounded and
    limited to uint8. A sampler that interpolates between neighbours gets at most one neighbour fewer than the smallest class that
    it resamples has images, if its number of neighbours is a number.

    Parameters
    ----------
    sampler : imbalanced-learn over-sampler
        Without a strategy and a random state of its own. It is cloned, so the given object stays as it is.
    sampling_strategy, random_state
        Passed to ``sampler``: see :class:`ImageOverSampler.ImageOverSampler`.

    Raises
    ------
    ValueError
        In ``fit_resample``, if the sampler has a strategy or a random state of its own, or is no over-sampler.
    TooFewImagesError
        In ``fit_resample``, if the sampler interpolates between neighbours and a class that it resamples has one image.
    UnsuitableImagesError
        In ``fit_resample``, if the sampler finds no way to rebalance these images, as ADASYN does if the nearest
        neighbours of all images of a class belong to the same class, or makes no image of a class that shall have more.
    FloatingPointError
        In ``fit_resample``, if the sampler gives pixels that are NaN or infinite.
    TooManyImagesError
        In ``fit_resample``, if the result would not fit into memory.

    Examples
    --------
    >>> import numpy as np
    >>> from imblearn.over_sampling import SMOTE
    >>> X = np.zeros((12, 32, 32, 3), dtype=np.uint8)
    >>> y = np.array([0] * 9 + [1] * 3)
    >>> X_res, y_res = PixelOverSampler(SMOTE(), random_state=0).fit_resample(X, y)
    >>> X_res.shape, np.bincount(y_res).tolist()
    ((18, 32, 32, 3), [9, 9])
    """

    def __init__(self, sampler, *, sampling_strategy="auto", random_state=None):
        super().__init__(sampling_strategy=sampling_strategy)
        self.sampler = sampler
        self.random_state = random_state

    def _check_X_y(self, X, y):
        X, y = check_images(X, y)
        if not isinstance(self.sampler, BaseOverSampler):
            raise ValueError(
                f"sampler must be an over-sampler of imbalanced-learn, such as SMOTE(): got {self.sampler!r}."
            )
        own = self.sampler.get_params(deep=False)
        if own["sampling_strategy"] != "auto" or own.get("random_state") is not None:
            raise ValueError(
                "Give sampling_strategy and random_state to PixelOverSampler: it sets those of its sampler, "
                f"{self.sampler}."
            )
        check_request(self.sampling_strategy, X, y, bytes_per_value=9)  # float32 twice, and uint8
        return X, y, False

    def fit_resample(self, X, y):
        """Append new images so that the class sizes follow ``sampling_strategy``.

        Parameters, results and errors are those of :meth:`ImageOverSampler.ImageOverSampler.fit_resample`.
        """
        return super().fit_resample(*check_images(X, y))

    def _fit_resample(self, X, y):
        sampler = clone(self.sampler).set_params(
            sampling_strategy=self.sampling_strategy, random_state=self.random_state
        )
        resampled = [int(np.sum(y == c)) for c, count in self.sampling_strategy_.items() if count > 0]
        for name in sampler.get_params().keys() & {"k_neighbors", "n_neighbors"}:
            neighbours = getattr(sampler, name)
            if not resampled or not isinstance(neighbours, numbers.Integral):
                continue  # a NearestNeighbors object has a number of its own
            if min(resampled) < 2:
                raise TooFewImagesError(
                    f"{type(sampler).__name__} interpolates between images of a class, but a class that it shall fill up "
                    "has only one. RandomOverSampler repeats it"
                )
            sampler.set_params(**{name: min(neighbours, min(resampled) - 1)})
        # float32, because differences of uint8 wrap around.
        pixels = X.reshape(len(X), -1).astype(np.float32)
        try:
            X_res, y_res = sampler.fit_resample(pixels, y)
        except RuntimeError as error:
            raise UnsuitableImagesError(f"{type(sampler).__name__}: {error}") from error
        empty_handed = [
            int(c)
            for c, n in self.sampling_strategy_.items()
            if n > 0 and np.sum(y_res == c) <= np.sum(y == c)
        ]
        if empty_handed:
            raise UnsuitableImagesError(
                f"{type(sampler).__name__} made no image of the classes {empty_handed}, which shall have more. Choose another sampler"
            )
        if not np.isfinite(X_res).all():
            raise FloatingPointError(
                f"{type(sampler).__name__} gave pixels that are not finite (NaN or infinity). Choose another sampler."
            )
        # Clipped, because samplers such as SVMSMOTE also extrapolate, and 256 would become 0.
        X_res = np.clip(np.rint(X_res, out=X_res), 0, 255, out=X_res).astype(np.uint8)
        return X_res.reshape(-1, *X.shape[1:]), y_res

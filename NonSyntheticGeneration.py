"""Oversampling without a generator: more images of the rare class by augmenting the few there are.

X_res, y_res = AugmentationOverSampler(random_state=0).fit_resample(X, y)
"""

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from ImageOverSampler import ImageOverSampler
from Runtime import seeded


def mild_augmentation(size):
    """What moves a small photograph about without leaving its class, for images of ``size`` (h, w).

    Chosen before any result was seen: crops and rotations stay small because at 32x32 the object fills
    the frame; hue stays put because coat colour is a cue; nothing is solarised or turned upside down,
    as no test image is. No flip either: the training loop flips every image already, and not every
    data set allows it.
    """
    return (
        v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.85, 1.18)),
        v2.RandomRotation(10, interpolation=InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    )


def reference_augmentation(size):
    """The reference study's: strong colour and geometry, made for large photographs.

    Solarising inverts the brighter half of the values; corners that rotation and perspective uncover
    are black. It keeps any ``size``.
    """
    return (
        v2.ColorJitter(brightness=0.5, hue=0.3),
        v2.RandomPerspective(distortion_scale=0.2, p=1.0),
        v2.RandomRotation((0, 180)),
        v2.RandomSolarize(threshold=128, p=0.5),
    )


PRESETS = {"mild": mild_augmentation, "reference": reference_augmentation}


class AugmentationOverSampler(ImageOverSampler):
    """Append randomly augmented copies of the images of the smaller classes.

    Every image of a class is used as a source equally often (give or take one), in random order.

    Parameters
    ----------
    preset : {'mild', 'reference'}, default 'mild'
        ``'mild'`` suits 32x32 photographs: crop to 70 to 100 % of the area, rotation by up to 10
        degrees, brightness, contrast and saturation by up to 20 %. ``'reference'`` is the reference
        study's: brightness 0.5, hue 0.3, perspective 0.2, rotation 0 to 180 degrees, solarise with
        probability 0.5.
    sampling_strategy : str or dict, default 'auto'
        As in imbalanced-learn: see :class:`ImageOverSampler.ImageOverSampler`.
    random_state : int, RandomState instance or None, default None
        The same seed gives the same images.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.zeros((12, 32, 32, 3), dtype=np.uint8)
    >>> y = np.array([0] * 9 + [1] * 3)
    >>> X_res, y_res = AugmentationOverSampler(random_state=0).fit_resample(X, y)
    >>> X_res.shape, np.bincount(y_res).tolist()
    ((18, 32, 32, 3), [9, 9])
    """

    def __init__(self, *, preset="mild", sampling_strategy="auto", random_state=None):
        super().__init__(sampling_strategy=sampling_strategy, random_state=random_state)
        self.preset = preset

    def _make_images(self, X, c, count, seed):
        if self.preset not in PRESETS:
            raise ValueError(f"Unknown preset {self.preset!r}. Choose one of {', '.join(PRESETS)}.")
        augment = v2.Compose(PRESETS[self.preset](X.shape[1:3]))
        rng = np.random.default_rng(seed)
        sources = np.concatenate([rng.permutation(len(X)) for _ in range(-(-count // len(X)))])[:count]
        # Image by image, because torchvision draws one set of parameters per call; as PIL images,
        # because on 32x32 pixels they take 0.6 times as long as tensors (both presets).
        with seeded(seed):
            return np.stack([np.asarray(augment(Image.fromarray(X[row]))) for row in sources])

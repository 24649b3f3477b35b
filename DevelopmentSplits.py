"""Development splits: another rare class than the study's, and validation images from the training set.

rest = held_out_set(data)
development = development_data(rest, "dog-50")
development.X, development.y                       # 36,050 images, 50 of them dogs
development.X_val, development.y_val               # 1,000 held-out images of each class, and the removed dogs
"""

from dataclasses import dataclass, replace

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from Arms import COMMITTED_PROFILE, CPU_GAN
from Experiment import prepare_stable_diffusion_images
from GANExperiment import prepare_generator
from ImbalancedCIFAR10 import split_from_name
from Repeatability import derive_seed
from Results import Study

SPLITS = ("dog-50", "ship-50")
HELD_OUT = 1000  # images of each class
# Half of the study's steps. On cat-50 the distance to the kept images is 9.8 there and 8.1 at the study's best step, so a
# use of the images can be chosen with them at half the cost.
DEVELOPMENT_GAN = replace(CPU_GAN, steps=CPU_GAN.steps // 2, records=CPU_GAN.records // 2)


@dataclass(frozen=True)
class DevelopmentData:
    """An imbalanced training set and validation images, all from the training set of a data set.

    Attributes
    ----------
    X, y : ndarrays of uint8, shape (n, 32, 32, 3), and int64, shape (n,)
        The kept training images.
    X_val, y_val : ndarrays of uint8, shape (m, 32, 32, 3), and int64, shape (m,)
        Held-out images of all classes, and the images that the split removed.
    weights : ndarray of float, shape (m,)
        Of the validation images. They add up to the same for each class.
    minority : int
        The rare class.
    """

    X: np.ndarray
    y: np.ndarray
    X_val: np.ndarray
    y_val: np.ndarray
    weights: np.ndarray
    minority: int


def held_out_set(data, held_out=HELD_OUT):
    """Divide a training set into one to cut splits from and one to judge on. The test set of ``data`` is not read.

    Parameters
    ----------
    data : ImbalancedCIFAR10.ImageDataSet
    held_out : int, default 1000
        Images of each class to judge on. They are the same in every call.

    Returns
    -------
    ImbalancedCIFAR10.ImageDataSet
        Its test set is a part of the training set of ``data``, and its training set is the rest.

    Raises
    ------
    ValueError
        If a class has too few images.
    """
    y = data.y_train
    is_held = np.zeros(len(y), dtype=bool)
    for c in np.unique(y):
        rows = np.flatnonzero(y == c)
        if not 1 <= held_out < len(rows):
            raise ValueError(
                f"Cannot hold out {held_out} of the {len(rows)} images of class {c}. Hold out fewer."
            )
        is_held[np.random.default_rng(derive_seed(0, 5, int(c))).permutation(rows)[:held_out]] = True
    return replace(
        data, name="development", X_train=data.X_train[~is_held], y_train=y[~is_held],
        X_test=data.X_train[is_held], y_test=y[is_held],
    )  # fmt: skip


def development_data(rest, split_name):
    """Cut a development split.

    The removed images of the rare class serve for validation too, which makes its recall more precise. This is
    allowed because the split's class is not the one that the study reports.

    Parameters
    ----------
    rest : ImbalancedCIFAR10.ImageDataSet
        What :func:`held_out_set` returned.
    split_name : str
        A split with one rare class, see :func:`ImbalancedCIFAR10.split_from_name`.

    Returns
    -------
    DevelopmentData

    Raises
    ------
    ValueError
        If the split's class is the one that the study reports, or the split cuts several classes.
    """
    y = rest.y_train
    split = split_from_name(split_name, y, rest.class_names)
    if len(split.counts) != 1 or rest.class_names[split.minority_classes[0]] == "cat":
        raise ValueError(
            f"{split_name} is no development split: it needs one rare class, and not cat, which the study reports. "
            f"Choose for example {' or '.join(SPLITS)}."
        )
    [minority] = split.minority_classes
    kept = split.kept_rows(y)
    removed = np.setdiff1d(np.arange(len(y)), kept)
    X_val = np.concatenate([rest.X_test, rest.X_train[removed]])
    y_val = np.concatenate([rest.y_test, y[removed]])
    weights = np.bincount(rest.y_test)[y_val] / np.bincount(y_val)[y_val]
    return DevelopmentData(rest.X_train[kept], y[kept], X_val, y_val, weights, minority)


def check_splits(rest, split_names):
    """Raise ValueError if one of these cannot be a development split of ``rest``, before work on the first begins."""
    for split_name in split_names:
        development_data(rest, split_name)


def validation_scores(development, predictions):
    """Scores on validation images, as if every class had equally many, so that accuracy is balanced accuracy.

    Returns a dict of fractions with the keys :data:`DevelopmentReport.SCORES`, the first three for the rare class.
    """
    y, weights = development.y_val, development.weights
    rare = {"labels": [development.minority], "average": "macro", "zero_division": 0}
    arguments = {"y_true": y, "y_pred": predictions, "sample_weight": weights}
    return {
        "recall": float(recall_score(**arguments, **rare)),
        "precision": float(precision_score(**arguments, **rare)),
        "f1": float(f1_score(**arguments, **rare)),
        "accuracy": float(accuracy_score(**arguments)),
    }


# --- What methods need --------------------------------------------------------------------------


def prepare_images(rest, split_names):
    """Make sure that there are Stable Diffusion images for these splits of ``rest``: see :mod:`Experiment`.

    Images that were made from real ones are refused unless these are the ones that the splits keep of ``rest``.
    """
    splits = [split_from_name(name, rest.y_train, rest.class_names) for name in split_names]
    prepare_stable_diffusion_images(rest, *splits)


class DevelopmentStudy(Study):
    """A development split of the committed profile, whose GAN is :data:`DEVELOPMENT_GAN`."""

    @property
    def settings(self):
        """The :class:`Arms.Profile`."""
        return replace(super().settings, gan=DEVELOPMENT_GAN)


def development_generator(rest, split_name, device):
    """The file of a generator that was trained on a development split: a path. Its training follows the study's."""
    return prepare_generator(DevelopmentStudy(COMMITTED_PROFILE, rest.name, split_name), rest, device)

"""Are these images and labels what a function needs? If not, one error says what is wrong and what to do.

X, y = check_images(X, y)
y = check_labels(y, num_classes=10)
"""

import numpy as np

NUMBER_THEM = "np.unique(y, return_inverse=True)[1] numbers the classes from 0."


def check_images(X, y):
    """Return ``X`` and ``y`` if they are images with labels, else raise an error.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, height, width, 3), n at least 1
    y : ndarray of integers, shape (n,)

    Returns
    -------
    X : the same array
    y : the labels as int64

    Raises
    ------
    TypeError
        If a dtype is wrong. Floats are refused because their range (0 to 1 or 0 to 255) is unknown.
    ValueError
        If a shape is wrong.
    """
    X, y = check_pixels(X), np.asarray(y)
    if y.shape != (len(X),):
        raise ValueError(f"y must have the shape ({len(X)},) like X's first axis, but it is {y.shape}.")
    return X, check_labels(y)


def check_pixels(X):
    """Return ``X`` if it holds images, as :func:`check_images` asks of them, else raise an error."""
    X = np.asarray(X)
    if X.dtype != np.uint8:
        raise TypeError(
            f"X must hold uint8 pixels from 0 to 255, but its dtype is {X.dtype}.{_conversion(X)}"
        )
    if X.ndim != 4 or X.shape[-1] != 3 or 0 in X.shape:
        raise ValueError(f"X must have the shape (n, height, width, 3), but it is {X.shape}.{_cure(X.shape)}")
    return X


def _conversion(X):
    """How to convert ``X``, as its values suggest."""
    if not X.size or not np.issubdtype(X.dtype, np.number) or np.iscomplexobj(X):
        return ""
    lowest, highest = X.min(), X.max()
    if not 0 <= lowest <= highest <= 255:  # also with NaN
        return " Scale its values to 0 to 255 first."
    if np.issubdtype(X.dtype, np.integer):
        return " Convert it: X.astype(np.uint8)."
    if highest > 1:
        return " Convert it from 0 to 255: np.rint(X).astype(np.uint8)."
    return " Convert it from 0 to 1: np.rint(255 * X).astype(np.uint8)."


def _cure(shape):
    if len(shape) == 3 and shape[-1] == 3:
        return " One image needs an axis in front: X[None]."
    if len(shape) == 3 or (len(shape) == 4 and shape[-1] == 1):
        return " Repeat a grey channel three times: np.repeat(X.reshape(*X.shape[:3], 1), 3, axis=3)."
    if len(shape) == 4 and shape[1] == 3:
        return " Move the channels to the end: X.transpose(0, 2, 3, 1)."
    if len(shape) == 4 and shape[-1] == 4:
        return " Leave the opacity out: X[..., :3]."
    return ""


def check_labels(y, num_classes=None, name="y"):
    """Return labels as int64 if they are class numbers, else raise an error.

    Parameters
    ----------
    y : array of integers, shape (n,)
    num_classes : int, optional
        If given, the labels must be below it, and 0 or more.
    name : str
        What the labels are called in the error.

    Returns
    -------
    ndarray of int64, shape (n,)

    Raises
    ------
    TypeError, ValueError
    """
    y = np.asarray(y)
    if y.ndim != 1:
        raise ValueError(f"{name} must hold one class number an image, but it has the shape {y.shape}.")
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(
            f"{name} must hold class numbers (integers), but its dtype is {y.dtype}. {NUMBER_THEM}"
        )
    if y.dtype == np.uint64 and len(y) and y.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must hold class numbers, but one of them is {y.max()}. {NUMBER_THEM}")
    if num_classes is not None and len(y) and (y.min() < 0 or y.max() >= num_classes):
        raise ValueError(
            f"Labels run from {y.min()} to {y.max()} in {name}, but there are classes 0 to {num_classes - 1}. {NUMBER_THEM}"
        )
    return y.astype(np.int64, copy=False)


def check_classes(classes, num_classes):
    """Return class numbers as an array if each is a class and none is named twice, else raise an error.

    Parameters
    ----------
    classes : int, or a sequence, set or array of them
        At least one.
    num_classes : int

    Returns
    -------
    ndarray of int64, shape (k,), k at least 1

    Raises
    ------
    TypeError, ValueError
    """
    numbers = np.atleast_1d(np.asarray(sorted(classes) if isinstance(classes, set | frozenset) else classes))
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(
            f"minority_classes must be class numbers (integers), but their dtype is {numbers.dtype}."
        )
    if not numbers.size or numbers.ndim != 1 or len(np.unique(numbers)) < len(numbers):
        raise ValueError(
            f"minority_classes must be one or more numbers of classes, each only once: got {classes}."
        )
    if numbers.min() < 0 or numbers.max() >= num_classes:
        raise ValueError(f"minority_classes must be from 0 to {num_classes - 1}: got {numbers.tolist()}.")
    return numbers.astype(np.int64)

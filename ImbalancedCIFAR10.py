"""CIFAR-10 as arrays, and the imbalanced training sets cut from it.

    data = load_cifar10()                                      # uint8 images, int64 labels
    split = minority_split(data.y_train, data.class_names)     # cat: 50 of 5,000 images stay
    X, y = split.cut(data.X_train, data.y_train)               # X holds none of the 4,950 removed cats

The same split always keeps the same images. The test set is never cut.

References
----------
Krizhevsky and Hinton (2009), Learning multiple layers of features from tiny images.
Buda, Maki and Mazurowski (2018), A systematic study of the class imbalance problem in convolutional
neural networks (step imbalance). Cui et al. (2019), Class-balanced loss based on effective number of
samples (long-tailed CIFAR).
"""

import os
import re
import tarfile
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from Checks import check_labels
from Files import downloading, is_reachable, require_free_space, user_path
from Repeatability import derive_seed

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class DataUnavailableError(OSError):
    """The data set is not on this machine and cannot be downloaded now."""


@dataclass(frozen=True)
class ImageDataSet:
    """A classification data set held in memory.

    Attributes
    ----------
    name : str
        ``"cifar10"`` or ``"digits"``.
    class_names : tuple of str
        The name at position c belongs to class number c.
    X_train, X_test : ndarray of uint8, shape (n, 32, 32, 3)
        RGB images with values from 0 to 255.
    y_train, y_test : ndarray of int64, shape (n,)
        The class number of each image.
    mirrored_images_keep_their_class : bool
        Whether a horizontal flip is a valid augmentation. It is not for digits.
    most_images_a_class : int or None
        See :meth:`part`. None: these are all images.
    """

    name: str
    class_names: tuple
    X_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    X_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    mirrored_images_keep_their_class: bool = True
    most_images_a_class: int | None = None

    def part(self, most_images_a_class):
        """The first images of each class of both sets, in their order: a small data set for a quick trial.

        Every result says which part it was obtained on, and results of different parts are never compared.

        Parameters
        ----------
        most_images_a_class : int or None
            Of the training set, and of the test set. A class with fewer images keeps them all. None: every image.

        Returns
        -------
        ImageDataSet
            It shares no memory with this one unless it is this one.
        """
        if most_images_a_class is None:
            return self
        train, test = (
            np.sort(np.concatenate([np.flatnonzero(y == c)[:most_images_a_class] for c in np.unique(y)]))
            for y in (self.y_train, self.y_test)
        )
        return replace(
            self,
            X_train=self.X_train[train],
            y_train=self.y_train[train],
            X_test=self.X_test[test],
            y_test=self.y_test[test],
            most_images_a_class=most_images_a_class,
        )


# --- Loading ------------------------------------------------------------------------------------


def default_root():
    """The folder that holds CIFAR-10 or into which it is downloaded: ``$CIFAR10_ROOT``, else ``datasets``.

    ``~`` in it is the home folder.
    """
    return user_path(os.environ.get("CIFAR10_ROOT") or "datasets")


def load_cifar10(root=None):
    """Load CIFAR-10. It is downloaded only if there is no copy.

    Parameters
    ----------
    root : path, optional
        The folder that contains ``cifar-10-batches-py``, or the archive ``cifar-10-python.tar.gz``, which is then
        unpacked there. Default: :func:`default_root`.

    Returns
    -------
    ImageDataSet
        50,000 training and 10,000 test images of 10 classes.

    Raises
    ------
    ValueError
        If the copy or the archive is damaged. The message names the damaged files. They are left as they are.
    DataUnavailableError
        If there is no copy and none can be downloaded. A missing network is noticed within 20 seconds.
    OSError
        If the archive cannot be unpacked.
    """
    root = default_root() if root is None else user_path(root)
    folder = root / CIFAR10.base_folder
    if not folder.exists():
        if (root / CIFAR10.filename).exists():
            _unpack_cifar10(root)
        else:
            _download_cifar10(root)
    try:
        # torchvision checks a batch's MD5 before it unpickles the batch.
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    except RuntimeError as error:
        files = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
        damaged = [name for name, md5 in files if not check_integrity(folder / name, md5)]
        raise ValueError(
            f"CIFAR-10 in {folder} is damaged. Missing, truncated or changed: {', '.join(damaged)}. "
            f"Remove the folder {folder} to download it again, or set CIFAR10_ROOT to the folder that "
            "contains an intact copy."
        ) from error
    return ImageDataSet(
        name="cifar10",
        class_names=CIFAR10_CLASSES,
        X_train=_contiguous(train.data),
        y_train=np.asarray(train.targets, dtype=np.int64),
        X_test=_contiguous(test.data),
        y_test=np.asarray(test.targets, dtype=np.int64),
    )


def _contiguous(images):
    """The same as NumPy's ascontiguousarray, in half the time."""
    return torch.from_numpy(images).contiguous().numpy()


def _unpack_cifar10(root):
    """Unpack the archive in ``root``. The network is not used."""
    archive = root / CIFAR10.filename
    if not check_integrity(archive, CIFAR10.tgz_md5):
        raise ValueError(
            f"{archive} is truncated, damaged or another file: its MD5 is not {CIFAR10.tgz_md5}. Get it again, or "
            "remove it to download CIFAR-10."
        )
    try:
        require_free_space(root, gigabytes=0.3)
        with tempfile.TemporaryDirectory(dir=root, prefix=".cifar10-") as temporary:
            with tarfile.open(archive) as content:
                content.extractall(temporary, filter="data")
            _move_into_place(Path(temporary), root)
    except (OSError, tarfile.TarError) as error:
        raise OSError(
            f"{archive} could not be unpacked: {error}. Unpack it into a folder that you may write to, and set "
            "CIFAR10_ROOT to that folder."
        ) from error


def _move_into_place(temporary, root):
    """Move the whole folder at once, so that a kill leaves no incomplete copy."""
    folder = root / CIFAR10.base_folder
    try:
        (temporary / CIFAR10.base_folder).rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise


def _download_cifar10(root):
    if not is_reachable(CIFAR10.url):
        raise DataUnavailableError(
            f"There is no CIFAR-10 in {root.absolute()} and {CIFAR10.url} does not answer. Set "
            f"CIFAR10_ROOT to a folder that contains {CIFAR10.base_folder} or {CIFAR10.filename}, or connect to "
            "the internet."
        )
    require_free_space(root, gigabytes=0.6)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".cifar10-") as temporary:
            with downloading():
                CIFAR10(temporary, download=True)
            _move_into_place(Path(temporary), root)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataUnavailableError(
            f"The download of CIFAR-10 from {CIFAR10.url} failed: {error}. Run again, or put a copy "
            f"of {CIFAR10.base_folder} into {root.absolute()}."
        ) from error


def load_digits_as_images():
    """Load scikit-learn's bundled 8x8 digits in CIFAR-10's format. This substitute needs no download.

    Each digit is enlarged to 32x32 by repeating each pixel 4x4 times, and copied to three channels. A fifth
    of each class becomes the test set. It is the same fifth in every call.

    Returns
    -------
    ImageDataSet
        1,437 training and 360 test images of 10 classes.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(np.repeat(images, 4, axis=1), 4, axis=2)
    images = np.repeat(images[..., np.newaxis], 3, axis=-1)
    X_train, X_test, y_train, y_test = train_test_split(
        images, digits.target.astype(np.int64), test_size=0.2, stratify=digits.target, random_state=0
    )
    return ImageDataSet(
        name="digits",
        class_names=tuple(str(d) for d in range(10)),
        X_train=X_train,
        y_train=y_train,
        X_test=X_test,
        y_test=y_test,
        mirrored_images_keep_their_class=False,
    )


def load_data(root=None):
    """Load CIFAR-10. If it is not available, warn and load the bundled digits.

    A damaged copy of CIFAR-10 is still an error, because the digits would hide the damage.

    Parameters
    ----------
    root : path, optional
        The folder that contains ``cifar-10-batches-py``. Default: :func:`default_root`.

    Returns
    -------
    ImageDataSet

    Raises
    ------
    ValueError
        If there is a damaged copy of CIFAR-10.
    """
    try:
        return load_cifar10(root)
    except DataUnavailableError as error:
        warnings.warn(
            f"NOT CIFAR-10: {error} The study runs on scikit-learn's bundled digits instead. The "
            "titles and file names of its results say so.",
            stacklevel=2,
        )
        return load_digits_as_images()


# --- Splits -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Which images of a training set are kept.

    Attributes
    ----------
    name : str
        A short name that can be a folder's name, for example ``"cat-50"``.
    counts : dict
        Class number -> number of images kept. A class that is not in it keeps all its images.
    minority_classes : tuple of int
        The rare classes, whose recall the study measures.
    draw : int
        Seed of the choice of images. With the same draw, a smaller count keeps a subset of the images that a
        larger count keeps.
    """

    name: str
    counts: dict
    minority_classes: tuple
    draw: int = 0

    def kept_rows(self, y):
        """The rows of ``y`` that stay.

        Parameters
        ----------
        y : ndarray of int, shape (n,)
            The class number of each image of the whole training set.

        Returns
        -------
        ndarray of int64, shape (m,), m <= n
            Row numbers in ascending order.

        Raises
        ------
        ValueError
            If a class has fewer images than it should keep, or none.
        """
        y, kept = check_labels(y), []
        if missing := sorted(self.counts.keys() - set(y.tolist())):
            raise ValueError(
                f"Split {self.name} keeps images of the classes {missing}, but y has none of them."
            )
        for c in np.unique(y):
            rows = np.flatnonzero(y == c)
            count = self.counts.get(int(c), len(rows))
            if not 1 <= count <= len(rows):
                raise ValueError(
                    f"Split {self.name} cannot keep {count} of the {len(rows)} images of class {c}. Keep "
                    f"1 to {len(rows)}."
                )
            order = np.random.default_rng(derive_seed(self.draw, int(c))).permutation(len(rows))
            kept.append(rows[order[:count]])
        return np.sort(np.concatenate(kept))

    def cut(self, X, y):
        """Return copies of the kept images and labels in their original order.

        Parameters
        ----------
        X : ndarray of shape (n, ...)
            The images of the whole training set.
        y : ndarray of int, shape (n,)
            Their class numbers.

        Returns
        -------
        X : ndarray of shape (m, ...), m <= n
        y : ndarray of int, shape (m,)
            Neither shares memory with the input, so no removed image can be reached through them.

        Raises
        ------
        ValueError
            If a class has fewer images than it should keep, or none, or there are not as many labels as images.
        """
        X, y = np.asarray(X), check_labels(y)  # a pandas Series would be indexed by its index
        if len(X) != len(y):
            raise ValueError(f"Each image needs a label: X has {len(X):,} images, y has {len(y):,}.")
        rows = self.kept_rows(y)
        return X[rows], y[rows]


def class_number(name_or_number, class_names):
    """Find the number of a class.

    Parameters
    ----------
    name_or_number : str or int
        The name of the class, its number, or its number as text (``"3"``).
    class_names : sequence of str

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If there is no such class. The message lists the valid ones.
    """
    text = str(name_or_number)
    is_number = isinstance(name_or_number, int | np.integer)  # of a class, even if another has it as its name
    if text in class_names and not is_number:
        return list(class_names).index(text)
    if text.isdecimal() and int(text) < len(class_names):
        return int(text)
    raise ValueError(
        f"Unknown class {name_or_number!r}. Choose one of {', '.join(class_names)} or a number from "
        f"0 to {len(class_names) - 1}."
    )


def minority_split(y, class_names=CIFAR10_CLASSES, minority="cat", keep=50, draw=0):
    """Make one or more classes rare. The other classes keep all their images.

    Parameters
    ----------
    y : ndarray of int, shape (n,)
        Labels of the whole training set.
    class_names : sequence of str
    minority : str or int, or a list of them
        The class or classes to cut, by name or number. The reference study cuts the cats.
    keep : int or float
        What stays of each rare class. An integer is a number of images. A float above 0 and up to 1 is a
        fraction, rounded up to a whole image. The reference study keeps 50 of 5,000 images, which is the
        fraction 0.01.
    draw : int
        Seed of the choice of images.

    Returns
    -------
    Split

    Raises
    ------
    ValueError
        If a class is unknown or named twice, or if the count is not between 1 and the number of images.
    """
    y = _check_labels_and_names(y, class_names)
    if minority is None or isinstance(minority, float):
        raise TypeError(f"minority must be a class's name or number, or a list of them: got {minority!r}.")
    names = [minority] if isinstance(minority, (str, int, np.integer)) else list(minority)
    classes = [class_number(name, class_names) for name in names]
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"Name at least one minority class, and each only once. Got {names}.")
    counts, kept, is_fraction = {}, keep, isinstance(keep, (float, np.floating))
    if is_fraction:  # not 2e-05, which split_from_name does not read, and what is printed is what is kept
        kept = np.format_float_positional(keep, trim="0")
        keep = float(kept)
    for c in classes:
        available = int(np.sum(y == c))
        if isinstance(keep, (bool, np.bool_)) or (is_fraction and not 0 < keep <= 1):  # also refuses NaN
            count = 0
        else:
            count = int(np.ceil(float(keep) * available - 1e-9)) if is_fraction else int(keep)
        if not 1 <= count <= available:
            raise ValueError(
                f"Cannot keep {keep} of class {class_names[c]}, which has {available} images. Choose a "
                f"count from 1 to {available}, or a fraction above 0.0 and up to 1.0."
            )
        counts[c] = count
    name = "+".join(class_names[c] for c in classes) + f"-{kept}" + _draw_suffix(draw)
    return Split(name, counts, tuple(classes), draw)


def long_tailed_split(y, class_names=CIFAR10_CLASSES, imbalance_factor=100, draw=0):
    """Let the class sizes fall exponentially (Cui et al. 2019).

    Of C classes, class c keeps n_c = n * factor^(-c / (C - 1)) images, where n is the size of the largest class.

    Parameters
    ----------
    y : ndarray of int, shape (n,)
        Labels of the whole training set.
    class_names : sequence of str
    imbalance_factor : float, at least 1
        Images of the first class per image of the last, for classes that were equally large. With 100, the classes of
        CIFAR-10 keep 5000, 2997, 1796, ..., 83, 50.
    draw : int
        Seed of the choice of images.

    Returns
    -------
    Split
        Its minority classes are those with at most a tenth of the largest class's images. If there are none,
        the last class is the minority.

    Raises
    ------
    ValueError
        If the factor is below 1, or so large that a class would keep no image, or a class has less than nine tenths of the
        images that it should keep.
    """
    _check_factor(imbalance_factor)
    sizes = np.bincount(_check_labels_and_names(y, class_names), minlength=len(class_names))
    powers = np.arange(len(class_names)) / (len(class_names) - 1)
    wanted = (sizes.max() * (1 / imbalance_factor) ** powers + 1e-9).astype(int)
    counts = {c: int(min(count, sizes[c])) for c, count in enumerate(wanted)}
    _check_none_empty(counts, class_names, imbalance_factor)
    # Classes that are nearly equal, such as the digits', keep a few images less.
    short = [f"{class_names[c]} ({sizes[c]} of {n})" for c, n in enumerate(wanted) if sizes[c] < 0.9 * n]
    if short:
        raise ValueError(
            f"A long-tailed split with factor {imbalance_factor:g} needs more images of the classes {', '.join(short)}. Order "
            "the classes from large to small, or choose a larger factor."
        )
    minority = tuple(c for c, count in counts.items() if count <= sizes.max() / 10)
    name = f"long-tailed-{imbalance_factor:g}" + _draw_suffix(draw)
    return Split(name, counts, minority or (len(class_names) - 1,), draw)


def step_split(y, class_names=CIFAR10_CLASSES, imbalance_factor=100, draw=0):
    """Make the second half of the classes equally rare (Buda et al. 2018, mu = 0.5).

    Parameters
    ----------
    y : ndarray of int, shape (n,)
        Labels of the whole training set.
    class_names : sequence of str
    imbalance_factor : float, at least 1
        Images of a frequent class per image of a rare one.
    draw : int
        Seed of the choice of images.

    Returns
    -------
    Split

    Raises
    ------
    ValueError
        If the factor is below 1, or so large that a class would keep no image.
    """
    _check_factor(imbalance_factor)
    sizes = np.bincount(_check_labels_and_names(y, class_names), minlength=len(class_names))
    minority = tuple(range((len(class_names) + 1) // 2, len(class_names)))
    counts = {c: int(min(sizes.max() / imbalance_factor + 1e-9, sizes[c])) for c in minority}
    _check_none_empty(counts, class_names, imbalance_factor)
    return Split(f"step-{imbalance_factor:g}" + _draw_suffix(draw), counts, minority, draw)


def split_from_name(name, y, class_names=CIFAR10_CLASSES):
    """Make a split from its name, as used on the command line and in ``results/``.

    Parameters
    ----------
    name : str
        ``cat-50`` (class, kept images), ``cat+dog-0.01`` (classes, kept fraction), ``long-tailed-100``
        or ``step-10`` (imbalance factor). An optional ``@1`` at the end chooses other images to keep.
    y : ndarray of int, shape (n,)
        Labels of the whole training set.
    class_names : sequence of str

    Returns
    -------
    Split

    Raises
    ------
    ValueError
        If the name has none of these forms, a class is unknown, or a count or factor is impossible.
    """
    match = re.fullmatch(r"(.+)-(\d+(?:\.\d+)?)(?:@(\d+))?", name)
    if match is None:
        raise ValueError(
            f"Unknown split {name!r}. Examples: cat-50, cat+dog-0.01, long-tailed-100, step-10, cat-50@1."
        )
    kind, number, draw = match[1], match[2], int(match[3] or 0)
    value = float(number) if "." in number or len(number) > 15 else int(number)
    if kind == "long-tailed":
        return long_tailed_split(y, class_names, value, draw)
    if kind == "step":
        return step_split(y, class_names, value, draw)
    return minority_split(y, class_names, kind.split("+"), value, draw)


def _check_labels_and_names(y, class_names):
    """The labels as int64, or an error if the names are no list of text, or a class has no image."""
    if isinstance(class_names, str | dict) or not all(isinstance(name, str) for name in class_names):
        raise TypeError(
            f"class_names must be a list of names, one for each class in order: got {class_names!r}."
        )
    y = check_labels(y, len(class_names))
    if missing := [name for c, name in enumerate(class_names) if not np.any(y == c)]:
        raise ValueError(
            f"y has no image of the classes {', '.join(missing)}. Pass the class_names of your own labels."
        )
    return y


def _check_factor(imbalance_factor):
    if not imbalance_factor >= 1:  # also refuses NaN
        raise ValueError(
            "imbalance_factor is the number of images of the largest class per image of the smallest, so it "
            f"must be at least 1. Got {imbalance_factor}."
        )


def _check_none_empty(counts, class_names, imbalance_factor):
    empty = [class_names[c] for c, count in counts.items() if count < 1]
    if empty:
        raise ValueError(
            f"An imbalance factor of {imbalance_factor:g} leaves no image of class {', '.join(empty)}. "
            "Choose a smaller one."
        )


def _draw_suffix(draw):
    return f"@{draw}" if draw else ""

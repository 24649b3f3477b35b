"""What images and labels are accepted, and what is said of others."""

import numpy as np
import pytest

from Checks import check_classes, check_images, check_labels, check_pixels

X = np.random.default_rng(0).integers(0, 256, size=(4, 5, 6, 3), dtype=np.uint8)
Y = np.array([2, 0, 1, 2], dtype=np.int32)


def test_good_images_are_returned_as_they_are_with_int64_labels():
    checked, labels = check_images(X, Y)
    assert checked is X
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool])
def test_images_of_another_dtype_are_refused(dtype):
    with pytest.raises(TypeError, match=f"uint8.*{np.dtype(dtype)}"):
        check_images(X.astype(dtype), Y)


@pytest.mark.parametrize(
    "shape", [(4, 5, 18), (4, 3, 5, 6), (4, 5, 6, 1), (4, 0, 6, 3), (0, 5, 6, 3), (360,)]
)
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(n, height, width, 3\)"):
        check_images(np.zeros(shape, dtype=np.uint8), np.zeros(shape[0], dtype=int))


@pytest.mark.parametrize("y", [Y[:3], Y[:, np.newaxis], np.int64(2)])
def test_labels_of_another_shape_are_refused(y):
    with pytest.raises(ValueError, match=r"\(4,\)"):
        check_images(X, y)


@pytest.mark.parametrize("y", [Y.astype(float), Y == 2, ["cat", "dog", "cat", "cat"]])
def test_labels_that_are_no_integers_are_refused(y):
    with pytest.raises(TypeError, match="integers"):
        check_images(X, y)


def test_labels_beyond_int64_are_refused_and_not_wrapped():
    with pytest.raises(ValueError, match="one of them is 18446744073709551615"):
        check_labels(np.array([0, 2**64 - 1], dtype=np.uint64))


def test_an_error_says_how_to_mend_the_images():
    for images, cure in (
        (X[..., 0], "np.repeat(X.reshape(*X.shape[:3], 1), 3, axis=3)"),
        (X[..., :1], "np.repeat(X.reshape(*X.shape[:3], 1), 3, axis=3)"),
        (X.transpose(0, 3, 1, 2), "X.transpose(0, 2, 3, 1)"),
    ):
        with pytest.raises(ValueError) as error:
            check_images(images, Y)
        assert cure in str(error.value)
        mended = eval(cure, {"X": images, "np": np})
        assert check_images(mended, Y)[0].shape == X.shape


def test_labels_beyond_the_classes_are_refused_with_the_way_to_number_them():
    assert check_labels([0, 2, 1], 3).tolist() == [0, 2, 1]
    for labels in ([1, 2, 3], [-1, 0, 1]):
        with pytest.raises(
            ValueError, match=r"Labels run from .* in labels, but there are classes 0 to 2.*return_inverse"
        ):
            check_labels(labels, 3, "labels")
    with pytest.raises(ValueError, match="one class number an image"):
        check_labels(np.eye(3, dtype=int))


@pytest.mark.parametrize(
    ("X", "cure"),
    [
        (X.astype(np.int64), r"X\.astype\(np\.uint8\)"),
        (X.astype(float), r"np\.rint\(X\)\.astype\(np\.uint8\)"),
        (X / 255, r"np\.rint\(255 \* X\)\.astype\(np\.uint8\)"),
        (X - 300.0, "Scale its values"),
        (np.full(X.shape, np.nan), "Scale its values"),
        (X[0], r"X\[None\]"),
        (X[..., 0], "np.repeat"),
        (np.repeat(X[..., :1], 4, axis=3), r"X\[\.\.\., :3\]"),
    ],
)
def test_the_cure_suits_the_values(X, cure):
    with pytest.raises((TypeError, ValueError), match=cure):
        check_pixels(X)


@pytest.mark.parametrize("integers", [np.int64, float])
def test_following_the_cure_keeps_the_images(integers):
    """255 * X would turn 10 into 246."""
    with pytest.raises(TypeError) as error:
        check_pixels(X.astype(integers))
    cure = str(error.value).partition(": ")[2].rpartition(".")[0]
    assert np.array_equal(eval(cure, {"np": np, "X": X.astype(integers)}), X)


@pytest.mark.parametrize("classes", [2, [2], (2,), {2}, np.array([2], dtype=np.uint8), np.int64(2)])
def test_class_numbers_can_be_given_in_every_form(classes):
    numbers = check_classes(classes, 3)
    assert numbers.tolist() == [2] and numbers.dtype == np.int64


@pytest.mark.parametrize(
    ("classes", "error"),
    [([], ValueError), ([1, 1], ValueError), ([3], ValueError), ([-1], ValueError), ([0.5], TypeError),
     ([False, False, True], TypeError), (["a"], TypeError), ([[1]], ValueError)],
)  # fmt: skip
def test_other_class_numbers_are_refused(classes, error):
    with pytest.raises(error, match="minority_classes must"):
        check_classes(classes, 3)

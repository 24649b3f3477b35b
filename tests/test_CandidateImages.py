"""From large images to small ones."""

import numpy as np
import pytest
from PIL import Image

from CandidateImages import downsample


def test_area_is_the_mean_of_the_pixels_that_a_small_one_covers():
    large = np.random.default_rng(0).integers(0, 256, size=(3, 128, 128, 3), dtype=np.uint8)
    small = downsample([Image.fromarray(x) for x in large])
    means = large.reshape(3, 32, 4, 32, 4, 3).astype(float).mean(axis=(2, 4))
    assert (small.shape, small.dtype) == ((3, 32, 32, 3), np.uint8)
    assert np.abs(small - means).max() <= 1  # Pillow rounds after each of the two directions


@pytest.mark.parametrize("method", ["area", "lanczos"])
def test_stripes_too_fine_for_the_small_image_become_grey_instead_of_aliasing(method):
    stripes = np.zeros((512, 512, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(downsample([Image.fromarray(stripes)], method).astype(int) - 127).max() <= 4


def test_images_are_reduced_to_the_size_that_is_asked_for():
    halves = np.repeat(np.uint8([[[10] * 3], [[30] * 3]]), 64, axis=0).repeat(128, axis=1)
    assert downsample([Image.fromarray(halves)], pixels=2)[0, :, :, 0].tolist() == [[10, 10], [30, 30]]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="Unknown downsampling 'nearest'. Choose one of area, lanczos"):
        downsample([], "nearest")
    assert downsample([]).shape == (0, 32, 32, 3)

"""Colours, sharpness and spectra of images, measured and matched."""

import numpy as np
import pytest

import CIFAKE
import ImageStatistics
from ImageCache import load_generated_images
from ImageStatistics import image_statistics, match_spectrum, match_statistics, mean_power


def noise(n, size=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(n, size, size, 3), dtype=np.uint8)


def test_statistics_have_known_values():
    halves = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    halves[:, :16] = (255, 0, 51)
    statistics = image_statistics(halves)
    assert statistics["mean"] == pytest.approx([0.5, 0, 0.1])
    assert statistics["standard_deviation"] == pytest.approx([0.5, 0, 0.1])
    # One of 31 row differences is the whole step s, the variance is s^2 / 4: (1/31 + 0) / 2 * 4.
    assert statistics["sharpness"] == pytest.approx(2 / 31, rel=1e-4)
    assert image_statistics(noise(20, 32))["sharpness"] == pytest.approx(2, rel=0.02)


def test_sharpness_ignores_contrast():
    x = noise(5, 32)
    faint = (100 + x / 4).astype(np.uint8)
    assert image_statistics(faint)["sharpness"] == pytest.approx(image_statistics(x)["sharpness"], rel=0.02)


def test_real_generated_images_take_on_the_statistics_of_fifty_real_ones(cifar10, cifake_zip, monkeypatch):
    monkeypatch.setattr(CIFAKE, "IMAGES_PER_CLASS", 400)
    CIFAKE.import_cifake(cifake_zip)
    images, labels = load_generated_images()
    generated, real = images[labels == 3], cifar10.X_train[cifar10.y_train == 3][:50]
    matched = match_statistics(generated, real)
    before, after, goal = map(image_statistics, (generated, matched, real))
    assert (matched.shape, matched.dtype) == (generated.shape, np.uint8)
    assert before["sharpness"] > 1.3 * goal["sharpness"]  # generated images are too sharp
    assert after["sharpness"] == pytest.approx(goal["sharpness"], rel=0.03)
    assert after["mean"] == pytest.approx(goal["mean"], abs=0.005)
    assert after["standard_deviation"] == pytest.approx(goal["standard_deviation"], abs=0.01)
    # The images themselves stay what they are.
    for a, b in zip(generated, matched, strict=True):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.85


@pytest.mark.parametrize("even", ["generated", "real"])
def test_images_of_one_even_colour_do_no_harm(even):
    grey = np.full((3, 32, 32, 3), 90, dtype=np.uint8)
    pair = (grey, noise(3, 32)) if even == "generated" else (noise(3, 32), grey)
    matched = match_statistics(*pair)
    assert matched.shape == (3, 32, 32, 3)
    assert image_statistics(matched)["mean"] == pytest.approx(image_statistics(pair[1])["mean"], abs=0.06)


@pytest.mark.parametrize(
    "images", [noise(0), noise(1, 1), noise(5, 1)], ids=["none", "one pixel", "five pixels"]
)
def test_images_without_statistics_are_refused_instead_of_giving_nan(images):
    for measure in (
        image_statistics,
        lambda x: match_statistics(x, noise(2)),
        lambda x: match_statistics(noise(2), x),
    ):
        with pytest.raises(ValueError, match="shape"):
            measure(images)


def test_numbers_that_are_not_finite_do_not_become_pixels(monkeypatch):
    monkeypatch.setattr(ImageStatistics, "_square_root", lambda matrix: np.full((3, 3), np.nan))
    with pytest.raises((FloatingPointError, np.linalg.LinAlgError)):
        match_statistics(noise(2), noise(2, seed=1))


# --- Power spectrum -----------------------------------------------------------------------------


def smooth(images):
    """Blurred by 3x3, cyclically, as float."""
    x = images.astype(float)
    return sum(np.roll(x, (a, b), axis=(1, 2)) for a in (-1, 0, 1) for b in (-1, 0, 1)) / 9


def test_matched_images_have_the_power_of_real_ones_at_each_frequency():
    real = np.clip(128 + 3 * (smooth(noise(300, 32)) - 128), 0, 255).astype(np.uint8)
    generated = noise(400, 32, seed=1)
    before = mean_power(generated) / mean_power(real)
    after = mean_power(match_spectrum(generated, real)) / mean_power(real)
    assert np.abs(np.log(before)).max() > 2
    strong = mean_power(real) > 32 * 32  # weaker than the noise of rounding to whole pixel values
    strong[0, 0] = False  # the mean of an image stays
    assert strong.sum() > 500 and np.abs(np.log(after[strong])).max() < 0.7


def test_each_image_keeps_its_mean_and_one_map_serves_all_images():
    real = smooth(noise(50, 32)).astype(np.uint8)
    generated = (noise(40, 32, seed=1) // 3 + 80).astype(np.uint8)
    matched = match_spectrum(generated, real)
    assert np.abs(matched.mean(axis=(1, 2)) - generated.mean(axis=(1, 2))).max() < 0.5
    # Gains are fixed by the set, so a linear map: the difference of two images is mapped alike.
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(match_spectrum(generated[order], real), matched[order])


def test_images_with_the_same_spectrum_stay_as_they_are():
    images = noise(30, 32)
    assert np.abs(match_spectrum(images, images).astype(int) - images).max() <= 1


def test_spectra_of_one_image_or_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="needs at least 2 real images, but there is 1"):
        match_spectrum(noise(3, 32), noise(1, 32))
    with pytest.raises(ValueError, match="Reduce them to the same size first"):
        match_spectrum(noise(3, 64), noise(3, 32))
    with pytest.raises(TypeError):
        match_spectrum(noise(3, 32).astype(float), noise(3, 32))

"""Colours, sharpness and power spectra of sets of images: measured, and matched to those of real images.

    print(image_statistics(generated), image_statistics(real))
    matched = match_statistics(generated, real)
    matched = match_spectrum(generated, real)

References
----------
Durall, Keuper and Keuper (2020), Watch your
up-convolution (the power spectrum gives generated images away). Pitié and Kokaram (2007), The linear
Monge-Kantorovitch linear colour mapping for example-based colour transfer.
"""

import numpy as np
import scipy.fft

from Checks import check_pixels

# --- Statistics ---------------------------------------------------------------------------------


def image_statistics(images):
    """Measure the colours and the sharpness of a set of images.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, height, width, 3)

    Returns
    -------
    dict
        ``mean`` and ``standard_deviation`` are those of red, green and blue over all pixels, each a list of 3
        fractions of full brightness. ``sharpness`` (float) is the mean squared difference between
        neighbouring pixels, divided by the variance within the images, and so does not depend on contrast. A
        uniform area has 0, white noise has 2.

    Raises
    ------
    TypeError, ValueError
        If there is no image, or the images are not uint8 of at least 2x2 pixels.
    """
    x = np.asarray(_check(images), dtype=np.float32) / 255
    pixels = x.reshape(-1, 3).astype(np.float64)
    return {
        "mean": pixels.mean(axis=0).tolist(),
        "standard_deviation": pixels.std(axis=0).tolist(),
        "sharpness": _sharpness(x),
    }


def _sharpness(x):
    grey = x.mean(axis=-1, dtype=np.float64)
    differences = np.mean(np.diff(grey, axis=1) ** 2) + np.mean(np.diff(grey, axis=2) ** 2)
    return float(differences / 2 / max(grey.var(axis=(1, 2)).mean(), 1e-12))


def match_statistics(images, real):
    """Give a set of generated images the sharpness and the colours of a set of real ones.

    All images get the same sharpening (or blurring) and the same linear map of colours, so the differences
    between them remain.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, height, width, 3)
    real : ndarray of uint8, shape (m, height, width, 3)
        Real training images that the split kept. Never pass images that it removed.

    Returns
    -------
    ndarray of uint8, shape (n, height, width, 3)

    Raises
    ------
    TypeError, ValueError
        If a set is empty, or its images are not uint8 of at least 2x2 pixels.
    FloatingPointError
        If the matched colours are not finite.
    """
    images, real = _check(images), _check(real)
    x = np.asarray(images, dtype=np.float32) / 255
    target = np.asarray(real, dtype=np.float32) / 255
    x = _match_sharpness(x, _sharpness(target))
    matched = _match_colours(x, target)
    if not np.isfinite(matched).all():
        raise FloatingPointError(
            "Matching the colours gave numbers that are not finite. Generate without --match-statistics."
        )
    return np.rint(255 * np.clip(matched, 0, 1)).astype(np.uint8)


def _check(images):
    images = check_pixels(images)
    if min(images.shape[1:3]) < 2:
        raise ValueError(f"The statistics of images need at least 2x2 pixels: got the shape {images.shape}.")
    return images


def _match_sharpness(x, target):
    """Find by bisection how much fine detail to add (or, if negative, to remove) for the wanted sharpness."""
    detail = x - _blur(x)
    low, high = -1.0, 4.0  # from the blurred image itself to five times its detail
    for _ in range(12):
        middle = (low + high) / 2
        if _sharpness(np.clip(x + middle * detail, 0, 1)) < target:
            low = middle
        else:
            high = middle
    return x + (low + high) / 2 * detail


def _blur(x):
    for axis in (1, 2):
        padded = np.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode="edge")
        size = x.shape[axis]
        before, after = (padded.take(range(k, k + size), axis=axis) for k in (0, 2))
        x = (before + 2 * x + after) / 4
    return x


def _match_colours(x, target):
    source_mean, source = _mean_and_covariance(x)
    target_mean, wanted = _mean_and_covariance(target)
    root = _square_root(source)
    inverse = np.linalg.inv(root)
    matrix = inverse @ _square_root(root @ wanted @ root) @ inverse
    return (x - source_mean) @ matrix.T + target_mean


def _mean_and_covariance(x):
    pixels = x.reshape(-1, 3).astype(np.float64)
    # One grey level of noise keeps the matrix invertible for images without colour.
    return pixels.mean(axis=0), np.cov(pixels, rowvar=False) + np.eye(3) / 255**2


def _square_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


# --- Power spectrum -----------------------------------------------------------------------------

SPECTRUM_IMAGES = 5000  # enough for the mean power of each frequency


def match_spectrum(images, real):
    """Give a set of generated images the mean power spectrum of a set of real ones.

    Generated images have too much or too little power at some frequencies, and a network can tell them from real ones
    by that (Durall et al. 2020). Each frequency of each channel gets one gain for all images: the square root of the
    ratio of its mean power in the real and in the generated images. The mean of each image stays, except for values
    that would leave 0 to 255 and are cut off. Differences between classes are matched away, too, if the two sets show
    other classes.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, height, width, 3)
    real : ndarray of uint8, shape (m, height, width, 3)
        Real training images that the split kept, of the same size. Never pass images that it removed.

    Returns
    -------
    ndarray of uint8, shape (n, height, width, 3)

    Raises
    ------
    TypeError, ValueError
        If a set is empty, its images are not uint8 of at least 2x2 pixels, the sizes differ, or there are fewer than
        2 real images.
    """
    images, real = _check(images), _check(real)
    if images.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"Spectra are compared at one size, but generated images have the shape {images.shape[1:]} and real ones "
            f"{real.shape[1:]}. Reduce them to the same size first."
        )
    if len(real) < 2:
        raise ValueError(
            "A mean power spectrum needs at least 2 real images, but there is 1. Keep more images."
        )
    rounding = (
        np.prod(images.shape[1:3]) / 12
    )  # the power of rounding to whole pixel values; it is not amplified
    gain = np.sqrt(mean_power(real) / np.maximum(mean_power(images), rounding))
    gain[0, 0] = 1  # the mean of an image
    matched = np.empty_like(images)
    for start in range(0, len(images), 1000):  # the spectra of all at once would take gigabytes
        part = slice(start, start + 1000)
        spectrum = gain.astype(np.float32) * _spectrum(images[part])
        pixels = scipy.fft.irfft2(spectrum, s=images.shape[1:3], axes=(1, 2))
        matched[part] = np.rint(np.clip(pixels, 0, 255))
    return matched


def mean_power(images):
    """Mean power of each frequency and channel: float64 (height, width // 2 + 1, 3), from at most 5,000 images."""
    if len(images) > SPECTRUM_IMAGES:
        rows = np.random.default_rng(0).choice(len(images), SPECTRUM_IMAGES, replace=False)
        images = images[np.sort(rows)]
    parts = [
        np.square(np.abs(_spectrum(p))).sum(axis=0, dtype=np.float64)
        for p in np.array_split(images, 1 + len(images) // 1000)
    ]
    return sum(parts) / len(images)


def _spectrum(images):
    return scipy.fft.rfft2(images.astype(np.float32), axes=(1, 2))

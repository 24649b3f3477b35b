"""How good generated images are, whatever generator made them: measures on features of images.

    features = InceptionFeatures()             # or ImageFeatures(network, name, device) with your own network
    quality = generation_quality(real, generated, features)      # uint8 images, (n, 32, 32, 3) each
    memory = memorisation(minority_images, generated_minority_images, features)

Distances depend on the features, so a result always says which ones. The Fréchet distance is the published
FID only with Inception's features. Numbers from two kinds of features cannot be compared.

References
----------
Heusel et al. (2017), GANs trained by a two time-scale update rule (Fréchet inception distance).
Bińkowski et al. (2018), Demystifying MMD GANs (kernel inception distance). Kynkäänniemi et al. (2019),
Improved precision and recall metric for assessing generative models. Alaa et al. (2022), How faithful is
your synthetic data? (authenticity).
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from Checkpoints import load_torch_file
from Checks import check_pixels
from DeviceFaults import first_line
from Files import atomic_path, downloading, is_reachable, require_free_space
from FiniteNumbers import require_finite
from Precision import mixed_precision
from Repeatability import derive_seed, seeded
from Runtime import choose_device

INCEPTION_NAME = "Inception-v3 (ImageNet)"
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
NEIGHBOURS = 3  # of precision and recall, as in Kynkäänniemi et al. (2019)
SUBSETS_SEED = derive_seed(0, 5)  # of the subsets that the kernel distance averages over


# --- Features -----------------------------------------------------------------------------------


class FeaturesUnavailableError(OSError):
    """The weights of the feature network are not on this machine and cannot be downloaded."""


class ImageFeatures:
    """A network's features of images, with the name that every number made from them carries.

    Parameters
    ----------
    network : callable
        uint8 (n, 3, height, width) pixels from 0 to 255 -> float (n, d), on ``device``.
    name : str
        What the features are. Every result contains it.
    device : torch.device
        Where the network computes.
    batch_size : int, default 500
        Images that the network gets at once.
    """

    is_inception = False

    def __init__(self, network, name, device, batch_size=500):
        self.network, self.name, self.device, self.batch_size = network, name, device, batch_size

    @torch.inference_mode()
    def __call__(self, images):
        """Features of images: uint8 ndarray (n, height, width, 3) -> float32 tensor (n, d) on the CPU.

        Raises :class:`FiniteNumbers.NotFiniteError` (a ValueError) if a feature is NaN or infinite.
        """
        images = check_pixels(images)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        features = torch.cat(
            [self._features(batch.to(self.device)).cpu() for batch in pixels.split(self.batch_size)]
        )
        cure = "Its weights may be damaged, or too large for half precision: load them again, use float32."
        require_finite(features, f"Features of the network {self.name!r}", cure)
        return features

    def _features(self, batch):
        with mixed_precision(self.device):
            return self.network(batch).float()


class InceptionFeatures(ImageFeatures):
    """The 2,048 features of Inception-v3 trained on ImageNet that define FID and KID.

    torchmetrics computes them with torch-fidelity's port of the original weights (about 90 MB, downloaded
    once).

    Parameters
    ----------
    device : str or torch.device, optional
        Default: the fastest there is.

    Raises
    ------
    FeaturesUnavailableError
        If the weights are not on this machine and cannot be downloaded, or their file is damaged. It is never
        unpickled as code.
    """

    is_inception = True

    def __init__(self, device=None):
        from torchmetrics.image.fid import FrechetInceptionDistance  # imported here because it takes seconds

        device = choose_device(device)
        weights = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rpartition("/")[2])
        if not weights.exists():
            _download_inception(weights)
        try:
            _check_inception(weights)
            # It reads the same file, as pickle: so the file was checked before.
            network = FrechetInceptionDistance(feature=2048).inception.to(device)
        except (ValueError, RuntimeError) as error:
            raise FeaturesUnavailableError(
                f"{weights} does not hold the weights of Inception-v3. Remove it and run again: they are then "
                f"downloaded from {INCEPTION_URL}. ({first_line(error)}.)"
            ) from error
        super().__init__(network, INCEPTION_NAME, device, batch_size=100)

    def _features(self, batch):
        # float32, as in every published FID. By default CUDA's convolutions round to TensorFloat-32.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.network(batch).float()


def _download_inception(weights):
    if not is_reachable(INCEPTION_URL):
        raise FeaturesUnavailableError(
            f"There is no {weights.name} in the folder checkpoints of torch.hub.get_dir(), and "
            f"{INCEPTION_URL} does not answer. Use the features of a network of your own "
            "(ImageFeatures), or put the file there."
        )
    try:
        require_free_space(weights.parent, gigabytes=0.2)
        with atomic_path(weights) as temporary:
            with downloading():
                torch.hub.download_url_to_file(INCEPTION_URL, str(temporary))
            _check_inception(temporary)
    except (OSError, ValueError, RuntimeError) as error:
        raise FeaturesUnavailableError(
            f"The weights of Inception-v3 could not be downloaded from {INCEPTION_URL}: {first_line(error)}. Use "
            "the features of a network of your own (ImageFeatures), or try again."
        ) from error


def _check_inception(path):
    weights = load_torch_file(path, {"Conv2d_1a_3x3.conv.weight", "fc.weight"})
    require_finite(weights, f"Weights in {path}", "Remove it and run again.")


# --- Distances of two sets of images ------------------------------------------------------------


def frechet_distance_to(real, features):
    """Prepare to measure the Fréchet distance of many sets of images to the same real ones.

    Parameters
    ----------
    real : ndarray of uint8, shape (n, height, width, 3)
    features : ImageFeatures

    Returns
    -------
    callable
        ``distance(images) -> float``: the Fréchet distance (Heusel et al. 2017) between normal distributions
        fitted to the features of the two sets. It is 0 for equal distributions. Both sets should have several
        times as many images as there are features. With fewer, the distance is too large.

    Raises
    ------
    ValueError
        Here or in ``distance``, if a set has fewer than 2 images, or a feature or the distance is not finite.
    """
    distance = _frechet_distance_to(features(real))
    return lambda images: distance(features(images))


def _frechet_distance_to(of_real):
    from torchmetrics.image.fid import FrechetInceptionDistance  # imported here because it takes seconds

    _require_two(of_real)
    metric = FrechetInceptionDistance(feature=_given_features(of_real), reset_real_features=False)
    metric.update(of_real, real=True)

    def distance(of_generated):
        _require_two(of_generated)
        metric.reset()
        metric.update(of_generated, real=False)
        return _finite_distance("Fréchet", metric.compute())

    return distance


def _require_two(features):
    if len(features) < 2:
        raise ValueError(f"A distance needs at least 2 images in each set, not {len(features)}.")


def _finite_distance(kind, value):
    cure = "The features may be too large for its matrix products: check the network's weights."
    require_finite(value, f"The {kind} distance is {float(value)}", cure)
    return float(value)


def _given_features(features):
    """A network that returns its input: torchmetrics asks for one, but the features exist already."""
    identity = nn.Identity()
    identity.num_features = features.shape[1]
    return identity


def _kernel_distance(real, generated):
    from torchmetrics.image.kid import KernelInceptionDistance  # imported here because it takes seconds

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")  # says: uses memory
        metric = KernelInceptionDistance(
            # At most half of each set: subsets that are the whole set would all be the same.
            feature=_given_features(real),
            subset_size=min(1000, len(real) // 2, len(generated) // 2),
        )
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with seeded(SUBSETS_SEED):  # torchmetrics draws the subsets from the global generator
        return _finite_distance("kernel", metric.compute()[0])


def precision_and_recall(real, generated):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Each image of a set gets a ball whose radius is the distance to the third nearest other image of the set.
    The union of the balls stands for the set. Precision is the share of generated images inside the union of
    the real ones: do they look real? Recall is the share of real images inside the union of the generated
    ones: is their diversity covered?

    Parameters
    ----------
    real, generated : float tensors, shapes (n, d), (m, d)
        Features, with n and m at least 4. The measure depends on n and m, so compare only results with equal
        n and equal m.

    Returns
    -------
    precision, recall : float
        Fractions from 0 to 1.

    Raises
    ------
    ValueError
        If a set has fewer than 4 images, or a feature is not finite.
    """
    for features, name in ((real, "real"), (generated, "generated")):
        require_finite(features, f"Features of the {name} images", "Check the network that computed them.")
    if min(len(real), len(generated)) <= NEIGHBOURS:
        raise ValueError(
            f"Precision and recall with {NEIGHBOURS} neighbours need more images than that in each set: got "
            f"{len(real)} real and {len(generated)} generated ones. Give at least {NEIGHBOURS + 1} of each."
        )

    def covered(points, centres):
        radii = torch.cat(
            [  # the nearest image of the set is the image itself
                _distances(chunk, centres).kthvalue(NEIGHBOURS + 1, dim=1).values
                for chunk in centres.split(1000)
            ]
        )
        inside = [(_distances(chunk, centres) <= radii).any(dim=1) for chunk in points.split(1000)]
        return float(torch.cat(inside).float().mean())

    return covered(generated, real), covered(real, generated)


def _distances(a, b):
    # Not through a matrix product: its rounding would give an image a distance to itself.
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    require_finite(distances, "Distances between features", "Check the network that computed the features.")
    return distances


def generation_quality(real, generated, features):
    """Judge generated images against real ones.

    The same images always give the same numbers: the kernel distance draws its subsets with a fixed seed.

    Parameters
    ----------
    real, generated : ndarray of uint8, shapes (n, height, width, 3), (m, height, width, 3)
        At least 4 each. A meaningful Fréchet distance needs some thousands.
    features : ImageFeatures

    Returns
    -------
    dict
        ``features`` (their name), ``real_images``, ``generated_images`` (counts), two distances,
        ``precision``, ``recall``. The distances are called ``fid`` (Heusel et al. 2017) and ``kid``
        (Bińkowski et al. 2018) if the features are Inception's. With other features they are other numbers, and are
        called ``frechet_distance`` and ``kernel_distance``.

    Raises
    ------
    ValueError
        If a set is too small, or a feature or distance is not finite.
    """
    names = ("fid", "kid") if features.is_inception else ("frechet_distance", "kernel_distance")
    of_real, of_generated = features(real), features(generated)
    precision, recall = precision_and_recall(of_real, of_generated)
    return {
        "features": features.name,
        "real_images": len(real),
        "generated_images": len(generated),
        names[0]: _frechet_distance_to(of_real)(of_generated),
        names[1]: _kernel_distance(of_real, of_generated),
        "precision": precision,
        "recall": recall,
    }


# --- Memorisation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memorisation:
    """Outcome of :func:`memorisation`.

    Attributes
    ----------
    nearest : ndarray of int64, shape (m,)
        Row of the real image that is nearest to each generated one.
    distances : ndarray of float32, shape (m,)
        From each generated image to that real one, in feature space.
    distances_among_real : ndarray of float32, shape (n,)
        From each real image to the nearest other real one.
    """

    nearest: np.ndarray
    distances: np.ndarray
    distances_among_real: np.ndarray

    @property
    def share_of_copies(self):
        """Share of generated images, from 0 to 1, that count as near copies: see :func:`memorisation`."""
        return float(np.mean(self.distances <= self.distances_among_real[self.nearest]))


def memorisation(real, generated, features):
    """Look for generated images that are near copies of training images.

    A generated image counts as one if no other real image is nearer to its nearest real image than it is (the
    authenticity of Alaa et al. 2022). An image and its mirror image count as the same. Some new
    real images of the class count as near copies too. Pass them as ``generated`` to compare with their share.

    Parameters
    ----------
    real : ndarray of uint8, shape (n, height, width, 3), n at least 2
        The images of one class that the generator was trained on.
    generated : ndarray of uint8, shape (m, height, width, 3)
        Generated images of the same class.
    features : ImageFeatures

    Returns
    -------
    Memorisation

    Raises
    ------
    ValueError
        If there are fewer than 2 real images, or a feature is not finite.
    """
    if len(real) < 2:
        raise ValueError(
            f"Memorisation compares with the distances among real images: give at least 2, not {len(real)}."
        )
    straight, mirrored = features(real), features(real[:, :, ::-1])

    def to_real(points):
        return torch.minimum(_distances(points, straight), _distances(points, mirrored))

    distances, nearest = to_real(features(generated)).min(dim=1)
    among_real = to_real(straight).fill_diagonal_(torch.inf).min(dim=1).values
    return Memorisation(nearest.numpy(), distances.numpy(), among_real.numpy())

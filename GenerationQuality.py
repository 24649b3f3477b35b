"""How good generated images are, whatever generator made them: four measures on features of images.

    features = InceptionFeatures()                     # or ImageFeatures(a network of your own, its name)
    quality = generation_quality(real, generated, features)     # uint8 images, (n, 32, 32, 3) each
    memory = memorisation(minority_images, generated_minority_images, features)

Distances depend on the features, so a result always says which ones: the Fréchet distance is the
published FID with Inception's alone, and numbers from two kinds of features cannot be compared.

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
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from Runtime import check_images, choose_device, derive_seed, is_reachable, mixed_precision, seeded
from Utils import plot_image_rows

INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


# --- Features -----------------------------------------------------------------------------------


class FeaturesUnavailableError(OSError):
    """The weights of the feature network are neither on this machine nor can they be downloaded."""


class ImageFeatures:
    """A network's features of images, with the name that every number made from them carries.

    Parameters
    ----------
    network : callable
        uint8 (n, 3, height, width) pixels from 0 to 255 -> float (n, d), on ``device``.
    name : str
        What the features are; it stands in every result.
    device : torch.device
    batch_size : int, default 500
    """

    is_inception = False

    def __init__(self, network, name, device, batch_size=500):
        self.network, self.name, self.device, self.batch_size = network, name, device, batch_size

    @torch.inference_mode()
    def __call__(self, images):
        """Features of ``images``, uint8 (n, height, width, 3): float32 tensor (n, d) on the CPU."""
        images, _ = check_images(images, np.zeros(len(images), dtype=int))
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        return torch.cat(
            [self._features(batch.to(self.device)).cpu() for batch in pixels.split(self.batch_size)]
        )

    def _features(self, batch):
        with mixed_precision(self.device):
            return self.network(batch).float()


class InceptionFeatures(ImageFeatures):
    """The 2,048 features of Inception-v3 trained on ImageNet that FID and KID are defined on.

    They come from torchmetrics, with torch-fidelity's port of the original weights (about 90 MB,
    downloaded once).

    Raises
    ------
    FeaturesUnavailableError
        If the weights are not here and cannot be downloaded.
    """

    is_inception = True

    def __init__(self, device=None, batch_size=100):
        device = choose_device(device)
        weights = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rpartition("/")[2])
        if not weights.exists() and not is_reachable(INCEPTION_URL):
            raise FeaturesUnavailableError(
                f"There is no {weights.name} in the folder checkpoints of torch.hub.get_dir() and {INCEPTION_URL} does "
                "not answer. Use the features of a network of your own (ImageFeatures), or put the file there."
            )
        try:
            network = FrechetInceptionDistance(feature=2048).inception.to(device)
        except (OSError, RuntimeError) as error:
            raise FeaturesUnavailableError(
                f"The weights of Inception-v3 could not be had from {INCEPTION_URL}: {error}"
            ) from error
        super().__init__(network, "Inception-v3 (ImageNet)", device, batch_size)

    def _features(self, batch):
        return self.network(batch).float()  # float32, as in every published FID


# --- Distances of two sets of images ------------------------------------------------------------


def frechet_distance_to(real, features):
    """Prepare to measure the Fréchet distance of many sets of images from the same real ones.

    Parameters
    ----------
    real : ndarray of uint8, shape (n, height, width, 3)
    features : ImageFeatures

    Returns
    -------
    callable
        ``distance(images) -> float``: the Fréchet distance (Heusel et al. 2017) of normal
        distributions fitted to the features, 0 for equal ones. Both sets should have several times as
        many images as there are features; with fewer the distance comes out too large.
    """
    distance = _frechet_distance_to(features(real))
    return lambda images: distance(features(images))


def _frechet_distance_to(of_real):
    metric = FrechetInceptionDistance(feature=_given_features(of_real), reset_real_features=False)
    metric.update(of_real, real=True)

    def distance(of_generated):
        metric.reset()
        metric.update(of_generated, real=False)
        return float(metric.compute())

    return distance


def _given_features(features):
    """torchmetrics' place for a feature network, filled with nothing: the features are there already."""
    nothing = nn.Identity()
    nothing.num_features = features.shape[1]
    return nothing


def _kernel_distance(real, generated, seed):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")  # says: uses memory
        metric = KernelInceptionDistance(
            # Halves at most: subsets that are the whole set would all be the same.
            feature=_given_features(real),
            subset_size=min(1000, len(real) // 2, len(generated) // 2),
        )
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with seeded(seed):  # torchmetrics draws the subsets from the global generator
        return float(metric.compute()[0])


def precision_and_recall(real, generated, neighbours=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Each set is taken for the union of balls around its images, as wide as the distance to the
    ``neighbours``-th nearest image of the same set. Precision is the share of generated images inside
    the real ones' union: do they look real? Recall is the share of real images inside the generated
    ones' union: is their diversity covered?

    Parameters
    ----------
    real, generated : float tensors, shapes (n, d), (m, d)
        Features. The measure depends on n and m: compare only results with equal ones.
    neighbours : int, default 3
        The paper's.

    Returns
    -------
    precision, recall : float
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"Precision and recall with {neighbours} neighbours need more images than that of each kind: got "
            f"{len(real)} real and {len(generated)} generated ones."
        )

    def covered(points, centres):
        radii = torch.cat(
            [  # the nearest one is the image itself
                _distances(chunk, centres).kthvalue(neighbours + 1, dim=1).values
                for chunk in centres.split(1000)
            ]
        )
        inside = [(_distances(chunk, centres) <= radii).any(dim=1) for chunk in points.split(1000)]
        return float(torch.cat(inside).float().mean())

    return covered(generated, real), covered(real, generated)


def _distances(a, b):
    # Not through a matrix product: its rounding would tell an image from itself.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def generation_quality(real, generated, features, *, seed=0):
    """Judge generated images against real ones.

    Parameters
    ----------
    real, generated : ndarray of uint8, shapes (n, height, width, 3), (m, height, width, 3)
        At least 4 each; some thousands for a Fréchet distance that means something.
    features : ImageFeatures
    seed : int
        Of the subsets that the kernel distance averages over.

    Returns
    -------
    dict
        ``features`` (their name), ``real_images``, ``generated_images`` (counts), ``precision``,
        ``recall``, and ``fid`` and ``kid`` if the features are Inception's. With other features the two
        distances are called ``frechet_distance`` and ``kernel_distance``, for they are other numbers.
    """
    names = ("fid", "kid") if features.is_inception else ("frechet_distance", "kernel_distance")
    of_real, of_generated = features(real), features(generated)
    precision, recall = precision_and_recall(of_real, of_generated)
    return {
        "features": features.name,
        "real_images": len(real),
        "generated_images": len(generated),
        names[0]: _frechet_distance_to(of_real)(of_generated),
        names[1]: _kernel_distance(of_real, of_generated, derive_seed(seed, 5)),
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
        To that image.
    distances_among_real : ndarray of float32, shape (n,)
        From each real image to the nearest other one.
    """

    nearest: np.ndarray
    distances: np.ndarray
    distances_among_real: np.ndarray

    @property
    def share_of_copies(self):
        """Share of generated images nearer to a real one than any other real image is to that one."""
        return float(np.mean(self.distances < self.distances_among_real[self.nearest]))


def memorisation(real, generated, features):
    """Look for generated images that are near copies of training images.

    An image counts as one if it is nearer to its nearest real image than that image's nearest real
    neighbour is (the authenticity of Alaa et al. 2022). Mirror images count as the same image. New
    real images of the class come out above 0 as well, so compare with them: pass them as ``generated``.

    Parameters
    ----------
    real : ndarray of uint8, shape (n, height, width, 3), n at least 2
        What the generator was trained on, of one class.
    generated : ndarray of uint8, shape (m, height, width, 3)
        Of the same class.
    features : ImageFeatures

    Returns
    -------
    Memorisation
    """
    if len(real) < 2:
        raise ValueError("Memorisation compares with the distances among real images: give at least 2.")
    straight, mirrored = features(real), features(real[:, :, ::-1])

    def to_real(points):
        return torch.minimum(_distances(points, straight), _distances(points, mirrored))

    distances, nearest = to_real(features(generated)).min(dim=1)
    among_real = to_real(straight).fill_diagonal_(torch.inf).min(dim=1).values
    return Memorisation(nearest.numpy(), distances.numpy(), among_real.numpy())


def memorisation_figure(real, generated, memory, title, columns=10):
    """The generated images nearest to real ones, each above its nearest real image.

    Parameters
    ----------
    real, generated : ndarray of uint8
        As given to :func:`memorisation`.
    memory : Memorisation
    title : str
    columns : int

    Returns
    -------
    matplotlib.figure.Figure
    """
    order = np.argsort(memory.distances, kind="stable")
    typical = order[np.linspace(0, len(order) - 1, columns).astype(int)]
    return plot_image_rows(
        {
            "generated, nearest ones": generated[order[:columns]],
            "their nearest real image": real[memory.nearest[order[:columns]]],
            "generated, nearest to farthest": generated[typical],
            "nearest real image of these": real[memory.nearest[typical]],
        },
        title,
    )

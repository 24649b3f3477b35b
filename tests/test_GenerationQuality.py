"""Distances, precision, recall and memorisation have the values that their definitions give."""

import numpy as np
import pytest
import torch

import GenerationQuality
from GenerationQuality import (
    FeaturesUnavailableError,
    ImageFeatures,
    InceptionFeatures,
    frechet_distance_to,
    generation_quality,
    memorisation,
    precision_and_recall,
)

CPU = torch.device("cpu")


def quarters(pixels):
    """Mean of each quarter and channel, 12 features."""
    return torch.nn.functional.avg_pool2d(pixels.float(), 16).flatten(1)


FEATURES = ImageFeatures(quarters, "means of quarters", CPU)


def noise(n, seed, mean=128):
    rng = np.random.default_rng(seed)
    colours = rng.normal(mean, 30, size=(n, 2, 2, 3))
    return np.clip(np.repeat(np.repeat(colours, 16, axis=1), 16, axis=2), 0, 255).astype(np.uint8)


# --- Features -----------------------------------------------------------------------------------


def test_features_do_not_depend_on_the_batch_size():
    images = noise(7, 0)
    whole = FEATURES(images)
    assert whole.shape == (7, 12) and whole.dtype == torch.float32
    assert torch.equal(ImageFeatures(quarters, "", CPU, batch_size=3)(images), whole)
    # First feature: the red channel's mean over the upper left quarter.
    assert whole[0, 0] == pytest.approx(images[0, :16, :16, 0].mean())
    with pytest.raises(TypeError, match="uint8"):
        FEATURES(images / 255)


def test_inception_without_weights_and_network_is_a_clear_error(monkeypatch, tmp_path, closed_url):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(GenerationQuality, "INCEPTION_URL", closed_url)
    message = "does not answer. Use the features of a network of your own"
    with pytest.raises(FeaturesUnavailableError, match=message):
        InceptionFeatures("cpu")


# --- Distances ----------------------------------------------------------------------------------


def test_the_frechet_distance_has_the_value_of_its_formula():
    real, generated = noise(300, 0), noise(200, 1, mean=140)
    a, b = (FEATURES(images).double().numpy() for images in (real, generated))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b)).real.sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    distance = frechet_distance_to(real, FEATURES)
    assert distance(generated) == pytest.approx(expected, rel=1e-3)
    assert distance(real) == pytest.approx(0, abs=0.05)
    assert distance(generated) == pytest.approx(expected, rel=1e-3), "the real statistics are kept"


def test_distances_are_named_by_the_kind_of_features():
    real, generated = noise(40, 0), noise(40, 1)
    ours = generation_quality(real, generated, FEATURES)
    assert ours["features"] == "means of quarters"
    assert {"frechet_distance", "kernel_distance", "precision", "recall"} < ours.keys()
    assert not {"fid", "kid"} & ours.keys()
    stand_in = ImageFeatures(quarters, "Inception-v3 (ImageNet)", CPU)
    stand_in.is_inception = True
    theirs = generation_quality(real, generated, stand_in)
    assert {"fid", "kid"} < theirs.keys() and "frechet_distance" not in theirs
    assert theirs["fid"] == ours["frechet_distance"]


def test_the_kernel_distance_has_the_value_of_its_formula_and_repeats():
    real, generated = noise(50, 0), noise(50, 1, mean=150)
    x, y = (FEATURES(images).double() for images in (real, generated))

    def kernel(a, b):
        return (a @ b.T / 12 + 1) ** 3

    def off_diagonal_mean(k):
        return (k.sum() - k.trace()) / (50 * 49)

    # The mean over many random halves is near the value of the whole sets.
    expected = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean()
    first = generation_quality(real, generated, FEATURES)["kernel_distance"]
    assert first == pytest.approx(expected.item(), rel=0.1)
    torch.manual_seed(99)
    assert generation_quality(real, generated, FEATURES)["kernel_distance"] == first


# --- Precision and recall -----------------------------------------------------------------------


def test_precision_and_recall_of_points_on_a_line():
    real = torch.arange(10.0)[:, None]
    same = precision_and_recall(real, real + 0.25)
    assert same == (1, 1)
    far = precision_and_recall(real, real + 100)
    assert far == (0, 0)
    # All generated points between two real ones: they look real but cover few real ones.
    alike = torch.linspace(4.4, 4.6, 10)[:, None]
    assert precision_and_recall(real, alike) == (1, 0)
    # Half of the generated points lie far away, so precision is a half. Recall stays 1.
    half = torch.cat([real + 0.25, real + 1000])
    precision, recall = precision_and_recall(real, half)
    assert (precision, recall) == (0.5, 1)


def test_the_radius_is_the_distance_to_the_third_nearest_other_point():
    real = torch.tensor([0.0, 1, 3, 7, 100, 101, 103, 107])[:, None]
    # The radii are 7, 6, 4, 7 and again 7, 6, 4, 7, so the balls cover -7 to 14 and 93 to 114.
    inside = torch.tensor([-7.0, 14, 93, 114])[:, None]
    outside = torch.tensor([-7.1, 14.1, 92.9, 114.1])[:, None]
    assert precision_and_recall(real, inside)[0] == 1
    assert precision_and_recall(real, outside)[0] == 0
    with pytest.raises(ValueError, match="with 3 neighbours need more images.*at least 4 of each"):
        precision_and_recall(real[:3], inside)


# --- Memorisation -------------------------------------------------------------------------------


def test_copies_are_found_and_new_images_are_not():
    real = noise(40, 0)
    copies = np.clip(real[[5, 6, 7]].astype(int) + 1, 0, 255).astype(np.uint8)
    far = noise(3, 9, mean=20)
    memory = memorisation(real, np.concatenate([copies, far]), FEATURES)
    assert memory.nearest[:3].tolist() == [5, 6, 7]
    assert (memory.distances[:3] < memory.distances_among_real[[5, 6, 7]]).all()
    assert (memory.distances[3:] > memory.distances_among_real.max()).all()
    assert memory.share_of_copies == 0.5


def test_mirror_images_are_copies_and_an_image_is_not_its_own_neighbour():
    real = noise(20, 0)
    memory = memorisation(real, real[[3]][:, :, ::-1], FEATURES)
    assert memory.nearest.tolist() == [3]
    assert memory.distances[0] == pytest.approx(0, abs=1e-3)
    assert memory.share_of_copies == 1
    assert (memory.distances_among_real > 1).all()
    with pytest.raises(ValueError, match="at least 2"):
        memorisation(real[:1], real, FEATURES)

"""Distances, precision, recall and memorisation have the values that their definitions give."""

import http.client
import os
import pickle
import shutil
import socket
import time
from pathlib import Path

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
from Runtime import choose_device

DEVICE = choose_device()  # the one under test


def quarters(pixels):
    """Mean of each quarter and channel, 12 features."""
    return torch.nn.functional.avg_pool2d(pixels.float(), 16).flatten(1)


FEATURES = ImageFeatures(quarters, "means of quarters", DEVICE)


def noise(n, seed, mean=128):
    rng = np.random.default_rng(seed)
    colours = rng.normal(mean, 30, size=(n, 2, 2, 3))
    return np.clip(np.repeat(np.repeat(colours, 16, axis=1), 16, axis=2), 0, 255).astype(np.uint8)


# --- Features -----------------------------------------------------------------------------------


def test_features_do_not_depend_on_the_batch_size():
    images = noise(7, 0)
    whole = FEATURES(images)
    assert whole.shape == (7, 12) and whole.dtype == torch.float32
    assert torch.equal(ImageFeatures(quarters, "", DEVICE, batch_size=3)(images), whole)
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


class Intruder:
    """Its pickle creates a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("intruded"),)


def no_weights(kind):
    """The content of a file that does not hold Inception's weights."""
    if kind == "another network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), "other.pt")
        return Path("other.pt").read_bytes()
    contents = {"empty": b"", "HTML": b"<!DOCTYPE html><title>Not found</title>", "random": os.urandom(5000)}
    return contents[kind] if kind in contents else pickle.dumps(Intruder(), protocol=2)


BAD_WEIGHTS = ["empty", "HTML", "random", "another network", "code"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty folder for torch.hub, and the path at which Inception's weights are looked for."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / GenerationQuality.INCEPTION_URL.rpartition("/")[2]


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_a_file_that_does_not_hold_inceptions_weights_is_named_with_what_to_do(hub, kind):
    hub.parent.mkdir(parents=True)
    hub.write_bytes(no_weights(kind))
    with pytest.raises(
        FeaturesUnavailableError, match="does not hold the weights of.*Remove it and run"
    ) as caught:
        InceptionFeatures("cpu")
    assert str(hub) in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("intruded").exists()


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_a_download_that_is_not_inception_leaves_nothing_behind(hub, monkeypatch, server, kind):
    server.files[f"/{hub.name}"] = no_weights(kind)
    monkeypatch.setattr(GenerationQuality, "INCEPTION_URL", f"{server.url}/{hub.name}")
    with pytest.raises(FeaturesUnavailableError, match="could not be downloaded from"):
        InceptionFeatures("cpu")
    assert not list(hub.parent.iterdir())


@pytest.fixture
def hanging_download(hub, monkeypatch, hanging_url, little_patience):
    """Inception is fetched from a server that never answers."""
    monkeypatch.setattr(GenerationQuality, "is_reachable", lambda url: True)
    monkeypatch.setattr(GenerationQuality, "INCEPTION_URL", f"{hanging_url}/{hub.name}")
    return hub


def test_a_download_of_inception_that_stalls_is_given_up(hanging_download):
    start = time.monotonic()
    with pytest.raises(FeaturesUnavailableError, match="could not be downloaded .*timed out"):
        InceptionFeatures("cpu")
    assert time.monotonic() - start < 30  # imports, and 0.3 seconds
    assert socket.getdefaulttimeout() is None and not list(hanging_download.parent.iterdir())


def test_a_download_of_inception_that_breaks_off_is_a_clear_error(hanging_download, monkeypatch):
    def break_off(*arguments):
        raise http.client.IncompleteRead(b"half", 4)

    monkeypatch.setattr(torch.hub, "download_url_to_file", break_off)
    with pytest.raises(FeaturesUnavailableError, match="could not be downloaded .*broke off its answer"):
        InceptionFeatures("cpu")
    assert not list(hanging_download.parent.iterdir())


def test_inception_is_not_downloaded_to_a_full_disk(hanging_download, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *rest: pytest.fail("it was downloaded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(FeaturesUnavailableError, match=r"0\.00 GB free, but 0\.20 GB are needed"):
        InceptionFeatures("cpu")


# --- Numbers that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_no_measurement(value):
    calls = []

    def once(pixels):
        calls.append(len(pixels))
        features = quarters(pixels)
        features[-1, 0] = value
        return features

    broken, images = ImageFeatures(once, "a network with one NaN", DEVICE), noise(8, 0)
    for measure in (
        lambda: broken(images),
        lambda: generation_quality(images, images, broken),
        lambda: memorisation(images, images, broken),
        lambda: frechet_distance_to(images, broken),
    ):
        with pytest.raises(ValueError, match="'a network with one NaN': NaN or infinity.*float32"):
            measure()


def test_given_features_that_are_not_finite_have_no_precision_and_recall():
    good, bad = torch.rand(8, 3), torch.rand(8, 3)
    bad[3, 1] = float("nan")
    for real, generated, name in ((bad, good, "real"), (good, bad, "generated")):
        with pytest.raises(ValueError, match=f"Features of the {name} images: NaN"):
            precision_and_recall(real, generated)


def test_distances_that_overflow_are_no_measurement():
    huge = torch.tensor([[1e38], [-3e38], [3e38], [0.0], [2e38]])
    with pytest.raises(ValueError, match="Distances between features: NaN or infinity"):
        precision_and_recall(huge, huge)
    large = ImageFeatures(lambda pixels: quarters(pixels) * 1e30, "large", DEVICE)
    with pytest.raises(ValueError, match="distance is"):
        frechet_distance_to(noise(8, 0), large)(noise(8, 1))


def test_a_distance_to_a_single_image_is_refused():
    with pytest.raises(ValueError, match="at least 2 images in each set, not 1"):
        frechet_distance_to(noise(1, 0), FEATURES)
    with pytest.raises(ValueError, match="at least 2 images in each set, not 1"):
        frechet_distance_to(noise(8, 0), FEATURES)(noise(1, 0))


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


def test_inceptions_convolutions_are_not_rounded_to_tensorfloat():
    """Published FIDs are of float32."""
    allowed = []

    def network(batch):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return batch.flatten(1)

    features = object.__new__(InceptionFeatures)  # without the weights
    features.network = network
    before = torch.backends.cudnn.allow_tf32
    features._features(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert allowed == [False] and torch.backends.cudnn.allow_tf32 == before


def test_distances_are_named_by_the_kind_of_features():
    real, generated = noise(40, 0), noise(40, 1)
    ours = generation_quality(real, generated, FEATURES)
    assert ours["features"] == "means of quarters"
    assert {"frechet_distance", "kernel_distance", "precision", "recall"} < ours.keys()
    assert not {"fid", "kid"} & ours.keys()
    stand_in = ImageFeatures(quarters, "Inception-v3 (ImageNet)", DEVICE)
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
    with_mirror = np.concatenate([real, real[[3]][:, :, ::-1]])
    assert memorisation(with_mirror, real, FEATURES).distances_among_real[3] == pytest.approx(0, abs=1e-3)
    twice = np.concatenate([real, real])
    assert memorisation(twice, real, FEATURES).share_of_copies == 1, "copies of an image that is there twice"
    with pytest.raises(ValueError, match="at least 2"):
        memorisation(real[:1], real, FEATURES)

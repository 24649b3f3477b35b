"""The committed networks do what the committed results say."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import Report
from ClassifierNetwork import evaluate_classifier, load_classifier
from GANExperiment import gan_settings, quality_measure
from GANNetworks import load_discriminator, load_generator, sample_images
from GenerationQuality import ImageFeatures
from ImbalancedCIFAR10 import split_from_name
from ModelCard import CLASSIFIERS, DISCRIMINATOR, GENERATOR
from Repeatability import derive_seed
from Report import weights_table
from Results import COMMITTED, predictions_of, read_result

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def repository(own_folder, monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(("study", "name"), CLASSIFIERS, ids=lambda part: getattr(part, "profile", part))
def test_a_classifier_gives_the_predictions_of_its_result(study, name, cifar10):
    result = read_result(study.result_path(name))
    model = load_classifier(study.weights_path(name), "cpu")
    found = evaluate_classifier(model, cifar10.X_test, cifar10.y_test).predictions
    # Other hardware rounds in other ways, which turns a prediction in a few hundred.
    assert np.mean(found == predictions_of(result)) > 0.99
    cats = cifar10.y_test == 3
    assert np.mean(found[cats] == 3) == pytest.approx(result["metrics"]["minority"]["recall"], abs=0.01)


def test_the_generator_has_the_quality_of_its_record(cifar10):
    record = COMMITTED.read_gan_record()
    split = split_from_name(COMMITTED.split, cifar10.y_train, cifar10.class_names)
    X, y = split.cut(cifar10.X_train, cifar10.y_train)
    network = load_classifier(COMMITTED.weights_path("imbalanced"), "cpu")
    count = gan_settings(COMMITTED, cifar10).quality_images
    quality = quality_measure(X, y, ImageFeatures(network.features, "", torch.device("cpu")), count)
    labels = np.resize(np.arange(10), count)
    images = sample_images(load_generator(GENERATOR, "cpu"), labels, seed=derive_seed(0, 3))
    best = next(entry for entry in record["history"] if entry["step"] == record["best_step"])
    assert quality(images, labels) == pytest.approx(best["quality"], rel=0.02)


def test_the_arms_with_the_gan_were_trained_on_images_of_this_generator():
    checksum = COMMITTED.generator_checksum()
    results = COMMITTED.load_results().items()
    runs = [run for name, arm_runs in results if name.startswith("gan") for run in arm_runs]
    assert runs and all(run["generator"] == checksum for run in runs)


def test_the_discriminator_tells_real_images_from_generated_ones(cifar10):
    discriminator, labels = load_discriminator(DISCRIMINATOR, "cpu"), cifar10.y_train[:500]
    generated = sample_images(load_generator(GENERATOR, "cpu"), labels, seed=1)
    scores = []
    for images in (cifar10.X_train[:500], generated):
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            scores.append(float(discriminator(pixels, torch.from_numpy(labels)).mean()))
    assert scores[0] > scores[1] + 0.1


def test_all_networks_are_committed_and_together_small():
    committed = subprocess.run(["git", "ls-files", "models"], capture_output=True, text=True, check=True)
    files = {Path(line) for line in committed.stdout.splitlines() if line.endswith(".pt")}
    assert files == {study.weights_path(name) for study, name in CLASSIFIERS} | {GENERATOR, DISCRIMINATOR}
    assert sum(path.stat().st_size for path in files) < 25e6


def test_the_card_has_a_row_for_each_file_with_the_scores_of_its_result():
    rows = weights_table().splitlines()[2:]
    assert len(rows) == len(CLASSIFIERS) + 2
    for (study, name), row in zip(CLASSIFIERS, rows, strict=False):
        recall = read_result(study.result_path(name))["metrics"]["minority"]["recall"]
        assert f"| {100 * recall:.1f} |" in row and study.weights_path(name).name in row
    assert "| 0.0 | – |" in rows[0]  # it never says cat, so it has no precision


def test_a_network_without_a_result_has_no_row(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert weights_table() == Report.NOT_RUN

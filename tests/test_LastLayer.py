"""Retraining of the last layer on balanced classes."""

import numpy as np
import pytest
import torch
from test_ClassifierNetwork import noise, small_model

from ClassifierNetwork import channel_statistics, create_classifier, evaluate_classifier
from ClassifierTraining import Recipe
from LastLayer import adjust_logits, retrain_last_layer


def test_a_rare_class_is_found_again_and_the_features_stay():
    # Two kinds of images that the features can tell apart; the untrained head takes neither class seriously.
    X = noise(120, 16) // 4
    X[100:] += 180
    y = np.repeat([0, 1], [100, 20])
    model = small_model(num_classes=2)
    images = torch.from_numpy(X).permute(0, 3, 1, 2).to(model.mean.device)
    before = model.eval().features(images)
    retrain_last_layer(model, X, y, Recipe(steps=1, batch_size=40), seed=0)
    assert torch.equal(model.features(images), before)
    assert np.mean(evaluate_classifier(model, X, y).predictions == y) == 1


def test_classes_weigh_alike():
    # The features say nothing, so the shares of the classes decide: balanced, each is as likely as the other.
    X, y = np.full((110, 16, 16, 3), 7, dtype=np.uint8), np.repeat([0, 1], [100, 10])
    model = small_model(num_classes=2)
    retrain_last_layer(model, X, y, Recipe(steps=1, batch_size=110), seed=0)
    logits = evaluate_classifier(model, X[:1], y[:1]).logits[0]
    assert logits[0] == pytest.approx(logits[1], abs=0.05)


def test_adjusted_logits_are_those_under_equal_class_frequencies():
    X, y = noise(40), np.repeat([0, 1], [36, 4])
    model = small_model(num_classes=2)
    before = evaluate_classifier(model, X, y).logits
    adjust_logits(model, X, y, Recipe(steps=1), seed=0)
    after = evaluate_classifier(model, X, y).logits
    # Bayes: P(class | image) under equal frequencies is P(class | image) / P(class), scaled.
    expected = torch.softmax(torch.from_numpy(before), dim=1).numpy() / [0.9, 0.1]
    expected /= expected.sum(axis=1, keepdims=True)
    assert torch.softmax(torch.from_numpy(after), dim=1).numpy() == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("change", [retrain_last_layer, adjust_logits])
def test_a_class_without_an_image_is_refused(change):
    for labels in (np.arange(20) % 2, 1 + np.arange(20) % 10):
        with pytest.raises(ValueError, match="needs images of all 10 classes, but y has"):
            change(small_model(), noise(20), labels, Recipe(steps=1), seed=0)


@pytest.mark.parametrize("change", [retrain_last_layer, adjust_logits])
def test_a_cosine_head_is_refused(change):
    model = create_classifier(10, 4, channel_statistics(noise(20)), 0, cosine_head=True)
    with pytest.raises(ValueError, match="A cosine head has no bias"):
        change(model, noise(20), np.arange(20) % 10, Recipe(steps=1), seed=0)


def test_a_class_of_one_image_is_never_left_out():
    X, y = noise(33), np.minimum(np.arange(33), 1)
    for seed in range(5):  # batches of 16 would leave out one row, sometimes the only one of class 0
        retrain_last_layer(small_model(num_classes=2), X, y, Recipe(steps=1, batch_size=16), seed=seed)

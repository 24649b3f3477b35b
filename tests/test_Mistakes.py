"""Pictures of missed images: which ones are shown, and beside what."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import Mistakes
from ClassifierNetwork import create_classifier


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_images_that_one_arm_finds_are_shown_with_what_the_other_takes_them_for(results, tiny_data):
    cats = np.flatnonzero(tiny_data.y_test == 3)
    runs = []
    for name, found, otherwise in (("imbalanced", [0, 1, 2], 5), ("logit-adjusted", [2, 3], 8)):
        predictions = tiny_data.y_test.copy()
        predictions[cats] = otherwise
        predictions[cats[found]] = 3
        runs.append(results[name][0] | {"test_predictions": " ".join(map(str, predictions))})
    figure = Mistakes.found_and_missed_figure(*runs, tiny_data, columns=4)
    rows = np.array(figure.axes).reshape(3, 4)
    captions = [[ax.texts[0].get_text() for ax in row if ax.images] for row in rows]
    assert captions == [["dog"], ["ship"] * 2, ["ship"] * 4]
    labels = [row[0].texts[-1].get_text() for row in rows]
    starts = "1 found only by Logit-adjusted", "2 found only by Imbalanced", "6 found by neither"
    assert all(label.startswith(start) for label, start in zip(labels, starts, strict=True))
    shown = figure.axes[0].images[0].get_array()
    assert (shown == tiny_data.X_test[cats[3]]).all()
    assert figure.get_suptitle() == "Test images of class cat\ncat-3, profile smoke, 1 seed (0)"
    figure = Mistakes.found_and_missed_figure(runs[0], runs[0] | {"seed": 1}, tiny_data)
    assert len(figure.axes) == 3 * 7, "three rows also for two seeds of one arm, of which two have no image"


@pytest.fixture
def pixels_as_features(monkeypatch):
    """The network's features are the pixels, so that the nearest image is known. The list of the networks asked."""
    asked = []

    def features(network, name, device):
        asked.append(network)
        return lambda images: torch.from_numpy(images.reshape(len(images), -1) / 255.0)

    monkeypatch.setattr(Mistakes, "ImageFeatures", features)
    return asked


def missed_cats(results, data, taken_for):
    """A result in which every cat but the first is taken for another class."""
    predictions, cats = data.y_test.copy(), np.flatnonzero(data.y_test == 3)
    predictions[cats[1:]] = taken_for
    return results["imbalanced"][0] | {"test_predictions": " ".join(map(str, predictions))}, cats[1:]


def test_missed_images_stand_above_the_nearest_training_images(results, tiny_data, pixels_as_features):
    result, missed = missed_cats(results, tiny_data, 5)
    # The training set: one copy of each missed cat, darker by a little and called a dog, and three black cats.
    X = np.concatenate([tiny_data.X_test[missed] // 2 * 2, np.zeros((3, 32, 32, 3), np.uint8)])
    y = np.repeat([5, 3], [len(missed), 3])
    model = create_classifier(10, 4, ((0.5,) * 3, (0.2,) * 3), 0, "cpu")
    figure = Mistakes.nearest_images_figure(result, model, X, y, tiny_data, columns=4)
    assert pixels_as_features == [model.features]
    above, below, rare = (row for row in np.array(figure.axes).reshape(3, 4))
    for cat, neighbour, own in zip(above, below, rare, strict=True):
        image = cat.images[0].get_array()
        assert any((image == tiny_data.X_test[k]).all() for k in missed)
        assert (neighbour.images[0].get_array() == image // 2 * 2).all()
        assert not own.images[0].get_array().any()
        assert cat.texts[0].get_text() == neighbour.texts[0].get_text() == "dog"
        assert own.texts[0].get_text().endswith(" x as far")
    words = figure.get_suptitle()
    assert "9 missed images of class cat: 100% lie nearest to a training image of the class" in words
    assert "\n0% nearest to one of their own class" in words


def test_no_missed_image_is_said(results, tiny_data):
    result = results["imbalanced"][0] | {"test_predictions": " ".join(map(str, tiny_data.y_test))}
    figure = Mistakes.nearest_images_figure(result, None, tiny_data.X_train, tiny_data.y_train, tiny_data)
    assert figure.get_suptitle() == "No image of class cat is missed"

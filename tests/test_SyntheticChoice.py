"""Which synthetic images a network chooses."""

import numpy as np
import pytest
import torch
from test_ClassifierNetwork import noise, small_model

import SyntheticChoice
from ClassifierTraining import Recipe
from Methods import METHODS, Method, adjusted
from SyntheticChoice import most_uncertain, nearest_to_prototypes

Y = np.array([0, 0, 1, 1] + [0, 0, 0, 1, 1, 1])  # four real rows


def test_the_nearest_to_the_mean_of_the_real_images_are_kept(monkeypatch):
    angles = np.radians([0, 20, 90, 110] + [50, 12, 30, 180, 95, 120])
    vectors = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1)).float()
    monkeypatch.setattr(SyntheticChoice, "extract_features", lambda model, X: 3 * vectors)
    # The means point to 10 and 100 degrees.
    assert nearest_to_prototypes(None, None, Y, 4, fraction=1 / 3).tolist() == [0, 1, 2, 3, 5, 8]
    assert nearest_to_prototypes(None, None, Y, 4, fraction=0.5).tolist() == [0, 1, 2, 3, 5, 6, 8, 9]


def test_the_uncertain_are_kept_but_not_those_of_another_class(monkeypatch):
    logits = np.array(
        [[9, 0, 0], [1, 0, 0], [0, 3, 4], [0, 9, 0], [0, 0.5, 0.4], [2, 2, 2.1]], dtype=np.float32
    )
    monkeypatch.setattr(SyntheticChoice, "predict_logits", lambda *a: logits)
    # Of class 0: the second is the least certain; the third is taken for another class. Of class 1: the last one has it
    # in the first two places or not, by the order of equal numbers, so it is not asked about.
    X = np.zeros((10, 1))
    assert most_uncertain(None, X, Y, 4, fraction=2 / 3).tolist()[:6] == [0, 1, 2, 3, 4, 5]
    assert 8 in most_uncertain(None, X, Y, 4, fraction=2 / 3)


def test_choosing_leaves_the_network_in_its_mode_and_takes_mirrored_views():
    model = small_model(num_classes=2).train()
    straight = nearest_to_prototypes(model, noise(10), Y, 4)
    assert model.training
    mirrored = nearest_to_prototypes(model, noise(10)[:, :, ::-1].copy()[:, :, ::-1], Y, 4)
    assert np.array_equal(straight, mirrored)


def test_impossible_choices_are_refused():
    X, model = noise(10), small_model(num_classes=2)
    for fraction in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction must be above 0 and at most 1"):
            nearest_to_prototypes(model, X, Y, 4, fraction)
    with pytest.raises(ValueError, match="Class 1 has synthetic images but no real one"):
        nearest_to_prototypes(model, X, Y, 2)


def test_a_choosing_method_trains_on_the_chosen_rows_and_is_resumable(tmp_path):
    seen = {}

    def choose(model, X, y, real_rows):
        seen["trained"] = {name: value.clone() for name, value in model.state_dict().items()}
        return np.arange(12)

    X, y = noise(20), np.arange(20) % 10
    method, recipe = Method(loss=adjusted, choose=choose), Recipe(steps=8, batch_size=10)
    model = small_model()
    _, settings = method.train(model, X, y, 10, recipe, seed=0, checkpoint=tmp_path / "run.pt")
    assert settings["rows"] == 12 and {path.name for path in tmp_path.iterdir()} == {
        "run.pt",
        "run-choosing.pt",
    }
    assert not torch.equal(seen["trained"]["head.weight"], small_model().state_dict()["head.weight"])
    again = small_model()
    Method(loss=adjusted, choose=choose).train(
        again, X, y, 10, recipe, seed=0, checkpoint=tmp_path / "run.pt"
    )
    assert torch.equal(again.head.weight, model.head.weight)
    named = small_model()
    Method(loss=adjusted, choose=choose).train(
        named, X, y, 10, recipe, seed=0, checkpoint=str(tmp_path / "run.pt")
    )
    assert torch.equal(named.head.weight, model.head.weight)


def test_the_steps_of_the_choosing_network_are_counted():
    for method in METHODS.values():
        if method.choose:
            assert method.compute == 1.25

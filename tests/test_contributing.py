"""What the documents show as code works as it stands there."""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, files, smoke
from test_ClassifierNetwork import equal_weights

import Arms
from Arms import ARMS, ArmUnavailableError
from Batches import SourceBatches
from ClassifierNetwork import channel_statistics, create_classifier
from Methods import METHODS

CAT = 3


def python_blocks(document):
    text = (REPOSITORY / "docs" / document).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


BLOCKS = python_blocks("contributing.md")


def entry(text, names):
    """The arm's name and the arm that an entry of ARMS in a block stands for."""
    [item] = eval("{" + text + "}", vars(Arms) | names).items()
    return item


def test_adasyn_is_an_arm_in_at_most_ten_lines(tiny_data, monkeypatch):
    block = BLOCKS[0]
    assert len(block.splitlines()) <= 10
    imports, text = block.split("\n\n")
    names = {}
    exec(imports, names)
    name, arm = entry(text, names)
    monkeypatch.setitem(ARMS, name, arm)
    with pytest.raises(ArmUnavailableError, match="ADASYN: Not any neigbours"):  # classes that do not overlap
        smoke(name, tiny_data)
    mixed = dataclasses.replace(tiny_data, y_train=np.random.default_rng(0).permutation(tiny_data.y_train))
    result = smoke(name, mixed)
    # It makes about as many images as asked for, because it shares them out by neighbourhood.
    assert result["training_images"]["synthetic"][CAT] == pytest.approx(25, abs=3)
    assert {"images/smoke/cat-5/cm_adasyn.png", "models/smoke/cat-5/resnet_adasyn.pt"} <= files()


def test_a_sampler_is_a_file_and_a_line(tiny_data, monkeypatch):
    Path("NoiseGeneration.py").write_text(BLOCKS[1])
    monkeypatch.syspath_prepend(".")
    imports, line = BLOCKS[2].strip().split("\n\n")
    assert len(line.splitlines()) == 1
    names = {}
    exec(imports, names)
    name, arm = entry(line, names)
    monkeypatch.setitem(ARMS, name, arm)
    X, y = np.full((12, 8, 8, 3), 100, dtype=np.uint8), np.repeat([0, 1], [9, 3])
    X_res, y_res = arm.fit_resample(X, y, seed=0)
    assert np.bincount(y_res).tolist() == [9, 9] and 2 < X_res[12:].std() < 16
    assert smoke(name, tiny_data)["training_images"]["synthetic"][CAT] == 25


TRAINING, LOOP, SAMPLER = python_blocks("development.md")


def own_images():
    """Names that the document's lines begin with."""
    rng = np.random.default_rng(0)
    names = {
        "X": rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8),
        "y": np.repeat([0, 1, 2], [28, 28, 4]),
        "X_new": rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8),
        "y_new": np.repeat([0, 1, 2], [4, 4, 16]),
    }
    return names | {"X_test": names["X"]}


def source_aware_training():
    names = own_images()
    exec(TRAINING.replace("steps=2000, batch_size=256", "steps=2, batch_size=16, micro_batch_size=8"), names)
    return names


def test_source_aware_training_on_ones_own_images():
    names = source_aware_training()
    assert len(names["X_all"]) == 84
    assert names["predictions"].shape == (60,)
    # It is the method that was chosen, bit by bit.
    method = METHODS["stable-spectrum-quarter-real-last"]
    model = create_classifier(3, 16, channel_statistics(names["X_all"]), seed=0)
    method.train(model, names["X_all"], names["y_all"], len(names["X"]), names["recipe"], seed=0)
    assert equal_weights(model, names["model"])
    assert not equal_weights(model, create_classifier(3, 16, channel_statistics(names["X_all"]), seed=0))


def test_source_aware_training_in_a_loop_of_ones_own():
    """Statistics follow real images alone: a white synthetic image leaves no trace in them."""
    names = source_aware_training()
    X, sources = names["X_all"].copy(), names["sources"]
    X[sources == 0], X[sources == 1] = 100, 255
    network = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3, affine=False), torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3)
    )
    names |= {
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), 0.1),
        "batches": SourceBatches(
            X, sources, names["recipe"], torch.device("cpu"), seed=0, phases=names["phases"]
        ),
    }
    before = network[2].weight.clone()
    exec(LOOP, names)
    assert network[0].num_batches_tracked > 0
    assert network[0].running_mean.numpy() == pytest.approx(100 / 255 * (1 - 0.9**4), rel=1e-4), (
        "of four real parts"
    )
    assert not torch.equal(network[2].weight, before)


def test_samplers_and_splits_on_ones_own_labels():
    names = own_images()
    for name in ("X", "X_new"):
        names[name] = np.repeat(np.repeat(names[name], 2, axis=1), 2, axis=2)
    names["y_new"][:12] = 1
    exec(SAMPLER, names)
    assert np.bincount(names["y"]).tolist() == [28, 4, 4]
    assert np.bincount(names["y_res"]).tolist() == [28, 10, 4]


def imports_of(name):
    """The modules that a module of the repository imports, anywhere in it: a set."""
    found = set()
    for node in ast.walk(ast.parse((REPOSITORY / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def needed_modules(name, found):
    """Add to ``found`` a module and all modules of the repository that it imports, directly or not."""
    if name not in found and (REPOSITORY / f"{name}.py").exists():
        found.add(name)
        for module in imports_of(name):
            needed_modules(module, found)
    return found


def packages_of(names):
    """What modules import from elsewhere, by the names on PyPI."""
    on_pypi = {"PIL": "pillow", "imblearn": "imbalanced-learn", "sklearn": "scikit-learn"}
    found = {module.split(".")[0] for name in names for module in imports_of(name)}
    ours = {path.stem for path in REPOSITORY.glob("*.py")}
    return {on_pypi.get(name, name) for name in found - ours - sys.stdlib_module_names}


def test_the_modules_to_copy_are_all_that_each_part_needs():
    text = (REPOSITORY / "docs" / "development.md").read_text(encoding="utf-8")
    table = re.search(
        r"\| part \| modules to copy \| packages \|\n\| --- \| --- \| --- \|\n((?:\|.*\n)+)", text
    )
    rows = table[1].splitlines()
    assert len(rows) == 10
    for row in rows:
        named = re.findall(r"`(\w+)`", row.split("|")[2])
        of_lines = {"Batches", "ClassifierNetwork", "ClassifierTraining", "ImageStatistics", "Losses"}
        start = of_lines if "the training above" in row else {named[0]}
        needed = set()
        for name in start:
            needed_modules(name, needed)
        assert set(named) == needed, row
        assert row.split("|")[3].strip().split(", ") == sorted(packages_of(needed)), row

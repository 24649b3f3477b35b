"""What the documents show as code works as it stands there."""

import ast
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, files, smoke
from test_ClassifierNetwork import equal_weights

import Arms
from Arms import ARMS, ArmUnavailableError
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


def test_source_aware_training_on_ones_own_images():
    [block] = python_blocks("development.md")
    rng = np.random.default_rng(0)
    names = {
        "X": rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8),
        "y": np.repeat([0, 1, 2], [28, 28, 4]),
        "X_new": rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8),
        "y_new": np.repeat([0, 1, 2], [4, 4, 16]),
    }
    names |= {"X_test": names["X"], "y_test": names["y"]}
    exec(block.replace("steps=2000, batch_size=256", "steps=2, batch_size=16, micro_batch_size=8"), names)
    assert len(names["X_all"]) == 84
    assert names["predictions"].shape == (60,)
    # It is the method that was chosen, bit by bit.
    method = METHODS["stable-spectrum-quarter-real-last"]
    model = create_classifier(3, 16, channel_statistics(names["X_all"]), seed=0)
    method.train(model, names["X_all"], names["y_all"], len(names["X"]), names["recipe"], seed=0)
    assert equal_weights(model, names["model"])
    assert not equal_weights(model, create_classifier(3, 16, channel_statistics(names["X_all"]), seed=0))


def needed_modules(name, found):
    """Add to ``found`` a module and all modules of the repository that it imports, directly or not."""
    if name in found or not (REPOSITORY / f"{name}.py").exists():
        return found
    found.add(name)
    for node in ast.walk(ast.parse((REPOSITORY / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            needed_modules(node.module, found)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                needed_modules(alias.name, found)
    return found


def test_the_modules_to_copy_are_all_that_each_part_needs():
    text = (REPOSITORY / "docs" / "development.md").read_text(encoding="utf-8")
    rows = re.search(r"\| part \| modules to copy \|\n\| --- \| --- \|\n((?:\|.*\n)+)", text)[1].splitlines()
    assert len(rows) == 9
    for row in rows:
        named = re.findall(r"`(\w+)`", row.split("|")[2])
        of_lines = {"Batches", "ClassifierNetwork", "ClassifierTraining", "ImageStatistics", "Losses"}
        start = of_lines if "lines above" in row else {named[0]}
        needed = set()
        for name in start:
            needed_modules(name, needed)
        assert set(named) == needed, row

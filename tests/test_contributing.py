"""What docs/contributing.md says works as it stands there."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, files, smoke

import Arms
from Arms import ARMS, ArmUnavailableError

BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "contributing.md").read_text(), re.DOTALL)
CAT = 3


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

"""Operators of a training step, and what is estimated from them."""

import importlib
import json
import sys

import pytest
import torch
from conftest import REPOSITORY

from Arms import PROFILES
from Files import save_json


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    yield
    sys.path.remove(str(REPOSITORY / "benchmarks"))


@pytest.fixture
def operators():
    return importlib.import_module("operators")


@pytest.fixture
def estimate():
    return importlib.import_module("estimate")


def test_what_computes_counts_once_and_views_do_not(operators):
    x, layer = torch.randn(4, 6), torch.nn.Linear(6, 5)
    values = [torch.ones(3) for _ in range(7)]

    def step():
        y = layer(x.view(2, 2, 6).flatten(0, 1)).relu()  # addmm, relu
        y.transpose(0, 1).reshape(-1)[None].contiguous()  # clone
        torch._foreach_add_(values, 1.0)
        torch.empty(3).unsqueeze(0)

    assert operators.count_operators(step) == {"addmm": 1, "relu": 1, "clone": 1, "_foreach_add_": 1}


def test_a_step_of_the_classifier_has_two_fifths_of_the_operators_and_with_graphs_a_third(operators):
    now = operators.count_operators(operators.classifier_step()).total()
    assert 100 < now <= 0.4 * operators.BEFORE["classifier"]
    graphs = "CompiledFunction", "CompiledFunctionBackward"
    counted = operators.count_operators(
        operators.classifier_step(backend=operators.like_cudagraphs()), graphs
    )
    assert counted["CompiledFunction"] == counted["CompiledFunctionBackward"] == 1
    assert counted.total() <= operators.BEFORE["classifier"] / 3
    torch._dynamo.reset()


@pytest.mark.parametrize("profile", ["cpu", "full"])
def test_a_step_of_the_gan_has_half_of_the_operators(operators, profile):
    now = operators.count_operators(operators.gan_step(PROFILES[profile].gan)).total()
    assert 100 < now <= operators.BEFORE[f"gan, {profile}"] / 2


def test_full_is_estimated_to_fit_the_cards(estimate):
    result = json.loads((REPOSITORY / estimate.RESULT).read_text())
    assert result["gan_steps"] == PROFILES["full"].gan.steps, "run benchmarks/estimate.py again"
    for card, minutes in (("H100", 15), ("T4", 60)):
        for kind in ("CUDA graphs", "not compiled"):
            assert estimate.total(result["seconds"][card], kind) < 60 * minutes, card
    assert max(result["gibibytes"].values()) < 14.5, "of the 16 GB of a T4"
    table = estimate.table(result)
    assert "*estimated*, not measured" in table and "A card of 16 GB is enough." in table
    assert table.count("\n| ") >= len(estimate.arms_of_make_main())


def test_seconds_follow_launches_where_arithmetic_is_short_and_arithmetic_where_it_is_long(estimate):
    counts, profile = {"gan, full": 1000}, PROFILES["full"]
    launches = profile.gan.steps * 1000 * estimate.LAUNCH + profile.gan.records * estimate.JUDGING
    assert estimate.gan_seconds(profile, counts, rate=1e30) == pytest.approx(launches)
    assert estimate.gan_seconds(profile, counts, rate=1e10) > 10 * launches


def test_what_a_backward_pass_needs_is_counted_once(estimate):
    x = torch.ones(1000, requires_grad=True)
    assert estimate.kept_bytes(lambda: x.exp().sum()) == 4000, "the result of exp"
    assert estimate.kept_bytes(lambda: (x * x).sum()) == 4000, "both factors are one tensor"


def test_the_table_of_operators_has_their_ratios(operators, tmp_path):
    after = {name: 100 for name in ("classifier", "classifier, CUDA graphs", "gan, cpu", "gan, full")}
    save_json("result.json", {"before": operators.BEFORE, "after": after})
    table = operators.table(json.loads((tmp_path / "result.json").read_text()))
    assert "| classifier | 853 | 100 | 0.12 |" in table and "70191a59" in table

"""The benchmark of Stable Diffusion's presets, without measuring."""

import json
import runpy
from pathlib import Path

import pytest
from conftest import REPOSITORY


def test_the_presets_cost_what_they_promise(capsys):
    """At least 2.5 times fewer operations for 'fast', and 25 times for 'turbo', than the reference's setting."""
    benchmark = runpy.run_path(str(REPOSITORY / "benchmarks" / "stable_diffusion.py"))
    benchmark["main"](["--count-only", "--output", "result.json"])
    result = json.loads(Path("result.json").read_text())
    costs = result["presets"]
    assert {name: cost["unet_passes"] for name, cost in costs.items()} == {
        "reference": 62, "fast": 22, "turbo": 1, "sdxl-turbo": 1,
    }  # fmt: skip
    # 0.4 * 10^12 multiplications with additions for one pass at 64x64 latents, counted as two operations each.
    assert result["flops_per_row"]["UNet v1"] == pytest.approx(0.80e12, rel=0.02)
    assert costs["reference"]["tflops"] / costs["fast"]["tflops"] > 2.5
    assert costs["reference"]["tflops"] / costs["turbo"]["tflops"] > 25
    assert costs["reference"]["calls"] == {
        "UNet v1, 2 rows": 31, "decoder, 1 rows": 1, "text encoder v1, 1 rows": 2, "safety checker, 1 rows": 1,
    }  # fmt: skip
    table = capsys.readouterr().out
    assert table.startswith("| preset |") and table.count("not measured") == 4

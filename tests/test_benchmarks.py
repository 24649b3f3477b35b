"""The benchmarks: what the presets of Stable Diffusion cost, and that the GAN's runs."""

import json
import runpy
import subprocess
import sys
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


def test_the_benchmark_of_the_gan_compares_the_two_in_turns():
    # In a process of its own: it starts processes, which import what is run.
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gan.py"), "--profile", "smoke", "--batch-size", "4",
               "--workers", "0", "--rounds", "2", "--seconds", "0.01", "--device", "cpu"]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    result = json.loads(Path("results/benchmarks/gan.json").read_text())
    speeds = {name: row["images_per_second"] for name, row in result["rows"].items()}
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["reference"], strict=True)]
    assert result["ratio_of_each_turn"] == pytest.approx(ratios) and len(ratios) == 2
    # 2.5 * 10^9 operations for an image through a DCGAN of 64 feature maps, counted with its three passes.
    assert result["rows"]["reference"]["gigaflops_per_image"] == pytest.approx(2.48, rel=0.01)
    assert f"{result['ratio']:.2f} times" in answer.stdout

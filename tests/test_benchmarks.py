"""The benchmarks: what Stable Diffusion's presets and the recipes cost, the variants of the network, and that the
others run.
"""

import importlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from ClassifierNetwork import channel_statistics, create_classifier, load_classifier, save_classifier
from ClassifierTraining import Recipe, count_training_flops, train_classifier
from Losses import CrossEntropy, LogitAdjustedLoss
from MirroredFilters import mirrored_filters


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


def test_the_benchmark_of_the_gan_compares_the_two_in_turns(device):
    # In a process of its own: it starts processes, which import what is run.
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gan.py"), "--profile", "smoke", "--batch-size", "4",
               "--workers", "0", "--rounds", "2", "--seconds", "0.01"]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    result = json.loads(Path(f"results/benchmarks/gan-{device.type}.json").read_text())
    speeds = {name: row["images_per_second"] for name, row in result["rows"].items()}
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["reference"], strict=True)]
    assert result["ratio_of_each_turn"] == pytest.approx(ratios) and len(ratios) == 2
    # 2.5 * 10^9 operations for an image through a DCGAN of 64 feature maps, counted with its three passes.
    assert result["rows"]["reference"]["gigaflops_per_image"] == pytest.approx(2.48, rel=0.01)
    assert f"{result['ratio']:.2f} times" in answer.stdout


# --- What accuracy costs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def time_to_accuracy():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        yield importlib.import_module("time_to_accuracy")


@pytest.fixture
def training_variants(time_to_accuracy):
    return sys.modules["training_variants"]


@pytest.fixture
def training_candidates(time_to_accuracy):
    return sys.modules["training_candidates"]


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("resnet_variants")


def untrained(width=4, num_classes=10, modify=None):
    model = create_classifier(num_classes, width, ((127.5,) * 3, (63.75,) * 3), seed=0, device="cpu")
    if modify:
        modify(model)
    return model


@pytest.fixture(scope="module")
def petaflops(time_to_accuracy):
    """Name -> PFLOPs of a run on 50,000 images."""
    X = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    costs = {}
    for lines in time_to_accuracy.SERIES.values():
        for name, candidate in lines.items():
            if name == "compiled":
                continue
            costs[name] = count_training_flops(candidate.network(X, seed=0), candidate.recipe(50_000)) / 1e15
    return costs


def test_the_lines_of_the_ablation_cost_about_the_same(time_to_accuracy, petaflops):
    costs = {name: petaflops[name] for name in time_to_accuracy.SERIES["ablation"] if name != "compiled"}
    assert {name for name, cost in costs.items() if not 0.041 < cost < 0.048} == set()


def test_the_targets_keep_within_their_budgets(time_to_accuracy, petaflops):
    targets = time_to_accuracy.SERIES["target"]
    for_94 = [name for name in targets if name.startswith("balanced-94")]
    assert len(for_94) == len(targets) - 1
    assert all(petaflops[name] < 0.7 for name in for_94)
    # A tenth of 50 passes over 50,000 images with SGD at the reference's width.
    reference = Recipe(steps=round(50 * 50_000 / 128), batch_size=128, optimizer="sgd", scales=(1.0,))
    assert petaflops["reference-accuracy"] < count_training_flops(untrained(42), reference) / 1e15 / 10


def test_the_lines_from_before_average_pooling_have_strides(time_to_accuracy):
    """No other test would notice: strides change neither the shapes of the weights nor the operations."""
    pooled = {
        "pooled", "mirrored", "mirrored-20", "balanced-94-mirrored", "balanced-94-pooled", "balanced-94-halved",
        "balanced-94-longer",
    }  # fmt: skip
    X = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    networks = {
        name: candidate.network(X, seed=0)
        for lines in time_to_accuracy.SERIES.values() for name, candidate in lines.items()
    }  # fmt: skip
    assert {name for name, model in networks.items() if model.downsampling == "average pooling"} == pooled


def test_the_committed_results_are_those_of_the_lines_as_they_stand(time_to_accuracy, petaflops):
    checked = 0
    for lines in time_to_accuracy.SERIES.values():
        for name, candidate in lines.items():
            for path in (REPOSITORY / time_to_accuracy.FOLDER).glob(f"{name}-seed*.json"):
                result = json.loads(path.read_text())
                candidate.require_same_settings(path, result, candidate.recipe(50_000))
                assert petaflops[name] == pytest.approx(result["pflops"], rel=5e-3), path.name
                checked += 1
    assert checked == len(list((REPOSITORY / time_to_accuracy.FOLDER).glob("*.json"))) > 30


def test_a_recipe_is_measured_once_and_shown(training_candidates, time_to_accuracy, tiny_data, monkeypatch):
    tiny = training_candidates.Candidate("tiny", width=2, passes=1, changes={"batch_size": 20}, averaged=True)
    monkeypatch.setattr(time_to_accuracy, "REFERENCE_SPLIT", "1-0.5")
    monkeypatch.setitem(time_to_accuracy.SERIES, "target", {"tiny": tiny})
    first = time_to_accuracy.run("tiny", tiny, tiny_data, seed=0)
    assert first["recipe"]["steps"] == len(tiny_data.y_train) // 20 and 0 <= first["accuracy"] <= 1
    assert first["pflops"] > 0
    monkeypatch.setattr(training_candidates, "train_classifier", None)  # a second training would fail
    assert time_to_accuracy.run("tiny", tiny, tiny_data, seed=0) == json.loads(json.dumps(first))
    for said, minutes in (
        ({"precision": "bfloat16"}, "0"),
        ({"precision": "float16"}, "0 (float16)"),
        ({"precision": None, "bfloat16": True}, "0"),
        ({"precision": None, "bfloat16": False}, "0 (float32)"),
    ):
        [path] = time_to_accuracy.FOLDER.glob("*.json")
        path.write_text(json.dumps(first | said))
        row = f"| tiny | 2 | 1 | {first['pflops']:.3f} | {minutes} | {100 * first['accuracy']:.2f} |"
        assert row in time_to_accuracy.table("target"), "with the minutes"


def test_a_line_on_an_arm_has_its_loss_with_the_source_of_each_row(
    time_to_accuracy, tiny_data, tiny_cache, monkeypatch
):
    monkeypatch.setattr(time_to_accuracy, "REFERENCE_SPLIT", "cat-5")
    arm = time_to_accuracy.SERIES["target"]["reference-accuracy"].arm
    X, y, loss = time_to_accuracy._training_set_and_loss(arm, tiny_data, 0, torch.device("cpu"))
    assert len(X) == len(y) == 275 + 133, (
        "9 classes of 30 and 5 cats, and as many synthetic images as the arm adds"
    )
    assert repr(loss) == repr(LogitAdjustedLoss(y, 10, np.repeat([0, 1], [275, 133])))
    X, y, loss = time_to_accuracy._training_set_and_loss("balanced", tiny_data, 0, torch.device("cpu"))
    assert len(X) == len(y) == 300 and loss is None


def tiny_batches(kind, X, batch_size, **options):
    return kind(X, batch_size, torch.device("cpu"), seed=0, **options)


def test_each_image_is_mirrored_every_other_epoch(training_variants):
    X = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    batches = tiny_batches(training_variants.AlternatingFlips, X, 10, padding=0)
    mirrored = np.zeros((4, len(X)), dtype=bool)
    for epoch, seen in enumerate(mirrored):
        for images, rows in batches.epoch(epoch):
            images = images.permute(0, 2, 3, 1).numpy()
            seen[rows] = (images == X[rows][:, :, ::-1]).all(axis=(1, 2, 3))
            assert np.array_equal(
                np.where(seen[rows][:, None, None, None], images[:, :, ::-1], images), X[rows]
            )
    assert 0 < mirrored[0].sum() < len(X)
    assert (mirrored[1] == ~mirrored[0]).all() and (mirrored[2] == mirrored[0]).all()


def test_a_square_of_each_image_is_cut_out_elsewhere_in_each_epoch(training_variants):
    class SmallCutout(training_variants.Cutout):
        side = 6

    X = np.full((400, 16, 16, 3), 255, dtype=np.uint8)
    X[::2] = 0  # the mean is 127.5
    batches = tiny_batches(SmallCutout, X, 20)
    cut = np.zeros((2, 400, 16, 16), dtype=bool)
    for epoch, places in enumerate(cut):
        for images, rows in batches.epoch(epoch):
            assert images.dtype == torch.uint8
            assert (images == images[:, :1]).all(), "all channels of a place"
            places[rows] = images[:, 0].numpy() == 128
            whole = images[:, 0].numpy()[~places[rows]]
            assert np.array_equal(whole, X[rows, :, :, 0][~places[rows]]), "the rest stays"
    heights, widths = cut.any(axis=3).sum(axis=2), cut.any(axis=2).sum(axis=2)
    assert (cut.sum(axis=(2, 3)) == heights * widths).all(), "rectangles"
    for sides in (heights, widths):
        assert sides.min() == 3 and sides.max() == 6, "their middle lies in the image, and no more need to"
    assert cut[0].mean(axis=0).min() > 0.02, "everywhere"
    assert (cut[0] == cut[1]).all(axis=(1, 2)).mean() < 0.05, "the same by chance alone"


def test_what_changes_the_batches_can_be_combined(training_variants):
    class Both(training_variants.Cutout, training_variants.AlternatingFlips):
        pass

    X = np.zeros((40, 16, 16, 3), dtype=np.uint8)
    X[:, :, :8] = 255
    batches = tiny_batches(Both, X, 40, padding=0)
    [(first, _)], [(second, _)] = batches.epoch(0), batches.epoch(1)
    assert all(128 in images.unique() for images in (first, second)), "cut"
    for images in (first, second):
        left, right = (half.float().mean(dim=(1, 2, 3)) for half in images.split(8, dim=3))
        assert 5 < (left > right).sum() < 35, "mirrored"


def test_some_of_the_easy_images_are_left_out(training_variants):
    n, batch_size = 1000, 20
    X = np.zeros((n, 8, 8, 3), dtype=np.uint8)
    hard = torch.arange(n) % 4 == 0
    batches = tiny_batches(training_variants.EasyImagesSkipped, X, batch_size)
    loss = training_variants.RememberingLoss(CrossEntropy(), batches.losses)
    sure_of_class_0 = torch.tensor([9.0, 0.0])
    seen = torch.zeros((4, n), dtype=torch.int64)
    for epoch, count in enumerate(seen):
        for images, rows in batches.epoch(epoch):
            assert images.shape == (batch_size, 3, 8, 8) and rows.shape == (batch_size,)
            count[rows] += 1
            for part in rows.split(8):  # micro-batches
                loss(sure_of_class_0.repeat(len(part), 1), hard[part].long(), part)
    assert seen.max() == 1, "no image twice in an epoch"
    assert (seen[0] == 1).all(), "nothing is known before the first epoch"
    assert (seen[1:, hard] == 0).sum() < 3 * batch_size, "only the incomplete last batch"
    assert 0.4 < seen[1:, ~hard].float().mean() < 0.6
    assert (seen[1] != seen[2]).any()


def test_a_remembering_loss_is_the_loss_it_wraps_and_keeps_that_of_each_row(training_variants):
    losses = torch.full((5,), torch.inf)
    logits, targets, rows = torch.randn((3, 4)), torch.tensor([0, 3, 1]), torch.tensor([4, 0, 2])
    smoothed = CrossEntropy(0.1)
    loss = training_variants.RememberingLoss(smoothed, losses)(logits, targets, rows)
    assert loss == smoothed(logits, targets, rows)
    expected = -logits.log_softmax(dim=1)[torch.arange(3), targets]
    torch.testing.assert_close(losses[rows], expected)
    assert losses[[1, 3]].isinf().all()


def test_a_run_that_keeps_more_than_a_checkpoint_holds_is_not_resumable(time_to_accuracy):
    lines = {name: line for series in time_to_accuracy.SERIES.values() for name, line in series.items()}
    assert {name for name, line in lines.items() if not line.resumable} == {
        "skipping", "averaged", "balanced-94-narrower", "balanced-94-mirrored", "balanced-94-halved", "balanced-94-longer",
    }  # fmt: skip


# --- Where a step's time goes -------------------------------------------------------------------


def test_the_profile_names_every_part_of_a_training_step(tiny_data):
    profile_training = runpy.run_path(str(REPOSITORY / "benchmarks" / "profile_training.py"))
    X, y = tiny_data.X_train, tiny_data.y_train
    named, usual = (create_classifier(10, 2, channel_statistics(X), seed=0, device="cpu") for _ in range(2))
    recipe = Recipe(steps=2, batch_size=20)
    batches = profile_training["NamedBatches"](X, 20, torch.device("cpu"), 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train_classifier(named, X, y, recipe, seed=0, batches=batches)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert {counts[part] for part in profile_training["PARTS"].values()} == {2}
    train_classifier(usual, X, y, recipe, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), usual.parameters(), strict=True))


# --- Variants of the network --------------------------------------------------------------------


def pixels(n, side):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0))


def test_strides_cost_as_much_as_pooling_and_have_the_same_weights(variants):
    def cost(model):
        return count_training_flops(model, Recipe(steps=1, optimizer="sgd"))

    def weights(model):
        return sum(parameter.numel() for parameter in model.parameters())

    usual, strided = untrained(), untrained(modify=variants.strided_downsampling)
    assert cost(usual) == cost(strided) and weights(usual) == weights(strided)


def test_pooling_sees_every_place_and_strides_do_not(variants):
    """A strided 1x1 convolution ignores three places of four; the pooled one is moved by each."""
    for modify, ignored in ((variants.strided_downsampling, 48), (None, 0)):
        block = untrained(modify=modify).blocks[2]
        of_shortcut = []
        block.shortcut[0].register_forward_hook(lambda *call, seen=of_shortcut: seen.append(call[-1]))
        maps = torch.zeros((1, 4, 8, 8), requires_grad=True)
        block(maps)
        of_shortcut[0].sum().backward()
        assert (maps.grad[0, 0] == 0).sum() == ignored


def test_files_of_a_strided_network_are_not_taken_for_those_of_the_default_network(variants, tiny_data):
    """Their weights would fit, and the predictions would be wrong."""
    X, y = tiny_data.X_train, tiny_data.y_train
    # Of width 8: PyTorch 2.14's float32 gradients of strided convolutions of 4 channels hang or abort on a CPU with AVX2 alone.
    strided = untrained(8, modify=variants.strided_downsampling)
    options = {"recipe": Recipe(steps=2, batch_size=20), "seed": 0, "checkpoint": "run.pt"}
    train_classifier(strided, X, y, **options)
    with pytest.raises(ValueError, match="downsampling: strides there, average pooling now"):
        train_classifier(untrained(8), X, y, **options)
    save_classifier(strided, "strided.pt")
    with pytest.raises(ValueError, match="holds a network with strides"):
        load_classifier("strided.pt")


@pytest.mark.parametrize("side", [16, 20, 24, 28, 32, 19])
def test_strides_give_maps_of_the_same_sides(variants, side):
    sides = []
    for modify in (None, variants.strided_downsampling):
        model = untrained(modify=modify)
        for block in model.blocks:
            block.register_forward_hook(lambda *call: sides.append(call[-1].shape[2:]))
        model(pixels(2, side))
    assert sides[:8] == sides[8:] and len(sides) == 16


def test_a_network_with_strides_cannot_be_mirrored(variants):
    with pytest.raises(ValueError, match="average pooling is needed"):
        mirrored_filters(untrained(modify=variants.strided_downsampling))


# --- Damaged results ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("classifier-cpu.json", ("median", "reference", "peak_memory_gib")),
        ("gan-cpu.json", ("rows", "ours", "batch_size")),
        ("profile-cpu-width42.json", ("shares", "Muon")),
        ("stable_diffusion.json", ("presets", "fast", "tflops")),
        ("time_to_accuracy/default-seed0.json", ("hardware", "name")),
    ],
)
def test_a_damaged_result_is_named_with_the_part_that_is_missing(name, keys, own_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    report = importlib.import_module("report")
    shutil.copytree(REPOSITORY / "results" / "benchmarks", own_folder / "results" / "benchmarks")
    assert report.generated_parts()
    path = Path("results", "benchmarks", name)
    content = json.loads(path.read_text())
    *outer, last = keys
    part = content
    for key in outer:
        part = part[key]
    del part[last]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name} is damaged: {'.'.join(keys)} missing or wrong. Remove it"):
        report.generated_parts()

"""One arm from its training set to its result: what is written, and what a kill leaves."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPLIT, files, smoke, smoke_study, with_other_removed_images

import ArmTraining
import Batches
import ClassifierNetwork
import ClassifierTraining
import Losses
import Methods
from Arms import ARMS, BEST_WITH_STABLE_DIFFUSION, PROFILES
from ArmTraining import epoch_evaluator, finished_result, run_arm
from ClassifierNetwork import Evaluation, ResNet18, evaluate_classifier, load_classifier
from ClassifierTraining import Recipe
from Experiment import run_arms
from ImageCache import CACHE, describe_cache
from ImbalancedCIFAR10 import CIFAR10_CLASSES, split_from_name
from Repeatability import checksum
from Report import caption, conditions
from Results import predictions_of

CAT = CIFAR10_CLASSES.index("cat")


def outcome_of(result):
    """What two runs of the same thing must agree in."""
    history = [{k: v for k, v in epoch.items() if not k.startswith("seconds")} for epoch in result["history"]]
    return result["metrics"], result["metrics_with_averaged_flips"], result["test_predictions"], history


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_a_result_of_another_method_under_the_same_name_is_refused(tiny_data, monkeypatch):
    smoke("imbalanced", tiny_data)
    changed = dataclasses.replace(ARMS["imbalanced"], method=Methods.Method(loss=Methods.adjusted))
    monkeypatch.setitem(ARMS, "imbalanced", changed)
    with pytest.raises(ValueError, match="other settings .definition: Method"):
        finished_result(smoke_study(tiny_data), tiny_data, "imbalanced")


# --- What an arm leaves -------------------------------------------------------------------------


def expected_counts(arm_name):
    """Real and synthetic images of each class, with 5 cats and 30 images of every other class."""
    real, synthetic = np.full(10, 30), np.zeros(10, dtype=int)
    if arm_name == "balanced":
        return real.tolist(), synthetic.tolist()
    real[CAT] = 5
    if "source-balanced" in arm_name or "source-aware" in arm_name:
        synthetic[:] = 12  # 0.4 x 30
    if arm_name not in ("imbalanced", "logit-adjusted", "adjusted-after-training"):
        synthetic[CAT] = 25
    return real.tolist(), synthetic.tolist()


@pytest.mark.parametrize("arm_name", ARMS)
def test_an_arm_leaves_its_result_weights_and_two_plots(arm_name, tiny_data, tiny_cache):
    result = smoke(arm_name, tiny_data)

    arm = ARMS[arm_name]
    weights, json_path = (
        f"models/smoke/cat-5/{arm.weights_name}.pt",
        f"results/smoke/cat-5/{arm_name}-seed0.json",
    )
    plots = {f"images/smoke/cat-5/{kind}_{arm.image_tag}.png" for kind in ("cm", "test")}
    labels = "results/smoke/cat-5/test-labels.txt"
    generator = set()
    if arm.needs_gan:  # and the network that judges it
        generator = {
            f"models/smoke/cat-5/{name}.pt" for name in ("generator", "discriminator", "resnet_imbalanced")
        }
        generator |= {f"results/smoke/cat-5/{name}" for name in ("gan.json", "gan-snapshots.npy")}
    expected = {weights, json_path, labels, "datasets/stable_diffusion_dataset.npy"} | plots | generator
    assert files() == expected
    assert smoke_study(tiny_data).load_test_labels().tolist() == tiny_data.y_test.tolist()
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG\r\n") for plot in plots)

    text = Path(json_path).read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse_constant) == result
    assert (result["arm"], result["data"], result["split"], result["seed"], result["profile"]) == (
        arm_name, "cifar10", "cat-5", 0, "smoke",
    )  # fmt: skip
    assert result["minority_classes"] == ["cat"] and result["class_names"] == list(CIFAR10_CLASSES)
    assert {"torch", "numpy", "imbalanced-learn", "python", "commit"} <= result["versions"].keys()
    assert result["hardware"].keys() == {"device", "name", "cpu_threads"}
    assert all(seconds >= 0 for seconds in result["seconds"].values())
    looked_at = [epoch["test_accuracy"] for epoch in result["history"] if "test_accuracy" in epoch]
    assert result["best_look_at_test"]["test_accuracy"] == max(looked_at)
    assert result["best_look_at_test"]["looks"] == len(looked_at)
    assert 0 < result["training_pflops"] < 1e-3
    of_cache = {"source": describe_cache(), "checksum": checksum(np.load(CACHE))}
    assert result.get("stable_diffusion_images") == (of_cache if arm.needs_stable_diffusion else None)

    configuration = result["configuration"]
    assert (configuration["steps"], configuration["width"]) == (6, 4), "every arm gets the same compute"
    assert result["history"][-1]["step"] == 6
    assert configuration["logit_adjusted"] == (
        arm_name.endswith("adjusted") or ("source-aware" in arm_name and "cross-entropy" not in arm_name)
    )
    assert configuration["label_smoothing"] == 0

    real, synthetic = expected_counts(arm_name)
    assert result["training_images"] == {"real": real, "synthetic": synthetic}

    predictions, y = predictions_of(result), tiny_data.y_test
    right = predictions == y
    assert len(predictions) == len(y) == 100
    assert result["metrics"]["accuracy"] == pytest.approx(right.mean())
    assert result["metrics"]["minority"]["recall"] == pytest.approx(right[y == CAT].mean())
    matrix = np.zeros((10, 10), dtype=int)
    np.add.at(matrix, (y, predictions), 1)
    assert result["metrics"]["confusion_matrix"] == matrix.tolist()

    network = load_classifier(weights)
    evaluation = evaluate_classifier(network, tiny_data.X_test, y)
    assert np.array_equal(evaluation.predictions, predictions)
    assert evaluation.loss == pytest.approx(result["metrics"]["loss"], rel=1e-5)
    assert configuration["parameters"] == sum(p.numel() for p in network.parameters())
    assert network.width == 4


def test_one_view_and_averaged_flips_are_kept_apart(tiny_data, monkeypatch):
    right = np.eye(10)[tiny_data.y_test]

    def evaluate(model, X, y, **options):
        # Slightly wrong on the images as they are, and surely right on their mirror images.
        mirrored = np.array_equal(X, tiny_data.X_test[:, :, ::-1])
        logits = 9 * right if mirrored else 2 * np.roll(right, 1, axis=1)
        return Evaluation(0.5, logits.argmax(axis=1), logits)

    monkeypatch.setattr(ArmTraining, "evaluate_classifier", evaluate)
    result = smoke("imbalanced", tiny_data)
    assert result["metrics"]["accuracy"] == 0
    assert result["metrics_with_averaged_flips"]["accuracy"] == 1
    assert np.array_equal(predictions_of(result), (tiny_data.y_test + 1) % 10)


@pytest.mark.parametrize(
    ("arm_name", "adjusted", "synthetic"),
    [
        ("stable-source-balanced", False, 133),
        ("stable-source-balanced-adjusted", True, 133),
        ("imbalanced", False, 0),
        ("logit-adjusted", True, 0),
    ],
)
def test_the_training_gets_the_loss_of_the_arm_and_the_source_of_each_row(
    arm_name, adjusted, synthetic, tiny_data, tiny_cache, monkeypatch
):
    calls = []

    def spy(model, X, y, recipe, **options):
        calls.append((y, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(Methods, "train_classifier", spy)
    with pytest.raises(KeyboardInterrupt):
        smoke(arm_name, tiny_data)
    [(y, options)] = calls
    assert len(y) == 275 + synthetic
    sources = np.array([0] * 275 + [1] * synthetic)
    expected = Losses.LogitAdjustedLoss(y, 10, sources) if adjusted else Losses.CrossEntropy()
    assert repr(options["loss"]) == repr(expected)  # names the priors of every row


@pytest.mark.parametrize(
    "change",
    [
        lambda X, y, data: (X[::-1], y[::-1]),  # shuffled
        lambda X, y, data: (X[1:], y[1:]),  # one real image lost
        lambda X, y, data: (data.X_train, data.y_train),  # removed images among the real ones
    ],
)
def test_a_training_set_that_does_not_begin_with_the_kept_images_is_refused(change, tiny_data):
    study, split = smoke_study(tiny_data), split_from_name(SPLIT, tiny_data.y_train)
    X, y = change(*split.cut(tiny_data.X_train, tiny_data.y_train), tiny_data)
    with pytest.raises(ValueError, match="must begin with the 275 real images"):
        run_arm(study, tiny_data, "imbalanced", X, y)
    with pytest.raises(ValueError, match="must begin with the 300 real images"):
        run_arm(study, tiny_data, "balanced", *split.cut(tiny_data.X_train, tiny_data.y_train))
    assert not files()


# --- No leak ------------------------------------------------------------------------------------


def test_no_removed_image_reaches_the_network(tiny_data, move_to_another_folder):
    other_data = with_other_removed_images(tiny_data, split_from_name(SPLIT, tiny_data.y_train))
    first = smoke("non-synthetic", tiny_data)
    move_to_another_folder()
    assert outcome_of(smoke("non-synthetic", other_data)) == outcome_of(first)


# --- Finished, killed and repeated runs ---------------------------------------------------------


def test_a_finished_arm_is_not_run_again(tiny_data, monkeypatch):
    result = smoke("imbalanced", tiny_data)
    written = {name: Path(name).stat().st_mtime_ns for name in files()}

    def fail(*arguments, **options):
        pytest.fail("it was trained again")

    monkeypatch.setattr(Methods, "train_classifier", fail)
    assert smoke("imbalanced", tiny_data) == result
    assert {name: Path(name).stat().st_mtime_ns for name in files()} == written


def test_an_arm_interrupted_in_training_continues_to_the_same_result(
    tiny_data, move_to_another_folder, monkeypatch
):
    evaluate, epochs = ClassifierNetwork.EpochEvaluator.__call__, []

    def interrupted_evaluation(*arguments):
        epochs.append(None)
        return interrupt() if len(epochs) == 2 else evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierNetwork.EpochEvaluator, "__call__", interrupted_evaluation)
        with pytest.raises(KeyboardInterrupt):
            smoke("logit-adjusted", tiny_data)
    assert files() == {
        "models/checkpoints/smoke/cat-5/logit-adjusted-seed0.pt",
        "results/smoke/cat-5/test-labels.txt",
    }

    resumed = smoke("logit-adjusted", tiny_data)
    assert not files("models/checkpoints")
    move_to_another_folder()
    assert outcome_of(resumed) == outcome_of(smoke("logit-adjusted", tiny_data))


def test_an_arm_killed_before_its_result_is_written_is_not_trained_again(tiny_data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ArmTraining, "save_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smoke("imbalanced", tiny_data)
    monkeypatch.setattr(Batches.AugmentedBatches, "epoch", None)  # one more epoch would fail
    assert smoke("imbalanced", tiny_data)["history"][-1]["step"] == 6
    assert not files("models/checkpoints")


def test_a_result_of_another_recipe_is_neither_used_nor_overwritten(tiny_data, monkeypatch):
    smoke("imbalanced", tiny_data)
    other = dataclasses.replace(PROFILES["smoke"], steps=7)
    monkeypatch.setitem(PROFILES, "smoke", other)
    with pytest.raises(
        ValueError, match="imbalanced-seed0.json was obtained with other settings .steps: 6 there, 7"
    ):
        smoke("imbalanced", tiny_data)


def test_a_result_of_a_part_of_the_data_says_so_and_is_never_mixed_with_others(tiny_data):
    part = tiny_data.part(20)
    assert smoke("imbalanced", part)["configuration"]["most_images_a_class"] == 20
    for other, found in ((tiny_data, None), (tiny_data.part(9), 9)):
        with pytest.raises(ValueError, match=f"most_images_a_class: 20 there, {found} now.*Remove it to run"):
            smoke("imbalanced", other)
    results = {"imbalanced": smoke_study(part).load_runs("imbalanced")}
    assert "At most 20 images of each class were used" in conditions(results)
    Path("results/smoke/cat-5/imbalanced-seed0.json").unlink()
    with pytest.raises(ValueError, match=r"test-labels\.txt and the results .* of other test images. Remove"):
        smoke("imbalanced", tiny_data.part(9))


def test_a_result_of_a_network_with_strides_is_not_used(tiny_data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ResNet18, "downsampling", "strides")
        smoke("imbalanced", tiny_data)
    with pytest.raises(ValueError, match="downsampling: strides there, average pooling now"):
        smoke("imbalanced", tiny_data)


def test_an_arm_killed_before_its_result_was_written_has_none_and_can_be_run_again(tiny_data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ArmTraining, "save_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smoke("imbalanced", tiny_data)
    assert smoke_study(tiny_data).load_results() == {}
    assert not [name for name in files("results") if name.endswith(".json")] and not files("images")
    assert Path("models/smoke/cat-5/resnet_imbalanced.pt").exists(), "a result must never lack its weights"

    result = smoke("imbalanced", tiny_data)
    assert smoke_study(tiny_data).load_results() == {"imbalanced": [result]}
    assert len(files("images")) == 2


def test_damaged_test_labels_are_noticed_before_the_training_and_missing_ones_written_again(
    tiny_data, monkeypatch
):
    smoke("imbalanced", tiny_data)
    labels = smoke_study(tiny_data).record_path("test-labels.txt")
    text = labels.read_text()
    labels.write_text(text[:20])
    with monkeypatch.context() as patch:
        patch.setattr(ArmTraining, "create_classifier", lambda *a, **o: pytest.fail("it trains"))
        with pytest.raises(ValueError, match=r"test-labels\.txt is damaged: .* Remove it and run again"):
            smoke("imbalanced", tiny_data, seed=1)
    labels.unlink()
    smoke("imbalanced", tiny_data)  # the finished result
    assert labels.read_text() == text


def test_an_arm_killed_before_its_plots_were_drawn_gets_them_in_the_next_run(tiny_data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ArmTraining, "save_arm_plots", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smoke("imbalanced", tiny_data)
    smoke("imbalanced", tiny_data)
    assert len(files("images")) == 2


def test_seeds_repeat_in_another_folder_and_differ_from_each_other(tiny_data, move_to_another_folder):
    first, other = smoke("non-synthetic", tiny_data), smoke("non-synthetic", tiny_data, seed=1)
    assert files("models") == {
        "models/smoke/cat-5/resnet_non_synthetic.pt", "models/smoke/cat-5/resnet_non_synthetic-seed1.pt",
    }  # fmt: skip
    results = smoke_study(tiny_data).load_results()["non-synthetic"]
    assert results == [first, other]
    assert caption(results) == "cat-5, profile smoke, 2 seeds"
    assert outcome_of(first) != outcome_of(other)

    move_to_another_folder()
    assert outcome_of(smoke("non-synthetic", tiny_data)) == outcome_of(first)


def test_a_numpy_seed_is_as_good_as_a_plain_one(tiny_data):
    assert smoke("imbalanced", tiny_data, seed=np.int64(1))["seed"] == 1


def test_the_walk_of_the_notebook_gives_the_result_that_run_arm_gives(tiny_data, move_to_another_folder):
    """Main.ipynb trains one arm by its own calls; run_arm then finds the checkpoint and trains nothing."""
    study, split = smoke_study(tiny_data), split_from_name(SPLIT, tiny_data.y_train)
    X, y = split.cut(tiny_data.X_train, tiny_data.y_train)
    X_res, y_res = ARMS["non-synthetic"].fit_resample(X, y, seed=0)
    recipe = ArmTraining.arm_recipe(study, tiny_data)
    assert finished_result(study, tiny_data, "non-synthetic") is None
    model = ArmTraining.create_classifier(10, 4, ArmTraining.channel_statistics(X_res), seed=0)
    history = ClassifierTraining.train_classifier(
        model, X_res, y_res, recipe, seed=0,
        after_epoch=epoch_evaluator(tiny_data, split, recipe),
        checkpoint=study.checkpoint_path("non-synthetic-seed0"),
    )  # fmt: skip
    predictions = evaluate_classifier(model, tiny_data.X_test, tiny_data.y_test).predictions

    result = run_arm(study, tiny_data, "non-synthetic", X_res, y_res)
    assert result["history"] == history  # the very same seconds: nothing was trained again
    assert np.array_equal(predictions_of(result), predictions)
    move_to_another_folder()
    assert outcome_of(smoke("non-synthetic", tiny_data)) == outcome_of(result)


def test_evaluating_during_training_costs_about_two_percent_but_makes_a_curve(tiny_data):
    # An image evaluated costs about half of one trained on.
    test_set = dataclasses.replace(
        tiny_data, X_test=np.zeros((10_000, 16, 16, 3), np.uint8), y_test=np.arange(10_000) % 10
    )
    split = split_from_name(SPLIT, tiny_data.y_train)
    for steps, evaluations in [(6, 3), (1000, 3), (10_000, 5), (40_000, 20)]:
        recipe = Recipe(steps=steps, batch_size=128)
        evaluator = epoch_evaluator(test_set, split, recipe)
        due = [evaluator.is_due(step, step) for step in range(1, steps + 1)]  # an epoch is a step
        assert sum(due) == evaluations


def test_a_damaged_result_is_named(tiny_data):
    study = smoke_study(tiny_data, "cat-3")
    path = study.result_path("imbalanced")
    path.parent.mkdir(parents=True)
    path.write_text('{"arm": "imbal')
    with pytest.raises(ValueError, match=r"imbalanced-seed0\.json is no valid JSON .*Remove it"):
        finished_result(study, tiny_data, "imbalanced")


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"seed": 1}'])
def test_a_damaged_result_of_another_seed_costs_nothing_but_the_plots(content, tiny_data, capsys):
    study = smoke_study(tiny_data)
    damaged = study.result_path("imbalanced", seed=1)
    damaged.parent.mkdir(parents=True)
    damaged.write_text(content)
    result = smoke("imbalanced", tiny_data)
    assert "imbalanced-seed1.json" in capsys.readouterr().out
    assert json.loads(study.result_path("imbalanced").read_text()) == result
    damaged.unlink()
    assert smoke("imbalanced", tiny_data) == result
    assert all(path.exists() for path in study.plot_paths("imbalanced")), "drawn by the next run"


def test_outputs_that_cannot_be_written_are_noticed_before_the_training(tiny_data, monkeypatch):
    monkeypatch.setattr(Methods, "train_classifier", lambda *a, **o: pytest.fail("it was trained"))
    Path("results").write_text("a file in the folder's place")
    with pytest.raises(OSError, match="imbalanced-seed0.json"):
        smoke("imbalanced", tiny_data)


# --- A profile of few arms, with mirrored filters -----------------------------------------------


@pytest.mark.parametrize("arm_name", [BEST_WITH_STABLE_DIFFUSION, "balanced"])
def test_an_arm_of_the_headline_trains_the_mirrored_network(arm_name, headline, tiny_data, tiny_cache):
    [result] = run_arms([headline], tiny_data, [arm_name]).values()
    configuration = result["configuration"]
    wanted = {
        "width": 4,
        "mirrored": True,
        "padding": 4,
        "cutout": 10,
        "flip": False,
        "norm_shift_rate": 16.0,
    }
    assert wanted.items() <= configuration.items()
    network = load_classifier(headline.weights_path(arm_name))
    assert network.mirrored and configuration["parameters"] == sum(p.numel() for p in network.parameters())
    plain = evaluate_classifier(network, tiny_data.X_test, tiny_data.y_test)
    assert np.array_equal(plain.predictions, predictions_of(result))
    assert all("headline" in name for name in files() - {"datasets/stable_diffusion_dataset.npy"})
    assert finished_result(headline, tiny_data, arm_name) == result
    assert "width 4 with average pooling and filters in mirrored pairs (" in conditions({arm_name: [result]})


def test_the_operations_of_a_mirrored_network_are_counted_as_they_are():
    recipe = Recipe(steps=1, batch_size=1, optimizer="sgd")
    usual, mirrored = (
        ArmTraining._training_flops(10, recipe, (32, 32), width=8, mirrored=answer)
        for answer in (False, True)
    )
    assert 0.49 < mirrored / usual < 0.53


def test_counting_operations_needs_no_gpu(monkeypatch):
    """The first GPU may be full, which is why another one was named."""
    monkeypatch.setattr("ClassifierNetwork.choose_device", lambda name=None: torch.device(name or "cuda:99"))
    assert ArmTraining._training_flops(10, Recipe(steps=1, batch_size=1), (32, 32), width=4) > 0


def test_an_arm_that_a_profile_does_not_run_is_refused(headline, tiny_data):
    X, y = split_from_name(SPLIT, tiny_data.y_train).cut(tiny_data.X_train, tiny_data.y_train)
    refused = pytest.raises(
        ValueError, match="The profile headline does not run the arm 'smote'. Choose one of imb"
    )
    for call in (
        lambda: finished_result(headline, tiny_data, "smote"),
        lambda: run_arm(headline, tiny_data, "smote", X, y),
        lambda: run_arms([smoke_study(tiny_data), headline], tiny_data, ["imbalanced", "smote"]),
    ):
        with refused:
            call()
    assert not files()


def test_a_result_from_before_filters_could_be_mirrored_counts_as_without(tiny_data, monkeypatch):
    smoke("imbalanced", tiny_data)
    study = smoke_study(tiny_data)
    path = study.result_path("imbalanced")
    new = json.loads(path.read_text())
    old = json.loads(path.read_text())
    for name in ("mirrored", "norm_shift_rate", "cutout"):
        del old["configuration"][name]
    path.write_text(json.dumps(old))
    assert smoke("imbalanced", tiny_data) == old
    for runs in ([old, new], [new, old]):
        assert "with average pooling (" in conditions({"imbalanced": runs})
    monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(PROFILES["smoke"], mirrored=True))
    with pytest.raises(ValueError, match="mirrored: False there, True now"):
        smoke("imbalanced", tiny_data)


def test_digits_are_told_from_their_mirror_images(headline, digits):
    study = dataclasses.replace(headline, data="digits", split="8-0.01")
    [result] = run_arms([study], digits, ["logit-adjusted"]).values()
    assert result["configuration"]["mirrored"] is False

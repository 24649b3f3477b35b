"""The study's GAN and the quality of generated images: what they may see, what is kept, what a kill leaves."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import smoke, smoke_study
from test_GANNetworks import tiny_generator

import Arms
import Experiment
import GANExperiment
import QualityExperiment
import Results
from Arms import ARMS, PROFILES
from ArmTraining import finished_result
from ClassifierNetwork import create_classifier, load_classifier, save_classifier
from Experiment import run_arms
from GANExperiment import gan_lock, is_trained, prepare_generator, quality_measure, save_gan
from GANGeneration import GANRun, train_gan
from GANNetworks import Discriminator, load_generator, save_generator
from GANTrainingStep import Adversaries, BalancedBatches
from GenerationQuality import ImageFeatures
from ImageCache import load_generated_images
from ImbalancedCIFAR10 import split_from_name
from QualityExperiment import classifier_features, judge_generated_images
from Results import Study, read_json

REMOVED, TEST = (255, 0, 255), 255  # the poisons' colours


def poisoned(data, split):
    """The same data with removed images in magenta and white test images with other labels."""
    X_train = data.X_train.copy()
    X_train[np.setdiff1d(np.arange(len(X_train)), split.kept_rows(data.y_train))] = REMOVED
    return dataclasses.replace(
        data, X_train=X_train, X_test=np.full_like(data.X_test, TEST), y_test=data.y_test[::-1]
    )


def test_no_removed_image_and_no_test_image_reaches_the_gan(tiny_data, monkeypatch):
    """Poisoned removed images and a poisoned test set change nothing, and no poison is ever scored."""
    split = split_from_name("cat-5", tiny_data.y_train)
    drawn, original = [], BalancedBatches.draw

    def draw(self, size, random):
        images, labels = original(self, size, random)
        drawn.append(images.cpu())
        return images, labels

    monkeypatch.setattr(BalancedBatches, "draw", draw)
    weights = []
    for folder, data in (("clean", tiny_data), ("poisoned", poisoned(tiny_data, split))):
        Path(folder).mkdir()
        monkeypatch.chdir(folder)
        path = prepare_generator(smoke_study(data), data)
        weights.append(torch.load(path, weights_only=True)["generator"])
        monkeypatch.chdir("..")
    first, second = weights
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    magenta = torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1)
    assert len(drawn) == 14  # 6 steps and one to count operations, twice
    assert not any((batch == magenta).all(dim=(1, 2, 3)).any() for batch in drawn)


def test_the_quality_measure_weighs_every_class_equally():
    """The distance is 0 for as many images of each class, and not for the images as they are."""
    y = np.array([0] * 40 + [1] * 10)
    X = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    X[y == 1] //= 2
    features = ImageFeatures(
        lambda images: images.float().mean(dim=(2, 3)), "mean colour", torch.device("cpu")
    )
    quality = quality_measure(X, y, features, images=40)
    equal = np.concatenate([X[:20], X[40:], X[40:]])  # 20 of class 0, 10 of class 1 twice
    assert quality(equal, None) == pytest.approx(0, abs=1e-2)
    assert quality(X, None) > 1


def test_one_gan_serves_every_seed_of_the_arms(tiny_data, monkeypatch):
    smoke("gan", tiny_data)
    monkeypatch.setattr(GANExperiment, "train_gan", lambda *a, **o: pytest.fail("it was trained again"))
    smoke("gan-source-balanced", tiny_data, seed=1)


def test_a_training_that_could_not_be_saved_is_not_lost(tiny_data, monkeypatch):
    study = smoke_study(tiny_data)

    def no_space(*arguments):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(GANExperiment, "save_json", no_space)
        with pytest.raises(OSError, match="No space"):
            prepare_generator(study, tiny_data)
    monkeypatch.setattr(GANExperiment, "count_flops", lambda *arguments: 1)  # it makes a training step too
    monkeypatch.setattr(Adversaries, "step", lambda *arguments: pytest.fail("it was trained again"))
    assert prepare_generator(study, tiny_data).exists()
    assert not list(Path("models/checkpoints").rglob("gan.pt"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Processes cannot be copied here.")
@pytest.mark.cpu(reason="a copy of a process that uses CUDA cannot use it")
@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_at_once_train_one_gan_and_both_get_it(tiny_data, monkeypatch, killed):
    """The second process waits, also if the first is killed in the middle of its training."""
    study, original = smoke_study(tiny_data), GANExperiment.train_gan

    def training(*arguments, **options):
        with open("trained.txt", "a") as file:
            file.write(f"{os.getpid()} ")
        if killed and len(Path("trained.txt").read_text().split()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    monkeypatch.setattr(GANExperiment, "train_gan", training)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare_generator, args=(study, tiny_data, "cpu")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert sorted(process.exitcode for process in processes) == ([-signal.SIGKILL, 0] if killed else [0, 0])
    assert len(Path("trained.txt").read_text().split()) == (2 if killed else 1)
    assert is_trained(study, tiny_data)
    assert not list(Path().rglob("*.lock"))
    assert not list(Path("models/checkpoints").rglob("*.pt"))


def test_the_lock_of_a_study_lies_beside_its_generator(tiny_data):
    study = smoke_study(tiny_data)
    with gan_lock(study):
        assert study.model_path(".generator.pt.lock").exists()
    assert not study.model_path(".generator.pt.lock").exists()


@pytest.mark.parametrize("place", ["models/smoke", "results"])
def test_an_output_that_cannot_be_written_is_noticed_before_the_training(tiny_data, monkeypatch, place):
    study = smoke_study(tiny_data)
    monkeypatch.setattr(GANExperiment, "train_gan", lambda *a, **o: pytest.fail("it was trained"))
    monkeypatch.setattr(GANExperiment, "classifier_features", lambda *a: pytest.fail("it was trained"))
    Path(place).parent.mkdir(exist_ok=True)
    Path(place).write_text("not a folder")
    with pytest.raises(OSError, match=f"Cannot write {place}/.*Choose a folder"):
        prepare_generator(study, tiny_data)


@pytest.mark.parametrize("writes", ["the weights", "the judged images"])
def test_judging_notices_before_the_work_what_it_cannot_write(tiny_data, monkeypatch, writes):
    study = smoke_study(tiny_data)
    monkeypatch.setattr(QualityExperiment, "train_classifier", lambda *a, **o: pytest.fail("it was trained"))
    if writes == "the weights":
        study.weights_path("imbalanced").mkdir(parents=True)
        monkeypatch.setattr(Path, "exists", Path.is_file)
        with pytest.raises(OSError, match=r"Cannot write models/smoke/.*\.pt"):
            classifier_features(study, tiny_data)
    else:
        Path("results").write_text("not a folder")
        with pytest.raises(OSError, match="Cannot write results/smoke"):
            judge_generated_images(study, tiny_data, {"gan": tiny_data.X_test[:4]})


def test_a_finished_gan_with_a_distance_of_nan_is_kept(tiny_data):
    """JSON has no NaN: the record says that nothing was measured."""
    study = smoke_study(tiny_data)
    history = [
        {"step": k, "quality": quality, "seconds": 1.0, "seconds_of_quality": 0.1}
        for k, quality in enumerate([float("nan"), np.float64(2.5), None, float("inf")])
    ]
    generator = tiny_generator(trained=range(10), num_classes=10)
    run = GANRun(
        generator, Discriminator(10, 4), history, np.zeros((4, 10, 32, 32, 3), np.uint8), np.int64(1)
    )
    save_gan(study, tiny_data, run, "some features")
    record = read_json(study.record_path("gan.json"))
    assert [entry["quality"] for entry in record["history"]] == [None, 2.5, None, None]
    assert record["best_step"] == 1


def test_a_quality_of_nan_ends_the_command_in_one_line_and_a_second_run_trains_no_step_again(
    tiny_data, monkeypatch, capsys
):
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    command = ["--train-gan", "--profile", "smoke", "--split", "cat-5"]
    with monkeypatch.context() as patch:
        patch.setattr(GANExperiment, "frechet_distance_to", lambda *a: lambda images: float("nan"))
        with pytest.raises(SystemExit) as stopped:
            Experiment.main(command)
    assert stopped.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "quality measured at step" in line and "Repair the measure" in line
    steps, original = [], Adversaries.step

    def step(self, batches, step, seed):
        steps.append(step)
        return original(self, batches, step, seed)

    monkeypatch.setattr(Adversaries, "step", step)
    monkeypatch.setattr(GANExperiment, "count_flops", lambda *arguments: 1)  # it makes a training step too
    Experiment.main(command)
    assert len(steps) < 6 and 0 not in steps


def test_the_calls_of_the_notebook_keep_the_gan_that_prepare_generator_keeps(
    tiny_data, move_to_another_folder
):
    study, split = smoke_study(tiny_data), split_from_name("cat-5", tiny_data.y_train)
    X, y = split.cut(tiny_data.X_train, tiny_data.y_train)
    settings = GANExperiment.gan_settings(study, tiny_data)
    features = classifier_features(study, tiny_data)
    assert not is_trained(study, tiny_data)
    run = train_gan(
        X, y, settings, seed=0, num_classes=10, checkpoint=study.checkpoint_path("gan"),
        quality=quality_measure(X, y, features, settings.quality_images),
    )  # fmt: skip
    save_gan(study, tiny_data, run, features.name)
    assert is_trained(study, tiny_data)
    weights, record = (
        load_generator(study.model_path("generator.pt")).state_dict(),
        study.record_path("gan.json"),
    )
    record = read_json(record)
    move_to_another_folder()
    other = load_generator(prepare_generator(study, tiny_data)).state_dict()
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    again = read_json(study.record_path("gan.json"))
    assert again.keys() == record.keys()
    for key in record.keys() - {"seconds", "history", "versions", "hardware"}:
        assert again[key] == record[key], key


def test_a_gan_of_other_settings_is_neither_used_nor_overwritten(tiny_data, monkeypatch):
    study = smoke_study(tiny_data)
    path = prepare_generator(study, tiny_data)
    content = path.read_bytes()
    smaller = PROFILES["smoke"]
    other = dataclasses.replace(smaller, gan=dataclasses.replace(smaller.gan, steps=7))
    monkeypatch.setitem(PROFILES, "smoke", other)
    with pytest.raises(
        ValueError, match=r"gan\.json was obtained with other settings .steps: 6 there, 7 now"
    ):
        prepare_generator(study, tiny_data)
    assert path.read_bytes() == content


def test_what_was_made_from_a_part_of_the_data_is_not_used_for_another_part(tiny_data, tiny_cache):
    study, part = smoke_study(tiny_data), tiny_data.part(20)
    prepare_generator(study, part, "cpu")
    assert is_trained(study, part)
    with pytest.raises(ValueError, match=r"gan\.json .*most_images_a_class: 20 there, None now"):
        is_trained(study, tiny_data)
    generated = {"stable": load_generated_images()[0][:9]}
    judged = judge_generated_images(study, part, generated, "cpu")
    assert "at most 20 images a class" in judged["methods"]["stable"]["features"]
    with pytest.raises(ValueError, match="was judged by other features"):
        judge_generated_images(study, tiny_data, generated, "cpu")


def test_a_run_of_another_profile_leaves_the_committed_gan_alone(tiny_data, monkeypatch):
    """cpu writes to models/generator.pt, full to a folder of its own."""
    monkeypatch.setattr(Results, "COMMITTED", Study("cpu", "cifar10", "cat-5"))
    for name, channels in (("cpu", 4), ("full", 5)):
        settings = dataclasses.replace(PROFILES["smoke"].gan, channels=channels)
        profile = dataclasses.replace(PROFILES["smoke"], evidence=True, width=channels, gan=settings)
        monkeypatch.setitem(PROFILES, name, profile)
    paths = [prepare_generator(Study(name, "cifar10", "cat-5"), tiny_data) for name in ("cpu", "full")]
    assert paths == [Path("models/generator.pt"), Path("models/full/cat-5/generator.pt")]
    for path, name, channels in zip(paths, ("cpu", "full"), (4, 5), strict=True):
        assert load_generator(path).channels == channels
        features = classifier_features(Study(name, "cifar10", "cat-5"), tiny_data)
        assert features.name.startswith(f"ResNet-18 of width {channels} with")


def test_the_features_of_a_mirrored_profile_are_those_of_its_network(headline, tiny_data):
    path = headline.weights_path("imbalanced")
    save_classifier(create_classifier(10, 4, ((127.5,) * 3, (63.75,) * 3), 0), path)
    name = (
        "ResNet-18 of width 4 with average pooling and filters in mirrored pairs, trained on cat-5 of cifar10"
    )
    features = classifier_features(headline, tiny_data)
    assert features.name == name and load_classifier(path).mirrored, "the other network was replaced"


@pytest.mark.parametrize("content", ["{}", "[]", '{"settings": null}'])
def test_a_damaged_record_is_named(content, tiny_data):
    study = smoke_study(tiny_data)
    prepare_generator(study, tiny_data)
    study.record_path("gan.json").write_text(content)
    with pytest.raises(ValueError, match=r"gan\.json (holds|is damaged).*Remove it"):
        is_trained(study, tiny_data)


def test_the_result_of_a_gan_arm_names_its_generator_and_is_refused_beside_another_one(tiny_data):
    study = smoke_study(tiny_data)
    result = smoke("gan", tiny_data)
    assert result["generator"] == study.generator_checksum() != 0
    assert "generator" not in smoke("imbalanced", tiny_data)
    assert finished_result(study, tiny_data, "gan") == result
    generator = load_generator(study.model_path("generator.pt"))
    with torch.no_grad():
        next(generator.parameters()).add_(1)
    save_generator(generator, study.model_path("generator.pt"))
    with pytest.raises(ValueError, match=r"gan-seed0\.json was obtained with another generator"):
        finished_result(study, tiny_data, "gan")
    study.model_path("generator.pt").unlink()  # as in a fresh clone with committed results
    assert finished_result(study, tiny_data, "gan") == result


def test_a_collapsed_gan_stops_its_own_arms_only(tiny_data, monkeypatch):
    original = Adversaries.step

    def step(*arguments):
        return original(*arguments).new_tensor([1.0, float("nan"), 0.0, 0.0])

    monkeypatch.setattr(Adversaries, "step", step)
    outcomes = run_arms([smoke_study(tiny_data)], tiny_data, ["gan", "imbalanced"])
    assert re.search("the GAN collapsed.*stopped being finite.*remove models", outcomes["gan", "cat-5", 0])
    assert outcomes["imbalanced", "cat-5", 0]["arm"] == "imbalanced"


def test_a_class_with_one_image_makes_the_arm_unavailable(tiny_data):
    outcomes = run_arms([smoke_study(tiny_data, "cat-1")], tiny_data, ["gan"])
    assert "a GAN needs 2 images of each class" in outcomes["gan", "cat-1", 0]


def test_the_command_line_trains_the_gan_alone(tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    Experiment.main(["--train-gan", "--profile", "smoke", "--split", "cat-5"])
    assert "models/smoke/cat-5/generator.pt" in capsys.readouterr().out
    assert not list(Path("results").rglob("*-seed0.json"))


def test_without_a_second_image_the_command_line_says_so_in_a_line(tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    with pytest.raises(SystemExit):
        Experiment.main(["--train-gan", "--profile", "smoke", "--split", "cat-1"])
    assert "a GAN needs 2 images of each class" in capsys.readouterr().err


def test_every_method_is_judged_against_unseen_images(tiny_data, tiny_cache):
    study, split = smoke_study(tiny_data), split_from_name("cat-5", tiny_data.y_train)
    X, y = split.cut(tiny_data.X_train, tiny_data.y_train)
    generator = prepare_generator(study, tiny_data)
    generated = {
        name: ARMS[name].fit_resample(X, y, seed=0, generator=generator)[0][len(X) :]
        for name in ("non-synthetic", "gan", "stable")
    }
    judged = judge_generated_images(study, tiny_data, generated)
    assert judged["class"] == "cat"
    assert list(judged["methods"]) == ["non-synthetic", "gan", "stable"]
    for scores in judged["methods"].values():
        assert scores["real_images"] == scores["generated_images"] == 10
        assert scores["features"] == "ResNet-18 of width 4 with average pooling, trained on cat-5 of cifar10"
        assert "frechet_distance" in scores and "fid" not in scores
    assert judge_generated_images(study, tiny_data, generated) == judged
    some = {"gan": generated["gan"]}
    assert judge_generated_images(study, tiny_data, some) == judged, "what was judged stays"


def test_images_of_a_further_method_are_judged_too(tiny_data, tiny_cache):
    """Once offline without Stable Diffusion, then with it."""
    study, split = smoke_study(tiny_data), split_from_name("cat-5", tiny_data.y_train)
    X, y = split.cut(tiny_data.X_train, tiny_data.y_train)
    generated = {"non-synthetic": ARMS["non-synthetic"].fit_resample(X, y, seed=0)[0][len(X) :]}
    assert list(judge_generated_images(study, tiny_data, generated)["methods"]) == ["non-synthetic"]
    generated["stable"] = ARMS["stable"].fit_resample(X, y, seed=0)[0][len(X) :]
    judged = judge_generated_images(study, tiny_data, generated)
    assert list(judged["methods"]) == ["non-synthetic", "stable"]
    with pytest.raises(ValueError, match="generated-images.json has non-synthetic, stable too"):
        judge_generated_images(study, tiny_data, {"smote": generated["stable"]})
    assert study.read_judgement() == judged


def test_too_few_images_to_judge_are_noticed_before_a_network_is_trained(tiny_data, monkeypatch):
    monkeypatch.setattr(QualityExperiment, "train_classifier", None)
    images = tiny_data.X_train[:9]
    for split, few, message in (
        ("cat-1", images, "there are 1 and 9"),
        ("cat-5", images[:3], "there are 5 and 3"),
    ):
        with pytest.raises(ValueError, match=f"Judging needs 2 kept images of class cat and 4 .*{message}"):
            judge_generated_images(smoke_study(tiny_data, split), tiny_data, {"gan": few})


@pytest.mark.parametrize("content", [None, "{}", '{"methods": []}'])
def test_a_judgement_by_other_features_or_a_damaged_one_is_refused(content, tiny_data):
    study = smoke_study(tiny_data)
    path = study.record_path("generated-images.json")
    path.parent.mkdir(parents=True)
    other = {"features": "ResNet-18 of width 4 with strides, trained on cat-5 of cifar10"}
    judged = {"class": "cat", "share_of_copies_among_new_real_images": 0.5, "methods": {"gan": other}}
    path.write_text(json.dumps(judged) if content is None else content)
    with pytest.raises(
        ValueError, match=r"generated-images\.json (was judged by other features|is damaged).*Remove it"
    ):
        judge_generated_images(study, tiny_data, {})


def test_a_gan_trained_again_is_judged_again(tiny_data, tiny_cache):
    study = smoke_study(tiny_data)
    judged = study.record_path("generated-images.json")
    prepare_generator(study, tiny_data)
    judged.write_text("{}")
    study.model_path("generator.pt").unlink()
    prepare_generator(study, tiny_data)
    assert not judged.exists()
    assert Arms.ARMS["gan"].method.sampler.generator is None, "the arm itself holds no generator"

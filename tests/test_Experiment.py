"""Many arms, several processes, the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, SPLIT, files, smoke_study

import Experiment
import ImageSources
from Arms import ARMS, PROFILES, STORY, ArmUnavailableError
from Experiment import run_arms
from ImageCache import CACHE, fingerprint, save_generated_images
from ImbalancedCIFAR10 import CIFAR10_CLASSES, DataUnavailableError, split_from_name
from Report import caption
from Results import Study, predictions_of

DIGITS = Study("smoke", "digits", "8-0.01")


# --- Names --------------------------------------------------------------------------------------


def test_a_wrong_last_arm_is_refused_before_anything_runs(tiny_data):
    with pytest.raises(ValueError, match="Unknown arm 'stabel'"):
        run_arms([smoke_study(tiny_data)], tiny_data, ["imbalanced", "stabel"])
    assert files() == set()


@pytest.mark.parametrize(
    ("split", "valid"),
    [
        ("cats", "Unknown split 'cats'.*cat-50, .*long-tailed-100, step-10"),
        ("lion-5", "Unknown class 'lion'.*airplane.*truck"),
        ("cat-31", "Cannot keep 31 of class cat, which has 30"),
    ],
)
def test_a_wrong_last_split_is_refused_before_anything_runs(split, valid, tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    with pytest.raises(SystemExit):
        Experiment.main(["--arm", "imbalanced", "--profile", "smoke", "--split", SPLIT, split])
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(valid, line)
    assert files() == set()


# --- Data and images that are missing -----------------------------------------------------------


def test_digits_results_say_so_everywhere_and_skip_stable_diffusion(digits):
    outcomes = run_arms([DIGITS], digits, ["logit-adjusted", "stable"])

    reason = outcomes["stable", "8-0.01", 0]
    assert isinstance(reason, str) and "no Stable Diffusion images of digits" in reason
    result = outcomes["logit-adjusted", "8-0.01", 0]
    assert (result["data"], result["split"]) == ("digits", "8-0.01")
    assert result["training_images"]["real"][8] == 2
    assert len(predictions_of(result)) == len(digits.y_test) == 360
    assert result["configuration"]["flip"] is False and result["metrics_with_averaged_flips"] is None
    assert caption([result]) == "DIGITS, NOT CIFAR-10 - 8-0.01, profile smoke, 1 seed (0)"
    assert files() == {
        "results/smoke/digits-8-0.01/logit-adjusted-seed0.json",
        "results/smoke/digits-8-0.01/test-labels.txt",
        "models/smoke/digits-8-0.01/digits_resnet_logit_adjusted.pt",
        "images/smoke/digits-8-0.01/digits_cm_logit_adjusted.png",
        "images/smoke/digits-8-0.01/digits_test_logit_adjusted.png",
    }


def test_without_stable_diffusion_images_the_other_arms_still_run(tiny_data, monkeypatch):
    def refuse(images_per_class):
        raise DataUnavailableError("no network")

    monkeypatch.setattr(ImageSources, "fetch_cifake", refuse)
    outcomes = run_arms([smoke_study(tiny_data)], tiny_data, ["stable", "imbalanced"])
    assert outcomes["stable", SPLIT, 0].startswith("CIFAKE is not available: no network. Generating")
    assert outcomes["imbalanced", SPLIT, 0]["arm"] == "imbalanced"


def test_generation_is_asked_for_what_the_most_demanding_split_needs(tiny_data, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Experiment, "prepare_images", lambda counts, no_more: asked.append(counts) or "somewhere"
    )
    monkeypatch.setattr(Experiment, "load_metadata", lambda path: [])
    splits = [split_from_name(name, tiny_data.y_train) for name in ("cat-5", "dog-3")]
    assert Experiment.prepare_stable_diffusion_images(tiny_data, *splits) == "somewhere"
    # 0.4 x 30 of each class; 30 - 5 cats for the first split, 30 - 3 dogs for the second.
    expected = dict.fromkeys(CIFAR10_CLASSES, 12) | {"cat": 25, "dog": 27}
    assert asked == [expected]


def test_the_sources_of_several_splits_are_prepared_together(tiny_data, monkeypatch):
    """With one call for each split, the images would be generated for the first split alone."""
    asked = []
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    monkeypatch.setattr(Experiment, "prepare_images", lambda counts, no_more: asked.append(counts) or "there")
    monkeypatch.setattr(Experiment, "load_metadata", lambda path: [])
    monkeypatch.setattr(Experiment, "_run", lambda *run: "not run here")
    Experiment.main(["--arm", "stable", "--profile", "smoke", "--split", "cat-5", "dog-3"])
    assert [(counts["cat"], counts["dog"]) for counts in asked] == [(25, 27)]


def test_too_many_synthetic_images_are_noticed_before_the_first_run(tiny_data, monkeypatch):
    monkeypatch.setattr(Experiment, "_run", lambda *run: "run")
    studies = [smoke_study(tiny_data, name) for name in ("cat-5", "cat-10")]
    assert len(run_arms(studies, tiny_data, ["imbalanced", "smote@20"])) == 4
    with pytest.raises(ValueError, match="smote@25 cannot run on cat-10: 25 new .* makes 1 to 20"):
        run_arms(studies, tiny_data, ["imbalanced", "smote@25"])


def test_images_made_from_real_ones_serve_only_splits_that_keep_these(tiny_data):
    """Images drawn from all dogs, which cat-5 keeps, would show dog-3 the dogs that it removed."""
    X, y = split_from_name("cat-5", tiny_data.y_train).cut(tiny_data.X_train, tiny_data.y_train)
    labels = np.repeat(np.arange(10), 30)
    rows = [
        {"label": c, "real_images": fingerprint(X[y == c]) if CIFAR10_CLASSES[c] == "dog" else ""}
        for c in labels
    ]
    save_generated_images(tiny_data.X_train[:300], labels, CACHE, rows)
    for name in ("cat-5", "ship-3"):  # both keep all dogs
        split = split_from_name(name, tiny_data.y_train)
        assert "the cache" in Experiment.prepare_stable_diffusion_images(tiny_data, split)
    unknown = [row | {"lora": "models/lora-cat"} if row["label"] == 3 else row for row in rows]
    save_generated_images(tiny_data.X_train[:300], labels, CACHE, unknown)
    with pytest.raises(ArmUnavailableError, match="class cat in .* adapter of unknown origin"):
        Experiment.prepare_stable_diffusion_images(tiny_data, split)
    save_generated_images(tiny_data.X_train[:300], labels, CACHE, rows)
    for name in ("dog-3", "long-tailed-10"):
        other = split_from_name(name, tiny_data.y_train)
        with pytest.raises(
            ArmUnavailableError, match=f"class dog in .* other real images than those that {name}"
        ):
            Experiment.prepare_stable_diffusion_images(tiny_data, split, other)


# --- Several processes --------------------------------------------------------------------------


class Processes:
    """What run_arms asks of accelerate's PartialState."""

    def __init__(self, process_index, num_processes):
        self.process_index, self.num_processes = process_index, num_processes


def test_runs_are_spread_over_the_processes_and_none_is_forgotten_or_run_twice(tiny_data, monkeypatch):
    monkeypatch.setattr(Experiment, "_run", lambda *arguments: "not run here")
    studies = [smoke_study(tiny_data, name) for name in (SPLIT, "cat-3")]
    runs = [
        key
        for index in range(3)
        for key in run_arms(studies, tiny_data, STORY, [0, 1], processes=Processes(index, 3))
    ]
    assert len(runs) == len(set(runs)) == len(STORY) * 2 * 2
    assert set(runs) == set(run_arms(studies, tiny_data, STORY, [0, 1]))


def test_what_is_named_twice_is_run_once(tiny_data, monkeypatch):
    """Two processes would write to the same checkpoint at once."""
    seen = []
    monkeypatch.setattr(Experiment, "_run", lambda *arguments: seen.append(arguments[2]) or "not run")
    arms, study = ["imbalanced", "smote", "imbalanced"], smoke_study(tiny_data)
    for process in range(2):
        run_arms([study, study], tiny_data, arms, [0, 0], processes=Processes(process, 2))
    assert seen == ["imbalanced", "smote"]


def test_in_data_parallel_every_process_takes_part_in_every_run(tiny_data, monkeypatch):
    seen = []
    monkeypatch.setattr(Experiment, "_run", lambda *arguments: seen.append(arguments[-1]) or "not run")
    processes = Processes(1, 2)
    outcomes = run_arms([smoke_study(tiny_data)], tiny_data, STORY, processes=processes, data_parallel=True)
    assert len(outcomes) == len(STORY)
    assert seen == [processes] * len(STORY)


def launch(*arguments, before=""):
    """Run Experiment.py on the digits in two processes, after the lines ``before``."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    Path("program.py").write_text(
        "import os, Experiment, ImbalancedCIFAR10\n"
        "Experiment.load_data = ImbalancedCIFAR10.load_digits_as_images\n"
        "import ArmTraining\n"
        "save_json = ArmTraining.save_json\n"
        "def logged(path, content):\n"
        "    print(f'{path.name} written by process {os.environ[\"RANK\"]}')\n"
        "    save_json(path, content)\n"
        f"ArmTraining.save_json = logged\n{before}Experiment.main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "program.py", "--profile", "smoke", *arguments],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_two_processes_share_a_list_of_runs():
    answer = launch("--arm", "imbalanced", "logit-adjusted", "--seed", "0", "1")
    assert answer.returncode == 0, answer.stderr
    assert sorted(path for path in files("results") if path.endswith(".json")) == [
        f"results/smoke/digits-8-0.01/{arm}-seed{seed}.json"
        for arm in ("imbalanced", "logit-adjusted") for seed in (0, 1)
    ]  # fmt: skip
    assert answer.stdout.count("written by process 0") == answer.stdout.count("written by process 1") == 2
    assert answer.stdout.count("minority recall") == 4


def test_two_processes_train_one_run_together_and_one_writes_it(digits, move_to_another_folder):
    answer = launch("--arm", "imbalanced", "--data-parallel")
    assert answer.returncode == 0, answer.stderr
    [together] = DIGITS.load_results()["imbalanced"]
    move_to_another_folder()
    [alone] = run_arms([DIGITS], digits, ["imbalanced"], device="cpu").values()
    assert answer.stdout.count("written by process") == 1 and "written by process 0" in answer.stdout
    for key in ("step", "train_loss"):
        expected = [epoch.get(key) for epoch in alone["history"]]
        assert [epoch.get(key) for epoch in together["history"]] == pytest.approx(expected, rel=1e-3), key
    assert together["configuration"]["processes"] == 2 and alone["configuration"]["processes"] == 1


def test_an_arm_that_one_process_cannot_run_is_skipped_by_all():
    """The other one would wait for it in the first training step."""
    before = """
make_training_set = Experiment.make_training_set
def make(study, data, arm_name, *arguments):
    if os.environ["RANK"] == "1" and arm_name == "logit-adjusted":
        raise Experiment.ArmUnavailableError("the cache is not on this machine")
    return make_training_set(study, data, arm_name, *arguments)
Experiment.make_training_set = make
"""
    answer = launch("--arm", "logit-adjusted", "imbalanced", "--data-parallel", before=before)
    assert answer.returncode == 0, answer.stderr
    assert (
        answer.stdout.count("logit-adjusted, 8-0.01, seed 0: skipped, the cache is not on this machine") == 2
    )
    assert answer.stdout.count("imbalanced, 8-0.01, seed 0: minority recall") == 2


def test_data_parallel_without_several_processes_is_one_line(digits, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: digits)
    with pytest.raises(SystemExit):
        Experiment.main(["--arm", "imbalanced", "--profile", "smoke", "--data-parallel"])
    assert "needs several processes: start it with torchrun" in capsys.readouterr().err


def test_finished_arms_need_no_images(tiny_data, monkeypatch):
    """A clone with committed results downloads nothing for them."""
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    prepared = []
    monkeypatch.setattr(
        Experiment, "prepare_images", lambda counts, no_more: prepared.append(counts) or "somewhere"
    )
    monkeypatch.setattr(Experiment, "load_metadata", lambda path: [])
    monkeypatch.setattr(Experiment, "_run", lambda *run: "not run here")
    path = smoke_study(tiny_data).result_path("stable")
    for expected in (1, 0):
        prepared.clear()
        Experiment.main(["--arm", "stable", "--profile", "smoke", "--split", SPLIT])
        assert len(prepared) == expected
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_the_data_can_be_prepared_without_running_an_arm(tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: tiny_data)
    monkeypatch.setattr(Experiment, "prepare_images", lambda counts, no_more: "the cache")
    monkeypatch.setattr(Experiment, "load_metadata", lambda path: [])
    Experiment.main(["--prepare-data", "--split", SPLIT])
    assert "Stable Diffusion images: the cache." in capsys.readouterr().out
    assert files() == set()


# --- Command line -------------------------------------------------------------------------------


def run_command_line(*arguments):
    damaged = Path("damaged", "cifar-10-batches-py")  # so that the data is refused without a network
    damaged.mkdir(parents=True)
    environment = os.environ | {"CIFAR10_ROOT": "damaged", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "Experiment.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_help_lists_every_arm_and_profile():
    answer = run_command_line("--help")
    assert answer.returncode == 0
    words = set(answer.stdout.split())
    assert ARMS.keys() <= words and PROFILES.keys() <= words


def test_damaged_data_is_one_clear_line_without_a_traceback():
    answer = run_command_line("--arm", "imbalanced", "--profile", "smoke")
    assert answer.returncode == 1 and answer.stdout == ""
    [line] = answer.stderr.splitlines()
    assert line.startswith("Experiment.py: CIFAR-10 in damaged") and "data_batch_1" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "stabel"], "Unknown arm 'stabel'. Choose one of imbalanced, "),
        (["--arm", "imbalanced", "--profile", "fast"], "Unknown profile 'fast'. Choose one of auto, smoke"),
        (["--arm", "imbalanced", "--split", "lion-5"], "Unknown class 'lion'. Choose one of 0, 1, "),
        (
            ["--arm", "smote", "--profile", "headline"],
            "does not run the arm 'smote'. Choose one of imbalanced, ",
        ),
    ],
)
def test_a_wrong_name_ends_with_one_line_that_lists_the_right_ones(
    arguments, message, digits, monkeypatch, capsys
):
    monkeypatch.setattr(Experiment, "load_data", lambda: digits)
    with pytest.raises(SystemExit) as end:
        Experiment.main(["--profile", "smoke", *arguments])
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("arguments", [["--arm", "stabel"], ["--profile", "fast"], ["--seed", "0", "-1"]])
def test_wrong_names_are_found_before_the_data_is_loaded(arguments, monkeypatch):
    monkeypatch.setattr(Experiment, "load_data", lambda: pytest.fail("the data was loaded"))
    with pytest.raises(SystemExit):
        Experiment.main(arguments)


def test_an_unknown_device_is_one_line_without_a_traceback(digits, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: digits)
    with pytest.raises(SystemExit) as end:
        Experiment.main(["--arm", "imbalanced", "--profile", "smoke", "--device", "abacus"])
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "abacus" in line


def test_each_arm_is_reported_in_a_line(digits, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "load_data", lambda: digits)
    Experiment.main(["--arm", "imbalanced", "stable", "--profile", "smoke", "--seed", "3"])
    ran, skipped = capsys.readouterr().out.splitlines()
    [result] = DIGITS.load_results()["imbalanced"]
    metrics = result["metrics"]
    assert ran == (
        f"imbalanced, 8-0.01, seed 3: minority recall {metrics['minority']['recall']:.1%}, "
        f"balanced accuracy {metrics['balanced_accuracy']:.1%}, accuracy {metrics['accuracy']:.1%}"
    )
    assert skipped.startswith(
        "stable, 8-0.01, seed 3: skipped, there are no Stable Diffusion images of digits"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], STORY),
        (["--arm", "story"], STORY),
        (["--arm", "all"], tuple(ARMS)),
        (["--arm", "smote"], ("smote",)),
        (["--profile", "headline"], PROFILES["headline"].arms),
        (["--profile", "headline", "--arm", "all"], PROFILES["headline"].arms),
    ],
)
def test_story_is_the_default_and_all_means_every_arm(arguments, expected, digits, monkeypatch):
    ran, prepared = [], []
    monkeypatch.setattr(Experiment, "load_data", lambda: digits)
    monkeypatch.setattr(Experiment, "_run", lambda *run: ran.append(run[2]) or "not run here")
    monkeypatch.setattr(Experiment, "prepare_generator", lambda *arguments: prepared.append(arguments))
    Experiment.main(arguments)
    assert tuple(ran) == expected
    # Once, before the arms: processes that ran them at the same time would each train the GAN.
    assert len(prepared) == any(ARMS[name].needs_gan for name in expected)

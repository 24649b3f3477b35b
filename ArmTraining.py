"""Train and evaluate one arm from its training set, and keep the result.

    X_res, y_res = ARMS["smote"].fit_resample(X, y, seed=0)
    result = run_arm(study, data, "smote", X_res, y_res)

The result goes to ``results/<profile>/<split>/<arm>-seed<k>.json``, the weights to ``models/`` and two plots to
``images/``. :func:`finished_result` reads it, so that nothing is trained twice; a killed training continues.
"""

import sys
import time
from functools import cache
from importlib.metadata import version

import numpy as np

from Arms import find_arm
from Calibration import probability_metrics
from ClassifierNetwork import (
    EpochEvaluator,
    ResNet18,
    channel_statistics,
    create_classifier,
    evaluate_classifier,
    save_classifier,
)
from ClassifierTraining import count_training_flops
from Files import require_same_settings, save_json
from ImageCache import CACHE, cache_checksum, describe_cache
from ImbalancedCIFAR10 import split_from_name
from Precision import precision_name
from Repeatability import checksum
from Report import save_arm_plots
from Results import configuration_of, read_result
from Runtime import choose_device, code_version, decide_in_main_process, describe_hardware
from Utils import classification_metrics

code_version()  # read and cached now: a commit made during a training is not the code that ran


def arm_recipe(study, data):
    """The training recipe of every arm of a study.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet

    Returns
    -------
    ClassifierTraining.Recipe
    """
    split = split_from_name(study.split, data.y_train, data.class_names)
    return study.settings.recipe(len(split.kept_rows(data.y_train)), data.mirrored_images_keep_their_class)


def finished_result(study, data, arm_name, seed=0):
    """The result of an arm that was run before, or None. Plots and test labels that are missing are written.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet
    arm_name : str
    seed : int

    Returns
    -------
    dict or None

    Raises
    ------
    ValueError
        If the file is damaged, or was obtained with another recipe, network or generator than this study's, or the
        study's profile does not run the arm.
    """
    arm = find_arm(arm_name, study.profile)
    path = study.result_path(arm_name, seed)
    if not path.exists():
        return None
    result = read_result(path)
    # Arms are compared with each other, so all must have been trained in the same way.
    wanted = _recipe_and_network(arm_recipe(study, data), study.settings, data)
    require_same_settings(path, configuration_of(result), wanted)
    definition = {"definition": arm.method.definition}
    require_same_settings(path, definition | result.get("method", {}), definition)
    generator = study.generator_checksum() if arm.needs_gan else None
    if generator is not None and result.get("generator", generator) != generator:
        raise ValueError(f"{path} was obtained with another generator than {study.model_path('generator.pt')}. "
                         "Remove it to run again.")  # fmt: skip
    if not study.record_path("test-labels.txt").exists():
        study.save_test_labels(data.y_test)
    if not all(plot.exists() for plot in study.plot_paths(arm_name)):
        _save_plots(study, arm_name)  # a kill came between the result and its plots
    return result


def epoch_evaluator(data, split, recipe):
    """A callback that evaluates on the test set during training, for the learning curves. It decides nothing.

    It evaluates so seldom that this costs at most about 2 % of the run: evaluating an image costs less than half of
    training on it. Three evaluations are the fewest that make a curve; in short runs they cost more.

    Parameters
    ----------
    data : ImbalancedCIFAR10.ImageDataSet
    split : ImbalancedCIFAR10.Split
    recipe : ClassifierTraining.Recipe

    Returns
    -------
    ClassifierNetwork.EpochEvaluator
    """
    evaluations = max(3, int(0.02 * 2 * recipe.steps * recipe.batch_size / len(data.y_test)))
    return EpochEvaluator(
        data.X_test,
        data.y_test,
        split.minority_classes,
        steps=recipe.steps,
        evaluations=evaluations,
    )


def run_arm(study, data, arm_name, X, y, *, seed=0, device=None, processes=None):
    """Train a ResNet-18 on an arm's training set, evaluate its last weights on the test set, keep the result.

    Parameters
    ----------
    study : Results.Study
        Decides network, recipe and where files go.
    data : ImbalancedCIFAR10.ImageDataSet
        Nothing of it but its test images is used, except to check ``X``.
    arm_name : str
        A key of :data:`Arms.ARMS`.
    X, y : ndarrays of uint8, shape (n, 32, 32, 3), and of int64, shape (n,)
        The arm's training set: the kept real images first, then the synthetic ones.
    seed : int
        Of the initial weights and the order of the images.
    device : str or torch.device, optional
    processes : accelerate.PartialState, optional
        If given, all of them train this one network together, and the main process writes.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If the first rows of ``X`` and ``y`` are not the images that the split keeps, in order, the study's profile
        does not run the arm, or the results beside this one are of other test images.
    OSError
        If an output cannot be written; noticed before the training.
    """
    arm, seed, device = find_arm(arm_name, study.profile), int(seed), choose_device(device)
    split = split_from_name(study.split, data.y_train, data.class_names)
    recipe, classes = arm_recipe(study, data), len(data.class_names)
    kept = np.arange(len(data.y_train)) if arm.whole_training_set else split.kept_rows(data.y_train)
    _check_real_rows(X, y, data, kept, arm_name)
    study.require_writable(arm_name, seed)
    decide_in_main_process(lambda: study.save_test_labels(data.y_test), processes)
    images = None
    if arm.needs_stable_diffusion and CACHE.exists():  # now: the cache may be another one after the training
        images = {"source": describe_cache(), "checksum": cache_checksum()}
    real_rows = len(kept)
    rank, world_size = (processes.process_index, processes.num_processes) if processes else (0, 1)
    network = study.settings.network(data.mirrored_images_keep_their_class)
    model = create_classifier(
        classes, mean_std=channel_statistics(X), seed=seed, device=device, cosine_head=arm.method.cosine_head,
        **network,
    )  # fmt: skip
    checkpoint = study.checkpoint_path(f"{arm_name}-seed{seed}")
    history, method_settings = arm.method.train(
        model, X, y, real_rows, recipe, seed=seed, checkpoint=checkpoint, rank=rank, world_size=world_size,
        after_epoch=epoch_evaluator(data, split, recipe),
    )  # fmt: skip
    result = (
        {
            "arm": arm_name,
            "data": study.data,
            "split": study.split,
            "seed": seed,
            "profile": study.profile,
            "minority_classes": [data.class_names[c] for c in split.minority_classes],
            "class_names": list(data.class_names),
            **_evaluate(model, data, split, history),
            "training_images": _count_images(y, real_rows, classes),
            "method": {"definition": arm.method.definition, **method_settings},
            "checksum_of_training_set": checksum(y, X),  # tells whether two results had the same images
            "configuration": _recipe_and_network(recipe, study.settings, data)
            | _run_settings(model, arm, world_size, device),
            "training_pflops": _training_flops(classes, recipe, data.X_test.shape[1:3], **network) / 1e15,
            "hardware": describe_hardware(device),
            "versions": _versions(),
            "history": history,
        }
        | ({"generator": study.generator_checksum()} if arm.needs_gan else {})
        | ({"stable_diffusion_images": images} if images else {})
    )
    if rank == 0:
        save_classifier(model, study.weights_path(arm_name, seed))
        save_json(study.result_path(arm_name, seed), result)  # last: it marks the arm as finished
        arm.method.remove_checkpoints(checkpoint)
        _save_plots(study, arm_name)
    return result


def _save_plots(study, arm_name):
    try:
        save_arm_plots(study, arm_name)
    except (ValueError, KeyError) as error:
        # The result of another seed is damaged. That must not cost the run that has just finished.
        print(f"The plots of {arm_name} were not drawn: {error}")


def _check_real_rows(X, y, data, kept, arm_name):
    real = slice(len(kept))
    if not (np.array_equal(y[real], data.y_train[kept]) and np.array_equal(X[real], data.X_train[kept])):
        raise ValueError(
            f"The training set of {arm_name} must begin with the {len(kept):,} real images of the arm, in order. Pass "
            "what fit_resample returned."
        )


def _recipe_and_network(recipe, settings, data):
    network = settings.network(data.mirrored_images_keep_their_class)
    return recipe.as_json() | network | {
        "downsampling": ResNet18.downsampling,
        "most_images_a_class": data.most_images_a_class,
    }  # fmt: skip


@cache
def _training_flops(num_classes, recipe, image_size, **network):
    """The same for all arms, and counting it takes longer than the training of ``smoke``."""
    model = create_classifier(num_classes, mean_std=((0.0,) * 3, (1.0,) * 3), seed=0, device="cpu", **network)
    return count_training_flops(model, recipe, image_size)


def _run_settings(model, arm, world_size, device):
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "logit_adjusted": arm.method.logit_adjusted,
        "processes": world_size,
        "precision": precision_name(device),
    }


def _evaluate(model, data, split, history):
    """Scores on the test set, predictions and seconds, by the names they have in the JSON file."""
    started = time.perf_counter()
    plain = evaluate_classifier(model, data.X_test, data.y_test)
    seconds = time.perf_counter() - started

    def judge(predictions):
        return classification_metrics(data.y_test, predictions, data.class_names, split.minority_classes)

    flips = None
    if data.mirrored_images_keep_their_class:
        mirrored = evaluate_classifier(model, data.X_test[:, :, ::-1], data.y_test)
        flips = judge((plain.logits + mirrored.logits).argmax(axis=1))
        del flips["confusion_matrix"], flips["per_class"]  # long, and shown nowhere
    evaluated = [epoch for epoch in history if "test_accuracy" in epoch]
    best = max(evaluated, key=lambda epoch: epoch["test_accuracy"])
    return {
        "metrics": judge(plain.predictions) | {"loss": plain.loss},
        "metrics_with_averaged_flips": flips,
        "probabilities": probability_metrics(plain.logits, data.y_test, split.minority_classes),
        # The reference study reports its best epoch by test accuracy; here that epoch chooses nothing.
        "best_look_at_test": {
            "looks": len(evaluated),
            **{key: best[key] for key in ("epoch", "test_accuracy", "test_minority_recall")},
        },
        "seconds": {
            "training": sum(epoch["seconds"] for epoch in history),
            "watching_the_test_set": sum(epoch["seconds_of_test"] for epoch in evaluated),
            "final_evaluation": seconds,
        },
        # One class number an image, so that other metrics and paired tests need no training.
        "test_predictions": " ".join(map(str, plain.predictions)),
    }


def _count_images(y, real_rows, num_classes):
    real, synthetic = (np.bincount(part, minlength=num_classes) for part in (y[:real_rows], y[real_rows:]))
    return {"real": real.tolist(), "synthetic": synthetic.tolist()}


def _versions():
    packages = ("torch", "torchvision", "numpy", "scikit-learn", "imbalanced-learn")
    return {name: version(name) for name in packages} | {
        "python": sys.version.split()[0],
        "commit": code_version(),
    }

"""Compare methods on development splits, without the test set and without the class that the study reports.

    python Development.py --method adjusted stable-spectrum-quarter --split dog-50 ship-50 --seed 0
    python DevelopmentReport.py      # the tables in docs/development.md

1,000 images of each class are held out of the training set first. Another class than the study's is then cut in the
rest. Methods are compared on the held-out images. Results lie in ``results/development/``. A finished run is not run
again, and a killed one continues. What is chosen here becomes an arm of ``Arms.py``, which the test set judges once.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    precision_score,
    recall_score,
)

from Arms import COMMITTED_PROFILE, PROFILES
from BusyMachine import start_again_if_busy
from ClassifierNetwork import channel_statistics, create_classifier, evaluate_classifier
from ClassifierTraining import Recipe
from DevelopmentReport import FOLDER, RUN, SCORES, methods_table
from Experiment import prepare_stable_diffusion_images
from GANExperiment import prepare_generator
from ImbalancedCIFAR10 import load_cifar10, split_from_name
from Methods import METHODS, choosing_checkpoint, find_method
from Precision import precision_name
from Results import Study, read_json
from Runtime import (
    checksum,
    choose_device,
    code_version,
    derive_seed,
    describe_hardware,
    require_same_settings,
    require_writable,
    save_json,
)

SPLITS = ("dog-50", "ship-50")
HELD_OUT = 1000  # images of each class

code_version()  # read and cached now: a commit made during a training is not the code that ran

# --- Data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DevelopmentData:
    """An imbalanced training set and validation images, all from the training set of a data set.

    Attributes
    ----------
    X, y : ndarrays of uint8, shape (n, 32, 32, 3), and int64, shape (n,)
        The kept training images.
    X_val, y_val : ndarrays of uint8, shape (m, 32, 32, 3), and int64, shape (m,)
        Held-out images of all classes, and the images that the split removed.
    weights : ndarray of float, shape (m,)
        Of the validation images. They add up to the same for each class.
    minority : int
        The rare class.
    """

    X: np.ndarray
    y: np.ndarray
    X_val: np.ndarray
    y_val: np.ndarray
    weights: np.ndarray
    minority: int


def held_out_set(data, held_out=HELD_OUT):
    """Divide a training set into one to cut splits from and one to judge on. The test set of ``data`` is not read.

    Parameters
    ----------
    data : ImbalancedCIFAR10.ImageDataSet
    held_out : int, default 1000
        Images of each class to judge on. They are the same in every call.

    Returns
    -------
    ImbalancedCIFAR10.ImageDataSet
        Its test set is a part of the training set of ``data``, and its training set is the rest.

    Raises
    ------
    ValueError
        If a class has too few images.
    """
    y = data.y_train
    is_held = np.zeros(len(y), dtype=bool)
    for c in np.unique(y):
        rows = np.flatnonzero(y == c)
        if not 1 <= held_out < len(rows):
            raise ValueError(
                f"Cannot hold out {held_out} of the {len(rows)} images of class {c}. Hold out fewer."
            )
        is_held[np.random.default_rng(derive_seed(0, 5, int(c))).permutation(rows)[:held_out]] = True
    return replace(
        data, name="development", X_train=data.X_train[~is_held], y_train=y[~is_held],
        X_test=data.X_train[is_held], y_test=y[is_held],
    )  # fmt: skip


def development_data(rest, split_name):
    """Cut a development split.

    The removed images of the rare class serve for validation too, which makes its recall more precise. This is
    allowed because the split's class is not the one that the study reports.

    Parameters
    ----------
    rest : ImbalancedCIFAR10.ImageDataSet
        What :func:`held_out_set` returned.
    split_name : str
        A split with one rare class, see :func:`ImbalancedCIFAR10.split_from_name`.

    Returns
    -------
    DevelopmentData

    Raises
    ------
    ValueError
        If the split's class is the one that the study reports, or the split cuts several classes.
    """
    y = rest.y_train
    split = split_from_name(split_name, y, rest.class_names)
    if len(split.counts) != 1 or rest.class_names[split.minority_classes[0]] == "cat":
        raise ValueError(
            f"{split_name} is no development split: it needs one rare class, and not cat, which the study reports. "
            f"Choose for example {' or '.join(SPLITS)}."
        )
    [minority] = split.minority_classes
    kept = split.kept_rows(y)
    removed = np.setdiff1d(np.arange(len(y)), kept)
    X_val = np.concatenate([rest.X_test, rest.X_train[removed]])
    y_val = np.concatenate([rest.y_test, y[removed]])
    weights = np.bincount(rest.y_test)[y_val] / np.bincount(y_val)[y_val]
    return DevelopmentData(rest.X_train[kept], y[kept], X_val, y_val, weights, minority)


def validation_scores(development, predictions):
    """Scores on validation images, as if every class had equally many, so that accuracy is balanced accuracy.

    Returns a dict of fractions with the keys :data:`DevelopmentReport.SCORES`, the first three for the rare class.
    """
    y, weights = development.y_val, development.weights
    rare = {"labels": [development.minority], "average": "macro", "zero_division": 0}
    arguments = {"y_true": y, "y_pred": predictions, "sample_weight": weights}
    return {
        "recall": float(recall_score(**arguments, **rare)),
        "precision": float(precision_score(**arguments, **rare)),
        "f1": float(f1_score(**arguments, **rare)),
        "accuracy": float(accuracy_score(**arguments)),
    }


# --- Runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Network and number of steps of all methods that are compared: ``width`` and ``steps``."""

    width: int
    steps: int

    @property
    def folder(self):
        return FOLDER / f"width{self.width}-steps{self.steps}"

    def path(self, method_name, split_name, seed):
        """Where the result of a run goes."""
        return self.folder / split_name / f"{method_name}-seed{seed}.json"

    def recipe(self, method):
        """The training recipe of a :class:`Methods.Method`."""
        return Recipe(steps=max(1, round(self.steps / method.compute)), **method.changes)


def run_method(data, method_name, split_name, seed, budget, device=None):
    """Train a ResNet-18 by one method on a development split and score it, or return the finished result.

    Parameters
    ----------
    data : ImbalancedCIFAR10.ImageDataSet
        Its test set is not read.
    method_name : str
        A key of :data:`Methods.METHODS`.
    split_name : str
    seed : int
    budget : Budget
    device : str or torch.device, optional

    Returns
    -------
    dict
        The content of the JSON file.

    Raises
    ------
    ValueError
        If a finished result was obtained with other settings.
    """
    method, path = find_method(method_name), budget.path(method_name, split_name, seed)
    recipe = budget.recipe(method)
    if path.exists():
        result = read_json(path, RUN)
        wanted = recipe.as_json() | {"definition": method.definition}
        # The first results lack settings that could not be chosen then.
        found = Recipe(steps=1).as_json() | result["recipe"] | {"definition": result.get("definition")}
        require_same_settings(path, found, wanted)
        return result
    require_writable(path)
    device, commit = choose_device(device), code_version()
    rest, classes = held_out_set(data), len(data.class_names)
    development = development_data(rest, split_name)
    generator = None
    if method.needs_gan:  # trained as the study's, on the development split
        generator = prepare_generator(Study(COMMITTED_PROFILE, rest.name, split_name), rest, device)
    X, y = method.fit_resample(development.X, development.y, seed=seed, generator=generator)
    model = create_classifier(classes, budget.width, channel_statistics(X), seed, device, method.cosine_head)
    checkpoint = Path("models", "checkpoints", *path.parts[1:]).with_suffix(".pt")
    real = len(development.y)
    history, settings = method.train(model, X, y, real, recipe, seed=seed, checkpoint=checkpoint)
    predictions = evaluate_classifier(model, development.X_val, development.y_val).predictions
    result = {
        "method": method_name,
        "what": method.what,
        "definition": method.definition,
        "split": split_name,
        "seed": seed,
        "validation": validation_scores(development, predictions),
        "width": budget.width,
        "recipe": recipe.as_json(),
        **settings,
        "checksum_of_training_set": checksum(y, X),
        "training_images": {"real": real, "synthetic": len(y) - real},
        "final_train_loss": history[-1]["train_loss"],
        "seconds": sum(epoch["seconds"] for epoch in history),
        "precision": precision_name(device),
        "hardware": describe_hardware(device),
        "commit": commit,
    }
    save_json(path, result)
    for left in (checkpoint, choosing_checkpoint(checkpoint)):
        left.unlink(missing_ok=True)
    return result


# --- Command line -------------------------------------------------------------------------------


def _natural(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 on is needed, not {text!r}")
    return int(text)


def _positive(text):
    if (number := _natural(text)) < 1:
        raise argparse.ArgumentTypeError("a number from 1 on is needed, not 0")
    return number


def main(arguments=None):
    start_again_if_busy()
    parser = argparse.ArgumentParser(
        description="Compare methods on development splits, without the test set.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {name:36}{method.what}" for name, method in METHODS.items()),
    )
    add = parser.add_argument
    add("--method", nargs="+", required=True, metavar="METHOD", help="one or more methods, or 'all'")
    add("--split", nargs="+", default=SPLITS, help=f"development splits (default: {' '.join(SPLITS)})")
    add("--seed", nargs="+", type=_natural, default=[0], help="seeds (default: 0)")
    add(
        "--steps",
        type=_positive,
        default=PROFILES["cpu"].steps,
        help="training steps (default: those of cpu)",
    )
    add(
        "--width",
        type=_positive,
        default=PROFILES["cpu"].width,
        help="of the ResNet-18 (default: that of cpu)",
    )
    add("--device", help="cpu, cuda, cuda:1, mps; default: the fastest there is")
    options = parser.parse_args(arguments)
    budget = Budget(options.width, options.steps)
    names = list(METHODS) if options.method == ["all"] else options.method
    try:
        for name in names:
            find_method(name)
        _run_all(names, options, budget)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(methods_table(budget.folder))


def _run_all(names, options, budget):
    data = load_cifar10()
    rest = held_out_set(data)
    for split_name in options.split:
        development_data(rest, split_name)  # a mistake in the last name must not surface after an hour
    if any(find_method(name).needs_stable_diffusion for name in names):
        splits = [split_from_name(name, data.y_train, data.class_names) for name in options.split]
        prepare_stable_diffusion_images(data, *splits)
    for seed in options.seed:
        for name in names:
            for split_name in options.split:
                scores = run_method(data, name, split_name, seed, budget, options.device)["validation"]
                text = ", ".join(f"{key.replace('_', ' ')} {scores[key]:.1%}" for key in SCORES)
                print(f"{name}, {split_name}, seed {seed}: {text}", flush=True)


if __name__ == "__main__":
    main()

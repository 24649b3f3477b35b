"""Where results, plots and weights lie, and how results are read. Nothing here trains, samples or downloads.

study = Study("cpu", "cifar10", "cat-50")
study.result_path("smote", seed=0)            # results/cpu/cat-50/smote-seed0.json
study.image_path("cm_nsd.png")                # images/cm_nsd.png
results = study.load_results()                # arm name -> its results, a dict per seed
results["smote"][0]["metrics"]["minority"]["recall"]
"""

import json
from collections import Counter
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np

from Arms import ARMS, COMMITTED_PROFILE, PROFILES, REFERENCE_SPLIT, find_arm
from Checkpoints import load_torch_file
from ClassifierTraining import Recipe
from Files import atomic_path, require_writable
from Repeatability import checksum


@dataclass(frozen=True)
class Study:
    """A profile, a data set and a split, by name: results with the same three may be compared.

    Attributes
    ----------
    profile : str
        A key of :data:`Arms.PROFILES`.
    data : str
        ``"cifar10"`` or ``"digits"``.
    split : str
        Such as ``"cat-50"``, see :func:`ImbalancedCIFAR10.split_from_name`.
    """

    profile: str
    data: str
    split: str

    @property
    def settings(self):
        """The :class:`Arms.Profile`."""
        return PROFILES[self.profile]

    @property
    def folder(self):
        """Name of the split's folders; other data than CIFAR-10 is part of it."""
        return self.split if self.data == "cifar10" else f"{self.data}-{self.split}"

    # --- Paths ---

    def result_path(self, arm_name, seed=0):
        """``results/<profile>/<split>/<arm>-seed<k>.json``: everything about one run of an arm."""
        return self.record_path(f"{arm_name}-seed{seed}.json")

    def record_path(self, file_name):
        """``results/<profile>/<split>/<file name>``."""
        return Path("results", self.profile, self.folder, file_name)

    def image_path(self, file_name):
        """``images/<file name>`` for the committed results, else in a subfolder of ``images``."""
        return self._output_path("images", file_name)

    def model_path(self, file_name):
        """``models/<file name>`` for the committed results, else in a subfolder of ``models``."""
        return self._output_path("models", file_name)

    def _output_path(self, kind, file_name):
        if self == COMMITTED:
            return Path(kind, file_name)
        prefix = "" if self.data == "cifar10" else f"{self.data}_"
        return Path(kind, self.profile, self.folder, prefix + file_name)

    def weights_path(self, arm_name, seed=0):
        """Where an arm's trained network goes."""
        suffix = f"-seed{seed}" if seed else ""
        return self.model_path(f"{find_arm(arm_name).weights_name}{suffix}.pt")

    def plot_paths(self, arm_name):
        """Where an arm's confusion matrix and learning curves go, in this order."""
        return [self.image_path(f"{kind}_{find_arm(arm_name).image_tag}.png") for kind in ("cm", "test")]

    def checkpoint_path(self, name):
        """From where a killed training continues: ``models/checkpoints/<profile>/<split>/<name>.pt``."""
        return Path("models", "checkpoints", self.profile, self.folder, f"{name}.pt")

    # --- Reading ---

    def load_results(self):
        """Read every finished result.

        Returns
        -------
        dict
            Arm name -> list of results (dicts) by ascending seed; arms in the order of :data:`Arms.ARMS`.

        Raises
        ------
        ValueError
            If a file is damaged.
        """
        results = {arm_name: self.load_runs(arm_name) for arm_name in ARMS}
        return {arm_name: runs for arm_name, runs in results.items() if runs}

    def load_runs(self, arm_name):
        """The finished results of one arm by ascending seed, a list of dict; ValueError if a file is damaged."""
        paths = self.record_path("").glob(f"{arm_name}-seed*.json")
        return sorted((read_result(path) for path in paths), key=lambda result: result["seed"])

    def read_gan_record(self):
        """The content of ``gan.json``: settings, history and choice of the study's GAN."""
        path = self.record_path("gan.json")
        record = read_json(path, GAN_RECORD)
        is_known = record["best_step"] in [entry["step"] for entry in record["history"]]
        refuse_damage(path, [] if is_known else ["best_step"])
        return record

    def read_judgement(self):
        """The content of ``generated-images.json``: the quality of each method's images."""
        path = self.record_path("generated-images.json")
        judged = read_json(path, JUDGEMENT)
        methods = judged["methods"]
        distances = ("frechet_distance", "kernel_distance")
        if any("fid" in scores for scores in methods.values()):
            distances = ("fid", "kid")
        wrong = wrong_parts(methods, {str: dict.fromkeys(distances, Real)}, "methods")
        refuse_damage(path, wrong if methods else ["methods"])
        return judged

    def generator_checksum(self):
        """CRC-32 of the weights of the study's generator, or None if there is no generator."""
        path = self.model_path("generator.pt")
        if not path.exists():
            return None
        weights = load_torch_file(path, {"generator"})["generator"]
        return checksum(*(weights[name].numpy() for name in sorted(weights)))

    # --- Writing ---

    def require_writable(self, arm_name, seed=0):
        """Raise OSError if the files of a run could not be written. Call it before the training."""
        require_writable(
            self.weights_path(arm_name, seed), self.result_path(arm_name, seed), *self.plot_paths(arm_name)
        )

    # --- Test labels: kept beside the predictions, so that results can be judged without the data ---

    def save_test_labels(self, y_test):
        """Write the true classes of the test set once, int array of shape (n,). Call it before the training.

        Raises
        ------
        ValueError
            If the file is damaged, or the results beside it were obtained on other test images.
        """
        path = self.record_path("test-labels.txt")
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text(" ".join(map(str, y_test)) + "\n", encoding="utf-8")
            return
        found = self.load_test_labels()
        if len(found) < len(y_test) and np.array_equal(found, y_test[: len(found)]):
            refuse_damage(path, [f"the labels after the first {len(found):,}"])
        if not np.array_equal(found, y_test):
            raise ValueError(
                f"{path} and the results beside it are of other test images. Remove the folder {path.parent} to run again."
            )

    def load_test_labels(self):
        """True classes of the test set, int array of shape (n,), in the order of the predictions.

        Raises
        ------
        ValueError
            If the file is missing or damaged.
        """
        path = self.record_path("test-labels.txt")
        try:
            labels = path.read_text(encoding="utf-8").split()
        except FileNotFoundError as error:
            raise ValueError(f"There is no {path}. Run an arm beside it again: that writes it.") from error
        except UnicodeDecodeError:
            labels = []
        refuse_damage(path, [] if labels and all(map(str.isdecimal, labels)) else ["class numbers"])
        return np.array(labels, dtype=int)


COMMITTED = Study(COMMITTED_PROFILE, "cifar10", REFERENCE_SPLIT)
HEADLINE = Study("headline", "cifar10", REFERENCE_SPLIT)


# --- What the files must hold: every part that some reader asks for --------------------------------

_MISSING = object()  # is of no type that a shape names, not even of None's
HARDWARE = {"device": str, "name": str, "cpu_threads": int}

RESULT = {
    "arm": str, "seed": int, "profile": str, "data": str, "split": str,
    "minority_classes": [str],
    "class_names": [str],
    "metrics": {
        "minority": {"recall": Real, "precision": Real},
        "balanced_accuracy": Real,
        "accuracy": Real,
        "per_class": {str: {"support": int}},
        "confusion_matrix": [[int]],
    },
    "best_look_at_test": dict,
    "training_images": {"real": [int], "synthetic": [int]},
    "configuration": {"width": int, "downsampling": str, "parameters": int, "steps": int, "batch_size": int},
    "training_pflops": Real,
    "seconds": {"training": Real},
    "hardware": HARDWARE,
    "versions": {"torch": str},
    "history": [{"images_seen": int, "train_loss": Real, "train_accuracy": Real}],
    "test_predictions": str,
}  # fmt: skip

PROBABILITIES = {
    "expected_calibration_error": Real,
    "minority": dict | None,
}  # older results do not have them
RANKING = {
    "average_precision": Real, "reliability": [{"images": int, "mean_probability": Real, "share_of_minority": Real}],
}  # fmt: skip

CACHE_OF_IMAGES = {"source": str, "checksum": int}

GAN_RECORD = {
    "settings": {"steps": int, "batch_size": int},
    "parameters": {"generator": int, "discriminator": int},
    "petaflops": Real,
    "chosen_by": str,
    "best_step": int,
    "seconds": {"training": Real},
    "hardware": HARDWARE,
    "history": [
        {
            "step": int, "images_seen": int, "discriminator_loss": Real, "generator_loss": Real,
            "score_of_real": Real, "score_of_generated": Real, "quality": Real | None,
        }
    ],
}  # fmt: skip

JUDGEMENT = {
    "class": str,
    "share_of_copies_among_new_real_images": Real,
    "methods": {
        str: {
            "features": str, "real_images": int, "generated_images": int, "precision": Real, "recall": Real,
            "share_of_copies": Real,
        }
    },
}  # fmt: skip

CUES = {"auc": {str: Real}, "configuration": dict, "sources": dict, "hardware": HARDWARE}


def read_json(path, shape=None):
    """Content of a JSON file of ``results/``.

    Parameters
    ----------
    path : path
    shape : dict, optional
        What the content must have, at every level: name -> type, or the shape of a dict of its own. ``{str: shape}``
        is a dict of any names with values of this shape; it may name others beside ``str``. ``[shape]`` is a list of such
        values. More is allowed.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If the file is damaged or holds something else; the message names what is wrong and says what to do.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}). Remove it and run again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {json.dumps(content)[:40]}, not a record. Remove it and run again.")
    refuse_damage(path, wrong_parts(content, shape or {}))
    return content


def _refuse_constant(name):
    raise ValueError(f"{name} is no number of JSON")


def wrong_parts(content, shape, name=""):
    """Names of the parts of a record that are missing or wrong, a list such as ``["metrics.minority.recall"]``.

    See :func:`read_json` for ``shape``. ``name`` is the record's own name.
    """
    if isinstance(shape, list) and isinstance(content, list):
        parts = [(f"{name}[{k}]", value, shape[0]) for k, value in enumerate(content)]
    elif isinstance(shape, dict) and isinstance(content, dict):
        prefix = f"{name}." if name else ""
        shapes = dict.fromkeys(content, shape[str]) if str in shape else {}
        shapes |= {key: of_key for key, of_key in shape.items() if key is not str}
        parts = [(f"{prefix}{key}", content.get(key, _MISSING), of_key) for key, of_key in shapes.items()]
    else:
        is_right = not isinstance(shape, list | dict) and isinstance(content, shape)
        return [] if is_right else [name]
    return [wrong for part, value, of_part in parts for wrong in wrong_parts(value, of_part, part)]


def refuse_damage(path, wrong):
    """Raise ValueError with the path and the names of its wrong parts, a list of str, if there are any."""
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{path} is damaged: {', '.join(wrong[:3])}{more} missing or wrong. Remove it and run again."
        )


def read_result(path):
    """Content of the result file of one run, with the same errors as :func:`read_json`."""
    result = read_json(path, RESULT)
    metrics, names = result["metrics"], result["class_names"]
    flips = result.get("metrics_with_averaged_flips")
    is_right = {
        "arm": f"{result['arm']}-seed{result['seed']}.json" == Path(path).name,
        "minority_classes": set(result["minority_classes"]) <= set(names) & metrics["per_class"].keys(),
        "metrics.confusion_matrix": [len(row) for row in metrics["confusion_matrix"]]
        == len(names) * [len(names)],
        # The majority's recall is None if every class is a minority.
        "metrics": _are_numbers(metrics, "macro_f1", "g_mean")
        and isinstance(metrics.get("majority_recall"), Real | None),
        "metrics.minority.f1": _are_numbers(metrics["minority"], "f1"),
        "best_look_at_test": _are_numbers(result["best_look_at_test"], "test_accuracy"),
        # None for data whose mirror images are of other classes.
        "metrics_with_averaged_flips": flips is None
        or isinstance(flips, dict)
        and _are_numbers(flips, "accuracy"),
        "probabilities": not _wrong_probabilities(result.get("probabilities")),
        # Arms without Stable Diffusion do not have it.
        "stable_diffusion_images": "stable_diffusion_images" not in result
        or not wrong_parts(result["stable_diffusion_images"], CACHE_OF_IMAGES),
        "history": len(result["history"]) > 0,
        "test_predictions": _fit(result["test_predictions"].split(), metrics["confusion_matrix"]),
    }
    refuse_damage(path, [name for name, right in is_right.items() if not right])
    return result


def _are_numbers(record, *names):
    """Whether those of these parts are numbers that a record has; older results lack some."""
    return all(isinstance(record[name], Real) for name in names if name in record)


def _fit(predictions, confusion_matrix):
    """Whether predicted classes (a list of str) are as many of each class as the columns of the matrix say."""
    if not all(map(str.isdecimal, predictions)):
        return False
    columns = [sum(column) for column in zip(*confusion_matrix, strict=False)]
    return Counter(map(int, predictions)) == Counter(dict(enumerate(columns)))


def _wrong_probabilities(probabilities):
    if probabilities is None:
        return []
    minority = probabilities.get("minority") if isinstance(probabilities, dict) else None
    return wrong_parts(probabilities, PROBABILITIES) + (
        wrong_parts(minority, RANKING) if minority is not None else []
    )


def predictions_of(result):
    """Predicted classes of a result, int array of shape (n,), one per test image in the test set's order."""
    return np.array(result["test_predictions"].split(), dtype=int)


def minority_of(result):
    """The class numbers of a result's minority: a list of int."""
    return [result["class_names"].index(name) for name in result["minority_classes"]]


def configuration_of(result):
    """Recipe and network of a result (dict). What could not be chosen when it was obtained has its default."""
    return with_defaults(result["configuration"])


def precision_of(configuration):
    """The type in which convolutions ran, from a configuration; older ones say only whether it was bfloat16."""
    return configuration.get("precision") or ("bfloat16" if configuration.get("bfloat16") else "float32")


def with_defaults(settings):
    """Settings of a recipe and a network (dict), completed by the defaults of those that could not be chosen then."""
    return Recipe(steps=1).as_json() | {"mirrored": False} | settings


def network_name(network):
    """A network in words, from a dict with its ``width``, ``downsampling`` and ``mirrored``."""
    filters = " and filters in mirrored pairs" if network["mirrored"] else ""
    return f"ResNet-18 of width {network['width']} with {network['downsampling']}{filters}"

"""Where results, plots and weights lie, and how results are read. Nothing here trains, samples or downloads.

study = Study("cpu", "cifar10", "cat-50")
study.result_path("smote", seed=0)            # results/cpu/cat-50/smote-seed0.json
study.image_path("cm_nsd.png")                # images/cm_nsd.png
results = study.load_results()                # arm name -> its results, a dict per seed
results["smote"][0]["metrics"]["minority"]["recall"]
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from Arms import ARMS, PROFILES, REFERENCE_SPLIT
from Runtime import atomic_path


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
        """``images/<file name>`` for evidence on the reference split, else in a subfolder of ``images``."""
        return self._output_path("images", file_name)

    def model_path(self, file_name):
        """``models/<file name>`` for evidence on the reference split, else in a subfolder of ``models``."""
        return self._output_path("models", file_name)

    def _output_path(self, kind, file_name):
        if self.settings.evidence and self.data == "cifar10" and self.split == REFERENCE_SPLIT:
            return Path(kind, file_name)
        prefix = "" if self.data == "cifar10" else f"{self.data}_"
        return Path(kind, self.profile, self.folder, prefix + file_name)

    def weights_path(self, arm_name, seed=0):
        """Where an arm's trained network goes."""
        suffix = f"-seed{seed}" if seed else ""
        return self.model_path(f"{ARMS[arm_name].weights_name}{suffix}.pt")

    def plot_paths(self, arm_name):
        """Where an arm's confusion matrix and learning curves go, in this order."""
        return [self.image_path(f"{kind}_{ARMS[arm_name].image_tag}.png") for kind in ("cm", "test")]

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
        results = {}
        for arm_name in ARMS:
            paths = self.record_path("").glob(f"{arm_name}-seed*.json")
            found = [read_json(path) for path in sorted(paths)]
            if found:
                results[arm_name] = sorted(found, key=lambda result: result["seed"])
        return results

    # --- Test labels: kept beside the predictions, so that results can be judged without the data ---

    def save_test_labels(self, y_test):
        """Write the true classes of the test set once, int array of shape (n,)."""
        path = self.record_path("test-labels.txt")
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text(" ".join(map(str, y_test)) + "\n", encoding="utf-8")

    def load_test_labels(self):
        """True classes of the test set, int array of shape (n,), in the order of the predictions."""
        return np.array(self.record_path("test-labels.txt").read_text().split(), dtype=int)


def read_json(path):
    """Content of a JSON file of ``results/``; ValueError with what to do if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}). Remove it and run again.") from error


def predictions_of(result):
    """Predicted classes of a result, int array of shape (n,), one per test image in the test set's order."""
    return np.array(result["test_predictions"].split(), dtype=int)

"""Train a method on a development split, score it on validation images, and keep the result.

    run_method(data, "adjusted", "dog-50", seed=0, budget=Budget(width=16, steps=2000))

The result goes to ``results/development/``. It is read if it is there, so that nothing is trained twice.
"""

from dataclasses import dataclass
from pathlib import Path

from Arms import PROFILES
from ClassifierNetwork import channel_statistics, create_classifier, evaluate_classifier
from ClassifierTraining import Recipe
from DevelopmentReport import FOLDER, RUN
from DevelopmentSplits import development_data, development_generator, held_out_set, validation_scores
from Files import require_same_settings, require_writable, save_json
from GANNetworks import load_generator
from Methods import find_method
from Precision import precision_name
from Repeatability import checksum
from Results import read_json, with_defaults
from Runtime import choose_device, code_version, describe_hardware

code_version()  # read and cached now: a commit made during a training is not the code that ran


@dataclass(frozen=True)
class Budget:
    """Network and recipe of all methods that are compared.

    Attributes
    ----------
    width, steps : int
    profile : str or None
        The key of :data:`Arms.PROFILES` that decides all else: see :meth:`of_profile`.
    """

    width: int
    steps: int
    profile: str | None = None

    @classmethod
    def of_profile(cls, name):
        """Network and recipe of a profile of the study, by its name.

        A profile with the usual network and recipe is the same as its width and steps, and shares their results.
        """
        settings = PROFILES[name]
        is_usual = not settings.mirrored and not settings.recipe_changes
        return cls(settings.width, settings.steps, None if is_usual else name)

    @property
    def folder(self):
        return FOLDER / (self.profile or f"width{self.width}-steps{self.steps}")

    @property
    def network(self):
        """A dict of arguments of :func:`ClassifierNetwork.create_classifier`."""
        mirrored = self.profile is not None and PROFILES[self.profile].network(flip=True)["mirrored"]
        return {"width": self.width, "mirrored": mirrored}

    def path(self, method_name, split_name, seed):
        """Where the result of a run goes."""
        return self.folder / split_name / f"{method_name}-seed{seed}.json"

    def recipe(self, method):
        """The training recipe of a :class:`Methods.Method`."""
        changes = PROFILES[self.profile].changes(flip=True) if self.profile else {}
        return Recipe(steps=max(1, round(self.steps / method.compute)), **changes | method.changes)


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
        wanted = recipe.as_json() | budget.network | {"definition": method.definition}
        require_same_settings(path, with_defaults(result | result["recipe"]), wanted)
        return result
    require_writable(path)
    device, commit = choose_device(device), code_version()
    rest, classes = held_out_set(data), len(data.class_names)
    development = development_data(rest, split_name)
    generator = None
    if method.needs_gan:  # trained as the study's, on the development split
        generator = load_generator(development_generator(rest, split_name, device), device)
    X, y = method.fit_resample(development.X, development.y, seed=seed, generator=generator)
    model = create_classifier(
        classes, mean_std=channel_statistics(X), seed=seed, device=device, cosine_head=method.cosine_head,
        **budget.network,
    )  # fmt: skip
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
        **budget.network,
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
    method.remove_checkpoints(checkpoint)
    return result

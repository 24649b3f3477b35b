"""Train a method on a development split, score it on validation images, and keep the result.

    run_method(data, "adjusted", "dog-50", seed=0, budget=Budget(width=16, steps=2000))

The result goes to ``results/development/``. It is read if it is there, so that nothing is trained twice.
"""

from dataclasses import dataclass
from pathlib import Path

from ClassifierNetwork import channel_statistics, create_classifier, evaluate_classifier
from ClassifierTraining import Recipe
from DevelopmentReport import FOLDER, RUN
from DevelopmentSplits import development_data, development_generator, held_out_set, validation_scores
from Methods import find_method
from Precision import precision_name
from Results import read_json
from Runtime import (
    checksum,
    choose_device,
    code_version,
    describe_hardware,
    require_same_settings,
    require_writable,
    save_json,
)

code_version()  # read and cached now: a commit made during a training is not the code that ran


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
        generator = development_generator(rest, split_name, device)
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
    method.remove_checkpoints(checkpoint)
    return result

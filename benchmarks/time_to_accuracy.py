"""What does which accuracy cost? Compute, seconds and test accuracy of training recipes.

    python benchmarks/time_to_accuracy.py --series ablation --seed 0 1
    python benchmarks/time_to_accuracy.py --series target --seed 0 1

Each run writes ``results/benchmarks/time_to_accuracy/<name>-seed<k>.json``. A finished run is not run again. A killed
run continues, unless it keeps more than a checkpoint holds. The last weights are evaluated. The training data is
balanced CIFAR-10 unless a line says otherwise.

The test accuracy of the ablation chose the defaults of :class:`ClassifierTraining.Recipe` and average pooling, on the
balanced data set, which is the ceiling's. No other arm of the study took part in that choice.
"""

import argparse
import sys
from dataclasses import asdict
from numbers import Real
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_candidates import SERIES

from Arms import ARMS, REFERENCE_SPLIT
from ClassifierNetwork import evaluate_classifier
from ClassifierTraining import count_training_flops
from Experiment import make_training_set
from Files import save_json
from ImbalancedCIFAR10 import load_cifar10, split_from_name
from Precision import precision_name
from Results import HARDWARE, Study, precision_of, read_json
from Runtime import choose_device, code_version, describe_hardware, hardware_text
from Utils import markdown_table

FOLDER = Path("results", "benchmarks", "time_to_accuracy")
RECORD = {  # what :func:`table` asks of a run, see Results.read_json
    "seed": int, "width": int, "passes": Real, "pflops": Real, "accuracy": Real, "accuracy_with_averaged_flips": Real,
    "seconds": Real, "hardware": HARDWARE,
}  # fmt: skip


# --- Running ------------------------------------------------------------------------------------


def run(name, candidate, data, seed, device=None):
    """Train and evaluate one candidate, or return its result if it is finished.

    Parameters
    ----------
    name : str
        Of the candidate, for the file of the result.
    candidate : Candidate
    data : ImbalancedCIFAR10.ImageDataSet
    seed : int
    device : str or torch.device, optional
        Default: the fastest there is.

    Returns
    -------
    dict
        The content of the JSON file.

    Raises
    ------
    ValueError
        If the result was obtained with other settings.
    """
    path = FOLDER / f"{name}-seed{seed}.json"
    recipe = candidate.recipe(len(data.y_train))
    if path.exists():
        result = read_json(path, RECORD)
        candidate.require_same_settings(path, result, recipe)
        return result
    device, commit = choose_device(device), code_version()
    X, y, loss = _training_set_and_loss(candidate.arm, data, seed, device)
    model = candidate.network(X, seed, device)
    flops = count_training_flops(model, recipe)
    checkpoint = Path("models", "checkpoints", FOLDER.name, path.with_suffix(".pt").name)
    history = candidate.train(
        model, X, y, recipe, seed=seed, loss=loss, checkpoint=checkpoint if candidate.resumable else None
    )
    plain = evaluate_classifier(model, data.X_test, data.y_test)
    mirrored = evaluate_classifier(model, data.X_test[:, :, ::-1], data.y_test)
    averaged = (plain.logits + mirrored.logits).argmax(axis=1)
    result = {
        "name": name,
        "what": candidate.what,
        "seed": seed,
        "width": candidate.width,
        "downsampling": model.downsampling,
        "passes": candidate.passes,
        "trained_on": candidate.arm,
        "recipe": asdict(recipe),
        "pflops": flops / 1e15,
        "seconds": sum(epoch["seconds"] for epoch in history),
        "accuracy": float((plain.predictions == data.y_test).mean()),
        "accuracy_with_averaged_flips": float((averaged == data.y_test).mean()),
        "final_train_loss": history[-1]["train_loss"],
        "precision": precision_name(device),
        "hardware": describe_hardware(device),
        "torch": torch.__version__,
        "commit": commit,
    }
    save_json(path, result)
    checkpoint.unlink(missing_ok=True)
    return result


def _training_set_and_loss(arm_name, data, seed, device):
    """Images and labels of an arm on the reference's split, and its loss (None for cross-entropy)."""
    study = Study("cpu", data.name, REFERENCE_SPLIT)  # the profile only matters to arms that need a GAN
    X, y = make_training_set(study, data, arm_name, seed, device)
    real_rows = len(y)
    if not ARMS[arm_name].whole_training_set:
        split = split_from_name(REFERENCE_SPLIT, data.y_train, data.class_names)
        real_rows = len(split.kept_rows(data.y_train))
    make_loss, sources = ARMS[arm_name].method.loss, np.arange(len(y)) >= real_rows
    return X, y, make_loss and make_loss(y, 10, sources)


# --- Report -------------------------------------------------------------------------------------


def load_runs(series):
    """Finished runs of a series: name -> list of results by ascending seed, in the order of the series."""
    found = {}
    for name in SERIES[series]:
        paths = FOLDER.glob(f"{name}-seed*.json")
        runs = [read_json(path, RECORD) for path in paths]
        if runs:
            found[name] = sorted(runs, key=lambda run: run["seed"])
    return found


def _mean_and_range(fractions):
    """``87.07 (86.73 to 87.40)``: mean in percent, and the lowest and highest of several seeds."""
    percents = 100 * np.array(fractions)
    seeds = f" ({percents.min():.2f} to {percents.max():.2f})" if len(percents) > 1 else ""
    return f"{percents.mean():.2f}{seeds}"


def table(series):
    """Markdown table of a series: what each line costs and reaches, mean and range over seeds.

    Only the targets have a time, because they ran alone. The lines of the ablation ran two at a time.
    """
    timed = series == "target"
    header = ["recipe", "width", "passes", "PFLOPs", "test accuracy (%)", "with averaged flips (%)", "seeds"]
    if timed:
        header.insert(4, "minutes")
    rows, hardware = [], {}
    for name, runs in load_runs(series).items():
        first = runs[0]
        cells = [
            SERIES[series][name].what, str(first["width"]), f"{first['passes']:g}", f"{first['pflops']:.3f}",
            _mean_and_range([run["accuracy"] for run in runs]),
            _mean_and_range([run["accuracy_with_averaged_flips"] for run in runs]),
            str(len(runs)),
        ]  # fmt: skip
        if timed:
            minutes = f"{np.median([run['seconds'] for run in runs]) / 60:.0f}"
            precision = precision_of(first)
            cells.insert(4, minutes if precision == "bfloat16" else f"{minutes} ({precision})")
        rows.append(cells)
        hardware |= {hardware_text(run["hardware"]): None for run in runs}
    text = markdown_table(header, rows)
    if not timed:
        return text
    return (
        f"{text}\n\nMinutes of training on {'; '.join(hardware)}, in bfloat16 unless the line says otherwise."
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Compute, seconds and accuracy of training recipes.")
    parser.add_argument("--series", choices=SERIES, default="ablation")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the series; default: all")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], metavar="N")
    options = parser.parse_args(arguments)
    names = options.only or list(SERIES[options.series])
    for name in names:
        if name not in SERIES[options.series]:
            parser.error(f"unknown recipe {name!r}; choose of {', '.join(SERIES[options.series])}")
    data = load_cifar10()
    for seed in options.seed:
        for name in names:
            result = run(name, SERIES[options.series][name], data, seed)
            print(f"{name}, seed {seed}: {result['accuracy']:.2%} for {result['pflops']:.3f} PFLOPs")
    print(table(options.series))


if __name__ == "__main__":
    main()

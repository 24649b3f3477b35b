"""How well can a network tell added images from real ones? A cue that one class alone has is a shortcut to its label.

    python CueStrength.py --split dog-50 ship-50

A small ResNet-18 learns to tell the images of a sampler from real ones, with equally many of each class, and is then
asked about images of the rare class: new ones of the sampler, and real ones that no sampler and no training has seen.
The area under the ROC curve (AUC) is the strength of the cue: 0.5 if there is none, 1 if each added image is recognised.

Reference: Geirhos et al. (2020), Shortcut learning in deep neural networks.
"""

import argparse
from functools import partial

import numpy as np
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

from BusyMachine import start_again_if_busy
from ClassifierNetwork import channel_statistics, create_classifier, predict_logits
from ClassifierTraining import Recipe, train_classifier
from DevelopmentReport import CUE, CUES, cue_table
from DevelopmentSplits import SPLITS, check_splits, development_data, held_out_set, prepare_images
from Experiment import seed_number
from Files import require_same_settings, save_json
from ImageOverSampler import source_balanced_strategy
from ImbalancedCIFAR10 import load_cifar10
from Methods import METHODS, sampling_seed
from Repeatability import derive_seed
from Results import read_json, with_defaults
from Runtime import choose_device, code_version, describe_hardware

# Name -> the method of Methods.py that adds such images to the rare class alone, with cross-entropy.
SAMPLERS = {
    "mild augmentation, black corners": "augmented-black-corners",
    "mild augmentation": "augmented",
    "mild augmentation, spectrum matched": "augmented-spectrum",
    "SMOTE": "smote",
    "Stable Diffusion": "stable",
    "Stable Diffusion, statistics matched": "stable-matched-statistics",
    "Stable Diffusion, spectrum matched": "stable-matched-spectrum",
}
WIDTH, RECIPE = 8, Recipe(steps=300, scales=(1.0,))  # small images would hide fine cues
TESTED = 500  # images of each source

code_version()  # read and cached now: a commit made during a training is not the code that ran


def cue_strength(
    X, y, unseen, rare, sampler, *, seed=0, recipe=RECIPE, width=WIDTH, tested=TESTED, device=None
):
    """Train a network to tell a sampler's images from real ones, and test it on a rare class.

    Parameters
    ----------
    X, y : ndarrays of uint8, shape (n, height, width, 3), and int64, shape (n,)
        The imbalanced training set.
    unseen : ndarray of uint8, shape (m, height, width, 3)
        Real images of the rare class that are not in ``X``.
    rare : int
        The number of that class.
    sampler : imbalanced-learn over-sampler
        Its ``sampling_strategy`` is replaced, so that each class gets images.
    seed : int
    recipe : ClassifierTraining.Recipe
    width : int
        Of the ResNet-18.
    tested : int
        Images of each source to test on.
    device : str or torch.device, optional

    Returns
    -------
    float
        Area under the ROC curve.

    Raises
    ------
    ValueError
        If there are too few images of the rare class to test on.
    """
    strategy = partial(source_balanced_strategy, share=0.25)
    sampler = clone(sampler).set_params(sampling_strategy=strategy, random_state=sampling_seed(seed))
    real, statistics = len(y), channel_statistics(X)
    X, y = sampler.fit_resample(X, y)
    added = np.arange(len(y)) >= real
    rng = np.random.default_rng(derive_seed(seed, 6))
    rare_added = rng.permutation(np.flatnonzero(added & (y == rare)))
    rare_real = rng.permutation(len(unseen))
    if min(len(rare_added) // 2, len(rare_real)) < tested:
        raise ValueError(
            f"{tested} images of each source are to be tested, but there are {len(rare_added)} added and "
            f"{len(rare_real)} real ones of the rare class. Test fewer."
        )
    training = _equally_many(y, added, rng, without=rare_added[:tested])
    model = create_classifier(2, width, statistics, seed, device)
    train_classifier(model, X[training], added[training].astype(np.int64), recipe, seed=seed)
    images = np.concatenate([X[rare_added[:tested]], unseen[rare_real[:tested]]])
    labels = np.repeat([1, 0], tested)
    logits = predict_logits(model, images)
    return float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))


def _equally_many(y, added, rng, without):
    """Rows with as many real as added images of each class, so that no class is a cue."""
    rows = []
    usable = np.ones(len(y), dtype=bool)
    usable[without] = False
    for c in np.unique(y):
        groups = [rng.permutation(np.flatnonzero((y == c) & (added == source) & usable)) for source in (0, 1)]
        rows += [group[: min(map(len, groups))] for group in groups]
    return np.sort(np.concatenate(rows))


def measure(data, name, split_name, seed, device=None):
    """Measure one sampler on one development split, or return the finished result: a dict."""
    path = CUES / split_name / f"{name.replace(',', '').replace(' ', '-')}-seed{seed}.json"
    settings = RECIPE.as_json() | {"width": WIDTH, "tested": TESTED}
    if path.exists():
        result = read_json(path, CUE)
        require_same_settings(path, with_defaults(result["configuration"]), settings)
        return result
    commit = code_version()
    development = development_data(held_out_set(data), split_name)
    unseen = development.X_val[development.y_val == development.minority]
    sampler = METHODS[SAMPLERS[name]].sampler
    auc = cue_strength(
        development.X, development.y, unseen, development.minority, sampler, seed=seed, device=device
    )
    result = {
        "sampler": name, "method": SAMPLERS[name], "split": split_name, "seed": seed, "auc": auc, "configuration": settings,
        "hardware": describe_hardware(choose_device(device)), "commit": commit,
    }  # fmt: skip
    save_json(path, result)
    return result


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Measure how well added images can be told from real ones.")
    add = parser.add_argument
    add("--split", nargs="+", default=SPLITS, help=f"development splits (default: {' '.join(SPLITS)})")
    add("--seed", nargs="+", type=seed_number, default=[0], help="seeds (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the fastest there is")
    options = parser.parse_args(arguments)
    try:
        data = load_cifar10()
        rest = held_out_set(data)
        check_splits(rest, options.split)
        prepare_images(rest, options.split)
        for seed in options.seed:
            for split_name in options.split:
                for name in SAMPLERS:
                    result = measure(data, name, split_name, seed, options.device)
                    print(f"{name}, {split_name}, seed {seed}: AUC {result['auc']:.3f}", flush=True)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(cue_table())


if __name__ == "__main__":
    start_again_if_busy()
    main()

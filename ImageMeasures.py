"""Measure the images that arms add to the rare class: quality, near copies, and the cue that tells them from real ones.

    python ImageMeasures.py --profile cpu

What they say about the worth of the images to a classifier is the question of ``Usefulness.py``.
"""

import argparse

from sklearn.base import clone

from Arms import ARMS, COMMITTED_PROFILE, PROFILES, REFERENCE_SPLIT, ArmUnavailableError
from BusyMachine import start_again_if_busy
from CueStrength import RECIPE, TESTED, WIDTH, cue_strength
from Experiment import make_training_set
from Files import require_same_settings, save_json
from GANNetworks import load_generator
from ImageCache import cache_checksum
from ImageOverSampler import added_images
from ImbalancedCIFAR10 import load_cifar10, split_from_name
from QualityExperiment import judge_generated_images
from Results import CUES, Study, read_json
from Runtime import choose_device, code_version, describe_hardware
from Usefulness import MEASURED

code_version()  # read and cached now: a commit made during a training is not the code that ran


def measure_images(study, data, arms=MEASURED, device=None):
    """Measure the images that arms add to the first minority class, and keep the outcome in two files.

    These are ``generated-images.json`` (see :func:`QualityExperiment.judge_generated_images`) and ``cues.json``. The
    real images that a measure compares with are the class's test images, which no sampler and no training sees.
    Nothing is chosen by the outcome. What was measured before is not measured again.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet
    arms : sequence of str
        Keys of :data:`Arms.ARMS` that add images.
    device : str or torch.device, optional
        Default: the fastest there is.

    Raises
    ------
    ArmUnavailableError
        If the images of an arm are not available.
    ValueError
        If the cues were measured with other settings or another generator, other images were judged that are not among
        these arms', or there are too few images to test on.
    """
    split = split_from_name(study.split, data.y_train, data.class_names)
    X, y = split.cut(data.X_train, data.y_train)
    minority = split.minority_classes[0]
    images = {}
    for name in arms:
        X_arm, y_arm = make_training_set(study, data, name, device=device)
        images[name] = added_images(X_arm, y_arm, len(y), minority)
    judge_generated_images(study, data, images, device)
    _measure_cues(study, X, y, data.X_test[data.y_test == minority], minority, arms, choose_device(device))


def _measure_cues(study, X, y, unseen, minority, arms, device):
    path = study.record_path("cues.json")
    tested = min(TESTED, len(unseen))
    settings = RECIPE.as_json() | {"width": WIDTH, "tested": tested}
    sources = {name: _source_of_images(study, name) for name in arms}
    cues = {"configuration": settings, "auc": {}, "sources": {}}
    if path.exists():
        cues = read_json(path, CUES)
        require_same_settings(path, cues["configuration"], settings)
        # Cues of another generator's images, or of another cache's, say nothing about these.
        known = {name: source for name, source in cues["sources"].items() if name in sources}
        require_same_settings(path, known, {name: sources[name] for name in known})
    for name in arms:
        if name not in cues["auc"]:
            sampler = clone(ARMS[name].method.sampler)
            if ARMS[name].needs_gan:
                sampler.set_params(generator=load_generator(study.model_path("generator.pt"), device))
            cues["auc"][name] = cue_strength(X, y, unseen, minority, sampler, tested=tested, device=device)
            cues["sources"][name] = sources[name]
            cues |= {"hardware": describe_hardware(device), "commit": code_version()}
            print(f"{name}: AUC of the cue {cues['auc'][name]:.3f}", flush=True)
            save_json(path, cues)


def _source_of_images(study, arm_name):
    """Checksum of what an arm takes its images from, the generator or the cache; None if it makes them itself."""
    if ARMS[arm_name].needs_gan:
        return study.generator_checksum()
    return cache_checksum() if ARMS[arm_name].needs_stable_diffusion else None


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Measure the images that arms add to the rare class.")
    add = parser.add_argument
    add("--profile", choices=list(PROFILES), default=COMMITTED_PROFILE, help=f"default: {COMMITTED_PROFILE}")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the fastest there is")
    options = parser.parse_args(arguments)
    try:
        study = Study(options.profile, "cifar10", REFERENCE_SPLIT)
        data = load_cifar10().part(study.settings.most_images_a_class)
        measure_images(study, data, device=options.device)
    except (ValueError, OSError, FloatingPointError, ArmUnavailableError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    start_again_if_busy()
    main()

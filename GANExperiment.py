"""The study's GAN: trained once per study from the ground up, and kept for all arms and seeds that use it.

    generator = prepare_generator(study, data)          # a path; trained now if it is not there
    X_res, y_res = ARMS["gan"].fit_resample(X, y, seed=0, generator=generator)

``GAN_Main.ipynb`` shows the same training step by step.
"""

import math
from dataclasses import asdict, replace
from importlib.metadata import version

import numpy as np

from Arms import ArmUnavailableError
from Files import one_process_at_a_time, require_same_settings, require_writable, save_array, save_json
from GANGeneration import GANCollapseError, train_gan
from GANNetworks import save_discriminator, save_generator
from GANTrainingStep import count_flops
from GenerationQuality import frechet_distance_to
from ImbalancedCIFAR10 import split_from_name
from Precision import precision_name
from QualityExperiment import classifier_features
from Runtime import choose_device, code_version, describe_hardware

code_version()  # read and cached now: a commit made during a training is not the code that ran


def gan_settings(study, data):
    """The :class:`GANTrainingStep.GANSettings` of the study's profile; images are flipped if the data allows it."""
    return replace(study.settings.gan, flip=data.mirrored_images_keep_their_class)


def quality_measure(X, y, features, images):
    """The measure that chooses a generator: the Fréchet distance to the kept training images.

    Every class has the same weight: the first images of the full classes are taken, the minority's several times.
    Removed images and the test set have no part in it.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, 32, 32, 3)
        The imbalanced training set.
    y : ndarray of int64, shape (n,)
    features : GenerationQuality.ImageFeatures
    images : int
        Number of real images to compare with, over all classes.

    Returns
    -------
    callable
        ``quality(images, labels) -> float``, smaller is better. Its ``description`` names the features.
    """
    classes = np.unique(y)
    rows = [np.resize(np.flatnonzero(y == c), images // len(classes)) for c in classes]
    distance = frechet_distance_to(X[np.concatenate(rows)], features)

    def quality(images, labels):
        return distance(images)

    quality.description = features.name
    return quality


def is_trained(study, data):
    """Whether the study's generator is trained and kept.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet

    Raises
    ------
    ValueError
        If the kept GAN was trained with other settings.
    """
    path, record, settings = _generator_path(study), _record_path(study), _settings_and_data(study, data)
    if not (path.exists() and record.exists()):
        return False
    require_same_settings(record, study.read_gan_record()["settings"], settings)
    return True


def gan_lock(study):
    """Context in which only one process at a time trains and keeps the study's GAN. The others wait.

    Call :func:`is_trained` inside it: another process may have trained the GAN meanwhile.

    Parameters
    ----------
    study : Results.Study
    """
    return one_process_at_a_time(_generator_path(study), "trains this GAN")


def save_gan(study, data, run, quality_name):
    """Keep a finished training: both networks, the snapshots, and the record ``gan.json``.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet
    run : GANGeneration.GANRun
        From :func:`GANGeneration.train_gan` with ``gan_settings(study, data)``.
    quality_name : str
        Name of the features behind the quality measure.
    """
    settings, classes = gan_settings(study, data), len(data.class_names)
    device = next(run.generator.parameters()).device
    record = {
        "data": study.data,
        "split": study.split,
        "profile": study.profile,
        "class_names": list(data.class_names),
        "settings": _settings_and_data(study, data),
        "parameters": {
            "generator": sum(p.numel() for p in run.generator.parameters()),
            "discriminator": sum(p.numel() for p in run.discriminator.parameters()),
        },
        "petaflops": count_flops(settings, classes) * settings.steps / 1e15,
        "chosen_by": f"Fréchet distance to the kept training images, classes weighted equally; {quality_name}",
        "best_step": run.best_step,
        "seconds": {
            "training": sum(record["seconds"] for record in run.history),
            "judging": sum(record["seconds_of_quality"] for record in run.history),
        },
        "hardware": describe_hardware(device),
        "precision": precision_name(device),
        "versions": {"torch": version("torch"), "commit": code_version()},
        "history": [_without_nan(record) for record in run.history],
    }
    path = _generator_path(study)
    require_writable(*_outputs(study))
    path.unlink(missing_ok=True)  # so that an earlier generator is never taken for this record's
    study.record_path("generated-images.json").unlink(missing_ok=True)  # it judges the earlier generator
    save_array(study.record_path("gan-snapshots.npy"), run.snapshots)
    save_json(_record_path(study), record)
    save_discriminator(run.discriminator, study.model_path("discriminator.pt"))
    save_generator(run.generator, path)  # last: it marks the training as finished
    study.checkpoint_path("gan").unlink(missing_ok=True)


def prepare_generator(study, data, device=None):
    """Train the GAN of a study if it is not trained yet, and return where its generator is.

    One GAN serves all arms and seeds of a study. It sees the kept training images and nothing else.
    A killed training continues. A second process waits for the first and then reads what it made.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet
    device : str or torch.device, optional
        Default: the fastest there is.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ArmUnavailableError
        If a class has fewer than 2 images, or the training collapsed.
    ValueError
        If the kept GAN was trained with other settings, or the quality of a generator is not finite.
    OSError
        If an output cannot be written. That is noticed before the training.
    """
    path = _generator_path(study)
    if is_trained(study, data):
        return path
    split = split_from_name(study.split, data.y_train, data.class_names)
    X, y = split.cut(data.X_train, data.y_train)
    if np.bincount(y).min() < 2:
        raise ArmUnavailableError(f"a GAN needs 2 images of each class, but a class of {study.split} has 1")
    with gan_lock(study):
        if not is_trained(study, data):
            _train_and_save(study, data, X, y, choose_device(device))
    return path


def _train_and_save(study, data, X, y, device):
    require_writable(*_outputs(study))
    settings, checkpoint = gan_settings(study, data), study.checkpoint_path("gan")
    features = classifier_features(study, data, device)
    try:
        run = train_gan(
            X,
            y,
            settings,
            seed=0,
            num_classes=len(data.class_names),
            quality=quality_measure(X, y, features, settings.quality_images),
            checkpoint=checkpoint,
            device=device,
        )
    except GANCollapseError as error:
        raise ArmUnavailableError(
            f"the GAN collapsed. {error} Change the GAN settings of the profile {study.profile!r} in Arms.py and "
            f"remove {checkpoint}"
        ) from error
    save_gan(study, data, run, features.name)


def _settings_and_data(study, data):
    """What two trainings must have in common to give the same GAN, a dict of plain values."""
    return asdict(gan_settings(study, data)) | {"most_images_a_class": data.most_images_a_class}


def _without_nan(record):
    """The record, with None for a quality that could not be measured: JSON has no NaN."""
    quality = record["quality"]
    return record if quality is None or math.isfinite(quality) else record | {"quality": None}


def _outputs(study):
    networks = [_generator_path(study), study.model_path("discriminator.pt")]
    return [*networks, _record_path(study), study.record_path("gan-snapshots.npy")]


def _generator_path(study):
    return study.model_path("generator.pt")


def _record_path(study):
    return study.record_path("gan.json")

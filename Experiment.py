"""One arm of the study: a method x a split x a seed, under a profile. Also a command line.

    python Experiment.py --arm imbalanced stable --split cat-50 --seed 0 --profile cpu
    accelerate launch Experiment.py --arm all --seed 0 1 2      # spread over all GPUs
    python Experiment.py --help

An arm cuts the split, rebalances it, trains the classifier for the profile's number of steps, judges
its last weights on the untouched test set, and writes ``results/<profile>/<split>/<arm>-seed<k>.json``,
weights and plots. An arm whose result is there is not run again; a killed one continues.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from imblearn.over_sampling import SMOTE, RandomOverSampler

from CandidateImages import CandidateMaker, GenerationSettings
from CIFAKE import import_cifake
from ClassifierNetwork import (
    Recipe,
    ResNet18,
    channel_statistics,
    count_training_flops,
    create_classifier,
    evaluate_classifier,
    load_classifier,
    save_classifier,
    train_classifier,
)
from GANGeneration import (
    GAN_SETTINGS,
    GANCollapseError,
    GANOverSampler,
    count_flops,
    load_generator,
    save_discriminator,
    save_generator,
    train_gan,
)
from GenerationQuality import (
    FeaturesUnavailableError,
    ImageFeatures,
    InceptionFeatures,
    frechet_distance_to,
    generation_quality,
    memorisation,
)
from ImageOverSampler import source_balanced_strategy
from ImbalancedCIFAR10 import load_data, split_from_name
from NonSyntheticGeneration import AugmentationOverSampler
from Runtime import (
    atomic_path,
    checksum,
    choose_device,
    code_version,
    derive_seed,
    describe_hardware,
    require_same_settings,
    save_json,
    start_processes,
    uses_bfloat16,
)
from StableDiffusionGeneration import (
    CACHE,
    SelectionError,
    StableDiffusionOverSampler,
    describe_cache,
    generate_images,
    preset_at_hand,
)
from Utils import classification_metrics, plot_confusion_matrix, plot_learning_curves, save_figure

REFERENCE_SPLIT = "cat-50"
DIGITS_SPLIT = "8-0.01"


# --- Profiles -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """How much an arm may cost. Every arm of a profile has the same network and number of steps.

    Attributes
    ----------
    width : int
        Of the ResNet-18: 64 is standard, 42 the reference study's.
    steps : int
        Optimiser steps; cut to ``MOST_PASSES`` over the imbalanced set where that is small.
    evidence : bool
        Whether its results are meant to be committed and quoted. Others write their plots and weights
        into folders of their own, which git ignores.
    purpose : str
    """

    width: int
    steps: int
    evidence: bool
    purpose: str


MOST_PASSES = 60  # over the imbalanced set; only the small digits reach it
PROFILES = {
    "smoke": Profile(4, 6, False, "seconds: does it run? Its numbers mean nothing"),
    "quick": Profile(16, 350, False, "a first look on a CPU: about 90 seconds an arm on two cores"),
    "cpu": Profile(16, 2000, True, "evidence from two CPU cores: 5 to 10 minutes an arm"),
    "full": Profile(64, 7000, True, "evidence from a CUDA GPU: 40 passes, near the reference's 50"),
}


def resolve_profile(name="auto"):
    """Return ``(name, Profile)``; ``auto`` is ``full`` where CUDA is, else ``quick``.

    Raises
    ------
    ValueError
        For an unknown profile; it lists the valid ones.
    """
    if name == "auto":
        name = "full" if choose_device().type == "cuda" else "quick"
    if name not in PROFILES:
        raise ValueError(f"Unknown profile {name!r}. Choose one of auto, {', '.join(PROFILES)}.")
    return name, PROFILES[name]


# --- Arms ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One method of the comparison.

    Attributes
    ----------
    title : str
        For plots and tables.
    resample : callable
        ``(X, y, seed) -> X_res, y_res``, imbalanced-learn's ``fit_resample``; None adds nothing.
    image_tag, weights_name : str
        Parts of the file names ``images/cm_<image_tag>.png`` and ``models/<weights_name>.pt``.
    logit_adjusted : bool
        Whether the loss is adjusted by the class frequencies of each row's source.
    whole_training_set : bool
        Whether it trains on the uncut data: the ceiling.
    needs_stable_diffusion : bool
    needs_gan : bool
        Whether ``resample`` takes the trained generator as a fourth argument.
    story : bool
        Whether it belongs to the short story that ``Main.ipynb`` tells.
    """

    title: str
    image_tag: str
    weights_name: str
    resample: Callable | None = None
    logit_adjusted: bool = False
    whole_training_set: bool = False
    needs_stable_diffusion: bool = False
    needs_gan: bool = False
    story: bool = False


def _on_flat_pixels(sampler, dtype=np.uint8):
    """Run an imbalanced-learn sampler, which wants one row of features an image.

    A sampler that computes with pixels needs ``dtype`` float32: differences of uint8 wrap around.
    """

    def resample(X, y, seed):
        flat = X.reshape(len(X), -1).astype(dtype, copy=False)
        X_res, y_res = sampler(y, seed).fit_resample(flat, y)
        if dtype != np.uint8:
            X_res = np.rint(X_res, out=X_res).astype(np.uint8)
        return X_res.reshape(-1, *X.shape[1:]), y_res

    return resample


def _smote(y, seed):
    smallest = int(np.unique(y, return_counts=True)[1].min())
    if smallest < 2:
        raise ArmUnavailableError("SMOTE interpolates between images of a class, but one class has only one")
    return SMOTE(k_neighbors=min(5, smallest - 1), random_state=seed)


def _source_balanced(X, y, seed):
    strategy = source_balanced_strategy(y)
    return StableDiffusionOverSampler(sampling_strategy=strategy, random_state=seed).fit_resample(X, y)


def _gan(X, y, seed, generator):
    return GANOverSampler(generator=generator, random_state=seed).fit_resample(X, y)


def _gan_source_balanced(X, y, seed, generator):
    sampler = GANOverSampler(
        generator=generator, sampling_strategy=source_balanced_strategy(y), random_state=seed
    )
    return sampler.fit_resample(X, y)


ARMS = {
    "imbalanced": Arm("Imbalanced", "imbalanced", "resnet_imbalanced", story=True),
    "random-oversampling": Arm(
        "Random oversampling", "random_oversampling", "resnet_random_oversampling",
        _on_flat_pixels(lambda y, seed: RandomOverSampler(random_state=seed)),
    ),
    "smote": Arm("SMOTE", "smote", "resnet_smote", _on_flat_pixels(_smote, np.float32)),
    "non-synthetic-reference": Arm(
        "Non-synthetic, reference's augmentation", "nsd_reference", "resnet_non_synthetic_reference",
        lambda X, y, seed: AugmentationOverSampler(preset="reference", random_state=seed).fit_resample(X, y),
    ),
    "non-synthetic": Arm(
        "Non-synthetic, mild augmentation", "nsd", "resnet_non_synthetic",
        lambda X, y, seed: AugmentationOverSampler(random_state=seed).fit_resample(X, y),
        story=True,
    ),
    "gan": Arm("GAN, minority only", "gan", "resnet_gan", _gan, needs_gan=True),
    "gan-source-balanced": Arm(
        "GAN, source-balanced", "gan_source_balanced", "resnet_gan_source_balanced",
        _gan_source_balanced, needs_gan=True,
    ),
    "gan-source-balanced-adjusted": Arm(
        "GAN, source-balanced, logit-adjusted per source", "gan_source_balanced_adjusted",
        "resnet_gan_source_balanced_adjusted", _gan_source_balanced, logit_adjusted=True, needs_gan=True,
    ),
    "stable": Arm(
        "Stable Diffusion, minority only", "stable", "resnet_stable_diffusion",
        lambda X, y, seed: StableDiffusionOverSampler(random_state=seed).fit_resample(X, y),
        needs_stable_diffusion=True, story=True,
    ),
    "stable-source-balanced": Arm(
        "Stable Diffusion, source-balanced", "stable_source_balanced",
        "resnet_stable_diffusion_source_balanced", _source_balanced, needs_stable_diffusion=True,
    ),
    "logit-adjusted": Arm(
        "Logit-adjusted loss, no added image", "logit_adjusted", "resnet_logit_adjusted",
        logit_adjusted=True, story=True,
    ),
    "stable-source-balanced-adjusted": Arm(
        "Stable Diffusion, source-balanced, logit-adjusted per source",
        "stable_source_balanced_adjusted", "resnet_stable_diffusion_source_balanced_adjusted",
        _source_balanced, logit_adjusted=True, needs_stable_diffusion=True, story=True,
    ),
    "balanced": Arm(
        "Balanced (ceiling: no image removed)", "balanced", "resnet_balanced",
        whole_training_set=True,
    ),
}  # fmt: skip
STORY = tuple(name for name, arm in ARMS.items() if arm.story)
GAN_STORY = (
    "imbalanced", "logit-adjusted", "gan", "gan-source-balanced", "gan-source-balanced-adjusted",
)  # fmt: skip


UNFINISHED_CACHE = CACHE.with_name("stable_diffusion_unfinished.npy")


class ArmUnavailableError(RuntimeError):
    """The arm cannot run on this data set; the message says why."""


def find_arm(name):
    """Return the arm of that name, or raise ValueError with the valid names."""
    if name not in ARMS:
        raise ValueError(f"Unknown arm {name!r}. Choose one of {', '.join(ARMS)}.")
    return ARMS[name]


def prepare_stable_diffusion_images(data, *splits):
    """See to it that the cache of Stable Diffusion images is there, and say where they come from.

    In this order: the cache, if there is one; CIFAKE, from this machine or downloaded; generation, if
    there is a GPU and the weights of a preset are on this machine. Generation draws from text alone and
    looks at no image.

    Parameters
    ----------
    data : ImageDataSet
    *splits : Split
        Say how many images of each class are needed, for generation: the most counts. Default: that of the
        story.

    Returns
    -------
    str
        Where the images come from.

    Raises
    ------
    ArmUnavailableError
        If there are none for this data set.
    """
    if data.name != "cifar10":
        raise ArmUnavailableError(
            f"there are no Stable Diffusion images of {data.name}: the cache and CIFAKE hold CIFAR-10's classes"
        )
    if CACHE.exists():
        return f"the cache {CACHE}: {describe_cache()}"
    try:
        count = import_cifake()
    except OSError as error:
        reason = error
    else:
        return f"CIFAKE, {count:,} images imported into {CACHE}"
    preset = preset_at_hand()
    if preset is None:
        raise ArmUnavailableError(
            f"no Stable Diffusion images could be had: {str(reason).rstrip('.')}. Nor can they be generated "
            "here, which takes a GPU and a model's weights: see StableDiffusionGeneration.py"
        ) from reason
    counts = {}
    for split in splits or [split_from_name(default_split(data), data.y_train, data.class_names)]:
        y = data.y_train[split.kept_rows(data.y_train)]
        for c, wanted in source_balanced_strategy(y).items():
            counts[c] = max(counts.get(c, 0), wanted - int(np.sum(y == c)))
    maker = CandidateMaker(GenerationSettings(preset))
    try:
        for c, count in counts.items():
            # Into a file of its own, so that the cache appears when it is complete, and not before.
            generate_images(
                data.class_names[c], count, maker.settings, path=UNFINISHED_CACHE, maker=maker, replace=True
            )
    except (OSError, SelectionError, MemoryError) as error:
        raise ArmUnavailableError(f"generating Stable Diffusion images failed: {error}") from error
    for suffix in (".csv", CACHE.suffix):
        UNFINISHED_CACHE.with_suffix(suffix).rename(CACHE.with_suffix(suffix))
    return f"the preset {preset}, {sum(counts.values()):,} images generated into {CACHE}"


@dataclass(frozen=True)
class TrainingSet:
    """What an arm trains on: real rows first, then synthetic ones.

    Attributes
    ----------
    X : ndarray of uint8, shape (n, 32, 32, 3)
    y : ndarray of int64, shape (n,)
    real_rows : int
        The first rows up to this one are real.
    """

    X: np.ndarray
    y: np.ndarray
    real_rows: int

    @property
    def groups(self):
        """0 for real and 1 for synthetic rows: int64, shape (n,)."""
        return (np.arange(len(self.y)) >= self.real_rows).astype(np.int64)

    def counts(self, num_classes):
        """Real and synthetic images of each class, two int arrays of shape (num_classes,)."""
        return (
            np.bincount(self.y[: self.real_rows], minlength=num_classes),
            np.bincount(self.y[self.real_rows :], minlength=num_classes),
        )


def make_training_set(arm_name, data, split, seed=0, profile="auto", device=None):
    """Cut the split and rebalance it as the arm does.

    The removed images are dropped before any sampler is called.

    Parameters
    ----------
    arm_name : str
    data : ImageDataSet
    split : Split
    seed : int
    profile : str
        Only a GAN arm asks for it: its generator, trained now if it is not there, belongs to a profile.
    device : str or torch.device, optional
        For that training.

    Returns
    -------
    TrainingSet

    Raises
    ------
    ArmUnavailableError
        If the arm needs Stable Diffusion images and there are none, or SMOTE or a GAN and a class has one
        image.
    """
    arm = find_arm(arm_name)
    if arm.whole_training_set:
        return TrainingSet(data.X_train, data.y_train, len(data.y_train))
    if arm.needs_stable_diffusion:
        prepare_stable_diffusion_images(data, split)
    X, y = split.cut(data.X_train, data.y_train)
    if arm.resample is None:
        return TrainingSet(X, y, len(y))
    generator = ()
    if arm.needs_gan:
        generator = (load_generator(prepare_generator(data, split, profile, device), device),)
    X_res, y_res = arm.resample(X, y, derive_seed(seed, 2) % 2**32, *generator)
    return TrainingSet(X_res, y_res, len(y))


# --- Places -------------------------------------------------------------------------------------


def default_split(data):
    """Name of the split that the story is told on: cat-50, or 8-0.01 for the digits."""
    return REFERENCE_SPLIT if data.name == "cifar10" else DIGITS_SPLIT


def split_folder(data_name, split_name):
    """Folder name of a split; whatever is not CIFAR-10 carries its name."""
    return split_name if data_name == "cifar10" else f"{data_name}-{split_name}"


def result_path(profile_name, data_name, split_name, arm_name, seed):
    """``results/<profile>/<split>/<arm>-seed<k>.json``."""
    return Path("results", profile_name, split_folder(data_name, split_name), f"{arm_name}-seed{seed}.json")


def output_path(kind, profile_name, data_name, split_name, file_name):
    """Path of a plot or of weights.

    The evidence on the reference split has the plain names, such as ``images/cm_nsd.png``. Everything
    else lies deeper, and what is not CIFAR-10 says so in the file's name too.

    Parameters
    ----------
    kind : {'images', 'models'}
    profile_name, data_name, split_name, file_name : str
    """
    if PROFILES[profile_name].evidence and data_name == "cifar10" and split_name == REFERENCE_SPLIT:
        return Path(kind, file_name)
    prefix = "" if data_name == "cifar10" else f"{data_name}_"
    return Path(kind, profile_name, split_folder(data_name, split_name), prefix + file_name)


def _labels_path(profile_name, data_name, split_name):
    return result_path(profile_name, data_name, split_name, "", 0).with_name("test-labels.txt")


def save_test_labels(profile_name, data, split_name):
    """Keep the true classes once beside the predictions, so that results can be judged without data."""
    path = _labels_path(profile_name, data.name, split_name)
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(" ".join(map(str, data.y_test)) + "\n", encoding="utf-8")


def load_test_labels(profile_name, data_name, split_name):
    """True classes of the test set, int array of shape (n,), in the order of ``test_predictions``."""
    return np.array(_labels_path(profile_name, data_name, split_name).read_text().split(), dtype=int)


def read_result(path):
    """Content of a JSON file of ``results/``; ValueError with what to do if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}). Remove it and run again.") from error


def load_results(profile_name, data_name, split_name):
    """Read every finished result of a profile and split.

    Returns
    -------
    dict
        Arm name -> list of results by ascending seed; arms in the order of :data:`ARMS`.
    """
    results = {}
    for arm_name in ARMS:
        folder = result_path(profile_name, data_name, split_name, arm_name, 0).parent
        paths = sorted(folder.glob(f"{arm_name}-seed*.json"))
        found = [read_result(path) for path in paths]
        if found:
            results[arm_name] = sorted(found, key=lambda result: result["seed"])
    return results


# --- The GAN ------------------------------------------------------------------------------------


def classifier_features(data, split, profile="auto", device=None):
    """Features of the ResNet-18 that the arm ``imbalanced`` trains: the measure of generated images.

    They know the training images that the split keeps and nothing else. The network is trained if its
    weights are not there, or are those of a profile with another width.

    Parameters
    ----------
    data : ImageDataSet
    split : Split
    profile : str
    device : str or torch.device, optional

    Returns
    -------
    GenerationQuality.ImageFeatures
    """
    profile_name, settings = resolve_profile(profile)
    device = choose_device(device)
    weights = output_path("models", profile_name, data.name, split.name, "resnet_imbalanced.pt")
    if not weights.exists() or load_classifier(weights, device).width != settings.width:
        X, y = split.cut(data.X_train, data.y_train)
        recipe = profile_recipe(settings, len(y), data)
        model = create_classifier(len(data.class_names), settings.width, channel_statistics(X), seed=0)
        folder = split_folder(data.name, split.name)
        checkpoint = Path("models", "checkpoints", profile_name, folder, "features.pt")
        train_classifier(
            model, X, y, recipe, seed=0, device=device, checkpoint=checkpoint,
            description=f"the network that judges images, {folder}",
        )  # fmt: skip
        save_classifier(model, weights)
        checkpoint.unlink(missing_ok=True)
    network = load_classifier(weights, device)
    name = f"ResNet-18 of width {network.width} with {network.downsampling}, trained on {split.name} of {data.name}"
    return ImageFeatures(network.features, name, device)


def gan_path(profile_name, data_name, split_name):
    """``results/<profile>/<split>/gan.json``: settings, history and quality of the trained GAN."""
    return result_path(profile_name, data_name, split_name, "", 0).with_name("gan.json")


def prepare_generator(data, split, profile="auto", device=None):
    """See to it that the GAN of a split and profile is trained, and return where its generator is.

    One GAN serves every seed of the arms: the adversarial training belongs to split and profile. It
    sees what :meth:`ImbalancedCIFAR10.Split.cut` leaves, and nothing else. Which record's generator is
    taken is decided by the Fréchet distance to them, every class weighted equally (the first
    images of the full classes, the minority's several times), in the features of
    :func:`classifier_features`.

    Parameters
    ----------
    data : ImageDataSet
    split : Split
    profile : str
    device : str or torch.device, optional

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ArmUnavailableError
        If a class has fewer than 2 images, or the training collapsed.
    ValueError
        If the GAN that is there was trained with other settings.
    """
    profile_name, _ = resolve_profile(profile)
    device, commit = choose_device(device), code_version()
    place = (profile_name, data.name, split.name)
    path, result_at = output_path("models", *place, "generator.pt"), gan_path(*place)
    settings = replace(GAN_SETTINGS[profile_name], flip=data.mirrored_images_keep_their_class)
    if path.exists() and result_at.exists():
        require_same_settings(result_at, read_result(result_at)["settings"], asdict(settings))
        # The evidence profiles write to the same place: the file may be another one's.
        if load_generator(path, device).channels == settings.channels:
            return path
    X, y = split.cut(data.X_train, data.y_train)
    if np.bincount(y).min() < 2:
        raise ArmUnavailableError(f"a GAN needs 2 images of each class, but a class of {split.name} has 1")
    features = classifier_features(data, split, profile_name, device)
    rows = [
        np.resize(np.flatnonzero(y == c), settings.quality_images // len(data.class_names))
        for c in np.unique(y)
    ]
    distance = frechet_distance_to(X[np.concatenate(rows)], features)
    folder = split_folder(data.name, split.name)
    checkpoint = Path("models", "checkpoints", profile_name, folder, "gan.pt")
    try:
        run = train_gan(
            X, y, settings, seed=0, num_classes=len(data.class_names), device=device, checkpoint=checkpoint,
            quality=lambda images, labels: distance(images), description=f"training the GAN, {folder}",
        )  # fmt: skip
    except GANCollapseError as error:
        raise ArmUnavailableError(
            f"the GAN collapsed. {error} Change GAN_SETTINGS[{profile_name!r}] and remove {checkpoint}"
        ) from error
    result = {
        "data": data.name,
        "split": split.name,
        "profile": profile_name,
        "class_names": list(data.class_names),
        "settings": asdict(settings),
        "parameters": {
            "generator": sum(p.numel() for p in run.generator.parameters()),
            "discriminator": sum(p.numel() for p in run.discriminator.parameters()),
        },
        "petaflops": count_flops(settings, len(data.class_names)) * settings.steps / 1e15,
        "chosen_by": f"Fréchet distance to the kept training images, classes weighted equally; {features.name}",
        "best_step": run.best_step,
        "seconds": {
            "training": sum(record["seconds"] for record in run.history),
            "judging": sum(record["seconds_of_quality"] for record in run.history),
        },
        "hardware": describe_hardware(device),
        "versions": {"torch": version("torch"), "commit": commit},
        "history": run.history,
    }
    path.unlink(missing_ok=True)  # a former generator must not pass for the one of this result
    generation_path(*place).unlink(missing_ok=True)  # it judges another generator
    with atomic_path(result_at.with_name("gan-snapshots.npy")) as temporary:
        np.save(temporary, run.snapshots, allow_pickle=False)
    save_json(result_at, result)
    save_discriminator(run.discriminator, output_path("models", *place, "discriminator.pt"))
    save_generator(run.generator, path)  # its presence says that the training is finished
    checkpoint.unlink()
    return path


# --- Quality of generated images ----------------------------------------------------------------

JUDGED = ("non-synthetic", "gan", "stable")


def generation_path(profile_name, data_name, split_name):
    """``results/<profile>/<split>/generated-images.json``: the quality of each method's images."""
    return gan_path(profile_name, data_name, split_name).with_name("generated-images.json")


def generated_minority_images(arm_name, data, split, profile="auto", device=None):
    """What an arm (seed 0) adds to the first minority class: uint8 (n, 32, 32, 3)."""
    training_set = make_training_set(arm_name, data, split, 0, profile, device)
    synthetic = slice(training_set.real_rows, None)
    return training_set.X[synthetic][training_set.y[synthetic] == split.minority_classes[0]]


def judge_generated_images(data, split, profile="auto", device=None):
    """Judge what each method makes of the first minority class, once everything is trained.

    Generated images are compared with the class's test images, which no generator saw; nothing is
    chosen by it. Memorisation is looked for among the kept training images, and new real images (the
    same test images) are put to the same test, for they too lie near some training image.

    The outcome is kept until the GAN is trained anew. Evidence profiles judge with Inception's features where
    its weights can be had, else, like the other profiles, with those of :func:`classifier_features`.

    Parameters
    ----------
    data : ImageDataSet
    split : Split
    profile : str
    device : str or torch.device, optional

    Returns
    -------
    dict
        As it stands in ``results/<profile>/<split>/generated-images.json``: ``class``,
        ``share_of_copies_among_new_real_images``, ``methods`` (arm name -> the dict of
        :func:`GenerationQuality.generation_quality` with ``share_of_copies``).
    """
    profile_name, settings = resolve_profile(profile)
    device = choose_device(device)
    place = (profile_name, data.name, split.name)
    path = generation_path(*place)
    if path.exists():
        return read_result(path)
    c = split.minority_classes[0]
    X, y = split.cut(data.X_train, data.y_train)
    kept, unseen = X[y == c], data.X_test[data.y_test == c]
    generated = {}
    for name in JUDGED:
        try:
            generated[name] = generated_minority_images(name, data, split, profile_name, device)
        except ArmUnavailableError:
            continue
    features = None
    if settings.evidence:
        try:
            features = InceptionFeatures(device)
        except FeaturesUnavailableError as error:
            print(f"Judged with features of our own: {error}")
    features = features or classifier_features(data, split, profile_name, device)
    count = min(len(unseen), *(len(images) for images in generated.values()))
    rng = np.random.default_rng(0)
    judged = {
        "class": data.class_names[c],
        "share_of_copies_among_new_real_images": memorisation(kept, unseen, features).share_of_copies,
        "methods": {},
    }
    for name, images in generated.items():
        some = images[rng.choice(len(images), count, replace=False)]  # recall depends on their number
        judged["methods"][name] = generation_quality(unseen, some, features) | {
            "share_of_copies": memorisation(kept, images, features).share_of_copies
        }
    save_json(path, judged)
    return judged


# --- Running ------------------------------------------------------------------------------------


def profile_recipe(settings, rows, data):
    """The :class:`ClassifierNetwork.Recipe` of a profile for a training set of so many real ``rows``."""
    passes = max(1, rows // Recipe.batch_size)
    return Recipe(
        steps=min(settings.steps, MOST_PASSES * passes), flip=data.mirrored_images_keep_their_class,
    )  # fmt: skip


def _recipe_and_network(recipe, settings):
    return recipe.as_json() | {"width": settings.width, "downsampling": ResNet18.downsampling}


def number_of_looks(recipe, test_images):
    """How often a run looks at the test set: so seldom that it costs about 2 % of the run.

    Judging an image costs about half of training on it. Three looks are the fewest that make a curve; in
    short runs they cost more.
    """
    return max(3, int(0.02 * 2 * recipe.steps * recipe.batch_size / test_images))


def run_arm(
    arm_name, data, split_name=None, seed=0, profile="auto", device=None, processes=None
):  # fmt: skip
    """Run one arm, or return its result if it is finished.

    Parameters
    ----------
    arm_name : str
        A key of :data:`ARMS`.
    data : ImageDataSet
    split_name : str, optional
        See :func:`ImbalancedCIFAR10.split_from_name`. Default: :func:`default_split`.
    seed : int
        Of the sampler, the initial weights and the order of the images. The choice of the kept images
        belongs to the split (``cat-50@1`` is another choice), so that arms and seeds share them.
    profile : str
    device : str or torch.device, optional
    processes : accelerate.PartialState, optional
        If given, all its processes train this one network together, and the main one writes.

    Returns
    -------
    dict
        The result as it stands in its JSON file.

    Raises
    ------
    ValueError
        For an unknown arm, split or profile, or a result that was obtained with another recipe.
    ArmUnavailableError
        If the arm needs images that are not to be had.
    """
    arm = find_arm(arm_name)
    profile_name, settings = resolve_profile(profile)
    device, seed, commit = choose_device(device), int(seed), code_version()
    split = split_from_name(split_name or default_split(data), data.y_train, data.class_names)
    place = (profile_name, data.name, split.name)
    path = result_path(*place, arm_name, seed)
    data_parallel = processes is not None
    main_process = not data_parallel or processes.is_main_process
    finished = [path.exists()]
    if data_parallel:
        from accelerate.utils import broadcast_object_list  # here: it takes seconds to import

        broadcast_object_list(finished)  # all or none must go on
    recipe = profile_recipe(settings, len(split.kept_rows(data.y_train)), data)
    if finished[0]:
        finished = read_result(path)
        # Arms are compared with each other, so none may have been trained in another way.
        require_same_settings(path, finished["configuration"], _recipe_and_network(recipe, settings))
        if main_process and not all(plot.exists() for plot in _plot_paths(arm_name, *place)):
            save_arm_plots(arm_name, *place)  # killed after the result was written
        return finished

    if arm.needs_gan:
        prepare_generator(data, split, profile_name, device)  # its own time stands in gan.json
    started = time.perf_counter()
    training_set = make_training_set(arm_name, data, split, seed, profile_name, device)
    seconds_of_resampling = time.perf_counter() - started

    weights_name = arm.weights_name + (f"-seed{seed}" if seed else "")
    weights = output_path("models", *place, f"{weights_name}.pt")
    checkpoint = Path("models", "checkpoints", *path.with_suffix(".pt").parts[1:])
    model = create_classifier(len(data.class_names), settings.width, channel_statistics(training_set.X), seed)
    history = train_classifier(
        model, training_set.X, training_set.y, recipe, seed=seed, groups=training_set.groups,
        logit_adjusted=arm.logit_adjusted, test_data=(data.X_test, data.y_test),
        looks=number_of_looks(recipe, len(data.y_test)), minority_classes=split.minority_classes,
        checkpoint=checkpoint, device=device, data_parallel=data_parallel,
        description=f"{arm_name}, {split_folder(*place[1:])}, seed {seed}",
    )  # fmt: skip

    started = time.perf_counter()
    plain = evaluate_classifier(model, data.X_test, data.y_test, device=device)
    seconds_of_evaluation = time.perf_counter() - started

    def judge(predictions):
        return classification_metrics(data.y_test, predictions, data.class_names, split.minority_classes)

    flips = None
    if data.mirrored_images_keep_their_class:
        mirrored = evaluate_classifier(model, data.X_test[:, :, ::-1], data.y_test, device=device)
        flips = judge((plain.logits + mirrored.logits).argmax(axis=1))
        # Whole numbers that follow from the rest of the result would only make the file longer.
        del flips["confusion_matrix"], flips["per_class"]
    seen = [epoch for epoch in history if "test_accuracy" in epoch]
    best = max(seen, key=lambda epoch: epoch["test_accuracy"])
    real, synthetic = training_set.counts(len(data.class_names))
    result = {
        "arm": arm_name,
        "data": data.name,
        "split": split.name,
        "seed": seed,
        "profile": profile_name,
        "minority_classes": [data.class_names[c] for c in split.minority_classes],
        "class_names": list(data.class_names),
        "metrics": judge(plain.predictions) | {"loss": plain.loss},
        "metrics_with_averaged_flips": flips,
        "best_look_at_test": {  # the reference reports its best epoch; here it chooses nothing
            "looks": len(seen), **{key: best[key] for key in ("epoch", "test_accuracy", "test_minority_recall")}
        },
        "training_images": {"real": real.tolist(), "synthetic": synthetic.tolist()},
        # Tells whether two results had the same generator's images.
        "checksum_of_training_set": checksum(training_set.y, training_set.X),
        "configuration": _recipe_and_network(recipe, settings) | {
            "parameters": sum(p.numel() for p in model.parameters()),
            "logit_adjusted": arm.logit_adjusted,
            "processes": processes.num_processes if data_parallel else 1,
            "bfloat16": uses_bfloat16(device),
        },
        "training_pflops": count_training_flops(model, recipe, data.X_test.shape[1:3]) / 1e15,
        "seconds": {
            "resampling": seconds_of_resampling,
            "training": sum(epoch["seconds"] for epoch in history),
            "watching_the_test_set": sum(epoch["seconds_of_test"] for epoch in seen),
            "final_evaluation": seconds_of_evaluation,
        },
        "hardware": describe_hardware(device),
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "numpy", "scikit-learn", "imbalanced-learn")
        } | {"python": sys.version.split()[0], "commit": commit},
        "history": history,
        # One class number an image in the test set's order: whoever wants another metric or a
        # paired test can compute it without training anything.
        "test_predictions": " ".join(map(str, plain.predictions)),
    }  # fmt: skip
    if main_process:
        save_classifier(model, weights)
        save_test_labels(profile_name, data, split.name)
        save_json(path, result)  # last: its presence says that the arm is finished
        checkpoint.unlink(missing_ok=True)
        save_arm_plots(arm_name, profile_name, data.name, split.name)
    return result


def run_arms(
    arm_names, data, split_names=(None,), seeds=(0,), profile="auto", device=None,
    processes=None, data_parallel=False,
):  # fmt: skip
    """Run several arms one after another, skipping what is finished or not to be had.

    Parameters
    ----------
    arm_names, data, split_names, seeds, profile, device
        See :func:`run_arm`; every combination is run.
    processes : accelerate.PartialState, optional
        Spread the runs over these processes: each takes its part of the list.
    data_parallel : bool, default False
        Instead, all processes train each run together.

    Returns
    -------
    dict
        ``(arm, split, seed)`` -> result of :func:`run_arm`, or the reason (str) why it was skipped; of
        the runs that this process took part in.
    """
    # A typing error in the last name should not surface after an hour.
    for arm_name in arm_names:
        find_arm(arm_name)
    for split_name in split_names:
        split_from_name(split_name or default_split(data), data.y_train, data.class_names)
    # What is named twice is run once: two processes would write to the same checkpoint.
    runs = list(dict.fromkeys(
        (arm_name, split_name or default_split(data), seed)
        for seed in seeds for split_name in split_names for arm_name in arm_names
    ))  # fmt: skip
    together = processes if data_parallel else None
    if processes is not None and not data_parallel:
        runs = runs[processes.process_index :: processes.num_processes]
    outcomes = {}
    for arm_name, split_name, seed in runs:
        try:
            outcomes[arm_name, split_name, seed] = run_arm(
                arm_name, data, split_name, seed, profile, device, together
            )
        except ArmUnavailableError as error:
            outcomes[arm_name, split_name, seed] = str(error)
    return outcomes


# --- Plots of one arm ---------------------------------------------------------------------------


def warning(data_name):
    """What every title must begin with if the data is not CIFAR-10; else nothing."""
    return "" if data_name == "cifar10" else f"{data_name.upper()}, NOT CIFAR-10 - "


def caption(results):
    """What a plot has to say about the runs behind it: data, split, profile, seeds."""
    first, seeds = results[0], [result["seed"] for result in results]
    many = f"{len(seeds)} seeds" if len(seeds) > 1 else f"1 seed ({seeds[0]})"
    return f"{warning(first['data'])}{first['split']}, profile {first['profile']}, {many}"


def _plot_paths(arm_name, profile_name, data_name, split_name):
    """Where the confusion matrix and the learning curves of an arm go, in this order."""
    return [
        output_path("images", profile_name, data_name, split_name, f"{kind}_{ARMS[arm_name].image_tag}.png")
        for kind in ("cm", "test")
    ]


def arm_figures(results):
    """Confusion matrix (added up over seeds) and learning curves (one line a seed) of one arm.

    Parameters
    ----------
    results : list of dict
        The arm's results, as :func:`load_results` gives them.

    Returns
    -------
    list of two matplotlib.figure.Figure
    """
    first = results[0]
    title = f"{ARMS[first['arm']].title}\n{caption(results)}"
    matrix = np.sum([r["metrics"]["confusion_matrix"] for r in results], axis=0)
    return [
        plot_confusion_matrix(matrix, first["class_names"], title),
        plot_learning_curves([r["history"] for r in results], title, chance=1 / len(first["class_names"])),
    ]


def save_arm_plots(arm_name, profile_name, data_name, split_name):
    """Draw ``cm_<tag>.png`` and ``test_<tag>.png`` of an arm from all its finished seeds."""
    results = load_results(profile_name, data_name, split_name)[arm_name]
    paths = _plot_paths(arm_name, profile_name, data_name, split_name)
    for path, figure in zip(paths, arm_figures(results), strict=True):
        save_figure(figure, path)
        plt.close(figure)


# --- Command line -------------------------------------------------------------------------------


def _seed(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 on, not {text!r}")
    return int(text)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Run arms of the study: each rebalances a split, trains a ResNet-18 and judges it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="arms:\n" + "\n".join(f"  {name:34}{arm.title}" for name, arm in ARMS.items())
        + "\n\nprofiles:\n" + "\n".join(f"  {name:8}{p.purpose}" for name, p in PROFILES.items()),
    )  # fmt: skip
    parser.add_argument(
        "--arm", nargs="+", default=["story"], metavar="ARM",
        help="one or more arms; 'story' for the arms of Main.ipynb (default), 'all' for every arm",
    )  # fmt: skip
    parser.add_argument(
        "--split", nargs="+", default=[None], metavar="SPLIT",
        help="cat-50 (class, kept images; the default), dog-0.01 (class, kept fraction), cat+dog-50, "
        "long-tailed-100 or step-10 (imbalance factor); add @1 for another choice of kept images",
    )  # fmt: skip
    parser.add_argument(
        "--seed", nargs="+", type=_seed, default=[0], metavar="N",
        help="seeds of sampler, initial weights and image order (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--profile",
        default="auto",
        help="smoke, quick, cpu, full, or auto (default): full with CUDA, else quick",
    )
    parser.add_argument(
        "--train-gan", action="store_true",
        help="train the GAN of the split (resumed after a kill), and run no arm",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the fastest there is")
    parser.add_argument(
        "--data-parallel", action="store_true",
        help="under torchrun or accelerate launch: all processes train each run together; "
        "without it, each process takes its part of the list of runs",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    arm_names = []
    for name in options.arm:
        arm_names += {"story": STORY, "all": tuple(ARMS)}.get(name, (name,))
    try:
        # What was typed is checked before any data is loaded or downloaded.
        resolve_profile(options.profile)
        choose_device(options.device)
        for name in arm_names:
            find_arm(name)
        processes = start_processes(options.device)
        with processes.main_process_first():  # the others find what the first one has made
            data = load_data()
            splits = [
                split_from_name(name or default_split(data), data.y_train, data.class_names)
                for name in options.split
            ]
            if options.train_gan:
                for split in splits:
                    generator = prepare_generator(data, split, options.profile, options.device)
                    print(f"The generator is {generator}.")
                return
            with contextlib.suppress(ArmUnavailableError):  # run_arms reports it
                if any(ARMS[name].needs_stable_diffusion for name in arm_names):
                    prepare_stable_diffusion_images(data, *splits)
            profile_name, _ = resolve_profile(options.profile)
            for split in splits:
                unfinished = [
                    name for name in arm_names for seed in options.seed
                    if not result_path(profile_name, data.name, split.name, name, seed).exists()
                ]  # fmt: skip
                if any(ARMS[name].needs_gan for name in unfinished):
                    with contextlib.suppress(ArmUnavailableError):
                        prepare_generator(data, split, profile_name, options.device)
        outcomes = run_arms(
            arm_names,
            data,
            options.split,
            options.seed,
            options.profile,
            options.device,
            processes if processes.use_distributed else None,
            options.data_parallel,
        )
    except (ValueError, OSError, FloatingPointError, ArmUnavailableError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    for (arm_name, split_name, seed), outcome in outcomes.items():
        if isinstance(outcome, str):
            print(f"{arm_name}, {split_name}, seed {seed}: skipped, {outcome}")
        else:
            scores = outcome["metrics"]
            print(
                f"{arm_name}, {split_name}, seed {seed}: minority recall {scores['minority']['recall']:.1%}, "
                f"balanced accuracy {scores['balanced_accuracy']:.1%}, accuracy {scores['accuracy']:.1%}"
            )


if __name__ == "__main__":
    main()

"""Run arms of the study from a shell: cut the split, rebalance, train, evaluate, keep the results.

    python Experiment.py --arm imbalanced stable --split cat-50 --seed 0 --profile cpu
    accelerate launch Experiment.py --arm all --seed 0 1 2      # spread over all GPUs
    python Experiment.py --help

A finished arm is not run again, and a killed one continues.
"""

import argparse
import contextlib
import itertools

import numpy as np
from imblearn.utils import check_sampling_strategy

from Arms import ARMS, PROFILES, ArmUnavailableError, default_split, expand_arms, find_arm, resolve_profile
from ArmTraining import finished_result, run_arm
from BusyMachine import start_again_if_busy
from DeviceFaults import device_faults
from GANExperiment import prepare_generator
from GANNetworks import load_generator
from ImageCache import CACHE, fingerprint, load_metadata
from ImageOverSampler import source_balanced_strategy
from ImageSources import ImagesUnavailableError, prepare_images
from ImbalancedCIFAR10 import CIFAR10_CLASSES, load_data, split_from_name
from Results import Study
from Runtime import agree_on_error, choose_device, decide_in_main_process, start_processes

# --- Training sets ------------------------------------------------------------------------------


def prepare_stable_diffusion_images(data, *splits):
    """Make sure that there are Stable Diffusion images, and say where they come from.

    See :func:`ImageSources.prepare_images`: the cache, else CIFAKE, else generation from text. Neither CIFAKE nor generation
    from text looks at an image of ``data``. A cache whose images were made from real ones is refused unless these are the images that every split keeps.

    Parameters
    ----------
    data : ImbalancedCIFAR10.ImageDataSet
    *splits : ImbalancedCIFAR10.Split
        The splits that the images are for. If images are generated, the split that needs the most decides.

    Returns
    -------
    str
        Where the images come from.

    Raises
    ------
    ArmUnavailableError
        If there are none for this data set.
    """
    if tuple(data.class_names) != tuple(CIFAR10_CLASSES):
        raise ArmUnavailableError(
            f"there are no Stable Diffusion images of {data.name}: the cache and CIFAKE hold CIFAR-10's classes"
        )
    counts = {}
    for split in splits:
        y = data.y_train[split.kept_rows(data.y_train)]
        for c, wanted in source_balanced_strategy(y).items():
            name = data.class_names[c]
            counts[name] = max(counts.get(name, 0), wanted - int(np.sum(y == c)))
    try:
        source = prepare_images(counts, no_more=data.most_images_a_class is not None)
    except ImagesUnavailableError as error:
        raise ArmUnavailableError(str(error)) from error
    _refuse_images_made_from_removed_ones(data, splits)
    return source


def _refuse_images_made_from_removed_ones(data, splits):
    """An image drawn from real ones, matched to them or drawn with an adapter trained on them shows what these show."""
    made_from = {}  # class -> fingerprints of real images
    for row in load_metadata(CACHE):
        # Tables from before adapters of unknown origin were noted name the adapter only.
        if seen := row["real_images"] or (row["lora"] and "unknown"):
            made_from.setdefault(int(row["label"]), set()).update(seen.split("+"))
    for split, (c, fingerprints) in itertools.product(splits, made_from.items()):
        if c >= len(data.class_names):
            continue
        rows = split.kept_rows(data.y_train)
        if fingerprints != {fingerprint(data.X_train[rows[data.y_train[rows] == c]])}:
            remedy = (
                f"Make them again with --split {split.name} --replace and an adapter trained here, or move"
            )
            if data.name != "cifar10":  # generation cuts the whole training set
                remedy = "Here only images made from text can serve: move"
            raise ArmUnavailableError(
                f"the images of class {data.class_names[c]} in {CACHE} were made from other real images than those that "
                f"{split.name} keeps, or with an adapter of unknown origin, and could show removed ones. {remedy} the cache away"
            )


def make_training_set(study, data, arm_name, seed=0, device=None):
    """Cut the split and rebalance it as the arm does. Removed images are dropped before any sampler is called.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet
    arm_name : str
        A key of :data:`Arms.ARMS`. For an arm that needs a GAN, the study's GAN is trained now if it is not yet.
    seed : int
    device : str or torch.device, optional
        Where that GAN is trained and its images are drawn. Default: the fastest there is.

    Returns
    -------
    X : ndarray of uint8, shape (n, 32, 32, 3)
        The kept real images first, then the synthetic ones.
    y : ndarray of int64, shape (n,)

    Raises
    ------
    ArmUnavailableError
        If the arm needs images that are not available, or more images of a class than there are.
    """
    arm = find_arm(arm_name, study.profile)
    if arm.whole_training_set:
        return data.X_train, data.y_train
    split = split_from_name(study.split, data.y_train, data.class_names)
    generator = None
    if arm.needs_stable_diffusion:
        prepare_stable_diffusion_images(data, split)
    if arm.needs_gan:
        generator = load_generator(prepare_generator(study, data, device), device)
    X, y = split.cut(data.X_train, data.y_train)
    return arm.fit_resample(X, y, seed=seed, generator=generator)


# --- Many runs ----------------------------------------------------------------------------------


def run_arms(studies, data, arm_names, seeds=(0,), *, device=None, processes=None, data_parallel=False):
    """Run several arms one after another. Finished arms are read, unavailable ones skipped.

    Parameters
    ----------
    studies : sequence of Results.Study
        Of the same data.
    data : ImbalancedCIFAR10.ImageDataSet
    arm_names : sequence of str
    seeds : sequence of int
        Every combination of study, arm and seed is run.
    device : str or torch.device, optional
        Default: the fastest there is.
    processes : accelerate.PartialState, optional
        Spread the runs over these processes; each runs its part of the list.
    data_parallel : bool, default False
        Instead, all ``processes`` train each run together.

    Returns
    -------
    dict
        ``(arm, split, seed)`` -> the result (dict), or the reason (str) why it was skipped, for the runs that this
        process took part in.
    """
    for study, name in itertools.product(studies, arm_names):
        _check_arm(study, data, name)  # a mistake in the last name must not surface after an hour
    # A run named twice is run once: two processes would write to the same checkpoint.
    runs = list(
        dict.fromkeys((study, name, int(seed)) for seed in seeds for study in studies for name in arm_names)
    )
    together = processes if data_parallel else None
    if processes is not None and not data_parallel:
        runs = runs[processes.process_index :: processes.num_processes]
    outcomes = {}
    for study, name, seed in runs:
        try:
            outcome = _run(study, data, name, seed, device, together)
        except ArmUnavailableError as error:
            outcome = str(error)
        outcomes[name, study.split, seed] = outcome
    return outcomes


def _check_arm(study, data, arm_name):
    """Raise ValueError if there is no such arm, or it cannot add as many images to this split as its name says."""
    sampler = find_arm(arm_name, study.profile).method.sampler
    if "@" in arm_name:
        split = split_from_name(study.split, data.y_train, data.class_names)
        y = data.y_train[split.kept_rows(data.y_train)]
        try:
            check_sampling_strategy(sampler.sampling_strategy, y, "over-sampling")
        except ValueError as error:
            raise ValueError(f"{arm_name} cannot run on {study.split}: {error}") from error


def _run(study, data, arm_name, seed, device, processes):
    if decide_in_main_process(study.result_path(arm_name, seed).exists, processes):
        return finished_result(study, data, arm_name, seed)
    method = find_arm(arm_name).method
    if processes is not None and (method.batches or method.choose):
        raise ArmUnavailableError(
            "several processes cannot train one network on its batches. Run it without --data-parallel"
        )
    checkpoint = study.checkpoint_path(f"{arm_name}-seed{seed}")
    with device_faults(f"The run {arm_name}, {study.split}, seed {seed}", checkpoint):
        unavailable = None
        try:
            X, y = make_training_set(study, data, arm_name, seed, device)
        except ArmUnavailableError as error:
            unavailable = error
        unavailable = agree_on_error(unavailable, processes)  # none may begin to train without the others
        if unavailable is not None:
            raise unavailable
        return run_arm(study, data, arm_name, X, y, seed=seed, device=device, processes=processes)


# --- Command line -------------------------------------------------------------------------------


def seed_number(text):
    """A seed from a command line; argparse.ArgumentTypeError if it is no whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 on, not {text!r}")
    return int(text)


def _parse(arguments):
    parser = argparse.ArgumentParser(
        description="Run arms of the study: each rebalances a split, trains a ResNet-18 and evaluates it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="arms:\n"
        + "\n".join(f"  {name:40}{arm.title}" for name, arm in ARMS.items())
        + "\n\nprofiles:\n"
        + "\n".join(f"  {name:10}{profile.purpose}" for name, profile in PROFILES.items()),
    )
    add = parser.add_argument
    add("--arm", nargs="+", default=["story"], metavar="ARM",
        help="one or more arms; 'story' for the arms of Main.ipynb (default), 'all' for every arm. A profile of few "
        "arms runs these for both. stable@500: the arm stable with 500 synthetic images of the minority")  # fmt: skip
    add("--split", nargs="+", metavar="SPLIT",
        help="cat-50 (class, kept images; the default), dog-0.01 (class, kept fraction), cat+dog-50, "
        "long-tailed-100 or step-10 (imbalance factor); add @1 for another choice of kept images")  # fmt: skip
    add("--seed", nargs="+", type=seed_number, default=[0], metavar="N",
        help="seeds of sampler, initial weights and image order (default: 0)")  # fmt: skip
    add(
        "--profile",
        default="auto",
        help=f"{', '.join(PROFILES)}, or auto (default): full on CUDA, else quick",
    )
    add(
        "--prepare-data",
        action="store_true",
        help="fetch CIFAR-10 and the Stable Diffusion images, and run no arm",
    )
    add("--train-gan", action="store_true", help="train the GAN of the split, and run no arm")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the fastest there is")
    add("--data-parallel", action="store_true",
        help="under torchrun or accelerate launch: all processes train each run together; "
        "without it, each process takes its part of the list of runs")  # fmt: skip
    return parser, parser.parse_args(arguments)


def _prepare_sources(studies, data, splits, options):
    """Fetch or make what several runs share. The main process does it before the others start."""
    need_images = []
    for study, split in zip(studies, splits, strict=True):
        unfinished = {
            name
            for name in options.arms
            for seed in options.seed
            if not study.result_path(name, seed).exists()
        }
        if any(find_arm(name).needs_stable_diffusion for name in unfinished):
            need_images.append(split)
        with contextlib.suppress(ArmUnavailableError):  # run_arms reports it
            if any(find_arm(name).needs_gan for name in unfinished):
                prepare_generator(study, data, options.device)
    with contextlib.suppress(ArmUnavailableError):
        if need_images:  # for all splits at once, or the images would be enough for the first one only
            prepare_stable_diffusion_images(data, *need_images)


def main(arguments=None):
    parser, options = _parse(arguments)
    try:
        # What was typed is checked before any data is loaded or downloaded.
        choose_device(options.device)
        profile, settings = resolve_profile(options.profile, options.device)
        options.arms = expand_arms(options.arm, profile)
        processes = start_processes(options.device)
        if options.data_parallel and not processes.use_distributed:
            parser.error(
                "--data-parallel needs several processes: start it with torchrun or accelerate launch"
            )
        with processes.main_process_first():
            data = load_data().part(settings.most_images_a_class)
            names = options.split or [default_split(data)]
            splits = [split_from_name(name, data.y_train, data.class_names) for name in names]
            studies = [Study(profile, data.name, split.name) for split in splits]
            if options.prepare_data:
                print(data)
                print(f"Stable Diffusion images: {prepare_stable_diffusion_images(data, *splits)}.")
                return
            if options.train_gan:
                for study in studies:
                    print(f"The generator is {prepare_generator(study, data, options.device)}.")
                return
            _prepare_sources(studies, data, splits, options)
        outcomes = run_arms(
            studies,
            data,
            options.arms,
            options.seed,
            device=options.device,
            processes=processes if processes.use_distributed else None,
            data_parallel=options.data_parallel,
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
    start_again_if_busy()
    main()

"""Stable Diffusion images of a class: made, kept in one file, and appended to a training set.

    python StableDiffusionGeneration.py --class cat --count 4950 --preset fast
    accelerate launch StableDiffusionGeneration.py --class all --count 2000 --preset turbo

    X_res, y_res = StableDiffusionOverSampler(random_state=0).fit_resample(X, y)

The first line needs a GPU and the model's weights, the second uses every GPU of the machine. Either can be
ended at any moment and started again: it goes on with the images that are missing, and makes the same ones.
``CIFAKE.py`` imports ready images instead.

The cache ``datasets/stable_diffusion_dataset.npy`` is one NumPy array of records, an image with its
class each. It holds no pickled object and can be memory-mapped. For generated images there is a row each in
``datasets/stable_diffusion_dataset.csv``: prompt, seed, model and how it was drawn.

Reference: Rombach et al. (2022), High-resolution image synthesis with latent diffusion models.
"""

import argparse
import csv
import math
import tokenize
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from CandidateImages import (
    SHARDS,
    STRENGTHS,
    CandidateMaker,
    GenerationSettings,
    describe_job,
    find_missing,
    name_job,
    prepare_shards,
    read_shards,
    write_shard,
)
from DiffusionPipelines import PRESETS, SIZE, is_on_this_machine
from Downsampling import METHODS, image_statistics, match_statistics
from ImageOverSampler import ImageOverSampler
from ImageSelection import CLIP_MODEL, find_near_duplicates
from ImbalancedCIFAR10 import CIFAR10_CLASSES, class_number, load_cifar10, split_from_name
from Prompts import GRAMMARS, find_grammar
from Runtime import (
    atomic_path,
    check_images,
    choose_device,
    require_free_space,
    save_json,
    start_processes,
)

CACHE = Path("datasets/stable_diffusion_dataset.npy")
RECORD = np.dtype([("image", np.uint8, (32, 32, 3)), ("label", np.int64)])
METADATA = (
    "class", "label", "index", "prompt", "seed", "model", "preset", "steps", "guidance_scale", "lora",
    "source", "strength", "clip_margin", "job", "crc32",
)  # fmt: skip


# --- The cache ----------------------------------------------------------------------------------


def save_generated_images(images, labels, path=CACHE, metadata=None):
    """Write generated images with their classes, atomically.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, 32, 32, 3)
    labels : ndarray of int, shape (n,)
    path : path
    metadata : list of dict, optional
        How each image was made, by the names in :data:`METADATA`; written beside ``path`` as ``.csv``.
        Without it no such file is left, since it would speak of other images.

    Raises
    ------
    TypeError, ValueError
        For arrays of another dtype or shape: nothing is converted silently.
    """
    images, labels = check_images(images, labels)
    if images.shape[1:] != RECORD["image"].shape:
        raise ValueError(f"The cache holds images of 32x32 pixels, but these have the shape {images.shape}.")
    records = np.empty(len(images), dtype=RECORD)
    records["image"], records["label"] = images, labels
    table = Path(path).with_suffix(".csv")
    if metadata is None:
        table.unlink(missing_ok=True)
    else:
        with (
            atomic_path(table) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, METADATA, restval="", lineterminator="\n")
            writer.writeheader()
            for image, row in zip(images, metadata, strict=True):
                writer.writerow(row | {"crc32": zlib.crc32(image.tobytes())})
    with atomic_path(path) as temporary:
        np.save(temporary, records, allow_pickle=False)


def load_generated_images(path=CACHE):
    """Read what :func:`save_generated_images` wrote.

    Returns
    -------
    images : ndarray of uint8, shape (n, 32, 32, 3)
    labels : ndarray of int64, shape (n,)

    Raises
    ------
    FileNotFoundError
    ValueError
        If the file is truncated, holds another dtype, or asks for pickle.
    """
    records = _open_cache(path)
    return records["image"].copy(), records["label"].copy()


def _open_cache(path):
    """The checked records of a cache, mapped into memory: nothing is read before it is looked at."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}. Make it with import_cifake(), generate_images() or save_generated_images()."
        )
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, tokenize.TokenError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is truncated, damaged, or no plain NumPy array ({error}). Remove it and make it again."
        ) from error
    if not isinstance(records, np.ndarray) or records.dtype != RECORD or records.ndim != 1:
        found = getattr(records, "dtype", type(records).__name__)
        raise ValueError(f"{path} must hold one record of {RECORD} an image, but it holds {found}.")
    return records


def load_metadata(path=CACHE):
    """How each image of a cache was made.

    Returns
    -------
    list of dict
        One per image in the cache's order, by the names in :data:`METADATA`, all values text. Empty text
        where nothing is known, as for images that were imported.
    """
    records = _open_cache(path)
    table = Path(path).with_suffix(".csv")
    if not table.exists():
        return [dict.fromkeys(METADATA, "") for _ in range(len(records))]
    with open(table, newline="", encoding="utf-8") as file:
        known = {(row["label"], row["crc32"]): row for row in csv.DictReader(file)}
    # Found by the image's own checksum: after a kill between the two files, no row is given to another image.
    keys = [(str(record["label"]), str(zlib.crc32(record["image"].tobytes()))) for record in records]
    return [known.get(key, dict.fromkeys(METADATA, "")) for key in keys]


def describe_cache(path=CACHE):
    """One line on where the images of a cache come from, such as ``50,000 images imported``."""
    makers = Counter(
        f"by the preset {row['preset']} of {row['model']}" if row["model"] else "imported"
        for row in load_metadata(path)
    )
    return ", ".join(f"{count:,} images {maker}" for maker, count in makers.items())


# --- Generation ---------------------------------------------------------------------------------


class SelectionError(RuntimeError):
    """Too few candidates pass the selection; the message says which of its parts rejects them."""


def select_candidates(candidates, count, margin=0.1, similarity=0.95):
    """Choose the images of a data set among candidates, in the order of their indices.

    Parameters
    ----------
    candidates : dict of ndarray
        See :meth:`CandidateImages.CandidateMaker.make`.
    count : int
        How many to choose at most.
    margin : float
        CLIP's margin (a difference of probabilities) that an image must reach. Where no CLIP model judged, all do.
    similarity : float
        See :func:`ImageSelection.find_near_duplicates`.

    Returns
    -------
    rows : ndarray of int
        Rows of the chosen candidates, ascending.
    report : dict
        How many candidates there were, were kept, were rejected and why, and were left over.
    """
    unsafe = ~candidates["usable"]
    doubtful = ~unsafe & (candidates["margin"] < margin)  # False for NaN
    passing = np.flatnonzero(~unsafe & ~doubtful)
    repeated = find_near_duplicates(candidates["image"][passing], similarity)
    rows = passing[~repeated][:count]
    report = {
        "candidates": len(unsafe),
        "kept": len(rows),
        "rejected": {
            "safety checker": int(unsafe.sum()),
            "CLIP sees another class": int(doubtful.sum()),
            "near-duplicate": int(repeated.sum()),
        },
        "left over": len(passing) - int(repeated.sum()) - len(rows),
        "drawn again after the safety checker": int(candidates["flagged"].sum()),
    }
    return rows, report


def generate_images(
    class_name, count, settings=None, *, real_images=None, label=None, margin=0.1, similarity=0.95,
    match=False, path=CACHE, shards=SHARDS, maker=None, device=None, replace=False,
):  # fmt: skip
    """Generate the images of one class and put them into the cache.

    Started with ``accelerate launch``, all processes share the work. They must see the same disk. Further
    candidates are drawn for those that the selection rejects, up to four times ``count`` in all.

    Parameters
    ----------
    class_name : str
        A class with prompts, see ``Prompts.py``.
    count : int
        How many images the cache shall have of the class.
    settings : CandidateImages.GenerationSettings, optional
        Default: the preset ``'fast'``.
    real_images : ndarray of uint8, shape (n, 32, 32, 3), optional
        The class's real images that the split kept; never pass others. Needed for image to image and for
        ``match``, and otherwise not looked at.
    label : int, optional
        Class number in the cache. Default: CIFAR-10's.
    margin, similarity : float
        See :func:`select_candidates`.
    match : bool
        Give the images the colours and the sharpness of the real ones, see
        :func:`Downsampling.match_statistics`.
    path : path
        The cache. Images of other classes in it stay.
    shards : path
        Folder for the candidates; each job gets a folder of its own in it.
    maker : CandidateImages.CandidateMaker, optional
        With the same settings; keeps its models loaded from one class to the next.
    device : str or torch.device, optional
        Default: the fastest there is, one GPU per process.
    replace : bool
        Whether images of this class that another job made or that were imported may be replaced.

    Returns
    -------
    dict
        What was kept, rejected and why; also written to ``report.json`` beside the shards.

    Raises
    ------
    ValueError
        For a class without prompts, a damaged shard, missing real images, or a cache that has images of
        this class from elsewhere.
    SelectionError
        If too few candidates pass the selection.
    OSError
        If a model cannot be had or the disk is full. What was drawn until then stays.
    """
    settings = (settings or GenerationSettings()).completed()
    if count < 1:
        raise ValueError(f"count must be at least 1: got {count}.")
    if label is None:
        label = class_number(class_name, CIFAR10_CLASSES)
    find_grammar(class_name, settings.prompts)
    if (settings.strengths or match) and real_images is None:
        raise ValueError(
            "Image to image and matched statistics need real_images: the class's images that the split kept."
        )
    sources = None
    if settings.strengths:
        sources, _ = check_images(real_images, np.zeros(len(real_images), dtype=int))
    job = describe_job(settings, class_name, label, sources)
    job_name = name_job(job)
    folder = Path(shards) / job_name
    if not replace:
        _refuse_foreign_images(path, class_name, label, job_name)
    require_free_space(shards, 0.05 + count * 8e-6)  # shard and cache take 3 kB an image each
    processes = start_processes(device)
    maker = maker or CandidateMaker(settings, device or processes.device)
    if processes.is_main_process:
        prepare_shards(folder, job)
    wanted = count
    while True:
        _draw_missing(maker, class_name, label, sources, folder, wanted, processes)
        candidates = read_shards(folder)
        candidates = {name: column[candidates["index"] < wanted] for name, column in candidates.items()}
        rows, report = select_candidates(candidates, count, margin, similarity)
        if len(rows) == count:
            break
        if wanted >= 4 * count:
            reasons = ", ".join(f"{name}: {number:,}" for name, number in report["rejected"].items())
            raise SelectionError(
                f"Only {len(rows):,} of {wanted:,} candidates of {class_name} pass the selection, but {count:,} "
                f"are asked for ({reasons}). They stay in {folder}. Ask for fewer, or lower the bar with --margin "
                "or --similarity: nothing is drawn again for that."
            )
        # As many more as the share that passes lets expect; the next round corrects it.
        share = max(len(rows) / wanted, 0.1)
        wanted = min(4 * count, wanted + math.ceil((count - len(rows)) / share))
    if processes.is_main_process:
        images = candidates["image"][rows]
        if match:
            images, report["statistics"] = _match(images, real_images)
        save_json(folder / "report.json", report)
        metadata = _describe_candidates(candidates, rows, job, job_name)
        _replace_class(path, label, images, metadata)
    processes.wait_for_everyone()
    return report


def _draw_missing(maker, class_name, label, sources, folder, wanted, processes):
    processes.wait_for_everyone()  # no shard of this round may be there before every process has looked
    groups = find_missing(folder, wanted)
    processes.wait_for_everyone()
    if groups:
        with processes.local_main_process_first():  # one download a machine, the others read its cache
            _ = maker.painter, maker.clip_filter
    groups = groups[processes.process_index :: processes.num_processes]
    with tqdm(
        total=sum(map(len, groups)), desc=f"{class_name}, {maker.settings.preset}", unit="image",
        disable=not (groups and processes.is_main_process), mininterval=2,
    ) as progress:  # fmt: skip
        for indices in groups:
            write_shard(folder, maker.make(class_name, label, indices, sources))
            progress.update(len(indices))
    processes.wait_for_everyone()


def _match(images, real_images):
    matched = match_statistics(images, real_images)
    return matched, {
        "real": image_statistics(real_images),
        "generated": image_statistics(images),
        "matched": image_statistics(matched),
    }


def _describe_candidates(candidates, rows, job, job_name):
    """One dict per row, by the names in METADATA."""
    shared = {name: job[name] for name in ("class", "label", "model", "preset", "steps", "guidance_scale")}
    shared |= {"lora": job.get("lora") or "", "job": job_name}
    described = []
    for row in rows:
        own = {name: candidates[name][row] for name in ("index", "prompt", "seed")}
        if not np.isnan(candidates["margin"][row]):
            own["clip_margin"] = f"{candidates['margin'][row]:.4f}"
        if candidates["source"][row] >= 0:
            own |= {name: candidates[name][row] for name in ("source", "strength")}
        described.append(shared | own)
    return described


def _refuse_foreign_images(path, class_name, label, job_name):
    if not Path(path).exists():
        return
    owners = _open_cache(path)["label"]
    of_class = [row for row, owner in zip(load_metadata(path), owners, strict=True) if owner == label]
    foreign = sum(row["job"] != job_name for row in of_class)
    if foreign:
        raise ValueError(
            f"{path} already has {foreign:,} images of {class_name} that were imported or made with other "
            "settings. Pass --replace (replace=True) to replace them, or --output (path=) for another file."
        )


def _replace_class(path, label, images, metadata):
    """Put a class's images into the cache, and keep those of the other classes."""
    labels = np.full(len(images), label, dtype=np.int64)
    if Path(path).exists():
        old_images, old_labels = load_generated_images(path)
        stay = np.flatnonzero(old_labels != label)
        old_metadata = load_metadata(path)
        images = np.concatenate([old_images[stay], images])
        labels = np.concatenate([old_labels[stay], labels])
        metadata = [old_metadata[row] for row in stay] + metadata
    order = np.argsort(labels, kind="stable")
    save_generated_images(images[order], labels[order], path, [metadata[row] for row in order])


def preset_at_hand():
    """Name of the cheapest preset that could draw here and now: there is a GPU, and the weights are here.

    Returns
    -------
    str or None
        None also if only the reference's setting could be drawn: a night's work is started by hand.
    """
    if choose_device().type == "cpu":
        return None
    for name in ("turbo", "fast"):
        models = (PRESETS[name].model, PRESETS[name].tiny_decoder, CLIP_MODEL)
        if all(is_on_this_machine(model) for model in models):
            return name
    return None


# --- The sampler --------------------------------------------------------------------------------


class StableDiffusionOverSampler(ImageOverSampler):
    """Append cached Stable Diffusion images of the smaller classes.

    The images are drawn without replacement. They were made from text alone, by a model that was
    not trained on CIFAR-10.

    Parameters
    ----------
    path : path, default ``datasets/stable_diffusion_dataset.npy``
        The cache, see :func:`save_generated_images`. Its labels are the class numbers in ``y``.
    sampling_strategy : str or dict, default 'auto'
        As in imbalanced-learn. ``'auto'`` makes the reference study's data set: synthetic images for
        the minority class only. :func:`ImageOverSampler.source_balanced_strategy` gives every class some.
    random_state : int, RandomState instance or None, default None
        Which images are drawn.

    Raises
    ------
    ValueError
        In ``fit_resample``, if the cache has fewer images of a class than are asked for.
    """

    def __init__(self, *, path=CACHE, sampling_strategy="auto", random_state=None):
        super().__init__(sampling_strategy=sampling_strategy, random_state=random_state)
        self.path = path

    def _fit_resample(self, X, y):
        self._images, self._labels = load_generated_images(self.path)
        try:
            return super()._fit_resample(X, y)
        finally:
            del self._images, self._labels  # the sampler itself stays small

    def _make_images(self, X, c, count, seed):
        rows = np.flatnonzero(self._labels == c)
        if len(rows) < count:
            raise ValueError(f"{self.path} has {len(rows)} images of class {c}, but {count} are asked for.")
        return self._images[np.random.default_rng(seed).choice(rows, count, replace=False)]


# --- Command line -------------------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Generate images of a class with Stable Diffusion and put them into the cache. Start it "
        "with 'accelerate launch' to use every GPU. Ended at any moment, it goes on where it was.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="presets:\n" + "\n".join(f"  {name:12}{p.purpose}" for name, p in PRESETS.items()),
    )  # fmt: skip
    add = parser.add_argument
    add("--class", dest="classes", nargs="+", required=True, metavar="CLASS",
        help="classes with prompts, such as cat; 'all' for the ten of CIFAR-10")  # fmt: skip
    add("--count", type=int, required=True, help="images of each class that the cache shall have")
    add("--preset", default="fast", help=f"one of {', '.join(PRESETS)} (default: fast), see below")
    add("--model", help="hub id or local folder in place of the preset's model")
    add("--steps", type=int, help="denoising steps in place of the preset's")
    add("--size", type=int, default=SIZE, help=f"pixels at which images are drawn (default: {SIZE})")
    add("--batch-size", type=int, help="images drawn at a time (default: the preset's; 1 on a CPU)")
    add("--prompts", help=f"{' or '.join(GRAMMARS)} in place of the preset's, see Prompts.py")
    add("--from-images", nargs="*", type=float, metavar="STRENGTH",
        help="draw from the class's real images that the split kept, at these strengths in turn "
        f"(default: {' '.join(map(str, STRENGTHS))}); 1 leaves nothing of them")  # fmt: skip
    add("--lora", metavar="FOLDER", help="adapter trained with LoRATraining.py")
    add("--split", default="cat-50", help="which real images may be used by --from-images and "
        "--match-statistics (default: cat-50)")  # fmt: skip
    add("--match-statistics", action="store_true",
        help="give the images the colours and sharpness of the real ones that the split kept")  # fmt: skip
    add("--clip-model", default="auto",
        help="hub id or folder of the CLIP model that judges the images, or 'none'")  # fmt: skip
    add("--margin", type=float, default=0.1,
        help="by how much the class must win in CLIP's eyes, as a probability (default: 0.1)")  # fmt: skip
    add("--similarity", type=float, default=0.95,
        help="correlation from which on an image repeats another one (default: 0.95)")  # fmt: skip
    add("--downsampling", default="area", help=f"{' or '.join(METHODS)} (default: area)")
    add("--seed", type=int, default=0, help="another seed makes other images (default: 0)")
    add("--label", type=int, help="class number in the cache for a class that CIFAR-10 does not have")
    add("--output", default=CACHE, help=f"the cache (default: {CACHE})")
    add("--shards", default=SHARDS, help=f"folder for candidates (default: {SHARDS})")
    add("--replace", action="store_true", help="replace images of the class that came from elsewhere")
    add("--device", help="cpu, cuda, mps; default: the fastest there is, one GPU per process")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="default: by device; float32 where "
        "a GPU draws black images")  # fmt: skip
    options = parser.parse_args(arguments)
    classes = [c for name in options.classes for c in (CIFAR10_CLASSES if name == "all" else (name,))]
    strengths = options.from_images if options.from_images is None else options.from_images or STRENGTHS
    try:
        settings = GenerationSettings(
            options.preset, options.model, options.steps, options.size, options.prompts, options.lora,
            tuple(strengths or ()), options.clip_model, options.downsampling, options.seed,
        ).completed()  # fmt: skip
        for name in classes:  # what was typed is checked before anything is loaded
            find_grammar(name, settings.prompts)
        if options.device is not None:
            choose_device(options.device)
        real = {}
        if strengths or options.match_statistics:
            data = load_cifar10()
            X, y = split_from_name(options.split, data.y_train).cut(data.X_train, data.y_train)
            real = {name: X[y == class_number(name, CIFAR10_CLASSES)] for name in classes}
        processes = start_processes(options.device)
        dtype = options.dtype and getattr(torch, options.dtype)
        maker = CandidateMaker(settings, options.device or processes.device, dtype, options.batch_size)
        for name in classes:
            report = generate_images(
                name, options.count, settings, real_images=real.get(name), label=options.label,
                margin=options.margin, similarity=options.similarity, match=options.match_statistics,
                path=options.output, shards=options.shards, maker=maker, device=options.device,
                replace=options.replace,
            )  # fmt: skip
            if processes.is_main_process:
                print(f"{options.output}: {_summary(name, report)}", flush=True)
    except (ValueError, OSError, SelectionError, MemoryError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def _summary(class_name, report):
    rejected = ", ".join(f"{number:,} {reason}" for reason, number in report["rejected"].items())
    text = f"{report['kept']:,} images of {class_name} from {report['candidates']:,} candidates"
    text += f" (rejected: {rejected}; drawn again: {report['drawn again after the safety checker']:,})"
    for name, values in report.get("statistics", {}).items():
        colours = "/".join(f"{value:.3f}" for value in values["mean"])
        text += f"\n  {name}: mean colour {colours}, sharpness {values['sharpness']:.3f}"
    return text


if __name__ == "__main__":
    main()

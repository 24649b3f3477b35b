"""Generate images of a class with Stable Diffusion, cache them, and append them to a training set.

    python StableDiffusionGeneration.py --class cat --count 4950 --preset fast
    accelerate launch StableDiffusionGeneration.py --class all --count 2000 --preset turbo

    X_res, y_res = StableDiffusionOverSampler(random_state=0).fit_resample(X, y)

The first command needs a GPU and the model's weights. The second uses every GPU of the machine. Both can be
stopped at any moment. Started again, they draw the images that are missing, and the result is the same.
``CIFAKE.py`` imports ready images instead. ``ImageCache.py`` describes the file that holds the images.

Reference: Rombach et al. (2022), High-resolution image synthesis with latent diffusion models.
"""

import argparse
import os

import numpy as np

from CandidateImages import SHARDS, STRENGTHS, CandidateMaker, GenerationSettings
from DiffusionPipelines import PRESETS, SIZE
from ImageCache import CACHE, load_generated_images
from ImageGeneration import check_class, generate_images
from ImageOverSampler import ImageOverSampler, TooFewImagesError
from ImageSelection import Selection, SelectionError
from ImbalancedCIFAR10 import CIFAR10_CLASSES, class_number, load_cifar10, split_from_name
from Prompts import GRAMMARS
from Runtime import start_processes

# --- The sampler --------------------------------------------------------------------------------


class StableDiffusionOverSampler(ImageOverSampler):
    """Append cached Stable Diffusion images of the smaller classes.

    The images are drawn from the cache without replacement. They were made from text
    alone, unless they were generated with real images or an adapter.

    Parameters
    ----------
    path : path, default ``datasets/stable_diffusion_dataset.npy``
        The cache, see :func:`ImageCache.save_generated_images`. Its labels are the class numbers in ``y``.
    sampling_strategy : str, dict or callable, default 'auto'
        As in imbalanced-learn. ``'auto'`` makes the reference study's data set: synthetic images for
        the minority class only. :func:`ImageOverSampler.source_balanced_strategy` gives every class some.
    random_state : int, RandomState instance or None, default None
        Which images are drawn.
    match : {None, 'spectrum', 'statistics'}, default None
        See :class:`ImageOverSampler.ImageOverSampler`. CIFAKE's images have 1.3 to 4 times the power of real ones at
        high frequencies.

    Raises
    ------
    FileNotFoundError
        In ``fit_resample``, if there is no cache.
    ValueError
        In ``fit_resample``, if the images do not have 32x32 pixels or the cache is damaged.
    TooFewImagesError
        In ``fit_resample``, if the cache has fewer images of a class than are needed.
    """

    def __init__(self, *, path=CACHE, sampling_strategy="auto", random_state=None, match=None):
        super().__init__(sampling_strategy=sampling_strategy, random_state=random_state, match=match)
        self.path = path

    def _check_X_y(self, X, y):
        X, y, binarize = super()._check_X_y(X, y)
        if X.shape[1:] != (32, 32, 3):
            raise ValueError(
                f"The cache {self.path} holds images of 32x32 pixels, but X has the shape {X.shape}. Resize X, or "
                "choose AugmentationOverSampler, which takes every size."
            )
        return X, y, binarize

    def _fit_resample(self, X, y):
        self._images, self._labels = load_generated_images(self.path)
        try:
            return super()._fit_resample(X, y)
        finally:
            del self._images, self._labels  # the sampler itself stays small

    def _make_images(self, X, c, count, seed):
        rows = np.flatnonzero(self._labels == c)
        if len(rows) < count:
            raise TooFewImagesError(
                f"{self.path} has {len(rows)} images of class {c}, but {count} are asked for"
            )
        return self._images[np.random.default_rng(seed).choice(rows, count, replace=False)]


# --- Command line -------------------------------------------------------------------------------


def main(arguments=None):
    parser = _make_parser()
    options = parser.parse_args(arguments)
    classes = [c for name in options.classes for c in (CIFAR10_CLASSES if name == "all" else (name,))]
    classes = list(dict.fromkeys(classes))
    try:
        maker, selection = _check_options(options, classes)
        processes = start_processes(options.device)
        real_images = {}
        if maker.settings.strengths or selection.match:
            real_images = _load_kept_images(classes, options.split)
        for name in classes:
            report = generate_images(
                name, options.count, maker, selection=selection, real_images=real_images.get(name),
                label=options.label, path=options.output, replace=options.replace,
            )  # fmt: skip
            if processes.is_main_process:
                print(f"{options.output}: {_summary(name, report)}", flush=True)
    except (ValueError, OSError, SelectionError, MemoryError, FloatingPointError) as error:
        parser.exit(1, f"{parser.prog}: {' '.join(str(error).splitlines())}\n")


def _check_options(options, classes):
    """What was typed as a maker and a selection. Mistakes are found before data or a model is loaded."""
    selection = Selection(options.margin, options.similarity, options.match_statistics)
    strengths = options.from_images if options.from_images is None else options.from_images or STRENGTHS
    settings = GenerationSettings(
        options.preset, options.model, options.steps, options.size, options.prompts, options.lora,
        tuple(strengths or ()), options.clip_model, options.downsampling, options.seed, options.dtype,
    )  # fmt: skip
    maker = CandidateMaker(
        settings, device=options.device, batch_size=options.batch_size, shards=options.shards
    )
    if options.label is not None and len(classes) > 1:
        raise ValueError(
            f"--label {options.label} is the number of one class, but {len(classes)} are given "
            f"({', '.join(classes)}). Run the command once for each class."
        )
    for name in classes:
        check_class(name, options.count, options.label, maker.settings)
        if strengths or selection.match:
            class_number(name, CIFAR10_CLASSES)
    return maker, selection


def _make_parser():
    parser = argparse.ArgumentParser(
        description="Generate images of a class with Stable Diffusion and put them into the cache. Start it "
        "with 'accelerate launch' to use every GPU. Stopped at any moment and started again, it continues.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="presets:\n" + "\n".join(f"  {name:12}{p.purpose}" for name, p in PRESETS.items()),
    )
    add = parser.add_argument
    add("--class", dest="classes", nargs="+", required=True, metavar="CLASS",
        help="classes with prompts, such as cat; 'all' for the ten of CIFAR-10")  # fmt: skip
    add("--count", type=int, required=True, help="images of each class that the cache shall have")
    add("--preset", default="fast", help=f"one of {', '.join(PRESETS)} (default: fast), see below")
    add("--model", type=os.path.expanduser, help="hub id or local folder (default: the preset's model)")
    add("--steps", type=int, help="denoising steps (default: the preset's)")
    add("--size", type=int, default=SIZE, help=f"pixels at which images are drawn (default: {SIZE})")
    add("--batch-size", type=int, help="images drawn at a time (default: the preset's; 1 on a CPU)")
    add("--prompts", help=f"{' or '.join(GRAMMARS)}, see Prompts.py (default: the preset's)")
    add("--from-images", nargs="*", type=float, metavar="STRENGTH",
        help="start from the class's real images that the split kept, at these strengths in turn "
        f"(default: {' '.join(map(str, STRENGTHS))}); at 1 nothing of them remains")  # fmt: skip
    add("--lora", type=os.path.expanduser, metavar="FOLDER", help="adapter trained with LoRATraining.py")
    add("--split", default="cat-50", help="which real images --from-images and --match-statistics "
        "may use (default: cat-50)")  # fmt: skip
    add("--match-statistics", action="store_true",
        help="give the images the colours and sharpness of the real ones that the split kept")  # fmt: skip
    add("--clip-model", type=os.path.expanduser, default="auto",
        help="hub id or folder of the CLIP model that judges the images, or 'none'")  # fmt: skip
    add("--margin", type=float, default=Selection.margin,
        help="lowest margin, a difference of probabilities, by which CLIP must prefer the class to "
        f"the others (default: {Selection.margin})")  # fmt: skip
    add("--similarity", type=float, default=Selection.similarity,
        help="lowest correlation at which an image counts as a repetition of another "
        f"(default: {Selection.similarity}; above 1: none does)")  # fmt: skip
    add("--downsampling", default="area", help="area or lanczos (default: area)")
    add("--seed", type=int, default=0, help="another seed makes other images (default: 0)")
    add(
        "--label",
        type=int,
        help="class number in the cache for a class that CIFAR-10 does not have; with one class only",
    )
    add("--output", type=os.path.expanduser, default=CACHE, help=f"the cache (default: {CACHE})")
    add(
        "--shards", type=os.path.expanduser, default=SHARDS, help=f"folder for candidates (default: {SHARDS})"
    )
    add("--replace", action="store_true", help="replace images of the class that came from elsewhere")
    add("--device", help="cpu, cuda, mps; default: the fastest device, one GPU per process")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="default: by device; choose float32 if a GPU draws black images "
        "or numbers that are not finite")  # fmt: skip
    return parser


def _load_kept_images(classes, split_name):
    """The real images that a split of CIFAR-10 keeps, by class name."""
    data = load_cifar10()
    X, y = split_from_name(split_name, data.y_train).cut(data.X_train, data.y_train)
    return {name: X[y == class_number(name, CIFAR10_CLASSES)] for name in classes}


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

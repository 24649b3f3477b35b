"""Where the study's Stable Diffusion images come from: the cache, CIFAKE, or generation on this machine.

print(prepare_images({"cat": 4950}))
"""

import contextlib
from types import SimpleNamespace

import numpy as np

from CandidateImages import CandidateMaker, GenerationSettings
from CIFAKE import IMAGES_PER_CLASS, fetch_cifake, local_cifake, read_cifake
from DiffusionPipelines import PRESETS, ModelUnavailableError, is_on_this_machine
from Files import one_process_at_a_time
from ImageCache import (
    CACHE,
    check_cache_path,
    describe_cache,
    load_generated_images,
    load_metadata,
    save_generated_images,
)
from ImageSelection import CLIP_MODEL, SelectionError
from ImbalancedCIFAR10 import CIFAR10_CLASSES, DataUnavailableError
from Runtime import choose_device
from StableDiffusionGeneration import generate_images

UNFINISHED_CACHE = CACHE.with_name("stable_diffusion_unfinished.npy")

# This process alone, with the interface of accelerate.PartialState. Whoever fills the cache holds its lock, for which
# the others wait: if it waited for them too, none would ever go on.
ALONE = SimpleNamespace(
    process_index=0, num_processes=1, is_main_process=True,
    wait_for_everyone=lambda: None, local_main_process_first=contextlib.nullcontext,
)  # fmt: skip


class ImagesUnavailableError(RuntimeError):
    """There are no Stable Diffusion images, and none can be obtained here. The message says why."""


def prepare_images(counts, *, no_more=False):
    """Make sure that the cache exists, and say where its images come from.

    The sources are tried in this order: an existing cache; CIFAKE, from this machine or downloaded;
    generation, if there is a GPU and the weights of a preset are on this machine. Generation starts from text
    alone and uses no real image.

    Parameters
    ----------
    counts : dict
        Class name of CIFAR-10 -> number of images that are needed, at least 1.
    no_more : bool, default False
        Whether to import no more images of a class than the largest of ``counts``, for a quick trial. A later call
        that needs more imports again.

    Returns
    -------
    str
        Where the images come from, for use in a sentence.

    Raises
    ------
    ImagesUnavailableError
        If no source has images.
    OSError
        If the cache cannot be written, the disk is too full for the download, or a source that is on this machine
        cannot be read.

    Notes
    -----
    Under ``accelerate launch`` each process calls this. The first one fills the cache alone, and the others wait.
    """
    if CACHE.exists() and not _is_too_small_a_part(counts):
        return f"the cache {CACHE}: {describe_cache()}"
    with one_process_at_a_time(CACHE.with_name("stable_diffusion_sources"), "fetches these images"):
        if CACHE.exists() and not _is_too_small_a_part(counts):  # another process has made it meanwhile
            return f"the cache {CACHE}: {describe_cache()}"
        return _fill_cache(counts, max(counts.values()) if no_more else None)


def _is_too_small_a_part(counts):
    """Whether the cache holds the first images of CIFAKE, and fewer than are needed.

    The images themselves are compared, so that a cache of the user's own is never replaced.
    """
    source = local_cifake()
    if source is None:
        return False
    images, labels = load_generated_images(CACHE)
    sizes = np.array([np.count_nonzero(labels == c) for c in range(len(CIFAR10_CLASSES))])
    is_enough = all(sizes[CIFAR10_CLASSES.index(name)] >= count for name, count in counts.items())
    if is_enough or sizes.min() != sizes.max() or sizes[0] >= IMAGES_PER_CLASS:
        return False
    first, _ = read_cifake(source, sizes[0])
    return np.array_equal(first, images)


def _fill_cache(counts, images_per_class):
    check_cache_path(CACHE)  # before a download
    try:
        images, labels = fetch_cifake(images_per_class)
    except DataUnavailableError as error:
        reason = error
    else:  # a disk that is full is no reason to try another source
        save_generated_images(images, labels, CACHE)
        return f"CIFAKE, {len(images):,} images imported into {CACHE}"
    preset = preset_at_hand()
    if preset is None:
        raise ImagesUnavailableError(
            f"CIFAKE is not available: {str(reason).rstrip('.')}. Generating images needs a GPU and a model's "
            "weights on this machine: see StableDiffusionGeneration.py"
        ) from reason
    # On the GPU that preset_at_hand found, even if the study itself runs on the CPU.
    maker = CandidateMaker(GenerationSettings(preset), device=choose_device())
    try:
        for class_name, count in counts.items():
            # Into another file, so that the cache appears only when it is complete.
            generate_images(class_name, count, maker, path=UNFINISHED_CACHE, replace=True, processes=ALONE)
        # Saved, not renamed, because the cache may be a symbolic link to a file that does not exist yet.
        save_generated_images(
            *load_generated_images(UNFINISHED_CACHE), CACHE, load_metadata(UNFINISHED_CACHE)
        )
    except (ModelUnavailableError, SelectionError, MemoryError, FloatingPointError) as error:
        raise ImagesUnavailableError(f"generating Stable Diffusion images failed: {error}") from error
    for suffix in (".csv", CACHE.suffix):
        UNFINISHED_CACHE.with_suffix(suffix).unlink(missing_ok=True)
    return f"the preset {preset}, {sum(counts.values()):,} images generated into {CACHE}"


def preset_at_hand():
    """Name the cheapest preset that can draw on this machine without a download.

    Returns
    -------
    str or None
        ``'turbo'`` or ``'fast'``. None without a GPU or without the weights. The preset ``'reference'`` is
        never returned: it takes 52 times the operations of ``turbo``, so a user has to start it.
    """
    if choose_device().type == "cpu":
        return None
    for name in ("turbo", "fast"):
        models = (PRESETS[name].model, PRESETS[name].tiny_decoder, CLIP_MODEL)
        if all(is_on_this_machine(model) for model in models):
            return name
    return None

"""Stable Diffusion with diffusers: the presets, and how their models are loaded.

    pipeline = load_pipeline("fast")

``Painter.py`` draws images with it. diffusers and transformers are imported only when a model is loaded.

References
----------
Rombach et al. (2022), High-resolution image synthesis with latent diffusion models. Lu et al. (2022),
DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models. Karras et al. (2022),
Elucidating the design space of diffusion-based generative models (spacing of the steps). Kynkäänniemi et
al. (2024), Applying guidance in a limited interval improves sample and distribution quality in diffusion
models. Sauer et al. (2023), Adversarial diffusion distillation (the turbo models).
"""

import contextlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from DeviceFaults import kind_and_first_line
from Files import is_reachable, require_free_space, user_path
from FiniteNumbers import check_weights
from Precision import check_dtype, half_precision
from Runtime import choose_device

# --- Presets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """How images are drawn, and what drawing them costs.

    Attributes
    ----------
    model : str
        Hub id of the pipeline.
    steps : int
        Denoising steps.
    guidance_scale : float
        Scale of classifier-free guidance (Ho and Salimans 2022), which doubles the UNet's batch. 0: no
        guidance.
    guidance_interval : tuple of float or None
        Lowest (exclusive) and highest noise level sigma at which guidance is applied. None: at every level.
    solver : {None, 'dpm-solver++'}
        None keeps the scheduler that comes with the model.
    tiny_decoder : str or None
        Hub id of a distilled decoder that replaces the model's own. None keeps the model's own.
    batch_size : int
        Number of images drawn at the same time, if memory allows.
    prompts : {'varied', 'reference'}
        Name of the grammar in ``Prompts.py``.
    clip_filter : bool
        Whether CLIP judges the images.
    gigabytes : float
        Approximate size of the download, in 10^9 bytes.
    purpose : str
        One line for the help of the command line.
    """

    model: str
    steps: int
    guidance_scale: float
    guidance_interval: tuple | None = None
    solver: str | None = None
    tiny_decoder: str | None = None
    batch_size: int = 16
    prompts: str = "varied"
    clip_filter: bool = True
    gigabytes: float = 6
    purpose: str = ""


MOST_STEPS = 1000  # noise levels that the models know
SIZE = 512  # pixels: the size that the models below were trained for or draw best
STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"  # of the reference study, and of CIFAKE

PRESETS = {
    "reference": Preset(
        STABLE_DIFFUSION, steps=30, guidance_scale=7.5, batch_size=1, prompts="reference", clip_filter=False,
        purpose="the reference study's setting: 30 steps, guidance 7.5, one image at a time",
    ),
    # 15 steps are the fewest that Lu et al. (2022) recommend for guided sampling. The 7 steps with guidance
    # lie in the interval of sigma that Kynkäänniemi et al. (2024) found best for Stable Diffusion XL. v1.x
    # has the same noise levels, but they did not measure it. The distilled decoder (TAESD) loses fine
    # texture, which the reduction from 512 to 32 pixels removes anyway.
    "fast": Preset(
        STABLE_DIFFUSION, steps=15, guidance_scale=7.5, guidance_interval=(0.28, 5.42), solver="dpm-solver++",
        tiny_decoder="madebyollin/taesd",
        purpose="15 steps of DPM-Solver++, guidance in 7 of them, a distilled decoder, batches",
    ),
    "turbo": Preset(
        "stabilityai/sd-turbo", steps=1, guidance_scale=0, tiny_decoder="madebyollin/taesd", batch_size=32,
        purpose="one step of the distilled SD-Turbo, no guidance; --steps 2 to 4 draws better and costs more",
    ),
    "sdxl-turbo": Preset(
        "stabilityai/sdxl-turbo", steps=1, guidance_scale=0, tiny_decoder="madebyollin/taesdxl", gigabytes=14,
        purpose="one step of the distilled SDXL-Turbo: a larger network, for GPUs with 12 GB or more",
    ),
}  # fmt: skip


def find_preset(name):
    """Return the :class:`Preset` of a name (str). An unknown name raises ValueError with the valid names."""
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}. Choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def check_drawing(steps, size, batch_size=None):
    """Raise ValueError if images cannot be drawn with these numbers. No model is needed to know this.

    Parameters
    ----------
    steps : int
        Denoising steps, from 1 to :data:`MOST_STEPS`.
    size : int
        Height and width in pixels, a multiple of 8.
    batch_size : int, optional
        Number of images drawn at the same time, at least 1.
    """
    if not (steps >= 1 and size >= 8 and size % 8 == 0 and (batch_size is None or batch_size >= 1)):
        raise ValueError(
            f"steps and batch size must be at least 1 and the size a multiple of 8: got steps {steps}, size {size}"
            + ("." if batch_size is None else f", batch size {batch_size}.")
        )
    if steps > MOST_STEPS:
        raise ValueError(
            f"steps must be at most {MOST_STEPS}, as many as the models have noise levels: got {steps}."
        )


# --- Loading ------------------------------------------------------------------------------------


class ModelUnavailableError(OSError):
    """A model is neither on this machine nor downloadable, or its files are incomplete or damaged."""


def is_on_this_machine(model):
    """Tell whether a model is a local folder or in the hub's cache, so that it needs no download.

    Parameters
    ----------
    model : str
        Hub id or local folder. The folder's content is not checked.

    Returns
    -------
    bool
    """
    from huggingface_hub import try_to_load_from_cache

    model = os.path.expanduser(model)
    if Path(model).is_dir():
        return True
    return any(
        isinstance(try_to_load_from_cache(model, name), str) for name in ("model_index.json", "config.json")
    )


def load_pretrained(load, model, gigabytes, **options):
    """Call a ``from_pretrained``, and turn its errors into one that says what to do.

    Parameters
    ----------
    load : callable
        ``from_pretrained`` of a class of diffusers or transformers.
    model : str
        A local folder or a hub id. If the hub's cache has the model, the network is not used. Where only
        half-precision weights (``.fp16.safetensors``) are, they are loaded.
    gigabytes : float
        Free space (10^9 bytes) that a download needs.
    **options
        Further arguments of ``load``.

    Returns
    -------
    object
        What ``load`` returns.

    Raises
    ------
    ModelUnavailableError
        If the folder is missing, incomplete or damaged, or the model is not in the cache and cannot be
        downloaded.
    OSError
        If there is too little space for a download.
    """
    from huggingface_hub import constants
    from transformers.utils import logging

    logging.disable_progress_bar()  # hides the reading of files; downloads still show their progress
    model = os.path.expanduser(str(model))

    def attempt(**more):
        with warnings.catch_warnings():
            # diffusers passes the hub an argument that the hub no longer knows. The user cannot change that.
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            return load(model, **options, **more)

    if Path(model).is_dir() and _has_half_precision_only(Path(model)):
        options["variant"] = "fp16"
    # Exception, because diffusers, transformers, safetensors and the hub raise errors of their own.
    if Path(model).is_dir():
        try:
            return attempt(local_files_only=True)
        except Exception as error:
            raise ModelUnavailableError(
                f"The model folder {model} is incomplete or damaged: {kind_and_first_line(error)} Get it again, "
                "for example with `hf download`."
            ) from error
    if model.startswith((".", "/", "~", "\\")) or model.count("/") > 1:
        raise ModelUnavailableError(f"There is no model folder {model}. Check its path.")
    try:
        return attempt(local_files_only=True)
    except Exception as error:
        absence = error
    if constants.is_offline_mode() or not is_reachable(constants.ENDPOINT):
        with contextlib.suppress(Exception):
            return attempt(local_files_only=True, variant="fp16")
        raise ModelUnavailableError(
            f"The model {model} is not complete in the cache {constants.HF_HUB_CACHE}, and "
            f"{constants.ENDPOINT} does not answer or HF_HUB_OFFLINE is set. Connect to the internet, or "
            f"run `hf download {model} --local-dir FOLDER` on another machine, copy the folder, and pass its "
            "path instead of the id."
        ) from absence
    require_free_space(constants.HF_HUB_CACHE, gigabytes)
    try:
        return attempt()
    except Exception as error:
        raise ModelUnavailableError(
            f"The model {model} could not be loaded from {constants.ENDPOINT}: {kind_and_first_line(error)} Check "
            "the name, and whether its licence must be accepted. Then run again."
        ) from error


def _has_half_precision_only(folder):
    """Whether the weights of a part of a model are there in half precision and not in full precision."""
    half = [
        f for f in folder.rglob("*.fp16.safetensors") if "tiny_decoder" not in f.relative_to(folder).parts
    ]
    return any(not f.with_name(f.name.replace(".fp16.", ".")).exists() for f in half)


def choose_dtype(device):
    """Choose the weights' data type, where :func:`Precision.half_precision` has one: float16 on CUDA, else that.

    On CUDA float16 is preferred to bfloat16, because its three more bits of precision are visible in images,
    and because the published weights were made for it.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    torch.dtype
    """
    half = half_precision(device)
    if half is None:
        return torch.float32
    return torch.float16 if device.type == "cuda" else half


def load_pipeline(preset, model=None, lora=None, device=None, dtype=None):
    """Load the text-to-image pipeline of a preset.

    Parameters
    ----------
    preset : str
        A key of :data:`PRESETS`.
    model : str, optional
        Hub id or local folder. Default: the preset's model. Only safetensors files are loaded.
    lora : path, optional
        Folder of an adapter, as :func:`LoRATraining.train_lora` writes it. It is merged into the weights.
    device : str or torch.device, optional
        Default: the fastest device.
    dtype : torch.dtype, optional
        Default: :func:`choose_dtype`.

    Returns
    -------
    diffusers.DiffusionPipeline

    Raises
    ------
    ModelUnavailableError
        See :func:`load_pretrained`.
    ValueError
        If the preset or device is unknown, the GPU only emulates the data type, the preset needs another kind of model, or
        the adapter does not fit the model.
    FloatingPointError
        If a weight of the model or of the adapter is NaN or infinite.
    """
    settings = find_preset(preset)
    device = choose_device(device)
    dtype = dtype or choose_dtype(device)
    check_dtype(dtype, device)
    from diffusers import (
        AutoencoderTiny,
        AutoPipelineForText2Image,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
    )
    from diffusers.utils import logging

    logging.disable_progress_bar()
    model = os.path.expanduser(str(model or settings.model))
    if Path(model).is_dir():
        _check_model_folder(model)

    def load(name, variant=None, **options):
        if dtype == torch.float16:
            # The variant halves the download. Models without it raise various errors.
            with contextlib.suppress(Exception):
                return AutoPipelineForText2Image.from_pretrained(name, variant="fp16", **options)
        return AutoPipelineForText2Image.from_pretrained(name, variant=variant, **options)

    pipeline = load_pretrained(load, model, settings.gigabytes, dtype=dtype, use_safetensors=True)
    if settings.guidance_interval and not isinstance(pipeline, StableDiffusionPipeline):
        raise ValueError(
            f"The preset {preset!r} limits guidance to an interval. This needs a Stable Diffusion 1.x or 2.x "
            f"model, but {model} is a {type(pipeline).__name__}. Choose another preset."
        )
    if settings.tiny_decoder:
        # A local model folder may contain the decoder, for machines without network.
        local = Path(model) / "tiny_decoder"
        decoder = str(local) if local.is_dir() else settings.tiny_decoder
        pipeline.vae = load_pretrained(
            AutoencoderTiny.from_pretrained, decoder, 0.1, dtype=dtype, use_safetensors=True
        )
    if settings.solver == "dpm-solver++":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            pipeline.scheduler.config, use_karras_sigmas=True
        )
    check_weights(pipeline.components, model)
    if lora is not None:
        _merge_lora(pipeline, user_path(lora))
    if dtype == torch.float16 and half_precision(device) != torch.bfloat16:
        _decode_in_float32(pipeline)
    pipeline.to(device)
    if device.type != "mps":
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _decode_in_float32(pipeline):
    """Let the decoder compute in float32: on some cards without bfloat16 it overflows, and images are black.

    Pipelines that can do so by themselves do: their decoders overflow on every card.
    """
    if hasattr(pipeline, "upcast_vae") or not getattr(pipeline.vae.config, "force_upcast", False):
        return
    decoder = pipeline.vae.decoder.to(torch.float32)
    decoder.register_forward_pre_hook(lambda _, arguments: (arguments[0].float(), *arguments[1:]))


def _check_model_folder(folder):
    """Raise ModelUnavailableError if a folder lacks a part that its ``model_index.json`` names.

    transformers silently replaces a missing vocabulary by an almost empty one. Every prompt would then mean
    the same. Weights are not checked here, because loading them does that.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(parts, dict) or not all(
            len(kind) == 2 for kind in parts.values() if isinstance(kind, list)
        ):
            raise ValueError("it does not list the parts of a pipeline")
        if not any(isinstance(kind, list) for kind in parts.values()):
            raise ValueError("it lists no part of a pipeline")
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(
            f"{folder} is no model folder: its model_index.json is missing or damaged ({error}). "
            "Get it again."
        ) from error
    for part, kind in parts.items():
        if part.startswith("_") or not isinstance(kind, list) or kind[1] is None:
            continue
        files = {f.name for f in (folder / part).glob("*")}
        if not files:
            raise ModelUnavailableError(
                f"The model folder {folder} is incomplete: {part} is missing. Get it again."
            )
        if "Tokenizer" in kind[1] and not (
            "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files
        ):
            raise ModelUnavailableError(
                f"The model folder {folder} is incomplete: {part} has neither tokenizer.json nor vocab.json "
                "with merges.txt. Get it again."
            )


def _merge_lora(pipeline, folder):
    if not folder.is_dir():
        raise ModelUnavailableError(f"There is no adapter folder {folder}. Train one with LoRATraining.py.")
    try:
        pipeline.load_lora_weights(str(folder), local_files_only=True)
        pipeline.fuse_lora()  # one matrix again, so that drawing costs the same as without the adapter
        pipeline.unload_lora_weights()
    except Exception as error:  # peft, diffusers and safetensors each raise their own kinds
        raise ValueError(
            f"The adapter in {folder} is damaged or was trained for another model: {kind_and_first_line(error)}"
        ) from error
    check_weights(pipeline.components, f"with the adapter in {folder}")

"""Stable Diffusion with diffusers: presets, loading, and drawing images in batches.

    painter = Painter(load_pipeline("fast"), "fast")
    images, flagged = painter.draw(["a photo of a cat"] * 16, seeds=range(16))

An image depends only on its prompt and its own seed, not on the batch that it is drawn in, except for
rounding. diffusers and transformers are imported only when a model is loaded.

References
----------
Rombach et al. (2022), High-resolution image synthesis with latent diffusion models. Lu et al. (2022),
DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models. Karras et al. (2022),
Elucidating the design space of diffusion-based generative models (spacing of the steps). Kynkäänniemi et
al. (2024), Applying guidance in a limited interval improves sample and distribution quality in diffusion
models. Sauer et al. (2023), Adversarial diffusion distillation (the turbo models). Meng et al. (2022),
SDEdit: guided image synthesis and editing with stochastic differential equations (image to image).
"""

import contextlib
import json
import math
import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from DeviceFaults import device_faults, kind_and_first_line, lacks_memory
from Files import is_reachable, require_free_space, user_path
from FiniteNumbers import check_weights, finite_numbers
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
        pipeline.vae = load_pretrained(AutoencoderTiny.from_pretrained, decoder, 0.1, dtype=dtype)
    if settings.solver == "dpm-solver++":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            pipeline.scheduler.config, use_karras_sigmas=True
        )
    check_weights(pipeline.components, model)
    if lora is not None:
        _merge_lora(pipeline, user_path(lora))
    if dtype == torch.float16 and half_precision(device) == torch.float16:
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


# --- Drawing ------------------------------------------------------------------------------------


class Painter:
    """Draws images with a loaded pipeline, and uses less memory if memory runs out.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        From :func:`load_pipeline`.
    preset : str
        A key of :data:`PRESETS`.
    steps : int, optional
        Denoising steps, at least 1. Default: the preset's number.
    size : int
        Height and width of the images in pixels, a multiple of 8.
    batch_size : int, optional
        Number of images drawn at the same time, at least 1. Default: the preset's, or 1 on a CPU, where
        larger batches gain nothing.

    Raises
    ------
    ValueError
        If the preset is unknown or a number is out of range.
    """

    def __init__(self, pipeline, preset, steps=None, size=SIZE, batch_size=None):
        self.settings = find_preset(preset)
        self.steps = self.settings.steps if steps is None else steps
        self.size = size
        check_drawing(self.steps, size, batch_size)
        self.batch_size = batch_size or (1 if pipeline.device.type == "cpu" else self.settings.batch_size)
        self._text_to_image = pipeline
        self._image_to_image = None
        self._device = pipeline.device
        self._model = pipeline.name_or_path
        self._savings = self._memory_savings()

    @device_faults("Drawing images")  # what was drawn before lies in the shards
    def draw(self, prompts, seeds, sources=None, strength=None):
        """Draw one image per prompt.

        Parameters
        ----------
        prompts : sequence of str
        seeds : sequence of int
            One per image, from 0 to 2^63 - 1. The noise is drawn on the CPU, so that it is the same for every
            device.
        sources : sequence of PIL.Image.Image, optional
            One per image, to start from (SDEdit). They are enlarged to ``size``. Default: start from noise.
        strength : float, optional
            Required with ``sources``: the fraction of the noise levels that is used, above 0 and at most 1.
            The larger it is, the less of the source remains.

        Returns
        -------
        images : list of PIL.Image.Image, ``size`` x ``size`` pixels
        flagged : list of bool
            Whether the model's safety checker flags the image, which is then black. Models without a safety
            checker flag none.

        Raises
        ------
        MemoryError
            If there is too little memory for a single image even with every measure that saves memory.
        FloatingPointError
            If a network computes numbers that are not finite.
        """
        images, flagged = [], []
        while len(images) < len(prompts):
            rows = slice(len(images), len(images) + self.batch_size)
            try:
                some_images, some_flagged = self._draw_batch(
                    list(prompts[rows]), list(seeds[rows]), sources and sources[rows], strength
                )
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
                message = kind_and_first_line(error)
            else:
                images += some_images
                flagged += some_flagged
                continue
            # Outside the except block, which would keep the failed batch's tensors alive.
            self._save_memory(message)
        return images, flagged

    def _draw_batch(self, prompts, seeds, sources, strength):
        pipeline, steps = self._text_to_image, self.steps
        options = {"height": self.size, "width": self.size}
        if sources:
            pipeline = self._image_pipeline()
            steps = max(steps, math.ceil(1 / strength))  # diffusers runs int(steps * strength), at least 1
            enlarged = [im.resize((self.size, self.size), Image.Resampling.BICUBIC) for im in sources]
            options = {"image": enlarged, "strength": strength}
        options |= {
            "generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds],
            "num_inference_steps": steps,
        }
        if self.settings.guidance_interval:
            options |= self._limited_guidance(pipeline, prompts, steps, strength if sources else 1)
        else:
            options |= {"prompt": prompts, "guidance_scale": self.settings.guidance_scale}
        with finite_numbers(pipeline, self._model):
            result = pipeline(**options)
        flagged = getattr(result, "nsfw_content_detected", None) or [False] * len(prompts)
        return result.images, list(flagged)

    @torch.no_grad()  # encode_prompt would keep the text encoder's activations
    def _limited_guidance(self, pipeline, prompts, steps, strength):
        """Options of the pipeline that apply guidance only within the preset's interval of sigma.

        Outside the interval the UNet sees each image once instead of twice. The pipeline decides at the start
        whether it doubles the batch. The callback after each step changes that for the next step.
        """
        low, high = self.settings.guidance_interval
        scale, scheduler = self.settings.guidance_scale, pipeline.scheduler
        positive, negative = pipeline.encode_prompt(prompts, self._device, 1, True)

        def is_guided(step):
            return low < float(scheduler.sigmas[step]) <= high

        def after_step(pipeline, step, timestep, tensors):
            next_step = scheduler.step_index
            if next_step < len(scheduler.timesteps) and is_guided(next_step) != (pipeline.guidance_scale > 1):
                pipeline._guidance_scale = scale if is_guided(next_step) else 1.0
                both = torch.cat([negative, positive])
                tensors["prompt_embeds"] = both if is_guided(next_step) else positive
            return tensors

        scheduler.set_timesteps(steps)
        first_step = max(steps - min(int(steps * strength), steps), 0)  # as diffusers counts
        return {
            "prompt_embeds": positive,
            "negative_prompt_embeds": negative,
            "guidance_scale": scale if is_guided(first_step) else 1.0,
            "callback_on_step_end": after_step,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }

    def _image_pipeline(self):
        if self._image_to_image is None:
            from diffusers import AutoPipelineForImage2Image

            self._image_to_image = AutoPipelineForImage2Image.from_pipe(self._text_to_image)
            self._image_to_image.set_progress_bar_config(disable=True)
        return self._image_to_image

    # --- When memory runs out ---

    def _memory_savings(self):
        """Measures for a single image that does not fit: name and function. Each makes drawing slower."""
        pipeline = self._text_to_image
        # An image that is no larger than a tile would be decoded as before.
        if hasattr(pipeline.vae, "enable_tiling") and self.size > pipeline.vae.tile_sample_min_size:
            yield "decoding in tiles", pipeline.vae.enable_tiling
        if self._device.type == "cuda":
            offload = partial(pipeline.enable_model_cpu_offload, device=self._device)
            yield "networks moved to the GPU one at a time", offload

    def _save_memory(self, message):
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        if self.batch_size > 1:
            self.batch_size //= 2
            measure = f"batches of {self.batch_size}"
        else:
            measure, apply = next(self._savings, (None, None))
            if measure is None:
                raise MemoryError(
                    f"There is too little memory on {self._device} for a single image of {self.size}x{self.size} "
                    f"pixels ({message}). Free some, choose the preset 'turbo', or choose a smaller size."
                )
            apply()
        tqdm.write(f"Out of memory on {self._device} ({message}): continuing with {measure}.")

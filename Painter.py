"""Draw images with a pipeline of Stable Diffusion, in batches that fit into memory.

    painter = Painter(load_pipeline("fast"), "fast")
    images, flagged = painter.draw(["a photo of a cat"] * 16, seeds=range(16))

An image depends only on its prompt and its own seed, not on the batch that it is drawn in, except for rounding.

References
----------
Meng et al. (2022), SDEdit: guided image synthesis and editing with stochastic differential equations (image to
image). Kynkäänniemi et al. (2024), Applying guidance in a limited interval improves sample and distribution quality in
diffusion models.
"""

import math
from functools import partial

import torch
from PIL import Image
from tqdm import tqdm

from DeviceFaults import device_faults, kind_and_first_line, lacks_memory
from DiffusionPipelines import SIZE, check_drawing, find_preset
from FiniteNumbers import finite_numbers


class Painter:
    """Draws images with a loaded pipeline, and uses less memory if memory runs out.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        From :func:`DiffusionPipelines.load_pipeline`.
    preset : str
        A key of :data:`DiffusionPipelines.PRESETS`.
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
            yield "decoding in tiles", partial(_work_in_tiles, pipeline.vae)
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


def _work_in_tiles(vae):
    """Let an autoencoder work in tiles. The tiny one then encodes to float32 in any type; its own type is restored."""
    vae.enable_tiling()
    encode = vae.encode

    def encode_in_own_type(images, **options):
        code = encode(images, **options)
        if hasattr(code, "latents"):
            code.latents = code.latents.to(images.dtype)
        return code

    vae.encode = encode_in_own_type

"""Train an adapter that teaches Stable Diffusion what the few real images of a class look like.

    python LoRATraining.py --class cat --split cat-50 --output models/lora-cat
    python StableDiffusionGeneration.py --class cat --count 4950 --lora models/lora-cat

Low-rank adaptation (LoRA) trains only small matrices beside the UNet's attention layers. The model itself
does not change. Training can be stopped at any moment. Started again, it continues to the same adapter.

References
----------
Hu et al. (2022), LoRA: low-rank adaptation of large language models. Ruiz et al. (2023), DreamBooth: fine
tuning text-to-image diffusion models for subject-driven generation (learning from a handful of images).
"""

import argparse
import math
import numbers
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

import Precision
from Checkpoints import Checkpoint, load_torch_file
from Checks import check_pixels
from DeviceFaults import lacks_memory
from DiffusionPipelines import SIZE, STABLE_DIFFUSION, load_pipeline
from Files import (
    atomic_path,
    one_process_at_a_time,
    require_free_space,
    require_same_settings,
    require_writable,
    user_path,
)
from FiniteNumbers import check_finite
from ImageCache import fingerprint
from ImbalancedCIFAR10 import CIFAR10_CLASSES, class_number, load_cifar10, split_from_name
from Prompts import with_article
from Repeatability import derive_seed, seeded
from Runtime import choose_device

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name under which diffusers looks for an adapter
STATE = "training_state.pt"
SAVE_EVERY = 50  # training steps; a kill loses at most so many


@dataclass(frozen=True)
class LoRARecipe:
    """How an adapter is trained.

    Attributes
    ----------
    model : str
        Hub id or local folder of a Stable Diffusion 1.x or 2.x pipeline. It must be the one that will draw.
    rank : int
        Rank of the trained matrices, at least 1. For 50 images 8 is small on purpose: the adapter shall learn
        the look of 32x32 photographs, not the photographs themselves.
    steps : int
        Training steps, at least 1. 800 steps with 4 images each pass over 50 images 64 times.
    batch_size : int
        Images in a training step, at least 1. If memory runs out, each step processes them in smaller
        portions.
    learning_rate : float
        Constant learning rate of AdamW, not negative.
    size : int
        Height and width in pixels to which the images are enlarged, a multiple of 8.
    """

    model: str = STABLE_DIFFUSION
    rank: int = 8
    steps: int = 800
    batch_size: int = 4
    learning_rate: float = 1e-4
    size: int = SIZE

    def check(self):
        """Raise ValueError if a number is out of range or not whole. No model is needed to know this."""
        for name in ("rank", "steps", "batch_size", "size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise ValueError(f"{name} must be a whole number: got {value!r}.")
        if self.steps < 1 or self.batch_size < 1 or self.rank < 1:
            raise ValueError(f"Steps, batch size and rank must be at least 1: got {self}.")
        if self.size < 8 or self.size % 8:
            raise ValueError(f"The size must be a multiple of 8 pixels: got {self.size}.")
        if not (self.learning_rate >= 0 and math.isfinite(self.learning_rate)):
            raise ValueError(
                f"The learning rate must be a finite number, 0 or more: got {self.learning_rate}."
            )


def train_lora(X, class_name, folder, recipe=None, *, seed=0, device=None):
    """Train an adapter on the real images of one class.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, height, width, 3)
        The images that the split kept. Never pass others: whatever is in ``X`` can reappear in the generated
        images. Each image is used as it is and mirrored.
    class_name : str
        Not empty. The adapter answers to "a photo of a <class name>" and to prompts that contain it.
    folder : path
        Output folder. ``pytorch_lora_weights.safetensors`` in it is the adapter, which a diffusers pipeline
        reads with ``load_lora_weights(folder)``. ``training_state.pt`` is the checkpoint, from which a
        stopped training continues. A second training in the same folder waits for the first.
    recipe : LoRARecipe, optional
    seed : int
        Not negative. It decides the adapter's initial weights, the noise and the order of the images.
    device : str or torch.device, optional
        Default: the fastest device.

    Returns
    -------
    list of float
        The loss of each training step: the mean squared error of the predicted noise.

    Raises
    ------
    ValueError
        If ``folder`` has an adapter of other images, another class or another recipe, or a number or the class
        name is invalid.
    DiffusionPipelines.ModelUnavailableError
        If the model is unavailable.
    MemoryError
        If a single image does not fit into memory.
    FloatingPointError
        If the model's encoders give numbers that are not finite, or the loss or the adapter is no longer finite.
    """
    recipe = recipe or LoRARecipe()
    X = check_pixels(X)
    _check_arguments(recipe, class_name, seed, folder)
    folder, device = user_path(folder), choose_device(device)
    # A second run would write its own checkpoints between these.
    with one_process_at_a_time(folder, "trains this adapter"):
        return _train(X, class_name, folder, recipe, seed, device)


def images_of_adapter(folder):
    """Fingerprint (see :func:`ImageCache.fingerprint`) of the real images that an adapter was trained on.

    Parameters
    ----------
    folder : path

    Returns
    -------
    str or None
        None if the adapter is from elsewhere, so that nothing is known.

    Raises
    ------
    ValueError
        If the checkpoint beside the adapter is damaged, or does not say which images it was trained on.
    """
    state = user_path(folder) / STATE
    if not state.exists():
        return None
    identity = load_torch_file(state, {"identity"})["identity"]
    if not isinstance(identity, dict) or not isinstance(identity.get("images"), str):
        raise ValueError(
            f"{state} does not say which images the adapter was trained on. Train the adapter again, or remove this "
            "file: the adapter then counts as trained on unknown images."
        )
    return identity["images"]


def _train(X, class_name, folder, recipe, seed, device):
    """The training itself. The arguments were checked, and no other process trains in ``folder``."""
    identity = asdict(recipe) | {"class": class_name, "seed": seed, "images": fingerprint(X)}
    checkpoint = Checkpoint(folder / STATE, identity)
    state = _load_state(checkpoint, folder / WEIGHTS)
    if state is not None and state["step"] == recipe.steps:
        if not (folder / WEIGHTS).exists():  # the checkpoint alone was copied, or the adapter was removed
            _save_weights(folder, state["adapter"])
        return state["history"]
    if state is not None:  # not part of the identity, because a finished adapter may be used on any device
        now = {"precision": Precision.precision_name(device)}
        require_same_settings(checkpoint.path, now | {key: state[key] for key in now.keys() & state}, now)
    require_free_space(folder, 0.1)

    from diffusers import DDPMScheduler  # imported here because it takes seconds

    with checkpoint.device_faults("The training of the adapter"):
        pipeline = _load_base_model(recipe.model, device)
        means, deviations, text = _encode(pipeline, X, class_name, recipe.size)
        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        unet = _add_adapter(pipeline, recipe.rank, seed)
        steps = _optimiser_steps(unet, recipe.learning_rate)
        history = _restore(state, unet, steps)
        portion = recipe.batch_size
        bar = tqdm(
            range(len(history), recipe.steps), initial=len(history), total=recipe.steps,
            desc=f"adapter, {class_name}", unit="step", mininterval=2,
        )  # fmt: skip
        for step in bar:
            # A generator for each step, so that the checkpoint needs no state of random numbers.
            random = torch.Generator().manual_seed(derive_seed(seed, 1, step))
            batch = _draw_batch(means, deviations, schedule, recipe.batch_size, random)
            loss, portion = _backward_within_memory(unet, steps, batch, text, portion, recipe.size)
            _check_loss(loss, step, recipe)
            steps.step()
            history.append(loss)
            bar.set_postfix(loss=f"{np.mean(history[-50:]):.4f}", refresh=False)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
                _save(folder, checkpoint, unet, steps, history, finished=step + 1 == recipe.steps)
    return history


def _check_arguments(recipe, class_name, seed, folder):
    recipe.check()
    with_article(class_name)
    if seed < 0:
        raise ValueError(f"The seed must not be negative: got {seed}.")
    require_writable(user_path(folder) / WEIGHTS)


def _check_loss(loss, step, recipe):
    if not np.isfinite(loss) and step == 0:
        raise FloatingPointError(
            f"The loss of the first step is {loss}, before anything was learned, so the model {recipe.model} computes "
            "numbers that are not finite. Get it again, or choose another model or --device cpu."
        )
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"The loss of step {step + 1} is {loss}. Lower the learning rate ({recipe.learning_rate:g})."
        )


def _load_state(checkpoint, weights):
    state = checkpoint.load("step", "history", "adapter", "optimizer")
    if state is None and weights.exists():
        raise ValueError(
            f"{weights.parent} has an adapter from elsewhere: {checkpoint.path.name} is not beside it. "
            "Choose another folder, or remove the adapter."
        )
    return state


def _load_base_model(model, device):
    from diffusers import StableDiffusionPipeline

    # The preset "reference" keeps the model's own encoder. The weights are float32, because the adapter's
    # updates are small compared with them. Multiplications run in bfloat16 where the hardware supports it.
    pipeline = load_pipeline("reference", model, device=device, dtype=torch.float32)
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise ValueError(
            f"Adapters can only be trained for Stable Diffusion 1.x and 2.x, but {model} is a "
            f"{type(pipeline).__name__}. Choose another model."
        )
    return pipeline


@torch.no_grad()
def _encode(pipeline, X, class_name, size):
    """Means and deviations of the latents of the images, plain and mirrored, and the prompt's embedding."""
    enlarged = [np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)) for x in X]
    means, deviations = [], []
    for pixels in (view for x in enlarged for view in (x, x[:, ::-1])):
        image = torch.tensor(pixels.copy(), dtype=torch.float32, device=pipeline.device)
        latents = pipeline.vae.encode(image.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
        means.append(latents.mean.cpu())
        deviations.append(latents.std.cpu())
    factor = pipeline.vae.config.scaling_factor
    prompt = f"a photo of {with_article(class_name)}"
    text, _ = pipeline.encode_prompt(prompt, pipeline.device, 1, False)
    for values, what in (
        (torch.cat(means + deviations), "The encoding of the images"),
        (text, "The prompt's encoding"),
    ):
        check_finite(values, what, pipeline.components, pipeline.name_or_path)
    return factor * torch.cat(means), factor * torch.cat(deviations), text


def _add_adapter(pipeline, rank, seed):
    """Add an untrained adapter to the pipeline's UNet. Returns the UNet, of which only the adapter trains."""
    from peft import LoraConfig

    for unused in (pipeline.vae, pipeline.text_encoder, pipeline.safety_checker):
        if unused is not None:
            unused.to("cpu")  # frees memory for the training
    unet = pipeline.unet.requires_grad_(False)
    with seeded(derive_seed(seed, 0)):
        unet.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=rank,
                init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            )
        )
    return unet.train()


def _optimiser_steps(unet, learning_rate):
    trained = [p for p in unet.parameters() if p.requires_grad]
    return Precision.ScaledSteps(trained, [torch.optim.AdamW(trained, lr=learning_rate)], unet.device)


def _restore(state, unet, steps):
    """Put a checkpoint's adapter and optimiser in place, and return its losses. Without one: no losses."""
    from peft.utils import set_peft_model_state_dict

    if state is None:
        return []
    set_peft_model_state_dict(unet, state["adapter"])
    steps.optimizers[0].load_state_dict(state["optimizer"])
    if "scale" in state:  # earlier versions of this code had none
        steps.load_state_dict(state["scale"])
    return state["history"]


def _draw_batch(means, deviations, schedule, batch_size, random):
    """Noisy latents, their time steps and what the UNet shall predict. All are on the CPU."""
    rows = torch.randint(len(means), (batch_size,), generator=random)
    shape = (batch_size, *means.shape[1:])
    clean = means[rows] + deviations[rows] * torch.randn(shape, generator=random)
    noise = torch.randn(shape, generator=random)
    times = torch.randint(schedule.config.num_train_timesteps, (batch_size,), generator=random)
    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(clean, noise, times)
    return schedule.add_noise(clean, noise, times), times, target


def _backward_within_memory(unet, steps, batch, text, portion, size):
    """Compute the gradients of a batch. If memory runs out: in smaller portions, then with activations computed twice.

    Returns the loss, and the portion (number of images) that fitted.
    """
    while True:
        unet.zero_grad(set_to_none=True)
        try:
            return _backward(unet, batch, text, portion, steps.backward), portion
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            if portion == 1 and unet.is_gradient_checkpointing:
                raise MemoryError(
                    f"There is too little memory on {unet.device} to train with a single image of "
                    f"{size}x{size} pixels. Free some, or choose a smaller --size."
                ) from error
        # Outside the except block, which would keep the failed portion's tensors alive.
        from accelerate.utils.memory import clear_device_cache  # imported here because it takes seconds

        clear_device_cache(garbage_collection=True)
        if portion > 1:
            portion //= 2
            measure = f"portions of {portion} images"
        else:
            unet.enable_gradient_checkpointing()
            measure = "activations computed twice"
        tqdm.write(f"Out of memory on {unet.device}: continuing with {measure}.")


def _backward(unet, batch, text, portion, backward):
    """Add up the gradients of a batch, ``portion`` images at a time, and return the loss."""
    device = unet.device
    total = len(batch[0])
    loss = 0.0
    for start in range(0, total, portion):
        noisy, times, target = (part[start : start + portion].to(device) for part in batch)
        with Precision.mixed_precision(device):
            predicted = unet(noisy, times, text.expand(len(noisy), -1, -1), return_dict=False)[0]
        error = F.mse_loss(predicted.float(), target, reduction="sum") / batch[2].numel()
        backward(error)
        loss += error.item()
    return loss


def _save(folder, checkpoint, unet, steps, history, finished):
    """Write the checkpoint, and the adapter if the training is finished. An adapter with NaN is refused."""
    from peft.utils import get_peft_model_state_dict

    adapter = get_peft_model_state_dict(unet)
    broken = [name for name, weight in adapter.items() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise FloatingPointError(
            f"After step {len(history)} the adapter is no longer finite ({broken[0]}). Nothing of it was kept. Lower "
            "the learning rate."
        )
    if finished:
        _save_weights(folder, adapter)
    checkpoint.save(
        step=len(history), history=history, adapter=adapter, optimizer=steps.optimizers[0].state_dict(),
        scale=steps.state_dict(), precision=Precision.precision_name(unet.device),
    )  # fmt: skip
    if finished and steps.skipped:
        tqdm.write(
            f"{steps.skipped} of {len(history)} steps were skipped, because a float16 gradient overflowed."
        )


def _save_weights(folder, adapter):
    """Write the file that diffusers reads."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    with atomic_path(folder / WEIGHTS) as temporary:
        StableDiffusionPipeline.save_lora_weights(
            temporary.parent,
            unet_lora_layers=convert_state_dict_to_diffusers(adapter),
            weight_name=temporary.name,
        )


# --- Command line -------------------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Train an adapter (LoRA) on the real images of a class that the split kept."
    )
    add, default = parser.add_argument, LoRARecipe()
    add("--class", dest="class_name", required=True, metavar="CLASS", help="such as cat")
    add("--split", default="cat-50", help="decides which images were kept (default: cat-50)")
    add(
        "--output",
        type=os.path.expanduser,
        required=True,
        metavar="FOLDER",
        help="output folder, such as models/lora-cat",
    )
    add(
        "--model",
        type=os.path.expanduser,
        default=default.model,
        help=f"hub id or local folder (default: {default.model})",
    )
    add("--rank", type=int, default=default.rank, help=f"rank of the matrices (default: {default.rank})")
    add("--steps", type=int, default=default.steps, help=f"training steps (default: {default.steps})")
    add(
        "--batch-size",
        type=int,
        default=default.batch_size,
        help=f"images in a step (default: {default.batch_size})",
    )
    add("--size", type=int, default=SIZE, help=f"pixels to which images are enlarged (default: {SIZE})")
    add(
        "--learning-rate", type=float, default=default.learning_rate, help=f"default: {default.learning_rate}"
    )
    add("--seed", type=int, default=0, help="default: 0")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the fastest device")
    options = parser.parse_args(arguments)
    recipe = LoRARecipe(
        options.model, options.rank, options.steps, options.batch_size, options.learning_rate, options.size
    )
    try:
        choose_device(options.device)
        c = class_number(options.class_name, CIFAR10_CLASSES)
        _check_arguments(recipe, CIFAR10_CLASSES[c], options.seed, options.output)
        data = load_cifar10()
        X, y = split_from_name(options.split, data.y_train).cut(data.X_train, data.y_train)
        history = train_lora(
            X[y == c], CIFAR10_CLASSES[c], options.output, recipe, seed=options.seed, device=options.device
        )
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        parser.exit(1, f"{parser.prog}: {' '.join(str(error).splitlines())}\n")
    print(
        f"{options.output}: adapter of rank {recipe.rank} from {np.sum(y == c)} images, loss "
        f"{np.mean(history[:50]):.4f} (first 50 steps) to {np.mean(history[-50:]):.4f} (last 50 steps)"
    )


if __name__ == "__main__":
    main()

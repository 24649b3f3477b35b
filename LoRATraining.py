"""Personalisation: teach Stable Diffusion what the few real images of a class look like.

    python LoRATraining.py --class cat --split cat-50 --output models/lora-cat
    python StableDiffusionGeneration.py --class cat --count 4950 --lora models/lora-cat

Only small matrices beside the UNet's attention layers are trained (low-rank adaptation); the model itself
stays as it is. Ended at any moment and started again, training goes on to the same adapter.

References
----------
Hu et al. (2022), LoRA: low-rank adaptation of large language models. Ruiz et al. (2023), DreamBooth: fine
tuning text-to-image diffusion models for subject-driven generation (learning from a handful of images).
"""

import argparse
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from DiffusionPipelines import SIZE, STABLE_DIFFUSION, load_pipeline
from ImbalancedCIFAR10 import CIFAR10_CLASSES, class_number, load_cifar10, split_from_name
from Prompts import with_article
from Runtime import (
    atomic_path,
    check_images,
    choose_device,
    derive_seed,
    load_torch_file,
    mixed_precision,
    require_free_space,
    seeded,
)

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name under which diffusers looks for an adapter
STATE = "training_state.pt"


@dataclass(frozen=True)
class LoRARecipe:
    """How an adapter is trained.

    Attributes
    ----------
    model : str
        Hub id or folder of a Stable Diffusion 1.x or 2.x pipeline: the one that will draw.
    rank : int
        Of the low-rank matrices. 8 on 50 images is small on purpose: they shall learn the look of
        32x32 photographs, not the photographs.
    steps : int
        Optimiser steps. 800 of 4 images pass over 50 images 64 times.
    batch_size : int
        Images in a step. Where memory runs out, they are gone through in smaller portions.
    learning_rate : float
        Of AdamW; constant.
    size : int
        Pixels to which the images are enlarged.
    """

    model: str = STABLE_DIFFUSION
    rank: int = 8
    steps: int = 800
    batch_size: int = 4
    learning_rate: float = 1e-4
    size: int = SIZE


def train_lora(X, class_name, folder, recipe=None, *, seed=0, device=None, save_every=50):
    """Train an adapter on the real images of one class.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, height, width, 3)
        The images that the split kept, and no others: whatever is in here can come back in the
        generated images. Each is used as it is and mirrored.
    class_name : str
        The adapter answers to "a photo of a <class name>" and to prompts that contain it.
    folder : path
        Where ``pytorch_lora_weights.safetensors`` goes, which a diffusers pipeline reads with
        ``load_lora_weights(folder)``, and ``training_state.pt``, from which an ended training goes on.
    recipe : LoRARecipe, optional
    seed : int
        Of the adapter's first weights, the noise and the order of the images.
    device : str or torch.device, optional
        Default: the fastest there is.
    save_every : int
        Steps between two saved states: what a kill can cost.

    Returns
    -------
    list of float
        The loss (mean squared error of the predicted noise) of each step.

    Raises
    ------
    ValueError
        If ``folder`` has an adapter of other images, another class or another recipe.
    DiffusionPipelines.ModelUnavailableError
        If the model cannot be had.
    MemoryError
        If a single image does not fit into memory.
    FloatingPointError
        If the loss is no longer finite.
    """
    recipe = recipe or LoRARecipe()
    X, _ = check_images(X, np.zeros(len(X), dtype=int))
    if recipe.steps < 1 or recipe.batch_size < 1 or recipe.rank < 1:
        raise ValueError(f"Steps, batch size and rank must be at least 1: got {recipe}.")
    folder, device = Path(folder), choose_device(device)
    identity = asdict(recipe) | {
        "class": class_name,
        "seed": seed,
        "images": hashlib.sha256(np.ascontiguousarray(X).tobytes()).hexdigest(),
    }
    state = _read_state(folder, identity)
    if state is not None and state["step"] == recipe.steps and (folder / WEIGHTS).exists():
        return state["history"]
    require_free_space(folder, 0.1)

    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    # "reference" is the preset that keeps the model's own encoder. float32: the adapter's updates are
    # small against its weights; the multiplications run in bfloat16 where the hardware does.
    pipeline = load_pipeline("reference", recipe.model, device=device, dtype=torch.float32)
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise ValueError(
            f"Adapters are trained for Stable Diffusion 1.x and 2.x, but {recipe.model} is a "
            f"{type(pipeline).__name__}."
        )
    means, deviations, text = _encode(pipeline, X, class_name, recipe.size)
    for finished in (pipeline.vae, pipeline.text_encoder, pipeline.safety_checker):
        if finished is not None:
            finished.to("cpu")  # makes room for the training
    unet = pipeline.unet.requires_grad_(False)
    with seeded(derive_seed(seed, 0)):
        unet.add_adapter(
            LoraConfig(
                r=recipe.rank, lora_alpha=recipe.rank, init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            )
        )  # fmt: skip
    weights = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    history = []
    if state is not None:
        set_peft_model_state_dict(unet, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]

    unet.train()
    portion = recipe.batch_size
    bar = tqdm(
        range(len(history), recipe.steps), initial=len(history), total=recipe.steps,
        desc=f"adapter, {class_name}", unit="step", mininterval=2,
    )  # fmt: skip
    for step in bar:
        # A generator for each step, so that no state of random numbers has to be kept.
        random = torch.Generator().manual_seed(derive_seed(seed, 1, step))
        batch = _draw_batch(means, deviations, schedule, recipe.batch_size, random)
        while True:
            optimizer.zero_grad(set_to_none=True)
            try:
                loss = _backward(unet, batch, text, portion, device)
                break
            except RuntimeError as error:
                from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

                if not should_reduce_batch_size(error):
                    raise
                if portion == 1:
                    raise MemoryError(
                        f"There is too little memory on {device} to train with a single image of "
                        f"{recipe.size}x{recipe.size} pixels. Free some, or choose a smaller --size."
                    ) from error
            # Outside the except block, which would keep the failed portion's tensors alive.
            clear_device_cache(garbage_collection=True)
            portion //= 2
            tqdm.write(f"Out of memory on {device}: going on with portions of {portion} images.")
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"The loss of step {step + 1} is {loss}. Lower the learning rate ({recipe.learning_rate:g})."
            )
        optimizer.step()
        history.append(loss)
        bar.set_postfix(loss=f"{np.mean(history[-50:]):.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            adapter = get_peft_model_state_dict(unet)
            if step + 1 == recipe.steps:
                _save_adapter(folder, convert_state_dict_to_diffusers(adapter))
            with atomic_path(folder / STATE) as temporary:
                torch.save(
                    {
                        "identity": identity, "step": step + 1, "history": history,
                        "adapter": adapter, "optimizer": optimizer.state_dict(),
                    },
                    temporary,
                )  # fmt: skip
    return history


def _read_state(folder, identity):
    if not (folder / STATE).exists():
        if (folder / WEIGHTS).exists():
            raise ValueError(f"{folder} has an adapter from elsewhere. Choose another folder.")
        return None
    state = load_torch_file(folder / STATE, {"identity", "step", "history", "adapter", "optimizer"})
    different = [name for name in identity if state["identity"].get(name) != identity[name]]
    if different:
        raise ValueError(
            f"The adapter in {folder} was trained with another {' and '.join(different)}. Choose another "
            "folder, or remove it."
        )
    return state


@torch.no_grad()
def _encode(pipeline, X, class_name, size):
    """Means and deviations of the images' latents, plain and mirrored, and the prompt's embedding."""
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
    return factor * torch.cat(means), factor * torch.cat(deviations), text


def _draw_batch(means, deviations, schedule, batch_size, random):
    """Noisy latents, their time steps and what the UNet shall predict, all on the CPU."""
    rows = torch.randint(len(means), (batch_size,), generator=random)
    shape = (batch_size, *means.shape[1:])
    clean = means[rows] + deviations[rows] * torch.randn(shape, generator=random)
    noise = torch.randn(shape, generator=random)
    times = torch.randint(schedule.config.num_train_timesteps, (batch_size,), generator=random)
    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(clean, noise, times)
    return schedule.add_noise(clean, noise, times), times, target


def _backward(unet, batch, text, portion, device):
    total = len(batch[0])
    loss = 0.0
    for start in range(0, total, portion):
        noisy, times, target = (part[start : start + portion].to(device) for part in batch)
        with mixed_precision(device):
            predicted = unet(noisy, times, text.expand(len(noisy), -1, -1), return_dict=False)[0]
        error = F.mse_loss(predicted.float(), target, reduction="sum") / batch[2].numel()
        error.backward()
        loss += error.item()
    return loss


def _save_adapter(folder, layers):
    from diffusers import StableDiffusionPipeline

    with atomic_path(folder / WEIGHTS) as temporary:
        StableDiffusionPipeline.save_lora_weights(
            temporary.parent, unet_lora_layers=layers, weight_name=temporary.name
        )


# --- Command line -------------------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Train an adapter (LoRA) on the real images of a class that the split kept."
    )
    add, default = parser.add_argument, LoRARecipe()
    add("--class", dest="class_name", required=True, metavar="CLASS", help="such as cat")
    add("--split", default="cat-50", help="which images there are (default: cat-50)")
    add("--output", required=True, metavar="FOLDER", help="where the adapter goes, such as models/lora-cat")
    add("--model", default=default.model, help=f"hub id or local folder (default: {default.model})")
    add("--rank", type=int, default=default.rank, help=f"of the matrices (default: {default.rank})")
    add("--steps", type=int, default=default.steps, help=f"optimiser steps (default: {default.steps})")
    add("--batch-size", type=int, default=default.batch_size, help=f"default: {default.batch_size}")
    add("--size", type=int, default=SIZE, help=f"pixels to which images are enlarged (default: {SIZE})")
    add(
        "--learning-rate", type=float, default=default.learning_rate, help=f"default: {default.learning_rate}"
    )
    add("--seed", type=int, default=0, help="default: 0")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the fastest there is")
    options = parser.parse_args(arguments)
    recipe = LoRARecipe(
        options.model, options.rank, options.steps, options.batch_size, options.learning_rate, options.size
    )
    try:
        choose_device(options.device)
        c = class_number(options.class_name, CIFAR10_CLASSES)
        data = load_cifar10()
        X, y = split_from_name(options.split, data.y_train).cut(data.X_train, data.y_train)
        history = train_lora(
            X[y == c], CIFAR10_CLASSES[c], options.output, recipe, seed=options.seed, device=options.device
        )
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(
        f"{options.output}: adapter of rank {recipe.rank} from {np.sum(y == c)} images, loss "
        f"{np.mean(history[:50]):.4f} (first 50 steps) to {np.mean(history[-50:]):.4f} (last 50 steps)"
    )


if __name__ == "__main__":
    main()

"""NaN and infinity are found where they leave a network, before they become black images or wrong answers.

    check_weights(pipeline.components, "CompVis/stable-diffusion-v1-4")
    with finite_numbers(pipeline, "CompVis/stable-diffusion-v1-4"):
        images = pipeline("a photo of a cat").images

A NaN pixel becomes black. A comparison with NaN is False, so a network that judges images by one lets every
image pass. Each function here raises FloatingPointError, which names the cause and what to do.
"""

import contextlib

import torch

from Precision import dtype_name


class NotFiniteError(FloatingPointError, ValueError):
    """A network, a file or a measure gave NaN or infinity. The message names the cause and the cure."""


def require_finite(values, what, cure):
    """Raise :class:`NotFiniteError` if a number is NaN or infinite.

    A comparison with NaN is always false, and a cast turns NaN into some number. So numbers are checked where
    they leave a network or a file.

    Parameters
    ----------
    values : float, ndarray or tensor, or a dict of tensors such as a state dict
    what : str
        Whose values they are, for the error message.
    cure : str
        What to do, as a whole sentence.
    """
    for part in values.values() if isinstance(values, dict) else [values]:
        numbers = torch.as_tensor(part)
        if not numbers.isfinite().all():
            share = f" ({int((~numbers.isfinite()).sum()):,} of {numbers.numel():,})" if numbers.ndim else ""
            raise NotFiniteError(f"{what}: NaN or infinity{share}. {cure}")


def check_weights(networks, model):
    """Raise FloatingPointError if a weight of a network is not finite. The message names the weight.

    Parameters
    ----------
    networks : dict
        Name -> :class:`torch.nn.Module`. Other values are ignored.
    model : str
        Hub id or folder, for the message.
    """
    for part, network in networks.items():
        if not isinstance(network, torch.nn.Module):
            continue
        for name, weight in network.state_dict().items():
            if not weight.is_meta:
                what = f"The model {model} has a weight that is not finite, {part}.{name} in {dtype_name(weight.dtype)}"
                require_finite(
                    weight, what, _cure(weight, "Get the model again, because its files are damaged.")
                )


def check_finite(values, what, networks, model):
    """Raise FloatingPointError if numbers that a network computed are not finite.

    Parameters
    ----------
    values : Tensor
    what : str
        What was computed, to begin the message with.
    networks, model
        Where to look for the cause, see :func:`check_weights`.
    """
    what = f"{what} by the model {model} in {dtype_name(values.dtype)} has numbers that are not finite"
    cure = _cure(values, "Get the model again, or choose another one.")
    try:
        require_finite(values, what, f"Nothing of it was kept. {cure}")
    except FloatingPointError:
        check_weights(networks, model)  # a weight is the cause if it is not finite itself
        raise


def _cure(tensor, otherwise):
    """What to do: half precision may be the cause, float32 never is."""
    if tensor.dtype == torch.float32:
        return otherwise
    return f"Choose float32 (--dtype float32), which has more range. If that does not help: {otherwise[0].lower()}{otherwise[1:]}"


@contextlib.contextmanager
def finite_numbers(pipeline, model):
    """Context in which a pipeline's numbers are checked on their way to the image.

    Checked are the latents (before the decoder), the pixels (after it) and what the safety checker computes.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
    model : str
        Hub id or folder, for the message.
    """

    def check_decoder(module, inputs, output):
        check_finite(inputs[0], "What the diffusion network drew", pipeline.components, model)
        check_finite(output, "What the decoder made of the drawing", pipeline.components, model)

    def check_judge(module, inputs, output):
        check_finite(output, "The safety checker's judgement", pipeline.components, model)

    hooks = [pipeline.vae.decoder.register_forward_hook(check_decoder)]
    if (checker := getattr(pipeline, "safety_checker", None)) is not None:
        hooks.append(checker.visual_projection.register_forward_hook(check_judge))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

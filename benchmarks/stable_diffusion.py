"""The cost of one 32x32 training image with Stable Diffusion: the reference's setting against the presets.

    python benchmarks/stable_diffusion.py              # a few minutes on two CPU cores, 12 GB of memory
    python benchmarks/stable_diffusion.py --count-only # UNet passes and FLOPs, a minute

The networks have the full size of Stable Diffusion v1.x and of SD-Turbo, which has the architecture of v2.1.
Their weights are random, because the cost does not depend on the values. The cost of an image is the sum over
the calls of networks that drawing it takes:

- Calls are counted by drawing an image while every network answers with zeros.
- FLOPs of a call are counted on PyTorch's meta device.
- Seconds of a call are the median of several measurements. Each round measures every network once.

Of SDXL-Turbo only the FLOPs are counted. How a preset changes the quality of images cannot be measured
without weights. See the papers that ``DiffusionPipelines.py`` names.
"""

import argparse
import sys
import time
from collections import Counter
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from DiffusionPipelines import PRESETS, SIZE, choose_dtype
from Files import save_json
from Painter import Painter
from Runtime import describe_hardware
from Utils import markdown_table

RESULT = Path("results/benchmarks/stable_diffusion.json")
COST = {"unet_passes": int, "tflops": Real, "seconds": Real | None}
# What :func:`table` asks of a result, see Results.read_json.
RECORD = {"presets": {"reference": COST, str: COST}}
LATENTS = SIZE // 8
TOKENS = 77

# --- The networks, in their published configurations --------------------------------------------

UNET = {"sample_size": LATENTS, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
LARGE_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224,
}  # fmt: skip


def _safety_checker():
    return StableDiffusionSafetyChecker(CLIPConfig(vision_config=LARGE_VISION, projection_dim=768))


# Name -> a function that makes the network, and one that gives the shapes of its inputs for a number of rows.
NETWORKS = {
    "UNet v1": (
        lambda: UNet2DConditionModel(**UNET, cross_attention_dim=768, attention_head_dim=8),
        lambda n: ((n, 4, LATENTS, LATENTS), (n,), (n, TOKENS, 768)),
    ),
    "UNet turbo": (
        lambda: UNet2DConditionModel(
            **UNET, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        lambda n: ((n, 4, LATENTS, LATENTS), (n,), (n, TOKENS, 1024)),
    ),
    "UNet SDXL": (
        lambda: UNet2DConditionModel(
            sample_size=LATENTS, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        ),
        lambda n: ((n, 4, LATENTS, LATENTS), (n,), (n, TOKENS, 2048)),
    ),
    "decoder": (
        lambda: AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=SIZE,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        ),
        lambda n: ((n, 4, LATENTS, LATENTS),),
    ),
    "tiny decoder": (AutoencoderTiny, lambda n: ((n, 4, LATENTS, LATENTS),)),
    "text encoder v1": (
        lambda: CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
        lambda n: ((n, TOKENS),),
    ),
    "text encoder turbo": (
        lambda: CLIPTextModel(
            CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
        ),
        lambda n: ((n, TOKENS),),
    ),
    "safety checker": (_safety_checker, lambda n: ((n, 3, 224, 224), (n, 3, 8, 8))),
    "CLIP filter": (
        lambda: CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32
            )
        ),
        lambda n: ((n, 3, 224, 224),),
    ),
}  # fmt: skip


def _call(name, network, inputs):
    if "decoder" in name:
        return network.decode(*inputs)
    if name == "safety checker":  # without its last lines, which compare a few numbers in Python
        return network.visual_projection(network.vision_model(inputs[0])[1])
    return network(*inputs)


def _inputs(name, rows, device, dtype=None):
    shapes = NETWORKS[name][1](rows)
    if name.startswith("text encoder"):
        return [torch.zeros(shapes[0], dtype=torch.long, device=device)]
    return [torch.ones(shape, device=device, dtype=dtype) for shape in shapes]


# --- FLOPs --------------------------------------------------------------------------------------


def count_flops(name):
    """Count the floating-point operations of one call with one row. A multiplication and an addition are two.

    Parameters
    ----------
    name : str
        A key of :data:`NETWORKS`.

    Returns
    -------
    int
    """
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        network = NETWORKS[name][0]()
    with counter, torch.no_grad():
        _call(name, network, _inputs(name, 1, "meta"))
    return counter.get_total_flops()


# --- The calls of a preset ----------------------------------------------------------------------


def make_networks(names, dtype, weights=True):
    """Make networks on the CPU with random weights.

    Parameters
    ----------
    names : sequence of str
        Keys of :data:`NETWORKS`.
    dtype : torch.dtype
        Data type of the weights.
    weights : bool
        If False, the weights stay uninitialised, which takes neither time nor memory.

    Returns
    -------
    dict of torch.nn.Module
        By name.
    """
    networks = {}
    for name in tqdm(names, desc="making networks", unit="network", disable=not weights):
        with torch.device("meta"):  # skips the networks' own initialisation, which is slow
            network = NETWORKS[name][0]()
        network = network.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
        if weights:
            for weight in network.parameters():
                weight.normal_(0, 0.02)
            for buffer_name, buffer in network.named_buffers():
                if buffer_name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1]))
            if "UNet" in name or "decoder" in name:
                network.to(memory_format=torch.channels_last)
        networks[name] = network
    return networks


def make_pipeline(preset, networks):
    """Make the pipeline of a preset from networks of :func:`make_networks`.

    It is built like the one that :func:`DiffusionPipelines.load_pipeline` loads.
    """
    kind = "turbo" if preset == "turbo" else "v1"
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = PNDMScheduler(**noise, skip_prk_steps=True)
    if PRESETS[preset].solver == "dpm-solver++":
        scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, use_karras_sigmas=True)
    elif kind == "turbo":
        scheduler = EulerDiscreteScheduler(**noise, timestep_spacing="trailing")
    letters = [chr(c) + end for c in range(97, 123) for end in ("", "</w>")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=TOKENS)
    pipeline = StableDiffusionPipeline(
        networks["tiny decoder" if PRESETS[preset].tiny_decoder else "decoder"],
        networks[f"text encoder {kind}"], tokenizer, networks[f"UNet {kind}"], scheduler,
        networks["safety checker"] if kind == "v1" else None, CLIPImageProcessor(),
        requires_safety_checker=kind == "v1",
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def count_calls(preset, networks):
    """Count the calls of networks that one image takes, by drawing it while every network answers with zeros.

    Parameters
    ----------
    preset : str
        A key of :data:`DiffusionPipelines.PRESETS`.
    networks : dict of torch.nn.Module
        See :func:`make_networks`.

    Returns
    -------
    collections.Counter
        (name of the network, number of rows) -> number of calls.
    """
    if preset == "sdxl-turbo":  # counted like turbo with its own UNet, without its second text encoder
        calls = count_calls("turbo", networks)
        return Counter(
            {(name.replace("UNet turbo", "UNet SDXL"), rows): n for (name, rows), n in calls.items()}
        )
    pipeline, calls = make_pipeline(preset, networks), Counter()
    kind = "turbo" if preset == "turbo" else "v1"
    replaced = []

    def replace(network, method, name, answer):
        def count(x, *arguments, **options):
            calls[name, len(x)] += 1
            return answer(x)

        setattr(network, method, count)
        replaced.append((network, method))

    size = pipeline.text_encoder.config.hidden_size
    dtype = pipeline.unet.dtype
    replace(pipeline.unet, "forward", f"UNet {kind}", lambda x: (torch.zeros_like(x),))
    replace(
        pipeline.vae, "decode", "tiny decoder" if PRESETS[preset].tiny_decoder else "decoder",
        lambda x: (torch.zeros(len(x), 3, SIZE, SIZE, dtype=dtype),),
    )  # fmt: skip
    replace(
        pipeline.text_encoder, "forward", f"text encoder {kind}",
        lambda x: (torch.zeros(len(x), TOKENS, size, dtype=dtype),),
    )  # fmt: skip
    if pipeline.safety_checker is not None:
        checker = pipeline.safety_checker

        def check(images, clip_input):
            calls["safety checker", len(clip_input)] += 1
            return images, [False] * len(clip_input)

        checker.forward = check
        replaced.append((checker, "forward"))
    try:
        Painter(pipeline, preset, batch_size=1).draw(["a cat"], [0])
    finally:
        for network, method in replaced:
            delattr(network, method)
    if PRESETS[preset].clip_filter:
        calls["CLIP filter", 1] += 1  # the text encoder is left out: it reads ten class names per 64 images
    return calls


# --- Seconds ------------------------------------------------------------------------------------


@torch.no_grad()
def measure(cases, networks, dtype, repeats):
    """Measure the seconds of calls. Each round measures every case once, so that a busy moment affects all.

    Parameters
    ----------
    cases : sequence of tuple
        (name of the network, number of rows).
    networks : dict of torch.nn.Module
        See :func:`make_networks`.
    dtype : torch.dtype
    repeats : int
        Measured rounds, after one that warms up.

    Returns
    -------
    dict
        Case -> median seconds.
    """
    seconds = {case: [] for case in cases}
    for turn in tqdm(range(repeats + 1), desc="measuring", unit="round"):
        for name, rows in cases:
            inputs = _inputs(name, rows, "cpu", dtype)
            started = time.perf_counter()
            _call(name, networks[name], inputs)
            if turn:  # the first round warms up
                seconds[name, rows].append(time.perf_counter() - started)
    return {case: median(times) for case, times in seconds.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Cost of one training image, preset by preset.")
    parser.add_argument(
        "--count-only", action="store_true", help="count passes and FLOPs, but measure nothing"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of each network (default: 3)")
    parser.add_argument("--output", default=RESULT, help=f"default: {RESULT}")
    options = parser.parse_args(arguments)
    dtype = choose_dtype(torch.device("cpu"))
    flops = {name: count_flops(name) for name in NETWORKS}
    names = [name for name in NETWORKS if name != "UNet SDXL"]
    networks = make_networks(names, dtype, weights=not options.count_only)
    calls = {preset: count_calls(preset, networks) for preset in PRESETS}
    seconds = {}
    if not options.count_only:
        cases = sorted({case for preset in PRESETS for case in calls[preset] if case[0] in networks})
        seconds = measure(cases, networks, dtype, options.repeats)
    result = {
        "presets": {preset: _cost(calls[preset], flops, seconds) for preset in PRESETS},
        "flops_per_row": flops,
        "seconds_per_call": {f"{name}, {rows} rows": s for (name, rows), s in seconds.items()},
        "size": SIZE,
        "dtype": str(dtype),
        "repeats": options.repeats,
        "hardware": describe_hardware(torch.device("cpu")),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    save_json(options.output, result)
    print(table(result))
    print(f"\nWritten to {options.output}.")


def _cost(calls, flops, seconds):
    unet = {rows: n for (name, rows), n in calls.items() if name.startswith("UNet")}
    measured = bool(seconds) and all(case in seconds for case in calls)
    return {
        "unet_calls": sum(unet.values()),
        "unet_passes": sum(rows * n for rows, n in unet.items()),
        "tflops": sum(flops[name] * rows * n for (name, rows), n in calls.items()) / 1e12,
        "seconds": sum(seconds[case] * n for case, n in calls.items()) if measured else None,
        "calls": {f"{name}, {rows} rows": n for (name, rows), n in calls.items()},
    }


def table(result):
    """Return a result as a Markdown table (str), one row per preset."""
    head = (
        "preset", "UNet passes an image", "TFLOPs an image", "times fewer", "seconds an image", "times less",
    )  # fmt: skip
    reference = result["presets"]["reference"]
    rows = []
    for preset, cost in result["presets"].items():
        seconds, times = "not measured", ""
        if cost["seconds"] is not None:
            seconds = f"{cost['seconds']:.1f}"
            times = f"{reference['seconds'] / cost['seconds']:.1f}"
        rows.append(
            (
                preset, str(cost["unet_passes"]), f"{cost['tflops']:.2f}",
                f"{reference['tflops'] / cost['tflops']:.1f}", seconds, times,
            )
        )  # fmt: skip
    return markdown_table(head, rows)


if __name__ == "__main__":
    main()

"""Presets, loading and drawing, with small models of diffusers' own classes."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import DiffusionPipelines
from DiffusionPipelines import (
    PRESETS,
    ModelUnavailableError,
    check_drawing,
    choose_dtype,
    find_preset,
    is_on_this_machine,
    load_pipeline,
)
from Painter import Painter

PROMPTS = ["a cat", "a small dog", "a red truck on a road", "a bird"]


def load(preset, model):
    return load_pipeline(preset, model, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pipelines(models):
    """The pipeline of each preset, loaded once."""
    return {
        "reference": load("reference", models["stable"]),
        "fast": load("fast", models["stable"]),
        "turbo": load("turbo", models["turbo"]),
    }


@pytest.fixture(params=["reference", "fast", "turbo"])
def preset(request):
    return request.param


@pytest.fixture
def painter(pipelines, preset):
    steps = 6 if preset == "reference" else None  # 30 steps take long and prove nothing more
    return Painter(pipelines[preset], preset, steps, size=64, batch_size=4)


@pytest.fixture
def unet_batches(pipelines, preset):
    """The batch size of every pass through the UNet."""
    batches = []
    hook = pipelines[preset].unet.register_forward_pre_hook(
        lambda module, arguments: batches.append(len(arguments[0]))
    )
    yield batches
    hook.remove()


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def sources(n=4):
    noise = np.random.default_rng(0).integers(0, 256, size=(n, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(x) for x in noise]


# --- What a preset does -------------------------------------------------------------------------


def test_the_preset_reference_has_the_reference_studys_settings():
    preset = find_preset("reference")
    assert (preset.model, preset.steps, preset.guidance_scale) == ("CompVis/stable-diffusion-v1-4", 30, 7.5)
    assert (preset.batch_size, preset.guidance_interval, preset.solver, preset.tiny_decoder) == (
        1,
        *[None] * 3,
    )
    assert (preset.prompts, preset.clip_filter, DiffusionPipelines.SIZE) == ("reference", False, 512)
    with pytest.raises(ValueError, match=r"Unknown preset 'best'. Choose one of reference, fast, turbo"):
        find_preset("best")


# Images through the UNet per drawn image. PNDM, the model's own scheduler, takes 31 passes for 30 steps.
@pytest.mark.parametrize(
    ("preset", "passes"), [("reference", 62), ("fast", 22), ("turbo", 1)], indirect=["preset"]
)
def test_the_unet_sees_as_many_images_as_the_preset_promises(pipelines, preset, unet_batches, passes):
    Painter(pipelines[preset], preset, size=64, batch_size=2).draw(PROMPTS[:2], range(2))
    assert sum(unet_batches) == 2 * passes


@pytest.mark.parametrize("preset", ["fast"], indirect=True)
def test_guidance_doubles_the_batch_in_the_middle_only(painter, unet_batches):
    painter.draw(PROMPTS, range(4))
    assert unet_batches == [4] * 4 + [8] * 7 + [4] * 4
    low, high = PRESETS["fast"].guidance_interval
    sigmas = painter._text_to_image.scheduler.sigmas[:-1]
    assert [8 if low < sigma <= high else 4 for sigma in sigmas] == unet_batches


@pytest.mark.parametrize("preset", ["fast"], indirect=True)
def test_the_prompts_encoding_keeps_no_activations(painter):
    options = painter._limited_guidance(painter._text_to_image, PROMPTS, 15, 1)
    assert not options["prompt_embeds"].requires_grad and not options["negative_prompt_embeds"].requires_grad


@pytest.mark.parametrize("preset", ["fast"], indirect=True)
def test_guidance_in_the_whole_interval_is_the_pipelines_own_guidance(painter, monkeypatch):
    """Our way of switching guidance must not change what guidance computes."""
    limits = {"always": (0.0, 1e9), "never": (1e9, 2e9)}
    for name, interval in limits.items():
        settings = dataclasses.replace(PRESETS["fast"], guidance_interval=interval)
        monkeypatch.setattr(painter, "settings", settings)
        images, _ = painter.draw(PROMPTS, range(4))
        own = painter._text_to_image(
            PROMPTS, height=64, width=64, num_inference_steps=15, guidance_scale=7.5 if name == "always" else 1,
            generator=[torch.Generator().manual_seed(i) for i in range(4)],
        ).images  # fmt: skip
        assert np.array_equal(pixels(images), pixels(own))


@pytest.mark.parametrize("preset", ["fast"], indirect=True)
def test_limited_guidance_is_guidance_without_effect_outside_the_interval(painter, unet_batches):
    images, _ = painter.draw(PROMPTS, range(4))
    guided = [batch == 8 for batch in unet_batches]
    unet_batches.clear()

    def without_effect(module, arguments, output):
        """Outside the interval both halves of the doubled batch answer alike, so guidance changes nothing."""
        step = len(unet_batches) - 1
        return output if guided[step] else (torch.cat([output[0][4:]] * 2),)

    hook = painter._text_to_image.unet.register_forward_hook(without_effect)
    expected = painter._text_to_image(
        PROMPTS, height=64, width=64, num_inference_steps=15, guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(i) for i in range(4)],
    ).images  # fmt: skip
    hook.remove()
    assert unet_batches == [8] * 15  # this way it saves nothing
    assert np.abs(pixels(images) - pixels(expected)).max() <= 1


def test_an_image_depends_on_its_own_prompt_and_seed_alone(painter):
    together, flagged = painter.draw(PROMPTS, [5, 6, 7, 8])
    painter.batch_size = 1
    alone, _ = painter.draw(PROMPTS[::-1], [8, 7, 6, 5])
    assert flagged == [False] * 4
    assert np.abs(pixels(together) - pixels(alone[::-1])).max() <= 1
    # The tolerance hides nothing: other prompts and seeds make larger differences.
    other_seeds, _ = painter.draw(PROMPTS, [1, 2, 3, 4])
    other_prompts, _ = painter.draw(PROMPTS[::-1], [5, 6, 7, 8])
    assert np.abs(pixels(together) - pixels(other_seeds)).max(axis=(1, 2, 3)).min() > 10
    assert np.abs(pixels(together) - pixels(other_prompts)).max(axis=(1, 2, 3)).min() > 1


def test_the_callers_random_numbers_are_unaffected_and_have_no_influence(painter):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = painter.draw(PROMPTS, range(4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(pixels(first), pixels(painter.draw(PROMPTS, range(4))[0]))


# --- Image to image -----------------------------------------------------------------------------


def test_images_are_drawn_from_images_at_any_strength(painter):
    for strength in (0.25, 0.5, 1.0):
        together, _ = painter.draw(PROMPTS, range(4), sources(), strength)
        painter.batch_size = 1
        alone, _ = painter.draw(PROMPTS, range(4), sources(), strength)
        painter.batch_size = 4
        assert np.abs(pixels(together) - pixels(alone)).max() <= 1
        assert pixels(together).shape == (4, 64, 64, 3)


@pytest.mark.parametrize("preset", ["reference", "fast"], indirect=True)
def test_the_larger_the_strength_the_more_steps_and_the_less_of_the_source(painter, unet_batches):
    passes, distances = [], []
    for strength in (0.25, 0.5, 1.0):
        unet_batches.clear()
        # Two different sources, the same noise: what differs in the result comes from the source.
        a, _ = painter.draw(["a cat"], [0], sources(2)[:1], strength)
        b, _ = painter.draw(["a cat"], [0], sources(2)[1:], strength)
        passes.append(len(unet_batches))
        distances.append(np.abs(pixels(a) - pixels(b)).mean())
    assert passes == sorted(set(passes))
    assert distances[0] > distances[2]


# --- Memory -------------------------------------------------------------------------------------


def limit_memory(painter, most):
    """Let the UNet run out of memory, with CUDA's message, for more than ``most`` images."""

    def check(module, arguments):
        if len(arguments[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    return painter._text_to_image.unet.register_forward_pre_hook(check)


@pytest.mark.parametrize("preset", ["turbo"], indirect=True)
def test_out_of_memory_halves_the_batch_says_so_and_loses_nothing(painter, capsys):
    expected, _ = painter.draw(PROMPTS * 2, range(8))
    hook = limit_memory(painter, 1)
    try:
        images, flagged = painter.draw(PROMPTS * 2, range(8))
    finally:
        hook.remove()
    assert np.abs(pixels(images) - pixels(expected)).max() <= 1
    assert (painter.batch_size, flagged) == (1, [False] * 8)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == [
        "continuing with batches of 2.",
        "continuing with batches of 1.",
    ]
    assert all(line.startswith("Out of memory on cpu") for line in lines)


def test_one_image_that_does_not_fit_is_decoded_in_tiles_and_then_given_up(models, capsys):
    painter = Painter(load("turbo", models["turbo"]), "turbo", size=64, batch_size=1)
    limit_memory(painter, 0)
    painter._text_to_image.vae.tile_sample_min_size = 32
    with pytest.raises(MemoryError, match=r"too little memory on cpu for a single image of 64x64 .*'turbo'"):
        painter.draw(["a cat"], [0])
    assert "decoding in tiles" in capsys.readouterr().out


def test_in_tiles_an_image_is_drawn_from_another_in_half_precision(models):
    pipeline = load_pipeline("turbo", models["turbo"], device="cpu", dtype=torch.bfloat16)
    painter = Painter(pipeline, "turbo", size=64, batch_size=1)
    pipeline.vae.tile_sample_min_size = 32
    source = Image.fromarray(np.full((32, 32, 3), 90, dtype=np.uint8))
    whole, _ = painter.draw(["a cat"], [0], [source], 0.5)
    painter._save_memory("out of memory")
    assert pipeline.vae.use_tiling
    in_tiles, _ = painter.draw(["a cat"], [0], [source], 0.5)
    assert in_tiles[0].size == whole[0].size == (64, 64)


def test_an_image_no_larger_than_a_tile_is_not_drawn_again_for_nothing(models, capsys):
    painter = Painter(load("turbo", models["turbo"]), "turbo", size=64, batch_size=1)
    limit_memory(painter, 0)
    painter._text_to_image.vae.tile_sample_min_size = 64
    with pytest.raises(MemoryError, match="too little memory"):
        painter.draw(["a cat"], [0])
    assert "tiles" not in capsys.readouterr().out


def test_networks_are_moved_to_the_gpu_that_is_used_and_not_to_the_first_one():
    offloaded = []

    def offload(gpu_id=None, device=None):
        offloaded.append((gpu_id, device))

    device = torch.device("cuda:1")
    pipeline = SimpleNamespace(
        device=device, name_or_path="model", vae=None, enable_model_cpu_offload=offload
    )
    painter = Painter(pipeline, "turbo", batch_size=1)
    painter._save_memory("CUDA out of memory.")
    assert offloaded == [(None, device)]


@pytest.mark.parametrize("preset", ["turbo"], indirect=True)
def test_other_errors_are_not_taken_for_a_lack_of_memory(painter):
    def fail(module, arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    hook = painter._text_to_image.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1"):
        painter.draw(["a cat"], [0])
    hook.remove()
    assert painter.batch_size == 4


@pytest.mark.parametrize("steps", [1001, 10**9])
def test_more_steps_than_noise_levels_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be at most 1000, .*got {steps}"):
        check_drawing(steps, 64)
    check_drawing(1000, 8, 1)


@pytest.mark.parametrize("change", [{"steps": 0}, {"size": 100}, {"size": 0}, {"batch_size": 0}])
def test_impossible_numbers_are_refused(pipelines, change):
    with pytest.raises(ValueError, match="must be at least 1 and the size a multiple of 8"):
        Painter(pipelines["turbo"], "turbo", **change)


# --- Loading ------------------------------------------------------------------------------------


def test_the_weights_type_follows_the_device(monkeypatch):
    assert choose_dtype(torch.device("mps")) == torch.float32
    for device, half, expected in (
        ("cuda", torch.bfloat16, torch.float16),
        ("cuda", torch.float16, torch.float16),
        ("cuda", None, torch.float32),
        ("cpu", torch.bfloat16, torch.bfloat16),
        ("cpu", None, torch.float32),
    ):
        monkeypatch.setattr(DiffusionPipelines, "half_precision", lambda device, half=half: half)
        assert choose_dtype(torch.device(device)) == expected


@pytest.mark.parametrize(
    ("half", "expected"),
    [(torch.float16, torch.float32), (None, torch.float32), (torch.bfloat16, torch.float16)],
)
def test_cards_without_bfloat16_decode_in_float32(models, monkeypatch, half, expected):
    monkeypatch.setattr(DiffusionPipelines, "half_precision", lambda device: half)
    pipeline = load_pipeline("reference", models["stable"], device="cpu", dtype=torch.float16)
    assert {p.dtype for p in pipeline.vae.decoder.parameters()} == {expected}
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.float16
    latents = torch.randn(1, pipeline.vae.config.latent_channels, 8, 8, dtype=torch.float16)
    assert pipeline.vae.decode(latents).sample.dtype == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pipeline_is_loaded_in_the_type_asked_for(models, dtype):
    pipeline = load_pipeline("fast", models["stable"], device="cpu", dtype=dtype)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {dtype}
    images, _ = Painter(pipeline, "fast", size=64).draw(["a cat"], [0])
    assert images[0].size == (64, 64)


def test_half_precision_files_are_preferred_on_a_gpu_and_not_needed(models, tmp_path):
    """CUDA gets float16. Nothing is drawn with it here, because CPUs do not multiply in it."""
    whole = load_pipeline("reference", models["stable"], device="cpu", dtype=torch.float16)
    assert whole.unet.dtype == torch.float16
    whole.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").rglob("diffusion_pytorch_model.safetensors"))
    half = load_pipeline("reference", str(tmp_path / "half"), device="cpu", dtype=torch.float16)
    assert torch.equal(half.unet.conv_in.weight, whole.unet.conv_in.weight)


@pytest.fixture
def broken(models, tmp_path):
    """A copy of the model's folder, to break something in."""
    return Path(shutil.copytree(models["stable"], tmp_path / "broken"))


def shorten(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), r"model_index\.json is missing"),
        (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json is missing or damaged"),
        (lambda f: (f / "model_index.json").write_text("{}"), r"model_index\.json is missing or damaged"),
        (lambda f: (f / "model_index.json").write_text("[]"), r"model_index\.json is missing or damaged"),
        (lambda f: (f / "model_index.json").write_text("null"), r"model_index\.json is missing or damaged"),
        (lambda f: (f / "model_index.json").write_text('{"unet": []}'), r"model_index\.json is missing or damaged"),
        (lambda f: (f / "model_index.json").write_text("{}", "utf-16"), r"model_index\.json is missing or damaged"),
        (lambda f: shutil.rmtree(f / "unet"), "unet is missing"),
        (lambda f: shutil.rmtree(f / "safety_checker"), "safety_checker is missing"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), r"tokenizer has neither tokenizer\.json"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "diffusion_pytorch_model"),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "incomplete or damaged"),
        (lambda f: shorten(f / "unet" / "diffusion_pytorch_model.safetensors"), "incomplete or damaged"),
        (lambda f: shorten(f / "tiny_decoder" / "diffusion_pytorch_model.safetensors"), "tiny_decoder is incomplete"),
    ],
)  # fmt: skip
def test_an_incomplete_model_folder_is_named_with_what_is_wrong(broken, change, message):
    change(broken)
    with pytest.raises(ModelUnavailableError, match=message) as caught:
        load("fast", str(broken))
    assert str(broken) in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelUnavailableError, match=f"There is no model folder {name}"):
        load("fast", name)


@pytest.fixture
def empty_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_without_network_and_cache_one_error_says_what_to_do(empty_hub_cache, closed_url, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed_url)
    with pytest.raises(ModelUnavailableError) as caught:
        load("turbo", None)
    for part in (
        "stabilityai/sd-turbo",
        str(empty_hub_cache),
        closed_url,
        "hf download stabilityai/sd-turbo",
    ):
        assert part in str(caught.value)
    assert not is_on_this_machine("stabilityai/sd-turbo")


def test_what_the_hubs_cache_has_is_loaded_without_a_network(
    models, empty_hub_cache, closed_url, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed_url)
    snapshot = (
        empty_hub_cache / "models--somebody--tiny" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    )
    shutil.copytree(models["stable"], snapshot)
    (empty_hub_cache / "models--somebody--tiny" / "refs").mkdir()
    (empty_hub_cache / "models--somebody--tiny" / "refs" / "main").write_text(snapshot.name)
    assert is_on_this_machine("somebody/tiny")
    pipeline = load("reference", "somebody/tiny")
    assert torch.equal(pipeline.unet.conv_in.weight, load("reference", models["stable"]).unet.conv_in.weight)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelUnavailableError, match="somebody/tiny is not complete in the cache"):
        load("reference", "somebody/tiny")


def test_a_full_disk_is_noticed_before_the_download(empty_hub_cache, monkeypatch):
    monkeypatch.setattr(DiffusionPipelines, "is_reachable", lambda url: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    with pytest.raises(OSError, match=r"has 1\.00 GB free, but 6\.00 GB are needed"):
        load("turbo", None)


def test_a_model_of_another_kind_is_refused_where_guidance_is_limited(models, monkeypatch):
    import diffusers

    class Other:
        from_pretrained = classmethod(lambda cls, *arguments, **options: cls())

    monkeypatch.setattr(diffusers, "AutoPipelineForText2Image", Other)
    with pytest.raises(ValueError, match=r"'fast' limits guidance .* is a Other"):
        load("fast", models["stable"])


@pytest.mark.parametrize("content", [None, b"no adapter"])
def test_a_missing_or_damaged_adapter_is_named(models, tmp_path, content):
    folder = tmp_path / "adapter"
    if content is not None:
        folder.mkdir()
        (folder / "pytorch_lora_weights.safetensors").write_bytes(content)
    with pytest.raises(
        (ModelUnavailableError, ValueError), match=r"adapter.*LoRATraining|adapter is damaged"
    ):
        load_pipeline("fast", models["stable"], folder, "cpu", torch.float32)


def test_the_folders_of_these_tests_are_real_pipelines(models):
    index = json.loads(Path(models["stable"], "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"][1] == "StableDiffusionSafetyChecker"
    assert json.loads(Path(models["turbo"], "model_index.json").read_text())["safety_checker"] == [None, None]
    assert is_on_this_machine(models["turbo"])


# --- Half-precision files only ------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(models, tmp_path_factory):
    """A model folder with fp16 files only, as a download for GPUs leaves it."""
    folder = tmp_path_factory.mktemp("half") / "model"
    whole = load_pipeline("reference", models["stable"], device="cpu", dtype=torch.float16)
    whole.save_pretrained(folder, variant="fp16")
    return folder


def test_half_precision_files_serve_a_drawing_in_float32(half, models):
    pipeline = load("reference", str(half))
    assert pipeline.unet.dtype == torch.float32
    whole = load("reference", models["stable"])
    assert torch.equal(pipeline.unet.conv_in.weight, whole.unet.conv_in.weight.half().float())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "safety_checker"])
def test_one_part_in_half_precision_serves_too(half, models, tmp_path, part):
    mixed = Path(shutil.copytree(models["stable"], tmp_path / "mixed"))
    shutil.rmtree(mixed / part)
    shutil.copytree(half / part, mixed / part)
    assert getattr(load("reference", str(mixed)), part).dtype == torch.float32


def test_a_decoder_in_half_precision_serves_too(models, tmp_path):
    folder = Path(shutil.copytree(models["stable"], tmp_path / "model"))
    weights = folder / "tiny_decoder" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load("fast", str(folder)).vae.dtype == torch.float32


def test_damaged_half_precision_files_are_still_damaged(half, tmp_path):
    folder = Path(shutil.copytree(half, tmp_path / "damaged"))
    shorten(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ModelUnavailableError, match="damaged is incomplete or damaged"):
        load("reference", str(folder))


def test_an_offline_cache_with_half_precision_only_serves_float32(
    half, empty_hub_cache, closed_url, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed_url)
    snapshot = (
        empty_hub_cache / "models--somebody--half" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    )
    shutil.copytree(half, snapshot)
    (empty_hub_cache / "models--somebody--half" / "refs").mkdir()
    (empty_hub_cache / "models--somebody--half" / "refs" / "main").write_text(snapshot.name)
    assert load("reference", "somebody/half").unet.dtype == torch.float32


def test_a_tilde_in_a_model_folder_is_the_home_folder(models, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(models["stable"]).parent))
    assert is_on_this_machine("~/stable")
    assert load("reference", "~/stable").unet.dtype == torch.float32


# --- Numbers that are not finite ----------------------------------------------------------------

BROKEN = {
    "unet": "conv_in.weight",
    "text_encoder": "text_model.final_layer_norm.weight",
    "vae": "decoder.conv_in.weight",
    "safety_checker": "concept_embeds",
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "name"), BROKEN.items())
def test_a_model_with_a_weight_that_is_not_finite_is_refused_by_name(broken, part, name, value):
    [file] = (broken / part).glob("*.safetensors")
    weights = load_file(file)
    name = next(key for key in weights if key.endswith(name.removeprefix("text_model.")))
    weights[name].view(-1)[-1] = value
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        FloatingPointError, match=rf"broken has a weight .*not finite.*{part}\..*Get the model again"
    ):
        load("reference", str(broken))


def test_weights_that_overflow_in_half_precision_are_told_from_damage(broken):
    [file] = (broken / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = 1e6
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        FloatingPointError, match=r"unet\.conv_in\.weight in float16: .*Choose float32 \(--dtype float32\)"
    ):
        load_pipeline("reference", str(broken), device="cpu", dtype=torch.float16)
    load("reference", str(broken))


def test_an_adapter_with_a_weight_that_is_not_finite_is_refused_by_name(models, tmp_path):
    pipeline = load("reference", models["stable"])
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline.unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    adapter = get_peft_model_state_dict(pipeline.unet)
    next(iter(adapter.values())).view(-1)[0] = float("nan")
    type(pipeline).save_lora_weights(tmp_path / "adapter", unet_lora_layers=adapter)
    with pytest.raises(FloatingPointError, match="with the adapter in .*adapter has a weight"):
        load_pipeline("reference", models["stable"], tmp_path / "adapter", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("preset", "part", "message"),
    [
        ("turbo", lambda p: p.unet.conv_out, "What the diffusion network drew"),
        ("fast", lambda p: p.unet.conv_out, "What the diffusion network drew"),
        ("reference", lambda p: p.text_encoder, "What the diffusion network drew"),
        ("turbo", lambda p: p.vae.decoder, "What the decoder made"),
        ("reference", lambda p: p.vae.decoder, "What the decoder made"),
        ("reference", lambda p: p.safety_checker.visual_projection, "The safety checker's judgement"),
    ],
    indirect=["preset"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_overflow_while_drawing_give_no_image(painter, pipelines, preset, part, message, value):
    def overflow(module, inputs, output):
        values = output if torch.is_tensor(output) else output[0]
        values[-1, ..., -1] = value
        return output

    hook = part(pipelines[preset]).register_forward_hook(overflow)
    try:
        with pytest.raises(
            FloatingPointError, match=f"{message}.* by the model .* in float32 has numbers .*not finite"
        ):
            painter.draw(PROMPTS[:2], range(2))
    finally:
        hook.remove()
    assert len(painter.draw(PROMPTS[:2], range(2))[0]) == 2

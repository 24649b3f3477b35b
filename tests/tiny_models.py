"""Models of diffusers' and transformers' real classes with random weights, small enough to draw in milliseconds.

Their images have 64x64 pixels and show nothing. The models serve to test the code around them.
"""

import torch

PROMPT_LENGTH = 256  # tokens; here a token is a letter


def _tokenizer():
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    # Every byte is a token, so that every prompt can be spelled and different prompts have different tokens.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, [], model_max_length=PROMPT_LENGTH)


def _clip_config(tokenizer):
    from transformers import CLIPConfig

    size = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = size | {
        "vocab_size": len(tokenizer), "max_position_embeddings": PROMPT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return CLIPConfig(
        text_config=text, vision_config=size | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )


def _image_processor():
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def save_pipeline(folder):
    """A Stable Diffusion v1.x pipeline with its safety checker, and a tiny decoder beside it."""
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = _clip_config(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8, norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    for name, weight in unet.named_parameters():
        if "attn2.to_out" in name:  # so that the text changes more than the last bit of an image
            weight.data *= 20
    vae = AutoencoderKL(
        block_out_channels=(16,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        vae, CLIPTextModel(config.text_config), tokenizer, unet, scheduler,
        StableDiffusionSafetyChecker(config), _image_processor(),
    ).save_pretrained(folder)  # fmt: skip
    channels = (8,) * 4
    decoder = AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
    )  # fmt: skip
    for name, weight in decoder.decoder.named_parameters():
        if name.endswith("bias"):
            weight.data.zero_()  # biases are the same in all images and would hide the differences
    decoder.decoder.layers[-1].bias.data.fill_(0.5)
    decoder.decoder.layers[-1].weight.data *= 8
    decoder.save_pretrained(folder / "tiny_decoder")


def save_turbo(folder, source):
    """A pipeline like SD-Turbo's, with one Euler step and no safety checker."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        source, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline.save_pretrained(folder)


def save_clip(folder):
    """A CLIP model with its processor."""
    from transformers import CLIPModel, CLIPProcessor

    torch.manual_seed(1)
    tokenizer = _tokenizer()
    CLIPModel(_clip_config(tokenizer)).save_pretrained(folder)
    CLIPProcessor(_image_processor(), tokenizer).save_pretrained(folder)


def make_strict(pipeline, images):
    """Set the pipeline's safety checker so that it flags about half of all images like the given ones."""
    checker = pipeline.safety_checker
    with torch.no_grad():
        inputs = pipeline.feature_extractor(images, return_tensors="pt").pixel_values
        embeddings = checker.visual_projection(checker.vision_model(inputs)[1])
        concept = torch.nn.functional.normalize(embeddings[0] - embeddings.mean(0), dim=0)
        cosines = torch.nn.functional.normalize(embeddings) @ concept
        checker.concept_embeds[0] = concept
        checker.concept_embeds_weights[0] = cosines.median()

"""Small twins of Stable Diffusion as diffusers pipelines: the same classes with few channels and random weights.

    sd15    one CLIP text encoder, epsilon, PNDM                    attention heads fixed in number
    sd21    one OpenCLIP text encoder (GELU, pads with "!"), v-prediction, DDIM, linear projections
    sdxl    two text encoders, pooled text and picture sizes beside the tokens, Euler; three levels
    turbo   sdxl with Euler-ancestral and trailing timesteps, made for one to four steps without guidance

With wide=True channels are what the original code fixes: norms of 32 groups, 8 heads (sd15) or heads of 64.

`pipe.save_pretrained(folder)` writes the folder that users have. Latents are 8x8, pictures 64x64.
"""

from __future__ import annotations

from typing import Any

import torch
from clip_words import TOKENS, vocabulary
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from export_helpers import randomize
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LATENTS = 8
PICTURE = 64

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULER: dict[str, Any] = {**BETAS, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
BLOCKS: dict[str, Any] = {
    **{"sample_size": LATENTS, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8},
    **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (16, 32)},
    **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2, "cross_attention_dim": 24},
}
AUTOENCODER: dict[str, Any] = {
    **{"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
}
XL_BLOCKS: dict[str, Any] = {
    **{"block_out_channels": (16, 32, 32), "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (1, 2, 2)},
    **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")},
    **{"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True},
    **{"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 24 + 32},
    **{"projection_class_embeddings_input_dim": 6 * 8 + 20},
}


def tokenizer(*, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    tokens, merges = vocabulary()
    return CLIPTokenizer(vocab=tokens, merges=merges, pad_token=pad, model_max_length=TOKENS)


WIDE_BLOCKS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 64), "attention_head_dim": 8, "cross_attention_dim": 64},
    "sd21": {"block_out_channels": (64, 128), "cross_attention_dim": 64},
    "sdxl": {
        **{"block_out_channels": (64, 128, 128), "cross_attention_dim": 64 + 128, "addition_time_embed_dim": 256},
        "projection_class_embeddings_input_dim": 6 * 256 + 20,
    },
}
WIDE_AUTOENCODER = {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}


def text_config(width: int, layers: int, act: str, *, heads: int = 2, projection: int = 20) -> CLIPTextConfig:
    tokens, _ = vocabulary()
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        hidden_act=act,
        projection_dim=projection,
        bos_token_id=tokens["<|startoftext|>"],
        eos_token_id=tokens["<|endoftext|>"],
        pad_token_id=tokens["<|endoftext|>"],
    )


def sd15(*, wide: bool = False, **unet: Any) -> StableDiffusionPipeline:
    scheduler = PNDMScheduler(
        **BETAS, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True, timestep_spacing="leading"
    )
    text = text_config(64, 3, "quick_gelu", heads=1) if wide else text_config(24, 3, "quick_gelu")
    return _one_encoder("sd15", scheduler, tokenizer(), text, unet, wide=wide)


def sd21(*, wide: bool = False, **unet: Any) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type="v_prediction", timestep_spacing="leading")
    unet = {"use_linear_projection": True, "attention_head_dim": (1, 2), **unet}
    text = text_config(64, 2, "gelu", heads=1) if wide else text_config(24, 2, "gelu")
    return _one_encoder("sd21", scheduler, tokenizer(pad="!"), text, unet, wide=wide)


def sdxl(*, wide: bool = False, **unet: Any) -> StableDiffusionXLPipeline:
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading", interpolation_type="linear")
    return _two_encoders(scheduler, unet, wide=wide)


def turbo(**unet: Any) -> StableDiffusionXLPipeline:
    return _two_encoders(EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="trailing"), unet)


TWINS = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl, "turbo": turbo}


def _one_encoder(
    name: str, scheduler: Any, words: CLIPTokenizer, config: CLIPTextConfig, unet: dict[str, Any], *, wide: bool
) -> StableDiffusionPipeline:
    return _ready(
        StableDiffusionPipeline(
            vae=_autoencoder(0.18215, wide=wide),
            text_encoder=randomize(CLIPTextModel(config), 2),
            tokenizer=words,
            unet=_unet(name, unet, wide=wide),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def _two_encoders(scheduler: Any, unet: dict[str, Any], *, wide: bool = False) -> StableDiffusionXLPipeline:
    one = text_config(64, 3, "quick_gelu", heads=1) if wide else text_config(24, 3, "quick_gelu")
    two = text_config(128, 3, "gelu") if wide else text_config(32, 3, "gelu")
    return _ready(
        StableDiffusionXLPipeline(
            vae=_autoencoder(0.13025, wide=wide),
            text_encoder=randomize(CLIPTextModel(one), 2),
            text_encoder_2=randomize(CLIPTextModelWithProjection(two), 4),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(pad="!"),
            unet=_unet("sdxl", {**XL_BLOCKS, **unet}, wide=wide),
            scheduler=scheduler,
            add_watermarker=False,
        )
    )


def _unet(name: str, blocks: dict[str, Any], *, wide: bool) -> UNet2DConditionModel:
    wider = {**WIDE_BLOCKS[name], "norm_num_groups": 32} if wide else {}
    return randomize(UNet2DConditionModel(**{**BLOCKS, **blocks, **wider}), 3)


def _autoencoder(scaling_factor: float, *, wide: bool) -> AutoencoderKL:
    wider = WIDE_AUTOENCODER if wide else {}
    return randomize(AutoencoderKL(**{**AUTOENCODER, **wider}, scaling_factor=scaling_factor), 1)


def _ready(pipe: DiffusionPipeline) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipe

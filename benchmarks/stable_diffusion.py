"""Write Stable Diffusion 1.5 or XL as a diffusers folder at its true shape, random weights.

    python benchmarks/stable_diffusion.py sd15 FOLDER        then the command that it prints

sd15: UNet 860 M parameters, latents of 4x64x64, one text encoder; float32, 4.1 GB. sdxl: UNet 2.6 B, latents of
4x128x128, two text encoders; float16, 6.9 GB, as both are published. The vocabulary is that of single bytes; all other
shapes are the published configurations. Time and memory of an export depend on shapes alone, and so do speeds.
Sources: stable-diffusion-v1-5/stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0 on huggingface.co.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

START, END = 49406, 49407
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        **{"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": {
        **{"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20)},
        **{"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10)},
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        **{"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256},
        "projection_class_embeddings_input_dim": 2816,
    },
}
AUTOENCODER: dict[str, Any] = {
    **{"block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "layers_per_block": 2},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(UNETS))
    parser.add_argument("folder", type=Path, help="where the diffusers folder is written")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    write = {"sd15": write_sd15, "sdxl": write_sdxl}[arguments.model]
    write(arguments.folder)
    command = ["qncd-export", str(arguments.folder), "--int8", "--name", arguments.model, "--n-steps", "4"]
    command += ["--calib-size", "2", "--calib-steps", "4", "--eval-size", "2", "--fit-size", "2"]
    print(shlex.join(command))


def write_sd15(folder: Path) -> None:
    StableDiffusionPipeline(
        unet=_random(lambda: UNet2DConditionModel(**UNETS["sd15"])),
        vae=_random(lambda: AutoencoderKL(**AUTOENCODER, scaling_factor=0.18215)),
        text_encoder=_random(lambda: CLIPTextModel(_text(768, 12, 12, "quick_gelu", projection=768))),
        tokenizer=_tokenizer("<|endoftext|>"),
        scheduler=PNDMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_sdxl(folder: Path) -> None:
    StableDiffusionXLPipeline(
        unet=_random(lambda: UNet2DConditionModel(**UNETS["sdxl"])).half(),
        vae=_random(lambda: AutoencoderKL(**AUTOENCODER, scaling_factor=0.13025)).half(),
        text_encoder=_random(lambda: CLIPTextModel(_text(768, 12, 12, "quick_gelu", projection=768))).half(),
        text_encoder_2=_random(
            lambda: CLIPTextModelWithProjection(_text(1280, 32, 20, "gelu", projection=1280))
        ).half(),
        tokenizer=_tokenizer("<|endoftext|>"),
        tokenizer_2=_tokenizer("!"),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(folder)


def _tokenizer(pad: str) -> CLIPTokenizer:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda symbol: (ord(symbol) > 255, ord(symbol)))
    tokens = {token: number for number, token in enumerate([*symbols, *(f"{symbol}</w>" for symbol in symbols)])}
    tokens |= {"<|startoftext|>": START, "<|endoftext|>": END}
    return CLIPTokenizer(vocab=tokens, merges=[], pad_token=pad, model_max_length=77)


def _text(width: int, layers: int, heads: int, activation: str, *, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=END + 1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=projection,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )


def _random(build: Callable[[], ModelMixin]) -> ModelMixin:
    """Weights of variance 1 / fan-in keep activations near 1 between the norms; norms scale by about 1."""
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu").requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=float(name.endswith("weight")), std=0.1)
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]))
    return module


if __name__ == "__main__":
    main()

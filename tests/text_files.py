"""The twins of text_models as single files in the original layout, with a tokenizer/ folder beside them.

The UNet and the decoder are written by the names that the reader looks for, which tests check against diffusers' own
converter; the text towers by names written out here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from text_models import TWINS, tokenizer
from torch import Tensor

from qncd_deploy.models.first_stage import LatentDecoder, decoder_sources
from qncd_deploy.models.ldm_config import Section
from qncd_deploy.models.ldm_unet import read_unet_params, unet_sources

UNET, STAGE = "model.diffusion_model.", "first_stage_model."


def written(name: str, folder: Path) -> tuple[Any, Path]:
    """(pipeline, the file of the same weights)."""
    pipe = TWINS[name](wide=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.contiguous().clone() for key, value in state_of(name, pipe).items()}, folder / f"{name}.safetensors"
    )
    tokenizer().save_pretrained(folder / "tokenizer")
    return pipe, folder / f"{name}.safetensors"


COMMON: dict[str, Any] = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": 1, "use_spatial_transformer": True},
    **{"use_checkpoint": True, "legacy": False},
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        **COMMON,
        **{"model_channels": 32, "channel_mult": [1, 2], "attention_resolutions": [1], "num_heads": 8},
        **{"transformer_depth": 1, "context_dim": 64},
    },
    "sd21": {
        **COMMON,
        **{"model_channels": 64, "channel_mult": [1, 2], "attention_resolutions": [1], "num_head_channels": 64},
        **{"transformer_depth": 1, "context_dim": 64, "use_linear_in_transformer": True},
    },
    "sdxl": {
        **COMMON,
        **{"model_channels": 64, "channel_mult": [1, 2, 2], "attention_resolutions": [4, 2], "num_head_channels": 64},
        **{"transformer_depth": [1, 1, 2], "context_dim": 192, "use_linear_in_transformer": True},
        **{"num_classes": "sequential", "adm_in_channels": 6 * 256 + 20},
    },
}
"""`unet_config.params` of the YAMLs that the wide twins would have."""


def yaml_of(name: str) -> dict[str, Any]:
    """The YAML of a Stable Diffusion 1 or 2, as the repositories have it."""
    ddconfig = {
        **{"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32},
        **{"ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
    }
    clip = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    open_clip = {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    }
    params = {
        **{"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "image_size": 8, "scale_factor": 0.18215},
        **{"conditioning_key": "crossattn", "use_ema": False},
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNETS[name]},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 4, "ddconfig": ddconfig},
        },
        "cond_stage_config": clip if name == "sd15" else open_clip,
        **({} if name == "sd15" else {"parameterization": "v"}),
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def state_of(name: str, pipe: Any) -> dict[str, Tensor]:
    params = read_unet_params(Section(Path("model.yaml"), "", UNETS[name]))
    parameters = pipe.unet.state_dict()
    state = {UNET + source.key: parameters[key] for key, source in unet_sources(pipe.unet, params).items()}
    decoder = LatentDecoder(pipe.vae.decoder, pipe.vae.post_quant_conv, None, 1.0)
    for key, source in decoder_sources(decoder).items():
        state[STAGE + source.key] = decoder.state_dict()[key].reshape(source.shape)
    state[f"{STAGE}encoder.conv_in.bias"] = torch.zeros(3)
    state["alphas_cumprod"] = pipe.scheduler.alphas_cumprod
    if name == "sd15":
        return state | clip_state(pipe.text_encoder, "cond_stage_model.transformer.")
    if name == "sd21":
        return state | open_clip_state(pipe.text_encoder, "cond_stage_model.model.", unused=True)
    state |= clip_state(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    return state | open_clip_state(pipe.text_encoder_2, "conditioner.embedders.1.model.", unused=False)


def clip_state(model: Any, prefix: str) -> dict[str, Tensor]:
    """Under the names of transformers before 5.6, with the position ids of before 4.31."""
    state = {
        f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in model.state_dict().items()
    }
    return state | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip_state(model: Any, prefix: str, *, unused: bool) -> dict[str, Tensor]:
    """A tower as OpenCLIP writes it; unused: with a last layer and a projection that Stable Diffusion 2 leaves out."""
    held = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    layers = model.config.num_hidden_layers
    width = model.config.hidden_size
    state = {
        "token_embedding.weight": held["embeddings.token_embedding.weight"],
        "positional_embedding": held["embeddings.position_embedding.weight"],
        "ln_final.weight": held["final_layer_norm.weight"],
        "ln_final.bias": held["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": torch.ones(width, 7) if unused else held["text_projection.weight"].T,
    }
    for layer in range(layers + unused):
        ours, theirs = f"encoder.layers.{min(layer, layers - 1)}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            fused = [held[f"{ours}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            state[f"{theirs}attn.in_proj_{kind}"] = torch.cat(fused)
            state[f"{theirs}attn.out_proj.{kind}"] = held[f"{ours}self_attn.out_proj.{kind}"]
            state[f"{theirs}ln_1.{kind}"] = held[f"{ours}layer_norm1.{kind}"]
            state[f"{theirs}ln_2.{kind}"] = held[f"{ours}layer_norm2.{kind}"]
            state[f"{theirs}mlp.c_fc.{kind}"] = held[f"{ours}mlp.fc1.{kind}"]
            state[f"{theirs}mlp.c_proj.{kind}"] = held[f"{ours}mlp.fc2.{kind}"]
    return {prefix + key: value for key, value in state.items()}

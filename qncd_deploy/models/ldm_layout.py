"""The config of a Stable Diffusion file, read off its tensors, for files that come without a YAML.

    cond_stage_model.transformer.*      Stable Diffusion 1: CLIP, 8 attention heads
    cond_stage_model.model.*            Stable Diffusion 2: OpenCLIP, heads of 64 channels
    conditioner.embedders.{0,1}.*       Stable Diffusion XL: both

Channels, blocks, attention and depths are in the tensors' shapes. What is not is taken from the published configs:
heads, betas, the scale of the latents, their size, and what the network predicts. generative-models' YAML says all of
these but heads and size, by other names.
Source: CompVis/stable-diffusion v1-inference.yaml; Stability-AI/stablediffusion v2-inference-v.yaml;
Stability-AI/generative-models sd_xl_base.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from qncd_deploy.checkpoint import Checkpoint
from qncd_deploy.errors import CheckpointError
from qncd_deploy.models.ldm_config import Section
from qncd_deploy.models.source import REFINER

CLIP, OPEN_CLIP, BOTH = "FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "GeneralConditioner"
_TOWERS = {"cond_stage_model.transformer.": CLIP, "cond_stage_model.model.": OPEN_CLIP, "conditioner.": BOTH}
_LATENTS = {CLIP: 64, OPEN_CLIP: 96, BOTH: 128}
_SCALES = {CLIP: 0.18215, OPEN_CLIP: 0.18215, BOTH: 0.13025}
_NOISE_PREDICTOR = 875000
"""global_step of the release of Stable Diffusion 2 that predicts noise, at 512 pixels; diffusers tells it so too."""


def engine_params(model: Section) -> dict[str, Any]:
    """What generative-models' YAML says and tensors do not, as entries of CompVis' `params`.

    model: its `model` section, of a DiffusionEngine. Raises CheckpointError for what would make another sampler.
    """
    params = model.section("params")
    denoiser = params.section("denoiser_config")
    if denoiser.target() != "DiscreteDenoiser":
        denoiser.fail("target", f"is {denoiser.target()}, only DiscreteDenoiser is supported.")
    inner = denoiser.section("params")
    inner.only({key: None for key in _DENOISER} | {"do_append_zero": False, "flip": True})
    scaling, betas = inner.section("scaling_config"), inner.section("discretization_config")
    if scaling.target() not in _SCALINGS:
        scaling.fail("target", f"is {scaling.target()}, expected one of {', '.join(_SCALINGS)}.")
    if betas.target() != "LegacyDDPMDiscretization":
        betas.fail("target", f"is {betas.target()}, only LegacyDDPMDiscretization is supported.")
    legacy = betas.section("params") if betas.entries.get("params") else Section(betas.file, betas.place, {})
    legacy.only(dict.fromkeys(_LEGACY))
    found = {key: legacy.get(key, default) for key, default in _LEGACY.items()}
    steps = found.pop("num_timesteps")
    if inner.need("num_idx", int) != steps:
        inner.fail("num_idx", f"is {inner.need('num_idx', int)}, only all {steps} timesteps are supported.")
    scale = params.get("scale_factor", 1.0)
    return {**found, "timesteps": steps, "parameterization": _SCALINGS[scaling.target()], "scale_factor": scale}


_DENOISER = ("num_idx", "scaling_config", "discretization_config", "weighting_config", "quantize_c_noise")
_LEGACY = {"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps": 1000}
_SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}


def describe(
    checkpoint: Checkpoint, said: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Section, tuple[str, ...]] | None:
    """(the `model` section of the YAML that the file would have, notes on what was assumed), None for other files.

    said: entries of its `params` that are known.

    Raises: CheckpointError if a part of the model is missing.
    """
    tower = next(
        (t for prefix, t in _TOWERS.items() if any(key.startswith(prefix) for key in checkpoint.tensors)), None
    )
    if tower is None:
        return None
    if any(key.startswith("conditioner.embedders.0.model.") for key in checkpoint.tensors):
        raise CheckpointError(f"{checkpoint.path}: {REFINER}")
    unet, stage = checkpoint.below("model.diffusion_model."), checkpoint.below("first_stage_model.")
    for needed in ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"):
        if needed not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: holds no '{needed}'. Give the file of the whole model.")
    notes: tuple[str, ...] = ()
    predicts_v = False
    if "parameterization" in said:
        predicts_v = said["parameterization"] == "v"
    elif tower == OPEN_CLIP:
        predicts_v = checkpoint.scalars.get("global_step") != _NOISE_PREDICTOR
        kind = "768, which predicts v" if predicts_v else "base, which predicts noise"
        notes = (f"Taken for Stable Diffusion 2 {kind}; put the model's YAML beside the file if it is another.",)
    params = {
        **{"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "scale_factor": _SCALES[tower]},
        "parameterization": "v" if predicts_v else "eps",
        "image_size": 64 if tower == OPEN_CLIP and not predicts_v else _LATENTS[tower],
        "unet_config": {"target": "UNetModel", "params": _unet(unet, tower)},
        "first_stage_config": {"target": "AutoencoderKL", "params": _first_stage(stage)},
        "cond_stage_config": {"target": tower, "params": {"layer": "penultimate"} if tower == OPEN_CLIP else {}},
        **said,
    }
    return Section(checkpoint.path, "model", {"target": "LatentDiffusion", "params": params}), notes


def _unet(tensors: Mapping[str, Tensor], tower: str) -> dict[str, Any]:
    """`unet_config.params`: blocks are walked from the input; a downsampling ends a level."""
    channels = tensors["input_blocks.0.0.weight"].shape[0]
    levels: list[list[tuple[int, int]]] = [[]]  # (channels, transformer blocks) of every residual block, level by level
    for index in range(1, count_after(tensors, "input_blocks.")):
        block = f"input_blocks.{index}."
        if f"{block}0.op.weight" in tensors:
            levels.append([])
        elif (out := tensors.get(f"{block}0.out_layers.3.weight")) is not None:
            levels[-1].append((out.shape[0], count_after(tensors, f"{block}1.transformer_blocks.")))
    keys = [key for key in tensors if key.endswith(".attn2.to_k.weight")]
    linear = any(key.endswith(".1.proj_in.weight") and value.ndim == 2 for key, value in tensors.items())
    labels = tensors.get("label_emb.0.0.weight")
    depths = [level[0][1] if level else 0 for level in levels]
    return {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "model_channels": channels,
        "num_res_blocks": len(levels[0]),
        "channel_mult": [level[0][0] // channels if level else 0 for level in levels],
        "attention_resolutions": [2**level for level, depth in enumerate(depths) if depth],
        "transformer_depth": [max(1, depth) for depth in depths],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": linear,
        "context_dim": tensors[keys[0]].shape[1] if keys else 0,
        **({"num_heads": 8} if tower == CLIP else {"num_head_channels": 64}),
        **({} if labels is None else {"num_classes": "sequential", "adm_in_channels": labels.shape[1]}),
    }


def _first_stage(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`first_stage_config.params` of a KL autoencoder."""
    levels = count_after(tensors, "decoder.up.")
    widths = [tensors[f"decoder.up.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    resolution = 256
    attention = [level for level in range(levels) if count_after(tensors, f"decoder.up.{level}.attn.")]
    return {
        "embed_dim": tensors["post_quant_conv.weight"].shape[1],
        "ddconfig": {
            "z_channels": tensors["decoder.conv_in.weight"].shape[1],
            "resolution": resolution,
            "out_ch": tensors["decoder.conv_out.weight"].shape[0],
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": count_after(tensors, "decoder.up.0.block.") - 1,
            "attn_resolutions": [resolution // 2**level for level in attention],
        },
    }


def count_after(names: Iterable[str], prefix: str) -> int:
    """One more than the highest number that follows the prefix; 0 if it occurs nowhere."""
    numbers = (re.match(r"\d+", name[len(prefix) :]) for name in names if name.startswith(prefix))
    return max((int(number[0]) + 1 for number in numbers if number), default=0)

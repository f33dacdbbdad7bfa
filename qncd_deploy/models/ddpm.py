"""DDPM in pixels: the checkpoints that Q-Diffusion's and QNCD's CIFAR-10 scripts load -> SourceModel.

    down.i.block.j, mid, up.i.block.j, temb.dense, conv_in, norm_out, conv_out     see ddpm_layout
    its YAML (configs/cifar10.yml), if given: model, data, diffusion

Without a YAML the tensors' shapes describe the network, and published habits the rest: attention at 16x16 alone, betas
from 1e-4 to 0.02 in 1000 steps (Ho et al., arXiv:2006.11239, section 4 and appendix B). Sampling follows
ermongroup/ddim, whose scripts those are: timesteps 0, T/n, ..., the last target without noise, x_0 not clipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor

from qncd_deploy.checkpoint import Checkpoint, Source, load_weights
from qncd_deploy.errors import CheckpointError, UsageError
from qncd_deploy.models.ddpm_layout import GROUPS, ddpm_source
from qncd_deploy.models.ldm_config import Section, read_config
from qncd_deploy.models.source import SourceModel
from qncd_deploy.schedule import Schedule, Variance, betas_of

_PARALLEL = "module."  # what torch's DataParallel puts before every name
_ATTENTION_SIDE = 16
_VARIANCES: dict[str, Variance] = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
_BETA_SCHEDULES = {"linear": "linear", "quad": "scaled_linear"}  # theirs: ours
_MODEL_KNOWN: dict[str, object] = {
    **dict.fromkeys(["in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "var_type"]),
    # How it was trained, not what it computes.
    **dict.fromkeys(["dropout", "ema", "ema_rate"]),
    "type": "simple",
    "resamp_with_conv": True,
}
_DATA_KNOWN: dict[str, object] = {
    **dict.fromkeys(["image_size", "channels"]),
    **dict.fromkeys(["dataset", "category", "random_flip", "num_workers", "uniform_dequantization"]),
    "gaussian_dequantization": None,
    "logit_transform": False,
    "rescaled": True,
}


@dataclass(frozen=True)
class DDPMParams:
    """What shapes the network; `attention` per level, the full resolution first; `variance` is ancestral sampling's."""

    image_size: int
    in_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    variance: Variance


def is_ddpm(checkpoint: Checkpoint) -> bool:
    """Whether the tensors have DDPM's names."""
    return any(name.removeprefix(_PARALLEL).startswith("down.0.block.") for name in checkpoint.tensors)


def read(checkpoint: Checkpoint, config: Path | None, *, null_class: int | None, scheduler: str | None) -> SourceModel:
    """Read a DDPM checkpoint; see `load_source` for the arguments and the errors."""
    path = checkpoint.path
    if null_class is not None:
        raise UsageError(f"--null-class {null_class}: {path} is not class-conditional. Leave it out.")
    tensors = {name.removeprefix(_PARALLEL): value for name, value in checkpoint.tensors.items()}
    config = _config_beside(path) if config is None else config
    notes = []
    if config is None:
        params = _params_of(tensors, path)
        schedule = _schedule(betas_of("linear", 1e-4, 2e-2, 1000), params, scheduler)
        notes.append(
            f"No config: by its tensors a DDPM for pictures of {params.image_size}x{params.image_size}, with the "
            "published betas."
        )
    else:
        root = read_config(config)
        params = _read_params(root)
        schedule = _schedule(_read_betas(root.section("diffusion")), params, scheduler)
    unet = build_unet(params)
    load_weights(
        unet,
        unet_sources(unet),
        tensors,
        where=str(path),
        asked_by="its own layout" if config is None else str(config),
        blame=lambda key, dim: "that the file is whole" if config is None else _entry(key, dim),
    )
    shape = (params.in_channels, params.image_size, params.image_size)
    return SourceModel(
        family="ddpm",
        unet=unet,
        latent_shape=shape,
        image_shape=shape,
        schedule=schedule,
        scheduler=scheduler or "ddim",
        condition=None,
        decoder=None,
        files={"checkpoint": path} | ({} if config is None else {"config": config}),
        notes=tuple(notes),
    )


def build_unet(params: DDPMParams) -> UNet2DModel:
    """The diffusers module, on the meta device: parameters have shapes and no memory yet."""
    levels = range(len(params.channels))
    with torch.device("meta"):
        return UNet2DModel(
            sample_size=params.image_size,
            in_channels=params.in_channels,
            out_channels=params.in_channels,
            block_out_channels=params.channels,
            layers_per_block=params.num_res_blocks,
            down_block_types=[_block("Down", params.attention[i]) for i in levels],
            up_block_types=[_block("Up", params.attention[i]) for i in reversed(levels)],
            norm_num_groups=GROUPS,
            norm_eps=1e-6,
            attention_head_dim=None,  # one head
            downsample_padding=0,  # below and to the right only
            flip_sin_to_cos=False,
            freq_shift=1,
        )


def unet_sources(unet: UNet2DModel) -> dict[str, Source]:
    """Where each parameter of the module comes from."""
    levels = len(unet.down_blocks)
    return {name: ddpm_source(name, tuple(value.shape), levels=levels) for name, value in unet.state_dict().items()}


def _block(direction: str, attention: bool) -> str:
    return f"{'Attn' if attention else ''}{direction}Block2D"


def _config_beside(path: Path) -> Path | None:
    places = (path.with_name("config.yaml"), path.with_suffix(".yaml"), path.with_suffix(".yml"))
    return next((place for place in places if place.is_file()), None)


def _params_of(tensors: Mapping[str, Tensor], path: Path) -> DDPMParams:
    """The network that the shapes describe. Raises CheckpointError if they leave the size of the pictures open."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{path}: misses '{name}'. Download or copy it again.")
        return tuple(tensors[name].shape)

    found = [re.match(r"down\.(\d+)\.(block|attn)\.(\d+)\.", name) for name in tensors]
    parts = {(m[2], int(m[1]), int(m[3])) for m in found if m is not None}
    levels = range(1 + max(level for _, level, _ in parts))
    attention = tuple(any(kind == "attn" and at == level for kind, at, _ in parts) for level in levels)
    if sum(attention) != 1:
        raise CheckpointError(
            f"{path}: has attention at {sum(attention)} resolutions, so its tensors do not say how large the pictures "
            "are. Give its YAML with --config FILE."
        )
    size = _ATTENTION_SIDE * 2 ** attention.index(True)
    params = DDPMParams(
        image_size=size,
        in_channels=shape("conv_in.weight")[1],
        channels=tuple(shape(f"down.{level}.block.0.conv2.weight")[0] for level in levels),
        num_res_blocks=sum(kind == "block" and level == 0 for kind, level, _ in parts),
        attention=attention,
        variance="fixed_large" if size == 32 else "fixed_small",  # as published for CIFAR-10 and for LSUN
    )
    if any(channel % GROUPS for channel in params.channels):
        raise CheckpointError(f"{path}: has {params.channels} channels, expected multiples of {GROUPS}.")
    return params


def _read_params(root: Section) -> DDPMParams:
    """Check and read `model` and `data`. Raises CheckpointError naming the entry that is missing or unsupported."""
    model, data = root.section("model"), root.section("data")
    model.only(_MODEL_KNOWN)
    data.only(_DATA_KNOWN)
    size, levels = data.need("image_size", int), model.need_ints("ch_mult")
    channels = tuple(model.need("ch", int) * mult for mult in levels)
    if not channels or any(channel % GROUPS for channel in channels):
        model.fail("ch", f"times ch_mult gives {list(channels)}, expected multiples of {GROUPS}.")
    if size < 1 or size % 2 ** (len(channels) - 1):
        data.fail("image_size", f"is {size}, which {len(channels) - 1} halvings do not divide.")
    if model.need("out_ch", int) != model.need("in_channels", int):
        model.fail("out_ch", f"is {model.need('out_ch', int)}, in_channels {model.need('in_channels', int)}.")
    variance = model.get("var_type", "fixedlarge")
    if variance not in _VARIANCES:
        model.fail("var_type", f"is {variance!r}, expected one of {', '.join(_VARIANCES)}.")
    attention = model.need_ints("attn_resolutions")
    return DDPMParams(
        image_size=size,
        in_channels=model.need("in_channels", int),
        channels=channels,
        num_res_blocks=model.need("num_res_blocks", int),
        attention=tuple(size // 2**level in attention for level in range(len(channels))),
        variance=_VARIANCES[variance],
    )


def _read_betas(section: Section) -> np.ndarray:
    kind, steps = section.need("beta_schedule", str), section.need("num_diffusion_timesteps", int)
    start, end = section.need("beta_start", float), section.need("beta_end", float)
    if kind not in _BETA_SCHEDULES:
        section.fail("beta_schedule", f"is {kind!r}, expected one of {', '.join(_BETA_SCHEDULES)}.")
    if steps < 1 or not 0 < start <= end < 1:
        section.fail("beta_start", f"is {start:g}, beta_end {end:g}, num_diffusion_timesteps {steps}: not a schedule.")
    return betas_of(_BETA_SCHEDULES[kind], start, end, steps)


def _schedule(betas: np.ndarray, params: DDPMParams, scheduler: str | None) -> Schedule:
    schedule = Schedule.from_betas(
        betas, steps_offset=0, final_abar=1.0, clip_sample=1.0 if scheduler == "ddpm" else None
    )
    return replace(schedule, variance=params.variance)


def _entry(key: str, dim: int | None) -> str:
    """The entry of the YAML to blame for tensor `key`, whose dimension `dim` differs (None: it is there or not)."""
    blame = [
        (r"conv_in\.", 1, "model.in_channels"),
        (r"(conv_in|temb)\.", 0, "model.ch"),
        (r"conv_out\.", 0, "model.out_ch"),
        (r"(down|up)\.\d+\.attn\.", None, "model.attn_resolutions and data.image_size"),
    ]
    for pattern, at, entry in blame:
        if at == dim and re.match(pattern, key):
            return entry
    return "model.ch and model.ch_mult" if dim is not None else "model.ch_mult and model.num_res_blocks"

"""A diffusers folder -> SourceModel: a pipeline with model_index.json, or just unet/, scheduler/ and perhaps vae/.

    unet/        UNet2DModel, or a UNet2DConditionModel without cross-attention; class labels through num_class_embeds
    scheduler/   scheduler_config.json: betas, prediction type, spacing
    vae/, vqvae/ AutoencoderKL or VQModel, of which the decoder is used; neither: the state is the picture

A component without a folder of its own lies in the root, as in google/ddpm-cifar10-32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import Tensor, nn

from qncd_deploy.checkpoint import load_weights, own_names, read_checkpoint
from qncd_deploy.errors import CheckpointError, UsageError, first_line
from qncd_deploy.models.first_stage import Codebook, LatentDecoder
from qncd_deploy.models.source import Condition, SourceModel
from qncd_deploy.schedule import Schedule, scheduler_name_from_diffusers

_AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
_WEIGHTS = "diffusion_pytorch_model"
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


class TextFreeUNet(UNet2DConditionModel):
    """A UNet2DConditionModel without cross-attention, called like a UNet2DModel: it has no tokens to be given."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        return super().forward(sample, timestep, encoder_hidden_states=None, class_labels=class_labels)


_UNETS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": TextFreeUNet}


def read(folder: Path, *, null_class: int | None, scheduler: str | None) -> SourceModel:
    """Read a diffusers folder; see `load_source` for the arguments and the errors."""
    files: dict[str, Path] = {}
    index = _index(folder, files)
    _refuse_text(folder, index)
    unet_home = _home(folder, "unet")
    unet_config = _config(unet_home, "unet", files)
    unet = _build(unet_home, unet_config, _UNETS)
    _refuse_inputs(unet_home, unet.config)
    _fill(unet, unet_home, "unet", files)
    latent_shape = (unet.config.in_channels, *_sides(unet_home, unet.config))
    decoder, image_shape = _decoder(folder, latent_shape, files)
    schedule_config = _config(_home(folder, "scheduler"), "scheduler", files, name="scheduler_config.json")
    name = scheduler or scheduler_name_from_diffusers(str(schedule_config.get("_class_name")))
    return SourceModel(
        family="diffusers",
        unet=unet,
        latent_shape=latent_shape,
        image_shape=image_shape,
        schedule=Schedule.from_diffusers(schedule_config, scheduler=scheduler),
        scheduler=name,
        condition=_condition(unet_home, unet.config, null_class),
        decoder=decoder,
        files=files,
    )


def _index(folder: Path, files: dict[str, Path]) -> Mapping[str, Any]:
    if not (folder / "model_index.json").is_file():
        return {}
    return _config(folder, "pipeline", files, name="model_index.json")


def _refuse_text(folder: Path, index: Mapping[str, Any]) -> None:
    parts = [part for part in ("text_encoder", "tokenizer", "bert") if index.get(part, [None])[0] or _is(folder, part)]
    if parts:
        pipeline = index.get("_class_name", "a text pipeline")
        raise CheckpointError(f"{folder}: {pipeline} has '{parts[0]}'; text encoders are not supported yet.")


def _is(folder: Path, part: str) -> bool:
    return (folder / part).is_dir()


def _home(folder: Path, part: str) -> Path:
    return folder / part if _is(folder, part) else folder


def _config(home: Path, part: str, files: dict[str, Path], *, name: str = "config.json") -> Mapping[str, Any]:
    path = home / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inside = sorted(item.name for item in home.iterdir())[:5]
        raise CheckpointError(
            f"{path}: missing, a diffusers folder needs its {part}. Found here: {', '.join(inside) or 'nothing'}."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON. Download or copy it again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, expected an object. Download or copy it again.")
    files[f"{part}-config"] = path
    return data


def _build(home: Path, config: Mapping[str, Any], classes: Mapping[str, Any]) -> Any:
    """The diffusers model that config.json describes, on the meta device."""
    path, kind = home / "config.json", config.get("_class_name")
    if kind not in classes:
        raise CheckpointError(f"{path}: _class_name is {kind!r}, only {' and '.join(classes)} are supported.")
    try:
        with torch.device("meta"):
            return classes[kind].from_config(dict(config))
    except Exception as error:  # whatever a wrong entry makes the constructor raise
        raise CheckpointError(f"{path}: {kind} cannot be built from it ({first_line(error)}).") from error


def _fill(module: nn.Module, home: Path, part: str, files: dict[str, Path]) -> None:
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(home):
        tensors |= read_checkpoint(file).tensors
        files[f"{part}/{file.name}"] = file
    renamed = {_modern(name): tensor for name, tensor in tensors.items()}
    config = str(home / "config.json")
    load_weights(module, own_names(module), renamed, where=str(home), asked_by=config, blame=lambda key, dim: config)


def _weight_files(home: Path) -> list[Path]:
    """One file or its shards; safetensors before pickles, full precision before a variant such as fp16."""
    for suffix in ("safetensors", "bin"):
        for name in sorted(home.glob(f"{_WEIGHTS}*.{suffix}.index*.json"), key=lambda path: len(path.name)):
            return _shards(home, name)
        for file in sorted(home.glob(f"{_WEIGHTS}*.{suffix}"), key=lambda path: len(path.name)):
            if "-of-" in file.name:
                raise CheckpointError(f"{home}: has shards, and no {_WEIGHTS}.{suffix}.index.json. Download it too.")
            return [file]
    raise CheckpointError(f"{home}: no weights, expected {_WEIGHTS}.safetensors or .bin. Download or copy them.")


def _shards(home: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a shard index. Download or copy it again.") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names the shard {name!r}, expected a file of its own folder.")
        if not (home / name).is_file():
            raise CheckpointError(f"{home}: shard {name} of {len(names)} is missing. Download or copy it.")
    return [home / name for name in names]


def _modern(name: str) -> str:
    """Attention blocks had other names once; diffusers still reads those files, and so do we."""
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name
    )


def _refuse_inputs(home: Path, config: Any) -> None:
    """What the network must be fed besides sample, timestep and class labels, or does to them that we do not."""
    blocks = [*config.down_block_types, config.mid_block_type, *config.up_block_types]
    if any("CrossAttn" in str(block) for block in blocks):
        problem = "has cross-attention, whose input comes from a text encoder; text encoders are not supported yet"
    elif config.out_channels != config.in_channels:
        problem = f"in_channels {config.in_channels}, out_channels {config.out_channels}: not supported"
    elif config.time_embedding_type != "positional":
        problem = f"time_embedding_type {config.time_embedding_type!r} is not supported, only 'positional'"
    elif config.class_embed_type is not None:
        problem = f"class_embed_type {config.class_embed_type!r} is not supported, only num_class_embeds"
    elif config.get("addition_embed_type") is not None:
        problem = f"addition_embed_type {config.addition_embed_type!r} is not supported"
    else:
        return
    raise CheckpointError(f"{home / 'config.json'}: {problem}.")


def _sides(home: Path, config: Any) -> tuple[int, int]:
    size = config.sample_size
    if size is None:
        raise CheckpointError(f"{home / 'config.json'}: sample_size is missing. Set it to the side of the samples.")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _condition(home: Path, config: Any, null_class: int | None) -> Condition | None:
    if config.num_class_embeds is not None:
        return Condition("class-labels", config.num_class_embeds, null_class)
    if null_class is not None:
        raise UsageError(f"--null-class {null_class}: {home} is not class-conditional. Leave it out.")
    return None


def _decoder(
    folder: Path, latent_shape: tuple[int, int, int], files: dict[str, Path]
) -> tuple[LatentDecoder | None, tuple[int, int, int]]:
    part = next((part for part in ("vae", "vqvae") if _is(folder, part)), None)
    if part is None:
        return None, latent_shape
    home = folder / part
    vae = _build(home, _config(home, part, files), _AUTOENCODERS)
    config = vae.config
    for entry in ("latents_mean", "latents_std", "shift_factor", "lookup_from_codebook"):
        if config.get(entry):
            raise CheckpointError(f"{home / 'config.json'}: {entry} is not supported.")
    if config.get("norm_type", "group") != "group":
        raise CheckpointError(f"{home / 'config.json'}: norm_type {config.norm_type!r} is not supported.")
    channels, height, width = latent_shape
    expected = config.latent_channels if config.get("vq_embed_dim") is None else config.vq_embed_dim
    if expected != channels:
        raise CheckpointError(f"{home / 'config.json'}: decodes {expected} channels, the UNet has {channels}.")
    _fill(vae, home, part, files)
    codebook = None
    if isinstance(vae, VQModel):
        with torch.device("meta"):
            codebook = Codebook(config.num_vq_embeddings, channels)
        codebook.embedding = vae.quantize.embedding
    factor = 2 ** (len(config.block_out_channels) - 1)
    decoder = LatentDecoder(vae.decoder, vae.post_quant_conv, codebook, config.scaling_factor)
    return decoder.eval(), (config.out_channels, height * factor, width * factor)

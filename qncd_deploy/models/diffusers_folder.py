"""A diffusers folder -> SourceModel: a pipeline with model_index.json, or just unet/, scheduler/ and perhaps vae/.

    unet/             UNet2DModel, or a UNet2DConditionModel; class labels through num_class_embeds
    text_encoder/,    CLIP, with tokenizer/ beside it; SDXL has text_encoder_2/ and tokenizer_2/ besides
    scheduler/        scheduler_config.json: betas, prediction type, spacing
    vae/, vqvae/      AutoencoderKL or VQModel, of which the decoder is used; neither: the state is the picture

A component without a folder of its own lies in the root, as in google/ddpm-cifar10-32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from torch import nn

from qncd_deploy.bundle import TextFacts
from qncd_deploy.checkpoint import load_weights, own_names
from qncd_deploy.errors import CheckpointError, UsageError, first_line
from qncd_deploy.models.conditional_unet import ConditionalUNet
from qncd_deploy.models.first_stage import Codebook, LatentDecoder
from qncd_deploy.models.folder_files import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, Folder, all_tensors
from qncd_deploy.models.source import CONTROLNET, LORA, REFINER, TAKES_PICTURES, Condition, SourceModel, Text
from qncd_deploy.models.text import (
    TOKENIZER_FILES,
    TextEncoder,
    TextTower,
    build_tower,
    check_encoders,
    read_tokenizer,
    text_config,
)
from qncd_deploy.schedule import Schedule, scheduler_name_from_diffusers
from qncd_deploy.subjects import size_ids

_AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15
_UNETS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": ConditionalUNet}


def read(folder: Path, *, null_class: int | None, scheduler: str | None) -> SourceModel:
    """Read a diffusers folder; see `load_source` for the arguments and the errors."""
    pipeline = Folder(folder)
    index = pipeline.config("pipeline", name="model_index.json") if (folder / "model_index.json").is_file() else {}
    _refuse_pipeline(pipeline, index)
    unet_home = pipeline.home("unet")
    unet = _unet(pipeline, unet_home)
    latent_shape = (unet.config.in_channels, *_sides(unet_home, unet.config))
    decoder, image_shape = _decoder(pipeline, latent_shape)
    text = _text(pipeline, unet.config, index, image_shape)
    schedule_config = pipeline.config("scheduler", name="scheduler_config.json")
    name = scheduler or scheduler_name_from_diffusers(str(schedule_config.get("_class_name")))
    if text is not None and null_class is not None:
        raise UsageError(f"--null-class {null_class}: {folder} takes prompts, not classes. Leave it out.")
    return SourceModel(
        family="diffusers",
        unet=unet,
        latent_shape=latent_shape,
        image_shape=image_shape,
        schedule=Schedule.from_diffusers(schedule_config, scheduler=scheduler),
        scheduler=name,
        condition=None if text is not None else _condition(unet_home, unet.config, null_class),
        decoder=decoder,
        files=pipeline.files,
        text=text,
        few_steps=text is not None and _few_steps(schedule_config),
    )


def _refuse_pipeline(folder: Folder, index: Mapping[str, Any]) -> None:
    """Pipelines with a part that changes what the network computes and that is not read here."""
    name = index.get("_class_name", "the pipeline")
    for part in ("controlnet", "image_encoder", "bert", "adapter", "prior"):
        if index.get(part, [None])[0]:
            raise CheckpointError(f"{folder.path}: {name} has '{part}', which is not supported.")
    if index.get("requires_aesthetics_score"):
        raise CheckpointError(f"{folder.path}: {REFINER}")
    if not folder.has("unet") and (lora := next(folder.path.glob("*lora_weights.*"), None)) is not None:
        raise CheckpointError(f"{lora}: {LORA}")


def _unet(folder: Folder, home: Path) -> Any:
    config = folder.config("unet")
    if str(config.get("_class_name")).startswith("ControlNet"):
        raise CheckpointError(f"{home}: {CONTROLNET}")
    unet = _build(home, config, _UNETS)
    _refuse_inputs(home, unet.config)
    _fill(unet, folder, "unet")
    return unet


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


def _fill(module: nn.Module, folder: Folder, part: str) -> None:
    home = folder.home(part)
    tensors = all_tensors(folder.weights(part, DIFFUSERS_WEIGHTS))
    tensors = {_modern(name): tensor for name, tensor in tensors.items()}
    config = str(home / "config.json")
    load_weights(module, own_names(module), tensors, where=str(home), asked_by=config, blame=lambda key, dim: config)


def _modern(name: str) -> str:
    """Attention blocks had other names once; diffusers still reads those files, and so do we."""
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name
    )


def _refuse_inputs(home: Path, config: Any) -> None:
    """What the network must be fed besides sample, timestep, class labels and text, or does to them that we do not."""
    if config.out_channels != config.in_channels:
        kind = TAKES_PICTURES.get(config.in_channels) if _attends(config) else None
        problem = f"in_channels {config.in_channels}, out_channels {config.out_channels}: "
        problem += "not supported" if kind is None else f"{kind}; not supported"
    elif config.time_embedding_type != "positional":
        problem = f"time_embedding_type {config.time_embedding_type!r} is not supported, only 'positional'"
    elif config.class_embed_type is not None:
        problem = f"class_embed_type {config.class_embed_type!r} is not supported, only num_class_embeds"
    elif config.get("addition_embed_type") not in (None, "text_time"):
        problem = f"addition_embed_type {config.addition_embed_type!r} is not supported, only 'text_time'"
    elif config.get("encoder_hid_dim_type") is not None:
        problem = f"encoder_hid_dim_type {config.encoder_hid_dim_type!r} is not supported"
    elif config.get("time_cond_proj_dim") is not None:
        problem = "time_cond_proj_dim: a latent consistency model, which is told its guidance scale; not supported"
    else:
        return
    raise CheckpointError(f"{home / 'config.json'}: {problem}.")


def _attends(config: Any) -> bool:
    blocks = [*config.down_block_types, config.mid_block_type, *config.up_block_types]
    return any("CrossAttn" in str(block) for block in blocks)


def _text(folder: Folder, unet: Any, index: Mapping[str, Any], image_shape: tuple[int, int, int]) -> Text | None:
    """The encoders of prompts, None for a network that attends to nothing.

    Raises: CheckpointError if one is missing, or of another width than the UNet wants.
    """
    if not _attends(unet):
        if folder.has("text_encoder"):
            raise CheckpointError(f"{folder.path}: text_encoder/ is there, and the UNet attends to nothing.")
        return None
    pooled = unet.get("addition_embed_type") == "text_time"
    parts = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))[: 2 if pooled else 1]
    for part in (name for names in parts for name in names):
        if not folder.has(part):
            raise CheckpointError(
                f"{folder.path}: {part}/ is missing, and the UNet attends to text. Download or copy it."
            )
    encoders = tuple(_encoder(folder, part, words, penultimate=pooled) for part, words in parts)
    check_encoders(encoders, unet, where=str(folder.path))
    facts = TextFacts(
        encoders=len(encoders),
        max_length=encoders[0].max_length,
        time_ids=size_ids(image_shape) if pooled else None,
        zero_null=pooled and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    return Text(encoders, facts)


def _encoder(folder: Folder, part: str, words: str, *, penultimate: bool) -> TextEncoder:
    home, path = folder.home(part), folder.home(part) / "config.json"
    config = text_config(folder.config(part), where=str(path))
    tokenizer, length = read_tokenizer(folder.home(words), config)
    for name in TOKENIZER_FILES:
        if (file := folder.home(words) / name).is_file():
            folder.files[f"{words}/{name}"] = file
    files = folder.weights(part, TRANSFORMERS_WEIGHTS)

    def build() -> TextTower:
        return build_tower(config, all_tensors(files), penultimate=penultimate, where=str(home), asked_by=str(path))

    return TextEncoder(
        tokenizer=tokenizer,
        max_length=length,
        build=build,
        width=config.hidden_size,
        pooled=config.projection_dim if config.architectures[0] == "CLIPTextModelWithProjection" else None,
    )


def _few_steps(config: Mapping[str, Any]) -> bool:
    """SDXL-Turbo, SD-Turbo and Lightning say it by their scheduler alone: Euler with trailing timesteps."""
    euler = str(config.get("_class_name")).startswith("Euler")
    return euler and config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")


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


def _decoder(folder: Folder, latent_shape: tuple[int, int, int]) -> tuple[LatentDecoder | None, tuple[int, int, int]]:
    part = next((part for part in ("vae", "vqvae") if folder.has(part)), None)
    if part is None:
        return None, latent_shape
    home = folder.home(part)
    vae = _build(home, folder.config(part), _AUTOENCODERS)
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
    _fill(vae, folder, part)
    codebook = None
    if isinstance(vae, VQModel):
        with torch.device("meta"):
            codebook = Codebook(config.num_vq_embeddings, channels)
        codebook.embedding = vae.quantize.embedding
    factor = 2 ** (len(config.block_out_channels) - 1)
    decoder = LatentDecoder(vae.decoder, vae.post_quant_conv, codebook, config.scaling_factor)
    return decoder.eval(), (config.out_channels, height * factor, width * factor)

"""Text encoders inside a Stable Diffusion file -> Text.

    cond_stage_model.transformer.*          Stable Diffusion 1: CLIP by transformers' names
    cond_stage_model.model.*                Stable Diffusion 2: OpenCLIP, all layers but the last, then the final norm
    conditioner.embedders.0.transformer.*   XL: CLIP
    conditioner.embedders.1.model.*         XL: OpenCLIP, its text projected

The towers' sizes are in the tensors; 64 channels a head and the activation are those of the published models. A file
holds no vocabulary: it is read from tokenizer/ (XL: and tokenizer_2/) or from tokenizer files beside it.
Source: ldm/modules/encoders/modules.py of both repositories; sgm/modules/encoders/modules.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig

from qncd_deploy.bundle import TextFacts
from qncd_deploy.checkpoint import Checkpoint, Source, read_checkpoint
from qncd_deploy.errors import CheckpointError
from qncd_deploy.models.ldm_config import Section
from qncd_deploy.models.ldm_layout import BOTH, CLIP, OPEN_CLIP, count_after
from qncd_deploy.models.source import Text
from qncd_deploy.models.text import (
    TOKENIZER_FILES,
    TextEncoder,
    TextTower,
    build_tower,
    canonical,
    check_encoders,
    has_tokenizer,
    read_tokenizer,
)
from qncd_deploy.subjects import size_ids

TEXT_STAGES = (CLIP, OPEN_CLIP, BOTH)
_TEXT = ("cond_stage_model.", "conditioner.")
_HEAD = 64
_LARGEST_ID = 2
"""For transformers an end of text of 2 means: pool where the largest id is, as OpenCLIP does."""

_KNOWN: dict[str, object] = {
    **dict.fromkeys(["layer", "version", "arch", "device", "freeze"]),
    "max_length": 77,
    "layer_idx": None,
}
_UNUSED_BY_OPEN_CLIP = ("logit_scale", "attn_mask")


@dataclass(frozen=True)
class _Place:
    """Where one tower lies in a file. projected: its pooled text is used;  unused_layers: at its end."""

    prefix: str
    open_clip: bool
    projected: bool = False
    unused_layers: int = 0


def read_text(
    checkpoint: Checkpoint, stage: Section, unet: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> tuple[Text, dict[str, Path]]:
    """(the encoders that `cond_stage_config` names, the tokenizer files that were read).

    unet: the config of the diffusers module.
    Raises: CheckpointError if the file holds none, if they do not fit the UNet, or if there is no tokenizer beside it.
    """
    kind = stage.target()
    if stage.entries.get("params") is not None:
        stage.section("params").only(_KNOWN)
    places = _places(kind, stage, checkpoint)
    for place in places:
        if not any(key.startswith(place.prefix) for key in checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.path}: holds no text encoder (no '{place.prefix}*'). Give the file of the whole model."
            )
    prefixes = tuple(place.prefix for place in places)
    stray = [key for key in checkpoint.tensors if key.startswith(_TEXT) and not key.startswith(prefixes)]
    if stray:
        raise CheckpointError(
            f"{checkpoint.path}: {len(stray)} tensors without a place (first: '{stray[0]}'). "
            f"Check {stage.name('target')}."
        )
    files: dict[str, Path] = {}
    encoders = tuple(
        _encoder(checkpoint, place, number, penultimate=kind == BOTH, files=files)
        for number, place in enumerate(places, start=1)
    )
    check_encoders(encoders, unet, where=str(checkpoint.path))
    sizes = size_ids(image_shape) if kind == BOTH else None
    facts = TextFacts(len(encoders), encoders[0].max_length, time_ids=sizes, zero_null=kind == BOTH)
    return Text(encoders, facts), files


def _places(kind: str, stage: Section, checkpoint: Checkpoint) -> tuple[_Place, ...]:
    if kind == BOTH:
        return (
            _Place("conditioner.embedders.0.transformer.", open_clip=False),
            _Place("conditioner.embedders.1.model.", open_clip=True, projected=True),
        )
    params = stage.entries.get("params") or {}
    layer = params.get("layer", "last")
    if kind == CLIP:
        if layer != "last":
            stage.fail("params.layer", f"is {layer!r}, only 'last' is supported.")
        return (_Place("cond_stage_model.transformer.", open_clip=False),)
    if layer not in ("last", "penultimate"):
        stage.fail("params.layer", f"is {layer!r}, expected 'last' or 'penultimate'.")
    place = _Place("cond_stage_model.model.", open_clip=True)
    # A whole tower has a projection; files converted from diffusers have neither that nor the layer that is not used.
    whole = f"{place.prefix}text_projection" in checkpoint.tensors
    return (replace(place, unused_layers=int(whole and layer == "penultimate")),)


def _encoder(
    checkpoint: Checkpoint, place: _Place, number: int, *, penultimate: bool, files: dict[str, Path]
) -> TextEncoder:
    path = checkpoint.path
    config = _config(checkpoint, place)
    home = _tokenizer_home(path, number)
    # Both have CLIP's vocabulary; CLIP's own pad with the end of text, OpenCLIP's with zeros, where "!" is.
    tokenizer, length = read_tokenizer(home, config, pad="!" if place.open_clip else "<|endoftext|>")
    files |= {f"tokenizer{number}/{name}": home / name for name in TOKENIZER_FILES if (home / name).is_file()}

    def build() -> TextTower:
        tensors = read_checkpoint(path).tensors
        below = {key[len(place.prefix) :]: value for key, value in tensors.items() if key.startswith(place.prefix)}
        take = None
        if place.open_clip:
            below = _used(below, config, place)
            take = open_clip_sources(config)
        where = f"{path}, {place.prefix}*"
        return build_tower(
            config, below, penultimate=penultimate, take=take, where=where, asked_by="the published model"
        )

    return TextEncoder(
        tokenizer=tokenizer,
        max_length=length,
        build=build,
        width=config.hidden_size,
        pooled=config.projection_dim if place.projected else None,
    )


def open_clip_sources(config: CLIPTextConfig) -> dict[str, Source]:
    """Where the parameters of transformers' CLIP are in an OpenCLIP tower, by their names in models/text.py."""
    width, inner = config.hidden_size, config.intermediate_size
    sources = {
        "text_model.embeddings.token_embedding.weight": Source("token_embedding.weight", (config.vocab_size, width)),
        "text_model.embeddings.position_embedding.weight": Source(
            "positional_embedding", (config.max_position_embeddings, width)
        ),
        "text_model.final_layer_norm.weight": Source("ln_final.weight", (width,)),
        "text_model.final_layer_norm.bias": Source("ln_final.bias", (width,)),
        "text_projection.weight": Source("text_projection", (width, config.projection_dim), torch.t),
    }
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        shapes = {
            "layer_norm1": ("ln_1", (width,)),
            "layer_norm2": ("ln_2", (width,)),
            "mlp.fc1": ("mlp.c_fc", (inner, width)),
            "mlp.fc2": ("mlp.c_proj", (width, inner)),
            "self_attn.out_proj": ("attn.out_proj", (width, width)),
        }
        for module, (name, shape) in shapes.items():
            sources[f"{ours}.{module}.weight"] = Source(f"{theirs}.{name}.weight", shape)
            sources[f"{ours}.{module}.bias"] = Source(f"{theirs}.{name}.bias", shape[:1])
        for part, letter in enumerate("qkv"):  # one matrix there
            rows = partial(_rows, part=part, width=width)
            module = f"{ours}.self_attn.{letter}_proj"
            sources[f"{module}.weight"] = Source(f"{theirs}.attn.in_proj_weight", (3 * width, width), rows)
            sources[f"{module}.bias"] = Source(f"{theirs}.attn.in_proj_bias", (3 * width,), rows)
    return sources


def _rows(fused: Tensor, *, part: int, width: int) -> Tensor:
    return fused[part * width : (part + 1) * width]


def _used(tensors: Mapping[str, Tensor], config: CLIPTextConfig, place: _Place) -> dict[str, Tensor]:
    """An OpenCLIP tower without what its model does not compute: layers behind the last one used, other outputs."""
    unused = list(_UNUSED_BY_OPEN_CLIP) + ([] if place.projected else ["text_projection"])
    behind = range(config.num_hidden_layers, config.num_hidden_layers + place.unused_layers)
    layers = tuple(f"transformer.resblocks.{layer}." for layer in behind)
    return {name: value for name, value in tensors.items() if name not in unused and not name.startswith(layers)}


def _config(checkpoint: Checkpoint, place: _Place) -> CLIPTextConfig:
    """The sizes of a tower. Raises CheckpointError if a tensor that tells one is missing."""
    tensors = checkpoint.below(place.prefix)
    if place.open_clip:
        words, positions, stack, inner = (
            "token_embedding.weight",
            "positional_embedding",
            "transformer.resblocks.",
            "c_fc",
        )
    else:
        tensors = {canonical(name): value for name, value in tensors.items()}
        words, positions = (f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
        stack, inner = "text_model.encoder.layers.", "fc1"
    needed = [words, positions, f"{stack}0.mlp.{inner}.weight", *(["text_projection"] if place.projected else [])]
    if missing := [name for name in needed if name not in tensors]:
        raise CheckpointError(f"{checkpoint.path}: '{place.prefix}{missing[0]}' is missing. Use an intact file.")
    vocabulary, width = tensors[words].shape
    return CLIPTextConfig(
        architectures=["CLIPTextModelWithProjection" if place.projected else "CLIPTextModel"],
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tensors[needed[2]].shape[0],
        num_hidden_layers=count_after(tensors, stack) - place.unused_layers,
        num_attention_heads=width // _HEAD,
        max_position_embeddings=tensors[positions].shape[0],
        hidden_act="gelu" if place.open_clip else "quick_gelu",
        projection_dim=tensors["text_projection"].shape[1] if place.projected else width,
        eos_token_id=_LARGEST_ID,
    )


def _tokenizer_home(path: Path, number: int) -> Path:
    """Where the vocabulary lies: a folder of diffusers' names, else the checkpoint's own."""
    names = ("tokenizer_2", "tokenizer") if number == 2 else ("tokenizer",)
    for home in (*(path.parent / name for name in names), path.parent):
        if has_tokenizer(home):
            return home
    raise CheckpointError(
        f"{path}: no tokenizer beside it, and such a file holds none. Put the model's tokenizer/ folder, or its "
        f"tokenizer.json, or vocab.json with merges.txt, into {path.parent}."
    )

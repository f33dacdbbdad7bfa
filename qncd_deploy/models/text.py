"""CLIP text encoders and their tokenizers, by transformers: ids -> tokens and pooled text as a UNet takes them.

    Stable Diffusion 1, 2   the last layer behind the final norm (2: of an OpenCLIP tower without its last layer)
    SDXL                    the last layer but one of both encoders, no norm; the second one's pooled text, projected

Source: diffusers' encode_prompt of both pipelines; Radford et al., arXiv:2103.00020, for the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from qncd_deploy.checkpoint import Source, load_weights
from qncd_deploy.errors import CheckpointError, first_line
from qncd_deploy.models.source import SIZES

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_MODELS = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
_NOT_WEIGHTS = ("embeddings.position_ids",)
_ROWS = 8  # prompts encoded at a time


class TextTower(nn.Module):
    """ids (N, L) int64 -> (hidden (N, L, D),), with a projection also the pooled text (N, P)."""

    def __init__(self, model: CLIPTextModel | CLIPTextModelWithProjection, *, penultimate: bool) -> None:
        super().__init__()
        self.model = model
        self.penultimate = penultimate

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.model(input_ids=input_ids, output_hidden_states=self.penultimate)
        hidden = out.hidden_states[-2] if self.penultimate else out.last_hidden_state
        return (hidden, out.text_embeds) if isinstance(self.model, CLIPTextModelWithProjection) else (hidden,)


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """One text encoder of a model.

    tokenizer: cuts and pads to max_length by itself.  build: the encoder with its weights, read anew at every call, so
    that nobody holds them longer than needed.  width: D of its tokens;  pooled: P, None if it has no projection.
    """

    tokenizer: Tokenizer
    max_length: int
    build: Callable[[], TextTower]
    width: int
    pooled: int | None

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("hidden",) if self.pooled is None else ("hidden", "pooled")

    def encode(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """ids (N, L) int64 -> "hidden" (N, L, D) and, with a projection, "pooled" (N, P), float32."""
        tower = self.build()
        with torch.no_grad():
            groups = [tower(group) for group in torch.from_numpy(ids).split(_ROWS)]
        columns = [torch.cat(column).numpy() for column in zip(*groups, strict=True)]
        return dict(zip(self.outputs, columns, strict=True))


def text_config(entries: Mapping[str, Any], *, where: str) -> CLIPTextConfig:
    """The config of an encoder as a transformers folder has it. Raises CheckpointError if it is of another kind."""
    kind = next(iter(entries.get("architectures") or ()), None)
    if kind not in _MODELS:
        raise CheckpointError(f"{where}: architecture {kind!r} is not supported, only {' and '.join(_MODELS)}.")
    if entries.get("use_attention_mask"):
        raise CheckpointError(f"{where}: use_attention_mask is not supported.")
    try:
        return CLIPTextConfig.from_dict(dict(entries))
    except Exception as error:  # whatever a wrong entry makes the constructor raise
        raise CheckpointError(f"{where}: not a config of {kind} ({first_line(error)}).") from error


def build_tower(
    config: CLIPTextConfig,
    tensors: Mapping[str, Tensor],
    *,
    penultimate: bool,
    take: Mapping[str, Source] | None = None,
    where: str,
    asked_by: str,
) -> TextTower:
    """The encoder that a config describes with these weights, every tensor of which must have a place.

    take: where each parameter comes from, by its name below the model; None: by transformers' own names, with or
    without the leading "text_model." that depends on its version.
    Raises: CheckpointError as load_weights does, or if the config cannot be built.
    """
    (kind,) = config.architectures
    try:
        with torch.device("meta"):
            model = _MODELS[kind]._from_config(config, attn_implementation="eager")  # one graph for any length of text
    except Exception as error:
        raise CheckpointError(f"{asked_by}: {kind} cannot be built from it ({first_line(error)}).") from error
    shapes = {canonical(name): (name, tuple(value.shape)) for name, value in model.state_dict().items()}
    if take is None:
        take = {name: Source(name, shape) for name, (_, shape) in shapes.items()}
        tensors = {canonical(name): value for name, value in tensors.items()}
        tensors = {name: value for name, value in tensors.items() if not name.endswith(_NOT_WEIGHTS)}
    sources = {name: take[key] for key, (name, _) in shapes.items()}
    load_weights(model, sources, tensors, where=where, asked_by=asked_by, blame=lambda key, dim: asked_by)
    embeddings = getattr(model, "text_model", model).embeddings
    embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]  # a buffer, still on the meta device
    return TextTower(model, penultimate=penultimate).eval()


def canonical(name: str) -> str:
    """A parameter's name as transformers wrote it before 5.6, for both models."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def has_tokenizer(home: Path) -> bool:
    return any((home / name).is_file() for name in TOKENIZER_FILES[:2])


def read_tokenizer(home: Path, config: CLIPTextConfig, *, pad: str | None = None) -> tuple[Tokenizer, int]:
    """(tokenizer that cuts and pads to the encoder's window, its length) from tokenizer.json, or vocab.json and
    merges.txt.

    pad: the token to pad with; by default the one that the folder says, else the end of text.
    Raises: CheckpointError if the files are missing or damaged, or have tokens that the encoder does not know.
    """
    if not has_tokenizer(home):
        raise CheckpointError(f"{home}: no tokenizer.json, and no vocab.json with merges.txt. Download or copy them.")
    try:
        words = CLIPTokenizerFast.from_pretrained(home, local_files_only=True)
        tokenizer = Tokenizer.from_str(words.backend_tokenizer.to_str())
    except Exception as error:  # of several libraries, one of them without exception types
        raise CheckpointError(
            f"{home}: not a CLIP tokenizer ({first_line(error)}). Give tokenizer.json, or vocab.json with merges.txt."
        ) from error
    count = tokenizer.get_vocab_size()
    if count > config.vocab_size:
        raise CheckpointError(
            f"{home}: a tokenizer of {count} tokens, the text encoder has {config.vocab_size}. Use the model's own."
        )
    length = min(int(words.model_max_length), config.max_position_embeddings)
    pad_id = words.pad_token_id if pad is None else tokenizer.token_to_id(pad)
    if pad_id is None:
        raise CheckpointError(f"{home}: the tokenizer has no {pad!r}, which the model pads with. Use the model's own.")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id))
    return tokenizer, length


def check_encoders(encoders: Sequence[TextEncoder], unet: Mapping[str, Any], *, where: str) -> None:
    """Raises CheckpointError unless the encoders, side by side, give what a diffusers UNet of this config takes."""
    lengths = sorted({encoder.max_length for encoder in encoders})
    if len(lengths) > 1:
        raise CheckpointError(f"{where}: text encoders of {lengths} tokens, expected the same for all.")
    width, wanted = sum(encoder.width for encoder in encoders), unet["cross_attention_dim"]
    if width != wanted:
        raise CheckpointError(
            f"{where}: text encoders of {width} channels, the UNet attends to {wanted}. They are not of one model."
        )
    if unet.get("addition_embed_type") is None:
        return
    pooled = encoders[-1].pooled
    wanted = unet["projection_class_embeddings_input_dim"] - SIZES * unet["addition_time_embed_dim"]
    if pooled != wanted:
        raise CheckpointError(
            f"{where}: the last text encoder pools {pooled or 'no'} channels, the UNet takes {wanted}. They are not of "
            "one model."
        )

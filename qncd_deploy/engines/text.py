"""From a graph of a bundle to a text encoder as prompts.py calls it: ids (N, L) int64 -> "hidden", perhaps "pooled".

It is open only while it is called: what it holds, up to gigabytes, is free again when pictures are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qncd_deploy.bundle import TextFacts
from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.engines.eps_model import full_groups, row_sizes
from qncd_deploy.prompts import Encode, open_tokenizer, prompt_table

ROWS = 2
"""Texts at a time: a prompt and its negative, which is what most runs encode; lists take turns."""


Open = Callable[[], BaseEngine]
"""The engine of a text encoder, in float32, which whoever opens it closes."""


def prompt_encoder(
    towers: Sequence[tuple[Path, Open]], facts: TextFacts
) -> Callable[[Sequence[str], str | None], Mapping[str, np.ndarray]]:
    """(prompts, negative prompt) -> what the network is told of them, see prompts.prompt_table.

    towers: tokenizer and text encoder of each of facts.roles. What is returned raises as open_tokenizer and opening
    the encoders do.
    """

    def encode(prompts: Sequence[str], negative: str | None) -> Mapping[str, np.ndarray]:
        opened = [(open_tokenizer(words), text_encoder(encoder)) for words, encoder in towers]
        return prompt_table(prompts, negative, opened, facts)

    return encode


def text_encoder(open_encoder: Open) -> Encode:
    """An encoder that opens its engine when it is called. Raises, then, as that does."""

    def encode(ids: np.ndarray) -> dict[str, np.ndarray]:
        with open_encoder() as engine:
            (spec,) = engine.inputs.values()
            parts: dict[str, list[np.ndarray]] = {name: [] for name in engine.outputs}
            for (group,), held in full_groups([ids], rows=row_sizes(engine, spec, ROWS)):
                for name, found in engine({spec.name: group.astype(spec.dtype, copy=False)}).items():
                    parts[name].append(found[:held])
        return {name: np.concatenate(found) for name, found in parts.items()}

    return encode

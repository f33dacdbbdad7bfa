"""Prompts -> the rows of a condition: what the exporter and the sampler both do around tokenizers and text encoders.

    texts -> tokenize -> ids (N, L) -> encoder -> {"hidden" (N, L, D), "pooled" (N, P)} -> {graph input: (N, ...)}

    encoder_hidden_states   the encoders' tokens side by side, (N, L, D1 + D2)
    text_embeds, time_ids   SDXL (Podell et al., arXiv:2307.01952, section 2.2): the last encoder's pooled text, (N, P),
                            and the sizes of the picture, (N, 6)

tokenizer.json cuts and pads to the window by itself (its truncation and padding sections say how). Lists of prompts are
text files with one prompt a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qncd_deploy.bundle import TextFacts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encode = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""A text encoder: ids (N, L) int64 -> "hidden" (N, L, D) and, where the network takes it, "pooled" (N, P), float32."""


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids (N, L) int64, cut and padded as the tokenizer's own settings say."""
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], dtype=np.int64)


def prompt_table(
    prompts: Sequence[str], negative: str, towers: Sequence[tuple[Tokenizer, Encode]], facts: TextFacts
) -> dict[str, np.ndarray]:
    """The condition of every prompt and, as the last row, of the negative one: {graph input: (P + 1, ...) float32}.

    towers: tokenizer and encoder of each of facts.roles, used one after the other, so that an encoder may open what it
    needs when it is called and close it again.
    """
    texts = [*prompts, negative]
    outputs = [encode(tokenize(tokenizer, texts)) for tokenizer, encode in towers]
    table = {"encoder_hidden_states": np.concatenate([output["hidden"] for output in outputs], axis=-1)}
    if facts.time_ids is not None:
        table["text_embeds"] = np.array(outputs[-1]["pooled"])
    if facts.zero_null and not negative:
        for rows in table.values():
            rows[-1] = 0
    if facts.time_ids is not None:
        table["time_ids"] = np.tile(np.array(facts.time_ids, np.float32), (len(texts), 1))
    return table

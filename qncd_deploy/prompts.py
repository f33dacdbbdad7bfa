"""Prompts -> the rows of a condition: what the exporter and the sampler both do around tokenizers and text encoders.

    texts -> tokenize -> ids (N, L) -> encoder -> {"hidden" (N, L, D), "pooled" (N, P)} -> {graph input: (N, ...)}

    encoder_hidden_states   the encoders' tokens side by side, (N, L, D1 + D2)
    text_embeds, time_ids   SDXL (Podell et al., arXiv:2307.01952, section 2.2): the last encoder's pooled text, (N, P),
                            and the sizes of the picture, (N, 6)

tokenizer.json cuts and pads to the window by itself (its truncation and padding sections say how). Lists of prompts are
text files with one prompt a line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qncd_deploy.bundle import TextFacts
from qncd_deploy.errors import BackendMissing, BundleError, PromptError, first_line, install_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

Encode = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""A text encoder: ids (N, L) int64 -> "hidden" (N, L, D) and, where the network takes it, "pooled" (N, P), float32."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, UTF-8, one a line; blank lines are none.

    Raises: PromptError if it is missing, not such a file, or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise PromptError(f"{path}: not UTF-8 at byte {exc.start}. Save it as UTF-8 text, one prompt a line.") from exc
    except OSError as exc:
        found = "no such file" if isinstance(exc, FileNotFoundError) else f"cannot be read ({exc.strerror})"
        raise PromptError(f"{path}: {found}. Give a text file with one prompt a line.") from exc
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise PromptError(f"{path}: holds no prompt. Write one a line.")
    return prompts


def shipped_prompts() -> tuple[str, ...]:
    """The captions that come with the package, to calibrate without a list of one's own: people, animals, places, food,
    styles, lettering and counts, short and long.
    """
    with as_file(files("qncd_deploy") / "captions.txt") as path:
        return read_prompts(path)


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """What read_prompts gives back."""
    path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json. Raises BackendMissing without the library that reads it, BundleError if it cannot."""
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        raise BackendMissing(f"prompts: tokenizers is not installed. Install it: {install_line('text')}") from exc
    try:
        return Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises Exception itself
        raise BundleError(f"{path}: not a tokenizer ({first_line(exc)}). Run `qncd export` again.") from exc


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids (N, L) int64, cut and padded as the tokenizer's own settings say."""
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], dtype=np.int64)


def what_is_cut(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[str]:
    """One line for each text that is longer than the tokenizer's window."""
    for text, encoding in zip(texts, tokenizer.encode_batch(list(texts)), strict=True):
        if not encoding.overflowing:
            continue
        over = encoding.overflowing[0]
        start = min(at for (at, _), special in zip(over.offsets, over.special_tokens_mask, strict=True) if not special)
        window = len(encoding.ids)
        yield f"prompt {text[:24]!r}...: longer than the window of {window} tokens, cut: {text[start:].strip()!r}"


def prompt_table(
    prompts: Sequence[str], negative: str | None, towers: Sequence[tuple[Tokenizer, Encode]], facts: TextFacts
) -> dict[str, np.ndarray]:
    """The condition of every prompt and, as the last row, of the negative one: {graph input: (P + 1, ...) float32}.

    negative: None where there is none, which is "" or zeros, as facts.zero_null says; "" is never zeros.
    towers: tokenizer and encoder of each of facts.roles, used one after the other, so that an encoder may open what it
    needs when it is called and close it again. What their windows cut off is logged.
    """
    texts = [*prompts, negative or ""]
    for line in dict.fromkeys(line for tokenizer, _ in towers for line in what_is_cut(tokenizer, texts)):
        log.info(line)
    outputs = [encode(tokenize(tokenizer, texts)) for tokenizer, encode in towers]
    table = {"encoder_hidden_states": np.concatenate([output["hidden"] for output in outputs], axis=-1)}
    if facts.time_ids is not None:
        table["text_embeds"] = np.array(outputs[-1]["pooled"])
    if facts.zero_null and negative is None:
        for rows in table.values():
            rows[-1] = 0
    if facts.time_ids is not None:
        table["time_ids"] = size_rows(facts.time_ids, len(texts))
    return table


def size_rows(time_ids: Sequence[int], count: int) -> np.ndarray:
    """What `count` pictures of these sizes are told of them, (count, 6) float32."""
    return np.tile(np.array(time_ids, np.float32), (count, 1))

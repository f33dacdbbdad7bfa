"""CLIP's real vocabulary and its own tokenizer, as the package open_clip ships them, against what a bundle holds."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for library in ("torch", "transformers", "tokenizers"):
    pytest.importorskip(library, reason="a model's tokenizer is read with it")

from transformers import CLIPTextConfig  # noqa: E402

from qncd_deploy.models.text import read_tokenizer  # noqa: E402
from qncd_deploy.prompts import shipped_prompts, tokenize  # noqa: E402

pytestmark = pytest.mark.slow

TOKENS = 77
PROMPTS = (
    *("", "a", "  two   spaces\tand a tab ", "UPPER and Lower", "it's, isn't, we've; they'll!", "12345 and 3.14"),
    *("naïve café, Zürich — 'quoted'", "東京の夜景", "a 🦊 in the ❄️", "hyphen-ated_under/slashed", "word " * 100),
)
"""No curly quotes: CLIP's own straightens them with ftfy, the tokenizers of the models' folders do not."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package without what it depends on: its tokenizer is one file beside the vocabulary."""
    folder = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    done = subprocess.run([*pip, "open_clip_torch==3.3.0", "ftfy", "wcwidth"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no package index in reach")
    return folder


@pytest.fixture
def reference(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(packages)
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", packages / "open_clip/tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def write_tokenizer(home: Path, bpe: Path) -> None:
    """tokenizer/ as the hub's folders have it, from the merges alone."""
    lines = gzip.decompress(bpe.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
    merged = ["".join(line.split()) for line in lines]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *merged, "<|startoftext|>", "<|endoftext|>"]
    home.mkdir()
    (home / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (home / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))
    (home / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "pad_token": "<|endoftext|>"})
    )


def test_ids_are_those_of_clips_own_tokenizer(packages: Path, reference: Any, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", packages / "open_clip/bpe_simple_vocab_16e6.txt.gz")
    tokenizer, length = read_tokenizer(tmp_path / "tokenizer", CLIPTextConfig())  # of 49,408 tokens
    assert length == TOKENS and tokenizer.get_vocab_size() == 49408
    prompts = [*PROMPTS, *shipped_prompts()]
    found, end = tokenize(tokenizer, prompts), tokenizer.token_to_id("<|endoftext|>")
    for prompt, ids, expected in zip(prompts, found, reference(prompts).numpy(), strict=True):
        last = int(np.argmax(expected == end))  # behind it open_clip pads with 0, the first encoder with the end
        np.testing.assert_array_equal(ids[: last + 1], expected[: last + 1], err_msg=prompt)
        assert (ids[last:] == end).all()

"""Prompts become the rows that diffusers' own pipelines make of them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the twins are torch networks")
pytest.importorskip("diffusers", reason="the twins are diffusers pipelines")
pytest.importorskip("transformers", reason="the twins have text encoders of transformers")

from clip_words import TOKENS  # noqa: E402
from text_models import PICTURE, TWINS  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from qncd_deploy.bundle import TextFacts  # noqa: E402
from qncd_deploy.prompts import Encode, prompt_table, tokenize  # noqa: E402

PROMPTS = ["a photo of the cat", "", "Astronaut riding a RED horse, 4k!", "dog " * 100]


def tower(words, encoder, *, penultimate: bool) -> tuple[Tokenizer, Encode]:
    """The bundle's half of a pipeline: a tokenizer with its settings inside, and what it feeds."""
    own = Tokenizer.from_str(words.backend_tokenizer.to_str())
    own.enable_truncation(TOKENS)
    own.enable_padding(length=TOKENS, pad_id=words.pad_token_id, pad_token=words.pad_token)

    def encode(ids: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            out = encoder(torch.from_numpy(ids), output_hidden_states=True)
        hidden = out.hidden_states[-2] if penultimate else out.last_hidden_state
        pooled = {"pooled": out.text_embeds.numpy()} if hasattr(out, "text_embeds") else {}
        return {"hidden": hidden.numpy(), **pooled}

    return own, encode


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@pytest.mark.parametrize("negative", ["", "watercolour"])
def test_one_encoder(name: str, negative: str) -> None:
    pipe = TWINS[name]()
    towers = [tower(pipe.tokenizer, pipe.text_encoder, penultimate=False)]
    table = prompt_table(PROMPTS, negative, towers, TextFacts(1, TOKENS))
    given, null = pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=[negative] * 4)
    assert table.keys() == {"encoder_hidden_states"}
    # The encoder runs five rows here, four and four there: sums of a matrix product in another order.
    rows = table["encoder_hidden_states"]
    np.testing.assert_allclose(rows[:-1], given.numpy(), rtol=0, atol=1e-5 * np.abs(rows).max())
    np.testing.assert_allclose(rows[-1], null[0].numpy(), rtol=0, atol=1e-5 * np.abs(rows).max())


@pytest.mark.parametrize("negative", [None, "", "watercolour"])
@pytest.mark.parametrize("zeros", [True, False])
def test_two_encoders(negative: str | None, zeros: bool) -> None:
    pipe = TWINS["sdxl"]()
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    sizes = (PICTURE, PICTURE, 0, 0, PICTURE, PICTURE)
    towers = [
        tower(pipe.tokenizer, pipe.text_encoder, penultimate=True),
        tower(pipe.tokenizer_2, pipe.text_encoder_2, penultimate=True),
    ]
    table = prompt_table(PROMPTS, negative, towers, TextFacts(2, TOKENS, time_ids=sizes, zero_null=zeros))
    given, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, None, "cpu", 1, True, negative_prompt=negative)
    assert table["time_ids"].dtype == np.float32 and (table["time_ids"] == sizes).all()
    assert table["time_ids"].shape == (5, 6)
    for rows, prompts, empty in (
        (table["encoder_hidden_states"], given, null),
        (table["text_embeds"], pooled, null_pooled),
    ):
        tolerance = 1e-5 * np.abs(rows).max()  # as above
        np.testing.assert_allclose(rows[:-1], prompts.numpy(), rtol=0, atol=tolerance)
        np.testing.assert_allclose(rows[-1], empty[0].numpy(), rtol=0, atol=tolerance)
    assert (table["encoder_hidden_states"][-1] == 0).all() == (zeros and negative is None)


def test_ids_are_those_of_transformers() -> None:
    pipe = TWINS["sd21"]()
    own, _ = tower(pipe.tokenizer, pipe.text_encoder, penultimate=False)
    expected = pipe.tokenizer(PROMPTS, padding="max_length", max_length=TOKENS, truncation=True).input_ids
    ids = tokenize(own, PROMPTS)
    assert ids.dtype == np.int64 and (ids == expected).all() and (ids[1, 2:] == 0).all()

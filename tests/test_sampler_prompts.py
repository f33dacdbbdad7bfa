"""Pictures of prompts: which rows the network is told, how they are encoded, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tokenizers")

from clip_words import TOKENS, clip_tokenizer, vocabulary
from text_bundle import LATENT, PROMPTS, condition, output, write_text_bundle

from qncd_deploy.bundle import read_manifest, write_manifest
from qncd_deploy.errors import BackendMissing, BundleError, LabelError, PromptError, UsageError
from qncd_deploy.pictures import save_pictures
from qncd_deploy.prompts import open_tokenizer, read_prompts, what_is_cut
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler
from qncd_deploy.subjects import at_size, check_prompts, parse_labels

OTHERS = ["red dog", "the astronaut riding a horse", "mars!"]


@pytest.fixture(scope="module", params=[1, 2], ids=["one encoder", "two encoders"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    return write_text_bundle(tmp_path_factory.mktemp("text") / "words-w8a8", encoders=request.param), request.param


@pytest.fixture(params=["openvino", "onnxruntime"])
def sampler(request: pytest.FixtureRequest, made: tuple[Path, int]) -> Iterator[Sampler]:
    pytest.importorskip(request.param)
    with Bundle.open(made[0]).sampler(request.param, threads=1, correction="off") as opened:
        yield opened


def guided(texts: list[str], negative: str, x: np.ndarray, encoders: int, scale: float = 7.5) -> np.ndarray:
    given, null = output(x, condition(texts, encoders), encoders), output(x, condition([negative], encoders), encoders)
    return null + scale * (given - null)


@pytest.mark.parametrize("negative", [None, "watercolour dog"])
def test_the_network_is_told_the_prompts_it_is_asked_for(
    sampler: Sampler, made: tuple[Path, int], negative: str | None
) -> None:
    x = np.random.default_rng(0).standard_normal((5, *LATENT)).astype(np.float32)
    told = sampler.prompted(OTHERS, negative)
    found = told.model_for([0, 1, 2, 3, 10])(x, 501.0)
    texts = [OTHERS[i % 3] for i in (0, 1, 2, 3, 10)]
    expected = guided(texts, negative or "", x, made[1])
    # Sums of 77 tokens in another order, and guidance that multiplies what is left by 15.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    own = sampler.model_for([0, 1, 2, 3, 10])(x, 501.0)
    plain = guided([PROMPTS[i % 3] for i in (0, 1, 2, 3, 10)], "", x, made[1])
    np.testing.assert_allclose(own, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
    assert np.abs(own - found).max() > 0.1


def test_the_bundles_own_prompts_encoded_here_are_what_it_holds(sampler: Sampler) -> None:
    held = sampler.network.embedding
    again = sampler.prompted(PROMPTS).network.embedding
    assert held is not None and again is not None and held.keys() == again.keys()
    for name, rows in held.items():
        assert rows.dtype == again[name].dtype == np.float32
        np.testing.assert_allclose(again[name], rows, rtol=1e-6, atol=1e-6)  # float32 products of ten numbers


def test_pictures_come_with_their_prompts(sampler: Sampler, tmp_path: Path) -> None:
    drawn = sampler.sample(5, prompts=OTHERS, negative_prompt="dog", seed=3, batch_size=2)
    assert drawn.labels.tolist() == [0, 1, 2, 0, 1]
    assert drawn.prompts is not None and drawn.prompts.tolist() == [*OTHERS, *OTHERS[:2]] == drawn.captions
    save_pictures(tmp_path / "p.npz", drawn)
    with np.load(tmp_path / "p.npz", allow_pickle=False) as held:
        assert held["prompts"].tolist() == [*OTHERS, *OTHERS[:2]]
    own = sampler.sample(4, seed=3)
    assert own.prompts is not None and own.prompts.tolist() == [*PROMPTS, PROMPTS[0]]
    # A picture depends on (seed, index), its own prompt and the negative one alone.
    alone = sampler.sample([4], prompts=["?", OTHERS[1]], labels=[1], negative_prompt="dog", seed=3)
    np.testing.assert_allclose(alone.latents[0], drawn.latents[4], rtol=0, atol=1e-5 * np.abs(drawn.latents).max())
    assert np.abs(sampler.sample([4], prompts=OTHERS, seed=3).latents[0] - drawn.latents[4]).max() > 0.1
    assert sampler.sample(2, labels=[2]).captions == [PROMPTS[2]] * 2
    with pytest.raises(LabelError, match="class 3 is the null class"):
        sampler.sample(1, labels=[3])


def test_encoders_are_open_only_while_they_encode(made: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    from qncd_deploy import runtime

    open_engine, held = runtime.open_engine, []

    def counting(*args: object, **options: object):
        held.append(open_engine(*args, **options))
        return held[-1]

    monkeypatch.setattr(runtime, "open_engine", counting)
    with Bundle.open(made[0]).sampler("onnxruntime") as opened:
        assert [engine.path.name for engine in held] == ["unet-ort.onnx", "vae-decoder.onnx"]
        told = opened.prompted(OTHERS)
        names = ["text-encoder.onnx", "text-encoder-2.onnx"][: made[1]]
        assert [engine.path.name for engine in held[2:]] == names
        assert [engine._closed for engine in held] == [False, False, *[True] * made[1]]
        told.close()  # its engines are the other's
        assert not held[0]._closed
    assert held[0]._closed


def test_what_a_window_cuts_off_is_said_once(
    sampler: Sampler, made: tuple[Path, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    text = "dog " * 70 + "on mars, the  CAT riding a red horse"
    sampler.prompted([text, "cat"])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "prompt 'dog dog dog dog dog dog '...: longer than the window of 77 tokens, cut: 'riding a red horse'"
    )
    short, long = ("dog " * 75).strip(), "dog " * 75 + "é"
    assert [*what_is_cut(clip_tokenizer(), [short, ""])] == []
    (line,) = what_is_cut(clip_tokenizer(), [long])
    assert line.endswith("cut: 'é'")


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_the_window_is_filled_with_the_models_own_padding(pad: str) -> None:
    tokens, _ = vocabulary()
    (ids,) = (encoding.ids for encoding in clip_tokenizer(pad=pad).encode_batch(["Cat on"]))
    start, end = tokens["<|startoftext|>"], tokens["<|endoftext|>"]
    assert ids == [start, tokens["cat</w>"], tokens["on</w>"], end, *[tokens[pad]] * (TOKENS - 4)]


HARD = (
    "", " ", "a  photo\tof\nthe cat", "CAT's DOG'S we've", "café naïve ÅNGSTRÖM é", "日本の猫, 4k…", "🐈‍⬛ on 🪐",
    "x" * 200, "1234567890 3.14e-7", "<|endoftext|> a <|startoftext|>", "photo_of-the.cat/dog\\",
    "\u200bzero\u00a0width", "ﬁne ½ №", "\x00\x07cat", "ΣΑΣ ς İstanbul", "watercolour," * 30,
)  # fmt: skip


def test_ids_are_those_of_transformers_tokenizer() -> None:
    pytest.importorskip("torch", reason="the twins are made with it")
    pytest.importorskip("transformers")
    from text_models import tokenizer

    for pad in ("<|endoftext|>", "!"):
        theirs = tokenizer(pad=pad)
        expected = theirs(list(HARD), padding="max_length", max_length=TOKENS, truncation=True).input_ids
        assert [encoding.ids for encoding in clip_tokenizer(pad=pad).encode_batch(list(HARD))] == expected


# ---------------------------------------------------------------- refusals


def test_a_prompts_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff a cat \r\n\r\ndog\n\n  \nöl".encode())
    assert read_prompts(path) == ("a cat", "dog", "öl")
    for content, words in (
        (b"", "holds no prompt"),
        (b" \n\t\n", "holds no prompt. Write one a line"),
        (b"caf\xe9\n", "not UTF-8 at byte 3. Save it as UTF-8 text"),
    ):
        path.write_bytes(content)
        with pytest.raises(PromptError, match=words):
            read_prompts(path)
    with pytest.raises(PromptError, match=r"no such file\. Give a text file with one prompt a line"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path)


def test_prompts_where_they_mean_nothing_are_refused(made: tuple[Path, int]) -> None:
    facts = Bundle.open(made[0]).manifest.model
    text, classes = facts.condition, replace(facts.condition, kind="class-tokens")
    for wrong, words in ((classes, "--prompt: the network has classes. Use --class-label"), (None, "takes no prompts")):
        with pytest.raises(UsageError, match=words):
            check_prompts(wrong, 7.5, prompts=["cat"])
    with pytest.raises(UsageError, match="--negative-prompt: the network has classes"):
        check_prompts(classes, 7.5, negative_prompt="cat")
    with pytest.raises(UsageError, match="--negative-prompt: without guidance it has no effect"):
        check_prompts(text, 1.0, prompts=["cat"], negative_prompt="dog")
    with pytest.raises(UsageError, match="--prompt: no prompts"):
        check_prompts(text, 1.0, prompts=[])
    check_prompts(text, 1.0, prompts=["cat"])
    with pytest.raises(UsageError, match=r"--class-label all: the network draws prompts, not classes\. Leave it out"):
        parse_labels("all", text)
    assert at_size(facts, height=64, width=64) is at_size(facts) is facts
    with pytest.raises(UsageError, match=r"--height 7: the network draws latents, which have no size in pixels"):
        at_size(replace(facts, image_shape=None), height=7)
    with pytest.raises(UsageError, match=r"--width 512: .* 64 x 64 pixels .*run `qncd export` with --width 512"):
        at_size(facts, width=512)
    free = replace(facts, size_multiple=16)
    assert at_size(free, height=64) is free
    wide = at_size(free, width=96)
    assert (wide.image_shape, wide.latent_shape) == ((3, 64, 96), (4, 8, 12))
    for side in (72, 8):
        with pytest.raises(UsageError, match=rf"--width {side}: expected a multiple of 16, .* \(64 is its own\)"):
            at_size(free, height=96, width=side)


def test_a_bundle_whose_text_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_text_bundle(tmp_path / "b")
    (folder / "prompts.txt").write_text("one\n")
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(BundleError, match=r"prompts.txt: 1 prompts, 3 were encoded. Run `qncd export` again"):
        Bundle.open(folder).sampler("onnxruntime")
    for content in ("{}", "", json.dumps({"version": "1.0", "model": {"type": "BPE"}})):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(BundleError, match=r"tokenizer.json: not a tokenizer \(.*\)\. Run `qncd export` again"):
            open_tokenizer(folder / "tokenizer.json")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(
        BackendMissing, match=r"prompts: tokenizers is not installed. Install it: pip install \"\.\[text"
    ):
        open_tokenizer(folder / "tokenizer.json")

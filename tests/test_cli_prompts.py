"""`qncd sample` and its kin on bundles of text networks: prompts in, captions out, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tokenizers")
pytest.importorskip("onnxruntime")

from cli_helpers import qncd, qncd_process
from text_bundle import PROMPTS, write_text_bundle

from qncd_deploy.bundle import read_manifest, write_manifest

HERE = ("--backend", "onnxruntime", "--threads", 1)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_bundle(tmp_path_factory.mktemp("export") / "words-w8a8", encoders=2)


def drawn(folder: Path, *args: object) -> dict[str, np.ndarray]:
    done = qncd("sample", *args, *HERE, "--correction", "off", "-o", folder / "p.npz")
    assert done.code == 0, done.err
    with np.load(folder / "p.npz", allow_pickle=False) as held:
        return dict(held)


def test_prompts_from_the_command_line_and_from_a_file_take_turns(words: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("a red horse\n\nwatercolour\n")
    args = ("--prompt", "dog", "--prompts-file", tmp_path / "more.txt", "--height", 64, "--width", 64)
    found = drawn(tmp_path, words, *args)
    assert found["prompts"].tolist() == ["dog", "a red horse", "watercolour"] and found["labels"].tolist() == [0, 1, 2]
    assert found["images"].shape == (3, 64, 64, 3)
    more = drawn(tmp_path, words, *args, "-n", 5, "--negative-prompt", "cat")
    assert more["prompts"].tolist() == ["dog", "a red horse", "watercolour", "dog", "a red horse"]
    assert np.abs(more["latents"][:3] - found["latents"]).max() > 0.01
    own = drawn(tmp_path, words, "-n", 4)
    assert own["prompts"].tolist() == [*PROMPTS, PROMPTS[0]]
    led = drawn(tmp_path, words, "-n", 4, "--negative-prompt", "mars")
    assert led["prompts"].tolist() == own["prompts"].tolist()
    assert np.abs(led["latents"] - own["latents"]).max() > 0.01


def test_what_was_drawn_is_told_and_what_was_cut_is_said(words: Path, tmp_path: Path) -> None:
    prompt = "dog " * 80
    done = qncd_process(
        "sample", words, "--prompt", prompt, *HERE, "--correction", "off", "--json", "-o", tmp_path / "grid.png"
    )
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["prompts"] == [prompt] and facts["pictures"] == 1
    assert "longer than the window of 77 tokens, cut: 'dog dog dog dog dog'" in done.line


def test_decoding_in_less_memory_gives_the_same_pictures(words: Path, tmp_path: Path) -> None:
    whole = drawn(tmp_path, words, "-n", 3)
    for flags in (["--vae-slicing"], ["--vae-tiling"], ["--vae-slicing", "--vae-tiling"]):
        found = drawn(tmp_path, words, "-n", 3, *flags)
        np.testing.assert_array_equal(found["latents"], whole["latents"])
        # Every pixel comes from its own latent here, so tiles differ by the rounding of their weights.
        assert np.abs(found["images"].astype(int) - whole["images"]).max() <= 1


def test_decoding_that_a_bundle_has_no_graph_for_is_refused(words: Path, tmp_path: Path) -> None:
    folder = tmp_path / "words-w8a8"
    shutil.copytree(words, folder)
    manifest = read_manifest(folder)
    for role, flag, said in (
        (
            "decoder-tile",
            "--vae-tiling",
            "was exported for pictures too small for tiles, so it has no decoder of tiles.",
        ),
        ("decoder", "--vae-slicing", "--vae-slicing: "),
        ("decoder", "--vae-tiling", "has no decoder. Leave it out."),
    ):
        roles = {name: file for name, file in manifest.roles.items() if not name.startswith(role)}
        write_manifest(folder, replace(manifest, roles=roles))
        done = qncd("sample", folder, flag, *HERE, "-o", tmp_path / "x.npz")
        assert done.code == 2 and said in done.line


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--class-label", "1"], 2, "--class-label 1: the network draws prompts, not classes"),
        (["--prompts-file", "none.txt"], 1, "none.txt: no such file. Give a text file with one prompt a line"),
        (["--prompts-file", "empty.txt"], 1, "empty.txt: holds no prompt"),
        (["--prompts-file", "latin.txt"], 1, "latin.txt: not UTF-8 at byte 3"),
        (["--height", "512"], 2, "--height 512: the bundle draws 64 x 64 pixels (height x width) and no other size"),
        (["--negative-prompt", "cat", "--guidance-scale", "1"], 2, "--negative-prompt: without guidance"),
    ],
)
def test_what_a_text_bundle_cannot_do_is_refused_in_one_line(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    done = qncd("sample", words, *args)
    assert done.code == code, done.err
    assert said in done.line and done.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "latin.txt"]


def test_captions_stand_where_classes_would(words: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    out = tmp_path / "page"
    out.mkdir()
    done = qncd("eval", words, "-n", 4, *HERE, "--work", tmp_path / "work", "-o", out, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["prompts"] == [*PROMPTS]
    assert all(way["accuracy"] is way["inception_score"] is None for way in facts["variants"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{PROMPTS[0]}, " in page and "class 0" not in page
    assert qncd("eval", words, "-n", 4, "--class-label", 1).code == 2


def test_inspect_lists_the_prompts(words: Path) -> None:
    done = qncd("inspect", words)
    assert done.code == 0, done.err
    assert "prompts 3, encoded by text-encoder.onnx and text-encoder-2.onnx, 77 tokens each" in done.out
    assert all(f"    {prompt}" in done.out for prompt in PROMPTS)
    assert json.loads(qncd("inspect", words, "--json").out)["prompts"] == [*PROMPTS]

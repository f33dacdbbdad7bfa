"""`qncd build` on bundles of text networks: engines of text encoders and of tiles beside those of network and decoder,
held against the float graphs, and what `qncd sample` then takes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tokenizers")
pytest.importorskip("onnxruntime")

from cli_helpers import qncd
from fake_tensorrt import Machine, install
from text_bundle import write_text_bundle

PARTS = ("", "-decoder", "-decoder-tile", "-text-encoder", "-text-encoder-2")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_bundle(tmp_path_factory.mktemp("export") / "words-w8a8", encoders=2)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return install(monkeypatch)


def test_engines_of_all_that_prompts_need_are_built_checked_and_taken(
    words: Path, tmp_path: Path, machine: Machine
) -> None:
    shelf = ("--backend", "tensorrt", "--remainder", "f32", "--engine-dir", tmp_path / "engines")
    done = qncd("build", words, *shelf, "--no-fit", "--batch", 2, "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)["engines"]
    names = [Path(engine["path"]).name for engine in made]
    assert [
        name.rpartition("-b")[0][-len(part) :] if part else "" for name, part in zip(names, PARTS, strict=True)
    ] == [*PARTS]
    assert names[0].startswith("tensorrt-f32-") and len(names) == len(PARTS)
    assert all(name.endswith(f"{part}-b2.engine") for name, part in zip(names, PARTS, strict=True))
    for engine in made:
        assert max(engine["parity"]["errors"]) < 1e-5  # float32, in another order
    builds = len(machine.builds)
    out = tmp_path / "p.npz"
    asked = ("--prompt", "red dog", "--prompt", "mars", "--negative-prompt", "cat", "--correction", "off", "-o", out)
    for more in ((), ("--vae-tiling",)):
        done = qncd("sample", words, *asked, *shelf, "--batch-size", 2, *more)
        assert done.code == 0, done.err
        with np.load(out) as found:
            latents = found["latents"]
        done = qncd("sample", words, *asked, "--backend", "onnxruntime", "--engine-dir", tmp_path / "none", *more)
        assert done.code == 0, done.err
        with np.load(out) as found:
            # Four guided calls on another engine, in float32.
            np.testing.assert_allclose(latents, found["latents"], rtol=0, atol=1e-4 * np.abs(latents).max())
    assert len(machine.builds) == builds, "an engine was built although there was one"


def test_engines_of_text_encoders_are_built_ahead_of_time(words: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
    args = ("--backend", "tensorrt-rtx", "--target", "sm86", "--remainder", "f32", "--batch", 1)
    done = qncd("build", words, *args, "--engine-dir", tmp_path, "--json")
    assert done.code == 0, done.err
    names = [Path(engine["path"]).name for engine in json.loads(done.out)["engines"]]
    assert len(names) == 5 and names[-1].endswith("-sm86-text-encoder-2-b2.engine")


def test_an_openvino_engine_that_was_built_draws_prompts(words: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    shelf = ("--backend", "openvino", "--engine-dir", tmp_path)
    assert qncd("build", words, *shelf, "--no-fit", "--batch", 1).code == 0
    done = qncd("sample", words, *shelf, "--prompt", "cat", "--correction", "off", "-o", tmp_path / "p.npz")
    assert done.code == 0, done.err


def test_what_is_stored_of_another_graph_is_no_text_encoders(words: Path, tmp_path: Path, machine: Machine) -> None:
    """A network's engine that a new export left behind, beside the one that was built since."""
    shelf = ("--backend", "tensorrt", "--remainder", "f32", "--engine-dir", tmp_path)
    assert qncd("build", words, *shelf, "--no-fit", "--batch", 1).code == 0
    folder = tmp_path / words.name
    (unet,) = (path for path in folder.glob("*-b1.engine") if "decoder" not in path.name)
    for path in (unet, unet.with_suffix(".json")):
        stale = path.with_name(path.name.replace("-b1.", "-b2."))
        stale.write_bytes(path.read_bytes())
        if stale.suffix == ".json":
            stale.write_text(json.dumps(json.loads(stale.read_text()) | {"source": "0" * 64}))
    for path in folder.glob("*-text-encoder*"):
        path.unlink()
    done = qncd("sample", words, *shelf, "--prompt", "cat", "--correction", "off", "-o", tmp_path / "p.npz")
    assert done.code == 0, done.err

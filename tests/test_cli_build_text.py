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


def test_one_engine_takes_several_sizes_of_pictures(tmp_path: Path, machine: Machine) -> None:
    """Two encoders, so that the network is told the size, too."""
    words = write_text_bundle(tmp_path / "words-w8a8", encoders=2, any_size=True)
    shelf = ("--backend", "tensorrt", "--remainder", "f32", "--engine-dir", tmp_path / "engines")
    done = qncd("build", words, *shelf, "--no-fit", "--batch", "1,2", "--sizes", "64x64,96x64", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)["engines"]
    both = "-64x64+96x64"
    ends = {"": both, "-decoder": both, "-decoder-tile": "", "-text-encoder": "", "-text-encoder-2": ""}
    for engine, (part, size) in zip(made, ends.items(), strict=True):
        assert Path(engine["path"]).stem.endswith(f"{part}-b{'2' if 'text' in part else '1+2'}{size}")
        assert max(engine["parity"]["errors"]) < 1e-5  # of the largest profile: float32, in another order
    facts = json.loads(Path(made[0]["path"]).with_suffix(".json").read_text())
    assert [profile["sample"] for profile in facts["profiles"]] == [
        [rows, 4, 8, width] for width in (8, 12) for rows in (2, 4)
    ]
    builds = len(machine.builds)
    out = tmp_path / "p.npz"
    asked = ("--prompt", "red dog", "--prompt", "mars", "--height", 64, "--width", 96, "--correction", "off", "-o", out)
    found = []
    for engine in (shelf, ("--backend", "onnxruntime", "--engine-dir", tmp_path / "none")):
        done = qncd("sample", words, *asked, *engine, "--batch-size", 2)
        assert done.code == 0, done.err
        with np.load(out) as held:
            found.append(held["latents"])
            assert held["images"].shape == (2, 64, 96, 3)
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4 * np.abs(found[1]).max())
    assert len(machine.builds) == builds, "an engine was built although there was one"
    assert qncd("bench", words, "--backend", "onnxruntime", "--width", 96, "--eval-size", 2, "--rounds", 1).code == 0


def draw(words: Path, out: Path, *args: object) -> tuple[np.ndarray, np.ndarray]:
    """Latents and pictures of the bundle's own prompts, uncorrected."""
    done = qncd("sample", words, *args, "--correction", "off", "-o", out)
    assert done.code == 0, done.err
    with np.load(out) as held:
        return held["latents"], held["images"]


def test_engines_of_other_sizes_are_neither_taken_nor_counted(tmp_path: Path, machine: Machine) -> None:
    """One of 64 x 64 for two pictures, one of 64 x 96 for one: each size has its own number of rows."""
    words, out = write_text_bundle(tmp_path / "words-w8a8", any_size=True), tmp_path / "p.npz"
    shelf = ("--backend", "tensorrt", "--remainder", "f32", "--engine-dir", tmp_path / "engines")
    for more in (("--batch", 2), ("--batch", 1, "--sizes", "96x64")):
        assert qncd("build", words, *shelf, "--no-fit", *more).code == 0
    exact = ("--backend", "onnxruntime", "--engine-dir", tmp_path / "none")
    builds = len(machine.builds)
    for size, batch in (((), 1), ((), 2), (("--width", 96), 1), (("--width", 96), 2)):
        found, wanted = (draw(words, out, *on, "-n", 2, *size, "--batch-size", batch) for on in (shelf, exact))
        np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-4 * np.abs(wanted[0]).max())
        assert np.abs(found[1].astype(int) - wanted[1]).max() <= 1  # decoded whole, rounded to nearest
    assert len(machine.builds) == builds, "an engine was built although there was one"
    found, wanted = (draw(words, out, *on, "-n", 1, "--height", 32) for on in (shelf, exact))
    assert np.abs(found[1].astype(int) - wanted[1]).max() <= 1
    assert len(machine.builds) == builds + 2, "network and decoder are compiled for a size that has no engines"


@pytest.mark.parametrize("sizes", [((64, 96),), ((32, 64), (64, 64))])
def test_every_size_that_is_built_is_checked_and_fitted(
    tmp_path: Path, machine: Machine, sizes: tuple[tuple[int, int], ...]
) -> None:
    """Without the bundle's own size, and with one that is smaller than the decoder's tiles."""
    words = write_text_bundle(tmp_path / "words-w8a8", any_size=True)
    asked = ",".join(f"{width}x{height}" for height, width in reversed(sizes))
    args = ("--backend", "tensorrt", "--remainder", "f32", "--batch", 8, "--sizes", asked, "--engine-dir", tmp_path)
    done = qncd("build", words, *args)
    assert done.code == 0, done.err
    for height, width in sizes:
        assert f"  auto = off for {height} x {width} pixels (height x width)" in done.out
    builds = len(machine.builds)
    again = qncd("build", words, *args)
    assert again.code == 0 and "auto" not in again.out and again.out.count("up to date") == 4
    assert len(machine.builds) == builds


@pytest.mark.parametrize(
    ("any_size", "sizes", "words"),
    [
        (True, "64", "expected sizes such as 768x512, width first"),
        (True, "72x64", "--sizes: --width 72: expected a multiple of 16"),
        (False, "96x64", "--sizes: --width 96: the bundle draws 64 x 64 pixels (height x width) and no other size"),
    ],
)
def test_sizes_that_cannot_be_built(tmp_path: Path, any_size: bool, sizes: str, words: str, machine: Machine) -> None:
    bundle = write_text_bundle(tmp_path / "words-w8a8", any_size=any_size)
    done = qncd("build", bundle, "--backend", "tensorrt", "--sizes", sizes, "--engine-dir", tmp_path / "engines")
    assert done.code == 2 and words in " ".join(done.err.split())


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

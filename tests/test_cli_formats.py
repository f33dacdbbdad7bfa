"""--format and its short forms: what they mean, what contradicts them, and an export that quantizes weights alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import SMALL, Export, contents, qncd


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--int4", "--format", "w4a16"], 2, "--int4 is --format w4a8, and --format w4a16 was given too."),
        (["--int4", "--int8"], 2, "--int8 is --format w8a8, and --int4 was given too."),
        (["--int8", "--format", "w4a8"], 2, "--int8 is --format w8a8, and --format w4a8 was given too."),
        (
            ["--int4", "--block-size", "64"],
            2,
            "--block-size 64: w4a8 has one scale per output channel",
        ),
        (["--format", "w4a16", "--block-size", "48"], 2, "'48' is not one of '32', '64', '128'"),
        (["--format", "w3a8"], 2, "'w3a8' is not one of"),
        (["--format", "w4a16", "--exclude", "no_such_layer"], 1, "--exclude 'no_such_layer': matches none of"),
    ],
)
def test_what_contradicts_is_refused(own_graph: Export, tmp_path: Path, args: list[str], code: int, words: str) -> None:
    shelves = ("--calib-dir", tmp_path / "calib", "--onnx-dir", tmp_path / "export")
    done = qncd("export", own_graph.source, *own_graph.options, *shelves, *args)
    assert done.code == code and words in " ".join(done.err.split())
    assert not (tmp_path / "export").exists() or not list((tmp_path / "export").iterdir())


@pytest.mark.parametrize("args", [["--int4"], ["--format", "w4a8"], ["--int4", "--format", "w4a8"]])
def test_int4_means_w4a8(own_graph: Export, tmp_path: Path, args: list[str]) -> None:
    done = qncd("export", own_graph.source, *own_graph.options, "--onnx-dir", tmp_path, *args, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["bundle"].endswith("own-w4a8")


def test_a_dry_run_names_the_blocks_and_nothing_to_smooth(own_graph: Export, tmp_path: Path) -> None:
    done = qncd(
        *("export", own_graph.source, *own_graph.options, "--onnx-dir", tmp_path, "--format", "w4a16", "--dry-run"),
        *("--block-size", "128"),
    )
    assert done.code == 0, done.err
    assert "in blocks of 32, since its 64 inputs are not several blocks of 128" in done.out
    assert " 0 residual blocks to smooth" in done.out


@pytest.fixture(scope="module")
def weight_only(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A w4a16 bundle of the tiny checkpoint."""
    home = tmp_path_factory.mktemp("w4a16")
    assert export(checkpoint, home) == ""
    return home / "export/tiny-w4a16"


def export(checkpoint: Path, home: Path, *more: object) -> str:
    shelves = ("--calib-dir", home / "calib_data", "--onnx-dir", home / "export")
    done = qncd("export", checkpoint, "--format", "w4a16", *SMALL, "--correction", "off", *shelves, *more)
    assert "activations stay float: nothing to calibrate, to smooth or to keep float for" in done.out, done.err
    return done.err


def test_nothing_is_calibrated_and_the_bundle_says_what_it_is(weight_only: Path) -> None:
    assert not (weight_only.parents[1] / "calib_data").exists()
    plan = json.loads((weight_only / "plan.json").read_text())
    manifest = json.loads((weight_only / "manifest.json").read_text())
    assert plan["format"] == manifest["format"] == "w4a16" and manifest["recipe"]["--block-size"] is None
    quantized = [layer for layer in plan["layers"] if layer["weight_bits"] is not None]
    assert all(layer["act_bits"] is None and layer["act_scale"] is None for layer in quantized)
    assert {layer["weight_bits"] for layer in quantized if layer["op"] == "Conv"} == {8}
    assert {(layer["weight_bits"], layer.get("block_size")) for layer in quantized if layer["op"] == "MatMul"} == {
        *((4, 64), (4, 32), (8, None))  # of 128, 64 and 32 inputs
    }
    shown = qncd("inspect", weight_only)
    assert shown.code == 0 and re.search(r"\d+ W4A16   \d+ W8A16   \d+ float", shown.out)


def test_every_cpu_engine_samples_the_same_pictures(weight_only: Path, tmp_path: Path) -> None:
    def latents(name: str, *how: object) -> np.ndarray:
        done = qncd("sample", weight_only, "-n", 4, "--n-steps", 4, *how, "-o", tmp_path / f"{name}.npz")
        assert done.code == 0, done.err
        with np.load(tmp_path / f"{name}.npz") as found:
            return found["latents"]

    exact = latents("float", "--float", "--backend", "torch")
    yardstick = latents("torch", "--backend", "torch")
    size = np.sqrt(np.square(exact).mean())
    error = np.sqrt(np.square(yardstick - exact).mean()) / size
    assert 1e-4 < error < 0.1  # 20 dB in the weights of Linears, 43 dB in convolutions, averaged over layers and steps
    for backend in ("openvino", "onnxruntime"):
        found = latents(backend, "--backend", backend)
        assert np.sqrt(np.square(found - yardstick).mean()) / size < 1e-4  # float32 sums in another order, 4 steps


def test_the_same_inputs_give_the_same_bytes(weight_only: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path) == ""
    again, first = contents(tmp_path / "export/tiny-w4a16"), contents(weight_only)
    assert again.keys() == first.keys()
    assert [name for name in first if name != "report.html" and again[name] != first[name]] == []

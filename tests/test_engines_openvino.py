"""OpenVINO: integer kernels really run, the remainder is the one asked for, blobs are used and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ov = pytest.importorskip("openvino")
pytest.importorskip("onnx")

from engine_graphs import network_feeds, save_network  # noqa: E402

from qncd_deploy.engines.base import BaseEngine, open_engine  # noqa: E402
from qncd_deploy.errors import EngineError  # noqa: E402

SHAPES = {name: array.shape for name, array in network_feeds().items()}
HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "int8.onnx"
    save_network(path, quantized=True)
    return path


@pytest.fixture(scope="module")
def blob(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "net.blob"
    with open_engine("openvino", graph, threads=1) as engine:
        engine.save_blob(path, SHAPES, source="aa" * 32)
    return path


def integer_ops(engine: BaseEngine) -> list[tuple[str, int]]:
    weighted = ("Convolution", "FullyConnected")
    return [(kernel.op, kernel.count) for kernel in engine.kernels(SHAPES) if kernel.integer and kernel.op in weighted]


def test_every_planned_layer_runs_on_integers_and_no_other(graph: Path, tmp_path: Path) -> None:
    with open_engine("openvino", graph) as engine:
        assert integer_ops(engine) == [("Convolution", 1), ("FullyConnected", 1)]
    save_network(tmp_path / "float.onnx", quantized=False)
    with open_engine("openvino", tmp_path / "float.onnx") as engine:
        assert integer_ops(engine) == []


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16")
def test_the_remainder_is_float32_unless_bf16_is_asked_for(graph: Path) -> None:
    precisions = {}
    for remainder in (None, "bf16"):
        with open_engine("openvino", graph, remainder=remainder) as engine:
            precisions[engine.engine_id] = {kernel.precision for kernel in engine.kernels(SHAPES)}
    assert "bf16" not in precisions["openvino-f32"]
    assert "bf16" in precisions["openvino-bf16"]


def test_shapes_are_compiled_once(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine("openvino", graph) as engine:
        compiled = []
        keep = engine._keep
        monkeypatch.setattr(engine, "_keep", lambda key, model: (compiled.append(key), keep(key, model)))
        for rows in (2, 2, 1, 2, 1):
            engine(network_feeds(rows))
    assert [key[0][0] for key in compiled] == [2, 1]


def test_a_shape_that_the_graph_cannot_take_is_one_line(graph: Path) -> None:
    with open_engine("openvino", graph) as engine, pytest.raises(EngineError, match="cannot compile it for") as caught:
        engine.kernels({**SHAPES, "c": (2, 1, 13)})
    assert "\n" not in str(caught.value)


def test_a_blob_replaces_compiling_and_gives_the_same_bits(
    graph: Path, blob: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine("openvino", graph, threads=1) as engine:
        expected = engine(network_feeds())["out"]
    with open_engine("openvino", graph, threads=1) as engine:
        assert engine.compiled_bytes(SHAPES) is None
        engine.load_blob(blob, source="aa" * 32)
        assert engine.compiled_bytes(SHAPES) == blob.stat().st_size
        monkeypatch.setattr(engine, "_core", None)  # whatever would compile now fails
        np.testing.assert_array_equal(engine(network_feeds())["out"], expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "bb" * 32}, r"made from another graph \(sha256 bbbbbbbbbbbb\.\.\., not aaaaaaaaaaaa\.\.\.\)"),
        ({"version": "2020.1"}, r"made by OpenVINO 2020\.1, this is 20"),
        ({"device": "Pentium"}, "made for Pentium, this is "),
        ({"remainder": "bf16"}, "its remainder is bf16, f32 was asked for"),
        ({"threads": 7}, "made for 7 threads, 1 were asked for"),
        ({"schema": 2}, "blob schema 2, this version reads 1"),
        ({"sha256": "00"}, r"changed on disk \(sha256 \w{12}\.\.\., 00\.\.\. was written\)"),
        ({"extra": 1}, r"not a compiled blob with its \.json beside it"),
        ({"shapes": 3}, r"not a compiled blob with its \.json beside it"),
    ],
)
def test_a_blob_for_something_else_is_refused(
    graph: Path, blob: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    (tmp_path / "net.blob").write_bytes(blob.read_bytes())
    facts = json.loads(blob.with_suffix(".json").read_text())
    (tmp_path / "net.json").write_text(json.dumps({**facts, **change}))
    with (
        open_engine("openvino", graph, threads=1) as engine,
        pytest.raises(EngineError, match=rf"net\.blob: {words}.*Run `qncd build` again here\.$"),
    ):
        engine.load_blob(tmp_path / "net.blob", source="aa" * 32)


def test_a_flipped_byte_and_a_missing_blob_are_refused(graph: Path, blob: Path, tmp_path: Path) -> None:
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "net.blob").write_bytes(content)
    (tmp_path / "net.json").write_bytes(blob.with_suffix(".json").read_bytes())
    with open_engine("openvino", graph, threads=1) as engine:
        with pytest.raises(EngineError, match="changed on disk"):
            engine.load_blob(tmp_path / "net.blob", source="aa" * 32)
        with pytest.raises(EngineError, match="not a compiled blob"):
            engine.load_blob(tmp_path / "none.blob", source="aa" * 32)


def test_backends_that_compile_nothing_say_so(graph: Path, blob: Path) -> None:
    pytest.importorskip("onnxruntime")
    with open_engine("onnxruntime", graph) as engine:
        assert engine.kernels(SHAPES) == ()
        with pytest.raises(EngineError, match="onnxruntime-f32: compiles nothing that could be stored"):
            engine.save_blob(blob, SHAPES, source="")
        with pytest.raises(EngineError, match="takes no compiled blob"):
            engine.load_blob(blob, source="")


def test_ctrl_c_is_no_crash_after_two_engines_were_closed_in_turn(graph: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from qncd_deploy.engines.base import open_engine
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit a deaf one
first, second = (open_engine("openvino", Path(sys.argv[1])) for _ in range(2))
shapes = eval(sys.argv[2])
for engine in (first, second):
    engine.kernels(shapes)
for engine in (first, second):
    engine.close()
del first, second, engine
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code, graph, repr(SHAPES)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr

"""What all engines promise, held against ONNX's own evaluator; opening them by name; their refusals."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("onnx")

from engine_graphs import network_feeds, reference, save_network

from qncd_deploy.engines import base
from qncd_deploy.engines.base import (
    BACKENDS,
    Backend,
    BaseEngine,
    available_backends,
    check_feeds,
    default_backend,
    make_engine_id,
    open_engine,
)
from qncd_deploy.errors import BackendMissing, BuildFailed, EngineError
from qncd_deploy.specs import TensorSpec

LIBRARIES = {"openvino": "openvino", "onnxruntime": "onnxruntime", "torch": "torch"}


@pytest.fixture(params=list(LIBRARIES))
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    save_network(folder / "float.onnx", quantized=False)
    save_network(folder / "int8.onnx", quantized=True)
    save_network(folder / "external.onnx", quantized=True, external=True)
    return folder


@pytest.mark.parametrize("graph", ["float", "int8", "external"])
def test_an_engine_equals_the_reference_evaluator(backend: str, graph: str, graphs: Path) -> None:
    feeds = network_feeds()
    expected = reference(graphs / f"{graph}.onnx", feeds)
    with open_engine(backend, graphs / f"{graph}.onnx") as engine:
        found = engine(feeds)
    # Sums of at most 72 products, |terms| <= 1; no activation of these feeds lies within 1e-5 of a rounding tie.
    np.testing.assert_allclose(found["out"], expected, rtol=0, atol=1e-5)


def test_the_integer_graph_is_told_from_the_float_one(backend: str, graphs: Path) -> None:
    feeds = network_feeds()
    with open_engine(backend, graphs / "int8.onnx") as quantized, open_engine(backend, graphs / "float.onnx") as exact:
        difference = quantized(feeds)["out"] - exact(feeds)["out"]
    assert 1e-3 < np.abs(difference).max() < 0.5


def test_specs_name_the_inputs_and_keep_free_dimensions_free(backend: str, graphs: Path) -> None:
    with open_engine(backend, graphs / "int8.onnx") as engine:
        assert list(engine.inputs.values()) == [
            TensorSpec("x", "float32", ("batch", 8, 16, 16)),
            TensorSpec("t", "float32", ("batch",)),
            TensorSpec("c", "float32", ("batch", 1, 12)),
        ]
        assert list(engine.outputs.values()) == [TensorSpec("out", "float32", ("batch", 8, 16, 16))]


def test_outputs_belong_to_the_caller_and_inputs_are_left_alone(backend: str, graphs: Path) -> None:
    first, second = network_feeds(seed=1), network_feeds(seed=2)
    for array in first.values():
        array.setflags(write=False)
    with open_engine(backend, graphs / "int8.onnx") as engine:
        out = engine(first)["out"]
        kept = out.copy()
        engine(second)
        np.testing.assert_array_equal(out, kept)
        out[:] = 0  # writable, and no part of the engine
        np.testing.assert_array_equal(engine(first)["out"], kept)  # bit for bit, run after run
    engine.close()


def test_batch_sizes_agree(backend: str, graphs: Path) -> None:
    feeds = network_feeds(3)
    with open_engine(backend, graphs / "float.onnx", threads=1) as engine:
        together = engine(feeds)["out"]
        alone = np.concatenate([engine({k: v[i : i + 1] for k, v in feeds.items()})["out"] for i in range(3)])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5)  # another order of 72 additions


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": None}, r"nothing fed to input 'x'\. Its inputs are x, t, c"),
        ({"y": np.zeros(2, np.float32)}, "unknown input 'y'"),
        ({"x": np.zeros((2, 8, 16), np.float32)}, "input 'x' is float32 2x8x16, expected float32 batchx8x16x16"),
        ({"x": np.zeros((2, 4, 16, 16), np.float32)}, "input 'x' is float32 2x4x16x16, expected"),
        ({"x": np.zeros((2, 8, 16, 16))}, "input 'x' is float64 2x8x16x16, expected float32"),
        ({"t": np.zeros(3, np.float32)}, r"input 't' is float32 3, expected float32 batch with batch = 2"),
        ({"t": np.float32(0)}, "input 't' is float32 a scalar"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(
    backend: str, graphs: Path, change: dict[str, np.ndarray | None], words: str
) -> None:
    feeds = {name: array for name, array in {**network_feeds(), **change}.items() if array is not None}
    with (
        open_engine(backend, graphs / "int8.onnx") as engine,
        pytest.raises(EngineError, match=rf"int8\.onnx: {words}") as caught,
    ):
        engine(feeds)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_graph_is_refused(backend: str, tmp_path: Path) -> None:
    for content in (b"", b"not a graph"):
        (tmp_path / "unet.onnx").write_bytes(content)
        with pytest.raises(EngineError) as caught:
            open_engine(backend, tmp_path / "unet.onnx")
        assert str(caught.value).startswith(f"{tmp_path}/unet.onnx: ")
        assert "\n" not in str(caught.value)


def test_missing_weights_are_a_failed_build(backend: str, graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "external.onnx").write_bytes((graphs / "external.onnx").read_bytes())
    with pytest.raises(BuildFailed, match=r"external\.onnx: "):
        open_engine(backend, tmp_path / "external.onnx")


def test_a_missing_graph_an_unknown_backend_and_an_impossible_remainder(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"unet\.onnx: no such graph\."):
        open_engine("onnxruntime", tmp_path / "unet.onnx")
    with pytest.raises(EngineError, match=r"backend 'tflite': unknown\. Choose one of openvino, onnxruntime, torch, "):
        open_engine("tflite", tmp_path / "unet.onnx")
    with pytest.raises(
        EngineError, match=r"onnxruntime: computes its float layers in f32 only, bf16 was asked for\. .*\(openvino\)"
    ):
        make_engine_id("onnxruntime", "bf16")


def test_engine_ids_name_backend_and_remainder() -> None:
    assert make_engine_id("openvino") == "openvino-f32"
    assert make_engine_id("openvino", "bf16") == "openvino-bf16"
    assert make_engine_id("torch") == "torch-f32"


def test_a_missing_library_is_named_with_the_line_that_installs_it(
    graphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent: set[str] = set()

    def load(name: str) -> object:
        if name.rpartition(".")[2] in absent:
            raise ImportError("No module named 'it'\nsecond line")
        return SimpleNamespace(**{backend.engine: BaseEngine for backend in BACKENDS.values()})

    monkeypatch.setattr(base.importlib, "import_module", load)
    assert default_backend() == "openvino"
    absent.add("openvino")
    with pytest.raises(
        BackendMissing,
        match=r"openvino: not usable on this machine \(No module named 'it'\)\. "
        r'Install it: pip install "\.\[cpu\]" in the checkout$',
    ):
        open_engine("openvino", graphs / "float.onnx")
    assert default_backend() == "onnxruntime"
    assert {status.name for status in available_backends() if status.missing} == {"openvino"}
    absent |= {backend.module.rpartition(".")[2] for backend in BACKENDS.values()}
    with pytest.raises(BackendMissing, match=r"no inference engine on this machine\. Install one: pip install"):
        default_backend()


def test_a_full_gpu_is_no_reason_to_do_without_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(BaseEngine):
        @classmethod
        def library_version(cls, backend: Backend) -> str | None:
            if backend.device == "gpu":
                raise EngineError("GPU: out of memory on Fake GPU before anything was loaded.")
            return None if backend.name == "torch" else super().library_version(backend)

    monkeypatch.setattr(base, "engine_class", lambda backend: Full)
    monkeypatch.setattr(base, "BACKENDS", dict(reversed(BACKENDS.items())))
    assert {status.missing is None for status in available_backends() if "tensorrt" in status.name} == {False}
    assert BACKENDS[default_backend()].device == "cpu"


def test_contiguous_feeds_are_passed_on_without_a_copy() -> None:
    inputs = {"x": TensorSpec("x", "float32", ("batch", 3))}
    x = np.zeros((2, 3), np.float32)
    assert check_feeds(Path("g"), inputs, {"x": x})["x"] is x
    turned = np.zeros((3, 2), np.float32).T
    assert check_feeds(Path("g"), inputs, {"x": turned})["x"].flags.c_contiguous


def test_engines_in_two_threads_do_not_disturb_each_other(backend: str, graphs: Path) -> None:
    results: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        with open_engine(backend, graphs / "int8.onnx", threads=1) as engine:
            for _ in range(3):
                results[seed] = engine(network_feeds(seed=seed))["out"]

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed, found in results.items():
        expected = reference(graphs / "int8.onnx", network_feeds(seed=seed))
        # Feeds of seed 2 may meet a tie: one step of the second grid through one row of weights, 0.0171 * 0.3, at most.
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.01)

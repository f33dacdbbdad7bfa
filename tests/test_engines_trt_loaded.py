"""Running a plan, on a device that does everything late: buffers, stream order, CUDA graphs, profiles, refusals."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import fake_cupy
from engine_graphs import network_feeds, reference, save_network
from fake_tensorrt import TensorRT, fixed, plan

from qncd_deploy.engines.trt.cuda import DeviceArrays
from qncd_deploy.engines.trt.device import Device
from qncd_deploy.engines.trt.library import Library, open_library
from qncd_deploy.engines.trt.loaded import LoadedEngine
from qncd_deploy.errors import EngineError

GPU = Device(name="Fake GPU", sm="sm86", memory=1 << 34, cuda="12.6")
SHAPES = {"x": (2, 8, 16, 16), "t": (2,), "c": (2, 1, 12)}
LAST_BIT = 1e-5
"""Sums of at most 72 products, |terms| <= 1, in another order."""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "net.onnx"
    save_network(path, quantized=False)
    return path


@pytest.fixture
def arrays() -> DeviceArrays:
    return DeviceArrays(fake_cupy, GPU)


def load(arrays: DeviceArrays, blob: bytes, *, rtx: bool = False, **how: Any) -> tuple[LoadedEngine, SimpleNamespace]:
    """An engine, and the fake object behind it."""
    module = TensorRT("1.7.1", kind="tensorrt-rtx") if rtx else TensorRT("10.13.2")
    library = Library(module.kind, module, (1, 7, 1) if rtx else (10, 13, 2))
    engine = LoadedEngine(library, arrays, blob, place=Path("net.engine"), **how)
    return engine, module.engines[0]


def device_feeds(arrays: DeviceArrays, seed: int = 1) -> dict:
    return {name: arrays.put(array) for name, array in network_feeds(seed=seed).items()}


def test_results_equal_the_reference_evaluator(graph: Path, arrays: DeviceArrays) -> None:
    engine, _ = load(arrays, plan(graph, [fixed(**SHAPES)]))
    assert [(s.dtype, s.shape) for s in engine.inputs.values()] == [("float32", SHAPES[n]) for n in ("x", "t", "c")]
    assert list(engine.outputs) == ["out"]
    for seed in (1, 2, 3):  # plain, captured, launched
        out = engine(device_feeds(arrays, seed))["out"]
        expected = reference(graph, network_feeds(seed=seed))
        np.testing.assert_allclose(arrays.get(out), expected, rtol=0, atol=LAST_BIT)


def test_nothing_waits_and_results_stay_the_callers(graph: Path, arrays: DeviceArrays) -> None:
    engine, _ = load(arrays, plan(graph, [fixed(**SHAPES)]))
    waits = arrays._stream.waits
    outs = [engine(device_feeds(arrays, seed))["out"] for seed in range(5)]
    assert arrays._stream.waits == waits
    assert np.isnan(outs[0].memory).all()  # what a reader finds who does not wait
    for seed, out in enumerate(outs):
        expected = reference(graph, network_feeds(seed=seed))
        np.testing.assert_allclose(arrays.get(out), expected, rtol=0, atol=LAST_BIT)


def test_the_second_call_is_captured_and_launched_from_then_on(graph: Path, arrays: DeviceArrays) -> None:
    engine, fake = load(arrays, plan(graph, [fixed(**SHAPES)]))
    for _ in range(4):
        engine(device_feeds(arrays))
    assert [context.enqueued for context in fake.contexts] == [2]  # once plainly, once into the graph


def test_a_context_that_cannot_be_captured_runs_without(
    graph: Path, arrays: DeviceArrays, caplog: pytest.LogCaptureFixture
) -> None:
    engine, fake = load(arrays, plan(graph, [fixed(**SHAPES)]))
    engine(device_feeds(arrays))
    fake.contexts[0].capturable = False
    with caplog.at_level(logging.INFO):
        outs = [engine(device_feeds(arrays, seed))["out"] for seed in (1, 2)]
    assert [r.message for r in caplog.records if "CUDA graph" in r.message] == [
        "net.engine: runs without a CUDA graph, which may be slower (net.engine: failed while running "
        "(enqueueV3: Error Code 1: Cask (kernel launch failed)).)"
    ]
    for seed, out in zip((1, 2), outs, strict=True):
        np.testing.assert_allclose(arrays.get(out), reference(graph, network_feeds(seed=seed)), rtol=0, atol=LAST_BIT)


def test_tensorrt_for_rtx_captures_by_itself_and_hands_its_cache_on(
    graph: Path, arrays: DeviceArrays, caplog: pytest.LogCaptureFixture
) -> None:
    blob = plan(graph, [fixed(**SHAPES)], kind="tensorrt-rtx", version="1.7.1")
    engine, fake = load(arrays, blob, rtx=True)
    for _ in range(3):
        engine(device_feeds(arrays))
    (context,) = fake.contexts
    assert context.enqueued == 3
    assert context.config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    cache = engine.compiled
    again, fake = load(arrays, blob, rtx=True, cache=cache)
    assert again._cache.filled
    with caplog.at_level(logging.INFO):
        load(arrays, blob, rtx=True, cache=b"of another driver")
    assert "so that is done again" in caplog.text
    assert load(arrays, plan(graph, [fixed(**SHAPES)]))[0].compiled is None


def test_every_profile_is_used_and_none_beyond(graph: Path, arrays: DeviceArrays) -> None:
    def profile(low: int, high: int) -> dict:
        return {name: [(low, *s[1:]), (high, *s[1:]), (high, *s[1:])] for name, s in SHAPES.items()}

    engine, fake = load(arrays, plan(graph, [profile(1, 2), profile(4, 6)]))
    assert engine.inputs["x"].shape == ("batch", 8, 16, 16)
    wanted = {1: 0, 2: 0, 3: None, 4: 1, 6: 1, 7: None}
    assert {rows: engine.profile({n: (rows, *s[1:]) for n, s in SHAPES.items()}) for rows in wanted} == wanted
    assert engine.profile({**SHAPES, "c": (2, 12)}) is None
    assert engine.sizes() == (
        "x 1x8x16x16 to 2x8x16x16, t 1 to 2, c 1x1x12 to 2x1x12; or "
        "x 4x8x16x16 to 6x8x16x16, t 4 to 6, c 4x1x12 to 6x1x12"
    )
    for rows in (2, 5, 2):
        feeds = network_feeds(rows)
        out = engine({name: arrays.put(array) for name, array in feeds.items()})["out"]
        np.testing.assert_allclose(arrays.get(out), reference(graph, feeds), rtol=0, atol=LAST_BIT)
    assert [context.profile for context in fake.contexts] == [0, 1]


def test_plans_that_are_not_for_this_machine_are_refused(graph: Path, arrays: DeviceArrays) -> None:
    good = plan(graph, [fixed(**SHAPES)])
    for blob, words in (
        (b"PK\x03\x04", r"header.magicTag == kEXPECTED_MAGIC_TAG failed"),
        (good[: len(good) // 2], r"sizeRead == static_cast<uint64_t>\(mEngineSize\) failed"),
        (plan(graph, [fixed(**SHAPES)], version="10.3.0"), r"not compatible: expecting version 10\.13\.2"),
        (plan(graph, [fixed(**SHAPES)], device="sm89"), r"built for sm89, this device is sm86"),
    ):
        with pytest.raises(EngineError, match=words) as refused:
            load(arrays, blob)
        message = str(refused.value)
        assert message.startswith("net.engine: tensorrt 10.13.2 on Fake GPU cannot load it (")
        assert message.endswith(". Run `qncd build` again here.") and "\n" not in message


def test_an_engine_for_later_versions_may_run_host_code_and_no_other(graph: Path, arrays: DeviceArrays) -> None:
    blob = plan(graph, [fixed(**SHAPES)], version_compatible=True)
    load(arrays, blob, version_compatible=True)
    with pytest.raises(EngineError, match="host code is not allowed"):
        load(arrays, blob)


def test_too_little_memory_to_load_it_is_no_fault_of_the_engine(graph: Path, arrays: DeviceArrays) -> None:
    module = TensorRT("10.13.2")
    module.memory_left = False
    with pytest.raises(EngineError, match=r"net\.engine: not enough memory on Fake GPU to load it \(.*\)\. Use a") as e:
        LoadedEngine(
            Library("tensorrt", module, (10, 13, 2)), arrays, plan(graph, [fixed(**SHAPES)]), place=Path("net.engine")
        )
    assert "qncd build" not in str(e.value)


def test_too_little_memory_is_one_line(graph: Path, arrays: DeviceArrays, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, fake = load(arrays, plan(graph, [fixed(**SHAPES)]))
    feeds = device_feeds(arrays)
    fake.memory_left = False
    with pytest.raises(EngineError, match=r"net\.engine: not enough memory on Fake GPU to run it \(.*out of memory\)"):
        engine(feeds)
    fake.memory_left = True
    monkeypatch.setattr(fake_cupy.MEMORY, "limit", 0)
    with pytest.raises(EngineError, match=r"GPU: out of memory on Fake GPU \(.*\)\. Use a smaller --batch-size"):
        engine(feeds)


def test_a_run_that_fails_says_why(graph: Path, arrays: DeviceArrays) -> None:
    engine, fake = load(arrays, plan(graph, [fixed(**SHAPES)]))
    engine(device_feeds(arrays))
    fake.contexts[0].fails = True
    with pytest.raises(EngineError, match=r"net\.engine: failed while running \(.*kernel launch failed\)\)\."):
        engine(device_feeds(arrays))


def test_closing_gives_the_memory_back(graph: Path, arrays: DeviceArrays) -> None:
    gc.collect()
    before = len(fake_cupy.MEMORY.held)
    gc.disable()
    try:
        engine, _ = load(arrays, plan(graph, [fixed(**SHAPES)]))
        for _ in range(3):
            engine(device_feeds(arrays))
        arrays.wait()
        assert len(fake_cupy.MEMORY.held) > before
        engine.close()
        assert len(fake_cupy.MEMORY.held) == before
    finally:
        gc.enable()


def test_the_librarys_own_refusal_is_one_line(arrays: DeviceArrays) -> None:
    """TensorRT for RTX itself, which reads a plan's header without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
    library = open_library("tensorrt-rtx")
    with pytest.raises(EngineError) as refused:
        LoadedEngine(library, arrays, b"no plan" * 100, place=Path("net.engine"))
    message = str(refused.value)
    assert message.startswith(f"net.engine: tensorrt-rtx {library.version_text} on Fake GPU cannot load it (")
    assert message.endswith(". Run `qncd build` again here.") and "\n" not in message

"""Full TensorRT, 10.3 to 11.4, as far as it goes without a GPU: what it is asked for, what is made of its answers."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_trt_builder import CONVOLUTION, RECORDED, FakeTensorRT

from qncd_deploy.engines.base import Kernel
from qncd_deploy.engines.trt.build import BuiltEngine, build, graph_specs
from qncd_deploy.engines.trt.kernels import Product, layers_from_inspector
from qncd_deploy.engines.trt.library import Library, parse_version
from qncd_deploy.engines.trt.options import BuildOptions, trtexec_line
from qncd_deploy.errors import BackendMissing, BuildFailed, EngineError, UsageError
from qncd_deploy.specs import TensorSpec

GRAPH = Path("net.onnx")
SHAPES = {"x": (2, 8, 4, 4)}
OUT_OF_MEMORY = (
    "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)",
    "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for node "
    "{ForeignNode[up.3/Conv...out/Cast]}.)",
)


def library(fake: FakeTensorRT) -> Library:
    return Library("tensorrt", fake, parse_version(fake.__version__))


def built(fake: FakeTensorRT, **options: Any) -> BuiltEngine:
    return build(library(fake), GRAPH, BuildOptions((SHAPES,), **options), memory=8 << 30)


@pytest.mark.parametrize("version", RECORDED)
def test_every_version_is_strongly_typed_and_takes_no_precision_flag(version: str) -> None:
    fake = FakeTensorRT(version)
    built(fake)
    (asked,) = fake.builds
    assert asked["flags"] == (2 if version.startswith("10.") else 0)  # 1 << STRONGLY_TYPED
    assert asked["set"] == [] and asked["cleared"] == ["TF32"]
    assert asked["profiling_verbosity"].name == "DETAILED"
    assert asked["shape"] == SHAPES["x"] and asked["profiles"] == []
    assert not asked.keys() & {"WORKSPACE", "builder_optimization_level", "hardware_compatibility_level"}


def test_what_is_asked_for_is_passed_on() -> None:
    fake = FakeTensorRT("11.4.0.106")
    built(fake, level=4, workspace=1 << 28, hardware="ampere-plus", version_compatible=True)
    (asked,) = fake.builds
    assert asked["builder_optimization_level"] == 4 and asked["WORKSPACE"] == 1 << 28
    assert asked["hardware_compatibility_level"].name == "AMPERE_PLUS" and asked["set"] == ["VERSION_COMPATIBLE"]


def test_several_shapes_are_profiles() -> None:
    fake = FakeTensorRT("10.3.0")
    build(library(fake), GRAPH, BuildOptions((SHAPES, {"x": (4, 8, 4, 4)})))
    assert fake.builds[0]["profiles"] == [{"x": (SHAPES["x"],) * 3}, {"x": ((4, 8, 4, 4),) * 3}]
    assert fake.builds[0]["shape"] == (-1, 8, 4, 4)


def test_what_a_version_does_not_have_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"--hardware-compatibility: tensorrt 10\.3\.0 does not have it\. Leave it out\."
    ):
        built(FakeTensorRT("10.3.0"), hardware="same-compute-capability")
    built(FakeTensorRT("10.16.1.11"), hardware="same-compute-capability")
    with pytest.raises(UsageError, match="--target sm86: tensorrt builds for the GPU it runs on"):
        built(FakeTensorRT("10.3.0"), targets=("sm86",))


def test_the_inspector_tells_the_kernels() -> None:
    engine = built(FakeTensorRT("10.3.0"))
    assert engine.demands.products == (Product("conv", "w", "y", "i8", "i8", "w_dq"),)
    (kernel,) = engine.table.kernels
    assert kernel == Kernel("Convolution", "i8", CONVOLUTION["TacticName"], 1)
    assert engine.table.missed == () and engine.table.line() == "1 of 1 planned layers run quantized"
    half = {**CONVOLUTION, "Inputs": CONVOLUTION["Outputs"], "Weights": {"Type": "Half"}, "TacticName": "h"}
    table = built(FakeTensorRT("10.3.0", layers=[half])).table
    assert table.missed == ("w (f16 x f16)",) and table.line() == "0 of 1 planned layers run quantized"
    single = {**half, "Inputs": [{"Format/Datatype": "Row major linear FP32"}], "Weights": {"Type": "Float"}}
    table = built(FakeTensorRT("10.3.0", layers=[single])).table
    assert table.float_products == ("conv + relu",) and table.line().endswith("1 products of float32")


def test_layers_of_the_compiled_regions_of_newer_versions() -> None:
    """Their constants are listed as tensors, and their data types on their own."""
    text = """{"Layers": [{"Name": "linear_myl0_3", "LayerType": "gemm",
        "Inputs": [{"Name": "a", "Datatype": "Int8", "Format": "Row major linear format"}],
        "Constants": [{"Name": "w", "Datatype": "Int8"}, {"Name": "alpha", "Datatype": "Float"}],
        "Outputs": [{"Name": "y", "Datatype": "Half"}], "TacticName": "sm80_xmma_gemm_i8_0x12ab", "StreamId": 0,
        "Metadata": "[ONNX Layer: linear/MatMul]\\u001e[ONNX Layer: w_dq]"}]}"""
    (layer,) = layers_from_inspector(text)
    assert (layer.op, layer.operands, layer.nodes >= {"linear/MatMul", "w_dq"}) == ("MatMul", ("i8", "i8"), True)


def test_a_convolution_that_adds_a_second_input_multiplies_its_weights() -> None:
    """The shortcut of a residual block, in float16; what a matrix product of two inputs has is its factors."""
    half = {"Name": "shortcut", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}
    fused = {**CONVOLUTION, "Name": "conv + add", "Inputs": [*CONVOLUTION["Inputs"], half]}
    table = built(FakeTensorRT("10.3.0", layers=[fused])).table
    assert table.missed == () and table.integer_kernels == 1

    def operands(*constants: str) -> tuple[str, str]:
        tensors = [{"Datatype": kind} for kind in constants]
        layer = {"Name": "qk_myl0_1", "LayerType": "gemm", "Inputs": [{"Datatype": "Int8"}, {"Datatype": "Half"}]}
        return layers_from_inspector(json.dumps({"Layers": [{**layer, "Constants": tensors}]}))[0].operands

    assert operands("Float", "Float") == operands() == ("i8", "f16")
    assert operands("Int8", "Float") == ("i8", "i8")


def test_version_11_writes_other_keys() -> None:
    tensor = {"Name": "x_q", "DataType": "Int8", "Format": "Thirty-two wide channel vectorized row major format"}
    told = {**CONVOLUTION, "Inputs": [tensor], "Outputs": [{**tensor, "DataType": "Half"}]}
    assert built(FakeTensorRT("11.4.0.106", layers=[told])).table == built(FakeTensorRT("10.3.0")).table


def test_each_profiles_kernels_count_once() -> None:
    """Names of layers, or of their tensors, say which profile; within a compiled region some say nothing."""
    conv = {**CONVOLUTION, "Name": "conv [profile 1]"}
    inner = {"Name": "__myl_Move_myl0_0", "LayerType": "kgen", "Inputs": [{"Name": "a", "Datatype": "Half"}]}
    outer = {**inner, "Name": "__myl_Cast_myl1_0", "Inputs": [{"Name": "x [profile 1]", "Datatype": "Half"}]}
    first, second = [CONVOLUTION, inner], [conv, outer, {**inner, "Name": "__myl_Move_myl1_1"}]
    table = built(FakeTensorRT("10.3.0", layers=first)).table
    assert built(FakeTensorRT("10.3.0", layers=[*first, *second])).table == table and len(table.kernels) == 2
    half = {**conv, "Inputs": CONVOLUTION["Outputs"], "Weights": {"Type": "Half"}}
    assert built(FakeTensorRT("10.3.0", layers=[CONVOLUTION, half])).table.missed == ("w (f16 x f16 and i8 x i8)",)


@pytest.mark.parametrize("layers", [["conv + relu"], [CONVOLUTION, "copy"], [{"Name": 3}], []])
def test_an_engine_whose_kernels_cannot_be_read_is_built_all_the_same(
    layers: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        engine = built(FakeTensorRT("11.4.0.106", layers=layers))
    assert engine.plan == b"plan" and not engine.table.known and engine.table.missed == ()
    assert engine.table.line() == "1 layers planned quantized, kernels not known"
    assert ("its kernels are not known: engine: " in caplog.text) == bool(layers)
    unnamed = {key: value for key, value in CONVOLUTION.items() if key != "LayerType"}
    assert built(FakeTensorRT("11.4.0.106", layers=[unnamed])).table.known


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"Layers": ["conv + relu"]}', "tells nothing but layers' names"),
        ("{}", "cannot be read"),
        ("Layers:", "cannot be read"),
        ('{"Layers": [{"Name": 3}]}', "cannot be read"),
    ],
)
def test_an_inspector_that_says_nothing(text: str, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        layers_from_inspector(text)


def test_less_memory_is_tried_when_it_runs_out() -> None:
    fake = FakeTensorRT("10.3.0", [OUT_OF_MEMORY, OUT_OF_MEMORY, b"plan"])
    engine = built(fake)
    assert engine.plan == b"plan"
    assert [(asked.get("WORKSPACE"), asked.get("builder_optimization_level")) for asked in fake.builds] == [
        (None, None),
        (4 << 30, 2),  # half of the GPU's memory, one level below TensorRT's own
        (2 << 30, 1),
    ]
    assert (engine.options.workspace, engine.options.level) == (2 << 30, 1)


def test_when_no_memory_suffices_the_node_is_named() -> None:
    fake = FakeTensorRT("10.3.0", [OUT_OF_MEMORY] * 4)
    words = (
        r"net\.onnx: up\.3/Conv\.\.\.out/Cast: out of memory, with 128 MiB of workspace and optimization level 0 too\. "
    )
    with pytest.raises(BuildFailed, match=words + "Close what else uses the GPU, or build for fewer pictures"):
        built(fake, workspace=1 << 30, level=1)
    assert [asked["builder_optimization_level"] for asked in fake.builds] == [1, 0, 0, 0]


NO_WORKSPACE = (
    "Error Code 10: Internal Error (Could not find any implementation for node conv due to insufficient workspace.)",
)


def test_a_workspace_that_is_too_small_is_not_made_smaller() -> None:
    fake = FakeTensorRT("10.3.0", [NO_WORKSPACE])
    with pytest.raises(BuildFailed, match=r"net\.onnx: conv: no kernel fits into the workspace\. Raise --workspace"):
        built(fake, workspace=1 << 20)


def test_too_little_workspace_that_nobody_asked_for_is_too_little_memory() -> None:
    fake = FakeTensorRT("10.3.0", [NO_WORKSPACE, NO_WORKSPACE, b"plan"])
    assert built(fake).options.workspace == 2 << 30
    with pytest.raises(BuildFailed, match=r"net\.onnx: conv: out of memory, with 1024 MiB of workspace and"):
        built(FakeTensorRT("10.3.0", [NO_WORKSPACE] * 4))
    fake = FakeTensorRT("10.3.0", [OUT_OF_MEMORY, NO_WORKSPACE, b"plan"])
    assert built(fake, workspace=1 << 30).options.workspace == 256 << 20  # the second was not the user's own


def test_memory_in_a_warning_is_no_reason_to_try_again() -> None:
    lines = ["[W] Skipping a tactic: insufficient memory", "Error Code 4: Internal Error (types disagree)"]
    with pytest.raises(BuildFailed, match="types disagree"):
        built(FakeTensorRT("10.3.0", [lines, b"plan"]))


def test_another_failure_is_its_first_error() -> None:
    fake = FakeTensorRT("10.3.0", [["Error Code 4: Internal Error (types disagree)\nmore", "second"]])
    with pytest.raises(BuildFailed, match=r"cannot build it \(Error Code 4: Internal Error \(types disagree\)\)\.$"):
        built(fake)


@pytest.mark.parametrize("name", ["Builder", "OnnxParser", "Runtime"])
def test_a_library_that_cannot_start_is_one_line(name: str) -> None:
    words = (
        rf"^tensorrt: its {name} cannot start \(CUDA initialization failure with error: 35\)\. Check `nvidia-smi`\.$"
    )
    with pytest.raises(BackendMissing, match=words):
        built(FakeTensorRT("10.3.0", broken=name))


def test_the_timing_cache_is_kept_and_a_foreign_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    fake = FakeTensorRT("10.3.0", [b"1", b"2", b"3"], foreign_caches=(b"of another GPU",))
    built(fake, timing_cache=path)
    assert path.read_bytes() == b"+"
    built(fake, timing_cache=path)
    assert path.read_bytes() == b"++"
    path.write_bytes(b"of another GPU")
    built(fake, timing_cache=path)
    assert path.read_bytes() == b"+"
    assert [asked["caches"] for asked in fake.builds] == [[b""], [b"+"], [b""]]


def test_a_timing_cache_that_cannot_be_written_does_not_lose_the_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeTensorRT("10.3.0", [b"1", b"2"])
    assert built(fake, timing_cache=tmp_path / "new/shelf/timing.cache").plan == b"1"
    assert (tmp_path / "new/shelf/timing.cache").read_bytes() == b"+"
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO):
        assert built(fake, timing_cache=tmp_path / "file/timing.cache").plan == b"2"
    assert "timing.cache: not written (" in caplog.text


@pytest.fixture
def hearing() -> Iterator[None]:
    """With Ctrl-C as an interactive Python takes it: a shell's background jobs inherit a deaf one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hearing")
def test_ctrl_c_stops_the_builder_and_is_raised_after_it() -> None:
    steps: list[bool] = []

    def press(monitor: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        until = time.monotonic() + 10
        while monitor.step_complete("Building Engine", 0) and time.monotonic() < until:
            time.sleep(0.001)
        steps.append(monitor.step_complete("Building Engine", 0))

    fake = FakeTensorRT("10.3.0", during=press)
    with pytest.raises(KeyboardInterrupt):
        built(fake)
    assert steps == [False]
    assert fake.thread is not threading.main_thread()  # which the library would not give back before it is done


def test_progress_is_told_by_one_of_the_builders_threads_at_a_time() -> None:
    told: list[int] = []
    failures: list[BaseException] = []
    busy = threading.Lock()

    def tick(done: int, total: int) -> None:
        assert busy.acquire(blocking=False), "two at once"
        time.sleep(1e-5)  # lets another thread run
        told.append(done)
        busy.release()

    def work(monitor: Any, name: str) -> None:
        try:
            for step in range(100):
                monitor.phase_start(f"{name}{step}", "Building Engine", 2)
                assert monitor.step_complete(f"{name}{step}", 0)
                monitor.phase_finish(f"{name}{step}")
        except BaseException as exc:
            failures.append(exc)

    def during(monitor: Any) -> None:
        threads = [threading.Thread(target=work, args=(monitor, name)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    build(library(FakeTensorRT("10.3.0", during=during)), GRAPH, BuildOptions((SHAPES,)), on_progress=tick)
    assert failures == [] and told == sorted(told) and told[-1] == 1000


def test_specs_name_free_sizes_where_the_graph_does_not() -> None:
    inputs, outputs = graph_specs(library(FakeTensorRT("10.3.0")), GRAPH)
    assert inputs == {"x": TensorSpec("x", "float32", ("batch", 8, 4, 4))}
    assert outputs == {"y": TensorSpec("y", "float32", ("batch", 8, 4, 4))}


def test_the_vendors_line(tmp_path: Path) -> None:
    options = BuildOptions(
        (SHAPES,), hardware="same-compute-capability", version_compatible=True, timing_cache=Path("t.cache")
    )
    words = trtexec_line(library(FakeTensorRT("10.16.1.11")), GRAPH, Path("net.engine"), options).split()
    assert words[0] == "trtexec" and {"--stronglyTyped", "--noTF32", "--timingCacheFile=t.cache"} <= set(words)
    assert {"--hardwareCompatibilityLevel=sameComputeCapability", "--versionCompatible"} <= set(words)
    assert "--stronglyTyped" not in trtexec_line(library(FakeTensorRT("11.4.0.106")), GRAPH, Path("e"), options)
    assert not {"--fp16", "--int8", "--best"} & set(words)

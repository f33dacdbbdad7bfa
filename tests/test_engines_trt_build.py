"""Building with TensorRT for RTX, which takes no GPU: what runs, on which targets, how often, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
onnx = pytest.importorskip("onnx")

from engine_graphs import network_feeds, save_network  # noqa: E402
from onnx import TensorProto, helper, numpy_helper, parser  # noqa: E402

from qncd_deploy.engines.base import Kernel  # noqa: E402
from qncd_deploy.engines.trt.build import BuiltEngine, build, graph_specs  # noqa: E402
from qncd_deploy.engines.trt.kernels import Product  # noqa: E402
from qncd_deploy.engines.trt.library import Library, open_library  # noqa: E402
from qncd_deploy.engines.trt.options import BuildOptions, check_options, trtexec_line  # noqa: E402
from qncd_deploy.errors import BuildFailed, EngineError, UsageError  # noqa: E402
from qncd_deploy.specs import TensorSpec  # noqa: E402

TARGETS = ("sm86", "sm89", "sm120")


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in network_feeds(rows).items()}


@pytest.fixture(scope="module")
def library() -> Library:
    return open_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "int8.onnx"
    save_network(path, quantized=True, external=True)
    return path


@pytest.fixture(scope="module")
def built(library: Library, graph: Path) -> BuiltEngine:
    return build(library, graph, BuildOptions((shapes(2),), TARGETS))


def test_planned_layers_run_in_int8_and_the_others_in_float(built: BuiltEngine) -> None:
    products = {product.output: (product.data, product.weight) for product in built.demands.products}
    # tokens is the table's product, y0 the first convolution: both were left in float
    assert products == {"tokens": ("f32", "f32"), "y0": ("f32", "f32"), "y3": ("i8", "i8"), "product": ("i8", "i8")}
    assert [product.layer for product in built.demands.products if product.planned] == ["w1d", "w2d"]
    assert built.table.planned == 2 and built.table.missed == ()
    assert Kernel("Convolution", "i8", "correlation", 1) in built.table.kernels
    assert built.table.integer_kernels == 2
    assert built.table.line().startswith("2 of 2 planned layers run quantized")


def test_the_same_build_gives_the_same_bytes_and_another_target_others(
    library: Library, graph: Path, built: BuiltEngine
) -> None:
    again = build(library, graph, built.options)
    assert (again.plan, again.table, again.demands) == (built.plan, built.table, built.demands)
    assert build(library, graph, replace(built.options, targets=("sm86",))).plan != built.plan


def test_several_batch_sizes_are_profiles_of_one_engine(library: Library, graph: Path) -> None:
    table = build(library, graph, BuildOptions((shapes(1), shapes(2), shapes(4)), ("sm89",))).table
    assert table.planned == 2 and table.missed == ()
    assert table == build(library, graph, BuildOptions((shapes(1),), ("sm89",))).table  # each kernel counts once


def test_progress_rises_to_its_end(library: Library, graph: Path) -> None:
    ticks: list[tuple[int, int]] = []
    build(library, graph, BuildOptions((shapes(1),), ("sm89",)), on_progress=lambda *tick: ticks.append(tick))
    done = [tick[0] for tick in ticks]
    assert len(done) > 20 and done == sorted(done) and len(set(done)) > 10
    assert ticks[-1] == (1000, 1000)


def test_what_progress_raises_stops_the_build_and_comes_out(library: Library, graph: Path) -> None:
    ticks: list[int] = []

    def tick(done: int, total: int) -> None:
        ticks.append(done)
        raise KeyError(done)

    with pytest.raises(KeyError):
        build(library, graph, BuildOptions((shapes(1),), ("sm89",)), on_progress=tick)
    assert len(ticks) < 20


def test_specs_are_the_graphs(library: Library, graph: Path) -> None:
    inputs, outputs = graph_specs(library, graph)
    assert list(inputs.values()) == [
        TensorSpec("x", "float32", ("batch", 8, 16, 16)),
        TensorSpec("t", "float32", ("batch",)),
        TensorSpec("c", "float32", ("batch", 1, 12)),
    ]
    assert list(outputs.values()) == [TensorSpec("out", "float32", ("batch", 8, 16, 16))]


def test_watched_tensors_become_outputs(library: Library, graph: Path, built: BuiltEngine) -> None:
    watched = build(library, graph, built.options, watch=("y3", "y0"))
    assert watched.plan != built.plan and watched.table.missed == ()
    with pytest.raises(EngineError, match=r"int8\.onnx: no tensor 'y9' to watch\."):
        build(library, graph, built.options, watch=("y9",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": (2, 8, 16, 20)}, r"input 'x' takes anyx8x16x16, 2x8x16x20 was asked for\."),
        ({"t": ()}, r"input 't' takes any,  was asked for|input 't' takes any, a scalar was asked for\."),
        ({"c": None}, r"input 'c' takes anyx1x12, no shape was asked for\."),
    ],
)
def test_shapes_that_the_graph_does_not_take(library: Library, graph: Path, change: dict, words: str) -> None:
    asked = {name: shape for name, shape in {**shapes(2), **change}.items() if shape is not None}
    with pytest.raises(EngineError, match=words):
        build(library, graph, BuildOptions((asked,), TARGETS))


def test_a_graph_that_cannot_be_read_names_its_node(library: Library, tmp_path: Path) -> None:
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    net (float[2,3] x) => (float[2,3] y) <float s = {0.1}, uint8 z = {128}> {
        [the_node] q = QuantizeLinear(x, s, z)
        [back] y = DequantizeLinear(q, s, z)
    }
    """
    onnx.save(parser.parse_model(text), tmp_path / "net.onnx")
    with pytest.raises(
        BuildFailed, match=r"net\.onnx: tensorrt-rtx cannot read it \(the_node \[QuantizeLinear\]: "
    ) as caught:
        build(library, tmp_path / "net.onnx", BuildOptions(({"x": (2, 3)},), TARGETS))
    assert "\n" not in str(caught.value)
    for content in (b"", b"no graph"):
        (tmp_path / "net.onnx").write_bytes(content)
        with pytest.raises(BuildFailed, match=r"net\.onnx: tensorrt-rtx cannot read it \(.+\)\."):
            graph_specs(library, tmp_path / "net.onnx")


def test_what_the_compiler_refuses_is_one_line(library: Library, tmp_path: Path) -> None:
    """An INT4 weight under a quantized input parses, and then fails to compile."""
    save_int4(tmp_path / "net.onnx", block=None, quantized_input=True)
    with pytest.raises(BuildFailed, match=r"net\.onnx: TensorRT cannot build it \(.+\)\.$") as caught:
        build(library, tmp_path / "net.onnx", BuildOptions(({"x": (1, 32, 8, 8)},), TARGETS))
    assert "\n" not in str(caught.value)


def save_int4(path: Path, *, block: int | None, quantized_input: bool = False) -> None:
    """A float16 MatMul with 4-bit weights in blocks along K; or, without blocks, a convolution per output channel."""
    rng = np.random.default_rng(0)
    shape = (256, 128) if block else (32, 32, 3, 3)
    weight = helper.make_tensor("w", TensorProto.INT4, shape, rng.integers(-8, 8, int(np.prod(shape))).tolist())
    scales = (shape[0] // block, shape[1]) if block else shape[:1]
    scale = numpy_helper.from_array(rng.uniform(0.01, 0.02, scales).astype(np.float16), "s")
    nodes = [helper.make_node("Cast", ["x"], ["xh"], name="in", to=TensorProto.FLOAT16)]
    parts = [weight, scale]
    how = {"axis": 0, "block_size": block} if block else {"axis": 0}
    nodes.append(helper.make_node("DequantizeLinear", ["w", "s"], ["w_dq"], name="weight", **how))
    data = "xh"
    if quantized_input:
        parts += [numpy_helper.from_array(np.float16(0.02), "xs"), numpy_helper.from_array(np.int8(0), "xz")]
        nodes.append(helper.make_node("QuantizeLinear", ["xh", "xs", "xz"], ["xq"], name="q"))
        nodes.append(helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="dq"))
        data = "xd"
    nodes.append(helper.make_node("MatMul" if block else "Conv", [data, "w_dq"], ["yh"], name="product"))
    nodes.append(helper.make_node("Cast", ["yh"], ["y"], name="out", to=TensorProto.FLOAT))
    size = ["batch", 16, 256] if block else ["batch", 32, 8, 8]
    free = ["batch", 16, 128] if block else ["batch", 32, 6, 6]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", size), ("y", free))]
    model = helper.make_model(
        helper.make_graph(nodes, "int4", ends[:1], ends[1:], parts),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(model, path)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_four_bit_weights_of_linear_layers_stay_packed(library: Library, tmp_path: Path, block: int) -> None:
    save_int4(tmp_path / "net.onnx", block=block)
    int4 = build(library, tmp_path / "net.onnx", BuildOptions(({"x": (2, 16, 256)},), TARGETS))
    assert int4.demands.products == (Product("product", "w", "yh", "f16", "i4", "weight"),)
    assert int4.table.planned == 1 and int4.table.missed == () and int4.table.integer_kernels == 0
    assert int4.table.line() == "1 of 1 planned layers are stored as planned, the products of 1 take packed weights"


def test_four_bit_weights_that_are_unpacked_first_are_told(library: Library, tmp_path: Path) -> None:
    """A block of the whole of K: a kernel of its own dequantizes, and a float16 product reads what it wrote."""
    save_int4(tmp_path / "net.onnx", block=256)
    table = build(library, tmp_path / "net.onnx", BuildOptions(({"x": (2, 16, 256)},), TARGETS)).table
    assert table.planned == 1 and table.missed == ("w (f16 x f16)",)
    assert table.line() == "0 of 1 planned layers are stored as planned, the products of 0 take packed weights"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--target: name the GPUs to build for, of sm75, sm80, sm86, sm89, sm120, sm121."),
        (
            {"targets": ("sm90",)},
            "--target sm90: tensorrt-rtx builds for sm75, sm80, sm86, sm89, sm120, sm121. For other GPUs use",
        ),
        ({"targets": ("sm86",), "hardware": "ampere-plus"}, "--hardware-compatibility: tensorrt-rtx 1."),
        ({"targets": ("sm86",), "version_compatible": True}, "--version-compatible: tensorrt-rtx 1."),
    ],
)
def test_options_that_it_does_not_have(library: Library, options: dict, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_options(library, BuildOptions((shapes(1),), **options))
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_turing_spoils_int8_for_all_and_is_refused_among_others(library: Library, tmp_path: Path) -> None:
    paths = {quantized: tmp_path / f"{quantized}.onnx" for quantized in (True, False)}
    for quantized, path in paths.items():
        save_half_conv(path, quantized=quantized)
    mixed = BuildOptions(({"x": (1, 32, 8, 8)},), ("sm75", "sm86"))
    with pytest.raises(UsageError, match=r"--target sm75: it has no INT8 convolutions .* Build for it alone\."):
        build(library, paths[True], mixed)
    build(library, paths[False], mixed)
    assert build(library, paths[True], replace(mixed, targets=("sm75",))).table.missed != ()


def save_half_conv(path: Path, *, quantized: bool) -> None:
    """A float16 convolution, with an INT8 weight and input or without."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    net (float16[batch,32,8,8] x) => (float16[batch,32,8,8] y) <int8 z = {0}> {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear(w, s, z)
        y = Conv<pads=[1,1,1,1]>(xd, wd)
    }
    """
    model = parser.parse_model(text)
    weight = np.random.default_rng(0).integers(-127, 128, (32, 32, 3, 3))
    if not quantized:
        del model.graph.node[:3]
        model.graph.node[0].input[:] = ["x", "w"]
    dtype = np.int8 if quantized else np.float16
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(dtype), "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.float16(0.1), "s"))
    onnx.save(model, path)


def test_the_vendors_line_for_the_same_engine(library: Library) -> None:
    options = BuildOptions(
        ({"x": (1, 4), "s": ()}, {"x": (2, 4), "s": ()}), ("sm86", "sm120"), level=4, workspace=1 << 30
    )
    assert trtexec_line(library, Path("a b.onnx"), Path("e.engine"), options) == (
        "tensorrt_rtx '--onnx=a b.onnx' --saveEngine=e.engine --profile=0 --minShapes=x:1x4 --optShapes=x:1x4 "
        "--maxShapes=x:1x4 --profile=1 --minShapes=x:2x4 --optShapes=x:2x4 --maxShapes=x:2x4 --noTF32 "
        "--profilingVerbosity=detailed --skipInference --computeCapabilities=86,120 --builderOptimizationLevel=4 "
        "--memPoolSize=workspace:1073741824B"
    )


def test_another_builder_takes_the_same_kernels(
    library: Library, graph: Path, built: BuiltEngine, tmp_path: Path
) -> None:
    """Polygraphy's loaders, in a process of their own: they choose the library by the environment. Kernels go by names
    with a hash; what surrounds them in the file depends on settings that Polygraphy makes and we leave alone.
    """
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    code = """
import sys
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
import tensorrt_rtx as trt
builder, network, parser = NetworkFromOnnxPath(sys.argv[1])()
for index, shape in enumerate(eval(sys.argv[3])):
    network.get_input(index).shape = shape
verbosity = trt.ProfilingVerbosity.DETAILED
make_config = CreateConfigRTX(compute_capabilities=[(8, 6), (8, 9), (12, 0)], profiling_verbosity=verbosity)
config = make_config(builder, network)
config.clear_flag(trt.BuilderFlag.TF32)
plan = EngineBytesFromNetwork((builder, network, parser), config=config)()
open(sys.argv[2], "wb").write(bytes(plan))
"""
    args = [graph, tmp_path / "plan", str(list(shapes(2).values()))]
    env = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    subprocess.run([sys.executable, "-c", code, *args], check=True, env=env, capture_output=True)
    theirs, ours = (set(re.findall(rb"__myl_\w{8,}", plan)) for plan in ((tmp_path / "plan").read_bytes(), built.plan))
    assert len(ours) > 5 and theirs == ours

"""What TensorRT for RTX makes of our graphs ahead of time, on a machine without a GPU: kernels, seconds, bytes.

    python benchmarks/trt_build.py export/fashion-ldm-w8a8 [...]    any W8A8 bundles; speed.py exports the 16 M UNet

Of every bundle three networks are built, for compute capabilities 8.6, 8.9 and 12.0 in one engine: the float twin in
float16, W8A8 as it is exported, and the float16 twin with the weights of its matrix products in 4-bit blocks of 32
along K, scale = max |w| / 7, written here. Every engine is built twice and compared byte for byte; the time is the
processor's, which a busy machine disturbs least. Nothing is run: of speed on a GPU this says nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qncd_deploy.engines.eps_model import input_shapes
from qncd_deploy.engines.trt.build import BuiltEngine, build, graph_specs
from qncd_deploy.engines.trt.library import Library, open_library
from qncd_deploy.engines.trt.options import BuildOptions
from qncd_deploy.export.passes.common import constant, insert_before
from qncd_deploy.export.passes.half import HalfRemainder
from qncd_deploy.export.save import save_siblings
from qncd_deploy.runtime import Bundle

TARGETS = ("sm86", "sm89", "sm120")
BLOCK = 32
INT4_OPSET = 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=2, help="rows of one network call")
    arguments = parser.parse_args()
    library = open_library("tensorrt-rtx")
    print(f"- command: {shlex.join(['python', *sys.argv])}")
    print(f"- TensorRT for RTX {library.version_text}, targets {', '.join(TARGETS)}, {arguments.rows} rows a call")
    print(f"- {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print()
    print(
        "| network | planned quantized | run so | convolutions | matrix products | fused attentions | float32 "
        "products | MiB | CPU s | same bytes again |"
    )
    print("|---|---:|---:|---|---|---:|---:|---:|---:|---|")
    for path in arguments.bundles:
        bundle = Bundle.open(path)
        with tempfile.TemporaryDirectory() as folder:
            for name, graph in networks(bundle, Path(folder)):
                print(row(f"{bundle.manifest.name} {name}", *measure(library, bundle, graph, arguments.rows)))


def networks(bundle: Bundle, folder: Path) -> Iterator[tuple[str, Path]]:
    def half(*changes: Callable[[ir.Model], None]) -> Path:
        model = ir.load(bundle.file("float"))
        HalfRemainder()(model)
        for change in changes:
            change(model)
        save_siblings({"unet.onnx": model}, folder)
        return folder / "unet.onnx"

    yield "float16", half()
    yield "W8A8", bundle.file("trt")
    yield "INT4 weights", half(pack_linears)


def pack_linears(model: ir.Model) -> None:
    """Weights of MatMul (K, N) and transposed Gemm (N, K) in 4-bit blocks along K, where BLOCK divides K."""
    graph = model.graph
    graph.opset_imports[""] = INT4_OPSET
    for node in list(graph):
        weight = constant(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") else None
        axis = 1 if node.op_type == "Gemm" and "transB" in node.attributes else 0
        if weight is None or weight.ndim != 2 or weight.shape[axis] % BLOCK:
            continue
        name = node.inputs[1].name
        scale, levels = blocks(weight.astype(np.float32), axis)
        packed = ir.Value(name=f"{name}_q", const_value=ir.tensor(levels, dtype=ir.DataType.INT4, name=f"{name}_q"))
        scales = ir.Value(name=f"{name}_scale", const_value=ir.tensor(scale, name=f"{name}_scale"))
        for value in (packed, scales):
            value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
            graph.register_initializer(value)
        back = insert_before(node, "DequantizeLinear", [packed, scales], f"{name}_dq", axis=axis, block_size=BLOCK)
        back.type = ir.TensorType(ir.DataType.FLOAT16)
        node.replace_input_with(1, back)


def blocks(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales, float16, one for each block along `axis`, and levels -8 .. 7, each an int8."""
    columns = np.moveaxis(weight, axis, 0)
    grouped = columns.reshape(-1, BLOCK, columns.shape[1])
    scale = np.maximum(np.abs(grouped).max(axis=1) / 7, np.finfo(np.float16).smallest_normal).astype(np.float16)
    levels = np.clip(np.round(grouped / scale[:, None].astype(np.float32)), -8, 7).astype(np.int8)
    levels = levels.reshape(columns.shape)
    return np.ascontiguousarray(np.moveaxis(scale, 0, axis)), np.ascontiguousarray(np.moveaxis(levels, 0, axis))


def measure(library: Library, bundle: Bundle, graph: Path, rows: int) -> tuple[BuiltEngine, float, bool]:
    """The engine, the processor's seconds of its first build, and whether a second one has the same bytes."""
    inputs, _ = graph_specs(library, graph)
    shapes = input_shapes(inputs, rows=rows, state=bundle.manifest.model.latent_shape, conditions=bundle.embedding)
    options = BuildOptions((shapes,), TARGETS)
    started = time.process_time()
    built = build(library, graph, options)
    seconds = time.process_time() - started
    return built, seconds, build(library, graph, options).plan == built.plan


def row(name: str, built: BuiltEngine, seconds: float, same: bool) -> str:
    table = built.table

    def counted(op: str) -> str:
        counts = Counter()
        for kernel in table.kernels:
            counts[kernel.precision] += kernel.count * (kernel.op == op)
        return ", ".join(f"{count} {precision}" for precision, count in sorted(counts.items()) if count)

    run = "" if not table.planned else str(table.planned - len(table.missed))
    cells = [name, str(table.planned or ""), run, counted("Convolution"), counted("MatMul")]
    cells += [f"{table.fused} of {table.attentions}", str(len(table.float_products))]
    cells += [f"{len(built.plan) / 2**20:.1f}", f"{seconds:.1f}", "yes" if same else "NO"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

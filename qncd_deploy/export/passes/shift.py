"""Take the zero points off 8-bit activations, for TensorRT: an exact rewrite, shift by shift.

With q = clip(round(x / s) + z) an op of weights W and zero padding computes conv(s (q - z), W). Since s (q - z) is
x + c, quantized without a zero point, less c = s z,

    x --Add(c)--[Pad with c]--QuantizeLinear(s, 0)--DequantizeLinear(s, 0)--> op without padding, bias - c sum(W)

is the same, the sum taken over everything but the output channels, of the weight as its integers give it. A padded
zero has to become c before it is rounded, which is what the Pad is for; Linears and 1x1 convolutions need none.
(Zero points below 8 bits never get here: see quant.grid.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qncd_deploy.export.passes.common import (
    Refused,
    constant,
    initializer,
    insert_after,
    insert_before,
    out_axis,
    quantized_pair,
    take_over,
)
from qncd_deploy.export.passes.insert_qdq import ZERO


class ShiftZeroPoints(ir.passes.InPlacePass):
    """Rewrite a model that InsertQDQ made so that every zero point is 0; idle where they are already.

    An edge whose readers pad differently is quantized once for each padding.
    """

    def requires(self, model: ir.Model) -> None:
        for quantizer in _shifted(model.graph):
            for node in _readers(quantizer):
                padding = node.attributes.get("auto_pad")
                if padding is not None and padding.as_string() not in ("NOTSET", "VALID"):
                    raise Refused(
                        f"{node.name}: padding {padding.as_string()} is not told in numbers. "
                        "Export the network with explicit pads, or with symmetric 8-bit grids."
                    )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = _shifted(model.graph)
        for quantizer in found:
            _shift(quantizer)
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        assert not _shifted(model.graph)


def _shifted(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "QuantizeLinear" and constant(node.inputs[2]).any()]


def _readers(quantizer: ir.Node) -> Sequence[ir.Node]:
    (dequantizer,) = quantizer.outputs[0].consumers()
    return dequantizer.outputs[0].consumers()


def _shift(quantizer: ir.Node) -> None:
    graph, (edge, scale, zero_point) = quantizer.graph, quantizer.inputs
    c = np.float32(float(constant(scale)) * int(constant(zero_point)))
    offset = initializer(graph, f"{edge.name}_offset", c)
    zero = initializer(graph, ZERO, np.int8(0))
    shifted = insert_before(quantizer, "Add", [edge, offset], f"{edge.name}_shift")
    by_padding: dict[tuple[int, ...], list[ir.Node]] = {}
    for node in _readers(quantizer):
        by_padding.setdefault(_padding(node), []).append(node)
    for index, (pads, nodes) in enumerate(by_padding.items()):
        source = _padded(quantizer, shifted, offset, pads, f"{shifted.name}_pad{index}") if any(pads) else shifted
        x = quantized_pair(quantizer, source, scale, zero, source.name)
        for node in nodes:
            node.replace_input_with(0, x)
            if any(pads):
                node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
            _take_off(node, float(c))


def _padding(node: ir.Node) -> tuple[int, ...]:
    """First of every axis, then last of every axis; () for an op without any."""
    return tuple(node.attributes["pads"].as_ints()) if "pads" in node.attributes else ()


def _padded(before: ir.Node, x: ir.Value, value: ir.Value, pads: tuple[int, ...], name: str) -> ir.Value:
    half = len(pads) // 2
    first, last = pads[:half], pads[half:]
    sizes = initializer(before.graph, f"{name}_sizes", np.array([0, 0, *first, 0, 0, *last]))
    padded = insert_before(before, "Pad", [x, sizes, value], name)
    if x.shape is not None:
        grown = [
            size + a + b if isinstance(size, int) else None for size, a, b in zip(x.shape[2:], first, last, strict=True)
        ]
        padded.shape = ir.Shape([*x.shape[:2], *grown])
    return padded


def _take_off(node: ir.Node, c: float) -> None:
    """Subtract what the shift adds to the output: in the bias where there is room for one, else behind the op."""
    weight = node.inputs[1].producer()
    integers, scale, axis = constant(weight.inputs[0]), constant(weight.inputs[1]), out_axis(node)
    others = tuple(i for i in range(integers.ndim) if i != axis)
    added = c * scale.astype(np.float64) * integers.sum(axis=others, dtype=np.int64)
    y, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    scaled = {"alpha", "beta"} & node.attributes.keys()
    if node.op_type != "MatMul" and not scaled and (bias is None or constant(bias) is not None):
        left = (0 if bias is None else constant(bias)) - added
        node.resize_inputs(3)
        node.replace_input_with(2, initializer(node.graph, f"{y.name}_bias_shift", left.astype(np.float32)))
        return
    if "alpha" in scaled:
        added *= node.attributes["alpha"].as_float()
    shape = (-1, *[1] * (integers.ndim - 2)) if node.op_type == "Conv" else (-1,)
    term = initializer(node.graph, f"{y.name}_unshift_by", -added.reshape(shape).astype(np.float32))
    unshifted = insert_after(node, "Add", [y, term], f"{y.name}_unshift")
    take_over(y, unshifted, keep=unshifted.producer())

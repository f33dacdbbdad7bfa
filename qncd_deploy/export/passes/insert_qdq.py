"""Insert Q/DQ from a plan: integers, zero point 0, on the inputs of weighted ops and nowhere else.

    x --[Clip]--QuantizeLinear(s_x, 0)--> int8 --DequantizeLinear(s_x, 0)--> Conv/Gemm/MatMul --> y, float
    W int8, an initializer -----------------DequantizeLinear(s_w, 0, axis)----^            bias: float

Where weights alone are quantized, x stays as it is. A weight in blocks is a packed int4 initializer behind
DequantizeLinear(s_w, axis, block_size) without a zero point (opset 21).

Tensors: EDGE_scale, EDGE_q, EDGE_dq; WEIGHT_q, WEIGHT_scale, WEIGHT_zero, WEIGHT_dq; one shared zero, int8_zero.
An 8-bit activation on an asymmetric grid, which is there on request only, has a zero point: EDGE_zero.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qncd_deploy.export.passes.common import (
    Broken,
    Refused,
    constant,
    initializer,
    insert_before,
    oldest_ir_version,
    quantized_pair,
    weighted_ops,
)
from qncd_deploy.quant.grid import Grid, quantize
from qncd_deploy.quant.plan import LayerPlan, QuantPlan

ZERO = "int8_zero"
BLOCKED_OPSET = 21


class InsertQDQ(ir.passes.InPlacePass):
    """Put one Q/DQ pair on every edge the plan names, shared by its planned consumers, and on no other.

    Consumers that stay float keep the float edge. Activations of fewer than 8 bits are clipped to their levels by a
    Clip before QuantizeLinear, since int8 saturates later; the integers are those of a grid of these levels, symmetric
    or not.
    """

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        self.plan = plan

    def requires(self, model: ir.Model) -> None:
        ops = {weight.name: node for node, weight in weighted_ops(model.graph)}
        planned = self.plan.quantized
        if missing := [layer.name for layer in planned if layer.name not in ops]:
            raise Refused(
                f"plan: {len(missing)} of {len(planned)} planned layers are not in the graph: "
                f"{', '.join(map(repr, missing[:3]))}. The plan was made from another network; export it again."
            )
        if moved := [layer for layer in planned if ops[layer.name].inputs[0].name != layer.input]:
            raise Refused(
                f"plan: {len(moved)} of {len(planned)} planned edges are not in the graph: {moved[0].name} reads "
                f"{ops[moved[0].name].inputs[0].name!r}, not {moved[0].input!r}. "
                "The plan was made from another network; export it again."
            )
        for layer in planned:
            node = ops[layer.name]
            if tuple(node.inputs[1].shape) != layer.shape or node.op_type != layer.op:
                raise Refused(
                    f"{layer.name}: {node.op_type} of {tuple(node.inputs[1].shape)}, the plan says {layer.op} of "
                    f"{layer.shape}. The plan was made from another network; export it again."
                )
        if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph):
            raise Refused("the graph holds Q/DQ pairs already. Give the float network.")
        if self.plan.blocked and (norm := next((n for n in model.graph if n.op_type == "GroupNormalization"), None)):
            raise Refused(
                f"{norm.name}: GroupNormalization means something else from opset {BLOCKED_OPSET} on, which INT4 "
                "weights need. Export the network with another opset_version, which spells it out, or as w8a8."
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if self.plan.blocked:
            _raise_opset(model)
        pairs: dict[str, ir.Value] = {}
        for node, weight in list(weighted_ops(graph)):
            if weight.name not in self.plan or not (layer := self.plan[weight.name]).quantized:
                continue
            edge = node.inputs[0]
            if layer.act_bits is not None:
                if edge.name not in pairs:
                    pairs[edge.name] = _activation_pair(node, edge, layer)
                node.replace_input_with(0, pairs[edge.name])
            node.replace_input_with(1, _weight(node, weight, layer.weight_grid))
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(self.plan.quantized))

    def ensures(self, model: ir.Model) -> None:
        edges, weights = quantized_edges(model, self.plan), quantized_weights(model)
        if edges != set(self.plan.edges):
            raise Broken(f"quantized edges differ from the plan: {sorted(edges ^ set(self.plan.edges))[:3]}.")
        if weights != {layer.name for layer in self.plan.quantized}:
            raise Broken("quantized weights differ from the plan.")


def quantized_edges(model: ir.Model, plan: QuantPlan) -> set[str]:
    """Names of the quantized tensors, as the plan calls them where an op of ours only prepares them."""
    names = set()
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            name = node.inputs[0].name
            while name not in plan.edges and (suffix := _PREPARED.search(name)) is not None:
                name = name[: suffix.start()]
            names.add(name)
    return names


_PREPARED = re.compile(r"_(clip|shift|pad\d+|lift|half|inner)$")
"""Behind an edge's name: clipped to its levels, shifted by its zero point, padded, lifted into float16's normal range,
cast to float16, or an output of the graph before the op that gives it its final form.
"""


def quantized_weights(model: ir.Model) -> set[str]:
    """Names of the weights that are stored as integers."""
    return {
        node.inputs[0].name.removesuffix("_q")
        for node in model.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
    }


def _activation_pair(node: ir.Node, edge: ir.Value, layer: LayerPlan) -> ir.Value:
    """The dequantized twin of edge, computed right before the first of its planned consumers."""
    graph, grid = node.graph, layer.act_grid
    scale = initializer(graph, f"{edge.name}_scale", grid.scale)
    if not grid.fits_int8:
        zero = initializer(graph, f"{edge.name}_zero", np.int8(layer.act_zero))
        return quantized_pair(node, edge, scale, zero, edge.name)
    zero = initializer(graph, ZERO, np.int8(0))
    source = edge
    if (grid.qmin, grid.qmax) != (-128, 127):
        low = initializer(graph, f"{edge.name}_min", np.float32(grid.qmin) * grid.scale)
        high = initializer(graph, f"{edge.name}_max", np.float32(grid.qmax) * grid.scale)
        source = insert_before(node, "Clip", [edge, low, high], f"{edge.name}_clip")
    return quantized_pair(node, source, scale, zero, edge.name)


def _weight(node: ir.Node, weight: ir.Value, grid: Grid) -> ir.Value:
    """The dequantized twin of weight, which is dropped once nothing reads it."""
    graph = node.graph
    integers = quantize(constant(weight), grid)
    scale = initializer(graph, f"{weight.name}_scale", grid.scale)
    where = {} if grid.axis is None else {"axis": grid.axis}
    if grid.block is None:
        q = initializer(graph, f"{weight.name}_q", integers)
        inputs = [q, scale, initializer(graph, f"{weight.name}_zero", np.zeros(grid.scale.shape, np.int8))]
    else:
        inputs = [initializer(graph, f"{weight.name}_q", integers.astype(ir.DataType.INT4.numpy())), scale]
        where["block_size"] = grid.block
    w = insert_before(node, "DequantizeLinear", inputs, f"{weight.name}_dq", **where)
    w.type = weight.type
    return w


def _raise_opset(model: ir.Model) -> None:
    """To the first opset that has 4-bit tensors and blocks; what the graph holds means the same in both (requires)."""
    model.graph.opset_imports[""] = max(BLOCKED_OPSET, model.graph.opset_imports[""])
    model.ir_version = oldest_ir_version(model.graph.opset_imports[""])

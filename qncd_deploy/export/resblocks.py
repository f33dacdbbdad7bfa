"""Find residual blocks by their graph: what enters the second convolution, and where the time embedding joins.

additive:      conv2 <- SiLU <- GroupNorm <- Add(h, emb)
scale-shift:   conv2 <- SiLU <- Add(Mul(GroupNorm(h), Add(scale, 1)), shift)
"""

from __future__ import annotations

import onnx_ir as ir

from qncd_deploy.export.graph import Flow, Inputs, find_inputs
from qncd_deploy.export.passes.common import scalar, weighted_ops
from qncd_deploy.export.patterns import group_norm, operands, silu_input
from qncd_deploy.quant.qncd import ResBlock


def find_resblocks(model: ir.Model, inputs: Inputs | None = None) -> tuple[ResBlock, ...]:
    """Every residual block whose second convolution QNCD can smooth, in graph order; names play no part."""
    flow = Flow(model, inputs or find_inputs(model))
    blocks = []
    for node, weight in weighted_ops(model.graph):
        if node.op_type == "Conv" and (preactivation := silu_input(node.inputs[0])) is not None:
            block = _additive(flow, preactivation, weight.name, node.inputs[0].name) or _scale_shift(
                flow, preactivation, weight.name, node.inputs[0].name
            )
            if block is not None:
                blocks.append(block)
    return tuple(blocks)


def _additive(flow: Flow, a: ir.Value, conv2: str, edge: str) -> ResBlock | None:
    norm = group_norm(a)
    if norm is None:
        return None
    x, gamma, beta, groups, epsilon = norm
    for _, emb in operands(x, "Add"):
        if flow.is_time(emb):
            vector = _before_views(emb)
            return ResBlock(conv2, edge, gamma, beta, groups, "additive", (vector.name,), epsilon)
    return None


def _scale_shift(flow: Flow, a: ir.Value, conv2: str, edge: str) -> ResBlock | None:
    for scaled, shift in operands(a, "Add"):
        if not flow.is_time(shift):
            continue
        for normed, gain in operands(scaled, "Mul"):
            norm, scale = group_norm(normed), _minus_one(gain)
            if norm is None or scale is None or not flow.is_time(scale):
                continue
            _, gamma, beta, groups, epsilon = norm
            emb, scale_first = _halves(scale, shift)
            return ResBlock(conv2, edge, gamma, beta, groups, "scale-shift", emb, epsilon, scale_first)
    return None


def _halves(scale: ir.Value, shift: ir.Value) -> tuple[tuple[str, ...], bool]:
    """The one (N, 2C) tensor that both are halves of, and whether the scale is its first half; else both edges."""
    scale, shift = _before_views(scale), _before_views(shift)
    whole, first = _half_of(scale)
    other, second = _half_of(shift)
    if whole is not None and whole is other and first is not second:
        return (_before_views(whole).name,), bool(first)
    return (scale.name, shift.name), True


def _half_of(value: ir.Value) -> tuple[ir.Value | None, bool | None]:
    """(the tensor it is half of along axis 1, whether it is the first half), or (None, None)."""
    node = value.producer()
    if node is None or node.inputs[0].shape is None or len(node.inputs[0].shape) < 2:
        return None, None
    if node.op_type == "Split" and len(node.outputs) == 2:
        return node.inputs[0], value is node.outputs[0]
    if node.op_type == "Slice" and (start := scalar(node.inputs[1])) is not None:
        return node.inputs[0], start == 0
    return None, None


def _minus_one(gain: ir.Value) -> ir.Value | None:
    """scale of gain = 1 + scale."""
    return next((scale for scale, one in operands(gain, "Add") if scalar(one) == 1), None)


def _before_views(value: ir.Value) -> ir.Value:
    """The vector that was given trailing axes of length one."""
    while (node := value.producer()) is not None and node.op_type in ("Unsqueeze", "Reshape", "Expand"):
        source = node.inputs[0]
        if source.shape is None or value.shape is None or _width(source) != _width(value):
            break
        value = source
    return value


def _width(value: ir.Value) -> list[int | ir.SymbolicDim]:
    return [dim for dim in value.shape[1:] if dim != 1]

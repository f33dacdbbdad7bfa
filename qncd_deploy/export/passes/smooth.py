"""Fold smoothing: op(u) becomes op'(u * (1 / S)) with the weight multiplied by S, equal in float arithmetic.

In a residual block the division cannot go through SiLU into the normalisation (SiLU(a / S) != SiLU(a) / S), so it stays
in the graph as one pointwise op right behind SiLU, which runtimes fuse with it: "QNCD" (Chu et al., arXiv:2403.19140).
Behind a normalisation it costs nothing, gamma / S and beta / S: SmoothQuant (Xiao et al., arXiv:2211.10438).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from qncd_deploy.export.passes.common import (
    Refused,
    constant,
    free_name,
    initializer,
    insert_before,
    out_axis,
    weighted_ops,
)
from qncd_deploy.export.patterns import operands
from qncd_deploy.quant.fold import along, fold_smoothing

SUFFIX = "_smooth"
"""The new input edge is called like the old one with this behind it."""

_INVERSE = "_smooth_inverse"  # behind the name of the first weight that reads the new edge: the constant 1 / S


class FoldSmoothing(ir.passes.InPlacePass):
    """Divide the input of the named layers by a per-channel factor and multiply it into their weights.

    factors: weight name -> S, (C_in,) float32 without zeros. Layers that read one edge with the same factors share the
    division; other consumers of the edge keep it as it is.
    """

    def __init__(self, factors: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.factors = factors

    def requires(self, model: ir.Model) -> None:
        ops = {weight.name: (node, weight) for node, weight in weighted_ops(model.graph)}
        for name, s in self.factors.items():
            if name not in ops:
                raise Refused(f"smoothing: {name} is not the weight of a Conv, Gemm or MatMul in this graph.")
            node, weight = ops[name]
            if "transA" in node.attributes and node.attributes["transA"].as_int():
                raise Refused(f"smoothing: {name} reads a transposed input, expected channels on its last axis.")
            expected = (weight.shape[1 - out_axis(node)],)
            if s.shape != expected or not np.isfinite(s).all() or not s.all():
                raise Refused(
                    f"smoothing: {name} has factors of shape {s.shape}, expected {expected}, finite, not zero."
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        divided: dict[tuple[ir.Value, bytes], ir.Value] = {}
        for node, weight in weighted_ops(graph):
            if (s := self.factors.get(weight.name)) is None:
                continue
            edge = node.inputs[0]
            key = (edge, s.tobytes())
            if key not in divided:
                reciprocal = (1 / s).astype(np.float32)
                if node.op_type == "Conv":
                    reciprocal = along(reciprocal, 1, len(weight.shape))
                inverse = initializer(graph, weight.name + _INVERSE, reciprocal)
                smooth = free_name(graph, edge.name + SUFFIX)  # layers may read one edge with different factors
                divided[key] = insert_before(node, "Mul", [edge, inverse], smooth)
            node.replace_input_with(0, divided[key])
            folded = fold_smoothing(constant(weight), s, axis=1 - out_axis(node))
            weight.const_value = ir.tensor(folded, name=weight.name)
        return ir.passes.PassResult(model, bool(self.factors))

    def ensures(self, model: ir.Model) -> None:
        smoothed = {
            weight.name
            for node, weight in weighted_ops(model.graph)
            if (producer := node.inputs[0].producer()) is not None and _is_division(producer)
        }
        assert smoothed == set(self.factors)


class AbsorbSmoothing(ir.passes.InPlacePass):
    """Let the normalisation in front of a division that FoldSmoothing inserted do it, where nothing else reads what it
    returns; the divided edge keeps its name, and its values up to rounding.

    Absorbed are LayerNormalization over the last axis and the affine end of GroupNorm, Add(Mul(x, gamma), beta).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        absorbed = [_absorb(node) for node in list(model.graph) if _is_division(node)]
        return ir.passes.PassResult(model, any(absorbed))


def absorbs(edge: ir.Value, readers: Collection[ir.Node]) -> bool:
    """Whether a normalisation ends in edge that can divide it for these readers, since nothing else reads it."""
    alone = {user for user, _ in edge.uses()} <= set(readers) and not edge.is_graph_output()
    return alone and _affine(edge) is not None


def _is_division(node: ir.Node) -> bool:
    return node.op_type == "Mul" and node.inputs[1].is_initializer() and node.inputs[1].name.endswith(_INVERSE)


def _absorb(division: ir.Node) -> bool:
    edge, inverse = division.inputs
    if not absorbs(edge, [division]):
        return False
    norm, smooth = edge.producer(), division.outputs[0]
    for number, (node, index) in enumerate(_affine(edge) or ()):
        scaled = (constant(node.inputs[index]) * constant(inverse)).astype(np.float32)
        name = f"{smooth.name}_{('gamma', 'beta')[number]}"
        node.replace_input_with(index, initializer(division.graph, name, scaled))
    smooth.replace_all_uses_with(edge)
    division.graph.remove(division, safe=True)
    edge.name, norm.name = smooth.name, f"{smooth.name}/{norm.op_type}"
    return True


def _affine(edge: ir.Value) -> list[tuple[ir.Node, int]] | None:
    """Where the constants lie that make edge what it is, as nodes and input indices: multiplying all of them by a
    factor per channel multiplies edge by it. None where it is not the end of a normalisation.
    """
    node = edge.producer()
    if node is None or edge.shape is None:
        return None
    if node.op_type == "LayerNormalization":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        places = [(node, index) for index in range(1, len(node.inputs)) if node.inputs[index] is not None]
        return places if axis in (-1, len(edge.shape) - 1) and _constant(places) else None
    for scaled, beta in operands(edge, "Add"):
        product = scaled.producer()
        for _, gamma in operands(scaled, "Mul"):
            places = [(product, product.inputs.index(gamma)), (node, node.inputs.index(beta))]
            if _constant(places) and len(scaled.uses()) == 1 and not scaled.is_graph_output():
                return places
    return None


def _constant(places: list[tuple[ir.Node, int]]) -> bool:
    return all(constant(node.inputs[index]) is not None for node, index in places)

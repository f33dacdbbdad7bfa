"""Fold QNCD's smoothing: conv2(u) becomes conv2'(u * (1 / S)) with W' = W diag(S), equal in float arithmetic.

The division cannot go through SiLU into the normalisation (SiLU(a / S) != SiLU(a) / S), so it stays in the graph as one
pointwise op right after SiLU, which runtimes fuse with it. "QNCD" (Chu et al., arXiv:2403.20137).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qncd_deploy.export.passes.common import (
    Refused,
    constant,
    free_name,
    initializer,
    insert_before,
    weighted_ops,
)
from qncd_deploy.quant.fold import fold_smoothing

SUFFIX = "_smooth"
"""The convolution's new input edge is called like the old one with this behind it."""


class FoldSmoothing(ir.passes.InPlacePass):
    """Divide the input of the named convolutions by a per-channel factor and multiply it into their weights.

    factors: weight name -> S, (C_in,) float32 without zeros. Other consumers of the same edge keep it as it is.
    """

    def __init__(self, factors: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.factors = factors

    def requires(self, model: ir.Model) -> None:
        convolutions = (weight for node, weight in weighted_ops(model.graph) if node.op_type == "Conv")
        shapes = {weight.name: tuple(weight.shape) for weight in convolutions}
        for name, s in self.factors.items():
            if name not in shapes:
                raise Refused(f"smoothing: {name} is not the weight of a convolution in this graph.")
            if s.shape != shapes[name][1:2] or not np.isfinite(s).all() or not s.all():
                raise Refused(
                    f"smoothing: {name} has factors of shape {s.shape}, expected {shapes[name][1:2]}, finite, not zero."
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for node, weight in weighted_ops(graph):
            if (s := self.factors.get(weight.name)) is None:
                continue
            edge = node.inputs[0]
            reciprocal = (1 / s).astype(np.float32).reshape(1, -1, 1, 1)
            inverse = initializer(graph, f"{weight.name}_smooth_inverse", reciprocal)
            smooth = free_name(graph, edge.name + SUFFIX)  # two convolutions may read one edge with different factors
            node.replace_input_with(0, insert_before(node, "Mul", [edge, inverse], smooth))
            weight.const_value = ir.tensor(fold_smoothing(constant(weight), s), name=weight.name)
        return ir.passes.PassResult(model, bool(self.factors))

    def ensures(self, model: ir.Model) -> None:
        smoothed = {
            weight.name
            for node, weight in weighted_ops(model.graph)
            if (producer := node.inputs[0].producer()) is not None
            and any(value is not None and value.name == f"{weight.name}_smooth_inverse" for value in producer.inputs)
        }
        assert smoothed == set(self.factors)

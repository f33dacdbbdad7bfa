"""Split convolutions of skip concatenations in two, equal in float arithmetic; each half can have grids of its own.

    conv(cat(h, s), W) + b  ->  Add(conv(h, W.h) + b, conv(s, W.s))
The Concat stays for whoever else reads it. A convolution that reads it through a normalisation gets the halves of the
normalised tensor, by an ONNX Split at the same channel. "Q-Diffusion" (Li et al., arXiv:2302.04304).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qncd_deploy.export.passes.common import Broken, Refused, constant, free_name, initializer, weighted_ops
from qncd_deploy.export.patterns import producer
from qncd_deploy.export.skips import SkipConv, find_skip_convs
from qncd_deploy.quant.plan import HALVES


class SplitShortcuts(ir.passes.InPlacePass):
    """Replace each named convolution by two, of weights NAME.h and NAME.s, and an Add; the bias goes with NAME.h."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def requires(self, model: ir.Model) -> None:
        if unknown := sorted(self.names - {skip.name for skip in find_skip_convs(model)}):
            raise Refused(f"split: {unknown[0]} is not a convolution of a skip concatenation in this graph.")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = {weight.name: node for node, weight in weighted_ops(graph)}
        halves: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for skip in find_skip_convs(model):
            if skip.name in self.names:
                node = nodes[skip.name]
                edge = node.inputs[0]
                if edge not in halves:
                    halves[edge] = _halves(node, skip)
                _replace(node, skip, halves[edge])
        return ir.passes.PassResult(model, bool(self.names))

    def ensures(self, model: ir.Model) -> None:
        weights = {weight.name for _, weight in weighted_ops(model.graph)}
        if weights & self.names or not {name + half for name in self.names for half in HALVES} <= weights:
            raise Broken("a convolution is not split as it was asked for.")


def _halves(node: ir.Node, skip: SkipConv) -> tuple[ir.Value, ir.Value]:
    """h and s themselves, or the parts of a tensor that was made of their concatenation."""
    edge, graph = node.inputs[0], node.graph
    if skip.kind == "shortcut":
        h, s = producer(edge, "Concat").inputs
        return h, s
    sizes = skip.channels, edge.shape[1] - skip.channels
    parts = [
        ir.Value(
            name=free_name(graph, f"{edge.name}_{half.removeprefix('.')}"),
            shape=ir.Shape([edge.shape[0], size, *edge.shape[2:]]),
            type=edge.type,
        )
        for half, size in zip(HALVES, sizes, strict=True)
    ]
    lengths = initializer(graph, f"lengths.{sizes[0]}.{sizes[1]}", np.array(sizes, np.int64))
    split = ir.node("Split", [edge, lengths], {"axis": 1}, outputs=parts, name=f"{parts[0].name}/Split")
    graph.insert_before(node, split)
    return parts[0], parts[1]


def _replace(node: ir.Node, skip: SkipConv, halves: tuple[ir.Value, ir.Value]) -> None:
    graph, weight, y = node.graph, node.inputs[1], node.outputs[0]
    array = constant(weight)
    arrays = array[:, : skip.channels], array[:, skip.channels :]
    convolutions = []
    for suffix, x, part, rest in zip(HALVES, halves, arrays, (node.inputs[2:], ()), strict=True):
        name = free_name(graph, f"{y.name}_{suffix.removeprefix('.')}")
        out = ir.Value(name=name, shape=y.shape, type=y.type)
        inputs = [x, initializer(graph, weight.name + suffix, part), *rest]
        convolutions.append(ir.Node("", "Conv", inputs, node.attributes.values(), outputs=[out], name=f"{name}/Conv"))
    total = ir.node("Add", [each.outputs[0] for each in convolutions], name=f"{y.name}/Add")
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*convolutions, total], [y], total.outputs)
    del graph.initializers[weight.name]

"""One network for pictures of any size: it is quantized at one of them and written with its sizes free again.

    traced with free sizes -> at_size -> a graph of fixed shapes for all passes and engines -> SizeRules.free -> written

What follows the size in a graph in normal form are integers, computed from Shapes: the targets of Reshapes and the
like. At a fixed size they are constants; the rules remember how each was computed and compute it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qncd_deploy.errors import ExportError
from qncd_deploy.export.passes.common import constant, initializer
from qncd_deploy.export.passes.normalise import normalise

_PREFIX = "size."
"""Of all names that the rules bring into a graph."""


@dataclass(frozen=True)
class _Rule:
    """A node of integers: its inputs by name, None where one is left out."""

    op: str
    attributes: Mapping[str, ir.Attr]
    inputs: tuple[str | None, ...]
    output: str


@dataclass(frozen=True, eq=False)
class SizeRules:
    """How the integers that follow a network's sizes are computed.

    inputs: free shapes of the graph's inputs;  nodes: what computes, in order;  constants: what it computes with;
    targets: (name of a node's first output, place of one of its inputs) -> the integers that belong there.
    """

    inputs: Mapping[str, ir.Shape]
    nodes: tuple[_Rule, ...]
    constants: Mapping[str, np.ndarray]
    targets: Mapping[tuple[str, int], str]

    def free(self, model: ir.Model) -> ir.Model:
        """Free the sizes of a graph that passes have made of at_size's, in place, and return it.

        Nodes that a pass has removed need no rule. Raises: ExportError if a tensor is gone whose size a rule asks for.
        """
        graph = model.graph
        users = {node.outputs[0].name: node for node in graph}
        values = (*graph.inputs, *(output for node in graph for output in node.outputs))
        known = {value.name: _quantized_twin(value) for value in values}
        known |= {name: initializer(graph, f"{_PREFIX}{name}", array) for name, array in self.constants.items()}
        for rule in self.nodes:
            if gone := [name for name in rule.inputs if name is not None and name not in known]:
                raise ExportError(f"{graph.name}: {gone[0]} is gone, whose size {rule.output} is computed from.")
            result = ir.Value(name=f"{_PREFIX}{rule.output}")
            read = [None if name is None else known[name] for name in rule.inputs]
            graph.append(ir.node(rule.op, read, rule.attributes, outputs=[result], name=f"{result.name}/{rule.op}"))
            known[rule.output] = result
        for (name, place), target in self.targets.items():
            if name in users:
                users[name].replace_input_with(place, known[target])
        for value in graph.inputs:
            value.shape = self.inputs[value.name]
        for node in graph:
            for output in node.outputs:
                output.shape = None if not output.is_graph_output() else _of_any_size(output.shape)
        for step in (
            common_passes.TopologicalSortPass(),
            common_passes.CommonSubexpressionEliminationPass(),
            common_passes.RemoveUnusedNodesPass(),
            common_passes.ShapeInferencePass(),
        ):
            step(model)
        return model


def at_size(model: ir.Model, sizes: Mapping[str, int]) -> tuple[ir.Model, SizeRules]:
    """A graph in normal form with some of its inputs' free sizes fixed, in place and in normal form again, and the
    rules that free them. sizes: by name, as the inputs' shapes have them.
    """
    graph = model.graph
    rules = _rules(graph)
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            fixed = (size if isinstance(size, int) else sizes.get(size.value, size.value) for size in value.shape)
            value.shape = ir.Shape(fixed)
    return normalise(model), rules


def _rules(graph: ir.Graph) -> SizeRules:
    """Shapes, and all that is computed of nothing but them and constants; where the others read it."""
    nodes, computed, constants, targets = [], set(), {}, {}
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        fed = [value for value in given if not value.is_initializer()]
        if node.op_type == "Shape" or (fed and all(value.name in computed for value in fed)):
            computed |= {output.name for output in node.outputs}
            (output,) = node.outputs
            names = tuple(None if value is None else value.name for value in node.inputs)
            nodes.append(_Rule(node.op_type, dict(node.attributes), names, output.name))
            constants |= {value.name: constant(value) for value in given if value.is_initializer()}
            continue
        places = enumerate(node.inputs)
        targets |= {(node.outputs[0].name, at): v.name for at, v in places if v is not None and v.name in computed}
    return SizeRules({value.name: value.shape for value in graph.inputs}, tuple(nodes), constants, targets)


def _quantized_twin(value: ir.Value) -> ir.Value:
    """What all read that reads a tensor whose maker is to be fused with its rounding: one reader more before the
    rounding, of its size alone, and engines compute both in float. The tensor itself where there is no such thing.
    """
    users = value.consumers()
    if not users or any(user.op_type != "QuantizeLinear" for user in users):
        return value
    back = [user for user in users[0].outputs[0].consumers() if user.op_type == "DequantizeLinear"]
    return back[0].outputs[0] if back else value


def _of_any_size(shape: ir.Shape) -> ir.Shape:
    """The shape with no sizes but that of the batch and the number of axes."""
    return ir.Shape([shape[0], *[None] * (len(shape) - 1)])

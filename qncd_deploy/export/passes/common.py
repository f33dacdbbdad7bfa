"""What every pass needs: refusals in the exporter's error tree, new initializers, a weight's data input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qncd_deploy.errors import ExportError


class Refused(ExportError, ir.passes.PreconditionError):
    """The graph is not one that the pass can work on: the user's model or plan, not our bug."""


class Broken(ExportError, ir.passes.PostconditionError):
    """A rule that the pass guarantees does not hold afterwards."""


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer of that name; made from array if there is none yet. Equal names must mean equal arrays."""
    if (known := graph.initializers.get(name)) is not None:
        return known
    tensor = ir.tensor(np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, None for everything that is computed or fed."""
    return value.const_value.numpy() if value is not None and value.is_initializer() else None


def scalar(value: ir.Value | None) -> float | None:
    """The number in an initializer of one element, None for anything else."""
    if value is None or not value.is_initializer() or value.const_value.size != 1:
        return None
    return value.const_value.numpy().item()


def weighted_ops(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every Conv, Gemm and MatMul whose second input is an initializer of floats, with that weight, in graph order."""
    for node in graph:
        if node.domain == "" and node.op_type in ("Conv", "Gemm", "MatMul"):
            weight = node.inputs[1]
            if weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.FLOAT:
                yield node, weight


def insert_before(node: ir.Node, op: str, inputs: list[ir.Value], name: str, **attributes: object) -> ir.Value:
    """Put one op right before node; its only output is called name and has the shape and type of inputs[0]."""
    value = ir.Value(name=name, shape=inputs[0].shape, type=inputs[0].type)
    node.graph.insert_before(node, ir.node(op, inputs, attributes, outputs=[value], name=f"{name}/{op}"))
    return value


def insert_after(node: ir.Node, op: str, inputs: list[ir.Value], name: str, **attributes: object) -> ir.Value:
    """Put one op right after node; its only output is called name and has the shape and type of inputs[0]."""
    value = ir.Value(name=name, shape=inputs[0].shape, type=inputs[0].type)
    node.graph.insert_after(node, ir.node(op, inputs, attributes, outputs=[value], name=f"{name}/{op}"))
    return value

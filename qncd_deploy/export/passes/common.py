"""What every pass needs: refusals in the exporter's error tree, new initializers, a weight's data input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from qncd_deploy.errors import ExportError


class Refused(ExportError, ir.passes.PreconditionError):
    """The graph is not one that the pass can work on: the user's model or plan, not our bug."""


class Broken(ExportError, ir.passes.PostconditionError):
    """A rule that the pass guarantees does not hold afterwards."""


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer of that name, made from array if there is none yet.

    Raises: Refused if the graph has one of that name that holds something else.
    """
    if (known := graph.initializers.get(name)) is not None:
        held = known.const_value.numpy()
        if held.dtype != np.asarray(array).dtype or not np.array_equal(held, array):
            raise Refused(f"initializer {name!r}: the name is taken in this graph. Rename it.")
        return known
    tensor = ir.tensor(np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def free_name(graph: ir.Graph, wanted: str) -> str:
    """A tensor name that is not taken: the wanted one, or the same with a number behind it."""
    taken = {output.name for node in graph for output in node.outputs}
    name, count = wanted, 1
    while name in taken or name in graph.initializers:
        count += 1
        name = f"{wanted}{count}"
    return name


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


def out_axis(node: ir.Node) -> int:
    """The axis of output channels in the weight of a Conv, Gemm or MatMul."""
    if node.op_type == "Conv":
        return 0
    transposed = node.attributes.get("transB")
    return 0 if transposed is not None and transposed.as_int() else 1


def quantized_ops(graph: ir.Graph) -> list[ir.Node]:
    """Every Conv, Gemm and MatMul whose weight is stored as integers, in graph order."""
    products = [node for node in graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [node for node in products if stored_weight(node.inputs[1]) is not None]


def stored_weight(value: ir.Value) -> ir.Value | None:
    """The integer initializer that a weight is computed from: by DequantizeLinear, or by Cast and Mul. None for any
    other tensor.
    """
    node = value.producer()
    if node is not None and node.op_type == "Mul" and node.inputs[0].producer() is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in ("DequantizeLinear", "Cast"):
        return None
    source = node.inputs[0]
    return source if source.is_initializer() and source.dtype.is_integer() else None


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


def quantized_pair(before: ir.Node, x: ir.Value, scale: ir.Value, zero: ir.Value, name: str) -> ir.Value:
    """Put QuantizeLinear and DequantizeLinear of x, to the type of zero, right before a node; returns x's twin."""
    q = insert_before(before, "QuantizeLinear", [x, scale, zero], f"{name}_q")
    q.type = ir.TensorType(zero.dtype)
    back = insert_before(before, "DequantizeLinear", [q, scale, zero], f"{name}_dq")
    back.type = x.type
    return back


def take_over(old: ir.Value, new: ir.Value, *, keep: ir.Node) -> None:
    """Let new be read wherever old was, but for the node keep; if old is an output of the graph, new gets its name."""
    for user, index in list(old.uses()):
        if user is not keep:
            user.replace_input_with(index, new)
    graph = new.graph
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
            old.name, new.name = f"{old.name}_inner", old.name


def oldest_ir_version(opset: int) -> int:
    """The oldest file format that holds this opset: old runtimes refuse newer ones whatever is inside."""
    return onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])

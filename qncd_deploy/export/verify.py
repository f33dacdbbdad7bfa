"""What a legal graph is, as a list of named rules, checked after the passes and before anything is written.

A rule takes the graph and its plan and yields one sentence per breach, beginning with the tensor or node it is about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qncd_deploy.errors import ExportError
from qncd_deploy.export.passes.common import constant, quantized_ops, stored_weight
from qncd_deploy.export.passes.half import LARGEST, SMALLEST_NORMAL
from qncd_deploy.export.passes.insert_qdq import BLOCKED_OPSET, quantized_edges
from qncd_deploy.export.passes.normalise import NEWEST_OPSET, OPSET
from qncd_deploy.quant.plan import LayerPlan, QuantPlan

Rule: TypeAlias = Callable[[ir.Model, QuantPlan], Iterator[str]]


def verify(model: ir.Model, rules: tuple[Rule, ...], *, plan: QuantPlan | None = None, name: str = "graph") -> None:
    """Raises: ExportError that names the first breach, its rule and how many more there are."""
    found = [(rule.__name__, text) for rule in rules for text in rule(model, plan or _NOTHING)]
    if found:
        rule, text = found[0]
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        raise ExportError(f"{name}: {text} Rule: {rule.replace('_', ' ')}{more}.")


_NOTHING = QuantPlan("float", ())


def checker_accepts(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """The ONNX checker with full shape and type inference."""
    try:
        common_passes.CheckerPass(full_check=True)(model)
    except Exception as error:  # the checker's own exception type is not public
        cause = error.__cause__ or error
        yield f"{str(cause).strip().splitlines()[0]}."


def opset_is_readable_everywhere(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """INT4 weights need a newer one than TensorRT 10.3 is known to read, and no more than that."""
    oldest, newest = (BLOCKED_OPSET, BLOCKED_OPSET) if plan.blocked else (OPSET, NEWEST_OPSET)
    for domain, version in model.opset_imports.items():
        if domain != "" or not oldest <= version <= newest:
            yield f"opset {domain or 'ai.onnx'} {version}: expected ai.onnx {oldest} to {newest}."


def names_are_unique(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    graph = model.graph
    tensors = [value.name for value in graph.inputs] + [out.name for node in graph for out in node.outputs if out.name]
    tensors += [name for name in graph.initializers if name not in {value.name for value in graph.inputs}]
    for kind, names in (("tensor", tensors), ("node", [node.name for node in graph])):
        for name, count in Counter(names).items():
            if count > 1:
                yield f"{name}: {count} {kind}s have this name."


def weights_are_finite(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """A lone infinity is a bound or a mask and may stay."""
    for value in model.graph.initializers.values():
        values = constant(value)
        if value.dtype.is_floating_point() and (np.isnan(values).any() or (values.size > 1 and np.isinf(values).any())):
            yield f"{value.name}: NaN or infinity."


def tells_nothing_of_the_machine(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    things = [model, model.graph, *model.graph, *(output for node in model.graph for output in node.outputs)]
    for thing in things:
        if thing.metadata_props or getattr(thing, "doc_string", None):
            yield f"{getattr(thing, 'name', 'model')}: holds metadata or a doc string."


def quantized_as_planned(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """The layers and the edges, as sets; other siblings may quantize outputs as well."""
    weights = {_weight_name(node) for node in quantized_ops(model.graph)}
    planned = {layer.name for layer in plan.quantized}
    edges = quantized_edges(model, plan)
    outputs = {layer.output for layer in plan.quantized}
    for name in sorted(planned ^ weights):
        yield f"{name}: {'planned but float' if name in planned else 'quantized but not planned'}."
    for name in sorted(plan.edges.keys() - edges):
        yield f"edge {name}: planned but float."
    for name in sorted(edges - plan.edges.keys() - outputs):
        yield f"edge {name}: quantized but not planned."


def integers_are_levels(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """Fewer than 8 bits are a promise about values, which int8 does not keep by itself."""
    for node in quantized_ops(model.graph):
        if (name := _weight_name(node)) in plan and (layer := plan[name]).quantized:
            integers = constant(stored_weight(node.inputs[1])).astype(np.int8)
            low, high = layer.weight_grid.limits_like(integers.ndim)
            if count := int(((integers < low) | (integers > high)).sum()):
                yield f"{name}: {count} of {integers.size} integers are not levels of its {layer.weight_bits} bits."


def _weight_name(node: ir.Node) -> str:
    return stored_weight(node.inputs[1]).name.removesuffix("_q")


def only_inputs_are_quantized(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    for name in sorted(quantized_edges(model, plan) - plan.edges.keys()):
        yield f"edge {name}: an output is quantized, TensorRT would round it once more."


def tensorrt_can_import(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """What TensorRT's parser refuses, or takes and silently runs in float."""
    for node in model.graph:
        if node.domain != "" or node.op_type in _REFUSED_BY_TENSORRT:
            yield f"{node.name}: {node.op_type} cannot be imported."
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is None and node.inputs[0].dtype == ir.DataType.INT4:
            pass  # it says what type is meant, and 0 is the default
        elif zero is None or not zero.is_initializer():
            yield f"{node.name}: zero point missing or not constant."
        elif zero.dtype != ir.DataType.INT8:
            yield f"{node.name}: zero point is {zero.dtype.name}."
        if constant(node.inputs[1]) is None:
            yield f"{node.name}: scale is not constant."
        elif constant(node.inputs[1]).size > 1 and not node.inputs[0].is_initializer():
            yield f"{node.name}: per-channel scale of an activation, the layer would run in float."
    for node in quantized_ops(model.graph):
        weight = node.inputs[1].producer()
        axis = weight.attributes["axis"].as_int() if "axis" in weight.attributes else None
        if weight.inputs[0].dtype == ir.DataType.INT4 and "block_size" not in weight.attributes:
            yield f"{weight.name}: 4 bits without blocks, which no kernel multiplies packed."
        elif "block_size" in weight.attributes:
            yield from _block_faults(node, weight, axis, plan[_weight_name(node)])
        elif axis is not None and axis != plan[_weight_name(node)].out_axis:
            yield f"{weight.name}: scale along axis {axis}, not the output channels; the layer would run in float."


def _block_faults(node: ir.Node, weight: ir.Node, axis: int | None, layer: LayerPlan) -> Iterator[str]:
    """TensorRT takes blocks of a matrix along the axis that is summed over, with an input in float."""
    block = weight.attributes["block_size"].as_int()
    source = node.inputs[0].producer()
    if len(layer.shape) != 2:
        yield f"{weight.name}: blocks of a {len(layer.shape)}-D weight, TensorRT takes them in two dimensions only."
    elif axis != 1 - layer.out_axis:
        yield f"{weight.name}: blocks along axis {axis}, not the inputs; the layer would run in float."
    if block not in _TENSORRT_BLOCKS:
        yield f"{weight.name}: blocks of {block}, expected {', '.join(map(str, _TENSORRT_BLOCKS))}."
    if source is not None and source.op_type == "DequantizeLinear":
        yield f"{node.name}: INT4 weights and a quantized input; TensorRT would dequantize and quantize again."


_TENSORRT_BLOCKS = (16, 32, 64, 128)
_REFUSED_BY_TENSORRT = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "MatMulNBits", "CastLike"}
)


def zero_points_are_zero(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """TensorRT has no other."""
    for node, zero in _zero_points(model):
        if zero.any():
            yield f"{node.name}: zero point is not 0."


def zero_points_as_planned(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """0, but for 8-bit activations on an asymmetric grid."""
    shifted = {edge: layers[0].act_zero for edge, layers in plan.edges.items() if not layers[0].act_grid.fits_int8}
    planned: dict[ir.Value, int] = {}
    for node, zero in _zero_points(model):
        quantizes = node.op_type == "QuantizeLinear"
        expected = shifted.get(node.inputs[0].name, 0) if quantizes else planned.get(node.inputs[0], 0)
        planned[node.outputs[0]] = expected
        if (zero != expected).any():
            yield f"{node.name}: zero point {zero.ravel()[0]}, planned {expected}."


def _zero_points(model: ir.Model) -> Iterator[tuple[ir.Node, np.ndarray]]:
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            if zero is not None:
                yield node, zero


def remainder_is_half(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
            for value in node.inputs:
                if value is not None and value.dtype != ir.DataType.FLOAT16:
                    yield f"{node.name}: input {value.name} is {value.dtype.name}, expected FLOAT16."
        if node.op_type == "QuantizeLinear" and node.inputs[0].dtype != node.inputs[1].dtype:
            yield f"{node.name}: tensor and scale differ in type."
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = constant(node.inputs[1]).astype(np.float64)
            if (scale < SMALLEST_NORMAL).any() or (scale > LARGEST).any():
                yield f"{node.name}: a scale leaves float16's normal range."


def borders_are_float32(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """The host loop feeds and reads float32, whatever the precision inside."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype.is_floating_point() and value.dtype != ir.DataType.FLOAT:
            yield f"{value.name}: {value.dtype.name} at the border, expected FLOAT."


def activations_are_unsigned(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[2].dtype != ir.DataType.UINT8:
            yield f"{node.name}: zero point is {node.inputs[2].dtype.name}, expected UINT8."


def convolutions_can_fuse(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    for node in quantized_ops(model.graph):
        users = [user.op_type for user in node.outputs[0].consumers()]
        rounded = plan[_weight_name(node)].act_bits is not None
        if node.op_type == "Conv" and rounded and users != ["QuantizeLinear"]:
            yield f"{node.name}: read by {', '.join(users)}, not by one Q; ONNX Runtime would run it in float."


_ALWAYS: tuple[Rule, ...] = (
    checker_accepts,
    opset_is_readable_everywhere,
    names_are_unique,
    weights_are_finite,
    tells_nothing_of_the_machine,
    borders_are_float32,
)
FLOAT = _ALWAYS
_INPUTS_ONLY = (*_ALWAYS, quantized_as_planned, integers_are_levels, only_inputs_are_quantized, tensorrt_can_import)
MASTER = (*_INPUTS_ONLY, zero_points_as_planned)
TENSORRT = (*_INPUTS_ONLY, zero_points_are_zero, remainder_is_half)
ONNXRUNTIME = (*_ALWAYS, quantized_as_planned, integers_are_levels, activations_are_unsigned, convolutions_can_fuse)

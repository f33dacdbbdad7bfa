"""The float remainder of a quantized graph in genuine float16, for TensorRT: same integers, float32 at the borders.

Float32 stays: graph inputs and outputs (with casts), what is computed from the timestep before the first weighted op
(float16 cannot tell apart the angles of neighbouring timesteps), and inputs that ONNX declares float32 (Resize scales).
Opset 19 is the first whose Q/DQ take float16 scales; scale and tensor are then of one type.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qncd_deploy.export.graph import WEIGHTED, feeds_wave
from qncd_deploy.export.passes.common import (
    Refused,
    constant,
    initializer,
    insert_after,
    insert_before,
    oldest_ir_version,
    quantized_ops,
    take_over,
)

OPSET = 19
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)  # 2**-14: below it float16 loses bits

_F32, _F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


class LiftScales(ir.passes.InPlacePass):
    """Bring quantization scales into float16's normal range by exact powers of two; a float32 graph stays equal.

    A small weight scale of channel c is multiplied by 2**k[c], and so is its bias; the op's output is multiplied by
    2**-k[c]. A small activation scale takes a Mul(2**k) before its QuantizeLinear and adds k to its consumers' k[c].
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        lifted_edges = {}
        for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
            if k := int(_powers(node.inputs[1], node.name).max()):
                lifted_edges[node] = k
                _lift_activation(node, k)
        modified = bool(lifted_edges)
        for node in quantized_ops(graph):
            weight, activation = node.inputs[1].producer(), node.inputs[0].producer()
            k = _weight_powers(weight)
            if k.any():
                powers = np.expand_dims(k, _axis(weight)) if "block_size" in weight.attributes else k
                scale = np.ldexp(constant(weight.inputs[1]), powers).astype(np.float32)
                weight.inputs[1].const_value = ir.tensor(scale, name=weight.inputs[1].name)
            if activation is not None and activation.inputs[0].producer() in lifted_edges:
                k = k + lifted_edges[activation.inputs[0].producer()]
            if k.any():
                _lower_output(node, k)
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert (constant(node.inputs[1]) >= SMALLEST_NORMAL).all(), node.name


def _powers(scale: ir.Value, where: str) -> np.ndarray:
    """The least k >= 0 with scale * 2**k normal in float16."""
    values = constant(scale).astype(np.float64)
    k = np.maximum(0, np.ceil(np.log2(SMALLEST_NORMAL / values))).astype(int)
    if k.max(initial=0) > _MOST or (values > LARGEST).any():
        extreme = values.min() if k.max(initial=0) > _MOST else values.max()
        raise Refused(f"{where}: scale {extreme:.3g} does not fit float16. Keep this layer in float with --exclude.")
    return k


_MOST = 14  # 2**-14, the factor that takes it back, is normal itself


def _weight_powers(weight: ir.Node) -> np.ndarray:
    """Per output channel; a channel of zeros takes any scale, so it is given one that fits."""
    axis, scale = _axis(weight), weight.inputs[1]
    if "block_size" in weight.attributes:  # a product (in, out) or (out, in): one power for all blocks of an output
        return _powers(scale, scale.name).max(axis=axis)
    integers = constant(weight.inputs[0])
    if axis is not None:
        silent = ~integers.any(axis=tuple(i for i in range(integers.ndim) if i != axis % integers.ndim))
        if (silent & (constant(scale) < SMALLEST_NORMAL)).any():
            fitting = np.where(silent, np.float32(SMALLEST_NORMAL), constant(scale))
            scale.const_value = ir.tensor(fitting, name=scale.name)
    return _powers(scale, scale.name)


def _axis(weight: ir.Node) -> int | None:
    """Of a DequantizeLinear's scale; of its blocks, where it has them."""
    return weight.attributes["axis"].as_int() if "axis" in weight.attributes else None


def _lift_activation(node: ir.Node, k: int) -> None:
    graph, edge, scale = node.graph, node.inputs[0], node.inputs[1]
    factor = initializer(graph, f"two_to_{k}", np.float32(2.0**k))
    node.replace_input_with(0, insert_before(node, "Mul", [edge, factor], f"{edge.name}_lift"))
    scale.const_value = ir.tensor(np.ldexp(constant(scale), k).astype(np.float32), name=scale.name)


def _lower_output(node: ir.Node, k: np.ndarray) -> None:
    graph, y = node.graph, node.outputs[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2]
        lifted = initializer(graph, f"{y.name}_bias_lift", np.ldexp(constant(bias), k).astype(np.float32))
        node.replace_input_with(2, lifted)
    back = np.ldexp(np.float32(1), -k).astype(np.float32)
    shape = (-1, 1, 1) if node.op_type == "Conv" else (-1,)
    factor = initializer(graph, f"{y.name}_lower", back.reshape(shape))
    lowered = insert_after(node, "Mul", [y, factor], f"{y.name}_lowered")
    take_over(y, lowered, keep=lowered.producer())


class HalfRemainder(ir.passes.InPlacePass):
    """Turn every float32 computation of a model into float16, but for those the header names."""

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            if any(attr.type is ir.AttributeType.GRAPH for attr in node.attributes.values()):
                raise Refused(f"{node.name}: control flow ({node.op_type}). Export the network with fixed branches.")
        scales = {node.inputs[1] for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        for value in model.graph.initializers.values():
            if value.dtype == _F32 and value not in scales:
                _check_range(value)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        LiftScales()(model)
        graph = model.graph
        version = graph.opset_imports[""] = max(OPSET, graph.opset_imports[""])
        model.ir_version = oldest_ir_version(version)
        exact = _before_weights(graph)
        conversion = _Conversion(graph)
        for node in list(graph):
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
            wants_half = [node not in exact and _takes_half(schema, schema.inputs, i) for i in range(len(node.inputs))]
            for index, half in enumerate(wants_half):
                conversion.convert_input(node, index, half)
            if node not in exact:
                _convert_attributes(node)
                for index, output in enumerate(node.outputs):
                    if output.dtype == _F32 and _takes_half(schema, schema.outputs, index):
                        output.type = ir.TensorType(_F16)
        conversion.restore_outputs()
        conversion.register_initializers()
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                assert all(value is None or value.dtype == _F16 for value in node.inputs), node.name
            if node.op_type == "QuantizeLinear":
                assert node.inputs[0].dtype == node.inputs[1].dtype, node.name


def _check_range(value: ir.Value) -> None:
    values = constant(value)
    finite = np.abs(values[np.isfinite(values)])
    if finite.size and finite.max() > LARGEST:
        raise Refused(
            f"{value.name}: holds {finite.max():.3g}, float16 ends at {LARGEST:.5g}. "
            "This network has no float16 form; leave out the TensorRT sibling."
        )
    if values.size == 1 and values.any() and not values.astype(np.float16).any():
        raise Refused(
            f"{value.name}: {finite.max():.3g} is zero in float16. "
            "This network has no float16 form; leave out the TensorRT sibling."
        )


def _before_weights(graph: ir.Graph) -> set[ir.Node]:
    """What is computed from scalars per picture, or from an input on its way to a sine, before any weighted op."""
    values = {
        value for value in graph.inputs if (value.shape is not None and len(value.shape) <= 1) or feeds_wave(value)
    }
    nodes = set()
    for node in graph:
        computed = [value for value in node.inputs if value is not None and not value.is_initializer()]
        if computed and values.issuperset(computed) and node.op_type not in WEIGHTED:
            nodes.add(node)
            values.update(node.outputs)
    return nodes


def _takes_half(schema: onnx.defs.OpSchema, parameters: list[onnx.defs.OpSchema.FormalParameter], index: int) -> bool:
    """ONNX allows float16 there; the last parameter may stand for many."""
    parameter = parameters[min(index, len(parameters) - 1)]
    return "tensor(float16)" in parameter.types


def _convert_attributes(node: ir.Node) -> None:
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _F32:
        node.attributes["to"] = ir.AttrInt64("to", _F16)
    elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
        if tensor.dtype == _F32:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float16)))


class _Conversion:
    """Casts and float16 copies of initializers, one for each tensor that needs it."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.halves: dict[ir.Value, ir.Value] = {}

    def convert_input(self, node: ir.Node, index: int, half: bool) -> None:
        value = node.inputs[index]
        if value is None or value.dtype not in (_F32, _F16) or value.dtype == (_F16 if half else _F32):
            return
        if value.is_initializer():
            node.replace_input_with(index, self._half(value))
        else:
            node.replace_input_with(index, self._cast(node, value, _F16 if half else _F32))

    def _half(self, value: ir.Value) -> ir.Value:
        if value not in self.halves:
            tensor = ir.tensor(constant(value).astype(np.float16), name=value.name)
            self.halves[value] = ir.Value(
                name=value.name, shape=value.shape, type=ir.TensorType(_F16), const_value=tensor
            )
        return self.halves[value]

    def _cast(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) not in self.casts:
            name = f"{value.name}_{'half' if dtype == _F16 else 'float'}"
            cast = insert_before(node, "Cast", [value], name, to=dtype)
            cast.type = ir.TensorType(dtype)
            self.casts[value, dtype] = cast
        return self.casts[value, dtype]

    def restore_outputs(self) -> None:
        """The graph's outputs are float32 under their own names."""
        for value in list(self.graph.outputs):
            if value.dtype == _F16:
                back = insert_after(value.producer(), "Cast", [value], f"{value.name}_float", to=_F32)
                back.type = ir.TensorType(_F32)
                for index, output in enumerate(self.graph.outputs):
                    if output is value:
                        self.graph.outputs[index] = back
                value.name, back.name = f"{value.name}_half", value.name

    def register_initializers(self) -> None:
        """A float16 copy takes the name; a float32 original that something still reads moves aside."""
        for original, half in self.halves.items():
            if original.uses():
                original.name = original.const_value.name = f"{half.name}_float"
            else:
                del self.graph.initializers[original.name]
            self.graph.register_initializer(half)

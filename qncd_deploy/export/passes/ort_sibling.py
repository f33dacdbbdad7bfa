"""Turn the master into ONNX Runtime's CPU form: the same integers and scales, in the patterns it fuses kernels from.

    activations   s8 with zero point 0 -> u8 with zero point 128: the same values (another zero point moves along)
    Conv          Q/DQ behind it too, else it runs in float                            -> QLinearConv
    Gemm          bias as int32 on the grid s_x s_w, else it runs in float             -> QGemm
    MatMul        as it is                                                             -> MatMulIntegerToFloat
    weights only  in blocks: as they are                                               -> MatMulNBits of a MatMul
                  others: Cast and Mul, which it computes once when it loads the graph, a DequantizeLinear in every run
Only the output of a Conv is rounded once more than in the master; a Linear's is not. (Which form is fused and which is
fastest was measured with ONNX Runtime 1.31; an Add behind a 3-D MatMul does not disturb it.)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qncd_deploy.export.passes.common import (
    Refused,
    constant,
    initializer,
    insert_after,
    insert_before,
    quantized_ops,
    take_over,
)
from qncd_deploy.quant.plan import QuantPlan

ZERO = "uint8_zero"
_UINT8_ZERO_POINT = np.uint8(128)


class OrtSibling(ir.passes.InPlacePass):
    """Rewrite a model that InsertQDQ made from plan; the plan's output_amax of convolutions is needed."""

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        self.output_amax = {layer.output: layer.output_amax or 0.0 for layer in plan.quantized}

    def requires(self, model: ir.Model) -> None:
        for node in _integer_ops(model.graph):
            if node.op_type == "Conv" and not self.output_amax.get(node.outputs[0].name, 0) > 0:
                raise Refused(
                    f"{node.name}: no range of its output {node.outputs[0].name!r}, which ONNX Runtime's integer "
                    "convolution needs. Calibrate the outputs of convolutions too."
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        ops, integer_ops = quantized_ops(graph), _integer_ops(graph)
        for node in ops:
            if node not in integer_ops and "block_size" not in node.inputs[1].producer().attributes:
                _dequantize_at_load(node)
        common_passes.RemoveUnusedNodesPass()(model)
        if integer_ops:
            zero = initializer(graph, ZERO, _UINT8_ZERO_POINT)
        for node in graph:
            if _is_activation_pair(node):
                node.replace_input_with(2, _unsigned(graph, node.inputs[2]))
                if node.op_type == "QuantizeLinear":
                    node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        for node in integer_ops:
            if node.op_type == "Conv":
                self._quantize_output(node, zero)
            elif node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
                _quantize_bias(node)
        graph.sort()  # a pair of the next layer may stand behind other readers of the tensor
        return ir.passes.PassResult(model, bool(ops))

    def _quantize_output(self, node: ir.Node, zero: ir.Value) -> None:
        """Everything that read the output reads its dequantized twin: the next layer's own pair where there is one."""
        y = node.outputs[0]
        q = next((user for user in y.consumers() if user.op_type == "QuantizeLinear"), None)
        if q is None:
            scale = initializer(node.graph, f"{y.name}_out_scale", np.float32(self.output_amax[y.name] / 127))
            integers = insert_after(node, "QuantizeLinear", [y, scale, zero], f"{y.name}_out_q")
            integers.type = ir.TensorType(ir.DataType.UINT8)
            q = integers.producer()
            back = insert_after(q, "DequantizeLinear", [integers, scale, zero], f"{y.name}_out_dq")
            back.type = y.type
        else:
            (dequantize,) = q.outputs[0].consumers()
            back = dequantize.outputs[0]
        take_over(y, back, keep=q)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            assert not _is_activation_pair(node) or node.inputs[2].dtype == ir.DataType.UINT8, node.name


def _unsigned(graph: ir.Graph, zero: ir.Value) -> ir.Value:
    """128 more."""
    value = int(constant(zero))
    return initializer(graph, f"{zero.name}_u8" if value else ZERO, np.uint8(int(_UINT8_ZERO_POINT) + value))


def _integer_ops(graph: ir.Graph) -> list[ir.Node]:
    """The quantized ops whose input is quantized too, in graph order."""
    return [
        node
        for node in quantized_ops(graph)
        if (source := node.inputs[0].producer()) is not None and source.op_type == "DequantizeLinear"
    ]


def _dequantize_at_load(node: ir.Node) -> None:
    """The same product of integer and scale, of operators that ONNX Runtime folds into one constant."""
    graph, back = node.graph, node.inputs[1].producer()
    (q, scale, _), axis = back.inputs, back.attributes["axis"].as_int()
    factors = constant(scale).reshape([-1 if i == axis else 1 for i in range(len(q.shape))])
    wide = insert_before(node, "Cast", [q], f"{q.name}_wide", to=ir.DataType.FLOAT)
    wide.type = ir.TensorType(ir.DataType.FLOAT)
    weight = insert_before(node, "Mul", [wide, initializer(graph, f"{scale.name}_wide", factors)], f"{q.name}_float")
    node.replace_input_with(1, weight)


def _is_activation_pair(node: ir.Node) -> bool:
    return node.op_type == "QuantizeLinear" or (
        node.op_type == "DequantizeLinear" and not node.inputs[0].is_initializer()
    )


def _quantize_bias(node: ir.Node) -> None:
    """int32 on the accumulator's grid: an error of half an accumulator step. A bias beyond int32 stays float."""
    weight, bias = node.inputs[1].producer(), node.inputs[2]
    scale = constant(node.inputs[0].producer().inputs[1]) * constant(weight.inputs[1])
    values = constant(bias)
    if values is None or values.ndim != 1 or {"alpha", "beta"} & node.attributes.keys():
        return
    integers = np.rint(values.astype(np.float64) / scale)
    if np.abs(integers).max(initial=0) > np.iinfo(np.int32).max:
        return
    scale = np.broadcast_to(scale, values.shape)
    q = initializer(node.graph, f"{bias.name}_q", integers.astype(np.int32))
    s = initializer(node.graph, f"{bias.name}_scale", scale.astype(np.float32))
    zero = initializer(node.graph, f"{bias.name}_zero", np.zeros(values.shape, np.int32))
    dequantized = insert_before(node, "DequantizeLinear", [q, s, zero], f"{bias.name}_dq", axis=0)
    dequantized.type = bias.type
    node.replace_input_with(2, dequantized)

"""Every rule is broken once, and says so in its words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from export_helpers import small_network, small_plan
from test_export_passes import _FLOAT

from qncd_deploy.errors import ExportError
from qncd_deploy.export.passes.half import HalfRemainder
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.ort_sibling import OrtSibling
from qncd_deploy.export.verify import (
    FLOAT,
    MASTER,
    ONNXRUNTIME,
    TENSORRT,
    tensorrt_can_import,
    verify,
    zero_points_are_zero,
    zero_points_as_planned,
)
from qncd_deploy.quant.plan import QuantPlan


def quantized() -> tuple[ir.Model, QuantPlan]:
    model = small_network()
    plan, _ = small_plan(model)
    InsertQDQ(plan)(model)
    return model, plan


def node(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in model.graph if node.outputs[0].name == output)


def set_initializer(model: ir.Model, name: str, array: np.ndarray) -> None:
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(array, name=name)
    value.type = ir.TensorType(value.const_value.dtype)


def _nan(model):
    set_initializer(model, "conv_bias", np.full(8, np.nan, np.float32))


def _opset(model):
    model.opset_imports[""] = 21


def _same_name(model):
    node(model, "c").name = node(model, "d").name


def _doc(model):
    node(model, "c").doc_string = "/home/someone/unet.py"


def _half_output(model):
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)


def _bad_rank(model):
    node(model, "j").attributes["perm"] = ir.AttrInt64s("perm", [0, 1])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_nan, r"conv_bias: NaN or infinity. Rule: weights are finite"),
        (_opset, r"opset ai.onnx 21: expected ai.onnx 18 to 20. Rule: opset is readable everywhere"),
        (_same_name, r"d/MatMul: 2 nodes have this name. Rule: names are unique"),
        (_doc, r"c/MatMul: holds metadata or a doc string. Rule: tells nothing of the machine"),
        (_half_output, r"Rule: checker accepts \(1 more\)"),
        (_bad_rank, r"Rule: checker accepts"),
    ],
)
def test_rules_for_every_graph(spoil, words):
    model = small_network()
    verify(model, FLOAT)
    spoil(model)
    with pytest.raises(ExportError, match=words) as caught:
        verify(model, FLOAT, name="unet.onnx")
    assert str(caught.value).startswith("unet.onnx: ") and "\n" not in str(caught.value)


def test_plan_and_graph_must_agree():
    model, plan = quantized()
    fewer = QuantPlan(plan.format, tuple(replace(p, **_FLOAT) if p.name == "last" else p for p in plan))
    with pytest.raises(ExportError, match=r"last: quantized but not planned. Rule: quantized as planned \(2 more\)"):
        verify(model, MASTER, plan=fewer)
    InsertQDQ(fewer)(model := small_network())
    with pytest.raises(ExportError, match="last: planned but float"):
        verify(model, MASTER, plan=plan)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_integers_must_be_levels_of_the_plan(asymmetric):
    model = small_network()
    plan, _ = small_plan(model, weight_bits=4, act_bits=6, asymmetric=asymmetric)
    InsertQDQ(plan)(model)
    verify(model, MASTER, plan=plan)
    integers = model.graph.initializers["left_q"].const_value.numpy().copy()
    top = plan["left"].weight_grid.qmax if not asymmetric else plan["left"].weight_grid.qmax[3]
    integers[2, 3] = top + 1
    set_initializer(model, "left_q", integers)
    with pytest.raises(ExportError, match=r"left: 1 of 64 integers are not levels of its 4 bits\. Rule: integers are"):
        verify(model, MASTER, plan=plan)


def _unsigned(model):
    set_initializer(model, "int8_zero", np.uint8(0))


def _shifted(model):
    set_initializer(model, "int8_zero", np.int8(3))


def _no_zero(model):
    q = node(model, "x_q")
    q.resize_inputs(2)


def _wrong_axis(model):
    node(model, "left_dq").attributes["axis"] = ir.AttrInt64("axis", 0)


def _per_channel_activation(model):
    set_initializer(model, "x_scale", np.full(8, 0.1, np.float32))


def _not_importable(model):
    node(model, "f").op_type = "CastLike"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_unsigned, "zero point is UINT8"),
        (_no_zero, "x_q/QuantizeLinear: zero point missing or not constant"),
        (_wrong_axis, "scale along axis 0, not the output channels"),
        (_per_channel_activation, "per-channel scale of an activation"),
        (_not_importable, "f/Mul: CastLike cannot be imported"),
    ],
)
def test_rules_for_tensorrt(spoil, words):
    model, plan = quantized()
    rules = (tensorrt_can_import,)
    verify(model, rules, plan=plan)
    spoil(model)
    with pytest.raises(ExportError, match=words):
        verify(model, rules, plan=plan)


def test_zero_points_are_the_plans_and_none_for_tensorrt():
    model, plan = quantized()
    verify(model, (zero_points_are_zero, zero_points_as_planned), plan=plan)
    _shifted(model)
    for rule, words in ((zero_points_are_zero, "is not 0"), (zero_points_as_planned, "3, planned 0")):
        with pytest.raises(ExportError, match=f"QuantizeLinear: zero point {words}"):
            verify(model, (rule,), plan=plan)
    model = small_network()
    shifted = QuantPlan(plan.format, tuple(replace(p, act_zero=-9) if p.input == "b" else p for p in plan))
    InsertQDQ(shifted)(model)
    verify(model, MASTER, plan=shifted)
    set_initializer(model, "b_zero", np.int8(9))
    with pytest.raises(ExportError, match=r"b_q/QuantizeLinear: zero point 9, planned -9\. Rule: .* \(1 more\)"):
        verify(model, MASTER, plan=shifted)


def test_tensorrt_sibling_must_be_half_and_quantize_inputs_only():
    model, plan = quantized()
    with pytest.raises(ExportError, match=r"input .* is FLOAT, expected FLOAT16. Rule: remainder is half"):
        verify(model, TENSORRT, plan=plan)
    HalfRemainder()(model)
    verify(model, TENSORRT, plan=plan)
    set_initializer(model, "left_scale", np.full(8, 1e-6, np.float16))
    with pytest.raises(ExportError, match="left_dq/DequantizeLinear: a scale leaves float16's normal range"):
        verify(model, TENSORRT, plan=plan)
    model, plan = quantized()
    OrtSibling(plan)(model)
    with pytest.raises(ExportError, match="an output is quantized, TensorRT would round it once more"):
        verify(model, MASTER, plan=plan)


def test_onnxruntime_sibling_must_fuse():
    model, plan = quantized()
    with pytest.raises(ExportError, match=r"zero point is INT8, expected UINT8. Rule: activations are unsigned"):
        verify(model, ONNXRUNTIME, plan=plan)
    OrtSibling(plan)(model)
    verify(model, ONNXRUNTIME, plan=plan)
    node(model, "b").replace_input_with(0, node(model, "a").outputs[0])
    with pytest.raises(ExportError, match=r"a/Conv: read by .*Transpose.*, not by one Q"):
        verify(model, ONNXRUNTIME, plan=plan)

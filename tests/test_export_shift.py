"""Zero points of 8-bit activations: the master has them, and TensorRT's form without them computes the same."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_helpers import feeds_for, minmax_plan, parsed, relative_rms, run, saved, small_network, small_plan, traced
from onnx.reference import ReferenceEvaluator

from qncd_deploy.engines.base import open_engine
from qncd_deploy.errors import ExportError
from qncd_deploy.export.graph import Inputs
from qncd_deploy.export.passes.half import HalfRemainder
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.ort_sibling import OrtSibling
from qncd_deploy.export.passes.shift import ShiftZeroPoints
from qncd_deploy.export.verify import MASTER, ONNXRUNTIME, TENSORRT, verify
from qncd_deploy.quant.plan import QuantPlan

RNG = np.random.default_rng(0)
NO_HALF = tuple(rule for rule in TENSORRT if rule.__name__ != "remainder_is_half")


def with_zeros(plan: QuantPlan, zeros: dict[str, int]) -> QuantPlan:
    """The plan with other zero points of its edges, by edge."""
    return QuantPlan(plan.format, tuple(replace(p, act_zero=zeros.get(p.input, p.act_zero)) for p in plan))


def shifted_twice(model: ir.Model, plan: QuantPlan) -> tuple[ir.Model, ir.Model]:
    """The master of the plan, and its form without zero points."""
    InsertQDQ(plan)(model)
    verify(model, MASTER, plan=plan)
    rewritten = model.clone()
    assert ShiftZeroPoints()(rewritten).modified
    verify(rewritten, NO_HALF, plan=plan)
    assert not ShiftZeroPoints()(rewritten).modified
    return model, rewritten


def assert_equal_to_rounding(found: np.ndarray, expected: np.ndarray) -> None:
    """Sums of some hundred float32 products, in another order and with a constant added and taken off; no value lies
    close enough to a tie for the shift's own rounding to move it.
    """
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_every_engine_agrees_with_torch_and_with_the_shifted_form(backend, tmp_path):
    model = small_network()
    plan, feeds = small_plan(model)
    plan = with_zeros(plan, {"x": -100, "b": 33, "g": -128, "k": 127})
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    first = plan["conv"]
    x = torch.fake_quantize_per_tensor_affine(torch.tensor(feeds["x"]), first.act_scale, -100, -128, 127)
    scale, zero = torch.tensor(first.weight_scale), torch.zeros(8, dtype=torch.int32)
    w = torch.fake_quantize_per_channel_affine(torch.tensor(weights["conv"]), scale, zero, 0, -127, 127)
    a = torch.nn.functional.conv2d(x, w, torch.tensor(weights["conv_bias"]), padding=1).numpy()

    master, rewritten = shifted_twice(model, plan)
    for graph in (master, rewritten):
        graph.graph.outputs.append(next(node.outputs[0] for node in graph.graph if node.name == "a/Conv"))
        folder = saved({"unet.onnx": graph}, tmp_path)
        with open_engine(backend, folder / "unet.onnx", remainder="f32", threads=1) as engine:
            outputs = engine(feeds)
        assert_equal_to_rounding(outputs["a"], a)
        assert_equal_to_rounding(outputs["y"], run(master, feeds)["y"])
    ops = [node.op_type for node in rewritten.graph]
    assert ops.count("Pad") == 1 and ops.count("QuantizeLinear") == 4  # the 3x3 convolution alone is padded


PADDINGS = """<ir_version: 8, opset_import: ["": 18]>
    g (float[N,4,6,6] x) => (float[N,4,3,3] y, float[N,4,3,3] z, float[N,4,3,3] w)
    {
        y = Conv <pads = [0, 0, 1, 1], strides = [2, 2]> (x, down, bias)
        z = Conv <strides = [2, 2]> (x, point)
        w = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 2> (x, grouped)
    }"""


def test_readers_that_pad_differently_and_grouped_ones(tmp_path):
    """Against the standard's own words for a true uint8 zero point, on the reference evaluator."""
    shapes = {"down": (4, 4, 3, 3), "point": (4, 4, 1, 1), "grouped": (4, 2, 3, 3), "bias": (4,)}
    model = parsed(PADDINGS, {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    feeds = {"x": np.abs(RNG.standard_normal((2, 4, 6, 6))).astype(np.float32)}
    plan = minmax_plan(model, feeds, inputs=Inputs("x", None), roles=("first", "last"))
    assert len(plan.edges) == 1 and len(plan.quantized) == 3
    master, rewritten = shifted_twice(model, with_zeros(plan, {"x": -90}))
    unsigned = master.clone()
    OrtSibling(plan)(unsigned)
    verify(unsigned, ONNXRUNTIME, plan=plan)
    assert unsigned.graph.initializers["x_zero_u8"].const_value.numpy() == np.uint8(38)
    by_runtime = run(rewritten, feeds)
    master.opset_imports[""] = 19  # the first that the reference implements Q/DQ for; it adds types alone
    names = [value.name for value in master.graph.outputs]
    for name, expected in zip(names, ReferenceEvaluator(ir.to_proto(master)).run(names, feeds), strict=True):
        assert_equal_to_rounding(by_runtime[name], expected)
    assert [node.op_type for node in rewritten.graph].count("Pad") == 2


@pytest.mark.parametrize("op", ["Gemm <alpha = 0.5, beta = 2.0> (x, weight, bias)", "Gemm (x, weight, late)"])
def test_a_gemm_without_room_in_its_bias_is_corrected_behind(op):
    text = f"""<ir_version: 8, opset_import: ["": 18]>
        g (float[N,8] x, float[8] late) => (float[N,8] y) {{ y = {op} }}"""
    names = re.findall(r"weight|bias", op)
    shapes = {"weight": (8, 8), "bias": (8,)}
    model = parsed(text, {name: RNG.standard_normal(shapes[name]).astype(np.float32) for name in names})
    feeds = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in (("x", (3, 8)), ("late", (8,)))}
    plan = minmax_plan(model, feeds, inputs=Inputs("x", None), roles=("body", "first", "last"))
    assert len(plan.quantized) == 1
    master, rewritten = shifted_twice(model, with_zeros(plan, {"x": -77}))
    assert_equal_to_rounding(run(rewritten, feeds)["y"], run(master, feeds)["y"])
    assert [node.op_type for node in rewritten.graph].count("Add") == 2


def test_padding_that_is_not_told_in_numbers_is_refused():
    text = """<ir_version: 8, opset_import: ["": 18]>
        g (float[N,4,6,6] x) => (float[N,4,6,6] y) { y = Conv <auto_pad = "SAME_UPPER"> (x, weight) }"""
    model = parsed(text, {"weight": RNG.standard_normal((4, 4, 3, 3)).astype(np.float32)})
    feeds = {"x": RNG.standard_normal((1, 4, 6, 6)).astype(np.float32)}
    plan = with_zeros(minmax_plan(model, feeds, inputs=Inputs("x", None), roles=("first", "last")), {"x": 5})
    InsertQDQ(plan)(model)
    with pytest.raises(ExportError, match=r"padding SAME_UPPER is not told in numbers\. Export the network with"):
        ShiftZeroPoints()(model)


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_siblings_of_a_unet_with_zero_points(kind, tmp_path):
    """As without them: master and TensorRT's form are equally far from the float network, whose ties they amplify
    differently. ONNX Runtime rounds outputs as well, on even grids: about as much noise again.
    """
    _, specs, model = traced(kind)
    feeds = feeds_for(specs, 2)
    expected = run(model, feeds)["out"]
    plan = minmax_plan(model, feeds, eight_bits_asymmetric=True)
    assert any(layer.act_zero for layer in plan)
    master, rewritten = shifted_twice(model, plan)
    ort = master.clone()
    OrtSibling(plan)(ort)
    verify(ort, ONNXRUNTIME, plan=plan)
    HalfRemainder()(rewritten)
    verify(rewritten, TENSORRT, plan=plan)
    fused = run(ort, feeds, fused=tmp_path / "fused.onnx")["out"]
    found = [run(master, feeds)["out"], run(rewritten, feeds)["out"], fused]
    errors = [relative_rms(each, expected) for each in found]
    assert max(errors) < 0.3 and errors[1] < 1.5 * errors[0] and errors[2] < 2 * errors[0], errors
    convolutions = sum(layer.op == "Conv" for layer in plan.quantized)
    ops = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert ops.count("QLinearConv") == convolutions

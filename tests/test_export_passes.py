"""Smoothing is exact, Q/DQ is the plan's arithmetic and nothing else, and the siblings say the same in other words."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_helpers import (
    feeds_for,
    minmax_plan,
    relative_rms,
    run,
    run_torch,
    saved,
    small_network,
    small_plan,
    traced,
)
from onnx.reference import ReferenceEvaluator

from qncd_deploy.engines.base import open_engine
from qncd_deploy.errors import ExportError
from qncd_deploy.export.graph import Inputs, find_sites
from qncd_deploy.export.passes.half import HalfRemainder, LiftScales
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.normalise import normalise
from qncd_deploy.export.passes.ort_sibling import OrtSibling
from qncd_deploy.export.passes.smooth import FoldSmoothing
from qncd_deploy.export.resblocks import find_resblocks
from qncd_deploy.export.verify import FLOAT, MASTER, ONNXRUNTIME, TENSORRT, verify
from qncd_deploy.quant.plan import LayerPlan, QuantPlan

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 6), (4, 4)])
def test_qdq_equals_torch_fake_quantization(bits, asymmetric, tmp_path):
    """Each edge and weight by torch's own fake quantizers, which know zero points, in the order the plan says; float32
    rounding is all that is left, and no value is close enough to a tie for it to matter.
    """
    weight_bits, act_bits = bits
    model = small_network()
    plan, feeds = small_plan(model, weight_bits=weight_bits, act_bits=act_bits, asymmetric=asymmetric)
    shifted = [asymmetric and min(bits) < 8, asymmetric and act_bits < 8]
    assert shifted == [any(p.weight_zero for p in plan) or any(p.act_zero for p in plan), any(p.act_zero for p in plan)]
    w = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    levels = 2 ** (act_bits - 1)

    def act(x, name: str) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(
            torch.as_tensor(x), plan[name].act_scale, plan[name].act_zero, -levels, levels - 1
        )

    def weight(name: str) -> torch.Tensor:
        layer, high = plan[name], 2 ** (weight_bits - 1) - 1
        scale = torch.tensor(layer.weight_scale)
        low = -high if weight_bits == 8 else -high - 1
        zero = torch.tensor(layer.weight_zero or [0] * len(scale), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(torch.tensor(w[name]), scale, zero, layer.out_axis, low, high)

    conv = torch.nn.functional.conv2d
    a = conv(act(feeds["x"], "conv"), weight("conv"), torch.tensor(w["conv_bias"]), padding=1)
    b = a.permute(0, 2, 3, 1)
    f = (act(b, "left") @ weight("left")) * (act(b, "right") @ weight("right") + torch.tensor(w["right_bias"]))
    h = torch.nn.functional.linear(act(f.reshape(-1, 8), "gemm"), weight("gemm"), torch.tensor(w["gemm_bias"]))
    k = h.reshape(-1, 4, 4, 8).permute(0, 3, 1, 2) + a
    expected = conv(act(k, "last"), weight("last")).numpy()

    InsertQDQ(plan)(model)
    verify(model, MASTER, plan=plan)
    found = [run(model, feeds)["y"]]
    graph = saved({"unet.onnx": model}, tmp_path) / "unet.onnx"
    for backend in ("torch", "onnxruntime", "openvino"):
        with open_engine(backend, graph, remainder="f32", threads=1) as engine:
            found.append(engine(feeds)["y"])
    model.opset_imports[""] = 19  # the first that the reference implements Q/DQ for; it adds types alone
    found.append(ReferenceEvaluator(ir.to_proto(model)).run(["y"], feeds)[0])
    for y in found:
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert relative_rms(expected, run(small_float(w), feeds)["y"]) > 1e-3, "a quantizer that does nothing would pass"


def small_float(arrays: dict[str, np.ndarray]) -> ir.Model:
    model = small_network()
    for name, value in model.graph.initializers.items():
        value.const_value = ir.tensor(arrays[name], name=name)
    return model


def test_one_pair_serves_all_planned_consumers_and_float_ones_keep_the_float_edge():
    model = small_network()
    plan, _ = small_plan(model)
    layers = [replace(layer, **_FLOAT) if layer.name == "right" else layer for layer in plan]
    plan = QuantPlan(plan.format, tuple(layers))
    InsertQDQ(plan)(model)
    verify(model, MASTER, plan=plan)
    nodes = {node.outputs[0].name: node for node in model.graph}
    assert nodes["c"].inputs[0].name == "b_dq" and nodes["d"].inputs[0].name == "b"
    assert Counter(node.op_type for node in model.graph)["QuantizeLinear"] == 4
    assert nodes["d"].inputs[1].name == "right" and "left" not in model.graph.initializers
    assert model.graph.initializers["gemm_q"].const_value.dtype == ir.DataType.INT8
    assert nodes["gemm_dq"].attributes["axis"].as_int() == 0 and nodes["left_dq"].attributes["axis"].as_int() == 1


_FLOAT = dict(weight_bits=None, act_bits=None, weight_scale=None, act_scale=None, act_zero=None, output_amax=None)


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_smoothing_is_exact_in_float(kind):
    module, specs, model = traced(kind)
    blocks = find_resblocks(model)
    factors = {b.conv2: np.exp(RNG.uniform(-2, 2, b.channels)).astype(np.float32) for b in blocks}
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    FoldSmoothing(factors)(model)
    verify(model, FLOAT)
    feeds = feeds_for(specs, 2)
    expected = run_torch(module, feeds)
    # methods: max|before - after| below 1e-4 relative; the factors add three roundings to a layer of some 40
    np.testing.assert_allclose(run(model, feeds)["out"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    inputs = {site.name: site.input for site in find_sites(model)}
    for block in blocks:
        assert inputs[block.conv2] == f"{block.edge}_smooth"
        weight = model.graph.initializers[block.conv2].const_value.numpy()
        np.testing.assert_allclose(weight, before[block.conv2] * factors[block.conv2][None, :, None, None], rtol=1e-6)
        kept = traced(kind)[2].graph.initializers[block.conv2].const_value.numpy()
        np.testing.assert_array_equal(kept, before[block.conv2])  # the model this one was cloned from


def test_smoothing_refuses_other_weights_and_bad_factors():
    model = small_network()
    with pytest.raises(ExportError, match="other is not the weight of a Conv, Gemm or MatMul in this graph"):
        FoldSmoothing({"other": np.ones(8, np.float32)})(model)
    for bad in (np.ones(7, np.float32), np.zeros(8, np.float32), np.full(8, np.nan, np.float32)):
        with pytest.raises(ExportError, match=r"conv has factors of shape .*, expected \(8,\), finite, not zero"):
            FoldSmoothing({"conv": bad})(model)


def test_insert_refuses_a_plan_of_another_network():
    model = small_network()
    plan, _ = small_plan(model)

    def changed(**change) -> QuantPlan:
        return QuantPlan(plan.format, (replace(plan.layers[0], **change), *plan.layers[1:]))

    with pytest.raises(ExportError, match=r"1 of 5 planned layers are not in the graph: 'conv9'"):
        InsertQDQ(changed(name="conv9"))(model)
    with pytest.raises(ExportError, match=r"1 of 5 planned edges are not in the graph: conv reads 'x', not 'z'"):
        InsertQDQ(changed(input="z"))(model)
    with pytest.raises(ExportError, match=r"conv: Conv of \(8, 8, 3, 3\), the plan says Conv of \(8, 8, 1, 1\)"):
        InsertQDQ(changed(shape=(8, 8, 1, 1)))(model)
    InsertQDQ(plan)(model)
    with pytest.raises(ExportError, match="planned layers are not in the graph"):
        InsertQDQ(plan)(model)


@pytest.mark.parametrize("bits", [{}, {"weight_bits": 4, "act_bits": 6, "asymmetric": True}])
def test_ort_sibling_holds_the_same_numbers_and_fuses(bits, tmp_path):
    model = small_network()
    plan, feeds = small_plan(model, **bits)
    InsertQDQ(plan)(model)
    sibling = model.clone()
    OrtSibling(plan)(sibling)
    verify(sibling, ONNXRUNTIME, plan=plan)
    fused = run(sibling, feeds, fused=tmp_path / "fused.onnx")["y"]
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    assert ops["QLinearConv"] == 2 and ops["QGemm"] == 1 and ops["MatMulIntegerToFloat"] == 2
    assert not ops["Conv"] and not ops["Gemm"] and not ops["MatMul"]
    held = {name: value.const_value.numpy() for name, value in sibling.graph.initializers.items()}
    step = held["gemm_bias_scale"]
    np.testing.assert_allclose(step, np.float32(plan["gemm"].act_scale) * held["gemm_scale"], rtol=1e-6)
    bias = model.graph.initializers["gemm_bias"].const_value.numpy()
    assert (np.abs(held["gemm_bias_q"] * step - bias) <= step * 0.51).all()  # half a step and float32 rounding
    # each convolution's output is rounded once more, to 1/127 of its range, and the last one is the output itself
    last = plan["last"].output_amax / 127
    upstream = plan["conv"].output_amax / 127 * np.abs(model.graph.initializers["last_q"].const_value.numpy()).sum()
    assert np.abs(fused - run(model, feeds)["y"]).max() < last + upstream


def test_ort_sibling_reuses_the_next_layers_pair():
    """The output of one convolution that the next one reads quantized is not quantized twice."""
    model = normalise(
        ir.from_proto(
            onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18]>
        two (float[N,1,2,2] x) => (float[N,1,2,2] y)
        <float[1,1,1,1] v = {0.5}, float[1,1,1,1] w = {2.0}>
        { a = Conv (x, v)  r = Relu (a)  b = Conv (a, w)  y = Add (r, b) }""")
        )
    )
    fixed = dict(op="Conv", shape=(1, 1, 1, 1), out_axis=0, reason="", weight_bits=8, act_bits=8, act_zero=0)
    plan = QuantPlan(
        "w8a8",
        (
            LayerPlan(name="v", input="x", output="a", weight_scale=0.5 / 127, act_scale=0.1, output_amax=6.0, **fixed),
            LayerPlan(name="w", input="a", output="b", weight_scale=2 / 127, act_scale=0.05, output_amax=6.0, **fixed),
        ),
    )
    plan = QuantPlan("w8a8", tuple(replace(layer, weight_scale=(layer.weight_scale,)) for layer in plan))
    InsertQDQ(plan)(model)
    sibling = model.clone()
    OrtSibling(plan)(sibling)
    verify(sibling, ONNXRUNTIME, plan=plan)
    nodes = {node.outputs[0].name: node for node in sibling.graph}
    assert nodes["r"].inputs[0].name == "a_dq"
    assert Counter(node.op_type for node in sibling.graph)["QuantizeLinear"] == 3  # x, a, b


def test_ort_sibling_needs_output_ranges():
    model = small_network()
    plan, _ = small_plan(model)
    plan = QuantPlan(plan.format, tuple(replace(layer, output_amax=None) for layer in plan))
    InsertQDQ(plan)(model)
    with pytest.raises(ExportError, match="no range of its output 'a'"):
        OrtSibling(plan)(model)


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_half_remainder_of_a_float_network_is_close(kind):
    """Without quantizers no rounding tie is amplified, so float16's own error shows: 2**-11 a rounding, 40 layers."""
    _, specs, model = traced(kind)
    feeds = feeds_for(specs, 2)
    expected = run(model, feeds)["out"]
    HalfRemainder()(model)
    verify(model, FLOAT)
    assert model.opset_imports[""] == 19
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT]
    assert relative_rms(run(model, feeds)["out"], expected) < 40 * 2.0**-11
    types = {node.outputs[0].name: node.outputs[0].dtype for node in model.graph}
    for node in model.graph:
        if node.op_type in ("Sin", "Cos"):
            assert types[node.outputs[0].name] == node.inputs[0].dtype == ir.DataType.FLOAT
        if node.op_type in ("Conv", "MatMul", "Gemm", "InstanceNormalization", "Softmax"):
            assert types[node.outputs[0].name] == ir.DataType.FLOAT16, node.name


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_siblings_of_a_unet_are_legal_and_hold_the_same_integers(kind, tmp_path):
    _, specs, model = traced(kind)
    feeds = feeds_for(specs, 2)
    plan = minmax_plan(model, feeds)
    expected = run(model, feeds)["out"]
    InsertQDQ(plan)(model)
    verify(model, MASTER, plan=plan)
    half, ort = model.clone(), model.clone()
    HalfRemainder()(half)
    verify(half, TENSORRT, plan=plan)
    OrtSibling(plan)(ort)
    verify(ort, ONNXRUNTIME, plan=plan)
    for layer in plan.quantized:
        integers = [m.graph.initializers[f"{layer.name}_q"].const_value for m in (model, half, ort)]
        assert integers[0] is integers[1] is integers[2]
    fused = run(ort, feeds, fused=tmp_path / "fused.onnx")["out"]
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    convolutions = sum(layer.op == "Conv" for layer in plan.quantized)
    assert ops["QLinearConv"] == convolutions and ops["Conv"] == 2  # conv_in and conv_out stay float
    assert ops["MatMulIntegerToFloat"] == len(plan.quantized) - convolutions
    # two runs of one int8 graph differ by rounding ties that the network amplifies; compare their errors, not values
    errors = [relative_rms(found, expected) for found in (run(model, feeds)["out"], run(half, feeds)["out"], fused)]
    assert max(errors) < 0.3 and max(errors) < 1.5 * errors[0], errors


def test_small_scales_are_lifted_exactly():
    """Weights of some channels and one activation are so small that their scales are subnormal in float16."""
    model = small_network()
    arrays = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    arrays["conv"][2] *= 1e-3
    arrays["conv"][5] = 0
    arrays["left"][:, 3] *= 1e-4
    arrays["gemm"] *= 1e-3
    arrays["gemm_bias"] *= 1e-3
    model = small_float(arrays)
    feeds = {"x": RNG.standard_normal((3, 8, 4, 4)).astype(np.float32) * 1e-3}
    plan = minmax_plan(model, feeds, inputs=Inputs("x", None), roles=("body", "first", "last"))
    scales = [scale for layer in plan.quantized for scale in (*layer.weight_scale, layer.act_scale)]
    assert sum(scale < 2.0**-14 for scale in scales) > 5
    InsertQDQ(plan)(model)
    before = run(model, feeds)["y"]
    LiftScales()(model)
    np.testing.assert_array_equal(run(model, feeds)["y"], before)  # powers of two round nothing
    HalfRemainder()(model)
    verify(model, TENSORRT, plan=plan)
    assert relative_rms(run(model, feeds)["y"], before) < 0.02


def test_what_float16_cannot_hold_is_refused_by_name():
    model = small_network()
    arrays = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    arrays["right_bias"][0] = 1e5
    with pytest.raises(ExportError, match=r"right_bias: holds 1e\+05, float16 ends at 65504"):
        HalfRemainder()(small_float(arrays))
    model = small_network()
    plan, _ = small_plan(model)
    plan = QuantPlan(plan.format, (replace(plan.layers[0], act_scale=1e-12), *plan.layers[1:]))
    InsertQDQ(plan)(model)
    with pytest.raises(ExportError, match=r"scale 1e-12 does not fit float16\. Keep this layer in float"):
        HalfRemainder()(model)

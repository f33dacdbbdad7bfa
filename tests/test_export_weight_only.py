"""Weights alone quantized: the graphs hold packed 4-bit blocks, mean what onnx says, and run on every engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from export_helpers import Arrays, feeds_for, relative_rms, run, saved, traced
from onnx.reference import ReferenceEvaluator

from qncd_deploy.engines.base import open_engine
from qncd_deploy.errors import ExportError
from qncd_deploy.evaluate.measure import graph_bytes
from qncd_deploy.export.graph import find_sites
from qncd_deploy.export.passes.common import constant, quantized_ops
from qncd_deploy.export.passes.half import SMALLEST_NORMAL, HalfRemainder
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.ort_sibling import OrtSibling
from qncd_deploy.export.verify import MASTER, ONNXRUNTIME, TENSORRT, verify
from qncd_deploy.quant.decide import make_plan
from qncd_deploy.quant.grid import fake_quantize
from qncd_deploy.quant.plan import QuantPlan
from qncd_deploy.quant.policy import Policy

ROUNDING = 1e-5
"""Relative: sums in float32 of other order, through forty layers; a level of a weight would be 1e-2."""


def weights_of(model: ir.Model) -> Arrays:
    return {site.name: constant(model.graph.initializers[site.name]) for site in find_sites(model)}


def quantized(kind: str, **policy: object) -> tuple[ir.Model, QuantPlan, ir.Model, Arrays]:
    """The master, its plan, the float graph and feeds for both."""
    _, specs, model = traced(kind)
    plan = make_plan(find_sites(model), weights_of(model), {}, Policy.for_format("w4a16", **policy))
    master = model.clone()
    InsertQDQ(plan)(master)
    verify(master, MASTER, plan=plan)
    return master, plan, model, feeds_for(specs, 2)


def rounded(model: ir.Model, plan: QuantPlan) -> ir.Model:
    """The float graph with the weights that the plan's grids leave of its own: what the master must compute."""
    for layer in plan.quantized:
        value = model.graph.initializers[layer.name]
        value.const_value = ir.tensor(fake_quantize(constant(value), layer.weight_grid), name=layer.name)
    return model


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_the_master_computes_with_the_plans_weights(kind: str) -> None:
    master, plan, model, feeds = quantized(kind)
    assert master.graph.opset_imports[""] == 21 and plan.blocked
    assert not any(node.op_type == "QuantizeLinear" for node in master.graph)
    found = run(master, feeds)["out"]
    np.testing.assert_array_equal(found, run(rounded(model, plan), feeds)["out"])


def test_stored_weights_mean_what_the_plan_says_to_onnx() -> None:
    """By onnx's own definition of DequantizeLinear, on the file's bytes: nothing of ours reads them."""
    master, plan, model, _ = quantized("additive", block_size=32)
    proto = ir.to_proto(master)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    kinds = Counter()
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        out = onnx.helper.make_empty_tensor_value_info(node.output[0])
        graph = onnx.helper.make_graph([node], "one", [], [out], [stored[name] for name in node.input])
        one = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
        (found,) = ReferenceEvaluator(one).run(None, {})
        layer = plan[node.input[0].removesuffix("_q")]
        expected = fake_quantize(constant(model.graph.initializers[layer.name]), layer.weight_grid)
        np.testing.assert_array_equal(found, expected)
        integers = stored[node.input[0]]
        packed = integers.data_type == onnx.TensorProto.INT4
        assert packed == (layer.block_size is not None)
        assert len(integers.raw_data) == (expected.size + packed) // (1 + packed)
        kinds[layer.op, packed] += 1
    assert kinds == Counter((layer.op, layer.block_size is not None) for layer in plan.quantized)
    assert kinds["MatMul", True] > 5 and kinds["MatMul", False] > 5 and kinds["Conv", False] > 20


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_every_engine_computes_the_same(kind: str, tmp_path: Path) -> None:
    master, plan, model, feeds = quantized(kind)
    ort = master.clone()
    OrtSibling(plan)(ort)
    verify(ort, ONNXRUNTIME, plan=plan)
    exact = run(model, feeds)["out"]
    expected = run(rounded(model, plan), feeds)["out"]
    saved({"unet.onnx": master, "unet-ort.onnx": ort}, tmp_path)
    for backend, name in (("openvino", "unet"), ("onnxruntime", "unet-ort"), ("torch", "unet")):
        with open_engine(backend, tmp_path / f"{name}.onnx") as engine:
            found = engine(feeds)["out"]
            assert relative_rms(found, expected) < ROUNDING, backend
            if backend == "openvino":
                shapes = {name: array.shape for name, array in feeds.items()}
                packed = sum(k.count for k in engine.kernels(shapes) if k.implementation.endswith("i4 weights"))
                assert packed == sum(layer.block_size is not None for layer in plan)
    # weights of 20 dB, 44 dB in convolutions: about one part in ten of the output, and not nothing
    assert 0.005 < relative_rms(expected, exact) < 0.2


def test_onnxruntime_multiplies_packed_blocks_and_unpacks_the_rest_once() -> None:
    import onnxruntime

    from qncd_deploy.engines.ort import session_options

    master, plan, _, feeds = quantized("additive")
    unfused = run(master, feeds)["out"]
    OrtSibling(plan)(master)
    np.testing.assert_array_equal(run(master, feeds)["out"], unfused)
    options = session_options()
    assert options.get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "1"
    for node in quantized_ops(master.graph):
        source = node.inputs[1].producer().op_type
        assert source == ("DequantizeLinear" if plan_blocks(plan, node) else "Mul")
    session = onnxruntime.InferenceSession(ir.to_proto(master).SerializeToString(), options)
    assert relative_rms(session.run(None, feeds)[0], unfused) < ROUNDING


def plan_blocks(plan: QuantPlan, node: ir.Node) -> bool:
    return any(layer.output == node.outputs[0].name and layer.block_size is not None for layer in plan)


def test_faint_weights_are_lifted_for_float16_by_whole_channels() -> None:
    """Scales below float16's normal range: the same numbers in float32, each channel by a power of two of its own."""
    _, specs, model = traced("additive")
    name = next(site.name for site in find_sites(model) if site.name.endswith("ff.net.2.weight"))  # of 128 inputs
    value = model.graph.initializers[name]
    faint = constant(value) * np.logspace(-4, -6, value.shape[1]).astype(np.float32)
    value.const_value = ir.tensor(faint, name=name)
    plan = make_plan(find_sites(model), weights_of(model), {}, Policy.for_format("w4a16", block_size=32))
    assert plan[name].weight_grid.scale.min() < SMALLEST_NORMAL
    feeds = feeds_for(specs, 2)
    InsertQDQ(plan)(model)
    expected = run(model, feeds)["out"]
    half = model.clone()
    HalfRemainder()(half)
    verify(half, TENSORRT, plan=plan)
    scale = constant(half.graph.initializers[f"{name}_scale"])
    assert scale.dtype == np.float16 and scale.min() >= SMALLEST_NORMAL
    # float16 keeps 11 bits of every tensor: 2**-11 each, adding up over the layers
    assert relative_rms(run(half, feeds)["out"], expected) < 40 * 2.0**-11


def test_a_group_normalization_of_old_is_refused() -> None:
    _, plan, model, _ = quantized("additive")
    norm = next(node for node in model.graph if node.op_type == "InstanceNormalization")
    norm.op_type = "GroupNormalization"
    with pytest.raises(ExportError, match="GroupNormalization means something else from opset 21 on"):
        InsertQDQ(plan)(model)


def node(model: ir.Model, op: str) -> ir.Node:
    """Of a Conv's weight, or of a MatMul's in blocks."""
    for product in quantized_ops(model.graph):
        source = product.inputs[1].producer()
        if product.op_type == op and (op == "Conv" or "block_size" in source.attributes):
            return source
    raise AssertionError(f"no {op}")


def _old(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 20


def _whole_axis(model: ir.Model) -> None:
    del node(model, "MatMul").attributes["block_size"]


def _outputs(model: ir.Model) -> None:
    node(model, "MatMul").attributes["axis"] = ir.AttrInt64("axis", 1)


def _wide(model: ir.Model) -> None:
    node(model, "MatMul").attributes["block_size"] = ir.AttrInt64("block_size", 256)


def _convolution(model: ir.Model) -> None:
    node(model, "Conv").attributes["block_size"] = ir.AttrInt64("block_size", 32)


def _quantized_input(model: ir.Model) -> None:
    product = node(model, "MatMul").outputs[0].consumers()[0]
    product.replace_input_with(0, node(model, "Conv").outputs[0])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_old, "opset ai.onnx 20: expected ai.onnx 21 to 21"),
        (_whole_axis, "4 bits without blocks"),
        (_outputs, "blocks along axis 1, not the inputs"),
        (_wide, "blocks of 256, expected 16, 32, 64, 128"),
        (_convolution, "blocks of a 4-D weight"),
        (_quantized_input, "INT4 weights and a quantized input"),
    ],
)
def test_what_tensorrt_does_not_take_packed_is_a_breach(spoil, words: str) -> None:
    master, plan, _, _ = quantized("additive")
    spoil(master)
    rules = tuple(rule for rule in MASTER if rule.__name__ != "checker_accepts")  # it stops at the first of these, too
    with pytest.raises(ExportError, match=words):
        verify(master, rules, plan=plan)


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_tensorrt_builds_it_with_packed_linear_weights(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
    from qncd_deploy.engines.trt.build import build
    from qncd_deploy.engines.trt.library import open_library
    from qncd_deploy.engines.trt.options import BuildOptions

    half, plan, _, feeds = quantized(kind)
    HalfRemainder()(half)
    verify(half, TENSORRT, plan=plan)
    saved({"unet-trt.onnx": half}, tmp_path)
    shapes = {name: array.shape for name, array in feeds.items()}
    built = build(open_library("tensorrt-rtx"), tmp_path / "unet-trt.onnx", BuildOptions((shapes,), ("sm86", "sm89")))
    planned = [product.layer for product in built.demands.products if product.planned]
    assert sorted(planned) == sorted(layer.name for layer in plan.quantized)
    table = built.table
    assert table.missed == () and table.float_products == () and table.integer_kernels == 0
    assert table.weight_only == len(plan.quantized)
    assert table.packed == sum(layer.op == "MatMul" for layer in plan.quantized)  # those of 8 bits, too


def stored_bytes(model: ir.Model, plan: QuantPlan) -> int:
    """Of the quantized weights: integers, scales and zero points, as the file holds them."""
    names = {f"{layer.name}{part}" for layer in plan.quantized for part in ("_q", "_scale", "_zero")}
    return sum(value.const_value.nbytes for name, value in model.graph.initializers.items() if name in names)


def eight_bits(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    """W8A8 of the same layers; activations get a scale without meaning."""
    weights, policy = weights_of(model), Policy()
    layers = [
        replace(
            layer,
            weight_bits=8,
            act_bits=8,
            act_scale=1.0,
            act_zero=0,
            block_size=None,
            weight_scale=tuple(map(float, policy.weight_grid(weights[layer.name], layer.out_axis).scale)),
        )
        if layer.quantized
        else layer
        for layer in plan
    ]
    return QuantPlan("w8a8", tuple(layers))


def test_linear_layers_take_little_more_than_half(tmp_path: Path) -> None:
    """The whole file too, by as much as the tensors say."""
    _, _, model = traced("additive")
    linear = Policy.for_format("w4a16", exclude=("conv", "proj_in", "proj_out", "attn", r"ff\.net\.0"))
    plan = make_plan(find_sites(model), weights_of(model), {}, linear)
    packed, whole = model.clone(), model.clone()
    InsertQDQ(plan)(packed)
    InsertQDQ(eight_bits(model, plan))(whole)
    sizes = stored_bytes(packed, plan), stored_bytes(whole, plan)
    assert sizes[0] <= 0.6 * sizes[1]
    saved({"packed.onnx": packed}, tmp_path), saved({"whole.onnx": whole}, tmp_path / "whole")
    saving = graph_bytes(tmp_path / "whole/whole.onnx") - graph_bytes(tmp_path / "packed.onnx")
    assert saving >= 0.95 * (sizes[1] - sizes[0])

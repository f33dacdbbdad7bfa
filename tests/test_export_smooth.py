"""Smoothing of Linears is exact, shared by the layers of one edge, and free behind a normalisation that nobody else
reads.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from export_helpers import feeds_for, minmax_plan, parsed, run, traced

from qncd_deploy.errors import ExportError
from qncd_deploy.export.graph import Inputs, find_sites
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.smooth import AbsorbSmoothing, FoldSmoothing
from qncd_deploy.export.verify import FLOAT, MASTER, verify

S = np.exp2(np.random.default_rng(0).integers(-3, 4, 8)).astype(np.float32)
"""Powers of two: every product with them is exact, so that a folded graph returns the same float32, bit for bit."""

RNG = np.random.default_rng(1)

TOKENS = """<ir_version: 8, opset_import: ["": 18]>
    tokens (float[N,5,8] x) => (float[N,5,8] y)
    {
        normed = LayerNormalization <axis = -1> (x, gamma, beta)
        q = MatMul (normed, query)
        k = MatMul (normed, key)
        m = Mul (q, k)
        flat = Reshape (m, rows)
        p = Gemm <transB = 1> (flat, out, out_bias)
        o = Reshape (p, tokens)
        late = LayerNormalization <axis = 2> (o, late_gamma)
        y = MatMul (late, last)
    }"""
"""Two Linears behind one normalisation, a Gemm on rows, and a Linear behind a normalisation without beta."""

GROUPED = """<ir_version: 8, opset_import: ["": 18]>
    grouped (float[N,8,4,4] x) => (float[N,8,4,4] y)
    {
        a = Reshape (x, groups)
        b = InstanceNormalization (a, ones, zeros)
        c = Reshape (b, planes)
        d = Mul (c, gamma)
        e = Add (d, beta)
        y = Conv (e, proj_in)
    }"""
"""GroupNorm of four groups as exporters write it, and the 1x1 convolution behind it."""


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def tokens() -> ir.Model:
    matrices = dict.fromkeys(("query", "key", "out", "last"), (8, 8))
    vectors = dict.fromkeys(("gamma", "beta", "out_bias", "late_gamma"), (8,))
    return parsed(TOKENS, arrays(**matrices, **vectors) | {"rows": np.array([-1, 8]), "tokens": np.array([-1, 5, 8])})


def grouped() -> ir.Model:
    fixed = {"ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)}
    shapes = {"groups": np.array([0, 4, -1]), "planes": np.array([-1, 8, 4, 4])}
    return parsed(GROUPED, arrays(gamma=(8, 1, 1), beta=(8, 1, 1), proj_in=(8, 8, 1, 1)) | fixed | shapes)


def smoothed(model: ir.Model, *names: str) -> ir.Model:
    copy = model.clone()
    FoldSmoothing(dict.fromkeys(names, S))(copy)
    return copy


def absorbed(model: ir.Model) -> ir.Model:
    copy = model.clone()
    AbsorbSmoothing()(copy)
    verify(copy, FLOAT)
    return copy


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def inputs_of(model: ir.Model) -> dict[str, str]:
    return {site.name: site.input for site in find_sites(model, Inputs("x", None))}


X = {"x": RNG.standard_normal((3, 5, 8)).astype(np.float32)}
PICTURE = {"x": RNG.standard_normal((2, 8, 4, 4)).astype(np.float32)}


def test_linears_of_one_edge_share_one_division() -> None:
    model = tokens()
    divided = smoothed(model, "query", "key", "out")
    verify(divided, FLOAT)
    assert ops(divided)["Mul"] == ops(model)["Mul"] + 2
    before, after = inputs_of(model), inputs_of(divided)
    assert after["query"] == after["key"] == "normed_smooth"
    assert (after["out"], after["last"]) == (f"{before['out']}_smooth", before["last"])
    np.testing.assert_array_equal(run(divided, X)["y"], run(model, X)["y"])
    weights = {name: value.const_value.numpy() for name, value in divided.graph.initializers.items()}
    kept = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    np.testing.assert_array_equal(weights["query"], kept["query"] * S[:, None])  # (K, N)
    np.testing.assert_array_equal(weights["out"], kept["out"] * S)  # (N, K)


def test_layers_with_other_factors_divide_for_themselves() -> None:
    model = tokens()
    divided = model.clone()
    FoldSmoothing({"query": S, "key": S[::-1].copy()})(divided)
    assert inputs_of(divided)["query"] == "normed_smooth" and inputs_of(divided)["key"] == "normed_smooth2"
    np.testing.assert_array_equal(run(divided, X)["y"], run(model, X)["y"])
    assert ops(absorbed(divided)) == ops(divided)  # two divisors, one normalisation


def test_a_layer_norm_divides_for_nothing() -> None:
    model = tokens()
    divided = smoothed(model, "query", "key", "last")
    free = absorbed(divided)
    assert ops(free) == ops(model)
    assert inputs_of(free) == inputs_of(divided)  # a plan for one is a plan for the other
    np.testing.assert_array_equal(run(free, X)["y"], run(model, X)["y"])
    gamma = model.graph.initializers["gamma"].const_value.numpy()
    np.testing.assert_array_equal(free.graph.initializers["normed_smooth_gamma"].const_value.numpy(), gamma / S)
    assert ops(absorbed(free)) == ops(free)  # idle the second time


def test_a_group_norm_divides_for_nothing() -> None:
    model = grouped()
    divided = smoothed(model, "proj_in")
    free = absorbed(divided)
    assert ops(divided)["Mul"] == 2 and ops(free)["Mul"] == 1
    assert inputs_of(free) == inputs_of(divided) == {"proj_in": "e_smooth"}
    np.testing.assert_array_equal(run(free, PICTURE)["y"], run(model, PICTURE)["y"])


@pytest.mark.parametrize("reader", ["another layer", "an output of the graph", "an op"])
def test_a_normalisation_that_others_read_stays_as_it_is(reader: str) -> None:
    model = tokens()
    names = ["query"] if reader == "another layer" else ["query", "key"]
    (normed,) = (output for node in model.graph for output in node.outputs if output.name == "normed")
    if reader == "an output of the graph":
        model.graph.outputs.append(normed)
    if reader == "an op":
        doubled = ir.node("Add", [normed, normed])
        doubled.outputs[0].name, doubled.outputs[0].shape, doubled.outputs[0].type = "w", normed.shape, normed.type
        model.graph.append(doubled)
        model.graph.outputs.append(doubled.outputs[0])
    divided = smoothed(model, *names)
    free = absorbed(divided)
    assert ops(free) == ops(divided)
    for name, expected in run(model, X).items():
        np.testing.assert_array_equal(run(free, X)[name], expected)


def test_other_axes_are_not_channels() -> None:
    """A LayerNormalization over two axes has factors for both; its gamma is not one number a channel."""
    model = parsed(TOKENS.replace("axis = 2", "axis = 1"), {
        **arrays(**dict.fromkeys(("query", "key", "out", "last"), (8, 8)), late_gamma=(5, 8)),
        **arrays(**dict.fromkeys(("gamma", "beta", "out_bias"), (8,))),
        "rows": np.array([-1, 8]), "tokens": np.array([-1, 5, 8]),
    })  # fmt: skip
    divided = smoothed(model, "last")
    assert ops(absorbed(divided)) == ops(divided)


def test_a_transposed_input_is_refused() -> None:
    model = tokens()
    (gemm,) = (node for node in model.graph if node.op_type == "Gemm")
    gemm.attributes["transA"] = ir.AttrInt64("transA", 1)
    with pytest.raises(
        ExportError, match="smoothing: out reads a transposed input, expected channels on its last axis"
    ):
        FoldSmoothing({"out": S})(model)


def test_a_smoothed_network_quantizes_on_the_same_integers_absorbed_or_not() -> None:
    divided = smoothed(tokens(), "query", "key", "out", "last")
    plan = minmax_plan(divided, X, inputs=Inputs("x", None), roles=("body", "first", "last"))
    outputs = []
    for model in (divided, absorbed(divided)):
        InsertQDQ(plan)(model)
        verify(model, MASTER, plan=plan)
        outputs.append(run(model, X)["y"])
    np.testing.assert_array_equal(*outputs)


def test_every_normalised_linear_of_a_unet() -> None:
    """All q, k, v and feed-forward inputs behind a LayerNorm, on any factors: float32 rounding is all that changes."""
    _, specs, model = traced("additive")
    behind = {
        site.name: np.exp(np.random.default_rng(len(site.name)).uniform(-2, 2, site.shape[0])).astype(np.float32)
        for site in find_sites(model)
        if site.input.startswith("layer_norm")
    }
    per_edge = {site.input: behind[site.name] for site in find_sites(model) if site.name in behind}
    factors = {site.name: per_edge[site.input] for site in find_sites(model) if site.name in behind}
    divided = model.clone()
    FoldSmoothing(factors)(divided)
    free = absorbed(divided)
    assert ops(free) == ops(model) and len(per_edge) == ops(model)["LayerNormalization"]
    feeds = feeds_for(specs, 2)
    expected = run(model, feeds)["out"]
    # three roundings more in some 30 of some 100 layers, each 6e-8 relative, amplified by at most the depth
    np.testing.assert_allclose(run(free, feeds)["out"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())

"""The plan: who is quantized and why, the numbers it records, and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.errors import PlanError
from qncd_deploy.quant.decide import decide, make_plan
from qncd_deploy.quant.grid import fake_quantize
from qncd_deploy.quant.plan import LayerSite, QuantPlan, float32_text
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.ranges import sqnr_db

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SHAPES = {
    "conv_in.weight": ("Conv", (16, 4, 3, 3), 0, "first"),
    "time_embedding.linear_1.weight": ("MatMul", (16, 64), 1, "time"),
    "down_blocks.0.resnets.0.conv1.weight": ("Conv", (16, 16, 3, 3), 0, "body"),
    "down_blocks.0.resnets.0.conv_shortcut.weight": ("Conv", (16, 16, 1, 1), 0, "body"),
    f"{BLOCK}.attn1.to_q.weight": ("MatMul", (16, 16), 1, "body"),
    f"{BLOCK}.attn1.to_k.weight": ("MatMul", (16, 16), 1, "body"),
    f"{BLOCK}.attn1.to_out.0.weight": ("Gemm", (16, 16), 0, "body"),
    f"{BLOCK}.ff.net.0.proj.weight": ("MatMul", (16, 32), 1, "body"),
    "narrow.weight": ("MatMul", (16, 4), 1, "body"),
    "conv_out.weight": ("Conv", (4, 16, 3, 3), 0, "last"),
}
QKV_EDGE = "tokens"


def sites() -> list[LayerSite]:
    return [
        LayerSite(
            name, op, shape, QKV_EDGE if "to_q" in name or "to_k" in name else f"{name}.in", f"{name}.out", axis, role
        )
        for name, (op, shape, axis, role) in SHAPES.items()
    ]


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, (_, shape, _, _) in SHAPES.items()}


def stats() -> dict[str, TensorStats]:
    rng = np.random.default_rng(1)
    edges = dict.fromkeys(edge for site in sites() for edge in (site.input, site.output))
    return {edge: TensorStats.of(rng.standard_normal((2, 16, 8, 8)), edge) for edge in edges}


def plan_for(policy: Policy | None = None, **changes) -> QuantPlan:
    return make_plan(sites(), changes.get("weights", weights()), changes.get("stats", stats()), policy or Policy())


def quantized_names(policy: Policy) -> set[str]:
    return {layer.name for layer in plan_for(policy).quantized}


CONVS = {name for name in SHAPES if "resnets" in name}
FF = {name for name in SHAPES if ".ff.net." in name}
QK = {name for name in SHAPES if "to_q" in name or "to_k" in name}
OUT = {name for name in SHAPES if "to_out" in name}


@pytest.mark.parametrize(
    ("level", "expected"), [(1, CONVS), (2, CONVS | FF), (2.5, CONVS | FF | QK), (3, CONVS | FF | QK | OUT)]
)
def test_quant_levels(level: float, expected: set[str]) -> None:
    assert quantized_names(Policy(quant_level=level)) == expected


def test_every_float_layer_says_why() -> None:
    reasons = {layer.name: layer.reason for layer in plan_for(Policy(quant_level=2))}
    assert reasons["conv_in.weight"] == "first layer"
    assert reasons["narrow.weight"] == "MatMul of 16 x 4: fewer than 8 inputs or outputs"
    assert reasons[f"{BLOCK}.attn1.to_q.weight"] == (
        "query, key or value projection: quantized from --quant-level 2.5 on"
    )
    assert reasons[f"{BLOCK}.attn1.to_out.0.weight"] == "Linear: quantized from --quant-level 3 on"


def test_structure_comes_first_names_second() -> None:
    site = LayerSite("time_emb_proj.weight", "Gemm", (64, 64), "a", "b", 0)
    assert decide(site, Policy()) == (
        False,
        "the name holds 'time_emb_proj', which NVIDIA's recipe leaves in float",
    )
    assert decide(replace(site, role="time", note="reached from timestep only"), Policy()) == (
        False,
        "reached from timestep only",
    )


def test_include_overrides_every_default_and_exclude_overrides_include() -> None:
    include = Policy(quant_level=1, include=("conv_in", "narrow", "to_q"))
    assert quantized_names(include) == CONVS | {"conv_in.weight", "narrow.weight", f"{BLOCK}.attn1.to_q.weight"}
    assert plan_for(include)["conv_in.weight"].reason == "--include 'conv_in'"
    both = plan_for(replace(include, exclude=("conv_in|shortcut",)))
    assert both["conv_in.weight"].reason == "--exclude 'conv_in|shortcut'"
    assert "down_blocks.0.resnets.0.conv_shortcut.weight" not in {layer.name for layer in both.quantized}


@pytest.mark.parametrize("option", ["exclude", "include"])
def test_a_pattern_that_matches_nothing_is_refused(option: str) -> None:
    with pytest.raises(PlanError, match=rf"--{option} 'mid_block': matches none of 10 weights"):
        plan_for(Policy(**{option: ("conv1", "mid_block")}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_bits": 3}, "weights of 3 bits, expected 4 to 8"),
        ({"act_bits": 16}, "activations of 16 bits"),
        ({"quant_level": 4}, "quant level: 4, expected one of 0, 1, 2, 2.5, 3"),
        ({"weight_method": "max"}, "expected one of minmax, mse, lp2.4"),
        ({"act_method": "kl"}, "expected one of minmax, percentile, mse"),
        ({"asymmetric": "on"}, "asymmetric: 'on', expected one of auto, off, all"),
        ({"percentile": 0.9}, "percentile: 0.9, expected 50 to 100"),
        ({"exclude": ("(",)}, "not a regular expression"),
    ],
)
def test_a_policy_is_checked_when_built(options: dict, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Policy(**options)


def test_policy_of_a_format() -> None:
    policy = Policy.for_format("w4a6", quant_level=1)
    assert (policy.weight_bits, policy.act_bits, policy.quant_level, policy.format) == (4, 6, 1, "w4a6")
    with pytest.raises(PlanError, match="expected wNaM"):
        Policy.for_format("int8")


@pytest.mark.parametrize("format", ["w8a8", "w4a8", "w4a6"])
@pytest.mark.parametrize("weight_method", ["minmax", "mse", "lp2.4"])
@pytest.mark.parametrize("act_method", ["minmax", "percentile", "mse"])
def test_recorded_numbers_are_those_of_the_grids(format: str, weight_method: str, act_method: str) -> None:
    plan = plan_for(Policy.for_format(format, weight_method=weight_method, act_method=act_method, percentile=99.9))
    w = weights()
    for layer in plan.quantized:
        measured = sqnr_db(w[layer.name], fake_quantize(w[layer.name], layer.weight_grid))
        assert layer.sqnr_db == round(measured, 2)
        assert len(layer.weight_scale) == layer.shape[layer.out_axis]
        assert layer.act_grid.scale == np.float32(layer.act_scale)
        assert layer.act_method == {"percentile": "percentile 99.9"}.get(act_method, act_method)
        weight_zero = np.zeros(len(layer.weight_scale)) if layer.weight_zero is None else np.array(layer.weight_zero)
        w_limits, a_limits = {
            "w8a8": ((-127, 127), (-128, 127)),
            "w4a8": ((-8, 7), (-128, 127)),
            "w4a6": ((-8, 7), (-32, 31)),
        }[format]
        np.testing.assert_array_equal(layer.weight_grid.qmin, w_limits[0] - weight_zero)
        np.testing.assert_array_equal(layer.weight_grid.qmax, w_limits[1] - weight_zero)
        assert (layer.act_grid.qmin, layer.act_grid.qmax) == tuple(end - layer.act_zero for end in a_limits)
        assert format == "w4a6" or layer.act_zero == 0
        assert (format == "w8a8") == (layer.weight_zero is None)
    assert all(layer.sqnr_db is None and layer.act_scale is None for layer in plan if not layer.quantized)


def test_consumers_of_one_edge_share_one_grid() -> None:
    plan = plan_for()
    to_q, to_k = plan.edges[QKV_EDGE]
    assert (to_q.act_scale, to_q.act_bits) == (to_k.act_scale, to_k.act_bits)
    assert to_q.weight_scale != to_k.weight_scale
    assert set(plan.edges) == {layer.input for layer in plan.quantized}


@pytest.mark.parametrize("act_method", ["minmax", "percentile", "mse"])
def test_asymmetric_grids_are_taken_where_their_error_is_lower(act_method: str) -> None:
    """One-sided tensors and channels take them, even ones do not; "off" is the symmetric plan."""
    silu, both = "down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv_shortcut.weight"
    x = np.random.default_rng(2).standard_normal((2, 16, 8, 8)) * 3
    even = np.concatenate([x, -x])
    seen = stats() | {f"{silu}.in": TensorStats.of(x / (1 + np.exp(-x)), "x"), f"{both}.in": TensorStats.of(even, "y")}
    w = weights()
    w[silu][3] = np.abs(w[silu][3])
    w[silu][5] = np.where(np.arange(9).reshape(3, 3) % 2, 1.0, -1.0) * 0.5
    policy = Policy.for_format("w4a4", act_method=act_method)
    found, off = (plan_for(p, weights=w, stats=seen) for p in (policy, replace(policy, asymmetric="off")))
    assert found[silu].act_zero < -4 and found[silu].act_sqnr_db > off[silu].act_sqnr_db + 2
    assert found[both].act_sqnr_db >= off[both].act_sqnr_db and abs(found[both].act_zero) <= 1
    assert found[silu].weight_zero[3] == -8 and found[silu].weight_zero[5] == 0
    assert all(one.sqnr_db >= other.sqnr_db for one, other in zip(found.quantized, off.quantized, strict=True))
    assert {layer.act_zero for layer in off.quantized} == {0} and {layer.weight_zero for layer in off} == {None}


def test_eight_bit_activations_are_asymmetric_on_request_where_that_pays() -> None:
    silu, both = "down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv_shortcut.weight"
    x = np.random.default_rng(2).standard_normal((2, 16, 8, 8)) * 3
    seen = stats() | {f"{silu}.in": TensorStats.of(x / (1 + np.exp(-x)), "x"), f"{both}.in": TensorStats.of(x, "y")}
    auto, everything = (plan_for(Policy(asymmetric=mode), stats=seen) for mode in ("auto", "all"))
    assert {layer.act_zero for layer in auto.quantized} == {0}
    assert everything[silu].act_zero < -100 and not everything[silu].act_grid.fits_int8
    assert everything[silu].act_sqnr_db > auto[silu].act_sqnr_db + 4
    assert everything[both] == auto[both]  # a normal distribution gains next to nothing
    assert {layer.weight_zero for layer in everything} == {None}


def test_a_plan_without_zero_points_is_written_as_before() -> None:
    """The field came later: old readers refuse fields that they do not know, and plans are known by their hash."""
    symmetric = plan_for(Policy.for_format("w4a4", asymmetric="off"))
    assert "weight_zero" not in symmetric.dumps() and "weight_zero" in plan_for(Policy.for_format("w4a4")).dumps()


def test_output_range_is_recorded_where_it_was_observed() -> None:
    seen = stats()
    name = "down_blocks.0.resnets.0.conv1.weight"
    plan = plan_for(Policy(act_method="minmax"), stats=seen)
    assert plan[name].output_amax == float32_text(seen[f"{name}.out"].amax)
    del seen[f"{name}.out"]
    assert plan_for(stats=seen)[name].output_amax is None


def test_an_input_that_is_always_zero_stays_float() -> None:
    name = "down_blocks.0.resnets.0.conv1.weight"
    seen = stats() | {f"{name}.in": TensorStats.of(np.zeros((1, 16, 2, 2)), "x")}
    assert plan_for(stats=seen)[name].reason == "its input was zero throughout calibration"


def test_exact_layers_have_no_sqnr_and_the_file_stays_json() -> None:
    name = "down_blocks.0.resnets.0.conv1.weight"
    plan = plan_for(weights=weights() | {name: np.zeros(SHAPES[name][1], np.float32)})
    assert plan[name].quantized and plan[name].sqnr_db is None
    json.loads(plan.dumps(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_faults_of_the_checkpoint_are_named() -> None:
    name = "down_blocks.0.resnets.0.conv1.weight"
    damaged = weights()
    damaged[name][3, 2, 1, 1] = np.nan
    with pytest.raises(PlanError, match=r"resnets\.0\.conv1\.weight: 1 of 2304 weights are not finite"):
        plan_for(weights=damaged)
    with pytest.raises(PlanError, match=r"conv1\.weight: shape \(1, 1\), the graph expects \(16, 16, 3, 3\)"):
        plan_for(weights=weights() | {name: np.ones((1, 1), np.float32)})
    absent = weights()
    del absent[name]
    with pytest.raises(PlanError, match="the checkpoint has no such array"):
        plan_for(weights=absent)


def test_an_edge_that_was_not_calibrated_is_refused() -> None:
    seen = stats()
    del seen[QKV_EDGE]
    with pytest.raises(PlanError, match=r"to_q\.weight: its input 'tokens' was not calibrated"):
        plan_for(stats=seen)


def test_a_plan_without_coverage_is_refused() -> None:
    with pytest.raises(PlanError, match=r"none of 10 weighted layers would be quantized \(--exclude '\.'\)"):
        plan_for(Policy(exclude=(".",)))
    with pytest.raises(PlanError, match=r"none of 0 weighted layers .*the graph has none"):
        make_plan([], {}, {}, Policy())


def test_a_weight_that_feeds_two_ops_is_refused() -> None:
    site = sites()[2]
    with pytest.raises(PlanError, match="feed more than one op"):
        make_plan([site, replace(site, output="elsewhere")], weights(), stats(), Policy())


def test_the_file_round_trips_exactly() -> None:
    plan = plan_for(Policy.for_format("w4a6"))
    assert any(layer.weight_zero for layer in plan) and any(layer.act_zero for layer in plan)
    text = plan.dumps()
    back = QuantPlan.from_json(json.loads(text))
    assert back == plan and back.dumps() == text and back.sha256 == plan.sha256
    data = json.loads(text)
    assert data["schema"] == 1 and data["format"] == "w4a6"
    assert [layer["name"] for layer in data["layers"]] == list(SHAPES)
    assert text.count("\n") == len(SHAPES) + 2  # one layer a line


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_scales_keep_their_float32_bits_and_are_written_short(scale: float) -> None:
    text = json.dumps(float32_text(scale))
    assert np.float32(json.loads(text)) == np.float32(scale)
    assert len(Decimal(text).normalize().as_tuple().digits) <= 9  # nine digits identify a float32


def test_files_of_another_version_are_refused() -> None:
    data = json.loads(plan_for().dumps())
    with pytest.raises(PlanError, match="schema 2, this version reads 1"):
        QuantPlan.from_json(data | {"schema": 2})
    with pytest.raises(PlanError, match=r"'conv_in\.weight': unknown fields \['colour'\]"):
        QuantPlan.from_json(data | {"layers": [data["layers"][0] | {"colour": 1}]})
    with pytest.raises(PlanError, match=r"incomplete \(.*'reason'"):
        QuantPlan.from_json(data | {"layers": [{k: v for k, v in data["layers"][0].items() if k != "reason"}]})
    with pytest.raises(PlanError, match="no format or no list of layers"):
        QuantPlan.from_json({"schema": 1, "format": "w8a8"})

"""Weights alone: which block a layer gets, the grids of blocks, what the plan says of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qncd_deploy.errors import PlanError
from qncd_deploy.quant.decide import decide, make_plan
from qncd_deploy.quant.grid import dequantize, fake_quantize, quantize
from qncd_deploy.quant.plan import LayerSite, QuantPlan
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.ranges import sqnr_db
from qncd_deploy.quant.weight_only import LEAST_SHARE, block_for, weight_only_grid

W4A16 = Policy.for_format("w4a16")


def site(op: str, *shape: int, out_axis: int = 1, name: str = "w") -> LayerSite:
    return LayerSite(name, op, shape, f"{name}.in", f"{name}.out", out_axis)


def gaussian(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_the_policy_of_the_format() -> None:
    assert (W4A16.weight_bits, W4A16.act_bits, W4A16.format) == (4, None, "w4a16")
    assert W4A16.weights_only and not Policy().weights_only
    with pytest.raises(PlanError, match=r"block size: 48, expected one of 32, 64, 128"):
        replace(W4A16, block_size=48)
    with pytest.raises(PlanError, match=r"weights of 2 bits, expected 4 to 8"):
        Policy.for_format("w2a16")


@pytest.mark.parametrize(
    ("where", "wanted", "block", "words"),
    [
        (site("MatMul", 256, 8), 128, 128, ""),
        (site("MatMul", 128, 8), 128, 64, "in blocks of 64, since its 128 inputs are not several blocks of 128"),
        (site("Gemm", 8, 192, out_axis=0), 64, 64, ""),
        (site("MatMul", 192, 8), 128, 64, "in blocks of 64, since its 192 inputs are not several blocks of 128"),
        (site("MatMul", 96, 8), 128, 32, "in blocks of 32, since its 96 inputs are not several blocks of 128"),
        (
            site("MatMul", 40, 64),
            64,
            None,
            "in 8 bits per output channel, since its 40 inputs are not several blocks of 64 or 32",
        ),
        (site("Conv", 64, 64, 3, 3, out_axis=0), 64, None, ""),
    ],
)
def test_a_block_that_does_not_divide_falls_back_and_says_so(where, wanted, block, words) -> None:
    assert block_for(where, wanted) == (block, words)
    policy = replace(W4A16, block_size=wanted)
    kind = "convolution" if where.op == "Conv" else "Linear"
    assert decide(where, policy) == (True, f"{kind}; {words}" if words else kind)
    (layer,) = make_plan([where], {"w": gaussian(*where.shape)}, {}, policy)
    assert (layer.block_size, layer.weight_bits, layer.act_bits) == (block, 4 if block else 8, None)


@pytest.mark.parametrize(("op", "shape", "out_axis"), [("MatMul", (128, 5), 1), ("Gemm", (5, 128), 0)])
def test_every_block_is_quantized_on_its_own(op, shape, out_axis) -> None:
    """The same numbers, block by block, as the block twice below itself gives."""
    weight, policy = gaussian(*shape), replace(W4A16, block_size=32)
    grid, bits = weight_only_grid(site(op, *shape, out_axis=out_axis), weight, policy)
    assert bits == 4 and grid.scale.shape == ((4, 5) if out_axis else (5, 4)) and grid.axis == 1 - out_axis
    found = fake_quantize(weight, grid)
    inputs_last = np.moveaxis(weight, out_axis, 0).reshape(5, 4, 32)
    for i in range(5):
        for j in range(4):
            twice = np.tile(inputs_last[i, j], 2)[:, None]
            alone, _ = weight_only_grid(site("MatMul", 64, 1), twice, policy)
            expected = fake_quantize(twice, alone)[:32, 0]
            np.testing.assert_array_equal(np.moveaxis(found, out_axis, 0).reshape(5, 4, 32)[i, j], expected)


def test_integers_are_four_bits_and_the_error_is_least() -> None:
    weight = gaussian(128, 16)
    grid, _ = weight_only_grid(site("MatMul", 128, 16), weight, W4A16)
    q = quantize(weight, grid)
    assert q.min() >= -8 and q.max() <= 7
    np.testing.assert_array_equal(dequantize(q, grid), q * np.repeat(grid.scale, 64, axis=0))
    error = np.square(weight - fake_quantize(weight, grid)).reshape(2, 64, 16).sum(axis=1)
    largest = np.abs(weight).reshape(2, 64, 16).max(axis=1)
    for shrink in (1.0, 0.9, 0.8, 0.7):  # candidates of the search: none of them is better
        tried = replace(grid, scale=(shrink * largest / 7).astype(np.float32))
        others = np.square(weight - fake_quantize(weight, tried)).reshape(2, 64, 16).sum(axis=1)
        assert (error <= others * (1 + 1e-5)).all()


@given(st.integers(-60, 60), st.integers(0, 3))
def test_scales_of_one_channel_fit_into_float16_together(exponent: int, faint: int) -> None:
    """However faint a block is, half of LEAST_SHARE of the largest scale is the most that it is wrong by."""
    weight = gaussian(128, 4)
    weight[32 * faint : 32 * (faint + 1)] *= np.float32(2.0**-40)
    weight *= np.float32(2.0**exponent)
    weight[:, 3] = 0
    grid, _ = weight_only_grid(site("MatMul", 128, 4), weight, replace(W4A16, block_size=32))
    assert (grid.scale[:, 3] == 1).all()
    assert (grid.scale[:, :3] >= np.float32(LEAST_SHARE) * grid.scale[:, :3].max(axis=0)).all()
    error = np.abs(weight - fake_quantize(weight, grid))[32 * faint : 32 * (faint + 1), :3]
    assert (error <= LEAST_SHARE / 2 * grid.scale[:, :3].max(axis=0)).all()


def test_the_plan_keeps_every_scale_and_has_no_activations(tmp_path) -> None:
    sites = [site("Conv", 8, 16, 3, 3, out_axis=0, name="c"), site("MatMul", 128, 8, name="m")]
    weights = {each.name: gaussian(*each.shape) for each in sites}
    plan = make_plan(sites, weights, {}, replace(W4A16, block_size=32))
    assert plan.format == "w4a16" and plan.edges == {} and plan.blocked
    back = QuantPlan.from_json(json.loads(plan.dumps()))
    assert back == plan and back.sha256 == plan.sha256
    conv, product = json.loads(plan.dumps())["layers"]
    assert conv["act_bits"] is product["act_bits"] is product["act_scale"] is None
    assert (conv["weight_bits"], len(conv["weight_scale"]), "block_size" in conv) == (8, 8, False)
    assert (product["weight_bits"], len(product["weight_scale"]), product["block_size"]) == (4, 4 * 8, 32)
    for layer in back:
        approximation = fake_quantize(weights[layer.name], layer.weight_grid)
        assert layer.sqnr_db == round(sqnr_db(weights[layer.name], approximation), 2)

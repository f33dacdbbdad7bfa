"""Reconstruction lowers what it says it lowers and keeps what does not gain, by either preset, on any device."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from export_helpers import instrument, minmax_plan, parsed, relative_rms, run, small_network  # noqa: E402
from learning import INPUTS, QUICK, learned, output, planned, rows, statistics  # noqa: E402

from qncd_deploy.export.blocks import find_blocks  # noqa: E402
from qncd_deploy.files import canonical_json  # noqa: E402
from qncd_deploy.quant.grid import dequantize, fake_quantize, quantize  # noqa: E402
from qncd_deploy.quant.plan import float32_text  # noqa: E402
from qncd_deploy.quant.rounding import LearnedStep  # noqa: E402
from qncd_deploy.reconstruct.learn import QuantizedBlock  # noqa: E402
from qncd_deploy.reconstruct.preset import PAPER, Preset  # noqa: E402


def test_the_network_is_closer_on_rows_that_nothing_was_learned_from(tmp_path: Path) -> None:
    model, feeds = small_network(), rows()
    plan = planned(model, feeds)
    found = learned(tmp_path)
    assert [outcome.kept for outcome in found.outcomes.values()] == [True] * 3
    fresh = rows(64, seed=6)
    exact = run(model, fresh)["y"]
    stats = statistics(model, plan, feeds)
    before = relative_rms(output(model, plan, fresh), exact)
    after = relative_rms(output(found.fold(model), found.revise(plan, model, stats), fresh), exact)
    assert after < 0.8 * before


def test_learned_weights_are_points_of_their_grids_next_to_the_float_ones(tmp_path: Path) -> None:
    model, feeds = small_network(), rows()
    plan, found = planned(model, feeds), learned(tmp_path)
    moved = 0
    for name, weight in found.weights.items():
        grid, exact = plan[name].weight_grid, model.graph.initializers[name].const_value.numpy()
        np.testing.assert_array_equal(fake_quantize(weight, grid), weight)
        nearest = quantize(exact, grid).astype(int)
        difference = quantize(weight, grid).astype(int) - nearest
        assert np.abs(difference).max() <= 1
        moved += np.count_nonzero(difference)
    assert moved


def test_the_plan_keeps_everything_but_what_was_learned(tmp_path: Path) -> None:
    model, feeds = small_network(), rows()
    plan, found = planned(model, feeds), learned(tmp_path)
    revised = found.revise(plan, model, statistics(model, plan, feeds))
    for before, after in zip(plan, revised, strict=True):
        learned_fields = {"act_scale", "act_method", "act_sqnr_db", "sqnr_db", "weight_method"}
        kept = set(before.to_json()) - learned_fields
        assert {key: before.to_json()[key] for key in kept} == {key: after.to_json()[key] for key in kept}
        assert after.weight_method.endswith("offset") and after.act_method.endswith("learned")
        weight = model.graph.initializers[after.name].const_value.numpy().astype(np.float64)
        loss = 10 * np.log10(np.square(weight).sum() / np.square(weight - found.weights[after.name]).sum())
        assert after.sqnr_db == pytest.approx(loss, abs=0.006)  # two decimals
    assert any(revised[name].act_scale != plan[name].act_scale for name in found.weights)


ONE = """<ir_version: 8, opset_import: ["": 18]>
    one (float[N,4] x) => (float[N,1] y) { z = MatMul (x, w) y = Relu (z) }"""


@pytest.mark.parametrize("kind", ["offset", "adaround"])
def test_of_a_tiny_layer_it_finds_the_best_of_all_roundings(kind: str, tmp_path: Path) -> None:
    """Correlated inputs, four weights: all 16 ways to round them are tried by hand."""
    rng = np.random.default_rng(3)
    mix = np.eye(4) + 0.9
    x = (rng.standard_normal((256, 4)) @ mix).astype(np.float32)
    w = np.array([[0.7], [0.346], [0.24], [0.134]], np.float32)  # steps of 0.1: three errors that add up
    model = parsed(ONE, {"w": w})
    plan = minmax_plan(model, {"x": x}, weight_bits=4, inputs=INPUTS, roles=("body", "first", "last"))
    grid, seen = plan["w"].weight_grid, fake_quantize(x, plan["w"].act_grid).astype(np.float64)
    floor = np.floor(w / grid.scale)
    tried = {
        ups: np.square(seen @ ((floor + np.array(ups)[:, None]) * grid.scale) - x @ w).mean()
        for ups in itertools.product((0, 1), repeat=4)
    }
    nearest = tuple((quantize(w, grid) - floor).astype(int).ravel())
    best = min(tried, key=tried.__getitem__)
    assert best != nearest and tried[best] < 0.5 * tried[nearest]
    soft = replace(PAPER, iterations=1000, batch=32, rate=2e-2, steps_iterations=0, steps_rate=0.0, penalty=1e-2)
    hard = replace(QUICK, iterations=300, steps_rate=0.0)
    preset = soft if kind == "adaround" else hard
    found = learned(tmp_path, preset, model=model, feeds={"x": x}, plan=plan)
    ups = tuple((quantize(found.weights["w"], grid) - floor).astype(int).ravel())
    assert tried[ups] <= 1.2 * tried[best]  # other rows decide a little differently


def test_both_presets_run_to_their_end(tmp_path: Path) -> None:
    """The published schedule in short: soft rounding to hard, then the steps on their own."""
    paper = replace(PAPER, iterations=150, steps_iterations=30, batch=8, rate=2e-2)
    found = learned(tmp_path, paper)
    assert {outcome.iterations for outcome in found.outcomes.values()} == {150}
    assert all(outcome.kept for outcome in found.outcomes.values())
    model, feeds = small_network(), rows()
    revised = found.revise(planned(model, feeds), model, statistics(model, planned(model, feeds), feeds))
    assert all("adaround" in layer.weight_method and "learned" in layer.act_method for layer in revised)


FAINT = """<ir_version: 8, opset_import: ["": 18]>
    faint (float[N,8,4,4] x) => (float[N,8,4,4] y)
    { a = Conv (x, first) b = Mul (a, gain) c = Conv (b, second) y = Add (a, c) }"""


def faint(gain: float):
    """A residual block that its body adds little to, or nothing."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((8, 8, 1, 1)).astype(np.float32) for name in ("first", "second")}
    return parsed(FAINT, {**arrays, "gain": np.float32(gain)})


@pytest.mark.parametrize(
    "preset",
    [replace(PAPER, iterations=2, steps_iterations=20, batch=8), replace(QUICK, iterations=20, steps_rate=2.0)],
    ids=["apart", "together"],
)
def test_steps_smaller_than_one_update_stay_above_zero(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They start ten times too wide, so that learning makes them smaller, and one update is more than all of a step."""
    model, feeds = faint(5e-5), rows()
    plan = planned(model, feeds)
    plan = replace(plan, layers=tuple(replace(each, act_scale=float32_text(10 * each.act_scale)) for each in plan))
    assert plan["second"].act_scale < PAPER.steps_rate
    used, original = [], LearnedStep.forward

    def forward(self, x):
        used.append(self.step.item())
        return original(self, x)

    monkeypatch.setattr(LearnedStep, "forward", forward)
    learned(tmp_path, preset, model=model, feeds=feeds, plan=plan)
    assert min(used) > 0 and np.min(used) < 0.2 * plan["second"].act_scale


def test_published_weights_are_learned_before_activations_are_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning, original = [], LearnedStep.forward

    def forward(self, x):
        learning.append(torch.is_grad_enabled())
        return original(self, x)

    monkeypatch.setattr(LearnedStep, "forward", forward)
    learned(tmp_path, replace(PAPER, iterations=9, steps_iterations=2, batch=8))
    assert learning.count(True) == 2 * 5  # every layer's input, in the iterations of the steps alone
    learning.clear()
    learned(tmp_path, replace(QUICK, iterations=9, patience=0), work=tmp_path / "fast")
    assert learning.count(True) == 9 * 5


def test_what_has_no_relative_error_is_no_number_in_the_manifest(tmp_path: Path) -> None:
    """A block of zeros has nothing to compare its error with, and JSON knows no infinity."""
    model, feeds = faint(1.0), rows()
    plan = planned(model, feeds)
    model.graph.initializers["first"].const_value = ir.tensor(np.zeros((8, 8, 1, 1), np.float32), name="first")
    found = learned(tmp_path, model=model, feeds=feeds, plan=plan).to_json()
    assert [block["error"] for block in found["blocks"].values()] == [[None, None], [None, None]]
    canonical_json(found)


def test_what_diverges_stays_at_the_nearest_level(tmp_path: Path) -> None:
    wild = replace(QUICK, rate=1e3, steps_rate=1e3, patience=0, decay=False)
    found = learned(tmp_path, wild)
    assert not any(outcome.kept for outcome in found.outcomes.values())
    assert found.weights == {} and found.steps == {}


def test_it_stops_where_the_held_out_error_no_longer_falls(tmp_path: Path) -> None:
    still = replace(QUICK, iterations=100, rate=0.0, steps_rate=0.0, patience=2)
    found = learned(tmp_path, still)
    assert {outcome.iterations for outcome in found.outcomes.values()} == {20}  # two looks, ten iterations apart


def test_work_is_bounded_by_multiplications_not_by_the_clock(tmp_path: Path) -> None:
    # conv: 8 * 8 * 9 weights over 16 pixels, 3 passes, 8 rows: 221,184 multiplications per iteration
    found = learned(tmp_path, replace(QUICK, most_macs=221_184 * 7.5, patience=0))
    assert found.outcomes["conv"].iterations == 7


def test_dequantized_integers_are_the_weights_to_the_bit(tmp_path: Path) -> None:
    model, feeds = small_network(), rows()
    plan, found = planned(model, feeds), learned(tmp_path)
    for name, weight in found.weights.items():
        grid = plan[name].weight_grid
        np.testing.assert_array_equal(dequantize(quantize(weight, grid), grid), weight)


def test_blocks_learn_on_another_device() -> None:
    """torch's device without memory stands for a GPU: it refuses operands of one op on two devices."""
    away = torch.device("meta")
    model, feeds = small_network(), rows(8)
    plan = planned(model, feeds)
    names = [output.name for node in model.graph for output in node.outputs]
    arrays = {**feeds, **run(instrument(model, names), feeds)}
    shapes = {name: array.shape for name, array in arrays.items()}
    for block in find_blocks(model, INPUTS, {layer.name for layer in plan.quantized}):
        layers = {name: plan[name] for name in block.layers}
        quantized = QuantizedBlock(block, layers, "offset", device=away)
        y = quantized({name: torch.empty(shapes[name], device=away) for name in block.inputs})
        y.square().mean().backward()
        assert y.device == away and y.shape == shapes[block.output]
        assert all(rounding.v.grad.device == away for rounding in quantized.roundings.values())

"""Reconstruction lowers what it says it lowers, keeps what does not gain, and a killed run ends with the same bytes."""

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

from qncd_deploy.calib.observers import TensorStats  # noqa: E402
from qncd_deploy.calib.trajectories import CalibSet  # noqa: E402
from qncd_deploy.errors import CalibrationError, ExportError  # noqa: E402
from qncd_deploy.export.blocks import find_blocks  # noqa: E402
from qncd_deploy.export.graph import Inputs  # noqa: E402
from qncd_deploy.export.passes.insert_qdq import InsertQDQ  # noqa: E402
from qncd_deploy.files import canonical_json  # noqa: E402
from qncd_deploy.quant.grid import dequantize, fake_quantize, quantize  # noqa: E402
from qncd_deploy.quant.plan import float32_text  # noqa: E402
from qncd_deploy.quant.rounding import LearnedStep  # noqa: E402
from qncd_deploy.reconstruct import network  # noqa: E402
from qncd_deploy.reconstruct.frontier import Filler  # noqa: E402
from qncd_deploy.reconstruct.learn import QuantizedBlock  # noqa: E402
from qncd_deploy.reconstruct.network import Reconstruction, reconstruct  # noqa: E402
from qncd_deploy.reconstruct.preset import FAST, PAPER, Preset  # noqa: E402

INPUTS = Inputs("x", None)
QUICK = replace(FAST, iterations=60, batch=8, rate=2e-2)


def rows(count: int = 96, seed: int = 5) -> dict[str, np.ndarray]:
    """Correlated channels, as real ones are: of independent inputs nearest rounding is the best there is."""
    white = np.random.default_rng(seed).standard_normal((count, 8, 4, 4))
    return {"x": (white + 2 * white.mean(axis=1, keepdims=True) * 8**0.5).astype(np.float32)}


def planned(model, feeds, bits: int = 4, act_bits: int = 8):
    roles = ("body", "first", "last")
    return minmax_plan(model, feeds, weight_bits=bits, act_bits=act_bits, inputs=INPUTS, roles=roles)


def learned(tmp_path: Path, preset: Preset = QUICK, **given) -> Reconstruction:
    model = given.pop("model", None) or small_network()
    feeds = given.pop("feeds", None) or rows()
    plan = given.pop("plan", None) or planned(model, feeds)
    return reconstruct(
        model,
        INPUTS,
        plan,
        CalibSet(feeds, "test", given.pop("picture", None)),
        preset=preset,
        seed=given.pop("seed", 0),
        work=given.pop("work", tmp_path / "work"),
        scratch=tmp_path / "scratch",
        tick=given.pop("tick", lambda done, total: None),
        **given,
    )


def output(model, plan, feeds) -> np.ndarray:
    master = model.clone()
    InsertQDQ(plan)(master)
    return run(master, feeds)["y"]


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


def statistics(model, plan, feeds) -> dict[str, TensorStats]:
    values = {**feeds, **run(instrument(model, plan.edges), feeds)}
    return {edge: TensorStats.of(values[edge], edge) for edge in plan.edges}


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


def test_a_killed_run_goes_on_with_the_same_result(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    whole = learned(tmp_path, work=tmp_path / "whole")
    with pytest.raises(Killed):
        learned(tmp_path, tick=kill)
    (folder,) = (tmp_path / "work").iterdir()
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(times) == 2
    resumed = learned(tmp_path)
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], weight)
    assert resumed.steps == whole.steps and resumed.outcomes == whole.outcomes
    learned(tmp_path, resume=False)
    assert all((folder / name).stat().st_mtime_ns > time for name, time in times.items())


def test_another_seed_or_another_weight_is_not_taken_for_the_same(tmp_path: Path) -> None:
    learned(tmp_path)
    learned(tmp_path, seed=1)
    model = small_network()
    bias = model.graph.initializers["conv_bias"]
    bias.const_value = type(bias.const_value)(bias.const_value.numpy() + 1, name="conv_bias")
    learned(tmp_path, model=model)
    assert len(list((tmp_path / "work").iterdir())) == 3


def test_fewer_rows_than_can_be_judged_by_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"7 calibration rows, expected at least 8.*--recon off"):
        learned(tmp_path, feeds=rows(7))


def test_rows_are_cut_to_what_the_disk_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # At its widest the graph keeps two tensors of 128 values, what a block reads and what it makes, in two copies.
    monkeypatch.setattr(network, "DISK_BYTES", 70 * 2 * 4 * 2 * 128)
    sizes = []
    original = Filler.add

    def add(self, batch) -> None:
        sizes.append(self._count)
        original(self, batch)

    monkeypatch.setattr(Filler, "add", add)
    learned(tmp_path)
    assert set(sizes) == {64}  # whole batches of 8 of the 70 rows that fit


def test_a_step_shared_with_another_block_stays(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18]>
        shared (float[N,8,4,4] x) => (float[N,8,4,4] y)
        { a = Relu (x) b = Conv (a, left) c = Conv (a, right) y = Mul (b, c) }"""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((8, 8, 1, 1)).astype(np.float32) for name in ("left", "right")}
    model, feeds = parsed(text, arrays), rows()
    plan = planned(model, feeds)
    found = learned(tmp_path, model=model, feeds=feeds, plan=plan)
    assert set(found.weights) == {"left", "right"}
    assert found.steps == {}
    paper = replace(PAPER, iterations=150, steps_iterations=5, batch=8, rate=2e-2)  # has no step to learn on its own
    assert learned(tmp_path, paper, model=model, feeds=feeds, plan=plan).steps == {}


def test_shapes_that_are_computed_at_run_time_are_those_of_a_batch(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18]>
        shaped (float[N,8,4,4] x) => (float[N,8,4,4] y)
        { a = Conv (x, first) s = Shape (a) b = Expand (bias, s) c = Add (a, b) y = Conv (c, second) }"""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((8, 8, 1, 1)).astype(np.float32) for name in ("first", "second")}
    model, feeds = parsed(text, {**arrays, "bias": rng.standard_normal((1, 8, 1, 1)).astype(np.float32)}), rows()
    found = learned(tmp_path, model=model, feeds=feeds, plan=planned(model, feeds))
    assert set(found.weights) == {"first", "second"}


FOLDED = """<ir_version: 8, opset_import: ["": 18]>
    folded (float[N,8,4,4] x) => (float[N,8,4,4] y)
    { a = Conv (x, first) b = Reshape (a, heads) c = Softmax <axis = -1> (b)
      d = Reshape (c, picture) y = Conv (d, second) }"""
PICTURE = np.array([-1, 8, 4, 4])


def convolutions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((8, 8, 1, 1)).astype(np.float32) for name in ("first", "second")}


def test_tensors_may_fold_heads_into_rows_between_two_blocks(tmp_path: Path) -> None:
    model, feeds = parsed(FOLDED, {**convolutions(), "heads": np.array([-1, 4, 16]), "picture": PICTURE}), rows()
    found = learned(tmp_path, model=model, feeds=feeds, plan=planned(model, feeds))
    assert set(found.outcomes) == {"first", "second"} and "first" in found.weights


def test_a_block_that_reads_folded_rows_is_refused(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18]>
        tokens (float[N,8,4,4] x) => (float[M,8] y)
        { a = Conv (x, first) b = Transpose <perm = [0, 2, 3, 1]> (a) c = Reshape (b, flat) y = Gemm (c, linear) }"""
    arrays = {"first": convolutions()["first"], "linear": convolutions()["second"][..., 0, 0]}
    model, feeds = parsed(text, {**arrays, "flat": np.array([-1, 8])}), rows()
    with pytest.raises(ExportError, match=r"c has shape \[128, 8\] for a batch of 8.*--recon off"):
        learned(tmp_path, model=model, feeds=feeds, plan=planned(model, feeds))


def test_the_pictures_that_judge_teach_nothing(tmp_path: Path) -> None:
    """What is learned depends on no row of a held-out picture, and the figures on them alone."""
    feeds = rows(96)
    picture = np.tile(np.arange(16), 6)
    strange = {"x": feeds["x"].copy()}
    strange["x"][np.isin(picture, (7, 15))] *= 0.5
    plan = planned(small_network(), feeds)
    once = replace(QUICK, patience=0)  # patience looks at the held-out rows
    found, others = (
        learned(tmp_path, once, feeds=each, plan=plan, picture=picture, work=tmp_path / name)
        for name, each in (("a", feeds), ("b", strange))
    )
    assert found.weights.keys() == others.weights.keys()
    for name, weight in found.weights.items():
        np.testing.assert_array_equal(weight, others.weights[name])
    assert found.outcomes["conv"].error_before != others.outcomes["conv"].error_before
    assert learned(tmp_path, feeds=rows(48), picture=np.repeat([0, 1], 24)).weights  # too few to hold one out


TIMED = """<ir_version: 8, opset_import: ["": 18]>
    timed (float[8] t, float[8,8,4,4] x) => (float[8,8,4,4] y)
    { a = Conv (x, first) b = Cos (t) c = Reshape (b, column) d = Add (a, c) y = Conv (d, second) }"""


def test_the_sample_says_how_many_rows_there_are_and_one_timestep_for_all_is_refused(tmp_path: Path) -> None:
    arrays = {**convolutions(), "column": np.array([-1, 1, 1, 1])}
    model, feeds = parsed(TIMED, arrays), {"t": np.linspace(0, 6, 96, dtype=np.float32), **rows()}
    first = {name: array[:8] for name, array in feeds.items()}
    plan = minmax_plan(model, first, weight_bits=4, inputs=INPUTS, roles=("body", "first", "last"))
    assert learned(tmp_path, model=model, feeds=feeds, plan=plan).weights
    for timed in ("float t, float[8", "float t, float[N"):
        single = parsed(TIMED.replace("float[8] t, float[8", timed), arrays)
        with pytest.raises(ExportError, match=r"input t is a single number for all rows.*--recon off"):
            learned(tmp_path, model=single, feeds=feeds, plan=plan)


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

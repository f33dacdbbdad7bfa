"""The walk through a network while rounding is learned: its rows, what lies between blocks, and where it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from export_helpers import minmax_plan, parsed, small_network  # noqa: E402
from learning import INPUTS, QUICK, learned, planned, rows  # noqa: E402

from qncd_deploy.errors import CalibrationError, ExportError  # noqa: E402
from qncd_deploy.reconstruct import network  # noqa: E402
from qncd_deploy.reconstruct.frontier import Filler  # noqa: E402
from qncd_deploy.reconstruct.preset import PAPER  # noqa: E402


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

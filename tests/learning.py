"""A small network whose rounding is learned, for the tests of reconstruction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from export_helpers import instrument, minmax_plan, run, small_network  # noqa: E402

from qncd_deploy.calib.observers import TensorStats  # noqa: E402
from qncd_deploy.calib.trajectories import CalibSet  # noqa: E402
from qncd_deploy.export.graph import Inputs  # noqa: E402
from qncd_deploy.export.passes.insert_qdq import InsertQDQ  # noqa: E402
from qncd_deploy.reconstruct.network import Reconstruction, reconstruct  # noqa: E402
from qncd_deploy.reconstruct.preset import FAST, Preset  # noqa: E402

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


def statistics(model, plan, feeds) -> dict[str, TensorStats]:
    values = {**feeds, **run(instrument(model, plan.edges), feeds)}
    return {edge: TensorStats.of(values[edge], edge) for edge in plan.edges}

"""Several engines behind one: which runs at which timestep, in the engine alone and in whole sampling loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qncd_deploy.bundle import ModelFacts
from qncd_deploy.correct.record import CorrectionTable, ScheduleKey, StepFix, identity_table
from qncd_deploy.engines.base import BaseEngine, Kernel
from qncd_deploy.engines.stepped import SteppedEngine
from qncd_deploy.errors import EngineError
from qncd_deploy.sampler import Network, Sampler
from qncd_deploy.schedule import SCHEDULERS, Schedule
from qncd_deploy.specs import TensorSpec
from qncd_deploy.steps import SamplerConfig, make_steps

SHAPE = (3, 2, 2)
SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
FLOORS = (600.0, 300.0, 0.0)


class Constant(BaseEngine):
    """Returns one number, and notes the timesteps that it was asked at."""

    def __init__(self, value: float, *, sizes: tuple[int, ...] = (), compiled: int | None = 7, dtype: str = "float32"):
        spec = TensorSpec("sample", "float32", ("batch", *SHAPE))
        super().__init__(
            "fake-f32", Path(f"net-{value:g}"), {"sample": spec, "t": TensorSpec("t", dtype, ("batch",))}, {"out": spec}
        )
        self.value, self._sizes, self._compiled = value, sizes, compiled
        self.asked: list[float] = []

    @property
    def row_sizes(self) -> tuple[int, ...]:
        return self._sizes

    def kernels(self, shapes: object) -> tuple[Kernel, ...]:
        return (Kernel("Conv", "i8", "vnni", 3), Kernel("Add", "f32", f"own {self.value:g}", 1))

    def compiled_bytes(self, shapes: object) -> int | None:
        return self._compiled

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.asked += feeds["t"].tolist()
        return {"out": np.full_like(feeds["sample"], self.value)}

    def _close(self) -> None: ...


def three(**options: object) -> tuple[SteppedEngine, list[Constant]]:
    parts = [Constant(value, **options) for value in (1.0, 2.0, 3.0)]
    return SteppedEngine(list(zip(FLOORS, parts, strict=True))), parts


def ask(engine: BaseEngine, *times: float, dtype: str = "float32") -> list[float]:
    """The first number of every row."""
    sample = np.zeros((len(times), *SHAPE), np.float32)
    return engine({"sample": sample, "t": np.array(times, dtype)})["out"][:, 0, 0, 0].tolist()


def test_the_timestep_chooses_and_a_floor_belongs_to_its_range() -> None:
    engine, _ = three()
    assert [ask(engine, t)[0] for t in (999, 600, 599.9, 300, 299.9, 0)] == [1, 1, 2, 2, 3, 3]
    whole, _ = three(dtype="int64")
    assert [ask(whole, t, dtype="int64")[0] for t in (600, 599, 300, 0)] == [1, 2, 2, 3]


def test_rows_may_have_different_timesteps() -> None:
    engine, parts = three()
    assert ask(engine, 10, 700, 300, 900, 0) == [3, 1, 2, 1, 3]
    assert [len(part.asked) for part in parts] == [5, 5, 5]
    assert ask(engine, 700, 10) == [1, 3] and len(parts[1].asked) == 5  # an engine that no row needs does not run


def test_a_floor_is_met_by_the_same_timestep_in_float32() -> None:
    """947.3684210526316 is fed as float32, which is 947.36841: below the floor unless that is rounded alike."""
    edge = 18000 / 19
    assert float(np.float32(edge)) < edge
    assert ask(SteppedEngine([(edge, Constant(1)), (0.0, Constant(2))]), edge) == [1]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_sampler_switches_at_the_timestep_of_every_call(scheduler: str) -> None:
    engine, parts = three()
    specs = tuple(parts[0].inputs.values())
    facts = ModelFacts("fake", specs, SHAPE, SHAPE, SCHEDULE.to_json(), None, 1.0, None)
    config = SamplerConfig(scheduler, 10, 0.0)
    key = ScheduleKey.of(SCHEDULE, config, guidance_scale=1.0, backend="fake-f32", plan_sha="0")
    network = Network(Path("bundle"), "00", facts, SCHEDULE, engine, None, None)
    sampler = Sampler(network, config=config, guidance_scale=1.0, table=identity_table(key))
    raw = [float(state.raw[0, 0, 0, 0]) for state in sampler.trajectory([0, 1])]
    times = [step.t for step in make_steps(SCHEDULE, config)]
    assert raw == [1.0 if t >= 600 else 2.0 if t >= 300 else 3.0 for t in times]
    assert {1.0, 2.0, 3.0} == set(raw)
    assert parts[0].asked == [np.float32(t) for t in times if t >= 600 for _ in range(2)]


def test_a_correction_that_moves_the_timestep_moves_the_choice() -> None:
    """The network is chosen by the timestep that it is fed: tables are fitted so, too."""
    engine, parts = three()
    specs = tuple(parts[0].inputs.values())
    facts = ModelFacts("fake", specs, SHAPE, SHAPE, SCHEDULE.to_json(), None, 1.0, None)
    config = SamplerConfig("ddim", 2, 0.0)  # at t = 501 and 1
    key = ScheduleKey.of(SCHEDULE, config, guidance_scale=1.0, backend="fake-f32", plan_sha="0")
    network = Network(Path("bundle"), "00", facts, SCHEDULE, engine, None, None)
    table = CorrectionTable("moved", key, (StepFix(t_model=620.0), StepFix()))
    sampler = Sampler(network, config=config, guidance_scale=1.0, table=table)
    assert [float(state.raw[0, 0, 0, 0]) for state in sampler.trajectory([0])] == [1.0, 3.0]


def test_what_is_told_of_it_is_of_all_parts() -> None:
    engine, parts = three()
    shapes = {"sample": (1, *SHAPE), "t": (1,)}
    assert Kernel("Conv", "i8", "vnni", 9) in engine.kernels(shapes) and len(engine.kernels(shapes)) == 4
    assert engine.compiled_bytes(shapes) == 21
    assert engine.graphs == tuple(part.path for part in parts)
    assert three(compiled=None)[0].compiled_bytes(shapes) is None
    assert three(sizes=(4, 8))[0].row_sizes == (4, 8)


def test_parts_compiled_for_different_rows_are_refused() -> None:
    engine = SteppedEngine([(5.0, Constant(1, sizes=(4,))), (0.0, Constant(2, sizes=(8,)))])
    with pytest.raises(EngineError, match=r"different numbers of rows \(net-1: \[4\], net-2: \[8\]\).*qncd build"):
        _ = engine.row_sizes


def test_closing_it_closes_all() -> None:
    engine, parts = three()
    engine.close()
    assert all(part._closed for part in parts)

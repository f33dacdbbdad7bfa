"""An engine that keeps its answers: what counts as the same question, whose the arrays are, and how many are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.engines.remembering import Answers, RememberingEngine, remembering
from qncd_deploy.errors import EngineError
from qncd_deploy.specs import TensorSpec

ROW_BYTES = 3 * 4


class Doubling(BaseEngine):
    """Twice its input, and how often it was asked."""

    def __init__(self, engine_id: str = "fake-f32") -> None:
        spec = TensorSpec("x", "float32", ("batch", 3))
        super().__init__(
            engine_id, Path("net.onnx"), {"x": spec, "t": TensorSpec("t", "int64", ("batch",))}, {"y": spec}
        )
        self.calls = 0
        self.closed = False

    @property
    def row_sizes(self) -> tuple[int, ...]:
        return (1, 4)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"y": feeds["x"] * 2 + feeds["t"][:, None].astype(np.float32)}

    def _close(self) -> None:
        self.closed = True


def feeds(value: float, t: int = 7, rows: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.full((rows, 3), value, np.float32), "t": np.full(rows, t)}


def test_the_same_inputs_are_answered_once_and_others_are_not_taken_for_them() -> None:
    engine = Doubling()
    kept = RememberingEngine(engine, Answers(), source="ab")
    questions = [feeds(1), feeds(1), feeds(2), feeds(1, t=8), feeds(1, rows=2), feeds(0), feeds(-0.0), feeds(1)]
    for asked in questions:
        np.testing.assert_array_equal(kept(asked)["y"], asked["x"] * 2 + asked["t"][:, None])
    assert engine.calls == len(questions) - 2  # zeros of either sign are told apart: a network may tell them, too


def test_what_is_returned_belongs_to_the_caller() -> None:
    kept = RememberingEngine(Doubling(), Answers(), source="ab")
    for _ in range(3):
        found = kept(feeds(1))["y"]
        np.testing.assert_array_equal(found, [[9, 9, 9]])
        found[:] = 0


def test_answers_are_shared_by_engines_of_one_network_and_by_no_others() -> None:
    answers, engines = Answers(), [Doubling(), Doubling(), Doubling("other-f32"), Doubling()]
    for engine, source in zip(engines, ("ab", "ab", "ab", "cd"), strict=True):
        RememberingEngine(engine, answers, source=source)(feeds(1))
    assert [engine.calls for engine in engines] == [1, 0, 1, 1]


def test_the_oldest_go_when_there_are_too_many() -> None:
    engine = Doubling()
    kept = RememberingEngine(engine, Answers(2 * ROW_BYTES), source="ab")
    for value in (1, 2, 3):
        kept(feeds(value))
    kept(feeds(3))
    kept(feeds(2))
    assert engine.calls == 3
    kept(feeds(1))
    assert engine.calls == 4
    kept(feeds(5, rows=9))  # more than there is room for
    kept(feeds(5, rows=9))
    assert engine.calls == 6


def test_it_is_the_engine_in_everything_else() -> None:
    engine = Doubling()
    kept = remembering(engine, Answers(), source="ab")
    assert isinstance(kept, RememberingEngine)
    assert (kept.engine_id, kept.path, kept.row_sizes) == (engine.engine_id, engine.path, (1, 4))
    assert kept.inputs == engine.inputs and kept.outputs == engine.outputs and kept.graphs == engine.graphs
    with pytest.raises(EngineError, match="x"):
        kept({"x": np.zeros((1, 4), np.float32), "t": np.zeros(1, np.int64)})
    kept.close()
    assert not engine.closed


def test_arrays_of_a_device_are_left_where_they_are() -> None:
    engine = Doubling()
    engine.arrays = object()  # type: ignore[assignment]
    assert remembering(engine, Answers(), source="ab") is engine

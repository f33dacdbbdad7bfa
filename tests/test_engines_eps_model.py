"""The adapter between engines and the loop: which input is which, padding to one batch size, dtypes, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.engines.eps_model import EngineModel, fixed_rows, in_groups, input_roles, input_shapes
from qncd_deploy.errors import EngineError
from qncd_deploy.specs import TensorSpec

SAMPLE = TensorSpec("sample", "float32", ("batch", 2, 3, 3))
TIME = TensorSpec("timestep", "float32", ("batch",))
TOKENS = TensorSpec("encoder_hidden_states", "float32", ("batch", 1, 2))
LABELS = TensorSpec("class_labels", "int64", ("batch",))


class Recorder(BaseEngine):
    """Returns sample + timestep + sum of the condition, and remembers what it was fed."""

    def __init__(self, *specs: TensorSpec) -> None:
        super().__init__("fake-f32", Path("net"), {s.name: s for s in specs}, {"out": SAMPLE})
        self.calls: list[dict[str, np.ndarray]] = []

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(feeds)
        sample, *others = feeds.values()
        total = sample.astype(np.float64)
        for other in others:
            total = total + other.reshape(other.shape[0] if other.ndim else 1, -1).sum(1).reshape(-1, 1, 1, 1)
        return {"out": total.astype(sample.dtype)}

    def _close(self) -> None: ...


def rows_of(n: int) -> np.ndarray:
    return np.arange(n * 18, dtype=np.float32).reshape(n, 2, 3, 3)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8])
def test_every_call_has_the_same_number_of_rows_and_every_row_its_own_result(n: int) -> None:
    engine = Recorder(SAMPLE, TIME, TOKENS)
    x, cond = rows_of(n), np.arange(2 * n, dtype=np.float32).reshape(n, 1, 2)
    out = EngineModel.of(engine, rows=4)(x, 7.0, {"encoder_hidden_states": cond})
    np.testing.assert_array_equal(out, x + 7 + cond.sum((1, 2))[:, None, None, None])
    assert out.dtype == np.float32
    assert [call["sample"].shape[0] for call in engine.calls] == [4] * -(-n // 4)
    for call in engine.calls:
        np.testing.assert_array_equal(call["timestep"], np.full(4, 7, np.float32))


def test_a_batch_size_fixed_in_the_graph_wins() -> None:
    fixed = [TensorSpec(s.name, s.dtype, (3, *s.shape[1:])) for s in (SAMPLE, TIME)]
    engine = Recorder(*fixed)
    assert EngineModel.of(engine, rows=8)(rows_of(4), 1.0, None).shape == (4, 2, 3, 3)
    assert [call["sample"].shape[0] for call in engine.calls] == [3, 3]
    assert fixed_rows(fixed[0]) == 3
    assert fixed_rows(SAMPLE) is None


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (TensorSpec("t", "int64", ("batch",)), np.full(2, 951, np.int64)),
        (TensorSpec("t", "float32", ()), np.float32(951)),
        (TensorSpec("t", "float16", (1,)), np.full(1, 951, np.float16)),
    ],
)
def test_the_timestep_takes_the_shape_and_dtype_of_the_graph(spec: TensorSpec, expected: np.ndarray) -> None:
    engine = Recorder(SAMPLE, spec)
    EngineModel.of(engine, rows=2)(rows_of(2), 951.0, None)
    found = engine.calls[0]["t"]
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


def test_a_half_precision_graph_is_fed_halves_and_returns_floats() -> None:
    engine = Recorder(TensorSpec("x", "float16", ("batch", 2, 3, 3)), TIME)
    out = EngineModel.of(engine, rows=2)(rows_of(2), 1.0, None)
    assert engine.calls[0]["x"].dtype == np.float16
    assert out.dtype == np.float32


def test_labels_keep_their_integers() -> None:
    engine = Recorder(SAMPLE, TIME, LABELS)
    EngineModel.of(engine, rows=3)(rows_of(2), 1.0, {"class_labels": np.array([4, 5])})
    np.testing.assert_array_equal(engine.calls[0]["class_labels"], [4, 5, 5])


def test_a_fractional_timestep_is_not_silently_cut() -> None:
    model = EngineModel.of(Recorder(SAMPLE, TensorSpec("t", "int64", ("batch",))), rows=2)
    with pytest.raises(EngineError, match=r"input 't' takes whole timesteps, the schedule visits 946\.5"):
        model(rows_of(2), 946.5, None)


def test_a_condition_that_is_missing_or_unwanted_is_refused() -> None:
    with pytest.raises(EngineError, match="needs a condition for its input 'class_labels'"):
        EngineModel.of(Recorder(SAMPLE, TIME, LABELS), rows=2)(rows_of(2), 1.0, None)
    with pytest.raises(EngineError, match="takes no condition 'y', but was given one; those it takes: none"):
        EngineModel.of(Recorder(SAMPLE, TIME), rows=2)(rows_of(2), 1.0, {"y": np.zeros(2)})
    model = EngineModel.of(Recorder(SAMPLE, TIME, TOKENS), rows=2)
    for shape in ((2, 1, 3), (2, 2), (2, 3, 2), (2,)):
        with pytest.raises(
            EngineError, match=r"input 'encoder_hidden_states' takes rows of shape \[1, 2\], but was given"
        ):
            model(rows_of(2), 1.0, {"encoder_hidden_states": np.zeros(shape, np.float32)})


def test_conditions_reach_the_inputs_they_are_named_after_in_any_order() -> None:
    pooled, sizes = TensorSpec("text_embeds", "float32", ("batch", 4)), TensorSpec("time_ids", "float32", ("batch", 6))
    engine = Recorder(sizes, SAMPLE, TOKENS, TIME, pooled)
    rng = np.random.default_rng(0)
    given = {spec.name: rng.random((3, *spec.shape[1:]), np.float32) for spec in (pooled, TOKENS, sizes)}
    EngineModel.of(engine, rows=2)(rows_of(3), 9.0, given)
    for name, rows in given.items():
        fed = np.concatenate([call[name] for call in engine.calls])
        np.testing.assert_array_equal(fed, np.concatenate([rows, rows[-1:]]))
    inputs = {spec.name: spec for spec in (sizes, SAMPLE, TOKENS, TIME, pooled)}
    shapes = input_shapes(inputs, rows=5, state=(2, 3, 3), conditions=given)
    assert shapes == {
        "time_ids": (5, 6),
        "sample": (5, 2, 3, 3),
        "encoder_hidden_states": (5, 1, 2),
        "timestep": (5,),
        "text_embeds": (5, 4),
    }


def test_without_conditions_the_graph_says_how_large_they_are() -> None:
    inputs = {spec.name: spec for spec in (SAMPLE, TIME, TOKENS)}
    shapes = input_shapes(inputs, rows=5, state=(2, 3, 3), conditions=None)
    assert shapes == {"sample": (5, 2, 3, 3), "timestep": (5,), "encoder_hidden_states": (5, 1, 2)}
    free = TensorSpec("encoder_hidden_states", "float32", ("batch", "length", 2))
    with pytest.raises(EngineError, match=r"'encoder_hidden_states' of shape \['batch', 'length', 2\]: only the first"):
        input_shapes({**inputs, free.name: free}, rows=5, state=(2, 3, 3), conditions=None)


def named(*specs: TensorSpec) -> Mapping[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


def test_inputs_are_told_apart_by_rank_in_any_order() -> None:
    x, sigma = TensorSpec("x", "float32", ("n", 3, "h", "w")), TensorSpec("sigma", "float32", ())
    roles = input_roles(named(TOKENS, sigma, x))
    assert (roles.sample, roles.timestep, roles.conditions) == (x, sigma, (TOKENS,))
    roles = input_roles(named(LABELS, TIME, SAMPLE))
    assert (roles.sample, roles.timestep, roles.conditions) == (SAMPLE, TIME, (LABELS,))
    roles = input_roles(named(x))
    assert (roles.sample, roles.timestep, roles.conditions) == (x, None, ())


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (
            (SAMPLE, TIME, TensorSpec("r", "float32", ("batch",))),
            r"input 'r' of shape \['batch'\]: sampling has nothing",
        ),
        ((SAMPLE, TIME, TensorSpec("mask", "float32", ("batch", 1, 3, 3))), "input 'mask' of shape"),
        ((SAMPLE, TIME, TensorSpec("clip", "float32", ("batch", 2, 1, 3, 3))), "input 'clip' of shape"),
        ((TIME, TOKENS), r"no input of shape \(N, C, H, W\) among timestep, encoder_hidden_states"),
    ],
)
def test_inputs_that_sampling_cannot_feed_are_named(specs: tuple[TensorSpec, ...], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        input_roles(named(*specs))


def test_groups_are_filled_with_rows_that_never_come_back() -> None:
    seen = []

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        seen.append((a.tolist(), b.tolist()))
        return a + b

    np.testing.assert_array_equal(in_groups(run, [np.arange(5), np.ones(5)], rows=[3]), np.arange(5) + 1)
    assert seen == [([0, 1, 2], [1, 1, 1]), ([3, 4, 4], [1, 1, 1])]


@pytest.mark.parametrize(
    ("n", "groups"), [(1, [1]), (2, [4]), (4, [4]), (5, [16]), (16, [16]), (17, [16, 1]), (35, [16, 16, 4])]
)
def test_groups_of_several_sizes_are_the_smallest_that_takes_what_is_left(n: int, groups: list[int]) -> None:
    seen = []

    def run(x: np.ndarray) -> np.ndarray:
        seen.append(len(x))
        return 2 * x

    np.testing.assert_array_equal(in_groups(run, [np.arange(n)], rows=[1, 4, 16]), 2 * np.arange(n))
    assert seen == groups

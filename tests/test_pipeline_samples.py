"""Samples of tensors come out of one pass within a bound of memory, by picture, with the values of the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")

from qncd_deploy.calib.parts import Parts  # noqa: E402
from qncd_deploy.calib.trajectories import CalibSet  # noqa: E402
from qncd_deploy.errors import CalibrationError  # noqa: E402
from qncd_deploy.pipeline import calibrate, samples  # noqa: E402
from qncd_deploy.pipeline.calibrate import Probe, as_fed, fixed_rows, in_batches  # noqa: E402
from qncd_deploy.pipeline.samples import LEAST_ROWS, SAMPLE_ROWS, edge_samples  # noqa: E402
from qncd_deploy.specs import TensorSpec  # noqa: E402

BATCH = "N"
X, T = TensorSpec("x", "float32", (BATCH, 2, 4, 4)), TensorSpec("t", "float32", (BATCH,))


class Graph:
    """Stands for a graph, of which samples read the shapes alone."""

    def __init__(self, inputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.inputs = [ir.Value(name=spec.name, shape=ir.Shape(spec.shape)) for spec in inputs]
        self._nodes = [
            SimpleNamespace(outputs=[ir.Value(name=name, shape=ir.Shape((BATCH, *row)))])
            for name, row in shapes.items()
        ]

    def __iter__(self) -> Iterator[SimpleNamespace]:
        return iter(self._nodes)


class Engine:
    """Makes tensors of the shapes asked for, from the mean of x and what channel it is; counts what is run."""

    def __init__(self, inputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.inputs = {spec.name: spec for spec in inputs}
        self.shapes = shapes
        self.runs: list[int] = []

    def stream(self, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        self.runs.append(len(feeds["x"]))
        level = feeds["x"].mean(axis=(1, 2, 3))
        return ((name, self._make(level, self.shapes[name])) for name in reversed(names))

    def _make(self, level: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(level.reshape(-1, *[1] * len(row)), (len(level), *row))


def setting(
    shapes: Mapping[str, tuple[int, ...]], *, pictures: int = 8, calls: int = 4, inputs: Sequence[TensorSpec] = (X, T)
) -> tuple[Engine, Probe, SimpleNamespace, CalibSet]:
    """x of row n is n all over."""
    engine = Engine(inputs, shapes)
    network = SimpleNamespace(
        model=SimpleNamespace(graph=Graph(inputs, shapes)),
        inputs=SimpleNamespace(sample="x", timestep="t"),
        facts=SimpleNamespace(sized_inputs=tuple(inputs), latent_shape=(2, 4, 4)),
    )
    rows = np.arange(pictures * calls, dtype=np.float32)
    x = np.broadcast_to(rows[:, None, None, None], (len(rows), 2, 4, 4))
    calib = CalibSet({"x": x, "t": rows}, "k", np.tile(np.arange(pictures), calls))
    return engine, Probe(engine), network, calib


def tick(done: int, of: int) -> None: ...


def test_all_tensors_come_out_of_one_pass_in_order_and_by_picture() -> None:
    shapes = {"plane": (3, 4, 4), "tokens": (5, 6), "emb": (7,)}
    engine, probe, network, calib = setting(shapes)
    told = []
    axes = {"emb": 1, "tokens": -1, "plane": 1}
    found = list(edge_samples(probe, network, calib, axes, lambda done, of: told.append((done, of))))
    assert [edge for edge, _ in found] == ["emb", "tokens", "plane"]
    assert sum(engine.runs) == len(calib) and told[-1] == (35, 35)
    for edge, sample in found:
        for part, rows in zip((sample.fit, sample.tune, sample.held_out), Parts.of(calib), strict=True):
            assert part.shape == (len(rows), *shapes[edge])
            np.testing.assert_array_equal(part.reshape(len(rows), -1)[:, 0], rows)  # the row's own values
        np.testing.assert_array_equal(sample.channel_amax, np.full(shapes[edge][0 if axes[edge] == 1 else -1], 30))


def test_no_more_rows_are_run_than_are_sampled() -> None:
    engine, probe, network, calib = setting({"a": (4, 4, 4)}, pictures=64, calls=10)
    ((_, sample),) = edge_samples(probe, network, calib, {"a": 1}, tick)
    assert sum(engine.runs) == SAMPLE_ROWS == sum(map(len, (sample.fit, sample.tune, sample.held_out)))


def shapes_of_stable_diffusion() -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """What smoothing samples in its UNet, with a 320th of the channels: by level the second convolutions of residual
    blocks and their embeddings, and what the Linears of transformers read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for level, (channels, side, blocks, transformers) in enumerate(
        ((1, 64, 5, 5), (2, 32, 5, 5), (4, 16, 5, 5), (4, 8, 7, 1))
    ):
        for block in range(blocks):
            shapes |= {f"{level}.{block}.emb": (channels,), f"{level}.{block}.conv": (channels, side, side)}
        for each in range(transformers):
            widths = {"q": 1, "to_out": 1, "q2": 1, "to_out2": 1, "ff": 1, "ff2": 4}
            shapes |= {f"{level}.{each}.{name}": (side**2, channels * width) for name, width in widths.items()}
            shapes |= {f"{level}.{each}.proj": (channels, side, side)}
    return shapes, {name: -1 if len(row) == 2 else 1 for name, row in shapes.items()}


def test_a_large_network_takes_one_pass_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 1.5 with a 320th of the channels, and so with a 320th of the bounds. (Before, a pass of its
    own was made for ranges, for embeddings, and for every number of rows that some tensor had room for.)"""
    budget = (1 << 30) // 320
    monkeypatch.setattr(samples, "BUDGET_BYTES", budget)
    monkeypatch.setattr(samples, "SAMPLE_BYTES", samples.SAMPLE_BYTES // 320)
    monkeypatch.setattr(samples, "LEAST_BYTES", samples.LEAST_BYTES // 320)
    shapes, axes = shapes_of_stable_diffusion()
    engine, probe, network, calib = setting(shapes, pictures=32, calls=10)
    held = 0
    for _, sample in edge_samples(probe, network, calib, axes, tick):
        parts = (sample.fit, sample.tune, sample.held_out)
        held += sum(part.nbytes for part in parts)
        assert all(map(len, parts)) and len(sample.fit) >= LEAST_ROWS // 2
        largest = Parts.of(calib).take(SAMPLE_ROWS).fit.max()
        np.testing.assert_array_equal(sample.channel_amax, largest)  # of rows that were not kept as well
    assert sum(engine.runs) == SAMPLE_ROWS
    assert 0.5 * budget < held <= budget


def test_tensors_that_cannot_be_held_together_take_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {name: (4, 4, 4) for name in "abc"}
    monkeypatch.setattr(samples, "BUDGET_BYTES", 2 * LEAST_ROWS * 256)
    engine, probe, network, calib = setting(shapes)
    found = dict(edge_samples(probe, network, calib, dict.fromkeys(shapes, 1), tick))
    assert list(found) == ["a", "b", "c"] and sum(engine.runs) == 2 * len(calib)
    assert [len(sample.fit) for sample in found.values()] == [2, 2, 4]  # the last one has the room for itself


def test_of_long_sequences_other_tokens_are_kept_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 32 * 10 * 8)
    monkeypatch.setattr(samples, "LEAST_BYTES", 1)
    engine, probe, network, calib = setting({"a": (40, 2)})
    engine._make = lambda level, row: level[:, None, None] + np.arange(40)[:, None] / 64 + np.zeros((len(level), *row))
    ((_, sample),) = edge_samples(probe, network, calib, {"a": -1}, tick)
    rows = np.concatenate([sample.fit, sample.tune, sample.held_out])
    assert rows.shape == (32, 10, 2)
    numbers = np.concatenate([*Parts.of(calib)])
    np.testing.assert_array_equal(np.floor(rows), np.broadcast_to(numbers[:, None, None], rows.shape))
    tokens = [tuple(row) for row in (rows % 1 * 64)[..., 0]]
    assert all(sorted(set(row)) == list(row) for row in tokens) and len(set(tokens)) > 20
    np.testing.assert_array_equal(sample.channel_amax, 30 + np.float32(39 / 64))


def test_a_tensor_that_is_the_same_for_all_rows_is_one_of_each() -> None:
    engine, probe, network, calib = setting({"a": (3,)})
    engine._make = lambda level, row: np.ones((1, *row), np.float32)
    ((_, sample),) = edge_samples(probe, network, calib, {"a": 1}, tick)
    assert sample.fit.shape == (16, 3)
    engine._make = lambda level, row: np.ones((2 * len(level), *row), np.float32)
    with pytest.raises(CalibrationError, match=r"'a' has 64 rows in a batch of 32, expected one each.*--smooth off"):
        list(edge_samples(probe, network, calib, {"a": 1}, tick))


def test_a_fixed_batch_is_filled_up_and_its_padding_dropped() -> None:
    inputs = (TensorSpec("t", "float32", (5,)), TensorSpec("x", "float32", (5, 2, 4, 4)))
    engine, probe, _, calib = setting({"a": (3,)}, inputs=inputs)
    batches = list(in_batches(calib, inputs))
    assert [len(feeds["x"]) for feeds in batches] == [5] * 6 + [2]
    found = np.concatenate([x for feeds in batches for _, x in probe(feeds, ["a"])])
    np.testing.assert_array_equal(found[:, 0], np.arange(32))
    assert set(engine.runs) == {5}


def test_a_timestep_for_all_rows_is_fed_row_by_row() -> None:
    """Whichever input comes first."""
    time = TensorSpec("t", "float32", ())
    for inputs in ((time, X), (X, time)):
        assert fixed_rows(inputs) == 1
        _, _, _, calib = setting({"a": (3,)}, inputs=inputs)
        fed = [as_fed(feeds, inputs) for feeds in in_batches(calib, inputs)]
        assert len(fed) == 32 and fed[7]["t"].shape == () and fed[7]["t"] == 7 and fed[7]["x"].shape == (1, 2, 4, 4)


def test_the_sample_says_how_many_rows_are_run_wherever_it_stands() -> None:
    large = TensorSpec("x", "float32", (BATCH, 4, 64, 64))
    rows = np.zeros((32, 4, 64, 64), np.float32)
    for inputs in ((large, T), (T, large)):
        batches = in_batches(CalibSet({"x": rows, "t": np.zeros(32, np.float32)}, "k"), inputs)
        assert max(len(feeds["t"]) for feeds in batches) == calibrate.NUMBERS // (4 * 64 * 64)


def test_inputs_that_fix_different_numbers_of_rows_are_refused() -> None:
    with pytest.raises(CalibrationError, match="takes 4 rows of x and 1 of t at a time"):
        fixed_rows((TensorSpec("x", "float32", (4, 3, 8, 8)), TensorSpec("t", "float32", ())))

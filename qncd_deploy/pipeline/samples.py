"""Samples of single tensors of the float graph, on which choices for the layers that read them are judged.

All tensors come out of one pass over the same rows, as a pass over a large network is what takes the time. Where their
values would not fit in memory together, fewer of each are kept: rows of planes, tokens of sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.parts import Parts
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.errors import CalibrationError
from qncd_deploy.pipeline.calibrate import Probe, in_batches
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.progress import Tick

SAMPLE_ROWS = 128
SAMPLE_BYTES = 32 << 20
"""Rows of one layer's input on which a choice for it is judged, and what they may take: large planes say as much in few
rows, and running the layer several times is what takes the time."""

BUDGET_BYTES = 1 << 30
"""What the samples of all tensors may take together."""

LEAST_ROWS = 4
LEAST_BYTES = 1 << 20
"""What is kept of planes and of sequences, however many tensors there are."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Values of one tensor, float32, in the graph's layout; tokens as (N, T, C). See Parts for what is for what.

    channel_amax (C,) float32: the largest |x| per channel over all rows to fit on, more than are kept.
    """

    fit: np.ndarray
    tune: np.ndarray
    held_out: np.ndarray
    channel_amax: np.ndarray


def edge_samples(
    probe: Probe, network: FloatNetwork, calib: CalibSet, channel_axes: Mapping[str, int], tick: Tick
) -> Iterator[tuple[str, Sample]]:
    """A sample of every tensor, in order, of up to SAMPLE_ROWS rows.

    channel_axes: where the channels are: 1, planes of which whole rows are kept, or -1, tokens of which any are. Kept
    are BUDGET_BYTES together; only where the least of every tensor is more than that is there more than one pass.
    tick: rows run and tensors done, and all of both.

    Raises: CalibrationError for a tensor without one row for every row of the batch.
    """
    parts = Parts.of(calib).take(SAMPLE_ROWS)
    rows = calib.take(np.concatenate([*parts]))
    groups = list(_groups(_wants(network, channel_axes, len(rows))))
    done, total = 0, len(groups) * len(rows) + len(channel_axes)
    for group in groups:
        keepers = {edge: _Keeper(edge, channel_axes[edge], room, parts) for edge, room in _rooms(group).items()}
        start = 0
        for feeds in in_batches(rows, network.facts.sized_inputs):
            count = len(next(iter(feeds.values())))
            for edge, x in probe(feeds, list(group)):
                keepers[edge].add(x, start, count)
            start += count
            tick(done + start, total)
        done += start
        for edge in group:
            yield edge, keepers.pop(edge).sample()
            done += 1
            tick(done, total)


@dataclass(frozen=True)
class _Want:
    """Bytes that are wanted of a tensor, and the least to do with."""

    most: int
    least: int


def _wants(network: FloatNetwork, channel_axes: Mapping[str, int], rows: int) -> dict[str, _Want]:
    tensors = (*network.model.graph.inputs, *(out for node in network.model.graph for out in node.outputs))
    shapes = {tensor.name: _row_shape(tensor) for tensor in tensors if tensor.name in channel_axes}
    wants = {}
    for edge, axis in channel_axes.items():
        row = SAMPLE_BYTES // LEAST_ROWS if (shape := shapes[edge]) is None else 4 * math.prod(shape)
        most = min(SAMPLE_BYTES, rows * row)
        token = 0 if shape is None else 4 * shape[-1]
        least = LEAST_ROWS * row if axis == 1 else max(min(most, LEAST_BYTES), rows * token)
        wants[edge] = _Want(max(most, least), least)
    return wants


def _row_shape(tensor: ir.Value) -> tuple[int, ...] | None:
    """Without the rows; None where the graph does not say."""
    row = (None,) if tensor.shape is None else tuple(tensor.shape[1:])
    return row if all(isinstance(size, int) for size in row) else None


def _groups(wants: Mapping[str, _Want]) -> Iterator[dict[str, _Want]]:
    """Tensors of one pass: as many, in order, as there is room for the least of."""
    group: dict[str, _Want] = {}
    for edge, want in wants.items():
        if group and sum(each.least for each in group.values()) + want.least > BUDGET_BYTES:
            yield group
            group = {}
        group[edge] = want
    if group:
        yield group


def _rooms(group: Mapping[str, _Want]) -> dict[str, int]:
    """Bytes for each: the least, and of what is left the same for all that want as much."""
    left = BUDGET_BYTES - sum(want.least for want in group.values())
    rooms = {}
    more = sorted(group, key=lambda edge: group[edge].most - group[edge].least)
    for place, edge in enumerate(more):
        extra = min(group[edge].most - group[edge].least, max(left, 0) // (len(more) - place))
        rooms[edge] = group[edge].least + extra
        left -= extra
    return rooms


class _Keeper:
    """What is kept of one tensor while batches of rows go by, those to fit on first."""

    def __init__(self, edge: str, axis: int, room: int, parts: Parts) -> None:
        ends = np.cumsum([len(part) for part in parts])
        self._edge, self._axis, self._room, self._to_fit = edge, axis, room, ends[0]
        self._parts = Parts(*np.split(np.arange(ends[-1]), ends[:-1]))  # of the rows that are kept
        self._kept: list[np.ndarray] = []
        self._random = np.random.default_rng(0)
        self._amax: np.ndarray | None = None

    def add(self, x: np.ndarray, start: int, count: int) -> None:
        """Values of `count` rows, from number `start` on; a tensor with a single one has the same for all."""
        x = np.repeat(x, count, axis=0) if len(x) == 1 else x
        if len(x) != count:
            raise CalibrationError(
                f"calibration: tensor {self._edge!r} has {len(x)} rows in a batch of {count}, expected one each. "
                "Use --smooth off and --split off for this network."
            )
        x = np.asarray(x, np.float32) if self._axis == 1 else np.asarray(x, np.float32).reshape(count, -1, x.shape[-1])
        self._see(x[: max(0, self._to_fit - start)])
        self._kept.append(self._some_rows(x, start) if self._axis == 1 else self._some_tokens(x))

    def sample(self) -> Sample:
        assert self._amax is not None, self._edge
        kept = np.concatenate(self._kept)
        self._kept.clear()
        ends = np.cumsum([len(part) for part in self._parts])
        return Sample(*np.split(kept, ends[:-1]), self._amax)

    def _see(self, x: np.ndarray) -> None:
        if len(x):
            others = tuple(axis for axis in range(x.ndim) if axis != self._axis % x.ndim)
            amax = np.maximum(x.max(axis=others), -x.min(axis=others))
            self._amax = amax if self._amax is None else np.maximum(amax, self._amax)

    def _some_rows(self, x: np.ndarray, start: int) -> np.ndarray:
        """Those that there is room for."""
        count = max(LEAST_ROWS, self._room // max(1, x[0].nbytes))
        if not self._kept and count < sum(map(len, self._parts)):
            self._parts = self._parts.take(count)
        numbers = np.concatenate([*self._parts]) - start
        return x[numbers[(numbers >= 0) & (numbers < len(x))]]

    def _some_tokens(self, x: np.ndarray) -> np.ndarray:
        """Of (n, T, C), as many of every row as there is room for, others of each."""
        tokens = x.shape[1]
        count = min(tokens, max(1, self._room // (x[0, 0].nbytes * sum(map(len, self._parts)))))
        if count == tokens:
            return x
        order = self._random.permuted(np.tile(np.arange(tokens), (len(x), 1)), axis=1)
        return np.take_along_axis(x, np.sort(order[:, :count], axis=1)[..., None], axis=1)

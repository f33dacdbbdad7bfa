"""Run a network over calibration batches and keep statistics of named tensors, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.errors import CalibrationError

BUDGET_BYTES = 1 << 30
"""Observed tensors held at a time; a network with more of them runs several times per batch."""

_FIRST_PART = 8  # tensors fetched together while no size is known


class Run(Protocol):
    """A network whose inner tensors can be asked for: inputs by name, tensor names -> those tensors."""

    def __call__(self, feeds: Mapping[str, np.ndarray], names: Sequence[str], /) -> Mapping[str, np.ndarray]: ...


def observe(
    run: Run,
    batches: Iterable[Mapping[str, np.ndarray]],
    names: Sequence[str],
    *,
    row_bytes: Mapping[str, int] | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> dict[str, TensorStats]:
    """Statistics of every named tensor over all batches, in the order of `names`.

    As many tensors are fetched per run as fit into budget_bytes together, at least one. How large they are is told by
    row_bytes (per row of the batch), else by the first batch, in several cautious runs. Names that are inputs of the
    network are read off the batch: a graph does not return those.

    Raises: CalibrationError if there is no batch, or a tensor is empty or not finite (the message names it).
    """
    names = tuple(dict.fromkeys(names))  # an edge with several consumers is counted once
    stats: dict[str, TensorStats] = {}
    sizes: dict[str, int] = {}
    for feeds in batches:
        inner = [name for name in names if name not in feeds]
        if not sizes and row_bytes:
            rows = len(next(iter(feeds.values())))
            sizes = {name: rows * row_bytes[name] for name in inner if name in row_bytes}
        _merge(stats, [name for name in names if name in feeds], feeds)
        for part in _parts(inner, sizes, budget_bytes):
            outputs = run(feeds, part)
            sizes.update({name: outputs[name].nbytes for name in part})
            _merge(stats, part, outputs)
    if names and not stats:
        raise CalibrationError("calibration: no batches, expected at least one. Check the calibration set.")
    return {name: stats[name] for name in names}


def _merge(stats: dict[str, TensorStats], names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
    for name in names:
        seen = TensorStats.of(arrays[name], name)
        stats[name] = stats[name].merge(seen) if name in stats else seen


def _parts(names: Sequence[str], sizes: Mapping[str, int], budget_bytes: int) -> Iterator[list[str]]:
    """Split names in order. Lazy: while parts of the first batch are consumed, `sizes` fills up.

    A tensor of unknown size counts as the largest one known: the early tensors of a UNet have its full resolution.
    """
    part: list[str] = []
    room = budget_bytes
    for name in names:
        size = sizes.get(name) or max(sizes.values(), default=budget_bytes // _FIRST_PART)
        if part and size > room:
            yield part
            part, room = [], budget_bytes
            size = sizes.get(name) or max(sizes.values())
        part.append(name)
        room -= size
    if part:
        yield part

"""Run a network over calibration batches and keep statistics of named tensors, one of which is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.errors import CalibrationError


class Run(Protocol):
    """A network whose tensors can be asked for: inputs by name, tensor names -> each of them with its name, in any
    order, as soon as it is there.
    """

    def __call__(
        self, feeds: Mapping[str, np.ndarray], names: Sequence[str], /
    ) -> Iterable[tuple[str, np.ndarray]]: ...


def observe(run: Run, batches: Iterable[Mapping[str, np.ndarray]], names: Sequence[str]) -> dict[str, TensorStats]:
    """Statistics of every named tensor over all batches, in the order of `names`. The network runs once per batch.

    Raises: CalibrationError if there is no batch, or a tensor is empty or not finite (the message names it).
    """
    names = tuple(dict.fromkeys(names))  # an edge with several consumers is counted once
    stats: dict[str, TensorStats] = {}
    for feeds in batches:
        for name, array in run(feeds, names):
            seen = TensorStats.of(array, name)
            stats[name] = stats[name].merge(seen) if name in stats else seen
    if names and not stats:
        raise CalibrationError("calibration: no batches, expected at least one. Check the calibration set.")
    return {name: stats[name] for name in names}

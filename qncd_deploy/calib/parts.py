"""Divide calibration rows into parts that share no picture: rows of one trajectory resemble each other.

A factor, a range or a rounding that is judged on later calls of the very pictures that it was made from looks better
than it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qncd_deploy.calib.trajectories import CalibSet


@dataclass(frozen=True, eq=False)
class Parts:
    """Numbers of rows: to fit on, to choose by, and to judge the choice by; each part in the order of the set."""

    fit: np.ndarray
    tune: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, calib: CalibSet) -> Parts:
        """Every second picture is to fit on, the others are to choose and to judge by in turns.

        With two or three pictures the last two parts share one, with a single picture all do; of fewer than four rows
        a part that would be empty has all of them.
        """
        names, ranks = np.unique(calib.pictures, return_inverse=True)
        turns = ranks % 4
        if len(names) == 1:
            turns = np.arange(len(calib)) % 4
        elif len(names) < 4:
            others = ranks % 2 == 1
            turns = np.where(others, 2 * (np.cumsum(others) % 2) + 1, 0)
        found = (np.flatnonzero(np.isin(turns, turn)) for turn in ((0, 2), 1, 3))
        return cls(*(rows if len(rows) else np.arange(len(calib)) for rows in found))

    @property
    def unseen(self) -> np.ndarray:
        """All that nothing is fitted on."""
        return np.unique(np.concatenate([self.tune, self.held_out]))

    def take(self, count: int) -> Parts:
        """Up to `count` rows in all, at least one a part: half to fit on, a quarter in either other part."""
        return Parts(spread(self.fit, count // 2), spread(self.tune, count // 4), spread(self.held_out, count // 4))

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.fit, self.tune, self.held_out))


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` of the rows, at least one, evenly spread over them."""
    return rows[np.linspace(0, len(rows) - 1, max(1, min(count, len(rows)))).astype(int)]

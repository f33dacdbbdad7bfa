"""Precision and recall of a set of pictures (Kynkaanniemi et al., arXiv:1904.06991).

A set of features {p} covers the union of balls around its members, each as wide as the distance to the member's k-th
nearest neighbour, k = 3 (equation 1):
    precision = share of the pictures that the reference covers;  recall = share of the reference that they cover
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 3
_BLOCK = 1 << 22  # distances held at a time: 32 MiB


@dataclass(frozen=True, eq=False)
class Manifold:
    """Features (N, d) float64 and the squared radius of the ball around each, (N,)."""

    points: np.ndarray
    radii: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, *, neighbours: int = NEIGHBOURS) -> Manifold | None:
        """features (N, d); None where there are too few for a k-th neighbour."""
        if len(features) <= neighbours:
            return None
        points = features.astype(np.float64)
        parts = []
        for rows, distances in _blocks(points, points):
            distances[np.arange(len(distances)), np.arange(len(points))[rows]] = 0  # rounding must not move a point
            parts.append(np.partition(distances, neighbours, axis=1)[:, neighbours])
        return cls(points, np.concatenate(parts))

    def covers(self, features: np.ndarray) -> np.ndarray:
        """Which of these features (M, d) lie in one of the balls, their surface included: (M,) bool."""
        return np.concatenate(
            [
                (distances <= self.radii).any(axis=1)
                for _, distances in _blocks(features.astype(np.float64), self.points)
            ]
        )


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances of a (N, d) to b (M, d), some rows of a at a time, never below 0."""
    lengths = np.square(b).sum(axis=1)
    size = max(1, _BLOCK // len(b))
    for start in range(0, len(a), size):
        rows = slice(start, start + size)
        distances = np.square(a[rows]).sum(axis=1)[:, None] + lengths - 2 * (a[rows] @ b.T)
        yield rows, np.maximum(distances, 0, out=distances)

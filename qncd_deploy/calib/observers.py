"""Streaming statistics of one tensor: extremes, power, per-channel magnitudes and a histogram, in bounded memory.

The histogram counts k = trunc(|x| / w) for either sign, k < HALF_BINS, where HALF_BINS * w = 2**exponent is the
smallest power of two above every |x| seen. When a larger value arrives, w doubles and neighbouring bins are added.
Since trunc(trunc(a / w) / 2) == trunc(a / 2w), the counts depend on the set of values alone: not on their order,
their batching, or the order of merges. Every value is counted; nothing is subsampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qncd_deploy.errors import CalibrationError

HALF_BINS = 1 << 13
MIN_EXPONENT = -100
"""Tensors below 2**-100 are told apart from zero by their extremes only; the bin width stays a normal float32."""

_CHUNK = 1 << 17  # values binned at a time: the temporaries stay in the second-level cache


@dataclass(frozen=True, eq=False)
class TensorStats:
    """What calibration knows of one tensor; a value, never changed in place.

    count: values seen. min, max, mean_square (float64): of all of them. channel_amax (C,) float32: largest |x| per
    channel, axis 1 of a 4-D tensor, the last axis otherwise. counts (2 * HALF_BINS,) int64, exponent: the histogram
    described above.
    """

    count: int
    min: float
    max: float
    sum_square: float
    channel_amax: np.ndarray
    counts: np.ndarray
    exponent: int

    @classmethod
    def of(cls, x: np.ndarray, name: str) -> TensorStats:
        """Statistics of one array (any float dtype, 1 to 5 dimensions); name is for the message.

        Raises: CalibrationError if x is empty or holds a value that is not finite in float32.
        """
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            x = np.ascontiguousarray(x, dtype=np.float32)
        if x.size == 0:
            raise CalibrationError(f"{name}: an empty tensor (shape {x.shape}), expected values to calibrate on.")
        low, high = _channel_extremes(x)
        x_min, x_max = float(low.min()), float(high.max())  # NaN and infinity reach the extremes
        if not (math.isfinite(x_min) and math.isfinite(x_max)):
            bad = int(x.size - np.isfinite(x).sum())
            raise CalibrationError(
                f"{name}: {bad} of {x.size} values are not finite. Check the checkpoint and the calibration inputs."
            )
        amax = max(-x_min, x_max)
        exponent = max(MIN_EXPONENT, math.frexp(amax)[1] if amax else MIN_EXPONENT)
        counts, sum_square = _histogram(x.ravel(), exponent)
        return cls(x.size, x_min, x_max, sum_square, np.maximum(-low, high), counts, exponent)

    def merge(self, other: TensorStats) -> TensorStats:
        """Statistics of both sets of values: exact and independent of order, but for the rounding of sum_square."""
        assert self.channel_amax.shape == other.channel_amax.shape, "statistics of different tensors"
        exponent = max(self.exponent, other.exponent)
        return TensorStats(
            self.count + other.count,
            min(self.min, other.min),
            max(self.max, other.max),
            self.sum_square + other.sum_square,
            np.maximum(self.channel_amax, other.channel_amax),
            _coarsen(self.counts, exponent - self.exponent) + _coarsen(other.counts, exponent - other.exponent),
            exponent,
        )

    @property
    def amax(self) -> float:
        return max(-self.min, self.max)

    @property
    def mean_square(self) -> float:
        return self.sum_square / self.count

    @property
    def bin_width(self) -> float:
        return math.ldexp(1.0, self.exponent) / HALF_BINS

    @cached_property
    def occupied(self) -> tuple[np.ndarray, np.ndarray]:
        """Centers (unit of x, float64) and counts of the bins that hold anything, in ascending order."""
        index = np.flatnonzero(self.counts)
        return (index - HALF_BINS + 0.5) * self.bin_width, self.counts[index]

    @cached_property
    def running_sums(self) -> np.ndarray:
        """(3, n + 1) float64: column k sums 1, center and center**2 over all values of the first k occupied bins."""
        centers, counts = self.occupied
        powers = np.stack([np.ones_like(centers), centers, centers**2]) * counts
        return np.concatenate([np.zeros((3, 1)), np.cumsum(powers, axis=1)], axis=1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for an npz file; from_arrays gives an equal value back, bit for bit."""
        index = np.flatnonzero(self.counts)
        return {
            "count": np.array(self.count),
            "moments": np.array([self.min, self.max, self.sum_square]),
            "channel_amax": self.channel_amax,
            "bin_index": index.astype(np.int32),
            "bin_count": self.counts[index],
            "exponent": np.array(self.exponent),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TensorStats:
        """Raises: CalibrationError if the histogram does not hold `count` values."""
        counts = np.zeros(2 * HALF_BINS, np.int64)
        counts[arrays["bin_index"]] = arrays["bin_count"]
        if counts.sum() != arrays["count"]:
            raise CalibrationError(
                f"stored statistics: the histogram holds {counts.sum()} values, expected {arrays['count']}. "
                "Calibrate again."
            )
        x_min, x_max, sum_square = map(float, arrays["moments"])
        return cls(
            int(arrays["count"]), x_min, x_max, sum_square, arrays["channel_amax"], counts, int(arrays["exponent"])
        )


def _channel_extremes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel minimum and maximum, (C,) each."""
    if x.ndim == 4:
        planes = x.reshape(x.shape[0], x.shape[1], -1)
        return planes.min(axis=2).min(axis=0), planes.max(axis=2).max(axis=0)
    flat = x.reshape(-1, x.shape[-1])
    return flat.min(axis=0), flat.max(axis=0)


def _histogram(x: np.ndarray, exponent: int) -> tuple[np.ndarray, float]:
    """Counts per bin and sum of squares (accumulated in float64) of a flat float32 array."""
    per_width = np.float32(
        math.ldexp(HALF_BINS, -exponent)
    )  # a power of two: exact, but for underflow to a signed zero
    counts = np.zeros(2 * HALF_BINS, np.int64)
    sum_square = 0.0
    for start in range(0, x.size, _CHUNK):
        chunk = x[start : start + _CHUNK]
        scaled = chunk * per_width
        index = scaled.astype(np.intp)  # toward zero
        index += HALF_BINS
        index -= np.signbit(scaled)  # kept by what is too small to stay nonzero
        counts += np.bincount(index, minlength=2 * HALF_BINS)
        # no product of vectors: BLAS has threads of its own, which fight for the cores with torch's between two calls
        sum_square += float(np.square(chunk, dtype=np.float64).sum())
    return counts, sum_square


def _coarsen(counts: np.ndarray, doublings: int) -> np.ndarray:
    """The same values counted in bins 2**doublings times as wide; zero stays an edge between two bins."""
    doublings = min(doublings, HALF_BINS.bit_length() - 1)  # from there on the two bins around zero hold everything
    if doublings == 0:
        return counts
    merged = counts.reshape(-1, 1 << doublings).sum(axis=1)
    margin = (counts.size - merged.size) // 2
    return np.pad(merged, margin)

"""Which range to quantize, of an array (weights) or of calibration statistics (activations).

A wide range rounds coarsely, a narrow one clips; the mse rules search for the balance. Weights: per output channel,
over the raw values, 80 shrunk candidates as in Q-Diffusion (Li et al., arXiv:2302.04304, released code). Activations:
per tensor, over the histogram. A symmetric grid spends half its levels on either side of zero; an asymmetric one spends
them where the values are: behind SiLU, which ends at -0.28, that is worth nearly one bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.quant.grid import Grid, limits

SHRINKS = tuple(1 - 0.01 * i for i in range(80))
"""Candidates of a weight range, as fractions of the largest |w|."""

_LOOK = 6
"""Candidates between two looks at what the limits alone lose."""

_BLOCK = 1 << 18  # weights searched at a time: the temporaries stay in cache, and memory stays bounded for any layer


def lp_grid(
    x: np.ndarray,
    *,
    bits: int,
    axis: int | None = None,
    p: float = 2.0,
    narrow: bool = False,
    asymmetric: bool = False,
    shrinks: Sequence[float] = SHRINKS,
) -> Grid:
    """The grid of least mean |x - Q(x)|**p, of the whole array or per index of `axis`; ties go to the wider range.

    Candidates are the ranges [-amax, amax] * f, amax = max |x|, f of `shrinks`, and, if asymmetric, [min, max] * f with
    zero in it. The latter with p = 2.4 are Q-Diffusion's published choice; p = 2 maximises SQNR.
    """
    rows = x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    per_block = max(1, _BLOCK // rows.shape[1])
    blocks = [np.ascontiguousarray(rows[i : i + per_block], np.float32) for i in range(0, len(rows), per_block)]

    def search(block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _search_rows(block, _families(block, bits, narrow, asymmetric), p, shrinks)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # NumPy computes outside the interpreter's lock
        found = list(pool.map(search, blocks))
    shape = () if axis is None else (len(rows),)
    scale, qmin, qmax = (np.concatenate(parts).reshape(shape) for parts in zip(*found, strict=True))
    return Grid(scale, qmin, qmax, axis)


@dataclass(frozen=True, eq=False)
class _Family:
    """Grids of one kind for several rows, (rows,) each: the widest span, float32, is `steps` steps; qmin and qmax."""

    span: np.ndarray
    steps: int
    qmin: np.ndarray
    qmax: np.ndarray


def _families(rows: np.ndarray, bits: int, narrow: bool, asymmetric: bool) -> Iterator[_Family]:
    low, high = np.minimum(rows.min(axis=1), 0), np.maximum(rows.max(axis=1), 0)
    qmin, qmax = limits(bits, narrow=narrow)
    yield _Family(np.maximum(high, -low), qmax, np.full(len(rows), qmin), np.full(len(rows), qmax))
    if asymmetric:
        below = _levels_below(low, high, bits)
        yield _Family(high - low, 2**bits - 1, -below, 2**bits - 1 - below)


def _search_rows(
    rows: np.ndarray, families: Iterator[_Family], p: float, shrinks: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, qmin and qmax of every row's best grid; shrinks descend.

    What lies beyond a grid's limits loses its distance to them, whatever happens to the rest, and the more the narrower
    the grid: where that alone is more than the least error of all rows so far, the narrower grids need no trial.
    """
    least = np.full(len(rows), np.inf)
    best = np.ones(len(rows), np.float32), np.zeros(len(rows), int), np.zeros(len(rows), int)
    steps, q = np.empty_like(rows), np.empty_like(rows)

    def error_of(scale: np.ndarray) -> np.ndarray:
        """Sum over each row of |steps - q|**p, in the unit of the rows; q is overwritten."""
        np.subtract(steps, q, out=q)
        if p == 2.0:
            error = np.matmul(q[:, None, :], q[:, :, None]).ravel().astype(np.float64)
        else:
            error = np.power(np.abs(q, out=q), np.float32(p), out=q).sum(axis=1, dtype=np.float64)
        return error * scale.astype(np.float64) ** p

    for family in families:
        qmin, qmax = (limit.astype(np.float32)[:, None] for limit in (family.qmin, family.qmax))
        for number, shrink in enumerate(shrinks):
            scale = positive_scale(family.span * np.float32(shrink), family.steps)
            np.divide(rows, scale[:, None], out=steps)
            if number % _LOOK == _LOOK - 1:
                np.clip(steps, qmin, qmax, out=q)
                if (error_of(scale) > least).all():
                    break
            np.rint(steps, out=q)
            np.clip(q, qmin, qmax, out=q)
            error = error_of(scale)
            better = error < least
            least[better] = error[better]
            for kept, tried in zip(best, (scale, family.qmin, family.qmax), strict=True):
                kept[better] = tried[better]
    return best


def _levels_below(low: np.ndarray | float, high: np.ndarray | float, bits: int) -> np.ndarray:
    """How many of the levels that span [low, high], low <= 0 <= high, lie below zero, itself a level; integers."""
    return np.rint(np.negative(low) / positive_scale(np.subtract(high, low), 2**bits - 1)).astype(int)


def minmax_stats(stats: TensorStats) -> float:
    """The largest |x|."""
    return stats.amax


def percentile_stats(stats: TensorStats, *, percentile: float) -> float:
    """The value that `percentile` % of all |x| do not exceed, interpolated within its bin; 100 is the largest |x|."""
    assert 0 < percentile <= 100
    negative, positive = np.split(stats.counts, 2)
    cumulative = np.cumsum(positive + negative[::-1])  # bin k: k w <= |x| < (k + 1) w
    wanted = percentile / 100 * stats.count
    k = int(np.searchsorted(cumulative, wanted))
    below = cumulative[k - 1] if k else 0
    inside = (wanted - below) / (cumulative[k] - below)
    return float(min((k + inside) * stats.bin_width, stats.amax))


def mse_stats(stats: TensorStats, *, bits: int) -> float:
    """The amax of the symmetric grid of least mean (x - Q(x))**2 over the histogram, rounding and clipping together.

    96 ranges spaced evenly in log from amax down to amax / 64, then 33 around the best one.
    """
    if stats.amax == 0:
        return 0.0

    def best(tried: np.ndarray) -> float:
        errors = [stats_error(stats, symmetric_grid(amax, bits=bits)) for amax in tried]
        return float(tried[np.argmin(errors)])

    coarse = best(stats.amax * 2.0 ** np.linspace(0, -6, 96))
    return best(np.minimum(coarse * 2.0 ** np.linspace(-0.06, 0.06, 33), stats.amax))


def symmetric_grid(amax: float, *, bits: int) -> Grid:
    """The grid of a whole tensor whose largest level is amax; for amax zero, scale 1 and integers 0."""
    qmin, qmax = limits(bits)
    return Grid(positive_scale(amax, qmax), qmin, qmax)


def asymmetric_grid(stats: TensorStats, amax: float, *, bits: int) -> Grid:
    """The grid of a whole tensor whose levels span what occurs of [-amax, amax], and zero."""
    low, high = max(min(stats.min, 0.0), -amax), min(max(stats.max, 0.0), amax)
    below = int(_levels_below(low, high, bits))
    return Grid(positive_scale(high - low, 2**bits - 1), -below, 2**bits - 1 - below)


def mse_asymmetric(stats: TensorStats, *, bits: int) -> Grid:
    """The asymmetric grid of least mean (x - Q(x))**2 over the histogram.

    Both ends are clipped at one of 48 magnitudes, spaced evenly in log down to amax / 64; then scale and zero point are
    searched together, twice, ever closer to the best ones.
    """
    if stats.amax == 0:
        return asymmetric_grid(stats, 0.0, bits=bits)

    def best(tried: Iterable[Grid]) -> Grid:
        return min(tried, key=lambda grid: stats_error(stats, grid))

    grid = best(asymmetric_grid(stats, amax, bits=bits) for amax in stats.amax * 2.0 ** np.linspace(0, -6, 48))
    for moves, factors in ((range(-2, 3), np.linspace(-0.24, 0.24, 9)), (range(-1, 2), np.linspace(-0.06, 0.06, 9))):
        lowest = [qmin for move in moves if -(2**bits - 1) <= (qmin := grid.qmin + move) <= 0]
        grid = best(
            Grid(grid.scale * np.float32(2.0**factor), qmin, qmin + 2**bits - 1)
            for qmin in lowest
            for factor in factors
        )
    return grid


def positive_scale(span: np.ndarray | float, steps: int) -> np.ndarray:
    """span / steps in float32, or 1 where that is not a normal positive number: a dead channel's."""
    scale = np.asarray(span, np.float32) / np.float32(steps)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def stats_error(stats: TensorStats, grid: Grid) -> float:
    """Mean (x - Q(x))**2 estimated from the histogram, values spread evenly within their bin (width w).

    For a bin inside one rounding cell, or beyond the clipping level, this is exact: (center - q)^2 + w^2 / 12. A cell's
    bins are neighbours, so running sums give its share: S2 - 2 q S1 + q^2 S0 over its centers.
    """
    assert grid.axis is None
    centers, _ = stats.occupied
    levels = float(grid.scale) * np.arange(grid.qmin, grid.qmax + 1)
    inner = np.searchsorted(centers, (levels[:-1] + levels[1:]) / 2)
    s0, s1, s2 = np.diff(stats.running_sums[:, np.concatenate([[0], inner, [len(centers)]])], axis=1)
    error = float(np.sum(s2 - 2 * levels * s1 + levels**2 * s0))
    return max(error, 0.0) / stats.count + stats.bin_width**2 / 12


def stats_sqnr_db(stats: TensorStats, grid: Grid) -> float:
    """10 log10(mean x^2 / mean (x - Q(x))^2), the error estimated from the histogram; infinite for an exact grid."""
    return decibel(stats.mean_square, stats_error(stats, grid))


def sqnr_db(x: np.ndarray, approximation: np.ndarray) -> float:
    """10 log10(sum x^2 / sum (x - approximation)^2), sums in float64; infinite where they are equal."""
    wide = np.asarray(x, np.float64)
    return decibel(float(np.square(wide).sum()), float(np.square(wide - approximation).sum()))


def decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf

"""Which range to quantize: the largest |x| kept, of an array (weights) or of calibration statistics (activations).

A wide range rounds coarsely, a narrow one clips; the mse rules search for the balance. Weights: per output channel,
over the raw values, 80 shrunk candidates as in Q-Diffusion (Li et al., arXiv:2302.04304, released code). Activations:
per tensor, over the histogram.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.quant.grid import Grid, limits

SHRINKS = tuple(1 - 0.01 * i for i in range(80))
"""Candidates of a weight range, as fractions of the largest |w|."""

_BLOCK = 1 << 18  # weights searched at a time: the temporaries stay in cache, and memory stays bounded for any layer


@dataclass(frozen=True, eq=False)
class Range:
    """Symmetric range [-amax, amax]; amax float32 >= 0, () for a whole tensor or (C,) along `axis`."""

    amax: np.ndarray
    axis: int | None = None


def minmax_range(x: np.ndarray, *, axis: int | None = None) -> Range:
    """The largest |x|, of the whole array or per index of `axis`."""
    other = None if axis is None else tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return Range(np.maximum(x.max(axis=other), -x.min(axis=other)).astype(np.float32), axis)


def lp_range(x: np.ndarray, *, bits: int, axis: int | None = None, p: float = 2.0, narrow: bool = False) -> Range:
    """The candidate amax * (1 - 0.01 i), i = 0..79, of least mean |x - Q(x)|**p; ties go to the wider range.

    p = 2.4 is Q-Diffusion's published choice, p = 2 maximises SQNR. Rows are independent: (C,) ranges along `axis`.
    """
    widest = minmax_range(x, axis=axis)
    rows = x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    full = np.atleast_1d(widest.amax)
    best = np.empty_like(full)
    per_block = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), per_block):
        part = slice(start, start + per_block)
        best[part] = _search_rows(np.ascontiguousarray(rows[part], np.float32), full[part], bits, p, narrow)
    return Range(best.reshape(widest.amax.shape), axis)


def _search_rows(rows: np.ndarray, full: np.ndarray, bits: int, p: float, narrow: bool) -> np.ndarray:
    qmin, qmax = limits(bits, narrow=narrow)
    best, least = full.copy(), np.full(full.shape, np.inf)
    steps, q = np.empty_like(rows), np.empty_like(rows)
    for shrink in SHRINKS:
        amax = (full * np.float32(shrink)).astype(np.float32)
        scale = positive_scale(amax, qmax)[:, None]
        np.divide(rows, scale, out=steps)
        np.rint(steps, out=q)
        np.clip(q, qmin, qmax, out=q)
        np.subtract(steps, q, out=q)  # the error, in steps of the grid
        if p == 2.0:
            error = np.matmul(q[:, None, :], q[:, :, None]).ravel().astype(np.float64)
        else:
            error = np.power(np.abs(q, out=q), np.float32(p), out=q).sum(axis=1, dtype=np.float64)
        error *= scale[:, 0].astype(np.float64) ** p
        better = error < least
        best[better], least[better] = amax[better], error[better]
    return best


def _whole(amax: float) -> Range:
    return Range(np.asarray(amax, np.float32))


def minmax_stats(stats: TensorStats) -> Range:
    return _whole(stats.amax)


def percentile_stats(stats: TensorStats, *, percentile: float) -> Range:
    """The value that `percentile` % of all |x| do not exceed, interpolated within its bin; 100 is the largest |x|."""
    assert 0 < percentile <= 100
    negative, positive = np.split(stats.counts, 2)
    cumulative = np.cumsum(positive + negative[::-1])  # bin k: k w <= |x| < (k + 1) w
    wanted = percentile / 100 * stats.count
    k = int(np.searchsorted(cumulative, wanted))
    below = cumulative[k - 1] if k else 0
    inside = (wanted - below) / (cumulative[k] - below)
    return _whole(min((k + inside) * stats.bin_width, stats.amax))


def mse_stats(stats: TensorStats, *, bits: int) -> Range:
    """The range of least mean (x - Q(x))**2 over the histogram, rounding and clipping together.

    96 ranges spaced evenly in log from amax down to amax / 64, then 33 around the best one.
    """
    if stats.amax == 0:
        return _whole(0.0)

    def best(tried: np.ndarray) -> float:
        errors = [stats_error(stats, grid_from_range(_whole(amax), bits=bits)) for amax in tried]
        return float(tried[np.argmin(errors)])

    coarse = best(stats.amax * 2.0 ** np.linspace(0, -6, 96))
    return _whole(best(np.minimum(coarse * 2.0 ** np.linspace(-0.06, 0.06, 33), stats.amax)))


def grid_from_range(r: Range, *, bits: int, narrow: bool = False) -> Grid:
    """The grid whose largest level is amax; a range of width zero (a dead channel) gets scale 1 and integers 0."""
    qmin, qmax = limits(bits, narrow=narrow)
    return Grid(positive_scale(r.amax, qmax), qmin, qmax, r.axis)


def positive_scale(amax: np.ndarray, qmax: int) -> np.ndarray:
    """amax / qmax in float32, or 1 where that is not a normal positive number."""
    scale = np.asarray(amax, np.float32) / np.float32(qmax)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def stats_error(stats: TensorStats, grid: Grid) -> float:
    """Mean (x - Q(x))**2 estimated from the histogram, values spread evenly within their bin (width w).

    For a bin inside one rounding cell, or beyond the clipping level, this is exact: (center - q)^2 + w^2 / 12.
    """
    assert grid.axis is None
    centers, counts = stats.occupied()
    scale = float(grid.scale)
    q = np.clip(np.rint(centers / scale), grid.qmin, grid.qmax)
    error = (centers - scale * q) ** 2
    return float(error @ counts) / stats.count + stats.bin_width**2 / 12


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

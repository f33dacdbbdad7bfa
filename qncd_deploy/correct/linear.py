"""Linear maps from what the sampler has at hand, the output q and the state x, to the float network's output e. Ours.

    filter   e ~= q + conv3x3([q, x], f) + b      2C C 9 + C numbers a call
    mix      e ~= a q + b                         a (C, C) mixes channels
    map      e ~= q + b                           b (C, H, W): one number an element

Ridge regression on teacher-forced pairs. A filter contains a bias, a slope, least squares and mixing as special cases,
so the published affine corrections are its ablations. Least squares shrinks: what it leaves over it does not return, so
that a deterministic sampler removes too little noise (see `var`, and choose on free-running pictures).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qncd_deploy.correct.fitting import Pairs, Study
from qncd_deploy.correct.moments import checked_pairs, eps_variance, shrunk_mean
from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import CalibrationError

RIDGE = 1e-4
"""Per sample, of the mean power of the columns."""

POSITIONS_PER_COEFFICIENT = 4
"""Fewer positions than this for each number of a row fit their own noise."""

_CHUNK = 1 << 24  # numbers of the design matrix held at a time


def fit_filter(study: Study) -> tuple[StepFix, ...]:
    """f (C, 2C, 3, 3), b (C,) and the variance that they leave over, by call.

    Raises CalibrationError for too few pictures, and as checked_pairs does.
    """
    return tuple(_filter_row(study, pairs) for pairs in checked_pairs(study, method="filter", per="channel"))


def fit_mix(study: Study) -> tuple[StepFix, ...]:
    """a (C, C), b (C,) and the variance that they leave over, by call.

    Raises CalibrationError for too few pictures, and as checked_pairs does.
    """
    return tuple(_mix_row(study, pairs) for pairs in checked_pairs(study, method="mix", per="channel"))


def fit_map(study: Study) -> tuple[StepFix, ...]:
    """b (C, H, W), minus the mean error of every element, taken towards 0 where pictures disagree, by call.

    Raises CalibrationError as checked_pairs does.
    """
    return tuple(_map_row(study, pairs) for pairs in checked_pairs(study, method="map", per="element"))


def _filter_row(study: Study, pairs: Pairs) -> StepFix:
    channels = pairs.q.shape[1]
    seen = np.concatenate([pairs.q, pairs.x], axis=1)
    solved = _regress("filter", seen, pairs.e - pairs.q, design=_taps, columns=18 * channels)
    kernel = solved.weights[:-1].T.reshape(channels, 2 * channels, 3, 3)
    return StepFix(f=kernel, b=solved.weights[-1], var=eps_variance(solved.residual, pairs.step, study.prediction))


def _mix_row(study: Study, pairs: Pairs) -> StepFix:
    channels = pairs.q.shape[1]
    solved = _regress("mix", pairs.q, pairs.e - pairs.q, design=_flat, columns=channels)
    a = np.eye(channels) + solved.weights[:-1].T
    return StepFix(a=a, b=solved.weights[-1], var=eps_variance(solved.residual, pairs.step, study.prediction))


def _map_row(study: Study, pairs: Pairs) -> StepFix:
    mean = shrunk_mean(pairs.error)
    return StepFix(b=-mean, var=eps_variance(np.square(pairs.error - mean), pairs.step, study.prediction))


@dataclass(frozen=True, eq=False)
class _Solved:
    """weights (columns + 1, C), the intercept last; residual: mean square of what is left."""

    weights: np.ndarray
    residual: float


def _regress(
    method: str, seen: np.ndarray, wanted: np.ndarray, *, design: Callable[[np.ndarray], np.ndarray], columns: int
) -> _Solved:
    """Ridge regression by its normal equations, the intercept not penalized.

    seen (N, K, H, W), of which design makes (positions, columns);  wanted (N, C, H, W).
    Raises CalibrationError for fewer pictures than make up POSITIONS_PER_COEFFICIENT.
    """
    count, channels, height, width = wanted.shape
    numbers = columns + 1
    least = math.ceil(POSITIONS_PER_COEFFICIENT * numbers / (height * width))
    if count < least:
        raise CalibrationError(
            f"{method}: {count} pictures of {height}x{width} to fit on, {numbers} numbers for every channel take at "
            f"least {least}. Fit on more pictures."
        )
    gram, cross, power = np.zeros((numbers, numbers)), np.zeros((numbers, channels)), 0.0
    at_a_time = max(1, _CHUNK // (columns * height * width))
    for start in range(0, count, at_a_time):
        part = slice(start, start + at_a_time)
        known = design(seen[part])
        known = np.concatenate([known, np.ones((len(known), 1), np.float32)], axis=1).astype(np.float64)
        target = _flat(wanted[part]).astype(np.float64)
        gram += known.T @ known
        cross += known.T @ target
        power += float(np.square(target).sum())
    penalty = RIDGE * (np.diag(gram)[:-1].mean() or 1.0) * np.eye(numbers)
    penalty[-1, -1] = 0
    weights = np.linalg.solve(gram + penalty, cross)
    left = power - 2 * np.sum(weights * cross) + np.sum(weights * (gram @ weights))
    return _Solved(weights, max(0.0, float(left)) / wanted.size)


def _flat(planes: np.ndarray) -> np.ndarray:
    """(N, C, H, W) to (N H W, C)."""
    return planes.transpose(0, 2, 3, 1).reshape(-1, planes.shape[1])


def _taps(planes: np.ndarray) -> np.ndarray:
    """Every position's 3x3 neighbourhood, zero outside: (N, C, H, W) to (N H W, 9 C), taps of a channel together."""
    padded = np.pad(planes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 9 * planes.shape[1])

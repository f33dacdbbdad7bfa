"""Linear maps from what the sampler has at hand, the output q and the state x, to the float network's output e. Ours.

    filter   e ~= q + conv3x3([q, x], f) + b      2C C 9 + C numbers a call
    mix      e ~= a q + b                         a (C, C) mixes channels
    map      e ~= q + b                           b (C, H, W): one number an element

Ridge regression on teacher-forced pairs. A filter contains a bias, a slope, least squares and mixing as special cases,
so the published affine corrections are its ablations. Least squares shrinks: what it leaves over it does not return, so
that a deterministic sampler removes too little noise (see `var`, and choose on free-running pictures).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qncd_deploy.correct.fitting import Pairs, Study
from qncd_deploy.correct.moments import checked_pairs, eps_variance, shrunk_mean
from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import CalibrationError

RIDGE = 1e-4
"""Per sample, of the mean power of the columns."""

SAMPLES_PER_COEFFICIENT = 4
"""Fewer positions than this for each number of a row fit their own noise."""

_CHUNK = 1 << 24  # numbers of the design matrix held at a time


def fit_filter(study: Study) -> tuple[StepFix, ...]:
    """f (C, 2C, 3, 3), b (C,) and the variance that they leave over, by call.

    Raises CalibrationError for too few pictures.
    """
    return tuple(filter_row(pairs.call, study, pairs.x, pairs.q, pairs.e) for pairs in study.pairs())


def filter_row(call: int, study: Study, x: np.ndarray, q: np.ndarray, e: np.ndarray) -> StepFix:
    """The filter of one call from any inputs x (N, C, H, W), outputs q there, and the outputs e that are wanted."""
    channels = q.shape[1]
    both = np.concatenate([q, x], axis=1)
    solved = _regress("filter", (_taps(part) for part in _chunks(both, 18 * channels)), _chunks(e - q, 18 * channels))
    kernel = solved.weights[:-1].T.reshape(channels, 2 * channels, 3, 3)
    var = eps_variance(solved.residual, study.steps[call], study.prediction)
    return StepFix(f=kernel, b=solved.weights[-1], var=var)


def fit_mix(study: Study) -> tuple[StepFix, ...]:
    """a (C, C), b (C,) and the variance that they leave over, by call. Raises CalibrationError for too few pictures."""
    return tuple(_mix_row(study, pairs) for pairs in study.pairs())


def fit_map(study: Study) -> tuple[StepFix, ...]:
    """b (C, H, W), minus the mean error of every element, taken towards 0 where pictures disagree, by call.

    Raises CalibrationError for too few pictures.
    """
    return tuple(_map_row(study, pairs) for pairs in checked_pairs(study, method="map", per="element"))


def _mix_row(study: Study, pairs: Pairs) -> StepFix:
    channels = pairs.q.shape[1]
    solved = _regress("mix", map(_flat, _chunks(pairs.q, channels)), _chunks(pairs.e - pairs.q, channels))
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


def _regress(name: str, designs: Iterator[np.ndarray], targets: Iterator[np.ndarray]) -> _Solved:
    """Ridge regression by its normal equations, the intercept not penalized.

    designs: (rows, columns) each; targets: (n, C, H, W) each, of the same rows.
    """
    gram = cross = power = 0.0
    count = 0
    for design, target in zip(designs, targets, strict=True):
        columns = np.concatenate([design, np.ones((len(design), 1), np.float32)], axis=1).astype(np.float64)
        wanted = _flat(target).astype(np.float64)
        gram = gram + columns.T @ columns
        cross = cross + columns.T @ wanted
        power = power + np.square(wanted).sum()
        count += len(columns)
    assert isinstance(gram, np.ndarray) and isinstance(cross, np.ndarray)
    if count < SAMPLES_PER_COEFFICIENT * len(gram):
        raise CalibrationError(
            f"{name}: {count} samples for {len(gram)} coefficients a channel, {SAMPLES_PER_COEFFICIENT} for each are "
            "the least. Fit on more pictures (--fit-size)."
        )
    penalty = RIDGE * (np.diag(gram)[:-1].mean() or 1.0) * np.eye(len(gram))
    penalty[-1, -1] = 0
    weights = np.linalg.solve(gram + penalty, cross)
    left = power - 2 * np.sum(weights * cross) + np.sum(weights * (gram @ weights))
    return _Solved(weights, max(0.0, float(left)) / (count * cross.shape[1]))


def _chunks(planes: np.ndarray, columns: int) -> Iterator[np.ndarray]:
    """(N, C, H, W) in runs of pictures whose design matrix of so many columns fits in memory."""
    pictures = max(1, _CHUNK // (columns * planes.shape[2] * planes.shape[3]))
    for start in range(0, len(planes), pictures):
        yield planes[start : start + pictures]


def _flat(planes: np.ndarray) -> np.ndarray:
    """(N, C, H, W) to (N H W, C)."""
    return planes.transpose(0, 2, 3, 1).reshape(-1, planes.shape[1])


def _taps(planes: np.ndarray) -> np.ndarray:
    """Every position's 3x3 neighbourhood, zero outside: (N, C, H, W) to (N H W, 9 C), taps of a channel together."""
    padded = np.pad(planes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 9 * planes.shape[1])

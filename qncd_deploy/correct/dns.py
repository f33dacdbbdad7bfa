"""DNS: an unbiased affine correction, and a target with room for the noise that it leaves (ICML 2026).

    D = k e + b + r per call and channel;  eps = (q - b) / (1 + k)
    V = (IQR(r) / 1.349)^2 / (1 + k)^2, averaged over channels
    a deterministic step aims at p instead of abar', so that the noise it brings in makes up for the difference:
    p = abar' (1 + B(p)^2 V),  B(p) = sqrt(1 - p) - sqrt(p (1 - abar) / abar),   then x <- sqrt(abar' / p) x

The state is then as noisy at abar' as the schedule says. From paper and released code: no bound on k, the robust scale
of r (its tails are heavy), no new target in the last step. Fitted here on the float sampler's states, in the paper on
generated pictures noised again. Ours: with a multistep sampler V counts the older outputs that the update uses
(residual.py; DPM-Solver++'s extrapolation is the one for abar'); a stochastic step keeps its target and takes V out of
its own noise, as PTQD does. The kurtosis correction, which the paper's final version dropped, is not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qncd_deploy.correct.fitting import Pairs, Study
from qncd_deploy.correct.moments import Moments, checked_pairs, eps_variance, invertible, ratio
from qncd_deploy.correct.record import StepFix
from qncd_deploy.correct.residual import update_variances
from qncd_deploy.schedule import Prediction
from qncd_deploy.steps import Step

_IQR = 1.349  # of N(0, 1)
_HALVINGS = 60


def fit(study: Study) -> tuple[StepFix, ...]:
    """The affine part per channel and the targets. Raises CalibrationError as checked_pairs does."""
    rows = [_row(p, study.prediction) for p in checked_pairs(study, method="dns", per="channel")]
    return with_target(rows, study.steps, prediction=study.prediction)


def with_target(rows: Sequence[StepFix], steps: Sequence[Step], *, prediction: Prediction) -> tuple[StepFix, ...]:
    """The rows aimed at p for their own var: the variance of eps that is left once the row has acted.

    Stochastic rows, the last one, and one whose noise no target can hold stay as they are.
    """
    variances = update_variances(steps, [row.var for row in rows], prediction=prediction)
    last = len(steps) - 1
    return tuple(
        row if call == last or step.std > 0 else _aimed(row, step, variance)
        for call, (row, step, variance) in enumerate(zip(rows, steps, variances, strict=True))
    )


def _row(pairs: Pairs, prediction: Prediction) -> StepFix:
    found = Moments.of(pairs)
    k = invertible(ratio(found.cov_e_error, found.var_e))
    intercept = found.mean_error - k * found.mean_e
    low, high = np.percentile(pairs.error - k.reshape(-1, 1, 1) * pairs.e, (25, 75), axis=(0, 2, 3))
    var = eps_variance(((high - low) / _IQR / (1 + k)) ** 2, pairs.step, prediction)
    return StepFix(a=1 / (1 + k), b=-intercept / (1 + k), var=var)


def _aimed(row: StepFix, step: Step, variance: float) -> StepFix:
    """variance: of the state after the untouched update, which is B(abar')^2 V."""
    if variance == 0:
        return row
    target = step.abar_next
    var = variance / _direction(step, target) ** 2

    def lacking(p: float) -> float:
        return target * (1 + _direction(step, p) ** 2 * var) - p

    if lacking(1.0) >= 0:
        return row
    low, high = target, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if lacking(middle) > 0 else (low, middle)
    return replace(row, abar_next=high, x_mul=math.sqrt(target / high))


def _direction(step: Step, p: float) -> float:
    """B(p): how far the state at p moves per unit of eps."""
    return math.sqrt(1 - p) - math.sqrt(p * (1 - step.abar) / step.abar)

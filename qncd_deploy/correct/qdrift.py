"""Q-Drift: quantization noise as diffusion, balanced by going further (arXiv:2603.18095).

    V = Var(D | q) = sd_D^2 (1 - rho^2),  rho = Corr(q, D), one number a call, outliers of D left out; in units of eps
    y = x / a, sigma = b / a:  y' = y + gain (y'_sampler - y)
    one step at a time    gain = 1 + (sigma - sigma') / (2 sigma) V
    multistep             gain = 1 + Var(y') / (sigma^2 - sigma'^2),  Var(y') = Var(x') / abar' of residual.py

Both gains are the paper's: the first for Euler, which is DDIM with eta 0, the second for DPM-Solver++ 2M and, our
extension, PLMS. The paper leaves stochastic samplers alone, and so does this. By default it corrects no mean, and none
is corrected here; with_gain adds the gain to rows that do, for what they leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qncd_deploy.correct.fitting import Study
from qncd_deploy.correct.moments import Moments, checked_pairs, eps_variance, ratio
from qncd_deploy.correct.record import StepFix
from qncd_deploy.correct.residual import sigma_of, update_variances
from qncd_deploy.schedule import Prediction
from qncd_deploy.steps import Step


def fit(study: Study) -> tuple[StepFix, ...]:
    """Rows with nothing but the gain, and V as their var, which the samplers in question do not use.

    Rows of a stochastic sampler change nothing. Raises CalibrationError as checked_pairs does.
    """
    if _stochastic(study.steps):
        return tuple(StepFix() for _ in study.steps)
    rows = []
    for pairs in checked_pairs(study, method="qdrift", per="scalar"):
        found = Moments.of(pairs, pooled=True, trim=True)
        given = found.var_error - ratio(found.cov_q_error**2, found.var_q)
        rows.append(StepFix(var=max(0.0, eps_variance(given, pairs.step, study.prediction))))
    return with_gain(rows, study.steps, prediction=study.prediction)


def with_gain(rows: Sequence[StepFix], steps: Sequence[Step], *, prediction: Prediction) -> tuple[StepFix, ...]:
    """The rows with the gain for their own var: the variance of eps that is left once the row has acted.

    Rows of a stochastic sampler stay as they are: it takes var out of its own noise.
    """
    if _stochastic(steps):
        return tuple(rows)
    multistep = any(step.push for step in steps)
    variances = update_variances(steps, [row.var for row in rows], prediction=prediction)
    return tuple(
        replace(row, gain=_gain(step, variance if multistep else None, row.var))
        for row, step, variance in zip(rows, steps, variances, strict=True)
    )


def _gain(step: Step, update_variance: float | None, var: float) -> float:
    if step.abar == 0 or step.abar_next <= step.abar:
        return 1.0
    sigma, target = sigma_of(step.abar), sigma_of(step.abar_next)
    if update_variance is None:
        return 1 + (sigma - target) / (2 * sigma) * var
    return 1 + update_variance / step.abar_next / (sigma**2 - target**2)


def _stochastic(steps: Sequence[Step]) -> bool:
    return any(step.std > 0 for step in steps)

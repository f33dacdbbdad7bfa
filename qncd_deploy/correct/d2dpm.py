"""D2-DPM: the quantization noise that a joint Gaussian with the output predicts (Zeng et al., arXiv:2501.08180).

    (q, D) ~ N per call;  rho = Cov(q, D) / (sd_q sd_D), clipped to +-0.9999
    m(q) = mu_D + rho sd_D / sd_q (q - mu_q),   v = sd_D^2 (1 - rho^2)
    deterministic (D-D2)    eps = q - m(q),              std'^2 = max(0, std^2 - B^2 v)
    stochastic    (S-D2)    eps = q - m(q) - sqrt(v) n,  n ~ N(0, I)

Paper and released code have a form with one Gaussian a call for all channels, here `:paper`, and one with a Gaussian
per channel, here the plain name; both leave out pairs whose D is more than 4 standard deviations off. The code computes
B with the reduced std ("s_eff"); the plain name uses the sampler's own, as the formula needs. v is averaged over
channels here, where the code has one per channel: the sampler's own noise is one number.

Since m(q) is the regression on q and not on e, eps is shrunk towards the mean: the least squared error, but too little
noise is removed in a deterministic sampler, unless S-D2 puts the residual back. S-D2 draws its noise on every sampler,
deterministic ones too (the noise source's own stream, so results stay reproducible). The paper has DDIM; the
correction acts on the output alone and is the same for every sampler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from qncd_deploy.correct.fitting import Study
from qncd_deploy.correct.moments import Moments, checked_pairs, eps_variance, ratio
from qncd_deploy.correct.record import StepFix
from qncd_deploy.steps import Step

LARGEST_RHO = 0.9999


def fit(study: Study) -> tuple[StepFix, ...]:
    """D-D2 per channel. Raises CalibrationError as checked_pairs does.

    var of a row whose sampler adds no noise changes nothing there: it says what is left of the error.
    """
    return tuple(StepFix(a=a, b=b, var=v) for _, a, b, v in _conditionals(study, method="d2dpm", pooled=False))


def fit_paper(study: Study) -> tuple[StepFix, ...]:
    """D-D2 with one Gaussian for all channels, the reduced std in B. Raises CalibrationError as checked_pairs does."""
    return tuple(
        StepFix(a=a, b=b, var=v, coef="s" if step.keep else "s_eff")  # ddpm has no direction weight to recompute
        for step, a, b, v in _conditionals(study, method="d2dpm:paper", pooled=True)
    )


def fit_stochastic(study: Study) -> tuple[StepFix, ...]:
    """S-D2 per channel. Raises CalibrationError as checked_pairs does."""
    return _stochastic(study, method="s-d2dpm", pooled=False)


def fit_stochastic_paper(study: Study) -> tuple[StepFix, ...]:
    """S-D2 with one Gaussian for all channels. Raises CalibrationError as checked_pairs does."""
    return _stochastic(study, method="s-d2dpm:paper", pooled=True)


def _stochastic(study: Study, *, method: str, pooled: bool) -> tuple[StepFix, ...]:
    return tuple(
        StepFix(a=a, b=b, z_std=math.sqrt(v)) for _, a, b, v in _conditionals(study, method=method, pooled=pooled)
    )


def _conditionals(study: Study, *, method: str, pooled: bool) -> Iterator[tuple[Step, np.ndarray, np.ndarray, float]]:
    """Per call: the step, eps = a q + b, and v in units of eps."""
    for pairs in checked_pairs(study, method=method, per="scalar" if pooled else "channel"):
        found = Moments.of(pairs, pooled=pooled, trim=True)
        sd_q, sd_error = np.sqrt(found.var_q), np.sqrt(found.var_error)
        rho = np.clip(ratio(found.cov_q_error, sd_q * sd_error), -LARGEST_RHO, LARGEST_RHO)
        slope = rho * ratio(sd_error, sd_q)
        v = eps_variance(found.var_error * (1 - rho**2), pairs.step, study.prediction)
        yield pairs.step, 1 - slope, slope * found.mean_q - found.mean_error, v

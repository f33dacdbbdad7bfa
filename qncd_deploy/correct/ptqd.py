"""PTQD: a correlated part and a residual of the quantization noise, and the sampler's noise reduced by the residual.

    q = (1 + k) e + mu + r,  r uncorrelated with e        eps = (q - mu) / (1 + k),  var = Var(r) / (1 + k)^2
    std'^2 = max(0, std^2 - B^2 var)                      He et al., arXiv:2305.10657

              `ptqd:paper`, the released code                     `ptqd`, repaired
    k         slope over all channels, negative ones set to 0     the same with an intercept per channel, of any sign;
                                                                  0 where k e explains too little of q - e
    mu        mean of q - e per channel, k mean(e) included       mean of q - e - k e per channel, shrunk by its error
    Var(r)    square of the mean over pictures of the standard    over pictures and space, channel means removed
              deviation over all channels
    B         from the reduced std ("s_eff")                      from the sampler's own std, as the formula needs

The paper sets negative k to 0 as well, but takes mu and Var(r) from the residual, as the repair does; of B it says
nothing that could be had. Where the sampler adds no noise, var changes nothing: the paper's method is then
the affine part alone. It stays in the row as what is left of the error, which qdrift.with_gain and dns.with_target
read. The paper has DDIM and DDPM; the affine part is the same for every sampler, and Euler-ancestral is DDIM's eta 1.
The paper's mixed precision per step needs two engines and is not here.
"""

from __future__ import annotations

import numpy as np

from qncd_deploy.correct.fitting import Pairs, Study
from qncd_deploy.correct.moments import (
    Moments,
    checked_pairs,
    eps_variance,
    invertible,
    picture_means,
    ratio,
    shrunk_mean,
)
from qncd_deploy.correct.record import StepFix
from qncd_deploy.schedule import Prediction

MIN_R2 = 0.05


def fit(study: Study, *, min_r2: float = MIN_R2) -> tuple[StepFix, ...]:
    """The repaired form: one k and (C,) means a call.

    min_r2: k is 0 where its share in the variance of q - e is below; ours, since the slope of a small share is mostly
    noise and dividing by it is not free.
    Raises CalibrationError as checked_pairs does.
    """
    pairs = checked_pairs(study, method="ptqd", per="channel")
    return tuple(_row(p, study.prediction, min_r2) for p in pairs)


def fit_paper(study: Study) -> tuple[StepFix, ...]:
    """The released code's form. Raises CalibrationError as checked_pairs does."""
    pairs = checked_pairs(study, method="ptqd:paper", per="channel")
    return tuple(_paper_row(p, study.prediction) for p in pairs)


def _row(pairs: Pairs, prediction: Prediction, min_r2: float) -> StepFix:
    found = Moments.of(pairs)
    along, var_e, var_error = found.cov_e_error.sum(), found.var_e.sum(), found.var_error.sum()
    k = float(invertible(ratio(along, var_e)))
    if along**2 < min_r2 * var_e * var_error:
        k = 0.0
    mu = shrunk_mean(picture_means(pairs.error) - k * picture_means(pairs.e))
    var = eps_variance(found.residual(k) / (1 + k) ** 2, pairs.step, prediction)
    return StepFix(a=1 / (1 + k), b=-mu / (1 + k), var=var)


def _paper_row(pairs: Pairs, prediction: Prediction) -> StepFix:
    found = Moments.of(pairs, pooled=True)
    k = max(0.0, float(ratio(found.cov_e_error, found.var_e)))
    mu = pairs.error.mean(axis=(0, 2, 3), dtype=np.float64)
    residual = pairs.error - k * pairs.e
    std = residual.std(axis=(1, 2, 3), dtype=np.float64, ddof=1).mean()
    var = eps_variance(std**2 / (1 + k) ** 2, pairs.step, prediction)
    # ddpm has no direction weight to recompute
    return StepFix(a=1 / (1 + k), b=-mu / (1 + k), var=var, coef="s" if pairs.step.keep else "s_eff")

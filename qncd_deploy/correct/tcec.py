"""TCEC in its safe form: an error proportional to the output, taken out where it arises (arXiv:2508.12094).

    D = K q  per call and channel,  K = sum q D / ((1 + lambda1) sum q^2),      eps = (1 - K) q

The paper estimates the error of the state, d' = A d + B D, from the outputs of the two newest calls, and subtracts it
at every step. Its equation 18 and lambda1 could not be had. Subtracting the error of this call and the propagated one
of the call before counts every error twice, once here and once there, if what was subtracted is not taken off the sum
(on Gaussian data the samples spread almost twice as wide); with it taken off, this form is what remains, which equals
the least-squares factor of TAC's NER without a mask. lambda1 relative to sum q^2, so that it has no unit, is ours.

The paper has DDIM and DPM-Solver++; this form acts on the output alone and is the same for every sampler.
"""

from __future__ import annotations

import numpy as np

from qncd_deploy.correct.fitting import Study
from qncd_deploy.correct.moments import checked_pairs, ratio
from qncd_deploy.correct.record import StepFix

LAMBDA1 = 0.01


def fit(study: Study, *, lambda1: float = LAMBDA1) -> tuple[StepFix, ...]:
    """One (C,) factor a call. Raises CalibrationError as checked_pairs does."""
    rows = []
    for pairs in checked_pairs(study, method="tcec", per="channel"):
        along = (pairs.q * pairs.error).sum(axis=(0, 2, 3), dtype=np.float64)
        power = np.square(pairs.q).sum(axis=(0, 2, 3), dtype=np.float64)
        rows.append(StepFix(a=1 - ratio(along, (1 + lambda1) * power)))
    return tuple(rows)

"""TAC-Diffusion: outputs rescaled per call and channel, then the drift of the state taken out (Yao et al., ECCV 2024).

    NER   out = K q where |q| >= thr mean|q|, else q;  over the masked numbers of a channel, n of them, K minimizes
          (1 - l1) sum (K q - e)^2 / E[e^2]  +  l1 sum (K q - e)^2 / (e^2 + delta)  +  l2 n (K - 1)^2
          delta = (0.1 rms e)^2
    IBC   x_in = x + E[x_float - x],  call by call on the free run, all earlier corrections on

The paper's abstract names both parts: absolute and relative error with a mask, and the input's bias. Its lambdas, its
mask, how many pictures it fits on and whether the bias is per channel or per element could not be had, and no code is
public. `tac:paper` has NER as SegQuant's public code re-implements it, with the defaults of that code:

              `tac:paper`                                         `tac`, repaired
    sums      for each picture; K is the mean of their K          pooled over pictures
    terms     n = C H W times the relative term and l2, against   each of the size of n, so that l1 and l2 weigh what
              sums over a plane: the relative term decides        they name and K does not depend on the output's unit
    relative  q / (e + 1e-7) against q^2 / (e^2 + 1e-7)           q e and q^2 over e^2 + delta, which cannot explode
    mask      in use only, q > thr mean|q|: never negative ones   in fit and use, |q| >= thr mean|q|
    IBC       plain means                                         means shrunk by their error

(That code's own treatment of the state stores noise predictions in its place, so IBC is ours in both.) Its K hangs on
the smallest |e| of each plane, where q is mostly quantization noise: with 4-bit weights rounded to nearest, DDIM and
eta 0, the demo's latents came out 20 dB further from the float ones than without a correction.

With l1 = l2 = thr = 0, K is the least-squares slope through the origin. Corrections act on input and output alone, so
any sampler takes them; the statistics are of the sampler at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from qncd_deploy.correct.fitting import Pairs, Study
from qncd_deploy.correct.moments import (
    checked_pairs,
    picture_means,
    ratio,
    require_finite,
    require_pictures,
    shrunk_mean,
)
from qncd_deploy.correct.record import StepFix

LAMBDA1, LAMBDA2, THRESHOLD = 0.5, 0.1, 1.0
_RELATIVE_FLOOR = 0.1
_PAPER_FLOOR = 1e-7


def fit(
    study: Study, *, lambda1: float = LAMBDA1, lambda2: float = LAMBDA2, thr: float = THRESHOLD
) -> tuple[StepFix, ...]:
    """NER and IBC, repaired, per channel. Raises CalibrationError as fit_ner and fit_ibc do."""
    return fit_ibc(study, fit_ner(study, lambda1=lambda1, lambda2=lambda2, thr=thr))


def fit_paper(
    study: Study, *, lambda1: float = LAMBDA1, lambda2: float = LAMBDA2, thr: float = THRESHOLD
) -> tuple[StepFix, ...]:
    """NER as re-implemented in public, and IBC. Raises CalibrationError as checked_pairs and fit_ibc do."""
    rows = [
        StepFix(a=_paper_factor(p, lambda1, lambda2), thr=thr, mask="one-sided")
        for p in checked_pairs(study, method="tac:paper", per="channel")
    ]
    return fit_ibc(study, rows, shrink=False)


def fit_ner(
    study: Study, *, lambda1: float = LAMBDA1, lambda2: float = LAMBDA2, thr: float = THRESHOLD
) -> tuple[StepFix, ...]:
    """The output's part alone, repaired; teacher-forced. Raises CalibrationError as checked_pairs does."""
    pairs = checked_pairs(study, method="tac", per="channel")
    return tuple(StepFix(a=_factor(p, lambda1, lambda2, thr), thr=thr) for p in pairs)


def fit_ibc(
    study: Study, rows: Sequence[StepFix], *, per: Literal["channel", "element"] = "channel", shrink: bool = True
) -> tuple[StepFix, ...]:
    """The rows with x_add in place of any that they had: (C,) or (C, H, W), strictly in order of the calls.

    Row i's is measured on the free run that all rows before it have steered, itself corrected. shrink: see
    moments.shrunk_mean. Costs one pass of the quantized network.
    Raises CalibrationError: too few pictures, or a state that is not finite.
    """
    require_pictures(study, method="input correction", per=per)
    run = study.run()
    fitted: list[StepFix] = []
    for call, row in enumerate(rows):
        drift = study.exact(call) - run.x
        require_finite(drift, method="input correction", what=f"the state before call {call}")
        if per == "channel":
            drift = picture_means(drift)
        added = shrunk_mean(drift) if shrink else drift.mean(axis=0, dtype=np.float64)
        fitted.append(replace(row, x_add=added if added.any() else 0.0))
        if call + 1 < len(rows):
            run.advance(fitted[-1])
    return tuple(fitted)


def _factor(pairs: Pairs, lambda1: float, lambda2: float, thr: float) -> np.ndarray:
    """K (C,)."""
    size = np.abs(pairs.q)
    chosen = size >= thr * size.mean(axis=(1, 2, 3), keepdims=True)
    power = np.mean(np.square(pairs.e), axis=(0, 2, 3), dtype=np.float64, keepdims=True)
    power = np.maximum(power, np.finfo(np.float32).tiny)
    weight = (1 - lambda1) / power + lambda1 / (np.square(pairs.e) + _RELATIVE_FLOOR**2 * power)

    def total(values: np.ndarray) -> np.ndarray:
        return np.asarray(values.sum(axis=(0, 2, 3), dtype=np.float64, where=chosen))

    prior = lambda2 * chosen.sum(axis=(0, 2, 3))
    along, squared = total(weight * pairs.q * pairs.e) + prior, total(weight * pairs.q * pairs.q) + prior
    return np.where(squared > 0, ratio(along, squared), 1.0)


def _paper_factor(pairs: Pairs, lambda1: float, lambda2: float) -> np.ndarray:
    """K (C,)."""
    q, e = pairs.q.astype(np.float64), pairs.e.astype(np.float64)
    count = q[0].size

    def totals(absolute: np.ndarray, relative: np.ndarray) -> np.ndarray:
        sums = (1 - lambda1) * absolute.sum(axis=(2, 3)) + lambda1 * count * relative.sum(axis=(2, 3))
        return sums + lambda2 * count

    factors = totals(q * e, q / (e + _PAPER_FLOOR)) / totals(q**2, q**2 / (e**2 + _PAPER_FLOOR))
    return (factors + _PAPER_FLOOR).mean(axis=0)

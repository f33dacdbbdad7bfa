"""What several papers fit from: means and covariances of paired outputs, how sure a mean is, and how many pictures.

    D = q - e,  q and e the quantized and the float network's raw output at the same input.

Moments are over pictures and space, of each channel or of all channels together, in float64. Outliers, where a paper
removes them: pairs whose D lies more than 4 standard deviations from its mean (D2-DPM, Q-Drift).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qncd_deploy.correct.fitting import Pairs, Study
from qncd_deploy.errors import CalibrationError
from qncd_deploy.schedule import Prediction
from qncd_deploy.steps import Step, output_per_eps

LEAST_PICTURES = {"scalar": 2, "channel": 4, "element": 16}
"""Pictures that a fit of so many numbers a call takes at least; ours. Pixels of one picture err together, so what
counts is pictures: 2 are needed to tell their scatter at all, a mean keeps 1 / N of it, and an element's mean is over
pictures alone."""

TRIM = 4.0
LEAST_SLOPE = 0.1
"""q = (1 + k) e is inverted only down to this 1 + k: below it q hardly follows e, and its noise would grow tenfold."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Of one call, float64: (C,) for each channel, () for all channels together."""

    mean_e: np.ndarray
    mean_error: np.ndarray
    var_e: np.ndarray
    var_error: np.ndarray
    cov_e_error: np.ndarray

    @classmethod
    def of(cls, pairs: Pairs, *, pooled: bool = False, trim: bool = False) -> Moments:
        """pooled: all channels together;  trim: without the outliers of D."""
        axis = None if pooled else (0, 2, 3)
        error = pairs.error

        def mean(values: np.ndarray, where: np.ndarray | bool = True) -> np.ndarray:
            return np.asarray(values.mean(axis=axis, dtype=np.float64, keepdims=True, where=where))

        kept: np.ndarray | bool = True
        if trim:
            off = np.abs(error - mean(error))
            kept = off <= TRIM * np.sqrt(mean(off**2))
        mean_e, mean_error = mean(pairs.e, kept), mean(error, kept)
        e, error = pairs.e - mean_e, error - mean_error
        second = (mean(e * e, kept), mean(error * error, kept), mean(e * error, kept))
        return cls(*(m.reshape(() if pooled else -1) for m in (mean_e, mean_error, *second)))

    @property
    def mean_q(self) -> np.ndarray:
        return self.mean_e + self.mean_error

    @property
    def var_q(self) -> np.ndarray:
        return np.maximum(0.0, self.var_e + 2 * self.cov_e_error + self.var_error)

    @property
    def cov_q_error(self) -> np.ndarray:
        return self.cov_e_error + self.var_error

    def residual(self, k: np.ndarray | float) -> np.ndarray:
        """Variance of D - k e."""
        return np.maximum(0.0, self.var_error - 2 * k * self.cov_e_error + k**2 * self.var_e)


def checked_pairs(study: Study, *, method: str, per: str) -> Iterator[Pairs]:
    """The pairs of a study, of which there must be enough: see LEAST_PICTURES.

    Raises CalibrationError: too few pictures, or an output that is not finite.
    """
    require_pictures(study, method=method, per=per)
    for pairs in study.pairs():
        for name, values in (("quantized", pairs.q), ("float", pairs.e)):
            require_finite(values, method=method, what=f"the {name} network's output at call {pairs.call}")
        yield pairs


def require_pictures(study: Study, *, method: str, per: str) -> None:
    """Raises CalibrationError for fewer pictures than one number per `per` of LEAST_PICTURES takes."""
    least = LEAST_PICTURES[per]
    if study.pictures < least:
        raise CalibrationError(
            f"{method}: {study.pictures} pictures to fit on, a number for every {per} takes at least {least}. "
            "Fit on more pictures."
        )


def require_finite(values: np.ndarray, *, method: str, what: str) -> None:
    """Raises CalibrationError for NaN or infinity."""
    if not np.isfinite(values).all():
        raise CalibrationError(f"{method}: {what} holds NaN or infinity. Check the checkpoint.")


def shrunk_mean(values: np.ndarray) -> np.ndarray:
    """Mean over pictures, the first axis, taken towards 0 where they disagree: m m^2 / (m^2 + se^2); ours.

    se is the standard error of m from the scatter between pictures, whose pixels are not independent.
    """
    mean = values.mean(axis=0, dtype=np.float64)
    variance = values.var(axis=0, dtype=np.float64, ddof=1) / len(values)
    squared = mean**2
    return np.divide(mean * squared, squared + variance, out=np.zeros_like(mean), where=squared > 0)


def picture_means(values: np.ndarray) -> np.ndarray:
    """(N, C, H, W) -> (N, C) float64."""
    return values.mean(axis=(2, 3), dtype=np.float64)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise, 0 where the denominator is: a constant output has no slope."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)


def invertible(k: np.ndarray) -> np.ndarray:
    """k, or 0 where q = (1 + k) e cannot be inverted (see LEAST_SLOPE)."""
    return np.where(1 + k >= LEAST_SLOPE, k, 0.0)


def eps_variance(variance: np.ndarray | float, step: Step, prediction: Prediction) -> float:
    """Variance of the raw output, averaged over channels, in units of eps; 0 where the output says nothing of eps."""
    scale = output_per_eps(step.abar_call, prediction)
    return float(np.mean(variance)) / scale**2 if scale else 0.0

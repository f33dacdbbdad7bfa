"""Choose and accept smoothing factors of a convolution by its quantized output, never by faith.

Per block: the candidate of least output error on the fitting samples, kept only if it also lowers the error on held-out
samples. Activations and weights are both quantized with the policy's own ranges, so what a factor gains on one side and
loses on the other is weighed in the unit that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.quant.fold import fold_smoothing
from qncd_deploy.quant.grid import Grid, fake_quantize
from qncd_deploy.quant.layer_error import convolve, relative_error
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.qncd import ResBlock, paper_factors, repaired_factors
from qncd_deploy.quant.smoothquant import smoothquant_factors

METHODS = ("qncd", "qncd:paper", "smoothquant")
ALPHAS = (0.25, 0.5, 0.75)
"""How much of a channel's range moves into the weight, where the user does not say."""

MIN_GAIN = 0.02
"""The least relative fall of the error that is worth one more multiplication in the graph, and no accident."""


def candidates(
    method: str,
    block: ResBlock,
    weight: np.ndarray,
    *,
    embedding: Mapping[str, np.ndarray],
    channel_amax: np.ndarray | None,
    alpha: float | None = None,
) -> dict[str, np.ndarray]:
    """Factors of one block by label: one per alpha (of ALPHAS, or the given one); the published form has none to
    choose.

    embedding: rows of the block's embedding edges. channel_amax (C,): largest |x| per channel of the convolution's
    input in calibration; "qncd" without it bounds the input by the embedding, "smoothquant" needs it.
    """
    if method == "qncd:paper":
        return {method: paper_factors(block, embedding)}
    found = {}
    for a in ALPHAS if alpha is None else (alpha,):
        if method == "qncd":
            s = repaired_factors(block, embedding, alpha=a, channel_amax=channel_amax)
        else:
            assert method == "smoothquant" and channel_amax is not None, method
            s = smoothquant_factors(weight, channel_amax, alpha=a)
        found[f"{method} alpha {a:g}"] = s
    return found


@dataclass(frozen=True, eq=False)
class Decision:
    """What became of one block: factors (C,) float32 of the candidate `label`, and its held-out output error (see
    output_error) without and with them."""

    label: str
    factors: np.ndarray
    error_before: float
    error_after: float

    @property
    def kept(self) -> bool:
        return self.error_after < (1 - MIN_GAIN) * self.error_before


def choose(
    factors: Mapping[str, np.ndarray],
    weight: np.ndarray,
    *,
    fit: np.ndarray,
    held_out: np.ndarray,
    policy: Policy,
) -> Decision:
    """The best of several factors by output error on `fit`, judged on `held_out`; factors by label, at least one.

    weight (O, C, kh, kw) unsmoothed; fit, held_out (N, C, H, W) float32 samples of the convolution's unsmoothed input.
    Activation ranges come from `fit` for both.
    """
    forms = {label: _Form.of(s, weight, fit=fit, policy=policy) for label, s in factors.items()}
    exact = convolve(fit, weight)
    best = min(forms, key=lambda label: forms[label].error(fit, exact))
    return _accept(best, forms[best], weight, fit=fit, held_out=held_out, policy=policy)


def accept(
    label: str, s: np.ndarray, weight: np.ndarray, *, fit: np.ndarray, held_out: np.ndarray, policy: Policy
) -> Decision:
    """Judge one factor on held-out samples; arguments as in `choose`."""
    return _accept(
        label, _Form.of(s, weight, fit=fit, policy=policy), weight, fit=fit, held_out=held_out, policy=policy
    )


def _accept(
    label: str, form: _Form, weight: np.ndarray, *, fit: np.ndarray, held_out: np.ndarray, policy: Policy
) -> Decision:
    plain = _Form.of(np.ones_like(form.factors), weight, fit=fit, policy=policy)
    exact = convolve(held_out, weight)
    return Decision(label, form.factors, plain.error(held_out, exact), form.error(held_out, exact))


def output_error(s: np.ndarray, weight: np.ndarray, *, fit: np.ndarray, judge: np.ndarray, policy: Policy) -> float:
    """sum (conv(Q(x / s), Q(w s)) - conv(x, w))^2 / sum conv(x, w)^2 over `judge`: relative, 0 for a perfect grid.

    The activation range is that of fit / s. "Same" padding, stride 1, as in the second convolution of every block; a
    bias would cancel.
    """
    return _Form.of(s, weight, fit=fit, policy=policy).error(judge, convolve(judge, weight))


@dataclass(frozen=True, eq=False)
class _Form:
    """A convolution quantized with one choice of factors; finding its grids and convolving are what takes the time."""

    factors: np.ndarray
    act_grid: Grid
    weight: np.ndarray

    @classmethod
    def of(cls, s: np.ndarray, weight: np.ndarray, *, fit: np.ndarray, policy: Policy) -> _Form:
        act_grid = policy.act_grid(TensorStats.of(fit / s.reshape(1, -1, 1, 1), "smoothed activation"))
        folded = fold_smoothing(weight, s)
        return cls(s, act_grid, fake_quantize(folded, policy.weight_grid(folded, 0)))

    def error(self, x: np.ndarray, exact: torch.Tensor) -> float:
        """See output_error. exact: conv of x with the float weight."""
        found = convolve(fake_quantize(x / self.factors.reshape(1, -1, 1, 1), self.act_grid), self.weight)
        return relative_error(found, exact)

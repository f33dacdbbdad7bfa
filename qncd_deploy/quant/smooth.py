"""Choose and accept smoothing factors of an edge by the quantized outputs of the layers that read it, never by faith.

Per edge: the candidate of least output error on samples that it was not computed from, kept only if it also lowers the
error on others that it was not chosen by. Activations and weights are both quantized with the policy's own ranges, so
what a factor gains on one side and loses on the other is weighed in the unit that matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.quant.fold import along, fold_smoothing
from qncd_deploy.quant.grid import Grid, fake_quantize
from qncd_deploy.quant.layer_error import layer_output, relative_error
from qncd_deploy.quant.plan import LayerSite
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.qncd import ResBlock, analytic_range, paper_factors, repaired_factors
from qncd_deploy.quant.smoothquant import smoothquant_factors

METHODS = ("qncd", "qncd:paper", "smoothquant")
QNCD_ALPHAS = (0.25, 0.5, 0.75)
SMOOTHQUANT_ALPHAS = (0.1, 0.3, 0.5, 0.7)
"""How much of a channel's range moves into the weight, where the user does not say. Measured on the demo's layers:
SmoothQuant needs the 0.1 for 4-bit weights and the others for 8-bit ones, and nine alphas gain no more than 1 %."""

MIN_GAIN = 0.02
"""The least relative fall of the error that is no accident, and worth a multiplication that runtimes fuse into SiLU."""

JUDGED_NUMBERS = 1 << 20
LEAST_CHANNELS = 64
"""Of a weight with more numbers so many of its output channels judge a factor: finding grids for all of them is half
of what takes time, and each channel's error is a mean over thousands of values already."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A weighted op that reads the edge, and its weight as the graph stores it. Convolutions: stride 1, "same" padding,
    as the second one of every block and the 1x1 ones have.
    """

    site: LayerSite
    weight: np.ndarray

    @property
    def channel_amax(self) -> np.ndarray:
        """(C,) float32: the largest |w| of every input channel."""
        axis = self.site.in_axis
        return np.abs(self.weight).max(axis=tuple(i for i in range(self.weight.ndim) if i != axis))

    def judged(self) -> Reader:
        """With those output channels alone that a factor is judged by, evenly spread."""
        channels = self.weight.shape[self.site.out_axis]
        count = max(LEAST_CHANNELS, JUDGED_NUMBERS * channels // max(1, self.weight.size))
        if count >= channels:
            return self
        chosen = np.linspace(0, channels - 1, count).astype(int)
        return Reader(self.site, self.weight.take(chosen, axis=self.site.out_axis))


def block_candidates(
    method: str,
    block: ResBlock,
    reader: Reader,
    *,
    embedding: Mapping[str, np.ndarray],
    channel_amax: np.ndarray,
    alpha: float | None = None,
) -> dict[str, np.ndarray]:
    """Factors of one residual block by label, for one alpha or several. For "qncd" two of each: from the range that
    calibration saw, and from the one that the embedding bounds, which does not depend on the pictures that were drawn.
    The published form has nothing to choose.

    reader: the second convolution. embedding: rows of the block's embedding edges, which "smoothquant" does without.
    channel_amax (C,): largest |x| per channel of its input in calibration.
    """
    if method == "qncd:paper":
        return {method: paper_factors(block, embedding)}
    if method == "smoothquant":
        return smoothquant_candidates([reader], channel_amax, alpha=alpha)
    assert method == "qncd", method
    ranges = {"qncd": channel_amax, "qncd embedding": analytic_range(block, embedding)}
    return {
        f"{label} alpha {a:g}": repaired_factors(block, spread, alpha=a)
        for label, spread in ranges.items()
        for a in (QNCD_ALPHAS if alpha is None else (alpha,))
    }


def smoothquant_candidates(
    readers: Sequence[Reader], channel_amax: np.ndarray, *, alpha: float | None = None
) -> dict[str, np.ndarray]:
    """SmoothQuant's factors of one edge by label, as in `block_candidates`; its layers are weighed together."""
    weight_amax = np.max([reader.channel_amax for reader in readers], axis=0)
    return {
        f"smoothquant alpha {a:g}": smoothquant_factors(weight_amax, channel_amax, alpha=a)
        for a in (SMOOTHQUANT_ALPHAS if alpha is None else (alpha,))
    }


@dataclass(frozen=True, eq=False)
class Decision:
    """What became of one edge: the layers that read it, factors (C,) float32 of the candidate `label`, and the held-out
    output error (see output_error) without and with them; min_gain: the least relative fall that is worth it."""

    layers: tuple[str, ...]
    label: str
    factors: np.ndarray
    error_before: float
    error_after: float
    min_gain: float = MIN_GAIN

    @property
    def kept(self) -> bool:
        return self.error_after < (1 - self.min_gain) * self.error_before


def choose(
    factors: Mapping[str, np.ndarray],
    readers: Sequence[Reader],
    *,
    fit: np.ndarray,
    tune: np.ndarray,
    held_out: np.ndarray,
    policy: Policy,
) -> Decision:
    """The best of several factors by output error on `tune`, judged on `held_out`; factors by label, at least one.

    fit, tune, held_out: float32 samples of the unsmoothed edge, (N, C, H, W) before convolutions, (..., C) before
    Linears. Activation ranges come from `fit` for all. So do factors as a rule, and none is chosen on it: the more a
    factor evens out the very samples it was computed from, the better it looks there, and clips others.
    """
    judged = [reader.judged() for reader in readers]
    forms = {label: _Form.of(s, judged, fit=fit, policy=policy) for label, s in factors.items()}
    exact = _outputs(tune, judged)
    best = min(forms, key=lambda label: forms[label].error(tune, exact))
    return _accept(best, forms[best], fit=fit, held_out=held_out, policy=policy)


def _accept(label: str, form: _Form, *, fit: np.ndarray, held_out: np.ndarray, policy: Policy) -> Decision:
    plain = _Form.of(np.ones_like(form.factors), form.readers, fit=fit, policy=policy)
    exact = _outputs(held_out, form.readers)
    layers = tuple(reader.site.name for reader in form.readers)
    return Decision(layers, label, form.factors, plain.error(held_out, exact), form.error(held_out, exact))


def output_error(
    s: np.ndarray, readers: Sequence[Reader], *, fit: np.ndarray, judge: np.ndarray, policy: Policy
) -> float:
    """sum (op(Q(x / s), Q(w s)) - op(x, w))^2 / sum op(x, w)^2 over `judge`, averaged over the readers: relative, 0 for
    perfect grids. The activation range is that of fit / s; a bias would cancel.
    """
    return _Form.of(s, readers, fit=fit, policy=policy).error(judge, _outputs(judge, readers))


@dataclass(frozen=True, eq=False)
class _Form:
    """The readers of an edge, quantized with one choice of factors; finding their grids is half of what takes time."""

    factors: np.ndarray
    readers: Sequence[Reader]
    act_grid: Grid
    quantized: Sequence[Reader]

    @classmethod
    def of(cls, s: np.ndarray, readers: Sequence[Reader], *, fit: np.ndarray, policy: Policy) -> _Form:
        act_grid = policy.act_grid(TensorStats.of(_divided(fit, s, readers), "smoothed activation"))
        quantized = []
        for reader in readers:
            folded = fold_smoothing(reader.weight, s, axis=reader.site.in_axis)
            grid = policy.weight_grid(folded, reader.site.out_axis)
            quantized.append(Reader(reader.site, fake_quantize(folded, grid)))
        return cls(s, readers, act_grid, quantized)

    def error(self, x: np.ndarray, exact: Sequence[torch.Tensor]) -> float:
        """See output_error. exact: what the float readers make of x."""
        found = _outputs(fake_quantize(_divided(x, self.factors, self.readers), self.act_grid), self.quantized)
        return float(np.mean(list(map(relative_error, found, exact))))


def _divided(x: np.ndarray, s: np.ndarray, readers: Sequence[Reader]) -> np.ndarray:
    return x / along(s, readers[0].site.channel_axis, x.ndim)


def _outputs(x: np.ndarray, readers: Sequence[Reader]) -> list[torch.Tensor]:
    return [layer_output(x, reader.site, reader.weight) for reader in readers]

"""QNCD's smoothing of the second convolution of a residual block, with factors read off the time embedding (or, ours,
off what calibration saw).

With g, b the affine of the block's second GroupNorm and GN0 the same normalisation without it, the block computes
    additive:      u = SiLU(g GN0(h + emb) + b),                      y = conv2(u)
    scale-shift:   u = SiLU((g GN0(h) + b) (1 + scale) + shift),      y = conv2(u)
The embedding, a function of the timestep, stretches some channels of u far beyond others; a factor S[c] moves that into
the weight, y = (W2 diag(S)) * (u / S), exact for every S without zeros. "QNCD: Quantization Noise Correction for
Diffusion Models" (Chu et al., arXiv:2403.19140) and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qncd_deploy.errors import PlanError

KAPPA = 3.0
"""How many standard deviations of a normalised activation the analytic range covers."""
MAX_FACTOR = 8.0
"""Repaired factors stay within 1 / MAX_FACTOR and MAX_FACTOR."""
_MIN_FRACTION = 1e-3  # of the median |S|: below it a published factor is moved away from zero


@dataclass(frozen=True, eq=False)
class ResBlock:
    """One residual block as the graph shows it.

    conv2: weight name of the second convolution. edge: its input u, (N, C, H, W). gamma, beta: (C,) affine of the
    second GroupNorm; groups, epsilon: its other constants. emb: the edge of the embedding as it enters the block, (N,
    C) for "additive", (N, 2C) for "scale-shift"; two edges of (N, C), scale and shift, where the graph keeps them
    apart. Trailing axes of length 1 are allowed. scale_first: which half of a (N, 2C) embedding is the scale.
    """

    conv2: str
    edge: str
    gamma: np.ndarray
    beta: np.ndarray
    groups: int
    kind: Literal["additive", "scale-shift"]
    emb: tuple[str, ...]
    epsilon: float = 1e-5
    scale_first: bool = True

    def __post_init__(self) -> None:
        assert self.gamma.shape == self.beta.shape == (self.channels,) and self.channels % self.groups == 0, self.conv2
        assert len(self.emb) == 1 or (self.kind == "scale-shift" and len(self.emb) == 2), self.conv2

    @property
    def channels(self) -> int:
        return len(self.gamma)

    def embedding(self, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray]:
        """(scale, shift) from the values of the embedding edges, (T, C) float64 each; scale is None if additive.

        Raises: PlanError if an array does not have the block's number of channels, or is not finite.
        """
        width = 2 * self.channels if self.kind == "scale-shift" and len(self.emb) == 1 else self.channels
        parts = []
        for edge in self.emb:
            rows = np.asarray(values[edge], np.float64)
            rows = rows.reshape(len(rows), -1)
            if rows.shape[1] != width or not np.isfinite(rows).all():
                raise PlanError(
                    f"{self.conv2}: embedding {edge!r} is {rows.shape}, expected (T, {width}) of finite values. "
                    "Use --smooth off for this network."
                )
            parts.append(rows)
        if self.kind == "additive":
            return None, parts[0]
        if len(parts) == 1:
            parts = np.split(parts[0], 2, axis=1)
        scale, shift = parts if self.scale_first else parts[::-1]
        return scale, shift


def group_normalize(rows: np.ndarray, groups: int, epsilon: float = 1e-5) -> np.ndarray:
    """GroupNorm without affine of (T, C) vectors seen as (T, C, 1, 1) maps: statistics over the channels of a group."""
    grouped = rows.reshape(len(rows), groups, -1)
    centered = grouped - grouped.mean(axis=2, keepdims=True)
    return (centered / np.sqrt(centered.var(axis=2, keepdims=True) + epsilon)).reshape(rows.shape)


def paper_factors(block: ResBlock, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """S[c] = g[c] * mean_t r_t[c], r_t = max(1, GN0(p_t)), as the released code computes it; (C,) float32, any sign.

    additive: p_t = emb_t. scale-shift: p_t = g GN0(scale_t) + b, so that GroupNorm is applied twice and 1 + scale is
    never formed. There is no absolute value: negative entries of GN0 become 1. (The code's outer max(1, mean) is
    idle.) values: the embedding edges, one row per calibration call. Our only addition: |S| below 0.001 of its median
    is raised to that, sign kept, because u / S would overflow where g is zero.
    """
    scale, shift = block.embedding(values)
    p = shift if scale is None else block.gamma * group_normalize(scale, block.groups, block.epsilon) + block.beta
    r = np.maximum(1.0, group_normalize(p, block.groups, block.epsilon))
    s = block.gamma * r.mean(axis=0)
    least = _MIN_FRACTION * np.median(np.abs(s)) or 1.0
    return np.where(np.abs(s) < least, np.copysign(least, s), s).astype(np.float32)


def repaired_factors(block: ResBlock, spread: np.ndarray, *, alpha: float) -> np.ndarray:
    """S = clamp((spread / median(spread))**alpha, 1/8, 8): always positive, and 1 for a channel of ordinary range.

    spread (C,): the range of each channel: analytic_range, or the largest |u| in calibration. Returns (C,) float32.
    """
    spread = np.asarray(spread, np.float64)
    assert spread.shape == (block.channels,), block.conv2
    median = np.median(spread)
    if median == 0:
        return np.ones(block.channels, np.float32)
    return np.clip((spread / median) ** alpha, 1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)


def analytic_range(block: ResBlock, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """A range of every channel before SiLU, from the embedding alone: (C,) float64.

    scale-shift: max_t(kappa |g| |1 + scale_t| + |b (1 + scale_t) + shift_t|)
    additive:    max_t max(1, |GN0(emb_t)|) |g| + |b|
    """
    scale, shift = block.embedding(values)
    gain = np.abs(block.gamma)
    if scale is None:
        stretch = np.maximum(1.0, np.abs(group_normalize(shift, block.groups, block.epsilon)))
        return stretch.max(axis=0) * gain + np.abs(block.beta)
    return (KAPPA * gain * np.abs(1 + scale) + np.abs(block.beta * (1 + scale) + shift)).max(axis=0)

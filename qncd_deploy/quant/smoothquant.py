"""SmoothQuant's factor (Xiao et al., arXiv:2211.10438, equation 4): share the difficulty between activation and
weight.
"""

from __future__ import annotations

import numpy as np


def smoothquant_factors(weight: np.ndarray, channel_amax: np.ndarray, *, alpha: float) -> np.ndarray:
    """S[c] = max|x_c|**alpha / max|w_c|**(1 - alpha), divided by its geometric mean; (C,) float32 > 0.

    weight (O, C, kh, kw); channel_amax (C,), the largest |x| of each input channel. The common factor cancels in the
    quantized product; without it S would carry the unit of the weights. Dead channels, x or w all zero, get 1.
    """
    amax = np.asarray(channel_amax, np.float64)
    w_amax = np.abs(weight).max(axis=(0, *range(2, weight.ndim))).astype(np.float64)
    alive = (amax > 0) & (w_amax > 0)
    log_s = np.zeros_like(amax)
    log_s[alive] = alpha * np.log(amax[alive]) - (1 - alpha) * np.log(w_amax[alive])
    if alive.any():
        log_s[alive] -= log_s[alive].mean()
    return np.exp(log_s).astype(np.float32)

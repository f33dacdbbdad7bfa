"""SmoothQuant's factor (Xiao et al., arXiv:2211.10438, equation 4): share the difficulty between activation and
weight.
"""

from __future__ import annotations

import numpy as np


def smoothquant_factors(weight_amax: np.ndarray, channel_amax: np.ndarray, *, alpha: float) -> np.ndarray:
    """S[c] = max|x_c|**alpha / max|w_c|**(1 - alpha), divided by its geometric mean; (C,) float32 > 0.

    channel_amax, weight_amax (C,): the largest |x| of each input channel, and the largest |w| that multiplies it, over
    all layers that read x. The common factor cancels in the quantized product; without it S would carry the unit of the
    weights. Dead channels, x or w all zero, get 1.
    """
    x, w = np.asarray(channel_amax, np.float64), np.asarray(weight_amax, np.float64)
    alive = (x > 0) & (w > 0)
    log_s = np.zeros_like(x)
    log_s[alive] = alpha * np.log(x[alive]) - (1 - alpha) * np.log(w[alive])
    if alive.any():
        log_s[alive] -= log_s[alive].mean()
    return np.exp(log_s).astype(np.float32)

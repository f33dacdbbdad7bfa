"""Move a per-channel factor out of an activation and into the weight that reads it."""

from __future__ import annotations

import numpy as np


def fold_smoothing(weight: np.ndarray, s: np.ndarray) -> np.ndarray:
    """conv(h / s, w * s) == conv(h, w), for any s without zeros: a convolution is linear in each input channel.

    weight (O, I, kh, kw) float32, s (I,). Returns a new float32 array; the graph still owes one h / s. The bias, the
    padding and everything after the convolution stay as they are.
    """
    assert s.shape == (weight.shape[1],) and np.isfinite(s).all() and s.all(), "one factor per input channel, not zero"
    return (weight * s.reshape(1, -1, 1, 1)).astype(np.float32)

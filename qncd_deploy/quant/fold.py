"""Move a per-channel factor out of an activation and into the weight that reads it."""

from __future__ import annotations

import numpy as np


def fold_smoothing(weight: np.ndarray, s: np.ndarray, *, axis: int = 1) -> np.ndarray:
    """op(x / s, w * s) == op(x, w), for any s without zeros: a weighted op is linear in each input channel.

    weight: of any shape, float32; axis: its input channels, 1 of a convolution's (O, I, kh, kw); s (I,). Returns a new
    float32 array; the graph still owes one x / s. The bias, the padding and everything behind the op stay as they are.
    """
    assert s.shape == (weight.shape[axis],) and np.isfinite(s).all() and s.all(), "one factor per input channel, not 0"
    return (weight * along(s, axis, weight.ndim)).astype(np.float32)


def along(s: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """s (C,) as it broadcasts along one axis of an array of ndim dimensions."""
    shape = [1] * ndim
    shape[axis] = len(s)
    return s.reshape(shape)

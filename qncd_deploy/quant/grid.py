"""Symmetric integer grids: x ~= scale * q, qmin <= q <= qmax, zero point 0 (the only one TensorRT takes).

Rounding is that of ONNX QuantizeLinear: float32 division, ties to even, saturation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Grid:
    """scale: float32 > 0 in the unit of x, () for a whole tensor or (C,) along `axis`. qmin <= 0 < qmax fit into
    int8.
    """

    scale: np.ndarray
    qmin: int
    qmax: int
    axis: int | None = None

    def __post_init__(self) -> None:
        scale = np.asarray(self.scale, np.float32)
        assert scale.ndim == (0 if self.axis is None else 1), "a per-channel scale needs its axis, and no other does"
        assert np.isfinite(scale).all() and (scale > 0).all(), "scales are finite and positive"
        assert -128 <= self.qmin <= 0 < self.qmax <= 127
        object.__setattr__(self, "scale", scale)

    def scale_like(self, ndim: int) -> np.ndarray:
        """The scale, shaped to broadcast against an array of ndim dimensions."""
        if self.axis is None:
            return self.scale
        return self.scale.reshape([-1 if i == self.axis % ndim else 1 for i in range(ndim)])


def limits(bits: int, *, narrow: bool = False) -> tuple[int, int]:
    """qmin, qmax of a signed grid of 2**bits levels; narrow leaves out the lowest one: -127..127 for 8 bits."""
    assert 2 <= bits <= 8
    qmax = 2 ** (bits - 1) - 1
    return (-qmax if narrow else -qmax - 1), qmax


def narrow_weights(bits: int) -> bool:
    """Eight-bit weights leave out -128: kernels that add two u8 x s8 products rely on it. Fewer bits keep every
    level.
    """
    return bits == 8


def quantize(x: np.ndarray, grid: Grid) -> np.ndarray:
    """Integers of x as int8, whatever the number of bits; x finite, any shape."""
    q = np.rint(np.asarray(x, np.float32) / grid.scale_like(np.ndim(x)))
    return np.clip(q, grid.qmin, grid.qmax).astype(np.int8)


def dequantize(q: np.ndarray, grid: Grid) -> np.ndarray:
    """scale * q in float32."""
    return q.astype(np.float32) * grid.scale_like(q.ndim)


def fake_quantize(x: np.ndarray, grid: Grid) -> np.ndarray:
    """The float32 values an integer kernel sees in place of x."""
    return dequantize(quantize(x, grid), grid)

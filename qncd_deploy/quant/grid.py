"""Integer grids with zero point 0, the only one TensorRT takes: x ~= scale * q, qmin <= q <= qmax.

An asymmetric grid of b < 8 bits and zero point z represents scale * (k - z), k = -2**(b-1)..2**(b-1)-1. Here q is
k - z: it still fits into int8, so the same numbers need no zero point, only other limits. (8 bits do not fit: such an
activation keeps its zero point in the graph, see export.passes.insert_qdq, and TensorRT gets it rewritten.)
Rounding is that of ONNX QuantizeLinear: float32 division, ties to even, saturation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Grid:
    """scale: float32 > 0 in the unit of x, () for a whole tensor or (C,) along `axis`. qmin <= 0 <= qmax, not both 0:
    one int each, or (C,) along `axis`. They fit into int8 but for asymmetric grids of 8 bits. With `block`, scale has
    the rank of x and one entry for every `block` elements along `axis`.
    """

    scale: np.ndarray
    qmin: int | np.ndarray
    qmax: int | np.ndarray
    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        scale = np.asarray(self.scale, np.float32)
        if self.block is None:
            assert scale.ndim == (self.axis is not None), "a per-channel scale needs its axis, and no other does"
        else:
            assert self.block > 0 and self.axis in range(scale.ndim), "blocks lie along an axis of the scale"
        assert np.isfinite(scale).all() and (scale > 0).all(), "scales are finite and positive"
        qmin, qmax = np.asarray(self.qmin), np.asarray(self.qmax)
        assert {qmin.shape, qmax.shape} <= {(), scale.shape}, "limits are one number, or one per scale"
        assert ((qmin <= 0) & (qmax >= 0) & (qmin < qmax) & (qmax - qmin < 256)).all()
        object.__setattr__(self, "scale", scale)

    def scale_like(self, ndim: int) -> np.ndarray:
        """The scale, shaped to broadcast against an array of ndim dimensions."""
        return self._along(self.scale, ndim)

    def limits_like(self, ndim: int) -> tuple[np.ndarray, np.ndarray]:
        """qmin and qmax, shaped to broadcast against an array of ndim dimensions."""
        return self._along(np.asarray(self.qmin), ndim), self._along(np.asarray(self.qmax), ndim)

    def _along(self, values: np.ndarray, ndim: int) -> np.ndarray:
        if values.ndim == 0:
            return values
        if self.block is not None:
            return np.repeat(values, self.block, self.axis)
        return values.reshape([-1 if i == self.axis % ndim else 1 for i in range(ndim)])

    @property
    def fits_int8(self) -> bool:
        return bool((np.asarray(self.qmin) >= -128).all() and (np.asarray(self.qmax) <= 127).all())

    def zero(self, bits: int) -> np.ndarray:
        """The zero point z of the same grid as k = q + z, -2**(b-1) <= k <= 2**(b-1)-1; see limits."""
        return limits(bits)[1] - np.asarray(self.qmax)


def limits(bits: int, *, narrow: bool = False, zero: int | np.ndarray = 0) -> tuple[int | np.ndarray, int | np.ndarray]:
    """qmin, qmax of a signed grid of 2**bits levels, its zero point (a number or an array) taken off; narrow leaves out
    the lowest level: -127..127 for 8 bits.
    """
    assert 2 <= bits <= 8
    qmax = 2 ** (bits - 1) - 1
    return (-qmax if narrow else -qmax - 1) - zero, qmax - zero


def narrow_weights(bits: int) -> bool:
    """Eight-bit weights leave out -128: kernels that add two u8 x s8 products rely on it. Fewer bits keep every
    level.
    """
    return bits == 8


def quantize(x: np.ndarray, grid: Grid) -> np.ndarray:
    """Integers of x, x finite, of any shape: int8 if the grid fits, whatever the number of bits, else int16."""
    q = np.rint(np.asarray(x, np.float32) / grid.scale_like(np.ndim(x)))
    return np.clip(q, *grid.limits_like(q.ndim)).astype(np.int8 if grid.fits_int8 else np.int16)


def dequantize(q: np.ndarray, grid: Grid) -> np.ndarray:
    """scale * q in float32."""
    return q.astype(np.float32) * grid.scale_like(q.ndim)


def fake_quantize(x: np.ndarray, grid: Grid) -> np.ndarray:
    """The float32 values an integer kernel sees in place of x."""
    return dequantize(quantize(x, grid), grid)

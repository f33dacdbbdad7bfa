"""Integer grids: properties, and equality with the ONNX operators they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qncd_deploy.quant.grid import Grid, dequantize, fake_quantize, limits, quantize

values = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-1e6, 1e6, width=32))
scales = st.floats(2.0**-13, 2.0**13, width=32)
bits = st.integers(4, 8)


def test_limits() -> None:
    assert limits(8) == (-128, 127) and limits(8, narrow=True) == (-127, 127) and limits(4) == (-8, 7)
    assert limits(4, zero=-8) == (0, 15) and limits(4, zero=7) == (-15, 0) and limits(7, zero=63) == (-127, 0)


def test_ties_go_to_even_and_ends_saturate() -> None:
    grid = Grid(np.float32(2), *limits(4))
    x = np.array([1, 3, 5, -1, -3, 100, -100], np.float32)
    np.testing.assert_array_equal(quantize(x, grid), np.array([0, 2, 2, 0, -2, 7, -8], np.int8))


@given(values, scales, bits, st.booleans())
@settings(max_examples=200, deadline=None)
def test_properties(x: np.ndarray, scale: float, b: int, narrow: bool) -> None:
    grid = Grid(np.float32(scale), *limits(b, narrow=narrow))
    q, y = quantize(x, grid), fake_quantize(x, grid)
    assert q.dtype == np.int8 and y.dtype == np.float32
    np.testing.assert_array_equal(fake_quantize(y, grid), y)  # a second rounding changes nothing
    inside = (x >= scale * grid.qmin) & (x <= scale * grid.qmax)
    # One rounding to the nearest level, and the float32 roundings of the division and of the product.
    bound = scale / 2 + np.abs(x.astype(np.float64)) * 2.0**-22
    assert (np.abs(y - x.astype(np.float64)) <= bound)[inside].all()
    order = np.argsort(x)
    assert (np.diff(q[order].astype(int)) >= 0).all()
    assert quantize(np.zeros(1, np.float32), grid)[0] == 0


@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_equal_to_onnx_reference_operators(axis: int | None) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, (4, 5, 6)).astype(np.float32)
    count = () if axis is None else (x.shape[axis],)
    scale = np.asarray(rng.uniform(0.005, 0.05, count), np.float32)
    zeros = np.zeros(count, np.int8)
    attribute = "" if axis is None else f"<axis = {axis}>"
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["": 19]>
        g (float[4,5,6] x, float[{"" if axis is None else len(scale)}] s, int8[{"" if axis is None else len(scale)}] z)
          => (int8[4,5,6] q, float[4,5,6] y)
        {{
            q = QuantizeLinear {attribute} (x, s, z)
            y = DequantizeLinear {attribute} (q, s, z)
        }}
    """.replace("float[]", "float").replace("int8[]", "int8")
    )
    q, y = ReferenceEvaluator(model).run(None, {"x": x, "s": scale, "z": zeros})
    grid = Grid(scale, *limits(8), axis)
    np.testing.assert_array_equal(quantize(x, grid), q)
    np.testing.assert_array_equal(dequantize(quantize(x, grid), grid), y)


@given(values, scales, st.integers(4, 8), st.data())
@settings(max_examples=100, deadline=None)
def test_the_zero_point_is_taken_off_exactly(x: np.ndarray, scale: float, b: int, data: st.DataObject) -> None:
    """scale * (k - z), k = clip(round(x / scale) + z), in the words of the standard: the same integers less z."""
    zero = data.draw(st.integers(-(2 ** (b - 1)), 2 ** (b - 1) - 1))
    grid = Grid(np.float32(scale), *limits(b, zero=zero))
    k = np.clip(np.rint(x / np.float32(scale)) + zero, *limits(b))
    np.testing.assert_array_equal(quantize(x, grid), k - zero)
    np.testing.assert_array_equal(fake_quantize(x, grid), np.float32(scale) * (k - zero).astype(np.float32))
    assert grid.fits_int8 or b == 8
    assert grid.zero(b) == zero and quantize(np.zeros(1, np.float32), grid)[0] == 0


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_limits_may_differ_per_channel(axis: int) -> None:
    x = np.random.default_rng(0).uniform(-30, 30, (3, 3, 3)).astype(np.float32)
    scale, zero = np.array([0.5, 1, 2], np.float32), np.array([-8, 0, 7])
    grid = Grid(scale, *limits(4, zero=zero), axis)
    found = np.moveaxis(quantize(x, grid), axis, 0)
    for i, channel in enumerate(np.moveaxis(x, axis, 0)):
        np.testing.assert_array_equal(found[i], quantize(channel, Grid(scale[i], *limits(4, zero=int(zero[i])))))
    np.testing.assert_array_equal(grid.zero(4), zero)


def test_limits_without_zero_or_of_more_than_8_bits_are_our_bug() -> None:
    for qmin, qmax in ((-129, 127), (0, 256), (1, 16), (-16, -1), (0, 0)):
        with pytest.raises(AssertionError):
            Grid(np.float32(1), qmin, qmax)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_none_is_our_bug(scale: float) -> None:
    with pytest.raises(AssertionError, match="finite and positive"):
        Grid(np.float32(scale), -128, 127)

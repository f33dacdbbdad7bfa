"""Streaming statistics against NumPy on the values themselves, and merging as a property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qncd_deploy.calib.observers import HALF_BINS, MIN_EXPONENT, TensorStats
from qncd_deploy.errors import CalibrationError

finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=finite)


def flat(x: np.ndarray) -> TensorStats:
    return TensorStats.of(x.reshape(-1, 1), "x")


def same(a: TensorStats, b: TensorStats) -> None:
    assert (a.count, a.min, a.max, a.exponent) == (b.count, b.min, b.max, b.exponent)
    np.testing.assert_array_equal(a.counts, b.counts)
    np.testing.assert_array_equal(a.channel_amax, b.channel_amax)
    # The one field that is a float64 sum: two orders of at most 160 non-negative terms.
    assert a.sum_square == pytest.approx(b.sum_square, rel=160 * 2.0**-52)


def test_one_array_equals_numpy() -> None:
    x = (3 * np.random.default_rng(0).standard_normal((4, 6, 5, 7)) + 1).astype(np.float32)
    stats = TensorStats.of(x, "x")
    assert (stats.count, stats.min, stats.max) == (x.size, x.min(), x.max())
    assert stats.mean_square == pytest.approx(np.mean(x.astype(np.float64) ** 2), rel=1e-12)
    np.testing.assert_array_equal(stats.channel_amax, np.abs(x).max(axis=(0, 2, 3)))
    edges = np.arange(-HALF_BINS, HALF_BINS + 1) * stats.bin_width
    np.testing.assert_array_equal(stats.counts, np.histogram(x.astype(np.float64), edges)[0])


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (6,)])
def test_channels_of_other_ranks_are_the_last_axis(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).standard_normal(shape)
    expected = np.abs(x.astype(np.float32)).reshape(-1, 6).max(axis=0)
    np.testing.assert_array_equal(TensorStats.of(x, "x").channel_amax, expected)


def test_the_histogram_does_not_depend_on_chunks() -> None:
    """More values than are binned at a time."""
    x = np.random.default_rng(2).standard_normal((300_000, 1)).astype(np.float32)
    stats = TensorStats.of(x, "x")
    assert stats.counts.sum() == x.size
    assert stats.mean_square == pytest.approx(np.mean(x.astype(np.float64) ** 2), rel=1e-12)


@given(st.lists(vectors, min_size=2, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_merging_is_exact_in_any_order(parts: list[np.ndarray], random) -> None:
    whole = flat(np.concatenate(parts))
    random.shuffle(parts)
    merged = flat(parts[0])
    for part in parts[1:]:
        merged = merged.merge(flat(part))
    same(merged, whole)


def test_a_negative_value_that_underflows_keeps_its_side() -> None:
    values = np.float32([1.5e20, -1.5e-29])
    same(flat(values[:1]).merge(flat(values[1:])), flat(values))


def test_a_range_that_grows_beyond_the_histogram_leaves_two_bins() -> None:
    small, large = flat(np.array([-1e-20, 1e-20, 0.0])), flat(np.array([1e20]))
    merged = small.merge(large)
    np.testing.assert_array_equal(merged.counts[[HALF_BINS - 1, HALF_BINS]], [1, 2])
    assert merged.counts.sum() == 4


@given(vectors)
@settings(max_examples=50, deadline=None)
def test_arrays_round_trip_bit_for_bit(x: np.ndarray) -> None:
    stats = flat(x)
    back = TensorStats.from_arrays(stats.to_arrays())
    same(back, stats)
    assert back.sum_square == stats.sum_square


def test_damaged_arrays_are_refused() -> None:
    arrays = flat(np.arange(4.0)).to_arrays()
    arrays["bin_count"] = arrays["bin_count"][:-1]
    arrays["bin_index"] = arrays["bin_index"][:-1]
    with pytest.raises(CalibrationError, match="histogram holds 3 values, expected 4"):
        TensorStats.from_arrays(arrays)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 1e-38, 3e38])
def test_constant_tensors(value: float) -> None:
    stats = flat(np.full(5, value, np.float32))
    assert stats.count == 5 and stats.min == stats.max == np.float32(value)
    centers, counts = stats.occupied
    assert counts.tolist() == [5]
    assert abs(centers[0] - value) <= stats.bin_width / 2  # the value lies in its bin
    assert stats.exponent >= MIN_EXPONENT


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    x = np.zeros((1, 2, 3, 3))
    x[0, 1, 2, 2] = bad
    with pytest.raises(CalibrationError, match=r"mid\.conv: 1 of 18 values are not finite"):
        TensorStats.of(x, "mid.conv")


def test_an_empty_tensor_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"edge: an empty tensor \(shape \(0, 4\)\)"):
        TensorStats.of(np.zeros((0, 4)), "edge")

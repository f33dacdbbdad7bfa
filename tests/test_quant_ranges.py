"""Ranges against brute force over the raw values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qncd_deploy.calib.observers import HALF_BINS, TensorStats
from qncd_deploy.quant import ranges
from qncd_deploy.quant.grid import Grid, fake_quantize
from qncd_deploy.quant.ranges import (
    SHRINKS,
    Range,
    grid_from_range,
    lp_range,
    minmax_range,
    minmax_stats,
    mse_stats,
    percentile_stats,
    sqnr_db,
    stats_error,
    stats_sqnr_db,
)

RNG = np.random.default_rng(0)
SAMPLES = {
    "normal": RNG.standard_normal(40_000),
    "laplace": RNG.laplace(size=40_000),
    "silu": (lambda x: x / (1 + np.exp(-x)))(2 * RNG.standard_normal(40_000)),
    "outlier": np.append(RNG.standard_normal(40_000), 60.0),
    "uniform": RNG.uniform(-1, 1, 40_000),
}


def stats_of(x: np.ndarray) -> TensorStats:
    return TensorStats.of(x.reshape(-1, 1), "x")


def mean_square_error(x: np.ndarray, amax: float, bits: int) -> float:
    grid = grid_from_range(Range(np.float32(amax)), bits=bits)
    return float(np.mean((x.astype(np.float32) - fake_quantize(x, grid)).astype(np.float64) ** 2))


def test_minmax_per_channel_and_whole() -> None:
    w = RNG.standard_normal((3, 4, 2, 2)).astype(np.float32)
    np.testing.assert_array_equal(minmax_range(w, axis=0).amax, np.abs(w).max(axis=(1, 2, 3)))
    np.testing.assert_array_equal(minmax_range(w, axis=1).amax, np.abs(w).max(axis=(0, 2, 3)))
    assert minmax_range(w).amax == np.abs(w).max()


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_lp_range_is_the_best_of_the_published_candidates(p: float, bits: int, axis: int, monkeypatch) -> None:
    monkeypatch.setattr(ranges, "_BLOCK", 100)  # several blocks, the last one shorter
    w = RNG.standard_t(4, (7, 5, 3, 3)).astype(np.float32)
    w[2, :, 0, 0] *= 10
    found = lp_range(w, bits=bits, axis=axis, p=p, narrow=bits == 8)
    assert found.axis == axis
    for channel, amax in zip(np.moveaxis(w, axis, 0), found.amax, strict=True):

        def error(a, channel=channel):
            grid = grid_from_range(Range(np.float32(a)), bits=bits, narrow=bits == 8)
            return np.mean(np.abs(channel.astype(np.float64) - fake_quantize(channel, grid)) ** p)

        best = min(error(np.abs(channel).max() * np.float32(f)) for f in SHRINKS)
        # The search works in steps of the grid, in float32: errors of up to half a step, known to 2**-16 of a step.
        assert error(amax) <= best * (1 + 1e-3)


def test_four_bit_search_beats_minmax_by_decibels() -> None:
    w = RNG.standard_normal((4, 2000)).astype(np.float32)
    searched, widest = (grid_from_range(r, bits=4) for r in (lp_range(w, bits=4, axis=0), minmax_range(w, axis=0)))
    assert sqnr_db(w, fake_quantize(w, searched)) > sqnr_db(w, fake_quantize(w, widest)) + 1


def test_a_dead_channel_becomes_integers_zero() -> None:
    w = np.zeros((2, 3, 3, 3), np.float32)
    w[1] = 0.5
    grid = grid_from_range(lp_range(w, bits=8, axis=0, narrow=True), bits=8, narrow=True)
    assert grid.scale[0] == 1
    np.testing.assert_array_equal(fake_quantize(w, grid)[0], 0)
    np.testing.assert_allclose(fake_quantize(w, grid)[1], 0.5, rtol=2.0**-22)  # 127 * float32(0.5 / 127)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mse_of_the_histogram_is_near_the_brute_force_optimum(name: str, bits: int) -> None:
    x = SAMPLES[name]
    amax = np.abs(x).max()
    brute = min(mean_square_error(x, a, bits) for a in amax * np.linspace(0.02, 1, 300))
    found = mean_square_error(x, float(mse_stats(stats_of(x), bits=bits).amax), bits)
    # Bins of a sixteenth of a step or less; the curve is flat at its minimum.
    assert found <= 1.01 * brute


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shrink", [1.0, 0.3])
def test_sqnr_of_the_histogram_is_that_of_the_values(name: str, bits: int, shrink: float) -> None:
    x = SAMPLES[name].astype(np.float32)
    grid = grid_from_range(Range(np.float32(shrink * np.abs(x).max())), bits=bits)
    measured = sqnr_db(x, fake_quantize(x, grid))
    # 40 000 values: the sampling spread of a mean of squares is about 1 %, 0.04 dB; three of those.
    assert stats_sqnr_db(stats_of(x), grid) == pytest.approx(measured, abs=0.15)


def test_bins_a_quarter_of_a_step_wide_still_give_the_uniform_rounding_error() -> None:
    """Values spread evenly lose scale^2 / 12; the histogram says so although it knows them to a bin only."""
    even, outlier = stats_of((np.arange(1 << 20) + 0.5) * 2.0**-20), stats_of(np.array([100.0]))
    stats = even.merge(outlier)  # bins of 1/64 from here on
    stats = replace(stats, counts=np.where(np.arange(2 * HALF_BINS) > HALF_BINS + 64, 0, stats.counts), count=1 << 20)
    grid = Grid(np.float32(4 * stats.bin_width), -128, 127)
    assert stats_error(stats, grid) == pytest.approx(float(grid.scale) ** 2 / 12, rel=1e-3)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("percentile", [50, 90, 99, 99.9])
def test_percentile_is_numpy_s_within_a_bin(name: str, percentile: float) -> None:
    x = SAMPLES[name]
    stats = stats_of(x)
    expected = np.percentile(np.abs(x), percentile, method="inverted_cdf")
    assert float(percentile_stats(stats, percentile=percentile).amax) == pytest.approx(expected, abs=stats.bin_width)


@given(hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-100, 100, width=32)))
@settings(max_examples=50, deadline=None)
def test_percentile_100_and_minmax_are_the_largest_magnitude(x: np.ndarray) -> None:
    stats, largest = stats_of(x), np.abs(x).max()
    assert minmax_stats(stats).amax == largest
    assert abs(float(percentile_stats(stats, percentile=100).amax) - largest) <= stats.bin_width
    assert percentile_stats(stats, percentile=100).amax <= largest


def test_a_zero_tensor_has_range_zero_under_every_rule() -> None:
    stats = stats_of(np.zeros(3))
    found = minmax_stats(stats), percentile_stats(stats, percentile=99), mse_stats(stats, bits=8)
    assert [float(r.amax) for r in found] == [0, 0, 0]


def test_sqnr_closed_form() -> None:
    assert sqnr_db(np.full(4, 10.0), np.full(4, 9.0)) == pytest.approx(20)
    assert sqnr_db(np.ones(2), np.ones(2)) == np.inf

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
from qncd_deploy.quant.grid import Grid, fake_quantize, limits
from qncd_deploy.quant.ranges import (
    SHRINKS,
    asymmetric_grid,
    lp_grid,
    minmax_stats,
    mse_asymmetric,
    mse_stats,
    percentile_stats,
    sqnr_db,
    stats_error,
    stats_sqnr_db,
    symmetric_grid,
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


def mean_square_error(x: np.ndarray, grid: Grid) -> float:
    return float(np.mean((x.astype(np.float32) - fake_quantize(x, grid)).astype(np.float64) ** 2))


def test_minmax_per_channel_and_whole() -> None:
    w = RNG.standard_normal((3, 4, 2, 2)).astype(np.float32)
    for axis, others in ((0, (1, 2, 3)), (1, (0, 2, 3)), (None, None)):
        grid = lp_grid(w, bits=8, axis=axis, shrinks=(1.0,), narrow=True)
        np.testing.assert_array_equal(grid.scale, np.abs(w).max(axis=others) / np.float32(127))
        assert (np.asarray(grid.qmin) == -127).all() and (np.asarray(grid.qmax) == 127).all()


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize(("bits", "asymmetric"), [(4, False), (4, True), (6, True), (8, False)])
@pytest.mark.parametrize("axis", [0, 1])
def test_lp_grid_is_the_best_of_the_published_candidates(p, bits, asymmetric, axis, monkeypatch) -> None:
    """Symmetric ones: amax shrunk. Asymmetric ones as Q-Diffusion writes them: delta = (max - min) / (2^b - 1), zero =
    round(-min / delta), x ~ delta (clip(round(x / delta) + zero, 0, 2^b - 1) - zero).
    """
    monkeypatch.setattr(ranges, "_BLOCK", 100)  # several blocks, the last one shorter
    w = RNG.standard_t(4, (7, 5, 3, 3)).astype(np.float32)
    w[2, :, 0, 0] *= 10
    w[4] = np.abs(w[4])  # a channel, and rows of the other axis, of one sign or nearly so
    grid = lp_grid(w, bits=bits, axis=axis, p=p, narrow=bits == 8, asymmetric=asymmetric)
    assert grid.axis == axis

    def error(x, y):
        return np.mean(np.abs(x.astype(np.float64) - y) ** p)

    qmin, qmax = limits(bits, narrow=bits == 8)
    found = np.moveaxis(fake_quantize(w, grid), axis, 0)
    for channel, mine in zip(np.moveaxis(w, axis, 0), found, strict=True):
        tried = []
        for shrink in SHRINKS:
            scale = np.abs(channel).max() * np.float32(shrink) / np.float32(qmax)
            tried.append(scale * np.clip(np.rint(channel / scale), qmin, qmax))
            if asymmetric:
                low, high = min(channel.min(), 0) * shrink, max(channel.max(), 0) * shrink
                delta = (high - low) / (2**bits - 1)
                zero = np.rint(-low / delta)
                tried.append(delta * (np.clip(np.rint(channel / delta) + zero, 0, 2**bits - 1) - zero))
        best = min(error(channel, y) for y in tried)
        # The search works in steps of the grid, in float32: errors of up to half a step, known to 2**-16 of a step.
        assert error(channel, mine) <= best * (1 + 1e-3)


def test_four_bit_search_beats_minmax_by_decibels() -> None:
    w = RNG.standard_normal((4, 2000)).astype(np.float32)
    searched, widest = (lp_grid(w, bits=4, axis=0, shrinks=shrinks) for shrinks in (SHRINKS, (1.0,)))
    assert sqnr_db(w, fake_quantize(w, searched)) > sqnr_db(w, fake_quantize(w, widest)) + 1


def test_a_dead_channel_becomes_integers_zero() -> None:
    w = np.zeros((2, 3, 3, 3), np.float32)
    w[1] = 0.5
    grid = lp_grid(w, bits=8, axis=0, narrow=True)
    assert grid.scale[0] == 1
    np.testing.assert_array_equal(fake_quantize(w, grid)[0], 0)
    np.testing.assert_allclose(fake_quantize(w, grid)[1], 0.5, rtol=2.0**-22)  # 127 * float32(0.5 / 127)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mse_of_the_histogram_is_near_the_brute_force_optimum(name: str, bits: int) -> None:
    x = SAMPLES[name]
    amax = np.abs(x).max()
    brute = min(mean_square_error(x, symmetric_grid(a, bits=bits)) for a in amax * np.linspace(0.02, 1, 300))
    found = mean_square_error(x, symmetric_grid(mse_stats(stats_of(x), bits=bits), bits=bits))
    # Bins of a sixteenth of a step or less; the curve is flat at its minimum.
    assert found <= 1.01 * brute


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("bits", [4, 6])
def test_the_asymmetric_search_is_near_the_brute_force_optimum(name: str, bits: int) -> None:
    """Against every zero point (6 bits: every fourth) and scales of 1/64 to 1 of the widest."""
    x = SAMPLES[name][:4000] if name != "outlier" else SAMPLES[name][-4000:]
    steps = 2**bits - 1
    scales = np.ptp(x) / steps * 2.0 ** np.linspace(-6, 0, 60)
    lowest = range(-steps, 1, 1 if bits == 4 else 4)
    brute = min(mean_square_error(x, Grid(np.float32(s), q, q + steps)) for s in scales for q in lowest)
    # 60 scales are 7 % apart, so brute force itself is off by a percent; two of the zero point's 63 are as much.
    assert mean_square_error(x, mse_asymmetric(stats_of(x), bits=bits)) <= 1.03 * brute


def test_behind_silu_an_asymmetric_grid_is_worth_most_of_a_bit() -> None:
    """Almost all levels cover [0, max]: steps of nearly half the width, so up to 6.02 dB less noise."""
    stats = stats_of(SAMPLES["silu"])
    for bits in (4, 6):
        one_sided, both = mse_asymmetric(stats, bits=bits), symmetric_grid(mse_stats(stats, bits=bits), bits=bits)
        assert 4 < stats_sqnr_db(stats, one_sided) - stats_sqnr_db(stats, both) < 6.02
        assert one_sided.qmin >= -3


@pytest.mark.parametrize(
    ("values", "amax", "qmin", "top"),
    [([-1, 14], 14, -1, 14), ([0, 3], 3, 0, 3), ([-3, 0], 3, -15, 0), ([2, 3], 9, 0, 3), ([-9, 14], 10, -7, 152 / 15)],
)
def test_an_asymmetric_range_holds_what_occurs_of_it_and_zero(values, amax, qmin, top) -> None:
    grid = asymmetric_grid(stats_of(np.array(values, float)), amax, bits=4)
    assert (grid.qmin, grid.qmax) == (qmin, qmin + 15)
    assert float(grid.scale) * grid.qmax == pytest.approx(top, rel=1e-4)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shrink", [1.0, 0.3])
def test_sqnr_of_the_histogram_is_that_of_the_values(name: str, bits: int, shrink: float) -> None:
    x = SAMPLES[name].astype(np.float32)
    grid = symmetric_grid(shrink * np.abs(x).max(), bits=bits)
    measured = sqnr_db(x, fake_quantize(x, grid))
    # 40 000 values: the sampling spread of a mean of squares is about 1 %, 0.04 dB; three of those.
    assert stats_sqnr_db(stats_of(x), grid) == pytest.approx(measured, abs=0.15)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("grid", [(0.1, -128, 127), (0.03, -40, 215), (0.7, -8, 7), (1e-4, -8, 7)])
def test_running_sums_add_up_what_every_bin_loses(name: str, grid: tuple[float, int, int]) -> None:
    stats, scale, (qmin, qmax) = stats_of(SAMPLES[name].astype(np.float32)), np.float32(grid[0]), grid[1:]
    centers, counts = stats.occupied
    lost = (centers - float(scale) * np.clip(np.rint(centers / float(scale)), qmin, qmax)) ** 2
    expected = lost @ counts / stats.count + stats.bin_width**2 / 12
    # cumulated sums of squares cancel: 1e-16 of the power, times some thousand bins
    assert stats_error(stats, Grid(scale, qmin, qmax)) == pytest.approx(expected, abs=1e-12 * stats.mean_square)


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
    assert percentile_stats(stats, percentile=percentile) == pytest.approx(expected, abs=stats.bin_width)


@given(hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-100, 100, width=32)))
@settings(max_examples=50, deadline=None)
def test_percentile_100_and_minmax_are_the_largest_magnitude(x: np.ndarray) -> None:
    stats, largest = stats_of(x), np.abs(x).max()
    assert minmax_stats(stats) == largest
    assert abs(percentile_stats(stats, percentile=100) - largest) <= stats.bin_width
    assert percentile_stats(stats, percentile=100) <= largest


def test_a_zero_tensor_has_range_zero_under_every_rule() -> None:
    stats = stats_of(np.zeros(3))
    assert minmax_stats(stats) == percentile_stats(stats, percentile=99) == mse_stats(stats, bits=8) == 0
    assert symmetric_grid(0.0, bits=4).scale == mse_asymmetric(stats, bits=4).scale == 1


def test_sqnr_closed_form() -> None:
    assert sqnr_db(np.full(4, 10.0), np.full(4, 9.0)) == pytest.approx(20)
    assert sqnr_db(np.ones(2), np.ones(2)) == np.inf

"""Figures of merit against closed forms, scipy's matrix square root and its filters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qncd_deploy.evaluate.metrics import (
    PSNR_CAP_DB,
    Moments,
    bootstrap,
    decibels,
    feature_errors,
    frechet_distance,
    hits,
    inception_score,
    psnr,
    resamples_for,
    row_power,
    shift,
    snr_db,
    ssim,
)


def pictures(n: int = 3, size: int = 20, channels: int = 3, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels)).astype(np.uint8)


def correlated(n: int, d: int, *, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


def test_psnr_of_a_known_error_and_its_cap() -> None:
    black = np.zeros((3, 4, 4, 1), np.uint8)
    found = black.copy()
    found[0] = 255  # 0 dB; unsigned differences the other way round wrap if they are not widened
    found[1, 0, 0] = 16  # 16^2 / 16 pixels
    np.testing.assert_allclose(psnr(found, black), [0, 20 * math.log10(255 / 4), PSNR_CAP_DB], rtol=1e-12)
    np.testing.assert_array_equal(psnr(black, found), psnr(found, black))


def test_psnr_is_a_mean_over_pictures_not_of_the_pooled_error() -> None:
    black = np.zeros((2, 4, 4, 1), np.uint8)
    found = black + np.array([1, 100], np.uint8).reshape(2, 1, 1, 1)
    assert psnr(found, black).mean() == pytest.approx((48.1308 + 8.1308) / 2, abs=1e-4)


def test_ssim_is_the_published_formula() -> None:
    filters = pytest.importorskip("scipy.ndimage")
    x, y = pictures(), pictures(seed=1) // 2 + pictures() // 2

    def blur(z: np.ndarray) -> np.ndarray:  # radius 5: the window of 11
        return filters.gaussian_filter(z, 1.5, truncate=3.5, axes=(1, 2))[:, 5:-5, 5:-5]

    u, v = x.astype(float), y.astype(float)
    mu, mv = blur(u), blur(v)
    su, sv, suv = blur(u * u) - mu**2, blur(v * v) - mv**2, blur(u * v) - mu * mv
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mu * mv + c1) * (2 * suv + c2) / ((mu**2 + mv**2 + c1) * (su + sv + c2))
    # Variances are differences of numbers up to 255^2 = 6.5e4, each to 1e-16 of it, over c2 = 58 at the least.
    np.testing.assert_allclose(ssim(x, y), expected.mean(axis=(1, 2, 3)), rtol=0, atol=1e-11)
    np.testing.assert_allclose(ssim(x, x), 1, rtol=0, atol=1e-12)


def test_ssim_of_pictures_smaller_than_the_window() -> None:
    x = pictures(size=8)
    np.testing.assert_allclose(ssim(x, x), 1, rtol=0, atol=1e-12)
    assert np.all(ssim(x, pictures(size=8, seed=1)) < 0.5)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_pictures_that_do_not_pair_up_are_our_bug(measure) -> None:
    with pytest.raises(AssertionError, match="do not pair up"):
        measure(pictures(2), pictures(3))
    with pytest.raises(AssertionError, match="do not pair up"):
        measure(pictures().astype(np.float32), pictures())


def test_snr() -> None:
    x = np.full((4, 5), 10, np.float32)
    assert snr_db(x, x + 1) == pytest.approx(20)
    assert snr_db(x, x) == math.inf
    assert decibels(0.0, 1.0) == -math.inf
    assert decibels(0.0, 0.0) == math.inf


def published(a: np.ndarray, b: np.ndarray) -> float:
    """FID as its authors' code computes it."""
    linalg = pytest.importorskip("scipy.linalg")
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real))


@pytest.mark.parametrize("n", [40, 300])
def test_frechet_distance_agrees_with_scipys_matrix_square_root(n: int) -> None:
    a, b = correlated(n, 12, seed=1), correlated(n, 12, seed=2)
    expected = published(a, b)
    # sqrtm of a product keeps about half the digits, sqrt(1e-16) of a trace of 300
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-7)
    assert shift(a, b) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_has_its_closed_form_on_commuting_covariances() -> None:
    deviations, others = np.array([3.0, 2.0, 0.0]), np.array([1.0, 2.0, 0.5])
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    a = Moments.from_cov(np.zeros(3), rotation @ np.diag(deviations**2) @ rotation.T)
    b = Moments.from_cov(np.array([0.0, 1.0, 2.0]), rotation @ np.diag(others**2) @ rotation.T)
    assert frechet_distance(a, b) == pytest.approx(5 + 4 + 0 + 0.25, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(9.25, rel=1e-12)


@pytest.mark.parametrize("n", [10, 200])
def test_fewer_pictures_than_features_lose_no_digits(n: int) -> None:
    a = correlated(n, 64, seed=3).astype(np.float32)
    size = a.astype(float).var(0).sum()
    # Rounding alone: 1e-16 of the trace for each of up to 64 singular values.
    assert shift(a, a) <= 1e-13 * size
    assert frechet_distance(Moments.of(a), Moments.of(a)) <= 1e-13 * size
    moved = a + np.float32(0.5)
    assert shift(moved, a) == pytest.approx(64 * 0.25, rel=1e-5)  # float32 sums round the offset
    b = correlated(n, 64, seed=4)
    assert shift(a, b) == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-10)


def test_moments_are_those_of_numpy_and_of_one_feature_too() -> None:
    a = correlated(50, 3, seed=0)
    moments = Moments.of(a)
    atol = 1e-12 * np.abs(np.cov(a.T)).max()
    np.testing.assert_allclose(moments.cov, np.cov(a.T), rtol=0, atol=atol)
    np.testing.assert_allclose(Moments.from_cov(moments.mean, np.cov(a.T)).cov, np.cov(a.T), rtol=0, atol=atol)
    assert Moments.of(a[:, :1]).cov.shape == (1, 1)


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert inception_score(np.zeros((6, 5))) == pytest.approx(1)
    assert inception_score(1e4 * np.eye(5)) == pytest.approx(5)  # logits that overflow a naive softmax
    p = np.array([[0.9, 0.1], [0.3, 0.7]])
    divergence = (p * np.log(p / [0.6, 0.4])).sum(1).mean()
    assert inception_score(np.log(p) + np.array([[3.0], [-7.0]])) == pytest.approx(np.exp(divergence))


def test_accuracy_is_the_share_of_pictures_seen_as_asked() -> None:
    assert hits(np.array([[2.0, 1, 0], [0, 3, 1], [0, 0, 1], [5, 1, 1]]), np.array([0, 1, 1, 0])).mean() == 0.75


def test_bootstrap_covers_a_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    caught = 0
    for trial in range(200):
        values = rng.standard_normal(60)
        found = bootstrap(lambda rows, v=values: float(v[rows].mean()), 60, seed=trial)
        assert found.low < found.value < found.high
        assert found.n == 60
        caught += found.low < 0 < found.high
    # 95 % of 200 with a binomial deviation of 3, and one point lower as bootstrap intervals are at N = 60
    assert 178 <= caught <= 198


def test_bootstrap_keeps_the_value_of_a_distance_inside_and_is_seeded() -> None:
    a, b = (correlated(40, 16, seed=seed) for seed in (1, 2))
    close = 0.9 * a + 0.1 * b

    def distance(rows: np.ndarray) -> float:
        return shift(close[rows], a[rows])

    found = bootstrap(distance, 40, seed=3)
    assert found.low < found.value < found.high
    assert found.value == shift(close, a)
    assert bootstrap(distance, 40, seed=3) == found
    assert bootstrap(distance, 40, seed=4) != found
    assert bootstrap(distance, 40, seed=3, level=0.5).low > found.low


def test_an_estimate_reads_as_value_and_interval() -> None:
    assert str(bootstrap(lambda rows: 0.5, 8, seed=0)) == "0.5 [0.5, 0.5]"


def test_feature_errors_are_in_units_of_the_spread() -> None:
    reference = np.array([[0.0, 0], [4, 0], [0, 2], [4, 2]], np.float32)  # each sqrt(5) from the mean
    moved = reference + np.array([[0, 0], [3, 4], [1, 0], [0, -2]], np.float32)
    np.testing.assert_allclose(feature_errors(moved, reference), [0, 5, 0.2, 0.8], rtol=1e-12)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2000, 50))
    # unrelated sets: E |a - b|^2 = 2 E |b|^2; a mean of 2000 x 50 squares of standard deviation sqrt(8) / 2
    assert feature_errors(a, b).mean() == pytest.approx(2, abs=5 * 2**0.5 * 2 / (2000 * 50) ** 0.5)
    assert not feature_errors(a, a).any()


def test_row_power_is_the_power_of_each_row() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)
    np.testing.assert_allclose(row_power(x), [np.square(row.astype(float)).sum() for row in x], rtol=1e-14)


def test_what_takes_long_is_resampled_less() -> None:
    assert resamples_for(1) == 200
    assert resamples_for(1e30) == 20
    assert 20 < resamples_for(1e9) < 200

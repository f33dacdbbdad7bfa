"""D2-DPM's joint Gaussian on errors of known make."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fit_study import COUNT, SCHEDULE, by_channel, channels, field, rough, study_of, uniform
from studies import with_prediction

from qncd_deploy.correct import d2dpm
from qncd_deploy.correct.d2dpm import LARGEST_RHO
from qncd_deploy.errors import CalibrationError
from qncd_deploy.steps import absorb

K, MU, NOISE = [0.1, -0.05, 0.02], [0.06, -0.04, 0.1], 0.2


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return study_of(tmp_path_factory.mktemp("study"), rough(k=K, mu=MU, noise=NOISE, draw=uniform))


def line(q, e):
    """Slope and offset of the regression of e on q, and what it leaves over."""
    slope, offset = np.polyfit(q, e, 1)
    return slope, offset, np.var(e - slope * q - offset)


def test_the_mean_is_the_regression_on_the_output(study):
    """No error here is 4 standard deviations off, so nothing is left out: the wave is the ordinary regression."""
    for row, stochastic, pairs in zip(d2dpm.fit(study), d2dpm.fit_stochastic(study), study.pairs(), strict=True):
        expected = [line(*both) for both in zip(by_channel(pairs.q), by_channel(pairs.e), strict=True)]
        slopes, offsets, left = np.transpose(expected)
        np.testing.assert_allclose(row.a, slopes, rtol=1e-6)
        np.testing.assert_allclose(row.b, offsets, atol=1e-6)
        assert row.var == pytest.approx(left.mean(), rel=1e-5)
        assert (row.coef, row.z_std) == ("s", 0)
        np.testing.assert_array_equal(stochastic.a, row.a)
        np.testing.assert_array_equal(stochastic.b, row.b)
        assert stochastic.z_std == pytest.approx(math.sqrt(row.var))
        assert stochastic.var == 0  # the noise that is added is not also absorbed


def test_one_gaussian_for_all_channels(study):
    rows = zip(d2dpm.fit_paper(study), d2dpm.fit_stochastic_paper(study), study.pairs(), strict=True)
    for row, stochastic, pairs in rows:
        slope, offset, left = line(pairs.q.ravel().astype(float), pairs.e.ravel().astype(float))
        assert isinstance(row.a, float) and isinstance(row.b, float)
        assert (row.a, row.b) == pytest.approx((slope, offset), rel=1e-5, abs=1e-6)
        assert row.var == pytest.approx(left, rel=1e-5)
        assert row.coef == "s_eff"
        assert (stochastic.a, stochastic.b, stochastic.var) == (row.a, row.b, 0)
        assert stochastic.z_std == pytest.approx(math.sqrt(left), rel=1e-5)


def test_the_stochastic_form_gives_the_variance_back(study):
    """E[e | q] is shrunk: its variance lacks exactly what the residual has."""
    for row, pairs in zip(d2dpm.fit_stochastic(study), study.pairs(), strict=True):
        mean = by_channel(row.a.reshape(-1, 1, 1) * pairs.q + channels(row.b)).var(axis=1).mean()
        exact = by_channel(pairs.e).var(axis=1).mean()
        assert mean < 0.97 * exact
        assert mean + row.z_std**2 == pytest.approx(exact, rel=1e-5)


def test_outliers_are_left_out(tmp_path):
    def spoilt(x, t):
        out = rough(k=K, mu=MU, noise=NOISE, draw=uniform)(x, t)
        out[::8, :, 0, 0] += 30
        return out

    clean = d2dpm.fit(study_of(tmp_path / "clean", rough(k=K, mu=MU, noise=NOISE, draw=uniform)))
    for row, other in zip(d2dpm.fit(study_of(tmp_path / "spoilt", spoilt)), clean, strict=True):
        # 8 of 9,216 pairs fewer
        np.testing.assert_allclose(row.a, other.a, atol=5 * NOISE * math.sqrt(8) / COUNT)
        assert row.var == pytest.approx(other.var, rel=0.01)


def test_correlation_is_clipped(tmp_path):
    """q = 1.1 e: D = q / 11 without any residual, rho = 1."""
    for row, pairs in zip(d2dpm.fit(study := study_of(tmp_path, rough(k=0.1))), study.pairs(), strict=True):
        np.testing.assert_allclose(row.a, 1 - LARGEST_RHO / 11, rtol=1e-6)
        left = by_channel(pairs.error).var(axis=1).mean() * (1 - LARGEST_RHO**2)
        assert row.var == pytest.approx(left, rel=5e-3)  # 4-sigma tails, 0.1 % on average, are out


def test_a_perfect_network_is_left_alone(tmp_path):
    study = study_of(tmp_path, field)
    for fit in (d2dpm.fit, d2dpm.fit_paper, d2dpm.fit_stochastic, d2dpm.fit_stochastic_paper):
        for row in fit(study):
            assert np.all(row.a == 1) and np.all(row.b == 0) and row.var == row.z_std == 0


def test_a_constant_output_has_no_slope(tmp_path):
    study = study_of(tmp_path, lambda x, t: np.full_like(x, 0.25), exact=lambda x, t: np.full_like(x, 0.2))
    for row in d2dpm.fit(study):
        np.testing.assert_array_equal(row.a, 1)
        np.testing.assert_allclose(row.b, -0.05, rtol=1e-5)


def test_residuals_are_in_units_of_eps(tmp_path):
    study = study_of(tmp_path, rough(noise=NOISE), schedule=with_prediction(SCHEDULE, "v_prediction"))
    left = NOISE**2 / (1 + NOISE**2)
    for row, stochastic, step in zip(d2dpm.fit(study), d2dpm.fit_stochastic(study), study.steps, strict=True):
        # sqrt(2 / n), and 4-sigma tails of the noise are out: they hold 0.1 % of its variance
        assert row.var == pytest.approx(step.abar * left, rel=5 * math.sqrt(2 / (3 * COUNT)) + 0.002)
        assert stochastic.z_std == pytest.approx(math.sqrt(row.var))


def test_every_sampler_can_absorb_it(tmp_path):
    study = study_of(tmp_path, rough(noise=NOISE), name="ddpm")
    for row, step in zip(d2dpm.fit_paper(study), study.steps, strict=True):
        assert absorb(step, row.var, row.coef).std <= step.std


def test_too_few_pictures(tmp_path):
    study = study_of(tmp_path, rough(noise=NOISE), pictures=3)
    with pytest.raises(CalibrationError, match=r"^s-d2dpm: 3 pictures to fit on, a number for every channel takes at"):
        d2dpm.fit_stochastic(study)
    assert len(d2dpm.fit_stochastic_paper(study)) == 3  # a single number takes fewer

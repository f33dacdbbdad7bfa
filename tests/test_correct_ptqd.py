"""PTQD's fit on errors of known make: repaired, and with the released code's peculiarities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fit_study import COUNT, MEANS, SCHEDULE, by_channel, channels, field, rough, study_of
from studies import with_prediction

from qncd_deploy.correct import ptqd
from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import CalibrationError
from qncd_deploy.steps import absorb, make_steps

MU = np.array([0.06, -0.04, 0.1])


@pytest.mark.parametrize("k", [-0.08, 0.08])
def test_the_linear_model_is_recovered(tmp_path, k):
    noise = 0.1
    study = study_of(tmp_path, rough(k=k, mu=MU, noise=noise))
    # k: a slope over 3 COUNT numbers, Var(e) = 1; mu: means of the residual and of e, whose own mean k multiplies
    error_k = 5 * noise / math.sqrt(3 * COUNT)
    error_mu = 5 * noise / math.sqrt(COUNT) + error_k * np.abs(MEANS).max()
    for row, pairs in zip(ptqd.fit(study), study.pairs(), strict=True):
        found_k = 1 / row.a - 1
        assert found_k == pytest.approx(k, abs=error_k)
        np.testing.assert_allclose(-row.b * (1 + found_k), MU, atol=error_mu)
        # relative error of a variance from n numbers: sqrt(2 / n)
        expected = noise**2 / (1 + k) ** 2
        assert row.var == pytest.approx(expected, rel=5 * math.sqrt(2 / (3 * COUNT)) + 2 * error_k)
        left = row.a * pairs.q + channels(row.b) - pairs.e
        np.testing.assert_allclose(by_channel(left).mean(axis=1), 0, atol=error_mu)
        assert by_channel(left).var(axis=1).mean() == pytest.approx(row.var, rel=1e-5)
        assert row.coef == "s"


def test_a_slope_that_explains_little_is_left_alone(tmp_path):
    """R^2 = k^2 / (k^2 + noise^2): 0.059 and 0.039 about the gate of 0.05."""
    taken = ptqd.fit(study_of(tmp_path / "a", rough(k=0.025, noise=0.1)))
    left = ptqd.fit(study_of(tmp_path / "b", rough(k=0.02, noise=0.1)))
    assert all(row.a < 1 for row in taken)
    assert all(row.a == 1 for row in left)
    assert all(row.a < 1 for row in ptqd.fit(study_of(tmp_path / "b", rough(k=0.02, noise=0.1)), min_r2=0))
    # what k would have explained stays in the residual
    assert left[0].var == pytest.approx(0.1**2 + 0.02**2, rel=5 * math.sqrt(2 / (3 * COUNT)))


def test_channel_means_are_no_part_of_the_slope_or_the_residual(tmp_path):
    """e has channel means: an error that is constant per channel and goes with them must not be read as a slope."""
    study = study_of(tmp_path, rough(mu=3 * MEANS, noise=0.01))
    for row in ptqd.fit(study, min_r2=0):
        assert row.a == pytest.approx(1, abs=5 * 0.01 / math.sqrt(3 * COUNT))
        assert row.var == pytest.approx(0.01**2, rel=0.05)
    for row in ptqd.fit_paper(study):  # one slope over all channels: the means drag it along
        spread = MEANS.var()
        # the means of e are MEANS give or take 1 / sqrt(COUNT)
        error = 5 * 3 * MEANS.std() / math.sqrt(COUNT)
        assert 1 / row.a - 1 == pytest.approx(3 * spread / (1 + spread), abs=error)
        assert 1 / row.a - 1 > error


def test_means_are_shrunk_by_their_scatter_between_pictures(tmp_path):
    def uneven(x, t):
        return field(x, t) + np.random.default_rng(int(t)).normal(0.02, 0.1, (len(x), 3, 1, 1)).astype(np.float32)

    study = study_of(tmp_path, uneven, pictures=9)
    for row, pairs in zip(ptqd.fit(study, min_r2=1), study.pairs(), strict=True):
        means = pairs.error.mean(axis=(2, 3), dtype=np.float64)
        mean, error = means.mean(axis=0), means.std(axis=0, ddof=1) / 3
        np.testing.assert_allclose(-row.b, mean**3 / (mean**2 + error**2), rtol=1e-5)
        assert np.all(np.abs(row.b) < 0.95 * np.abs(mean))


def test_variance_is_in_units_of_eps(tmp_path):
    """An error of v is a = sqrt(abar) times as large in eps."""
    noise = 0.1
    study = study_of(tmp_path, rough(noise=noise), schedule=with_prediction(SCHEDULE, "v_prediction"))
    for row, step in zip(ptqd.fit(study), study.steps, strict=True):
        assert row.var == pytest.approx(step.abar * noise**2, rel=5 * math.sqrt(2 / (3 * COUNT)))


def test_an_output_that_does_not_follow_the_float_one_is_not_inverted(tmp_path):
    for row in ptqd.fit(study_of(tmp_path, lambda x, t: np.zeros_like(x))):
        assert row.a == 1
        np.testing.assert_allclose(-row.b, -MEANS, atol=5 / math.sqrt(COUNT))


def test_the_released_code(tmp_path):
    """Slope by an ordinary regression over everything, mean of the whole error, one standard deviation a picture."""
    study = study_of(tmp_path, rough(k=[0.1, 0.05, 0.03], mu=MU, noise=0.1))
    for row, pairs in zip(ptqd.fit_paper(study), study.pairs(), strict=True):
        k, _ = np.polyfit(pairs.e.ravel().astype(float), pairs.error.ravel().astype(float), 1)
        assert row.a == pytest.approx(1 / (1 + k), rel=1e-6)
        np.testing.assert_allclose(row.b, -by_channel(pairs.error).mean(axis=1) / (1 + k), rtol=1e-5)
        stds = [np.std(d - k * e, ddof=1) for d, e in zip(pairs.error, pairs.e, strict=True)]
        assert row.var == pytest.approx((np.mean(stds) / (1 + k)) ** 2, rel=1e-5)
        assert row.coef == "s_eff"


def test_the_released_code_knows_no_negative_slope(tmp_path):
    study = study_of(tmp_path, rough(k=-0.1, mu=MU))
    for row in ptqd.fit_paper(study):
        assert row.a == 1
        # the mean of the whole error, k E[e] included
        np.testing.assert_allclose(-row.b, MU - 0.1 * MEANS, atol=5 * 0.1 / math.sqrt(COUNT))


def test_ddpm_has_no_direction_weight_to_recompute(tmp_path):
    study = study_of(tmp_path, rough(noise=0.1), name="ddpm")
    rows = ptqd.fit_paper(study)
    assert {row.coef for row, step in zip(rows, study.steps, strict=True) if step.std} == {"s"}
    steps = [absorb(step, row.var, row.coef) for row, step in zip(rows, study.steps, strict=True)]
    assert all(now.std < before.std for now, before in zip(steps, study.steps, strict=True) if before.std)


def test_too_few_pictures(tmp_path):
    study = study_of(tmp_path, rough(), pictures=2)
    for fit, name in ((ptqd.fit, "ptqd"), (ptqd.fit_paper, "ptqd:paper")):
        with pytest.raises(CalibrationError, match=f"^{name}: 2 pictures to fit on"):
            fit(study)


def test_rows_are_for_all_calls(tmp_path):
    study = study_of(tmp_path, rough(noise=0.1), name="plms", n_steps=4)
    rows = ptqd.fit(study)
    assert len(rows) == len(make_steps(study.schedule, study.config)) == 5
    assert all(isinstance(row, StepFix) for row in rows)

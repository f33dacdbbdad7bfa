"""DNS: unbiased rows, a robust variance, and targets that leave the schedule's marginals in place."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fit_study import COUNT, SCHEDULE, by_channel, rough, study_of
from scipy.optimize import brentq

from qncd_deploy.correct import dns, ptqd
from qncd_deploy.correct.record import StepFix, fixed_steps
from qncd_deploy.correct.residual import update_variances
from qncd_deploy.steps import SamplerConfig, make_steps

K, MU, NOISE = np.array([0.1, -0.3, 0.02]), [0.06, -0.04, 0.1], 0.2


def test_slopes_of_any_sign_and_no_gate(tmp_path):
    study = study_of(tmp_path, rough(k=K, mu=MU, noise=NOISE))
    for row, pairs in zip(dns.fit(study), study.pairs(), strict=True):
        for c, (d, e) in enumerate(zip(by_channel(pairs.error), by_channel(pairs.e), strict=True)):
            slope, intercept = np.polyfit(e, d, 1)
            assert row.a[c] == pytest.approx(1 / (1 + slope), rel=1e-5)
            assert row.b[c] == pytest.approx(-intercept / (1 + slope), abs=1e-6)
        # a standard deviation from quartiles is off by sqrt(1.36 / n), relatively
        expected = np.mean(NOISE**2 / (1 + K) ** 2)
        assert row.var == pytest.approx(expected, rel=5 * 2 * math.sqrt(1.36 / COUNT) + 0.01)


def test_heavy_tails_hardly_count(tmp_path):
    def tailed(rng, shape):
        return rng.standard_normal(shape) * np.where(rng.random(shape) < 0.02, 20, 1)

    study = study_of(tmp_path, rough(noise=0.1, draw=tailed))
    for row, plain in zip(dns.fit(study), ptqd.fit(study), strict=True):
        assert plain.var == pytest.approx(0.01 * (0.98 + 0.02 * 400), rel=0.5)
        assert row.var == pytest.approx(0.01, rel=0.15)  # quartiles move by 2 % / (2 x 0.25 x 1.27) at most


def lacking(p, step, var):
    direction = math.sqrt(1 - p) - math.sqrt(p * (1 - step.abar) / step.abar)
    return step.abar_next * (1 + direction**2 * var) - p


@pytest.mark.parametrize("var", [0.01, 0.1])
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_the_target_solves_its_equation(name, var):
    steps = make_steps(SCHEDULE, SamplerConfig(name, 20))
    rows = [StepFix(a=1.1, var=var)] * 20
    *aimed, last = dns.with_target(rows, steps, prediction="epsilon")
    assert last == rows[-1]
    solved = 0
    for row, step in zip(aimed, steps, strict=False):
        assert (row.a, row.var) == (1.1, var)
        if lacking(1.0, step, var) >= 0:  # even no noise at all in the target would leave too much
            assert row.abar_next is None and row.x_mul == 1
            continue
        solved += 1
        root = brentq(lacking, step.abar_next, 1, args=(step, var), xtol=1e-15)
        assert row.abar_next == pytest.approx(root, rel=1e-12)
        assert row.abar_next > step.abar_next
        assert row.x_mul == pytest.approx(math.sqrt(step.abar_next / row.abar_next))
    assert solved >= 16


@pytest.mark.parametrize(("name", "tolerance"), [("ddim", 1e-9), ("euler", 1e-9), ("plms", 1e-9), ("dpmpp-2m", 0.05)])
def test_the_marginal_is_kept(name, tolerance):
    """Aimed at p, scaled back by x_mul: signal amplitude sqrt(abar'), and noise of the sampler's 1 - p plus what the
    outputs' errors bring makes 1 - abar'. The update's variances are those of the rows that are really run.

    tolerance, of the noise brought in: rounding, but for DPM-Solver++, whose extrapolation p changes a little."""
    config = SamplerConfig(name, 20)
    steps = make_steps(SCHEDULE, config)
    var = [0.002] * len(steps)
    aimed = dns.with_target([StepFix(var=v) for v in var], steps, prediction="epsilon")
    run = fixed_steps(SCHEDULE, config, aimed)
    brought = update_variances(run, var, prediction="epsilon")
    for row, step, extra in list(zip(aimed, steps, brought, strict=True))[:-1]:
        p = row.abar_next
        assert p > step.abar_next
        assert row.x_mul**2 * p == pytest.approx(step.abar_next)
        noise = row.x_mul**2 * (1 - p + extra)
        assert abs(noise - (1 - step.abar_next)) < tolerance * extra + 1e-12


def test_stochastic_rows_absorb_instead(tmp_path):
    study = study_of(tmp_path, rough(noise=NOISE), eta=1.0)
    for row in dns.fit(study):
        assert row.abar_next is None and row.x_mul == 1 and row.var > 0


def test_noise_that_no_target_can_hold():
    steps = make_steps(SCHEDULE, SamplerConfig("ddim", 4))
    rows = dns.with_target([StepFix(var=1e3)] * 4, steps, prediction="epsilon")
    assert all(row.abar_next is None and row.x_mul == 1 for row in rows)


def test_no_error_no_target(tmp_path):
    study = study_of(tmp_path, rough(k=0.1))
    for row in dns.fit(study):
        assert row.var < 1e-12  # rounding of float32
        assert row.x_mul == pytest.approx(1, abs=1e-9)


def test_an_output_that_does_not_follow_the_float_one_is_not_inverted(tmp_path):
    for row in dns.fit(study_of(tmp_path, lambda x, t: np.zeros_like(x))):
        np.testing.assert_array_equal(row.a, 1)

"""Q-Drift's gain: its published forms, and the variance that it is made from."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fit_study import COUNT, SCHEDULE, field, rough, study_of, uniform
from studies import with_prediction

from qncd_deploy.correct import qdrift
from qncd_deploy.correct.record import StepFix
from qncd_deploy.steps import SamplerConfig, make_steps

K, NOISE = 0.1, 0.2


def given_output(k, noise):
    """Var(D | q) of q = (1 + k) e + noise n, Var(e) = 1."""
    cov, var_q = k * (1 + k) + noise**2, (1 + k) ** 2 + noise**2
    return k**2 + noise**2 - cov**2 / var_q


def sigmas(step):
    return math.sqrt(1 / step.abar - 1), math.sqrt(1 / step.abar_next - 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_one_step_at_a_time(tmp_path, name, prediction):
    schedule = with_prediction(SCHEDULE, prediction)
    study = study_of(tmp_path, rough(k=K, noise=NOISE, draw=uniform), schedule=schedule, name=name, n_steps=5)
    for row, step in zip(qdrift.fit(study), study.steps, strict=True):
        var = given_output(K, NOISE) * (1 if prediction == "epsilon" else step.abar)
        # a variance from 3 COUNT numbers, and channel means of e that are pooled with it: 1 % of Var(e)
        assert row.var == pytest.approx(var, rel=5 * math.sqrt(2 / (3 * COUNT)) + 0.01)
        sigma, target = sigmas(step)
        assert row.gain == pytest.approx(1 + abs(target - sigma) / (2 * sigma) * row.var, rel=1e-12)
        assert row.gain > 1
        assert (row.a, row.b, row.z_std) == (1, 0, 0)


def test_multistep_matches_what_the_published_sum_says():
    """DPM-Solver++ 2M by hand: Var(y') = sum_j (C_j sigma_j / alpha')^2 V_j over the solver's two x_0."""
    steps = make_steps(SCHEDULE, SamplerConfig("dpmpp-2m", 6))
    var = [0.01 * (call + 1) for call in range(6)]
    rows = qdrift.with_gain([StepFix(var=v) for v in var], steps, prediction="epsilon")
    previous = None
    for call, (row, step) in enumerate(zip(rows, steps, strict=True)):
        sigma, target = sigmas(step)
        alpha = math.sqrt(step.abar_next)
        moved = (step.x0_weights[0] * sigma / alpha) ** 2 * var[call]
        if len(step.x0_weights) == 2:
            moved += (step.x0_weights[1] * sigmas(previous)[0] / alpha) ** 2 * var[call - 1]
        assert row.gain == pytest.approx(1 + moved / (sigma**2 - target**2), rel=1e-12)
        if len(step.x0_weights) == 1:  # first order: |dsigma| V / (sigma + sigma')
            assert row.gain == pytest.approx(1 + (sigma - target) / (sigma + target) * var[call], rel=1e-12)
        previous = step


def test_plms_counts_the_outputs_that_it_mixes():
    """(55, -59, 37, -9) / 24 of equally bad outputs is sum of squares = 13.9 times as bad as one of them."""
    steps = make_steps(SCHEDULE, SamplerConfig("plms", 8))
    rows = qdrift.with_gain([StepFix(var=0.01)] * 9, steps, prediction="epsilon")
    sigma, target = sigmas(steps[5])
    worse = (55**2 + 59**2 + 37**2 + 9**2) / 24**2
    assert rows[5].gain == pytest.approx(1 + (sigma - target) / (sigma + target) * 0.01 * worse)


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.5), ("ddpm", 0.0), ("euler-a", 0.0)])
def test_stochastic_samplers_are_left_alone(tmp_path, name, eta):
    study = study_of(tmp_path, rough(k=K, noise=NOISE), name=name, eta=eta)
    assert all(row.gain == 1 and row.var == 0 for row in qdrift.fit(study))
    rows = tuple(StepFix(a=1.1, var=0.1) for _ in study.steps)
    assert qdrift.with_gain(rows, study.steps, prediction="epsilon") == rows


def test_gain_is_added_to_rows_as_they_are():
    steps = make_steps(SCHEDULE, SamplerConfig("ddim", 4))
    rows = [StepFix(a=1.1, b=np.ones(3), var=0.02)] * 4
    for row in qdrift.with_gain(rows, steps, prediction="epsilon"):
        assert row.a == 1.1 and row.var == 0.02 and row.gain > 1
        np.testing.assert_array_equal(row.b, 1)


def test_outliers_are_left_out(tmp_path):
    """One error in a thousand of 30: 0.9 of variance, were it counted."""

    def spoilt(x, t):
        out = rough(noise=NOISE, draw=uniform)(x, t)
        out[::7, :, 3, 3] += 30
        return out

    clean = qdrift.fit(study_of(tmp_path / "clean", rough(noise=NOISE, draw=uniform)))
    for row, other in zip(qdrift.fit(study_of(tmp_path / "spoilt", spoilt)), clean, strict=True):
        assert row.var == pytest.approx(other.var, rel=0.01)


def test_a_perfect_network_gains_nothing(tmp_path):
    assert all(row.gain == 1 for row in qdrift.fit(study_of(tmp_path, field)))


def test_two_pictures_are_enough(tmp_path):
    assert len(qdrift.fit(study_of(tmp_path, rough(noise=NOISE), pictures=2))) == 3

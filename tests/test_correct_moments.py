"""Moments of paired outputs, shrunk means, and what a fit refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fit_study import by_channel, rough, study_of

from qncd_deploy.correct.moments import (
    Moments,
    checked_pairs,
    eps_variance,
    invertible,
    ratio,
    shrunk_mean,
)
from qncd_deploy.errors import CalibrationError
from qncd_deploy.schedule import Schedule
from qncd_deploy.steps import SamplerConfig, make_steps

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    study = study_of(tmp_path_factory.mktemp("study"), rough(k=0.1, mu=[0.1, 0.2, -0.3], noise=0.2), n_steps=1)
    (found,) = study.pairs()
    return found


@pytest.mark.parametrize("pooled", [False, True])
def test_moments_are_numpys(pairs, pooled):
    found = Moments.of(pairs, pooled=pooled)
    e, q, d = (v.reshape(1, -1) if pooled else v for v in map(by_channel, (pairs.e, pairs.q, pairs.error)))
    near = {"rtol": 1e-6}  # D is a float32 difference here, q of float64 there
    for channel in range(len(e)):
        of_e, of_q = np.cov(e[channel], d[channel], ddof=0), np.cov(q[channel], d[channel], ddof=0)
        np.testing.assert_allclose(np.ravel(found.mean_e)[channel], e[channel].mean(), **near)
        np.testing.assert_allclose(np.ravel(found.mean_error)[channel], d[channel].mean(), **near)
        np.testing.assert_allclose(np.ravel(found.mean_q)[channel], q[channel].mean(), **near)
        np.testing.assert_allclose(np.ravel(found.var_e)[channel], of_e[0, 0], **near)
        np.testing.assert_allclose(np.ravel(found.var_error)[channel], of_e[1, 1], **near)
        np.testing.assert_allclose(np.ravel(found.cov_e_error)[channel], of_e[0, 1], **near)
        np.testing.assert_allclose(np.ravel(found.var_q)[channel], of_q[0, 0], **near)
        np.testing.assert_allclose(np.ravel(found.cov_q_error)[channel], of_q[0, 1], **near)
        left = np.var(d[channel] - 0.07 * e[channel])
        np.testing.assert_allclose(np.ravel(found.residual(0.07))[channel], left, **near)
    assert found.var_e.shape == (() if pooled else (3,))


@pytest.mark.parametrize("pooled", [False, True])
def test_trimming_leaves_out_pairs_with_far_errors(pairs, pooled):
    tails = np.random.default_rng(0).laplace(scale=0.7, size=pairs.q.shape).astype(np.float32)
    spoilt = type(pairs)(pairs.call, pairs.step, pairs.x, pairs.q + tails, pairs.e)
    error = by_channel(spoilt.error).reshape((1, -1) if pooled else (3, -1))
    e = by_channel(pairs.e).reshape(error.shape)
    kept = np.abs(error - error.mean(axis=1, keepdims=True)) <= 4 * error.std(axis=1, keepdims=True)
    assert 50 < (~kept).sum() < 0.01 * kept.size
    found = Moments.of(spoilt, pooled=pooled, trim=True)
    expected = [np.cov(e[c][kept[c]], error[c][kept[c]], ddof=0) for c in range(len(e))]
    np.testing.assert_allclose(np.ravel(found.var_e), [m[0, 0] for m in expected], rtol=1e-6)
    np.testing.assert_allclose(np.ravel(found.var_error), [m[1, 1] for m in expected], rtol=1e-6)
    np.testing.assert_allclose(np.ravel(found.cov_e_error), [m[0, 1] for m in expected], rtol=1e-6)
    assert np.all(Moments.of(spoilt, pooled=pooled).var_error > 1.02 * found.var_error)


def test_a_perfect_network_has_no_outliers(pairs):
    same = type(pairs)(pairs.call, pairs.step, pairs.x, pairs.e, pairs.e)
    found = Moments.of(same, trim=True)
    np.testing.assert_array_equal(found.var_error, 0)
    np.testing.assert_allclose(found.var_e, by_channel(pairs.e).var(axis=1), rtol=1e-9)


def test_shrunk_mean():
    """Two pictures a, b: mean (a + b) / 2, squared standard error (a - b)^2 / 4."""
    a, b = np.array([3.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, -1.0, 0.0])
    mean, error = (a + b) / 2, (a - b) ** 2 / 4
    found = shrunk_mean(np.stack([a, b]))
    np.testing.assert_allclose(found[:2], mean[:2] ** 3 / (mean[:2] ** 2 + error[:2]))
    np.testing.assert_array_equal(found[2:], 0)


def test_ratio_and_inverse():
    np.testing.assert_array_equal(ratio(np.array([1.0, 1.0]), np.array([4.0, 0.0])), [0.25, 0.0])
    np.testing.assert_array_equal(invertible(np.array([3.0, -0.89, -0.91, -2.0])), [3.0, -0.89, 0.0, 0.0])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_variance_in_eps(prediction):
    """An output of the network that is off by d puts eps off by d times its own factor."""
    step = make_steps(SCHEDULE, SamplerConfig("ddim", 4))[1]
    factor = {"epsilon": 1, "v_prediction": step.a, "sample": step.a / step.b}[prediction]
    assert eps_variance(np.array([1.0, 3.0]), step, prediction) == pytest.approx(2 * factor**2)


def test_without_signal_v_says_nothing_of_eps():
    step = replace(make_steps(SCHEDULE, SamplerConfig("ddim", 4))[1], abar=0.0)
    assert eps_variance(1.0, step, "v_prediction") == 0


def test_refusals(tmp_path):
    study = study_of(tmp_path, rough(), pictures=3, n_steps=1)
    expected = r"^ptqd: 3 pictures to fit on, a number for every channel takes at least 4\. Fit on more pictures\.$"
    with pytest.raises(CalibrationError, match=expected):
        next(checked_pairs(study, method="ptqd", per="channel"))
    assert len(list(checked_pairs(study, method="qdrift", per="scalar"))) == 1

    class Broken(type(study)):
        def pairs(self):
            for found in super().pairs():
                found.e[0, 0, 0, 0] = np.inf
                yield found

    broken = Broken(study.setting, study.exact_network, study.network, study.exact_folder, study.folder)
    with pytest.raises(CalibrationError, match=r"^ptqd: the float network's output at call 0 holds NaN or infinity\."):
        next(checked_pairs(broken, method="ptqd", per="scalar"))

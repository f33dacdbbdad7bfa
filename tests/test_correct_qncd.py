"""QNCD's runtime estimator on networks whose error is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from studies import setting_of, unrecorded, with_prediction

from qncd_deploy.correct import qncd
from qncd_deploy.errors import CalibrationError
from qncd_deploy.sample import PictureNoise, denoise, rollout
from qncd_deploy.schedule import SCHEDULERS, Schedule
from qncd_deploy.steps import SamplerConfig, make_steps

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
SHAPE = (4, 8, 8)
BIAS = np.array([0.03, -0.02, 0.05, 0.01], np.float32).reshape(4, 1, 1)
OWN = np.array([-0.04, 0.01, 0.02, 0.03], np.float32).reshape(4, 1, 1)


def steps_of(name="ddim", n_steps=20):
    return make_steps(SCHEDULE, SamplerConfig(name, n_steps))


def study_of(exact, network, pictures, **sampler):
    return unrecorded(exact, network, setting_of(SCHEDULE, pictures=pictures, shape=SHAPE, **sampler))


def float_net(x, t):
    """Its mean over a picture and channel is OWN whatever it sees: what the probe finds is exactly known."""
    centred = x - x.mean(axis=(2, 3), keepdims=True)
    return np.tanh(centred) - np.tanh(centred).mean(axis=(2, 3), keepdims=True) + OWN


def biased_net(x, t):
    return float_net(x, t) + BIAS


@pytest.mark.parametrize(
    ("name", "n_steps", "expected"),
    [
        ("plms", 50, (7, 17, 27, 37, 47)),  # step l is call l: the doubled first step comes before
        ("plms", 20, (7, 17)),
        ("ddim", 50, (6, 16, 26, 36, 46)),
        ("euler", 20, (6, 16)),
        ("ddim", 6, ()),
    ],
)
def test_refresh_calls_are_the_released_ones(name, n_steps, expected):
    assert qncd.refresh_calls(steps_of(name, n_steps)) == expected
    if name == "plms":
        released = tuple(step for step in range(1, n_steps + 1) if (step - 2) % 10 == 10 // 2)
        assert expected == released


@pytest.mark.parametrize("name", SCHEDULERS)
def test_short_intervals_never_probe_where_nothing_can_be_renoised(name):
    steps = steps_of(name, 8)
    for interval in (1, 2, 3):
        calls = qncd.refresh_calls(steps, interval=interval)
        assert calls
        fixes = qncd.fit_paper(steps, interval=interval)
        assert [i for i, f in enumerate(fixes) if f.refresh] == list(calls)
        noise = PictureNoise(0, range(2), SHAPE)
        *_, last = denoise(biased_net, noise.initial(), steps, noise=noise, fixes=fixes)
        assert last.extra_calls == len(calls)
        assert np.isfinite(last.x).all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_repaired_removes_a_bias_per_channel(name):
    steps = steps_of(name)
    loop = rollout(steps, seed=0, shape=SHAPE)
    fixes = qncd.fit(study_of(float_net, biased_net, 7, name=name))
    calls = qncd.refresh_calls(steps)
    for call in calls:
        # means of 64 float32 values of size 1
        np.testing.assert_allclose(fixes[call].m_ref.reshape(4, 1, 1), OWN, atol=1e-6)
    for state in loop(lambda _: biased_net, range(100, 103), fixes):
        if state.call < calls[0]:
            assert state.m is None
            continue
        assert fixes[state.call].m_gain == pytest.approx(1.0, abs=1e-4)
        np.testing.assert_allclose(state.m, np.broadcast_to(BIAS, state.m.shape), atol=1e-5)
        np.testing.assert_allclose(state.eps, float_net(state.x_in, state.step.t), atol=1e-5)


def test_faithful_subtracts_one_number():
    """The released estimator takes the mean over all channels, the float model's own mean included, plus the mean of
    e1: std 1 / sqrt(N C H W)."""
    steps = steps_of()
    pictures = 64
    *_, last = rollout(steps, seed=0, shape=SHAPE)(lambda _: biased_net, range(pictures), qncd.fit_paper(steps))
    assert isinstance(last.m, float)
    expected = float((BIAS + OWN).mean())
    standard_error = 1 / math.sqrt(pictures * np.prod(SHAPE))
    assert abs(last.m - expected) < 4 * standard_error
    assert abs(last.m - expected) > 1e-7  # e1 is not zero-mean here
    np.testing.assert_array_equal(last.eps, last.raw - np.float32(last.m))


def test_gain_is_the_share_of_m_that_is_error_of_the_row():
    """The error is a bias plus a fresh draw per call, picture and channel: E[m D] / E[m^2]
    = bias^2 / (bias^2 + spread^2)."""
    steps = steps_of()
    spread, bias = 0.06, 0.05
    rng = np.random.default_rng(0)

    def restless(x, t):
        draw = rng.normal(bias, spread, (*x.shape[:2], 1, 1)).astype(np.float32)
        return float_net(x, t) + draw

    pictures = 400
    fixes = qncd.fit(study_of(float_net, restless, pictures))
    expected = bias**2 / (bias**2 + spread**2)
    # the ratio's numerator averages m D over n = 1600 pairs, with std(m D) <= bias^2 + 2 bias spread + spread^2; four
    # standard errors, and as much for the denominator
    error = 8 * (bias + spread) ** 2 / math.sqrt(pictures * SHAPE[0]) / (bias**2 + spread**2)
    first, second = qncd.refresh_calls(steps)
    for call in range(first, len(steps)):
        assert fixes[call].m_gain == pytest.approx(expected, abs=error)
    assert fixes[first].m_gain != fixes[second].m_gain
    assert all(f.m_gain == 1.0 for f in fixes[:first] if not f.refresh)


def test_gain_is_zero_where_m_points_the_wrong_way():
    """An error that only shows in the probe (which sees the state twice as noisy) must not be subtracted."""
    steps = steps_of()
    calls = qncd.refresh_calls(steps)
    seen = []

    def deceiving(x, t):
        seen.append(t)
        probed = seen[-2:].count(t) == 2  # the second call at one timestep is the probe
        return float_net(x, t) + (BIAS if probed else -BIAS)

    fixes = qncd.fit(study_of(float_net, deceiving, 4))
    assert all(f.m_gain == 0.0 for f in fixes[calls[0] :])


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_are_fitted_in_eps(prediction):
    """The same networks, told to return v or x_0: the same m_ref and gain come out."""
    steps = steps_of()
    level = {s.t: (s.a, s.b) for s in steps}

    def as_output(net):
        def predict(x, t):
            a, b = level[t]
            x0 = (x - b * net(x, t)) / a
            out = a * net(x, t) - b * x0 if prediction == "v_prediction" else x0
            return out.astype(np.float32)

        return predict

    setting = setting_of(with_prediction(SCHEDULE, prediction), pictures=4, shape=SHAPE)
    fixes = qncd.fit(unrecorded(as_output(float_net), as_output(biased_net), setting))
    for call in qncd.refresh_calls(steps):
        # eps = (x - a x_0) / b and back: float32 rounding of values up to 20 over b >= 0.07, averaged over 64
        np.testing.assert_allclose(fixes[call].m_ref.reshape(4, 1, 1), OWN, atol=5e-5)
        assert fixes[call].m_gain == pytest.approx(1.0, abs=5e-3)


def test_pictures_do_not_mix():
    steps = steps_of()
    loop = rollout(steps, seed=0, shape=SHAPE)
    fixes = qncd.fit(study_of(float_net, biased_net, 4))
    *_, together = loop(lambda _: biased_net, range(5), fixes)
    *_, alone = loop(lambda _: biased_net, [4], fixes)
    np.testing.assert_array_equal(together.x[4:], alone.x)


def test_counts_and_options():
    steps = steps_of()
    counts = {"float": 0, "quantized": 0}

    def counted(name, net):
        def predict(x, t):
            counts[name] += 1
            return net(x, t)

        return predict

    models = counted("float", float_net), counted("quantized", biased_net)
    plain = qncd.fit(study_of(*models, 4), shrink=False)
    assert counts == {"float": 22, "quantized": 0}
    assert all(f.m_gain == 1.0 for f in plain)
    qncd.fit(study_of(*models, 4))
    first = qncd.refresh_calls(steps)[0]
    assert counts == {"float": 22 + 22 + 20 - first, "quantized": 22}
    short = qncd.fit(study_of(*models, 4, n_steps=5))
    assert len(short) == 5
    assert not any(f.refresh for f in short)


def test_refusals():
    steps = steps_of()
    with pytest.raises(
        CalibrationError, match="qncd: 3 pictures to fit on, a number for every channel takes at least 4"
    ):
        qncd.fit(study_of(float_net, biased_net, 3))
    with pytest.raises(CalibrationError, match="refresh interval 0"):
        qncd.refresh_calls(steps, interval=0)
    with pytest.raises(CalibrationError, match="float network says of its probe at call 6 holds NaN or infinity"):
        qncd.fit(study_of(lambda x, t: np.nan * x, biased_net, 4))
    with pytest.raises(CalibrationError, match="an output at call 6 holds NaN or infinity"):
        qncd.fit(study_of(float_net, lambda x, t: np.nan * x, 4))

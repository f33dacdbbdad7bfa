"""StepbaQ where the accumulated error is white noise: the sampler steps back exactly as far as the noise is worth.

x_0 ~ N(0, 1): states at every level are N(0, 1), the exact predictor is e = b x, and one DDIM step with eta 0 takes x
to cos(angle) x, cos of the angle between (a, b) and (a', b').
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from studies import recorded, setting_of, unrecorded

from qncd_deploy.correct import stepbaq
from qncd_deploy.correct.record import fixed_steps
from qncd_deploy.errors import CalibrationError
from qncd_deploy.schedule import SCHEDULERS, Schedule

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
LEVELS = SCHEDULE.alphas_cumprod
PICTURES, SHAPE = 64, (2, 32, 32)
NOISE, MU = 0.3, np.array([0.05, -0.1])


def exact(x, t):
    return (math.sqrt(1 - np.interp(t, np.arange(LEVELS.size), LEVELS)) * x).astype(np.float32)


def noisy(seed, noise=NOISE, mu=MU):
    rng = np.random.default_rng(seed)

    def predict(x, t):
        n = rng.standard_normal(x.shape, dtype=np.float32)
        return exact(x, t) + np.float32(noise) * n + mu.reshape(2, 1, 1).astype(np.float32)

    return predict


def study_of(*, noise=NOISE, pictures=PICTURES, **options):
    setting = setting_of(SCHEDULE, pictures=pictures, shape=SHAPE, **options)
    return unrecorded(exact, noisy(1, noise), setting)


def closed_form(steps):
    """(tau or None, mu, state's noise variance over the float state) by call: D is white, so between two steps back
    the gap follows gap' = (A + B slope) gap + B D."""
    abar, slope_t = steps[0].abar, steps[0].t
    variance, mean = 0.0, np.zeros(2)
    found = []
    for step, following in itertools.pairwise(steps):
        p = step.abar_next
        direction = math.sqrt(1 - p) - math.sqrt(p * (1 - abar) / abar)
        carried = math.sqrt(p / abar) + direction * math.sqrt(1 - LEVELS[int(slope_t)])
        variance = carried**2 * variance + direction**2 * NOISE**2
        mean = carried * mean + direction * MU
        tau = int(np.argmin(np.abs(LEVELS - following.abar / (1 + variance))))
        found.append((tau, mean, variance))
        abar, slope_t = following.abar, following.t
        if tau > following.t:
            abar, slope_t, variance, mean = LEVELS[tau], tau, 0.0, np.zeros(2)
    return found


def test_times_and_means_follow_the_closed_form():
    study = study_of()
    rows = stepbaq.fit(study)
    count = PICTURES * 32 * 32
    stepped = 0
    for call, (tau, mean, variance) in enumerate(closed_form(study.steps)):
        following = study.steps[call + 1]
        if tau <= following.t:
            assert rows[call].x_mul == 1 and rows[call + 1].t_model is None and rows[call + 1].abar is None
            continue
        stepped += 1
        # a sampled variance is off by sqrt(2 / n), and tau is a whole number
        assert abs(rows[call + 1].t_model - tau) <= 1
        assert rows[call + 1].abar == LEVELS[int(rows[call + 1].t_model)]
        assert rows[call].x_mul == pytest.approx(math.sqrt(rows[call + 1].abar / following.abar))
        np.testing.assert_allclose(rows[call].x_sub, mean, atol=5 * math.sqrt(variance / count))
    assert stepped >= 10


def test_noise_is_the_schedules_after_the_step_back():
    """Other pictures: with the rows on, the spread of each state is what the float sampler's own steps leave of 1, and
    the spread of the samples is nearer the float run's than without."""
    rows = stepbaq.fit(study_of())
    spreads, states_of = {}, {}
    for name, network, fixes in (("float", exact, None), ("off", noisy(2), None), ("on", noisy(2), rows)):
        setting = setting_of(SCHEDULE, pictures=PICTURES, shape=SHAPE, seed=5)
        run = unrecorded(exact, network, setting).run()
        states_of[name] = [run.advance(*(() if fixes is None else (fixes[call],))) for call in range(20)]
        spreads[name] = np.array([s.x.std(axis=(0, 2, 3)).mean() for s in states_of[name]])
    checked = 0
    for call in range(19):
        if rows[call].x_mul == 1:
            continue
        checked += 1
        step = states_of["on"][call].step
        turn = math.sqrt(step.abar * step.abar_next) + math.sqrt((1 - step.abar) * (1 - step.abar_next))
        before = 1.0 if call == 0 else float(np.var(states_of["on"][call - 1].x, axis=(0, 2, 3)).mean())
        clean = turn**2 * before
        direction = step.eps_gain
        # the noise that D brought and the room made for it cancel: x_mul^2 (clean + B^2 NOISE^2) with
        # x_mul^2 = 1 / (1 + v), v = B^2 NOISE^2 (plus what a step not taken left), abar_tau the nearest of a table
        expected = rows[call].x_mul ** 2 * (clean + direction**2 * NOISE**2)
        found = float(np.var(states_of["on"][call].x, axis=(0, 2, 3)).mean())
        error = 5 * math.sqrt(2 / (2 * PICTURES * 32 * 32))
        assert found == pytest.approx(expected, rel=error)
        assert found <= 1 + error
    assert checked >= 10
    off, on = (abs(spreads[name][-1] / spreads["float"][-1] - 1) for name in ("off", "on"))
    assert on < off / 2
    means = {name: np.abs(states[-1].x.mean(axis=(0, 2, 3))).max() for name, states in states_of.items()}
    assert means["on"] < means["off"] / 5


def test_a_bias_alone_is_no_noise():
    setting = setting_of(SCHEDULE, pictures=4, shape=SHAPE)
    rows = stepbaq.fit(unrecorded(exact, noisy(1, noise=0.0, mu=np.array([0.5, -0.5])), setting))
    assert all(row.t_model is None and row.x_mul == 1 for row in rows)


def test_errors_in_a_multistep_history_count():
    """DPM-Solver++ goes on from the x_0 of the call before, which is off by -sigma MU since it was remembered."""
    setting = setting_of(SCHEDULE, pictures=PICTURES, shape=SHAPE, name="dpmpp-2m")
    rows = stepbaq.fit(unrecorded(exact, noisy(1), setting))
    first, second = fixed_steps(SCHEDULE, setting.config, rows)[:2]
    assert rows[0].x_mul < 1 and rows[1].x_mul < 1  # both samplers are in step before either call
    moved = second.eps_gain - second.x0_weights[1] * first.b / first.a
    noise = NOISE * math.hypot(second.eps_gain, second.x0_weights[1] * first.b / first.a)
    np.testing.assert_allclose(rows[1].x_sub, moved * MU, atol=5 * noise / math.sqrt(PICTURES * 32 * 32))
    assert abs(moved - second.eps_gain) > 0.3  # what the history adds


def test_small_errors_add_up_until_they_are_worth_a_timestep():
    rows = stepbaq.fit(study_of(noise=0.08))
    taken = [row.t_model is not None for row in rows]
    assert any(taken) and not all(taken[1:])


@pytest.mark.parametrize(("name", "eta"), [*((name, 0.0) for name in SCHEDULERS), ("ddim", 1.0)])
def test_every_sampler_has_its_rows(tmp_path, name, eta):
    setting = setting_of(SCHEDULE, pictures=4, shape=SHAPE, name=name, eta=eta, n_steps=8)
    study = recorded(exact, noisy(1), setting, tmp_path)
    rows = stepbaq.fit(study)
    assert len(rows) == len(study.steps)
    assert any(row.t_model is not None for row in rows)
    assert rows[-1].x_mul == 1  # there is no call to come
    for row, step in zip(rows, study.steps, strict=True):
        if step.base == "saved":
            assert row.t_model is None and row.abar is None
        if row.t_model is not None:
            assert row.t_model > step.t and row.t_model == int(row.t_model) and row.abar < step.abar
    run = study.run()
    for row in rows:
        assert np.isfinite(run.advance(row).x).all()


def test_the_samplers_own_noise_is_no_error(tmp_path):
    """With eta 1 and a perfect network both samplers draw the same noise: nothing to step back from."""
    setting = setting_of(SCHEDULE, pictures=4, shape=SHAPE, eta=1.0)
    rows = stepbaq.fit(unrecorded(exact, exact, setting))
    assert all(row.t_model is None and row.x_mul == 1 for row in rows)


def test_each_network_is_run_once_a_row():
    asked = {"float": 0, "quantized": 0}

    def counted(name, network):
        def predict(x, t):
            asked[name] += 1
            return network(x, t)

        return predict

    setting = setting_of(SCHEDULE, pictures=4, shape=SHAPE, n_steps=6)
    stepbaq.fit(unrecorded(counted("float", exact), counted("quantized", noisy(1)), setting))
    assert asked == {"float": 5, "quantized": 5}  # nothing comes after the last call


def test_refusals():
    with pytest.raises(CalibrationError, match=r"^stepbaq: 3 pictures to fit on"):
        stepbaq.fit(study_of(pictures=3))
    setting = setting_of(SCHEDULE, pictures=4, shape=SHAPE)
    with pytest.raises(CalibrationError, match=r"^stepbaq: the state after call 0 holds NaN or infinity"):
        stepbaq.fit(unrecorded(exact, lambda x, t: np.nan * x, setting))

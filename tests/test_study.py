"""Studies: paired outputs on the float sampler's states, and free runs that go on call by call."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from studies import recorded, setting_of, unrecorded

from qncd_deploy.correct.record import StepFix, fixed_steps
from qncd_deploy.errors import CalibrationError
from qncd_deploy.sample import denoise
from qncd_deploy.schedule import SCHEDULERS, Schedule
from qncd_deploy.study import FreeRun

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
SHAPE = (3, 4, 4)


def exact(x, t):
    return np.tanh(x) + np.float32(t / 1000)


def rough(x, t):
    return np.float32(1.1) * exact(x, t) + np.float32(0.02)


@pytest.mark.parametrize(("name", "eta"), [*((name, 0.0) for name in SCHEDULERS), ("ddim", 1.0)])
def test_a_free_run_is_the_loop_itself(name, eta):
    """Call by call, with every kind of correction on, bit for bit what denoise makes in one go."""
    setting = setting_of(SCHEDULE, pictures=3, shape=SHAPE, name=name, eta=eta, n_steps=8)
    rng = np.random.default_rng(0)
    fixes = [
        StepFix(
            x_add=rng.normal(size=3) / 50,
            a=1.02,
            b=rng.normal(size=SHAPE) / 50,
            z_std=0.01,
            x_sub=0.01,
            var=1e-4,
            refresh=call == 4,
        )
        for call in range(len(setting.steps))
    ]
    noise = setting.noise()
    states = denoise(rough, setting.scale * noise.initial(), setting.steps, noise=noise, fixes=fixes)
    run = FreeRun(setting, rough)
    for state, fix in zip(states, fixes, strict=True):
        np.testing.assert_array_equal(run.output(fix), state.raw)
        found = run.advance(fix)
        np.testing.assert_array_equal(found.x, state.x)
        assert found.extra_calls == state.extra_calls
    assert run.call == len(setting.steps)


def test_a_row_may_say_another_level():
    setting = setting_of(SCHEDULE, pictures=2, shape=SHAPE, n_steps=5)
    fixes = [StepFix(abar=step.abar * 0.99, t_model=step.t + 1, x_mul=0.99) for step in setting.steps]
    noise = setting.noise()
    steps = fixed_steps(setting.schedule, setting.config, fixes)
    *_, last = denoise(rough, noise.initial(), steps, noise=noise, fixes=fixes)
    run = FreeRun(setting, rough)
    for fix in fixes:
        run.advance(fix)
    np.testing.assert_array_equal(run.x, last.x)


def test_the_network_is_asked_once_per_input():
    asked = []

    def counted(x, t):
        asked.append(t)
        return rough(x, t)

    run = FreeRun(setting_of(SCHEDULE, pictures=2, shape=SHAPE, n_steps=4), counted)
    for _ in range(4):
        run.output()
        run.advance()
    assert len(asked) == 4
    assert len(run.fixes) == 4


def test_pairs_are_both_networks_at_the_float_samplers_states(tmp_path):
    setting = setting_of(SCHEDULE, pictures=5, shape=SHAPE, name="plms", n_steps=6)
    study = recorded(exact, rough, setting, tmp_path)
    noise = setting.noise()
    states = list(denoise(exact, noise.initial(), setting.steps, noise=noise))
    assert study.pictures == 5
    for pair, state in zip(study.pairs(), states, strict=True):
        np.testing.assert_array_equal(pair.x, state.x_in)
        np.testing.assert_array_equal(pair.e, state.raw)
        np.testing.assert_array_equal(pair.q, rough(state.x_in, pair.step.t))
        np.testing.assert_array_equal(pair.error, pair.q - pair.e)
        np.testing.assert_array_equal(study.exact(pair.call), state.x_in)
    np.testing.assert_array_equal(study.exact(len(states)), states[-1].x)


def test_an_interrupted_recording_goes_on(tmp_path):
    setting = setting_of(SCHEDULE, pictures=2, shape=SHAPE, n_steps=6)
    whole = recorded(exact, rough, setting, tmp_path / "whole")
    left = itertools.count()

    def failing(x, t):
        if next(left) == 3:
            raise KeyboardInterrupt
        return rough(x, t)

    with pytest.raises(KeyboardInterrupt):
        recorded(exact, failing, setting, tmp_path / "cut")
    (tmp_path / "cut/quantized/call-0001.npz").write_bytes(b"cut off")
    asked = []

    def counted(x, t):
        asked.append(t)
        return rough(x, t)

    resumed = recorded(exact, counted, setting, tmp_path / "cut")
    assert asked == [step.t for step in (setting.steps[1], *setting.steps[3:])]
    for one, other in zip(whole.pairs(), resumed.pairs(), strict=True):
        np.testing.assert_array_equal(one.q, other.q)


def test_a_network_that_breaks_is_named(tmp_path):
    setting = setting_of(SCHEDULE, pictures=1, shape=SHAPE, n_steps=3)
    with pytest.raises(CalibrationError, match=r"the quantized network returned NaN or infinity at t = 667"):
        recorded(exact, lambda x, t: np.nan * x, setting, tmp_path)


def test_runs_start_from_the_same_noise():
    setting = setting_of(SCHEDULE, pictures=2, shape=SHAPE, name="euler-a", n_steps=4)
    study = unrecorded(exact, exact, setting)
    one, other = study.run(), study.exact_run()
    for _ in range(4):
        np.testing.assert_array_equal(one.advance().x, other.advance().x)

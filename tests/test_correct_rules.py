"""What may stand together in a correction table."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.correct.record import StepFix
from qncd_deploy.correct.rules import active, check, only, without_variance
from qncd_deploy.errors import ScheduleError
from qncd_deploy.sample import PictureNoise, denoise
from qncd_deploy.schedule import Schedule
from qncd_deploy.steps import SamplerConfig, make_steps

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)


def steps_of(eta=0.0):
    return make_steps(SCHEDULE, SamplerConfig("ddim", 3, eta))


def rows(**values):
    return (StepFix(), StepFix(**values), StepFix())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"a": 1.1}, {"output": {"a"}}),
        ({"b": np.zeros(3)}, {}),
        ({"b": np.array([0, 0.1, 0]), "thr": 1.0}, {"output": {"b"}}),
        ({"f": np.ones((1, 2, 3, 3))}, {"output": {"f"}}),
        ({"x_add": 0.1}, {"input": {"x_add"}}),
        ({"x_sub": np.ones(2), "abar": 0.5, "x_mul": 0.99}, {"input": {"x_sub"}, "variance": {"abar"}}),
        ({"a": 1.1, "z_std": 0.1}, {"output": {"a"}, "variance": {"z_std"}}),
        ({"refresh": True, "m_ref": np.ones(2)}, {"runtime": {"refresh"}}),
        ({"coef": "s_eff", "mask": "one-sided", "m_gain": 0.5}, {}),
    ],
)
def test_what_a_table_fills(values, expected):
    assert active(rows(**values), steps_of()) == expected


def test_a_variance_counts_only_where_the_sampler_draws_noise():
    assert active(rows(var=0.1), steps_of()) == {}
    assert active(rows(var=0.1), steps_of(eta=1.0)) == {"variance": {"var"}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"x_add": 0.1, "x_sub": 0.1}, "x_add and x_sub both remove the mean of the accumulated error"),
        ({"gain": 1.1, "abar_next": 0.5, "x_mul": 0.9}, "abar_next and gain both remove the variance"),
        ({"var": 0.1, "z_std": 0.1}, "var and z_std both"),
        ({"b": 0.1, "refresh": True}, "both remove the mean error"),
    ],
)
def test_what_would_correct_twice_is_refused(values, words):
    with pytest.raises(ScheduleError, match=words):
        check(rows(**values), steps_of(eta=1.0))


def test_one_of_each_part_composes():
    check(rows(a=1.1, b=0.2, var=0.1, x_add=0.3), steps_of(eta=1.0))
    check(rows(var=0.1, gain=1.1), steps_of())
    check(rows(refresh=True, x_add=0.3), steps_of())


def test_taking_out():
    bare = without_variance(rows(a=1.1, var=0.2, x_mul=0.9))
    assert [(r.a, r.var, r.x_mul) for r in bare] == [(1, 0, 1), (1.1, 0, 1), (1, 0, 1)]
    kept = only((StepFix(a=2.0), StepFix(a=3.0), StepFix(a=4.0)), range(1, 2))
    assert [r.a for r in kept] == [1, 3, 1]


def test_cutting_ends_a_measured_mean():
    """After the cut nothing is subtracted any more, though the mean that was measured lives on in the loop."""
    steps = make_steps(SCHEDULE, SamplerConfig("ddim", 8))
    fixes = [StepFix(refresh=call == 2, m_gain=0.1) for call in range(8)]

    def network(x, t):
        return np.tanh(x) + np.float32(0.3)

    noise = PictureNoise(0, range(2), (2, 4, 4))
    states = denoise(network, noise.initial(), steps, noise=noise, fixes=only(fixes, range(4)))
    gaps = [np.abs(state.eps - state.raw).max() for state in states]
    assert gaps[2] > 0 and gaps[3] > 0
    assert gaps[4:] == [0, 0, 0, 0]

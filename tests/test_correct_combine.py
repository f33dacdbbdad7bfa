"""Which corrections may stand together."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.correct.combine import PARTS, combine, only, parts, without
from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import ScheduleError
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
        ({}, set()),
        ({"a": 1.1}, {"output"}),
        ({"b": np.zeros(3)}, set()),
        ({"b": np.array([0, 0.1, 0])}, {"output"}),
        ({"f": np.ones((1, 2, 3, 3))}, {"output"}),
        ({"x_add": 0.1}, {"input"}),
        ({"x_sub": np.ones(2), "abar": 0.5, "x_mul": 0.99}, {"input", "variance"}),
        ({"a": 1.1, "z_std": 0.1}, {"output", "variance"}),
        ({"refresh": True, "m_ref": np.ones(2)}, {"runtime"}),
        ({"coef": "s_eff", "mask": "one-sided", "m_gain": 0.5}, set()),
    ],
)
def test_parts(values, expected):
    assert parts(rows(**values), steps_of()) == expected


def test_a_variance_counts_only_where_the_sampler_draws_noise():
    assert parts(rows(var=0.1), steps_of()) == set()
    assert parts(rows(var=0.1), steps_of(eta=1.0)) == {"variance"}


def test_every_field_belongs_to_one_part():
    named = [name for names in PARTS.values() for name in names]
    assert sorted(named) == sorted(StepFix.__dataclass_fields__)


def test_combining_takes_both():
    together = combine(rows(a=1.1, b=0.2), rows(x_add=0.3), steps_of())
    assert [(r.a, r.b, r.x_add) for r in together] == [(1, 0, 0), (1.1, 0.2, 0.3), (1, 0, 0)]


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({"a": 1.1}, {"f": np.ones((1, 2, 3, 3))}, "output"),
        ({"x_add": 0.1}, {"x_sub": 0.1}, "input"),
        ({"gain": 1.1}, {"abar_next": 0.5, "x_mul": 0.9}, "variance"),
        ({"b": 0.1}, {"refresh": True}, "output and runtime"),
        ({"refresh": True}, {"b": 0.1}, "output and runtime"),
    ],
)
def test_what_would_correct_twice_is_refused(one, other, words):
    with pytest.raises(ScheduleError, match=rf"both change the {words} part"):
        combine(rows(**one), rows(**other), steps_of())


def test_taking_out():
    bare = without(rows(a=1.1, var=0.2, x_mul=0.9), "variance")
    assert [(r.a, r.var, r.x_mul) for r in bare] == [(1, 0, 1), (1.1, 0, 1), (1, 0, 1)]
    kept = only((StepFix(a=2.0), StepFix(a=3.0), StepFix(a=4.0)), range(1, 2))
    assert [r.a for r in kept] == [1, 3, 1]

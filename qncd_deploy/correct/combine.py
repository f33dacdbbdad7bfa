"""Which parts of a row a correction fills, and which corrections may stand together in one.

output     a, b, thr, f                        a map of the network's output: one
variance   var, gain, z_std, abar, x_mul ...   what spends the variance that such a map leaves over: once
input      x_add, x_sub                        removes the mean of what has added up: once
runtime    refresh                             QNCD's measured mean of the output: not beside a map, which has b
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import ScheduleError
from qncd_deploy.steps import Step

PARTS = {
    "output": ("a", "b", "thr", "mask", "f"),
    "variance": ("var", "coef", "gain", "z_std", "t_model", "abar", "abar_next", "x_mul"),
    "input": ("x_add", "x_sub"),
    "runtime": ("refresh", "m_ref", "m_pool", "m_gain"),
}

_DEFAULTS = StepFix()


def parts(fixes: Sequence[StepFix], steps: Sequence[Step]) -> frozenset[str]:
    """The parts that these rows change anything by; var does nothing where the sampler draws no noise."""
    found = set()
    for fix, step in zip(fixes, steps, strict=True):
        for part, names in PARTS.items():
            idle = {"coef", "mask", "m_ref", "m_pool", "m_gain"} | (set() if step.std else {"var"})
            if any(name not in idle and _differs(fix, name) for name in names):
                found.add(part)
    return frozenset(found)


def combine(first: Sequence[StepFix], second: Sequence[StepFix], steps: Sequence[Step]) -> tuple[StepFix, ...]:
    """Rows with the parts of both. Raises ScheduleError if they have one in common, or a map and a measured mean."""
    one, other = parts(first, steps), parts(second, steps)
    clash = sorted(one & other) or (["output", "runtime"] if {"output", "runtime"} <= one | other else [])
    if clash:
        raise ScheduleError(f"corrections cannot be combined: both change the {' and '.join(clash)} part of a row.")
    names = [name for part in other for name in PARTS[part]]
    return tuple(
        replace(fix, **{name: getattr(added, name) for name in names}) for fix, added in zip(first, second, strict=True)
    )


def without(fixes: Sequence[StepFix], part: str) -> tuple[StepFix, ...]:
    """The rows with one part taken out."""
    plain: dict[str, Any] = {name: getattr(_DEFAULTS, name) for name in PARTS[part]}
    return tuple(replace(fix, **plain) for fix in fixes)


def only(fixes: Sequence[StepFix], calls: Container[int]) -> tuple[StepFix, ...]:
    """The rows of some calls, nothing at the others."""
    return tuple(fix if call in calls else _DEFAULTS for call, fix in enumerate(fixes))


def _differs(fix: StepFix, name: str) -> bool:
    value, plain = getattr(fix, name), getattr(_DEFAULTS, name)
    return bool(np.any(value != plain)) if isinstance(value, np.ndarray) else value != plain

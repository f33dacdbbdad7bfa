"""What a correction table fills in its rows, and what may not stand together there because it would correct twice.

    output     a, b, thr, f           a map of the network's output
    variance   var, gain, z_std ...   what spends the variance that such a map leaves over: once
    input      x_add, x_sub           takes out the mean of what has added up: once
    runtime    refresh                QNCD's measured mean of the output: not beside a map, whose b removes that mean

Which corrections add up and which do not follows from the formula of record.py: two that model the same error both
remove it. A map and one member of each of the others compose.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import numpy as np

from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import ScheduleError
from qncd_deploy.steps import Step

PARTS: Mapping[str, tuple[str, ...]] = {
    "output": ("a", "b", "f"),
    "variance": ("var", "gain", "z_std", "abar", "abar_next"),
    "input": ("x_add", "x_sub"),
    "runtime": ("refresh",),
}
"""The fields that make up a part; the others only say how."""

_HOW = ("coef", "t_model", "x_mul")
_DEFAULTS = StepFix()
_NOTHING = StepFix(m_gain=0.0)


def active(fixes: Sequence[StepFix], steps: Sequence[Step]) -> dict[str, frozenset[str]]:
    """The fields that change anything, by part; var does nothing where the sampler draws no noise."""
    found = {
        part: frozenset(
            name
            for name in names
            for fix, step in zip(fixes, steps, strict=True)
            if _differs(fix, name) and (name != "var" or step.std)
        )
        for part, names in PARTS.items()
    }
    return {part: names for part, names in found.items() if names}


def check(fixes: Sequence[StepFix], steps: Sequence[Step]) -> None:
    """Raises ScheduleError for a table that removes the same error twice."""
    found = active(fixes, steps)
    for part in ("variance", "input"):
        if len(names := found.get(part, ())) > 1:
            raise ScheduleError(
                f"correction table: {' and '.join(sorted(names))} both remove the {_ERROR[part]}. Use one."
            )
    if {"output", "runtime"} <= found.keys():
        raise ScheduleError(
            "correction table: a map of the output and QNCD's measured mean both remove the mean error. Use one."
        )


_ERROR = {"variance": "variance of the output's error", "input": "mean of the accumulated error"}


def without_variance(fixes: Sequence[StepFix]) -> tuple[StepFix, ...]:
    """The rows with that part taken out."""
    plain = {name: getattr(_DEFAULTS, name) for name in PARTS["variance"] + _HOW}
    return tuple(replace(fix, **plain) for fix in fixes)


def only(fixes: Sequence[StepFix], calls: Container[int]) -> tuple[StepFix, ...]:
    """The rows of some calls, nothing at the others: no share of a mean that an earlier row measured either."""
    return tuple(fix if call in calls else _NOTHING for call, fix in enumerate(fixes))


def _differs(fix: StepFix, name: str) -> bool:
    value, plain = getattr(fix, name), getattr(_DEFAULTS, name)
    return bool(np.any(value != plain)) if isinstance(value, np.ndarray) else value != plain

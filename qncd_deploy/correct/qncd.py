"""QNCD's runtime estimate of the quantization noise in the sampler ("inter noise", Chu et al., arXiv:2403.19140).

Every `interval` steps the updated state is noised back with a known e1, x_re = sqrt(abar / abar') x' +
sqrt(1 - abar / abar') e1, and run through the network once more. What it returns beside e1 is taken for its error:

    m = pool(eps_q(x_re, t) - e1) - m_ref,        eps = eps_q - m_gain m   until the next refresh.

            `qncd:paper`, the released code     `qncd`, repaired
    e1      as drawn: its mean enters m         exactly zero-mean in each picture and channel
    pool    one number for the whole batch      one for each picture and channel, so pictures do not mix
    m_ref   0                                   the float model's mean of the same probe, per channel
    m_gain  1                                   per row, the share of m that is an error of this row

The repair of m_ref is needed because e1 is the noise of one step while the network was trained to return all of it, so
that pool(eps - e1) is not zero for the float model either. The released code has the estimator in its PLMS sampler
only, and computes a variance that it then sets to zero; both hold here for `qncd:paper`'s arithmetic, on any sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qncd_deploy.correct.fitting import Run, Study
from qncd_deploy.correct.moments import require_finite, require_pictures
from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import CalibrationError
from qncd_deploy.steps import Step, eps_from_output

INTERVAL = 10


def refresh_calls(steps: Sequence[Step], *, interval: int = INTERVAL) -> tuple[int, ...]:
    """Calls at which m is measured: step l (1-based, PLMS' doubled first step counted once) with
    (l - 2) mod interval == interval // 2, as in the released code: steps 7, 17, ... for 10.

    Fewer than 7 steps have none. Raises CalibrationError for an interval below 1.
    """
    if interval < 1:
        raise CalibrationError(f"qncd: refresh interval {interval}, expected 1 or more.")
    calls, number = [], 0
    for call, step in enumerate(steps):
        number += step.base == "current"
        # an update that removes no noise cannot be noised back: the second call of PLMS' first step, a last step
        # that stays at abar_0
        probes = step.base == "current" and step.abar_next > step.abar
        if probes and (number - 2) % interval == interval // 2:
            calls.append(call)
    return tuple(calls)


def fit_paper(steps: Sequence[Step], *, interval: int = INTERVAL) -> tuple[StepFix, ...]:
    """The released estimator: nothing to fit."""
    calls = refresh_calls(steps, interval=interval)
    return tuple(StepFix(refresh=call in calls, m_pool="batch") for call in range(len(steps)))


def fit(study: Study, *, interval: int = INTERVAL, shrink: bool = True) -> tuple[StepFix, ...]:
    """The repaired estimator, fitted by running both networks through the sampling loop.

    m_ref is the mean of the float network's own probes. With `shrink`, m_gain of each row is the g in [0, 1] with the
    least E|eps_q - g m - eps|^2 over the quantized sampler's own states: m is noisy and grows stale between refreshes,
    and only the part of it that is error of this row should be subtracted. Without, m_gain is 1.
    Cost, for n rows and r refreshes: n + r calls of the float network, and with shrink up to n more, and n + r of the
    quantized one.
    Raises CalibrationError: too few pictures, or an estimate that is not finite.
    """
    require_pictures(study, method="qncd", per="channel")
    steps = study.steps
    calls = refresh_calls(steps, interval=interval)
    if not calls:
        return tuple(StepFix() for _ in steps)
    measuring = tuple(StepFix(refresh=call in calls, m_gain=0.0) for call in range(len(steps)))
    reference = _probe_means(study.exact_run(), measuring)
    fixes = tuple(replace(fix, m_ref=reference[call]) if fix.refresh else fix for call, fix in enumerate(measuring))
    gains = _gains(study, fixes) if shrink else [1.0] * len(steps)
    return tuple(replace(fix, m_gain=gain) for fix, gain in zip(fixes, gains, strict=True))


def _probe_means(run: Run, fixes: Sequence[StepFix]) -> dict[int, np.ndarray]:
    """Mean over pictures of what the probe measures at each refresh, (C,) float64 by call."""
    means = {}
    for call, fix in enumerate(fixes):
        state = run.advance(fix)
        if fix.refresh:
            means[call] = np.asarray(state.m).mean(axis=(0, 2, 3), dtype=np.float64)
            require_finite(means[call], method="qncd", what=f"what the float network says of its probe at call {call}")
    return means


def _gains(study: Study, fixes: Sequence[StepFix]) -> list[float]:
    """g = <m, D> / <m, m> clipped to [0, 1], D the error of eps averaged over each picture and channel (only this part
    of it can be met by m); 1 before the first probe."""
    gains, run = [], study.run()
    for fix in fixes:
        state = run.advance(fix)
        if state.m is None:
            gains.append(1.0)
            continue
        abar = state.step.abar_call
        raw = study.exact_network(state.x_in, state.step.t)
        exact = eps_from_output(raw, state.x_in, abar, study.prediction)
        error = eps_from_output(state.raw, state.x_in, abar, study.prediction) - exact
        along = np.sum(state.m * error.mean(axis=(2, 3), keepdims=True), dtype=np.float64)
        squared = np.sum(np.square(state.m), dtype=np.float64)
        require_finite(np.array([along, squared]), method="qncd", what=f"an output at call {state.call}")
        gains.append(float(np.clip(along / squared, 0.0, 1.0)) if squared else 1.0)
    return gains

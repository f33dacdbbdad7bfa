"""StepbaQ: accumulated error taken for diffusion, so the sampler steps back in time (Chen et al., NeurIPS 2024).

    after each update, against the float sampler:  Delta = x_q - x_float,  mu = mean per channel, v = Var(Delta - mu)
    tau: the training timestep with abar_tau nearest to abar / (1 + v);  if tau is later than the next call's t:
    x <- sqrt(abar_tau / abar) (x - mu),  the next call sees tau, its update starts from abar_tau, and the float
    sampler goes on from the corrected state;  else nothing, and Delta goes on adding up

since sqrt(abar_tau / abar) scales signal sqrt(abar) and noise 1 - abar + v to what the schedule has at tau. From the
paper: all of it, on DDIM and Euler-ancestral, with the two samplers in step. The noise that a stochastic sampler adds
is the same for both and cancels in Delta. Ours: v is pooled over channels. In PLMS' doubled first step, whose update
starts from the state before it, nothing is measured; multistep histories stay as the two samplers made them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from qncd_deploy.correct.fitting import Study
from qncd_deploy.correct.moments import require_finite, require_pictures
from qncd_deploy.correct.record import StepFix, fixed_steps
from qncd_deploy.schedule import Schedule
from qncd_deploy.steps import Memory, Step, advance


def fit(study: Study) -> tuple[StepFix, ...]:
    """tau, one of the schedule's training timesteps, and mu of every call, fitted in order on the free run.

    Costs one call of each network per row.
    Raises CalibrationError: too few pictures, or a state that is not finite.
    """
    require_pictures(study, method="stepbaq", per="channel")
    run, steps = study.run(), study.steps
    rows = [StepFix() for _ in steps]
    ahead = np.zeros_like(run.x)  # of the float sampler's state before the quantized one's
    memory, exact_memory = Memory(), Memory()
    for call in range(len(steps) - 1):
        row = rows[call]
        step = replace(fixed_steps(study.schedule, study.config, rows)[call], std=0.0)
        x, exact_x = run.x, run.x + ahead
        exact_output = study.exact_network(exact_x, step.t if row.t_model is None else row.t_model)
        reached, _ = advance(x, run.output(row), step, memory, prediction=study.prediction)
        exact, exact_memory = advance(exact_x, exact_output, step, exact_memory, prediction=study.prediction)
        delta = reached - exact
        require_finite(delta, method="stepbaq", what=f"the state after call {call}")
        mu = delta.mean(axis=(0, 2, 3), dtype=np.float64)
        tau = _tau(np.mean(np.square(delta - mu.reshape(-1, 1, 1))), steps[call + 1], study.schedule)
        if tau is not None and len(steps[call + 1].x0_weights) == 2 and study.schedule.alphas_cumprod[tau] <= step.abar:
            tau = None  # a second-order step must start less noisy than the one before it
        if tau is not None:
            abar = float(study.schedule.alphas_cumprod[tau])
            rows[call] = replace(row, x_sub=mu, x_mul=math.sqrt(abar / steps[call + 1].abar))
            rows[call + 1] = StepFix(t_model=float(tau), abar=abar)
        memory = run.advance(rows[call]).memory
        ahead = -delta if tau is None else np.zeros_like(delta)
    return tuple(rows)


def _tau(variance: float, following: Step, schedule: Schedule) -> int | None:
    """The timestep of a state with this much noise more than the next call expects; None where it is no later."""
    if following.base == "saved":
        return None
    levels = schedule.alphas_cumprod[schedule.alphas_cumprod > 0]
    tau = int(np.argmin(np.abs(levels - following.abar / (1 + variance))))
    return tau if tau > following.t else None

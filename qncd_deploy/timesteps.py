"""Which of the T timesteps that a network was trained on a sampler visits, as diffusers or the papers' scripts have it.

    leading    k (T // n) + steps_offset
    trailing   T - k T / n - 1
    linspace   k (T - 1) / (n - 1), rounded
    quad       squares of equal steps from 0 to sqrt(0.8 T), rounded down, each once

Sources: Lin et al., arXiv:2305.08891, Table 2; Song et al., arXiv:2010.02502, appendix D.2, with ermongroup/ddim.
"""

from __future__ import annotations

import math

import numpy as np

from qncd_deploy.errors import ScheduleError
from qncd_deploy.schedule import Schedule


def timesteps_of(schedule: Schedule, scheduler: str, n: int) -> np.ndarray:
    """The n timesteps of a sampler, (n,) float64, falling; whole numbers but for Euler's linspace.

    Raises ScheduleError if the network was not trained on them.
    """
    total = schedule.alphas_cumprod.size
    if n > total:
        raise ScheduleError(f"n_steps {n}: the network was trained on {total} timesteps. Ask for {total} or fewer.")
    if scheduler == "plms" and schedule.timestep_spacing == "quad":
        raise ScheduleError("plms mixes outputs of equally spaced timesteps, quad is not. Use another --scheduler.")
    points = n + 1 if scheduler == "dpmpp-2m" else n  # the solver's grid has one node more, its target
    if schedule.timestep_spacing == "trailing":
        times = np.round(total - np.arange(n) * (total / n)) - 1
    elif schedule.timestep_spacing == "linspace":
        times = np.linspace(0, total - 1, points)[::-1][:n]
        if scheduler not in ("euler", "euler-a"):
            times = np.round(times)
    elif schedule.timestep_spacing == "quad":
        times = _quadratic(total, points)[::-1][:n]
    else:
        times = (np.arange(points) * (total // points))[::-1][:n] + float(schedule.steps_offset)
    if times[0] >= total:
        raise ScheduleError(
            f"n_steps {n} with steps_offset {schedule.steps_offset} starts at timestep {times[0]:.0f}, the network was "
            f"trained on 0 .. {total - 1}. Ask for fewer steps."
        )
    return times


def _quadratic(total: int, count: int) -> np.ndarray:
    """`count` timesteps that rise with the square of their number up to 0.8 T, as ermongroup/ddim makes them for
    CIFAR-10; those that rounding down repeats, mostly t = 0, change nothing without noise and are not visited again:
    its 100 timesteps are 96.
    """
    if count > total * 4 // 5:
        raise ScheduleError(f"n_steps {count}: quad timesteps lie below {total * 4 // 5}. Ask for fewer steps.")
    points, times = count, np.array([])
    while times.size < count:
        times = np.unique((np.linspace(0, math.sqrt(0.8 * total), points) ** 2).astype(int))
        points += 1
    return times.astype(np.float64)

"""Quadratic timesteps against ermongroup/ddim's own grid and loop; test_steps has the others."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.errors import ScheduleError
from qncd_deploy.schedule import Schedule
from qncd_deploy.steps import SamplerConfig, advance, make_steps
from qncd_deploy.timesteps import timesteps_of

BETAS = np.linspace(1e-4, 0.02, 1000)
QUAD = Schedule.from_betas(BETAS, timestep_spacing="quad", steps_offset=0, final_abar=1.0)


def published(points: int) -> list[int]:
    """sample_image of ermongroup/ddim, skip_type "quad"."""
    return [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), points) ** 2]


@pytest.mark.parametrize(("points", "calls"), [(10, 10), (20, 20), (50, 49), (100, 96), (200, 187)])
def test_the_published_grid_each_timestep_once(points: int, calls: int) -> None:
    times = timesteps_of(QUAD, "ddim", calls)
    assert times.tolist() == sorted(set(published(points)), reverse=True)


def test_every_count_is_met() -> None:
    for count in (*range(1, 130), 300, 500, 800):
        assert len(timesteps_of(QUAD, "ddim", count)) == count
    with pytest.raises(ScheduleError, match="n_steps 801: quad timesteps lie below 800"):
        timesteps_of(QUAD, "ddim", 801)
    with pytest.raises(ScheduleError, match="plms mixes outputs of equally spaced timesteps"):
        make_steps(QUAD, SamplerConfig("plms", 20))


def test_the_published_loop_gains_nothing_by_its_repeated_timesteps() -> None:
    """generalized_steps of ermongroup/ddim over all 100 timesteps ends where our 96 calls do."""

    def eps(x: np.ndarray, t: float) -> np.ndarray:
        return np.tanh(x + t / 1000)

    abar = np.append(np.cumprod(1 - BETAS), 1.0)  # entry -1: the last target
    x = start = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    seq = published(100)
    for i, j in zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True):
        e = eps(x, i)
        x0 = (x - e * np.sqrt(1 - abar[i])) / np.sqrt(abar[i])
        x = np.sqrt(abar[j]) * x0 + np.sqrt(1 - abar[j]) * e
    ours = start
    steps = make_steps(QUAD, SamplerConfig("ddim", 96))
    for step in steps:
        ours, _ = advance(ours, eps(ours, step.t), step)
    np.testing.assert_allclose(ours, x, rtol=1e-12, atol=1e-12)  # float64 over a hundred steps

"""Networks whose quantization error is a linear model with known numbers, for fits from paired outputs.

q = (1 + k) e + mu + noise n, e a Gaussian field drawn anew for every timestep, whatever the state: its variance is 1
and its means are MEANS at every call, so what a fit should find is known at every call as well.
"""

from __future__ import annotations

import math

import numpy as np
from studies import recorded, setting_of

from qncd_deploy.schedule import Schedule

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
SHAPE = (3, 12, 12)
PICTURES = 64
MEANS = np.array([0.2, -0.1, 0.05])
COUNT = PICTURES * SHAPE[1] * SHAPE[2]
"""Numbers of one channel."""


def channels(values) -> np.ndarray:
    """(C,) -> (C, 1, 1) float32; a number stays one."""
    values = np.asarray(values, dtype=np.float32)
    return values.reshape(-1, 1, 1) if values.ndim else values


def field(x, t):
    """The float network."""
    noise = np.random.default_rng(int(t)).standard_normal(x.shape, dtype=np.float32)
    return noise + channels(MEANS)


def rough(*, k=0.0, mu=0.0, noise=0.0, exact=field, draw=None):
    """A quantized network: k, mu numbers or (C,); noise: of N(0, 1), or of draw(rng, shape), which has variance 1."""

    def predict(x, t):
        rng = np.random.default_rng(10_000 + int(t))
        n = rng.standard_normal(x.shape) if draw is None else draw(rng, x.shape)
        return (exact(x, t) * (1 + channels(k)) + channels(mu) + np.float32(noise) * n).astype(np.float32)

    return predict


def uniform(rng, shape):
    """Variance 1 and no outliers."""
    return rng.uniform(-math.sqrt(3), math.sqrt(3), shape)


def study_of(folder, network, *, exact=field, schedule=SCHEDULE, pictures=PICTURES, shape=SHAPE, n_steps=3, **options):
    setting = setting_of(schedule, pictures=pictures, shape=shape, n_steps=n_steps, **options)
    return recorded(exact, network, setting, folder)


def by_channel(values) -> np.ndarray:
    """(N, C, H, W) -> (C, N H W) float64."""
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)

"""Run quantized forms of a network through the whole sampling loop beside the float one, before there is a bundle.

What a rounding error does to a picture is decided by how it adds up over the steps, which no error of single calls
tells: an error that repeats itself is worse than a larger one that does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.engines.eps_model import EngineModel
from qncd_deploy.evaluate.metrics import row_power
from qncd_deploy.pipeline.calibrate import PICTURES, rows_per_run
from qncd_deploy.pipeline.network import FloatNetwork, condition_rows
from qncd_deploy.pipeline.output_error import Form
from qncd_deploy.sample import guided, rollout
from qncd_deploy.specs import EpsModel
from qncd_deploy.steps import initial_scale, make_steps

FIRST_PICTURE = 3 << 28
"""Pictures from here on: shared with no other use of a seed."""


def latent_snr_db(
    network: FloatNetwork, exact: Form, quantized: Iterable[Form], *, pictures: int, seed: int
) -> list[np.ndarray]:
    """For every quantized form: 10 log10 sum x^2 / sum (x_q - x)^2 of each picture's final latents, (pictures,), same
    noise and labels for all.
    """
    latents = []
    for form in chain([exact], quantized):
        with form() as engine:
            latents.append(_latents(network, engine, pictures, seed))
    signal, *others = latents
    return [picture_snr_db(signal, found) for found in others]


def picture_snr_db(exact: np.ndarray, found: np.ndarray) -> np.ndarray:
    """10 log10 sum x^2 / sum (x_q - x)^2 of each row, finite for equal ones too, (rows,)."""
    return 10 * np.log10(row_power(exact) / np.maximum(row_power(found - exact), np.finfo(np.float64).tiny))


def model_for(network: FloatNetwork, engine: BaseEngine, indices: Sequence[int], *, batch: int) -> EpsModel:
    """The network as the sampling loop calls it for these pictures, an engine of it taking `batch` at a time."""
    rows = batch if network.facts.guidance_scale == 1 else 2 * batch
    return guided(EngineModel.of(engine, rows=rows), *condition_rows(network, indices), network.facts.guidance_scale)


def batch_size(network: FloatNetwork, pictures: int) -> int:
    """Pictures at a time, before there is a bundle."""
    return min(pictures, rows_per_run(network.facts.latent_shape, most=PICTURES))


def _latents(network: FloatNetwork, engine: BaseEngine, pictures: int, seed: int) -> np.ndarray:
    assert network.schedule is not None
    size = batch_size(network, pictures)
    run = rollout(
        make_steps(network.schedule, network.sampler),
        seed=seed,
        shape=network.facts.latent_shape,
        prediction=network.schedule.prediction,
        scale=initial_scale(network.schedule, network.sampler),
    )
    parts = []
    for start in range(FIRST_PICTURE, FIRST_PICTURE + pictures, size):
        indices = range(start, min(start + size, FIRST_PICTURE + pictures))
        *_, last = run(lambda indices: model_for(network, engine, indices, batch=size), indices)
        parts.append(last.x)
    return np.concatenate(parts)

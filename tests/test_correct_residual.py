"""What errors of the outputs bring into the state, against the samplers themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fit_study import SCHEDULE
from studies import with_prediction

from qncd_deploy.correct.residual import sigma_of, update_variances
from qncd_deploy.schedule import SCHEDULERS
from qncd_deploy.steps import Memory, SamplerConfig, advance, eps_from_output, make_steps


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_output_moves_the_state_by_its_weight(name, prediction):
    """Outputs are nudged one at a time with the states that the network saw held fixed; the update's own response,
    squared and weighed by the variances, is what must come out."""
    schedule = with_prediction(SCHEDULE, prediction)
    steps = make_steps(schedule, SamplerConfig(name, 7))
    rng = np.random.default_rng(0)
    states, outputs = rng.normal(size=(2, len(steps)))
    var = rng.uniform(0.5, 2, len(steps))

    def updates(outputs):
        memory, reached = Memory(), []
        for step, x, out in zip(steps, states, outputs, strict=True):
            quiet = replace(step, std=0.0, clip=None)
            x_next, memory = advance(np.array([x]), np.array([out]), quiet, memory, prediction=prediction)
            reached.append(x_next.item())
        return np.array(reached)

    expected = np.zeros(len(steps))
    for call, step in enumerate(steps):
        nudged = outputs.copy()
        nudged[call] += 1
        before, after = (eps_from_output(o[call], states[call], step.abar_call, prediction) for o in (outputs, nudged))
        expected += ((updates(nudged) - updates(outputs)) / (after - before)) ** 2 * var[call]
    np.testing.assert_allclose(update_variances(steps, var, prediction=prediction), expected, rtol=1e-9)


def test_a_state_without_signal():
    step = replace(make_steps(SCHEDULE, SamplerConfig("ddim", 2))[0], abar=0.0)
    assert update_variances([step], [1.0], prediction="v_prediction") == [0.0]


def test_sigma():
    assert sigma_of(0.2) == 2 and sigma_of(1.0) == 0

"""What is left of an error in eps after a correction, as one update of a deterministic sampler sees it.

    Var(x') = (B / mix_0)^2 sum_j mix_j^2 var_j  +  (x0_weights_1 sigma_1)^2 var_1

B: Step.eps_gain;  j: the outputs that the update mixes, this call's first (PLMS);  1: the call whose x_0 it goes on
from (DPM-Solver++ 2M), sigma = b / a there. Errors of different calls are taken for independent, as Q-Drift does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qncd_deploy.schedule import Prediction
from qncd_deploy.steps import Step, output_per_eps


def sigma_of(abar: float) -> float:
    """Noise over signal, b / a."""
    return math.sqrt(1 / abar - 1)


def update_variances(steps: Sequence[Step], var: Sequence[float], *, prediction: Prediction) -> list[float]:
    """For each call, the variance that errors of variance var[call] in eps bring into the state of its update.

    0 for an update from a state without signal, of which eps says nothing.
    """
    variances: list[float] = []
    remembered: list[int] = []
    for call, step in enumerate(steps):
        here = output_per_eps(step.abar, prediction)
        if here == 0:
            variances.append(0.0)
        else:
            total = 0.0
            for weight, past in zip(step.mix, [call, *reversed(remembered)], strict=False):
                raw = output_per_eps(steps[past].abar_call, prediction) ** 2 * var[past]
                total += (step.eps_gain / step.mix[0] * weight / here) ** 2 * raw
            if len(step.x0_weights) == 2:
                total += (step.x0_weights[1] * sigma_of(steps[remembered[-1]].abar)) ** 2 * var[remembered[-1]]
            variances.append(total)
        if step.push:
            remembered.append(call)
    return variances

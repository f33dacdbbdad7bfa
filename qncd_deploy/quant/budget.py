"""Leave in float the few layers whose 8-bit input costs most of the quality and little of the arithmetic.

To first order, rounding the input of layer l by d_l moves the network's output by J_l d_l. With one random v ~ N(0, I)
per row and g_l = J_l^T v, which one backward pass gives for all layers at once,

    E (g_l . d_l)^2 = |J_l d_l|^2,

the noise that this layer alone puts on the output: no layer has to be tried. The errors of different layers are taken
as independent. (Ours; the use of random probes for traces goes back to Hutchinson, 1990.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qncd_deploy.quant.grid import Grid, fake_quantize
from qncd_deploy.quant.plan import Choice

LEAST_SHARE = 0.03
"""A layer that makes less than this share of the error is not worth an exception."""

TOO_NOISY = 0.005
"""Of the output's power, 23 dB: with as much again from rounded weights and from what first order misses, 20 dB."""

LARGEST_BUDGET = 0.1
"""What may stay float of a network whose output would otherwise be too noisy."""


@dataclass(frozen=True)
class EdgeCost:
    """One quantized tensor and what hangs on it: names of the layers that read it, predicted noise on the network's
    output relative to the output's power, and multiplications per picture."""

    edge: str
    layers: tuple[str, ...]
    noise: float
    macs: int


def output_noise(x: np.ndarray, gradients: Sequence[np.ndarray], grid: Grid, signal: np.ndarray) -> float:
    """Mean over rows of (g . (Q(x) - x))^2 / signal, the predicted relative noise of quantizing one tensor.

    x (N, ...): the tensor; gradients: of the probed output with respect to it, one array like x for each layer that
    reads it quantized; signal (N,): power of the network's output, sum over its elements.
    """
    error = (fake_quantize(x, grid) - x).reshape(len(x), -1).astype(np.float64)
    total = sum(g.reshape(len(x), -1).astype(np.float64) for g in gradients)
    return float(np.mean(np.square((error * total).sum(axis=1)) / signal))


def keep_float(costs: Sequence[EdgeCost], *, budget: float, pinned: Collection[str] = ()) -> Mapping[str, Choice]:
    """Layers to leave in float, with the reason of each: the noisiest per multiplication while they fit in the budget.

    budget: share of all multiplications in `costs` that may stay float, 0 to 1; up to LARGEST_BUDGET of them while the
    other layers are predicted to make more than TOO_NOISY of the output's power. pinned: layers that may not, nor what
    reads a tensor with them.
    """
    noise, macs = sum(cost.noise for cost in costs), sum(cost.macs for cost in costs)
    left_noise, spent = noise, 0
    chosen: dict[str, str] = {}
    for cost in sorted(costs, key=lambda cost: cost.noise / max(cost.macs, 1), reverse=True):
        share = cost.noise / noise if noise else 0.0
        allowed = max(budget, LARGEST_BUDGET) if left_noise > TOO_NOISY else budget
        if any(name in pinned for name in cost.layers) or share < LEAST_SHARE or spent + cost.macs > allowed * macs:
            continue
        spent += cost.macs
        left_noise -= cost.noise
        part = f"{cost.macs / macs:.1%} of the arithmetic"
        reason = f"rounding its input would make {share:.0%} of the output error, for {part}"
        chosen |= dict.fromkeys(cost.layers, Choice(None, reason))
    return chosen

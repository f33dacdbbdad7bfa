"""How long and by which rule blocks are reconstructed: the published schedule, and a fast one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qncd_deploy.quant.rounding import Kind


@dataclass(frozen=True)
class Preset:
    """rounding: see quant.rounding. iterations, batch, rate: of the weights, with Adam; decay: the rate falls
    linearly to 0. steps_rate: Adam's for the step sizes of activations, relative to each step if steps_iterations
    is 0, when they are learned together with the weights; else, activations being float until then, afterwards for
    steps_iterations, the rate falling to 0 as a cosine, by the error's steps_power-th power. penalty: weight of
    what is left of soft rounding, after the first `warm_up` of the iterations, beta falling linearly from 20 to 2.
    patience: stop once the held-out error has not fallen for so many of CHECKS looks; 0 is never. most_macs:
    multiplications that learning one block may take, forward and backward; fewer iterations where they would be
    more.
    """

    name: str
    rounding: Kind
    iterations: int
    batch: int
    rate: float
    decay: bool
    steps_rate: float
    steps_iterations: int = 0
    steps_power: float = 2.0
    penalty: float = 0.0
    warm_up: float = 0.0
    patience: int = 0
    most_macs: float = float("inf")

    @property
    def passes(self) -> int:
        """Rows that go through every block forward, or their like: a backward pass costs about two forward ones."""
        return PASSES * self.batch * (self.iterations + self.steps_iterations)


PASSES = 3
"""Forward ones that learning on a row costs, the backward pass counting two."""

CHECKS = 10
"""How often a preset with patience looks at the held-out error."""

PAPER = Preset(
    "paper",
    "adaround",
    iterations=20_000,
    batch=32,
    rate=1e-3,
    decay=False,
    steps_rate=4e-4,
    steps_iterations=5_000,
    steps_power=2.4,
    penalty=0.01,
    warm_up=0.2,
)
"""Q-Diffusion's released schedule (Li et al., arXiv:2302.04304): AdaRound inside BRECQ's blocks, of weights alone,
then step sizes. Its scripts make two passes over the network, one for the weights of all blocks and one for all
steps; here a block learns both before the next one begins, so that the tensors it reads are rounded already.
"""

FAST = Preset(
    "fast",
    "offset",
    iterations=150,
    batch=32,
    rate=1e-2,
    decay=True,
    steps_rate=1e-2,
    patience=3,
    most_macs=4e12,
)
"""Ours. Hard rounding with offsets, together with the step sizes, from the ranges of least squares."""

PRESETS = {preset.name: preset for preset in (FAST, PAPER)}

"""What a fit function is handed: models by picture, and the ordinary sampling loop to run them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qncd_deploy.correct.record import StepFix
from qncd_deploy.specs import Array, EpsModel
from qncd_deploy.steps import Step

ModelFor = Callable[[Sequence[int]], EpsModel]
"""The network for a batch of pictures, named by index: labels and guidance are inside what it returns."""


@dataclass(frozen=True, slots=True)
class State:
    """One network call of the sampling loop and what came of it.

    call         index of the call, 0 first; rows of a correction table go by it
    step         the scalars in force, corrections included
    x_in         the network's input (N, C, H, W); raw: its output after guidance, untouched
    eps          the corrected output as eps, the one the sampler used
    x            the state after the update
    m            QNCD's running mean in eps, before m_gain: a float or (N, C, 1, 1); None before the first probe
    extra_calls  network calls so far beyond one per row
    """

    call: int
    step: Step
    x_in: Array
    raw: Array
    eps: Array
    x: Array
    m: Array | float | None
    extra_calls: int


class Rollout(Protocol):
    """The sampling loop for some pictures, from noise to latents, with noise that depends on the pictures alone."""

    def __call__(
        self, model_for: ModelFor, indices: Sequence[int], fixes: Sequence[StepFix] | None = None
    ) -> Iterator[State]: ...

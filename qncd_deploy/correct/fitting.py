"""What a fit function is handed: paired outputs of both networks, and runs that go on call by call.

teacher-forced pairs    q and e, the quantized and the float network's output at the same input x, which is the
                        float sampler's own state: what q - e is made of, call by call
free run                the quantized sampler on its own, the rows fitted so far active: what has added up
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qncd_deploy.correct.record import StepFix
from qncd_deploy.schedule import Prediction, Schedule
from qncd_deploy.specs import Array, EpsModel
from qncd_deploy.steps import Memory, SamplerConfig, Step


@dataclass(frozen=True, slots=True)
class State:
    """One network call of the sampling loop and what came of it.

    call         index of the call, 0 first; rows of a correction table go by it
    step         the scalars in force, corrections included
    x_in         the network's input (N, C, H, W); raw: its output after guidance, untouched
    eps          the corrected output as eps, the one the sampler used
    x            the state after the update, and what a multistep sampler remembers with it
    m            QNCD's running mean in eps, before m_gain: a float or (N, C, 1, 1); None before the first probe
    extra_calls  network calls so far beyond one per row
    """

    call: int
    step: Step
    x_in: Array
    raw: Array
    eps: Array
    x: Array
    memory: Memory
    m: Array | float | None
    extra_calls: int


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """One network call, teacher-forced: raw outputs after guidance, each (N, C, H, W) float32, N pictures.

    call, step  index of the call and the sampler's untouched row
    x           the networks' input: the float sampler's state before the call
    q, e        the quantized and the float network's output there
    """

    call: int
    step: Step
    x: np.ndarray
    q: np.ndarray
    e: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """D = q - e."""
        return self.q - self.e


class Run(Protocol):
    """A sampler on all pictures of a study, one call at a time; a row may be chosen knowing all before it."""

    @property
    def call(self) -> int:
        """Index of the next network call."""
        ...

    @property
    def step(self) -> Step:
        """The sampler's untouched row of that call."""
        ...

    @property
    def x(self) -> np.ndarray:
        """The state before that call, (N, C, H, W) float32."""
        ...

    def output(self, fix: StepFix = ...) -> np.ndarray:
        """The network's raw output at the input that this row asks for (x_add, t_model), (N, C, H, W). Changes
        nothing; advance with the same input runs the network no second time."""
        ...

    def advance(self, fix: StepFix = ...) -> State:
        """Make the call with this row and update the state. abar and abar_next of the row are honoured."""
        ...


class Study(Protocol):
    """Everything measured for one way to sample; fit functions read it and return one row per network call."""

    @property
    def schedule(self) -> Schedule:
        """What the steps are made from, with the config."""
        ...

    @property
    def config(self) -> SamplerConfig: ...

    @property
    def steps(self) -> Sequence[Step]:
        """The sampler's untouched rows."""
        ...

    @property
    def prediction(self) -> Prediction:
        """What the raw outputs stand for."""
        ...

    @property
    def pictures(self) -> int:
        """How many pictures."""
        ...

    @property
    def exact_network(self) -> EpsModel:
        """The float network for these pictures."""
        ...

    def pairs(self) -> Iterator[Pairs]:
        """The teacher-forced pairs of every call, in order; may be asked for again."""
        ...

    def exact(self, call: int) -> np.ndarray:
        """The float sampler's state before the call, (N, C, H, W); call len(steps) is its result."""
        ...

    def run(self) -> Run:
        """A fresh free run of the quantized sampler on the same pictures, from the same noise."""
        ...

    def exact_run(self) -> Run:
        """The same of the float sampler."""
        ...

"""The narrow contracts between stages: what a tensor is called, what a network looks like to the sampling loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

BATCH = "batch"
SIDES = ("height", "width")
"""Names of free dimensions: of every input's first, and of a latent's last two where pictures may have any size."""


def pixels(sides: tuple[int, int]) -> str:
    """(height, width) in words."""
    return "{} x {} pixels (height x width)".format(*sides)


Array = Any
"""A NumPy array or a device array with the same operators; the sampling loop never asks which."""

Conditions = Mapping[str, Array]
"""What the network is told beside state and timestep, by graph input name: (N, ...) each, a row for a row of the state
(class tokens or prompts in "encoder_hidden_states", numbers in "class_labels", ...)."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, NumPy dtype name and shape of one graph input or output; a string in the shape is a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        return cls(str(data["name"]), str(data["dtype"]), tuple(data["shape"]))


class Arrays(Protocol):
    """Where the arrays of a sampling loop live: it runs there, and only its result comes back."""

    def put(self, array: np.ndarray) -> Array:
        """Bring an array there. May return before it has arrived; it arrives before anything that is done with it."""
        ...

    def get(self, array: Array) -> np.ndarray:
        """Bring an array back, once everything it depends on is done."""
        ...

    def wait(self) -> None:
        """Until everything that was asked for is done."""
        ...

    def used_bytes(self) -> int | None:
        """Memory in use on the device they are on, by whomever; None for the host's, which processes tell apart."""
        ...


class HostArrays:
    """NumPy's arrays: they are there already."""

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, array: np.ndarray) -> np.ndarray:
        return array

    def wait(self) -> None: ...

    def used_bytes(self) -> None: ...


class EpsModel(Protocol):
    """The network as the sampling loop sees it: guidance, labels and engine are already inside.

    x is (N, C, H, W) float32; t is the timestep all N pictures share. Returns the raw network output
    (eps, v or x0 by the schedule's prediction type) after guidance, in the shape and dtype of x.
    """

    def __call__(self, x: Array, t: float) -> Array: ...


class NoiseSource(Protocol):
    """Seeded Gaussian noise for a batch: separate streams, so that a probe never shifts the sampler's own noise."""

    def step(self) -> Array:
        """z ~ N(0, I) of the sampler's next stochastic step, (N, C, H, W) float32."""
        ...

    def probe(self) -> Array:
        """e ~ N(0, I) for a runtime probe (QNCD's e1) or an injected residual, (N, C, H, W) float32."""
        ...


class Engine(Protocol):
    """Named arrays in, named arrays out. Whoever opens an engine closes it; its outputs belong to the caller.

    arrays: where it computes. Fed NumPy arrays alone, an engine returns them; fed any array of its own, it returns
    its own.  row_sizes: numbers of rows that it takes, rising; () for any.
    """

    arrays: Arrays

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def row_sizes(self) -> tuple[int, ...]: ...

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def close(self) -> None: ...

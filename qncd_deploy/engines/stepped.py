"""Several engines of one network behind a single one: which of them runs is decided by the timestep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qncd_deploy.engines.base import BaseEngine, Kernel
from qncd_deploy.engines.eps_model import input_roles
from qncd_deploy.errors import EngineError
from qncd_deploy.specs import Array, TensorSpec


class SteppedEngine(BaseEngine):
    """Runs, of engines with the same inputs, the first whose own lowest timestep is not above the one fed.

    Args: parts: the lowest timestep of each and the engine, from high to low; the last takes all that are left. They
        are closed with it.

    The timestep must be an array of the host, which is what EngineModel feeds; rows may have different ones.
    """

    def __init__(self, parts: Sequence[tuple[float, BaseEngine]]) -> None:
        first = parts[0][1]
        super().__init__(first.engine_id, first.path, {}, {})  # what there is in and out, an engine may learn later
        self.arrays = first.arrays
        self.parts = tuple(engine for _, engine in parts)
        self._floors = np.array([lowest for lowest, _ in parts[:-1]])

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self.parts[0].inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.parts[0].outputs

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """As specs.Engine's. Raises EngineError if the parts were compiled for different ones."""
        if len({part.row_sizes for part in self.parts}) > 1:
            sizes = ", ".join(f"{part.path.name}: {list(part.row_sizes)}" for part in self.parts)
            raise EngineError(
                f"{self.path.parent}: its networks are compiled for different numbers of rows ({sizes}). "
                "Run `qncd build` again, which builds all of them."
            )
        return self.parts[0].row_sizes

    @property
    def graphs(self) -> tuple[Path, ...]:
        return tuple(part.path for part in self.parts)

    def kernels(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Kernel, ...]:
        """Of all parts together."""
        found: Counter[tuple[str, str, str]] = Counter()
        for part in self.parts:
            for kernel in part.kernels(shapes):
                found[kernel.op, kernel.precision, kernel.implementation] += kernel.count
        return tuple(Kernel(*key, count=count) for key, count in sorted(found.items()))

    def compiled_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Of all parts together: each holds a copy of the weights of its own."""
        sizes = [size for part in self.parts if (size := part.compiled_bytes(shapes)) is not None]
        return sum(sizes) if len(sizes) == len(self.parts) else None

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        chosen = self._chosen(feeds)
        first, *others = np.unique(chosen).tolist()
        outputs = self.parts[first]._run(feeds)
        for other in others:  # never in the sampling loop, where all rows have one timestep
            found, rows = self.parts[other]._run(feeds), chosen == other
            for name, array in outputs.items():
                array[rows] = found[name][rows]
        return outputs

    def _chosen(self, feeds: Mapping[str, Array]) -> np.ndarray:
        """The index of the part for every row, or for all of them."""
        spec = input_roles(self.inputs).timestep
        assert spec is not None, f"{self.path}: without a timestep there is nothing to choose by"
        # a timestep fed as float32 must meet a floor that was rounded alike, or a call on the edge falls below it
        floors = self._floors.astype(spec.dtype) if spec.dtype.startswith("float") else self._floors
        return (np.reshape(feeds[spec.name], (-1, 1)) < floors).sum(axis=1)

    def _close(self) -> None:
        for part in self.parts:
            part.close()

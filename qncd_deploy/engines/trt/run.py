"""A TensorRT engine as the rest of the package sees engines: the graph's tensors in, the graph's tensors out.

Engines that were built before (`load_blob`) are used; without any, one is built for the shapes at hand, which takes
from seconds to many minutes. Fed NumPy arrays alone, a call returns them; fed a device array, it returns device arrays
and waits for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import get_args

from qncd_deploy.engines.base import Backend, BaseEngine, Kernel, Remainder
from qncd_deploy.engines.trt.build import build, graph_specs
from qncd_deploy.engines.trt.cuda import DeviceArrays, open_arrays
from qncd_deploy.engines.trt.kernels import KernelTable
from qncd_deploy.engines.trt.library import Flavour, open_library
from qncd_deploy.engines.trt.loaded import LoadedEngine
from qncd_deploy.engines.trt.options import BuildOptions
from qncd_deploy.engines.trt.store import load_engine, timing_file
from qncd_deploy.errors import BundleError, EngineError
from qncd_deploy.files import atomic_file
from qncd_deploy.specs import Array, TensorSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Held:
    """An engine, what it runs, and the file of what TensorRT for RTX compiled for it; None if it was built just now."""

    engine: LoadedEngine
    table: KernelTable
    cache: Path | None = None


class TrtEngine(BaseEngine):
    """Runs a graph with TensorRT or TensorRT for RTX, whichever the engine's id names."""

    arrays: DeviceArrays

    def __init__(self, path: Path, *, engine_id: str, remainder: Remainder, threads: int | None) -> None:
        if threads is not None:
            raise EngineError(f"{engine_id}: runs on the GPU, where --threads {threads} means nothing. Leave it out.")
        (flavour,) = (name for name in get_args(Flavour) if engine_id == f"{name}-{remainder}")
        self._library = open_library(flavour)
        super().__init__(engine_id, path, {}, {})  # asked for when needed: reading the graph takes a builder
        self.arrays = self.open_arrays()
        self._held: list[_Held] = []
        self._fixed = False

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Raises BuildFailed if nothing is stored and the library does not read the graph."""
        return self._known()[0]

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Raises as inputs does."""
        return self._known()[1]

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Those of the stored engines; () where what is missing is built."""
        return tuple(sorted(set().union(*(held.engine.row_sizes() for held in self._held)))) if self._fixed else ()

    @classmethod
    def library_version(cls, backend: Backend) -> str | None:
        """As BaseEngine's. Raises BackendMissing without the library, a GPU or the array library."""
        (flavour,) = (name for name in get_args(Flavour) if name == backend.name)
        library = open_library(flavour)
        open_arrays()
        return library.version_text

    @classmethod
    def open_arrays(cls) -> DeviceArrays:
        """This process's GPU. Raises BackendMissing without a GPU or the array library."""
        return open_arrays()

    def kernels(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Kernel, ...]:
        """What runs for inputs of these shapes, sorted. Raises EngineError and BuildFailed as a call does."""
        return self._holding(shapes).table.kernels

    def compiled_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Of the engine that takes these shapes. Raises EngineError and BuildFailed as a call does."""
        return self._holding(shapes).engine.bytes

    def load_blob(self, path: Path, *, source: str) -> None:
        """Use an engine that `qncd build` stored; several may be used, for several shapes.

        Raises: EngineError if it is not whole, or was made from another graph, with another version or for another GPU,
        or if memory does not suffice.
        """
        plan, facts = load_engine(path, self._library, self.arrays.device, source=source)
        assert facts.table is not None, "a stored engine was built"
        cache = path.with_suffix(".cache")
        known = cache.read_bytes() if cache.is_file() else None
        engine = LoadedEngine(
            self._library, self.arrays, plan, place=path, cache=known, version_compatible=facts.version_compatible
        )
        self._use(_Held(engine, facts.table, cache))

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        engine = self._holding({name: tuple(array.shape) for name, array in feeds.items()}).engine
        there = any(map(self.arrays.holds, feeds.values()))
        results = engine({name: self.arrays.put(array) for name, array in feeds.items()})
        return results if there else {name: self.arrays.get(array) for name, array in results.items()}

    def _close(self) -> None:
        try:
            self.arrays.wait()  # memory must not be given back while it is in use
            for held in self._held:
                _keep_compiled(held)
        finally:
            for held in self._held:
                held.engine.close()
            self._held.clear()

    def _holding(self, shapes: Mapping[str, tuple[int, ...]]) -> _Held:
        """The first engine that takes these input shapes; without any stored one, it is built."""
        for held in self._held:
            if held.engine.profile(shapes) is not None:
                return held
        if self._fixed:
            sizes = "; or ".join(held.engine.sizes() for held in self._held)
            asked = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'a scalar'}" for name, shape in shapes.items())
            raise EngineError(
                f"{self.path}: the engines built for it take {sizes}; {asked} was asked for. Build one for that, too, "
                "with `qncd build --batch` and --sizes, or choose a --batch-size and a size that there are."
            )
        log.info("building an engine of %s for this run alone; `qncd build` makes one to keep.", self.path.name)
        device, effort = self.arrays.device, self.effort
        options = BuildOptions(
            profiles=(dict(shapes),),
            targets=(device.sm,) if self._library.ahead_of_time else (),
            level=effort.level,
            workspace=effort.workspace,
            timing_cache=None if effort.shelf is None else timing_file(effort.shelf, self._library, device),
        )
        built = build(self._library, self.path, options, memory=device.memory)
        self._held.append(_Held(LoadedEngine(self._library, self.arrays, built.plan, place=self.path), built.table))
        return self._held[-1]

    def _use(self, held: _Held) -> None:
        """From now on nothing is built."""
        (inputs, outputs), engine = self._tensors, held.engine
        self._tensors = (
            (_either(inputs, engine.inputs), _either(outputs, engine.outputs))
            if self._fixed
            else (engine.inputs, engine.outputs)
        )
        self._held.append(held)
        self._fixed = True

    def _known(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        if self._tensors == ({}, {}):
            self._tensors = graph_specs(self._library, self.path)
        return self._tensors


def _either(some: Mapping[str, TensorSpec], others: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """What two engines of one graph take: sizes in which they differ are free."""

    def size(axis: int, a: int | str, b: int | str) -> int | str:
        return a if a == b else f"dim{axis}" if axis else "batch"

    return {
        name: replace(spec, shape=tuple(map(size, count(), spec.shape, others[name].shape)))
        for name, spec in some.items()
    }


def _keep_compiled(held: _Held) -> None:
    """Write what TensorRT for RTX compiled beside the engine, so that the next process starts at once."""
    compiled = held.engine.compiled
    if held.cache is None or compiled is None or (held.cache.is_file() and held.cache.read_bytes() == compiled):
        return
    try:
        with atomic_file(held.cache) as partial:
            partial.write_bytes(compiled)
    except BundleError as exc:  # a shelf that may only be read: the engine works all the same
        log.info("%s: not written (%s), so the next start compiles again", held.cache, exc)

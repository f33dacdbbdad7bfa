"""A TensorRT engine as the rest of the package sees engines: the graph's tensors in, the graph's tensors out.

Engines that were built before (`load_blob`) are used; without any, one is built for the shapes at hand, which takes
from seconds to many minutes. Fed NumPy arrays alone, a call returns them; fed a device array, it returns device arrays
and waits for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from qncd_deploy.engines.base import Backend, BaseEngine, Kernel, Remainder
from qncd_deploy.engines.trt.build import BuiltEngine, build, graph_specs
from qncd_deploy.engines.trt.cuda import DeviceArrays, open_arrays
from qncd_deploy.engines.trt.kernels import KernelTable
from qncd_deploy.engines.trt.library import Flavour, open_library
from qncd_deploy.engines.trt.loaded import LoadedEngine
from qncd_deploy.engines.trt.options import BuildOptions
from qncd_deploy.engines.trt.store import load_engine
from qncd_deploy.errors import BundleError, EngineError
from qncd_deploy.files import atomic_file
from qncd_deploy.specs import Array

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
        arrays = self.open_arrays()
        inputs, outputs = graph_specs(self._library, path)
        super().__init__(engine_id, path, inputs, outputs)
        self.arrays = arrays
        self._graph_inputs = inputs
        self._held: list[_Held] = []
        self._fixed = False

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

    def use(self, built: BuiltEngine, *, place: Path) -> None:
        """Use an engine that is stored nowhere yet. place: for messages. Raises EngineError as load_blob does."""
        self._use(_Held(self._load(built, place), built.table))

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
                f"{self.path}: the engines built for it take {sizes}; {asked} was asked for. Build one for that batch "
                "size, too, with `qncd build`, or choose a --batch-size that there is."
            )
        log.info("building an engine of %s for this run alone; `qncd build` makes one to keep.", self.path.name)
        device = self.arrays.device
        targets = (device.sm,) if self._library.ahead_of_time else ()
        built = build(
            self._library, self.path, BuildOptions(profiles=(dict(shapes),), targets=targets), memory=device.memory
        )
        self._held.append(_Held(self._load(built, self.path), built.table))
        return self._held[-1]

    def _load(self, built: BuiltEngine, place: Path) -> LoadedEngine:
        return LoadedEngine(
            self._library,
            self.arrays,
            built.plan,
            place=place,
            version_compatible=built.options.version_compatible,
        )

    def _use(self, held: _Held) -> None:
        """From now on nothing is built. The sizes of a single engine that takes but one are what the inputs say, so
        that batches of any size are cut to it.
        """
        self._held.append(held)
        self._fixed = True
        alone = self._held[0].engine if len(self._held) == 1 else None
        self.inputs = {
            name: alone.inputs[name] if alone is not None else spec for name, spec in self._graph_inputs.items()
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

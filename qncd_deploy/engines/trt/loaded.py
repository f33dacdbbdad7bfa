"""A TensorRT engine on the device: buffers allocated once for every set of shapes, and a CUDA graph around every call.

    call 1      queued as it is; the library sets itself up
    call 2      captured as a CUDA graph, which is launched then and from now on: hundreds of kernels queued in one go.
                TensorRT for RTX is told to do this by itself, since it compiles its kernels when they are first used

Nothing waits: a call copies its feeds into the buffers, runs, and copies the results out, all in the order of one
stream. Results are copies because they are the caller's: a multistep sampler remembers them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qncd_deploy.engines.trt.cuda import DeviceArrays
from qncd_deploy.engines.trt.library import Library, LogLine, out_of_memory
from qncd_deploy.errors import EngineError
from qncd_deploy.specs import Array, TensorSpec

log = logging.getLogger(__name__)

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}


@dataclass
class _Bound:
    """An execution context at fixed shapes and the buffers whose addresses it holds.

    ran: it was queued before;  graph: launches what was captured then;  capturable: not known to be otherwise.
    """

    context: Any
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    capturable: bool
    ran: bool = False
    graph: Callable[[], None] | None = None


class LoadedEngine:
    """An engine, from the bytes of its plan. inputs, outputs: its tensors, -1 being named as free dimensions are;
    bytes: size of the plan.

    place: where the bytes came from, for messages;  cache: an earlier process's `compiled`;  version_compatible: how
    they were built.

    Raises: EngineError if they are no plan, cut short, or for another version or GPU, or if memory does not suffice;
    BackendMissing if the library cannot start.
    """

    def __init__(
        self,
        library: Library,
        arrays: DeviceArrays,
        plan: bytes,
        *,
        place: Path,
        cache: bytes | None = None,
        version_compatible: bool = False,
    ) -> None:
        self._library, self._arrays, self._place = library, arrays, place
        self._lines: list[LogLine] = []
        # Logger and runtime are kept because an engine must not outlive them.
        self._logger = library.logger(self._lines)
        self._runtime = library.runtime(self._logger, lines=self._lines, version_compatible=version_compatible)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None and out_of_memory(self._lines):
            raise self._too_large("load")
        if self._engine is None:
            raise EngineError(
                f"{place}: {library.flavour} {library.version_text} on {arrays.device.name} cannot load it"
                f"{self._reason()}. Run `qncd build` again here."
            )
        self._config, self._cache = self._just_in_time(cache)
        self.inputs, self.outputs = self._specs()
        self.bytes = len(plan)
        self._bound: dict[tuple[tuple[int, ...], ...], _Bound] = {}

    def profile(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """The first optimization profile that takes these input shapes; None if none does."""
        for index in range(self._engine.num_optimization_profiles):
            if all(self._takes(name, shapes[name], index) for name in self.inputs):
                return index
        return None

    def row_sizes(self) -> set[int]:
        """The most rows that each profile takes: those of the input with most axes, none if it has none."""
        state = max(self.inputs, key=lambda name: len(self.inputs[name].shape))
        highest = (self._range(state, index)[1] for index in range(self._engine.num_optimization_profiles))
        return {shape[0] for shape in highest if shape}

    def sizes(self) -> str:
        """The input shapes that it takes, in words."""
        profiles = []
        for index in range(self._engine.num_optimization_profiles):
            ranges = [(name, *map(_words, self._range(name, index))) for name in self.inputs]
            words = (f"{name} {low}" if low == high else f"{name} {low} to {high}" for name, low, high in ranges)
            profiles.append(", ".join(words))
        return "; or ".join(profiles)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Queue one run. Feeds: device arrays of the inputs' dtypes and of shapes that `profile` takes; returns device
        arrays. Raises EngineError if memory does not suffice or the library refuses.
        """
        shapes = {name: tuple(feeds[name].shape) for name in self.inputs}
        key = tuple(shapes.values())
        if key not in self._bound:
            self._bound[key] = self._bind(shapes)
        bound = self._bound[key]
        self._arrays.use()
        for name, buffer in bound.inputs.items():
            buffer[...] = feeds[name]
        self._queue(bound)
        return {name: buffer.copy() for name, buffer in bound.outputs.items()}

    @property
    def compiled(self) -> bytes | None:
        """What TensorRT for RTX compiled on this machine so far; None for TensorRT, which compiles when it builds."""
        return None if self._cache is None else bytes(self._cache.serialize())

    def close(self) -> None:
        """Give its memory back."""
        self._bound.clear()
        self._cache = self._config = self._engine = self._runtime = None

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> _Bound:
        context = self._context()
        profile = self.profile(shapes)
        assert profile is not None, f"{self._place}: takes {self.sizes()}, not {dict(shapes)}"
        # The first profile is current from the beginning.
        if profile and not context.set_optimization_profile_async(profile, self._arrays.stream):
            raise EngineError(f"{self._place}: profile {profile} cannot be used{self._reason()}.")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise EngineError(f"{self._place}: refuses {name} of {_words(shape)}{self._reason()}.")
        inputs = {name: self._arrays.empty(shape, self.inputs[name].dtype) for name, shape in shapes.items()}
        outputs = {
            name: self._arrays.empty(tuple(context.get_tensor_shape(name)), spec.dtype)
            for name, spec in self.outputs.items()
        }
        for name, buffer in (*inputs.items(), *outputs.items()):
            context.set_tensor_address(name, buffer.data.ptr)
        return _Bound(context, inputs, outputs, capturable=self._config is None)

    def _queue(self, bound: _Bound) -> None:
        if bound.graph is None and bound.ran and bound.capturable:
            try:
                bound.graph = self._arrays.capture(lambda: self._enqueue(bound.context))
            except EngineError as exc:
                log.info("%s: runs without a CUDA graph, which may be slower (%s)", self._place, exc)
                bound.capturable = False
        if bound.graph is not None:
            bound.graph()
        else:
            self._enqueue(bound.context)
        bound.ran = True

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._arrays.stream):
            raise EngineError(f"{self._place}: failed while running{self._reason()}.")

    def _takes(self, name: str, shape: Sequence[int], profile: int) -> bool:
        low, high = self._range(name, profile)
        return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def _range(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Smallest and largest shape of an input."""
        shape = tuple(self._engine.get_tensor_shape(name))
        if -1 not in shape:
            return shape, shape
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(high)

    def _specs(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        engine = self._engine
        inputs: dict[str, TensorSpec] = {}
        outputs: dict[str, TensorSpec] = {}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            kind = engine.get_tensor_dtype(name).name
            if kind not in _DTYPES:
                raise EngineError(f"{self._place}: tensor {name!r} is {kind}, expected {', '.join(_DTYPES)}.")
            shape = tuple(
                size if size >= 0 else "batch" if axis == 0 else f"dim{axis}"
                for axis, size in enumerate(engine.get_tensor_shape(name))
            )
            is_input = engine.get_tensor_mode(name) == self._library.module.TensorIOMode.INPUT
            (inputs if is_input else outputs)[name] = TensorSpec(name, _DTYPES[kind], shape)
        return inputs, outputs

    def _just_in_time(self, known: bytes | None) -> tuple[Any, Any]:
        """The configuration and the cache of what TensorRT for RTX compiles when an engine first runs."""
        if not self._library.uses("ICudaEngine.create_runtime_config"):
            return None, None
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        cache = config.create_runtime_cache()
        if known is not None and not cache.deserialize(known):
            log.info("%s: compiled for another version, driver or GPU before, so that is done again", self._place)
        config.set_runtime_cache(cache)
        return config, cache

    def _context(self) -> Any:
        made = self._engine.create_execution_context(*(() if self._config is None else (self._config,)))
        if made is None:
            raise self._too_large("run")
        return made

    def _too_large(self, what: str) -> EngineError:
        return EngineError(
            f"{self._place}: not enough memory on {self._arrays.device.name} to {what} it{self._reason()}. Use a "
            "smaller --batch-size, or close what else uses the GPU."
        )

    def _reason(self) -> str:
        """What the library complained about last, in parentheses."""
        errors = [line.text for line in self._lines if line.is_error]
        return f" ({' '.join(errors[-1].split()).rstrip('. ')})" if errors else ""


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"

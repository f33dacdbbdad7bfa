"""OpenVINO on the CPU: runs the master graph, compiled once for every set of static shapes it meets.

The remainder's precision is always set: on CPUs with AMX or AVX512-BF16 the library would choose bfloat16 by itself.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from qncd_deploy.engines.base import BaseEngine, Kernel, Remainder
from qncd_deploy.engines.stored import AGAIN, load_stored, require_same, save_stored
from qncd_deploy.errors import BackendMissing, BuildFailed, EngineError, first_line
from qncd_deploy.specs import TensorSpec

Shapes = tuple[tuple[int, ...], ...]
"""One static shape per input, in the graph's order."""


@dataclass(frozen=True)
class BlobFacts:
    """What a compiled blob was made from and for. source: hash of graph and weights, given by whoever knows them (a
    bundle's manifest).
    """

    source: str
    version: str
    device: str
    remainder: str
    threads: int | None
    shapes: Shapes

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BlobFacts:
        return cls(**{**data, "shapes": tuple(tuple(shape) for shape in data["shapes"])})


class OpenVINOEngine(BaseEngine):
    """Runs an ONNX graph on the CPU; each new combination of input shapes is compiled once, then kept."""

    def __init__(self, path: Path, *, engine_id: str, remainder: Remainder, threads: int | None) -> None:
        self._core = _core()
        if not self.computes(remainder):
            raise BackendMissing("openvino: this CPU has no bfloat16 arithmetic. Use the float32 remainder.")
        try:
            self._model = self._core.read_model(path)
        except RuntimeError as exc:
            raise BuildFailed(f"{path}: OpenVINO cannot read it ({first_line(exc)}).") from exc
        self._remainder, self._threads = remainder, threads
        self._compiled: dict[Shapes, ov.CompiledModel] = {}
        self._requests: dict[Shapes, ov.InferRequest] = {}
        self._stored_bytes: dict[Shapes, int] = {}
        super().__init__(engine_id, path, _specs(self._model.inputs), _specs(self._model.outputs))

    @classmethod
    def computes(cls, remainder: Remainder) -> bool:
        return remainder != "bf16" or "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def compile(self, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Compile for these static input shapes unless that was done already. Raises BuildFailed."""
        key = tuple(tuple(shapes[name]) for name in self.inputs)
        if key not in self._compiled:
            try:
                model = self._model.clone()
                model.reshape({name: ov.PartialShape(list(shapes[name])) for name in self.inputs})
                self._keep(key, self._core.compile_model(model, "CPU", self._config()))
            except RuntimeError as exc:
                raise BuildFailed(
                    f"{self.path}: OpenVINO cannot compile it for {dict(shapes)} ({first_line(exc)})."
                ) from exc
        return key

    def kernels(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Kernel, ...]:
        """What the graph compiled for these shapes runs, by operation, precision and implementation, sorted."""
        found: Counter[tuple[str, str, str]] = Counter()
        for node in self._compiled[self.compile(shapes)].get_runtime_model().get_ops():
            info = node.get_rt_info()
            kind, precision, implementation = (
                info[key].astype(str) for key in ("layerType", "runtimePrecision", "primitiveType")
            )
            if kind == "FullyConnected" and not implementation.endswith(precision):
                # compressed weights: their type is told as its precision, what it computes in only by its name
                implementation, precision = f"{implementation}, {precision} weights", implementation.rpartition("_")[2]
            if kind not in ("Const", "Constant", "Input", "Output", "Parameter", "Result"):
                found[kind, precision, implementation] += 1
        return tuple(Kernel(*key, count=count) for key, count in sorted(found.items()))

    def compiled_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Of the blob that was loaded for these shapes; None for what was compiled in memory."""
        return self._stored_bytes.get(tuple(tuple(shapes[name]) for name in self.inputs))

    def save_blob(self, path: Path, shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
        """Write the graph compiled for these shapes to `path` (.blob) and what it is to the .json beside it."""
        key = self.compile(shapes)
        save_stored(path, self._compiled[key].export_model().getvalue(), self._facts(key, source))

    def load_blob(self, path: Path, *, source: str) -> None:
        """Use a blob of save_blob instead of compiling for the shapes it was made for.

        Raises: EngineError if it was made from another graph, by another OpenVINO, for another CPU or precision, or has
        changed on disk.
        """
        blob, found = load_stored(path, BlobFacts.from_json)
        require_same(path, found, self._facts(found.shapes, source), _BLOB_WORDS)
        try:
            self._keep(found.shapes, self._core.import_model(io.BytesIO(blob), "CPU", self._config()))
        except RuntimeError as exc:
            raise BuildFailed(f"{path}: OpenVINO refuses the blob ({first_line(exc)}). {AGAIN}") from exc
        self._stored_bytes[found.shapes] = len(blob)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        key = self.compile({name: array.shape for name, array in feeds.items()})
        try:
            # share_inputs reads the caller's arrays in place; outputs are copies, since the request is used again.
            results = self._requests[key].infer(list(feeds.values()), share_inputs=True, share_outputs=False)
        except RuntimeError as exc:
            raise EngineError(f"{self.path}: OpenVINO failed while running ({first_line(exc)}).") from exc
        return {name: results[index] for index, name in enumerate(self.outputs)}

    def _close(self) -> None:
        self._requests.clear()
        self._compiled.clear()
        del self._model

    def _keep(self, key: Shapes, compiled: ov.CompiledModel) -> None:
        self._compiled[key] = compiled
        self._requests[key] = compiled.create_infer_request()

    def _config(self) -> dict[str, object]:
        config: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._remainder,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # no rounding of activations that the plan does not know of
        }
        return config if self._threads is None else {**config, "INFERENCE_NUM_THREADS": self._threads}

    def _facts(self, shapes: Shapes, source: str) -> BlobFacts:
        return BlobFacts(
            source=source,
            version=ov.get_version(),
            device=str(self._core.get_property("CPU", "FULL_DEVICE_NAME")),
            remainder=self._remainder,
            threads=self._threads,
            shapes=shapes,
        )


@cache
def _core() -> ov.Core:
    """One for all engines of the process. Its CPU plugin gives the thread a stack for signal handlers and on closing
    puts back the one that it found: with two of them, closed in the order they were opened, that is a stack that is no
    more, and the next Ctrl-C a segmentation fault (seen with 2026.4).
    """
    return ov.Core()


_BLOB_WORDS = {
    "source": "made from another graph (sha256 {has:.12}..., not {want:.12}...)",
    "version": "made by OpenVINO {has}, this is {want}",
    "device": "made for {has}, this is {want}",
    "remainder": "its remainder is {has}, {want} was asked for",
    "threads": "made for {has} threads, {want} were asked for",
}


def _specs(ports: list[ov.Output]) -> dict[str, TensorSpec]:
    specs = (
        TensorSpec(
            port.get_any_name(),
            np.dtype(port.get_element_type().to_dtype()).name,
            tuple(_size(size, axis) for axis, size in enumerate(port.get_partial_shape())),
        )
        for port in ports
    )
    return {spec.name: spec for spec in specs}


def _size(size: ov.Dimension, axis: int) -> int | str:
    """A fixed size, or a name: OpenVINO does not keep the names of free dimensions, and the first one is the batch."""
    if size.is_static:
        return int(size.get_length())
    return "batch" if axis == 0 else f"dim{axis}"

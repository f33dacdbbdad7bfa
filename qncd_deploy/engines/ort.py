"""ONNX Runtime on the CPU: runs the sibling whose Q/DQ placement its fusions recognise, or a float graph."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qncd_deploy.engines.base import BaseEngine, Remainder
from qncd_deploy.errors import BuildFailed, EngineError, first_line
from qncd_deploy.specs import TensorSpec

PROVIDERS = ("CPUExecutionProvider",)

_DTYPES = {"float": "float32", "double": "float64"}


class SessionEngine(BaseEngine):
    """Runs an ONNX graph with an open ONNX Runtime session; free dimensions stay free."""

    def __init__(self, engine_id: str, path: Path, session: ort.InferenceSession) -> None:
        self._session = session
        super().__init__(engine_id, path, _specs(session.get_inputs()), _specs(session.get_outputs()))

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._outputs(feeds, self._session)

    def _outputs(self, feeds: dict[str, np.ndarray], session: ort.InferenceSession) -> dict[str, np.ndarray]:
        """session: of the same graph, the one it was opened with or another."""
        names = list(self.outputs)
        try:
            results = session.run(names, feeds)
        except Exception as exc:
            raise EngineError(f"{self.path}: ONNX Runtime failed while running ({first_line(exc)}).") from exc
        return dict(zip(names, results, strict=True))

    def _close(self) -> None:
        del self._session


class OrtEngine(SessionEngine):
    """Runs an ONNX graph on the CPU."""

    def __init__(self, path: Path, *, engine_id: str, remainder: Remainder, threads: int | None) -> None:
        assert remainder == "f32"
        options = session_options()
        options.intra_op_num_threads = threads or 0  # 0: one per physical core
        options.inter_op_num_threads = 1
        # Merging MatMul + Add into Gemm hides Q/DQ -> MatMul from the integer fusions. A float graph keeps it: it is
        # the baseline of every speed and must not be slowed.
        disabled = ["MatMulAddFusion"] if is_quantized(path) else []
        session = open_session(path, options, providers=list(PROVIDERS), disabled_optimizers=disabled)
        used = tuple(session.get_providers())
        if used != PROVIDERS:
            raise BuildFailed(f"{path}: ONNX Runtime runs it with {', '.join(used)}, not {', '.join(PROVIDERS)}.")
        super().__init__(engine_id, path, session)


def session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors reach us as exceptions; warnings are about its own rewriting
    options.use_deterministic_compute = True
    # 4-bit weights meet activations in float32; by default they would be rounded to 8 bits, which no plan knows of.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def open_session(
    path: Path, options: ort.SessionOptions, *, content: bytes | None = None, **given: Any
) -> ort.InferenceSession:
    """A session of a graph, or of `content` in its place. given: as InferenceSession takes it. Raises BuildFailed."""
    try:
        return ort.InferenceSession(path if content is None else content, options, **given)
    except Exception as exc:  # the library raises its own classes, which share no base of their own
        raise BuildFailed(f"{path}: ONNX Runtime cannot load it ({first_line(exc)}).") from exc


def is_quantized(path: Path) -> bool:
    """Whether a graph holds Q/DQ pairs, seen from its bytes: operator types are plain text in protobuf."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"QuantizeLinear") >= 0


def _specs(nodes: list[ort.NodeArg]) -> dict[str, TensorSpec]:
    specs = []
    for node in nodes:
        dtype = node.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(size if size is not None else f"dim{axis}" for axis, size in enumerate(node.shape))
        specs.append(TensorSpec(node.name, _DTYPES.get(dtype, dtype), shape))
    return {spec.name: spec for spec in specs}

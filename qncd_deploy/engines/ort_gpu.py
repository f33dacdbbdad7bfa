"""ONNX Runtime on an NVIDIA GPU: a second way to TensorRT, and CUDA's own kernels to check both by.

    onnxruntime-tensorrt   its TensorRT provider, with TensorRT's libraries beside it
    onnxruntime-rtx        TensorRT for RTX as a plugin package, which brings its libraries
    onnxruntime-cuda       its CUDA provider, which has no INT8 kernels: Q/DQ pairs are computed as they are written

Providers hand nodes that they do not take to the next one, down to the CPU, and say nothing. Here a session whose nodes
did not all stay is refused by their names; for CUDA the shape arithmetic that it leaves to the CPU itself is let be.
Arrays go through the host at every call: the native engines (trt/run.py) keep them on the device. So far this has run
on no GPU, only on sessions that pretend.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qncd_deploy.engines.base import Backend, Remainder, find_backend
from qncd_deploy.engines.ort import SessionEngine, is_quantized, open_session, session_options
from qncd_deploy.engines.stored import load_stored, require_same, save_stored
from qncd_deploy.engines.trt.device import find_device
from qncd_deploy.errors import BackendMissing, BuildFailed, EngineError, first_line

PROVIDERS = {
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-rtx": "NvTensorRTRTXExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_SHAPE_ARITHMETIC = frozenset(
    {"Cast", "Concat", "Constant", "ConstantOfShape", "Gather", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze"}
)

Shapes = tuple[tuple[int, ...], ...]
"""One static shape per input, in the graph's order."""


@dataclass(frozen=True)
class ContextFacts:
    """What an ONNX file that wraps a compiled engine was made from and for.

    source: hash of the graph and its weights;  version: of ONNX Runtime;  shapes: those it was compiled for.
    """

    source: str
    engine_id: str
    version: str
    device: str
    shapes: Shapes


class OrtGpuEngine(SessionEngine):
    """Runs an ONNX graph with the provider that the engine's id names, all of it."""

    def __init__(self, path: Path, *, engine_id: str, remainder: Remainder, threads: int | None) -> None:
        if threads is not None:
            raise EngineError(f"{engine_id}: runs on the GPU, where --threads {threads} means nothing. Leave it out.")
        self._backend = engine_id.removesuffix(f"-{remainder}")
        self._provider = PROVIDERS[self._backend]
        self._remainder = remainder
        self._quantized = is_quantized(path)
        self._device = find_device()
        check_provider(self._backend)
        self._compiled: dict[Shapes, ort.InferenceSession] = {}
        self._stored_bytes: dict[Shapes, int] = {}
        super().__init__(engine_id, path, self._open(path))

    @classmethod
    def library_version(cls, backend: Backend) -> str | None:
        """As BaseEngine's. Raises BackendMissing without the provider or a GPU."""
        check_provider(backend.name)
        find_device()
        return ort.__version__

    def compiled_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Of the file that was loaded for these shapes; None for what the provider compiles in memory."""
        return self._stored_bytes.get(tuple(tuple(shapes[name]) for name in self.inputs))

    def save_blob(self, path: Path, shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
        """Have the provider compile for these shapes, and keep the ONNX file that wraps its engine.

        Raises: EngineError for CUDA, which compiles nothing;  BuildFailed if nothing was written.
        """
        if self._backend == "onnxruntime-cuda":
            super().save_blob(path, shapes, source=source)
        with tempfile.TemporaryDirectory() as folder:
            wrapped = Path(folder) / "context.onnx"
            options = {"ep.context_enable": "1", "ep.context_embed_mode": "1", "ep.context_file_path": str(wrapped)}
            self._open(self.path, shapes=shapes, config=options)
            if not wrapped.is_file():
                raise BuildFailed(f"{self.path}: {self._provider} compiled it, but wrote no engine.")
            content = wrapped.read_bytes()
        save_stored(path, content, self._facts(tuple(tuple(shapes[name]) for name in self.inputs), source))

    def load_blob(self, path: Path, *, source: str) -> None:
        """Use what save_blob stored for the shapes it was made for.

        Raises: EngineError if it is not whole, or was made from another graph, by another ONNX Runtime, or for another
        GPU or precision;  BuildFailed if the provider refuses it.
        """
        content, found = load_stored(path, _facts_from_json)
        require_same(path, found, self._facts(found.shapes, source), _WORDS)
        shapes = dict(zip(self.inputs, found.shapes, strict=True))
        self._compiled[found.shapes] = self._open(path, content=content, shapes=shapes)
        self._stored_bytes[found.shapes] = len(content)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes = tuple(array.shape for array in feeds.values())
        return self._outputs(feeds, self._compiled.get(shapes, self._session))

    def _close(self) -> None:
        self._compiled.clear()
        super()._close()

    def _open(
        self,
        path: Path,
        *,
        content: bytes | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        config: Mapping[str, str] | None = None,
    ) -> ort.InferenceSession:
        """A session all of whose nodes are the provider's. shapes: of the one profile to compile for."""
        options = session_options()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        for name, value in (config or {}).items():
            options.add_session_config_entry(name, value)
        settings = self._settings(shapes or {})
        if self._backend == "onnxruntime-rtx":
            options.add_provider_for_devices(_plugin_devices()[:1], settings)
            given: dict[str, Any] = {}
        else:
            # enable_fallback: without it a provider that cannot start is an error, and not the next one in line
            given = {"providers": [(self._provider, settings)], "enable_fallback": 0}
        session = open_session(path, options, content=content, **given)
        self._check_partition(path, session)
        return session

    def _settings(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        if self._backend == "onnxruntime-cuda":
            return {"use_tf32": "0"}
        prefix = "trt" if self._backend == "onnxruntime-tensorrt" else "nv"
        text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items() if shape)
        settings = {f"{prefix}_profile_{bound}_shapes": text for bound in ("min", "opt", "max") if text}
        if prefix == "trt":
            # Before TensorRT 11 this provider makes weakly typed networks, where a graph's own float16 and Q/DQ need
            # leave by a flag; it has no strongly typed ones. On 11 the flags mean nothing.
            settings["trt_fp16_enable"] = str(int(self._remainder == "f16"))
            settings["trt_int8_enable"] = str(int(self._quantized))
        return settings

    def _check_partition(self, path: Path, session: ort.InferenceSession) -> None:
        """Raises BuildFailed naming the nodes that are not the provider's, BackendMissing if it is not there at all."""
        strays = [
            f"{node.op_type} {node.name!r} on {part.ep_name}"
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != self._provider
            for node in part.get_nodes()
            if not (self._backend == "onnxruntime-cuda" and node.op_type in _SHAPE_ARITHMETIC)
        ]
        if self._provider not in session.get_providers():
            raise _not_loaded(self._backend, f"its session has {', '.join(session.get_providers())}")
        if strays:
            more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
            raise BuildFailed(
                f"{path}: {self._provider} does not run all of it: {', '.join(strays[:3])}{more}. Use --backend "
                "tensorrt, which says why, or onnxruntime-cuda."
            )

    def _facts(self, shapes: Shapes, source: str) -> ContextFacts:
        device = f"{self._device.name} ({self._device.sm})"
        return ContextFacts(source, self.engine_id, ort.__version__, device, shapes)


_WORDS = {
    "source": "made from another graph (sha256 {has:.12}..., not {want:.12}...)",
    "engine_id": "made for {has}, this is {want}",
    "version": "made by ONNX Runtime {has}, this is {want}",
    "device": "made for {has}, this is {want}",
}


def check_provider(backend: str) -> None:
    """Raises BackendMissing, with what to install, if ONNX Runtime here does not have a backend's provider, or has it
    without the libraries that it needs.
    """
    install = find_backend(backend).install
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        raise BackendMissing(
            f"{backend}: ONNX Runtime {ort.__version__} does not tell where nodes run, expected a newer one (Python "
            f"3.11 or newer has it). Update it: {install}"
        )
    if backend == "onnxruntime-rtx":
        _plugin_devices()
    elif PROVIDERS[backend] not in ort.get_available_providers():
        raise BackendMissing(
            f"{backend}: this ONNX Runtime has {', '.join(ort.get_available_providers())}, not {PROVIDERS[backend]}. "
            f"Install it: {install}"
        )
    elif (why := _failure(PROVIDERS[backend])) is not None:
        raise _not_loaded(backend, why)


def _not_loaded(backend: str, why: str) -> BackendMissing:
    needed = "CUDA and cuDNN" + (" and TensorRT" if backend == "onnxruntime-tensorrt" else "")
    return BackendMissing(
        f"{backend}: {PROVIDERS[backend]}'s libraries could not be loaded ({why}); it needs {needed}, of the versions "
        f"that this ONNX Runtime {ort.__version__} was made with. Install them: {find_backend(backend).install}"
    )


@cache
def _failure(provider: str) -> str | None:
    """Why a provider that was compiled in does not start; None if it does.

    Its libraries may come as wheels, which lie on no search path: ONNX Runtime loads those of CUDA and cuDNN when it is
    asked to, TensorRT's package loads its own.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # where it reports what it does not find
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    if provider == PROVIDERS["onnxruntime-tensorrt"]:
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("tensorrt")
    ort.set_default_logger_severity(4)  # it would print the same, on several lines
    try:
        session = ort.InferenceSession(_IDENTITY, session_options(), providers=[provider], enable_fallback=0)
    except Exception as exc:  # the library raises its own classes, which share no base of their own
        return first_line(exc)
    finally:
        ort.set_default_logger_severity(2)
    return None if provider in session.get_providers() else f"its session has {', '.join(session.get_providers())}"


_IDENTITY = bytes.fromhex(
    "08083a390a120a017812017922084964656e746974793a001201705a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808011204"
    "0a02080142040a00100d"
)
"""A model of one node, y = Identity(x) of float32 (1,): what it takes to open a session."""


@cache
def _plugin_devices() -> list[Any]:
    """The GPUs that TensorRT for RTX's plugin drives. A library is registered once a process."""
    install = find_backend("onnxruntime-rtx").install
    try:
        plugin = importlib.import_module(_PLUGIN)
        ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    except ModuleNotFoundError as exc:
        raise BackendMissing(f"onnxruntime-rtx: its plugin is not installed. Install it: {install}") from exc
    except Exception as exc:  # the library raises its own classes, the plugin OSError and RuntimeError
        raise BackendMissing(f"onnxruntime-rtx: its plugin cannot be loaded ({first_line(exc)}).") from exc
    devices = [device for device in ort.get_ep_devices() if device.ep_name == plugin.get_ep_name()]
    if not devices:
        raise BackendMissing("onnxruntime-rtx: its plugin drives no GPU of this machine. It takes Ampere and newer.")
    return devices


def _facts_from_json(data: dict[str, Any]) -> ContextFacts:
    return ContextFacts(**{**data, "shapes": tuple(tuple(shape) for shape in data["shapes"])})

"""The TensorRT library of one flavour: its Python module, its version, and every name of its API that is used here.

API is the one table of names. Opening a library resolves all names that the table promises for its version, so that a
renamed or removed one is refused at once and by name. From TensorRT 11 on, and in TensorRT for RTX, networks are
strongly typed by themselves; before, a flag asks for it. Precision flags do not occur: types are the graph's alone.
"""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qncd_deploy.engines.base import find_backend
from qncd_deploy.errors import BackendMissing, first_line, install_line

Flavour = Literal["tensorrt", "tensorrt-rtx"]
"""As the backends are called."""

Version = tuple[int, ...]

MODULES: Mapping[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
OLDEST: Mapping[Flavour, Version] = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 7)}
"""10.3 is JetPack 6's; 1.7 is the first TensorRT for RTX that this was tried with."""

JETSON = Path("/etc/nv_tegra_release")


@dataclass(frozen=True)
class Span:
    """The versions first <= v < until in which a name is used; until None: in all later ones."""

    first: Version = (0,)
    until: Version | None = None

    def __contains__(self, version: Version) -> bool:
        return self.first <= version and (self.until is None or version < self.until)


_BOTH: Mapping[str, Span] = {"tensorrt": Span(), "tensorrt-rtx": Span()}
_FULL: Mapping[str, Span] = {"tensorrt": Span()}
_RTX: Mapping[str, Span] = {"tensorrt-rtx": Span()}

API: Mapping[str, Mapping[str, Span]] = {
    # build.py
    "Builder.create_network": _BOTH,
    "Builder.create_builder_config": _BOTH,
    "Builder.create_optimization_profile": _BOTH,
    "Builder.build_serialized_network": _BOTH,
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": {"tensorrt": Span(until=(11, 0))},
    "OnnxParser.parse_from_file": _BOTH,
    "OnnxParser.num_errors": _BOTH,
    "OnnxParser.get_error": _BOTH,
    "ParserError.desc": _BOTH,
    "ParserError.node_name": _BOTH,
    "ParserError.node_operator": _BOTH,
    "INetworkDefinition.num_inputs": _BOTH,
    "INetworkDefinition.get_input": _BOTH,
    "INetworkDefinition.num_outputs": _BOTH,
    "INetworkDefinition.get_output": _BOTH,
    "INetworkDefinition.num_layers": _BOTH,
    "INetworkDefinition.get_layer": _BOTH,
    "INetworkDefinition.mark_output": _BOTH,
    "ILayer.type": _BOTH,
    "ILayer.name": _BOTH,
    "ILayer.num_inputs": _BOTH,
    "ILayer.get_input": _BOTH,
    "ILayer.num_outputs": _BOTH,
    "ILayer.get_output": _BOTH,
    "LayerType.CONVOLUTION": _BOTH,
    "LayerType.MATRIX_MULTIPLY": _BOTH,
    "LayerType.DEQUANTIZE": _BOTH,
    "LayerType.SHUFFLE": _BOTH,
    "LayerType.SOFTMAX": _BOTH,
    "ITensor.name": _BOTH,
    "ITensor.dtype": _BOTH,
    "ITensor.shape": _BOTH,
    "ITensor.get_dimension_name": _BOTH,
    "nptype": _BOTH,
    "IBuilderConfig.profiling_verbosity": _BOTH,
    "IBuilderConfig.builder_optimization_level": _BOTH,
    "IBuilderConfig.set_memory_pool_limit": _BOTH,
    "IBuilderConfig.progress_monitor": _BOTH,
    "IBuilderConfig.add_optimization_profile": _BOTH,
    "IBuilderConfig.set_flag": _BOTH,
    "IBuilderConfig.clear_flag": _BOTH,
    "IBuilderConfig.num_compute_capabilities": _RTX,
    "IBuilderConfig.set_compute_capability": _RTX,
    "IBuilderConfig.create_timing_cache": _FULL,  # a no-op in TensorRT for RTX
    "IBuilderConfig.set_timing_cache": _FULL,
    "IBuilderConfig.hardware_compatibility_level": _FULL,  # TensorRT for RTX names its targets instead
    "ITimingCache.serialize": _FULL,
    "IOptimizationProfile.set_shape": _BOTH,
    "IProgressMonitor.phase_start": _BOTH,
    "IProgressMonitor.step_complete": _BOTH,
    "IProgressMonitor.phase_finish": _BOTH,
    "BuilderFlag.TF32": _BOTH,
    "BuilderFlag.VERSION_COMPATIBLE": _FULL,  # TensorRT for RTX lacks the lean library that it needs
    "ComputeCapability.SM75": _RTX,
    "ComputeCapability.SM80": _RTX,
    "ComputeCapability.SM86": _RTX,
    "ComputeCapability.SM89": _RTX,
    "ComputeCapability.SM120": _RTX,
    "ComputeCapability.SM121": _RTX,
    "HardwareCompatibilityLevel.AMPERE_PLUS": _FULL,
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": {"tensorrt": Span((10, 10))},
    "MemoryPoolType.WORKSPACE": _BOTH,
    "ProfilingVerbosity.DETAILED": _BOTH,
    "ILogger.Severity": _BOTH,
    # kernels.py
    "ICudaEngine.create_engine_inspector": _BOTH,
    "EngineInspector.get_engine_information": _BOTH,
    "LayerInformationFormat.JSON": _BOTH,
    # loaded.py
    "Runtime.deserialize_cuda_engine": _BOTH,
    "Runtime.engine_host_code_allowed": _FULL,
    "ICudaEngine.num_io_tensors": _BOTH,
    "ICudaEngine.num_optimization_profiles": _BOTH,
    "ICudaEngine.get_tensor_name": _BOTH,
    "ICudaEngine.get_tensor_mode": _BOTH,
    "ICudaEngine.get_tensor_dtype": _BOTH,
    "ICudaEngine.get_tensor_shape": _BOTH,
    "ICudaEngine.get_tensor_profile_shape": _BOTH,
    "ICudaEngine.create_execution_context": _BOTH,
    "IExecutionContext.set_optimization_profile_async": _BOTH,
    "IExecutionContext.set_input_shape": _BOTH,
    "IExecutionContext.get_tensor_shape": _BOTH,
    "IExecutionContext.set_tensor_address": _BOTH,
    "IExecutionContext.execute_async_v3": _BOTH,
    "ICudaEngine.create_runtime_config": _RTX,
    "IRuntimeConfig.create_runtime_cache": _RTX,
    "IRuntimeConfig.set_runtime_cache": _RTX,
    "IRuntimeConfig.cuda_graph_strategy": _RTX,
    "IRuntimeCache.deserialize": _RTX,
    "IRuntimeCache.serialize": _RTX,
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE": _RTX,
    "TensorIOMode.INPUT": _BOTH,
    "DataType.FLOAT": _BOTH,
    "DataType.HALF": _BOTH,
    "DataType.INT64": _BOTH,
}
"""Class.member -> flavour -> the versions in which it is used. Checked against the vendor's own bindings."""


@dataclass(frozen=True)
class LogLine:
    """severity: INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE."""

    severity: str
    text: str

    @property
    def is_error(self) -> bool:
        return self.severity in ("INTERNAL_ERROR", "ERROR")

    @property
    def is_complaint(self) -> bool:
        return self.is_error or self.severity == "WARNING"


@dataclass(frozen=True)
class Library:
    """An imported TensorRT. module: the vendor's Python module;  version: such as (10, 3, 0)."""

    flavour: Flavour
    module: Any
    version: Version

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs named by their compute capability, without having one."""
        return self.uses("IBuilderConfig.set_compute_capability")

    def uses(self, name: str) -> bool:
        """Whether this flavour and version is one that a name of API is used with."""
        spans = API[name]
        return self.flavour in spans and self.version in spans[self.flavour]

    @cached_property
    def lacking(self) -> tuple[str, ...]:
        """Names that API promises for this version and that the module does not have."""
        return tuple(name for name in API if self.uses(name) and not _resolves(self.module, name))

    def make(self, name: str, *args: Any, lines: Sequence[LogLine]) -> Any:
        """A Builder, OnnxParser or Runtime. lines: what its logger appends to.

        Raises: BackendMissing, with what the library said last, if it cannot start: the bindings make a TypeError of a
        null pointer.
        """
        try:
            return getattr(self.module, name)(*args)
        except TypeError as exc:
            said = next((line.text for line in reversed(lines) if line.is_complaint), str(exc))
            raise BackendMissing(
                f"{self.flavour}: its {name} cannot start ({first_line(Exception(said))}). Check `nvidia-smi`."
            ) from exc

    def runtime(self, logger: Any, *, lines: Sequence[LogLine], version_compatible: bool) -> Any:
        """A Runtime. version_compatible: of the engine that it is to load, which brings host code of its own to run.

        Raises: BackendMissing as make does.
        """
        runtime = self.make("Runtime", logger, lines=lines)
        if version_compatible:
            runtime.engine_host_code_allowed = True
        return runtime

    def logger(self, lines: list[LogLine]) -> Any:
        """A logger object of the library's that appends to `lines`."""

        class Logger(self.module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity: Any, text: str) -> None:  # called by code that must see no exception
                lines.append(LogLine(severity.name, text))

        return Logger()


def open_library(flavour: Flavour) -> Library:
    """Import a flavour of TensorRT; a GPU is not asked for (see cuda.open_device).

    Raises: BackendMissing, with what to do, if it is not installed, cannot be loaded, is older than OLDEST or lacks a
    name that API promises.
    """
    try:
        module = importlib.import_module(MODULES[flavour])
    except (ImportError, OSError) as exc:  # OSError: a shared library that it loads itself is absent
        absent = isinstance(exc, ModuleNotFoundError) and exc.name == MODULES[flavour]
        found = "not installed" if absent else f"cannot be loaded ({first_line(exc)})"
        raise BackendMissing(f"{flavour}: {found}. {_remedy(flavour)}") from exc
    library = Library(flavour, module, parse_version(module.__version__))
    if library.version < OLDEST[flavour]:
        oldest = ".".join(map(str, OLDEST[flavour]))
        jetson = f" JetPack 6.1 is the first that brings {oldest}: flash it." if JETSON.exists() else _remedy(flavour)
        raise BackendMissing(f"{flavour}: version {library.version_text}, expected {oldest} or newer. {jetson.strip()}")
    if library.lacking:
        raise BackendMissing(
            f"{flavour}: version {library.version_text} lacks {', '.join(library.lacking[:3])}. {_remedy(flavour)}"
        )
    return library


def out_of_memory(lines: Sequence[LogLine]) -> bool:
    """Whether an error that was logged is one of memory."""
    return any(line.is_error and _NO_MEMORY.search(line.text) for line in lines)


_NO_MEMORY = re.compile("out ?of ?memory|insufficient memory|cuda(?:ErrorM| m)emory ?allocation", re.IGNORECASE)


def _remedy(flavour: Flavour) -> str:
    if flavour == "tensorrt-rtx" and platform.machine() != "x86_64":
        return f"There is none for {platform.machine()}: use --backend tensorrt."
    if flavour == "tensorrt" and JETSON.exists():
        return (
            "JetPack brings it, for the system's Python: make the environment with "
            f"`python3 -m venv --system-site-packages`, then {install_line('jetson')}."
        )
    return f"Install it: {find_backend(flavour).install}"


def parse_version(text: str) -> Version:
    """The leading numbers: "10.14.1.48.post1" -> (10, 14, 1, 48)."""

    def numbers() -> Iterator[int]:
        for part in text.split("."):
            if not part.isdigit():
                return
            yield int(part)

    return tuple(numbers())


def _resolves(module: Any, name: str) -> bool:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True

"""What every engine does the same way (checking its inputs, closing), and opening one by its backend's name."""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np

from qncd_deploy.errors import BackendMissing, EngineError, first_line, install_line
from qncd_deploy.specs import Array, Arrays, HostArrays, TensorSpec

if TYPE_CHECKING:
    from typing import Self

Remainder = Literal["f32", "bf16", "f16"]
"""Precision of what a quantized graph leaves in float."""


@dataclass(frozen=True)
class Backend:
    """One inference library: where its engine class is, how to get it, and which graphs of a bundle it runs.

    roles: the bundle's graph for each precision that it can compute the float layers in, the default first;
    device: what it runs on.
    """

    name: str
    module: str
    engine: str
    package: str
    install: str
    roles: Mapping[Remainder, str]
    device: Literal["cpu", "gpu"] = "cpu"

    @property
    def remainders(self) -> tuple[Remainder, ...]:
        return tuple(self.roles)

    def role(self, remainder: Remainder | None = None) -> str:
        """The bundle's graph for a remainder that it has, None for the default."""
        return self.roles[remainder or self.remainders[0]]


BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "openvino",
            "qncd_deploy.engines.openvino",
            "OpenVINOEngine",
            package="openvino",
            install=install_line("cpu"),
            roles={"f32": "master", "bf16": "master"},
        ),
        Backend(
            "onnxruntime",
            "qncd_deploy.engines.ort",
            "OrtEngine",
            package="onnxruntime",
            install=install_line("cpu"),
            roles={"f32": "ort"},
        ),
        *(
            Backend(
                name,
                "qncd_deploy.engines.torch_ref",
                engine,
                package="torch",
                install=install_line("export"),
                roles={"f32": "master"},
                device=device,
            )
            for name, engine, device in (("torch", "TorchEngine", "cpu"), ("torch-cuda", "TorchCudaEngine", "gpu"))
        ),
        *(
            Backend(
                name,
                "qncd_deploy.engines.trt.run",
                "TrtEngine",
                package=name,
                install=install_line(extra),
                roles={"f16": "trt", "f32": "master"},
                device="gpu",
            )
            for name, extra in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx"))
        ),
        *(
            Backend(
                name,
                "qncd_deploy.engines.ort_gpu",
                "OrtGpuEngine",
                package="onnxruntime",
                install=install,
                roles={"f16": "trt", "f32": "master"},
                device="gpu",
            )
            for name, install in (
                ("onnxruntime-tensorrt", f"{install_line('gpu')}, in place of onnxruntime"),
                ("onnxruntime-rtx", 'pip install "onnxruntime>=1.24" onnxruntime-ep-nv-tensorrt-rtx'),
                ("onnxruntime-cuda", f"{install_line('gpu')}, in place of onnxruntime"),
            )
        ),
    )
}
"""By name, in order of preference: the first that this machine has is the default."""


@dataclass(frozen=True)
class Effort:
    """What an engine that is compiled for a run alone may take; TensorRT's, the others need no such limits.

    level, workspace: as in trt.options.BuildOptions;  shelf: folder of what was measured of kernels before, which is
    added to, None for none.
    """

    level: int | None = None
    workspace: int | None = None
    shelf: Path | None = None


@dataclass(frozen=True)
class Kernel:
    """How many operations of one kind a compiled graph runs with one implementation.

    op: such as "Convolution";  precision: of its arithmetic, such as "i8";  implementation: such as "brgemm_avx512_i8".
    """

    op: str
    precision: str
    implementation: str
    count: int

    @property
    def integer(self) -> bool:
        """Whether it computes on 8-bit integers; what only moves or widens them does not."""
        return self.precision in ("i8", "u8") and self.op not in ("Convert", "Transpose")


@dataclass(frozen=True)
class BackendStatus:
    """What this machine has of a backend: the library's version, or the sentence that says what is missing."""

    name: str
    version: str | None
    missing: str | None


class BaseEngine(ABC):
    """Named arrays in, named arrays out, as specs.Engine says; a context manager that closes itself.

    Args: engine_id: backend and precision, as correction tables are keyed by it;  path: the graph, for messages.

    effort: for what it still has to compile.
    """

    effort: Effort = Effort()

    def __init__(
        self, engine_id: str, path: Path, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
    ) -> None:
        self.engine_id = engine_id
        self.path = path
        self._tensors = (inputs, outputs)
        self.arrays: Arrays = HostArrays()
        self._closed = False

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._tensors[0]

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._tensors[1]

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """As specs.Engine's."""
        return ()

    @property
    def graphs(self) -> tuple[Path, ...]:
        """All graphs that it runs, of one folder."""
        return (self.path,)

    @classmethod
    def library_version(cls, backend: Backend) -> str | None:
        """The version of the library, None if it does not tell. Raises BackendMissing if it cannot run here."""
        return _version(backend.package)

    @classmethod
    def computes(cls, remainder: Remainder) -> bool:
        """Whether this machine has the arithmetic for a precision that the backend has."""
        return True

    @classmethod
    def open_arrays(cls) -> Arrays:
        """Where engines of this class compute; the same at every call. Raises BackendMissing if that is not here."""
        return HostArrays()

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises EngineError if an input is missing, unknown, or of another dtype or shape."""
        assert not self._closed, f"{self.path}: the engine is closed"
        return self._run(check_feeds(self.path, self.inputs, feeds))

    def close(self) -> None:
        """Let the library's objects go. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self._close()

    def kernels(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Kernel, ...]:
        """What runs for inputs of these shapes, sorted; () for a backend that cannot tell."""
        return ()

    def compiled_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Size of the compiled network that runs for inputs of these shapes, as it is stored; None where nothing is
        compiled, or only in memory.
        """
        return None

    def save_blob(self, path: Path, shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
        """Store what was compiled for inputs of these shapes. source: hash of the graph and its weights.

        Raises: EngineError for a backend that compiles nothing.
        """
        raise EngineError(f"{self.engine_id}: compiles nothing that could be stored. It needs no build.")

    def load_blob(self, path: Path, *, source: str) -> None:
        """Use what save_blob stored. Raises EngineError if it is not for this graph, library, device or precision."""
        raise EngineError(f"{path}: {self.engine_id} runs the graph itself and takes no compiled blob.")

    @abstractmethod
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]: ...

    @abstractmethod
    def _close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_engine(
    backend: str,
    path: Path,
    *,
    remainder: Remainder | None = None,
    threads: int | None = None,
    effort: Effort = BaseEngine.effort,
) -> BaseEngine:
    """Open an ONNX graph with a backend.

    remainder: precision of the float layers, None for the backend's own default;  threads: None for the library's
    choice;  effort: for what is compiled while it runs.

    Raises: EngineError for an unknown backend or a remainder it cannot do;  BackendMissing if its library is not here;
    BuildFailed if it refuses the graph.
    """
    chosen = find_backend(backend)
    remainder = remainder or chosen.remainders[0]
    engine_id = make_engine_id(backend, remainder)
    if not path.is_file():
        raise EngineError(f"{path}: no such graph.")
    make: Callable[..., BaseEngine] = engine_class(chosen)
    engine = make(path, engine_id=engine_id, remainder=remainder, threads=threads)
    engine.effort = effort
    return engine


def make_engine_id(backend: str, remainder: Remainder | None = None) -> str:
    """The name that correction tables are keyed by, such as "openvino-f32". Raises EngineError as open_engine does."""
    chosen = find_backend(backend)
    remainder = remainder or chosen.remainders[0]
    if remainder not in chosen.remainders:
        able = ", ".join(b.name for b in BACKENDS.values() if remainder in b.remainders)
        raise EngineError(
            f"{backend}: computes its float layers in {', '.join(chosen.remainders)} only, {remainder} was asked for. "
            f"Choose another backend ({able or 'none has it'})."
        )
    return f"{backend}-{remainder}"


def find_backend(name: str) -> Backend:
    """The backend of that name. Raises EngineError naming those that exist."""
    if name not in BACKENDS:
        raise EngineError(f"backend {name!r}: unknown. Choose one of {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def default_backend() -> str:
    """The first backend that this machine has. Raises BackendMissing if it has none."""
    for backend in BACKENDS.values():
        if backend_status(backend).missing is None:
            return backend.name
    raise BackendMissing(f"no inference engine on this machine. Install one: {BACKENDS['openvino'].install}")


def torch_backend() -> str:
    """torch on the GPU where it has one, else on the CPU: what can read and differentiate every tensor of a graph."""
    return "torch" if backend_status(BACKENDS["torch-cuda"]).missing else "torch-cuda"


def computing_backend() -> str:
    """What exporting runs networks on: the GPU that torch has, else the default. CUDA_VISIBLE_DEVICES= hides the GPU.

    Raises: BackendMissing as default_backend does.
    """
    gpu = torch_backend()
    return gpu if BACKENDS[gpu].device == "gpu" else default_backend()


def available_backends() -> tuple[BackendStatus, ...]:
    """Every backend and whether it works here, found by importing its library (torch takes a second or two)."""
    return tuple(backend_status(backend) for backend in BACKENDS.values())


def backend_status(backend: Backend) -> BackendStatus:
    """Never raises: a GPU whose memory is taken is missing like one that is not there, and the next backend may do."""
    try:
        version = engine_class(backend).library_version(backend)
    except EngineError as exc:
        return BackendStatus(backend.name, None, str(exc))
    return BackendStatus(backend.name, version, None)


def usable_remainders(backend: Backend) -> tuple[Remainder, ...]:
    """The precisions of the float layers that this machine has the arithmetic for. Raises as engine_class does."""
    engine = engine_class(backend)
    return tuple(remainder for remainder in backend.remainders if engine.computes(remainder))


def engine_class(backend: Backend) -> type[BaseEngine]:
    """Raises BackendMissing if its module cannot be imported here."""
    found: type[BaseEngine] = getattr(_import(backend), backend.engine)
    return found


def check_feeds(path: Path, inputs: Mapping[str, TensorSpec], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds in the order of `inputs`, those of the host as contiguous arrays, or an EngineError that says which
    does not fit.
    """
    if wrong := sorted(set(feeds) ^ set(inputs)):
        found = "unknown input" if wrong[0] in feeds else "nothing fed to input"
        raise EngineError(f"{path}: {found} {wrong[0]!r}. Its inputs are {', '.join(inputs)}.")
    checked: dict[str, Array] = {}
    free: dict[str, int] = {}
    for name, spec in inputs.items():
        array = feeds[name]
        if not hasattr(type(array), "__cuda_array_interface__"):
            array = np.asarray(array, order="C")
        fits = len(array.shape) == len(spec.shape) and all(
            size == (free.setdefault(want, size) if isinstance(want, str) else want)
            for size, want in zip(array.shape, spec.shape, strict=True)
        )
        if not fits or array.dtype.name != spec.dtype:
            wanted = "x".join(str(n) for n in spec.shape) or "a scalar"
            found = "x".join(str(n) for n in array.shape) or "a scalar"
            raise EngineError(
                f"{path}: input {name!r} is {array.dtype.name} {found}, expected {spec.dtype} {wanted}"
                + (f" with {', '.join(f'{k} = {v}' for k, v in free.items())}" if free else "")
                + "."
            )
        checked[name] = array
    return checked


def _import(backend: Backend) -> object:
    try:
        return importlib.import_module(backend.module)
    except (ImportError, OSError) as exc:  # OSError: a shared library that the package needs is absent
        raise BackendMissing(
            f"{backend.name}: not usable on this machine ({first_line(exc)}). Install it: {backend.install}"
        ) from exc


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # JetPack's and conda's builds may come without metadata
        return None

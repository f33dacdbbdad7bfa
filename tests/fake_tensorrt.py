"""A TensorRT that is not there, on fake_cupy's device: its protocol of named tensors, addresses and streams.

A plan is JSON that holds an ONNX graph; ONNX Runtime computes it, on what the bound addresses hold when the stream
comes to it. What the library refuses with None or False and a line in its log is refused so here.
"""

from __future__ import annotations

import base64
import enum
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qncd_deploy.engines.base import Kernel
from qncd_deploy.engines.trt import run
from qncd_deploy.engines.trt.build import BuiltEngine
from qncd_deploy.engines.trt.cuda import DeviceArrays
from qncd_deploy.engines.trt.device import Device
from qncd_deploy.engines.trt.kernels import Demands, KernelTable
from qncd_deploy.engines.trt.library import Library
from qncd_deploy.engines.trt.options import BuildOptions
from qncd_deploy.engines.trt.store import EngineFacts, save_engine
from qncd_deploy.pipeline import build as pipeline_build
from qncd_deploy.pipeline import parity
from qncd_deploy.specs import TensorSpec

TABLE = KernelTable((Kernel("correlation", "i8", "fake", 2),), 2, (), (), 0, 0)
GPU = Device(name="Fake GPU", sm="sm86", memory=1 << 34, cuda="12.6")

Profile = Mapping[str, Sequence[Sequence[int]]]
"""Input -> smallest, best and largest shape."""

DTYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}


def plan(
    graph: Path,
    profiles: Sequence[Profile],
    *,
    version: str = "10.13.2",
    device: str = "sm86",
    kind: str = "tensorrt",
    version_compatible: bool = False,
) -> bytes:
    """What a builder would have made of a graph."""
    model = base64.b64encode(onnx.load(graph).SerializeToString()).decode()
    facts = {"graph": model, "profiles": list(profiles), "version": version, "device": device, "kind": kind}
    facts["version_compatible"] = version_compatible
    return b"PLAN" + json.dumps(facts).encode()


def fixed(**shapes: Sequence[int]) -> Profile:
    """The profile of static shapes."""
    return {name: [shape] * 3 for name, shape in shapes.items()}


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class RuntimeCache:
    """What was compiled just in time; of one version, or not taken."""

    def __init__(self, version: str) -> None:
        self.wanted = f"cache of {version}".encode()
        self.filled = False

    def deserialize(self, blob: bytes) -> bool:
        self.filled = blob == self.wanted
        return self.filled

    def serialize(self) -> bytes:
        return self.wanted if self.filled else b"empty"


class RuntimeConfig:
    def __init__(self, version: str) -> None:
        self.version = version
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.version)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    def __init__(self, log: Any, facts: dict[str, Any]) -> None:
        self.log = log
        self.version = facts["version"]
        self.profiles = facts["profiles"]
        self.session = ort.InferenceSession(base64.b64decode(facts["graph"]), providers=["CPUExecutionProvider"])
        self.nodes = {node.name: node for node in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.input_names = [node.name for node in self.session.get_inputs()]
        self.num_io_tensors = len(self.nodes)
        self.num_optimization_profiles = len(self.profiles)
        self.contexts: list[Context] = []
        self.memory_left = True

    def get_tensor_name(self, index: int) -> str:
        return list(self.nodes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.input_names else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[DTYPES[self.nodes[name].type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = self.nodes[name].shape
        free = tuple(-1 if not isinstance(size, int) else size for size in shape)
        if name not in self.input_names:
            return free
        sizes = [{tuple(profile[name][kind]) for profile in self.profiles for kind in (0, 2)}]
        return tuple(free if len(sizes[0]) > 1 else next(iter(sizes[0])))

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.profiles[index][name]]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.version)

    def create_execution_context(self, runtime_config: RuntimeConfig | None = None) -> Context | None:
        if not self.memory_left:
            self.log.log(Severity.ERROR, "[allocate::73] Error Code 1: Cuda Runtime (out of memory)")
            return None
        self.contexts.append(Context(self, runtime_config))
        return self.contexts[-1]


class Context:
    """Every call's inputs must have been given shapes within the profile and addresses of the right size."""

    def __init__(self, engine: Engine, config: RuntimeConfig | None) -> None:
        self.engine = engine
        self.config = config
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.enqueued = 0
        self.fails = False
        self.capturable = True
        self.seen: set[int] = set()

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in fake_cupy.Stream.by_handle
        self.profile = index
        return index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        feeds = {
            n: np.ones(self.shapes[n], NUMPY[self.engine.get_tensor_dtype(n).name]) for n in self.engine.input_names
        }
        return self.engine.session.run([name], feeds)[0].shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.nodes

    def execute_async_v3(self, stream: int) -> bool:
        queue = fake_cupy.Stream.by_handle[stream]
        if self.fails or (queue.captured is not None and not self.capturable):
            self.engine.log.log(Severity.ERROR, "enqueueV3: Error Code 1: Cask (kernel launch failed)")
            return False
        self.enqueued += 1
        self.seen |= {max(self.shapes.values(), key=len)[0]}
        queue.put(self._run)
        if self.config is not None and self.config.cache is not None:
            self.config.cache.filled = True
        return True

    def _run(self) -> None:
        held = {name: fake_cupy.MEMORY.held[address] for name, address in self.addresses.items()}
        feeds = {name: held[name] for name in self.engine.input_names}
        assert {name: array.shape for name, array in feeds.items()} == self.shapes
        outputs = [name for name in self.engine.nodes if name not in feeds]
        for name, result in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
            np.copyto(held[name], result)


class TensorRT:
    """The module. kind: "tensorrt" or "tensorrt-rtx";  device: the GPU's compute capability."""

    ILogger = ILogger
    DataType = DataType
    TensorIOMode = TensorIOMode
    CudaGraphStrategy = CudaGraphStrategy

    def __init__(self, version: str = "10.13.2", *, kind: str = "tensorrt", device: str = "sm86") -> None:
        self.__version__ = version
        self.kind = kind
        self.device = device
        self.engines: list[Engine] = []
        self.memory_left = True

    def Runtime(self, log: Any) -> Runtime:
        return Runtime(self, log)


class Runtime:
    def __init__(self, library: TensorRT, log: Any) -> None:
        self.library = library
        self.log = log
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, blob: bytes) -> Engine | None:
        def refuse(words: str) -> None:
            self.log.log(Severity.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization ({words})")

        if not blob.startswith(b"PLAN"):
            return refuse("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
        try:
            facts = json.loads(blob[4:])
        except ValueError:
            return refuse("Serialization assertion sizeRead == static_cast<uint64_t>(mEngineSize) failed.")
        if facts["version"] != self.library.__version__ or facts["kind"] != self.library.kind:
            return refuse(f"The engine plan file is not compatible: expecting version {self.library.__version__}")
        if facts["device"] != self.library.device:
            return refuse(f"The engine was built for {facts['device']}, this device is {self.library.device}")
        if facts["version_compatible"] and not self.engine_host_code_allowed:
            return refuse("host code is not allowed in version compatible engines")
        if not self.library.memory_left:
            self.log.log(
                Severity.ERROR, "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"
            )
            return refuse("allocation")
        self.library.engines.append(Engine(self.log, facts))
        return self.library.engines[-1]


class Machine:
    """A GPU and a TensorRT; its builder takes any graph that ONNX Runtime takes.

    builds: the shapes of every engine that was built, in order;  asked: their graphs' names, options, and how many
    engines were loaded before;  watched: the inner tensors that were asked for;
    read: the graphs whose inputs and outputs a builder was asked for;
    tamper: changes what is built of unet-trt.onnx, as a builder with a fault would.
    """

    def __init__(self, kind: str) -> None:
        version = {"tensorrt": (10, 13, 2), "tensorrt-rtx": (1, 7, 1)}[kind]
        self.module = TensorRT(".".join(map(str, version)), kind=kind)
        self.library = Library(kind, self.module, version)
        self.arrays = DeviceArrays(fake_cupy, GPU)
        self.builds: list[Mapping[str, tuple[int, ...]]] = []
        self.asked: list[tuple[str, BuildOptions, int]] = []
        self.watched: list[Sequence[str]] = []
        self.read: list[Path] = []
        self.tamper: Callable[[onnx.ModelProto], None] | None = None
        self._scratch = tempfile.TemporaryDirectory()

    @property
    def waits(self) -> int:
        """How often something waited for the device."""
        return self.arrays._stream.waits

    def graph_specs(self, library: Library, path: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        self.read.append(path)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        inputs, outputs = (
            [TensorSpec(node.name, NUMPY[DTYPES[node.type]], tuple(node.shape)) for node in nodes]
            for nodes in (session.get_inputs(), session.get_outputs())
        )
        return {spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs}

    def product_tensors(self, library: Library, path: Path) -> tuple[str, ...]:
        nodes = onnx.load(path, load_external_data=False).graph.node
        return tuple(node.output[0] for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul"))

    def build(
        self, library: Library, path: Path, options: BuildOptions, *, watch: Sequence[str] = (), **_: Any
    ) -> BuiltEngine:
        self.builds += options.profiles
        self.asked.append((path.name, options, len(self.module.engines)))
        self.watched += [watch] if watch else []
        tamper = self.tamper if path.name == "unet-trt.onnx" else None
        if watch or tamper:
            model = onnx.load(path)
            if tamper is not None:
                tamper(model)
            model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in watch)
            path = Path(self._scratch.name) / f"{len(self.builds)}.onnx"
            onnx.save(model, path)
        profiles = [fixed(**shapes) for shapes in options.profiles]
        blob = plan(
            path,
            profiles,
            version=self.module.__version__,
            kind=self.module.kind,
            version_compatible=options.version_compatible,
        )
        return BuiltEngine(blob, options, Demands((), ()), TABLE)

    def store(
        self, path: Path, graph: Path, *profiles: Mapping[str, tuple[int, ...]], source: str = "graph", **how: Any
    ) -> Path:
        """An engine as `qncd build` keeps it. profiles: input -> shape;  how: of BuildOptions."""
        options = BuildOptions(profiles=profiles, **how)
        built = self.build(self.library, graph, options)
        self.builds.clear()
        save_engine(path, built, EngineFacts.of(self.library, GPU, options, source=source))
        return path


def install(monkeypatch: pytest.MonkeyPatch, kind: str = "tensorrt") -> Machine:
    """Put one in the place of the libraries, wherever they are asked for."""
    machine = Machine(kind)
    for module in (run, parity, pipeline_build):
        for name, stand_in in (
            ("open_library", lambda flavour: machine.library),
            ("open_arrays", lambda: machine.arrays),
            ("find_device", lambda: GPU),
            ("graph_specs", machine.graph_specs),
            ("product_tensors", machine.product_tensors),
            ("build_engine" if module is pipeline_build else "build", machine.build),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    return machine

"""The building half of full TensorRT, which cannot run without a GPU: a network of one quantized convolution.

It has the names that the vendor's bindings of its version have and no others, follows a script of what becomes of each
build, and keeps what it was asked for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from trt_bindings import RECORD

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))

CONVOLUTION = {  # as trtexec --exportLayerInfo writes an INT8 convolution
    "Name": "conv + relu",
    "LayerType": "CaskConvolution",
    "Inputs": [
        {
            "Name": "x_q",
            "Location": "Device",
            "Dimensions": [1, 8, 4, 4],
            "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format",
        }
    ],
    "Outputs": [
        {
            "Name": "y",
            "Location": "Device",
            "Dimensions": [1, 8, 4, 4],
            "Format/Datatype": "Channel major FP16 format where channel % 8 == 0",
        }
    ],
    "ParameterType": "Convolution",
    "Weights": {"Type": "Int8", "Count": 576},
    "Bias": {"Type": "Float", "Count": 8},
    "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tilesize64x64x64",
    "TacticValue": "0x4749124f62d8bd23",
    "StreamId": 0,
    "Metadata": "[ONNX Layer: conv]\x1e[ONNX Layer: relu]",
}


class _Enum:
    """Values of an enum of the bindings; each knows its name and its number."""

    def __init__(self, *names: str) -> None:
        for number, name in enumerate(names):
            setattr(self, name, _Value(number, name))


class _Value(int):
    def __new__(cls, number: int, name: str) -> _Value:
        value = super().__new__(cls, number)
        value.name = name  # type: ignore[attr-defined]
        return value

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __str__(self) -> str:
        return f"DataType.{self.name}"  # type: ignore[attr-defined]


class _Base:
    pass


class FakeTensorRT:
    """script: for each build its plan, or the lines it fails with, [W] marking warnings;  builds: what each was
    asked for;  thread: the one that the last was in.

    Options: layers (what the inspector tells), foreign_caches (timing caches it refuses), during (called with the
    monitor while it builds), shape (of the input), broken (the class that cannot start).
    """

    def __init__(self, version: str, script: Sequence[bytes | Sequence[str]] = (b"plan",), **options: Any) -> None:
        self.__version__ = version
        self._names, self._script = set(RECORDED[version]), list(script)
        self.builds: list[dict[str, Any]] = []
        self.thread: threading.Thread | None = None
        self.layers: list[Any] = options.get("layers", [CONVOLUTION])
        self.foreign_caches: tuple[bytes, ...] = options.get("foreign_caches", ())
        self.during = options.get("during", lambda monitor: None)
        self.broken: str | None = options.get("broken")
        self.shape: tuple[int, ...] = options.get("shape", (-1, 8, 4, 4))
        self.NetworkDefinitionCreationFlag = _Enum("EXPLICIT_BATCH", "STRONGLY_TYPED")
        self.BuilderFlag = _Enum("FP16", "INT8", "TF32", "VERSION_COMPATIBLE")
        self.ProfilingVerbosity = _Enum("LAYER_NAMES_ONLY", "NONE", "DETAILED")
        self.MemoryPoolType = _Enum("WORKSPACE")
        self.HardwareCompatibilityLevel = _Enum("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")
        self.LayerInformationFormat = _Enum("ONELINE", "JSON")
        self.LayerType = _Enum("CONSTANT", "CONVOLUTION", "MATRIX_MULTIPLY", "DEQUANTIZE", "SHUFFLE", "SOFTMAX")
        self.DataType = _Enum("FLOAT", "HALF", "INT8")
        self.ILogger = type("ILogger", (_Base,), {"Severity": _Enum("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")})
        self.IProgressMonitor = _Base
        self.nptype = {self.DataType.FLOAT: np.float32}.__getitem__

    def Builder(self, log: Any) -> Any:
        self._start("Builder", log)
        return _Builder(self, log)

    def OnnxParser(self, network: _Network, log: Any) -> Any:
        self._start("OnnxParser", log)
        return SimpleNamespace(parse_from_file=lambda path: True, num_errors=0)

    def Runtime(self, log: Any) -> Any:
        self._start("Runtime", log)
        inspector = SimpleNamespace(
            get_engine_information=lambda form: json.dumps({"Layers": self.layers, "Bindings": []})
        )
        engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
        runtime = SimpleNamespace(engine_host_code_allowed=False)

        def load(plan: bytes) -> Any:
            if "VERSION_COMPATIBLE" in self.builds[-1]["set"] and not runtime.engine_host_code_allowed:
                log.log(self.ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: host code is not allowed")
                return None
            return engine

        runtime.deserialize_cuda_engine = load
        return runtime

    def _start(self, name: str, log: Any) -> None:
        """As pybind11 does it where the library returns a null pointer."""
        if name == self.broken:
            log.log(self.ILogger.Severity.ERROR, "first")
            log.log(self.ILogger.Severity.WARNING, "CUDA initialization failure with error: 35")
            log.log(self.ILogger.Severity.INFO, "last")
            raise TypeError("pybind11::init(): factory function returned nullptr")


class _Builder:
    def __init__(self, trt: FakeTensorRT, log: Any) -> None:
        self._trt, self._log = trt, log

    def create_network(self, flags: int) -> _Network:
        return _Network(self._trt, flags)

    def create_builder_config(self) -> _Config:
        return _Config(self._trt)

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, tuple[Any, ...]] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *bounds: shapes.update({name: bounds}))

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        self._trt.builds.append({"flags": network.flags, "shape": network.input.shape, **config.asked})
        self._trt.thread = threading.current_thread()
        monitor = config.asked["progress_monitor"]
        monitor.phase_start("Building Engine", None, 2)
        self._trt.during(monitor)
        going_on = [monitor.step_complete("Building Engine", step) for step in range(2)]
        monitor.phase_finish("Building Engine")
        outcome = self._trt._script.pop(0)
        if isinstance(outcome, bytes) and all(going_on):
            return outcome
        for line in [] if isinstance(outcome, bytes) else outcome:
            severity = self._trt.ILogger.Severity
            self._log.log(severity.WARNING if line.startswith("[W]") else severity.ERROR, line)
        return None


class _Config:
    """Takes what the bindings take, and refuses what they do not have."""

    def __init__(self, trt: FakeTensorRT) -> None:
        vars(self).update(_trt=trt, asked={"set": [], "cleared": [], "profiles": [], "caches": []})

    def __setattr__(self, name: str, value: Any) -> None:
        assert f"IBuilderConfig.{name}" in self._trt._names, name
        self.asked[name] = value

    def set_flag(self, flag: _Value) -> None:
        self.asked["set"].append(flag.name)

    def clear_flag(self, flag: _Value) -> None:
        self.asked["cleared"].append(flag.name)

    def set_memory_pool_limit(self, pool: _Value, size: int) -> None:
        self.asked[pool.name] = size

    def add_optimization_profile(self, profile: Any) -> None:
        self.asked["profiles"].append(profile.shapes)

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(content=content, serialize=lambda: content + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content in self._trt.foreign_caches:
            return False
        self.asked["caches"].append(cache.content)
        return True


class _Network:
    """x -> Q -> DQ -> conv <- DQ <- w."""

    def __init__(self, trt: FakeTensorRT, flags: int) -> None:
        self.flags = flags
        types, kinds = trt.DataType, trt.LayerType

        def tensor(name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
            return SimpleNamespace(name=name, dtype=dtype, shape=shape, get_dimension_name=lambda axis: "")

        def layer(name: str, kind: Any, inputs: Sequence[Any], output: Any) -> Any:
            return SimpleNamespace(
                name=name,
                type=kind,
                num_inputs=len(inputs),
                get_input=inputs.__getitem__,
                num_outputs=1,
                get_output=lambda index: output,
            )

        self.input = tensor("x", types.FLOAT, trt.shape)
        x_q, w_q = tensor("x_q", types.INT8, (-1, 8, 4, 4)), tensor("w_q", types.INT8, (8, 8, 3, 3))
        x_dq, w_dq = tensor("x_dq", types.HALF, (-1, 8, 4, 4)), tensor("w_dq", types.HALF, (8, 8, 3, 3))
        y = tensor("y", types.FLOAT, (-1, 8, 4, 4))
        self._layers = [
            layer("w_q", kinds.CONSTANT, [], w_q),
            layer("dq", kinds.DEQUANTIZE, [x_q], x_dq),
            layer("w_dq", kinds.DEQUANTIZE, [w_q], w_dq),
            layer("conv", kinds.CONVOLUTION, [x_dq, w_dq], y),
        ]
        self.num_inputs = self.num_outputs = 1
        self.num_layers = len(self._layers)
        self.get_layer = self._layers.__getitem__
        self.get_input = [self.input].__getitem__
        self.get_output = [y].__getitem__

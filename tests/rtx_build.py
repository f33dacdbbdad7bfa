"""Build an ONNX file with TensorRT for RTX, which needs no GPU, and read from its log what the kernels compute in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tensorrt_rtx as trt

TARGETS = ("SM86", "SM89", "SM120")

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Build:
    """The serialized engine, and (data type, weight type) of every kernel as the log has it."""

    plan: bytes
    convolutions: tuple[tuple[str, str], ...]
    matmuls: tuple[tuple[str, str], ...]


class _Log(trt.ILogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        self.lines.append(message)


def build(path: Path, shapes: Shapes, *, targets: tuple[str, ...] = TARGETS) -> Build:
    """Parse and build for the compute capabilities named; shapes: input name -> (least, usual, most)."""
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)  # always strongly typed
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        error = parser.get_error(0)
        raise ValueError(f"{error.node_name()} [{error.node_operator()}]: {error.desc()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, least, usual, most)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("\n".join(log.lines[-5:]))
    text = "\n".join(log.lines)
    return Build(bytes(plan), tuple(_kernels(text, "correlation")), tuple(_kernels(text, "gemm")))


def _kernels(text: str, kind: str) -> Iterator[tuple[str, str]]:
    """A kernel's line reads: LayerType: gemm, Inputs: [ {.. Datatype: Int8}, ..], Constants: [..], Outputs: [..]."""
    for match in re.finditer(rf"LayerType: {kind}, Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs", text):
        types = [re.findall(r"Datatype: (\w+)", part) for part in match.groups()]
        yield types[0][0], (types[1] or types[0][1:])[0]

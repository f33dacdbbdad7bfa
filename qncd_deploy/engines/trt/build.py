"""ONNX to engine, on this machine's GPU or, with TensorRT for RTX, ahead of time for GPUs named by compute capability.

Shapes are fixed: each profile is one shape of every input, and a single profile makes a static network. Types are the
graph's alone (strongly typed, no precision flag), and float32 products are never rounded to TF32. Polygraphy's loaders
are not used: they choose between the two libraries for the whole process, by a variable of its environment, and send
the builder's log, which tells the kernels, to a logger of their own.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.engines.trt.kernels import (
    Demands,
    KernelTable,
    Layer,
    demands_of,
    kernel_table,
    layers_from_inspector,
    layers_from_log,
)
from qncd_deploy.engines.trt.library import Library, LogLine, out_of_memory
from qncd_deploy.engines.trt.monitor import TICKS, Watched, in_worker
from qncd_deploy.engines.trt.options import DEFAULT_LEVEL, HARDWARE, BuildOptions, Shapes, check_options
from qncd_deploy.errors import BuildFailed, BundleError, EngineError, UsageError, first_line
from qncd_deploy.files import atomic_file, make_folder
from qncd_deploy.specs import TensorSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltEngine:
    """plan: the serialized engine;  options: as asked, or what it took when memory was short;  table: what runs."""

    plan: bytes
    options: BuildOptions
    demands: Demands
    table: KernelTable


def build(
    library: Library,
    path: Path,
    options: BuildOptions,
    *,
    memory: int | None = None,
    watch: Sequence[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> BuiltEngine:
    """Build an ONNX graph. When memory runs out it is tried again with less workspace and a lower level.

    memory: of the GPU, in bytes, which workspace is halved from if none was named;  watch: tensors of the graph to make
    outputs, too;  on_progress: told steps done and in all, from threads of the builder's, one at a time; what it raises
    stops the build, and so does Ctrl-C.

    Raises: UsageError for options that this library does not have, and for sm75 among the targets of an INT8 graph;
    EngineError for shapes that the graph does not take;  BuildFailed, naming the node where the library does, if it
    refuses the graph or memory does not suffice;  BackendMissing if it cannot start.
    """
    check_options(library, options)
    attempts = [options, *_smaller(options, memory)]
    for attempt in attempts:
        try:
            limited = attempt is options and options.workspace is not None
            return in_worker(partial(_build, library, path, attempt, watch, on_progress, limited))
        except _OutOfMemory as exc:
            where = exc.node or "the network"
    workspace = "" if attempt.workspace is None else f"{attempt.workspace >> 20} MiB of workspace and "
    raise BuildFailed(
        f"{path}: {where}: out of memory, with {workspace}optimization level {attempt.level} too. Close what else uses "
        "the GPU, or build for fewer pictures at a time with --batch."
    )


def graph_specs(library: Library, path: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs of an ONNX graph as the library reads it. Raises BuildFailed if it does not."""
    lines = list[LogLine]()
    logger = library.logger(lines)
    _, network = _read(library, path, logger, lines)

    def specs(tensors: Iterable[Any]) -> dict[str, TensorSpec]:
        return {tensor.name: TensorSpec(tensor.name, _dtype(library, tensor), _shape(tensor)) for tensor in tensors}

    return specs(_inputs(network)), specs(network.get_output(index) for index in range(network.num_outputs))


def product_tensors(library: Library, path: Path) -> tuple[str, ...]:
    """Results of an ONNX graph's convolutions and matrix products, in its order: tensors that `watch` takes.

    Raises BuildFailed if the library does not read it.
    """
    lines = list[LogLine]()
    logger = library.logger(lines)
    _, network = _read(library, path, logger, lines)
    return tuple(product.output for product in demands_of(library, network).products)


class _OutOfMemory(Exception):
    def __init__(self, node: str | None) -> None:
        self.node = node


def _smaller(options: BuildOptions, memory: int | None) -> Iterator[BuildOptions]:
    """What to try next, each with half the workspace and a lower level than the one before."""
    workspace, level = options.workspace or memory, DEFAULT_LEVEL if options.level is None else options.level
    for step in range(1, _RETRIES + 1):
        yield replace(options, workspace=None if workspace is None else workspace >> step, level=max(0, level - step))


_RETRIES = 3


def _build(
    library: Library,
    path: Path,
    options: BuildOptions,
    watch: Sequence[str],
    on_progress: Callable[[int, int], None] | None,
    limited: bool,
    stopped: threading.Event,
) -> BuiltEngine:
    lines = list[LogLine]()
    logger = library.logger(lines)
    builder, network = _read(library, path, logger, lines)
    demands = demands_of(library, network)
    mixed = len(options.targets) > 1 and "sm75" in options.targets
    if mixed and any(product.planned for product in demands.products):
        raise UsageError(
            "--target sm75: it has no INT8 convolutions in TensorRT for RTX, and one engine for several targets would "
            "lose them for all. Build for it alone."
        )
    _mark(network, watch, path)
    config = builder.create_builder_config()
    _configure(library, config, options)
    _set_shapes(builder, network, config, options.profiles, path)
    cache = _timing_cache(library, config, options.timing_cache)
    watched = Watched(library, stopped, on_progress)
    config.progress_monitor = watched.monitor
    plan = builder.build_serialized_network(network, config)
    if watched.raised is not None:
        raise watched.raised
    if plan is None:
        raise _failure(lines, path, limited=limited)
    if on_progress is not None:
        on_progress(TICKS, TICKS)
    if cache is not None and options.timing_cache is not None:
        _keep_timings(options.timing_cache, bytes(cache.serialize()))
    content = bytes(plan)
    layers = layers_from_log(lines) if library.ahead_of_time else _inspected(library, content, options)
    return BuiltEngine(content, options, demands, kernel_table(demands, layers))


def _read(library: Library, path: Path, logger: Any, lines: Sequence[LogLine]) -> tuple[Any, Any]:
    """A builder and the network that the parser made of a graph; types are the graph's, whatever the version."""
    trt = library.module
    builder = library.make("Builder", logger, lines=lines)
    flags = 0
    if library.uses("NetworkDefinitionCreationFlag.STRONGLY_TYPED"):
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = library.make("OnnxParser", network, logger, lines=lines)
    if not parser.parse_from_file(str(path)):
        why = _first_error(lines)
        if parser.num_errors:
            error = parser.get_error(0)
            where = f"{error.node_name()} [{error.node_operator()}]: " if error.node_operator() else ""
            why = where + first_line(Exception(error.desc()))
        raise BuildFailed(f"{path}: {library.flavour} cannot read it ({why}).")
    if not network.num_outputs:  # which the parser makes of an empty file
        raise BuildFailed(f"{path}: {library.flavour} cannot read it (no graph in it).")
    return builder, network


def _mark(network: Any, names: Sequence[str], path: Path) -> None:
    tensors = {}
    for index in range(network.num_layers if names else 0):
        layer = network.get_layer(index)
        tensors.update({layer.get_output(i).name: layer.get_output(i) for i in range(layer.num_outputs)})
    for name in names:
        if name not in tensors:
            raise EngineError(f"{path}: no tensor {name!r} to watch.")
        network.mark_output(tensors[name])


def _configure(library: Library, config: Any, options: BuildOptions) -> None:
    trt = library.module
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.hardware != "none":
        level = HARDWARE[options.hardware].rpartition(".")[2]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _set_shapes(builder: Any, network: Any, config: Any, profiles: tuple[Shapes, ...], path: Path) -> None:
    inputs = _inputs(network)
    for shapes in profiles:
        for tensor in inputs:
            asked, fixed = shapes.get(tensor.name), tuple(tensor.shape)
            if asked is None or not _fits(asked, fixed):
                takes = "x".join("any" if size < 0 else str(size) for size in fixed) or "a scalar"
                found = "no shape" if asked is None else "x".join(map(str, asked))
                raise EngineError(f"{path}: input {tensor.name!r} takes {takes}, {found} was asked for.")
    if len(profiles) == 1:
        for tensor in inputs:
            tensor.shape = profiles[0][tensor.name]
        return
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            profile.set_shape(tensor.name, *3 * [shapes[tensor.name]])
        config.add_optimization_profile(profile)


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(index) for index in range(network.num_inputs)]


def _shape(tensor: Any) -> tuple[int | str, ...]:
    """With names for free sizes: the graph's own, where the parser keeps them; the first is the batch."""
    names = (
        tensor.get_dimension_name(axis) or (f"dim{axis}" if axis else "batch") for axis in range(len(tensor.shape))
    )
    return tuple(size if size >= 0 else name for size, name in zip(tensor.shape, names, strict=True))


def _dtype(library: Library, tensor: Any) -> str:
    return np.dtype(library.module.nptype(tensor.dtype)).name


def _fits(asked: tuple[int, ...], fixed: tuple[int, ...]) -> bool:
    """Whether a shape agrees with one in which free sizes are -1."""
    return len(asked) == len(fixed) and all(size in (-1, want) for want, size in zip(asked, fixed, strict=True))


def _timing_cache(library: Library, config: Any, path: Path | None) -> Any:
    """The cache in use, None where there is none. What cannot be read, or is of another version or GPU, is replaced."""
    if path is None or not library.uses("IBuilderConfig.set_timing_cache"):
        return None
    held = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(held)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _keep_timings(path: Path, content: bytes) -> None:
    try:
        make_folder(path.parent)
        with atomic_file(path) as unfinished:
            unfinished.write_bytes(content)
    except BundleError as exc:  # the engine is worth more than the minutes that the next build will take
        log.info("%s: not written (%s), so the next build measures kernels again", path, exc)


def _inspected(library: Library, plan: bytes, options: BuildOptions) -> tuple[Layer, ...]:
    trt, lines = library.module, list[LogLine]()
    runtime = library.runtime(library.logger(lines), lines=lines, version_compatible=options.version_compatible)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildFailed(f"{library.flavour}: cannot load the engine that it built ({_first_error(lines)}).")
    try:
        return layers_from_inspector(
            engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        )
    except EngineError as exc:  # the engine is worth more than a report on it
        log.info("its kernels are not known: %s", exc)
        return ()


def _failure(lines: Sequence[LogLine], path: Path, *, limited: bool) -> Exception:
    """limited: the user said how much workspace there is. Else too little of it means too little memory: TensorRT then
    takes what the GPU has.
    """
    errors = [line for line in lines if line.is_error]
    text = "\n".join(line.text for line in errors)
    found = _NODE.search(text)
    node = None if found is None else found[1] or found[2]
    short = _NO_WORKSPACE.search(text)
    if short and limited:
        where = node or "the network"
        return BuildFailed(f"{path}: {where}: no kernel fits into the workspace. Raise --workspace, or leave it out.")
    if short or out_of_memory(errors):
        return _OutOfMemory(node)
    return BuildFailed(f"{path}: TensorRT cannot build it ({_first_error(lines)}).")


_NODE = re.compile(r"implementation for node (?:\{ForeignNode\[(.+?)\]\}|(\S+?))[.)]*(?:\s|$)")
_NO_WORKSPACE = re.compile("insufficient workspace", re.IGNORECASE)


def _first_error(lines: Sequence[LogLine]) -> str:
    return first_line(Exception(next((line.text for line in lines if line.is_error), "it does not say why")))

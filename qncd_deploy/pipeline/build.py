"""Compile a bundle's networks, for this machine or ahead of time for others, and keep the results; no torch."""

from __future__ import annotations

import logging
import platform
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qncd_deploy.engines.base import Remainder, backend_status, find_backend, make_engine_id
from qncd_deploy.engines.eps_model import fixed_rows, input_shapes
from qncd_deploy.engines.text import ROWS as TEXTS
from qncd_deploy.engines.trt.build import build as build_engine
from qncd_deploy.engines.trt.build import graph_specs
from qncd_deploy.engines.trt.device import Device, find_device
from qncd_deploy.engines.trt.library import Library, open_library
from qncd_deploy.engines.trt.options import TARGETS, BuildOptions, Hardware, check_options, trtexec_line
from qncd_deploy.engines.trt.store import SUFFIX, EngineFacts, held_engine, save_engine
from qncd_deploy.errors import BackendMissing, EngineError, UsageError
from qncd_deploy.files import make_folder
from qncd_deploy.pipeline.parity import Gate, Parity
from qncd_deploy.pipeline.progress import Progress
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import default_batch
from qncd_deploy.specs import TensorSpec

log = logging.getLogger(__name__)

FLAVOURS = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class BuildRequest:
    """What to build, and for whom.

    remainder: None for the backend's own;  batches: pictures at a time, () for the sampler's own;  threads: of a CPU.
    For TensorRT alone: targets ... version_compatible, as in BuildOptions.
    """

    backend: str
    remainder: Remainder | None = None
    batches: tuple[int, ...] = ()
    threads: int | None = None
    targets: tuple[str, ...] = ()
    level: int | None = None
    workspace: int | None = None
    hardware: Hardware = "none"
    version_compatible: bool = False


@dataclass(frozen=True)
class Built:
    """A compiled engine. runs: what it computes in, in words;  missed: planned layers that run otherwise;
    seconds: None if it was there already, made of the same graph for the same machine.
    """

    path: Path
    bytes: int
    integer_kernels: int
    planned_layers: int
    runs: str
    missed: tuple[str, ...]
    seconds: float | None
    parity: Parity | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def line(self) -> str:
        how = "up to date" if self.seconds is None else f"built in {self.seconds:.1f} s"
        return f"{self.path}  {self.bytes / 2**20:.1f} MiB  {how}  {self.runs}"


def build(bundle: Bundle, folder: Path, request: BuildRequest, progress: Progress) -> tuple[Built, ...]:
    """Write to FOLDER what is not there yet, or is there for something else; the network first.

    What TensorRT builds and the GPU of this machine runs is held against the float network before it is written, if
    the bundle can sample.

    Raises: EngineError for a backend that compiles nothing or a GPU that is not there, BuildFailed if it refuses the
    graph, UsageError for options that the backend does not have, GateFailed for an engine that is wrong.
    """
    if request.backend in FLAVOURS:
        library, device = _library(request)
        gate = _gate(bundle, request, device)
        jobs = _jobs(bundle, folder, request, library, device)
        return tuple(_engine(job, library, device, gate, progress) for job in jobs)
    _refuse_gpu_options(request)
    with progress.stage(f"building for {request.backend}"):
        widths = (None,) if bundle.stepping is None else tuple(reversed(bundle.stepping.suffixes))
        return tuple(
            _blob(bundle, folder, request, batch, bits) for batch in request.batches or (None,) for bits in widths
        )


def trtexec_lines(bundle: Bundle, folder: Path, request: BuildRequest) -> tuple[str, ...]:
    """What the vendor's own tool would be called with for each engine; nothing is built. Raises as build does."""
    if request.backend not in FLAVOURS:
        raise UsageError(f"--trtexec: {request.backend} is not TensorRT. Leave it out.")
    library, device = _library(request)
    jobs = _jobs(bundle, folder, request, library, device)
    return tuple(trtexec_line(library, job.graph, job.path, job.options) for job in jobs)


def _blob(bundle: Bundle, folder: Path, request: BuildRequest, batch_size: int | None, act_bits: int | None) -> Built:
    """act_bits: of a bundle of several networks, which one."""
    engine_id = make_engine_id(request.backend, request.remainder)
    suffix = "" if bundle.stepping is None or act_bits is None else bundle.stepping.suffixes[act_bits]
    planned = sum(layer["weight_bits"] is not None for layer in bundle.plan["layers"])
    opened = partial(
        bundle.sampler,
        request.backend,
        remainder=request.remainder,
        batch_size=batch_size,
        threads=request.threads,
        correction="off",
        act_bits=act_bits,
    )
    version = backend_status(find_backend(request.backend)).version
    with opened() as sampler:
        device = re.sub(r"[^a-z0-9]+", "", (platform.processor() or platform.machine()).lower())
        path = folder / f"{engine_id}-{version}-{device}{suffix}-b{sampler.batch_size}.blob"
        seconds, kernels = None, None
        if path.exists():
            try:
                with opened(blobs=[path]) as held:
                    kernels = held.kernels()
            except EngineError:
                pass  # of another graph, library or device: made again below
        if kernels is None:
            started = time.perf_counter()
            sampler.save_blob(path)
            seconds, kernels = time.perf_counter() - started, sampler.kernels()
    count = sum(kernel.count for kernel in kernels if kernel.integer)
    weights_only = all(layer["act_bits"] is None for layer in bundle.plan["layers"])
    runs = (
        f"{planned} layers planned with quantized weights, arithmetic in float"
        if planned and weights_only
        else f"{planned} layers planned in INT8, {count} kernels run on integers"
    )
    return Built(path, path.stat().st_size, count, planned, runs, (), seconds)


def _refuse_gpu_options(request: BuildRequest) -> None:
    for name in ("targets", "level", "workspace", "hardware", "version_compatible"):
        if getattr(request, name) != BuildRequest.__dataclass_fields__[name].default:
            raise UsageError(f"{_OPTIONS.get(name, '--' + name)}: {request.backend} does not have it. Leave it out.")


_OPTIONS = {
    "targets": "--target",
    "hardware": "--hardware-compatibility",
    "version_compatible": "--version-compatible",
}


@dataclass(frozen=True)
class _Job:
    """One engine to build. role: of the graph in the bundle;  path: where to;  facts: what it will be."""

    role: str
    graph: Path
    path: Path
    options: BuildOptions
    facts: EngineFacts


def _library(request: BuildRequest) -> tuple[Library, Device | None]:
    """The library, and the GPU that it is to build for; None to build ahead of time."""
    if request.threads is not None:
        raise UsageError(f"--threads: {request.backend} runs on the GPU. Leave it out.")
    library = open_library("tensorrt" if request.backend == "tensorrt" else "tensorrt-rtx")
    if request.targets:
        return library, None
    try:
        return library, find_device()
    except BackendMissing as exc:
        if not library.ahead_of_time:
            raise
        raise UsageError(
            f"--target: there is no GPU here to build for. Name those it is for, of {', '.join(TARGETS)}."
        ) from exc


def _gate(bundle: Bundle, request: BuildRequest, device: Device | None) -> Gate | None:
    """What holds each engine against the float network; None for a bundle that cannot sample, and where no GPU here, or
    none that is among the targets, runs the engines. Raises BackendMissing as Gate does for this machine's own.
    """
    if bundle.manifest.model.schedule is None:
        return None
    try:
        if device is None and find_device().sm not in request.targets:
            return None
        return Gate(bundle, backend=request.backend, remainder=request.remainder)
    except BackendMissing as exc:
        if device is not None:
            raise
        log.info("engines are kept unchecked: %s", exc)
        return None


def _jobs(
    bundle: Bundle, folder: Path, request: BuildRequest, library: Library, device: Device | None
) -> Iterator[_Job]:
    """The network, of several the one of the bundle's own plan first, and what else the bundle has: decoders, of whole
    pictures and of tiles, and text encoders.
    """
    engine_id = make_engine_id(request.backend, request.remainder)
    cache = (
        None if device is None else folder.parent / f"timing-{request.backend}-{library.version_text}-{device.sm}.cache"
    )
    targets = request.targets
    if library.ahead_of_time and device is not None:
        targets, device = (device.sm,), None  # an engine for a capability, wherever it is built
    batches = request.batches or (default_batch(bundle.manifest.model.latent_shape),)
    own = find_backend(request.backend).role(request.remainder)
    names = {role: (engine_id, role.removeprefix(own)) for role in reversed(bundle.network_roles(own))}
    float_id = make_engine_id(request.backend, "f32")
    names |= {role: (float_id, f"-{role}") for role in bundle.around}
    for role, (engine, part) in names.items():
        graph, sizes = bundle.file(role), (TEXTS,) if role.startswith("text-encoder") else batches
        inputs, _ = graph_specs(library, graph)
        options = BuildOptions(
            profiles=tuple(_shapes(bundle, role, inputs, size) for size in sizes),
            targets=targets,
            level=request.level,
            workspace=request.workspace,
            hardware=request.hardware,
            version_compatible=request.version_compatible,
            timing_cache=cache,
        )
        check_options(library, options)
        facts = EngineFacts.of(library, device, options, source=bundle.graph_id(role))
        suffix = "+".join(map(str, sizes))
        yield _Job(role, graph, folder / f"{engine}-{facts.stem}{part}-b{suffix}{SUFFIX}", options, facts)


def _shapes(bundle: Bundle, role: str, inputs: Mapping[str, TensorSpec], batch: int) -> dict[str, tuple[int, ...]]:
    """Input shapes of a graph for a full batch: guidance asks the network for every picture twice, the others once."""
    latent = tuple(bundle.manifest.model.latent_shape)
    if role in bundle.around:
        (spec,) = inputs.values()
        return {spec.name: (fixed_rows(spec) or batch, *map(int, spec.shape[1:]))}
    rows = batch if bundle.guidance() == 1 else 2 * batch
    return input_shapes(inputs, rows=rows, state=latent, conditions=bundle.embedding)


def _engine(job: _Job, library: Library, device: Device | None, gate: Gate | None, progress: Progress) -> Built:
    facts, seconds, parity = held_engine(job.path, job.facts), None, None
    if facts is None:
        make_folder(job.path.parent)  # a long build must not end at a shelf that cannot be written
        memory = None if device is None else device.memory
        with progress.stage(f"building {job.graph.name}") as tick:
            started = time.perf_counter()
            built = build_engine(library, job.graph, job.options, memory=memory, on_progress=tick)
            seconds = time.perf_counter() - started
        if gate is not None:
            with progress.stage(f"checking {job.graph.name}"):
                parity = gate(job.role, built, place=job.path)
        facts = save_engine(job.path, built, job.facts)
    table = facts.table
    size = job.path.stat().st_size
    return Built(job.path, size, table.integer_kernels, table.planned, table.line(), table.missed, seconds, parity)

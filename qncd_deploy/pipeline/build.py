"""Compile a bundle's networks, for this machine or ahead of time for others, and keep the results; no torch."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qncd_deploy.engines.base import Effort, Remainder, backend_status, find_backend, make_engine_id
from qncd_deploy.engines.eps_model import fixed_rows, input_shapes
from qncd_deploy.engines.stored import drop_stored, move_stored
from qncd_deploy.engines.text import ROWS as TEXTS
from qncd_deploy.engines.trt.build import build as build_engine
from qncd_deploy.engines.trt.build import graph_specs
from qncd_deploy.engines.trt.device import Device, find_device
from qncd_deploy.engines.trt.library import Library, open_library
from qncd_deploy.engines.trt.options import TARGETS, BuildOptions, Hardware, check_options, trtexec_line
from qncd_deploy.engines.trt.store import SUFFIX, EngineFacts, held_engine, save_engine, timing_file
from qncd_deploy.errors import BackendMissing, EngineError, GateFailed, QncdError, UsageError
from qncd_deploy.files import make_folder
from qncd_deploy.pipeline.parity import Gate, Parity
from qncd_deploy.pipeline.progress import Progress
from qncd_deploy.runtime import ONE_SIZE, Bundle
from qncd_deploy.sampler import default_batch
from qncd_deploy.specs import TensorSpec

FLAVOURS = ("tensorrt", "tensorrt-rtx")

ASIDE = "unchecked"
"""Folder beside the engines for those that are still to be held against the float network."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build, and for whom.

    remainder: None for the backend's own;  batches: pictures at a time, () for the sampler's own;  sizes: of pictures,
    (height, width), () for the bundle's own;  threads: of a CPU.
    For TensorRT alone: targets ... version_compatible, as in BuildOptions;  check: hold new engines against the float
    network.
    """

    backend: str
    remainder: Remainder | None = None
    batches: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    threads: int | None = None
    targets: tuple[str, ...] = ()
    level: int | None = None
    workspace: int | None = None
    hardware: Hardware = "none"
    version_compatible: bool = False
    check: bool = True

    def effort(self, folder: Path) -> Effort:
        """For what else is compiled on the way: the float network, where no engine for a CPU runs it. folder: of the
        engines.
        """
        return Effort(self.level, self.workspace, folder.parent)

    def sized(self, bundle: Bundle) -> tuple[Bundle, ...]:
        """The bundle at each of the sizes, the smallest first. Raises UsageError for one that it does not draw."""
        try:
            return tuple(bundle.at_size(height, width) for height, width in sorted(set(self.sizes))) or (bundle,)
        except UsageError as exc:
            raise UsageError(f"--sizes: {exc}") from exc


@dataclass(frozen=True)
class Built:
    """A compiled engine. runs: what it computes in, in words;  missed: planned layers that run otherwise;
    seconds: None if it was there already, made of the same graph for the same machine;  parity: None if it was held
    against the float network earlier or not at all;  unchecked: why it was not, None if it was or need not be;
    here: whether this machine's GPU runs it and it passed, now or earlier.
    """

    path: Path
    bytes: int
    integer_kernels: int
    planned_layers: int
    runs: str
    missed: tuple[str, ...]
    seconds: float | None
    parity: Parity | None = None
    unchecked: str | None = None
    here: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def line(self) -> str:
        how = "up to date" if self.seconds is None else f"built in {self.seconds:.1f} s"
        return f"{self.path}  {self.bytes / 2**20:.1f} MiB  {how}  {self.runs}"


def build(
    bundle: Bundle, folder: Path, request: BuildRequest, progress: Progress, *, around: Collection[str] | None = None
) -> tuple[Built, ...]:
    """Write to FOLDER what is not there yet, or is there for something else; the network first.

    around: for TensorRT, roles of the graphs beside the network to build, None for all that there are.

    What TensorRT builds and the GPU of this machine runs is held against the float network before it is written to
    FOLDER, if the bundle can sample and unless `request` says otherwise. Until then it lies in ASIDE, and stays there
    for the next call if the float network cannot be run.

    Raises: EngineError for a backend that compiles nothing, a GPU that is not there or a float network that cannot be
    run, BuildFailed if the backend refuses the graph, UsageError for options that it does not have, GateFailed for an
    engine that is wrong.
    """
    if request.backend in FLAVOURS:
        library, device = _library(request)
        bundle = replace(bundle, effort=request.effort(folder))
        gate = _gate(bundle, request, device)
        jobs = _jobs(bundle, folder, request, library, device, around)
        return tuple(_engine(job, library, device, gate, progress) for job in jobs)
    _refuse_gpu_options(request)
    with progress.stage(f"building for {request.backend}"):
        widths = (None,) if bundle.stepping is None else tuple(reversed(bundle.stepping.suffixes))
        return tuple(
            _blob(sized, folder, request, batch, bits)
            for sized in request.sized(bundle)
            for batch in request.batches or (None,)
            for bits in widths
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
    role = find_backend(request.backend).role(request.remainder) + suffix
    batch_size = batch_size or default_batch(bundle.manifest.model.latent_shape)
    planned = sum(layer["weight_bits"] is not None for layer in bundle.plan["layers"])
    version, source = backend_status(find_backend(request.backend)).version, bundle.graph_id(role)
    device = re.sub(r"[^a-z0-9]+", "", (platform.processor() or platform.machine()).lower())
    path = folder / f"{engine_id}-{version}-{device}{suffix}-b{batch_size}{_sizes_stem([bundle])}.blob"
    with bundle.open_network(request.backend, (role,), remainder=request.remainder, threads=request.threads) as engine:
        shapes, seconds = call_shapes(bundle, role, engine.inputs, batch_size), None
        if path.exists():
            with suppress(EngineError):  # of another graph, library or device: made again below
                engine.load_blob(path, source=source)
        if engine.compiled_bytes(shapes) is None:
            started = time.perf_counter()
            engine.save_blob(path, shapes, source=source)
            seconds = time.perf_counter() - started
        kernels = engine.kernels(shapes)
    count = sum(kernel.count for kernel in kernels if kernel.integer)
    weights_only = all(layer["act_bits"] is None for layer in bundle.plan["layers"])
    runs = (
        f"{planned} layers planned with quantized weights, arithmetic in float"
        if planned and weights_only
        else f"{planned} layers planned in INT8, {count} kernels run on integers"
    )
    return Built(path, path.stat().st_size, count, planned, runs, (), seconds)


def _refuse_gpu_options(request: BuildRequest) -> None:
    for name in ("targets", "level", "workspace", "hardware", "version_compatible", "check"):
        if getattr(request, name) != BuildRequest.__dataclass_fields__[name].default:
            raise UsageError(f"{_OPTIONS.get(name, '--' + name)}: {request.backend} does not have it. Leave it out.")


_OPTIONS = {
    "targets": "--target",
    "hardware": "--hardware-compatibility",
    "version_compatible": "--version-compatible",
    "check": "--no-check",
}


@dataclass(frozen=True)
class _Job:
    """One engine to build. role: of the graph in the bundle;  path: where to;  facts: what it will be;
    bundles: the bundle at the size of each profile.
    """

    role: str
    graph: Path
    path: Path
    options: BuildOptions
    facts: EngineFacts
    bundles: tuple[Bundle, ...]


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


def _gate(bundle: Bundle, request: BuildRequest, device: Device | None) -> Gate | str:
    """What holds each engine against the float network; or why nothing does: for a bundle that cannot sample, where no
    GPU here, or none that is among the targets, runs the engines, and where nobody wants it. Raises BackendMissing as
    Gate does for this machine's own.
    """
    if not request.check:
        return "--no-check"
    if bundle.manifest.model.schedule is None:
        return "the bundle has no noise schedule"
    try:
        if device is None and find_device().sm not in request.targets:
            return "this GPU is not among the targets"
        return Gate(bundle, backend=request.backend, remainder=request.remainder)
    except BackendMissing as exc:
        if device is not None:
            raise
        return str(exc).rstrip(".")


def _jobs(
    bundle: Bundle,
    folder: Path,
    request: BuildRequest,
    library: Library,
    device: Device | None,
    around: Collection[str] | None = None,
) -> Iterator[_Job]:
    """The network, of several the one of the bundle's own plan first, and what else the bundle has: decoders, of whole
    pictures and of tiles, and text encoders.
    """
    engine_id = make_engine_id(request.backend, request.remainder)
    cache = None if device is None else timing_file(folder.parent, library, device)
    targets = request.targets
    if library.ahead_of_time and device is not None:
        targets, device = (device.sm,), None  # an engine for a capability, wherever it is built
    any_size = request.sized(bundle)
    own = find_backend(request.backend).role(request.remainder)
    names = {role: (engine_id, role.removeprefix(own)) for role in reversed(bundle.network_roles(own))}
    float_id = make_engine_id(request.backend, "f32")
    names |= {role: (float_id, f"-{role}") for role in bundle.around if around is None or role in around}
    for role, (engine, part) in names.items():
        graph, texts = bundle.file(role), (TEXTS,) if role.startswith("text-encoder") else ()
        inputs, _ = graph_specs(library, graph)
        bundles = (bundle,) if role in ONE_SIZE else any_size
        calls = [
            (rows, call_shapes(sized, role, inputs, rows), sized)
            for sized in bundles
            for rows in texts or request.batches or (default_batch(sized.manifest.model.latent_shape),)
        ]
        options = BuildOptions(
            profiles=tuple(shapes for _, shapes, _ in calls),
            targets=targets,
            level=request.level,
            workspace=request.workspace,
            hardware=request.hardware,
            version_compatible=request.version_compatible,
            timing_cache=cache,
        )
        check_options(library, options)
        facts = EngineFacts.of(library, device, options, source=bundle.graph_id(role))
        suffix = "+".join(str(rows) for rows in dict.fromkeys(rows for rows, *_ in calls))
        suffix += "" if role in ONE_SIZE else _sizes_stem(bundles)
        path = folder / f"{engine}-{facts.stem}{part}-b{suffix}{SUFFIX}"
        yield _Job(role, graph, path, options, facts, tuple(sized for *_, sized in calls))


def _sizes_stem(bundles: Sequence[Bundle]) -> str:
    """What the sizes of pictures add to the name of what is compiled for them: -WxH+WxH."""
    sizes = "+".join(f"{sides[1]}x{sides[0]}" for bundle in bundles if (sides := bundle.sides) is not None)
    return f"-{sizes}" if sizes else ""


def call_shapes(bundle: Bundle, role: str, inputs: Mapping[str, TensorSpec], batch: int) -> dict[str, tuple[int, ...]]:
    """Input shapes of a graph for a full batch: guidance asks the network for every picture twice, the others once."""
    latent = tuple(bundle.manifest.model.latent_shape)
    if role in bundle.around:
        (spec,) = inputs.values()
        row = (size if isinstance(size, int) else own for size, own in zip(spec.shape[1:], latent, strict=False))
        return {spec.name: (fixed_rows(spec) or batch, *row)}
    rows = batch if bundle.guidance() == 1 else 2 * batch
    return input_shapes(inputs, rows=rows, state=latent, conditions=bundle.embedding)


def _engine(job: _Job, library: Library, device: Device | None, gate: Gate | str, progress: Progress) -> Built:
    facts, seconds, parity = held_engine(job.path, job.facts), None, None
    if facts is None or (facts.unchecked is not None and not isinstance(gate, str)):
        place = job.path
        if facts is None:
            place = job.path.parent / ASIDE / job.path.name
            facts, seconds = _built(job, place, library, device, progress)
        if not isinstance(gate, str):
            with progress.stage(f"checking {job.graph.name}"):
                parity = _checked(job, place, gate)
        facts = replace(facts, unchecked=gate if isinstance(gate, str) else None)
        move_stored(place, job.path, facts)
    table = facts.table
    return Built(
        path=job.path,
        bytes=job.path.stat().st_size,
        integer_kernels=table.integer_kernels,
        planned_layers=table.planned,
        runs=table.line(),
        missed=table.missed,
        seconds=seconds,
        parity=parity,
        unchecked=facts.unchecked,
        here=not isinstance(gate, str),
    )


def _built(
    job: _Job, place: Path, library: Library, device: Device | None, progress: Progress
) -> tuple[EngineFacts, float | None]:
    """Build to a place, unless the same lies there from before, and the seconds it took."""
    facts = held_engine(place, job.facts)
    if facts is not None:
        return facts, None
    make_folder(job.path.parent)  # a long build must not end at a shelf that cannot be written
    memory = None if device is None else device.memory
    with progress.stage(f"building {job.graph.name}") as tick:
        started = time.perf_counter()
        built = build_engine(library, job.graph, job.options, memory=memory, on_progress=tick)
        seconds = time.perf_counter() - started
    return save_engine(place, built, job.facts), seconds


def _checked(job: _Job, place: Path, gate: Gate) -> Parity:
    """What the gate measures. An engine that fails it goes; one that it cannot measure stays where it lies."""
    try:
        return gate(job.role, place, job.options, bundles=job.bundles, place=job.path)
    except GateFailed:
        drop_stored(place)
        raise
    except QncdError as exc:
        raise EngineError(
            f"{job.path}: built, but not checked. {exc} Then run the same command again, which goes on from {place}, "
            "or with --no-check, which takes the engine as it is."
        ) from exc

"""Speed beside accuracy: interleaved rounds A B C A B C ... of whole sampling runs, so that drift hits all alike.

call_ms     one network call on a guided batch: the median over a run's calls, without the first
speedup     the baseline's call_ms / this one's, within the same round
picture_ms  the sampling loop of a batch / its pictures, extra calls of a correction included, decoding not
host        share of the loop's time that is spent outside the network
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from rich.table import Table

from qncd_deploy.engines.base import Kernel, backend_status, default_backend, find_backend
from qncd_deploy.errors import UsageError
from qncd_deploy.evaluate.batches import Batch, Draw, draw_batches
from qncd_deploy.evaluate.compare import counter
from qncd_deploy.evaluate.features import Lens
from qncd_deploy.evaluate.judge import Figures, Judge, Origin
from qncd_deploy.evaluate.measure import Measurement, Stopwatch, graph_bytes, machine, resident_bytes
from qncd_deploy.evaluate.variants import REFERENCE, Variant
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler


@dataclass(frozen=True, eq=False)
class BenchRow:
    """One variant. network: the bundle's format or "float";  engine: backend and precision of its float layers;
    graph_bytes: the graph and the weights it reads;  memory_bytes: by how much opening and warming it up grew the
    process, None where the system does not tell;  kernels: as BaseEngine.kernels;  figures: None for the reference.
    """

    name: str
    network: str
    engine: str
    correction: str
    extra_calls: int
    call_ms: Measurement
    speedup: Measurement
    picture_ms: Measurement
    host: Measurement
    graph_bytes: int
    memory_bytes: int | None
    kernels: tuple[Kernel, ...]
    figures: Figures | None

    @property
    def integer_kernels(self) -> int | None:
        """How many operations run on 8-bit integers; None where the engine cannot tell."""
        return sum(kernel.count for kernel in self.kernels if kernel.integer) if self.kernels else None

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return self.call_ms, self.speedup, self.picture_ms, self.host

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "network": self.network,
            "engine": self.engine,
            "correction": self.correction,
            "extra_calls": self.extra_calls,
            **{measured.name: measured.to_json() for measured in self.measurements},
            "graph_bytes": self.graph_bytes,
            "memory_bytes": self.memory_bytes,
            "integer_kernels": self.integer_kernels,
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "figures": None if self.figures is None else self.figures.to_json(),
        }


@dataclass(frozen=True, eq=False)
class BenchResult:
    """baseline: the row that every speedup is against;  reference: the float twin that figures are against;
    context: what was run, and on what.
    """

    rows: tuple[BenchRow, ...]
    baseline: str
    reference: str
    context: Mapping[str, str]

    def __getitem__(self, name: str) -> BenchRow:
        return {row.name: row for row in self.rows}[name]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is doubtful in the times, by row. A ratio or share of doubtful times adds nothing to say."""
        return tuple(f"{row.name}, {warning}" for row in self.rows for warning in row.call_ms.warnings)

    def to_json(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "reference": self.reference,
            "context": dict(self.context),
            "warnings": list(self.warnings),
            "rows": [row.to_json() for row in self.rows],
        }


def bench(
    bundle: Bundle,
    variants: Sequence[Variant],
    draw: Draw,
    *,
    rounds: int = 5,
    baseline: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Time every variant in every round, all open at once, and measure what each does to the pictures.

    draw: its batch_size is what is timed, its pictures are what the figures are of. The first float twin among the
    variants is the reference, and the baseline unless another is named; without any, one is put in front.
    on_progress: runs done and in all, a figure's sampling being one run.

    Raises: UsageError for no rounds or an unknown baseline, and whatever opening and sampling raise.
    """
    if rounds < 1:
        raise UsageError(f"{rounds} rounds: expected 1 or more.")
    if not any(variant.float_twin for variant in variants):
        variants = (Variant(REFERENCE, variants[0].backend if variants else None, float_twin=True), *variants)
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names), f"names that are not unique: {names}"
    reference = next(variant.name for variant in variants if variant.float_twin)
    baseline = baseline or reference
    if baseline not in names:
        raise UsageError(f"baseline {baseline}: nothing of that name is measured. Choose one of {', '.join(names)}.")
    tick = counter((rounds + 1) * len(variants), on_progress)
    with ExitStack() as opened:
        entrants = {}
        for variant in variants:
            entrants[variant.name] = entrant = _Entrant.open(variant, bundle, draw)
            opened.callback(entrant.sampler.close)
        turns: dict[str, list[_Turn]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, entrant in entrants.items():
                turns[name].append(entrant.turn(draw))
                tick(1)
        figures = _figures(bundle, entrants, reference, draw, tick)
        rows = tuple(entrants[name].row(turns[name], turns[baseline], figures.get(name)) for name in names)
        context = _context(list(entrants.values()), draw, rounds)
    return BenchResult(rows, baseline, reference, context)


def bench_table(result: BenchResult) -> Table:
    """The result for a terminal: medians with half their interquartile range, PSNR beside every speed."""
    facts = result.context
    table = Table(
        title=f"{facts['pictures a batch']} pictures a batch, {facts['sampler']}, {facts['rounds']} rounds",
        caption=(
            f"engine: library and precision of its float layers; speedup over {result.baseline}; "
            f"PSNR to {result.reference}, {facts['pictures compared']} pictures"
        ),
    )
    table.add_column("", no_wrap=True)
    table.add_column("engine")
    for heading in ("ms / call", "speedup", "ms / picture", "host", "MiB", "memory", "int8 ops", "PSNR dB"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        memory, integers = row.memory_bytes, row.integer_kernels
        fidelity = None if row.figures is None else row.figures.psnr
        table.add_row(
            row.name,
            row.engine,
            f"{row.call_ms.median:.2f} ± {row.call_ms.iqr / 2:.2f}",
            f"{row.speedup.median:.2f}",
            f"{row.picture_ms.median:.1f}",
            f"{100 * row.host.median:.1f} %",
            f"{row.graph_bytes / 2**20:.1f}",
            "" if memory is None else f"{memory / 2**20:.0f}",
            "" if integers is None else str(integers),
            "reference" if row.name == result.reference else "" if fidelity is None else f"{fidelity.value:.2f}",
        )
    return table


@dataclass(frozen=True)
class _Turn:
    """One run of the loop: seconds of each network call, and of the whole."""

    calls: tuple[float, ...]
    total: float

    @property
    def call(self) -> float:
        """The first call pays for what the previous entrant left: cold caches, threads still spinning or asleep."""
        return statistics.median(self.calls[1:] or self.calls)


@dataclass(frozen=True, eq=False)
class _Entrant:
    """An open variant: `sampler` as opened, `timed` the same with a stopwatch around its network."""

    variant: Variant
    backend: str
    network: str
    sampler: Sampler
    timed: Sampler
    stopwatch: Stopwatch
    graph_bytes: int
    memory_bytes: int | None

    @classmethod
    def open(cls, variant: Variant, bundle: Bundle, draw: Draw) -> _Entrant:
        before = resident_bytes()
        sampler = variant.open(bundle, draw)
        stopwatch = Stopwatch(sampler.network.unet)
        timed = Sampler(
            replace(sampler.network, unet=stopwatch),
            config=sampler.config,
            guidance_scale=sampler.guidance_scale,
            table=sampler.table,
            batch_size=sampler.batch_size,
        )
        try:
            for _ in islice(timed.trajectory(range(timed.batch_size), labels=draw.labels), 2):
                pass
        except BaseException:
            sampler.close()
            raise
        after = resident_bytes()
        memory = None if before is None or after is None else after - before
        own = (variant.bundle or bundle).manifest
        network = "float" if variant.float_twin else own.format
        size = graph_bytes(sampler.network.unet.path)
        return cls(variant, variant.backend or default_backend(), network, sampler, timed, stopwatch, size, memory)

    def turn(self, draw: Draw) -> _Turn:
        self.stopwatch.seconds.clear()
        started = time.perf_counter()
        for _ in self.timed.trajectory(range(self.timed.batch_size), labels=draw.labels, seed=draw.seed):
            pass
        self.stopwatch.arrays.wait()
        return _Turn(tuple(self.stopwatch.seconds), time.perf_counter() - started)

    def row(self, turns: Sequence[_Turn], baseline: Sequence[_Turn], figures: Figures | None) -> BenchRow:
        context = {"variant": self.variant.name, "engine": self.sampler.table.key.backend, "network": self.network}

        def measured(name: str, unit: str, samples: Iterable[float]) -> Measurement:
            return Measurement(name, unit, tuple(samples), context)

        return BenchRow(
            name=self.variant.name,
            network=self.network,
            engine=self.sampler.table.key.backend,
            correction=self.sampler.table.method,
            extra_calls=len(turns[0].calls) - len(self.timed.steps),
            call_ms=measured("call_ms", "ms", (1e3 * turn.call for turn in turns)),
            speedup=measured("speedup", "x", (b.call / t.call for b, t in zip(baseline, turns, strict=True))),
            picture_ms=measured("picture_ms", "ms", (1e3 * turn.total / self.timed.batch_size for turn in turns)),
            host=measured("host", "share", (1 - sum(turn.calls) / turn.total for turn in turns)),
            graph_bytes=self.graph_bytes,
            memory_bytes=self.memory_bytes,
            kernels=self.sampler.kernels(),
            figures=figures,
        )


def _figures(
    bundle: Bundle, entrants: Mapping[str, _Entrant], reference: str, draw: Draw, tick: Callable[[int], None]
) -> dict[str, Figures]:
    """What each variant but the reference does to the pictures."""
    found = {}
    with Lens.open(bundle, entrants[reference].backend, threads=draw.threads) as lens:

        def drawn(sampler: Sampler) -> tuple[Origin, list[Batch]]:
            batches = list(draw_batches(sampler, draw, lens))
            tick(1)
            return Origin.of(sampler), batches

        judge = Judge.of(reference, *drawn(entrants[reference].sampler), draw, lens.data)
        for name, entrant in entrants.items():
            if name != reference:
                found[name] = judge.figures(name, *drawn(entrant.sampler))
    return found


def _context(entrants: Sequence[_Entrant], draw: Draw, rounds: int) -> dict[str, str]:
    """What the times are of, in words."""
    sampler = entrants[0].timed
    config, scale = sampler.config, sampler.guidance_scale
    eta = f", eta {config.eta:g}" if config.eta else ""
    guidance = f", guidance {scale:g}" if scale != 1 else ""
    versions = {backend: backend_status(find_backend(backend)).version for backend in {e.backend for e in entrants}}
    return {
        "pictures a batch": str(sampler.batch_size),
        "rows a call": str(sampler.batch_size * (1 if scale == 1 else 2)),
        "sampler": f"{config.scheduler}, {config.n_steps} steps{eta}{guidance}",
        "rounds": str(rounds),
        "pictures compared": str(draw.count),
        "seed": str(draw.seed),
        **machine(),
        "threads": "the library's choice" if draw.threads is None else str(draw.threads),
        "engines": ", ".join(f"{name} {version or '(unknown)'}" for name, version in sorted(versions.items())),
    }

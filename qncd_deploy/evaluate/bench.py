"""Speed beside accuracy: interleaved rounds A B C A B C ... of whole sampling runs, so that drift hits all alike."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from qncd_deploy.engines.base import backend_status, default_backend, engine_class, find_backend
from qncd_deploy.engines.eps_model import fixed_rows, input_roles
from qncd_deploy.engines.trt.device import find_device
from qncd_deploy.errors import Diverged, EngineError, UsageError
from qncd_deploy.evaluate.batches import Batch, Draw, draw_batches
from qncd_deploy.evaluate.bench_result import BenchResult, BenchRow
from qncd_deploy.evaluate.compare import counter
from qncd_deploy.evaluate.features import Lens
from qncd_deploy.evaluate.judge import Figures, Judge, Origin
from qncd_deploy.evaluate.measure import Measurement, Stopwatch, graph_bytes, machine, resident_bytes
from qncd_deploy.evaluate.variants import REFERENCE, Variant, require_same_network
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler
from qncd_deploy.specs import pixels

log = logging.getLogger(__name__)


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

    draw: its batch_size is what is timed, its pictures are what the figures are of; what it leaves open is `bundle`'s
    choice for the variants of other bundles, too. The first float twin among the variants is the reference, and the
    baseline unless another is named; without any, one is put in front. on_progress: runs done and in all, a figure's
    sampling being one run.

    Raises: UsageError for no rounds, an unknown baseline or a bundle of another network;  EngineError for a stored
    engine of another batch size;  and whatever opening and sampling raise.
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
    for variant in variants:
        require_same_network(bundle, variant.bundle or bundle)
    draw = _settled(draw, bundle)
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


@dataclass(frozen=True)
class _Turn:
    """One run of the loop: seconds of each network call, the correction's own among them, and of the whole."""

    calls: tuple[float, ...]
    extra_calls: int
    total: float

    @property
    def steady(self) -> tuple[float, ...]:
        """The first call pays for what the previous entrant left: cold caches, threads still spinning or asleep."""
        return self.calls[1:] or self.calls

    @property
    def call(self) -> float:
        return statistics.median(self.steady)

    @property
    def call_p90(self) -> float:
        return float(np.percentile(self.steady, 90))

    @property
    def outside(self) -> float:
        """Seconds that were not spent in the network."""
        return self.total - sum(self.calls)


@dataclass(frozen=True, eq=False)
class _Entrant:
    """An open variant: `sampler` as opened, `timed` the same with a stopwatch around its network."""

    variant: Variant
    backend: str
    network: str
    sampler: Sampler
    timed: Sampler
    stopwatch: Stopwatch
    memory_bytes: int | None
    device_bytes: int | None

    @classmethod
    def open(cls, variant: Variant, bundle: Bundle, draw: Draw) -> _Entrant:
        backend = variant.backend or default_backend()
        arrays = engine_class(find_backend(backend)).open_arrays()
        before = resident_bytes(), arrays.used_bytes()
        sampler = variant.open(bundle, draw)
        stopwatch = Stopwatch(sampler.network.unet)
        timed = sampler.using(replace(sampler.network, unet=stopwatch))
        try:
            _require_full_rows(variant, sampler)
            # of several networks that take turns the last is first called near the end
            warm_up = None if len(sampler.network.unet.graphs) > 1 else 2
            for _ in islice(timed.trajectory(range(timed.batch_size), labels=draw.labels), warm_up):
                pass
        except BaseException:
            sampler.close()
            raise
        after = resident_bytes(), arrays.used_bytes()
        grown = (None if a is None or b is None else a - b for a, b in zip(after, before, strict=True))
        own = (variant.bundle or bundle).manifest
        network = "float" if variant.float_twin else own.format
        return cls(variant, backend, network, sampler, timed, stopwatch, *grown)

    def turn(self, draw: Draw) -> _Turn:
        self.stopwatch.seconds.clear()
        extra_calls = 0
        started = time.perf_counter()
        for state in self.timed.trajectory(range(self.timed.batch_size), labels=draw.labels, seed=draw.seed):
            extra_calls = state.extra_calls
        self.stopwatch.arrays.wait()
        total = time.perf_counter() - started
        # every network call has the same rows, so all are made of equally many calls of the engine
        calls = np.reshape(self.stopwatch.seconds, (len(self.timed.steps) + extra_calls, -1)).sum(axis=1)
        return _Turn(tuple(calls.tolist()), extra_calls, total)

    def row(self, turns: Sequence[_Turn], baseline: Sequence[_Turn], figures: Figures | None) -> BenchRow:
        context = {"variant": self.variant.name, "engine": self.sampler.table.key.backend, "network": self.network}

        def measured(name: str, unit: str, samples: Iterable[float]) -> Measurement:
            return Measurement(name, unit, tuple(samples), context)

        return BenchRow(
            name=self.variant.name,
            network=self.network,
            engine=self.sampler.table.key.backend,
            correction=self.sampler.table.method,
            extra_calls=turns[0].extra_calls,
            call_ms=measured("call_ms", "ms", (1e3 * turn.call for turn in turns)),
            call_p90_ms=measured("call_p90_ms", "ms", (1e3 * turn.call_p90 for turn in turns)),
            speedup=measured("speedup", "x", (b.call / t.call for b, t in zip(baseline, turns, strict=True))),
            picture_ms=measured("picture_ms", "ms", (1e3 * turn.total / self.timed.batch_size for turn in turns)),
            host=measured("host", "share", (turn.outside / turn.total for turn in turns)),
            host_ms=measured("host_ms", "ms", (1e3 * turn.outside / len(turn.calls) for turn in turns)),
            graph_bytes=graph_bytes(*self.sampler.network.unet.graphs),
            engine_bytes=self.sampler.compiled_bytes(),
            memory_bytes=self.memory_bytes,
            device_bytes=self.device_bytes,
            kernels=self.sampler.kernels(),
            figures=figures,
        )


def _settled(draw: Draw, bundle: Bundle) -> Draw:
    """The draw with nothing left open that would make a call or a picture another one for another bundle."""
    return replace(draw, sampling=bundle.settled(draw.sampling))


def _rows(sampler: Sampler) -> int:
    """Of one network call: guidance asks for every picture twice."""
    return sampler.batch_size * (1 if sampler.guidance_scale == 1 else 2)


def _require_full_rows(variant: Variant, sampler: Sampler) -> None:
    """A stored engine for more rows than there are would be timed on rows that nobody asked for, one for fewer on part
    of them. Raises EngineError.
    """
    network, wanted = sampler.network, _rows(sampler)
    graph = fixed_rows(input_roles({spec.name: spec for spec in network.facts.inputs}).sample)
    sizes = network.unet.row_sizes
    if graph is None and sizes and wanted not in sizes:
        takes = " or ".join(map(str, sizes))
        raise EngineError(
            f"{variant.name}: the stored engine takes {takes} rows a call, --batch-size {sampler.batch_size} with "
            f"guidance {sampler.guidance_scale:g} asks for {wanted}. Run `qncd build` for that batch size, or name an "
            "empty --engine-dir: engines are then made for the run."
        )


def _figures(
    bundle: Bundle, entrants: Mapping[str, _Entrant], reference: str, draw: Draw, tick: Callable[[int], None]
) -> dict[str, Figures]:
    """What each variant but the reference does to the pictures; one that diverges is timed all the same."""
    found = {}
    with Lens.open(bundle, entrants[reference].backend, threads=draw.threads) as lens:

        def drawn(sampler: Sampler) -> list[Batch]:
            try:
                return list(draw_batches(sampler, draw, lens))
            finally:
                tick(1)

        exact = entrants[reference].sampler
        judge = Judge.of(reference, Origin.of(exact), drawn(exact), draw, lens.data)
        for name, entrant in entrants.items():
            if name == reference:
                continue
            origin = Origin.of(entrant.sampler)
            try:
                found[name] = judge.figures(name, origin, drawn(entrant.sampler))
            except Diverged as exc:
                log.warning("%s", exc)
                found[name] = judge.diverged(name, origin, str(exc))
    return found


def _context(entrants: Sequence[_Entrant], draw: Draw, rounds: int) -> dict[str, str]:
    """What the times are of, in words."""
    sampler = entrants[0].timed
    config, scale = sampler.config, sampler.guidance_scale
    eta = f", eta {config.eta:g}" if config.eta else ""
    guidance = f", guidance {scale:g}" if scale != 1 else ""
    versions = {backend: backend_status(find_backend(backend)).version for backend in {e.backend for e in entrants}}
    sides = sampler.network.facts.sides
    return {
        **({} if sides is None else {"pictures": pixels(sides)}),
        "pictures a batch": str(sampler.batch_size),
        "rows a call": str(_rows(sampler)),
        "sampler": f"{config.scheduler}, {config.n_steps} steps{eta}{guidance}",
        "rounds": str(rounds),
        "pictures compared": str(draw.count),
        "seed": str(draw.seed),
        **machine(),
        **_gpu(versions),
        "threads": "the library's choice" if draw.threads is None else str(draw.threads),
        "engines": ", ".join(f"{name} {version or '(unknown)'}" for name, version in sorted(versions.items())),
    }


def _gpu(backends: Iterable[str]) -> dict[str, str]:
    """The GPU, if any backend computes on it."""
    if all(find_backend(name).device == "cpu" for name in backends):
        return {}
    device = find_device()
    return {"gpu": f"{device.name} ({device.sm}), driver of CUDA {device.cuda}"}

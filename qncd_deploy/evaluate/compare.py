"""Several ways to run a network beside its float twin: the same seeds and labels, one variant at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from qncd_deploy.engines.base import default_backend
from qncd_deploy.errors import Diverged
from qncd_deploy.evaluate.batches import Batch, Draw, Job, Tick, plan_jobs
from qncd_deploy.evaluate.crew import Crew, Solo, Task
from qncd_deploy.evaluate.features import Lens
from qncd_deploy.evaluate.judge import Figures, Judge, Origin, PairMeasure
from qncd_deploy.evaluate.store import Store, batch_facts, key_of
from qncd_deploy.evaluate.variants import REFERENCE, Variant
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Comparison:
    """reference: the float twin's own figures;  variants: in the order asked for;  captions: of the pictures in
    `images`;  images: the first few of each, by name, REFERENCE among them, (N, H, W, C) uint8; empty if not decoded.
    """

    reference: Figures
    variants: tuple[Figures, ...]
    captions: tuple[str, ...]
    images: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> Figures:
        found = {figures.name: figures for figures in (self.reference, *self.variants)}
        return found[name]

    def to_json(self) -> dict[str, Any]:
        return {"reference": self.reference.to_json(), "variants": [figures.to_json() for figures in self.variants]}


@dataclass(frozen=True, eq=False)
class Look:
    """What pictures are measured with.

    features, reference: files in place of the bundle's own;  perceptual: LPIPS, None to leave it out.
    """

    features: Path | None = None
    reference: Path | None = None
    perceptual: PairMeasure | None = None


def compare(
    bundle: Bundle,
    variants: Sequence[Variant],
    draw: Draw,
    *,
    backend: str | None = None,
    shown: int = 16,
    traced: int = 32,
    teacher_forced: bool = True,
    look: Look | None = None,
    store: Store | None = None,
    crew: Crew | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Sample the float twin once and each variant in turn.

    backend: of the float twin, None for the first variant's;  shown: how many pictures to return;  traced: pictures
    behind the SNR of every call, rounded up to whole batches, 0 for none;  teacher_forced: measure the output SNR too,
    at the price of running the traced pictures once more;  store: where batches are kept and looked for, None for
    memory;  crew: who draws them, None for this process;  on_progress: picture-calls done and in all.

    A variant whose pictures are not finite has no figures, but says so; the others are measured.

    Raises: UsageError for bundles of different networks, BundleError for a feature network of other pictures, Diverged
    if it is the float twin or every variant that does, and whatever Bundle.sampler and sampling raise.
    """
    names = [variant.name for variant in variants]
    assert len({REFERENCE, *names}) == 1 + len(names), f"names that are not unique: {names}"
    backend = backend or next((v.backend for v in variants if v.backend), None) or default_backend()
    look = look or Look()
    task = Task(bundle, draw, backend, look.features, teacher_forced)
    with Lens.open(bundle, backend, features=look.features, reference=look.reference, threads=draw.threads) as lens:
        twin = Variant(REFERENCE, backend, float_twin=True)
        with twin.open(bundle, draw) as exact:
            jobs = plan_jobs(draw, batch_size=exact.batch_size, traced=traced)
            again = sum(len(job.indices) for job in jobs if job.traced) if teacher_forced else 0
            tick = counter(len(exact.steps) * (draw.count + len(variants) * (draw.count + again)), on_progress)
            easel = _Easel(task, lens, store, crew or Solo(), tick)
            origin, drawn = Origin.of(exact), easel.twin(twin, exact, jobs)
        judge = Judge.of(REFERENCE, origin, drawn, draw, lens.data, perceptual=look.perceptual)
        images, found = {REFERENCE: _first_images(drawn, shown)}, []
        for variant in variants:
            with variant.open(bundle, draw) as sampler:
                origin = Origin.of(sampler)
                try:
                    drawn = easel.variant(variant, sampler, jobs)
                except Diverged as exc:
                    log.warning("%s", exc)
                    found.append(judge.diverged(variant.name, origin, str(exc)))
                    continue
            found.append(judge.figures(variant.name, origin, drawn))
            images[variant.name] = _first_images(drawn, shown)
    captions = [caption for batch in judge.batches[:shown] for caption in batch.pictures.captions]
    if all(figures.diverged for figures in found):
        raise Diverged(str(found[0].diverged))
    return Comparison(
        reference=judge.own,
        variants=tuple(found),
        captions=tuple(captions[:shown]),
        images={name: pictures for name, pictures in images.items() if pictures is not None},
    )


def counter(total: int, on_progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """A function that adds up what it is told and passes the sum on."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if on_progress is not None:
            on_progress(done, total)

    return tick


@dataclass(frozen=True, eq=False)
class _Drawn(Sequence[Batch]):
    """Batches of one variant in order, each fetched when it is asked for."""

    shelf: Mapping[str, Batch]
    jobs: Sequence[Job]

    @overload
    def __getitem__(self, place: int) -> Batch: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Batch]: ...
    def __getitem__(self, place: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(place, slice):
            return _Drawn(self.shelf, self.jobs[place])
        return self.shelf[self.jobs[place].name]

    def __len__(self) -> int:
        return len(self.jobs)


class _Easel:
    """Draws what the store does not have."""

    def __init__(self, task: Task, lens: Lens, store: Store | None, crew: Crew, tick: Tick) -> None:
        self._task, self._lens, self._store, self._crew, self._tick = task, lens, store, crew, tick
        self._exact: MutableMapping[str, Batch] = {}
        self._exact_key: str | None = None

    def twin(self, variant: Variant, sampler: Sampler, jobs: Sequence[Job]) -> _Drawn:
        """The float twin, which must come first."""
        facts = batch_facts(self._task, variant, sampler, None)
        self._exact, self._exact_key = self._shelf(facts), key_of(facts)
        return self._fill(self._exact, variant, sampler, jobs)

    def variant(self, variant: Variant, sampler: Sampler, jobs: Sequence[Job]) -> _Drawn:
        """A variant, its traced batches held against the twin's."""
        shelf = self._shelf(batch_facts(self._task, variant, sampler, self._exact_key))
        return self._fill(shelf, variant, sampler, jobs, against=self._exact)

    def _shelf(self, facts: Mapping[str, Any]) -> MutableMapping[str, Batch]:
        return {} if self._store is None else self._store.shelf(facts)

    def _fill(
        self,
        shelf: MutableMapping[str, Batch],
        variant: Variant,
        sampler: Sampler,
        jobs: Sequence[Job],
        against: Mapping[str, Batch] | None = None,
    ) -> _Drawn:
        missing = []
        for job in jobs:
            if job.name in shelf:
                again = job.traced and against is not None and self._task.teacher_forced
                self._tick(len(sampler.steps) * len(job.indices) * (2 if again else 1))
            else:
                missing.append(job)
        ready = (
            replace(job, exact=against[job.name].trace) if job.traced and against is not None else job
            for job in missing
        )
        for job, batch in self._crew.draw(
            self._task, variant, ready, sampler=sampler, lens=self._lens, tick=self._tick
        ):
            shelf[job.name] = batch
        return _Drawn(shelf, jobs)


def _first_images(batches: _Drawn, shown: int) -> np.ndarray | None:
    parts, count = [], 0
    for batch in batches:
        if batch.pictures.images is None or count >= shown:
            break
        parts.append(batch.pictures.images)
        count += len(batch.pictures)
    return np.concatenate(parts)[:shown] if parts else None

"""Who draws the batches of a comparison: this process, or others that are told everything they need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qncd_deploy.evaluate.batches import Batch, Draw, Job, Tick, draw_batch
from qncd_deploy.evaluate.features import Lens
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler


@dataclass(frozen=True)
class Task:
    """What all batches of a comparison share; it can be sent to another process.

    backend: of the float twin and the feature network;  features: a feature network in place of the bundle's;
    teacher_forced: see draw_batch.
    """

    bundle: Bundle
    draw: Draw
    backend: str
    features: Path | None = None
    teacher_forced: bool = True


class Crew(Protocol):
    def draw(
        self, task: Task, variant: Variant, jobs: Iterable[Job], *, sampler: Sampler, lens: Lens, tick: Tick
    ) -> Iterator[tuple[Job, Batch]]:
        """Draw batches of a variant, in any order.

        sampler, lens: those of this process, open; other processes open their own.
        """
        ...


class Solo:
    """This process, one batch after the other."""

    def draw(
        self, task: Task, variant: Variant, jobs: Iterable[Job], *, sampler: Sampler, lens: Lens, tick: Tick
    ) -> Iterator[tuple[Job, Batch]]:
        for job in jobs:
            yield job, draw_batch(sampler, task.draw, job, lens, teacher_forced=task.teacher_forced, tick=tick)

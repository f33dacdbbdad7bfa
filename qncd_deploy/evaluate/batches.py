"""Batches of pictures as an evaluation draws them: described by the feature network, held against the float twin.

A batch depends on its variant, its pictures and, where it is traced, the float twin's states; so batches are drawn in
any order, by any process, and are worth keeping. What they say together is for judge.py.

latent SNR of a call   sum x^2 / sum (x_v - x)^2 after the call, both networks running freely, corrections included
output SNR of a call   sum e^2 / sum (q - e)^2 at the float trajectory's inputs: the network alone, uncorrected
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from qncd_deploy.correct.fitting import State
from qncd_deploy.evaluate.features import Description, Lens
from qncd_deploy.evaluate.metrics import power
from qncd_deploy.pictures import Pictures
from qncd_deploy.runtime import AS_EXPORTED, Sampling
from qncd_deploy.sampler import Sampler

Tick = Callable[[int], None]
"""Told after every network call for how many pictures it was."""


@dataclass(frozen=True)
class Draw:
    """Which pictures are drawn, and how; None is the bundle's own choice.

    Pictures first .. first + count - 1 of `seed`;  labels: see Sampler.sample;  batch_size, threads: see
    Bundle.sampler.
    """

    count: int
    seed: int = 0
    first: int = 0
    labels: tuple[int, ...] | None = None
    sampling: Sampling = AS_EXPORTED
    batch_size: int | None = None
    threads: int | None = None

    @property
    def indices(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True, eq=False)
class Trace:
    """The float twin's states at every network call of a batch, each (calls, N, C, H, W) float32; see State."""

    x_in: np.ndarray
    raw: np.ndarray
    x: np.ndarray


@dataclass(frozen=True, eq=False)
class Job:
    """A batch to draw.

    indices: its pictures;  size: rows that a batch is filled up to;  traced: whether the SNR of its calls is measured;
    exact: the float twin's trace of these pictures, None for the twin itself, which leaves one.
    """

    indices: range
    size: int
    traced: bool = False
    exact: Trace | None = None

    @property
    def name(self) -> str:
        """The same for the same pictures, whatever else is drawn."""
        return f"{self.indices[0]:09d}-{len(self.indices)}" + ("-traced" if self.traced else "")


def plan_jobs(draw: Draw, *, batch_size: int, traced: int) -> tuple[Job, ...]:
    """The batches of a draw, the first of them traced until there are `traced` pictures."""
    size = min(batch_size, draw.count)
    starts = range(draw.first, draw.first + draw.count, size)
    return tuple(
        Job(range(start, min(start + size, draw.indices.stop)), size, traced=start - draw.first < traced)
        for start in starts
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """What a batch leaves.

    extra_calls: of QNCD's probes;  trace: of the float twin, where traced;  free, forced: (2, calls) float64, the power
    of the float twin's latents (outputs) and of the difference, call by call, None where not measured.
    """

    pictures: Pictures
    description: Description | None
    extra_calls: int
    trace: Trace | None = None
    free: np.ndarray | None = None
    forced: np.ndarray | None = None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it by name, for an npz."""
        named: dict[str, Any] = {f"pictures.{f.name}": getattr(self.pictures, f.name) for f in fields(Pictures)}
        if self.description is not None:
            named |= {f"description.{name}": part for name, part in self.description._asdict().items()}
        if self.trace is not None:
            named |= {f"trace.{f.name}": getattr(self.trace, f.name) for f in fields(Trace)}
        named |= {"extra_calls": np.int64(self.extra_calls), "free": self.free, "forced": self.forced}
        return {name: np.asarray(array) for name, array in named.items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Batch:
        """Raises TypeError or KeyError if some are missing."""
        parts: dict[str, dict[str, Any]] = {
            part: {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"{part}.")}
            for part in ("pictures", "description", "trace")
        }
        return cls(
            pictures=Pictures(**{"images": None, **parts["pictures"]}),
            description=Description(**parts["description"]) if parts["description"] else None,
            extra_calls=int(arrays["extra_calls"]),
            trace=Trace(**parts["trace"]) if parts["trace"] else None,
            free=arrays.get("free"),
            forced=arrays.get("forced"),
        )


def draw_batch(
    sampler: Sampler, draw: Draw, job: Job, lens: Lens, *, teacher_forced: bool = True, tick: Tick = lambda _: None
) -> Batch:
    """Sample and describe one batch.

    teacher_forced: measure the output SNR of a traced batch too, at the price of running it once more.
    """
    states: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    free = np.zeros((2, len(sampler.steps))) if job.exact is not None else None
    extra_calls = 0

    def on_state(state: State) -> None:
        nonlocal extra_calls
        extra_calls = max(extra_calls, state.extra_calls)
        tick(len(state.x))
        if not job.traced:
            return
        here = sampler.on_host(state)
        if job.exact is not None and free is not None:
            exact = job.exact.x[state.call]
            free[:, state.call] = power(exact), power(here.x - exact)
        else:
            states.append((here.x_in, here.raw, here.x))

    pictures = sampler.sample(job.indices, labels=draw.labels, seed=draw.seed, batch_size=job.size, on_state=on_state)
    return Batch(
        pictures=pictures,
        description=lens.describe(pictures),
        extra_calls=extra_calls,
        trace=Trace(*map(np.stack, zip(*states, strict=True))) if states else None,
        free=free,
        forced=_forced(sampler, draw, job, tick) if job.exact is not None and teacher_forced else None,
    )


def draw_batches(sampler: Sampler, draw: Draw, lens: Lens) -> Iterator[Batch]:
    """All batches of a draw, untraced, one by one."""
    for job in plan_jobs(draw, batch_size=sampler.batch_size, traced=0):
        yield draw_batch(sampler, draw, job, lens)


def _forced(sampler: Sampler, draw: Draw, job: Job, tick: Tick) -> np.ndarray:
    """Powers of the float twin's raw output and of the network's error, at the inputs of the twin's trajectory."""
    assert job.exact is not None
    powers = np.zeros((2, len(sampler.steps)))
    model = sampler.model_for(job.indices, labels=draw.labels, batch_size=job.size)
    for call, (step, x_in, raw) in enumerate(zip(sampler.steps, job.exact.x_in, job.exact.raw, strict=True)):
        powers[:, call] = power(raw), power(model(x_in, step.t) - raw)
        tick(len(x_in))
    return powers

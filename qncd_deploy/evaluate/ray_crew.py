"""Batches spread over processes, on this machine or a cluster, with Ray: each worker opens its own engines.

The bundle must lie at the same path on every machine; what is drawn travels back to the process that asked for it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported: it would report home

import ray
from ray.exceptions import RayActorError, RayTaskError

from qncd_deploy.bundle import check_files
from qncd_deploy.errors import EngineError, QncdError, first_line
from qncd_deploy.evaluate.batches import Batch, Job, Tick, draw_batch
from qncd_deploy.evaluate.crew import Task
from qncd_deploy.evaluate.features import Lens
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.sampler import Sampler

if TYPE_CHECKING:
    from typing import Self


_ANSWER_S = 10.0
_START_S = 300.0
"""How long the first worker may take to start: a process and its imports on a slow machine, not on one that is full."""


class RayCrew:
    """As many workers as there are CPUs for, `threads` each, on one machine; a context manager that lets them go.

    A worker gets batches once it has answered: where others use the cluster too, some may never start.

    address: of a running cluster, such as "10.0.0.1:6379"; None for this machine.
    """

    def __init__(self, *, address: str | None = None, threads: int = 1) -> None:
        """Raises EngineError if no cluster answers."""
        if address is not None:
            _require_answer(address)
        ray.init(address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        self._threads, self._size = _crew_size(ray.nodes(), threads)
        self._workers: list[Any] = []
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._task: Task | None = None

    def draw(
        self, task: Task, variant: Variant, jobs: Iterable[Job], *, sampler: Sampler, lens: Lens, tick: Tick
    ) -> Iterator[tuple[Job, Batch]]:
        """Raises: QncdError as draw_batch does, EngineError if a worker dies or none starts."""
        del lens  # the workers' own
        self._hire(task)
        waiting = iter(jobs)
        running: dict[Any, tuple[Any, Job]] = {}
        following = next(waiting, None)
        try:
            while running or following is not None:
                while self._idle and following is not None:
                    worker = self._idle.pop()
                    running[worker.draw.remote(variant, following)] = worker, following
                    following = next(waiting, None)
                starting = self._starting if following is not None else {}
                done = _first([*running, *starting], timeout=None if running else _START_S)
                if done in self._starting:
                    self._idle.append(self._starting.pop(done))
                    _result(done)
                    continue
                worker, job = running.pop(done)
                self._idle.append(worker)
                batch: Batch = _result(done)
                tick(len(sampler.steps) * len(job.indices) * (1 if batch.forced is None else 2))
                yield job, batch
        finally:  # after an error some are at work still, and take what comes next when they are done
            self._idle += [worker for worker, _ in running.values()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()

    def _hire(self, task: Task) -> None:
        if self._task is task:
            return
        for worker in self._workers:
            ray.kill(worker)
        hire = ray.remote(_Worker).options(num_cpus=self._threads)
        own = replace(task, draw=replace(task.draw, threads=self._threads))
        self._workers = [hire.remote(own) for _ in range(self._size)]
        self._idle, self._starting = [], {worker.answer.remote(): worker for worker in self._workers}
        self._task = task


def _crew_size(nodes: Iterable[Mapping[str, Any]], threads: int) -> tuple[int, int]:
    """CPUs of a worker and how many workers there is room for. A worker is on one machine, so CPUs that are left over
    there do not count; where no machine has `threads`, it has as many as the largest one.
    """
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    threads = max(1, min(threads, max(cpus, default=1)))
    return threads, max(1, sum(each // threads for each in cpus))


def _first(references: list[Any], *, timeout: float | None) -> Any:
    """The first of them that is done. Raises EngineError if none is within `timeout` seconds."""
    done, _ = ray.wait(references, num_returns=1, timeout=timeout)
    if not done:
        raise EngineError(
            f"ray: no worker started within {timeout:g} s. Are all CPUs of the cluster taken? Wait, or give fewer "
            "--threads."
        )
    return done[0]


def _require_answer(address: str) -> None:
    """Ray itself would wait for minutes. Raises EngineError if nothing listens there, or it is no HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError) as exc:
        raise EngineError(
            f"ray: no cluster at {address} ({first_line(exc)}). Start one with `ray start --head`, or leave "
            "--ray-address out."
        ) from exc


class _Worker:
    """One process: the feature network, and the sampler of the last variant that was asked for."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._lens: Lens | None = None
        self._open: tuple[Variant, Sampler] | None = None

    def answer(self) -> None:
        """The process is there."""

    def draw(self, variant: Variant, job: Job) -> Batch:
        """Opening is left to the first call: an error there reaches the caller as it is."""
        task = self._task
        if self._lens is None:
            check_files(task.bundle.path, task.bundle.manifest)  # another machine may hold another one
            self._lens = Lens.open(task.bundle, task.backend, features=task.features, threads=task.draw.threads)
        if self._open is None or self._open[0] != variant:
            if self._open is not None:
                self._open[1].close()
            self._open = variant, variant.open(task.bundle, task.draw)
        return draw_batch(self._open[1], task.draw, job, self._lens, teacher_forced=task.teacher_forced)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as exc:
        if isinstance(exc.cause, QncdError):
            raise exc.cause from None
        raise
    except RayActorError as exc:
        raise EngineError(
            f"ray: a worker died ({first_line(exc)}). What was drawn is kept: run again, with more "
            "--threads (so fewer workers) or a smaller --batch-size if memory ran out."
        ) from exc

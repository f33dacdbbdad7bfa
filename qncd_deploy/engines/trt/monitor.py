"""What a builder tells while it builds, and how Ctrl-C stops it.

Its callbacks come from threads of its own, and Python runs signal handlers in the main thread alone, which a builder
does not give back for minutes. So the build runs in a worker, the caller's thread waits, and what it is told to stop by
is read at the builder's next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

from qncd_deploy.engines.trt.library import Library

TICKS = 1000
"""How much a whole build is, as progress is told."""

_BEAT = 0.2
"""Seconds. A signal that comes just before a wait begins does not end it, but is seen when it ends."""

Result = TypeVar("Result")


def in_worker(work: Callable[[threading.Event], Result]) -> Result:
    """work(stopped) in a thread of its own. What it raises comes out here; so does Ctrl-C, once `stopped`, which it
    sets, has ended the work.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="qncd-build") as pool:  # waits for its thread when left
        pool.submit(bool).result()  # Ctrl-C while a thread starts would leave one behind that nobody waits for
        try:
            future = pool.submit(work, stopped)
            while not wait([future], timeout=_BEAT).done:
                pass
            return future.result()
        except KeyboardInterrupt:
            stopped.set()
            raise


class Watched:
    """Progress of one build.

    monitor: an IProgressMonitor, for the builder's configuration;  raised: what `on_progress` raised, which stops the
    build, since the library's callbacks must not raise.
    """

    def __init__(
        self, library: Library, stopped: threading.Event, on_progress: Callable[[int, int], None] | None
    ) -> None:
        self.raised: BaseException | None = None
        self._stopped = stopped
        self._on_progress = on_progress or (lambda done, total: None)
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._shown = 0
        self.monitor = _monitor(library, self)

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = _Phase(parent, steps)

    def step(self, name: str, step: int) -> bool:
        """Whether to go on."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
            if self.raised is None:
                try:
                    self._show()
                except BaseException as exc:
                    self.raised = exc
            return self.raised is None and not self._stopped.is_set()

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def _show(self) -> None:
        """Phases nest: a step of a phase is its children's work."""
        roots = [self._share(name) for name, phase in self._phases.items() if phase.parent is None]
        self._shown = max(self._shown, round(TICKS * max(roots, default=0.0)))
        self._on_progress(self._shown, TICKS)

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        children = [self._share(child) for child, other in self._phases.items() if other.parent == name]
        return min(1.0, (phase.done + max(children, default=0.0)) / max(1, phase.steps))


class _Phase:
    def __init__(self, parent: str | None, steps: int) -> None:
        self.parent, self.steps, self.done = parent, steps, 0


def _monitor(library: Library, watched: Watched) -> Any:
    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            watched.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            return watched.step(name, step)

        def phase_finish(self, name: str) -> None:
            watched.finish(name)

    return Monitor()

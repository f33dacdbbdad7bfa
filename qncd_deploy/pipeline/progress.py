"""How long work tells what it does; the command line draws it, libraries and tests keep silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Tick = Callable[[int, int], None]
"""Told what is done and how much there is in all."""


class Progress(Protocol):
    def stage(self, title: str) -> AbstractContextManager[Tick]:
        """A stage of the work, from entering to leaving the block."""
        ...

    def note(self, text: str) -> None:
        """Something to know while the work goes on."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Tick]:
        yield lambda done, total: None

    def note(self, text: str) -> None:
        pass

"""Progress bars on standard error, and none where that is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qncd_deploy.pipeline.progress import Tick


class Bars:
    """One line per stage: what it is, how far it is, time spent and time left; notes, which need no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Tick]:
        if not self._console.is_terminal:
            yield lambda done, total: None
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=False) as progress:
            task = progress.add_task(title, total=None)

            def tick(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield tick
            if progress.tasks[0].total is None:  # a stage that counts nothing is done when it ends
                progress.update(task, total=1, completed=1)

"""How the tests run the command line: in this process, which is quick, or in one of its own, as a user does."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qncd_deploy.cli import qncd as group
from qncd_deploy.cli import run

ROOT = Path(__file__).parents[1]

SMALL = ("--n-steps", "4", "--calib-size", "4", "--calib-steps", "4", "--fit-size", "8", "--eval-size", "4")
"""An export of seconds: four pictures of four steps wherever the defaults have many."""


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of standard error. Fails the test if there is a traceback, or anything else beside it."""
        assert "Traceback" not in self.err, self.err
        (line,) = self.err.strip().splitlines()
        return line


def qncd(*args: object) -> Finished:
    """`qncd ARGS` in this process. Log messages go to pytest's own handlers, not to standard error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(group, [str(arg) for arg in args], "qncd")
    return Finished(code, out.getvalue(), err.getvalue())


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "qncd_deploy", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    """The environment in which a child process finds this package, on one thread."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def qncd_process(*args: object, cwd: Path | None = None, **env: str) -> Finished:
    """`qncd ARGS` in a process of its own."""
    done = subprocess.run(
        command(*args), cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=600, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Export:
    """An export that was made: of what and how, the folder of its shelves, and what `--json` said."""

    source: Path
    options: tuple[object, ...]
    home: Path
    name: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def bundle(self) -> Path:
        return self.home / f"export/{self.name}-w8a8"

    def again(self, *more: object) -> tuple[object, ...]:
        """The arguments that made it, and more."""
        shelves = ("--calib-dir", self.home / "calib_data", "--onnx-dir", self.home / "export")
        return ("export", self.source, "--int8", *self.options, *shelves, *more)

    def made(self) -> Export:
        done = qncd(*self.again("--json"))
        assert done.code == 0, done.err
        return replace(self, facts=json.loads(done.out))

    def copy(self, home: Path) -> Export:
        """The same in another place, to be changed."""
        shutil.copytree(self.home, home)
        return replace(self, home=home)

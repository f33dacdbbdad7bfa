"""The line that a page gives for making it again is the one that was typed, word for word."""

from __future__ import annotations

import shlex

import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxscript")

from qncd_deploy.cli import CONTEXT, run
from qncd_deploy.cli import qncd as group
from qncd_deploy.cli.export import export_command
from qncd_deploy.errors import ExportError

WORDS = ["my model.ckpt", "--no-resume", "--step-bits", "4,8", "--max-size", "12MB", "--int4", "--exclude", "a|b"]


@pytest.mark.parametrize("name", ["qncd", "qncd-export"])
def test_an_export_is_made_again_by_what_was_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def export(options: object, progress: object, *, command: str) -> None:
        told.append(command)
        raise ExportError("far enough")

    monkeypatch.setattr("qncd_deploy.pipeline.export.export", export)
    if name == "qncd":
        typed = ["export", *WORDS]
        run(group, typed, name)
    else:
        typed = WORDS
        run(export_command, typed, name, context_settings=CONTEXT)
    assert [shlex.split(line) for line in told] == [[name, *typed]]


def test_without_arguments_it_is_what_the_shell_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr("qncd_deploy.pipeline.export.export", lambda *_, command: told.append(command) or 1 / 0)
    monkeypatch.setattr("sys.argv", ["/somewhere/qncd-export", "a.ckpt", "--int8"])
    with pytest.raises(ZeroDivisionError):
        run(export_command, None, "qncd-export", context_settings=CONTEXT)
    assert told == ["qncd-export a.ckpt --int8"]

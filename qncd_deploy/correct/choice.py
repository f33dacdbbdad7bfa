"""Which of the fitted tables a run takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from qncd_deploy.correct.methods import METHODS
from qncd_deploy.correct.record import CorrectionTable, ScheduleKey, Tables, identity_table
from qncd_deploy.errors import UsageError

log = logging.getLogger(__name__)


def chosen_table(method: str, key: ScheduleKey, searched: Sequence[Tables], *, bundle: Path) -> CorrectionTable:
    """The table of a method, of what auto chose, or of no correction, from the first file that has it.

    searched: not empty, the last one speaks for what is nowhere;  bundle: for messages. Raises ScheduleError if a
    method that was named is nowhere, UsageError if there is no such method.
    """
    if method == "off":
        return identity_table(key)
    if method == "auto":
        for tables in searched:
            if (choice := tables.choice(key)) is not None:
                return tables.find(choice, key)
        log.info(
            "no correction was fitted for this backend and schedule, so none is used. Fit one with `%s`.",
            key.fit_command(bundle),
        )
        return identity_table(key)
    for tables in searched:
        if any(table.method == method and table.key == key for table in tables.tables):
            return tables.find(method, key)
    fitted = {table.method for tables in searched for table in tables.tables}
    if method not in METHODS.keys() | fitted:  # which `qncd fit` would not change
        made = "".join(f", {name}" for name in sorted(fitted - METHODS.keys()))
        raise UsageError(f"correction {method}: expected auto, off or one of {', '.join(METHODS)}{made}.")
    return searched[-1].find(method, key)

"""Folders of paired outputs while corrections are fitted, so that an interrupted fit goes on where it stopped.

FOLDER/SOURCE-KEY/    what one network says of the pictures to fit on, see study.RecordedStudy; SOURCE is the
                      beginning of its hash, KEY that of the hash of everything that decides its outputs
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd_deploy.engines.remembering import Answers
from qncd_deploy.evaluate.store import network_ids
from qncd_deploy.files import canonical_json, exclusive
from qncd_deploy.runtime import Bundle

if TYPE_CHECKING:
    from typing import Self

_DIGITS = 16


class Recordings:
    """The recordings of one bundle, which no other process uses at the same time.

    answers: of the same networks in this process, to whoever asks them what was asked before.
    """

    def __init__(self, folder: Path, *, resume: bool = True) -> None:
        self.folder = folder
        self.answers = Answers()
        self._resume = resume
        self._used: set[Path] = set()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, bundle: Bundle, *, resume: bool = True) -> Iterator[Self]:
        """Delete what is of networks that the bundle no longer holds; afterwards what was used, unless the block ends
        with an error. What interrupted fits of other ways to sample left stays.

        resume: go on with what is there. Raises: BundleError if another process uses the folder or it cannot be
        written.
        """
        with exclusive(folder):
            held = {source[:_DIGITS] for source in network_ids(bundle)}
            for path in folder.glob(f"{'?' * _DIGITS}-{'?' * _DIGITS}"):
                if path.name[:_DIGITS] not in held:
                    shutil.rmtree(path, ignore_errors=True)
            found = cls(folder, resume=resume)
            yield found
            for path in found._used:
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # not empty: recordings of another fit
                folder.rmdir()

    def place(self, source: str, facts: Mapping[str, Any]) -> Path:
        """The folder of a network's outputs. source: its hash;  facts: everything that decides them."""
        key = hashlib.sha256(canonical_json({**facts, "source": source}).encode()).hexdigest()
        path = self.folder / f"{source[:_DIGITS]}-{key[:_DIGITS]}"
        if not self._resume and path not in self._used:
            shutil.rmtree(path, ignore_errors=True)
        self._used.add(path)
        return path

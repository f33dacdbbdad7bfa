"""Drawn batches on disk, so that an interrupted evaluation goes on where it stopped and memory holds one at a time.

    FOLDER/KEY/about.json                     everything that decides these pictures; KEY is the beginning of its sha256
    FOLDER/KEY/FIRST-COUNT[-traced].npz       one batch, see batches.Batch

A batch is written whole or not at all. What belongs to a graph that the bundle no longer holds is deleted when the
folder is used again; what an evaluation used is deleted when it is done, unless it is to be kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.bundle import CONDITION_ROLES
from qncd_deploy.correct.record import StepFix
from qncd_deploy.engines.base import backend_status, default_backend, find_backend
from qncd_deploy.errors import BundleError
from qncd_deploy.evaluate.batches import Batch
from qncd_deploy.evaluate.crew import Task
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.files import atomic_file, canonical_json, exclusive, load_npz, make_folder, save_npz, sha256_file
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler

SCHEMA = 1
_ABOUT = "about.json"


def batch_facts(task: Task, variant: Variant, sampler: Sampler, exact: str | None) -> dict[str, Any]:
    """Everything that decides the batches of a variant, but for which pictures each holds; threads move no more than
    last bits.

    sampler: of the variant, open;  exact: key of the float twin's batches, None for the twin itself.
    """
    table, draw = sampler.table, task.draw
    own = (variant.bundle or task.bundle).manifest
    features = task.features
    if features is None and "features" in task.bundle.manifest.roles:
        features = task.bundle.file("features")
    return {
        "schema": SCHEMA,
        "source": sampler.network.source,
        "decoding": {
            role: own.files[own.roles[role]].sha256 for role in ("decoder", *CONDITION_ROLES) if role in own.roles
        },
        "engine": table.key.backend,
        "version": backend_status(find_backend(variant.backend or default_backend())).version,
        "sampling": table.key.id,
        "correction": _digest(table.fixes),
        "seed": draw.seed,
        "labels": draw.labels,
        "rows": min(sampler.batch_size, draw.count),
        "features": None if features is None else [task.backend, sha256_file(features)],
        "exact": exact,
        "teacher_forced": task.teacher_forced,
    }


def network_ids(bundle: Bundle) -> set[str]:
    """Network.source of every network that the bundle holds, alone and with those that it takes turns with."""
    graphs = [role for role, name in bundle.manifest.roles.items() if ".onnx" in name]
    return {bundle.network_id(roles) for role in graphs for roles in ((role,), bundle.network_roles(role))}


def key_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]


class Store:
    """A folder of shelves, one for each way to draw, that no other process uses at the same time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: set[Path] = set()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, bundles: Collection[Bundle], *, keep: bool = False) -> Iterator[Store]:
        """Delete what is of other graphs than these bundles hold; afterwards, without `keep`, what was used, unless the
        block ends with an error.

        Raises: BundleError if another process uses the folder or it cannot be written.
        """
        with exclusive(folder):
            store = cls(folder)
            store._sweep(set().union(*map(network_ids, bundles)))
            yield store
            if not keep:
                store._clear()

    def shelf(self, facts: Mapping[str, Any]) -> Shelf:
        """The batches that were drawn exactly so."""
        path = self.folder / key_of(facts)
        self._used.add(path)
        return Shelf(path, facts)

    def _sweep(self, sources: Collection[str]) -> None:
        for about in self.folder.glob(f"*/{_ABOUT}"):
            try:
                source = json.loads(about.read_text(encoding="utf-8"))["source"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not ours
            if source not in sources:
                shutil.rmtree(about.parent, ignore_errors=True)

    def _clear(self) -> None:
        for path in self._used:
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # not empty: batches of another evaluation
            self.folder.rmdir()


class Shelf(MutableMapping[str, Batch]):
    """Batches by the name of their job, each read from its file when asked for. A damaged one counts as absent."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path = path
        self._facts = facts

    def __getitem__(self, name: str) -> Batch:
        file = self._path / f"{name}.npz"
        if not file.exists():
            raise KeyError(name)
        try:
            return Batch.from_arrays(load_npz(file))
        except (BundleError, KeyError, TypeError) as exc:
            raise KeyError(name) from exc

    def __setitem__(self, name: str, batch: Batch) -> None:
        make_folder(self._path)
        if not (about := self._path / _ABOUT).exists():
            with atomic_file(about) as partial:
                partial.write_text(canonical_json(self._facts), encoding="utf-8")
        save_npz(self._path / f"{name}.npz", batch.to_arrays())

    def __delitem__(self, name: str) -> None:
        (self._path / f"{name}.npz").unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._path.glob("*.npz")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _digest(fixes: Collection[StepFix]) -> str:
    """Content of a correction table, whatever the method is called."""
    digest = hashlib.sha256()
    for fix in fixes:
        for each in fields(StepFix):
            value = getattr(fix, each.name)
            facts = (value.shape, value.dtype.name) if isinstance(value, np.ndarray) else value
            digest.update(f"{each.name} {facts!r}\n".encode())
            if isinstance(value, np.ndarray):
                digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()

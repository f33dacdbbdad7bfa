"""Compiled networks on disk: NAME with NAME.json beside it, which says what it was made from and for.

    {"schema": 1, "sha256": hash of NAME's bytes, ...: the facts of whoever compiled it}

A reader refuses what has changed on disk and what was made for anything else, and says what to run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qncd_deploy.errors import EngineError
from qncd_deploy.files import atomic_file, canonical_json, make_folder

if TYPE_CHECKING:
    from qncd_deploy.engines.base import BaseEngine

SCHEMA = 1
AGAIN = "Run `qncd build` again here."

Facts = TypeVar("Facts")
"""A frozen dataclass whose fields are all that a compiled network depends on."""


def save_stored(path: Path, content: bytes, facts: Any) -> None:
    """Write `content` to `path` and a dataclass of facts to the .json beside it; a folder that is not there is made."""
    make_folder(path.parent)
    with atomic_file(path) as partial:
        partial.write_bytes(content)
    _state(path, hashlib.sha256(content).hexdigest(), facts)


def move_stored(path: Path, target: Path, facts: Any) -> None:
    """Rename what save_stored wrote, and an engine's cache, within a file system; facts: what it says from now on."""
    sha256 = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
    for held in (path, path.with_suffix(".cache")):
        if held.is_file():
            held.replace(target.with_suffix(held.suffix))
    _state(target, sha256, facts)
    if path != target:
        drop_stored(path)


def drop_stored(path: Path) -> None:
    """Remove what save_stored wrote and what lies beside it, and the folder if nothing else is in it."""
    for suffix in (path.suffix, ".json", ".cache"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _state(path: Path, sha256: str, facts: Any) -> None:
    with atomic_file(path.with_suffix(".json")) as partial:
        partial.write_text(canonical_json({"schema": SCHEMA, "sha256": sha256, **asdict(facts)}), encoding="utf-8")


def load_stored(path: Path, parse: Callable[[dict[str, Any]], Facts]) -> tuple[bytes, Facts]:
    """The content and its facts, from what `parse` makes of the .json without schema and sha256.

    Raises: EngineError if either file is missing, not of this schema, or changed on disk, and if `parse` raises.
    """
    try:
        content = path.read_bytes()
        data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        schema, sha256 = data.pop("schema"), str(data.pop("sha256"))
        if schema != SCHEMA:
            raise EngineError(f"{path}: blob schema {schema}, this version reads {SCHEMA}. {AGAIN}")
        facts = parse(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EngineError(f"{path}: not a compiled blob with its .json beside it ({exc}). {AGAIN}") from exc
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise EngineError(f"{path}: changed on disk (sha256 {found[:12]}..., {sha256[:12]}... was written). {AGAIN}")
    return content, facts


def stored_source(path: Path) -> str | None:
    """The graph's hash that a compiled network says it was made from; None where it does not say."""
    try:
        source = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(source)


def stored_for(path: Path, state: Sequence[int]) -> bool:
    """Whether a compiled network takes states (or latents) of (C, H, W), as far as it says what it takes."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    profiles = facts.get("profiles") if isinstance(facts, dict) else None
    if profiles is None:  # one that is compiled for single shapes, and passed over where they are others
        return True
    planes = [shape[1:] for profile in profiles for shape in profile.values() if len(shape) == 4]
    return list(state) in planes


def give_blobs(engines: Mapping[str, BaseEngine], blobs: Sequence[Path], *, others: Collection[str] = ()) -> None:
    """Give compiled networks to the engines, by the hash of the graph that each runs, of whose graphs they were made.

    others: hashes of graphs that are not open, whose compiled networks are passed over. A folder may hold some for
    other machines and versions. Raises EngineError for an engine that can use none of those there are for it.
    """
    refused: dict[str, EngineError] = {}
    loaded = set()
    for blob in blobs:
        source = stored_source(blob)
        if source in others:
            continue
        if source not in engines:
            source = next(iter(engines))  # whose engine says what is wrong with it
        try:
            engines[source].load_blob(blob, source=source)
            loaded.add(source)
        except EngineError as exc:
            refused.setdefault(source, exc)
    for source in refused.keys() - loaded:
        raise refused[source]


def require_same(path: Path, found: Any, wanted: Any, words: Mapping[str, str]) -> None:
    """Refuse facts that differ from those wanted.

    words: field -> a sentence with {has} and {want}, in the order they are compared;  what has no words is not.

    Raises: EngineError.
    """
    for name, sentence in words.items():
        if (has := getattr(found, name)) != (want := getattr(wanted, name)):
            raise EngineError(f"{path}: {sentence.format(has=str(has)[:60], want=str(want)[:60])}. {AGAIN}")

"""A CompVis YAML config as typed sections: every error names the file and the full entry."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from qncd_deploy.errors import CheckpointError

T = TypeVar("T", int, float, bool, str)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def read_config(path: Path) -> Section:
    """The root of a YAML file, loaded safely. Raises CheckpointError if it is missing or not a YAML mapping."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = "" if line is None else f" (line {line + 1})"
        raise CheckpointError(f"{path}: not valid YAML{place}. Give the CompVis config with --config FILE.") from error
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path}: not a mapping, expected 'model:'. Give the CompVis config with --config FILE.")
    return Section(path, "", data)


@dataclass(frozen=True)
class Section:
    """A mapping inside the config: `file`, the dotted `place` of this mapping, its entries."""

    file: Path
    place: str
    entries: Mapping[str, Any]

    def name(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def fail(self, key: str, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.file}: {self.name(key)} {problem}")

    def section(self, key: str) -> Section:
        value = self.entries.get(key)
        if not isinstance(value, Mapping):
            found = "missing" if value is None else f"{value!r}"
            self.fail(key, f"is {found}, expected a section. Give the checkpoint's own config with --config FILE.")
        return Section(self.file, self.name(key), value)

    def target(self) -> str:
        """The class this section instantiates, without its module path: forks move modules, and keep class names."""
        return self.need("target", str).rpartition(".")[2]

    def need(self, key: str, kind: type[T]) -> T:
        if self.entries.get(key) is None:
            self.fail(key, "is missing. Give the checkpoint's own config with --config FILE.")
        return self._cast(key, self.entries[key], kind)

    def get(self, key: str, default: T) -> T:
        value = self.entries.get(key)
        return default if value is None else self._cast(key, value, type(default))

    def need_ints(self, key: str) -> tuple[int, ...]:
        value = self.entries.get(key)
        if not isinstance(value, (list, tuple)):
            self.fail(key, f"is {value!r}, expected a list of whole numbers.")
        return tuple(self._cast(key, item, int) for item in value)

    def only(self, known: Mapping[str, object]) -> None:
        """Refuse entries that change the network and are not supported; an entry of null is as good as absent.

        `known` maps an entry to the one value that is supported, or to None if any value is.
        """
        for key, value in self.entries.items():
            if value is None:
                continue
            if key not in known:
                self.fail(key, "is not supported.")
            if known[key] is not None and value != known[key]:
                self.fail(key, f"is {value!r}, only {known[key]!r} is supported.")

    def _cast(self, key: str, value: Any, kind: type[T]) -> T:
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            with suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-4 as a word
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fail(key, f"is {value!r}, expected {_KINDS[kind]}.")
        return value

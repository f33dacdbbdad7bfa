"""The files of a diffusers or transformers folder: where a part lies, its config, its weights whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qncd_deploy.checkpoint import read_checkpoint
from qncd_deploy.errors import CheckpointError

DIFFUSERS_WEIGHTS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
TRANSFORMERS_WEIGHTS = {"safetensors": "model", "bin": "pytorch_model"}
"""How the two libraries call weights, by file type."""


@dataclass(frozen=True)
class Folder:
    """A model's folder. files: what was read from it so far, by a name for the manifest."""

    path: Path
    files: dict[str, Path] = field(default_factory=dict)

    def has(self, part: str) -> bool:
        return (self.path / part).is_dir()

    def home(self, part: str) -> Path:
        """The part's own folder, or the root where it has none, as in google/ddpm-cifar10-32."""
        return self.path / part if self.has(part) else self.path

    def config(self, part: str, *, home: Path | None = None, name: str = "config.json") -> Mapping[str, Any]:
        """A JSON object. Raises CheckpointError if there is none."""
        path = (home or self.home(part)) / name
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            inside = sorted(item.name for item in path.parent.iterdir())[:5]
            raise CheckpointError(
                f"{path}: missing, a diffusers folder needs its {part}. Found here: {', '.join(inside) or 'nothing'}."
            ) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable JSON. Download or copy it again.") from error
        if not isinstance(data, dict):
            raise CheckpointError(
                f"{path}: holds a {type(data).__name__}, expected an object. Download or copy it again."
            )
        self.files[f"{part}-config"] = path
        return data

    def weights(self, part: str, stems: Mapping[str, str]) -> list[Path]:
        """The files that hold a part's tensors. Raises CheckpointError if a file or a shard is missing."""
        found = _weight_files(self.home(part), stems)
        self.files.update({f"{part}/{file.name}": file for file in found})
        return found


def all_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of a file and of its further shards, mapped. Raises CheckpointError as read_checkpoint does."""
    return {name: tensor for file in files for name, tensor in read_checkpoint(file).tensors.items()}


def _weight_files(home: Path, stems: Mapping[str, str]) -> list[Path]:
    """One file or its shards; safetensors before pickles, full precision before a variant such as fp16."""
    for suffix, stem in stems.items():
        found = [*home.glob(f"{stem}*.{suffix}"), *home.glob(f"{stem}*.{suffix}.index*.json")]
        whole = sorted((path for path in found if "-of-" not in path.name), key=_variant)
        if whole:
            return _shards(home, whole[0]) if whole[0].suffix == ".json" else whole[:1]
        if found:
            raise CheckpointError(f"{home}: has shards, and no {stem}.{suffix}.index.json. Download it too.")
    names = " or ".join(f"{stem}.{suffix}" for suffix, stem in stems.items())
    raise CheckpointError(f"{home}: no weights, expected {names}. Download or copy them.")


def _variant(path: Path) -> tuple[int, str]:
    """Orders weights: the longer the name, an index apart, the more it is a variant."""
    return len(path.name.replace(".index", "").removesuffix(".json")), path.name


def _shards(home: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a shard index. Download or copy it again.") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names the shard {name!r}, expected a file of its own folder.")
    missing = [name for name in names if not (home / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{home}: shards are missing, {len(missing)} of {len(names)} (first: {missing[0]}). Download or copy them."
        )
    return [home / name for name in names]

"""What lies in a bundle and whether it is still what was written: manifest.json, its schema and its hashes.

The manifest names every file with its sha256, what each is for, and all that sampling needs to know of the network. It
holds no clock time, path, host name or speed, so that the same inputs give the same bytes. report.html is not hashed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qncd_deploy.errors import BundleError
from qncd_deploy.files import atomic_file, canonical_json, sha256_file
from qncd_deploy.specs import SIDES, TensorSpec

SCHEMA = 1
MANIFEST = "manifest.json"
UNHASHED = (MANIFEST, "report.html")

CONDITION_ROLES = ("class-embedding", "prompt-embedding")
"""Files that say what the network is told of every class or prompt."""

HASHED_AT_OPEN = 256 << 20
"""Bytes hashed when a bundle is opened (a fraction of a second), smallest files first; the others are checked by
size.
"""


@dataclass(frozen=True)
class ConditionFacts:
    """How a class reaches the network: "class-tokens" (a row of the embedding table), "class-labels" (its number), or
    "text" (row k of the prompt table is the bundle's prompt k; the null class, the last row, is the negative prompt).

    classes: how many there are, the null class of classifier-free guidance included;  null_class: its number, if any.
    """

    kind: str
    classes: int
    null_class: int | None

    @property
    def valid(self) -> tuple[int, ...]:
        """The classes a picture can have: all but the null class."""
        return tuple(k for k in range(self.classes) if k != self.null_class)


@dataclass(frozen=True)
class TextFacts:
    """How prompts become a condition, see prompts.py; the bundle's own are in the file of the role "prompts".

    encoders: text encoders, one or two;  max_length: tokens that each reads, the prompt cut or padded to as many;
    time_ids: the picture's sizes that the network is told besides (original height and width, top and left of the crop,
    height and width asked for), None where it takes neither these nor the pooled text;
    zero_null: where no negative prompt is given, the null row is zeros, not the encoders' output for "".
    """

    encoders: int
    max_length: int
    time_ids: tuple[int, ...] | None = None
    zero_null: bool = False

    @property
    def roles(self) -> tuple[tuple[str, str], ...]:
        """The bundle's (tokenizer, text encoder) by role, in the order in which their tokens are joined."""
        return (("tokenizer", "text-encoder"), ("tokenizer-2", "text-encoder-2"))[: self.encoders]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextFacts:
        time_ids = data["time_ids"]
        return cls(**{**data, "time_ids": None if time_ids is None else tuple(time_ids)})


@dataclass(frozen=True)
class ModelFacts:
    """All that the host loop needs to know of a network.

    inputs: the UNet's inputs;  latent_shape, image_shape: (C, H, W), image_shape None when there is no decoder;
    schedule: Schedule.to_json() or None for a bring-your-own graph without one;
    sampler: the defaults {"scheduler", "n_steps", "eta"};  guidance_scale: 1 is off;
    text: how prompts are encoded, None where classes or nothing condition the network;
    size_multiple: what the sides of other pictures than those of image_shape are multiples of, in pixels; None where
    it draws no others.
    """

    family: str
    inputs: tuple[TensorSpec, ...]
    latent_shape: tuple[int, ...]
    image_shape: tuple[int, ...] | None
    schedule: Mapping[str, Any] | None
    sampler: Mapping[str, Any] | None
    guidance_scale: float
    condition: ConditionFacts | None
    text: TextFacts | None = None
    size_multiple: int | None = None

    @property
    def sized_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs, with the sides of latent_shape where pictures may have any size."""
        if self.size_multiple is None:
            return self.inputs
        sides = dict(zip(SIDES, self.latent_shape[1:], strict=True))
        return tuple(
            replace(spec, shape=tuple(sides.get(size, size) if isinstance(size, str) else size for size in spec.shape))
            for spec in self.inputs
        )

    @property
    def picture_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of a picture; None where there is no decoder and the latents are none."""
        are_pictures = len(self.latent_shape) == 3 and self.latent_shape[0] in (1, 3)
        return self.image_shape or (self.latent_shape if are_pictures else None)

    @property
    def sides(self) -> tuple[int, int] | None:
        """(height, width) of a picture; None where picture_shape is."""
        shape = self.picture_shape
        return None if shape is None else (shape[1], shape[2])

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelFacts:
        image_shape, condition, text = data["image_shape"], data["condition"], data.get("text")
        return cls(
            family=data["family"],
            inputs=tuple(TensorSpec.from_json(spec) for spec in data["inputs"]),
            latent_shape=tuple(data["latent_shape"]),
            image_shape=None if image_shape is None else tuple(image_shape),
            schedule=data["schedule"],
            sampler=data["sampler"],
            guidance_scale=float(data["guidance_scale"]),
            condition=None if condition is None else ConditionFacts(**condition),
            text=None if text is None else TextFacts.from_json(text),
            size_multiple=data.get("size_multiple"),
        )


@dataclass(frozen=True)
class FileFacts:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """manifest.json as a value.

    roles: what each file is for, {"master", "ort", "trt", "float", "decoder", "plan", "corrections", ...: file name};
    a text model's are "prompts", "prompt-embedding" and those of TextFacts.roles;
    inputs: sha256 of what the bundle was made from, by bare name;  recipe: every option of the export that can change
    the result;  versions: of the libraries that made it;  quality: figures measured at export;  files: filled by
    write_manifest.
    """

    name: str
    format: str
    model: ModelFacts
    roles: Mapping[str, str]
    inputs: Mapping[str, str]
    recipe: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    quality: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileFacts] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        values = {key: value for key, value in data.items() if key != "schema"}
        values["model"] = ModelFacts.from_json(data["model"])
        values["files"] = {name: FileFacts(**facts) for name, facts in data["files"].items()}
        for name in [*values["files"], *values["roles"].values()]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} lies outside the bundle")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `folder`, put the result in its manifest.json and return the completed manifest."""
    assert not any("/" in name for name in manifest.inputs), "inputs go by bare name: a path would tell machines apart"
    files = {name: FileFacts(sha256_file(folder / name), (folder / name).stat().st_size) for name in _contents(folder)}
    missing = set(manifest.roles.values()) - set(files)
    assert not missing, f"roles name files that were not written: {sorted(missing)}"
    manifest = replace(manifest, files=files)
    with atomic_file(folder / MANIFEST) as partial:
        partial.write_text(canonical_json(manifest.to_json()), encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest without looking at the files it names (see check_files).

    Raises: BundleError if there is none, if it cannot be understood, or if its schema is not SCHEMA.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        found = f"no {MANIFEST} in it" if folder.is_dir() else "no such folder"
        raise BundleError(f"{folder}: {found}, so it is not a bundle. Make one with `qncd export`.") from None
    except (OSError, ValueError) as exc:
        raise BundleError(f"{path}: cannot be read ({exc}). Run `qncd export` again.") from exc
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise BundleError(
            f"{path}: schema {schema!r}, this version of qncd-deploy reads schema {SCHEMA}. "
            "Install the version that wrote it, or run `qncd export` again."
        )
    try:
        manifest = Manifest.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BundleError(f"{path}: not a complete manifest ({exc}). Run `qncd export` again.") from exc
    return manifest


def check_files(folder: Path, manifest: Manifest, *, limit: int | None = HASHED_AT_OPEN) -> None:
    """Refuse a bundle whose files are not those that were written.

    limit: bytes to hash, None for all. Beyond it files are checked by size alone, the largest ones last: `qncd
    verify` hashes all. Files that the manifest does not name are not read and not refused here (file_problems with
    limit None lists them).

    Raises: BundleError naming the first file that is missing or changed.
    """
    for problem in file_problems(folder, manifest, limit=limit):
        raise BundleError(f"{folder}/{problem}. Run `qncd export` again.")


def file_problems(folder: Path, manifest: Manifest, *, limit: int | None = None) -> Iterator[str]:
    """One sentence for each file that is missing or changed and, with limit None, each that the manifest does not
    name.
    """
    hashed = 0
    for name, facts in sorted(manifest.files.items(), key=lambda item: (item[1].bytes, item[0])):
        path = folder / name
        if not path.is_file():
            yield f"{name}: missing, {facts.bytes} bytes were written"
            continue
        if (size := path.stat().st_size) != facts.bytes:
            yield f"{name}: changed on disk, {size} bytes, {facts.bytes} were written"
            continue
        hashed += size
        if (limit is None or hashed <= limit) and (found := sha256_file(path)) != facts.sha256:
            yield f"{name}: changed on disk, sha256 {found[:12]}..., {facts.sha256[:12]}... was written"
    if limit is None:
        yield from (f"{name}: not part of the bundle" for name in _contents(folder) if name not in manifest.files)


def _contents(folder: Path) -> list[str]:
    """Names of the files in a bundle that a manifest hashes, relative to it; hidden files are not part of it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = (path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    return sorted(name for name in visible if name not in UNHASHED)

"""Engines on disk: what each was built from and for, in its .json, and refusing any other.

tensorrt-f16-10.3.0-sm87-b16.engine                 this machine's GPU, 16 pictures at a time
tensorrt-rtx-f16-1.7.1.116-sm86+sm89-b1+4.engine    ahead of time, two profiles
tensorrt-f32-10.3.0-sm87-decoder-b16.engine         another graph of the bundle
tensorrt-f16-10.3.0-sm87-b1-512x512+768x512.engine  of a bundle that draws any size: for pictures of these
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qncd_deploy.engines.stored import AGAIN, load_stored, require_same, save_stored
from qncd_deploy.engines.trt.build import BuiltEngine
from qncd_deploy.engines.trt.device import Device
from qncd_deploy.engines.trt.kernels import KernelTable
from qncd_deploy.engines.trt.library import Library, parse_version
from qncd_deploy.engines.trt.options import BuildOptions, Hardware
from qncd_deploy.errors import EngineError

SUFFIX = ".engine"


@dataclass(frozen=True)
class EngineFacts:
    """What an engine was built from and for, and what runs in it.

    source: hash of the graph and its weights;  version: of the library;  device: name of the GPU that it was built on,
    None if ahead of time;  targets: compute capabilities that it was built for;  profiles, level, workspace, hardware,
    version_compatible: as in BuildOptions, as asked for;  table: empty while it is not built;  unchecked: why it was
    not held against the float network, None if it was.
    """

    source: str
    backend: str
    version: str
    device: str | None
    targets: tuple[str, ...]
    profiles: tuple[Mapping[str, tuple[int, ...]], ...]
    level: int | None
    workspace: int | None
    hardware: Hardware
    version_compatible: bool
    table: KernelTable = field(default_factory=KernelTable)
    unchecked: str | None = None

    @classmethod
    def of(cls, library: Library, device: Device | None, options: BuildOptions, *, source: str) -> EngineFacts:
        """Those of an engine to be built with these options. device: None to build ahead of time."""
        return cls(
            source=source,
            backend=library.flavour,
            version=library.version_text,
            device=None if device is None else device.name,
            targets=options.targets if device is None else (device.sm,),
            profiles=tuple(dict(shapes) for shapes in options.profiles),
            level=options.level,
            workspace=options.workspace,
            hardware=options.hardware,
            version_compatible=options.version_compatible,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineFacts:
        values = {
            **data,
            "targets": tuple(data["targets"]),
            "profiles": tuple({name: tuple(shape) for name, shape in profile.items()} for profile in data["profiles"]),
            "table": KernelTable.from_json(data["table"]),
        }
        return cls(**values)

    @property
    def stem(self) -> str:
        """Library, version and GPUs, as file names have them."""
        return f"{self.version}-{'+'.join(self.targets)}"


def save_engine(path: Path, built: BuiltEngine, facts: EngineFacts) -> EngineFacts:
    """Write an engine and its .json. Returns the facts with the table of what was built."""
    facts = replace(facts, table=built.table)
    save_stored(path, built.plan, facts)
    return facts


def held_engine(path: Path, wanted: EngineFacts) -> EngineFacts | None:
    """The facts of an engine that is on disk, whole, and built as wanted; else None: it is to be built."""
    try:
        _, found = load_stored(path, EngineFacts.from_json)
    except EngineError:
        return None
    return found if replace(found, table=wanted.table, unchecked=wanted.unchecked) == wanted else None


def timing_file(shelf: Path, library: Library, device: Device) -> Path:
    """Where full TensorRT keeps what it measured of its kernels, on the shelf that the folders of engines stand on."""
    return shelf / f"timing-{library.flavour}-{library.version_text}-{device.sm}.cache"


def load_engine(path: Path, library: Library, device: Device, *, source: str) -> tuple[bytes, EngineFacts]:
    """An engine and its facts.

    Raises: EngineError if it is not whole, or was built from another graph, with another version, or for another GPU.
    """
    plan, found = load_stored(path, EngineFacts.from_json)
    wanted = replace(found, source=source, backend=library.flavour, version=library.version_text)
    if found.version_compatible and parse_version(found.version) <= library.version:
        wanted = replace(wanted, version=found.version)
    require_same(path, found, wanted, _WORDS)
    if not _runs_on(found, device):
        made = ", ".join(found.targets) if found.device is None else f"{found.device} ({found.targets[0]})"
        raise EngineError(f"{path}: built for {made}, this GPU is {device.name} ({device.sm}). {AGAIN}")
    return plan, found


_WORDS = {
    "source": "made from another graph (sha256 {has:.12}..., not {want:.12}...)",
    "backend": "an engine of {has}, not of {want}",
    "version": "built with version {has}, this is {want}",
}


def _runs_on(facts: EngineFacts, device: Device) -> bool:
    if facts.device is None or facts.hardware == "same-compute-capability":
        return device.sm in facts.targets
    if facts.hardware == "ampere-plus":
        return int(device.sm.removeprefix("sm")) >= _AMPERE
    return (facts.device, facts.targets) == (device.name, (device.sm,))


_AMPERE = 80

"""Compile a bundle's network for this machine and keep the result; no torch."""

from __future__ import annotations

import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qncd_deploy.engines.base import Remainder, backend_status, find_backend, make_engine_id
from qncd_deploy.errors import EngineError
from qncd_deploy.runtime import Bundle


@dataclass(frozen=True)
class Built:
    """A compiled engine. seconds: None if it was there already, made of the same graph for this machine."""

    path: Path
    bytes: int
    integer_kernels: int
    planned_layers: int
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def line(self) -> str:
        how = "up to date" if self.seconds is None else f"built in {self.seconds:.1f} s"
        runs = f"{self.planned_layers} layers planned in INT8, {self.integer_kernels} kernels run on integers"
        return f"{self.path}  {self.bytes / 2**20:.1f} MiB  {how}  {runs}"


def build(
    bundle: Bundle,
    folder: Path,
    *,
    backend: str,
    remainder: Remainder | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
) -> Built:
    """Write FOLDER/ENGINE-VERSION-DEVICE-bN.blob and its .json, unless they are there and still right.

    Raises: EngineError for a backend that compiles nothing, BuildFailed if it refuses the graph.
    """
    engine_id = make_engine_id(backend, remainder)
    planned = sum(layer["weight_bits"] is not None for layer in bundle.plan["layers"])
    options = {"remainder": remainder, "batch_size": batch_size, "threads": threads, "correction": "off"}
    version = backend_status(find_backend(backend)).version
    with bundle.sampler(backend, **options) as sampler:
        device = re.sub(r"[^a-z0-9]+", "", (platform.processor() or platform.machine()).lower())
        path = folder / f"{engine_id}-{version}-{device}-b{sampler.batch_size}.blob"
        if path.exists():
            try:
                with bundle.sampler(backend, blobs=[path], **options) as held:
                    kernels = sum(kernel.count for kernel in held.kernels() if kernel.integer)
                return Built(path, path.stat().st_size, kernels, planned, None)
            except EngineError:
                pass  # of another graph, library or device: made again below
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        sampler.save_blob(path)
        seconds = time.perf_counter() - started
        kernels = sum(kernel.count for kernel in sampler.kernels() if kernel.integer)
    return Built(path, path.stat().st_size, kernels, planned, seconds)

"""What is measured of one engine: raw samples, time spent inside it, the size of its graph, memory; and where."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.engines.base import BaseEngine

NOISY_IQR = 0.1
"""Spread over median from which a measurement says so, as torch.utils.benchmark does."""


@dataclass(frozen=True)
class Measurement:
    """Raw samples of one quantity and what they were taken of."""

    name: str
    unit: str
    samples: tuple[float, ...]
    context: Mapping[str, str]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """Distance of the quartiles."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(high - low)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why not to trust the median; () if there is no reason."""
        found = []
        if len(self.samples) < 3:
            found.append(f"{self.name}: {len(self.samples)} samples show no spread, take 3 rounds or more")
        elif self.iqr > NOISY_IQR * abs(self.median):
            found.append(
                f"{self.name}: noisy, the quartiles are {100 * self.iqr / abs(self.median):.0f} % of the median apart; "
                "is the machine busy?"
            )
        return tuple(found)

    def __str__(self) -> str:
        return f"{self.median:.3g} {self.unit} ± {self.iqr / 2:.2g}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "iqr": self.iqr,
            "samples": list(self.samples),
            "context": dict(self.context),
            "warnings": list(self.warnings),
        }


class Stopwatch(BaseEngine):
    """An engine that notes how long each call of another one takes, in seconds, until its results are there."""

    def __init__(self, engine: BaseEngine) -> None:
        super().__init__(engine.engine_id, engine.path, engine.inputs, engine.outputs)
        self.arrays = engine.arrays
        self.seconds: list[float] = []
        self._engine = engine

    @property
    def row_sizes(self) -> tuple[int, ...]:
        return self._engine.row_sizes

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.arrays.wait()  # for what came before, such as the sampler's update on a GPU
        started = time.perf_counter()
        outputs = self._engine._run(feeds)
        self.arrays.wait()
        self.seconds.append(time.perf_counter() - started)
        return outputs

    def _close(self) -> None:
        self._engine.close()


def graph_bytes(*paths: Path) -> int:
    """Size of ONNX graphs of one folder with the external tensors they refer to, each counted once, wherever it lies.

    Data files are shared between siblings, so their sizes say nothing of one graph. Read without the onnx library:
    location, offset and length of a tensor are three consecutive entries in its protobuf message.
    """
    tensors = {tensor for path in paths for tensor in _EXTERNAL.findall(path.read_bytes())}
    return sum(path.stat().st_size for path in paths) + sum(int(length) for *_, length in tensors)


_EXTERNAL = re.compile(
    rb"\x0a\x08location\x12.([^\x00-\x1f]+)j.\x0a\x06offset\x12.(\d+)j.\x0a\x06length\x12.(\d+)", re.DOTALL
)


def resident_bytes() -> int | None:
    """Memory that this process holds at the moment; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, str]:
    """What figures were measured on, by class: no name of the machine and no path."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()

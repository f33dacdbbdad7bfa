"""What a bench measured of every way to run a network, and how that is shown.

call_ms      one network call on a guided batch: the median over a run's calls, without the first
call_p90_ms  their 90th percentile
speedup      the baseline's call_ms / this one's, within the same round
picture_ms   the sampling loop of a batch / its pictures, extra calls of a correction included, decoding not
host         share of the loop's time that is spent outside the network
host_ms      that time / network calls

On a GPU every call is waited for on both sides, since it could not be timed else; the sampler itself waits once a
batch, so there host and picture_ms are upper bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from qncd_deploy.engines.base import Kernel
from qncd_deploy.evaluate.judge import Figures
from qncd_deploy.evaluate.measure import Measurement


@dataclass(frozen=True, eq=False)
class BenchRow:
    """One variant. network: the bundle's format or "float";  engine: backend and precision of its float layers;
    graph_bytes: the graph and the weights it reads;  engine_bytes: of the compiled network, None where none is stored
    or built;  memory_bytes: by how much opening and warming it up grew the process, None where the system does not
    tell;  device_bytes: by how much it grew what is in use on the GPU, None for engines whose arrays are the host's;
    kernels: as BaseEngine.kernels;  figures: None for the reference.
    """

    name: str
    network: str
    engine: str
    correction: str
    extra_calls: int
    call_ms: Measurement
    call_p90_ms: Measurement
    speedup: Measurement
    picture_ms: Measurement
    host: Measurement
    host_ms: Measurement
    graph_bytes: int
    engine_bytes: int | None
    memory_bytes: int | None
    device_bytes: int | None
    kernels: tuple[Kernel, ...]
    figures: Figures | None

    @property
    def integer_kernels(self) -> int | None:
        """How many operations run on 8-bit integers; None where the engine cannot tell."""
        return sum(kernel.count for kernel in self.kernels if kernel.integer) if self.kernels else None

    @property
    def pictures_per_second(self) -> Measurement:
        """Of the sampling loop, as picture_ms."""
        each = self.picture_ms
        return Measurement("pictures_per_second", "1/s", tuple(1e3 / ms for ms in each.samples), each.context)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (
            *(self.call_ms, self.call_p90_ms, self.speedup),
            *(self.picture_ms, self.pictures_per_second, self.host, self.host_ms),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "network": self.network,
            "engine": self.engine,
            "correction": self.correction,
            "extra_calls": self.extra_calls,
            **{measured.name: measured.to_json() for measured in self.measurements},
            "graph_bytes": self.graph_bytes,
            "engine_bytes": self.engine_bytes,
            "memory_bytes": self.memory_bytes,
            "device_bytes": self.device_bytes,
            "integer_kernels": self.integer_kernels,
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "figures": None if self.figures is None else self.figures.to_json(),
        }


@dataclass(frozen=True, eq=False)
class BenchResult:
    """baseline: the row that every speedup is against;  reference: the float twin that figures are against;
    context: what was run, and on what.
    """

    rows: tuple[BenchRow, ...]
    baseline: str
    reference: str
    context: Mapping[str, str]

    def __getitem__(self, name: str) -> BenchRow:
        return {row.name: row for row in self.rows}[name]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is doubtful in the times, by row. A ratio or share of doubtful times adds nothing to say."""
        return tuple(f"{row.name}, {warning}" for row in self.rows for warning in row.call_ms.warnings)

    def to_json(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "reference": self.reference,
            "context": dict(self.context),
            "warnings": list(self.warnings),
            "rows": [row.to_json() for row in self.rows],
        }


def bench_table(result: BenchResult) -> Table:
    """The result for a terminal: medians with half their interquartile range, PSNR beside every speed."""
    facts = result.context
    table = Table(
        title=f"{facts['pictures a batch']} pictures a batch, {facts['sampler']}, {facts['rounds']} rounds",
        caption=(
            f"engine: library and precision of its float layers; speedup over {result.baseline}; outside: ms a call "
            "and share of the loop; MiB: of the compiled engine where there is one, else of the graph; memory: MiB, "
            f"on the GPU where the loop runs there; PSNR to {result.reference}, {facts['pictures compared']} pictures"
        ),
    )
    table.add_column("", no_wrap=True)
    table.add_column("engine")
    for heading in ("ms / call", "p90", "speedup", "pictures / s", "outside", "MiB", "memory", "int8 ops", "PSNR dB"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        memory = row.memory_bytes if row.device_bytes is None else row.device_bytes
        size = row.graph_bytes if row.engine_bytes is None else row.engine_bytes
        integers = row.integer_kernels
        table.add_row(
            row.name,
            row.engine,
            f"{row.call_ms.median:.2f} ± {row.call_ms.iqr / 2:.2f}",
            f"{row.call_p90_ms.median:.2f} ± {row.call_p90_ms.iqr / 2:.2f}",
            f"{row.speedup.median:.2f}",
            f"{row.pictures_per_second.median:.3g}",
            f"{row.host_ms.median:.2f} ({100 * row.host.median:.1f} %)",
            f"{size / 2**20:.1f}",
            "" if memory is None else f"{memory / 2**20:.0f}",
            "" if integers is None else str(integers),
            "reference" if row.name == result.reference else _fidelity(row.figures),
        )
    return table


def _fidelity(figures: Figures | None) -> str:
    if figures is None or (figures.psnr is None and figures.diverged is None):
        return ""
    return "diverged" if figures.psnr is None else f"{figures.psnr.value:.2f}"

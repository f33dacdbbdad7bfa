"""report.html: one self-contained page that says what a bundle is worth and how to make it again.

Styles, curves (SVG) and pictures (PNG) are inside; nothing is fetched and no script runs. Everything that comes from
outside is escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from qncd_deploy.bundle import Manifest
from qncd_deploy.evaluate import plots
from qncd_deploy.evaluate.bench_result import BenchResult
from qncd_deploy.evaluate.compare import Comparison
from qncd_deploy.evaluate.contest import OFF, Contest, Kind
from qncd_deploy.evaluate.judge import Figures
from qncd_deploy.evaluate.metrics import decibels, psnr
from qncd_deploy.evaluate.table import ESTIMATES
from qncd_deploy.files import atomic_file

PAIRS = 8
"""Pictures shown beside the float twin's."""

GAIN = 8
"""How much differences are magnified: grey is none, one level of 255 is barely visible without."""

KINDS: Mapping[Kind, str] = {
    "none": "no correction",
    "published": "published",
    "ours": "ours",
    "combined": "made of the best",
}


@dataclass(frozen=True, eq=False)
class ReportData:
    """All that the page shows.

    manifest: of the bundle; its quality["smoothing"] and ["splitting"], if any, are what pipeline.export writes;
    layers: those of plan.json;  graph_bytes: by file name, measure.graph_bytes;  command: what makes the page again;
    comparison: None for a network that cannot sample;  machine: what it was measured on, measure.machine;  variant:
    which one of the comparison the bundle is, its first by default;  contests: how auto chose, by engine.
    """

    manifest: Manifest
    layers: Sequence[Mapping[str, Any]]
    graph_bytes: Mapping[str, int]
    command: str
    comparison: Comparison | None = None
    machine: Mapping[str, str] = field(default_factory=dict)
    variant: str | None = None
    bench: BenchResult | None = None
    contests: Mapping[str, Contest] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def main(self) -> Figures | None:
        """The figures of the bundle as it samples by default."""
        if self.comparison is None:
            return None
        return self.comparison.variants[0] if self.variant is None else self.comparison[self.variant]


@dataclass(frozen=True)
class Pair:
    """A picture in three: PNG files as data URLs."""

    title: str
    exact: str
    found: str
    difference: str


class Drawing(NamedTuple):
    """A plot and what it shows."""

    title: str
    words: str
    svg: Markup


@dataclass(frozen=True)
class LayerGroups:
    """Quantized layers, the one that loses most first, and the others by reason. best_db: the largest of all SQNR."""

    quantized: Sequence[Mapping[str, Any]]
    floats: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def best_db(self) -> float:
        return max((db for layer in self.quantized for db in _sqnr(layer)), default=0.0)


def write_report(path: Path, data: ReportData) -> None:
    """Write the page, whole or not at all. Raises BundleError if the folder cannot be written."""
    page = render(data)
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def render(data: ReportData) -> str:
    """The page as text; the same data give the same bytes."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"mib": _mib, "snr": _snr, "number": _number, "percent": _percent, "shape": _shape}
    template = environment.from_string(files("qncd_deploy.evaluate").joinpath("report.html").read_text("utf-8"))
    main = data.main
    return template.render(
        data=data,
        manifest=data.manifest,
        main=main,
        columns=[] if data.comparison is None else _columns(data.comparison),
        pairs=[] if data.comparison is None or main is None else list(_pairs(data.comparison, main.name)),
        gain=GAIN,
        overview=[] if data.comparison is None else list(_overview(data.comparison)),
        curves=[] if data.comparison is None else list(_curves(data.comparison)),
        contests=data.contests,
        kinds=KINDS,
        contest_plots=lambda contest: list(_contest_plots(contest)),
        layers=group_layers(data.layers),
        smoothing=data.manifest.quality.get("smoothing", {}),
        splitting=data.manifest.quality.get("splitting", {}),
        bits=data.manifest.quality.get("bits", {}),
    )


def group_layers(layers: Sequence[Mapping[str, Any]]) -> LayerGroups:
    """The order in which layers are worth looking at."""
    quantized = [layer for layer in layers if layer["weight_bits"] is not None]
    floats: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        if layer["weight_bits"] is None:
            floats.setdefault(layer["reason"], []).append(layer)
    return LayerGroups(sorted(quantized, key=_worst_sqnr), floats)


def _worst_sqnr(layer: Mapping[str, Any]) -> float:
    return min(_sqnr(layer), default=math.inf)


def _sqnr(layer: Mapping[str, Any]) -> list[float]:
    return [layer[name] for name in ("sqnr_db", "act_sqnr_db") if layer.get(name) is not None]


def _pairs(comparison: Comparison, name: str) -> Iterator[Pair]:
    if name not in comparison.images:
        return
    exact, found = comparison.images[comparison.reference.name][:PAIRS], comparison.images[name][:PAIRS]
    difference = np.clip(128 + GAIN * (found.astype(np.int32) - exact), 0, 255).astype(np.uint8)
    fidelity = psnr(found, exact)
    for i, caption in enumerate(comparison.captions[: len(exact)]):
        place = f"{caption}, " if caption else ""
        yield Pair(f"{place}{fidelity[i]:.1f} dB", *map(_png, (exact[i], found[i], difference[i])))


def _png(picture: np.ndarray) -> str:
    """(H, W, 1 or 3) uint8 as a data URL."""
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _columns(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Those of ESTIMATES that something was measured of."""
    ways = (comparison.reference, *comparison.variants)
    return [column for column in ESTIMATES if any(getattr(way, column[0]) is not None for way in ways)]


def _overview(comparison: Comparison) -> Iterator[Drawing]:
    """What tells variants apart, where there are several."""
    for name, title, less_is_better in (("shift", "Shift", True), ("psnr", "PSNR", False)):
        found = {way.name: each for way in comparison.variants if (each := getattr(way, name)) is not None}
        if len(found) > 1:
            ranked = sorted(found.items(), key=lambda item: item[1].value, reverse=not less_is_better)
            label = "shift, less is better" if less_is_better else "PSNR in dB, more is better"
            words = "with 95 % intervals, the best on top; dashed: without correction"
            yield Drawing(title, words, plots.intervals(dict(ranked), base=OFF, label=label))


def _curves(comparison: Comparison) -> Iterator[Drawing]:
    """Of the first variant, of the one without correction, and of the best others."""
    first, *others = comparison.variants
    others.sort(key=lambda way: (way.correction != OFF, way.shift.value if way.shift else 0.0))
    ways = [first, *others]
    free = {way.name: way.latent_snr_db for way in ways if way.latent_snr_db}
    # corrections of one network share its curve
    forced = {values: way.name for way in reversed(ways) if (values := way.output_snr_db)}
    if free:
        words = "the state after each network call against the float twin's"
        if len(free) > plots.LINES:
            words += f"; {plots.LINES} of {len(free)}, the best by shift"
        yield Drawing("Latent, running freely", words, plots.curves(_most(free)))
    if forced:
        lines = {name: values for values, name in reversed(forced.items())}
        words = "what one call alone adds, before any correction"
        yield Drawing("Network output, at the float twin's inputs", words, plots.curves(_most(lines)))


def _most(lines: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    return dict(islice(lines.items(), plots.LINES))


def _contest_plots(contest: Contest) -> Iterator[Drawing]:
    label = "shift, less is better" if contest.less_is_better else "PSNR in dB, more is better"
    marked = {contest.choice: "taken"}
    if contest.best_published not in (None, contest.choice):
        marked[contest.best_published] = "best published"
    held_out = (contest.figures, f"On {contest.pictures} held-out pictures")
    first = (contest.screened, f"On the first {contest.half} of them")
    # where only those competed that came far on another engine, both are of the same
    shown = [held_out] if contest.screened.keys() <= contest.figures.keys() else [held_out, first]
    for tried, title in shown:
        finite = {name: tried[name] for name in contest.order(tried) if math.isfinite(tried[name])}
        if OFF in finite and len(finite) > 1:
            drawn = plots.bars(finite, base=OFF, label=label, less_is_better=contest.less_is_better, marked=marked)
            yield Drawing(title, "bars begin at the dashed line: without correction", drawn)
    if lines := contest.curves(plots.LINES):
        words = "the state after each network call against the float twin's, on the first held-out pictures"
        yield Drawing("Error, call by call", words, plots.curves(lines))


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"


def _snr(error: float) -> float:
    """A relative squared error in decibels, error-free being infinite."""
    return decibels(1.0, error)


def _number(value: float | None, digits: str = ".2f") -> str:
    return "" if value is None else f"{value:{digits}}"


def _percent(value: float | None, digits: str = ".1f") -> str:
    return "" if value is None else f"{100 * value:{digits}} %"


def _shape(value: Sequence[int]) -> str:
    return "×".join(map(str, value))

"""report.html: one self-contained page that says what a bundle is worth and how to make it again.

Styles, curves (SVG) and pictures (PNG) are inside; nothing is fetched and no script runs. Everything that comes from
outside is escaped.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import MaxNLocator
from PIL import Image

from qncd_deploy.bundle import Manifest
from qncd_deploy.evaluate.bench import BenchResult
from qncd_deploy.evaluate.compare import Comparison
from qncd_deploy.evaluate.judge import Figures
from qncd_deploy.evaluate.metrics import decibels, psnr
from qncd_deploy.files import atomic_file

PAIRS = 8
"""Pictures shown beside the float twin's."""

GAIN = 8
"""How much differences are magnified: grey is none, one level of 255 is barely visible without."""

_COLOURS = ("#2f7ed8", "#e07b28", "#3a9b52", "#b04fc4", "#c43c4b", "#8a7a2f")
_INK = "#010203"  # stands for the colour of the page's text, which only the page knows


@dataclass(frozen=True)
class CorrectionChoice:
    """What `auto` takes on one engine, by which objective ("shift", "psnr"), and its value for every method."""

    engine: str
    choice: str
    objective: str
    figures: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class ReportData:
    """All that the page shows.

    manifest: of the bundle; its quality["smoothing"], if any, is what pipeline.export writes;  layers: those of
    plan.json;  graph_bytes: by file name, measure.graph_bytes;  comparison: None for a network that cannot sample;
    command: what makes the bundle again;  variant: which one of the comparison the bundle is, its first by default.
    """

    manifest: Manifest
    layers: Sequence[Mapping[str, Any]]
    graph_bytes: Mapping[str, int]
    command: str
    comparison: Comparison | None = None
    variant: str | None = None
    corrections: Sequence[CorrectionChoice] = ()
    bench: BenchResult | None = None
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


@dataclass(frozen=True)
class LayerGroups:
    """Quantized layers, the one that loses most first, and the others by reason."""

    quantized: Sequence[Mapping[str, Any]]
    floats: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


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
        pairs=[] if data.comparison is None or main is None else list(_pairs(data.comparison, main.name)),
        gain=GAIN,
        curves=[] if data.comparison is None else list(_curves(data.comparison)),
        layers=group_layers(data.layers),
        smoothing=data.manifest.quality.get("smoothing", {}),
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
    found = [layer[name] for name in ("sqnr_db", "act_sqnr_db") if layer.get(name) is not None]
    return min(found, default=math.inf)


def _pairs(comparison: Comparison, name: str) -> Iterator[Pair]:
    if name not in comparison.images:
        return
    exact, found = comparison.images[comparison.reference.name][:PAIRS], comparison.images[name][:PAIRS]
    difference = np.clip(128 + GAIN * (found.astype(np.int32) - exact), 0, 255).astype(np.uint8)
    fidelity = psnr(found, exact)
    for i, label in enumerate(comparison.labels[: len(exact)]):
        place = f"class {label}, " if label >= 0 else ""
        yield Pair(f"{place}{fidelity[i]:.1f} dB", *map(_png, (exact[i], found[i], difference[i])))


def _png(picture: np.ndarray) -> str:
    """(H, W, 1 or 3) uint8 as a data URL."""
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _curves(comparison: Comparison) -> Iterator[tuple[str, str, Markup]]:
    """Title, explanation and SVG of every curve there is something to draw for."""
    named = {figures.name: figures for figures in comparison.variants}
    free = {name: figures.latent_snr_db for name, figures in named.items() if figures.latent_snr_db}
    forced = {name: figures.output_snr_db for name, figures in named.items() if figures.output_snr_db}
    if free:
        title, words = "Latent, running freely", "the state after each network call against the float twin's"
        yield title, words, _curve(free, salt="latent")
    if forced:
        title = "Network output, at the float twin's inputs"
        yield title, "what one call alone adds, before any correction", _curve(forced, salt="output")


def _curve(lines: Mapping[str, Sequence[float]], *, salt: str) -> Markup:
    """Decibels over network calls as inline SVG, in the page's own text colour and font."""
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 11}
    for part in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"):
        style[part] = _INK
    with mpl.rc_context(style):
        plot = Plot(figsize=(6.4, 3.4), layout="constrained")
        axes = plot.add_subplot()
        for number, (name, values) in enumerate(lines.items()):
            drawn = [value if math.isfinite(value) else math.nan for value in values]
            calls = range(1, len(values) + 1)
            colour = _COLOURS[number % len(_COLOURS)]
            label = name.lstrip("_")  # which would hide it from the legend
            axes.plot(calls, drawn, marker="o", markersize=3, color=colour, label=label)
        axes.set(xlabel="network call", ylabel="SNR in dB")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        plot.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog, which names a DTD on the network
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows the namespaces
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)  # as wide as the page lets it
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page's own
    return Markup(svg.replace(_INK, "currentColor"))


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

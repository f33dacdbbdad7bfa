"""Plots of a report as inline SVG, in the page's own text colour and font: curves, bars and intervals.

As wide as a phone's column, so that their text is as large as the page's there. The same data give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from qncd_deploy.evaluate.metrics import Estimate

LINES = 6
"""As many curves as can be told apart."""

_COLOURS = ("#2f7ed8", "#e07b28", "#3a9b52", "#b04fc4", "#c43c4b", "#8a7a2f")
_BETTER, _WORSE, _MARKED = "#7fa8d9", "#c98b8b", ("#3a9b52", "#e07b28")
_INK = "#010203"  # stands for the colour of the page's text, which only the page knows
_WIDTH, _ROW = 5.2, 0.21  # inches


def curves(lines: Mapping[str, Sequence[float]]) -> Markup:
    """Decibels over network calls, at most LINES of them; what is infinite is left out."""
    assert len(lines) <= LINES, "more curves than colours"

    def draw(figure: Figure, axes: Axes) -> None:
        for colour, (name, values) in zip(_COLOURS, lines.items(), strict=False):
            drawn = [value if math.isfinite(value) else math.nan for value in values]
            axes.plot(range(1, len(values) + 1), drawn, marker="o", markersize=3, color=colour, label=_label(name))
        axes.set(xlabel="network call", ylabel="SNR in dB")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.2)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)

    return _svg(draw, height=2.8 + _ROW * math.ceil(len(lines) / 2))


def bars(
    values: Mapping[str, float], *, base: str, label: str, less_is_better: bool, marked: Mapping[str, str]
) -> Markup:
    """A bar for every value, from that of `base` to its own; the first on top. All values must be finite.

    marked: up to two names that have a colour of their own, and what to say of them.
    """
    start, colours = values[base], dict(zip(marked, _MARKED, strict=False))

    def draw(_: Figure, axes: Axes) -> None:
        for place, (name, value) in enumerate(values.items()):
            colour = colours.get(name, _BETTER if (value < start) == less_is_better else _WORSE)
            axes.barh(place, value - start, left=start, height=0.7, color=colour)
            axes.plot(value, place, "|", color=colour, markersize=8, markeredgewidth=2)  # for bars of no length
        names = [f"{_label(name)} ({marked[name]})" if name in marked else _label(name) for name in values]
        _rows(axes, names, values.values(), line=start, label=label)

    return _svg(draw, height=0.7 + _ROW * len(values))


def intervals(estimates: Mapping[str, Estimate], *, base: str, label: str) -> Markup:
    """A point with its interval for every estimate, the first on top, and a line at that of `base`, if it is there."""

    def draw(_: Figure, axes: Axes) -> None:
        for place, each in enumerate(estimates.values()):
            axes.plot([each.low, each.high], [place, place], color=_COLOURS[0], linewidth=4, alpha=0.45)
            axes.plot(each.value, place, "o", color=_COLOURS[0], markersize=5)
        ends = [end for each in estimates.values() for end in (each.low, each.value, each.high)]
        line = estimates[base].value if base in estimates else None
        _rows(axes, [_label(name) for name in estimates], ends, line=line, label=label)

    return _svg(draw, height=0.7 + _ROW * len(estimates))


def _label(name: str) -> str:
    """A leading underscore would hide it from a legend."""
    return name.lstrip("_")


def _rows(axes: Axes, names: Sequence[str], values: Iterable[float], *, line: float | None, label: str) -> None:
    """Names down the left side and values along the bottom, in decades where they span more than one."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    held = list(values)
    if min(held) > 0 and max(held) > 10 * min(held):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if max(held) < 1000 * min(held) else (1.0,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if line is not None:
        axes.axvline(line, color=_INK, linewidth=1, linestyle="--")
    axes.grid(axis="x", alpha=0.2)
    axes.set_axisbelow(True)
    axes.set_xlabel(label)


def _svg(draw: Callable[[Figure, Axes], None], *, height: float) -> Markup:
    """What `draw` draws, `height` inches high, without anything that a page would have to fetch."""
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "", "text.parse_math": False, "font.size": 11}
    for part in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"):
        style[part] = _INK
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(figure, axes)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog, which names a DTD on the network
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows the namespaces
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)  # as wide as the page lets it
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page's own
    return Markup(svg.replace(_INK, "currentColor"))

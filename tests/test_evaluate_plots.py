"""Plots: that what is drawn has the size of its value, on an axis that suits the values, in the page's own colours."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("markupsafe")

from qncd_deploy.evaluate.metrics import Estimate
from qncd_deploy.evaluate.plots import LINES, bars, curves, intervals

HALF_A_PIXEL = 0.02  # coordinates are printed with six digits; plots are some 300 points wide


def extents(svg: str, *colours: str) -> list[tuple[float, float]]:
    """Left and right end of every filled shape of these colours, in order."""
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="fill: (#\w{6})', svg)
    found = []
    for path, colour in paths:
        if colour in colours:
            x = np.array(re.findall(r"[ML] ([\d.-]+) [\d.-]+", path), dtype=float)
            found.append((x.min(), x.max()))
    return found


def drawn_bars(values: dict[str, float], **options: object) -> str:
    given = {"base": "off", "label": "shift", "less_is_better": True, "marked": {}} | options
    return str(bars(values, **given))


BLUE, RED, GREEN, ORANGE = "#7fa8d9", "#c98b8b", "#3a9b52", "#e07b28"


def test_bars_reach_from_the_base_to_their_value() -> None:
    svg = drawn_bars({"best": 1.0, "good": 2.0, "off": 4.0, "bad": 7.0})
    best, good = extents(svg, BLUE)
    _, bad = extents(svg, RED)  # off itself is a bar of no length
    unit = good[1] - good[0]  # two units of value
    assert best[1] == pytest.approx(good[1]) == pytest.approx(bad[0], abs=HALF_A_PIXEL)
    assert best[1] - best[0] == pytest.approx(1.5 * unit, abs=HALF_A_PIXEL)
    assert bad[1] - bad[0] == pytest.approx(1.5 * unit, abs=HALF_A_PIXEL)


def test_values_of_several_decades_have_a_logarithmic_axis() -> None:
    svg = drawn_bars({"best": 0.001, "good": 0.01, "off": 0.1})
    best, good, *_ = extents(svg, BLUE, RED)
    assert best[1] - best[0] == pytest.approx(2 * (good[1] - good[0]), abs=HALF_A_PIXEL)
    for tick in (">0.001<", ">0.01<", ">0.1<"):
        assert tick in svg
    zero = drawn_bars({"best": 0.0, "good": 0.05, "off": 0.1})  # which has no logarithm
    best, good, *_ = extents(zero, BLUE, RED)
    assert best[1] - best[0] == pytest.approx(2 * (good[1] - good[0]), abs=HALF_A_PIXEL)


def test_better_is_up_where_more_is_better_and_marks_have_colours_and_words() -> None:
    svg = drawn_bars(
        {"a": 30.0, "b": 28.0, "off": 25.0, "c": 20.0}, less_is_better=False, marked={"a": "taken", "b": "?"}
    )
    ((left, _),) = extents(svg, GREEN)
    ((base, _),) = extents(svg, ORANGE)
    assert left == pytest.approx(base)
    assert any(right == pytest.approx(base, abs=HALF_A_PIXEL) and left < base - 1 for left, right in extents(svg, RED))
    assert ">a (taken)<" in svg and ">b (?)<" in svg and ">c<" in svg


def test_intervals_are_drawn_from_end_to_end() -> None:
    svg = str(intervals({"x": Estimate(2.0, 1.0, 4.0, 8), "off": Estimate(6.0, 5.0, 7.0, 8)}, base="off", label="PSNR"))
    lines = re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \n?"[^>]*stroke-width: 4', svg)
    (x0, x1), (off0, off1) = (map(float, line) for line in lines)
    unit = (off1 - off0) / 2
    assert x1 - x0 == pytest.approx(3 * unit, abs=HALF_A_PIXEL)
    assert off0 - x0 == pytest.approx(4 * unit, abs=HALF_A_PIXEL)
    assert "stroke-dasharray" in svg
    assert "stroke-dasharray" not in str(intervals({"x": Estimate(2.0, 1.0, 4.0, 8)}, base="off", label="PSNR"))


def test_text_is_text_in_the_pages_colour_and_nothing_is_fetched() -> None:
    svgs = [
        str(curves({"_first": (30.0, float("inf"), 20.0), "$x$ <b>": (10.0, 11.0, 12.0)})),
        drawn_bars({"$x$ <b>": 1.0, "off": 2.0}),
    ]
    for svg in svgs:
        assert "currentColor" in svg and "#010203" not in svg and "http" not in svg and "font-family" not in svg
        assert "$x$ &lt;b&gt;" in svg
    assert ">first<" in svgs[0]
    assert svgs[1] == drawn_bars({"$x$ <b>": 1.0, "off": 2.0})


def test_more_curves_than_colours_are_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        curves({str(n): (1.0,) for n in range(LINES + 1)})

"""A comparison for a terminal: every way to run with every figure that there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.table import Table

from qncd_deploy.evaluate.compare import Comparison
from qncd_deploy.evaluate.judge import Figures
from qncd_deploy.evaluate.metrics import Estimate
from qncd_deploy.specs import pixels

ESTIMATES: tuple[tuple[str, str, str], ...] = (
    ("shift", "shift", ".2g"),
    ("psnr", "PSNR dB", ".2f"),
    ("ssim", "SSIM", ".4f"),
    ("lpips", "LPIPS", ".2g"),
    ("feature_rms", "feature RMS", ".2g"),
    ("inception_score", "IS", ".3f"),
    ("accuracy", "accuracy", ".4f"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
    ("fid", "FID", ".3g"),
    ("sfid", "sFID", ".3g"),
    ("data_precision", "precision, data", ".3f"),
    ("data_recall", "recall, data", ".3f"),
)
"""Figure, heading, digits; those to the float twin first."""


_MOST_ACROSS = 5
"""Ways to run that stand side by side; more are listed one below the other."""


def comparison_table(found: Comparison, sides: tuple[int, int] | None = None) -> Table:
    """Estimates with half their interval; figures that nothing was measured of are left out. sides: (height, width) of
    the pictures.
    """
    ways = (found.reference, *found.variants)
    size = "" if sides is None else f" of {pixels(sides)}"
    table = Table(
        title=f"{found.reference.n} pictures{size} from {found.reference.first} on, seed {found.reference.seed}, "
        f"{found.reference.calls} network calls each",
        caption="Figures up to recall: to the float twin's pictures of the same seeds. FID falls when noise is added: "
        "never choose by it. ±: half of a 95 % bootstrap interval.",
    )
    lines = [["", *(way.name for way in ways)], ["engine", *(way.engine for way in ways)]]
    lines.append(["correction", *(_correction(way) for way in ways)])
    for name, heading, digits in ESTIMATES:
        lines.append([heading, *(_interval(getattr(way, name), digits) for way in ways)])
    lines.append(["diverged", *("yes" if way.diverged else "" for way in ways)])
    for name, heading, words in _SERIES:
        lines.append([heading, *(words(series) if (series := getattr(way, name)) else "" for way in ways)])
    lines = [line for line in lines if any(line[1:])]
    headings, *rows = lines if len(found.variants) <= _MOST_ACROSS else zip(*lines, strict=True)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    return table


def _correction(way: Figures) -> str:
    return way.correction + (f" (+{way.extra_calls} calls)" if way.extra_calls else "")


def _interval(found: Estimate | None, digits: str) -> str:
    if found is None:
        return ""
    half = (found.high - found.low) / 2
    return f"{found.value:{digits}}" + (f" ± {half:.1g}" if half else "")


def _ends(values: Sequence[float]) -> str:
    """First and last of a series of decibels."""
    return " .. ".join("exact" if value == math.inf else f"{value:.1f}" for value in (values[0], values[-1]))


def _range(values: Sequence[float]) -> str:
    """The least and the largest of the channels."""
    return f"{min(values):.3g} .. {max(values):.3g}"


_SERIES: tuple[tuple[str, str, Callable[[Sequence[float]], str]], ...] = (
    ("output_snr_db", "output SNR dB, first .. last call", _ends),
    ("latent_snr_db", "latent SNR dB, first .. last call", _ends),
    ("latent_mean_error", "latent mean - float's, in its std", _range),
    ("latent_std_ratio", "latent std / float's", _range),
)
"""Figure that has a value for every call or channel, heading, and what is shown of it."""

"""A comparison for a terminal: a row for each way to run, a column for each figure that there is."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.table import Table

from qncd_deploy.evaluate.compare import Comparison
from qncd_deploy.evaluate.judge import Figures
from qncd_deploy.evaluate.metrics import Estimate

_COLUMNS: tuple[tuple[str, str, str], ...] = (
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


def comparison_table(found: Comparison) -> Table:
    """Estimates with half their interval; figures that nothing was measured of are left out."""
    rows = (found.reference, *found.variants)
    table = Table(
        title=f"{found.reference.n} pictures from {found.reference.first} on, seed {found.reference.seed}, "
        f"{found.reference.calls} network calls each",
        caption="shift to recall: to the float twin's pictures of the same seeds. FID falls when noise is added: never "
        "choose by it. ±: half of a 95 % bootstrap interval",
    )
    table.add_column("", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    table.add_column("correction")
    shown = [column for column in _COLUMNS if any(getattr(row, column[0]) is not None for row in rows)]
    for _, heading, _ in shown:
        table.add_column(heading, justify="right")
    series = [each for each in _SERIES if any(each[1](row) for row in rows)]
    for heading, _ in series:
        table.add_column(heading, justify="right")
    for row in rows:
        extra = f" (+{row.extra_calls} calls)" if row.extra_calls else ""
        table.add_row(
            row.name,
            row.engine,
            row.correction + extra,
            *(_interval(getattr(row, name), digits) for name, _, digits in shown),
            *(words(row) for _, words in series),
        )
    return table


def _interval(found: Estimate | None, digits: str) -> str:
    if found is None:
        return ""
    half = (found.high - found.low) / 2
    return f"{found.value:{digits}}" + (f" ± {half:.1g}" if half else "")


def _ends(values: tuple[float, ...]) -> str:
    """First and last of a series of decibels."""
    return " .. ".join("exact" if math.isinf(value) else f"{value:.1f}" for value in (values[0], values[-1]))


_SERIES: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("output SNR dB", lambda row: _ends(row.output_snr_db) if row.output_snr_db else ""),
    ("latent SNR dB", lambda row: _ends(row.latent_snr_db) if row.latent_snr_db else ""),
    (
        "latent std / float",
        lambda row: (
            f"{min(row.latent_std_ratio):.3f} .. {max(row.latent_std_ratio):.3f}" if row.latent_std_ratio else ""
        ),
    ),
)
"""Heading, and what is shown of a figure that has a value for every call or channel."""

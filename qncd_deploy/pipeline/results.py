"""Where `qncd eval` and `qncd bench` write what they measured: a JSON file, or a folder with a page beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qncd_deploy.errors import BundleError, UsageError
from qncd_deploy.evaluate.bench_result import BenchResult
from qncd_deploy.evaluate.compare import Comparison
from qncd_deploy.files import atomic_file, canonical_json, make_folder, require_writable
from qncd_deploy.pipeline.proof import write_page
from qncd_deploy.runtime import AS_EXPORTED, Bundle, Sampling


def check_output(out: Path) -> None:
    """Refuse what write_json could not write, before anything is measured. Raises as that does."""
    if out.is_dir():
        require_writable(out)
        return
    if out.suffix not in ("", ".json") or (out.exists() and out.suffix != ".json"):
        raise UsageError(f"{out}: neither a .json file nor a folder. Name one of these after -o.")
    if not out.parent.is_dir():
        raise BundleError(f"{out}: the folder {out.parent} does not exist. Make it, or name another.")
    require_writable(out.parent)


def write_json(out: Path, facts: Mapping[str, Any], *, name: str) -> None:
    """Write a .json file, or one called `name` in a folder, made if need be.

    Raises: UsageError for another suffix, BundleError if the parent is missing or cannot be written.
    """
    check_output(out)
    if out.suffix != ".json" or out.is_dir():
        make_folder(out)
        out = out / name
    with atomic_file(out) as partial:
        partial.write_text(canonical_json(facts), encoding="utf-8")


def write_results(
    out: Path,
    bundle: Bundle,
    facts: Mapping[str, Any],
    *,
    name: str,
    command: str,
    comparison: Comparison | None = None,
    bench: BenchResult | None = None,
    sampling: Sampling = AS_EXPORTED,
    tables: Sequence[Path] = (),
) -> None:
    """As write_json; in a folder report.html too, if the `report` extra is here: see write_page."""
    write_json(out, facts, name=name)
    if out.is_dir():
        write_page(out, bundle, comparison, bench=bench, sampling=sampling, tables=tables, command=command)

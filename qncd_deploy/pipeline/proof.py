"""The proof that goes with a bundle: its pictures beside the float twin's, in figures and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qncd_deploy.engines.base import computing_backend
from qncd_deploy.errors import Diverged
from qncd_deploy.evaluate.bench_result import BenchResult
from qncd_deploy.evaluate.compare import Comparison, Variant, compare
from qncd_deploy.evaluate.contest import Contest, contests_of
from qncd_deploy.evaluate.judge import Draw, Figures
from qncd_deploy.evaluate.measure import graph_bytes, machine
from qncd_deploy.evaluate.metrics import Estimate
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.runtime import AS_EXPORTED, Bundle, Sampling

FIRST_PICTURE = 1 << 27
"""Pictures from here on: none of them was calibrated, fitted or chosen on, and `--seed` shows none of them first."""

CORRECTED, PLAIN = "as sampled", "uncorrected"


@dataclass(frozen=True, eq=False)
class Proof:
    """The figures of what exporting computes on, corrected as `auto` says and, if that is not off, uncorrected too."""

    comparison: Comparison

    @property
    def final(self) -> Figures:
        return self.comparison[CORRECTED]

    @property
    def quality(self) -> dict[str, Any]:
        """For the manifest: rounded, since no more digits mean anything."""
        final, reference = self.final, self.comparison.reference
        return {
            "engine": final.engine,
            "correction": final.correction,
            "extra_calls": final.extra_calls,
            "pictures": final.n,
            "psnr_db": None if final.psnr is None else round(final.psnr.value, 2),
            "shift": None if final.shift is None else float(f"{final.shift.value:.3g}"),
            "inception_score": _rounded(final.inception_score),
            "inception_score_float": _rounded(reference.inception_score),
            "accuracy": _rounded(final.accuracy),
            "accuracy_float": _rounded(reference.accuracy),
            "latent_snr_db": _decibels(final.latent_snr_db[-1]),
        }


def prove(bundle: Bundle, *, size: int, seed: int, tick: Tick) -> Proof:
    """Sample the float twin and the quantized network, with the same seeds, on what exporting computes on.

    Raises: Diverged if a picture is not finite as the bundle samples by default, and what compare raises.
    """
    backend = computing_backend()
    variants = [Variant(CORRECTED, backend)]
    with variants[0].open(bundle, Draw(1)) as sampler:
        corrected = sampler.table.method != "off"
    if corrected:
        variants.append(Variant(PLAIN, backend, correction="off"))
    draw = Draw(size, seed=seed, first=FIRST_PICTURE)
    proof = Proof(compare(bundle, variants, draw, on_progress=tick))
    if proof.final.diverged is not None:
        raise Diverged(proof.final.diverged)
    return proof


def _decibels(value: float) -> float | None:
    """None where nothing differs, which JSON has no number for."""
    return round(value, 2) if math.isfinite(value) else None


def _rounded(found: Estimate | None) -> float | None:
    return None if found is None else round(found.value, 4)


def write_page(
    folder: Path,
    bundle: Bundle,
    comparison: Comparison | None,
    *,
    bench: BenchResult | None = None,
    sampling: Sampling = AS_EXPORTED,
    tables: Sequence[Path] = (),
    command: str,
) -> bool:
    """Write report.html about a bundle, if the libraries of the `report` extra are here; says whether it did.

    sampling, tables: the way to sample and the correction files whose contests are shown, see Bundle.sampler.
    """
    try:
        from qncd_deploy.evaluate.report import ReportData, write_report
    except ImportError:
        return False
    manifest = bundle.manifest
    held = [role for own in ("float", "master", "trt", "ort") for role in bundle.network_roles(own)]
    graphs = [manifest.roles[role] for role in held if role in manifest.roles]
    data = ReportData(
        manifest=manifest,
        layers=bundle.plan["layers"],
        graph_bytes={name: graph_bytes(bundle.path / name) for name in graphs},
        command=command,
        comparison=comparison,
        bench=bench,
        machine=machine(),
        contests=_contests(bundle, sampling, tables),
    )
    write_report(folder / "report.html", data)
    return True


def _contests(bundle: Bundle, sampling: Sampling, files: Sequence[Path]) -> dict[str, Contest]:
    """How auto chose for this way to sample, by engine; as in Bundle.sampler, the first file that has it counts."""
    found: dict[str, Contest] = {}
    for tables in bundle.corrections(files):
        for key, contest in contests_of(tables).items():
            if key == bundle.key(sampling, key.backend):
                found.setdefault(key.backend, contest)
    return found

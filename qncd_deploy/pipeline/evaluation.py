"""What `qncd eval` does: several corrections of one bundle beside its float twin, kept on the way; figures and page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qncd_deploy.engines.base import Remainder, default_backend
from qncd_deploy.errors import BackendMissing, UsageError, install_line
from qncd_deploy.evaluate.batches import Draw
from qncd_deploy.evaluate.compare import Comparison, Look, compare
from qncd_deploy.evaluate.crew import Crew, Solo
from qncd_deploy.evaluate.perceptual import load_lpips
from qncd_deploy.evaluate.store import Store
from qncd_deploy.evaluate.variants import Variant, fitted_methods
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.runtime import Bundle
from qncd_deploy.specs import SIDES

ALL = "all"
"""The correction that stands for auto, off and every one that was fitted."""


@dataclass(frozen=True)
class EvalOptions:
    """corrections: auto, off, fitted methods, ALL;  features, reference: files in place of the bundle's;  work: where
    batches are kept until the evaluation is done, and afterwards with `keep`;  ray: spread them over processes, those
    of the cluster at ray_address or of this machine;  tables, blobs: as in Bundle.sampler.
    """

    draw: Draw
    work: Path
    backend: str | None = None
    remainder: Remainder | None = None
    corrections: tuple[str, ...] = ("auto", "off")
    features: Path | None = None
    reference: Path | None = None
    keep: bool = False
    ray: bool = False
    ray_address: str | None = None
    tables: tuple[Path, ...] = ()
    blobs: tuple[Path, ...] = ()


@contextmanager
def evaluated(bundle: Bundle, options: EvalOptions, tick: Tick) -> Iterator[Comparison]:
    """Measure every correction, in the order asked for, named as it was asked for.

    What was drawn is deleted when the block ends, unless it is to be kept or the block ends with an error, such as that
    of a disk too full for the results.

    Raises: UsageError for a bundle that cannot sample, ScheduleError for a correction that was not fitted for this way
    to sample, BackendMissing for an absent Ray, and what compare raises.
    """
    if bundle.manifest.model.schedule is None:
        raise UsageError(
            f"{bundle.path}: has no noise schedule, so it cannot sample. Evaluate it with --data FILE.npz."
        )
    look = Look(options.features, options.reference, load_lpips())
    variants = [_variant(options, correction) for correction in _corrections(bundle, options)]
    for variant in variants:
        if variant.correction not in ("auto", "off"):  # one that was never fitted is refused now, not after hours
            variant.open(bundle, options.draw).close()

    with (
        crew_of(ray=options.ray, address=options.ray_address, threads=options.draw.threads) as crew,
        Store.open(options.work, [bundle], keep=options.keep) as store,
    ):
        yield compare(bundle, variants, options.draw, look=look, store=store, crew=crew, on_progress=tick)


def evaluation_json(bundle: Bundle, options: EvalOptions, comparison: Comparison) -> dict[str, Any]:
    """The figures and what they are of, in plain values."""
    draw, sides = options.draw, bundle.manifest.model.sides
    return {
        **dict(zip(SIDES, sides or (None, None), strict=True)),
        "bundle": bundle.path.resolve().name,
        "pictures": draw.count,
        "seed": draw.seed,
        "first": draw.first,
        "labels": draw.labels,
        "prompts": bundle.prompts,
        **asdict(bundle.settled(draw.sampling)),
        "features": None if options.features is None else options.features.name,
        **comparison.to_json(),
    }


def _corrections(bundle: Bundle, options: EvalOptions) -> list[str]:
    """As asked for, ALL spelled out, none twice."""
    found = list(options.corrections)
    if ALL in found:
        with _variant(options, "off").open(bundle, options.draw) as sampler:
            fitted = fitted_methods(bundle, sampler.table.key, options.tables)
        place = found.index(ALL)
        found[place : place + 1] = ["auto", "off", *fitted]
    return list(dict.fromkeys(found))


def _variant(options: EvalOptions, correction: str) -> Variant:
    return Variant(
        correction,
        options.backend or default_backend(),
        correction=correction,
        remainder=options.remainder,
        tables=options.tables,
        blobs=options.blobs,
    )


@contextmanager
def crew_of(*, ray: bool, address: str | None = None, threads: int | None = None) -> Iterator[Crew]:
    """Who draws: this process, or Ray's workers. Raises UsageError for an address without Ray, BackendMissing without
    its library.
    """
    if not ray:
        if address is not None:
            raise UsageError(f"--ray-address {address}: give --workers ray with it.")
        yield Solo()
        return
    try:
        from qncd_deploy.evaluate.ray_crew import RayCrew
    except ImportError as exc:
        raise BackendMissing(f"ray: not installed. Install it: {install_line('ray')}") from exc
    with RayCrew(address=address, threads=threads or 1) as crew:
        yield crew

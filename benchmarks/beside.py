"""Several bundles of one network beside its float twin, every picture kept, so that an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qncd_deploy.cli.progress import Bars
from qncd_deploy.evaluate.batches import Draw
from qncd_deploy.evaluate.compare import Comparison, compare
from qncd_deploy.evaluate.store import Store
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.pipeline.evaluation import crew_of
from qncd_deploy.runtime import Bundle


def beside_float(
    bundle: Bundle, variants: Sequence[Variant], draw: Draw, *, work: Path, bars: Bars, ray: bool, traced: int
) -> Comparison:
    """Figures of the variants against the float twin of `bundle`, by the engine of the first of them.

    work: where the pictures are kept;  ray: drawn by a process for every core;  traced: see compare.
    """
    held = [variant.bundle for variant in variants if variant.bundle is not None]
    with (
        crew_of(ray=ray, threads=draw.threads) as crew,
        Store.open(work, [bundle, *held], keep=True) as store,
        bars.stage("pictures") as tick,
    ):
        return compare(
            bundle,
            variants,
            draw,
            shown=0,
            traced=traced,
            store=store,
            crew=crew,
            on_progress=tick,
        )

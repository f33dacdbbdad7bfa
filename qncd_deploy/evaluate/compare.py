"""Several ways to run a network beside its float twin: the same seeds and labels, one sampler open at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.engines.base import Remainder, default_backend
from qncd_deploy.errors import UsageError
from qncd_deploy.evaluate.judge import Draw, Figures, Judge, Lens
from qncd_deploy.pictures import Pictures
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler

REFERENCE = "float"
"""Name of the float twin among the results."""


@dataclass(frozen=True)
class Variant:
    """One way to run a bundle; tables, blobs and the other options as in Bundle.sampler.

    bundle: another one than the rest are of, for ablations; its float twin must be the same network.
    """

    name: str
    backend: str | None = None
    correction: str = "auto"
    float_twin: bool = False
    remainder: Remainder | None = None
    bundle: Bundle | None = None
    tables: tuple[Path, ...] = ()
    blobs: tuple[Path, ...] = ()

    def open(self, bundle: Bundle, draw: Draw) -> Sampler:
        """A sampler of this variant. Raises as Bundle.sampler does; UsageError for a bundle of another network."""
        own = self.bundle or bundle
        _require_same_network(bundle, own)
        return own.sampler(
            self.backend,
            float_twin=self.float_twin,
            correction="off" if self.float_twin else self.correction,
            batch_size=draw.batch_size,
            scheduler=draw.scheduler,
            n_steps=draw.n_steps,
            eta=draw.eta,
            guidance_scale=draw.guidance_scale,
            remainder=self.remainder,
            threads=draw.threads,
            tables=self.tables,
            blobs=self.blobs,
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """reference: the float twin's own figures;  variants: in the order asked for;  labels: of the pictures in `images`;
    images: the first few of each, by name, REFERENCE among them, (N, H, W, C) uint8; empty without a decoder.
    """

    reference: Figures
    variants: tuple[Figures, ...]
    labels: tuple[int, ...]
    images: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> Figures:
        found = {figures.name: figures for figures in (self.reference, *self.variants)}
        return found[name]

    def to_json(self) -> dict[str, Any]:
        return {"reference": self.reference.to_json(), "variants": [figures.to_json() for figures in self.variants]}


def compare(
    bundle: Bundle,
    variants: Sequence[Variant],
    draw: Draw,
    *,
    backend: str | None = None,
    shown: int = 16,
    traced: int = 32,
    teacher_forced: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Sample the float twin once and each variant in turn.

    backend: of the float twin, None for the first variant's;  shown: how many pictures to return;  traced: pictures
    behind the SNR of every call, rounded up to whole batches, 0 for none;  teacher_forced: measure the output SNR too,
    at the price of running the traced pictures once more;  on_progress: picture-calls done and in all.

    Raises: UsageError for bundles of different networks, BundleError for a feature network of other pictures, and
    whatever Bundle.sampler and sampling raise.
    """
    names = [variant.name for variant in variants]
    assert len({REFERENCE, *names}) == 1 + len(names), f"names that are not unique: {names}"
    backend = backend or next((v.backend for v in variants if v.backend), None) or default_backend()
    images: dict[str, np.ndarray] = {}

    def keep(name: str, pictures: Pictures) -> None:
        if pictures.images is not None:
            images[name] = pictures.images[:shown]

    with Lens.open(bundle, backend, threads=draw.threads) as lens:
        with Variant(REFERENCE, backend, float_twin=True).open(bundle, draw) as exact:
            size = min(exact.batch_size, draw.count)
            again = min(math.ceil(traced / size) * size, draw.count) if teacher_forced else 0
            work = len(exact.steps) * (draw.count + len(variants) * (draw.count + again))
            tick = counter(work, on_progress)
            judge = Judge.of(REFERENCE, exact, draw, lens, traced=traced, tick=tick)
        keep(REFERENCE, judge.pictures)
        found = []
        for variant in variants:
            with variant.open(bundle, draw) as sampler:
                figures, pictures = judge.figures(variant.name, sampler, teacher_forced=teacher_forced, tick=tick)
            keep(variant.name, pictures)
            found.append(figures)
    labels = tuple(int(label) for label in judge.pictures.labels[:shown])
    return Comparison(judge.own, tuple(found), labels, images)


def counter(total: int, on_progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """A function that adds up what it is told and passes the sum on."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if on_progress is not None:
            on_progress(done, total)

    return tick


def _require_same_network(bundle: Bundle, other: Bundle) -> None:
    """Float graphs are laid out beside their quantized siblings, so their bytes differ between formats; what they were
    made from does not.
    """
    inputs, others = (_network_inputs(each) for each in (bundle, other))
    differs = next(
        (name for name in sorted(inputs.keys() | others.keys()) if inputs.get(name) != others.get(name)), None
    )
    if differs is None and bundle.manifest.model.schedule != other.manifest.model.schedule:
        differs = "noise schedule"
    if differs is not None:
        raise UsageError(
            f"{other.path}: made from another network than {bundle.path} ({differs} differs), so its pictures have no "
            "common float twin. Compare bundles of one checkpoint."
        )


def _network_inputs(bundle: Bundle) -> dict[str, str]:
    return {name: sha256 for name, sha256 in bundle.manifest.inputs.items() if name != "calib-data"}

"""Figures of sampled pictures, held against the float twin's pictures of the same seeds and labels, and against data.

Batches are gone through one by one, the float twin's beside the variant's: what stays is a few numbers a picture and
its features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from qncd_deploy.evaluate.batches import Batch, Draw
from qncd_deploy.evaluate.features import Description, Reference
from qncd_deploy.evaluate.manifold import Manifold
from qncd_deploy.evaluate.metrics import (
    Estimate,
    Moments,
    bootstrap,
    decibels,
    feature_errors,
    frechet_distance,
    frechet_work,
    hits,
    inception_score,
    psnr,
    resamples_for,
    shift,
    ssim,
)
from qncd_deploy.sampler import Sampler

PairMeasure = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two sets of pictures, (N, H, W, C) uint8, to one number a pair, (N,)."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one variant; None where there is no picture, feature network or class to measure it by.

    engine: such as "openvino-f32";  correction: the method in use;  calls, extra_calls: network calls of a trajectory,
    the latter for QNCD's probes.

    To the float twin, None for the twin itself: psnr, ssim, lpips, shift, feature_rms; precision, recall: of its
    pictures;  latent_mean_error, latent_std_ratio: of the final latents, a number a channel, the former in standard
    deviations of the twin's;  latent_snr_db, output_snr_db: one a call, infinite where nothing differs, () if not
    measured.
    diverged: why there are no figures of a variant whose sampling ended in what is not finite.
    To the data, None without a reference: fid, sfid, data_precision, data_recall.
    """

    name: str
    engine: str
    correction: str
    n: int
    seed: int
    first: int
    calls: int
    extra_calls: int
    psnr: Estimate | None = None
    ssim: Estimate | None = None
    lpips: Estimate | None = None
    shift: Estimate | None = None
    feature_rms: Estimate | None = None
    precision: Estimate | None = None
    recall: Estimate | None = None
    fid: Estimate | None = None
    sfid: Estimate | None = None
    data_precision: Estimate | None = None
    data_recall: Estimate | None = None
    inception_score: Estimate | None = None
    accuracy: Estimate | None = None
    latent_mean_error: tuple[float, ...] = ()
    latent_std_ratio: tuple[float, ...] = ()
    latent_snr_db: tuple[float, ...] = ()
    output_snr_db: tuple[float, ...] = ()
    diverged: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; an SNR that JSON has no number for is null where nothing differs, else "-inf" or "nan"."""
        data = asdict(self)
        for name in ("latent_snr_db", "output_snr_db"):
            data[name] = [
                value if math.isfinite(value) else None if value == math.inf else str(value) for value in data[name]
            ]
        return data


@dataclass(frozen=True)
class Origin:
    """Where batches come from. classes: what a picture can be of, None where the network has none, or prompts."""

    engine: str
    correction: str
    calls: int
    classes: tuple[int, ...] | None

    @classmethod
    def of(cls, sampler: Sampler) -> Origin:
        condition = sampler.network.facts.condition
        return cls(
            engine=sampler.table.key.backend,
            correction=sampler.table.method,
            calls=len(sampler.steps),
            classes=None if condition is None or condition.kind == "text" else condition.valid,
        )


@dataclass(frozen=True, eq=False)
class Judge:
    """The float twin's batches and what is known of data.

    own: the twin's own figures;  perceptual: LPIPS, if it is to be measured.
    """

    draw: Draw
    data: Reference | None
    batches: Sequence[Batch]
    own: Figures
    perceptual: PairMeasure | None
    _kept: _Kept
    _known: Manifold | None

    @classmethod
    def of(
        cls,
        name: str,
        origin: Origin,
        batches: Sequence[Batch],
        draw: Draw,
        data: Reference | None = None,
        *,
        perceptual: PairMeasure | None = None,
    ) -> Judge:
        """batches: of the float twin, all of the draw in order."""
        kept = _Kept.of(batches)
        known = None if data is None or data.features is None else Manifold.of(data.features)
        return cls(
            draw=draw,
            data=data,
            batches=batches,
            own=_unpaired(name, origin, draw, kept, data, known),
            perceptual=perceptual,
            _kept=kept,
            _known=known,
        )

    def figures(self, name: str, origin: Origin, batches: Iterable[Batch]) -> Figures:
        """Measure a variant by its batches, of the same pictures in the same order."""
        pairs = _Pairs()
        measures = {"psnr": psnr, "ssim": ssim} | ({"lpips": self.perceptual} if self.perceptual else {})
        kept = _Kept.of(pairs.watched(batches, self.batches, measures))
        exact = self._kept
        figures = _unpaired(name, origin, self.draw, kept, self.data, self._known)
        return replace(
            figures,
            **pairs.means(self.draw),
            **self._of_features(kept),
            latent_mean_error=tuple(((kept.latent_mean - exact.latent_mean) / exact.latent_std).tolist()),
            latent_std_ratio=tuple((kept.latent_std / exact.latent_std).tolist()),
            latent_snr_db=_snr_db(pairs.free),
            output_snr_db=_snr_db(pairs.forced),
        )

    def diverged(self, name: str, origin: Origin, reason: str) -> Figures:
        """Of a variant that has no pictures to measure."""
        return replace(_unmeasured(name, origin, self.draw), diverged=reason)

    def _of_features(self, kept: _Kept) -> dict[str, Any]:
        found, exact, seed = kept.features, self._kept.features, self.draw.seed
        if found is None or exact is None or len(found) < 2:
            return {}
        n, d = found.shape
        errors = feature_errors(found, exact)
        measured: dict[str, Any] = {
            "shift": bootstrap(
                lambda rows: shift(found[rows], exact[rows]), n, seed=seed, resamples=resamples_for(frechet_work(n, d))
            ),
            "feature_rms": bootstrap(lambda rows: math.sqrt(errors[rows].mean()), n, seed=seed),
        }
        if kept.manifold is not None and self._kept.manifold is not None:
            measured["precision"] = _mean(self._kept.manifold.covers(found), self.draw)
            measured["recall"] = _mean(kept.manifold.covers(exact), self.draw)
        return measured


@dataclass(frozen=True, eq=False)
class _Kept:
    """What stays of the batches: see Description; mean and standard deviation of the latents' channels, (C,)."""

    labels: np.ndarray
    features: np.ndarray | None
    logits: np.ndarray | None
    spatial: np.ndarray | None
    latent_mean: np.ndarray
    latent_std: np.ndarray
    extra_calls: int

    @cached_property
    def manifold(self) -> Manifold | None:
        return None if self.features is None else Manifold.of(self.features)

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> _Kept:
        labels: list[np.ndarray] = []
        parts: dict[str, list[np.ndarray]] = {name: [] for name in Description._fields}
        count, extra_calls = 0, 0
        total = squares = np.zeros(())
        for batch in batches:
            labels.append(batch.pictures.labels)
            for name, held in parts.items():
                if (part := getattr(batch.description, name, None)) is not None:
                    held.append(part)
            latents = batch.pictures.latents.astype(np.float64)
            count += latents[:, 0].size
            total = total + latents.sum(axis=(0, 2, 3))
            squares = squares + np.square(latents).sum(axis=(0, 2, 3))
            extra_calls = max(extra_calls, batch.extra_calls)
        mean = total / count
        described = {name: np.concatenate(held) if held else None for name, held in parts.items()}
        # E x^2 - m^2 in float64 keeps ten digits, since latents have a mean no larger than their spread
        spread = np.sqrt(np.maximum(squares / count - mean**2, np.finfo(np.float64).tiny))
        return cls(np.concatenate(labels), **described, latent_mean=mean, latent_std=spread, extra_calls=extra_calls)


class _Pairs:
    """What is measured of a variant's batch and the float twin's beside it.

    values: by measure, (N,) a batch;  free, forced: (2, calls), summed over the batches, None if none was traced.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[np.ndarray]] = {}
        self.free: np.ndarray | None = None
        self.forced: np.ndarray | None = None

    def watched(
        self, batches: Iterable[Batch], exact: Iterable[Batch], measures: dict[str, PairMeasure]
    ) -> Iterable[Batch]:
        """The batches themselves, measured on the way."""
        for found, twin in zip(batches, exact, strict=True):
            same = np.array_equal(found.pictures.indices, twin.pictures.indices)
            assert same, "the variant samples other batches than the float twin"
            if found.pictures.images is not None and twin.pictures.images is not None:
                for name, measure in measures.items():
                    self.values.setdefault(name, []).append(measure(found.pictures.images, twin.pictures.images))
            self.free = _added(self.free, found.free)
            self.forced = _added(self.forced, found.forced)
            yield found

    def means(self, draw: Draw) -> dict[str, Any]:
        return {name: _mean(np.concatenate(values), draw) for name, values in self.values.items()}


def _added(total: np.ndarray | None, more: np.ndarray | None) -> np.ndarray | None:
    return total if more is None else more if total is None else total + more


def _snr_db(powers: np.ndarray | None) -> tuple[float, ...]:
    return () if powers is None else tuple(map(decibels, *powers.tolist()))


def _unmeasured(name: str, origin: Origin, draw: Draw) -> Figures:
    return Figures(
        name=name,
        engine=origin.engine,
        correction=origin.correction,
        n=draw.count,
        seed=draw.seed,
        first=draw.first,
        calls=origin.calls,
        extra_calls=0,
    )


def _unpaired(
    name: str, origin: Origin, draw: Draw, kept: _Kept, data: Reference | None, known: Manifold | None
) -> Figures:
    """The figures that need no float twin. known: what real pictures cover."""
    figures = replace(_unmeasured(name, origin, draw), extra_calls=kept.extra_calls)
    features, logits, n = kept.features, kept.logits, draw.count
    measured: dict[str, Any] = {}
    if features is not None and data is not None and n > 1:
        measured["fid"] = _distance(features, data.moments, draw)
        if kept.spatial is not None and data.spatial is not None:
            measured["sfid"] = _distance(kept.spatial, data.spatial, draw)
        if known is not None and kept.manifold is not None:
            measured["data_precision"] = _mean(known.covers(features), draw)
            measured["data_recall"] = _mean(kept.manifold.covers(known.points), draw)
    if logits is not None:
        measured["inception_score"] = bootstrap(
            lambda rows: inception_score(logits[rows]), n, seed=draw.seed, resamples=resamples_for(100 * logits.size)
        )
        if origin.classes == tuple(range(logits.shape[1])):  # else: other classes
            measured["accuracy"] = _mean(hits(logits, kept.labels), draw)
    return replace(figures, **measured)


def _mean(values: np.ndarray, draw: Draw) -> Estimate:
    """The mean of a number a picture, or a share of pictures."""
    return bootstrap(lambda rows: float(values[rows].mean()), len(values), seed=draw.seed)


def _distance(features: np.ndarray, data: Moments, draw: Draw) -> Estimate:
    n, d = features.shape
    resamples = resamples_for(frechet_work(n, d))
    return bootstrap(
        lambda rows: frechet_distance(Moments.of(features[rows]), data), n, seed=draw.seed, resamples=resamples
    )

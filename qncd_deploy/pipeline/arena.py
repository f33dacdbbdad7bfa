"""Held-out pictures on which corrections compete: the same noise and labels for all, against the float twin's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qncd_deploy.correct.fitting import State
from qncd_deploy.correct.record import CorrectionTable, StepFix
from qncd_deploy.errors import Diverged
from qncd_deploy.evaluate.contest import half_of
from qncd_deploy.evaluate.features import FeatureNetwork
from qncd_deploy.evaluate.metrics import frechet_work, psnr, resamples_for, shift, snr_db
from qncd_deploy.pictures import Pictures
from qncd_deploy.sampler import Sampler

RESAMPLES = 200


@dataclass(frozen=True, eq=False)
class Candidate:
    """Rows that compete under a name."""

    name: str
    fixes: tuple[StepFix, ...]


@dataclass(eq=False)
class Arena:
    """Samples candidates, each picture once, and compares them.

    exact: the float twin's pictures, all of the held-out ones;  states: its states after every call, of the first n of
    them, each (n, C, H, W);  plain: a sampler of the quantized network;  features: None where pictures are compared one
    by one: by PSNR of their bytes, or of the latents where there are no pictures.
    on_pictures: told of every network call for how many pictures it was.
    """

    exact: Pictures
    states: Sequence[np.ndarray]
    plain: Sampler
    features: FeatureNetwork | None
    seed: int
    on_pictures: Callable[[int], None] = lambda count: None
    _samples: dict[str, np.ndarray] = field(default_factory=dict)
    _latent_snr_db: dict[str, tuple[float, ...]] = field(default_factory=dict)
    _diverged: dict[str, Diverged] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        exact: Sampler,
        plain: Sampler,
        indices: Sequence[int],
        features: FeatureNetwork | None,
        *,
        seed: int,
        on_pictures: Callable[[int], None],
    ) -> Arena:
        """Sample the float twin. indices: of the held-out pictures."""
        # no more than any candidate's first batch holds, so that all curves are of the same pictures
        count = min(exact.batch_size, plain.batch_size, half_of(len(indices)))
        states: list[np.ndarray] = []

        def on_state(state: State) -> None:
            on_pictures(len(state.x))
            if len(states) < len(exact.steps):
                states.append(exact.on_host(state).x[:count].copy())

        pictures = exact.sample(indices, seed=seed, on_state=on_state)
        return cls(pictures, states, plain, features, seed, on_pictures)

    def __post_init__(self) -> None:
        self._truth = self._described(self.exact, 0)

    @property
    def objective(self) -> str:
        return "psnr" if self.features is None else "shift"

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def half(self) -> int:
        """How many pictures a candidate is tried on first."""
        return half_of(len(self))

    def figure(self, candidate: Candidate, count: int) -> float:
        """The objective on the first `count` held-out pictures: shift, or mean PSNR in dB; infinitely bad for a
        candidate whose pictures grow beyond all numbers."""
        try:
            return self._figure(self._sampled(candidate, count), np.arange(count))
        except Diverged:
            return math.inf if self.features is not None else -math.inf

    def cost(self, candidate: Candidate, count: int) -> float:
        """The same so that less is better."""
        figure = self.figure(candidate, count)
        cost = figure if self.features is not None else -figure
        return cost if math.isfinite(cost) else math.inf

    def latent_snr_db(self, candidate: Candidate) -> tuple[float, ...]:
        """Of the state after every call against the float twin's, both running freely; see evaluate.batches."""
        self.figure(candidate, self.half)
        return self._latent_snr_db[candidate.name]

    def wins(self, candidate: Candidate, rival: Candidate, count: int) -> float:
        """Share of bootstrap resamples of the first `count` pictures in which the candidate is better than its rival:
        0.5 says nothing, 0.95 is significant at 5 %, one-sided.

        Gains are moved so that their mean is the gain on all pictures, for the reason that metrics.bootstrap gives:
        resampling adds to the part of a distance that is noise, not to the part that is a common drift.
        """
        gain = self.cost(rival, count) - self.cost(candidate, count)
        if not math.isfinite(gain):
            return float(gain > 0)
        sign = 1 if self.features is not None else -1
        gains = sign * (self._resampled(rival, count) - self._resampled(candidate, count))
        return float(np.mean(gains - gains.mean() + gain > 0))

    def _resampled(self, candidate: Candidate, count: int) -> np.ndarray:
        """The objective on resamples of the first `count` pictures, the same ones for all candidates."""
        sample = self._sampled(candidate, count)
        width = 1 if sample.ndim == 1 else sample.shape[1]
        resamples = resamples_for(frechet_work(count, width)) if self.features is not None else RESAMPLES
        rows = np.random.default_rng(self.seed).integers(0, count, (resamples, count))
        return np.array([self._figure(sample, some) for some in rows])

    def _figure(self, sample: np.ndarray, rows: np.ndarray) -> float:
        if self.features is None:
            return float(sample[rows].mean())
        return shift(sample[rows], self._truth[rows])

    def _sampled(self, candidate: Candidate, count: int) -> np.ndarray:
        """What is known of a candidate's first `count` pictures, sampling those that are missing."""
        if candidate.name in self._diverged:
            raise self._diverged[candidate.name]
        held = self._samples.get(candidate.name)
        start = 0 if held is None else len(held)
        if start < count:
            sampler = self.plain.using(table=CorrectionTable(candidate.name, self.plain.table.key, candidate.fixes))
            indices: Sequence[int] = self.exact.indices[start:count].tolist()
            snr: list[float] = []

            def on_state(state: State) -> None:
                self.on_pictures(len(state.x))
                if start == 0 and len(snr) < len(self.states):
                    exact = self.states[len(snr)]
                    snr.append(snr_db(exact, sampler.on_host(state).x[: len(exact)]))

            try:
                found = sampler.sample(indices, seed=self.seed, on_state=on_state)
            except Diverged as exc:
                self._diverged[candidate.name] = exc
                raise
            finally:
                if start == 0:
                    self._latent_snr_db[candidate.name] = tuple(snr)
            new = self._described(found, start)
            self._samples[candidate.name] = held = new if held is None else np.concatenate([held, new])
        assert held is not None
        return held[:count]

    def _described(self, pictures: Pictures, start: int) -> np.ndarray:
        """Features of each picture, (n, d), or its fidelity to the float twin's in dB, (n,)."""
        if self.features is not None:
            assert pictures.images is not None
            return self.features(pictures.images).features
        rows = slice(start, start + len(pictures))
        if pictures.images is not None and self.exact.images is not None:
            return psnr(pictures.images, self.exact.images[rows])
        error = np.square(pictures.latents - self.exact.latents[rows]).mean(axis=(1, 2, 3), dtype=np.float64)
        peak = np.abs(self.exact.latents).max()
        return 10 * np.log10(peak**2 / np.maximum(error, np.finfo(np.float64).tiny))

"""Figures of sampled pictures, held against the float twin's pictures of the same seeds and labels.

latent SNR of a call   sum x^2 / sum (x_v - x)^2 after the call, both networks running freely, corrections included
output SNR of a call   sum e^2 / sum (q - e)^2 at the float trajectory's inputs: the network alone, uncorrected
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qncd_deploy.correct.fitting import State
from qncd_deploy.evaluate.features import Description, FeatureNetwork, load_reference
from qncd_deploy.evaluate.metrics import (
    Estimate,
    Moments,
    accuracy,
    bootstrap,
    decibels,
    frechet_distance,
    inception_score,
    power,
    psnr,
    shift,
    ssim,
)
from qncd_deploy.pictures import Pictures
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler

if TYPE_CHECKING:
    from typing import Self

Tick = Callable[[int], None]
"""Told after every network call for how many pictures it was."""


@dataclass(frozen=True)
class Draw:
    """Which pictures are drawn, and how; None is the bundle's own choice.

    Pictures first .. first + count - 1 of `seed`;  labels: see Sampler.sample.
    """

    count: int
    seed: int = 0
    first: int = 0
    labels: tuple[int, ...] | None = None
    batch_size: int | None = None
    scheduler: str | None = None
    n_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    threads: int | None = None

    @property
    def indices(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class Figures:
    """What was measured of one variant; None where there is no picture, feature network or class to measure it by.

    engine: such as "openvino-f32";  correction: the method in use;  calls, extra_calls: network calls of a trajectory,
    the latter for QNCD's probes;  psnr, ssim, shift: to the float twin, None for the twin itself;  fid: to the data, of
    these n pictures;  latent_snr_db, output_snr_db: one a call, infinite where nothing differs, () if not measured.
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
    shift: Estimate | None = None
    fid: float | None = None
    inception_score: float | None = None
    accuracy: float | None = None
    latent_snr_db: tuple[float, ...] = ()
    output_snr_db: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite SNR is null, since JSON has no number for it."""
        data = asdict(self)
        for name in ("latent_snr_db", "output_snr_db"):
            data[name] = [value if math.isfinite(value) else None for value in data[name]]
        return data


@dataclass(frozen=True, eq=False)
class Lens:
    """The feature network and the moments of real pictures, either None; a context manager that closes the network."""

    network: FeatureNetwork | None = None
    data: Moments | None = None

    @classmethod
    def open(cls, bundle: Bundle, backend: str, *, threads: int | None = None) -> Lens:
        """What the bundle brings. Raises BundleError for files of another form."""
        roles = bundle.manifest.roles
        data = load_reference(bundle.file("features-reference")) if "features-reference" in roles else None
        if "features" not in roles:
            return cls(None, data)
        return cls(FeatureNetwork.open(bundle.file("features"), backend, threads=threads), data)

    def describe(self, pictures: Pictures) -> Description | None:
        return None if self.network is None or pictures.images is None else self.network(pictures.images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.network is not None:
            self.network.close()


@dataclass(frozen=True, eq=False)
class Judge:
    """The float twin's pictures and what is needed to hold others against them.

    trajectories: its states, one list per traced batch;  own: the twin's own figures.
    """

    draw: Draw
    lens: Lens
    pictures: Pictures
    description: Description | None
    trajectories: Sequence[Sequence[State]]
    own: Figures

    @classmethod
    def of(cls, name: str, exact: Sampler, draw: Draw, lens: Lens, *, traced: int, tick: Tick) -> Judge:
        """Sample the float twin. traced: how many pictures' trajectories to keep, rounded up to whole batches."""
        batches: list[list[State]] = []
        seen = 0

        def keep(state: State) -> None:
            nonlocal seen
            if state.call == 0:
                if seen < traced:
                    batches.append([])
                seen += len(state.x)
            if seen - len(state.x) < traced:  # this batch began before there were enough
                batches[-1].append(state)

        pictures, extra = _sample(exact, draw, keep if traced else None, tick)
        description = lens.describe(pictures)
        own = _unpaired(name, exact, draw, lens, pictures, description, extra)
        return cls(draw, lens, pictures, description, batches, own)

    def figures(
        self, name: str, sampler: Sampler, *, teacher_forced: bool = True, tick: Tick
    ) -> tuple[Figures, Pictures]:
        """Sample a variant and measure it.

        sampler: of the float twin's batch size;  teacher_forced: the output SNR too, at the price of running the traced
        batches once more.
        """
        free = _Powers(len(sampler.steps))
        batch = -1

        def hold_against(state: State) -> None:
            nonlocal batch
            batch += state.call == 0
            if batch < len(self.trajectories):
                free.add(state.call, self.trajectories[batch][state.call].x, state.x)

        pictures, extra = _sample(sampler, self.draw, hold_against if self.trajectories else None, tick)
        description = self.lens.describe(pictures)
        figures = _unpaired(name, sampler, self.draw, self.lens, pictures, description, extra)
        return replace(
            figures,
            psnr=self._mean(psnr, pictures),
            ssim=self._mean(ssim, pictures),
            shift=self._shift(description),
            latent_snr_db=free.snr_db if self.trajectories else (),
            output_snr_db=self._forced(sampler, tick) if teacher_forced and self.trajectories else (),
        ), pictures

    def _mean(self, measure: Callable[[np.ndarray, np.ndarray], np.ndarray], pictures: Pictures) -> Estimate | None:
        if pictures.images is None or self.pictures.images is None:
            return None
        values = measure(pictures.images, self.pictures.images)
        return bootstrap(lambda rows: float(values[rows].mean()), len(values), seed=self.draw.seed)

    def _shift(self, description: Description | None) -> Estimate | None:
        if description is None or self.description is None or self.draw.count < 2:
            return None
        found, exact = description.features, self.description.features
        return bootstrap(lambda rows: shift(found[rows], exact[rows]), len(found), seed=self.draw.seed)

    def _forced(self, sampler: Sampler, tick: Tick) -> tuple[float, ...]:
        """SNR of the network's raw output at the inputs of the float twin's trajectories, call by call."""
        powers = _Powers(len(sampler.steps))
        start, size = 0, min(sampler.batch_size, self.draw.count)
        for states in self.trajectories:
            indices = self.draw.indices[start : start + len(states[0].x)]
            start += len(indices)
            model = sampler.model_for(indices, labels=self.draw.labels, batch_size=size)
            for state in states:
                powers.add(state.call, state.raw, model(state.x_in, state.step.t))
                tick(len(indices))
        return powers.snr_db


class _Powers:
    """Power of exact arrays and of what differs from them, summed call by call."""

    def __init__(self, calls: int) -> None:
        self._signal, self._noise = [0.0] * calls, [0.0] * calls

    def add(self, call: int, exact: np.ndarray, found: np.ndarray) -> None:
        assert exact.shape == found.shape, "the variant samples other batches than the float twin"
        self._signal[call] += power(exact)
        self._noise[call] += power(found - exact)

    @property
    def snr_db(self) -> tuple[float, ...]:
        return tuple(map(decibels, self._signal, self._noise))


def _sample(sampler: Sampler, draw: Draw, watch: Callable[[State], None] | None, tick: Tick) -> tuple[Pictures, int]:
    """The pictures, and the network calls beyond one per row that each trajectory took."""
    extra = 0

    def on_state(state: State) -> None:
        nonlocal extra
        extra = max(extra, state.extra_calls)
        if watch is not None:
            watch(state)
        tick(len(state.x))

    return sampler.sample(draw.indices, labels=draw.labels, seed=draw.seed, on_state=on_state), extra


def _unpaired(
    name: str,
    sampler: Sampler,
    draw: Draw,
    lens: Lens,
    pictures: Pictures,
    description: Description | None,
    extra_calls: int,
) -> Figures:
    """The figures that need no float twin."""
    fid = score = hits = None
    if description is not None:
        features, logits = description
        if lens.data is not None and len(features) > 1:
            fid = frechet_distance(Moments.of(features), lens.data)
        if logits is not None:
            score = inception_score(logits)
            condition = sampler.network.facts.condition
            if condition is not None and condition.valid == tuple(range(logits.shape[1])):  # else: other classes
                hits = accuracy(logits, pictures.labels)
    return Figures(
        name=name,
        engine=sampler.table.key.backend,
        correction=sampler.table.method,
        n=draw.count,
        seed=draw.seed,
        first=draw.first,
        calls=len(sampler.steps),
        extra_calls=extra_calls,
        fid=fid,
        inception_score=score,
        accuracy=hits,
    )

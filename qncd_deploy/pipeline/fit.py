"""Fit correction tables on the engine that will run them, and choose among them by held-out pictures. No torch.

Three sets of pictures share nothing with each other, with calibration or with what `--seed` shows: one to fit on, one
to choose on, one to report on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.correct import qncd
from qncd_deploy.correct.record import CorrectionTable, Tables, load_tables, save_tables
from qncd_deploy.engines.base import Remainder
from qncd_deploy.errors import UsageError
from qncd_deploy.evaluate.features import FeatureNetwork
from qncd_deploy.evaluate.metrics import psnr, shift
from qncd_deploy.pictures import Pictures
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.runtime import Bundle
from qncd_deploy.sample import rollout
from qncd_deploy.sampler import Sampler
from qncd_deploy.specs import EpsModel

METHODS = ("qncd", "qncd:paper")
FIRST_FIT_PICTURE = 1 << 28
FIRST_CHOICE_PICTURE = 1 << 29
RESAMPLES = 400
CONFIDENCE = 0.95
"""A method replaces "off" only if it wins in this share of the bootstrap resamples of the pictures."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """The tables of one way to sample, which one `--correction auto` takes, and by what figures (method -> value)."""

    tables: tuple[CorrectionTable, ...]
    choice: str
    objective: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class FitOptions:
    """What to fit for; None is the bundle's own. methods: of METHODS. size: pictures to fit on, twice as many to choose
    by.
    """

    backend: str
    remainder: Remainder | None = None
    scheduler: str | None = None
    n_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    methods: tuple[str, ...] = METHODS
    objective: str = "shift"
    size: int = 16
    seed: int = 0
    batch_size: int | None = None
    threads: int | None = None

    @property
    def fit_pictures(self) -> range:
        return range(FIRST_FIT_PICTURE, FIRST_FIT_PICTURE + self.size)

    @property
    def choice_pictures(self) -> range:
        return range(FIRST_CHOICE_PICTURE, FIRST_CHOICE_PICTURE + 2 * self.size)


def fit(bundle: Bundle, options: FitOptions, tick: Tick) -> Fitted:
    """Fit every method and choose one, or "off" where none is better beyond chance.

    Raises: EngineError, ScheduleError or CalibrationError as the sampler and the fits do.
    """
    opened: dict[str, Any] = {
        "scheduler": options.scheduler,
        "n_steps": options.n_steps,
        "eta": options.eta,
        "guidance_scale": options.guidance_scale,
        "threads": options.threads,
        "batch_size": options.batch_size,
        "backend": options.backend,
    }
    with (
        bundle.sampler(float_twin=True, **opened) as exact,
        bundle.sampler(correction="off", remainder=options.remainder, **opened) as plain,
    ):
        work = _Work(tick, rows=len(plain.steps), options=options)
        tables = tuple(_table(method, exact, plain, options, work) for method in options.methods)
        objective, figures, wins = _judge(bundle, exact, plain, tables, options, work)
    lower_is_better = objective == "shift"
    best = (min if lower_is_better else max)(figures, key=figures.__getitem__)
    choice = best if wins.get(best, 0.0) >= CONFIDENCE else "off"
    tables = tuple(
        replace(table, info={**table.info, objective: figures[table.method], "beats off": wins[table.method]})
        for table in tables
    )
    return Fitted(tables, choice, objective, figures)


def merge_into(path: Path, fitted: Sequence[Fitted]) -> None:
    """Add tables to a corrections file, in place of older ones for the same keys."""
    held = load_tables(path) if path.exists() else Tables(path, (), {})
    new = [table for each in fitted for table in each.tables]
    keys = {table.key.id for table in new}
    auto = {key: method for key, method in held.auto.items() if key not in keys}
    auto |= {each.tables[0].key.id: each.choice for each in fitted if each.tables}
    save_tables(path, [*(table for table in held.tables if table.key.id not in keys), *new], auto=auto)


class _Work:
    """Counts batches of network calls for the progress bar; an upper bound of all there are."""

    def __init__(self, tick: Tick, *, rows: int, options: FitOptions) -> None:
        fits = 3 * len(options.fit_pictures) * ("qncd" in options.methods)
        self._total = rows * (fits + (2 + len(options.methods)) * len(options.choice_pictures))
        self._done = 0
        self._tick = tick

    def add(self, pictures: int) -> None:
        self._done = min(self._done + pictures, self._total)
        self._tick(self._done, self._total)


def _table(method: str, exact: Sampler, plain: Sampler, options: FitOptions, work: _Work) -> CorrectionTable:
    if method == "qncd:paper":
        return CorrectionTable(method, plain.table.key, qncd.fit_paper(plain.steps))
    if method != "qncd":
        raise UsageError(f"--correction {method}: expected one of {', '.join(METHODS)}.")
    facts, schedule = plain.network.facts, plain.network.schedule

    def counted(sampler: Sampler, indices: Sequence[int]) -> EpsModel:
        model = sampler.model_for(indices, batch_size=sampler.batch_size)

        def predict(x: np.ndarray, t: float) -> np.ndarray:
            work.add(len(indices))
            return model(x, t)

        return predict

    fixes = qncd.fit(
        lambda indices: counted(exact, indices),
        lambda indices: counted(plain, indices),
        plain.steps,
        rollout=rollout(
            plain.steps,
            seed=options.seed,
            shape=facts.latent_shape,
            prediction=schedule.prediction,
            scale=plain.initial_scale,
        ),
        batches=list(_batches(options.fit_pictures, plain.batch_size)),
        prediction=schedule.prediction,
    )
    info = {"pictures": options.size, "m_gain": [round(fix.m_gain, 4) for fix in fixes]}
    return CorrectionTable(method, plain.table.key, fixes, info)


def _batches(pictures: range, size: int) -> Iterator[range]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def _judge(
    bundle: Bundle,
    exact: Sampler,
    plain: Sampler,
    tables: Sequence[CorrectionTable],
    options: FitOptions,
    work: _Work,
) -> tuple[str, dict[str, float], dict[str, float]]:
    """The objective used, its value by method, and how often each method beats "off" in resamples of the pictures."""

    def sample(sampler: Sampler) -> Pictures:
        return sampler.sample(options.choice_pictures, seed=options.seed, on_state=lambda state: work.add(len(state.x)))

    reference = sample(exact)
    rivals = {"off": sample(plain)}
    for table in tables:
        corrected = Sampler(
            plain.network,
            config=plain.config,
            guidance_scale=plain.guidance_scale,
            table=table,
            batch_size=plain.batch_size,
        )
        rivals[table.method] = sample(corrected)
    rng = np.random.default_rng(options.seed)
    count = len(options.choice_pictures)
    resamples = rng.integers(0, count, (RESAMPLES, count))
    if options.objective == "shift" and "features" in bundle.manifest.roles and reference.images is not None:
        with FeatureNetwork.open(bundle.file("features"), options.backend) as network:
            truth = network(reference.images).features
            features = {method: network(pictures.images).features for method, pictures in rivals.items()}
        figures = {method: shift(found, truth) for method, found in features.items()}
        spread = {
            method: np.array([shift(found[rows], truth[rows]) for rows in resamples])
            for method, found in features.items()
        }
        wins = {method: float(np.mean(values < spread["off"])) for method, values in spread.items()}
        return "shift", figures, wins
    quality = {method: _fidelity(pictures, reference) for method, pictures in rivals.items()}
    figures = {method: float(values.mean()) for method, values in quality.items()}
    gain = {method: (values - quality["off"])[resamples].mean(axis=1) for method, values in quality.items()}
    return "psnr", figures, {method: float(np.mean(values > 0)) for method, values in gain.items()}


def _fidelity(pictures: Pictures, reference: Pictures) -> np.ndarray:
    """Per picture: PSNR of the bytes, or of the latents where there are no pictures, in dB."""
    if pictures.images is not None and reference.images is not None:
        return psnr(pictures.images, reference.images)
    error = np.square(pictures.latents - reference.latents).mean(axis=(1, 2, 3), dtype=np.float64)
    peak = np.abs(reference.latents).max()
    return 10 * np.log10(peak**2 / np.maximum(error, np.finfo(np.float64).tiny))

"""Fit correction tables on the engine that will run them, and choose among them by held-out pictures. No torch.

Four sets of pictures share nothing with each other, with calibration or with what `--seed` shows: one to fit on, one to
choose on, one to confirm the choice on, one to report on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.bundle import CONDITION_ROLES
from qncd_deploy.correct.methods import METHODS
from qncd_deploy.correct.record import CorrectionTable, ScheduleKey, StepFix, Tables, load_tables, save_tables
from qncd_deploy.engines.base import Remainder, backend_status, default_backend, find_backend, make_engine_id
from qncd_deploy.engines.remembering import Answers, remembering
from qncd_deploy.errors import CalibrationError, UsageError
from qncd_deploy.evaluate.batches import Draw
from qncd_deploy.evaluate.contest import OBJECTIVES, OFF, Contest
from qncd_deploy.evaluate.features import FeatureNetwork
from qncd_deploy.evaluate.variants import REFERENCE, Variant
from qncd_deploy.pipeline.arena import Arena
from qncd_deploy.pipeline.choose import CONFIDENCE, Choice, choose
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.pipeline.recordings import Recordings
from qncd_deploy.runtime import AS_EXPORTED, Bundle, Sampling
from qncd_deploy.sampler import Sampler, default_batch
from qncd_deploy.specs import EpsModel
from qncd_deploy.study import RecordedStudy, Setting

FIRST_FIT_PICTURE = 1 << 28
FIRST_CHOICE_PICTURE = 1 << 29
FIRST_CONFIRMING_PICTURE = 5 << 27

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted(Contest):
    """The tables of one way to sample, and which of them `--correction auto` takes."""

    tables: tuple[CorrectionTable, ...]


@dataclass(frozen=True)
class FitOptions:
    """What to fit for; None is the bundle's own choice.

    methods: of METHODS, None for all;  shortlist: of these, the ones that auto chooses among, None for all;  take: fit
    this one alone, in place of `methods`, and let auto take it untried;  size:
    pictures to fit on, the choice is made on as many others and confirmed on twice as many;  blobs: what `qncd build`
    compiled, since tables are of the engine that runs them.
    """

    backend: str
    remainder: Remainder | None = None
    sampling: Sampling = AS_EXPORTED
    methods: tuple[str, ...] | None = None
    shortlist: tuple[str, ...] | None = None
    take: str | None = None
    objective: str = "shift"
    size: int = 32
    seed: int = 0
    batch_size: int | None = None
    threads: int | None = None
    blobs: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.wanted) - METHODS.keys():
            raise UsageError(f"--correction {min(unknown)}: expected one of {', '.join(METHODS)}.")
        if self.objective not in OBJECTIVES:
            raise UsageError(f"--objective {self.objective}: expected one of {', '.join(OBJECTIVES)}.")
        if self.size < 2:
            raise UsageError(f"--fit-size {self.size}: expected 2 or more.")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The methods to fit."""
        return (self.take,) if self.take is not None else self.methods or tuple(METHODS)

    @property
    def sampled(self) -> float:
        """Pictures that fitting and choosing run through a network from noise to the end, at most."""
        methods = len(self.wanted)
        fits = (2 + methods) * self.size
        trials = (8 + methods / 2) * len(self.choice_pictures) + 3 * len(self.confirming_pictures)
        return fits + (trials if self.take is None else 0)

    @property
    def choice_pictures(self) -> range:
        return range(FIRST_CHOICE_PICTURE, FIRST_CHOICE_PICTURE + self.size)

    @property
    def confirming_pictures(self) -> range:
        return range(FIRST_CONFIRMING_PICTURE, FIRST_CONFIRMING_PICTURE + 2 * self.size)


def fit(bundle: Bundle, options: FitOptions, recordings: Recordings, tick: Tick) -> Fitted:
    """Fit the methods and choose one, or "off" where none is better beyond chance.

    recordings: of paired outputs, used again by fits for other engines and by one that was interrupted.
    Raises: EngineError, ScheduleError or CalibrationError as the sampler and the fits do; a method that cannot be
    fitted is an error only if no other is asked for.
    """
    draw = Draw(
        options.size,
        seed=options.seed,
        first=FIRST_FIT_PICTURE,
        sampling=options.sampling,
        # few pictures, small batches: every number of rows is a network to compile
        batch_size=options.batch_size or min(options.size, default_batch(bundle.manifest.model.latent_shape)),
        threads=options.threads,
    )
    # one float reference for all CPU engines: their float twins agree to rounding
    twin = _twin_backend(options.backend)
    quantized = Variant(OFF, options.backend, OFF, remainder=options.remainder, blobs=options.blobs)
    with ExitStack() as stack:
        exact, plain = (
            _remembering(stack.enter_context(variant.open(bundle, draw)), recordings.answers)
            for variant in (Variant(REFERENCE, twin, float_twin=True), quantized)
        )
        done = _Work(tick, options, calls=len(plain.steps))
        study = _recorded(bundle, exact, plain, draw, recordings, done)
        fitted, refused = _fit_all(study, options)
        if options.take is not None:
            taken = CorrectionTable(options.take, plain.table.key, fitted[options.take], {"pictures": options.size})
            return Fitted(
                tables=(taken,),
                choice=options.take,
                objective=options.objective,
                pictures=0,
                confidence=CONFIDENCE,
                figures={},
                screened={},
            )
        features = None
        if options.objective == "shift":
            if "features" in bundle.manifest.roles and bundle.manifest.model.picture_shape is not None:
                network = FeatureNetwork.open(
                    bundle.file("features"), twin, threads=options.threads, effort=bundle.effort
                )
                features = stack.enter_context(network)
            else:
                log.info("no feature network to measure the shift of pictures by: PSNR to the float network decides.")

        def arena_of(pictures: range) -> Arena:
            return Arena.of(exact, plain, pictures, features, seed=options.seed, on_pictures=done.add)

        arena = arena_of(options.choice_pictures)
        fresh = partial(arena_of, options.confirming_pictures)
        chosen = choose(study, fitted, arena, fresh, shortlist=options.shortlist)
    return Fitted(
        tables=_tables(plain.table.key, fitted, chosen, arena.objective, options),
        choice=OFF if chosen.taken is None else chosen.taken.name,
        objective=arena.objective,
        pictures=len(arena),
        confidence=CONFIDENCE,
        figures=chosen.figures,
        screened=chosen.screened,
        best=chosen.best,
        confirmed=chosen.confirmed,
        wins=chosen.wins,
        confirming=None if chosen.wins is None else len(options.confirming_pictures),
        refused=refused,
        latent_snr_db=chosen.latent_snr_db,
    )


def fit_into(folder: Path, bundle: Bundle, options: FitOptions, tick: Tick) -> tuple[Path, Fitted]:
    """Fit, and add the tables and how auto chose to FOLDER/corrections-ENGINE.npz, which is returned.

    Raises as fit does, and BundleError if another process fits in the same folder; an interrupted fit goes on where it
    stopped.
    """
    path = _tables_path(folder, options)
    with Recordings.open(folder / "fits", bundle) as recordings:
        fitted = fit(bundle, options, recordings, tick)
        merge_into(path, [fitted])
    return path, fitted


def is_fitted(folder: Path, bundle: Bundle, options: FitOptions) -> bool:
    """Whether FOLDER's tables or the bundle's own say how auto chooses for these options' engine and way to sample.

    Raises: BundleError for a damaged file.
    """
    path = _tables_path(folder, options)
    key = bundle.key(options.sampling, make_engine_id(options.backend, options.remainder))
    return any(tables.choice(key) is not None for tables in bundle.corrections([path] if path.exists() else []))


def _tables_path(folder: Path, options: FitOptions) -> Path:
    return folder / f"corrections-{make_engine_id(options.backend, options.remainder)}.npz"


def _twin_backend(backend: str) -> str:
    default = default_backend()
    both = {find_backend(name).device for name in (backend, default)}
    return default if both == {"cpu"} else backend


def merge_into(path: Path, fitted: Sequence[Fitted]) -> None:
    """Add tables, with how auto chose among them, to a corrections file, in place of older ones for the same keys.

    The file is read, then written: no other process may do the same meanwhile.
    """
    held = load_tables(path) if path.exists() else Tables(path, (), {})
    new = {each.tables[0].key.id: each for each in fitted if each.tables}
    kept = [table for table in held.tables if table.key.id not in new]
    save_tables(
        path,
        [*kept, *(table for each in new.values() for table in each.tables)],
        auto={**held.auto, **{key: each.choice for key, each in new.items()}},
        contests={**held.contests, **{key: each.to_json() for key, each in new.items()}},
    )


class _Work:
    """Counts pictures run through a network for the progress bar; an upper bound of all there are."""

    def __init__(self, tick: Tick, options: FitOptions, *, calls: int) -> None:
        self._total = round(calls * options.sampled)
        self._done = 0
        self._tick = tick

    def add(self, pictures: int) -> None:
        self._done = min(self._done + pictures, self._total)
        self._tick(self._done, self._total)

    def counted(self, model: EpsModel) -> EpsModel:
        def predict(x: np.ndarray, t: float) -> np.ndarray:
            self.add(len(x))
            return model(x, t)

        return predict


def _remembering(sampler: Sampler, answers: Answers) -> Sampler:
    network = sampler.network
    return sampler.using(replace(network, unet=remembering(network.unet, answers, source=network.source)))


def _recorded(
    bundle: Bundle, exact: Sampler, plain: Sampler, draw: Draw, recordings: Recordings, done: _Work
) -> RecordedStudy:
    shape = tuple(plain.network.facts.latent_shape)
    setting = Setting(plain.network.schedule, plain.config, draw.indices, draw.seed, shape)
    exact_network, network = (
        done.counted(sampler.model_for(draw.indices, batch_size=sampler.batch_size)) for sampler in (exact, plain)
    )
    folders = [
        recordings.place(sampler.network.source, _recording(bundle, sampler, draw)) for sampler in (exact, plain)
    ]
    study = RecordedStudy(setting, exact_network, network, *folders)
    study.record()
    return study


def _recording(bundle: Bundle, sampler: Sampler, draw: Draw) -> dict[str, Any]:
    """Everything, but for its graph, that decides what this sampler's network says of the pictures to fit on."""
    key = sampler.table.key
    held = bundle.manifest.files
    return {
        "key": {**key.to_json(), "plan_sha": ""},
        "model": asdict(bundle.manifest.model),
        "files": {role: held[name].sha256 for role, name in bundle.manifest.roles.items() if role in CONDITION_ROLES},
        "version": backend_status(find_backend(key.backend.rpartition("-")[0])).version,
        "pictures": [draw.count, draw.seed],
    }


def _fit_all(study: RecordedStudy, options: FitOptions) -> tuple[dict[str, tuple[StepFix, ...]], dict[str, str]]:
    """Rows of every method that could be fitted, and why the others could not."""
    fitted, refused = {}, {}
    for name in options.wanted:
        try:
            fitted[name] = METHODS[name].fit(study)
        except CalibrationError as exc:
            if len(options.wanted) == 1:
                raise
            refused[name] = str(exc)
            log.info("correction %s was not fitted: %s", name, exc)
    return fitted, refused


def _tables(
    key: ScheduleKey, fitted: Mapping[str, tuple[StepFix, ...]], chosen: Choice, objective: str, options: FitOptions
) -> tuple[CorrectionTable, ...]:
    """One for every method, and one for the choice if it is made of several."""
    rows = dict(fitted)
    if chosen.taken is not None:
        rows.setdefault(chosen.taken.name, chosen.taken.fixes)

    def info(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"pictures": options.size}
        for words, tried in ((objective, chosen.figures), (f"{objective}, half of the pictures", chosen.screened)):
            if math.isfinite(tried.get(name, math.nan)):
                return {**found, words: tried[name]}
        return found

    return tuple(CorrectionTable(name, key, fixes, info(name)) for name, fixes in rows.items())

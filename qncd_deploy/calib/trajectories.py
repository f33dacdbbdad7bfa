"""Calibration sets: the inputs the network meets while the float sampler draws pictures, evenly over the timesteps.

As in Q-Diffusion (Li et al., arXiv:2302.04304): every k-th call of the float model's own trajectory is recorded, for a
fixed number of pictures, and doubled by the unconditional rows where guidance makes them. Rows are ordered by call; per
call the conditional rows of all pictures, then the unconditional ones.

    FOLDER/calibration-KEY.npz            the set, arrays named as the graph's inputs, first axis = rows
    FOLDER/calibration-KEY.partial/       while recording: one NNN.npz per batch of pictures; a killed run goes on here
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.errors import CalibrationError
from qncd_deploy.files import canonical_json, load_npz, save_npz
from qncd_deploy.sample import Rollout, guided, rollout
from qncd_deploy.schedule import Schedule
from qncd_deploy.specs import Conditions, EpsModel, TensorSpec
from qncd_deploy.steps import SamplerConfig, initial_scale, make_steps

SCHEMA = 1
FIRST_PICTURE = 1 << 30
"""Calibration pictures are numbered from here on, so that none of them is a picture that --seed shows or evaluates."""

log = logging.getLogger(__name__)

Model = Callable[[np.ndarray, float, "Conditions | None"], np.ndarray]
"""The float network: (x, t, rows of the conditions or None) -> its raw output."""


@dataclass(frozen=True, eq=False)
class CalibSet:
    """Network inputs to calibrate on: arrays by graph input name, of equal length; key stands for their content.

    picture: (rows,) int, which picture's trajectory a row is of; None where every row is of its own.
    """

    arrays: Mapping[str, np.ndarray]
    key: str
    picture: np.ndarray | None = None

    @property
    def pictures(self) -> np.ndarray:
        """(rows,) int: rows of one picture have one number."""
        return np.arange(len(self)) if self.picture is None else self.picture

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def take(self, rows: slice | np.ndarray) -> CalibSet:
        """Some of the rows, under the same key."""
        return CalibSet({name: array[rows] for name, array in self.arrays.items()}, self.key, self.pictures[rows])

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """All rows in order, `size` at a time; the last batch may be shorter."""
        for start in range(0, len(self), size):
            yield {name: array[start : start + size] for name, array in self.arrays.items()}


@dataclass(frozen=True, eq=False)
class ConditionRows:
    """What the network is told of each calibration picture: `given` (size, ...) by graph input; `null` (1, ...) is what
    guidance feeds beside it, None without guidance."""

    given: Conditions
    null: Conditions | None = None


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything that decides the content of a recorded set.

    model_sha256: of the float checkpoint. engine: what computes it, with its version. latent_shape: (C, H, W). size:
    pictures. calls: network calls to record of each picture's trajectory. batch_size: pictures sampled together.
    """

    model_sha256: str
    schedule: Schedule
    sampler: SamplerConfig
    latent_shape: tuple[int, ...]
    size: int
    calls: int
    condition: ConditionRows | None = None
    guidance_scale: float = 1.0
    seed: int = 0
    batch_size: int = 16
    engine: str = ""

    def __post_init__(self) -> None:
        for what, value in (
            ("--calib-size", self.size),
            ("--calib-steps", self.calls),
            ("batch size", self.batch_size),
        ):
            if value < 1:
                raise CalibrationError(f"{what} {value}: expected at least 1.")
        given = {} if self.condition is None else self.condition.given
        assert all(len(rows) == self.size for rows in given.values()), "one row per picture"

    @property
    def null(self) -> Conditions | None:
        """What guidance adds for every picture; None where it adds nothing."""
        return self.condition.null if self.condition is not None and self.guidance_scale != 1 else None

    @property
    def key(self) -> str:
        """The first 16 digits of a sha256 over all of it."""
        facts = {
            "schema": SCHEMA,
            "model": self.model_sha256,
            "schedule": self.schedule.sha256(),
            "sampler": [self.sampler.scheduler, self.sampler.n_steps, self.sampler.eta],
            "latent_shape": self.latent_shape,
            "size": self.size,
            "calls": self.calls,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "engine": self.engine,
            "condition": None
            if self.condition is None
            else [
                part
                for name, rows in self.condition.given.items()
                for part in (name, _digest(rows), None if self.null is None else _digest(self.null[name]))
            ],
        }
        return _short_hash(facts)


def record(
    model: Model,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibSet:
    """The set of a recipe: read if it was recorded before, else sampled with `model`, in batches that survive a kill.

    progress is told the network calls done and in all, one call being one batch once through the network.
    resume=False records from the start.

    Raises: CalibrationError if the network returns values that are not finite.
    """
    target = folder / f"calibration-{recipe.key}.npz"
    partial = target.with_suffix(".partial")
    if not resume:
        target.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    if target.exists():
        log.info("calibration: %s was recorded before, reused", target.name)
        return _set(load_npz(target), recipe)
    trajectory = _Trajectory.of(model, recipe)
    starts = range(0, recipe.size, recipe.batch_size)
    total = len(starts) * trajectory.n_calls
    shards = []
    for number, start in enumerate(starts):
        shard = partial / f"{number:03d}.npz"

        def tell(call: int, before: int = number * trajectory.n_calls) -> None:
            progress(before + call, total)

        if shard.exists():
            shards.append(load_npz(shard)["sample"])
            tell(trajectory.n_calls)
            continue
        pictures = range(start, min(start + recipe.batch_size, recipe.size))
        shards.append(trajectory.states(pictures, tell))
        partial.mkdir(parents=True, exist_ok=True)
        save_npz(shard, {"sample": shards[-1]})
    arrays = _assemble(recipe, trajectory.timesteps, np.concatenate(shards, axis=1))
    save_npz(target, arrays)
    shutil.rmtree(partial, ignore_errors=True)
    return _set(arrays, recipe)


def recorded_calls(n_calls: int, wanted: int) -> list[int]:
    """Every floor(n_calls / wanted)-th call, at least `wanted` of them where there are so many.

    Counted from the last call backwards: that one is always among them, because outputs are hardest to quantize there.
    """
    stride = max(1, n_calls // wanted)
    return list(range(n_calls - 1, -1, -stride))[::-1]


@dataclass(frozen=True, eq=False)
class _Trajectory:
    """The float sampler, and which of its calls are kept. timesteps: those of the kept calls."""

    recipe: Recipe
    model: Model
    run: Rollout
    n_calls: int
    kept: frozenset[int]
    timesteps: tuple[float, ...]

    @classmethod
    def of(cls, model: Model, recipe: Recipe) -> _Trajectory:
        steps = make_steps(recipe.schedule, recipe.sampler)
        kept = recorded_calls(len(steps), recipe.calls)
        run = rollout(
            steps,
            seed=recipe.seed,
            shape=recipe.latent_shape,
            prediction=recipe.schedule.prediction,
            scale=initial_scale(recipe.schedule, recipe.sampler),
        )
        return cls(recipe, model, run, len(steps), frozenset(kept), tuple(steps[call].t for call in kept))

    def states(self, pictures: range, progress: Callable[[int], None]) -> np.ndarray:
        """What the network saw at the kept calls: (calls, pictures, C, H, W) float32."""
        seen = []
        for state in self.run(self._predict, [FIRST_PICTURE + i for i in pictures]):
            if not np.isfinite(state.raw).all():
                raise CalibrationError(
                    f"calibration: the float network returns values that are not finite at call {state.call} "
                    f"(timestep {state.step.t:g}). Check the checkpoint and its config."
                )
            if state.call in self.kept:
                seen.append(np.array(state.x_in, np.float32))
            progress(state.call + 1)
        return np.stack(seen)

    def _predict(self, indices: Sequence[int]) -> EpsModel:
        condition = self.recipe.condition
        rows = [i - FIRST_PICTURE for i in indices]
        given = None if condition is None else {name: array[rows] for name, array in condition.given.items()}
        return guided(self.model, given, self.recipe.null, self.recipe.guidance_scale)


def _assemble(recipe: Recipe, timesteps: Sequence[float], states: np.ndarray) -> dict[str, np.ndarray]:
    """Rows as the network gets them: per call all pictures with their condition, then with the null row of guidance."""
    rows = states if recipe.null is None else np.concatenate([states, states], axis=1)
    arrays = {
        "sample": rows.reshape(-1, *rows.shape[2:]),
        "timestep": np.repeat(np.asarray(timesteps, np.float32), rows.shape[1]),
    }
    for name, given in ({} if recipe.condition is None else recipe.condition.given).items():
        sides = [given] if recipe.null is None else [given, np.broadcast_to(recipe.null[name], given.shape)]
        arrays[name] = np.concatenate(sides * len(timesteps))
    return arrays


def _set(arrays: Mapping[str, np.ndarray], recipe: Recipe) -> CalibSet:
    """The pictures of a call stand in their order, and once more where guidance doubles them."""
    turns = len(next(iter(arrays.values()))) // recipe.size
    return CalibSet(arrays, recipe.key, np.tile(np.arange(recipe.size), turns))


def load_user_npz(path: Path, specs: Sequence[TensorSpec]) -> CalibSet:
    """A calibration set of the user's own: arrays named as the graph's inputs, first axis = samples.

    Numbers are cast to the input's dtype; integers are wanted where the input is integer.

    Raises: CalibrationError for missing or unknown names, a wrong rank or shape, another kind of numbers, different
    lengths, no samples, or values that are not finite. BundleError if the file cannot be read.
    """
    found = load_npz(path)
    wanted = {spec.name: spec for spec in specs}
    if found.keys() != wanted.keys():
        raise CalibrationError(
            f"{path}: arrays {sorted(found)}, the network's inputs are {sorted(wanted)}. Name one array per input."
        )
    arrays = {name: _checked(path, found[name], spec) for name, spec in wanted.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise CalibrationError(f"{path}: lengths differ ({lengths}), expected one row of every array per sample.")
    return CalibSet(arrays, _short_hash({name: _digest(array) for name, array in arrays.items()}))


def _checked(path: Path, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    place = f"{path}, {spec.name}"
    shape = ("samples", *spec.shape[1:])
    fits = array.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        expected = " x ".join(map(str, shape))
        raise CalibrationError(f"{place}: shape {array.shape}, expected {expected}. First axis = samples.")
    if len(array) == 0:
        raise CalibrationError(f"{place}: no samples, expected at least one.")
    kinds = "iu" if np.dtype(spec.dtype).kind in "iu" else "fiu"
    if array.dtype.kind not in kinds:
        raise CalibrationError(f"{place}: {array.dtype} values, expected {spec.dtype}. Save it with that dtype.")
    with np.errstate(over="ignore"):  # what the dtype cannot hold becomes infinite, and is refused below
        cast = array.astype(spec.dtype)
    if not np.isfinite(cast).all():
        bad = int(cast.size - np.isfinite(cast).sum())
        raise CalibrationError(f"{place}: {bad} of {cast.size} values are not finite. Remove those samples.")
    return cast


def _digest(array: np.ndarray) -> list[Any]:
    return [str(array.dtype), list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]


def _short_hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]

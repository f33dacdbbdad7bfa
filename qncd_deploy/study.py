"""What fit functions fit on: both networks run over the same pictures, in step, call by call.

All pictures go through a call before any goes on to the next, so one call's outputs are whole arrays, from which any
statistic can be had, trimmed, masked or ranked ones too; memory holds two calls of them, the rest lies on disk. What is
on disk already is not run again, so an interrupted fit goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from qncd_deploy.correct.fitting import Pairs, State
from qncd_deploy.correct.record import StepFix, fixed_steps
from qncd_deploy.errors import BundleError, CalibrationError
from qncd_deploy.files import load_npz, make_folder, save_npz
from qncd_deploy.sample import PictureNoise, denoise
from qncd_deploy.schedule import Prediction, Schedule
from qncd_deploy.specs import EpsModel
from qncd_deploy.steps import SamplerConfig, Step, initial_scale, make_steps

_NOTHING = StepFix()


@dataclass(frozen=True, eq=False)
class Setting:
    """Which pictures are sampled how. indices, seed: of their noise; shape: (C, H, W)."""

    schedule: Schedule
    config: SamplerConfig
    indices: Sequence[int]
    seed: int
    shape: tuple[int, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        return make_steps(self.schedule, self.config)

    @property
    def scale(self) -> float:
        return initial_scale(self.schedule, self.config)

    def noise(self) -> PictureNoise:
        """From its beginning."""
        return PictureNoise(self.seed, self.indices, self.shape)


@dataclass(frozen=True, eq=False)
class RecordedStudy:
    """A correct.fitting.Study whose pairs lie on disk, a file a call and network.

    exact_network, network: the float and the quantized one, for the pictures of the setting;  exact_folder, folder:
    where their outputs lie. The float network's serve all engines, whose float twins agree to rounding.
    """

    setting: Setting
    exact_network: EpsModel
    network: EpsModel
    exact_folder: Path
    folder: Path

    def record(self) -> None:
        """Run the float sampler and, at each of its inputs, the quantized network; what is on disk is kept.

        The folders must be of this setting and these networks alone.
        Raises: CalibrationError if an output is not finite.
        """
        noise = self.setting.noise()
        first = self.setting.scale * noise.initial()

        def predict(x: np.ndarray, t: float) -> np.ndarray:
            exact = _output(self.exact_folder, call, "float", self.exact_network, x, t)
            _output(self.folder, call, "quantized", self.network, x, t)
            return exact

        call, x = 0, first
        for state in denoise(predict, first, self.steps, noise=noise, prediction=self.prediction):
            x = state.x
            call += 1
        save_npz(_file(self.exact_folder, call), {"x": x})

    @property
    def schedule(self) -> Schedule:
        return self.setting.schedule

    @property
    def config(self) -> SamplerConfig:
        return self.setting.config

    @property
    def steps(self) -> Sequence[Step]:
        return self.setting.steps

    @property
    def prediction(self) -> Prediction:
        return self.setting.schedule.prediction

    @property
    def pictures(self) -> int:
        return len(self.setting.indices)

    def pairs(self) -> Iterator[Pairs]:
        for call, step in enumerate(self.steps):
            exact = load_npz(_file(self.exact_folder, call))
            yield Pairs(call, step, exact["x"], load_npz(_file(self.folder, call))["output"], exact["output"])

    def exact(self, call: int) -> np.ndarray:
        return load_npz(_file(self.exact_folder, call))["x"]

    def run(self) -> FreeRun:
        return FreeRun(self.setting, self.network)

    def exact_run(self) -> FreeRun:
        return FreeRun(self.setting, self.exact_network)


def _output(folder: Path, call: int, which: str, network: EpsModel, x: np.ndarray, t: float) -> np.ndarray:
    """The network's output at x, from disk if it was asked there before."""
    path = _file(folder, call)
    held = _held(path)
    if not np.array_equal(held.get("x", ()), x) or "output" not in held:
        held = {"x": x, "output": network(x, t)}
        if not np.isfinite(held["output"]).all():
            raise CalibrationError(
                f"the {which} network returned NaN or infinity at t = {t:g} while corrections were fitted. Check the "
                "checkpoint, or leave the layers that overflow in float with --exclude."
            )
        make_folder(folder)
        save_npz(path, held)
    return held["output"]


def _held(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_npz(path) if path.exists() else {}
    except BundleError:  # cut off when the machine went down
        return {}


def _file(folder: Path, call: int) -> Path:
    return folder / f"call-{call:04d}.npz"


@dataclass(eq=False)
class FreeRun:
    """A correct.fitting.Run of one network over the pictures of a setting."""

    setting: Setting
    network: EpsModel
    fixes: list[StepFix] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._steps = self.setting.steps
        self._noise = self.setting.noise()
        self._state: State | None = None
        self._output: tuple[np.ndarray, float, np.ndarray] | None = None
        self.x: np.ndarray = self.setting.scale * self._noise.initial()

    @property
    def call(self) -> int:
        """Index of the next call, len(steps) when there is none."""
        return len(self.fixes)

    @property
    def step(self) -> Step:
        return self._steps[self.call]

    def output(self, fix: StepFix = _NOTHING) -> np.ndarray:
        """See Run.output."""
        added = fix.x_add
        if isinstance(added, np.ndarray) and added.ndim == 1:
            added = added.reshape(-1, 1, 1)
        x = self.x + added
        return self._predict(x, self.step.t if fix.t_model is None else fix.t_model)

    def advance(self, fix: StepFix = _NOTHING) -> State:
        """See Run.advance. Raises ScheduleError as denoise does."""
        rows = [*self.fixes, fix]
        rows += [_NOTHING] * (len(self._steps) - len(rows))
        step = fixed_steps(self.setting.schedule, self.setting.config, rows)[self.call]
        (state,) = denoise(
            self._predict,
            self.x,
            [step],
            noise=self._noise,
            fixes=[fix],
            prediction=self.setting.schedule.prediction,
            after=self._state,
        )
        state = replace(state, call=self.call)
        self.fixes.append(fix)
        self._state, self.x, self._output = state, state.x, None
        return state

    def _predict(self, x: np.ndarray, t: float) -> np.ndarray:
        """The network, or what it said last time if it is asked the same again."""
        held = self._output
        if held is None or held[1] != t or not np.array_equal(held[0], x):
            held = self._output = (x, t, self.network(x, t))
        return held[2]

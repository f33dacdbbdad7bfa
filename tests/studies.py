"""Studies of networks that are plain functions of (x, t)."""

from __future__ import annotations

from pathlib import Path

from qncd_deploy.schedule import Schedule
from qncd_deploy.steps import SamplerConfig
from qncd_deploy.study import RecordedStudy, Setting


def setting_of(schedule, *, pictures, shape, name="ddim", n_steps=20, eta=0.0, seed=0):
    return Setting(schedule, SamplerConfig(name, n_steps, eta), range(pictures), seed, shape)


def unrecorded(exact, network, setting: Setting) -> RecordedStudy:
    """For fits that only run networks and read no pairs."""
    return RecordedStudy(setting, exact, network, Path("nowhere"), Path("nowhere"))


def recorded(exact, network, setting: Setting, folder: Path) -> RecordedStudy:
    study = RecordedStudy(setting, exact, network, folder / "float", folder / "quantized")
    study.record()
    return study


def with_prediction(schedule: Schedule, prediction: str) -> Schedule:
    """The same noise levels for a network that returns something else."""
    return Schedule.from_json({**schedule.to_json(), "prediction": prediction})

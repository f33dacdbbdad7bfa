"""What `auto` takes, on networks whose error is known: judged on pictures that no fit has seen."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from studies import recorded, setting_of

from qncd_deploy.correct.methods import METHODS
from qncd_deploy.correct.record import StepFix
from qncd_deploy.correct.rules import active
from qncd_deploy.pipeline.choose import choose
from qncd_deploy.schedule import Schedule
from qncd_deploy.study import FreeRun, Setting

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
SHAPE = (2, 4, 4)
SLOPE, BIAS = 0.95, np.array([0.06, -0.04], np.float32).reshape(2, 1, 1)
NAMES = ("qncd", "ptqd", "ptqd:paper", "d2dpm", "tac", "mix", "map")


def exact(x, t):
    return np.tanh(x)


def skewed(x, t):
    """Smaller than it should be, and biased: PTQD's clamp of k at 0 leaves the slope as it is."""
    return np.float32(SLOPE) * exact(x, t) + BIAS


@dataclass
class Field:
    """An arena whose pictures are the final states of free runs: cost is their mean squared distance from the float
    sampler's."""

    network: object
    setting: Setting
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self):
        self.truth = self._final(exact, (StepFix(),) * len(self.setting.steps))

    def __len__(self):
        return len(self.setting.indices)

    @property
    def half(self):
        return len(self) // 2

    def latent_snr_db(self, candidate):
        return (0.0,) * len(candidate.fixes)

    def _final(self, network, fixes):
        run = FreeRun(self.setting, network)
        for fix in fixes:
            run.advance(fix)
        return run.x

    def _errors(self, candidate, count):
        self.asked.append((candidate.name, count))
        found = self._final(self.network, candidate.fixes)
        return np.square(found - self.truth).mean(axis=(1, 2, 3))[:count]

    def figure(self, candidate, count):
        return float(self._errors(candidate, count).mean())

    cost = figure

    def wins(self, candidate, rival, count):
        one, other = self._errors(candidate, count), self._errors(rival, count)
        rows = np.random.default_rng(0).integers(0, count, (200, count))
        return float(np.mean(one[rows].mean(axis=1) < other[rows].mean(axis=1)))


def contest(network, folder, *, names=NAMES, eta=0.0, shortlist=None):
    sampler = {"shape": SHAPE, "n_steps": 8, "eta": eta}
    study = recorded(exact, network, setting_of(SCHEDULE, pictures=32, seed=1, **sampler), folder)
    arena = Field(network, setting_of(SCHEDULE, pictures=24, seed=2, **sampler))
    fitted = {name: METHODS[name].fit(study) for name in names}
    fresh = Field(network, setting_of(SCHEDULE, pictures=24, seed=3, **sampler))
    return study, arena, choose(study, fitted, arena, lambda: fresh, shortlist=shortlist)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_finds_what_repairs_the_network(tmp_path, eta):
    study, _, found = contest(skewed, tmp_path, eta=eta)
    taken = found.taken
    assert taken is not None and "output" in active(taken.fixes, study.steps)
    # a map with a slope undoes the error up to the fit's own; a bias alone, PTQD's clamped form, cannot
    assert found.figures[taken.name] < 0.02 * found.figures["off"]
    assert found.screened["ptqd:paper"] > 5 * found.screened["ptqd"]
    assert found.figures[taken.name] == min(found.figures.values())
    assert found.figures[taken.name] <= min(found.figures.get(name, np.inf) for name in NAMES)
    assert found.best == taken.name and found.wins > 0.95
    assert found.confirmed[taken.name] < 0.02 * found.confirmed["off"]


def test_a_perfect_network_is_left_alone(tmp_path):
    assert contest(exact, tmp_path, names=("ptqd", "map", "mix"))[2].taken is None


def test_noise_that_no_table_can_know_is_left_alone(tmp_path):
    """The error is a fresh draw every call: what a fit finds in it is not there in other pictures. Confirmed at 95 %,
    one in twenty may pass by luck."""
    taken = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)

        def restless(x, t, rng=rng):
            return exact(x, t) + rng.normal(0, 0.05, x.shape).astype(np.float32)

        taken += contest(restless, tmp_path / str(seed), names=("map", "qncd", "ptqd"))[2].taken is not None
    assert taken <= 1


def test_a_lucky_winner_is_found_out(tmp_path):
    """What is better on the pictures it was chosen by, and worse on others."""

    class Swayed(Field):
        def _errors(self, candidate, count):
            return super()._errors(candidate, count) * (1e-3 if candidate.name == "worse" else 1)

    sampler = {"shape": SHAPE, "n_steps": 8}
    study = recorded(exact, exact, setting_of(SCHEDULE, pictures=32, seed=1, **sampler), tmp_path)
    worse = tuple(StepFix(a=1.05) for _ in study.steps)
    arena = Swayed(skewed, setting_of(SCHEDULE, pictures=24, seed=2, **sampler))
    fresh = Field(exact, setting_of(SCHEDULE, pictures=24, seed=3, **sampler))
    found = choose(study, {"worse": worse}, arena, lambda: fresh)
    assert found.best == "worse" and found.figures["worse"] < found.figures["off"]
    assert found.confirmed["worse"] > found.confirmed["off"]
    assert found.taken is None and found.wins < 0.5


def test_what_has_added_up_is_taken_out_of_the_input(tmp_path):
    """A bias that the output's own table does not hold: only the input's mean is left to correct."""

    def drifting(x, t):
        return exact(x, t) + (BIAS if t > 500 else 0 * BIAS)

    study, _, found = contest(drifting, tmp_path, names=("qncd",))
    assert found.taken is not None
    assert active(found.taken.fixes, study.steps).keys() == {"input"}
    assert found.taken.name.split("@")[0] in ("ibc", "ibc-map", "qncd+ibc", "qncd+ibc-map")


def test_the_shortlist_alone_competes(tmp_path):
    _, arena, found = contest(skewed, tmp_path, shortlist=("qncd", "map"))
    assert found.screened.keys() & set(NAMES) == {"qncd", "map"}
    assert not {name for name, _ in arena.asked if name.split("+")[0].split("@")[0] in ("ptqd", "mix", "tac")}


def test_only_the_best_are_tried_on_all_pictures(tmp_path):
    _, arena, found = contest(skewed, tmp_path)
    whole = {name for name, count in arena.asked if count == len(arena)}
    assert len(whole & set(NAMES)) == 4
    assert whole == found.figures.keys() < found.screened.keys() == found.latent_snr_db.keys()

"""TAC's rescaling and input correction on errors of known make."""

from __future__ import annotations

import numpy as np
import pytest
from fit_study import SHAPE, channels, rough, study_of
from scipy.optimize import minimize_scalar

from qncd_deploy.correct import tac
from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import CalibrationError
from qncd_deploy.sample import denoise
from qncd_deploy.schedule import SCHEDULERS

K, MU, NOISE = [0.1, -0.05, 0.02], [0.06, -0.04, 0.1], 0.2


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return study_of(tmp_path_factory.mktemp("study"), rough(k=K, mu=MU, noise=NOISE))


def loss(factor, q, e, chosen, lambda1, lambda2):
    """The formula on top of tac.py, one channel."""
    power = np.mean(e**2)
    q, e = q[chosen], e[chosen]
    error = (factor * q - e) ** 2
    relative = np.sum(error / (e**2 + 0.01 * power))
    return (1 - lambda1) * np.sum(error) / power + lambda1 * relative + lambda2 * len(q) * (factor - 1) ** 2


@pytest.mark.parametrize(("lambda1", "lambda2", "thr"), [(0.5, 0.1, 1.0), (0.8, 0.3, 0.0), (0.0, 1.0, 0.5)])
def test_the_factor_minimizes_the_loss(study, lambda1, lambda2, thr):
    rows = tac.fit_ner(study, lambda1=lambda1, lambda2=lambda2, thr=thr)
    for row, pairs in zip(rows, study.pairs(), strict=True):
        q, e = pairs.q.astype(float), pairs.e.astype(float)
        chosen = np.abs(q) >= thr * np.abs(q).mean(axis=(1, 2, 3), keepdims=True)
        for c in range(3):
            sides = (q[:, c], e[:, c], chosen[:, c], lambda1, lambda2)
            best = minimize_scalar(loss, bracket=(0.5, 1.5), args=sides)
            assert row.a[c] == pytest.approx(best.x, abs=1e-6)  # the minimum of a parabola to sqrt(1e-16) and better
        assert (row.thr, row.mask) == (thr, "two-sided")


def test_the_factor_has_no_unit(tmp_path):
    rows = [tac.fit_ner(study_of(tmp_path / str(unit), scaled(unit), exact=scaled(unit, 0))) for unit in (1, 10)]
    for one, ten in zip(*rows, strict=True):
        np.testing.assert_allclose(one.a, ten.a, rtol=1e-6)


def scaled(unit, noise=NOISE):
    return lambda x, t: np.float32(unit) * rough(noise=noise)(x, t)


def test_the_public_code(study):
    """Its loop, one picture and channel at a time."""
    lambda1, lambda2 = 0.5, 0.1
    for row, pairs in zip(tac.fit_paper(study), study.pairs(), strict=True):
        count, factors = np.prod(SHAPE), np.zeros((study.pictures, 3))
        for i in range(study.pictures):
            for c in range(3):
                q, e = pairs.q[i, c].astype(float), pairs.e[i, c].astype(float)
                over = (1 - lambda1) * np.sum(q * e) + lambda1 * count * np.sum(q / (e + 1e-7)) + lambda2 * count
                under = (1 - lambda1) * np.sum(q**2) + lambda1 * count * np.sum(q**2 / (e**2 + 1e-7))
                factors[i, c] = over / (under + lambda2 * count) + 1e-7
        np.testing.assert_allclose(row.a, factors.mean(axis=0), rtol=1e-6)
        assert (row.thr, row.mask) == (1.0, "one-sided")


def test_the_public_code_means_over_factors_of_pictures(tmp_path):
    """Pictures that are wrong by different factors: the mean of 1 / s, where pooled sums give another number."""
    factors = np.linspace(0.5, 2, 64, dtype=np.float32).reshape(-1, 1, 1, 1)
    study = study_of(tmp_path, lambda x, t: factors * rough()(x, t))
    faithful = tac.fit_paper(study, lambda1=0, lambda2=0)
    pooled = tac.fit_ner(study, lambda1=0, lambda2=0, thr=0)
    for one, other in zip(faithful, pooled, strict=True):
        np.testing.assert_allclose(one.a, np.mean(1 / factors), rtol=1e-6)
        assert np.all(np.abs(other.a - one.a) > 0.05)


def drifting(x, t):
    """Follows the state, so that errors of earlier calls come back."""
    return (0.9 * x + channels([0.1, 0.0, -0.1])).astype(np.float32)


def off(x, t):
    pattern = np.linspace(-0.1, 0.1, int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)
    return drifting(x, t) * np.float32(1.04) + channels([0.05, -0.02, 0.08]) + pattern


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("per", ["channel", "element"])
def test_the_input_has_the_float_samplers_mean(tmp_path, name, per):
    """At every call, with other corrections on, on the pictures that it was fitted on."""
    study = study_of(tmp_path, off, exact=drifting, name=name, n_steps=6, pictures=16)
    base = [StepFix(a=0.98, b=0.01, gain=1.01) for _ in study.steps]
    rows = tac.fit_ibc(study, base, per=per, shrink=False)
    noise = study.setting.noise()
    states = denoise(off, study.setting.scale * noise.initial(), study.steps, noise=noise, fixes=rows)
    axis = (0, 2, 3) if per == "channel" else 0
    moved = 0.0
    for state, row, plain in zip(states, rows, base, strict=True):
        # float32 states of size 4
        gap = (state.x_in - study.exact(state.call)).mean(axis=axis, dtype=np.float64)
        np.testing.assert_allclose(gap, 0, atol=1e-6)
        assert (row.a, row.b, row.gain) == (plain.a, plain.b, plain.gain)
        assert state.call == 0 or row.x_add.shape == ((3,) if per == "channel" else SHAPE)
        moved = max(moved, np.abs(row.x_add).max())
    assert rows[0].x_add == 0  # both start from the same noise
    assert moved > 0.01


def test_means_are_shrunk_where_pictures_disagree(tmp_path):
    study = study_of(tmp_path, rough(noise=3.0), n_steps=2)
    (_, plain), (_, shrunk) = (tac.fit_ibc(study, [StepFix()] * 2, shrink=shrink) for shrink in (False, True))
    run = study.run()
    run.advance()
    means = (study.exact(1) - run.x).mean(axis=(2, 3), dtype=np.float64)
    error = means.std(axis=0, ddof=1) / np.sqrt(study.pictures)
    np.testing.assert_allclose(plain.x_add, means.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(shrunk.x_add, plain.x_add**3 / (plain.x_add**2 + error**2), rtol=1e-4)


def test_input_correction_replaces_one_that_is_there(tmp_path):
    study = study_of(tmp_path, off, exact=drifting, n_steps=3)
    plain = tac.fit_ibc(study, [StepFix()] * 3)
    again = tac.fit_ibc(study, plain)
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_allclose(one.x_add, other.x_add, atol=1e-7)


def test_the_whole_method_has_both_parts(tmp_path):
    study = study_of(tmp_path, off, exact=drifting)
    for fit in (tac.fit, tac.fit_paper):
        first, *others = fit(study)
        assert first.x_add == 0
        assert all(row.thr == 1 and np.any(row.a != 1) and np.any(row.x_add != 0) for row in others)
    plain = tac.fit_ibc(study, tac.fit_paper(study), shrink=False)
    for row, other in zip(tac.fit_paper(study), plain, strict=True):
        np.testing.assert_array_equal(row.x_add, other.x_add)
    faithful = tac.fit_paper(study, thr=4, lambda1=0.8)
    assert faithful[0].thr == 4 and np.any(faithful[0].a != tac.fit_paper(study)[0].a)


def test_a_mask_that_takes_nothing_changes_nothing(tmp_path):
    for row in tac.fit_ner(study_of(tmp_path, rough(k=0.1)), thr=1000):
        np.testing.assert_array_equal(row.a, 1)


def test_networks_are_run_no_more_than_needed(tmp_path):
    asked = []

    def counted(x, t):
        asked.append(t)
        return off(x, t)

    study = study_of(tmp_path, counted, exact=drifting, n_steps=5)
    asked.clear()
    tac.fit(study)
    assert len(asked) == 4  # the last call's output moves no input


def test_refusals(tmp_path):
    study = study_of(tmp_path, off, exact=drifting, pictures=15)
    with pytest.raises(CalibrationError, match=r"^input correction: 15 pictures to fit on, a number for every element"):
        tac.fit_ibc(study, [StepFix()] * 3, per="element")
    with pytest.raises(CalibrationError, match=r"^input correction: the state before call 1 holds NaN or infinity"):
        tac.fit_ibc(study, [StepFix(b=np.full(3, np.nan))] * 3)
    few = study_of(tmp_path / "few", off, exact=drifting, pictures=3)
    with pytest.raises(CalibrationError, match=r"^tac:paper: 3 pictures to fit on"):
        tac.fit_paper(few)


def test_silent_channels_are_left_alone(tmp_path):
    silent = study_of(tmp_path, lambda x, t: np.zeros_like(x), exact=lambda x, t: np.zeros_like(x))
    for rows in (tac.fit_ner(silent), tac.fit_ner(silent, lambda2=0), tac.fit_paper(silent)):
        for row in rows:
            np.testing.assert_allclose(row.a, 1, atol=2e-7)

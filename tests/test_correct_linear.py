"""Linear corrections against torch's convolution, NumPy's least squares and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from studies import recorded, setting_of, with_prediction

from qncd_deploy.correct import linear
from qncd_deploy.errors import CalibrationError
from qncd_deploy.sample import denoise
from qncd_deploy.schedule import Schedule
from qncd_deploy.steps import output_per_eps

torch = pytest.importorskip("torch", reason="an independent convolution")

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
SHAPE = (2, 6, 6)
RNG = np.random.default_rng(3)
KERNEL = (RNG.normal(size=(2, 4, 3, 3)) / 20).astype(np.float32)
SHIFT = np.array([0.05, -0.02], np.float32)


def network(x, t):
    """Not linear in x, so that the taps of q and of x differ."""
    return np.tanh(2 * x) + np.float32(0.2) * np.roll(x, 1, axis=3) ** 2


def corrected(x, t):
    """What the filter is to find: network + conv3x3([network, x]) + shift, by torch."""
    q = network(x, t)
    both = torch.from_numpy(np.concatenate([q, x], axis=1))
    found = torch.nn.functional.conv2d(both, torch.from_numpy(KERNEL), torch.from_numpy(SHIFT), padding=1)
    return q + found.numpy()


def noisy(net, spread):
    rng = np.random.default_rng(5)

    def predict(x, t):
        out = net(x, t)
        return out + rng.normal(0, spread, out.shape).astype(np.float32)

    return predict


def study_of(exact, net, folder, pictures, **sampler):
    return recorded(exact, net, setting_of(SCHEDULE, pictures=pictures, shape=SHAPE, n_steps=3, **sampler), folder)


def test_the_filter_finds_a_convolution(tmp_path):
    study = study_of(corrected, network, tmp_path, 60)
    rows = linear.fit_filter(study)
    for row in rows:
        # ridge 1e-4 of the columns' power moves each coefficient by about 1e-4 of its size over the smallest relative
        # eigenvalue of the columns' correlation, which is some tenths here
        np.testing.assert_allclose(row.f, KERNEL, atol=2e-3)
        np.testing.assert_allclose(row.b, SHIFT, atol=2e-3)
        assert row.var < 1e-5
    for pairs, row in zip(study.pairs(), rows, strict=True):
        (state,) = denoise(lambda x, t, q=pairs.q: q, pairs.x, [pairs.step], noise=study.setting.noise(), fixes=[row])
        np.testing.assert_allclose(state.eps, pairs.e, atol=2e-2)  # the sum of 37 such errors times values up to 3


def test_what_is_left_over_is_its_variance(tmp_path):
    """q = e + n: the best guess of e from q alone, e and n independent of x's other values, leaves
    var(e) var(n) / (var(e) + var(n)) over; a filter sees x too and leaves less."""
    spread = 0.3
    study = study_of(network, noisy(network, spread), tmp_path, 200)
    mixed, filtered = linear.fit_mix(study), linear.fit_filter(study)
    for pairs, mix, kernel in zip(study.pairs(), mixed, filtered, strict=True):
        flat = np.moveaxis(pairs.q, 1, -1).reshape(-1, 2).astype(np.float64)
        columns = np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
        target = np.moveaxis(pairs.e, 1, -1).reshape(-1, 2)
        weights, residual, *_ = np.linalg.lstsq(columns, target, rcond=None)
        np.testing.assert_allclose(mix.a, weights[:2].T, atol=2e-4)  # the ridge
        np.testing.assert_allclose(mix.b, weights[2], atol=2e-4)
        assert mix.var == pytest.approx(residual.sum() / target.size, rel=1e-3)
        assert kernel.var < mix.var < spread**2


def test_the_map_is_the_mean_error_of_each_element(tmp_path):
    error = RNG.normal(size=SHAPE).astype(np.float32) / 10
    error[0, 0, 0] = 0
    study = study_of(network, noisy(lambda x, t: network(x, t) + error, 0.05), tmp_path, 400)
    standard_error = 0.05 / np.sqrt(400)
    for row in linear.fit_map(study):
        # five standard errors over 72 elements; shrinking moves an element by at most half of its standard error
        np.testing.assert_allclose(-row.b, error, atol=5.5 * standard_error)
        assert abs(row.b[0, 0, 0]) < 5 * standard_error
        assert row.var == pytest.approx(0.05**2, rel=0.05)


def test_the_variance_is_that_of_eps(tmp_path):
    """A network that returns v: D_v = D_eps / a."""
    schedule = with_prediction(SCHEDULE, "v_prediction")
    study = recorded(network, noisy(network, 0.1), setting_of(schedule, pictures=200, shape=SHAPE, n_steps=3), tmp_path)
    for step, row in zip(study.steps, linear.fit_map(study), strict=True):
        unit = output_per_eps(step.abar, "v_prediction")
        assert row.var == pytest.approx(0.1**2 / unit**2, rel=0.05)


def test_large_sets_are_fitted_in_parts(tmp_path, monkeypatch):
    study = study_of(corrected, noisy(network, 0.1), tmp_path, 30)
    whole = linear.fit_filter(study)
    monkeypatch.setattr(linear, "_CHUNK", 1)
    for one, other in zip(whole, linear.fit_filter(study), strict=True):
        np.testing.assert_allclose(one.f, other.f, rtol=1e-4, atol=1e-6)
        assert one.var == pytest.approx(other.var, rel=1e-6)


def test_too_few_pictures(tmp_path):
    study = study_of(corrected, network, tmp_path, 3)
    for fit in (linear.fit_filter, linear.fit_mix):
        with pytest.raises(CalibrationError, match=r"(filter|mix): 3 pictures to fit on, .* every channel .* least 4"):
            fit(study)
    with pytest.raises(CalibrationError, match=r"map: .*16"):
        linear.fit_map(study)


def test_small_pictures_hold_few_positions(tmp_path):
    """37 numbers take 148 positions: 5 pictures of 6x6, though 4 would do for a number a channel."""
    with pytest.raises(CalibrationError, match=r"filter: 4 pictures of 6x6 .* 37 numbers .* at least 5\. Fit on more"):
        linear.fit_filter(study_of(corrected, network, tmp_path / "4", 4))
    linear.fit_filter(study_of(corrected, network, tmp_path / "5", 5))
    linear.fit_mix(study_of(corrected, network, tmp_path / "mix", 4))

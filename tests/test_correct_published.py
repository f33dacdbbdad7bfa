"""Every published correction on every sampler: a row for each call, and nothing done where there is no error."""

from __future__ import annotations

import numpy as np
import pytest
from studies import recorded, setting_of, with_prediction

from qncd_deploy.correct import d2dpm, dns, ptqd, qdrift, stepbaq, tac, tcec
from qncd_deploy.correct.record import StepFix, fixed_steps
from qncd_deploy.sample import denoise
from qncd_deploy.schedule import SCHEDULERS, Schedule

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
SHAPE = (2, 6, 6)
FITS = {
    "ptqd": ptqd.fit,
    "ptqd:paper": ptqd.fit_paper,
    "d2dpm": d2dpm.fit,
    "d2dpm:paper": d2dpm.fit_paper,
    "s-d2dpm": d2dpm.fit_stochastic,
    "s-d2dpm:paper": d2dpm.fit_stochastic_paper,
    "tac": tac.fit,
    "qdrift": qdrift.fit,
    "dns": dns.fit,
    "stepbaq": stepbaq.fit,
    "tcec": tcec.fit,
}
WAYS = [*((name, 0.0, "epsilon") for name in SCHEDULERS), ("ddim", 1.0, "epsilon")]
WAYS += [(name, 0.0, "v_prediction") for name in SCHEDULERS]


def exact(x, t):
    return (np.tanh(x) + np.float32(t / 2000)).astype(np.float32)


def off(x, t):
    noise = np.random.default_rng(int(t)).standard_normal(x.shape, dtype=np.float32)
    return np.float32(1.05) * exact(x, t) + np.float32(0.02) + np.float32(0.1) * noise


def sampled(setting, network, rows):
    steps = fixed_steps(setting.schedule, setting.config, rows)
    noise = setting.noise()
    first = setting.scale * noise.initial()
    prediction = setting.schedule.prediction
    *_, last = denoise(network, first, steps, noise=noise, fixes=rows, prediction=prediction)
    return last.x


@pytest.mark.parametrize(("name", "eta", "prediction"), WAYS)
def test_rows_run_on_every_sampler(tmp_path, name, eta, prediction):
    schedule = with_prediction(SCHEDULE, prediction)
    setting = setting_of(schedule, pictures=8, shape=SHAPE, name=name, eta=eta, n_steps=6)
    study = recorded(exact, off, setting, tmp_path)
    plain = sampled(setting, off, [StepFix()] * len(study.steps))
    for method, fit in {**FITS, "tac:paper": tac.fit_paper}.items():
        rows = fit(study)
        assert len(rows) == len(study.steps), method
        out = sampled(setting, off, rows)
        assert np.isfinite(out).all(), method
        skips = method == "qdrift" and any(step.std for step in study.steps)
        assert np.array_equal(out, plain) == skips, method


@pytest.mark.parametrize(("name", "eta", "prediction"), WAYS)
def test_a_perfect_network_is_left_alone(tmp_path, name, eta, prediction):
    """Bit for bit; the factor of TAC's public code, with its 1e-7, is 1 only about."""
    schedule = with_prediction(SCHEDULE, prediction)
    setting = setting_of(schedule, pictures=8, shape=SHAPE, name=name, eta=eta, n_steps=6)
    study = recorded(exact, exact, setting, tmp_path)
    plain = study.exact(len(study.steps))
    for method, fit in FITS.items():
        np.testing.assert_array_equal(sampled(setting, exact, fit(study)), plain, err_msg=method)

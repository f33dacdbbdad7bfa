"""The host loop on Gaussian data, where every published correction has a known effect.

x_0 ~ N(0.3, 0.5^2), the exact eps-predictor e, a "quantized" one q = 1.05 e + 0.02 + 0.15 n, 20 DDIM steps
(t = 951, ..., 1, last target abar = 1). Each correction is fitted on other pictures than those it is tried on; expected
are the spread of the samples relative to the float run's, and their rms distance from it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from studies import recorded, setting_of

from qncd_deploy.correct import d2dpm, dns, ptqd, qdrift, tac
from qncd_deploy.correct.record import StepFix, fixed_steps
from qncd_deploy.sample import PictureNoise, denoise
from qncd_deploy.schedule import Schedule
from qncd_deploy.steps import SamplerConfig, make_steps

SCHEDULE = replace(Schedule.scaled_linear(0.0015, 0.0195), final_abar=1.0)
MEAN, SPREAD = 0.3, 0.5
K, MU, NOISE = 0.05, 0.02, 0.15
PICTURES, SHAPE = 64, (1, 64, 64)
COUNT = PICTURES * math.prod(SHAPE)
FIT_SEED, EVAL_SEED = 1, 2


def exact(x, t):
    """E[eps | x] for Gaussian data."""
    abar = SCHEDULE.alphas_cumprod[int(t)]
    a, var = math.sqrt(abar), abar * SPREAD**2 + 1 - abar
    return ((x - a * MEAN) * (math.sqrt(1 - abar) / var)).astype(np.float32)


def quantized(seed, *, fixed):
    """q with fresh noise at every call, or with the same at all of them."""
    rng = np.random.default_rng(seed)
    kept = rng.standard_normal((PICTURES, *SHAPE), dtype=np.float32)

    def predict(x, t):
        n = kept if fixed else rng.standard_normal(x.shape, dtype=np.float32)
        return (1 + K) * exact(x, t) + np.float32(MU) + np.float32(NOISE) * n

    return predict


def run(predict, eta, seed, fixes=None):
    config = SamplerConfig("ddim", 20, eta)
    steps = make_steps(SCHEDULE, config) if fixes is None else fixed_steps(SCHEDULE, config, fixes)
    noise = PictureNoise(seed, range(PICTURES), SHAPE)
    return denoise(predict, noise.initial(), steps, noise=noise, fixes=fixes)


@pytest.fixture(scope="module")
def study_of(tmp_path_factory):
    @cache
    def study(eta, fixed):
        setting = setting_of(SCHEDULE, pictures=PICTURES, shape=SHAPE, eta=eta, seed=FIT_SEED)
        predict = quantized(FIT_SEED, fixed=fixed)
        return recorded(exact, predict, setting, tmp_path_factory.mktemp("study"))

    return study


def unbiased(study):
    return ptqd.fit(study, min_r2=0)  # k is 0.05 at every call, those included where e hardly varies


def without_variance(study):
    return [replace(row, var=0) for row in unbiased(study)]


def code_variance(study):
    return [replace(row, coef="s_eff") for row in unbiased(study)]


def q_drift(study):
    return qdrift.with_gain(unbiased(study), study.steps, prediction="epsilon")


def least_squares(study):
    return [replace(row, var=0) for row in d2dpm.fit(study)]


def ibc(study):
    return tac.fit_ibc(study, [StepFix()] * 20)


TABLE_COUNT = 20_000  # the size of sample whose scatter the table shows
# rows: eta, whether the noise is the same at all steps; columns: (spread ratio, rms distance)
TABLE = {
    (0.0, False): {
        "none": (0.781, 0.144),
        "unbiased": (1.024, 0.092),
        "paper variance": (1.024, 0.092),
        "code variance": (1.024, 0.092),
        "least squares": (1.175, 0.117),
        "q-drift": (1.007, 0.092),
        "dns": (0.987, 0.093),
        "ibc": (0.781, 0.136),
    },
    (1.0, False): {
        "none": (0.945, 0.078),
        "unbiased": (1.013, 0.064),
        "paper variance": (1.000, 0.067),
        "code variance": (1.048, 0.067),
        "least squares": (1.087, 0.070),
        "ibc": (0.945, 0.073),
    },
    (0.0, True): {
        "none": (1.117, 0.372),
        "unbiased": (1.330, 0.378),
        "paper variance": (1.330, 0.378),
        "code variance": (1.330, 0.378),
        "least squares": (1.471, 0.400),
        "q-drift": (1.316, 0.377),
        "dns": (1.295, 0.374),
        "ibc": (1.117, 0.369),
    },
}
FITS = {
    "none": lambda study: None,
    "unbiased": without_variance,
    "paper variance": unbiased,
    "code variance": code_variance,
    "least squares": least_squares,
    "q-drift": q_drift,
    "dns": dns.fit,
    "ibc": ibc,
}
CASES = [(eta, fixed, name, *values) for (eta, fixed), row in TABLE.items() for name, values in row.items()]


def closed_form(eta, fixed, fixes):
    """(spread ratio, rms distance, correlation) of (float sample, corrected sample), by propagating means and
    covariances of (x_float, x, n) through the published update: everything is affine in Gaussian variables."""
    config = SamplerConfig("ddim", 20, eta)
    mean, cov = np.zeros(3), np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for step, fix in zip(make_steps(SCHEDULE, config), fixes or [StepFix()] * 20, strict=True):
        a, target = math.sqrt(step.abar), step.abar_next
        slope = math.sqrt(1 - step.abar) / (step.abar * SPREAD**2 + 1 - step.abar)
        offset = -slope * a * MEAN
        aim = target if fix.abar_next is None else fix.abar_next

        def scalars(p, abar=step.abar, eta=eta):
            std = eta * math.sqrt((1 - p) / (1 - abar) * (1 - abar / p))
            return math.sqrt(p / abar), math.sqrt(max(0, 1 - p - std**2)) - math.sqrt(p * (1 - abar) / abar), std

        keep_f, gain_f, std_f = scalars(target)
        keep, gain, std = scalars(aim)
        std_eff = math.sqrt(max(0, std**2 - gain**2 * fix.var))
        if fix.coef == "s_eff" and fix.var:
            gain = math.sqrt(1 - aim - std_eff**2) - math.sqrt(aim * (1 - step.abar) / step.abar)
        stretch = math.sqrt(aim / step.abar)
        keep, gain, std_eff = fix.gain * keep + (1 - fix.gain) * stretch, fix.gain * gain, fix.gain * std_eff
        factor, shifted, added = (np.ravel(v).item() for v in (fix.a, fix.b, fix.x_add))
        by_x, by_n = gain * factor * (1 + K) * slope, gain * factor * NOISE
        shift = gain * (factor * ((1 + K) * offset + MU) + shifted) + (keep + by_x) * added
        m = fix.x_mul
        linear = np.array(
            [[keep_f + gain_f * slope, 0, 0], [0, m * (keep + by_x), m * by_n if fixed else 0], [0, 0, 1]]
        )
        mean = linear @ mean + [gain_f * offset, m * shift, 0]
        z = np.array([std_f, m * std_eff, 0])
        cov = linear @ cov @ linear.T + np.outer(z, z)
        if not fixed:
            cov[1, 1] += (m * by_n) ** 2
    spread = np.sqrt(np.diag(cov))
    off = mean[1] - mean[0]
    distance = math.sqrt(off**2 + cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    return spread[1] / spread[0], distance, cov[0, 1] / (spread[0] * spread[1])


@cache
def float_samples(eta):
    *_, last = run(exact, eta, EVAL_SEED)
    return last.x.astype(np.float64)


def standard_errors(ratio, distance, correlation, count):
    """Of the two estimates from `count` pairs of jointly Gaussian samples: var(ln ratio) = (1 - corr^2) / count,
    var(rms) = rms^2 / (2 count)."""
    return np.array([ratio * math.sqrt((1 - correlation**2) / count), distance / math.sqrt(2 * count)])


@pytest.mark.parametrize(("eta", "fixed", "name", "ratio", "distance"), CASES)
def test_toy_table(study_of, eta, fixed, name, ratio, distance):
    fixes = FITS[name](study_of(eta, fixed))
    *_, last = run(quantized(EVAL_SEED, fixed=fixed), eta, EVAL_SEED, fixes)
    reference, samples = float_samples(eta), last.x.astype(np.float64)
    found = np.array([samples.std() / reference.std(), math.sqrt(np.mean((samples - reference) ** 2))])
    *expected, correlation = closed_form(eta, fixed, fixes)
    # the loop against the closed form of the same rows
    assert np.all(np.abs(found - expected) < 4 * standard_errors(*expected, correlation, COUNT))
    # the fits against the table, which has three digits and comes from a sample of its own
    sampling = 4 * standard_errors(*expected, correlation, TABLE_COUNT)
    assert np.all(np.abs(np.array(expected) - [ratio, distance]) < sampling + 0.0005)

"""Acceptance of smoothing: a factor that helps is kept, one that hurts is not, and the error is the real one."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.quant.grid import fake_quantize
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.qncd import ResBlock

torch = pytest.importorskip("torch")

from qncd_deploy.quant.smooth import ALPHAS, METHODS, Decision, accept, candidates, choose, output_error  # noqa: E402 - needs torch

C = 16
RNG = np.random.default_rng(0)
LOUD = np.where(np.arange(C) % 8 == 0, 30.0, 1.0)  # two channels thirty times as loud as the others
WEIGHT = (RNG.normal(size=(C, C, 3, 3)) / LOUD.reshape(1, -1, 1, 1)).astype(np.float32)
ONES = np.ones(C, np.float32)
POLICY = Policy()


def samples(seed: int) -> np.ndarray:
    u = np.random.default_rng(seed).normal(size=(4, C, 8, 8)) * LOUD.reshape(1, -1, 1, 1)
    return u.astype(np.float32)


FIT, HELD_OUT = samples(1), samples(2)


def test_output_error_is_that_of_the_quantized_convolution() -> None:
    s = np.random.default_rng(3).lognormal(0, 1, C).astype(np.float32)
    x, w = HELD_OUT / s.reshape(1, -1, 1, 1), WEIGHT * s.reshape(1, -1, 1, 1)
    xq = fake_quantize(x, POLICY.act_grid(TensorStats.of(FIT / s.reshape(1, -1, 1, 1), "x")))
    wq = fake_quantize(w, POLICY.weight_grid(w, 0))
    exact, quantized = (
        torch.nn.functional.conv2d(torch.from_numpy(a).double(), torch.from_numpy(b).double(), padding=1)
        for a, b in ((HELD_OUT, WEIGHT), (xq, wq))
    )
    expected = float(((quantized - exact) ** 2).sum() / (exact**2).sum())
    found = output_error(s, WEIGHT, fit=FIT, judge=HELD_OUT, policy=POLICY)
    assert found == pytest.approx(expected, rel=1e-3)  # float32 convolutions, relative error 1e-6 against about 1e-2


def test_a_factor_that_evens_out_loud_channels_is_kept() -> None:
    decision = accept("even", LOUD.astype(np.float32), WEIGHT, fit=FIT, held_out=HELD_OUT, policy=POLICY)
    assert decision.kept
    assert decision.error_before == output_error(ONES, WEIGHT, fit=FIT, judge=HELD_OUT, policy=POLICY)
    assert decision.error_after < decision.error_before / 10  # noise of an outlier-sized step, gone


def test_a_factor_that_hurts_is_not_kept() -> None:
    decision = accept("worse", (LOUD**-1).astype(np.float32), WEIGHT, fit=FIT, held_out=HELD_OUT, policy=POLICY)
    assert not decision.kept and decision.error_after > decision.error_before


def test_no_smoothing_is_never_kept_as_an_improvement() -> None:
    assert not accept("none", ONES, WEIGHT, fit=FIT, held_out=HELD_OUT, policy=POLICY).kept


def test_a_gain_too_small_for_a_multiplication_is_not_kept() -> None:
    assert not Decision("s", ONES, error_before=1.0, error_after=0.985).kept
    assert Decision("s", ONES, error_before=1.0, error_after=0.975).kept


def test_the_best_candidate_is_chosen() -> None:
    factors = {f"alpha {a}": (LOUD**a).astype(np.float32) for a in (-0.5, 0.0, 0.25, 1.0)}
    decision = choose(factors, WEIGHT, fit=FIT, held_out=HELD_OUT, policy=POLICY)
    assert decision.label == "alpha 1.0" and decision.kept
    np.testing.assert_array_equal(decision.factors, factors["alpha 1.0"])


@pytest.mark.parametrize("policy", [Policy.for_format("w4a8"), Policy.for_format("w4a6", act_method="minmax")])
def test_other_formats_are_judged_by_their_own_grids(policy: Policy) -> None:
    eight = output_error(ONES, WEIGHT, fit=FIT, judge=HELD_OUT, policy=POLICY)
    assert output_error(ONES, WEIGHT, fit=FIT, judge=HELD_OUT, policy=policy) > eight


def test_silent_samples_and_weights_are_no_division_by_zero() -> None:
    silent = np.zeros((1, C, 4, 4), np.float32)
    decision = accept("even", LOUD.astype(np.float32), WEIGHT, fit=silent, held_out=silent, policy=POLICY)
    assert (decision.error_before, decision.error_after, decision.kept) == (0, 0, False)
    assert output_error(ONES, WEIGHT * 0, fit=FIT, judge=HELD_OUT, policy=POLICY) == 0


BLOCK = ResBlock("conv2.weight", "u", np.ones(C), np.zeros(C), 4, "additive", ("emb",))
EMBEDDING = {"emb": np.random.default_rng(4).normal(size=(5, C))}


@pytest.mark.parametrize("method", METHODS)
def test_candidates_of_every_method(method: str) -> None:
    amax = np.abs(FIT).max(axis=(0, 2, 3))
    found = candidates(method, BLOCK, WEIGHT, embedding=EMBEDDING, channel_amax=amax)
    assert len(found) == (1 if method == "qncd:paper" else len(ALPHAS))
    decision = choose(found, WEIGHT, fit=FIT, held_out=HELD_OUT, policy=POLICY)
    assert decision.kept == (method != "qncd:paper")  # its embedding knows nothing of the loud channels here
    assert decision.label.startswith(method)


def test_a_given_alpha_is_the_only_candidate() -> None:
    found = candidates("qncd", BLOCK, WEIGHT, embedding=EMBEDDING, channel_amax=LOUD, alpha=1.0)
    assert list(found) == ["qncd alpha 1"]
    np.testing.assert_array_equal(found["qncd alpha 1"], np.minimum(LOUD, 8).astype(np.float32))

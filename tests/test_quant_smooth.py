"""Acceptance of smoothing: a factor that helps is kept, one that hurts is not, and the error is the real one."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.quant.grid import fake_quantize
from qncd_deploy.quant.plan import LayerSite
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.qncd import ResBlock

torch = pytest.importorskip("torch")

from qncd_deploy.quant import smooth  # noqa: E402
from qncd_deploy.quant.smooth import (  # noqa: E402 - needs torch
    METHODS,
    QNCD_ALPHAS,
    SMOOTHQUANT_ALPHAS,
    Decision,
    Reader,
    block_candidates,
    choose,
    output_error,
    smoothquant_candidates,
)

C = 16
RNG = np.random.default_rng(0)
LOUD = np.where(np.arange(C) % 8 == 0, 30.0, 1.0)  # two channels thirty times as loud as the others
WEIGHT = (RNG.normal(size=(C, C, 3, 3)) / LOUD.reshape(1, -1, 1, 1)).astype(np.float32)
CONV = Reader(LayerSite("conv2.weight", "Conv", WEIGHT.shape, "u", "y", 0), WEIGHT)
EVEN = Reader(CONV.site, (WEIGHT * LOUD.reshape(1, -1, 1, 1)).astype(np.float32))
ONES = np.ones(C, np.float32)
POLICY = Policy()


def samples(seed: int) -> np.ndarray:
    u = np.random.default_rng(seed).normal(size=(4, C, 8, 8)) * LOUD.reshape(1, -1, 1, 1)
    return u.astype(np.float32)


FIT, HELD_OUT, TUNE = samples(1), samples(2), samples(3)


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
    found = output_error(s, [CONV], fit=FIT, judge=HELD_OUT, policy=POLICY)
    assert found == pytest.approx(expected, rel=1e-3)  # float32 convolutions, relative error 1e-6 against about 1e-2


def test_a_factor_that_evens_out_loud_channels_is_kept() -> None:
    decision = choose(
        {"even": LOUD.astype(np.float32)}, [CONV], fit=FIT, tune=HELD_OUT, held_out=HELD_OUT, policy=POLICY
    )
    assert decision.kept
    assert decision.error_before == output_error(ONES, [CONV], fit=FIT, judge=HELD_OUT, policy=POLICY)
    assert decision.error_after < decision.error_before / 10  # noise of an outlier-sized step, gone


def test_a_factor_that_hurts_is_not_kept() -> None:
    decision = choose(
        {"worse": (LOUD**-1).astype(np.float32)}, [CONV], fit=FIT, tune=HELD_OUT, held_out=HELD_OUT, policy=POLICY
    )
    assert not decision.kept and decision.error_after > decision.error_before


def test_no_smoothing_is_never_kept_as_an_improvement() -> None:
    assert not choose({"none": ONES}, [CONV], fit=FIT, tune=HELD_OUT, held_out=HELD_OUT, policy=POLICY).kept


def test_a_gain_too_small_for_a_multiplication_is_not_kept() -> None:
    assert not Decision(("conv2.weight",), "s", ONES, error_before=1.0, error_after=0.985).kept
    assert Decision(("conv2.weight",), "s", ONES, error_before=1.0, error_after=0.975).kept
    assert not Decision(("conv2.weight",), "s", ONES, error_before=1.0, error_after=0.92, min_gain=0.1).kept


def test_the_best_candidate_is_chosen() -> None:
    factors = {f"alpha {a}": (LOUD**a).astype(np.float32) for a in (-0.5, 0.0, 0.25, 1.0)}
    decision = choose(factors, [CONV], fit=FIT, tune=TUNE, held_out=HELD_OUT, policy=POLICY)
    assert decision.label == "alpha 1.0" and decision.kept
    np.testing.assert_array_equal(decision.factors, factors["alpha 1.0"])


def test_a_factor_is_not_chosen_by_the_samples_it_was_made_from() -> None:
    """A channel that was quiet by chance: raising it to the others' range looks best there, and clips elsewhere."""
    lucky = FIT / LOUD.reshape(1, -1, 1, 1).astype(np.float32)
    lucky[:, 3] *= 0.01
    seen = {"half": np.ones(C, np.float32), "whole": np.ones(C, np.float32)}
    seen["half"][3], seen["whole"][3] = 0.9, 0.01
    tune, held_out = (each / LOUD.reshape(1, -1, 1, 1).astype(np.float32) for each in (TUNE, HELD_OUT))
    on_fit = {label: output_error(s, [EVEN], fit=lucky, judge=lucky, policy=POLICY) for label, s in seen.items()}
    assert on_fit["whole"] < on_fit["half"]
    decision = choose(seen, [EVEN], fit=lucky, tune=tune, held_out=held_out, policy=POLICY)
    assert decision.label == "half"


@pytest.mark.parametrize("policy", [Policy.for_format("w4a8"), Policy.for_format("w4a6", act_method="minmax")])
def test_other_formats_are_judged_by_their_own_grids(policy: Policy) -> None:
    eight = output_error(ONES, [CONV], fit=FIT, judge=HELD_OUT, policy=POLICY)
    assert output_error(ONES, [CONV], fit=FIT, judge=HELD_OUT, policy=policy) > eight


def test_silent_samples_and_weights_are_no_division_by_zero() -> None:
    silent = np.zeros((1, C, 4, 4), np.float32)
    decision = choose(
        {"even": LOUD.astype(np.float32)}, [CONV], fit=silent, tune=silent, held_out=silent, policy=POLICY
    )
    assert (decision.error_before, decision.error_after, decision.kept) == (0, 0, False)
    assert output_error(ONES, [Reader(CONV.site, WEIGHT * 0)], fit=FIT, judge=HELD_OUT, policy=POLICY) == 0


BLOCK = ResBlock("conv2.weight", "u", np.ones(C), np.zeros(C), 4, "additive", ("emb",))
EMBEDDING = {"emb": np.random.default_rng(4).normal(size=(5, C))}


@pytest.mark.parametrize("method", METHODS)
def test_candidates_of_every_method(method: str) -> None:
    amax = np.abs(FIT).max(axis=(0, 2, 3))
    found = block_candidates(method, BLOCK, CONV, embedding=EMBEDDING, channel_amax=amax)
    assert len(found) == {"qncd:paper": 1, "qncd": 2 * len(QNCD_ALPHAS), "smoothquant": len(SMOOTHQUANT_ALPHAS)}[method]
    decision = choose(found, [CONV], fit=FIT, tune=TUNE, held_out=HELD_OUT, policy=POLICY)
    assert decision.kept == (method != "qncd:paper")  # its embedding knows nothing of the loud channels here
    assert decision.label.startswith(method)


def test_a_given_alpha_is_the_only_one() -> None:
    found = block_candidates("qncd", BLOCK, CONV, embedding=EMBEDDING, channel_amax=LOUD, alpha=1.0)
    assert list(found) == ["qncd alpha 1", "qncd embedding alpha 1"]
    np.testing.assert_array_equal(found["qncd alpha 1"], np.minimum(LOUD, 8).astype(np.float32))


def test_the_embedding_wins_where_few_pictures_have_not_shown_what_is_loud() -> None:
    """At a timestep that none of the rows is of, one channel is ten times as loud."""
    block = ResBlock("conv2.weight", "u", np.ones(C), np.zeros(C), 4, "scale-shift", ("emb",))
    emb = np.zeros((5, 2 * C))
    emb[0, 1] = 9.0  # of 1 + scale
    x = samples(1) / LOUD.reshape(1, -1, 1, 1).astype(np.float32)
    x[:, 1] *= 10
    found = block_candidates("qncd", block, EVEN, embedding={"emb": emb}, channel_amax=np.ones(C))
    for label, s in found.items():
        alpha = float(label.split()[-1])
        expected = np.where(np.arange(C) == 1, 10**alpha if "embedding" in label else 1, 1)
        np.testing.assert_allclose(s, expected, rtol=1e-6)
    decision = choose(found, [EVEN], fit=x, tune=x, held_out=x, policy=POLICY)
    assert decision.label.startswith("qncd embedding") and decision.kept


TOKENS = np.random.default_rng(6).normal(size=(3, 40, C)).astype(np.float32) * LOUD.astype(np.float32)


def linear(name: str, out: int, *, out_axis: int, seed: int) -> Reader:
    """A Linear that weighs the loud channels as little as the convolution does, stored (K, N) or (N, K)."""
    w = (np.random.default_rng(seed).normal(size=(out, C)) / LOUD).astype(np.float32)
    w = w if out_axis == 0 else np.ascontiguousarray(w.T)
    return Reader(LayerSite(name, "Gemm" if out_axis == 0 else "MatMul", w.shape, "norm", name, out_axis), w)


QUERY, KEY = linear("q", 8, out_axis=1, seed=7), linear("k", 24, out_axis=0, seed=8)


def test_the_error_of_an_edge_is_the_mean_over_its_linears() -> None:
    s = np.random.default_rng(9).lognormal(0, 1, C).astype(np.float32)
    x, judge = TOKENS[:1], TOKENS[1:2]
    grid = POLICY.act_grid(TensorStats.of(x / s, "x"))
    errors = []
    for reader, matrix in ((QUERY, QUERY.weight), (KEY, KEY.weight.T)):
        w = matrix * s[:, None]
        found = fake_quantize(judge / s, grid).astype(np.float64) @ fake_quantize(w, POLICY.weight_grid(w, 1))
        exact = judge.astype(np.float64) @ matrix
        errors.append(((found - exact) ** 2).sum() / (exact**2).sum())
        alone = output_error(s, [reader], fit=x, judge=judge, policy=POLICY)
        assert alone == pytest.approx(errors[-1], rel=1e-3)  # float32 products against float64
    both = output_error(s, [QUERY, KEY], fit=x, judge=judge, policy=POLICY)
    assert both == pytest.approx(np.mean(errors), rel=1e-3)


def test_linears_of_one_edge_share_one_choice() -> None:
    amax = np.abs(TOKENS).max(axis=(0, 1))
    found = smoothquant_candidates([QUERY, KEY], amax)
    assert list(found) == [f"smoothquant alpha {a:g}" for a in SMOOTHQUANT_ALPHAS]
    w_amax = np.maximum(np.abs(QUERY.weight).max(axis=1), np.abs(KEY.weight).max(axis=0))
    even = (amax / found["smoothquant alpha 0.5"]) / (w_amax * found["smoothquant alpha 0.5"])
    np.testing.assert_allclose(even, even[0], rtol=1e-5)  # balanced against the larger weight of the two
    decision = choose(found, [QUERY, KEY], fit=TOKENS[:1], tune=TOKENS[1:2], held_out=TOKENS[2:], policy=POLICY)
    assert decision.kept and decision.layers == ("q", "k")
    assert decision.error_after < decision.error_before / 10


def test_smoothing_of_even_linears_is_refused() -> None:
    """Nothing to move: all channels alike, so that any factor only spends levels."""
    even = Reader(QUERY.site, np.random.default_rng(10).choice([-1, 1], (C, 8)).astype(np.float32))
    tokens = np.random.default_rng(11).normal(size=(3, 400, C)).astype(np.float32)
    skewed = {"skewed": np.linspace(0.5, 2, C).astype(np.float32)}
    decision = choose(skewed, [even], fit=tokens[:1], tune=tokens[1:2], held_out=tokens[2:], policy=POLICY)
    assert not decision.kept and decision.error_after > decision.error_before


@pytest.mark.parametrize("out_axis", [0, 1])
def test_of_a_large_weight_some_channels_judge_for_all(monkeypatch: pytest.MonkeyPatch, out_axis: int) -> None:
    wide = linear("wide", 1024, out_axis=out_axis, seed=12)
    factors = smoothquant_candidates([wide], np.abs(TOKENS).max(axis=(0, 1)))
    given = {"fit": TOKENS[:1], "tune": TOKENS[1:2], "held_out": TOKENS[2:], "policy": POLICY}
    assert wide.judged() is wide
    whole = choose(factors, [wide], **given)
    monkeypatch.setattr(smooth, "JUDGED_NUMBERS", 256 * C)
    some = wide.judged()
    assert some.weight.shape[out_axis] == 256 and some.weight.shape[1 - out_axis] == C
    np.testing.assert_array_equal(some.weight.take([0, -1], out_axis), wide.weight.take([0, -1], out_axis))
    found = choose(factors, [wide], **given)
    assert found.label == whole.label and found.kept
    # both sums run over channels drawn alike: 256 of them, each a sum over 40 tokens, leave a few percent
    assert found.error_before == pytest.approx(whole.error_before, rel=0.1)
    assert found.error_after == pytest.approx(whole.error_after, rel=0.1)
    monkeypatch.setattr(smooth, "JUDGED_NUMBERS", 1)
    assert wide.judged().weight.shape[out_axis] == smooth.LEAST_CHANNELS

"""Smoothing factors against closed forms and torch, and exactness of the fold."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.errors import PlanError
from qncd_deploy.quant.fold import fold_smoothing
from qncd_deploy.quant.qncd import (
    KAPPA,
    MAX_FACTOR,
    ResBlock,
    analytic_range,
    group_normalize,
    paper_factors,
    repaired_factors,
)
from qncd_deploy.quant.smoothquant import smoothquant_factors

torch = pytest.importorskip("torch")

C, GROUPS, T = 24, 4, 7


def block(kind: str = "additive", **changes) -> ResBlock:
    rng = np.random.default_rng(0)
    gamma, beta = rng.normal(1, 0.3, C), rng.normal(0, 0.5, C)
    fields = {"gamma": gamma, "beta": beta, "groups": GROUPS, "emb": ("emb",)} | changes
    return ResBlock("res.conv2.weight", "u", kind=kind, **fields)


def embedding(width: int = C) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 2, (T, width))


def torch_norm(rows: np.ndarray, gamma: np.ndarray | None = None, beta: np.ndarray | None = None) -> np.ndarray:
    affine = [None if a is None else torch.from_numpy(a) for a in (gamma, beta)]
    return torch.nn.functional.group_norm(torch.from_numpy(rows)[:, :, None, None], GROUPS, *affine).numpy()[:, :, 0, 0]


def test_group_normalize_is_torch_group_norm_of_a_1x1_map() -> None:
    rows = embedding()
    np.testing.assert_allclose(group_normalize(rows, GROUPS), torch_norm(rows), rtol=1e-12, atol=1e-12)  # both float64


def test_paper_factors_of_an_additive_block() -> None:
    b, emb = block(), embedding()
    r = np.maximum(1, torch_norm(emb))
    expected = b.gamma * np.maximum(1, r.mean(axis=0))
    np.testing.assert_allclose(paper_factors(b, {"emb": emb}), expected, rtol=2.0**-23)  # one float32 rounding
    assert (r == 1).any() and (r > 1).any()  # negative entries became 1, and others did not


def test_paper_factors_of_a_scale_shift_block_normalise_twice() -> None:
    b, emb = block("scale-shift"), embedding(2 * C)
    scale = emb[:, :C]
    r = np.maximum(1, torch_norm(torch_norm(scale, b.gamma, b.beta)))
    np.testing.assert_allclose(paper_factors(b, {"emb": emb}), b.gamma * np.maximum(1, r.mean(axis=0)), rtol=2.0**-23)


def test_paper_factors_are_bounded_by_the_group_size() -> None:
    """GN0 of a one-hot vector is the largest there is: sqrt(C / groups - 1)."""
    emb = np.zeros((1, C))
    emb[0, 0] = 1e6
    s = paper_factors(block(gamma=np.ones(C)), {"emb": emb})
    assert s[0] == pytest.approx(np.sqrt(C / GROUPS - 1), rel=1e-6)
    np.testing.assert_array_equal(s[1:], 1)


def test_paper_factors_keep_signs_and_stay_away_from_zero() -> None:
    gamma = np.ones(C)
    gamma[:3] = 0.0, -2.0, -1e-9
    s = paper_factors(block(gamma=gamma), {"emb": np.zeros((T, C))})
    np.testing.assert_allclose(s[:4], [1e-3, -2, -1e-3, 1], rtol=1e-6)
    np.testing.assert_array_equal(paper_factors(block(gamma=np.zeros(C)), {"emb": embedding()}), 1)


def test_analytic_range_bounds_the_activation_of_scale_shift_blocks() -> None:
    """Before SiLU, and with a normalised input of at most KAPPA; SiLU(a) <= |a|."""
    b, emb = block("scale-shift"), embedding(2 * C)
    normalised = np.random.default_rng(2).uniform(-KAPPA, KAPPA, (500, T, C))
    scale, shift = emb[:, :C], emb[:, C:]
    a = (b.gamma * normalised + b.beta) * (1 + scale) + shift
    largest, bound = np.abs(a).max(axis=(0, 1)), analytic_range(b, {"emb": emb})
    assert (largest <= bound).all()
    assert (largest >= 0.9 * bound).all()  # 3500 uniform values come near their end


def test_analytic_range_of_additive_blocks() -> None:
    b, emb = block(), embedding()
    expected = np.abs(b.gamma) * np.maximum(1, np.abs(torch_norm(emb))).max(axis=0) + np.abs(b.beta)
    np.testing.assert_allclose(analytic_range(b, {"emb": emb}), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_repaired_factors_from_the_embedding(kind: str) -> None:
    b, values = block(kind), {"emb": embedding(2 * C if kind == "scale-shift" else C)}
    spread = analytic_range(b, values)
    np.testing.assert_allclose(
        repaired_factors(b, spread, alpha=0.5), np.sqrt(spread / np.median(spread)), rtol=2.0**-23
    )
    np.testing.assert_array_equal(repaired_factors(b, spread, alpha=0), 1)


def test_repaired_factors_are_bounded() -> None:
    amax = np.full(C, 2.0)
    amax[:3] = 8.0, 1e9, 0.0
    s = repaired_factors(block(), amax, alpha=0.5)
    np.testing.assert_array_equal(s[:4], np.float32([2, MAX_FACTOR, 1 / MAX_FACTOR, 1]))
    np.testing.assert_array_equal(repaired_factors(block(), np.zeros(C), alpha=0.5), 1)


def test_halves_of_the_embedding() -> None:
    emb = embedding(2 * C)
    scale, shift = emb[:, :C], emb[:, C:]
    for found in (
        block("scale-shift").embedding({"emb": emb}),
        block("scale-shift").embedding({"emb": emb[:, :, None, None]}),
        block("scale-shift", scale_first=False).embedding({"emb": np.hstack([shift, scale])}),
        block("scale-shift", emb=("s", "h")).embedding({"s": scale, "h": shift}),
    ):
        np.testing.assert_array_equal(found[0], scale)
        np.testing.assert_array_equal(found[1], shift)
    assert block().embedding({"emb": scale})[0] is None


def test_an_embedding_of_another_network_is_refused() -> None:
    with pytest.raises(PlanError, match=r"res\.conv2\.weight: embedding 'emb' is \(7, 5\), expected \(T, 24\)"):
        paper_factors(block(), {"emb": embedding(5)})


def test_smoothquant_balances_activation_and_weight() -> None:
    rng = np.random.default_rng(3)
    weight, amax = rng.normal(size=(8, C, 3, 3)).astype(np.float32), rng.lognormal(0, 1.5, C)
    w_amax = np.abs(weight).max(axis=(0, 2, 3))
    s = smoothquant_factors(w_amax, amax, alpha=0.5)
    ratio = (amax / s) / (w_amax * s)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)  # alpha 0.5: equal difficulty, up to the common factor
    assert np.prod(s.astype(np.float64)) == pytest.approx(1, rel=1e-5)


def test_smoothquant_leaves_dead_channels_alone() -> None:
    w_amax, amax = np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0, 0.0, 4.0, 9.0])
    s = smoothquant_factors(w_amax, amax, alpha=0.5)
    np.testing.assert_allclose(s, [1 / np.sqrt(2), 1, np.sqrt(2), 1], rtol=1e-6)
    np.testing.assert_array_equal(smoothquant_factors(w_amax * 0, amax, alpha=0.5), 1)


def test_smoothquant_is_equation_4() -> None:
    """max|x|**a / max|w|**(1 - a) by hand at a = 0.75: 16**.75 / 16**.25 = 4 and 1 / 1; their geometric mean is 2."""
    s = smoothquant_factors(np.array([16.0, 1.0]), np.array([16.0, 1.0]), alpha=0.75)
    np.testing.assert_allclose(s, [2, 0.5], rtol=1e-6)


def test_folding_keeps_the_convolution() -> None:
    """Signs included, and zero padding with them: in float64 to rounding."""
    rng = np.random.default_rng(4)
    h, w = rng.normal(size=(2, C, 6, 6)), rng.normal(size=(8, C, 3, 3)).astype(np.float32)
    s = (rng.choice([-1, 1], C) * rng.lognormal(0, 1, C)).astype(np.float32)
    s = 2.0 ** np.round(np.log2(np.abs(s))) * np.sign(s)  # powers of two: the float32 product is exact
    before = w.copy()
    folded = fold_smoothing(w, s.astype(np.float32))
    conv = [
        torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(k).double(), padding=1).numpy()
        for x, k in ((h, w), (h / s.reshape(1, -1, 1, 1), folded))
    ]
    # 216 float64 products of order 1 per output
    np.testing.assert_allclose(conv[1], conv[0], rtol=0, atol=216 * 2.0**-52 * np.abs(conv[0]).max())
    np.testing.assert_array_equal(w, before)


def test_folding_keeps_a_linear_of_either_layout() -> None:
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(7, 12)), rng.normal(size=(5, 12)).astype(np.float32)
    s = (2.0 ** rng.integers(-3, 4, 12)).astype(np.float32)  # powers of two: every product is exact
    np.testing.assert_array_equal((x / s) @ fold_smoothing(w, s).T.astype(np.float64), x @ w.T)
    np.testing.assert_array_equal(fold_smoothing(np.ascontiguousarray(w.T), s, axis=0), fold_smoothing(w, s).T)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_folding_a_factor_that_cannot_be_undone_is_our_bug(bad: float) -> None:
    with pytest.raises(AssertionError, match="one factor per input channel"):
        fold_smoothing(np.ones((1, 2, 1, 1), np.float32), np.array([1, bad], np.float32))

"""What splitting a convolution gains is the error of the real arithmetic, and patterns know both halves."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.quant.decide import check_patterns, decide
from qncd_deploy.quant.grid import fake_quantize
from qncd_deploy.quant.plan import LayerSite
from qncd_deploy.quant.policy import Policy

torch = pytest.importorskip("torch")

from qncd_deploy.quant.split import MIN_GAIN, SplitError, split_error  # noqa: E402 - needs torch

H, S = 6, 10
WEIGHT = (np.random.default_rng(0).normal(size=(5, H + S, 3, 3)) / 12).astype(np.float32)


def samples(loudness: float, seed: int) -> np.ndarray:
    """Two halves of normal noise, the second `loudness` times as loud."""
    x = np.random.default_rng(seed).normal(size=(4, H + S, 8, 8))
    x[:, H:] *= loudness
    return x.astype(np.float32)


@pytest.mark.parametrize("policy", [Policy(), Policy.for_format("w4a6", act_method="minmax")])
def test_the_errors_are_those_of_quantized_convolutions(policy: Policy) -> None:
    fit, held_out = samples(20, 1), samples(20, 2)

    def output(x: np.ndarray, w: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.conv2d(torch.from_numpy(x).double(), torch.from_numpy(w).double(), padding=1)

    def quantized(part: slice) -> torch.Tensor:
        act_grid = policy.act_grid(TensorStats.of(fit[:, part], "x"))
        weight_grid = policy.weight_grid(WEIGHT[:, part], 0)
        return output(fake_quantize(held_out[:, part], act_grid), fake_quantize(WEIGHT[:, part], weight_grid))

    exact = output(held_out, WEIGHT)
    forms = quantized(slice(None)), quantized(slice(0, H)) + quantized(slice(H, H + S))
    expected = [float(((form - exact) ** 2).sum() / (exact**2).sum()) for form in forms]
    found = split_error(WEIGHT, H, fit=fit, held_out=held_out, policy=policy)
    assert (found.whole, found.halves) == pytest.approx(expected, rel=1e-3)  # float32 convolutions


def test_a_half_that_drowns_in_the_others_step_pays() -> None:
    """The error of the loud half stays; that of the quiet one, weighed as heavily by its weights, goes."""
    weight = WEIGHT.copy()
    weight[:, :H] *= 20  # both halves are half of the output
    found = split_error(weight, H, fit=samples(20, 1), held_out=samples(20, 2), policy=Policy())
    assert found.pays and found.halves < found.whole / 10


def test_halves_of_one_kind_do_not_pay() -> None:
    assert not split_error(WEIGHT, H, fit=samples(1, 1), held_out=samples(1, 2), policy=Policy()).pays


def test_a_gain_too_small_for_a_kernel_does_not_pay() -> None:
    assert not SplitError(1.0, 1.001 - MIN_GAIN).pays
    assert SplitError(1.0, 0.999 - MIN_GAIN).pays


def test_a_pattern_of_the_whole_weight_holds_for_its_halves() -> None:
    sites = [
        LayerSite(name, "Conv", (8, 16, 1, 1), "x", "y", 0)
        for name in ("up.shortcut.weight.h", "up.shortcut.weight.s", "up.conv.weight")
    ]
    policy = Policy(include=(r"shortcut\.weight$",), exclude=(r"^up\.conv\.weight$",))
    check_patterns(sites, policy)
    assert [decide(site, policy) for site in sites] == [
        (True, r"--include 'shortcut\\.weight$'"),
        (True, r"--include 'shortcut\\.weight$'"),
        (False, r"--exclude '^up\\.conv\\.weight$'"),
    ]
    assert [decide(site, Policy(exclude=(r"\.h$",)))[0] for site in sites] == [False, True, True]

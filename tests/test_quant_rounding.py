"""Learned rounding starts where it should, ends on the grid, and its gradients are those of the papers."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="learning needs torch")

from qncd_deploy.quant.grid import Grid, quantize  # noqa: E402
from qncd_deploy.quant.rounding import KINDS, AdaRound, LearnedStep, OffsetRounding, round_ste  # noqa: E402

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((6, 5, 3, 3)).astype(np.float32)
GRIDS = {
    "symmetric": Grid(np.full(6, 0.2, np.float32), -8, 7, 0),
    "per channel": Grid(np.linspace(0.1, 0.6, 6, dtype=np.float32), -8, 7, 0),
    "asymmetric": Grid(np.full(6, 0.25, np.float32), np.arange(-10, -4), np.arange(5, 11), 0),
    "input axis": Grid(np.linspace(0.2, 0.4, 5, dtype=np.float32), -8, 7, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_before_learning_every_weight_is_at_its_nearest_level(kind: str, grid: Grid) -> None:
    found = KINDS[kind](WEIGHT, grid).integers().numpy()
    np.testing.assert_array_equal(found, quantize(WEIGHT, grid))


def test_soft_rounding_starts_at_the_float_weight_and_can_only_reach_its_two_neighbours() -> None:
    grid = Grid(np.full(6, 0.5, np.float32), -8, 7, 0)  # wide enough: nothing is clipped
    rounding = AdaRound(WEIGHT, grid)
    # The start leaves 1e-4 of a step to either side, so that the sigmoid is finite.
    np.testing.assert_allclose(rounding().detach(), WEIGHT, atol=1.01e-4 * 0.5)
    for v, neighbour in ((40.0, np.floor(WEIGHT / 0.5) + 1), (-40.0, np.floor(WEIGHT / 0.5))):
        torch.nn.init.constant_(rounding.v, v)
        np.testing.assert_array_equal(rounding.integers(), neighbour)
        np.testing.assert_array_equal(rounding().detach(), neighbour.astype(np.float32) * np.float32(0.5))


def test_the_penalty_is_the_papers_and_vanishes_only_where_rounding_is_hard() -> None:
    rounding = AdaRound(WEIGHT, GRIDS["symmetric"])
    v = torch.linspace(-6, 6, WEIGHT.size).reshape(WEIGHT.shape)
    with torch.no_grad():
        rounding.v.copy_(v)
    for beta in (20.0, 2.0):
        h = np.clip(1.2 / (1 + np.exp(-v.numpy().astype(np.float64))) - 0.1, 0, 1)
        expected = np.sum(1 - np.abs(2 * h - 1) ** beta)
        assert rounding.penalty(beta).item() == pytest.approx(expected, rel=1e-5)  # float32 sums of 270 terms
    torch.nn.init.constant_(rounding.v, 40.0)
    assert rounding.penalty(2.0).item() == 0
    assert OffsetRounding(WEIGHT, GRIDS["symmetric"]).penalty(2.0).item() == 0


def test_an_offset_moves_a_weight_by_one_level_at_most_and_stays_in_bounds() -> None:
    grid = Grid(np.full(6, 0.5, np.float32), -8, 7, 0)
    rounding = OffsetRounding(WEIGHT, grid)
    torch.nn.init.constant_(rounding.v, 3.0)
    rounding.project()
    assert rounding.v.max() == 0.5
    moved = rounding.integers().numpy() - quantize(WEIGHT, grid)
    assert set(np.unique(moved)) == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_levels_agree(kind: str) -> None:
    """What is trained with and what is stored are the same numbers once rounding is hard."""
    rounding = KINDS[kind](WEIGHT, GRIDS["asymmetric"])
    with torch.no_grad():
        rounding.v.copy_(torch.sign(rounding.v + 0.1) * 40)
    rounding.project()
    torch.testing.assert_close(rounding().detach(), rounding.integers() * rounding.scale, rtol=0, atol=0)


def test_the_straight_through_gradient_is_that_of_the_identity() -> None:
    x = torch.tensor([-1.5, -0.2, 0.5, 2.4], requires_grad=True)
    y = round_ste(x)
    assert y.tolist() == [-2, 0, 0, 2]  # ties to even
    (y * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [1, 2, 3, 4]


def test_the_gradient_of_a_step_is_that_of_lsq() -> None:
    """Esser et al., equation 3: round(x / s) - x / s inside, qmin or qmax outside; of x: 1 inside, 0 outside."""
    grid = Grid(np.float32(0.5), -3, 4)
    step = LearnedStep(grid)
    x = torch.tensor([-9.0, -1.1, -0.2, 0.3, 1.3, 7.0], requires_grad=True)
    y = step(x)
    np.testing.assert_array_equal(y.detach(), [-1.5, -1.0, 0.0, 0.5, 1.5, 2.0])
    inside = x.detach().numpy() / 0.5
    expected = [-3, *(np.rint(inside[1:5]) - inside[1:5]), 4]
    (by_value,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert by_value.tolist() == [0, 1, 1, 1, 1, 0]
    for place, value in enumerate(expected):
        (found,) = torch.autograd.grad(y[place], step.step, retain_graph=True)
        assert found.item() == pytest.approx(value, abs=1e-5)


def test_a_step_smaller_than_the_learning_rate_stays_a_step() -> None:
    """One update of Adam moves by its rate, here twice the step, whatever the gradient."""
    step = LearnedStep(Grid(np.float32(2e-4), -8, 7, None))
    optimizer = torch.optim.Adam([step.step], lr=4e-4)
    x = torch.full((4,), 1e-6)
    for _ in range(5):
        optimizer.zero_grad()
        (step(x + 2e-3) - x).square().sum().backward()  # wants a smaller range
        optimizer.step()
        step.project()
        assert step.step.item() >= 0.1 * 2e-4 * (1 - 1e-6)
        assert torch.isfinite(step(x)).all()

"""The bits that the solver hands out against every possible choice, and what it says of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")

from qncd_deploy.errors import PlanError
from qncd_deploy.quant.budget import EdgeCost
from qncd_deploy.quant.mixed import FLOAT_BITS, GAP, WIDTHS, Assignment, BitBudget, assign
from qncd_deploy.quant.plan import LayerSite

Noise = dict[str, dict[int, float]]


def network(rng: np.random.Generator, count: int, readers: int = 2) -> tuple[list[LayerSite], list[EdgeCost], Noise]:
    """`count` convolutions, the first `readers` of which read one tensor."""
    edges = ["shared"] * readers + [f"x{i}" for i in range(count - readers)]
    shapes = [(int(8 * rng.integers(1, 20)), int(8 * rng.integers(1, 20)), 3, 3) for _ in range(count)]
    sites = [LayerSite(f"w{i}", "Conv", shapes[i], edges[i], f"y{i}", 0) for i in range(count)]
    costs = [
        EdgeCost(
            edge,
            tuple(site.name for site in sites if site.input == edge),
            float(rng.lognormal(-9, 2)),
            int(rng.integers(1, 1000)),
        )
        for edge in dict.fromkeys(edges)
    ]
    four = rng.lognormal(-7, 2, count)
    return sites, costs, {site.name: {4: float(n), 8: float(n) / 256} for site, n in zip(sites, four, strict=True)}


def size(site: LayerSite, width: int | None, budget: BitBudget) -> float:
    """In bits, written down from the words of the help."""
    weights, scales = math.prod(site.shape), site.shape[0]
    if budget.bytes is None:
        return weights * (width or 16)
    return 16 * weights if width is None else weights * width + 32 * scales


def best_by_trying(
    sites: list[LayerSite], edges: list[EdgeCost], noise: Noise, budget: BitBudget, share: float, pinned: set[str]
) -> float:
    limit = 8 * budget.bytes if budget.bytes else budget.average * sum(math.prod(site.shape) for site in sites)
    least = math.inf
    for widths in itertools.product((*WIDTHS, None), repeat=len(sites)):
        given = {site.name: width for site, width in zip(sites, widths, strict=True)}
        floats = [edge for edge in edges if given[edge.layers[0]] is None]
        together = all(len({given[name] is None for name in edge.layers}) == 1 for edge in edges)
        allowed = not any(given[name] is None for name in pinned)
        spent = sum(edge.macs for edge in floats) / sum(edge.macs for edge in edges)
        if not together or not allowed or spent > share:
            continue
        if sum(size(site, given[site.name], budget) for site in sites) > limit:
            continue
        rounded = sum(edge.noise for edge in edges if edge not in floats)
        least = min(least, rounded + sum(noise[n][w] for n, w in given.items() if w is not None))
    return least


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    spend=st.floats(0, 1),
    share=st.sampled_from([0.0, 0.2, 0.5]),
    by_size=st.booleans(),
    pin=st.booleans(),
)
def test_no_choice_that_fits_is_better(seed: int, spend: float, share: float, by_size: bool, pin: bool) -> None:
    sites, edges, noise = network(np.random.default_rng(seed), 6)
    pinned = {sites[0].name} if pin else set()
    if by_size:
        ends = [sum(size(s, width, BitBudget(bytes=1)) for s in sites) for width in (4, None)]
        budget = BitBudget(bytes=math.ceil((ends[0] + spend * (ends[1] - ends[0])) / 8))
    else:
        budget = BitBudget(average=4 + 8 * spend)
    found = assign(sites, edges, noise, budget, float_share=share, pinned=pinned)
    best = best_by_trying(sites, edges, noise, budget, share, pinned)
    assert best * (1 - 1e-9) <= found.noise <= best * (1 + GAP) + 1e-9
    assert found.gap <= GAP
    given = {name: choice.weight_bits for name, choice in found.choices.items()}
    held = sum(math.prod(site.shape) * (given[site.name] or FLOAT_BITS) for site in sites)
    assert found.average == pytest.approx(held / sum(math.prod(site.shape) for site in sites))
    assert found.bytes == math.ceil(sum(size(s, given[s.name], BitBudget(bytes=1)) for s in sites) / 8)


def solved(average: float, share: float = 0.0, count: int = 20) -> Assignment:
    return assign(*network(np.random.default_rng(1), count), BitBudget(average=average), float_share=share)


def test_the_ends_of_the_range_are_reached_exactly() -> None:
    assert solved(4).counts() == {"W4": 20}
    assert solved(8).counts() == {"W8": 20}
    assert solved(4).noise == pytest.approx(solved(4).uniform[4])
    assert solved(8).noise == pytest.approx(solved(8).uniform[8])
    assert solved(16, share=1.0).counts() == {"float": 20}
    assert solved(16, share=1.0).noise == 0
    assert solved(16).counts() == {"W8": 20}  # float costs arithmetic, and none was given


def test_a_network_of_hundreds_of_layers(capfd: pytest.CaptureFixture[str]) -> None:
    sites, edges, noise = network(np.random.default_rng(2), 600, readers=3)
    found = assign(sites, edges, noise, BitBudget(average=5), float_share=0)
    assert found.gap <= GAP and 4.999 < found.average <= 5
    assert capfd.readouterr() == ("", "")  # standard output is the command's, libraries' C code included
    noisiest = max(noise, key=lambda name: noise[name][4] / math.prod(next(s.shape for s in sites if s.name == name)))
    assert found.choices[noisiest].weight_bits != 4


def test_a_search_that_is_cut_short_says_how_far_it_may_be_from_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    sites, edges, noise = network(np.random.default_rng(4), 7)
    budget = BitBudget(average=5.3)
    best = best_by_trying(sites, edges, noise, budget, 0.3, set())
    monkeypatch.setattr("qncd_deploy.quant.program.NODES", 0)
    found = assign(sites, edges, noise, budget, float_share=0.3)
    assert found.gap > GAP
    assert found.noise * (1 - found.gap) <= best * (1 + 1e-9) and best <= found.noise * (1 + 1e-9)


def test_every_choice_says_why() -> None:
    sites = [LayerSite(f"w{i}", "Conv", (8, 8, 1, 1), f"x{i}", f"y{i}", 0) for i in range(3)]
    edges = [EdgeCost("x0", ("w0",), 0.5, 10), EdgeCost("x1", ("w1",), 0.0, 490), EdgeCost("x2", ("w2",), 0.0, 500)]
    noise = {"w0": {4: 0.1, 8: 0.0}, "w1": {4: 0.36, 8: 0.0}, "w2": {4: 0.04, 8: 0.0}}
    found = assign(sites, edges, noise, BitBudget(average=(16 + 8 + 4) / 3), float_share=0.01)
    assert {name: choice.weight_bits for name, choice in found.choices.items()} == {"w0": None, "w1": 8, "w2": 4}
    assert [choice.reason for choice in found.choices.values()] == [
        "its input and 4-bit weights would make 60.00% of the output error, for 1.0% of the arithmetic",
        "4 bits would make 36.00% of the output error",
        "4 bits make 4.00% of the output error",
    ]
    assert found.counts() == {"W4": 1, "W8": 1, "float": 1}


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    sites = [LayerSite(f"w{i}", "MatMul", (10, 20), "x", f"y{i}", 1) for i in range(3)]
    needed = 3 * (200 // 2 + 20 * 4)  # half a byte a weight, four bytes a scale
    BitBudget(bytes=needed).require_reachable(sites)
    with pytest.raises(
        PlanError, match=rf"^--max-size {needed - 1}: the 3 layers .* take {needed} .* 4 bits .* at least"
    ):
        BitBudget(bytes=needed - 1).require_reachable(sites)


def test_silent_layers_are_no_reason_to_fail() -> None:
    sites, edges, noise = network(np.random.default_rng(3), 4)
    quiet = [EdgeCost(edge.edge, edge.layers, 0.0, edge.macs) for edge in edges]
    found = assign(sites, quiet, {n: {4: 0.0, 8: 0.0} for n in noise}, BitBudget(average=5), float_share=0)
    assert found.noise == 0 and found.average <= 5


@pytest.mark.parametrize("by_size", [False, True])
def test_layers_that_stay_float_whatever_is_chosen_count_with_sixteen_bits(by_size: bool) -> None:
    sites, edges, noise = network(np.random.default_rng(4), 12, readers=1)
    chosen, floats = sites[:9], sites[9:]
    weights = sum(math.prod(site.shape) for site in sites)
    packed = BitBudget(bytes=1)
    least = sum(size(s, 4, packed) for s in chosen) + sum(size(s, None, packed) for s in floats)
    budget = BitBudget(bytes=math.ceil(1.2 * least / 8)) if by_size else BitBudget(average=9.5)
    found = assign(chosen, edges[:9], noise, budget, float_share=0, floats=floats)
    assert found.choices.keys() == {site.name for site in chosen}
    given = {site.name: found.choices[site.name].weight_bits for site in chosen} | dict.fromkeys(s.name for s in floats)
    held = sum(math.prod(site.shape) * (given[site.name] or 16) for site in sites)
    assert found.average == pytest.approx(held / weights)
    assert found.bytes == math.ceil(sum(size(site, given[site.name], packed) for site in sites) / 8)
    assert found.bytes <= budget.bytes if by_size else found.average <= budget.average
    assert found.counts()["W8"] > 0  # what is left is spent
    too_little = BitBudget(bytes=least // 8 - 1) if by_size else BitBudget(average=4.5)
    with pytest.raises(PlanError, match=r"9 layers to quantize take .*, beside 3 that stay float"):
        assign(chosen, edges[:9], noise, too_little, float_share=0, floats=floats)

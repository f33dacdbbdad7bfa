"""Choose the weight bits of every layer: the least predicted noise on the output within a budget of bits or bytes.

    minimise    sum_e a_e z_e' + sum_l sum_b n_lb y_lb          z_e' = 1 - z_e
    subject to  sum_b y_lb + z_e(l) = 1 for every layer l,      y, z in {0, 1}
                sum of the sizes chosen <= the budget,          sum_e m_e z_e <= the arithmetic that may stay float

y_lb: layer l has weights of b bits; z_e: tensor e is not quantized, and all layers that read it stay float. a_e is the
noise of rounding that tensor (budget.py), m_e the multiplications behind it, n_lb the noise of rounding one weight W,

    n_lb = E (g_y . op_l(x, Q_b(W) - W))^2 / power of the output,      g_y = J_y^T v,  v ~ N(0, I),

y being the layer's output: to first order the noise that this weight alone puts on the network's output. One backward
pass measures all layers; errors of different layers are taken as independent. (Ours.) Activations keep the bits of the
format: a budget of weight bits sets them no price. Scored is rounding to nearest; what reconstruction will gain in each
layer is not known here.

Others: MixDQ (Zhao et al., arXiv:2405.17873) quantizes one layer at a time, judges content and quality apart, and
solves an integer program for weights and one for activations. Model Optimizer's auto_quantize sums squared gradients of
a loss times squared errors over a layer's elements, which forgets how these errors go together, and solves for an
effective number of bits. HAWQ-V3 (Yao et al., arXiv:2011.10680) takes traces of the loss's Hessian times |dW|^2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qncd_deploy.errors import PlanError
from qncd_deploy.quant.budget import EdgeCost
from qncd_deploy.quant.plan import Choice, LayerSite
from qncd_deploy.quant.program import WHOLE, Program, solve

WIDTHS = (4, 8)
"""Bits that a weight may get, beside float."""

FLOAT_BITS = 16
"""What a float weight counts: engines hold it in half precision."""

SCALE_BITS = 32
"""One scale per output channel, whatever the bits of the weights."""

GAP = 1e-4
"""How much less noise than the solution the best one may have, relative: the search ends there, or where it takes too
long, with the gap that it is left with.
"""


@dataclass(frozen=True)
class BitBudget:
    """One of two limits. average: bits per weight;  bytes: of weights packed to their bits, with their scales.

    Counted are the layers that the policy quantizes, those of them that stay float in the end with 16 bits a weight.
    """

    average: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        assert (self.average is None) != (self.bytes is None), "one limit, not two and not none"

    def __str__(self) -> str:
        return f"--avg-bits {self.average:g}" if self.bytes is None else f"--max-size {self.bytes}"

    def limit(self, sites: Sequence[LayerSite], floats: Sequence[LayerSite] = ()) -> float:
        """Bits for all of `sites` together; floats: layers that count as well and stay float whatever is chosen."""
        whole = self.average * sum(map(_weights, [*sites, *floats])) if self.bytes is None else 8 * self.bytes
        return whole - sum(self.bits(site, FLOAT_BITS) for site in floats)

    def bits(self, site: LayerSite, width: int) -> int:
        """Bits that a layer takes of the limit at this width; scales count in a size, not in an average."""
        return width * _weights(site) if self.bytes is None else _packed_bits(site, width)

    def require_reachable(self, sites: Sequence[LayerSite], floats: Sequence[LayerSite] = ()) -> None:
        """Raises PlanError where even the fewest bits in every layer are too many; floats: see limit."""
        least = sum(self.bits(site, WIDTHS[0]) for site in sites)
        if least > self.limit(sites, floats):
            least += sum(self.bits(site, FLOAT_BITS) for site in floats)
            weights = sum(map(_weights, [*sites, *floats]))
            needed = f"{least / weights:g}" if self.bytes is None else f"{math.ceil(least / 8)}"
            beside = f", beside {len(floats)} that stay float" if floats else ""
            raise PlanError(
                f"{self}: the {len(sites)} layers to quantize take {needed} with {WIDTHS[0]} bits a weight, the "
                f"fewest there are{beside}. Give at least that."
            )


@dataclass(frozen=True)
class Assignment:
    """What every layer gets and what that costs.

    choices: by layer; average: bits per weight; bytes: packed to their bits, with scales; noise: predicted, relative to
    the power of the output; uniform: the same of all layers at one width; gap: how much less, relative to the noise,
    the least possible one might be.
    """

    choices: Mapping[str, Choice]
    average: float
    bytes: int
    noise: float
    uniform: Mapping[int, float]
    gap: float

    def counts(self) -> dict[str, int]:
        """Layers by what they get: {"W4": 50, "W8": 12, "float": 1}."""
        bits = (choice.weight_bits for choice in self.choices.values())
        return dict(sorted(Counter("float" if b is None else f"W{b}" for b in bits).items()))

    def to_json(self) -> dict[str, Any]:
        return {
            "average": self.average,
            "packed_bytes": self.bytes,
            "layers": self.counts(),
            "predicted_noise": self.noise,
            "predicted_noise_uniform": {f"W{width}": noise for width, noise in self.uniform.items()},
            "optimality_gap": self.gap,
        }


def assign(
    sites: Sequence[LayerSite],
    edges: Sequence[EdgeCost],
    noise: Mapping[str, Mapping[int, float]],
    budget: BitBudget,
    *,
    float_share: float,
    pinned: Collection[str] = (),
    floats: Sequence[LayerSite] = (),
) -> Assignment:
    """Solve the program above.

    sites: the layers to choose for; edges: the tensors they read, every layer in one of them; noise: n_lb by layer and
    width, of all WIDTHS; float_share: of the multiplications, may stay float; pinned: layers that may not; floats:
    layers that count in the budget and stay float whatever is chosen.

    Raises: PlanError where the budget cannot be met.
    """
    budget.require_reachable(sites, floats)
    weight_noise = np.array([[noise[site.name][width] for width in WIDTHS] for site in sites])
    edge_noise = np.array([edge.noise for edge in edges])
    uniform = edge_noise.sum() + weight_noise.sum(axis=0)
    widths, gap = _solve(
        sites, edges, weight_noise, budget, budget.limit(sites, floats), float_share, frozenset(pinned)
    )
    given = {site.name: width for site, width in zip(sites, widths, strict=True)}
    held = [(site, given.get(site.name) or FLOAT_BITS) for site in (*sites, *floats)]
    return Assignment(
        choices=_explained(edges, noise, given, float(uniform[0])),
        average=sum(bits * _weights(site) for site, bits in held) / sum(_weights(site) for site, _ in held),
        bytes=math.ceil(sum(_packed_bits(site, bits) for site, bits in held) / 8),
        noise=sum(edge.noise for edge in edges if given[edge.layers[0]])
        + sum(noise[name][width] for name, width in given.items() if width),
        uniform=dict(zip(WIDTHS, map(float, uniform), strict=True)),
        gap=gap,
    )


def _solve(
    sites: Sequence[LayerSite],
    edges: Sequence[EdgeCost],
    weight_noise: np.ndarray,
    budget: BitBudget,
    limit: float,
    float_share: float,
    pinned: frozenset[str],
) -> tuple[list[int | None], float]:
    """The width of every layer, None for float, and the gap. limit: bits for all of them.

    Unknowns: z of every edge, then y of every layer, width by width.
    """
    number = {name: i for i, edge in enumerate(edges) for name in edge.layers}
    owner = np.array([number[site.name] for site in sites])
    taken = np.array([[budget.bits(site, width) for width in WIDTHS] for site in sites])
    float_taken = np.bincount(owner, [budget.bits(site, FLOAT_BITS) for site in sites], len(edges)).astype(np.int64)
    macs = np.array([edge.macs for edge in edges], float)

    def row(of_edges: np.ndarray, of_layers: np.ndarray) -> np.ndarray:
        return np.concatenate([of_edges, of_layers.ravel()])

    one_each = np.zeros((len(sites), len(edges) + taken.size))
    one_each[np.arange(len(sites)), owner] = 1
    one_each[:, len(edges) :] = np.kron(np.eye(len(sites)), np.ones(len(WIDTHS)))
    size = row(float_taken, taken)
    unit = np.gcd.reduce(size)  # whole numbers no larger than need be, which the solver compares exactly
    goal = row(-np.array([edge.noise for edge in edges]), weight_noise)
    scale = float(np.abs(goal).mean()) or 1.0
    share = macs / max(macs.sum(), 1)
    may_float = (share <= float_share) & [float_share > 0 and pinned.isdisjoint(edge.layers) for edge in edges]
    program = Program(
        goal=goal / scale,
        limits=np.stack([size // unit, row(share, np.zeros(taken.shape))]),
        most=np.array([math.floor(limit / unit), float_share]),
        groups=one_each,
        upper=row(may_float, np.ones(taken.shape)),
    )

    def whole(x: np.ndarray) -> np.ndarray:
        """Undecided tensors are quantized, undecided weights get the fewest bits: smaller on both counts."""
        floats, decided = x[: len(edges)] > 1 - WHOLE, x[len(edges) :].reshape(taken.shape) > 1 - WHOLE
        picked = np.eye(len(WIDTHS))[decided.argmax(axis=1)]  # the first where none is decided
        return row(floats, picked * ~floats[owner, None])

    x, gap = solve(program, whole, gap=GAP, constant=sum(edge.noise for edge in edges) / scale)
    widths = [WIDTHS[int(of.argmax())] if of.any() else None for of in x[len(edges) :].reshape(taken.shape)]
    used = sum(budget.bits(site, width or FLOAT_BITS) for site, width in zip(sites, widths, strict=True))
    assert used <= limit
    return widths, gap


def _explained(
    edges: Sequence[EdgeCost],
    noise: Mapping[str, Mapping[int, float]],
    given: Mapping[str, int | None],
    whole: float,
) -> dict[str, Choice]:
    """The reason of each choice, in shares of the noise that a network of the fewest bits would have."""
    least, macs = WIDTHS[0], sum(edge.macs for edge in edges)

    def share(part: float) -> str:
        return f"{part / whole if whole else 0.0:.2%} of the output error"

    choices = {}
    for edge in edges:
        for name in edge.layers:
            width, by_weight = given[name], noise[name][least]
            if width is None:
                saved = share(edge.noise + sum(noise[other][least] for other in edge.layers))
                cost = f"{edge.macs / max(macs, 1):.1%} of the arithmetic"
                reason = f"its input and {least}-bit weights would make {saved}, for {cost}"
            elif width == least:
                reason = f"{least} bits make {share(by_weight)}"
            else:
                reason = f"{least} bits would make {share(by_weight)}"
            choices[name] = Choice(width, reason)
    return choices


def _weights(site: LayerSite) -> int:
    return math.prod(site.shape)


def _packed_bits(site: LayerSite, width: int) -> int:
    scales = 0 if width == FLOAT_BITS else SCALE_BITS * site.shape[site.out_axis]
    return width * _weights(site) + scales

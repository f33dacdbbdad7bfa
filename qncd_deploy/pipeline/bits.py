"""Which layers get other bits than the format's: float where rounding costs most, more bits within a budget of bits."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.errors import PlanError
from qncd_deploy.export.graph import find_sites
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import MIXED_FORMATS, SPARE_BITS, ExportOptions
from qncd_deploy.pipeline.sensitivity import edge_costs, unmeasured, weight_noise
from qncd_deploy.quant.budget import EdgeCost, keep_float
from qncd_deploy.quant.decide import decide, is_included
from qncd_deploy.quant.mixed import WIDTHS, Assignment, BitBudget, assign
from qncd_deploy.quant.plan import Choice, LayerSite
from qncd_deploy.quant.policy import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Bits:
    """exceptions: layers that get something other than the format's bits, see make_plan; measured: False where the
    network was too large for a backward pass; budget, assignment: None where no budget was asked for.
    """

    exceptions: Mapping[str, Choice] = field(default_factory=dict)
    measured: bool = True
    budget: BitBudget | None = None
    assignment: Assignment | None = None

    def to_json(self) -> dict[str, Any] | None:
        """What the manifest says of a budget and how it was spent."""
        if self.assignment is None:
            return None
        return {"budget": str(self.budget), "measured": self.measured, **self.assignment.to_json()}


def budget_of(options: ExportOptions) -> BitBudget | None:
    if options.max_size is not None:
        return BitBudget(bytes=options.max_size)
    if not isinstance(options.avg_bits, str):
        return BitBudget(options.avg_bits)
    spends = options.avg_bits == "auto" and options.format in MIXED_FORMATS
    return BitBudget(WIDTHS[0] + SPARE_BITS) if spends else None


def check_budget(sites: Sequence[LayerSite], options: ExportOptions, policy: Policy) -> None:
    """Raises PlanError for a budget that no choice of bits can meet, or that there is nothing to spend on, before
    anything is measured. There is nothing to be said of one that nobody asked for.
    """
    if (budget := budget_of(options)) is None or _unasked(options):
        return
    wanted = [site for site in sites if decide(site, policy)[0]]
    if not wanted:
        raise PlanError(f"{budget}: none of {len(sites)} layers is to be quantized. `qncd export --dry-run` says why.")
    budget.require_reachable(wanted)


def choose_bits(
    model: ir.Model,
    network: FloatNetwork,
    calib: CalibSet,
    stats: Mapping[str, TensorStats],
    options: ExportOptions,
    policy: Policy,
    scratch: Path,
    *,
    kept: Container[str] = (),
) -> Bits:
    """Measure what rounding does to the output and decide. model: the float graph that is to be quantized; kept: names
    of layers that stay float already.

    With a budget, the solver also says what stays float: as much of the arithmetic as --keep-float alone would leave.
    """
    budget = budget_of(options)
    if budget is None and not options.keep_float:
        return Bits()
    wanted = [site for site in find_sites(model, network.inputs) if decide(site, policy)[0]]
    # what is zero throughout calibration stays float too, see make_plan
    sites = [site for site in wanted if site.name not in kept and stats[site.input].amax > 0]
    if not sites:
        return Bits()
    pinned = [site.name for site in sites if is_included(site, policy)]
    costs = edge_costs(model, network, sites, calib, stats, policy, scratch)
    exceptions = keep_float(costs, budget=options.keep_float / 100, pinned=pinned) if options.keep_float else {}
    measured = bool(costs)
    if not measured:
        what = "--keep-float is idle" if budget is None else f"{budget} is spent by relative weight error"
        log.info("the network is too large to measure which layers rounding hurts most: %s", what)
    if budget is None:
        return Bits(exceptions, measured)
    share = max(options.keep_float / 100, _share(costs, exceptions)) if options.keep_float else 0.0
    if measured:
        noise = weight_noise(model, network, sites, calib, policy, scratch)
    else:
        share = 0.0  # speed is not spent on a guess
        costs, noise = unmeasured(model, sites, stats, policy)
    chosen = {site.name for site in sites}
    # a budget of our own is for what there is to choose, and can always be met
    floats = [] if _unasked(options) else [site for site in wanted if site.name not in chosen]
    assignment = assign(sites, costs, noise, budget, float_share=share, pinned=pinned, floats=floats)
    return Bits(assignment.choices, measured, budget, assignment)


def _unasked(options: ExportOptions) -> bool:
    return options.max_size is None and options.avg_bits == "auto"


def _share(costs: Sequence[EdgeCost], chosen: Mapping[str, Choice]) -> float:
    """Of the multiplications, those of the chosen layers."""
    whole = sum(cost.macs for cost in costs)
    return sum(cost.macs for cost in costs if cost.layers[0] in chosen) / max(whole, 1)

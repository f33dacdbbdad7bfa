"""Decide for every weighted op of a network whether it is quantized, by which rule, and on which grids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.errors import PlanError
from qncd_deploy.quant.grid import Grid, fake_quantize
from qncd_deploy.quant.plan import HALVES, Choice, LayerPlan, LayerSite, QuantPlan, finite_db, float32_text
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.ranges import sqnr_db, stats_sqnr_db
from qncd_deploy.quant.weight_only import block_for, weight_only_grid

FLOAT_NAMES = re.compile(
    r"time_emb_proj|time_embedding|conv_in|conv_out|add_embedding|pos_embed|time_text_embed|context_embedder|norm_out"
)
"""Names that NVIDIA's diffusers recipe never quantizes, for what the graph's structure did not tell; conv_shortcut is
left out of the list on purpose: shortcut convolutions are ordinary convolutions of the body."""

FEED_FORWARD = re.compile(r"(^|\.)ff\.net\.")
QKV = re.compile(r"(^|\.)(to_[qkv]|to_qkv|qkv|query|key|value|[qkv]_proj|add_[qkv]_proj)\.")
MIN_WIDTH = 8
"""A Gemm with fewer inputs or outputs than this costs nothing and has no integer kernel worth the Q in front of it."""


def make_plan(
    sites: Sequence[LayerSite],
    weights: Mapping[str, np.ndarray],
    stats: Mapping[str, TensorStats],
    policy: Policy,
    *,
    exceptions: Mapping[str, Choice] = MappingProxyType({}),
    planned: Mapping[str, LayerPlan] = MappingProxyType({}),
) -> QuantPlan:
    """Decide for every site, and give every quantized one its scales.

    weights: by site name, of the site's shape. stats: by edge, of every quantized layer's input; where an output is
    there too, its range is recorded; nothing if the policy quantizes weights only. exceptions: layers to leave in float
    though the policy would not, unless --include says otherwise, or to give other bits. planned: layers of an earlier
    plan by the same policy and exceptions, whose weight and input are still those. All quantized consumers of an edge
    share one grid.

    Raises: PlanError if a pattern of the policy matches no weight, an edge was not calibrated, a weight is missing, of
    another shape or not finite, or nothing at all would be quantized.
    """
    check_patterns(sites, policy)
    grids: dict[str, Grid] = {}
    layers = []
    for site in sites:
        if site.name in planned:
            layers.append(planned[site.name])
            continue
        wanted, reason = decide(site, policy)
        weight_bits = policy.weight_bits
        choice = exceptions.get(site.name) if wanted else None
        if choice is not None and choice.weight_bits is not None:
            weight_bits, reason = choice.weight_bits, f"{reason}; {choice.reason}"
        elif choice is not None and not is_included(site, policy):
            wanted, reason = False, choice.reason
        if wanted and site.input in stats and stats[site.input].amax == 0:
            wanted, reason = False, "its input was zero throughout calibration"
        if not wanted:
            layers.append(_float_layer(site, reason))
            continue
        if policy.weights_only:
            layers.append(_weight_only_layer(site, reason, _checked_weight(site, weights), policy))
            continue
        if site.input not in stats:
            raise PlanError(f"{site.name}: its input {site.input!r} was not calibrated. Observe every planned edge.")
        if site.input not in grids:
            grids[site.input] = policy.act_grid(stats[site.input])
        weight = _checked_weight(site, weights)
        layers.append(_quantized_layer(site, reason, weight, weight_bits, stats, grids[site.input], policy))
    plan = QuantPlan(policy.format, tuple(layers))
    if not plan.quantized and policy.quant_level:
        reasons = "; ".join(sorted({layer.reason for layer in layers})) or "the graph has none"
        raise PlanError(f"plan: none of {len(layers)} weighted layers would be quantized ({reasons}).")
    return plan


def with_act_bits(plan: QuantPlan, stats: Mapping[str, TensorStats], policy: Policy) -> QuantPlan:
    """The same layers with the same weights, and inputs of no more bits than the policy's, on grids that it chooses.

    stats: by edge, of every input that has more bits now.
    """
    grids: dict[str, Grid] = {}
    layers = []
    for layer in plan:
        if layer.act_bits is not None and layer.act_bits > policy.act_bits:
            if layer.input not in grids:
                grids[layer.input] = policy.act_grid(stats[layer.input])
            layer = replace(layer, **_input_fields(stats[layer.input], grids[layer.input], policy))
        layers.append(layer)
    return QuantPlan(policy.format, tuple(layers))


def check_patterns(sites: Sequence[LayerSite], policy: Policy) -> None:
    """Raises PlanError for a pattern of the policy that matches no weight."""
    for option, patterns in (("--exclude", policy.exclude), ("--include", policy.include)):
        for pattern in patterns:
            if not any(_first_match((pattern,), site.name) for site in sites):
                raise PlanError(
                    f"{option} {pattern!r}: matches none of {len(sites)} weights. `qncd export --dry-run` lists them."
                )


def decide(site: LayerSite, policy: Policy) -> tuple[bool, str]:
    """Whether a layer is quantized, and the rule that said so; needs no weights and no statistics."""
    wanted, reason = _decide(site, policy)
    if wanted and policy.weights_only and (exception := block_for(site, policy.block_size)[1]):
        return True, f"{reason}; {exception}"
    return wanted, reason


def _decide(site: LayerSite, policy: Policy) -> tuple[bool, str]:
    if policy.quant_level == 0:
        return False, f"format {policy.format}"
    if pattern := _first_match(policy.exclude, site.name):
        return False, f"--exclude {pattern!r}"
    if pattern := _first_match(policy.include, site.name):
        return True, f"--include {pattern!r}"
    if site.role != "body":
        return False, site.note or f"{site.role} layer"
    if match := FLOAT_NAMES.search(site.name):
        return False, f"the name holds {match[0]!r}, which NVIDIA's recipe leaves in float"
    if site.op == "Conv":
        return True, "convolution"
    if min(site.shape) < MIN_WIDTH:
        return False, f"{site.op} of {' x '.join(map(str, site.shape))}: fewer than {MIN_WIDTH} inputs or outputs"
    level, kind = _linear_level(site.name)
    if level > policy.quant_level:
        return False, f"{kind}: quantized from --quant-level {level:g} on"
    return True, kind


def is_included(site: LayerSite, policy: Policy) -> bool:
    """The user asked for this layer by name: no measurement makes an exception of it."""
    return _first_match(policy.include, site.name) is not None


def _first_match(patterns: Sequence[str], name: str) -> str | None:
    """The first that is found in the name, or in that of the weight of which it is a half."""
    names = {name, *(name.removesuffix(half) for half in HALVES)}
    return next((pattern for pattern in patterns if any(re.search(pattern, each) for each in names)), None)


def _linear_level(name: str) -> tuple[float, str]:
    if FEED_FORWARD.search(name):
        return 2, "feed-forward Linear"
    if QKV.search(name):
        return 2.5, "query, key or value projection"
    return 3, "Linear"


def _float_layer(site: LayerSite, reason: str) -> LayerPlan:
    return LayerPlan(site.name, site.op, site.shape, site.input, site.output, site.out_axis, reason)


def _quantized_layer(
    site: LayerSite,
    reason: str,
    weight: np.ndarray,
    weight_bits: int,
    stats: Mapping[str, TensorStats],
    act_grid: Grid,
    policy: Policy,
) -> LayerPlan:
    weight_grid = policy.weight_grid(weight, site.out_axis, bits=weight_bits)
    weight_zero = weight_grid.zero(weight_bits)
    return replace(
        _float_layer(site, reason),
        weight_bits=weight_bits,
        weight_scale=tuple(map(float32_text, weight_grid.scale)),
        sqnr_db=finite_db(sqnr_db(weight, fake_quantize(weight, weight_grid))),
        weight_method=policy.weight_method,
        **_input_fields(stats[site.input], act_grid, policy),
        output_amax=float32_text(policy.act_amax(stats[site.output], bits=8)) if site.output in stats else None,
        weight_zero=tuple(map(int, weight_zero)) if weight_zero.any() else None,
    )


def _input_fields(stats: TensorStats, grid: Grid, policy: Policy) -> dict[str, Any]:
    """What a plan says of a layer's input."""
    return {
        "act_bits": policy.act_bits,
        "act_scale": float32_text(grid.scale),
        "act_zero": int(grid.zero(policy.act_bits)),
        "act_sqnr_db": finite_db(stats_sqnr_db(stats, grid)),
        "act_method": policy.act_method_text,
    }


def _weight_only_layer(site: LayerSite, reason: str, weight: np.ndarray, policy: Policy) -> LayerPlan:
    grid, bits = weight_only_grid(site, weight, policy)
    return replace(
        _float_layer(site, reason),
        weight_bits=bits,
        weight_scale=tuple(map(float32_text, grid.scale.ravel())),
        sqnr_db=finite_db(sqnr_db(weight, fake_quantize(weight, grid))),
        weight_method=policy.weight_method,
        block_size=grid.block,
    )


def _checked_weight(site: LayerSite, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    if site.name not in weights:
        raise PlanError(f"{site.name}: the graph names this weight, the checkpoint has no such array.")
    weight = weights[site.name]
    if weight.shape != site.shape:
        raise PlanError(f"{site.name}: shape {weight.shape}, the graph expects {site.shape}.")
    if not np.isfinite(weight).all():
        bad = int(weight.size - np.isfinite(weight).sum())
        raise PlanError(f"{site.name}: {bad} of {weight.size} weights are not finite. The checkpoint is damaged.")
    return weight

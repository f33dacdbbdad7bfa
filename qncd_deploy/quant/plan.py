"""The quantization plan: for every weighted op, which grid its weight and its input get, or why it stays float.

A plan is data (`plan.json`, schema 1): the exporter inserts Q/DQ from it, reports read it, correction tables are keyed
by its hash. Scales are float32, kept and written as the shortest decimal that reads back as the same float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.errors import PlanError
from qncd_deploy.quant.grid import Grid, fake_quantize, limits, narrow_weights
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.ranges import sqnr_db, stats_sqnr_db

SCHEMA = 1

Op = Literal["Conv", "Gemm", "MatMul"]
Role = Literal["body", "first", "last", "time", "label", "small"]


@dataclass(frozen=True, slots=True)
class LayerSite:
    """What the graph says of one weighted op, before anything is decided.

    name: the weight initializer (the parameter name of the checkpoint), unique in a network. shape: as stored in the
    graph, (O, I, kh, kw) for Conv, (N, K) or (K, N) for Gemm, (K, N) for MatMul. out_axis: the axis of output channels
    in that shape. input, output: edge (tensor) names. role: "body" unless the graph's structure asks for float; note
    says what was found.
    """

    name: str
    op: Op
    shape: tuple[int, ...]
    input: str
    output: str
    out_axis: int
    role: Role = "body"
    note: str = ""

    def __post_init__(self) -> None:
        assert self.op in get_args(Op) and self.role in get_args(Role), self
        assert 0 <= self.out_axis < len(self.shape), self


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One entry of plan.json. A float layer has None in every field from weight_bits to output_amax except the reason.

    weight_scale: one float32 per output channel. act_scale: one float32 for the edge `input`, the same for all
    quantized consumers of that edge; act_zero is always 0. Fewer than 8 bits use the levels -2**(b-1)..2**(b-1)-1 of
    an int8 tensor; weights of 8 bits use -127..127 (see weight_grid, act_grid). output_amax: calibrated range of
    |output|, for runtimes that want the output quantized as well, None where it was not observed. sqnr_db = 10
    log10(sum w^2 / sum (w - Q(w))^2), measured on the weight the plan was made for; act_sqnr_db is the same of the
    input, estimated from its calibration histogram. None where there is no error at all.
    """

    name: str
    op: Op
    shape: tuple[int, ...]
    input: str
    output: str
    out_axis: int
    reason: str
    weight_bits: int | None = None
    act_bits: int | None = None
    weight_scale: float | tuple[float, ...] | None = None
    act_scale: float | None = None
    act_zero: int | None = None
    sqnr_db: float | None = None
    act_sqnr_db: float | None = None
    weight_method: str | None = None
    act_method: str | None = None
    output_amax: float | None = None

    @property
    def quantized(self) -> bool:
        return self.weight_bits is not None

    @property
    def weight_grid(self) -> Grid:
        """The grid of a quantized layer's weight, per output channel."""
        assert self.weight_bits is not None and self.weight_scale is not None, f"{self.name} stays float"
        qmin, qmax = limits(self.weight_bits, narrow=narrow_weights(self.weight_bits))
        return Grid(np.asarray(self.weight_scale, np.float32), qmin, qmax, self.out_axis)

    @property
    def act_grid(self) -> Grid:
        """The grid of a quantized layer's input edge, per tensor."""
        assert self.act_bits is not None and self.act_scale is not None, f"{self.name} stays float"
        return Grid(np.asarray(self.act_scale, np.float32), *limits(self.act_bits))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerPlan:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise PlanError(
                f"plan.json, layer {data.get('name')!r}: unknown fields {unknown}. Use the version that wrote it."
            )
        try:
            tuples = {key: tuple(data[key]) for key in ("shape", "weight_scale") if isinstance(data[key], list)}
            return cls(**{**data, **tuples})
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"plan.json, layer {data.get('name')!r}: incomplete ({error}). Export the bundle again."
            ) from error


@dataclass(frozen=True)
class QuantPlan:
    """Every weighted op of one exported network in graph order, quantized or not; layer names are unique.

    output_sqnr_db: of the quantized network's output against the float one's on the calibration data, where it was
    measured (networks that cannot sample).
    """

    format: str
    layers: tuple[LayerPlan, ...]
    output_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PlanError(f"plan: weights {twice} feed more than one op. Give every op a weight of its own.")
        scales: dict[str, tuple[int | None, float | None]] = {}
        for layer in self.quantized:
            grid = (layer.act_bits, layer.act_scale)
            assert scales.setdefault(layer.input, grid) == grid, f"edge {layer.input!r} has two grids"

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def edges(self) -> dict[str, tuple[LayerPlan, ...]]:
        """Quantized consumers of every edge that gets a Q/DQ pair, in graph order; all share one grid."""
        found: dict[str, list[LayerPlan]] = {}
        for layer in self.quantized:
            found.setdefault(layer.input, []).append(layer)
        return {edge: tuple(layers) for edge, layers in found.items()}

    @cached_property
    def _by_name(self) -> dict[str, LayerPlan]:
        return {layer.name: layer for layer in self.layers}

    def to_json(self) -> dict[str, Any]:
        return {**self._head(), "layers": [layer.to_json() for layer in self.layers]}

    def _head(self) -> dict[str, Any]:
        error = {} if self.output_sqnr_db is None else {"output_sqnr_db": self.output_sqnr_db}
        return {"schema": SCHEMA, "format": self.format, **error}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantPlan:
        """Raises PlanError for another schema or a damaged entry; from_json(to_json()) is equal, scales bit for bit."""
        if data.get("schema") != SCHEMA:
            raise PlanError(
                f"plan.json: schema {data.get('schema')!r}, this version reads {SCHEMA}. Export the bundle again."
            )
        if not isinstance(data.get("layers"), list) or "format" not in data:
            raise PlanError("plan.json: no format or no list of layers. Export the bundle again.")
        layers = tuple(LayerPlan.from_json(layer) for layer in data["layers"])
        return cls(str(data["format"]), layers, data.get("output_sqnr_db"))

    def dumps(self) -> str:
        """The text of plan.json: one layer a line, so that two plans can be compared with diff."""
        head, layers = json.dumps(self._head())[:-1], self.to_json()["layers"]
        lines = ",\n".join(json.dumps(layer, allow_nan=False) for layer in layers)
        return f'{head}, "layers": [\n{lines}\n]}}\n'

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.dumps().encode()).hexdigest()


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
    exceptions: Mapping[str, str] = MappingProxyType({}),
) -> QuantPlan:
    """Decide for every site, and give every quantized one its scales.

    weights: by site name, of the site's shape. stats: by edge, of every quantized layer's input; where an output is
    there too, its range is recorded. exceptions: layers to leave in float though the policy would not, with the reason;
    --include overrules them. All quantized consumers of an edge share one grid.

    Raises: PlanError if a pattern of the policy matches no weight, an edge was not calibrated, a weight is missing, of
    another shape or not finite, or nothing at all would be quantized.
    """
    check_patterns(sites, policy)
    grids: dict[str, Grid] = {}
    layers = []
    for site in sites:
        wanted, reason = decide(site, policy)
        if wanted and site.name in exceptions and not _first_match(policy.include, site.name):
            wanted, reason = False, exceptions[site.name]
        if wanted and site.input in stats and stats[site.input].amax == 0:
            wanted, reason = False, "its input was zero throughout calibration"
        if not wanted:
            layers.append(_float_layer(site, reason))
            continue
        if site.input not in stats:
            raise PlanError(f"{site.name}: its input {site.input!r} was not calibrated. Observe every planned edge.")
        if site.input not in grids:
            grids[site.input] = policy.act_grid(stats[site.input])
        layers.append(_quantized_layer(site, reason, _checked_weight(site, weights), stats, grids[site.input], policy))
    plan = QuantPlan(policy.format, tuple(layers))
    if not plan.quantized and policy.quant_level:
        reasons = "; ".join(sorted({layer.reason for layer in layers})) or "the graph has none"
        raise PlanError(f"plan: none of {len(layers)} weighted layers would be quantized ({reasons}).")
    return plan


def check_patterns(sites: Sequence[LayerSite], policy: Policy) -> None:
    """Raises PlanError for a pattern of the policy that matches no weight."""
    for option, patterns in (("--exclude", policy.exclude), ("--include", policy.include)):
        for pattern in patterns:
            if not any(re.search(pattern, site.name) for site in sites):
                raise PlanError(
                    f"{option} {pattern!r}: matches none of {len(sites)} weights. `qncd export --dry-run` lists them."
                )


def decide(site: LayerSite, policy: Policy) -> tuple[bool, str]:
    """Whether a layer is quantized, and the rule that said so; needs no weights and no statistics."""
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


def float32_text(value: float | np.floating | np.ndarray) -> float:
    """The float whose repr is the shortest decimal that reads back as float32(value): a scale as JSON shows it."""
    return float(str(np.float32(value)))


def _first_match(patterns: Sequence[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if re.search(pattern, name)), None)


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
    stats: Mapping[str, TensorStats],
    act_grid: Grid,
    policy: Policy,
) -> LayerPlan:
    weight_grid = policy.weight_grid(weight, site.out_axis)
    return replace(
        _float_layer(site, reason),
        weight_bits=policy.weight_bits,
        act_bits=policy.act_bits,
        weight_scale=tuple(map(float32_text, weight_grid.scale)),
        act_scale=float32_text(act_grid.scale),
        act_zero=0,
        sqnr_db=_finite_db(sqnr_db(weight, fake_quantize(weight, weight_grid))),
        act_sqnr_db=_finite_db(stats_sqnr_db(stats[site.input], act_grid)),
        weight_method=policy.weight_method,
        act_method=policy.act_method_text,
        output_amax=float32_text(policy.act_range(stats[site.output], bits=8).amax) if site.output in stats else None,
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


def _finite_db(value: float) -> float | None:
    """Decibels to a hundredth; None where nothing was lost, which JSON has no number for."""
    return round(value, 2) if math.isfinite(value) else None

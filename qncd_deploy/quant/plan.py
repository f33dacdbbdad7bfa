"""The quantization plan: for every weighted op of the network, which grid its weight and its input get, or why it stays float.

A plan is data (`plan.json`, schema 1): the exporter inserts Q/DQ from it, reports read it, correction tables are keyed by its
hash. Scales are float32; they are kept and written as the shortest decimal that reads back as the same float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from qncd_deploy.errors import PlanError

SCHEMA = 1

Op = Literal["Conv", "Gemm", "MatMul"]
Role = Literal["body", "first", "last", "time", "label", "small"]


@dataclass(frozen=True, slots=True)
class LayerSite:
    """What the graph says of one weighted op, before anything is decided.

    name: the weight initializer (the parameter name of the checkpoint), unique in a network. shape: as stored in the graph,
    (O, I, kh, kw) for Conv, (N, K) or (K, N) for Gemm, (K, N) for MatMul. out_axis: the axis of output channels in that shape.
    input, output: edge (tensor) names. role: "body" unless the graph's structure asks for float; note says what was found.
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

    weight_scale: one float32 per output channel (or one for all). act_scale: one float32 for the edge `input`, the same for all
    quantized consumers of that edge; act_zero is always 0. output_amax: calibrated |output| range, for runtimes that want the
    output quantized as well. sqnr_db: 10 log10(sum w^2 / sum (w - Q(w))^2) of the weight as stored; act_sqnr_db: the same of the
    input, estimated from its calibration histogram. Both are None where the rounding is exact.
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
    """Every weighted op of one exported network in graph order, quantized or not; layer names are unique."""

    format: str
    layers: tuple[LayerPlan, ...]

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
        return {"schema": SCHEMA, "format": self.format, "layers": [layer.to_json() for layer in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantPlan:
        """Raises PlanError for another schema or a damaged entry; from_json(to_json()) is equal, scales bit for bit."""
        if data.get("schema") != SCHEMA:
            raise PlanError(
                f"plan.json: schema {data.get('schema')!r}, this version reads {SCHEMA}. Export the bundle again."
            )
        return cls(str(data["format"]), tuple(LayerPlan.from_json(layer) for layer in data["layers"]))

    def dumps(self) -> str:
        """The bytes of plan.json."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.dumps().encode()).hexdigest()


def float32_text(value: float | np.floating) -> float:
    """The float whose repr is the shortest decimal that reads back as float32(value): what a scale looks like in JSON."""
    return float(str(np.float32(value)))

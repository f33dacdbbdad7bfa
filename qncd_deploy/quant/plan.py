"""The quantization plan: for every weighted op, which grid its weight and its input get, or why it stays float.

A plan is data (`plan.json`, schema 1): the exporter inserts Q/DQ from it, reports read it, correction tables are keyed
by its hash. Scales are float32, kept and written as the shortest decimal that reads back as the same float32.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from qncd_deploy.errors import PlanError
from qncd_deploy.quant.grid import Grid, limits, narrow_weights

SCHEMA = 1

HALVES = (".h", ".s")
"""Behind a split layer's name: what weighs the first of two concatenated tensors, and the second (see quant.split)."""

Op = Literal["Conv", "Gemm", "MatMul"]
Role = Literal["body", "first", "last", "time", "label", "small"]

_LISTS = ("shape", "weight_scale", "weight_zero")


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

    @property
    def in_axis(self) -> int:
        """The axis of input channels in `shape`."""
        return 1 - self.out_axis

    @property
    def channel_axis(self) -> int:
        """The axis of input channels in the tensor `input`."""
        return 1 if self.op == "Conv" else -1


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One entry of plan.json. A float layer has None in every field from weight_bits to output_amax except the reason.

    weight_scale: one float32 per output channel; with block_size one for every block_size inputs of every output
    channel: the array of the weight's shape, its axis of inputs divided by block_size, in C order. act_scale: one
    float32 for the edge `input`, the same for all quantized consumers of that edge; so is act_zero. act_bits, act_scale
    and act_zero are None where the weight alone is quantized. Fewer than 8 bits are fewer levels of an int8 tensor:
        k = clip(round(x / scale) + zero, -2**(b-1), 2**(b-1)-1),    stored: k - zero, with ONNX zero point 0.
    weight_zero: one integer per output channel, None where all are 0. Weights of 8 bits have zero 0 and use -127..127;
    blocks have zero 0, and are packed, two 4-bit integers to a byte. An activation of 8 bits with another zero than 0
    does not fit: k itself is stored, with that zero point (see weight_grid, act_grid). output_amax: calibrated range of
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
    weight_zero: tuple[int, ...] | None = None
    block_size: int | None = None

    @property
    def quantized(self) -> bool:
        return self.weight_bits is not None

    @property
    def weight_grid(self) -> Grid:
        """The grid of a quantized layer's weight, per output channel or in blocks along its inputs."""
        assert self.weight_bits is not None and self.weight_scale is not None, f"{self.name} stays float"
        zero = 0 if self.weight_zero is None else np.asarray(self.weight_zero)
        qmin, qmax = limits(self.weight_bits, narrow=narrow_weights(self.weight_bits), zero=zero)
        scale = np.asarray(self.weight_scale, np.float32)
        if self.block_size is None:
            return Grid(scale, qmin, qmax, self.out_axis)
        axis = 1 - self.out_axis
        shape = [size // self.block_size if i == axis else size for i, size in enumerate(self.shape)]
        return Grid(scale.reshape(shape), qmin, qmax, axis, self.block_size)

    @property
    def act_grid(self) -> Grid:
        """The grid of a quantized layer's input edge, per tensor."""
        assert self.act_bits is not None and self.act_scale is not None, f"{self.name} stays float"
        return Grid(np.asarray(self.act_scale, np.float32), *limits(self.act_bits, zero=self.act_zero or 0))

    def to_json(self) -> dict[str, Any]:
        optional = {"weight_zero", "block_size"}
        return {key: value for key, value in asdict(self).items() if value is not None or key not in optional}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerPlan:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise PlanError(
                f"plan.json, layer {data.get('name')!r}: unknown fields {unknown}. Use the version that wrote it."
            )
        try:
            tuples = {key: tuple(data[key]) for key in _LISTS if isinstance(data.get(key), list)}
            return cls(**{**data, **tuples})
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"plan.json, layer {data.get('name')!r}: incomplete ({error}). Export the bundle again."
            ) from error


@dataclass(frozen=True, slots=True)
class Choice:
    """What a layer gets in place of the bits of the policy, None for float, and why; activations keep theirs."""

    weight_bits: int | None
    reason: str


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
        grids: dict[str, tuple[int | None, float | None, int | None]] = {}
        for layer in self.quantized:
            grid = (layer.act_bits, layer.act_scale, layer.act_zero)
            assert grids.setdefault(layer.input, grid) == grid, f"edge {layer.input!r} has two grids"

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
            if layer.act_bits is not None:
                found.setdefault(layer.input, []).append(layer)
        return {edge: tuple(layers) for edge, layers in found.items()}

    @property
    def blocked(self) -> bool:
        """Some weight is stored in 4-bit blocks, which ONNX has from opset 21 on."""
        return any(layer.block_size is not None for layer in self.layers)

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


def float32_text(value: float | np.floating | np.ndarray) -> float:
    """The float whose repr is the shortest decimal that reads back as float32(value): a scale as JSON shows it."""
    return float(str(np.float32(value)))


def finite_db(value: float) -> float | None:
    """Decibels to a hundredth; None where nothing was lost, which JSON has no number for."""
    return round(value, 2) if math.isfinite(value) else None

"""Read a normalised graph: which input is which, where the weighted ops are, what each is for.

Everything is told from structure, since names differ between families: the sample is the picture-shaped input, the
timestep is what sine and cosine are taken of, and what sees nothing but the timestep is the time path.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from qncd_deploy.errors import ExportError
from qncd_deploy.export.passes.common import out_axis, weighted_ops
from qncd_deploy.quant.plan import LayerSite

_log = logging.getLogger(__name__)

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gather", "Gemm", "MatMul"})
"""Operators that weights enter through; Gather is an embedding table."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Names of a denoiser's graph inputs by what they are; timestep is None for a decoder.

    labels are vectors (class labels, pooled text, sizes) that end in the time embedding; conditions are sequences that
    the network attends to.
    """

    sample: str
    timestep: str | None
    labels: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()


def find_inputs(model: ir.Model, *, sample: str | None = None, timestep: str | None = None) -> Inputs:
    """Tell the inputs apart by rank, type and use; sample and timestep overrule.

    Raises: ExportError if a name is not an input, or if no or several inputs could be the sample or the timestep.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for what, name in (("sample", sample), ("timestep", timestep)):
        if name is not None and name not in inputs:
            raise ExportError(f"{what} input {name!r}: not in the graph, its inputs are {', '.join(inputs)}.")
    if unknown := [name for name, value in inputs.items() if value.shape is None or value.dtype is None]:
        raise ExportError(f"input {unknown[0]!r}: rank or type unknown. Export the network with typed inputs.")
    if sample is None:
        pictures = [name for name, value in inputs.items() if len(value.shape) == 4 and value.dtype.is_floating_point()]
        sample = _only("sample", "4-D float", pictures, inputs)
    if timestep is None:
        vectors = [name for name, value in inputs.items() if len(value.shape) <= 1 and name != sample]
        waves = [name for name in vectors if feeds_wave(inputs[name])]
        named = [name for name in vectors if name.lower() in _TIMESTEP_NAMES]
        for found in (waves, named, vectors):
            if len(found) == 1:
                timestep = found[0]
                break
        else:
            if vectors:
                _only("timestep", "scalar or 1-D", vectors, inputs)
    rest = [name for name in inputs if name not in (sample, timestep)]
    return Inputs(
        sample,
        timestep,
        labels=tuple(name for name in rest if len(inputs[name].shape) <= 2),
        conditions=tuple(name for name in rest if len(inputs[name].shape) > 2),
    )


_TIMESTEP_NAMES = frozenset({"timestep", "timesteps", "time", "t", "sigma", "noise_level"})


def _only(what: str, kind: str, found: list[str], inputs: Mapping[str, ir.Value]) -> str:
    if len(found) != 1:
        named = ", ".join(f"{name} {list(map(str, value.shape))}" for name, value in inputs.items())
        count = " and ".join(found) if found else "none"
        raise ExportError(f"{what} input: expected one {kind} input, found {count} among {named}. Name it.")
    return found[0]


def feeds_wave(value: ir.Value) -> bool:
    """Sine or cosine is taken of it before any weighted op sees it."""
    queue, seen = [value], {value}
    while queue:
        for node in queue.pop().consumers():
            if node.op_type in ("Sin", "Cos"):
                return True
            if node.op_type not in WEIGHTED:
                queue += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
    return False


@dataclass(frozen=True)
class Flow:
    """Which graph inputs every tensor is computed from, and what lies between."""

    model: ir.Model
    inputs: Inputs

    @cached_property
    def sources(self) -> Mapping[ir.Value, frozenset[str]]:
        """Names of the graph inputs that a tensor's values depend on; its shape alone does not count."""
        found = {value: frozenset({value.name}) for value in self.model.graph.inputs}
        for node in self.model.graph:
            if node.op_type in ("Shape", "Size"):
                continue
            union = frozenset().union(*(found.get(value, frozenset()) for value in node.inputs if value is not None))
            found.update(dict.fromkeys(node.outputs, union))
        return found

    @cached_property
    def weighed(self) -> frozenset[ir.Value]:
        """Tensors with a weighted op between the sample and them."""
        weights = {node for node, _ in weighted_ops(self.model.graph)}
        found: set[ir.Value] = set()
        for node in self.model.graph:
            first = node.inputs[0] if node.inputs else None
            starts = node in weights and self.inputs.sample in self.sources.get(first, ())
            if starts or any(value in found for value in node.inputs):
                found.update(node.outputs)
        return frozenset(found)

    @cached_property
    def leads_on(self) -> frozenset[ir.Value]:
        """Tensors with a weighted op between them and the graph's output."""
        weights = {node for node, _ in weighted_ops(self.model.graph)}
        found: set[ir.Value] = set()
        for node in reversed(self.model.graph):
            if node in weights or any(output in found for output in node.outputs):
                found.update(value for value in node.inputs if value is not None)
        return frozenset(found)

    def is_time(self, value: ir.Value) -> bool:
        """Computed from the timestep and nothing but vectors beside it."""
        found = self.sources.get(value, frozenset())
        return self.inputs.timestep in found and found <= {self.inputs.timestep, *self.inputs.labels}

    def is_label(self, value: ir.Value) -> bool:
        found = self.sources.get(value, frozenset())
        return bool(found) and found <= set(self.inputs.labels)

    def is_condition(self, value: ir.Value) -> bool:
        found = self.sources.get(value, frozenset())
        return bool(found) and found <= set(self.inputs.conditions)


def find_sites(model: ir.Model, inputs: Inputs | None = None) -> tuple[LayerSite, ...]:
    """Every Conv, Gemm and MatMul with a weight, in graph order, with its role.

    time: reached from the timestep only (labels may join in). label: reached from label vectors only. first: no
    weighted op lies between the sample and it. last: no weighted op lies between it and an output. small: projects a
    condition of one token. body: the rest; the note says where a Linear of the body projects a condition (keys and
    values of cross-attention). A ConvTranspose or a batched weight is not a site: it stays float and is logged.
    """
    flow = Flow(model, inputs or find_inputs(model))
    sites = []
    for node, weight in weighted_ops(model.graph):
        shape = tuple(weight.shape.numpy())
        if len(shape) < 2 or (node.op_type == "MatMul" and len(shape) != 2):
            _log.info("%s: %s weight of shape %s stays float", weight.name, node.op_type, shape)
            continue
        role, note = _role(flow, node)
        data, out = node.inputs[0].name, node.outputs[0].name
        sites.append(LayerSite(weight.name, node.op_type, shape, data, out, out_axis(node), role, note))
    for node in model.graph:
        if node.op_type == "ConvTranspose":
            _log.info("%s: ConvTranspose stays float", node.inputs[1].name)
    return tuple(sites)


def _role(flow: Flow, node: ir.Node) -> tuple[str, str]:
    data, out, inputs = node.inputs[0], node.outputs[0], flow.inputs
    if inputs.timestep is not None and flow.is_time(data):
        return "time", f"reached from {inputs.timestep} only"
    if flow.is_label(data):
        return "label", f"reached from {', '.join(sorted(flow.sources[data]))} only"
    if inputs.sample in flow.sources.get(data, ()) and data not in flow.weighed:
        return "first", f"no weighted op between {inputs.sample} and it"
    if out not in flow.leads_on:
        return "last", "no weighted op between it and the output"
    if flow.is_condition(data) and _is_one_token(flow, data):
        return "small", f"projects the one token of {', '.join(sorted(flow.sources[data]))}"
    if flow.is_condition(data):
        return "body", f"projects the condition {', '.join(sorted(flow.sources[data]))}"
    return "body", ""


def row_values(value: ir.Value) -> int:
    """Elements per row of the batch; a size that is not known counts as 1, a tensor without any shape as nothing."""
    return 0 if value.shape is None else math.prod(size for size in value.shape[1:] if isinstance(size, int))


def backward_bytes(nodes: Iterable[ir.Node]) -> int:
    """What a backward pass through them holds per row: each tensor, its gradient, and what an op keeps for it."""
    return 3 * 4 * sum(row_values(output) for node in nodes for output in node.outputs)


def row_macs(shape: Sequence[int], out_axis: int, output: ir.Value) -> int:
    """Multiplications per row of a weighted op: every output element takes one per weight of its channel."""
    return row_values(output) * math.prod(shape) // shape[out_axis]


def macs_by_layer(model: ir.Model, sites: Iterable[LayerSite]) -> dict[str, int]:
    """Multiplications per row of each."""
    values = {out.name: out for node in model.graph for out in node.outputs}
    return {site.name: row_macs(site.shape, site.out_axis, values[site.output]) for site in sites}


def _is_one_token(flow: Flow, data: ir.Value) -> bool:
    """Sequences of length one: a product with a vector, which no integer kernel makes faster. (And attention to a
    single token does not depend on its key.)
    """
    given = (value for value in flow.model.graph.inputs if value.name in flow.sources[data])
    return all(value.shape is not None and len(value.shape) == 3 and value.shape[1] == 1 for value in given)

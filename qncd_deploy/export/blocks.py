"""Find the units whose output is worth keeping as a whole when their weights are rounded: residual blocks by structure.

An Add that joins two paths from one fork closes a residual block: everything between the fork and the Add, as long as
nothing in between is read elsewhere. With the fork as the Add's immediate dominator this finds ResNet blocks, attention
and feed-forward units and whole transformers alike, names play no part. BRECQ (Li et al., arXiv:2102.05426) rounds by
such blocks, Q-Diffusion by residual and transformer blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir

from qncd_deploy.export.graph import Flow, Inputs
from qncd_deploy.export.passes.common import weighted_ops

MOST_LAYERS = 16
"""A larger region is taken apart into the ones inside it: a transformer of depth one is a block, one of depth ten is
not."""


@dataclass(frozen=True, eq=False)
class Block:
    """Nodes that are reconstructed together.

    nodes: in graph order. inputs: names of the tensors that come in from outside, constants left out. output: the name
    of the only tensor that is read outside. layers: weight names of the weighted ops inside that were asked for.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    output: str
    layers: tuple[str, ...]


def find_blocks(model: ir.Model, inputs: Inputs, layers: Set[str]) -> tuple[Block, ...]:
    """Blocks that hold every named layer once, in the order in which they are to be reconstructed.

    A layer outside every residual region is a block of its own.
    """
    order = {node: place for place, node in enumerate(model.graph)}
    weights = {node: weight.name for node, weight in weighted_ops(model.graph) if weight.name in layers}
    taken: set[ir.Node] = set()
    blocks, sources = [], Flow(model, inputs).sources
    for region in sorted(_regions(model, inputs, weights), key=len, reverse=True):
        inside = region & weights.keys()
        if 0 < len(inside) <= MOST_LAYERS and not region & taken:
            region = _with_feeders(region, sources, inputs.sample)
            taken |= region
            blocks.append(_block(region, order, weights))
    blocks += [_block({node}, order, weights) for node in weights if node not in taken]
    return tuple(sorted(blocks, key=lambda block: order[block.nodes[-1]]))


def _regions(model: ir.Model, inputs: Inputs, weights: Iterable[ir.Node]) -> list[set[ir.Node]]:
    """What lies between every Add of two computed paths and the node at which they part, if it has one exit."""
    flow = _sample_flow(model, inputs)
    idom = nx.immediate_dominators(flow, _SOURCE)
    weighted = set(weights)
    regions = []
    for add in [node for node in flow if node is not _SOURCE and node.op_type == "Add" and flow.in_degree(node) == 2]:
        region = {add} | (nx.ancestors(flow, add) & nx.descendants(flow, idom[add]))
        exits = {node for node in region - {add} for user in node.successors() if user not in region}
        if not exits and region & weighted:
            regions.append(region)
    return regions


_SOURCE = "sample"


def _sample_flow(model: ir.Model, inputs: Inputs) -> nx.DiGraph:
    """Which node reads which, of all that depend on the sample; constants and the other inputs are left out.

    A layer that was split into halves reads the tensors before their concatenation; for this purpose it reads the
    concatenation, as it did before.
    """
    flow = nx.DiGraph()
    flow.add_node(_SOURCE)
    for node in model.graph:
        for value in node.inputs:
            if value is None:
                continue
            producer = value.producer()
            if value.name == inputs.sample:
                flow.add_edge(_SOURCE, node)
            elif producer in flow:
                flow.add_edge(_concatenation(value, node) or producer, node)
    return flow


def _concatenation(value: ir.Value, reader: ir.Node) -> ir.Node | None:
    """The Concat that joins value with what the other half of a split layer reads."""
    if reader.op_type != "Conv":
        return None
    for add in reader.successors():
        if add.op_type != "Add":
            continue
        halves = [operand.producer() for operand in add.inputs]
        if any(half is None or half.op_type != "Conv" for half in halves):
            continue
        read = {half.inputs[0] for half in halves}
        for user in value.consumers():
            if user.op_type == "Concat" and len(read) == 2 and read == set(user.inputs):
                return user
    return None


def _with_feeders(region: set[ir.Node], sources: Mapping[ir.Value, frozenset[str]], sample: str) -> set[ir.Node]:
    """The region and what computes for it alone beside the sample's path: projections of the time or of a condition."""
    grown, queue = set(region), list(region)
    while queue:
        for value in queue.pop().inputs:
            node = None if value is None else value.producer()
            if node is None or node in grown or sample in sources.get(value, ()):
                continue
            if all(user in grown for user in node.successors()):
                grown.add(node)
                queue.append(node)
    return grown


def _block(region: Set[ir.Node], order: dict[ir.Node, int], weights: dict[ir.Node, str]) -> Block:
    nodes = tuple(sorted(region, key=order.__getitem__))
    made = {output for node in nodes for output in node.outputs}
    read: Sequence[ir.Value] = [value for node in nodes for value in node.inputs if value is not None]
    outside = [value.name for value in read if value not in made and not value.is_initializer()]
    return Block(
        nodes,
        tuple(dict.fromkeys(outside)),
        nodes[-1].outputs[0].name,
        tuple(weights[node] for node in nodes if node in weights),
    )

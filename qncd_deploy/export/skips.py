"""Find the convolutions that read a skip concatenation, by their graph.

    shortcut:   conv <- Concat(h, s)
    main:       conv <- [Mul(constant) <-] SiLU <- GroupNorm <- Concat(h, s)
The Concat joins two computed tensors along the channels; h, its first, is the decoder's, s an encoder's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qncd_deploy.export.passes.common import constant, weighted_ops
from qncd_deploy.export.patterns import group_norm, operands, producer, silu_input


@dataclass(frozen=True)
class SkipConv:
    """name: of the weight. input: edge (tensor) name. channels: of its input, how many come from h."""

    name: str
    input: str
    channels: int
    kind: Literal["shortcut", "main"]


def find_skip_convs(model: ir.Model) -> tuple[SkipConv, ...]:
    """Every convolution, not grouped, of a skip concatenation, in graph order; names play no part."""
    found = []
    for node, weight in weighted_ops(model.graph):
        if node.op_type != "Conv" or ("group" in node.attributes and node.attributes["group"].as_int() != 1):
            continue
        edge = node.inputs[0]
        normalised = _before_norm(edge)
        if (channels := _first_channels(edge)) is not None:
            found.append(SkipConv(weight.name, edge.name, channels, "shortcut"))
        elif normalised is not None and (channels := _first_channels(normalised)) is not None:
            found.append(SkipConv(weight.name, edge.name, channels, "main"))
    return tuple(found)


def _first_channels(value: ir.Value) -> int | None:
    """Channels of the first of two computed tensors, maps of (N, C, H, W), that a Concat joins along axis 1."""
    node = producer(value, "Concat")
    if node is None or len(node.inputs) != 2 or any(part.producer() is None for part in node.inputs):
        return None
    first, axis = node.inputs[0], node.attributes["axis"].as_int()
    if first.shape is None or len(first.shape) != 4 or axis % 4 != 1 or not isinstance(first.shape[1], int):
        return None
    return first.shape[1]


def _before_norm(edge: ir.Value) -> ir.Value | None:
    """x of edge = SiLU(GroupNorm(x)), or of that times a constant, which smoothing leaves behind."""
    unscaled = (x for x, factor in operands(edge, "Mul") if constant(factor) is not None)
    activated = silu_input(next(unscaled, edge))
    norm = None if activated is None else group_norm(activated)
    return None if norm is None else norm[0]

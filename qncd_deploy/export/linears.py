"""Find the tensors on which SmoothQuant can work: what quantized Linears read, and whether a division is free there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qncd_deploy.export.passes.common import weighted_ops
from qncd_deploy.export.passes.smooth import absorbs
from qncd_deploy.quant.plan import LayerSite


@dataclass(frozen=True)
class LinearEdge:
    """A tensor and the Linears that read it, in graph order. free: a normalisation makes it for them alone, and can
    divide it without another operation.
    """

    name: str
    layers: tuple[LayerSite, ...]
    free: bool


def find_linear_edges(model: ir.Model, sites: Sequence[LayerSite], *, sample: str) -> tuple[LinearEdge, ...]:
    """The edges that some of `sites`, the layers to be quantized, read as Linears: Gemm, MatMul and 1x1 convolutions.

    Left out is what has no rows of the batch on its first axis (sample names the input that has), and the shortcut of a
    concatenation, whose halves differ as a whole.
    """
    batch = next(value for value in model.graph.inputs if value.name == sample).shape[0]
    nodes = {weight.name: node for node, weight in weighted_ops(model.graph)}
    readers: dict[ir.Value, list[LayerSite]] = {}
    for site in sites:
        node = nodes[site.name]
        if _is_linear(site, node) and _starts_with(node.inputs[0], batch) and not _is_concatenation(node.inputs[0]):
            readers.setdefault(node.inputs[0], []).append(site)
    return tuple(
        LinearEdge(edge.name, tuple(layers), absorbs(edge, [nodes[site.name] for site in layers]))
        for edge, layers in readers.items()
    )


def _is_linear(site: LayerSite, node: ir.Node) -> bool:
    if site.op != "Conv":
        return "transA" not in node.attributes or not node.attributes["transA"].as_int()
    strides, pads = (node.attributes[key].as_ints() if key in node.attributes else () for key in ("strides", "pads"))
    one_by_one = site.shape[2:] == (1, 1) and set(strides) <= {1} and not any(pads)
    return one_by_one and ("group" not in node.attributes or node.attributes["group"].as_int() == 1)


def _starts_with(edge: ir.Value, batch: int | ir.SymbolicDim) -> bool:
    return edge.shape is not None and len(edge.shape) > 1 and edge.shape[0] == batch


def _is_concatenation(edge: ir.Value) -> bool:
    return edge.producer() is not None and edge.producer().op_type == "Concat"

"""Some nodes of a graph as a differentiable function in torch, with the weighted ones open to other operands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qncd_deploy.engines.torch_ops import OPERATORS
from qncd_deploy.engines.torch_place import CPU, placed, together
from qncd_deploy.errors import ExportError, first_line
from qncd_deploy.export.passes.common import constant

Operands = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]
"""(x, w) of a weighted op -> what it is computed with instead."""


class Segment:
    """Calling it computes tensors by name from tensors by name; constants come from the graph unless they are fed.

    nodes: in an order in which they can run. device: where it computes. Raises: ExportError for an operator that torch
    has no function for.
    """

    def __init__(self, nodes: Sequence[ir.Node], device: torch.device = CPU) -> None:
        unknown = sorted({node.op_type for node in nodes if node.domain or node.op_type not in OPERATORS})
        if unknown:
            raise ExportError(f"reconstruction: no operator {', '.join(unknown)} in torch. Use --recon off.")
        self._steps = [(node, OPERATORS[node.op_type], _attributes(node)) for node in nodes]
        values = (value for node in nodes for value in node.inputs if value is not None and value.is_initializer())
        self.constants = {value.name: placed(torch.from_numpy(np.array(constant(value))), device) for value in values}
        self._device = device

    def __call__(
        self,
        feeds: Mapping[str, Tensor],
        wanted: Collection[str],
        operands: Mapping[ir.Node, Operands] | None = None,
    ) -> dict[str, Tensor]:
        """wanted: names of tensors that the nodes make; operands: for weighted ops that are not computed as they are.

        Raises: ExportError naming the node that failed.
        """
        values = {**self.constants, **feeds}
        last = {value: place for place, (node, *_) in enumerate(self._steps) for value in node.inputs}
        for place, (node, run, attributes) in enumerate(self._steps):
            given = [None if value is None else values[value.name] for value in node.inputs]
            inputs = together(node.op_type, given, self._device)
            if operands is not None and node in operands:
                inputs[:2] = operands[node](inputs[0], inputs[1])
            try:
                results = run(*inputs, **attributes)
            except (ValueError, TypeError, RuntimeError, IndexError) as error:
                raise ExportError(f"{node.name}: {node.op_type} failed in torch ({first_line(error)}).") from error
            several = results if isinstance(results, tuple) else (results,)
            values.update((out.name, result) for out, result in zip(node.outputs, several, strict=False))
            for value in node.inputs:
                if value is not None and last[value] == place and value.name not in wanted:
                    values.pop(value.name, None)
        return {name: values[name] for name in wanted}


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: _plain(attribute.value) for name, attribute in node.attributes.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, ir.TensorProtocol):
        return torch.from_numpy(np.array(value.numpy()))
    return list(value) if isinstance(value, tuple) else value

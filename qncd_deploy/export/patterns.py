"""The few compound operations of a normalised graph that later stages look for, by their ops.

SiLU(a) is a * Sigmoid(a). GroupNorm is what exporters write up to opset 20: Reshape, InstanceNormalization, Reshape,
Mul(gamma), Add(beta).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qncd_deploy.export.passes.common import constant


def silu_input(u: ir.Value) -> ir.Value | None:
    """a of u = a * Sigmoid(a)."""
    for a, gate in operands(u, "Mul"):
        node = gate.producer()
        if node is not None and node.op_type == "Sigmoid" and node.inputs[0] is a:
            return a
    return None


def group_norm(y: ir.Value) -> tuple[ir.Value, np.ndarray, np.ndarray, int, float] | None:
    """(x, gamma, beta, groups, epsilon) of y = GroupNorm(x); arrays of their own, as views would keep a checkpoint."""
    for scaled, beta in operands(y, "Add"):
        for normed, gamma in operands(scaled, "Mul"):
            found = _normalization(normed)
            if found is None or constant(beta) is None or constant(gamma) is None:
                continue
            x, groups, epsilon = found
            channels = x.shape[1] if x.shape is not None and len(x.shape) == 4 else 0
            if constant(gamma).size == constant(beta).size == channels:
                return x, constant(gamma).flatten(), constant(beta).flatten(), groups, epsilon
    return None


def _normalization(y: ir.Value) -> tuple[ir.Value, int, float] | None:
    """(x, groups, epsilon) of y = Reshape(InstanceNormalization(Reshape(x, (N, groups, -1)), 1, 0))."""
    back = producer(y, "Reshape")
    norm = producer(back.inputs[0], "InstanceNormalization") if back is not None else None
    flat = producer(norm.inputs[0], "Reshape") if norm is not None else None
    if flat is None or (ones := constant(norm.inputs[1])) is None or (zeros := constant(norm.inputs[2])) is None:
        return None
    if (ones != 1).any() or zeros.any():
        return None
    epsilon = norm.attributes.get("epsilon")
    return flat.inputs[0], len(ones), 1e-5 if epsilon is None else epsilon.as_float()


def operands(value: ir.Value, op: str) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The two inputs of the commutative op that makes value, in both orders; nothing if another op makes it."""
    if (node := producer(value, op)) is not None:
        a, b = node.inputs
        yield a, b
        yield b, a


def producer(value: ir.Value, op: str) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op else None

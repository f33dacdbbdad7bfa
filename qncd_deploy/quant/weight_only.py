"""Grids where weights alone are quantized: matrix products in blocks of 4 bits along their inputs, the rest in 8 bits.

MatMul, Gemm   w[k, n] ~= scale[k // block, n] * q[k, n],   -8 <= q <= 7: what engines keep packed, two to a byte
Conv           w[o, ...] ~= scale[o] * q[o, ...],   -127 <= q <= 127: no engine keeps 4 bits of it packed
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qncd_deploy.quant.grid import Grid, limits
from qncd_deploy.quant.plan import LayerSite
from qncd_deploy.quant.policy import BLOCK_SIZES, Policy

WIDE_BITS = 8
"""Of convolutions, and of matrix products that no block fits."""

LEAST_SHARE = 2.0**-8
"""Of the largest scale in its output channel, for the scale of any block: beside that one, smaller ones would leave
float16's range. Such a block is wrong by half of its scale at most, 48 dB below what the largest block is wrong by."""


def block_for(site: LayerSite, wanted: int) -> tuple[int | None, str]:
    """The block size of a layer: the wanted one if its inputs are two or more of them, else the largest smaller one of
    BLOCK_SIZES for which they are, else None: 8 bits per output channel. (A single block is a scale per output channel
    to TensorRT for RTX 1.7, which then multiplies none of it packed.) Second: why it is not the wanted one, "" where it
    is or for a convolution.
    """
    if site.op == "Conv":
        return None, ""
    inputs = site.shape[1 - site.out_axis]
    tried = [block for block in sorted(BLOCK_SIZES, reverse=True) if block <= wanted]
    for block in tried:
        if inputs % block == 0 and inputs > block:
            why = f"in blocks of {block}, since its {inputs} inputs are not several blocks of {wanted}"
            return block, "" if block == wanted else why
    sizes = " or ".join(map(str, tried))
    return None, f"in {WIDE_BITS} bits per output channel, since its {inputs} inputs are not several blocks of {sizes}"


def weight_only_grid(site: LayerSite, weight: np.ndarray, policy: Policy) -> tuple[Grid, int]:
    """The grid of a weight of the site's shape, by the policy's method, and its bits."""
    block, _ = block_for(site, policy.block_size)
    if block is None:
        return policy.weight_grid(weight, site.out_axis, bits=WIDE_BITS), WIDE_BITS
    return _blocked_grid(weight, 1 - site.out_axis, block, policy), policy.weight_bits


def _blocked_grid(weight: np.ndarray, axis: int, block: int, policy: Policy) -> Grid:
    policy = replace(policy, asymmetric="off")  # integers of an asymmetric grid would not fit into 4 bits
    columns = np.moveaxis(weight, axis, -1)  # (outputs, inputs)
    blocks = columns.reshape(-1, block)
    scale = np.where(blocks.any(axis=1), policy.weight_grid(blocks, 0).scale, 0).reshape(len(columns), -1)
    scale = np.maximum(scale, np.float32(LEAST_SHARE) * scale.max(axis=1, keepdims=True))
    scale[scale == 0] = 1  # of a channel of zeros
    scale = np.ascontiguousarray(np.moveaxis(scale, -1, axis))
    return Grid(scale, *limits(policy.weight_bits), axis, block)

"""Split shortcuts: quantize a convolution of two concatenated tensors half by half, each half on grids of its own.

    conv(cat(h, s), W) + b = conv(h, W_h) + b + conv(s, W_s)        exact, W_h and W_s halves along the input channels

A decoder block reads its predecessor h beside an encoder's output s, of very different ranges; one grid for both wastes
most of its levels on one of them. "Q-Diffusion" (Li et al., arXiv:2302.04304); its released code splits the shortcut
convolution only and asks nothing. That the block's main convolution may be split as well, and that a split must lower
the measured error, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.quant.grid import fake_quantize
from qncd_deploy.quant.layer_error import convolve, relative_error
from qncd_deploy.quant.policy import Policy

MIN_GAIN = 0.1
"""The least relative fall of the convolution's output error that is worth one more kernel: half a decibel. A 1x1 kernel
costs little, and the errors of shortcuts, which no normalisation follows, are much of the network's."""


@dataclass(frozen=True)
class SplitError:
    """Relative error of one convolution's output on held-out samples, quantized whole and half by half."""

    whole: float
    halves: float

    @property
    def pays(self) -> bool:
        return self.halves < (1 - MIN_GAIN) * self.whole


def split_error(
    weight: np.ndarray, channels: int, *, fit: np.ndarray, held_out: np.ndarray, policy: Policy
) -> SplitError:
    """What splitting behind `channels` input channels does to the convolution's quantized output.

    weight (O, C, kh, kw); fit, held_out (N, C, H, W) float32 samples of its input. Grids are the policy's, those of
    activations from `fit`. Errors are sum (found - exact)^2 / sum exact^2 over `held_out`; a bias would cancel.
    """
    exact = convolve(held_out, weight)

    def quantized(part: slice) -> torch.Tensor:
        act_grid = policy.act_grid(TensorStats.of(fit[:, part], "input of a convolution"))
        w = np.ascontiguousarray(weight[:, part])
        return convolve(fake_quantize(held_out[:, part], act_grid), fake_quantize(w, policy.weight_grid(w, 0)))

    whole, halves = quantized(slice(None)), quantized(slice(channels)) + quantized(slice(channels, None))
    return SplitError(relative_error(whole, exact), relative_error(halves, exact))

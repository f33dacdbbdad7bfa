"""What quantizing does to the output of one layer: run it in both forms and compare."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import conv2d

from qncd_deploy.quant.plan import LayerSite


def layer_output(x: np.ndarray, site: LayerSite, weight: np.ndarray) -> torch.Tensor:
    """What a weighted op makes of x without its bias: a convolution as in `convolve`, a Linear on the last axis."""
    if site.op == "Conv":
        return convolve(x, weight)
    with torch.inference_mode():
        return (_tensor(x) @ _tensor(weight.T if site.out_axis == 0 else weight)).double()


def convolve(x: np.ndarray, weight: np.ndarray) -> torch.Tensor:
    """conv(x, weight) without bias, stride 1, "same" padding; x (N, C, H, W), weight (O, C, kh, kw), odd kernels.

    Computed in float32, returned as float64.
    """
    with torch.inference_mode():
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        return conv2d(_tensor(x), _tensor(weight), padding=padding).double()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """sum (found - exact)^2 / sum exact^2; of an exact output of zeros the plain sum of squares."""
    power, noise = float(exact.square().sum()), float((found - exact).square().sum())
    return noise / power if power else noise


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(x, np.float32, ("C", "W")))  # torch warns of arrays that it may not write

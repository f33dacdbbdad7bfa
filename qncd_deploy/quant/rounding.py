"""Learned rounding: which integer every weight becomes, decided by what it does to an output and not to the weight.

    nearest    q = clip(round(w / s))
    adaround   q = clip(floor(w / s) + h(v)),   h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1),   in the end h = [v >= 0]
               with the penalty sum(1 - |2 h - 1|^beta), which drives every h to 0 or 1 as beta falls
    offset     q = clip(round(w / s + v)),      -1/2 <= v <= 1/2,   gradient of round taken as 1

adaround: Nagel et al., arXiv:2004.10568, with the constants of Q-Diffusion's released code. offset: after SignRound
(Cheng et al., arXiv:2309.05516), which moves v by the sign of its gradient; here Adam does, which is ours. An offset is
always rounded while it is learned, so it needs no penalty and pays off within tens of steps; a soft rounding is exact
only once the penalty has closed it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qncd_deploy.quant.grid import Grid

Kind = Literal["adaround", "offset"]

_ZETA, _GAMMA = 1.1, -0.1
"""The sigmoid is stretched to reach from GAMMA to ZETA, so that its clipped ends have slope zero."""


def round_ste(x: Tensor) -> Tensor:
    """round(x), ties to even, with the gradient of x (the straight-through estimator)."""
    return x + (x.round() - x).detach()


class Rounding(nn.Module):
    """The quantized values of one weight as a function of what is learned; calling it returns them, shaped like w.

    weight: float32; grid: of its shape and axis. The scale is given and stays.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    steps: Tensor

    def __init__(self, weight: np.ndarray, grid: Grid) -> None:
        super().__init__()
        shape = [1] * weight.ndim
        if grid.axis is not None:
            shape[grid.axis] = -1
        for name, each in (("scale", grid.scale), ("low", grid.qmin), ("high", grid.qmax)):
            tensor = torch.from_numpy(np.asarray(each, np.float32).copy())
            self.register_buffer(name, tensor.reshape(shape if np.ndim(each) else []))
        self.register_buffer("steps", torch.from_numpy(weight) / self.scale)
        self.v = nn.Parameter(self._start())

    def _start(self) -> Tensor:
        raise NotImplementedError

    def integers(self) -> Tensor:
        """What the weight is rounded to for good: float32 with integral values, without a gradient."""
        raise NotImplementedError

    def penalty(self, beta: float) -> Tensor:
        """What is left of soft rounding; 0 where rounding is never soft."""
        return self.v.new_zeros(())

    def project(self) -> None:
        """Bring what is learned back to where it may be; to be called after every update."""


class AdaRound(Rounding):
    """Soft until it is settled."""

    def _start(self) -> Tensor:
        """h(v) equals the fractional part, so that it starts at the float weight where nothing is clipped."""
        part = (self.steps - self.steps.floor()).clamp(1e-4, 1 - 1e-4)
        return -torch.log((_ZETA - _GAMMA) / (part - _GAMMA) - 1)

    def soft(self) -> Tensor:
        return ((_ZETA - _GAMMA) * torch.sigmoid(self.v) + _GAMMA).clamp(0, 1)

    def forward(self) -> Tensor:
        return (self.steps.floor() + self.soft()).clamp(self.low, self.high) * self.scale

    @torch.no_grad()
    def integers(self) -> Tensor:
        return (self.steps.floor() + (self.v >= 0)).clamp(self.low, self.high)

    def penalty(self, beta: float) -> Tensor:
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).sum()


class OffsetRounding(Rounding):
    """Hard all along."""

    def _start(self) -> Tensor:
        return torch.zeros_like(self.steps)

    def forward(self) -> Tensor:
        return round_ste(self.steps + self.v).clamp(self.low, self.high) * self.scale

    @torch.no_grad()
    def integers(self) -> Tensor:
        return (self.steps + self.v).round().clamp(self.low, self.high)

    @torch.no_grad()
    def project(self) -> None:
        self.v.clamp_(-0.5, 0.5)


KINDS: dict[Kind, type[Rounding]] = {"adaround": AdaRound, "offset": OffsetRounding}


LEAST_PART = 0.1
"""A learned step is at least this part of the step it started from, which least squares has chosen."""


class _FakeQuantize(torch.autograd.Function):
    """LearnedStep's function with its gradients, in fewer passes over x than its operators take one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: float, high: float) -> Tensor:
        y = (x / step).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, step, y)
        ctx.limits = low, high
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, step, y = ctx.saved_tensors
        low, high = ctx.limits
        inside = (x >= low * step) & (x <= high * step)
        by_step = None
        if ctx.needs_input_grad[1]:
            by_step = (gradient * torch.where(inside, y - x, y)).sum() / step
        return gradient * inside, by_step, None, None


class LearnedStep(nn.Module):
    """Fake quantization of an activation with a step size that can be learned; the levels stay.

        x -> s clip(round(x / s), qmin, qmax)

    LSQ (Esser et al., arXiv:1902.08153): with the gradient of round taken as 1, that of s is round(x / s) - x / s
    inside the range and qmin or qmax outside. The gradient is not rescaled by the number of values: to Adam it is all
    the same. An update of Adam is as large as its rate whatever the gradient, and a step may be smaller than that: it
    is held at LEAST_PART of its start (ours), so that it neither turns negative nor ends where nothing can be learned.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        assert grid.axis is None, "activations have one grid per tensor"
        self.step = nn.Parameter(torch.tensor(float(grid.scale)))
        self.least = LEAST_PART * float(grid.scale)
        self.low, self.high = float(grid.qmin), float(grid.qmax)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _FakeQuantize.apply(x, self.step, self.low, self.high)
        return found

    @torch.no_grad()
    def project(self) -> None:
        """Bring the step back to where it may be; to be called after every update."""
        self.step.clamp_(min=self.least)

"""ONNX operators (opset 13 to 23) that move values without changing them, as torch functions: the other half of
torch_ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def only(supported: object, what: str) -> None:
    """Refuse a variant of an operator that is not here. Raises ValueError."""
    if not supported:
        raise ValueError(f"{what} is not supported")


def reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """A size of 0 copies the input's, unless allowzero says that it means zero."""
    sizes = shape.tolist()
    return x.reshape(sizes if allowzero else [size or x.shape[axis] for axis, size in enumerate(sizes)])


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), -1)


def transpose(x: Tensor, *, perm: Sequence[int] = ()) -> Tensor:
    return x.permute(*(perm or reversed(range(x.dim()))))


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(a % rank for a in axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


def shape_of(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def concat(*xs: Tensor, axis: int) -> Tensor:
    return torch.cat(xs, axis)


def split(
    x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    if sizes is not None:
        return x.split(sizes.tolist(), axis)
    if num_outputs is None:
        raise ValueError("Split without sizes is not supported below opset 18")
    return x.split(-(-x.shape[axis] // num_outputs), axis)


def slice_(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    places = range(starts.numel()) if axes is None else axes.tolist()
    strides = [1] * starts.numel() if steps is None else steps.tolist()
    for axis, start, end, step in zip(places, starts.tolist(), ends.tolist(), strides, strict=True):
        kept = range(x.shape[axis])[start:end:step]  # Python clamps as ONNX does
        x = x.index_select(axis, torch.tensor(kept, dtype=torch.int64, device=x.device))
    return x


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    flat = torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1)
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def pad(
    x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: str = "constant"
) -> Tensor:
    places = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes.tolist()]
    amounts = [0] * (2 * x.dim())  # torch counts from the last axis, (before, after) for each
    for i, axis in enumerate(places):
        before, after = pads[i].item(), pads[i + len(places)].item()
        amounts[2 * (x.dim() - 1 - axis)], amounts[2 * (x.dim() - 1 - axis) + 1] = int(before), int(after)
    if mode == "constant":
        return F.pad(x, amounts, value=0.0 if value is None else value.item())
    only(mode in ("reflect", "edge"), f"padding mode {mode}")
    only(not any(amounts[4:]), f"{mode} padding beyond the last two axes")
    return F.pad(x, amounts[:4], mode="replicate" if mode == "edge" else mode)


def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    antialias: int = 0,
    axes: Sequence[int] = (),
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    """Nearest neighbour along any axes, or linear over the last two with half-pixel centres."""
    only(not antialias and not axes and keep_aspect_ratio_policy == "stretch", "antialiasing, axes or aspect policy")
    if scales is not None and scales.numel():
        factors = scales.double().tolist()
        target = [math.floor(size * factor) for size, factor in zip(x.shape, factors, strict=True)]
    else:
        assert sizes is not None
        target = sizes.tolist()
        factors = [new / size for new, size in zip(target, x.shape, strict=True)]
    if mode == "linear":
        only(x.dim() == 4 and target[:2] == list(x.shape[:2]), "linear resizing of other axes than the last two")
        only(coordinate_transformation_mode in ("half_pixel", "pytorch_half_pixel"), coordinate_transformation_mode)
        return F.interpolate(x, size=target[2:], mode="bilinear", align_corners=False)
    only(mode == "nearest", f"resizing mode {mode}")
    for axis, (size, factor) in enumerate(zip(target, factors, strict=True)):
        if size != x.shape[axis]:
            place = torch.arange(size, dtype=torch.float64)
            place = _SOURCE[coordinate_transformation_mode](place, factor)
            index = _ROUND[nearest_mode](place).long().clamp(0, x.shape[axis] - 1)
            x = x.index_select(axis, index.to(x.device))
    return x


_SOURCE: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "asymmetric": lambda place, factor: place / factor,
    "half_pixel": lambda place, factor: (place + 0.5) / factor - 0.5,
    "pytorch_half_pixel": lambda place, factor: (place + 0.5) / factor - 0.5,
}
_ROUND: Mapping[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda place: torch.ceil(place - 0.5),
    "round_prefer_ceil": lambda place: torch.floor(place + 0.5),
}


def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    fill = torch.zeros(1) if value is None else value
    return fill.reshape(()).expand(shape.tolist()).clone()

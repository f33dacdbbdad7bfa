"""Where the tensors of a graph lie that torch interprets: values on the device, shapes and axes where the program runs,
which reads them as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qncd_deploy.engines.torch_ops import OPERATORS

CPU = torch.device("cpu")

READ_AS_NUMBERS = frozenset(
    {"Expand", "Pad", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Tile", "Unsqueeze"}
    | {op for op in OPERATORS if op.startswith("Reduce")}
)
"""Operators that read the values of all operands but the first: shapes, axes and the like may lie on another device."""

_NARROW = (torch.int8, torch.uint8)
"""Of integers, those that are weights."""


def torch_device() -> torch.device:
    """The GPU where torch has one, else the CPU; as engines.base.torch_backend."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Where it is computed with."""
    return tensor.to(device) if tensor.is_floating_point() or tensor.dtype in _NARROW else tensor


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """float32 as it is written and the same every time: GPUs would round products to TF32 and pick kernels by speed."""
    if device.type == "cuda":
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    else:
        yield


def room(device: torch.device, on_cpu: int) -> int:
    """Bytes that a computation may hold there: half of a GPU's, on_cpu elsewhere."""
    return torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else on_cpu


def together(op: str, inputs: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Operands on one device: what was computed from shapes may meet what was computed from values."""
    if op in READ_AS_NUMBERS or len({x.device for x in inputs if x is not None}) < 2:
        return list(inputs)
    return [x if x is None else x.to(device) for x in inputs]

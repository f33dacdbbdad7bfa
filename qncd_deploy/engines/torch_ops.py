"""ONNX operators (opset 13 to 23) as torch functions, each read off the operator's specification and nothing else.

Every function takes the node's inputs in order (None for one left out) and its attributes by name, and returns a
tensor or a tuple of them. Attribute defaults are ONNX's own. Raises ValueError for a variant that is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from qncd_deploy.engines import torch_shapes as shapes
from qncd_deploy.engines.torch_shapes import only

Operator = Callable[..., "Tensor | tuple[Tensor, ...]"]


def torch_dtype(onnx_type: int) -> torch.dtype:
    """The torch dtype of an ONNX element type. Raises ValueError if torch has none."""
    if onnx_type not in _DTYPES:
        raise ValueError(f"element type {onnx.TensorProto.DataType.Name(onnx_type)} is not supported")
    return _DTYPES[onnx_type]


_T = onnx.TensorProto
_DTYPES: Mapping[int, torch.dtype] = {
    _T.FLOAT: torch.float32,
    _T.FLOAT16: torch.float16,
    _T.BFLOAT16: torch.bfloat16,
    _T.DOUBLE: torch.float64,
    _T.INT8: torch.int8,
    _T.INT4: torch.int8,  # unpacked: torch computes on nothing smaller
    _T.UINT8: torch.uint8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.BOOL: torch.bool,
}


# --- quantization -----------------------------------------------------------------------------------------------------


def quantize_linear(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1) -> Tensor:
    """q = saturate(round_half_even(x / scale) + zero), per tensor or along `axis`; uint8 without a zero point."""
    dtype = torch.uint8 if zero is None else zero.dtype
    limits = torch.iinfo(dtype)
    q = torch.round(x / _along(scale, x, axis))
    if zero is not None:
        q = q + _along(zero, x, axis)
    return torch.clamp(q, limits.min, limits.max).to(dtype)


def dequantize_linear(
    q: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0
) -> Tensor:
    """x = (q - zero) * scale, in the scale's dtype; the difference is taken in integers."""
    wide = q.to(torch.int32)
    if zero is not None:
        wide = wide - _along(zero, q, axis, block_size).to(torch.int32)
    return wide.to(scale.dtype) * _along(scale, q, axis, block_size)


def _along(parameter: Tensor, x: Tensor, axis: int, block_size: int = 0) -> Tensor:
    """A scale or zero point in a shape that broadcasts over x: a scalar, (C,) laid along `axis`, or one of every block
    of block_size elements along it.
    """
    if block_size:
        spread = parameter.repeat_interleave(block_size, dim=axis)
        return spread.narrow(axis, 0, x.shape[axis])  # the last block may be cut short
    if parameter.numel() == 1:
        return parameter.reshape(())
    only(parameter.dim() == 1, "a scale of several axes without blocks")
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


# --- weighted layers and normalization --------------------------------------------------------------------------------


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    rank = x.dim() - 2
    only(auto_pad in ("NOTSET", "VALID"), f"auto_pad {auto_pad}")
    run = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return run(_padded(x, pads), w, b, stride=strides or [1] * rank, dilation=dilations or [1] * rank, groups=group)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    output_padding: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    rank = x.dim() - 2
    pads = list(pads) or [0] * (2 * rank)
    only(auto_pad == "NOTSET" and pads[:rank] == pads[rank:], "uneven or automatic padding")
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    ones, zeros = [1] * rank, [0] * rank
    return run(
        x,
        w,
        b,
        stride=strides or ones,
        padding=pads[:rank],
        output_padding=output_padding or zeros,
        groups=group,
        dilation=dilations or ones,
    )


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    y = (a.T if transA else a) @ (b.T if transB else b)
    y = y if alpha == 1.0 else alpha * y
    return y if c is None else y + (c if beta == 1.0 else beta * c)


def instance_normalization(x: Tensor, scale: Tensor, b: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.group_norm(x, x.shape[1], scale, b, epsilon)


def group_normalization(
    x: Tensor, scale: Tensor, b: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    only(scale.numel() == x.shape[1], "one scale per group (opset below 21)")
    return F.group_norm(x, num_groups, scale, b, epsilon)


def layer_normalization(
    x: Tensor,
    scale: Tensor,
    b: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    y = F.layer_norm(x, x.shape[axis % x.dim() :], eps=epsilon) * scale
    return y if b is None else y + b


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    b: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    only(not training_mode, "training mode")
    return F.batch_norm(x, mean, var, scale, b, eps=epsilon)


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    rank = x.dim() - 2
    pads = list(pads) or [0] * (2 * rank)
    only(auto_pad == "NOTSET" and set(dilations) <= {1} and pads[:rank] == pads[rank:], "uneven padding or dilation")
    run = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    return run(
        x,
        list(kernel_shape),
        stride=list(strides) or [1] * rank,
        padding=pads[:rank],
        ceil_mode=bool(ceil_mode),
        count_include_pad=bool(count_include_pad),
    )


# --- arithmetic -------------------------------------------------------------------------------------------------------


def div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def cast(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    return x.to(torch_dtype(to))


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def reduction(reduce: Callable[..., Tensor]) -> Operator:
    """A Reduce* operator; its axes are an input from opset 18 on (13 for ReduceSum), an attribute before."""

    def run(
        x: Tensor,
        given: Tensor | None = None,
        *,
        axes: Sequence[int] | None = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        places = list(axes or ()) if given is None else given.tolist()
        if not places and noop_with_empty_axes:
            return x
        return reduce(x, dim=places or list(range(x.dim())), keepdim=bool(keepdims))

    return run


def index_of(choose: Callable[..., Tensor]) -> Operator:
    """ArgMax or ArgMin."""

    def run(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        only(not select_last_index, "select_last_index")
        return choose(x, dim=axis, keepdim=bool(keepdims))

    return run


def fold(combine: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of any number of inputs, such as Max."""

    def run(*xs: Tensor) -> Tensor:
        total = xs[0]
        for x in xs[1:]:
            total = combine(total, x)
        return total

    return run


def constant(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> Tensor:
    if value is not None:
        return value
    numbers = value_floats if value_float is None else value_float
    if numbers is not None:
        return torch.tensor(numbers, dtype=torch.float32)
    return torch.tensor(value_ints if value_int is None else value_int, dtype=torch.int64)


def _padded(x: Tensor, pads: Sequence[int]) -> Tensor:
    """Zero padding as Conv's attribute gives it: all the befores, then all the afters."""
    if not any(pads):
        return x
    rank = len(pads) // 2
    return F.pad(x, [amount for axis in reversed(range(rank)) for amount in (pads[axis], pads[axis + rank])])


OPERATORS: Mapping[str, Operator] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "ArgMax": index_of(torch.argmax),
    "ArgMin": index_of(torch.argmin),
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Cast": cast,
    "Ceil": torch.ceil,
    "Clip": clip,
    "Concat": shapes.concat,
    "Constant": constant,
    "ConstantOfShape": shapes.constant_of_shape,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Cos": torch.cos,
    "DequantizeLinear": dequantize_linear,
    "Div": div,
    "Einsum": lambda *xs, equation: torch.einsum(equation, *xs),
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": shapes.expand,
    "Flatten": shapes.flatten,
    "Floor": torch.floor,
    "Gather": shapes.gather,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "GroupNormalization": group_normalization,
    "Identity": lambda x: x,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Max": fold(torch.maximum),
    "Min": fold(torch.minimum),
    "Mod": mod,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pad": shapes.pad,
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
    "QuantizeLinear": quantize_linear,
    "Range": shapes.range_,
    "Reciprocal": torch.reciprocal,
    "ReduceMax": reduction(torch.amax),
    "ReduceMean": reduction(torch.mean),
    "ReduceMin": reduction(torch.amin),
    "ReduceSum": reduction(torch.sum),
    "Relu": torch.relu,
    "Reshape": shapes.reshape,
    "Resize": shapes.resize,
    "Round": torch.round,
    "Shape": shapes.shape_of,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Size": lambda x: torch.tensor(x.numel(), dtype=torch.int64),
    "Slice": shapes.slice_,
    "Softmax": softmax,
    "Softplus": F.softplus,
    "Split": shapes.split,
    "Sqrt": torch.sqrt,
    "Squeeze": shapes.squeeze,
    "Sub": torch.sub,
    "Sum": fold(torch.add),
    "Tanh": torch.tanh,
    "Tile": lambda x, repeats: x.repeat(repeats.tolist()),
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
    "Where": torch.where,
}

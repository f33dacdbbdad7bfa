"""What the user asks of a quantized network, as one checked value: bits, which layers, and how ranges are chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.errors import PlanError
from qncd_deploy.quant.grid import Grid, narrow_weights
from qncd_deploy.quant.ranges import (
    SHRINKS,
    asymmetric_grid,
    lp_grid,
    minmax_stats,
    mse_asymmetric,
    mse_stats,
    percentile_stats,
    stats_error,
    symmetric_grid,
)

QUANT_LEVELS = (0, 1, 2, 2.5, 3)
FLOAT_FORMAT = "fp16"
WEIGHT_METHODS = ("minmax", "mse", "lp2.4")
ACT_METHODS = ("minmax", "percentile", "mse")
ASYMMETRIC = ("auto", "off", "all")

CLEARLY = 0.8
"""An 8-bit activation takes an asymmetric grid, which costs TensorRT an op, where its error falls below this share of
the symmetric one's: by 1 dB. (Ours.)"""

BLOCK_SIZES = (32, 64, 128)
BLOCK_SIZE = 64
"""Weights that share a scale unless another size is asked for: 4.5 bits a weight with scales in float32."""

_FLOAT_BITS = 16


@dataclass(frozen=True)
class Policy:
    """What to quantize and how; checked when built.

    quant_level: 0 nothing (the format is fp16), 1 convolutions, 2 adds the feed-forward Linears, 2.5 the query, key and
    value projections, 3 every weighted Linear. exclude, include: regular expressions searched in weight names. A layer
    that `exclude` matches stays float; else one that `include` matches is quantized whatever its level, role or name;
    else the defaults decide. weight_method: "minmax", "mse" (p = 2) or "lp2.4" (Q-Diffusion's search). act_method:
    "minmax", "percentile" or "mse". asymmetric: "auto" takes an asymmetric grid below 8 bits, for an output channel of
    a weight or for an activation, where its error is lower (it costs nothing there); "all" does so for activations of 8
    bits too, where the error falls clearly; "off" never does. act_bits None: activations stay float, and weight_bits
    are those of matrix products in blocks of block_size inputs (see quant.weight_only).
    """

    weight_bits: int = 8
    act_bits: int | None = 8
    quant_level: float = 3
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    weight_method: str = "mse"
    act_method: str = "mse"
    percentile: float = 99.99
    asymmetric: str = "auto"
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        for what, bits in (("weights", self.weight_bits), ("activations", self.act_bits)):
            if bits is not None and bits not in range(4, 9):
                raise PlanError(f"format: {what} of {bits} bits, expected 4 to 8. Choose another --format.")
        for what, value, known in (
            ("quant level", self.quant_level, QUANT_LEVELS),
            ("weight method", self.weight_method, WEIGHT_METHODS),
            ("calibration method", self.act_method, ACT_METHODS),
            ("asymmetric", self.asymmetric, ASYMMETRIC),
            ("block size", self.block_size, BLOCK_SIZES),
        ):
            if value not in known:
                raise PlanError(f"{what}: {value!r}, expected one of {', '.join(map(str, known))}.")
        if not 50 <= self.percentile <= 100:
            raise PlanError(
                f"percentile: {self.percentile:g}, expected 50 to 100, the share of |x| that is not clipped."
            )
        for pattern in self.exclude + self.include:
            try:
                re.compile(pattern)
            except re.error as error:
                raise PlanError(f"pattern {pattern!r}: not a regular expression ({error}).") from error

    @classmethod
    def for_format(cls, format: str, **options: Any) -> Policy:
        """Policy of "fp16", "w8a8", "w4a6", "w4a16" and the like; options are the other fields."""
        if format == FLOAT_FORMAT:
            return cls(**{**options, "quant_level": 0})
        bits = re.fullmatch(r"w(\d+)a(\d+)", format)
        if bits is None:
            raise PlanError(f"format {format!r}: expected wNaM, weight and activation bits, like w8a8.")
        act_bits = int(bits[2])
        return cls(weight_bits=int(bits[1]), act_bits=None if act_bits == _FLOAT_BITS else act_bits, **options)

    @property
    def format(self) -> str:
        return FLOAT_FORMAT if self.quant_level == 0 else f"w{self.weight_bits}a{self.act_bits or _FLOAT_BITS}"

    @property
    def weights_only(self) -> bool:
        return self.act_bits is None

    @property
    def act_method_text(self) -> str:
        """The activation method with its parameter: "percentile 99.99"."""
        return f"percentile {self.percentile:g}" if self.act_method == "percentile" else self.act_method

    def weight_grid(self, weight: np.ndarray, axis: int, *, bits: int | None = None) -> Grid:
        """Per index of `axis`, the output channels; bits only where they differ from the policy's."""
        bits = bits or self.weight_bits
        return lp_grid(
            weight,
            bits=bits,
            axis=axis,
            p=2.4 if self.weight_method == "lp2.4" else 2.0,
            narrow=narrow_weights(bits),
            asymmetric=self.asymmetric != "off" and bits < 8,
            shrinks=(1.0,) if self.weight_method == "minmax" else SHRINKS,
        )

    def act_amax(self, stats: TensorStats, *, bits: int | None = None) -> float:
        """The end of a symmetric range, per tensor; bits only where they differ from the policy's (an output that is
        quantized for the runtime's sake).
        """
        if self.act_method == "minmax":
            return minmax_stats(stats)
        if self.act_method == "percentile":
            return percentile_stats(stats, percentile=self.percentile)
        return mse_stats(stats, bits=bits or self.act_bits)

    def act_grid(self, stats: TensorStats) -> Grid:
        """Per tensor."""
        amax, bits = self.act_amax(stats), self.act_bits
        even = symmetric_grid(amax, bits=bits)
        if self.asymmetric == "off" or (bits == 8 and self.asymmetric == "auto"):
            return even
        by_error = self.act_method == "mse"
        shifted = mse_asymmetric(stats, bits=bits) if by_error else asymmetric_grid(stats, amax, bits=bits)
        enough = stats_error(stats, even) * (CLEARLY if bits == 8 else 1)
        return shifted if stats_error(stats, shifted) < enough else even

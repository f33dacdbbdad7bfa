"""Decide on the calibration data which convolutions of skip concatenations are quantized half by half."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.export.passes.common import constant
from qncd_deploy.export.passes.split import SplitShortcuts
from qncd_deploy.export.skips import SkipConv, find_skip_convs
from qncd_deploy.pipeline.calibrate import probing
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.pipeline.samples import edge_samples
from qncd_deploy.quant.decide import decide
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.split import SplitError, split_error


@dataclass(frozen=True)
class Splitting:
    """errors: of every convolution that was tried, by weight name, in graph order;  split: those that become two."""

    errors: Mapping[str, SplitError]
    split: tuple[str, ...]

    def apply(self, model: ir.Model) -> ir.Model:
        """A copy of the float graph with the chosen convolutions in two."""
        copy = model.clone()
        SplitShortcuts(self.split)(copy)
        return copy

    def to_json(self) -> dict[str, Any]:
        return {
            "split": len(self.split),
            "convolutions": {
                name: {"split": name in self.split, "error": [error.whole, error.halves]}
                for name, error in self.errors.items()
            },
        }


def candidates(network: FloatNetwork, options: ExportOptions, policy: Policy) -> tuple[SkipConv, ...]:
    """The convolutions that --split may split: quantized, and shortcuts unless it says all; with auto none at 8 bits,
    where pictures of the demo came out no closer for it (48.9 dB, 49.3 without) and the kernels cost time all the same.
    """
    if options.split == "off" or (options.split == "auto" and policy.weight_bits == 8):
        return ()
    wanted = {site.name for site in network.sites if decide(site, policy)[0]}
    kinds = ("shortcut", "main") if options.split == "all" else ("shortcut",)
    return tuple(skip for skip in find_skip_convs(network.model) if skip.name in wanted and skip.kind in kinds)


def find_splitting(
    network: FloatNetwork, calib: CalibSet, options: ExportOptions, policy: Policy, scratch: Path, tick: Tick
) -> Splitting:
    """Measure every candidate; "auto" splits where the held-out error falls by enough, the others split them all."""
    skips = candidates(network, options, policy)
    if not skips:
        return Splitting({}, ())
    errors = {}
    edges = [skip.input for skip in skips]
    with probing(network.model, scratch) as probe:
        for edge, sample in edge_samples(probe, network, calib, dict.fromkeys(edges, 1), tick):
            held_out = np.concatenate([sample.tune, sample.held_out])  # nothing is to be chosen
            for skip in (skip for skip in skips if skip.input == edge):
                weight = constant(network.model.graph.initializers[skip.name])
                errors[skip.name] = split_error(weight, skip.channels, fit=sample.fit, held_out=held_out, policy=policy)
    errors = {skip.name: errors[skip.name] for skip in skips}
    return Splitting(errors, tuple(name for name, error in errors.items() if error.pays or options.split != "auto"))

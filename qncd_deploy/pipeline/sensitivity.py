"""Measure which layers' rounding reaches the output, with one backward pass through the float graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.engines.base import open_engine
from qncd_deploy.engines.torch_ref import TorchEngine
from qncd_deploy.export.graph import row_macs, row_values
from qncd_deploy.export.save import save_siblings
from qncd_deploy.pipeline.calibrate import in_batches
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.quant.budget import EdgeCost, output_noise
from qncd_deploy.quant.plan import LayerSite
from qncd_deploy.quant.policy import Policy

ROWS = 40
BATCH = 8
MEMORY_BYTES = 4 << 30
"""What a backward pass may hold; a network that needs more for a single row is not measured."""

_HELD_PER_VALUE = 3 * 4  # bytes: each tensor, its gradient, and what an op keeps for its backward pass


def edge_costs(
    model: ir.Model,
    network: FloatNetwork,
    sites: Sequence[LayerSite],
    calib: CalibSet,
    stats: Mapping[str, TensorStats],
    policy: Policy,
    scratch: Path,
) -> list[EdgeCost]:
    """The predicted cost of every edge that `sites` would quantize; none for a network too large to differentiate.

    model: the float graph that the sites and the statistics are of.
    """
    if not sites:
        return []
    row_bytes = _HELD_PER_VALUE * sum(row_values(out) for node in model.graph for out in node.outputs)
    fixed = network.facts.inputs[0].shape[0]
    size = fixed if isinstance(fixed, int) else min(BATCH, MEMORY_BYTES // max(row_bytes, 1))
    if size < 1 or size * row_bytes > 2 * MEMORY_BYTES:
        return []
    rows = np.unique(np.linspace(0, len(calib) - 1, min(ROWS, len(calib))).astype(int))
    grids = {site.input: policy.act_grid(stats[site.input]) for site in sites}
    readers: dict[str, list[LayerSite]] = {}
    for site in sites:
        readers.setdefault(site.input, []).append(site)
    noise = dict.fromkeys(readers, 0.0)
    rng = np.random.default_rng(0)
    graph = scratch / "sensitivity.onnx"
    save_siblings({graph.name: model}, scratch)
    with open_engine("torch", graph) as engine:
        assert isinstance(engine, TorchEngine)
        for feeds in in_batches(calib.take(rows), network.facts.inputs, size):
            (out,) = engine(feeds).values()
            probe = rng.standard_normal(out.shape).astype(np.float32)
            found = engine.input_gradients(feeds, {site.output for site in sites}, probe)
            signal = np.square(out, dtype=np.float64).reshape(len(out), -1).sum(axis=1)
            for edge, layers in readers.items():
                reached = [found[site.output] for site in layers if site.output in found]
                if reached:
                    gradients = [gradient for _, gradient in reached]
                    noise[edge] += len(out) / len(rows) * output_noise(reached[0][0], gradients, grids[edge], signal)
    shapes = {out.name: out for node in model.graph for out in node.outputs}
    return [
        EdgeCost(
            edge,
            tuple(site.name for site in layers),
            noise[edge],
            sum(row_macs(site.shape, site.out_axis, shapes[site.output]) for site in layers),
        )
        for edge, layers in readers.items()
    ]

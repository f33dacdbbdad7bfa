"""Measure which layers' rounding reaches the output, with one backward pass through the float graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.engines.base import open_engine, torch_backend
from qncd_deploy.engines.torch_place import room, torch_device
from qncd_deploy.engines.torch_ref import TorchEngine
from qncd_deploy.export.graph import backward_bytes, macs_by_layer
from qncd_deploy.export.passes.common import constant
from qncd_deploy.export.save import on_disk
from qncd_deploy.pipeline.calibrate import as_fed, fixed_rows, in_batches
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.quant.budget import EdgeCost, output_noise
from qncd_deploy.quant.grid import Grid, fake_quantize
from qncd_deploy.quant.mixed import WIDTHS
from qncd_deploy.quant.plan import LayerSite
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.ranges import stats_error

ROWS = 40
"""Enough to order the demo's weights as measured errors do (rank correlation 0.99). Few rows carry most of the error,
so that the sum of all predictions comes out low: 0.6 of what was measured on 640 rows, 0.8 with 320 rows.
"""

BATCH = 8
MEMORY_BYTES = 4 << 30
"""What a backward pass may hold on a CPU; a network that needs more for a single row is not measured."""


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
    if not sites or not _batch_size(model, network):
        return []
    grids = {site.input: policy.act_grid(stats[site.input]) for site in sites}
    readers = _by_edge(sites)
    noise = dict.fromkeys(readers, 0.0)
    for engine, feeds, probe, signal, share in _probed(model, network, calib, scratch):
        found = engine.input_gradients(feeds, {site.output for site in sites}, probe)
        for edge, layers in readers.items():
            reached = [found[site.output] for site in layers if site.output in found]
            if reached:
                gradients = [gradient for _, gradient in reached]
                noise[edge] += share * output_noise(reached[0][0], gradients, grids[edge], signal)
    macs = macs_by_layer(model, sites)
    return [
        EdgeCost(edge, tuple(site.name for site in layers), noise[edge], sum(macs[site.name] for site in layers))
        for edge, layers in readers.items()
    ]


def weight_noise(
    model: ir.Model,
    network: FloatNetwork,
    sites: Sequence[LayerSite],
    calib: CalibSet,
    policy: Policy,
    scratch: Path,
) -> dict[str, dict[int, float]]:
    """Predicted noise on the output, relative to its power, of rounding the weight of each site to each of WIDTHS bits;
    none for a network too large to differentiate. Sites that the output does not depend on make none.
    """
    if not sites or not _batch_size(model, network):
        return {}
    errors = {site.output: partial(_errors, *_rounded(model, site, policy)) for site in sites}
    noise = {site.name: dict.fromkeys(WIDTHS, 0.0) for site in sites}
    for engine, feeds, probe, signal, share in _probed(model, network, calib, scratch):
        moved = engine.weight_effects(feeds, errors, probe)
        for site in sites:
            for width, rows in zip(WIDTHS, moved.get(site.output, ()), strict=False):
                noise[site.name][width] += share * float(np.mean(np.square(rows) / signal))
    return noise


def unmeasured(
    model: ir.Model, sites: Sequence[LayerSite], stats: Mapping[str, TensorStats], policy: Policy
) -> tuple[list[EdgeCost], dict[str, dict[int, float]]]:
    """What stands in for both where no backward pass fits: error over power of the tensor or the weight itself. Knows
    nothing of what the network does with the error: every layer counts alike, so that more bits go to small ones. (On
    the demo, 4.25 bits a weight: output error 0.0048 without, 0.0018 so, 0.0046 where layers count by their arithmetic,
    0.0011 as measured.)
    """
    macs = macs_by_layer(model, sites)
    edges, weights = [], {}
    for edge, layers in _by_edge(sites).items():
        behind = sum(macs[site.name] for site in layers)
        lost = stats_error(stats[edge], policy.act_grid(stats[edge])) / stats[edge].mean_square
        edges.append(EdgeCost(edge, tuple(site.name for site in layers), lost, behind))
    for site in sites:
        weight, grids = _rounded(model, site, policy)
        power = _power(weight) or 1.0
        lost_of = zip(WIDTHS, _errors(weight, grids), strict=True)
        weights[site.name] = {width: _power(error) / power for width, error in lost_of}
    return edges, weights


class _Batch(NamedTuple):
    """probe: random, of the output's shape, zero in rows that do not count; signal (N,): the output's power; share:
    what a mean over N counts in one over all rows that do.
    """

    engine: TorchEngine
    feeds: Mapping[str, np.ndarray]
    probe: np.ndarray
    signal: np.ndarray
    share: float


def _probed(model: ir.Model, network: FloatNetwork, calib: CalibSet, scratch: Path) -> Iterator[_Batch]:
    """ROWS rows of the calibration set in batches, with the same probes each time."""
    rows = np.unique(np.linspace(0, len(calib) - 1, min(ROWS, len(calib))).astype(int))
    rng = np.random.default_rng(0)
    with on_disk(model, scratch) as graph, open_engine(torch_backend(), graph) as engine:
        assert isinstance(engine, TorchEngine)
        for feeds in in_batches(calib.take(rows), network.facts.sized_inputs, _batch_size(model, network)):
            fed = as_fed(feeds, network.facts.sized_inputs)
            (out,) = engine(fed).values()
            probe = rng.standard_normal(out.shape).astype(np.float32)
            probe[len(next(iter(feeds.values()))) :] = 0  # rows that only fill a fixed batch up
            signal = np.square(out, dtype=np.float64).reshape(len(out), -1).sum(axis=1)
            yield _Batch(engine, fed, probe, signal, len(out) / len(rows))


def _batch_size(model: ir.Model, network: FloatNetwork) -> int:
    """Rows that a backward pass can take; 0 where a single one needs too much memory."""
    row_bytes = backward_bytes(model.graph)
    fixed = fixed_rows(network.facts.sized_inputs)
    held = room(torch_device(), MEMORY_BYTES)
    size = fixed if fixed is not None else min(BATCH, held // max(row_bytes, 1))
    return 0 if size * row_bytes > 2 * held else size


def _rounded(model: ir.Model, site: LayerSite, policy: Policy) -> tuple[np.ndarray, tuple[Grid, ...]]:
    weight = constant(model.graph.initializers[site.name])
    return weight, tuple(policy.weight_grid(weight, site.out_axis, bits=width) for width in WIDTHS)


def _errors(weight: np.ndarray, grids: Sequence[Grid]) -> list[np.ndarray]:
    return [fake_quantize(weight, grid) - weight for grid in grids]


def _by_edge(sites: Sequence[LayerSite]) -> dict[str, list[LayerSite]]:
    readers: dict[str, list[LayerSite]] = {}
    for site in sites:
        readers.setdefault(site.input, []).append(site)
    return readers


def _power(x: np.ndarray) -> float:
    return float(np.square(x, dtype=np.float64).sum())

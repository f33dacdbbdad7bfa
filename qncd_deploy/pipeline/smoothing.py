"""Find, fold and judge the smoothing of residual blocks on the calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.observe import observe
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.export.passes.common import constant
from qncd_deploy.export.passes.smooth import FoldSmoothing
from qncd_deploy.pipeline.calibrate import counted, edge_samples, fetch, probing
from qncd_deploy.pipeline.free_run import latent_snr_db
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.output_error import output_errors, spread_rows
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.quant.decide import decide
from qncd_deploy.quant.plan import QuantPlan
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.qncd import ResBlock
from qncd_deploy.quant.smooth import MIN_GAIN, Decision, Reader, block_candidates, choose

RANGE_ROWS = 256
"""Rows from which smoothing learns the range of each channel."""

JUDGED_ROWS = 256
"""Rows on which the network's output error decides whether smoothing stays."""


@dataclass(frozen=True, eq=False)
class Smoothing:
    """blocks: what it does to each residual block, by the name of the second convolution;  folded: the blocks where it
    is in the graph;  network_error: relative error of the network's output without and with it, None if not compared;
    latent_snr_db: of free-running pictures without and with it, None if not compared (see judge).
    """

    blocks: Mapping[str, Decision]
    folded: tuple[str, ...]
    network_error: tuple[float, float] | None = None
    latent_snr_db: tuple[float, float] | None = None

    def fold(self, model: ir.Model) -> ir.Model:
        """A copy of the float graph with the factors of the folded blocks in it."""
        smoothed = model.clone()
        FoldSmoothing({name: self.blocks[name].factors for name in self.folded})(smoothed)
        return smoothed


def find_smoothing(
    network: FloatNetwork, calib: CalibSet, options: ExportOptions, policy: Policy, scratch: Path, tick: Tick
) -> Smoothing:
    """The best factors for every block, folded where they lower its held-out error (everywhere without the gate)."""
    names = {site.name for site in network.sites if decide(site, policy)[0]}
    blocks = [block for block in network.resblocks if block.conv2 in names]
    if options.smooth == "off" or not blocks:
        return Smoothing({}, ())
    decisions = _decisions(network, blocks, calib, options, policy, scratch, tick)
    return Smoothing(decisions, tuple(name for name, each in decisions.items() if each.kept or not options.gate))


def judge(
    network: FloatNetwork,
    smoothing: Smoothing,
    plain: tuple[ir.Model, QuantPlan],
    smoothed: tuple[ir.Model, QuantPlan],
    calib: CalibSet,
    options: ExportOptions,
    scratch: Path,
) -> Smoothing:
    """Keep smoothing only if the network's output error falls and, where it can sample, pictures come out closer.

    A lower error of single calls is no proof: what is left of it may repeat itself from step to step.
    """
    rows = spread_rows(calib, JUDGED_ROWS, odd=True)
    errors = output_errors(network.model, [plain, smoothed], network.facts.inputs, rows, scratch)
    before, after = (error.relative for error in errors)
    smoothing = replace(smoothing, network_error=(before, after))
    if after > (1 - MIN_GAIN) * before:
        return replace(smoothing, folded=())
    if network.schedule is None:
        return smoothing
    without, with_it = latent_snr_db(
        network, [plain, smoothed], pictures=options.fit_size, seed=options.seed, scratch=scratch
    )
    gain = with_it - without
    smoothing = replace(smoothing, latent_snr_db=(float(without.mean()), float(with_it.mean())))
    chance = _ONE_SIDED_95 * float(gain.std(ddof=1)) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return smoothing if gain.mean() > chance else replace(smoothing, folded=())


_ONE_SIDED_95 = 1.645


def _decisions(
    network: FloatNetwork,
    blocks: Sequence[ResBlock],
    calib: CalibSet,
    options: ExportOptions,
    policy: Policy,
    scratch: Path,
    tick: Tick,
) -> dict[str, Decision]:
    """What smoothing does in every block to the convolution's quantized output."""
    edges = [block.edge for block in blocks]
    embeddings = [edge for block in blocks for edge in block.emb]
    decisions = {}
    with probing(network.model, [*edges, *embeddings], scratch) as probe:
        some = calib.take(np.unique(np.linspace(0, len(calib) - 1, min(RANGE_ROWS, len(calib))).astype(int)))
        seen = observe(probe, counted(network, some, tick), edges, row_bytes=probe.row_bytes)
        spoken = fetch(probe, network, _one_row_per_timestep(network, calib), embeddings)
        for edge, fit, held_out in edge_samples(probe, network, calib, edges):
            for block in (block for block in blocks if block.edge == edge):
                reader = _reader(network, block.conv2)
                found = block_candidates(
                    options.smooth,
                    block,
                    reader,
                    embedding=spoken,
                    channel_amax=seen[edge].channel_amax,
                    alpha=options.alpha,
                )
                decisions[block.conv2] = choose(found, [reader], fit=fit, held_out=held_out, policy=policy)
    return {block.conv2: decisions[block.conv2] for block in blocks}


def _reader(network: FloatNetwork, name: str) -> Reader:
    (site,) = (site for site in network.sites if site.name == name)
    return Reader(site, constant(network.model.graph.initializers[name]))


def _one_row_per_timestep(network: FloatNetwork, calib: CalibSet) -> CalibSet:
    times = calib.arrays[network.inputs.timestep]
    return calib.take(np.unique(times, return_index=True)[1])

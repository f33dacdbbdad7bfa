"""Find, fold and judge the smoothing of residual blocks and of Linears on the calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.observe import observe
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.export.linears import LinearEdge, find_linear_edges
from qncd_deploy.export.passes.common import constant
from qncd_deploy.export.passes.smooth import AbsorbSmoothing, FoldSmoothing
from qncd_deploy.pipeline.calibrate import counted, edge_samples, fetch, probing
from qncd_deploy.pipeline.draft import Draft
from qncd_deploy.pipeline.free_run import latent_snr_db
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.output_error import output_errors, spread_rows
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.quant.decide import decide
from qncd_deploy.quant.plan import LayerSite, QuantPlan
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.qncd import ResBlock
from qncd_deploy.quant.smooth import (
    MIN_GAIN,
    Decision,
    Reader,
    block_candidates,
    choose,
    smoothquant_candidates,
)

RANGE_ROWS = 256
"""Rows from which smoothing of residual blocks learns the range of each channel."""

JUDGED_ROWS = 256
"""Rows on which the network's output error decides which smoothing stays."""

OP_GAIN = 0.1
"""The least relative fall of a Linear's error that is worth an operation of its own, which no SiLU is there to fuse
with. (A choice: what the operation costs depends on the runtime.)"""


@dataclass(frozen=True, eq=False)
class Smoothing:
    """blocks: what it does to each residual block, by the name of the second convolution;  linears: what SmoothQuant
    does to each edge that Linears read, by the name of the first;  folded: where it is in the graph, of both;
    network_error: relative error of the network's output without and with it, None if not compared;  latent_snr_db: of
    free-running pictures without and with it, None if not compared (see judge).
    """

    blocks: Mapping[str, Decision]
    linears: Mapping[str, Decision]
    folded: tuple[str, ...]
    network_error: tuple[float, float] | None = None
    latent_snr_db: tuple[float, float] | None = None

    @classmethod
    def none(cls) -> Smoothing:
        return cls({}, {}, ())

    def alternatives(self) -> tuple[Smoothing, ...]:
        """What to choose from, without repetition: nothing folded, blocks alone, Linears alone, all."""
        groups = (tuple(name for name in self.folded if name in group) for group in (self.blocks, self.linears))
        return tuple(replace(self, folded=folded) for folded in dict.fromkeys([(), *groups, self.folded]))

    def divide(self, model: ir.Model) -> ir.Model:
        """A copy of the float graph that divides and multiplies by the factors of what is folded; every edge of the
        original is there too, with the same values.
        """
        smoothed = model.clone()
        decisions = [{**self.blocks, **self.linears}[name] for name in self.folded]
        FoldSmoothing({layer: each.factors for each in decisions for layer in each.layers})(smoothed)
        return smoothed

    def fold(self, model: ir.Model) -> ir.Model:
        """The same, in as few operations as it takes: what a normalisation can divide is not there undivided."""
        smoothed = self.divide(model)
        AbsorbSmoothing()(smoothed)
        return smoothed


def find_smoothing(
    network: FloatNetwork, calib: CalibSet, options: ExportOptions, policy: Policy, scratch: Path, tick: Tick
) -> Smoothing:
    """The best factors for every residual block and every edge of Linears, folded where they lower the held-out error
    (everywhere without the gate). Linears are left alone where the published form of QNCD is asked for.
    """
    if options.smooth == "off":
        return Smoothing.none()
    sites = {site.name: site for site in network.sites if decide(site, policy)[0]}
    blocks = [block for block in network.resblocks if block.conv2 in sites]
    taken = {block.conv2 for block in blocks}
    others = [site for site in sites.values() if site.name not in taken]
    edges: Sequence[LinearEdge] = ()
    if options.smooth != "qncd:paper":
        edges = find_linear_edges(network.model, others, sample=network.inputs.sample)
    of_blocks = _blocks(network, blocks, sites, calib, options, policy, scratch, tick) if blocks else {}
    of_linears = _linears(network, edges, calib, options, policy, scratch, tick) if edges else {}
    found = {**of_blocks, **of_linears}
    folded = tuple(name for name, each in found.items() if each.kept or not options.gate)
    return Smoothing(of_blocks, of_linears, folded)


def judge(
    network: FloatNetwork,
    alternatives: Sequence[Smoothing],
    drafts: Sequence[Draft],
    calib: CalibSet,
    options: ExportOptions,
    scratch: Path,
) -> tuple[int, Smoothing]:
    """Which alternative to take, the first of which folds nothing, with the figures that say so.

    Another one must lower the network's output error, and pictures must come out closer where it can sample: a lower
    error of single calls is no proof, since what is left of it may repeat itself from step to step. Of several that do,
    the one whose pictures are closest (the one of least error, if the network cannot sample).

    drafts: the alternatives with their plans.
    """

    def masters(some: Iterable[int]) -> Iterator[tuple[ir.Model, QuantPlan]]:
        return ((drafts[i].master(), drafts[i].plan) for i in some)

    others = range(1, len(drafts))
    rows = spread_rows(calib, JUDGED_ROWS, odd=True)
    found = output_errors(network.model, masters((0, *others)), network.facts.inputs, rows, scratch)
    errors = [each.relative for each in found]
    best = min(others, key=errors.__getitem__)
    better = [i for i in others if errors[i] <= (1 - MIN_GAIN) * errors[0]]
    latents: dict[int, np.ndarray] = {}
    if better and network.schedule is not None:
        tried = (0, *better)
        closeness = latent_snr_db(
            network, masters(tried), pictures=options.fit_size, seed=options.seed, scratch=scratch
        )
        latents = dict(zip(tried, closeness, strict=True))
        best = max(better, key=lambda i: latents[i].mean())
        better = [best] if _beyond_chance(latents[best] - latents[0], tried=len(better)) else []
    chosen = best if better else 0
    figures = replace(
        alternatives[chosen],
        network_error=(errors[0], errors[best]),
        latent_snr_db=(float(latents[0].mean()), float(latents[best].mean())) if latents else None,
    )
    return chosen, figures


def _beyond_chance(gain: np.ndarray, *, tried: int) -> bool:
    """A mean above zero that one-sided chance of 5 % in `tried` attempts does not explain; gain: one per picture."""
    level = NormalDist().inv_cdf(1 - 0.05 / tried)
    chance = level * float(gain.std(ddof=1)) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return bool(gain.mean() > chance)


def _blocks(
    network: FloatNetwork,
    blocks: Sequence[ResBlock],
    sites: Mapping[str, LayerSite],
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
    with probing(network.model, scratch) as probe:
        some = spread_rows(calib, RANGE_ROWS)
        seen = observe(probe, counted(network, some, tick), edges)
        spoken = fetch(probe, network, _one_row_per_timestep(network, calib), embeddings)
        for edge, fit, held_out in edge_samples(probe, network, calib, edges):
            for block in (block for block in blocks if block.edge == edge):
                reader = _reader(network, sites[block.conv2])
                found = block_candidates(
                    options.smooth,
                    block,
                    reader,
                    embedding=spoken,
                    channel_amax=seen[edge].channel_amax,
                    alpha=options.alpha,
                )
                decisions[block.conv2] = _choose(found, [reader], fit, held_out, policy)
    return {block.conv2: decisions[block.conv2] for block in blocks}


def _linears(
    network: FloatNetwork,
    edges: Sequence[LinearEdge],
    calib: CalibSet,
    options: ExportOptions,
    policy: Policy,
    scratch: Path,
    tick: Tick,
) -> dict[str, Decision]:
    """What SmoothQuant does to the quantized outputs of all Linears that read an edge, by the name of the first."""
    by_name = {edge.name: edge for edge in edges}
    decisions: dict[str, Decision] = {}
    with probing(network.model, scratch) as probe:
        for name, fit, held_out in edge_samples(probe, network, calib, list(by_name)):
            edge = by_name[name]
            readers = [_reader(network, site) for site in edge.layers]
            axis = edge.layers[0].channel_axis % fit.ndim
            channel_amax = np.abs(fit).max(axis=tuple(i for i in range(fit.ndim) if i != axis))
            found = smoothquant_candidates(readers, channel_amax, alpha=options.alpha)
            decision = _choose(found, readers, fit, held_out, policy)
            decisions[name] = decision if edge.free else replace(decision, min_gain=OP_GAIN)
            tick(len(decisions), len(edges))
    return {edge.layers[0].name: decisions[edge.name] for edge in edges}


def _choose(
    factors: Mapping[str, np.ndarray],
    readers: Sequence[Reader],
    fit: np.ndarray,
    others: np.ndarray,
    policy: Policy,
) -> Decision:
    return choose(factors, readers, fit=fit, tune=others[::2], held_out=others[1::2], policy=policy)


def _reader(network: FloatNetwork, site: LayerSite) -> Reader:
    return Reader(site, constant(network.model.graph.initializers[site.name]))


def _one_row_per_timestep(network: FloatNetwork, calib: CalibSet) -> CalibSet:
    times = calib.arrays[network.inputs.timestep]
    return calib.take(np.unique(times, return_index=True)[1])

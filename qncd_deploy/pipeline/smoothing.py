"""Find, fold and judge the smoothing of residual blocks and of Linears on the calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.parts import Parts, spread
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.export.linears import LinearEdge, find_linear_edges
from qncd_deploy.export.passes.common import constant
from qncd_deploy.export.passes.smooth import AbsorbSmoothing, FoldSmoothing
from qncd_deploy.pipeline.calibrate import probing
from qncd_deploy.pipeline.draft import Draft
from qncd_deploy.pipeline.free_run import latent_snr_db
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.output_error import Form, kept_open, output_errors, running
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.pipeline.samples import Sample, edge_samples
from qncd_deploy.quant.decide import decide
from qncd_deploy.quant.plan import LayerSite
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

JUDGED_ROWS = 256
"""Rows, of pictures that no factor was fitted on, on which the network's output error decides which smoothing stays."""

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
    embeddings = [edge for block in blocks for edge in block.emb] if options.smooth.startswith("qncd") else []
    axes = dict.fromkeys([*embeddings, *(block.edge for block in blocks)], 1)
    axes |= {edge.name: edge.layers[0].channel_axis for edge in edges}
    if not axes:
        return Smoothing.none()
    spoken: dict[str, np.ndarray] = {}
    of_blocks: dict[str, Decision] = {}
    of_linears: dict[str, Decision] = {}
    with probing(network.model, scratch) as probe:
        for name, sample in edge_samples(probe, network, calib, axes, tick):
            if name in embeddings:  # these come first
                spoken[name] = sample.fit
            for block in (block for block in blocks if block.edge == name):
                reader = _reader(network, sites[block.conv2])
                of_blocks[block.conv2] = _of_block(block, reader, sample, spoken, options, policy)
            for edge in (edge for edge in edges if edge.name == name):
                readers = [_reader(network, site) for site in edge.layers]
                of_linears[readers[0].site.name] = _of_linears(edge, readers, sample, options, policy)
    of_blocks = {block.conv2: of_blocks[block.conv2] for block in blocks}
    of_linears = {edge.layers[0].name: of_linears[edge.layers[0].name] for edge in edges}
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
    the one whose pictures are closest (the one of least error, if the network cannot sample). Of a large network only
    the one of least error makes pictures, which cost most.

    drafts: the alternatives with their plans.
    """

    def quantized(draft: Draft) -> Form:
        return lambda: running(draft.master(), draft.plan, scratch)

    others = range(1, len(drafts))
    rows = calib.take(spread(Parts.of(calib).unseen, JUDGED_ROWS))
    with ExitStack() as stack:
        forms = [lambda: running(network.model, None, scratch), *map(quantized, drafts)]
        exact, *tried = forms if network.is_large else [kept_open(form, stack) for form in forms]
        errors = [each.relative for each in output_errors(exact, tried, network.facts.sized_inputs, rows)]
        best = min(others, key=errors.__getitem__)
        better = [i for i in others if errors[i] <= (1 - MIN_GAIN) * errors[0]]
        latents: dict[int, np.ndarray] = {}
        if network.is_large:
            better = [best] if best in better else []
        if better and network.schedule is not None:
            some = (0, *better)
            closeness = latent_snr_db(
                network, exact, [tried[i] for i in some], pictures=options.fit_size, seed=options.seed
            )
            latents = dict(zip(some, closeness, strict=True))
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


def _of_block(
    block: ResBlock,
    reader: Reader,
    sample: Sample,
    embedding: Mapping[str, np.ndarray],
    options: ExportOptions,
    policy: Policy,
) -> Decision:
    """What smoothing does in a block to the second convolution's quantized output."""
    found = block_candidates(
        options.smooth,
        block,
        reader,
        embedding=embedding,
        channel_amax=sample.channel_amax,
        alpha=options.alpha,
    )
    return _choose(found, [reader], sample, policy)


def _of_linears(
    edge: LinearEdge, readers: Sequence[Reader], sample: Sample, options: ExportOptions, policy: Policy
) -> Decision:
    """What SmoothQuant does to the quantized outputs of all Linears that read an edge."""
    found = smoothquant_candidates(readers, sample.channel_amax, alpha=options.alpha)
    decision = _choose(found, readers, sample, policy)
    return decision if edge.free else replace(decision, min_gain=OP_GAIN)


def _choose(factors: Mapping[str, np.ndarray], readers: Sequence[Reader], sample: Sample, policy: Policy) -> Decision:
    return choose(factors, readers, fit=sample.fit, tune=sample.tune, held_out=sample.held_out, policy=policy)


def _reader(network: FloatNetwork, site: LayerSite) -> Reader:
    return Reader(site, constant(network.model.graph.initializers[site.name]))

"""From the float network and its calibration set to a plan and the quantized graphs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.observe import observe
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.export.passes.common import constant
from qncd_deploy.export.passes.half import HalfRemainder
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.ort_sibling import OrtSibling
from qncd_deploy.export.passes.smooth import FoldSmoothing
from qncd_deploy.export.verify import MASTER, ONNXRUNTIME, TENSORRT, verify
from qncd_deploy.pipeline.calibrate import Probe, in_batches, probing
from qncd_deploy.pipeline.free_run import latent_snr_db
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.output_error import output_errors, spread_rows
from qncd_deploy.pipeline.progress import Progress, Tick
from qncd_deploy.pipeline.sensitivity import edge_costs
from qncd_deploy.quant.budget import keep_float
from qncd_deploy.quant.plan import LayerSite, QuantPlan, check_patterns, decide, make_plan
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.qncd import ResBlock
from qncd_deploy.quant.smooth import MIN_GAIN, Decision, candidates, choose

RANGE_ROWS = 256
"""Rows from which smoothing learns the range of each channel."""

JUDGED_ROWS = 256
"""Rows on which the network's output error decides whether smoothing stays."""

log = logging.getLogger(__name__)

SAMPLE_ROWS = 128
SAMPLE_BYTES = 32 << 20
"""Rows of one convolution's input on which smoothing is judged, fewer where they would not fit in SAMPLE_BYTES: large
planes say as much in few rows, and convolving them several times is what takes the time."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """The plan, what became of smoothing, and the graphs by file name (the float twin too)."""

    plan: QuantPlan
    smoothing: Smoothing
    graphs: Mapping[str, ir.Model]


@dataclass(frozen=True, eq=False)
class Smoothing:
    """blocks: what it does to each residual block, by the name of the second convolution;  folded: the blocks where it
    is in the graph;  network_error: relative error of the network's output without and with it, None if not compared;
    latent_snr_db: of free-running pictures without and with it, None if not compared (see _judge).
    """

    blocks: Mapping[str, Decision]
    folded: tuple[str, ...]
    network_error: tuple[float, float] | None = None
    latent_snr_db: tuple[float, float] | None = None


def policy_of(options: ExportOptions) -> Policy:
    """Raises PlanError for a pattern that is no regular expression and the like."""
    return Policy.for_format(
        options.format,
        quant_level=options.quant_level,
        exclude=options.exclude,
        include=options.include,
        act_method=options.calib_method,
        percentile=options.percentile,
    )


def unquantized(network: FloatNetwork, options: ExportOptions) -> Quantized:
    """The plan and the graphs of a bundle whose layers all stay in float: the baseline of the quantized ones."""
    plan = make_plan(network.sites, {}, {}, policy_of(options))
    return Quantized(plan, Smoothing({}, ()), _graphs(network.model, network.model.clone(), plan))


def quantize(
    network: FloatNetwork, calib: CalibSet, options: ExportOptions, scratch: Path, progress: Progress
) -> Quantized:
    """Smooth, observe, plan, and insert Q/DQ. scratch: a folder for graphs that only calibration runs.

    Raises: PlanError, CalibrationError or ExportError, naming the layer.
    """
    policy = policy_of(options)
    check_patterns(network.sites, policy)
    wanted = [site for site in network.sites if decide(site, policy)[0]]
    names = {site.name for site in wanted}
    blocks = [block for block in network.resblocks if block.conv2 in names] if options.smooth != "off" else []
    decisions: dict[str, Decision] = {}
    if blocks:
        with progress.stage("smoothing") as tick:
            decisions = _smoothing(network, blocks, calib, options, policy, scratch, tick)
    kept = {name: decision.factors for name, decision in decisions.items() if decision.kept or not options.gate}
    smoothed = network.model.clone()
    FoldSmoothing(kept)(smoothed)
    sites = _sites_after(network, smoothed)
    edges = [site.input for site in sites if site.name in names]
    edges += [site.output for site in sites if site.name in names and site.op == "Conv"]
    edges += [block.edge for block in blocks if block.conv2 in kept]  # for the plan without smoothing
    with progress.stage("ranges") as tick, probing(smoothed, edges, scratch) as probe:
        seen = observe(probe, _counted(network, calib, tick), edges, row_bytes=probe.row_bytes)
    weights = {site.name: _weight(smoothed, site.name) for site in sites}
    exceptions: Mapping[str, str] = {}
    if options.keep_float:
        with progress.stage("sensitivity"):
            chosen = [site for site in sites if site.name in names and seen[site.input].amax > 0]
            costs = edge_costs(smoothed, network, chosen, calib, seen, policy, scratch)
            if not costs:
                log.info("the network is too large to measure which layers rounding hurts most: --keep-float is idle")
            exceptions = keep_float(costs, budget=options.keep_float / 100)
    plan = make_plan(sites, weights, seen, policy, exceptions=exceptions)
    InsertQDQ(plan)(smoothed)
    smoothing = Smoothing(decisions, tuple(kept))
    if kept and options.gate:
        with progress.stage("smoothing, judged"):
            weights = {site.name: _weight(network.model, site.name) for site in network.sites}
            plain_plan = make_plan(network.sites, weights, seen, policy, exceptions=exceptions)
            plain = network.model.clone()
            InsertQDQ(plain_plan)(plain)
            smoothing = _judge(network, smoothing, (plain, plain_plan), (smoothed, plan), calib, options, scratch)
            if not smoothing.folded:
                plan, smoothed = plain_plan, plain
    with progress.stage("graphs"):
        return Quantized(plan, smoothing, _graphs(network.model, smoothed, plan))


def _judge(
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


def _graphs(model: ir.Model, master: ir.Model, plan: QuantPlan) -> dict[str, ir.Model]:
    """The siblings of a master that InsertQDQ made from the plan, each held to its rules."""
    verify(master, MASTER, plan=plan, name="unet.onnx")
    half, ort = master.clone(), master.clone()
    HalfRemainder()(half)
    verify(half, TENSORRT, plan=plan, name="unet-trt.onnx")
    OrtSibling(plan)(ort)
    verify(ort, ONNXRUNTIME, plan=plan, name="unet-ort.onnx")
    return {"unet.onnx": master, "unet-trt.onnx": half, "unet-ort.onnx": ort, "unet-float.onnx": model}


def _smoothing(
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
        seen = observe(probe, _counted(network, some, tick), edges, row_bytes=probe.row_bytes)
        spoken = _fetch(probe, network, _one_row_per_timestep(network, calib), embeddings)
        for count, group in _by_sample_rows(blocks, probe, calib).items():
            samples = _fetch(probe, network, _pairs(calib, count), [block.edge for block in group])
            for block in group:
                weight, x = _weight(network.model, block.conv2), samples.pop(block.edge)
                found = candidates(
                    options.smooth,
                    block,
                    weight,
                    embedding=spoken,
                    channel_amax=seen[block.edge].channel_amax,
                    alpha=options.alpha,
                )
                decisions[block.conv2] = choose(found, weight, fit=x[::2], held_out=x[1::2], policy=policy)
    return {block.conv2: decisions[block.conv2] for block in blocks}


def _one_row_per_timestep(network: FloatNetwork, calib: CalibSet) -> CalibSet:
    times = calib.arrays[network.inputs.timestep]
    return calib.take(np.unique(times, return_index=True)[1])


def _by_sample_rows(blocks: Sequence[ResBlock], probe: Probe, calib: CalibSet) -> dict[int, list[ResBlock]]:
    """The blocks by how many rows each is judged on, so that one run of the network serves all that take as many."""
    groups: dict[int, list[ResBlock]] = {}
    for block in blocks:
        count = max(2, min(SAMPLE_ROWS, len(calib), SAMPLE_BYTES // max(1, probe.row_bytes[block.edge])))
        groups.setdefault(count, []).append(block)
    return groups


def _pairs(calib: CalibSet, count: int) -> CalibSet:
    """Some rows, evenly spread; the calibration set alternates pictures, so even and odd ones share none."""
    rows = np.linspace(0, len(calib) - 1, count // 2).astype(int) // 2 * 2
    return calib.take(np.minimum(np.stack([rows, rows + 1], axis=1).ravel(), len(calib) - 1))


def _fetch(probe: Probe, network: FloatNetwork, rows: CalibSet, names: Sequence[str]) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for feeds in in_batches(rows, network.facts.inputs):
        for name, array in probe(feeds, names).items():
            found[name].append(array)
    return {name: np.concatenate(parts)[: len(rows)] for name, parts in found.items()}


def _counted(network: FloatNetwork, calib: CalibSet, tick: Tick) -> Iterator[dict[str, np.ndarray]]:
    done = 0
    for feeds in in_batches(calib, network.facts.inputs):
        yield feeds
        done = min(done + len(next(iter(feeds.values()))), len(calib))
        tick(done, len(calib))


def _sites_after(network: FloatNetwork, smoothed: ir.Model) -> tuple[LayerSite, ...]:
    """The same sites, with the edges that smoothing put in front of some of them."""
    inputs = {node.inputs[1].name: node.inputs[0].name for node in smoothed.graph if node.op_type == "Conv"}
    return tuple(replace(site, input=inputs.get(site.name, site.input)) for site in network.sites)


def _weight(model: ir.Model, name: str) -> np.ndarray:
    return constant(model.graph.initializers[name])

"""From the float network and its calibration set to a plan and the quantized graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from qncd_deploy.calib.observe import observe
from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.errors import CalibrationError, ExportError
from qncd_deploy.export.graph import find_sites
from qncd_deploy.export.passes.common import constant
from qncd_deploy.export.passes.half import HalfRemainder
from qncd_deploy.export.passes.ort_sibling import OrtSibling
from qncd_deploy.export.passes.shift import ShiftZeroPoints
from qncd_deploy.export.save import spill, unmap
from qncd_deploy.export.verify import MASTER, ONNXRUNTIME, TENSORRT, verify
from qncd_deploy.pipeline.bits import Bits, choose_bits
from qncd_deploy.pipeline.calibrate import counted, probing
from qncd_deploy.pipeline.draft import Draft
from qncd_deploy.pipeline.first_token import FirstTokens, find_first_tokens
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.progress import Progress, Tick
from qncd_deploy.pipeline.smoothing import Smoothing, find_smoothing, judge
from qncd_deploy.pipeline.splitting import Splitting, find_splitting
from qncd_deploy.pipeline.stepping import Steps, find_steps
from qncd_deploy.quant.decide import check_patterns, decide, make_plan
from qncd_deploy.quant.plan import Choice, QuantPlan
from qncd_deploy.quant.policy import BLOCK_SIZE, Policy
from qncd_deploy.reconstruct.network import Reconstruction, reconstruct


@dataclass(frozen=True, eq=False)
class Quantized:
    """The plan, what became of smoothing, of splitting, of a budget of bits and of the first text token, and the graphs
    by file name (the float twin too).

    steps: what became of --step-bits, None without it;  graphs: none once they are written;  notes: what the user
    should be told of.
    """

    plan: QuantPlan
    smoothing: Smoothing
    splitting: Splitting
    bits: Bits
    graphs: Mapping[str, ir.Model]
    steps: Steps | None = None
    reconstruction: Reconstruction | None = None
    first_tokens: FirstTokens = field(default_factory=FirstTokens)
    notes: tuple[str, ...] = ()


def policy_of(options: ExportOptions) -> Policy:
    """Raises PlanError for a pattern that is no regular expression and the like."""
    return Policy.for_format(
        options.format,
        quant_level=options.quant_level,
        exclude=options.exclude,
        include=options.include,
        act_method=options.calib_method,
        weight_method=options.weight_method,
        percentile=options.percentile,
        asymmetric=options.asymmetric,
        block_size=options.block_size or BLOCK_SIZE,
    )


def quantize_weights(network: FloatNetwork, options: ExportOptions, progress: Progress) -> Quantized:
    """The plan and the graphs of a format that leaves activations in float, and needs no calibration: with quantized
    weights, or nothing quantized at all, the baseline of the other formats. Raises: PlanError or ExportError.
    """
    with progress.stage("graphs"):
        (draft,) = _drafts(network, [(network.model, {})], {}, policy_of(options))
        graphs = _graphs(network.model, draft.master(), draft.plan)
        return Quantized(draft.plan, Smoothing.none(), Splitting({}, ()), Bits(), graphs)


def quantize(
    network: FloatNetwork, calib: CalibSet, options: ExportOptions, work: Path, scratch: Path, progress: Progress
) -> Quantized:
    """Smooth, split, observe, plan, learn the rounding, and insert Q/DQ.

    work: a folder for what a killed run should go on from; scratch: one for what it should not.

    Raises: PlanError, CalibrationError or ExportError, naming the layer.
    """
    policy = policy_of(options)
    check_patterns(network.sites, policy)
    with progress.stage("first token"):
        tokens = find_first_tokens(network, calib, options, policy)
    network = tokens.without(network)
    with progress.stage("smoothing") as tick:
        smoothing = find_smoothing(network, calib, options, policy, scratch, tick)
    with progress.stage("split shortcuts") as tick:
        splitting = find_splitting(network, calib, options, policy, scratch, tick)
    alternatives = smoothing.alternatives() if options.gate else (smoothing,)
    plain = _on_file(splitting.apply(network.model), scratch / "plain.data")
    smoothed = _on_file(splitting.apply(smoothing.divide(network.model)), scratch / "smoothed.data")
    with progress.stage("ranges") as tick:
        seen = _ranges(network, (plain, smoothed), calib, policy, scratch, tick)
    with progress.stage("sensitivity"):
        measured = [  # smoothing moves what rounding hurts most, so that the form without it is measured by itself
            choose_bits(form, network, calib, seen, options, policy, scratch, kept=tokens.exceptions)
            for form in ((plain, smoothed) if len(alternatives) > 1 else (smoothed,))
        ]
    forms = []
    for number, each in enumerate(alternatives):
        form = _on_file(splitting.apply(each.fold(network.model)), scratch / f"form-{number}.data")
        forms.append((form, {**tokens.exceptions, **measured[min(number, 1)].exceptions}))
    drafts = _drafts(network, forms, seen, policy)
    for graph in (network.model, plain, smoothed, *(form for form, _ in forms)):
        unmap(graph)  # each has mapped all of its weights by now
    chosen = 0
    if len(alternatives) > 1:
        with progress.stage("smoothing, judged"):
            chosen, smoothing = judge(network, alternatives, drafts, calib, options, scratch)
    draft, bits = drafts[chosen], measured[min(chosen, 1)]
    found, notes = None, ()
    if (preset := options.preset) is not None:
        with progress.stage("rounding") as tick:
            try:
                found = reconstruct(
                    draft.model,
                    network.inputs,
                    draft.plan,
                    calib,
                    preset=preset,
                    seed=options.seed,
                    work=work,
                    scratch=scratch,
                    resume=options.resume,
                    tick=tick,
                )
            except (CalibrationError, ExportError) as error:
                if options.recon != "auto":
                    raise
                notes = (f"rounding is not learned, which --recon auto does where it can: {error}",)
    if found is not None:
        draft = Draft(found.fold(draft.model), found.revise(draft.plan, draft.model, seen))
    steps = None
    if options.step_bits:
        with progress.stage("step bits") as tick:
            steps = find_steps(network, draft, seen, policy, options, scratch, tick)
    with progress.stage("graphs"):
        graphs = _graphs(network.model, draft.master(), draft.plan)
        for suffix, narrow in steps.drafts.items() if steps else ():
            graphs |= _siblings(narrow.master(), narrow.plan, suffix)
        return Quantized(draft.plan, smoothing, splitting, bits, graphs, steps, found, tokens, notes)


def _on_file(model: ir.Model, data: Path) -> ir.Model:
    """The graph with its weights in a file, where those of the float network that it took over are already."""
    spill(model, data)
    return model


def _drafts(
    network: FloatNetwork,
    forms: Sequence[tuple[ir.Model, Mapping[str, Choice]]],
    seen: Mapping[str, TensorStats],
    policy: Policy,
) -> list[Draft]:
    """A plan for every form of the network with its exceptions; layers that several have in common are planned once."""
    drafts: list[Draft] = []
    for model, exceptions in forms:
        sites = find_sites(model, network.inputs)
        weights = {site.name: constant(model.graph.initializers[site.name]) for site in sites}
        planned = {}
        for site in sites:
            for draft, (_, others) in zip(drafts, forms, strict=False):  # of those before this one
                layer = draft.same_layer(site, weights[site.name])
                if layer is not None and others.get(site.name) == exceptions.get(site.name):
                    planned[site.name] = layer
        drafts.append(Draft(model, make_plan(sites, weights, seen, policy, exceptions=exceptions, planned=planned)))
    return drafts


def _ranges(
    network: FloatNetwork,
    models: tuple[ir.Model, ir.Model],
    calib: CalibSet,
    policy: Policy,
    scratch: Path,
    tick: Tick,
) -> dict[str, TensorStats]:
    """Statistics of every edge that a plan for the plain or the smoothed graph may ask for: the smoothed one has all
    the plain one's edges, with the same values.
    """
    plain, smoothed = ([s for s in find_sites(m, network.inputs) if decide(s, policy)[0]] for m in models)
    edges = [site.input for site in smoothed]
    edges += [site.output for site in smoothed if site.op == "Conv"]
    edges += [site.input for site in plain]
    with probing(models[1], scratch) as probe:
        return observe(probe, counted(network, calib, tick), edges)


def _graphs(model: ir.Model, master: ir.Model, plan: QuantPlan) -> dict[str, ir.Model]:
    """The siblings of a master that InsertQDQ made from the plan, and the float twin."""
    return {**_siblings(master, plan), "unet-float.onnx": model}


def _siblings(master: ir.Model, plan: QuantPlan, suffix: str = "") -> dict[str, ir.Model]:
    """The forms of a master for every runtime, each held to its rules. suffix: tells networks of one bundle apart."""
    names = (f"unet{suffix}.onnx", f"unet{suffix}-trt.onnx", f"unet{suffix}-ort.onnx")
    verify(master, MASTER, plan=plan, name=names[0])
    half, ort = master.clone(), master.clone()
    ShiftZeroPoints()(half)
    HalfRemainder()(half)
    verify(half, TENSORRT, plan=plan, name=names[1])
    OrtSibling(plan)(ort)
    verify(ort, ONNXRUNTIME, plan=plan, name=names[2])
    return dict(zip(names, (master, half, ort), strict=True))

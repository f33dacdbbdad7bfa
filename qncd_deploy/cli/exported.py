"""What `qncd export` made, in words: layers, smoothing, rounding, corrections, quality; and the gates on it."""

from __future__ import annotations

from math import log10
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from qncd_deploy.cli.options import bits_line, bits_text, first_token_line, print_json
from qncd_deploy.errors import GateFailed
from qncd_deploy.evaluate.measure import graph_bytes

if TYPE_CHECKING:
    from qncd_deploy.pipeline.dry_run import DryRun
    from qncd_deploy.pipeline.export import Exported
    from qncd_deploy.pipeline.smoothing import Smoothing
    from qncd_deploy.pipeline.splitting import Splitting
    from qncd_deploy.pipeline.stepping import Steps
    from qncd_deploy.reconstruct.network import Reconstruction


def facts_of(exported: Exported) -> dict[str, Any]:
    manifest = exported.bundle.manifest
    layers = exported.bundle.plan["layers"]
    return {
        "bundle": str(exported.bundle.path),
        "up_to_date": exported.quantized is None,
        "layers": len(layers),
        "quantized": sum(layer["weight_bits"] is not None for layer in layers),
        "quality": dict(manifest.quality),
        "bytes": {name: facts.bytes for name, facts in sorted(manifest.files.items())},
    }


def show(exported: Exported, seconds: float, *, verbose: bool) -> None:
    bundle, manifest = exported.bundle, exported.bundle.manifest
    for note in exported.notes:
        click.echo(note)
    if exported.quantized is None:
        click.echo(f"{bundle.path}  up to date: same inputs, options and versions (--force makes it again)")
        return
    plan = exported.quantized.plan
    click.echo(f"layers      {len(plan.quantized)} of {len(plan)} quantized to {plan.format}; float:")
    reasons: dict[str, int] = {}
    for layer in plan:
        if verbose:
            error = f" {layer.sqnr_db} dB" if layer.quantized else ""
            bits = bits_text(layer.weight_bits, layer.act_bits)
            click.echo(f"            {layer.name}  {bits}{error}  {layer.reason}")
        if not layer.quantized:
            reasons[layer.reason] = reasons.get(layer.reason, 0) + 1
    for reason, count in reasons.items():
        click.echo(f"            {count:4d}  {reason}")
    if "bits" in manifest.quality:
        click.echo(f"bits        {bits_line(manifest.quality['bits'])}")
    if exported.quantized.first_tokens.exceptions:
        click.echo(f"first token {first_token_line(manifest.quality['first_token'])}")
    smoothing = exported.quantized.smoothing
    if smoothing.blocks or smoothing.linears:
        click.echo(f"smoothing   {smoothing_line(smoothing)}")
    elif not any(layer.act_bits for layer in plan.quantized):
        click.echo("activations stay float: nothing to calibrate, to smooth or to keep float for")
    elif manifest.recipe["--smooth"] != "off":
        click.echo("smoothing   nothing to smooth: no residual blocks with a time embedding, no Linears were found")
    if exported.quantized.splitting.errors:
        click.echo(f"split       {_splitting_line(exported.quantized.splitting)}")
    if (found := exported.quantized.reconstruction) is not None:
        click.echo(f"rounding    {_rounding_line(found)}")
    if exported.quantized.steps is not None:
        click.echo(f"step bits   {_steps_line(exported.quantized.steps)}")
    for engine, fitted in (exported.fitted or {}).items():
        figures = ", ".join(f"{method} {value:.4g}" for method, value in fitted.figures.items())
        why = f"held-out {fitted.objective}: {figures}" if figures else "asked for by name"
        click.echo(f"correction  {fitted.choice} on {engine} ({why})")
    quality = manifest.quality
    if "psnr_db" in quality:
        shift = "" if quality["shift"] is None else f", shift {quality['shift']:.2g}"
        psnr = "not measured" if quality["psnr_db"] is None else f"{quality['psnr_db']:.1f} dB"
        click.echo(f"quality     PSNR {psnr} to the float twin{shift} ({quality['pictures']} pictures)")
    if "output_sqnr_db" in quality:
        click.echo(f"quality     output {quality['output_sqnr_db']:.1f} dB over its error on the calibration data")
    click.echo(f"size        {_weights_mebibytes(exported)}")
    page = bundle.path / "report.html"
    click.echo(f"bundle      {bundle.path}  in {seconds:.0f} s" + (f"; look at {page}" if page.exists() else ""))


def smoothing_line(smoothing: Smoothing) -> str:
    groups = (("residual blocks", smoothing.blocks), ("inputs of Linears", smoothing.linears))
    gains, folded = [], []
    for what, decisions in groups:
        if decisions:
            gains.append(f"{sum(decision.kept for decision in decisions.values())} of {len(decisions)} {what}")
        if count := sum(name in decisions for name in smoothing.folded):
            folded.append(f"{count} {what}")
    parts = [f"{' and '.join(gains)} gain by themselves"]
    if smoothing.network_error is not None:
        before, after = smoothing.network_error
        parts.append(f"the network's output error goes from {before:.3g} to {after:.3g}")
    if smoothing.latent_snr_db is not None:
        before, after = smoothing.latent_snr_db
        parts.append(f"held-out pictures from {before:.1f} to {after:.1f} dB")
    verdict = f"folded into {' and '.join(folded)}" if folded else "refused"
    return f"{verdict}: {', '.join(parts)}"


def _splitting_line(splitting: Splitting) -> str:
    """How many, and the error of each that is split (of the best that is not), whole and in halves."""
    errors, split = splitting.errors, splitting.split
    shown = split or [min(errors, key=lambda name: errors[name].halves / errors[name].whole)]
    found = "; ".join(f"{name} {errors[name].whole:.2g} to {errors[name].halves:.2g}" for name in shown)
    return f"{len(split)} of {len(errors)} convolutions of skip concatenations; their relative error: {found}"


def _steps_line(steps: Steps) -> str:
    """The rule's choice and what it costs."""
    widest = max(steps.latent_snr_db)
    if steps.stepping is None:
        return f"refused: the rule gives every call {widest} bits"
    narrow = sum(steps.stepping.act_bits(call.t) < widest for call in steps.calls)
    whole = ", ".join(f"{value:.1f} with {bits} bits throughout" for bits, value in sorted(steps.latent_snr_db.items()))
    return (
        f"{steps.stepping.line()}: {narrow} of {len(steps.calls)} calls have fewer; "
        f"held-out pictures {steps.stepped_snr_db:.1f} dB ({whole})"
    )


def _rounding_line(found: Reconstruction) -> str:
    kept = [outcome for outcome in found.outcomes.values() if outcome.kept]
    iterations = sum(outcome.iterations for outcome in found.outcomes.values())
    parts = [f"learned in {len(kept)} of {len(found.outcomes)} blocks ({found.preset.name}, {iterations} iterations)"]
    if kept:
        gain = median(10 * log10(outcome.error_before / outcome.error_after) for outcome in kept)
        parts.append(f"their output error falls by {gain:.1f} dB (median)")
    if len(kept) < len(found.outcomes):
        parts.append("the others stay at the nearest level, where learning did not help")
    return ", ".join(parts)


def _weights_mebibytes(exported: Exported) -> str:
    """The graph that an engine runs with all its weights, quantized and float."""
    bundle = exported.bundle
    small, large = (graph_bytes(bundle.file(role)) / 2**20 for role in ("master", "float"))
    several = len(bundle.network_roles("master"))
    held = f" each for {several} engines, weights shared on disk alone" if several > 1 else ""
    return f"{small:.1f} MiB{held}, {large:.1f} MiB in float"


def check_gates(exported: Exported, psnr: float | None, shift: float | None) -> None:
    quality = exported.bundle.manifest.quality
    for flag, limit, key, met in (
        ("--require-psnr", psnr, "psnr_db", lambda value, limit: value >= limit),
        ("--require-shift-below", shift, "shift", lambda value, limit: value < limit),
    ):
        if limit is None:
            continue
        if quality.get(key) is None:
            raise GateFailed(f"{flag} {limit:g}: {key} was not measured for this bundle.")
        if not met(quality[key], limit):
            raise GateFailed(f"{flag} {limit:g}: measured {quality[key]:.4g} on {quality['pictures']} pictures.")


def show_dry_run(found: DryRun, *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_json())
        return
    for line in found.lines():
        click.echo(line)

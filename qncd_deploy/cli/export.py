"""qncd export: from a checkpoint to a bundle, in one command."""

from __future__ import annotations

import importlib.util
import shlex
import time
from math import log10
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from qncd_deploy.cli.options import PATH, Numbers, Size, bits_line, bits_text, json_option, print_json
from qncd_deploy.cli.progress import Bars
from qncd_deploy.errors import BackendMissing, GateFailed
from qncd_deploy.evaluate.contest import OBJECTIVES
from qncd_deploy.evaluate.measure import graph_bytes
from qncd_deploy.pipeline.options import (
    ASYMMETRIC,
    CALIB_METHODS,
    CORRECTIONS,
    FORMATS,
    LEARNING_PICTURES,
    RANGES_PICTURES,
    RECONSTRUCTION,
    SMOOTHING,
    SPLITTING,
    ExportOptions,
)
from qncd_deploy.quant.policy import BLOCK_SIZE, BLOCK_SIZES
from qncd_deploy.schedule import SCHEDULERS, SPACINGS

if TYPE_CHECKING:
    from qncd_deploy.pipeline.export import Exported
    from qncd_deploy.pipeline.smoothing import Smoothing
    from qncd_deploy.pipeline.splitting import Splitting
    from qncd_deploy.pipeline.stepping import Steps
    from qncd_deploy.reconstruct.network import Reconstruction

DEFAULTS = ExportOptions(Path("model.ckpt"))

QUANT_LEVELS = {"1": 1, "2": 2, "2.5": 2.5, "3": 3}


@click.command("export")
@click.argument("checkpoint", type=PATH)
@click.option("--int8", "int8", is_flag=True, help="8-bit weights and activations: --format w8a8.")
@click.option("--int4", "int4", is_flag=True, help="4-bit weights and 8-bit activations: --format w4a8.")
@click.option(
    "--format",
    "format",
    type=click.Choice(FORMATS),
    help="Bits of weights and activations. w8a8: 8-bit integers, weights and arithmetic. w4a8: 4-bit levels in 8-bit "
    "integers, so speed and size are those of w8a8 on every engine; files compress to half. w4a6, w4a4: likewise, to "
    "study quality. w4a16: smaller, not faster: weights of Linears packed in 4 bits, of convolutions in 8, arithmetic "
    "in float, no calibration. fp16: nothing is quantized, the baseline.  [default: w8a8]",
)
@click.option(
    "--block-size",
    type=click.Choice([str(size) for size in BLOCK_SIZES]),
    callback=lambda _context, _parameter, size: size and int(size),
    help="Weights that share a scale in w4a16: fewer are more exact and larger. A Linear that it does not divide takes "
    f"the next smaller one, or 8 bits per output channel.  [default: {BLOCK_SIZE}]",
)
@click.option(
    "--config",
    type=PATH,
    help="YAML of a CompVis checkpoint, or scheduler_config.json for an .onnx graph.  "
    "[default: config.yaml beside the checkpoint, else <stem>.yaml]",
)
@click.option("--name", help="Name of the bundle.  [default: the checkpoint's folder or stem]")
@click.option("--calib-dir", type=PATH, default=DEFAULTS.calib_dir, help="Where calibration sets are kept.")
@click.option("--onnx-dir", type=PATH, default=DEFAULTS.onnx_dir, help="Where the bundle is written.")
@click.option("--scheduler", type=click.Choice(SCHEDULERS), help="Sampler.  [default: the folder's own, else ddim]")
@click.option("--n-steps", type=int, default=DEFAULTS.n_steps, help="Sampling steps.")
@click.option("--eta", type=float, default=DEFAULTS.eta, help="Noise of ddim, 0 to 1.")
@click.option(
    "--timestep-spacing",
    type=click.Choice(SPACINGS),
    help="How the steps are spread over the training timesteps; quad has more of them where there is little noise.  "
    "[default: the folder's own, else leading]",
)
@click.option(
    "--guidance-scale",
    type=float,
    help="Classifier-free guidance, 1 is off.  [default: 7.5 for prompts, 1.5 with a null class, else 1; 1 for models "
    "distilled to few steps]",
)
@click.option("--null-class", type=int, help="The class that stands for no class, where the config does not say.")
@click.option(
    "--prompts-file",
    type=PATH,
    help="Prompts that calibrate a text model, one a line; the bundle's own from then on.  [default: 32 captions that "
    "come with the package]",
)
@click.option("--height", type=int, help="Of the pictures, in pixels.  [default: the model's own]")
@click.option("--width", type=int, help="Of the pictures, in pixels.  [default: the model's own]")
@click.option(
    "--calib-size",
    type=int,
    help=f"Pictures whose trajectories calibrate.  [default: {RANGES_PICTURES}, {LEARNING_PICTURES} where rounding is "
    "learned]",
)
@click.option("--calib-steps", type=int, default=DEFAULTS.calib_steps, help="Network calls recorded of each picture.")
@click.option(
    "--calib-method",
    type=click.Choice(CALIB_METHODS),
    default=DEFAULTS.calib_method,
    help="Activation ranges: mse takes the range of least error.",
)
@click.option(
    "--percentile", type=float, default=DEFAULTS.percentile, help="Share of |x| kept, for --calib-method percentile."
)
@click.option(
    "--asymmetric",
    type=click.Choice(ASYMMETRIC),
    default=DEFAULTS.asymmetric,
    help="Put the levels where the values are instead of as many on either side of zero, where the error falls. auto: "
    "below 8 bits, where it costs nothing; all: 8-bit activations too, which costs TensorRT an op each.",
)
@click.option("--calib-data", type=PATH, help="Your own inputs: a .npz, one array per graph input.")
@click.option(
    "--quant-level",
    type=click.Choice(list(QUANT_LEVELS)),
    default="3",
    help="1: convolutions; 2: and feed-forward Linears; 2.5: and q, k, v projections; 3: all weighted Linears.",
)
@click.option(
    "--keep-float",
    type=float,
    default=DEFAULTS.keep_float,
    metavar="PERCENT",
    help="Share of the arithmetic that may stay float where rounding costs the output most; up to 10 while the "
    "predicted error is large; 0 quantizes all.",
)
@click.option(
    "--avg-bits",
    type=float,
    metavar="BITS",
    help="Budget of a w4 format: 4 or 8 bits or float for each layer's weights, so that they take this many on average "
    "(float counts 16) and the output suffers least, as predicted from one backward pass. Activations keep the "
    "format's bits.",
)
@click.option(
    "--max-size",
    type=Size(),
    metavar="SIZE",
    help="The same budget as a size, like 12MB: of the layers to quantize, weights packed to their bits with 4 bytes a "
    "scale, float weights in 2 bytes. Files and engines hold 4 bits in a whole byte.",
)
@click.option(
    "--step-bits",
    type=Numbers(),
    default=DEFAULTS.step_bits,
    show_default=False,
    metavar="BITS,BITS",
    help="Bits of activations to choose from by timestep, as PTQD does: 4,8 gives noisy calls 4 bits where its rule "
    "allows, at INT8 speed. Each width is one more engine, with weights of its own in memory.  [default: the format's]",
)
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave weights in float whose names match. Repeatable.")
@click.option("--include", multiple=True, metavar="REGEX", help="Quantize weights whose names match. Repeatable.")
@click.option(
    "--split",
    type=click.Choice(SPLITTING),
    default=DEFAULTS.split,
    help="Quantize the shortcut convolutions of skip concatenations half by half (Q-Diffusion), in one more kernel "
    "each: auto below 8 bits where the held-out error falls by a tenth or more, shortcut everywhere as published; all "
    "splits the blocks' main convolutions as well.",
)
@click.option(
    "--smooth",
    type=click.Choice(SMOOTHING),
    default=DEFAULTS.smooth,
    help="Smoothing of residual blocks; with qncd and smoothquant, Linears get SmoothQuant's, and everything is kept "
    "only where the held-out error falls; qncd:paper is as published.",
)
@click.option("--alpha", type=float, help="Share of a range that moves into the weight.  [default: the best of a few]")
@click.option(
    "--recon",
    type=click.Choice(RECONSTRUCTION),
    default=DEFAULTS.recon,
    help="Learn the rounding of weights block by block: fast, at most 150 iterations a block, or paper, Q-Diffusion's "
    "25,000; auto is fast below 8 bits, else off.",
)
@click.option(
    "--correction",
    type=click.Choice(CORRECTIONS),
    default=DEFAULTS.correction,
    help="Correction of the sampling loop; auto fits all and keeps one only if held-out pictures get better.",
)
@click.option("--objective", type=click.Choice(OBJECTIVES), default=DEFAULTS.objective, help="What auto chooses by.")
@click.option(
    "--fit-size",
    type=int,
    default=DEFAULTS.fit_size,
    help="Pictures to fit corrections on; auto chooses on as many others, and confirms on twice as many.",
)
@click.option("--eval-size", type=int, default=DEFAULTS.eval_size, help="Pictures that the figures are measured on.")
@click.option("--seed", type=int, default=DEFAULTS.seed, help="Of calibration, fits and figures.")
@click.option("--resume/--no-resume", default=True, help="Go on from what a killed run recorded.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--require-psnr", type=float, metavar="DB", help="Exit code 3 if the pictures are less faithful.")
@click.option("--require-shift-below", type=float, metavar="X", help="Exit code 3 if the distribution shifts this far.")
@click.option("--dry-run", is_flag=True, help="Show what would be quantized, and stop.")
@json_option
@click.option("-v", "--verbose", is_flag=True, help="List every layer.")
def export_command(**given: Any) -> None:
    """Make a bundle: calibrate, smooth, quantize, export, correct and prove.

    CHECKPOINT is a CompVis .ckpt or .safetensors with its YAML, one of Stable Diffusion (1, 2, XL) with its tokenizer/
    beside it, a DDPM checkpoint as the CIFAR-10 scripts of the papers load it, a diffusers folder, or a float .onnx
    graph.
    """
    names = ("int8", "int4", "dry_run", "as_json", "verbose", "require_psnr", "require_shift_below")
    flags = {key: given.pop(key) for key in names}
    given["format"] = _format(given["format"], int8=flags["int8"], int4=flags["int4"])
    options = ExportOptions(**{**given, "quant_level": QUANT_LEVELS[given["quant_level"]]})
    _need_export_extra()
    started = time.perf_counter()
    if flags["dry_run"]:
        from qncd_deploy.pipeline.dry_run import dry_run

        _show_dry_run(dry_run(options), as_json=flags["as_json"])
        return
    from qncd_deploy.pipeline.export import export

    exported = export(options, Bars(), command=_command_line())
    if flags["as_json"]:
        print_json(_facts(exported))
    else:
        _show(exported, time.perf_counter() - started, verbose=flags["verbose"])
    _check_gates(exported, flags["require_psnr"], flags["require_shift_below"])


def _format(named: str | None, *, int8: bool, int4: bool) -> str:
    """What --format and its short forms agree on. Raises click.UsageError if they do not."""
    asked = {
        **({"--int8": "w8a8"} if int8 else {}),
        **({"--int4": "w4a8"} if int4 else {}),
        **({f"--format {named}": named} if named else {}),
    }
    if len(set(asked.values())) > 1:
        (first, meant), *_, (other, _) = asked.items()
        raise click.UsageError(f"{first} is --format {meant}, and {other} was given too.")
    return next(iter(asked.values()), DEFAULTS.format)


def _need_export_extra() -> None:
    for library in ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "scipy"):
        if importlib.util.find_spec(library) is None:
            raise BackendMissing(
                f"export: the library {library} is not installed; sampling does not need it, exporting does. "
                'Run `pip install -c constraints.txt -e ".[export,cpu,report]"`.'
            )


def _command_line() -> str:
    context = click.get_current_context()
    parts = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if context.get_parameter_source(parameter.name or "") == click.core.ParameterSource.DEFAULT or value is None:
            continue
        if not isinstance(parameter, click.Option):
            parts.append(str(value))
        elif parameter.is_flag:
            parts.append(parameter.opts[0])
        else:
            for each in value if parameter.multiple else (value,):
                parts += [parameter.opts[0], str(each)]
    return shlex.join(["qncd-export", *parts])


def _facts(exported: Exported) -> dict[str, Any]:
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


def _show(exported: Exported, seconds: float, *, verbose: bool) -> None:
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
    smoothing = exported.quantized.smoothing
    if smoothing.blocks or smoothing.linears:
        click.echo(f"smoothing   {_smoothing_line(smoothing)}")
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
        click.echo(f"correction  {fitted.choice} on {engine} (held-out {fitted.objective}: {figures})")
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


def _smoothing_line(smoothing: Smoothing) -> str:
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


def _check_gates(exported: Exported, psnr: float | None, shift: float | None) -> None:
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


def _show_dry_run(found: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_json())
        return
    for line in found.lines():
        click.echo(line)

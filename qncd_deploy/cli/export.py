"""qncd export: from a checkpoint to a bundle, in one command."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from qncd_deploy.cli.exported import check_gates, facts_of, show, show_dry_run
from qncd_deploy.cli.options import PATH, NumberOr, Numbers, Size, json_option, print_json, typed_command
from qncd_deploy.cli.progress import Bars
from qncd_deploy.errors import BackendMissing
from qncd_deploy.evaluate.contest import OBJECTIVES
from qncd_deploy.models.hub import fetch_from_hub, hub_name
from qncd_deploy.pipeline.options import (
    ASYMMETRIC,
    AVERAGE_BITS,
    CALIB_METHODS,
    CORRECTIONS,
    FIRST_TOKEN,
    FORMATS,
    LEARNING_PICTURES,
    LEAST_PICTURES,
    RANGES_PICTURES,
    RECONSTRUCTION,
    SMOOTHING,
    SPARE_BITS,
    SPLITTING,
    ExportOptions,
)
from qncd_deploy.pipeline.recipes import RECIPES
from qncd_deploy.quant.policy import BLOCK_SIZE, BLOCK_SIZES, WEIGHT_METHODS
from qncd_deploy.schedule import SCHEDULERS, SPACINGS

DEFAULTS = ExportOptions(Path("model.ckpt"))

QUANT_LEVELS = {"1": 1, "2": 2, "2.5": 2.5, "3": 3}


@click.command("export")
@click.argument("checkpoint", type=PATH, required=False)
@click.option(
    "--from-hub",
    metavar="ORG/NAME",
    help="Download this diffusers model from the Hugging Face Hub, in place of a CHECKPOINT: its configs and weights "
    "once, in one format. Nothing is ever downloaded otherwise.",
)
@click.option("--int8", "int8", is_flag=True, help="8-bit weights and activations: --format w8a8.")
@click.option(
    "--int4",
    "int4",
    is_flag=True,
    help="4-bit weights, the few that matter most in 8 (--avg-bits), and 8-bit activations: --format w4a8.",
)
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
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    help="Set options as a paper published them; any that is given beside it wins. `qncd inspect --recipe NAME` shows "
    "which, and where each was read.",
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
    "--weight-method",
    type=click.Choice(WEIGHT_METHODS),
    default=DEFAULTS.weight_method,
    help="Weight ranges, by output channel: mse takes those of least squared error, lp2.4 of least |error|^2.4, as "
    "Q-Diffusion does, minmax all of the weights.",
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
    "--first-token",
    type=click.Choice(FIRST_TOKEN),
    default=DEFAULTS.first_token,
    help="auto: the layers that make keys and values of the text stay float where its first token is so large that one "
    "range for all tokens more than doubles their error (MixDQ); off quantizes them.",
)
@click.option(
    "--avg-bits",
    type=NumberOr(*AVERAGE_BITS),
    metavar="auto|off|BITS",
    default=DEFAULTS.avg_bits,
    help="Budget of a w4 format: 4 or 8 bits or float for each layer's weights, so that they take this many on average "
    "(float counts 16) and the output suffers least, as predicted from one backward pass. auto: "
    f"{4 + SPARE_BITS:g}; off: 4 everywhere but where --keep-float says float. Activations keep the "
    "format's bits.",
)
@click.option(
    "--max-size",
    type=Size(),
    metavar="SIZE",
    help="The budget as a size instead, like 12MB: of the layers to quantize, weights packed to their bits with 4 "
    "bytes a scale, float weights in 2 bytes. Files and engines hold 4 bits in a whole byte.",
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
    "25,000; auto is fast below 8 bits where there are rows enough and the graph allows it, else off.",
)
@click.option(
    "--correction",
    type=click.Choice(CORRECTIONS),
    default=DEFAULTS.correction,
    help="Correction of the sampling loop; auto fits all and keeps one only if held-out pictures get better, one "
    "that is named is fitted alone and taken untried.",
)
@click.option("--objective", type=click.Choice(OBJECTIVES), default=DEFAULTS.objective, help="What auto chooses by.")
@click.option(
    "--fit-size",
    type=int,
    default=DEFAULTS.fit_size,
    help="Pictures to fit corrections on, and others to judge smoothing and --step-bits by; --correction auto chooses "
    f"on as many again, {LEAST_PICTURES} or more, and confirms on twice as many.",
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

    It computes on the GPU where torch finds a CUDA device, else on the CPU engines of this machine;
    CUDA_VISIBLE_DEVICES= hides the GPU.
    """
    names = ("int8", "int4", "dry_run", "as_json", "verbose", "require_psnr", "require_shift_below")
    flags = {key: given.pop(key) for key in names}
    asked = _format(given["format"], int8=flags["int8"], int4=flags["int4"])
    given |= {"format": asked or DEFAULTS.format, "quant_level": QUANT_LEVELS[given["quant_level"]]}
    if ((hub_id := given.pop("from_hub")) is None) == (given["checkpoint"] is None):
        raise click.UsageError("expected a CHECKPOINT or --from-hub ORG/NAME, one of the two.")
    if hub_id is not None:
        given |= {"checkpoint": Path(hub_id), "name": given["name"] or hub_name(hub_id)}
    options = ExportOptions(**given | _of_recipe(given["recipe"], format_asked=asked is not None))
    _need_export_extra()
    if hub_id is not None:
        options = replace(options, checkpoint=fetch_from_hub(hub_id))
    started = time.perf_counter()
    if flags["dry_run"]:
        from qncd_deploy.pipeline.dry_run import dry_run

        show_dry_run(dry_run(options), as_json=flags["as_json"])
        return
    from qncd_deploy.pipeline.export import export

    exported = export(options, Bars(), command=typed_command())
    if flags["as_json"]:
        print_json(facts_of(exported))
    else:
        show(exported, time.perf_counter() - started, verbose=flags["verbose"])
    check_gates(exported, flags["require_psnr"], flags["require_shift_below"])


def _format(named: str | None, *, int8: bool, int4: bool) -> str | None:
    """What --format and its short forms agree on, None without any. Raises click.UsageError if they do not."""
    asked = {
        **({"--int8": "w8a8"} if int8 else {}),
        **({"--int4": "w4a8"} if int4 else {}),
        **({f"--format {named}": named} if named else {}),
    }
    if len(set(asked.values())) > 1:
        (first, meant), *_, (other, _) = asked.items()
        raise click.UsageError(f"{first} is --format {meant}, and {other} was given too.")
    return next(iter(asked.values()), None)


def _of_recipe(name: str | None, *, format_asked: bool) -> dict[str, Any]:
    """What a recipe sets, but for what was given beside it."""
    if name is None:
        return {}
    source_of = click.get_current_context().get_parameter_source
    left_open = (None, click.core.ParameterSource.DEFAULT)
    options = {key: value for key, value in RECIPES[name].options.items() if source_of(key) in left_open}
    return {key: value for key, value in options.items() if key != "format" or not format_asked}


def _need_export_extra() -> None:
    for library in ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "scipy"):
        if importlib.util.find_spec(library) is None:
            raise BackendMissing(
                f"export: the library {library} is not installed; sampling does not need it, exporting does. "
                'Run `pip install -c constraints.txt -e ".[export,cpu,report]"`.'
            )

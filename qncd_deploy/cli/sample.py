"""qncd fit, sample: what runs a bundle; none of it needs torch, diffusers or onnx."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from qncd_deploy.cli.options import (
    PATH,
    backend_option,
    batch_size_option,
    bundle_argument,
    class_label_option,
    compiled_blobs,
    effort_options,
    engine_dir_option,
    fitted_tables,
    json_option,
    print_json,
    prompt_options,
    remainder_option,
    sampling_options,
    size_options,
    threads_option,
    with_effort,
)
from qncd_deploy.cli.progress import Bars
from qncd_deploy.correct.fitting import State
from qncd_deploy.correct.methods import METHODS
from qncd_deploy.engines.base import Remainder, default_backend, make_engine_id
from qncd_deploy.evaluate.batches import Draw
from qncd_deploy.evaluate.contest import OBJECTIVES
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.pictures import check_output, save_batches
from qncd_deploy.pipeline.fit import FitOptions, fit_into
from qncd_deploy.runtime import Bundle, Sampling
from qncd_deploy.specs import SIDES
from qncd_deploy.subjects import check_prompts, parse_labels


@click.command("sample")
@bundle_argument
@click.option(
    "-n", "count", type=click.IntRange(1), help="How many pictures.  [default: 16, or one for every prompt given]"
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Picture i depends on (seed, i) alone.")
@class_label_option
@prompt_options
@click.option(
    "--negative-prompt",
    metavar="TEXT",
    help='What guidance leads away from.  [default: "", or zeros for a network that is made for these]',
)
@size_options
@sampling_options
@backend_option
@click.option("--float", "float_twin", is_flag=True, help="The float network instead, in float32.")
@click.option(
    "--correction",
    default="auto",
    help=f"auto (what was chosen on held-out pictures), off, or a fitted method: {', '.join(METHODS)}.",
)
@remainder_option
@batch_size_option
@threads_option
@click.option("--vae-slicing", is_flag=True, help="Decode one picture at a time, which needs less memory.")
@click.option(
    "--vae-tiling",
    is_flag=True,
    help="Decode in tiles that overlap: less memory still, more arithmetic, and pictures that differ a little. For "
    "bundles exported for pictures of 512 pixels a side or more.",
)
@engine_dir_option
@click.option(
    "-o",
    "--output",
    "out",
    type=PATH,
    default=Path("grid.png"),
    help="A .png (one grid), a .npz (images, latents, labels, prompts) or an existing folder (one PNG each, written "
    "batch by batch).",
)
@json_option
def sample_command(
    bundle: Path,
    count: int | None,
    seed: int,
    class_label: str | None,
    prompts: tuple[str, ...] | None,
    negative_prompt: str | None,
    height: int | None,
    width: int | None,
    sampling: Sampling,
    backend: str | None,
    float_twin: bool,
    correction: str,
    remainder: Remainder | None,
    batch_size: int | None,
    threads: int | None,
    vae_slicing: bool,
    vae_tiling: bool,
    engine_dir: Path,
    out: Path,
    as_json: bool,
) -> None:
    """Draw pictures with a bundle.

    Without --prompt, the bundle's own prompts take turns, if it is one of text; without --class-label, classes do.
    """
    opened = Bundle.open(bundle).at_size(height, width)
    model = opened.manifest.model
    check_output(out, images=model.picture_shape is not None)
    labels = None if class_label is None else parse_labels(class_label, model.condition)
    asked = prompts is not None or negative_prompt is not None
    if asked:
        scale = opened.guidance(sampling.guidance_scale)
        check_prompts(model.condition, scale, prompts=prompts, negative_prompt=negative_prompt)
    count = count or (16 if prompts is None else len(prompts))
    backend = backend or default_backend()
    engine_id = make_engine_id(backend, "f32" if float_twin else remainder)
    network = "float" if float_twin else opened.manifest.format
    variant = Variant(
        network,
        backend,
        correction,
        float_twin=float_twin,
        remainder=remainder,
        tables=tuple(fitted_tables(engine_dir, bundle)),
        blobs=() if float_twin else tuple(compiled_blobs(engine_dir, bundle, engine_id)),
        vae_slicing=vae_slicing,
        vae_tiling=vae_tiling,
    )
    draw = Draw(count, seed=seed, labels=labels, sampling=sampling, batch_size=batch_size, threads=threads)
    extra_calls = 0
    with ExitStack() as stack:
        sampler = stack.enter_context(variant.open(opened, draw))
        if asked:
            sampler = sampler.prompted(prompts, negative_prompt)
        tick = stack.enter_context(Bars().stage("sampling"))
        steps, done = len(sampler.steps), 0

        def count_call(state: State) -> None:
            nonlocal done, extra_calls
            done += len(state.x)
            extra_calls = max(extra_calls, state.extra_calls)
            tick(done, count * steps)

        pictures = save_batches(out, sampler.batches(count, labels=labels, seed=seed, on_state=count_call))
        facts = {
            "output": str(out),
            "pictures": pictures,
            **dict(zip(SIDES, model.sides or (None, None), strict=True)),
            "seed": seed,
            "engine": engine_id,
            "network": network,
            "correction": sampler.table.method,
            "network_calls": steps + extra_calls,
            "extra_calls": extra_calls,
        }
        if sampler.network.text is not None:
            facts["prompts"] = list(sampler.network.text.prompts[:pictures])
    if as_json:
        print_json(facts)
    else:
        more = f" (+{extra_calls} for {facts['correction']})" if extra_calls else ""
        click.echo(
            f"{out}  {pictures} pictures, {facts['network']} on {engine_id}, correction {facts['correction']}, "
            f"{steps} network calls{more}"
        )


@click.command("fit")
@bundle_argument
@size_options
@sampling_options
@backend_option
@remainder_option
@click.option("--objective", type=click.Choice(OBJECTIVES), default="shift", help="What auto chooses by.")
@click.option(
    "--fit-size",
    type=click.IntRange(2),
    default=32,
    help="Pictures to fit on; the choice is made on as many others, and confirmed on twice as many.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the pictures to fit and to choose on.")
@threads_option
@effort_options
@engine_dir_option
@json_option
def fit_command(
    bundle: Path,
    height: int | None,
    width: int | None,
    sampling: Sampling,
    backend: str | None,
    remainder: Remainder | None,
    objective: str,
    fit_size: int,
    seed: int,
    threads: int | None,
    level: int | None,
    workspace_mib: int | None,
    engine_dir: Path,
    as_json: bool,
) -> None:
    """Fit correction tables for one engine, schedule and size of pictures, and choose among them on held-out pictures.

    The tables go to ENGINE_DIR/NAME-FORMAT/, where `qncd sample` looks before the bundle's own; how they were chosen
    is kept with them, for `qncd inspect` and the page of `qncd eval -o FOLDER`.
    """
    backend = backend or default_backend()
    opened = with_effort(Bundle.open(bundle).at_size(height, width), [backend], level, workspace_mib, engine_dir)
    options = FitOptions(
        backend,
        remainder=remainder,
        sampling=sampling,
        objective=objective,
        size=fit_size,
        seed=seed,
        threads=threads,
        blobs=tuple(compiled_blobs(engine_dir, bundle, make_engine_id(backend, remainder))),
    )
    with Bars().stage("fitting") as tick:
        path, fitted = fit_into(engine_dir / bundle.resolve().name, opened, options, tick)
    if as_json:
        print_json({"output": str(path), **fitted.to_json()})
        return
    click.echo(f"{path}  auto takes {fitted.line()}")

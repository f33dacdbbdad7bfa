"""qncd build: compile a bundle's networks, here or ahead of time; none of it needs torch, diffusers or onnx."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import click

from qncd_deploy.cli.options import (
    Numbers,
    backend_option,
    bundle_argument,
    effort_options,
    engine_dir_option,
    json_option,
    print_json,
    remainder_option,
    threads_option,
    together,
)
from qncd_deploy.cli.progress import Bars
from qncd_deploy.engines.base import Remainder, default_backend
from qncd_deploy.engines.trt.options import TARGETS, Hardware
from qncd_deploy.pipeline.build import BuildRequest, build, trtexec_lines
from qncd_deploy.pipeline.fit import FitOptions, fit_into, is_fitted
from qncd_deploy.runtime import Bundle
from qncd_deploy.specs import pixels


class _Targets(click.ParamType):
    """smNN,smNN,... as a tuple; which of them there are is for the library to say."""

    name = "smNN,smNN,..."

    def convert(
        self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(dict.fromkeys(value.lower().split(",")))


class _Sizes(click.ParamType):
    """WxH,WxH,... as a tuple of (height, width)."""

    name = "WxH,WxH,..."

    def convert(
        self,
        value: str | tuple[tuple[int, int], ...],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[tuple[int, int], ...]:
        if isinstance(value, tuple):
            return value
        parts = [re.fullmatch(r"(\d+)x(\d+)", part) for part in value.lower().split(",")]
        if not all(parts):
            self.fail(f"{value!r}: expected sizes such as 768x512, width first, with commas.", param, ctx)
        return tuple((int(part[2]), int(part[1])) for part in parts if part is not None)


_tensorrt_options = together(
    effort_options,
    click.option(
        "--target",
        "targets",
        type=_Targets(),
        default=(),
        show_default=False,
        help=f"tensorrt-rtx: GPUs to build for, of {', '.join(TARGETS)}; none needs to be here.  [default: this GPU's]",
    ),
    click.option(
        "--hardware-compatibility",
        "hardware",
        type=click.Choice(["none", "ampere-plus", "same-compute-capability"]),
        default="none",
        help="tensorrt: which other GPUs the engine is to run on, more slowly.",
    ),
    click.option(
        "--version-compatible", is_flag=True, help="tensorrt: the engine is to run in later versions, more slowly."
    ),
    click.option(
        "--trtexec", is_flag=True, help="TensorRT: print the vendor's commands for the same engines, build nothing."
    ),
)


@click.command("build")
@bundle_argument
@backend_option
@remainder_option
@click.option(
    "--batch",
    "--batch-size",
    "batches",
    type=Numbers(),
    default=(),
    show_default=False,
    help="Pictures at a time; several are profiles of one TensorRT engine.  [default: as `qncd sample`]",
)
@click.option(
    "--sizes",
    type=_Sizes(),
    default=(),
    show_default=False,
    help="Of pictures, in pixels, width first, for bundles that draw any size; several are profiles of one TensorRT "
    "engine, which is fitted and checked for each.  [default: the bundle's own]",
)
@_tensorrt_options
@click.option(
    "--fit/--no-fit",
    default=True,
    help="TensorRT: fit correction tables for an engine of this GPU that is new or has none, as `qncd fit`.",
)
@click.option(
    "--check/--no-check",
    default=True,
    help="TensorRT: hold a new engine of this GPU against the float network before it is used, and fit.",
)
@threads_option
@engine_dir_option
@json_option
def build_command(
    bundle: Path,
    backend: str | None,
    remainder: Remainder | None,
    batches: tuple[int, ...],
    sizes: tuple[tuple[int, int], ...],
    targets: tuple[str, ...],
    level: int | None,
    workspace_mib: int | None,
    hardware: Hardware,
    version_compatible: bool,
    trtexec: bool,
    fit: bool,
    check: bool,
    threads: int | None,
    engine_dir: Path,
    as_json: bool,
) -> None:
    """Compile a bundle's networks, so that `qncd sample` starts at once.

    openvino: for this machine. tensorrt: for this machine's GPU. tensorrt-rtx: for GPUs named with --target, without
    having one. A second build with nothing changed does nothing.
    """
    opened = Bundle.open(bundle)
    folder = engine_dir / bundle.resolve().name
    request = BuildRequest(
        backend or default_backend(),
        remainder=remainder,
        batches=tuple(dict.fromkeys(batches)),
        sizes=sizes,
        threads=threads,
        targets=targets,
        level=level,
        workspace=None if workspace_mib is None else workspace_mib << 20,
        hardware=hardware,
        version_compatible=version_compatible,
        check=check,
    )
    if trtexec:
        lines = trtexec_lines(opened, folder, request)
        if as_json:
            print_json({"commands": lines})
        else:
            click.echo("\n".join(lines))
        return
    engines = build(opened, folder, request, Bars())
    options = FitOptions(
        request.backend,
        remainder=remainder,
        batch_size=max(request.batches, default=None),
        blobs=tuple(engine.path for engine in engines),
    )
    new = any(engine.seconds is not None for engine in engines)
    tables, choices = None, []
    for sized in request.sized(replace(opened, effort=request.effort(folder))):
        if fit and engines[0].here and (new or not is_fitted(folder, sized, options)):
            with Bars().stage("fitting") as tick:
                tables, fitted = fit_into(folder, sized, options, tick)
            size = "" if sized.sides is None else f" for {pixels(sized.sides)}"
            choices.append(f"{tables}  auto = {fitted.choice}{size}")
    if as_json:
        every = [engine.to_json() for engine in engines]
        print_json({**every[0], "engines": every, "corrections": None if tables is None else str(tables)})
        return
    for engine in engines:
        click.echo(engine.line())
        if engine.parity is not None:
            click.echo(f"  {engine.parity.line()}")
        if engine.unchecked is not None:
            click.echo(f"  not held against the float network: {engine.unchecked}")
        for layer in engine.missed:
            click.echo(f"  planned quantized, but runs otherwise: {layer}")
    for line in choices:
        click.echo(line)

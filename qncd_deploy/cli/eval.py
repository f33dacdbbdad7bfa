"""qncd eval: what a bundle and its corrections do to the pictures, measured against the float twin."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from qncd_deploy.cli.options import (
    PATH,
    backend_option,
    batch_size_option,
    bundle_argument,
    class_label_option,
    compiled_blobs,
    engine_dir_option,
    fitted_tables,
    json_option,
    print_json,
    remainder_option,
    results_option,
    sampling_options,
    size_options,
    threads_option,
    typed_command,
)
from qncd_deploy.cli.progress import Bars
from qncd_deploy.engines.base import default_backend, make_engine_id
from qncd_deploy.errors import GateFailed, UsageError
from qncd_deploy.evaluate.batches import Draw
from qncd_deploy.evaluate.judge import Figures
from qncd_deploy.evaluate.on_data import compare_on_data
from qncd_deploy.evaluate.table import comparison_table
from qncd_deploy.pipeline.evaluation import EvalOptions, evaluated, evaluation_json
from qncd_deploy.pipeline.results import check_output, write_json, write_results
from qncd_deploy.runtime import Bundle
from qncd_deploy.subjects import parse_labels

_WITH_DATA = ("bundle", "data", "backend", "remainder", "threads", "seed", "out", "as_json")
JSON = "eval.json"
_PLAIN_WIDTH = 240  # where there is no terminal


@click.command("eval")
@bundle_argument
@click.option("-n", "--eval-size", "count", type=click.IntRange(2), default=500, help="Pictures. FID wants thousands.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the pictures.")
@click.option("--first", type=click.IntRange(0), default=0, metavar="K", help="Number of the first picture.")
@class_label_option
@size_options
@sampling_options
@backend_option
@remainder_option
@click.option(
    "--correction",
    "corrections",
    multiple=True,
    metavar="C",
    help="auto, off, a fitted method, or all: every one that was fitted for this way to sample. Repeatable; the gates "
    "are about the first.  [default: auto, off]",
)
@batch_size_option
@click.option(
    "--features",
    type=PATH,
    metavar="FILE.onnx",
    help="Feature network: pictures (n, C, H, W) in [-1, 1] to `features`, optionally `logits` and `spatial`, which "
    "sFID is measured with. Inception's, for published figures.  [default: the bundle's]",
)
@click.option(
    "--features-reference",
    type=PATH,
    metavar="FILE.npz",
    help="What it makes of real pictures: `mean` and `cov`, or `features`, which precision and recall need too; "
    "`spatial_mean` and `spatial_cov` for sFID.  [default: the bundle's, with the bundle's network]",
)
@click.option(
    "--data",
    type=PATH,
    metavar="FILE.npz",
    help="Compare the networks' outputs on these inputs instead: arrays named as the graph's inputs, first axis = "
    "samples. For bundles without a schedule.",
)
@click.option(
    "--workers",
    type=click.Choice(["ray"]),
    help="Spread the batches over processes with Ray, --threads CPUs each (1 by default).  [default: this process]",
)
@click.option("--ray-address", metavar="HOST:PORT", help="A running Ray cluster.  [default: processes of this machine]")
@click.option(
    "--work",
    type=PATH,
    help="Where batches lie until the evaluation is done, so that an interrupted one goes on.  "
    "[default: ENGINE_DIR/NAME-FORMAT/eval]",
)
@click.option("--keep", is_flag=True, help="Leave them there: a larger evaluation or another method then starts there.")
@threads_option
@engine_dir_option
@results_option(JSON)
@click.option("--require-psnr", type=float, metavar="DB", help="Exit code 3 if the pictures are less faithful.")
@click.option("--require-shift-below", type=float, metavar="X", help="Exit code 3 if the distribution shifts this far.")
@json_option
@click.pass_context
def eval_command(context: click.Context, /, bundle: Path, as_json: bool, **flags: Any) -> None:
    """Measure what quantization and its corrections do to the pictures, against the float twin's of the same seeds.

    A bundle without a schedule is measured by its outputs, with --data.
    """
    if flags["out"] is not None:
        check_output(flags["out"])
    opened = Bundle.open(bundle)
    if flags["data"] is not None:
        _refuse_sampling_options(context)
        _on_data(opened, flags, as_json)
        return
    opened = opened.at_size(flags["height"], flags["width"])
    options = _options(opened, bundle, flags)
    with Bars().stage("evaluating") as tick, evaluated(opened, options, tick) as found:
        facts = evaluation_json(opened, options, found)
        if flags["out"] is not None:
            write_results(
                flags["out"],
                opened,
                facts,
                name=JSON,
                comparison=found,
                sampling=options.draw.sampling,
                tables=options.tables,
                command=typed_command(),
            )
    if as_json:
        print_json(facts)
    else:
        Console(width=None if os.isatty(1) else _PLAIN_WIDTH).print(
            comparison_table(found, opened.manifest.model.sides)
        )
        if flags["out"] is not None:
            click.echo(flags["out"])
    _check_gates(found.variants[0], flags["require_psnr"], flags["require_shift_below"])


def _options(bundle: Bundle, path: Path, flags: Mapping[str, Any]) -> EvalOptions:
    label = flags["class_label"]
    draw = Draw(
        flags["count"],
        seed=flags["seed"],
        first=flags["first"],
        labels=None if label is None else parse_labels(label, bundle.manifest.model.condition),
        sampling=flags["sampling"],
        batch_size=flags["batch_size"],
        threads=flags["threads"],
    )
    backend = flags["backend"] or default_backend()
    shelf = flags["engine_dir"]
    return EvalOptions(
        draw,
        work=flags["work"] or shelf / path.resolve().name / "eval",
        backend=backend,
        remainder=flags["remainder"],
        corrections=flags["corrections"] or EvalOptions.corrections,
        features=flags["features"],
        reference=flags["features_reference"],
        keep=flags["keep"],
        ray=flags["workers"] == "ray",
        ray_address=flags["ray_address"],
        tables=tuple(fitted_tables(shelf, path)),
        blobs=tuple(compiled_blobs(shelf, path, make_engine_id(backend, flags["remainder"]))),
    )


def _refuse_sampling_options(context: click.Context) -> None:
    """With --data nothing is sampled: an option that would have no effect is a mistake."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in _WITH_DATA and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{parameter.opts[-1]}: nothing is sampled with --data. Leave one of them out.")


def _on_data(bundle: Bundle, flags: Mapping[str, Any], as_json: bool) -> None:
    with Bars().stage("evaluating") as tick:
        found = compare_on_data(
            bundle,
            flags["data"],
            backend=flags["backend"],
            remainder=flags["remainder"],
            threads=flags["threads"],
            seed=flags["seed"],
            on_progress=tick,
        )
    facts = {"bundle": bundle.path.resolve().name, "data": flags["data"].name, **found.to_json()}
    if (out := flags["out"]) is not None:
        write_json(out, facts, name=JSON)
    if as_json:
        print_json(facts)
        return
    sqnr, worst = found.sqnr_db, found.worst
    click.echo(
        f"output SQNR {sqnr.value:.2f} dB ({sqnr.low:.2f} to {sqnr.high:.2f}) on {found.engine}, {sqnr.n} rows; "
        f"the worst is row {worst} with {found.row_sqnr_db[worst]:.2f} dB"
    )


def _check_gates(found: Figures, psnr: float | None, shift: float | None) -> None:
    """Of the first correction."""
    for flag, limit, figure, met in (
        ("--require-psnr", psnr, found.psnr, operator.ge),
        ("--require-shift-below", shift, found.shift, operator.lt),
    ):
        if limit is not None and (figure is None or not met(figure.value, limit)):
            absent = "diverged" if found.diverged else "was not measured"
            value = absent if figure is None else f"has {figure.value:.4g}"
            raise GateFailed(f"{flag} {limit:g}: correction {found.name} {value}.")

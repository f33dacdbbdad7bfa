"""qncd bench: speed beside accuracy, measured interleaved on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from qncd_deploy.cli.options import (
    PATH,
    bundle_argument,
    compiled_blobs,
    effort_options,
    engine_dir_option,
    json_option,
    print_json,
    results_option,
    size_options,
    threads_option,
    typed_command,
    with_effort,
)
from qncd_deploy.cli.progress import Bars
from qncd_deploy.engines.base import BACKENDS, Remainder, available_backends, make_engine_id, usable_remainders
from qncd_deploy.errors import BackendMissing, BundleError, EngineError, GateFailed, first_line
from qncd_deploy.evaluate.bench import bench
from qncd_deploy.evaluate.bench_result import BenchResult, bench_table
from qncd_deploy.evaluate.compare import Variant
from qncd_deploy.evaluate.judge import Draw
from qncd_deploy.pipeline.build import FLAVOURS, BuildRequest, build
from qncd_deploy.pipeline.results import check_output, write_results
from qncd_deploy.runtime import Bundle

JSON = "bench.json"

log = logging.getLogger(__name__)


@click.command("bench")
@bundle_argument
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(list(BACKENDS)),
    help="Measure these only. Repeatable.  [default: openvino and onnxruntime, where they are installed]",
)
@click.option(
    "--remainder",
    "remainders",
    multiple=True,
    type=click.Choice(["f32", "bf16", "f16"]),
    help="Measure these precisions of the float layers only, and without --backend the engines that have one of them. "
    "Repeatable.  [default: all that an engine has on this machine]",
)
@click.option(
    "--baseline",
    type=PATH,
    metavar="BUNDLE",
    help="Speedups are over this bundle of the same network, such as one of `qncd export --format fp16`.  "
    "[default: over the float32 twin; on TensorRT alone over its float16 form, which is made with the export extra]",
)
@click.option("--batch-size", type=click.IntRange(1), default=1, help="Pictures at a time.")
@size_options
@click.option("--rounds", type=click.IntRange(1), default=5, help="Interleaved rounds.")
@click.option("--eval-size", type=click.IntRange(2), default=32, help="Pictures that the PSNR is measured on.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the pictures.")
@click.option("--require-psnr", type=float, metavar="DB", help="Exit code 3 if the pictures are less faithful.")
@click.option("--require-speedup", type=float, metavar="X", help="Exit code 3 if the speedup is less.")
@threads_option
@effort_options
@engine_dir_option
@results_option(JSON)
@json_option
def bench_command(
    bundle: Path,
    backends: tuple[str, ...],
    remainders: tuple[Remainder, ...],
    baseline: Path | None,
    batch_size: int,
    height: int | None,
    width: int | None,
    rounds: int,
    eval_size: int,
    seed: int,
    require_psnr: float | None,
    require_speedup: float | None,
    threads: int | None,
    level: int | None,
    workspace_mib: int | None,
    engine_dir: Path,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time the float32 twin, the quantized network and a baseline side by side, with their accuracy.

    Engines that `qncd build` made for the batch size are used, others are compiled for the run; those of a float16
    baseline that was not named are kept in ENGINE_DIR/NAME-FORMAT-half. The gates are about the first engine measured
    and its first precision of the float layers: its speedup over the baseline in the same precision, or over the
    float32 twin where there is none, and its pictures against the float32 twin's.
    """
    if out is not None:
        check_output(out)
    engines = _engines(backends, remainders)
    opened, other = (
        None
        if path is None
        else with_effort(Bundle.open(path).at_size(height, width), engines, level, workspace_mib, engine_dir)
        for path in (bundle, baseline)
    )
    assert opened is not None

    def stored(of: Bundle, engine_id: str) -> tuple[Path, ...]:
        return tuple(compiled_blobs(engine_dir, of.path, engine_id, batch=batch_size))

    draw = Draw(eval_size, seed=seed, batch_size=batch_size, threads=threads)
    with _baseline(opened, other, engines) as other:
        if other is not None and baseline is None:
            _keep_engines(other, engines, engine_dir / other.path.name, batch_size)
        variants = _variants(opened, other, engines, stored)
        with Bars().stage("bench") as tick:  # after those of the builds: a terminal shows one at a time
            result = bench(
                opened,
                variants,
                draw,
                rounds=rounds,
                baseline=next((variant.name for variant in variants if variant.bundle is not None), None),
                on_progress=tick,
            )
    facts = result.to_json()
    if out is not None:
        write_results(out, opened, facts, name=JSON, bench=result, command=typed_command())
    if as_json:
        print_json(facts)
    else:
        console = Console(width=None if os.isatty(1) else 160)
        console.print(bench_table(result))
        context = result.context
        place = context.get("gpu", f"{context['processor']}, {context['cores']} cores")
        console.print(f"{place}, {context['engines']}")
        for warning in result.warnings:
            console.print(f"noisy: {warning}")
        if out is not None:
            click.echo(out)
    _check_gates(result, variants, require_psnr, require_speedup)


@contextmanager
def _baseline(
    bundle: Bundle, named: Bundle | None, engines: Mapping[str, Sequence[Remainder]]
) -> Iterator[Bundle | None]:
    """What was named; else, where TensorRT alone runs a quantized network with a float16 rest, that network in float16,
    if this machine can make it.
    """
    half_first = all(name in FLAVOURS and asked[0] == "f16" for name, asked in engines.items())
    quantized = any(layer["weight_bits"] is not None for layer in bundle.plan["layers"])
    if named is not None or not (half_first and quantized):
        yield named
        return
    try:
        from qncd_deploy.pipeline.half_twin import half_twin
    except ImportError as exc:
        log.info(
            "speedups are over float32: a float16 network cannot be made here (%s). Export one with `qncd-export "
            "CHECKPOINT --format fp16`, and name it with --baseline.",
            first_line(exc),
        )
        yield None
        return
    with half_twin(bundle) as twin:
        yield twin


def _keep_engines(twin: Bundle, backends: Iterable[str], folder: Path, batch_size: int) -> None:
    """Build the engines of a float16 twin where the next run finds them; a folder that cannot be written is no reason
    not to measure: they are built for the run then.
    """
    try:
        for name in backends:
            effort = twin.effort
            request = BuildRequest(
                name, batches=(batch_size,), level=effort.level, workspace=effort.workspace, check=False
            )
            build(twin, folder, request, Bars(), around=("decoder",))
    except BundleError as exc:
        log.info("%s: not kept (%s)", folder, first_line(exc))


def _engines(backends: tuple[str, ...], remainders: tuple[Remainder, ...]) -> dict[str, tuple[Remainder, ...]]:
    """What to measure: precisions by backend. What was named is measured or refused; what was not, as far as there is
    anything of it here.
    """
    asked = tuple(dict.fromkeys(remainders))
    if backends:
        return {name: asked or usable_remainders(BACKENDS[name]) for name in backends}
    if not asked:
        return {name: usable_remainders(BACKENDS[name]) for name in _installed()}
    found = {name: tuple(each for each in asked if each in BACKENDS[name].remainders) for name in _installed()}
    if lost := set(asked).difference(*found.values()):
        able = ", ".join(backend.name for backend in BACKENDS.values() if min(lost) in backend.remainders)
        raise EngineError(
            f"--remainder {min(lost)}: {', '.join(found)} have no such precision. Choose a backend that does with "
            f"--backend ({able})."
        )
    return {name: able for name, able in found.items() if able}


def _installed() -> tuple[str, ...]:
    on_cpu = [name for name, backend in BACKENDS.items() if backend.device == "cpu" and name != "torch"]
    found = tuple(s.name for s in available_backends() if s.missing is None and s.name in on_cpu)
    if not found:
        raise BackendMissing(f"no inference engine on this machine. Install one: {BACKENDS['openvino'].install}")
    return found


def _variants(
    bundle: Bundle,
    baseline: Bundle | None,
    engines: dict[str, tuple[Remainder, ...]],
    stored: Callable[[Bundle, str], tuple[Path, ...]],
) -> list[Variant]:
    """For every engine its float twin, the baseline in the first precision asked for, and the bundle in all of them.

    engines: precisions by backend;  stored: compiled networks of a bundle for an engine.
    """
    found = []
    for name, asked in engines.items():
        found.append(Variant(f"{name} float", name, float_twin=True))
        if baseline is not None:
            title, first = f"{name} baseline {baseline.manifest.format}", asked[0]
            blobs = stored(baseline, make_engine_id(name, first))
            found.append(Variant(title, name, correction="off", remainder=first, bundle=baseline, blobs=blobs))
        for remainder in asked:
            rest = f", {remainder} rest" if len(BACKENDS[name].remainders) > 1 else ""
            title, blobs = f"{name} {bundle.manifest.format}{rest}", stored(bundle, make_engine_id(name, remainder))
            found.append(Variant(title, name, correction="off", remainder=remainder, blobs=blobs))
    return found


def _check_gates(result: BenchResult, variants: list[Variant], psnr: float | None, speedup: float | None) -> None:
    first = next(variant for variant in variants if not variant.float_twin and variant.bundle is None)
    quantized = result[first.name]
    measured = quantized.speedup.median
    if speedup is not None and measured < speedup:
        raise GateFailed(
            f"--require-speedup {speedup:g}: {quantized.name} is {measured:.2f} times as fast as {result.baseline}."
        )
    fidelity = None if quantized.figures is None else quantized.figures.psnr
    if psnr is not None and (fidelity is None or fidelity.value < psnr):
        diverged = quantized.figures is not None and quantized.figures.diverged is not None
        absent = "diverged" if diverged else "was not measured"
        value = absent if fidelity is None else f"has {fidelity.value:.2f} dB"
        raise GateFailed(f"--require-psnr {psnr:g}: {quantized.name} {value}.")

"""qncd bench: speed beside accuracy, measured interleaved on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.console import Console

from qncd_deploy.cli.options import PATH, bundle_argument, json_option, print_json, threads_option, typed_command
from qncd_deploy.cli.progress import Bars
from qncd_deploy.engines.base import BACKENDS, available_backends
from qncd_deploy.errors import BackendMissing, GateFailed
from qncd_deploy.evaluate.bench import BenchResult, bench, bench_table
from qncd_deploy.evaluate.compare import Variant
from qncd_deploy.evaluate.judge import Draw
from qncd_deploy.pipeline.results import check_output, write_results
from qncd_deploy.runtime import Bundle


@click.command("bench")
@bundle_argument
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(list(BACKENDS)),
    help="Measure these only. Repeatable.  [default: openvino and onnxruntime, where they are installed]",
)
@click.option("--batch-size", type=click.IntRange(1), default=1, help="Pictures at a time.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Interleaved rounds.")
@click.option("--eval-size", type=click.IntRange(2), default=32, help="Pictures that the PSNR is measured on.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the pictures.")
@click.option("--require-psnr", type=float, metavar="DB", help="Exit code 3 if the pictures are less faithful.")
@click.option("--require-speedup", type=float, metavar="X", help="Exit code 3 if INT8 is less than X times as fast.")
@threads_option
@click.option(
    "-o",
    "--output",
    "out",
    type=PATH,
    help="A .json, or a folder for bench.json and, with the report extra, report.html.",
)
@json_option
def bench_command(
    bundle: Path,
    backends: tuple[str, ...],
    batch_size: int,
    rounds: int,
    eval_size: int,
    seed: int,
    require_psnr: float | None,
    require_speedup: float | None,
    threads: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time the float twin and the quantized network side by side, with their accuracy.

    The gates are about the first engine measured: its quantized network with a float32 remainder, against its own float
    twin.
    """
    if out is not None:
        check_output(out)
    opened = Bundle.open(bundle)
    chosen = backends or _installed()
    variants = _variants(chosen, opened.manifest.format)
    draw = Draw(eval_size, seed=seed, batch_size=batch_size, threads=threads)
    with Bars().stage("bench") as tick:
        result = bench(opened, variants, draw, rounds=rounds, on_progress=tick)
    facts = result.to_json()
    if out is not None:
        write_results(out, opened, facts, name="bench.json", bench=result, command=typed_command())
    if as_json:
        print_json(facts)
    else:
        console = Console(width=None if os.isatty(1) else 160)
        console.print(bench_table(result))
        console.print(f"{result.context['processor']}, {result.context['cores']} cores, {result.context['engines']}")
        for warning in result.warnings:
            console.print(f"noisy: {warning}")
        if out is not None:
            click.echo(out)
    _check_gates(result, variants, require_psnr, require_speedup)


def _installed() -> tuple[str, ...]:
    on_cpu = [name for name, backend in BACKENDS.items() if backend.device == "cpu" and name != "torch"]
    found = tuple(s.name for s in available_backends() if s.missing is None and s.name in on_cpu)
    if not found:
        raise BackendMissing(f"no inference engine on this machine. Install one: {BACKENDS['openvino'].install}")
    return found


def _variants(backends: tuple[str, ...], network: str) -> list[Variant]:
    """For every engine its float twin and the quantized network, in every precision of the remainder it has."""
    found = []
    for name in backends:
        backend = BACKENDS[name]
        found.append(Variant(f"{name} float", name, float_twin=True))
        for remainder in backend.remainders:
            rest = f", {remainder} rest" if len(backend.remainders) > 1 else ""
            found.append(Variant(f"{name} {network}{rest}", name, correction="off", remainder=remainder))
    return found


def _check_gates(result: BenchResult, variants: list[Variant], psnr: float | None, speedup: float | None) -> None:
    twin, quantized = (result[variant.name] for variant in variants[:2])
    if speedup is not None:
        measured = twin.call_ms.median / quantized.call_ms.median
        if measured < speedup:
            raise GateFailed(f"--require-speedup {speedup:g}: {quantized.name} is {measured:.2f} times {twin.name}.")
    fidelity = None if quantized.figures is None else quantized.figures.psnr
    if psnr is not None and (fidelity is None or fidelity.value < psnr):
        value = "not measured" if fidelity is None else f"{fidelity.value:.2f} dB"
        raise GateFailed(f"--require-psnr {psnr:g}: {quantized.name} has {value}.")

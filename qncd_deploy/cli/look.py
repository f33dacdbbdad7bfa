"""qncd inspect, verify, doctor: what a bundle holds, whether it is intact, what this machine can do with it."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from qncd_deploy.bundle import file_problems, read_manifest
from qncd_deploy.cli.options import (
    PATH,
    backend_option,
    bits_line,
    bits_text,
    bundle_argument,
    engine_dir_option,
    first_token_line,
    fitted_tables,
    json_option,
    print_json,
    remainder_option,
)
from qncd_deploy.engines.base import (
    BACKENDS,
    Remainder,
    available_backends,
    default_backend,
    find_backend,
    make_engine_id,
)
from qncd_deploy.engines.stored import load_stored
from qncd_deploy.engines.trt.library import open_library
from qncd_deploy.engines.trt.options import TARGETS
from qncd_deploy.engines.trt.store import SUFFIX, EngineFacts
from qncd_deploy.errors import BackendMissing, BundleError, EngineError
from qncd_deploy.evaluate.contest import OFF, Contest, contests_of
from qncd_deploy.pipeline.build import call_shapes
from qncd_deploy.pipeline.recipes import RECIPES, Recipe
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import default_batch
from qncd_deploy.specs import pixels


@click.command("inspect")
@click.argument("bundle", type=PATH, required=False)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    help="Instead of a bundle: what `qncd export --recipe NAME` sets, and where each value was read.",
)
@backend_option
@remainder_option
@click.option(
    "--kernels",
    is_flag=True,
    help="Show what really runs: of the engines that `qncd build` made for TensorRT, else of the network compiled now "
    "(openvino).",
)
@engine_dir_option
@json_option
def inspect_command(
    bundle: Path | None,
    recipe: str | None,
    backend: str | None,
    remainder: Remainder | None,
    kernels: bool,
    engine_dir: Path,
    as_json: bool,
) -> None:
    """List the layers by bits with scales and reasons, the corrections that are fitted, the engines that are built."""
    if (bundle is None) == (recipe is None):
        raise click.UsageError("expected a BUNDLE or --recipe NAME, one of the two.")
    if remainder is not None and not kernels:
        raise click.UsageError(f"--remainder {remainder} is about --kernels. Give both, or neither.")
    if recipe is not None:
        _show_recipe(RECIPES[recipe], as_json=as_json)
    if bundle is not None:
        _show_bundle(bundle, backend, remainder, kernels=kernels, engine_dir=engine_dir, as_json=as_json)


def _show_recipe(recipe: Recipe, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(recipe))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("option", "value", "read in"):
        table.add_column(heading, overflow="fold")
    for setting in recipe.settings:
        value = ", ".join(setting.value) if isinstance(setting.value, tuple) else setting.value
        table.add_row(setting.flag, str(value), setting.source)
    console = Console(width=None if os.isatty(1) else 200)
    console.print(f"{recipe.name}: {recipe.title}. Any option given beside --recipe {recipe.name} wins.")
    console.print(table)
    console.print("Not as published, or not known:")
    for line in recipe.apart:
        console.print(f"  {line}")


def _show_bundle(
    bundle: Path,
    backend: str | None,
    remainder: Remainder | None,
    *,
    kernels: bool,
    engine_dir: Path,
    as_json: bool,
) -> None:
    opened = Bundle.open(bundle)
    plan, manifest = opened.plan, opened.manifest
    engines = _engines(engine_dir / bundle.resolve().name, backend)
    found = []
    if kernels and find_backend(compiled := backend or default_backend()).device == "cpu":
        found = _kernels(opened, compiled, remainder)
    corrections = _corrections(opened, fitted_tables(engine_dir, bundle))
    if as_json:
        facts = {"plan": plan, "quality": dict(manifest.quality), "corrections": corrections, "kernels": found}
        facts["stepping"] = None if opened.stepping is None else opened.stepping.to_json()["ranges"]
        facts["prompts"] = opened.prompts
        print_json({**facts, "engines": {path.name: asdict(engine) for path, engine in engines.items()}})
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "op", "shape", "bits", "act scale", "SQNR dB", "why"):
        table.add_column(heading, justify="right" if heading in ("act scale", "SQNR dB") else "left", overflow="fold")
    for layer in plan["layers"]:
        table.add_row(*_row(layer))
    console = Console(width=None if os.isatty(1) else 200)
    console.print(table)
    bits = Counter(bits_text(layer["weight_bits"], layer["act_bits"]) for layer in plan["layers"])
    console.print("   ".join(f"{count} {name}" for name, count in sorted(bits.items())))
    if manifest.recipe.get("--recipe") is not None:
        console.print(f"recipe {manifest.recipe['--recipe']}, and what was given beside it")
    if "bits" in manifest.quality:
        console.print(f"bits {bits_line(manifest.quality['bits'])}")
    if manifest.quality.get("first_token", {}).get("kept_float"):
        console.print(f"first token {first_token_line(manifest.quality['first_token'])}")
    if opened.stepping is not None:
        graphs = ", ".join(manifest.roles[role] for role in opened.network_roles("master"))
        console.print(f"activations {opened.stepping.line()} ({graphs}; the layers above are those of the last)")
    if opened.prompts is not None and (text := manifest.model.text) is not None:
        encoders = " and ".join(manifest.roles[encoder] for _, encoder in text.roles)
        console.print(f"prompts {len(opened.prompts)}, encoded by {encoders}, {text.max_length} tokens each:")
        for prompt in opened.prompts:
            console.print(f"    {prompt}", markup=False, highlight=False)
    for line in corrections:
        size = "" if line["sides"] is None else f", {pixels(line['sides'])}"
        console.print(
            f"correction {line['choice']} of {', '.join(line['methods'])} for {line['backend']}, {line['scheduler']} "
            f"{line['n_steps']} steps, guidance {line['guidance_scale']:g}{size}, in {line['file']}"
        )
        if line["contest"] is not None:
            console.print(f"    auto takes {Contest.from_json(line['contest']).line()}")
    for kernel in found:
        console.print(_kernel_line(**kernel))
    for path, engine in engines.items():
        console.print(f"engine {path.name}: {engine.table.line()}")
        if engine.unchecked is not None:
            console.print(f"    not held against the float network: {engine.unchecked}", markup=False, highlight=False)
        for layer in engine.table.missed:
            console.print(f"    planned quantized, but runs otherwise: {layer}")
        for each in engine.table.kernels if kernels else ():
            console.print(_kernel_line(**asdict(each)))


def _kernel_line(*, op: str, precision: str, implementation: str, count: int) -> str:
    return f"{count:5d}  {precision:6}  {op:28}  {implementation}"


def _engines(folder: Path, backend: str | None) -> dict[Path, EngineFacts]:
    """TensorRT engines that `qncd build` made of a bundle and that are whole, of one backend or of all."""
    found = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with suppress(EngineError):  # not whole: `qncd build` makes it again, and says so
            _, facts = load_stored(path, EngineFacts.from_json)
            if backend in (None, facts.backend):
                found[path] = facts
    return found


def _row(layer: dict[str, Any]) -> tuple[str, ...]:
    scale, sqnr = layer["act_scale"], layer["sqnr_db"]
    return (
        layer["name"],
        layer["op"],
        "x".join(map(str, layer["shape"])),
        bits_text(layer["weight_bits"], layer["act_bits"]),
        "" if scale is None else f"{scale:.4g}",
        "" if sqnr is None else f"{sqnr:.1f}",
        layer["reason"],
    )


def _corrections(bundle: Bundle, files: Sequence[Path]) -> list[dict[str, Any]]:
    """What was fitted for this bundle's plan and how it was chosen, in the order in which `qncd sample` looks."""
    found = []
    for tables in bundle.corrections(files):
        contests = contests_of(tables)
        found += [
            {
                "file": str(tables.path),
                "backend": key.backend,
                "scheduler": key.scheduler,
                "n_steps": key.n_steps,
                "eta": key.eta,
                "guidance_scale": key.guidance_scale,
                "sides": key.sides,
                "methods": sorted(table.method for table in tables.tables if table.key == key),
                "choice": tables.choice(key) or OFF,
                "contest": contests[key].to_json() if key in contests else None,
            }
            for key in tables.keys
            if key.plan_sha == bundle.plan_sha
        ]
    return found


def _kernels(bundle: Bundle, backend: str, remainder: Remainder | None) -> list[dict[str, Any]]:
    """Of the network compiled for a full batch. Raises as open_engine does."""
    make_engine_id(backend, remainder)
    role, batch_size = find_backend(backend).role(remainder), default_batch(bundle.manifest.model.latent_shape)
    with bundle.open_network(backend, bundle.network_roles(role), remainder=remainder) as engine:
        shapes = call_shapes(bundle, role, engine.inputs, batch_size)
        return [asdict(kernel) for kernel in engine.kernels(shapes)]


@click.command("verify")
@bundle_argument
@json_option
def verify_command(bundle: Path, as_json: bool) -> None:
    """Hash every file of a bundle, and say what this machine can do with it."""
    manifest = read_manifest(bundle)
    problems = list(file_problems(bundle, manifest, limit=None))
    engines = {status.name: status.missing for status in available_backends()}
    if as_json:
        print_json({"bundle": str(bundle), "problems": problems, "versions": manifest.versions, "engines": engines})
    elif not problems:
        total = sum(facts.bytes for facts in manifest.files.values())
        click.echo(f"{bundle}  {len(manifest.files)} files, {total / 2**20:.1f} MiB, all as written")
        made = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
        click.echo(f"made with  {made}")
        ready = [name for name, missing in engines.items() if missing is None]
        click.echo(f"runs here  {', '.join(ready) or 'nowhere: see `qncd doctor`'}")
    if problems:
        more = f" ({len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise BundleError(f"{bundle}/{problems[0]}{more}. Copy the bundle again, or run `qncd export` again.")


@click.command("doctor")
@json_option
def doctor_command(as_json: bool) -> None:
    """Say what this machine can run, and what is missing for the rest."""
    cpu = _cpu()
    engines = available_backends()
    if as_json:
        print_json(
            {
                "python": platform.python_version(),
                "machine": platform.machine(),
                "cpu": cpu,
                "engines": {s.name: {"version": s.version, "missing": s.missing} for s in engines},
                "ahead_of_time": _ahead_of_time(),
            }
        )
        return
    width = max(len(name) for name in (*BACKENDS, *_HEADINGS)) + 1

    def say(heading: str, text: str) -> None:
        click.echo(f"{heading:{width}}{text}")

    say("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    say("cpu", f"{cpu['name']}, {cpu['cores']} cores")
    for feature, (has, means) in _features(cpu["flags"]).items():
        say("", f"{'yes' if has else 'no ':3} {feature}: {means}")
    for status in engines:
        graph = {"master": "unet.onnx", "ort": "unet-ort.onnx", "trt": "unet-trt.onnx"}[
            find_backend(status.name).role()
        ]
        missing = status.missing and status.missing.removeprefix(f"{status.name}: ")
        say(status.name, missing or f"version {status.version}, runs {graph}")
    ready = [s.name for s in engines if s.missing is None]
    say("w8a8 runs", f"on {', '.join(ready)}" if ready else f"nowhere yet: {BACKENDS['openvino'].install}")
    for formats, needs in _FORMATS.items():
        say(formats, needs)
    for name, targets in _ahead_of_time().items():
        say("builds for", f"{', '.join(targets)}, ahead of time, with {name}")


_FORMATS = {
    "w4a8 w4a6 w4a4": "run where w8a8 does, as fast and in as many bytes: mostly 4-bit levels in 8-bit integers",
    "w4a16": "runs everywhere, in float arithmetic; weights of Linears stay packed in 4 bits in openvino, onnxruntime "
    "and tensorrt-rtx",
}
_HEADINGS = ("w8a8 runs", "builds for", *_FORMATS)


def _ahead_of_time() -> dict[str, list[str]]:
    """GPUs that engines can be built for here without having one, by the backend that does it."""
    with suppress(BackendMissing):
        return {open_library("tensorrt-rtx").flavour: list(TARGETS)}
    return {}


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    wanted = {"avx2", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm"}
    return {"name": name, "cores": os.cpu_count(), "flags": sorted(flags & wanted)}


def _features(flags: list[str]) -> dict[str, tuple[bool, str]]:
    def has(*names: str) -> bool:
        return any(name in flags for name in names)

    return {
        "8-bit dot products": (has("avx512_vnni", "avx_vnni", "asimddp", "i8mm", "amx_int8"), "INT8 layers are fast"),
        "8-bit matrix unit": (has("amx_int8"), "INT8 layers are fastest"),
        "bfloat16": (has("avx512_bf16", "amx_bf16"), "--remainder bf16 pays"),
    }

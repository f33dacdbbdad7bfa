"""The chain behind `qncd export`: from a checkpoint or a float graph to a complete bundle, or to nothing at all."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qncd_deploy.bundle import MANIFEST, Manifest, TextFacts, check_files, read_manifest, write_manifest
from qncd_deploy.errors import BundleError, QncdError
from qncd_deploy.export.save import on_disk, save_siblings, spill
from qncd_deploy.export.trace import trace_text_encoder
from qncd_deploy.export.verify import FLOAT, verify
from qncd_deploy.files import atomic_directory, save_npz, sha256_file
from qncd_deploy.models.load import artifact_name
from qncd_deploy.pipeline.bits import check_budget
from qncd_deploy.pipeline.calibrate import calibration_set
from qncd_deploy.pipeline.fit import Fitted, merge_into
from qncd_deploy.pipeline.fits import engines_to_fit, fit_engines, options_of, unfitted_note
from qncd_deploy.pipeline.forecast import Pace, forecast
from qncd_deploy.pipeline.network import FloatNetwork, read_network
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.output_error import output_errors, running, spread_rows
from qncd_deploy.pipeline.progress import Progress
from qncd_deploy.pipeline.proof import Proof, prove, write_page
from qncd_deploy.pipeline.quantize import Quantized, policy_of, quantize, quantize_weights
from qncd_deploy.pipeline.smoothing import Smoothing
from qncd_deploy.prompts import write_prompts
from qncd_deploy.quant.policy import FLOAT_FORMAT
from qncd_deploy.runtime import Bundle

GRAPHS = {"master": "unet.onnx", "trt": "unet-trt.onnx", "ort": "unet-ort.onnx", "float": "unet-float.onnx"}
PROMPT_FILES = {"prompts": "prompts.txt", "prompt-embedding": "prompt-embedding.npz"}
DECODERS = {"decoder": "vae-decoder.onnx", "decoder-tile": "vae-decoder-tile.onnx"}
LIBRARIES = ("torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "numpy", "scipy")
CHECKED_ROWS = 256
"""Calibration rows on which a network that cannot sample is compared with its float twin."""


@dataclass(frozen=True, eq=False)
class Exported:
    """A bundle and what there is to say of it; the stages' results are None if it was up to date already."""

    bundle: Bundle
    quantized: Quantized | None = None
    fitted: Mapping[str, Fitted] | None = None
    proof: Proof | None = None
    notes: tuple[str, ...] = ()


def bundle_folder(options: ExportOptions) -> Path:
    """<onnx-dir>/<name>-<format>."""
    return options.onnx_dir / f"{_name(options)}-{options.format}"


def export(options: ExportOptions, progress: Progress, *, command: str) -> Exported:
    """Make the bundle that the options describe. command: how the report says to make it again.

    An existing bundle of the same recipe, inputs and versions is left as it is; any other is replaced only with
    options.force. Raises: a QncdError naming what is wrong; then nothing is left behind, and nothing was replaced.
    """
    target = bundle_folder(options)
    policy_of(options)
    if not options.force and (target / MANIFEST).exists():
        return _existing(target, options, progress)
    with atomic_directory(target, force=options.force) as folder, _named(folder, target):
        with progress.stage("network"):
            network = read_network(options)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            for role, graph in {"float": network.model, **_decoders(network)}.items():
                spill(graph, Path(scratch) / f"{role}.data")
            quantized = _quantized(network, options, Path(scratch), progress)
            _write_network(folder, network, quantized)
            quantized = replace(quantized, graphs={})  # whose weights are where they were written
        manifest = write_manifest(folder, _manifest(network, quantized, options))
        if network.schedule is None:
            write_page(folder, Bundle(folder, manifest), None, command=command)
            return Exported(Bundle(target, manifest), quantized, {}, None, (*network.notes, *quantized.notes))
        engines = engines_to_fit(network, options)
        work = options.calib_dir / _name(options) / f"fits-{options.format}"
        fitted = fit_engines(Bundle(folder, manifest), engines, options, work, progress)
        if fitted:
            merge_into(folder / "corrections.npz", list(fitted.values()))
            roles = {**manifest.roles, "corrections": "corrections.npz"}
            manifest = write_manifest(folder, replace(manifest, roles=roles))
        with progress.stage("proof") as tick:
            proof = prove(Bundle(folder, manifest), size=options.eval_size, seed=options.seed, tick=tick)
        contests = {"corrections": {engine: each.to_json() for engine, each in fitted.items()}} if fitted else {}
        quality = {**manifest.quality, **contests, **proof.quality}
        manifest = write_manifest(folder, replace(manifest, quality=quality))
        write_page(folder, Bundle(folder, manifest), proof.comparison, command=command)
    notes = (*network.notes, *quantized.notes, *unfitted_note(target, engines, options))
    return Exported(Bundle(target, manifest), quantized, fitted, proof, notes)


@contextmanager
def _named(folder: Path, target: Path) -> Iterator[None]:
    """Messages name the bundle that is being made, not the folder that it is made in."""
    try:
        yield
    except QncdError as error:
        raise type(error)(str(error).replace(str(folder), str(target))) from error


def _name(options: ExportOptions) -> str:
    return options.name or artifact_name(options.checkpoint)


def _existing(target: Path, options: ExportOptions, progress: Progress) -> Exported:
    """The bundle that is there, if it is what would be made. Raises BundleError naming what differs."""
    manifest = read_manifest(target)
    with progress.stage("network"):
        network = read_network(options)
    made, asked = (
        {**m.recipe, **m.inputs, **m.versions, "--seed": m.seed} for m in (manifest, _manifest(network, None, options))
    )
    if differs := sorted(key for key in made.keys() | asked.keys() if made.get(key) != asked.get(key)):
        key = differs[0]
        raise BundleError(
            f"{target}: exists already, made with another {key} ({_short(made.get(key))}, now "
            f"{_short(asked.get(key))}). "
            "Use --force to replace it, or --name for another."
        )
    check_files(target, manifest)
    return Exported(Bundle(target, manifest), notes=network.notes)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _quantized(network: FloatNetwork, options: ExportOptions, scratch: Path, progress: Progress) -> Quantized:
    verify(network.model, FLOAT, name="unet-float.onnx")
    if not options.rounds_activations and (options.format == FLOAT_FORMAT or not options.brings_graph):
        return quantize_weights(network, options, progress)
    check_budget(network.sites, options, policy_of(options))
    with progress.stage("calibration") as tick, on_disk(network.model, scratch) as graph:
        pace = Pace(tick)
        calib = calibration_set(network, options, graph, _name(options), pace)
    fits = [options_of(options, backend) for backend in engines_to_fit(network, options)]
    if (ahead := forecast(network, options, calib, fits, pace)) is not None:
        progress.note(str(ahead))
    if options.rounds_activations:
        work = options.calib_dir / _name(options) / "rounding"
        quantized = quantize(network, calib, options, work, scratch, progress)
    else:
        quantized = quantize_weights(network, options, progress)
    if options.brings_graph:
        with progress.stage("output error"):
            rows = spread_rows(calib, CHECKED_ROWS)
            forms = ((network.model, None), (quantized.graphs[GRAPHS["master"]], quantized.plan))
            exact, rounded = (partial(running, graph, plan, scratch) for graph, plan in forms)
            (error,) = output_errors(exact, [rounded], network.facts.sized_inputs, rows)
        return replace(quantized, plan=replace(quantized.plan, output_sqnr_db=round(error.sqnr_db, 2)))
    return quantized


def _write_network(folder: Path, network: FloatNetwork, quantized: Quantized) -> None:
    graphs, rules = quantized.graphs, network.size_rules
    if rules is not None:
        graphs = {name: rules.free(graph.clone()) for name, graph in graphs.items()}
    save_siblings(graphs, folder)
    _write_decoders(folder, network)
    if (values := _class_tokens(network)) is not None:
        np.save(folder / "class-embedding.npy", values, allow_pickle=False)
    if network.facts.text is not None:
        _write_text(folder, network, network.facts.text)
    for name, path in network.companions.items():
        shutil.copyfile(path, folder / name)
    (folder / "plan.json").write_text(quantized.plan.dumps(), encoding="utf-8")
    if quantized.steps is not None:
        quantized.steps.write(folder)


def _write_decoders(folder: Path, network: FloatNetwork) -> None:
    graphs = {DECODERS[role]: graph for role, graph in _decoders(network).items()}
    for name, graph in graphs.items():
        verify(graph, FLOAT, name=name)
    if graphs:
        save_siblings(graphs, folder)


def _write_text(folder: Path, network: FloatNetwork, text: TextFacts) -> None:
    """Prompts and what encodes others; one encoder in memory at a time."""
    assert network.embedding is not None
    write_prompts(folder / PROMPT_FILES["prompts"], network.prompts)
    save_npz(folder / PROMPT_FILES["prompt-embedding"], network.embedding)
    for (tokenizer, tower), encoder in zip(text.roles, network.encoders, strict=True):
        (folder / f"{tokenizer}.json").write_text(encoder.tokenizer.to_str(pretty=True), encoding="utf-8")
        graph = trace_text_encoder(encoder.build(), encoder.max_length, encoder.outputs)
        verify(graph, FLOAT, name=f"{tower}.onnx")
        save_siblings({f"{tower}.onnx": graph}, folder)


def _decoders(network: FloatNetwork) -> dict[str, ir.Model]:
    """Those there are, by role: of whole pictures, and of the tiles of large ones."""
    graphs = {"decoder": network.decoder, "decoder-tile": network.decoder_tile}
    return {role: graph for role, graph in graphs.items() if graph is not None}


def _class_tokens(network: FloatNetwork) -> np.ndarray | None:
    """Rows that stand for classes, (classes, L, D); None where there are none, or the numbers of classes do."""
    condition = network.facts.condition
    if condition is None or condition.kind != "class-tokens":
        return None
    assert network.embedding is not None
    (values,) = network.embedding.values()
    return values


def _manifest(network: FloatNetwork, quantized: Quantized | None, options: ExportOptions) -> Manifest:
    """Everything but the figures and the hashes of the files; without `quantized`, for comparing recipes only."""
    roles = {**GRAPHS, "plan": "plan.json"}
    roles |= {role: DECODERS[role] for role in _decoders(network)}
    if _class_tokens(network) is not None:
        roles["class-embedding"] = "class-embedding.npy"
    if network.facts.text is not None:
        roles |= PROMPT_FILES
        for tokenizer, tower in network.facts.text.roles:
            roles |= {tokenizer: f"{tokenizer}.json", tower: f"{tower}.onnx"}
    if quantized is not None and quantized.steps is not None:
        roles |= quantized.steps.roles
    roles |= {Path(name).stem: name for name in network.companions}
    files = {**network.files, **network.companions}
    if options.calib_data is not None:
        files["calib-data"] = options.calib_data
    return Manifest(
        name=_name(options),
        format=options.format,
        model=network.facts,
        roles=roles,
        inputs={name.replace("/", ":"): sha256_file(path) for name, path in files.items()},
        recipe=_recipe(options),
        seed=options.seed,
        versions=_versions(),
        quality={} if quantized is None else _quality(quantized),
    )


def _recipe(options: ExportOptions) -> dict[str, Any]:
    """By flag: every option that can change the bundle. Files are in the inputs, by hash."""
    elsewhere = {"checkpoint", "config", "name", "prompts_file", "calib_data", "seed", "resume", "force"}
    values = {key: value for key, value in asdict(options).items() if key not in elsewhere and not key.endswith("_dir")}
    return {f"--{key.replace('_', '-')}": list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for library in ("qncd-deploy", *LIBRARIES):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _quality(quantized: Quantized) -> dict[str, Any]:
    """What is known before anything is sampled."""
    found = {"smoothing": _smoothing(quantized.smoothing), "splitting": quantized.splitting.to_json()}
    if quantized.reconstruction is not None:
        found["rounding"] = quantized.reconstruction.to_json()
    if (bits := quantized.bits.to_json()) is not None:
        found["bits"] = bits
    if quantized.first_tokens.found:
        found["first_token"] = quantized.first_tokens.to_json()
    if quantized.plan.output_sqnr_db is not None:
        found["output_sqnr_db"] = quantized.plan.output_sqnr_db
    if quantized.steps is not None:
        found["step_bits"] = quantized.steps.to_json()
    return _rounded(found)


def _rounded(value: Any) -> Any:
    """Six digits of every number: the last ones of a sum depend on where its terms lie in memory."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _smoothing(smoothing: Smoothing) -> dict[str, Any]:
    return {
        "folded": len(smoothing.folded),
        "network_error": None if smoothing.network_error is None else list(smoothing.network_error),
        "latent_snr_db": None if smoothing.latent_snr_db is None else list(smoothing.latent_snr_db),
        "blocks": {name: _decision(name, smoothing) for name in smoothing.blocks},
        "linears": {
            name: {"layers": list(decision.layers), **_decision(name, smoothing)}
            for name, decision in smoothing.linears.items()
        },
    }


def _decision(name: str, smoothing: Smoothing) -> dict[str, Any]:
    decision = {**smoothing.blocks, **smoothing.linears}[name]
    return {
        "factors": decision.label,
        "lowers_block_error": decision.kept,
        "folded": name in smoothing.folded,
        "block_error": [decision.error_before, decision.error_after],
    }

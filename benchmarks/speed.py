"""How fast one network call is on this machine, quantized and not, on every engine; and how far each is from float.

    python benchmarks/speed.py --model unet64 --work FOLDER     16 M parameters, 3x64x64, random weights, exported here
    python benchmarks/speed.py --model demo --work FOLDER       the demo checkpoint, exported here
    --bundle PATH [--checkpoint PATH]                           measure this export instead of making one

Rounds are interleaved, A B C ... A B C ..., so that drift hits all alike. In each round a variant is called once to
warm up what the previous one left cold, then a few times; the round's time is the median of these. Ratios are taken
within rounds. Inputs are those that the float sampler meets on its way from noise to picture. SNR is
10 log10 sum y^2 / sum (y' - y)^2 against ONNX Runtime float. Times depend on shapes alone, SNRs on the weights too:
those of random weights say that the arithmetic is right, not how good a trained network's pictures are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from qncd_deploy.engines.base import BaseEngine, Remainder, open_engine
from qncd_deploy.errors import BackendMissing
from qncd_deploy.evaluate.measure import Measurement, Stopwatch
from qncd_deploy.models.load import load_source
from qncd_deploy.pipeline.export import export
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.progress import Silent
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler

DEMO = Path(__file__).parents[1] / "calib_data/fashion-ldm/model.ckpt"
BASELINE = "ONNX Runtime float"
OPENVINO: tuple[tuple[str, str, Remainder], ...] = (
    ("OpenVINO f32", "float", "f32"),
    ("OpenVINO bf16", "float", "bf16"),
    ("OpenVINO INT8, rest f32", "master", "f32"),
    ("OpenVINO INT8, rest bf16", "master", "bf16"),
)
"""Name, the bundle's graph, precision of its float layers."""

Feeds = Mapping[str, np.ndarray]


@dataclass
class Variant:
    """One way to run the network: its output for some feeds, and how many of its kernels compute on integers (None:
    cannot be told). seconds: one a round."""

    name: str
    run: Callable[[Feeds], np.ndarray]
    integer_kernels: int | None = None
    seconds: list[float] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("unet64", "demo"), default="unet64")
    parser.add_argument("--work", type=Path, default=Path("export"), help="where the export goes")
    parser.add_argument("--checkpoint", type=Path, help="what the bundle was made of, if it is neither model")
    parser.add_argument("--bundle", type=Path, help="an export of this model that is there already")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures a call; guidance makes two rows of each")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=3, help="timed calls a round")
    parser.add_argument("--inputs", type=int, help="of the sampler's calls, the first so many  [default: all]")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the raw samples go")
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint or DEMO
    if arguments.model == "unet64" and not arguments.checkpoint:
        checkpoint = write_unet64(arguments.work / "unet64", seed=arguments.seed)
    bundle = Bundle.open(arguments.bundle) if arguments.bundle else make_bundle(checkpoint, arguments)
    feeds = recorded_feeds(bundle, arguments.batch_size, arguments.seed)[: arguments.inputs]
    with ExitStack() as opened:
        variants = open_variants(bundle, checkpoint, feeds[0], arguments.threads, opened)
        measure(variants, feeds, arguments.rounds, arguments.calls)
    rows = [figures(variant, {v.name: v for v in variants}[BASELINE]) for variant in variants]
    context = describe(arguments, bundle, feeds)
    print(markdown(rows, context))
    if arguments.json:
        arguments.json.write_text(json.dumps({"context": context, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def write_unet64(folder: Path, *, seed: int) -> Path:
    """A diffusers folder of an unconditional UNet with attention at its deepest level and torch's initial weights."""
    if not folder.exists():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=64,
            block_out_channels=(64, 128, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
        DDPMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


def make_bundle(checkpoint: Path, arguments: argparse.Namespace) -> Bundle:
    """Export with a small calibration, unless that was done before."""
    options = ExportOptions(
        checkpoint,
        calib_dir=arguments.work / "calibration",
        onnx_dir=arguments.work / "bundles",
        n_steps=5,
        calib_size=4,
        calib_steps=5,
        fit_size=4,
        eval_size=2,
        correction="off",
        seed=arguments.seed,
    )
    return export(options, Silent(), command=command_line()).bundle


class Recorder(Stopwatch):
    """An engine that keeps what it is fed."""

    def __init__(self, engine: BaseEngine) -> None:
        super().__init__(engine)
        self.feeds: list[dict[str, np.ndarray]] = []

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.feeds.append(feeds)
        return super()._run(feeds)


def recorded_feeds(bundle: Bundle, batch_size: int, seed: int) -> Sequence[Feeds]:
    """What the network is fed while the float sampler draws one batch."""
    with bundle.sampler("onnxruntime", float_twin=True, correction="off", batch_size=batch_size) as sampler:
        recorder = Recorder(sampler.network.unet)
        recording = Sampler(
            replace(sampler.network, unet=recorder),
            config=sampler.config,
            guidance_scale=sampler.guidance_scale,
            table=sampler.table,
            batch_size=batch_size,
        )
        for _ in recording.trajectory(range(batch_size), seed=seed):
            pass
        return recorder.feeds


def open_variants(bundle: Bundle, checkpoint: Path, feeds: Feeds, threads: int, opened: ExitStack) -> list[Variant]:
    """Every engine that this machine has, float and quantized."""

    def engine(name: str, backend: str, role: str, remainder: Remainder | None = None) -> Variant:
        found = opened.enter_context(open_engine(backend, bundle.file(role), remainder=remainder, threads=threads))
        output = next(iter(found.outputs))
        kernels = found.kernels({key: array.shape for key, array in feeds.items()})
        integers = sum(kernel.count for kernel in kernels if kernel.integer) if kernels else None
        return Variant(name, lambda feeds: found(feeds)[output], integers)

    variants = [
        Variant("torch float", torch_runner(checkpoint, threads)),
        engine(BASELINE, "onnxruntime", "float"),
        replace(engine("ONNX Runtime INT8", "onnxruntime", "ort"), integer_kernels=ort_integers(bundle.file("ort"))),
    ]
    for name, role, remainder in OPENVINO:
        try:
            variants.append(engine(name, "openvino", role, remainder))
        except BackendMissing as missing:
            print(missing, file=sys.stderr)
    return variants


def torch_runner(checkpoint: Path, threads: int) -> Callable[[Feeds], np.ndarray]:
    """The diffusers module that the export was traced from, as torch runs it by itself."""
    torch.set_num_threads(threads)
    unet = load_source(checkpoint).unet

    def run(feeds: Feeds) -> np.ndarray:
        named = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
        with torch.inference_mode():
            found: np.ndarray = unet(named.pop("sample"), named.pop("timestep"), **named).sample.numpy()
        return found

    return run


def ort_integers(path: Path) -> int:
    """Integer operators in the graph as ONNX Runtime has rewritten it; its sessions do not tell otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(path, options, ["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return sum("QLinear" in node.op_type or "Integer" in node.op_type for node in graph.node)


def measure(variants: Sequence[Variant], feeds: Sequence[Feeds], rounds: int, calls: int) -> None:
    """Fill in the outputs on all feeds, which warms up too, and the seconds of every round."""
    for variant in variants:
        variant.outputs = [np.array(variant.run(fed)) for fed in feeds]
    for turn in range(rounds):
        fed = feeds[turn % len(feeds)]
        for variant in variants:
            samples = []
            for _ in range(1 + calls):
                started = time.perf_counter()
                variant.run(fed)
                samples.append(time.perf_counter() - started)
            variant.seconds.append(float(np.median(samples[1:])))


def figures(variant: Variant, baseline: Variant) -> dict[str, Any]:
    signal = sum(float(np.square(y, dtype=np.float64).sum()) for y in baseline.outputs)
    pairs = zip(variant.outputs, baseline.outputs, strict=True)
    noise = sum(float(np.square(found - y, dtype=np.float64).sum()) for found, y in pairs)
    ratios = tuple(b / own for b, own in zip(baseline.seconds, variant.seconds, strict=True))
    return {
        "name": variant.name,
        "call": Measurement("call", "ms", tuple(1e3 * s for s in variant.seconds), {}).to_json(),
        "speed": Measurement("speed", "x", ratios, {}).to_json(),
        "snr_db": 10 * float(np.log10(signal / noise)) if noise else None,
        "integer_kernels": variant.integer_kernels,
    }


def describe(arguments: argparse.Namespace, bundle: Bundle, feeds: Sequence[Feeds]) -> dict[str, str]:
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in facts if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in facts if line.startswith("flags")), [])
    wide = [flag for flag in ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if flag in flags]
    shapes = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in feeds[0].items())
    layers = bundle.plan["layers"]
    quantized = sum(layer["weight_bits"] is not None for layer in layers)
    millions = sum(int(np.prod(layer["shape"])) for layer in layers) / 1e6
    versions = [f"{name} {version}" for name, version in bundle.manifest.versions.items() if name in _SHOWN]
    return {
        "command": command_line(),
        "network": f"{bundle.manifest.name}, {millions:.1f} M weights, {quantized} of {len(layers)} layers in INT8",
        "inputs": f"{shapes}; from {len(feeds)} calls of the float sampler",
        "rounds": f"{arguments.rounds} of {arguments.calls} calls each",
        "seed": str(arguments.seed),
        "processor": f"{cpu} ({', '.join(wide) or 'no integer or bfloat16 extensions'})",
        "threads": f"{arguments.threads} of {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f} processes, a mean over the last minute",
        "versions": ", ".join(versions),
    }


_SHOWN = ("python", "torch", "diffusers", "onnxruntime", "openvino", "numpy")


def command_line() -> str:
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def markdown(rows: Sequence[Mapping[str, Any]], context: Mapping[str, str]) -> str:
    lines = [f"- {name}: {text}" for name, text in context.items()]
    lines += ["", f"| | ms a call (± half IQR) | times {BASELINE} (IQR) | SNR dB | integer kernels |"]
    lines.append("|---|---:|---:|---:|---:|")
    for row in rows:
        call, speed = row["call"], row["speed"]
        low, high = np.percentile(speed["samples"], [25, 75])
        snr = "reference" if row["name"] == BASELINE else "exact" if row["snr_db"] is None else f"{row['snr_db']:.1f}"
        integers = "" if row["integer_kernels"] is None else str(row["integer_kernels"])
        lines.append(
            f"| {row['name']} | {call['median']:.2f} ± {call['iqr'] / 2:.2f} | {speed['median']:.2f} "
            f"({low:.2f} to {high:.2f}) | {snr} | {integers} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

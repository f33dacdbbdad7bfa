"""Quality of the demo's quantized forms against the float twin: what each part of the recipe is worth, ungated too.

    python benchmarks/quality.py --pictures 2000 --out benchmarks/results/quality.md

Exports one bundle per recipe, samples all with the same seeds and labels, and writes a table. Pictures are those of a
seed that no export calibrates, fits or chooses on. Everything is kept in --work: an interrupted run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from beside import beside_float

from qncd_deploy.cli.progress import Bars
from qncd_deploy.evaluate.batches import Draw
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.pipeline.export import export
from qncd_deploy.pipeline.options import ExportOptions

Recipe = dict[str, Any]

NAIVE: Recipe = {
    "calib_method": "minmax",
    "smooth": "off",
    "keep_float": 0.0,
    "split": "off",
    "asymmetric": "off",
    "recon": "off",
    "avg_bits": "off",
}
PARTS: tuple[tuple[str, Recipe], ...] = (
    ("naive: min-max, nearest, nothing else", {}),
    ("+ least-squares ranges", {"calib_method": "mse"}),
    ("+ asymmetric grids", {"asymmetric": "auto"}),
    ("+ split shortcuts", {"split": "auto"}),
    ("+ sensitive layers in float", {"keep_float": 2.0}),
    ("+ 8-bit weights where that matters most", {"avg_bits": "auto"}),
    ("+ learned rounding and steps", {"recon": "auto"}),
    ("+ smoothing, gated: the default", {"smooth": "qncd"}),
)
"""One part of the recipe after another, each on top of those before; at 8 bits some of them do nothing."""
IDLE_AT_8_BITS = ("asymmetric", "split", "recon", "avg_bits")
FORCED: tuple[tuple[str, Recipe], ...] = (
    ("smoothing forced, qncd", {"gate": False}),
    ("smoothing forced, qncd:paper", {"gate": False, "smooth": "qncd:paper"}),
)
"""Smoothing without its gate, in place of the last part."""
AT_RUN_TIME = (
    ("auto", "what auto chose"),
    ("qncd", "qncd at run time, forced"),
    ("qncd:paper", "qncd:paper at run time, forced"),
)
"""Corrections of the default, and what the table calls them."""
DEFAULT = PARTS[-1][0]


def recipes(format: str) -> dict[str, Recipe]:
    """By the name of the table's row."""
    found, recipe = {}, dict(NAIVE)
    for name, part in PARTS:
        recipe |= part
        if format != "w8a8" or not set(part) & set(IDLE_AT_8_BITS):
            found[name] = dict(recipe)
    return found | {name: {**found[DEFAULT], **part} for name, part in FORCED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("calib_data/fashion-ldm/model.ckpt"))
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--format", default="w8a8")
    parser.add_argument("--short", action="store_true", help="the first recipe and the default alone")
    parser.add_argument("--alone", action="store_true", help="the default alone")
    parser.add_argument("--ray", action="store_true", help="one process a core, one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("export"), help="where the bundles go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.md"))
    given = parser.parse_args()
    bars, bundles = Bars(), {}
    for number, (name, recipe) in enumerate(recipes(given.format).items()):
        if name != DEFAULT and (given.alone or (given.short and name != PARTS[0][0])):
            continue
        correction = "auto" if name == DEFAULT else "off"
        options = ExportOptions(
            given.checkpoint,
            name=f"quality-{number}",
            format=given.format,
            onnx_dir=given.work,
            correction=correction,
            eval_size=16,
            **recipe,
        )
        bundles[name] = export(options, bars, command="").bundle
    variants = [Variant(name, "openvino", "off", bundle=bundle) for name, bundle in bundles.items()]
    variants += [
        Variant(f"{DEFAULT}, with {words}", "openvino", method, bundle=bundles[DEFAULT])
        for method, words in AT_RUN_TIME[: 1 if given.short or given.alone else None]
    ]
    draw = Draw(given.pictures, seed=given.seed, batch_size=32, threads=1 if given.ray else None)
    pictures = given.work / "quality-pictures"
    found = beside_float(bundles[DEFAULT], variants, draw, work=pictures, bars=bars, ray=given.ray, traced=64)
    float_ = found.reference
    lines = [
        f"# Quality of the demo at {given.format.upper()}, {given.pictures} pictures of seed {given.seed}",
        "",
        f"`python benchmarks/quality.py --format {given.format} --pictures {given.pictures} --seed {given.seed}"
        f"{' --short' * given.short}{' --alone' * given.alone}`; "
        f"{float_.engine}, DDIM {float_.calls} steps, guidance 1.5; {platform.machine()}, "
        f"Python {platform.python_version()}. Intervals: 95 %, bootstrap.",
        "",
        "| network | PSNR, dB | shift | IS | accuracy | FID | output SNR first, middle, last call, dB | extra calls |",
        "|---|---|---|---|---|---|---|---|",
        f"| float | | 0 | {float_.inception_score.value:.3f} | {float_.accuracy.value:.4f} | "
        f"{float_.fid.value:.4f} | | 0 |",
    ]
    for row in found.variants:
        snr = row.output_snr_db
        lines.append(
            f"| {row.name} | {row.psnr.value:.2f} ({row.psnr.low:.2f} to {row.psnr.high:.2f}) | {row.shift.value:.6f} "
            f"({row.shift.low:.6f} to {row.shift.high:.6f}) | {row.inception_score.value:.3f} | "
            f"{row.accuracy.value:.4f} | "
            f"{row.fid.value:.4f} | "
            f"{snr[0]:.1f}, {snr[len(snr) // 2]:.1f}, {snr[-1]:.1f} | {row.extra_calls} |"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""What every correction is worth, at several bit widths: the demo with each method as published, repaired, and auto.

    python benchmarks/ablation.py --pictures 2000 --out benchmarks/results/ablation.md

    float        the float twin
    naive        weights by least squares, activations by min-max: no more (with `auto` on it in its own row)
    calibrated   Q-Diffusion's calibration: ranges of least error over all timesteps; the base of the rows below it
    METHOD       each correction on the calibrated network; NAME:paper as published
    auto         what `--correction auto` takes on the calibrated network
    default      `qncd export` as it comes: sensitive layers in float or 8 bits, rounding learned below 8 bits,
                 smoothing and correction where they help

All others are rounded to nearest. Corrections are fitted and chosen on pictures that no figure is taken of. Everything
is kept in --work: an interrupted run goes on where it stopped, and another --pictures fits nothing again.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from beside import beside_float

from qncd_deploy.cli.progress import Bars
from qncd_deploy.correct.methods import METHODS
from qncd_deploy.correct.record import load_tables
from qncd_deploy.evaluate.batches import Draw
from qncd_deploy.evaluate.compare import Comparison
from qncd_deploy.evaluate.judge import Figures
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.pipeline.export import export
from qncd_deploy.pipeline.fit import FitOptions, fit, merge_into
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.recordings import Recordings
from qncd_deploy.runtime import Bundle, Sampling

ENGINE = "openvino"
PLAIN = {"smooth": "off", "keep_float": 0.0, "split": "off", "asymmetric": "off", "recon": "off", "avg_bits": "off"}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "naive": {**PLAIN, "calib_method": "minmax"},
    "calibrated": PLAIN,
    "default": {},
}
FORMATS, MORE_FORMATS = ("w8a8", "w4a8", "w4a6"), ("w4a4",)


DDIM = Sampling(scheduler="ddim", n_steps=20, eta=0.0, guidance_scale=1.5)
MORE_SAMPLINGS = (
    replace(DDIM, guidance_scale=1.0),
    replace(DDIM, scheduler="plms"),
    replace(DDIM, scheduler="dpmpp-2m", n_steps=10),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("calib_data/fashion-ldm/model.ckpt"))
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--etas", default="0,1", help="of ddim with 20 steps and guidance 1.5")
    parser.add_argument("--ray", action="store_true", help="pictures by one process a core, one thread each")
    parser.add_argument("--full", action="store_true", help="W4A4, guidance 1, PLMS and DPM-Solver++ too")
    parser.add_argument("--work", type=Path, default=Path("export/ablation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation.md"))
    given = parser.parse_args()
    formats = [*given.formats.split(","), *(MORE_FORMATS if given.full else ())]
    samplings = [replace(DDIM, eta=float(eta)) for eta in given.etas.split(",")]
    samplings += MORE_SAMPLINGS if given.full else ()
    bars, found = Bars(), {}
    for number, network in enumerate(formats):
        bundles = {name: _bundle(given, network, name, recipe, bars) for name, recipe in RECIPES.items()}
        for sampling in samplings:
            print(f"{network}, {_words(sampling)}  ({number + 1} of {len(formats)} formats)", flush=True)
            found[network, sampling] = _row_group(given, bundles, sampling, bars)
            _write(given, found)
    print(given.out.read_text(encoding="utf-8"))


def _words(sampling: Sampling) -> str:
    eta = f", eta {sampling.eta:g}" if sampling.scheduler == "ddim" else ""
    return f"{sampling.scheduler} {sampling.n_steps} steps{eta}, guidance {sampling.guidance_scale:g}"


def _bundle(given: argparse.Namespace, network: str, name: str, recipe: Mapping[str, Any], bars: Bars) -> Bundle:
    options = ExportOptions(
        given.checkpoint,
        name=name,
        format=network,
        onnx_dir=given.work,
        calib_dir=given.work,
        correction="off",
        eval_size=8,
        **recipe,
    )
    return export(options, bars, command="").bundle


def _row_group(
    given: argparse.Namespace, bundles: Mapping[str, Bundle], sampling: Sampling, bars: Bars
) -> tuple[Comparison, Mapping[str, str]]:
    """Every row of one format and one way to sample, and what auto took in the rows that have it."""
    draw = Draw(
        given.pictures,
        seed=given.seed,
        sampling=sampling,
        batch_size=16,
        threads=1 if given.ray else None,
    )
    tables = {name: _tables(bundle, sampling, bars) for name, bundle in bundles.items()}
    variants = list(_variants(bundles, tables, draw))
    comparison = beside_float(
        bundles["calibrated"], variants, draw, work=given.work / "pictures", bars=bars, ray=given.ray, traced=32
    )
    taken = {}
    for variant in variants:
        if variant.correction == "auto":
            with variant.open(bundles["calibrated"], draw) as sampler:
                taken[variant.name] = sampler.table.method
    return comparison, taken


def _tables(bundle: Bundle, sampling: Sampling, bars: Bars) -> Path:
    """Tables of every method for this bundle and way to sample, in a file beside it."""
    words = "".join(c if c.isalnum() else "-" for c in _words(sampling))
    path = bundle.path.parent / f"{bundle.path.name}-{words}.npz"
    if not path.exists():
        with bars.stage(f"corrections of {bundle.path.name}") as tick:
            options = FitOptions(ENGINE, sampling=sampling)
            with Recordings.open(bundle.path.parent / "fits" / path.stem, bundle) as recordings:
                fitted = fit(bundle, options, recordings, tick)
        merge_into(path, [fitted])
    return path


def _variants(bundles: Mapping[str, Bundle], tables: Mapping[str, Path], draw: Draw) -> Iterator[Variant]:
    def variant(row: str, base: str, correction: str) -> Variant:
        return Variant(row, ENGINE, correction, bundle=bundles[base], tables=(tables[base],))

    yield variant("naive", "naive", "off")
    yield variant("naive, auto", "naive", "auto")
    yield variant("calibrated", "calibrated", "off")
    held = {table.method for table in load_tables(tables["calibrated"]).tables}
    for method in METHODS:
        if method in held:
            yield variant(method, "calibrated", method)
    yield variant("auto", "calibrated", "auto")
    yield variant("default, uncorrected", "default", "off")
    yield variant("default", "default", "auto")


def _write(
    given: argparse.Namespace, found: Mapping[tuple[str, Sampling], tuple[Comparison, Mapping[str, str]]]
) -> None:
    lines = [
        "# Ablation of the corrections on the demo",
        "",
        f"`python benchmarks/ablation.py --pictures {given.pictures} --seed {given.seed} --formats {given.formats} "
        f"--etas {given.etas}{' --full' if given.full else ''}`; {given.pictures} pictures of seed {given.seed}; "
        f"{platform.machine()}, Python {platform.python_version()}. Intervals: 95 %, bootstrap. Rows are explained in "
        "`benchmarks/ablation.py`. `shift` decides; FID is to the data, and falls when noise is added.",
    ]
    for (network, sampling), (comparison, taken) in found.items():
        lines += ["", f"## {network.upper()}, {_words(sampling)}", "", *_table(comparison, taken)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [
        {"format": network, "sampling": _words(sampling), "auto": taken, **comparison.to_json()}
        for (network, sampling), (comparison, taken) in found.items()
    ]
    (given.work / "ablation.json").write_text(json.dumps(rows), encoding="utf-8")


def _table(comparison: Comparison, taken: Mapping[str, str]) -> Iterator[str]:
    yield "| | shift | PSNR, dB | IS | accuracy | FID | sFID | output SNR first, middle, last call | extra calls |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for figures in (comparison.reference, *comparison.variants):
        name = f"{figures.name} = {taken[figures.name]}" if figures.name in taken else figures.name
        yield f"| {name} | " + " | ".join(_cells(figures)) + " |"


def _cells(figures: Figures) -> Iterator[str]:
    shift, psnr = figures.shift, figures.psnr
    yield "" if shift is None else f"{shift.value:.5f} ({shift.low:.5f} to {shift.high:.5f})"
    yield "" if psnr is None else f"{psnr.value:.2f} ({psnr.low:.2f} to {psnr.high:.2f})"
    for estimate, digits in (
        (figures.inception_score, 3),
        (figures.accuracy, 4),
        (figures.fid, 4),
        (figures.sfid, 4),
    ):
        yield "" if estimate is None else f"{estimate.value:.{digits}f}"
    snr = figures.output_snr_db
    yield ", ".join(f"{snr[place]:.1f}" for place in (0, len(snr) // 2, -1)) if snr else ""
    yield str(figures.extra_calls)


if __name__ == "__main__":
    main()

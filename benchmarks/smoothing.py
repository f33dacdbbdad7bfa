"""What QNCD's smoothing does by itself where groups are wide: six channels a group, at 8 and at fewer bits.

    python benchmarks/smoothing.py --out benchmarks/results/smoothing.md

The published factor is bounded by sqrt(channels per group - 1), so the demo's groups of two to four channels mute it.
No trained network with wide groups ships with this project: this one has 192 channels in 32 groups, random weights,
and group-norm gains and biases drawn wide, so that channels differ as they do in trained networks. What is measured is
arithmetic, the error of the network's output and of a free run's latents; of pictures it says nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel

from qncd_deploy.cli.progress import Bars
from qncd_deploy.engines.base import default_backend
from qncd_deploy.evaluate.batches import Draw
from qncd_deploy.evaluate.compare import compare
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.pipeline.export import export
from qncd_deploy.pipeline.options import ExportOptions

CHANNELS, GROUPS, SIZE = 192, 32, 16
SMOOTHING = ("off", "qncd", "qncd:paper")
GAIN_SPREAD, BIAS_SPREAD = 0.5, 0.3
"""Standard deviations of log gain and of bias."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="w8a8,w4a6")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/smoothing.md"))
    given = parser.parse_args()
    lines = [
        "# QNCD smoothing in wide groups",
        "",
        f"`python benchmarks/smoothing.py --formats {given.formats} --pictures {given.pictures} --seed {given.seed}`; "
        f"{CHANNELS} channels in {GROUPS} groups, {SIZE}x{SIZE}, random weights, DDIM 8 steps; smoothing forced into "
        "every block (no gate), no layer kept in float, no correction. SNR in dB against the float network.",
        "",
        "| residual blocks | format | smoothing | output SNR first, middle, last call | latent SNR, free run |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as work:
        for kind in ("default", "scale_shift"):
            folder = Path(work) / kind
            _save(folder, kind, given.seed)
            for network in given.formats.split(","):
                lines += _rows(folder, kind, network, given.pictures)
                given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _rows(folder: Path, kind: str, network: str, pictures: int) -> list[str]:
    bundles = {
        smooth: export(
            ExportOptions(
                folder,
                name=f"{kind}-{smooth.replace(':', '-')}",
                format=network,
                smooth=smooth,
                gate=False,
                keep_float=0.0,
                split="off",
                recon="off",
                correction="off",
                n_steps=8,
                calib_steps=8,
                calib_size=16,
                eval_size=2,
                onnx_dir=folder,
                calib_dir=folder,
            ),
            Bars(),
            command="",
        ).bundle
        for smooth in SMOOTHING
    }
    variants = [Variant(smooth, default_backend(), "off", bundle=bundle) for smooth, bundle in bundles.items()]
    found = compare(bundles["off"], variants, Draw(pictures, seed=1), shown=0, traced=pictures)
    words = {"default": "additive", "scale_shift": "scale-shift"}[kind]
    return [
        f"| {words} | {network} | {row.name} | "
        + ", ".join(f"{row.output_snr_db[call]:.2f}" for call in (0, 4, 7))
        + f" | {row.latent_snr_db[-1]:.2f} |"
        for row in found.variants
    ]


def _save(folder: Path, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(CHANNELS, CHANNELS),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=GROUPS,
        resnet_time_scale_shift=kind,
        add_attention=False,
    )
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(torch.from_numpy(np.exp(GAIN_SPREAD * rng.normal(size=parameter.shape))))
            elif "norm" in name and name.endswith("bias"):
                parameter.copy_(torch.from_numpy(BIAS_SPREAD * rng.normal(size=parameter.shape)))
    unet.save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")


if __name__ == "__main__":
    main()

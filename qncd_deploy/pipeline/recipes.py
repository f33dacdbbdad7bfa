"""Published settings by name, as data: what `--recipe` sets, each value with where it was read.

A recipe sets options of an export and nothing else, and any option given beside it wins. What was published and cannot
be set here is said in words (`apart`), and so is what could not be read anywhere. Papers: Q-Diffusion,
arXiv:2302.04304; PTQD, arXiv:2305.10657; QNCD, arXiv:2403.19140; scripts: as their authors released them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One option of ExportOptions, by field name, its value, and where that was read."""

    option: str
    value: Any
    source: str

    @property
    def flag(self) -> str:
        return f"--{self.option.replace('_', '-')}"


@dataclass(frozen=True)
class Recipe:
    """`title`: of what, by whom.  apart: where an export with these settings is not what was published."""

    name: str
    title: str
    settings: tuple[Setting, ...]
    apart: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        """By field of ExportOptions."""
        return {setting.option: setting.value for setting in self.settings}


def _all(source: str, **values: Any) -> tuple[Setting, ...]:
    """Settings that were read in one place."""
    return tuple(Setting(option, value, source) for option, value in values.items())


_EVERY_LAYER = _all(
    "no layer is excepted for its error in any of the papers", keep_float=0.0, avg_bits="off", first_token="off"
)
_QDIFFUSION_ONLY = _all("Q-Diffusion neither smooths nor corrects the sampling loop", smooth="off", correction="off")
_QDIFFUSION_APART = (
    "Steps of activations are learned in a second pass over the network there, when all weights are; here block by "
    "block, each block's after its weights.",
    "The released code quantizes the first and the last layer, and the Linears of the time embedding; here they stay "
    "float.",
    "q, k, v and the attention weights are quantized before their products there; here these stay float.",
    "8-bit weights have a zero point there; here they are symmetric (4-bit ones have one in both).",
)
_CLASS_TOKEN = _all(
    "keys and values of the class token are quantized like every Linear of a transformer block",
    include=("attn2.to_[kv]",),
)
_QNCD_EVERYWHERE = Setting("gate", False, "QNCD smooths every residual block, whether its error falls or not")

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "qncd-ldm4",
            "LDM-4 on ImageNet 256, QNCD",
            (
                *_all("QNCD, Table 2 (W8A8; W4A8 and W4A6 too)", format="w8a8", n_steps=20, guidance_scale=3.0),
                *_all(
                    "not in the table; eta 0 in PTQD's and D2-DPM's runs of the same rows", scheduler="ddim", eta=0.0
                ),
                *_all(
                    "QNCD, both parts; released code: S of C channels, refresh every 10 steps",
                    smooth="qncd:paper",
                    correction="qncd:paper",
                ),
                _QNCD_EVERYWHERE,
                *_CLASS_TOKEN,
                *_EVERY_LAYER,
            ),
            (
                "No script of the ImageNet runs was released, and its estimator runs in the PLMS sampler alone: these "
                "settings follow the paper, as far as it could be read.",
                "Calibration sizes of the ImageNet runs are not known; the defaults are used.",
                "Below 8 bits weights were rounded by BRECQ: give --recon paper with --format w4a8 or w4a6.",
            ),
        ),
        Recipe(
            "qncd-sd",
            "Stable Diffusion 1.4, 512x512, QNCD",
            (
                *_all(
                    "QNCD, README: --plms --weight_bit 8 --act_bit 8 --quant_act",
                    format="w8a8",
                    scheduler="plms",
                    asymmetric="all",
                ),
                *_all("scripts/txt2img.py: --ddim_steps 50, --scale 7.5", n_steps=50, guidance_scale=7.5),
                *_all("QNCD, README: --cali_n 128 --cali_st 25 --cond", calib_size=128, calib_steps=25),
                *_all(
                    "QNCD, README: --scale_split_static --sample_reverse --reverse_interval 10",
                    smooth="qncd:paper",
                    correction="qncd:paper",
                ),
                _QNCD_EVERYWHERE,
                *_all(
                    "scripts/txt2img.py sets transformer blocks to float before activations are calibrated",
                    exclude=("transformer_blocks",),
                ),
                *_all("QNCD, README: the 8-bit command has no --split", split="off"),
                *_EVERY_LAYER,
            ),
            (
                "Pictures of MS-COCO captions were measured: give them with --prompts-file.",
                "Below 8 bits weights were rounded by BRECQ: give --recon paper --split shortcut with --format w4a8.",
            ),
        ),
        Recipe(
            "qdiffusion-cifar",
            "DDPM on CIFAR-10, Q-Diffusion",
            (
                *_all("Q-Diffusion, README: --weight_bit <4 or 8> --act_bit 8 --quant_act", format="w4a8"),
                *_all("Q-Diffusion, README: --a_sym, activations are symmetric", asymmetric="auto"),
                *_all(
                    "Q-Diffusion, README: --timesteps 100 --skip_type quad --eta 0; 4 of the 100 repeat another, "
                    "which changes nothing without noise",
                    scheduler="ddim",
                    timestep_spacing="quad",
                    n_steps=96,
                    eta=0.0,
                ),
                *_all("Q-Diffusion, README: --cali_n 256 --cali_st 20", calib_size=256, calib_steps=20),
                *_all(
                    "scripts/sample_diffusion_ddim.py: scale_method max", calib_method="minmax", weight_method="minmax"
                ),
                *_all("scripts/sample_diffusion_ddim.py: 20,000 iterations, then 5,000", recon="paper"),
                *_all("Q-Diffusion, README: --split", split="shortcut"),
                *_QDIFFUSION_ONLY,
                *_EVERY_LAYER,
            ),
            _QDIFFUSION_APART,
        ),
        Recipe(
            "qdiffusion-sd",
            "Stable Diffusion 1.4, 512x512, Q-Diffusion",
            (
                *_all(
                    "Q-Diffusion, README: --plms --weight_bit <4 or 8> --act_bit 8 --quant_act",
                    format="w4a8",
                    scheduler="plms",
                    asymmetric="all",
                ),
                *_all("scripts/txt2img.py: --ddim_steps 50, --scale 7.5", n_steps=50, guidance_scale=7.5),
                *_all("Q-Diffusion, README: --cali_n 128 --cali_st 25 --cond", calib_size=128, calib_steps=25),
                *_all("scripts/txt2img.py: scale_method mse", calib_method="mse", weight_method="lp2.4"),
                *_all("scripts/txt2img.py: 20,000 iterations, then 5,000", recon="paper"),
                *_all("Q-Diffusion, README: --split", split="shortcut"),
                *_QDIFFUSION_ONLY,
                *_EVERY_LAYER,
            ),
            (
                *_QDIFFUSION_APART,
                "Blocks were learned in batches of 8 there (--cali_batch_size 8), here of 32.",
                "Calibration prompts were captions of MS-COCO: give them with --prompts-file.",
            ),
        ),
        Recipe(
            "ptqd-ldm4",
            "LDM-4 on ImageNet 256, PTQD",
            (
                *_all("quant_scripts: n_bits_w = 4, n_bits_a = 8, symmetric False", format="w4a8", asymmetric="all"),
                *_all(
                    "quant_scripts/collect_quant_error_brecq.py: ddim_steps 20, ddim_eta 0.0, scale 3.0",
                    scheduler="ddim",
                    n_steps=20,
                    eta=0.0,
                    guidance_scale=3.0,
                ),
                *_all(
                    "quant_scripts/quantize_ldm_brecq.py: 1,024 inputs at random; here 26 pictures x 20 calls x 2",
                    calib_size=26,
                    calib_steps=20,
                ),
                *_all("quant_scripts: scale_method mse", calib_method="mse", weight_method="lp2.4"),
                *_all("quant_scripts/quantize_ldm_brecq.py and _brecqA.py: AdaRound, then LSQ", recon="paper"),
                *_all(
                    "quant_scripts/brecq_quant_model.py: 'skip' and 'op' layers stay float, nothing is split",
                    exclude=("conv_shortcut", "downsamplers"),
                    split="off",
                ),
                *_all("PTQD smooths nothing", smooth="off"),
                *_all("quant_scripts/analyze_error.py, on 1,024 pictures", correction="ptqd:paper", fit_size=1024),
                *_CLASS_TOKEN,
                *_EVERY_LAYER,
            ),
            (
                "The released code has one scale for a whole weight tensor; here one per output channel.",
                "First and last layer have 8 bits there; here they stay float.",
                "Rounding took 10,000 iterations in batches of 8 there; here 20,000 in batches of 32.",
                "The paper's step-aware mixed precision is --step-bits, and not in the released code.",
            ),
        ),
    )
}

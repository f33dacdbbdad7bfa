"""Write a checkpoint of LDM-4 for ImageNet (cin256-v2) at its true shape, random weights.

    python benchmarks/ldm4.py FOLDER        then the command that it prints

400 M parameters, latents of 3x64x64, a VQ first stage, 1001 classes; the config is the published one. Time and memory
of an export depend on shapes alone, and so do speeds. What the pictures look like, and how well smoothing or a
correction does, cannot be told from random weights.
Source: Rombach et al., arXiv:2112.10752, configs/latent-diffusion/cin256-v2.yaml.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from qncd_deploy.checkpoint import Source
from qncd_deploy.models.first_stage import build_decoder, decoder_sources, read_first_stage_params
from qncd_deploy.models.ldm_config import Section
from qncd_deploy.models.ldm_unet import build_unet, read_unet_params, unet_sources

UNET: dict[str, Any] = {
    **{"image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 192, "num_res_blocks": 2},
    **{"attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 5], "num_heads": 1},
    **{"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 512},
}
DDCONFIG = {
    **{"double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128},
    **{"ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0},
}
FIRST_STAGE = {"embed_dim": 3, "n_embed": 8192, "ddconfig": DDCONFIG, "lossconfig": {"target": "torch.nn.Identity"}}
CLASSES: dict[str, Any] = {"n_classes": 1001, "embed_dim": 512, "key": "class_label"}
CONFIG = {
    "model": {
        "base_learning_rate": 1e-4,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            **{"linear_start": 0.0015, "linear_end": 0.0195, "num_timesteps_cond": 1, "log_every_t": 200},
            **{"timesteps": 1000, "first_stage_key": "image", "cond_stage_key": "class_label", "image_size": 64},
            **{"channels": 3, "cond_stage_trainable": True, "conditioning_key": "crossattn", "monitor": "val/loss"},
            "use_ema": False,
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
            "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface", "params": FIRST_STAGE},
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": CLASSES},
        },
    }
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where model.ckpt (1.8 GB) and config.yaml are written")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    path = write(arguments.folder, seed=arguments.seed)
    command = ["qncd-export", str(path), "--int8", "--name", "ldm4", "--n-steps", "4", "--calib-size", "2"]
    command += ["--calib-steps", "4", "--eval-size", "2", "--fit-size", "2"]
    print(shlex.join(command))


def write(folder: Path, *, seed: int) -> Path:
    """The checkpoint and its config. Returns the path of the former."""
    generator = torch.Generator().manual_seed(seed)
    unet = read_unet_params(Section(Path("config.yaml"), "unet_config.params", UNET))
    stage = read_first_stage_params(Section(Path("config.yaml"), "first_stage_config.params", FIRST_STAGE), vq=True)
    parts = {
        "model.diffusion_model": unet_sources(build_unet(unet, UNET["image_size"]), unet),
        "first_stage_model": decoder_sources(build_decoder(stage, scale_factor=1.0)),
        "cond_stage_model": {"": Source("embedding.weight", (CLASSES["n_classes"], CLASSES["embed_dim"]))},
    }
    state = {f"{prefix}.{key}": value for prefix, part in parts.items() for key, value in _random(part, generator)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.ckpt"
    torch.save({"state_dict": state}, path)
    path.with_name("config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    return path


def _random(sources: Mapping[str, Source], generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of variance 1 / fan-in keep activations near 1 between the norms; norms scale by about 1."""
    for key, shape in {source.key: source.shape for source in sources.values()}.items():
        values = torch.randn(shape, generator=generator)
        if "embedding" in key:  # codes and classes: inputs, not sums
            pass
        elif len(shape) > 1:
            values *= math.prod(shape[1:]) ** -0.5
        else:
            values = 0.1 * values + key.endswith("weight")
        yield key, values


if __name__ == "__main__":
    main()

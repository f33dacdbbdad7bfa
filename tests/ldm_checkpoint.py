"""CompVis checkpoints on disk with random weights: the smallest networks that have every kind of part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from ldm_reference import FirstStage, UNetModel, randomize

from qncd_deploy.models.load import load_source

BASE = {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1}
UNETS: dict[str, dict[str, Any]] = {
    "transformer-head-channels": {
        **BASE,
        **{"channel_mult": [1, 2], "attention_resolutions": [1, 2], "num_head_channels": 16},
        **{"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 24},
    },
    "transformer-heads-depth-2-scale-shift": {
        **BASE,
        **{"channel_mult": [1, 2, 3], "attention_resolutions": [2], "num_heads": 2, "num_res_blocks": 2},
        **{"use_spatial_transformer": True, "transformer_depth": 2, "context_dim": 24, "use_scale_shift_norm": True},
    },
    "transformer-linear-projection": {
        **BASE,
        **{"channel_mult": [1, 2], "attention_resolutions": [1], "num_heads": 1, "use_linear_in_transformer": True},
        **{"use_spatial_transformer": True, "context_dim": 24},
    },
    "attention-head-channels": {
        **BASE,
        **{"channel_mult": [1, 2], "attention_resolutions": [2], "num_head_channels": 8, "num_res_blocks": 2},
    },
    "attention-heads-scale-shift-updown": {
        **BASE,
        **{"channel_mult": [1, 2, 3], "attention_resolutions": [1, 2], "num_heads": 4},
        **{"use_scale_shift_norm": True, "resblock_updown": True},
    },
    "attention-new-order": {
        **BASE,
        **{"channel_mult": [1, 2], "attention_resolutions": [1, 2], "num_heads": 2, "use_new_attention_order": True},
    },
    "attention-class-labels": {
        **BASE,
        **{"channel_mult": [1, 2], "attention_resolutions": [2], "num_heads": 2, "num_classes": 5},
    },
}
DDCONFIG = {
    **{"double_z": True, "z_channels": 3, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32},
    **{"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
}
STAGES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"embed_dim": 3, "ddconfig": DDCONFIG},
    "VQModelInterface": {"embed_dim": 3, "n_embed": 37, "ddconfig": {**DDCONFIG, "double_z": False}},
}


def config_of(unet: dict[str, Any], kind: str = "AutoencoderKL", **params: Any) -> dict[str, Any]:
    if unet.get("use_spatial_transformer"):
        params.setdefault(
            "cond_stage_config",
            {
                "target": "ldm.modules.encoders.modules.ClassEmbedder",
                "params": {"n_classes": 6, "embed_dim": unet["context_dim"], "key": "class_label"},
            },
        )
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                **{"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 100, "image_size": 8, "channels": 3},
                **{"scale_factor": 0.5, "cond_stage_config": "__is_unconditional__"},
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
                "first_stage_config": {"target": f"ldm.models.autoencoder.{kind}", "params": STAGES[kind]},
                **params,
            },
        }
    }


class Written:
    """A checkpoint on disk, and the networks whose weights it holds."""

    def __init__(self, folder: Path, unet: dict[str, Any], kind: str = "AutoencoderKL", **params: Any) -> None:
        self.config = config_of(unet, kind, **params)
        self.unet = randomize(UNetModel(**unet), 1)
        self.stage = randomize(FirstStage(**STAGES[kind]), 2)
        self.state = {f"model.diffusion_model.{k}": v for k, v in self.unet.state_dict().items()}
        self.state |= {f"first_stage_model.{k}": v for k, v in self.stage.state_dict().items()}
        self.state |= {
            "first_stage_model.encoder.conv_in.bias": torch.zeros(3),
            "first_stage_model.loss.w": torch.ones(1),
        }
        if unet.get("use_spatial_transformer"):
            rows = torch.randn(6, unet["context_dim"], generator=torch.Generator().manual_seed(3))
            self.state["cond_stage_model.embedding.weight"] = rows
        self.path = folder / "model.ckpt"

    def save(self) -> Path:
        torch.save({"state_dict": self.state, "global_step": 7}, self.path)
        self.path.with_name("config.yaml").write_text(yaml.safe_dump(self.config))
        return self.path

    def load(self, **options: Any):
        return load_source(self.save(), **options)

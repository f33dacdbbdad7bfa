"""Names of DDPM's PyTorch networks, which CompVis' first stages inherited: from a diffusers parameter to theirs.

    down_blocks.i: resnets.j, attentions.j, downsamplers.0      down.i: block.j, attn.j, downsample
    mid_block: resnets.0, attentions.0, resnets.1               mid: block_1, attn_1, block_2
    up_blocks.i: resnets.j, attentions.j, upsamplers.0          up.{levels - 1 - i}: block.j, attn.j, upsample
    time_embedding.linear_1, _2                                 temb.dense.0, .1
    conv_norm_out                                               norm_out

Source: pesser/pytorch_diffusion, pytorch_diffusion/model.py, after Ho et al., arXiv:2006.11239; then
Rombach et al., arXiv:2112.10752, ldm/modules/diffusionmodules/model.py.
"""

from __future__ import annotations

import re
from functools import partial

import torch

from qncd_deploy.checkpoint import Source

GROUPS = 32
"""Of every GroupNorm."""

_THEIRS = {
    "time_embedding.linear_1.": "temb.dense.0.",
    "time_embedding.linear_2.": "temb.dense.1.",
    "down_blocks.": "down.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    ".resnets.": ".block.",
    ".attentions.": ".attn.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".time_emb_proj.": ".temb_proj.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
    "conv_norm_out.": "norm_out.",
}


def ddpm_source(name: str, shape: tuple[int, ...], *, levels: int) -> Source:
    """Where the parameter `name` of a diffusers module with `levels` resolutions comes from."""
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)  # they count from the picture
    for ours, theirs in _THEIRS.items():
        key = key.replace(ours, theirs)
    if re.search(r"\.(q|k|v|proj_out)\.weight$", key):  # 1x1 convolutions there, Linear here
        return Source(key, (*shape, 1, 1), partial(torch.reshape, shape=shape))
    return Source(key, shape)

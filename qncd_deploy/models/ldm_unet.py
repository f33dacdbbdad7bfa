"""CompVis' UNetModel as a diffusers module: its config, its module, and where each parameter comes from.

    input_blocks.0.0                conv_in                        time_embed.0, .2   time_embedding.linear_1, _2
    input_blocks.{1 + i(n+1) + j}   down_blocks.i: .0 resnets.j, .1 attentions.j;  j = n: downsamplers.0
    middle_block.0, .1, .2          mid_block: resnets.0, attentions.0, resnets.1
    output_blocks.{i(n+1) + j}      up_blocks.i: .0 resnets.j, .1 attentions.j, the last one upsamplers.0
    out.0, out.2                    conv_norm_out, conv_out        n = num_res_blocks

With a spatial transformer it is a UNet2DConditionModel, otherwise a UNet2DModel. diffusers' own converter serves Stable
Diffusion: it drops resblock_updown, fused qkv and num_head_channels without a word, so the names are mapped here, from
the module to the checkpoint; that way every tensor is accounted for on both sides.
Source: Rombach et al., arXiv:2112.10752, ldm/modules/diffusionmodules/openaimodel.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from qncd_deploy.checkpoint import Source
from qncd_deploy.models.conditional_unet import ConditionalUNet
from qncd_deploy.models.ldm_config import Section
from qncd_deploy.models.source import TAKES_PICTURES

_GROUPS = 32  # GroupNorm32, everywhere
_SEQUENTIAL = "sequential"  # what generative-models calls pooled text and sizes, in the place of classes
_SIZE_WIDTH = 256  # channels that each size is embedded in
_KNOWN: dict[str, object] = {
    **dict.fromkeys(
        ["in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions", "channel_mult"]
    ),
    **dict.fromkeys(["num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order"]),
    **dict.fromkeys(["use_spatial_transformer", "transformer_depth", "context_dim", "use_linear_in_transformer"]),
    **dict.fromkeys(["use_scale_shift_norm", "resblock_updown", "num_classes", "adm_in_channels"]),
    **dict.fromkeys(["spatial_transformer_attn_type"]),
    # How it was trained or run, not what it computes; "legacy" picks between two spellings of the same head count.
    **dict.fromkeys(["image_size", "dropout", "use_checkpoint", "use_fp16", "use_bf16", "legacy"]),
    "conv_resample": True,
    "dims": 2,
    "disable_self_attentions": False,
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(
    r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
)


@dataclass(frozen=True)
class UNetParams:
    """The entries of `unet_config.params` that shape the network; `heads` per level."""

    in_channels: int
    out_channels: int
    model_channels: int
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    attention: tuple[bool, ...]
    heads: tuple[int, ...]
    scale_shift: bool
    resblock_updown: bool
    new_attention_order: bool
    spatial_transformer: bool
    linear_projection: bool
    transformer_depth: tuple[int, ...]
    context_dim: int | None
    num_classes: int | None
    text_and_sizes: int | None

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.model_channels * mult for mult in self.channel_mult)


def read_unet_params(section: Section) -> UNetParams:
    """Check and read `unet_config.params`. Raises CheckpointError naming the entry that is missing or unsupported."""
    section.only(_KNOWN)
    channel_mult = section.need_ints("channel_mult")
    attention_resolutions = section.need_ints("attention_resolutions")
    channels = [section.need("model_channels", int) * mult for mult in channel_mult]
    transformer = section.get("use_spatial_transformer", False)
    classes = section.entries.get("num_classes")
    params = UNetParams(
        in_channels=section.need("in_channels", int),
        out_channels=section.need("out_channels", int),
        model_channels=section.need("model_channels", int),
        num_res_blocks=section.need("num_res_blocks", int),
        channel_mult=channel_mult,
        attention=tuple(2**level in attention_resolutions for level in range(len(channel_mult))),
        heads=_heads(section, channels),
        scale_shift=section.get("use_scale_shift_norm", False),
        resblock_updown=section.get("resblock_updown", False),
        new_attention_order=section.get("use_new_attention_order", False),
        spatial_transformer=transformer,
        linear_projection=section.get("use_linear_in_transformer", False),
        transformer_depth=_depths(section, len(channel_mult)),
        context_dim=section.need("context_dim", int) if transformer else None,
        num_classes=section.need("num_classes", int) if classes not in (None, _SEQUENTIAL) else None,
        text_and_sizes=section.need("adm_in_channels", int) if classes == _SEQUENTIAL else None,
    )
    if params.out_channels != params.in_channels:
        kind = TAKES_PICTURES.get(params.in_channels) if transformer else None
        found = f"is {params.out_channels}, in_channels {params.in_channels}"
        section.fail("out_channels", f"{found}: {'' if kind is None else f'{kind}; '}not supported.")
    if any(channel % _GROUPS for channel in channels) or not channels:
        section.fail("model_channels", f"times channel_mult gives {channels}, expected multiples of {_GROUPS}.")
    if transformer and params.resblock_updown:
        section.fail("resblock_updown", "with use_spatial_transformer is not supported.")
    if not transformer and section.entries.get("context_dim") is not None:
        section.fail("context_dim", "needs use_spatial_transformer: true.")
    return params


def build_unet(params: UNetParams, sample_size: int) -> UNet2DModel | ConditionalUNet:
    """The diffusers module, on the meta device: parameters have shapes and no memory yet."""
    levels = range(len(params.channels))
    common = {
        "sample_size": sample_size,
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
        "block_out_channels": params.channels,
        "layers_per_block": params.num_res_blocks,
        "norm_num_groups": _GROUPS,
        "resnet_time_scale_shift": "scale_shift" if params.scale_shift else "default",
        "num_class_embeds": params.num_classes,
    }
    with torch.device("meta"):
        if params.spatial_transformer:
            return ConditionalUNet(
                **common,
                down_block_types=[_block("CrossAttn", "Down", params.attention[i]) for i in levels],
                up_block_types=[_block("CrossAttn", "Up", params.attention[i]) for i in reversed(levels)],
                cross_attention_dim=params.context_dim,
                transformer_layers_per_block=params.transformer_depth,
                use_linear_projection=params.linear_projection,
                attention_head_dim=params.heads,  # diffusers means the number of heads, by a name it cannot change
                **_addition(params),
            )
        plain = "Resnet{}sampleBlock2D" if params.resblock_updown else "{}Block2D"
        resample = "resnet" if params.resblock_updown else "conv"
        unet = UNet2DModel(
            **common,
            down_block_types=["AttnDownBlock2D" if params.attention[i] else plain.format("Down") for i in levels],
            up_block_types=["AttnUpBlock2D" if params.attention[i] else plain.format("Up") for i in reversed(levels)],
            downsample_type=resample,
            upsample_type=resample,
            attn_norm_num_groups=_GROUPS,  # or the middle attention loses its norm in scale-shift networks
            attention_head_dim=None,
        )
    # UNet2DModel knows one head width for all levels, CompVis also fixes the number of heads.
    heads_at = dict(zip(params.channels, params.heads, strict=True))
    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = module.sliceable_head_dim = heads_at[module.query_dim]
            module.scale = (module.query_dim // module.heads) ** -0.5
    return unet


def unet_sources(unet: UNet2DModel | ConditionalUNet, params: UNetParams) -> dict[str, Source]:
    """Where each parameter of the module comes from, by CompVis names below `model.diffusion_model.`."""
    return {name: _source(name, tuple(value.shape), params) for name, value in unet.state_dict().items()}


def unet_entry(key: str, dim: int | None) -> str:
    """The entry of `unet_config.params` to blame for tensor `key`, whose dimension `dim` differs (None: it is there or
    not at all)."""
    blame = [
        (r"input_blocks\.0\.0\.weight", 1, "in_channels"),
        (r"input_blocks\.0\.0\.|time_embed\.", 0, "model_channels"),
        (r"out\.2\.", 0, "out_channels"),
        (r"label_emb\.", 0, "num_classes"),
        (r"label_emb\.", None, "num_classes"),
        (r".*\.attn2\.to_[kv]\.", 1, "context_dim"),
        (r".*\.emb_layers\.", 0, "use_scale_shift_norm or channel_mult"),
        (r".*\.transformer_blocks\.[1-9]", None, "transformer_depth"),
        (r".*\.(transformer_blocks|qkv|proj_in|proj_out)\.", None, "use_spatial_transformer and attention_resolutions"),
        (r".*\.[12]\.(in_layers|out_layers|emb_layers)\.", None, "resblock_updown"),
    ]
    for pattern, at, entry in blame:
        if at == dim and re.match(pattern, key):
            return entry
    return "model_channels and channel_mult" if dim is not None else "channel_mult and num_res_blocks"


def _depths(section: Section, levels: int) -> tuple[int, ...]:
    """Transformer blocks per level, one number for all or a list."""
    if isinstance(section.entries.get("transformer_depth"), (list, tuple)):
        depths = section.need_ints("transformer_depth")
        if len(depths) != levels:
            section.fail("transformer_depth", f"has {len(depths)} entries, channel_mult {levels}.")
        return depths
    return (section.get("transformer_depth", 1),) * levels


def _addition(params: UNetParams) -> dict[str, object]:
    """SDXL: pooled text and the embedded sizes of the picture join the time embedding."""
    if params.text_and_sizes is None:
        return {}
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _SIZE_WIDTH,
        "projection_class_embeddings_input_dim": params.text_and_sizes,
    }


def _heads(section: Section, channels: list[int]) -> tuple[int, ...]:
    """Heads per level: CompVis lets num_head_channels win over num_heads; -1 means not given."""
    count, width = section.get("num_heads", -1), section.get("num_head_channels", -1)
    upsample = section.get("num_heads_upsample", -1)
    if count < 1 and width < 1:
        section.fail("num_heads", "and num_head_channels are both missing. Give the checkpoint's own config.")
    if width < 1 and upsample not in (-1, count):
        section.fail("num_heads_upsample", f"is {upsample}, num_heads {count}: different counts are not supported.")
    key, divisor = ("num_head_channels", width) if width > 0 else ("num_heads", count)
    if any(channel % divisor for channel in channels):
        section.fail(key, f"is {divisor}, which does not divide the channels {channels}.")
    return tuple(channel // width if width > 0 else count for channel in channels)


def _block(attention: str, direction: str, has_attention: bool) -> str:
    return f"{attention if has_attention else ''}{direction}Block2D"


def _source(name: str, shape: tuple[int, ...], params: UNetParams) -> Source:
    block = _BLOCK.match(name)
    if block is None:
        module, _, parameter = name.rpartition(".")
        return Source(f"{_OUTER[module]}.{parameter}", shape)
    side, level, kind, index = block[1], int(block[2] or 0), block[3], int(block[4])
    n, rest = params.num_res_blocks, name[block.end() :]
    if side == "down_blocks":
        place = f"input_blocks.{1 + level * (n + 1) + (n if kind == 'downsamplers' else index)}"
        place += ".1" if kind == "attentions" else ".0"
    elif side == "mid_block":
        place = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
    else:
        place = f"output_blocks.{level * (n + 1) + (n if kind == 'upsamplers' else index)}"
        after_attention = params.attention[len(params.attention) - 1 - level]
        place += {"resnets": ".0", "attentions": ".1", "upsamplers": ".2" if after_attention else ".1"}[kind]
    if kind == "attentions" and not params.spatial_transformer:
        return _attention_source(place, rest, shape, params)
    if kind == "attentions":
        return Source(f"{place}.{rest}", shape)
    module, _, parameter = rest.rpartition(".")
    inner = "op" if kind == "downsamplers" and module == "conv" else _RESNET.get(module, module)
    return Source(f"{place}.{inner}.{parameter}", shape)


def _attention_source(place: str, rest: str, shape: tuple[int, ...], params: UNetParams) -> Source:
    """AttentionBlock: 1-D convolutions (O, I, 1), and q, k, v fused into one."""
    module, _, parameter = rest.rpartition(".")
    conv = (1,) if parameter == "weight" else ()
    if module == "group_norm":
        return Source(f"{place}.norm.{parameter}", shape)
    if module == "to_out.0":
        return Source(f"{place}.proj_out.{parameter}", (*shape, *conv), partial(torch.reshape, shape=shape))
    part = ("to_q", "to_k", "to_v").index(module)
    heads = dict(zip(params.channels, params.heads, strict=True))[shape[0]]
    take = partial(_unfuse, part=part, heads=heads, parts_first=params.new_attention_order, shape=shape)
    return Source(f"{place}.qkv.{parameter}", (3 * shape[0], *shape[1:], *conv), take)


def _unfuse(qkv: Tensor, *, part: int, heads: int, parts_first: bool, shape: tuple[int, ...]) -> Tensor:
    """One of q, k, v. Rows of QKVAttentionLegacy run (head, part, width), those of QKVAttention (part, head, width)."""
    rows = qkv.reshape(3, -1) if parts_first else qkv.reshape(heads, 3, -1).transpose(0, 1)
    return rows[part].reshape(shape).contiguous()

"""The second half of an autoencoder: latents as the sampler leaves them -> pictures in [-1, 1].

    picture = decoder(post_quant_conv(nearest code(latents / scale_factor)))      the code book only in VQ models

Only the decoder is built and loaded; sampling never encodes. CompVis' AutoencoderKL and VQModelInterface become
diffusers' Decoder, by names mapped from the module to the checkpoint (diffusers' converter knows no attention inside a
level, which kl-f16 and vq-f8 have). Source: Rombach et al., arXiv:2112.10752, ldm/modules/diffusionmodules/model.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from qncd_deploy.checkpoint import Source
from qncd_deploy.models.ddpm_layout import GROUPS, ddpm_source
from qncd_deploy.models.ldm_config import Section

UNUSED_PREFIXES = ("encoder.", "quant_conv.", "loss.", "model_ema.")
"""What a CompVis first stage holds and decoding does not need."""

_FIRST_STAGE_KNOWN: dict[str, object] = {
    **dict.fromkeys(["embed_dim", "n_embed", "ddconfig"]),
    # How it was trained: nothing that decoding computes.
    **dict.fromkeys(["lossconfig", "ckpt_path", "ignore_keys", "image_key", "monitor", "scheduler_config", "use_ema"]),
    **dict.fromkeys(["colorize_nlabels", "batch_resize_range", "sane_index_shape", "learn_logvar", "lr_g_factor"]),
}
_DDCONFIG_KNOWN: dict[str, object] = {
    **dict.fromkeys(["ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels", "out_ch"]),
    **dict.fromkeys(["in_channels", "double_z", "dropout"]),
    "attn_type": "vanilla",
    "resamp_with_conv": True,
    "tanh_out": False,
    "give_pre_end": False,
    "use_linear_attn": False,
}


class Codebook(nn.Module):
    """The code nearest to each latent vector (VQModelInterface.decode quantizes first). (N, D, H, W) -> the same."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)

    def forward(self, latents: Tensor) -> Tensor:
        vectors = latents.permute(0, 2, 3, 1)
        codes = self.embedding.weight
        # |v - e|^2 without |v|^2, which is the same for every code
        distance = codes.square().sum(1) - 2 * vectors @ codes.T
        return self.embedding(distance.argmin(-1)).permute(0, 3, 1, 2)


class LatentDecoder(nn.Module):
    """(N, C, H, W) float32 latents, as the sampler leaves them -> (N, C', fH, fW) pictures in [-1, 1], not clipped."""

    def __init__(
        self, decoder: nn.Module, post_quant_conv: nn.Module | None, codebook: nn.Module | None, scale_factor: float
    ) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.codebook = codebook
        self.post_quant_conv = post_quant_conv
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        z = latents * (1.0 / self.scale_factor)
        if self.codebook is not None:
            z = self.codebook(z)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)


@dataclass(frozen=True)
class FirstStageParams:
    """The entries of `first_stage_config.params` that shape the decoder; `codes` is None for a KL autoencoder."""

    embed_dim: int
    codes: int | None
    z_channels: int
    out_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]

    @property
    def factor(self) -> int:
        """How much larger the picture is than the latents."""
        return 2 ** (len(self.channels) - 1)


def read_first_stage_params(section: Section, *, vq: bool) -> FirstStageParams:
    """Check and read `first_stage_config.params`. Raises CheckpointError naming the missing or unsupported entry."""
    section.only(_FIRST_STAGE_KNOWN)
    net = section.section("ddconfig")
    net.only(_DDCONFIG_KNOWN)
    channels = tuple(net.need("ch", int) * mult for mult in net.need_ints("ch_mult"))
    if not channels or any(channel % GROUPS for channel in channels):
        net.fail("ch", f"times ch_mult gives {list(channels)}, expected multiples of {GROUPS}.")
    resolution, attention = net.need("resolution", int), net.need_ints("attn_resolutions")
    return FirstStageParams(
        embed_dim=section.need("embed_dim", int),
        codes=section.need("n_embed", int) if vq else None,
        z_channels=net.need("z_channels", int),
        out_channels=net.need("out_ch", int),
        channels=channels,
        num_res_blocks=net.need("num_res_blocks", int),
        attention=tuple(resolution // 2**level in attention for level in range(len(channels))),
    )


def build_decoder(params: FirstStageParams, scale_factor: float) -> LatentDecoder:
    """The module, on the meta device."""
    with torch.device("meta"):
        decoder = Decoder(
            in_channels=params.z_channels,
            out_channels=params.out_channels,
            up_block_types=tuple(f"{'Attn' if on else ''}UpDecoderBlock2D" for on in reversed(params.attention)),
            block_out_channels=params.channels,
            layers_per_block=params.num_res_blocks,
            norm_num_groups=GROUPS,
        )
        codebook = None if params.codes is None else Codebook(params.codes, params.embed_dim)
        return LatentDecoder(decoder, nn.Conv2d(params.embed_dim, params.z_channels, 1), codebook, scale_factor)


def decoder_sources(decoder: LatentDecoder) -> dict[str, Source]:
    """Where each parameter comes from, by CompVis names below `first_stage_model.`."""
    levels = len(decoder.decoder.up_blocks)
    return {
        name: ddpm_source(name.replace("codebook.", "quantize."), tuple(value.shape), levels=levels)
        for name, value in decoder.state_dict().items()
    }


def decoder_entry(key: str, dim: int | None) -> str:
    """The entry of `first_stage_config.params` to blame for tensor `key`, whose dimension `dim` differs."""
    blame = [
        (r"quantize\.", 0, "n_embed"),
        (r"quantize\.", 1, "embed_dim"),
        (r"quantize\.", None, "first_stage_config.target (VQModelInterface or AutoencoderKL)"),
        (r"post_quant_conv\.", 1, "embed_dim"),
        (r"post_quant_conv\.", 0, "ddconfig.z_channels"),
        (r"decoder\.conv_in\.", 1, "ddconfig.z_channels"),
        (r"decoder\.conv_out\.", 0, "ddconfig.out_ch"),
        (r"decoder\.up\.\d+\.attn\.", None, "ddconfig.attn_resolutions"),
    ]
    for pattern, at, entry in blame:
        if at == dim and re.match(pattern, key):
            return entry
    return "ddconfig.ch and ddconfig.ch_mult" if dim is not None else "ddconfig.ch_mult and ddconfig.num_res_blocks"

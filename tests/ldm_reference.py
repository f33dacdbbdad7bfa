"""CompVis' networks written again for the tests, with CompVis' parameter names and nothing of diffusers.

An independent yardstick: `UNetModel` and `FirstStage` follow the published structure of Rombach et al.,
arXiv:2112.10752 (ldm/modules/diffusionmodules/openaimodel.py and model.py, ldm/modules/attention.py), reduced to what
inference needs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that leave no path silent: CompVis starts many convolutions at zero, which would hide their mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1:
                parameter.mul_(math.prod(parameter.shape[1:]) ** -0.5)
            else:
                parameter.mul_(0.3).add_(0.2)
    return module.eval().requires_grad_(False)


class ResBlock(nn.Module):
    def __init__(self, ch: int, emb: int, out: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if ch == out else nn.Conv2d(ch, out, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = (F.interpolate(v, scale_factor=2, mode="nearest") for v in (h, x))
        h = self.in_layers[2](h)
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    def __init__(self, ch: int, heads: int, parts_first: bool) -> None:
        super().__init__()
        self.heads, self.parts_first = heads, parts_first
        self.norm = nn.GroupNorm(32, ch)
        self.qkv = nn.Conv1d(ch, 3 * ch, 1)
        self.proj_out = nn.Conv1d(ch, ch, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        n, c, *sides = x.shape
        flat = x.reshape(n, c, -1)
        qkv = self.qkv(self.norm(flat))
        width = c // self.heads
        if self.parts_first:  # QKVAttention
            q, k, v = (part.reshape(n * self.heads, width, -1) for part in qkv.chunk(3, dim=1))
        else:  # QKVAttentionLegacy
            q, k, v = qkv.reshape(n * self.heads, 3 * width, -1).split(width, dim=1)
        scale = width**-0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(n, c, -1)
        return (flat + self.proj_out(h)).reshape(n, c, *sides)


class CrossAttention(nn.Module):
    def __init__(self, query: int, context: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query, heads * width, bias=False)
        self.to_k = nn.Linear(context, heads * width, bias=False)
        self.to_v = nn.Linear(context, heads * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * width, query), nn.Dropout())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for value in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weight = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.to_out((weight @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, ch: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(ch, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, ch: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(ch, 4 * ch), nn.Dropout(), nn.Linear(4 * ch, ch))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, ch: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(ch, ch, heads, ch // heads)
        self.ff = FeedForward(ch)
        self.attn2 = CrossAttention(ch, context, heads, ch // heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(ch), nn.LayerNorm(ch), nn.LayerNorm(ch)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, ch: int, context: int, heads: int, depth: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(32, ch, eps=1e-6)
        self.proj_in = nn.Linear(ch, ch) if linear else nn.Conv2d(ch, ch, 1)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(ch, context, heads) for _ in range(depth))
        self.proj_out = nn.Linear(ch, ch) if linear else nn.Conv2d(ch, ch, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        n, c, height, width = x.shape
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).reshape(n, c, height, width)
        return (h if self.linear else self.proj_out(h)) + x


class Downsample(nn.Module):
    def __init__(self, ch: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(ch, ch, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, ch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stem(nn.Conv2d):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return super().forward(x)


class UNetModel(nn.Module):
    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: list[int],
        channel_mult: list[int],
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        use_linear_in_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int = 0,
        num_classes: int | None = None,
        image_size: int = 0,
    ) -> None:
        super().__init__()
        emb, self.model_channels = 4 * model_channels, model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        def res(ch: int, out: int, resample: str = "") -> ResBlock:
            return ResBlock(ch, emb, out, use_scale_shift_norm, resample)

        def attention(ch: int) -> nn.Module:
            heads = num_heads if num_head_channels == -1 else ch // num_head_channels
            if use_spatial_transformer:
                return SpatialTransformer(ch, context_dim, heads, transformer_depth, use_linear_in_transformer)
            return AttentionBlock(ch, heads, use_new_attention_order)

        ch, skips, ds = model_channels, [model_channels], 1
        self.input_blocks = nn.ModuleList([nn.ModuleList([Stem(in_channels, ch, 3, padding=1)])])
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                block = [res(ch, mult * model_channels)]
                ch = mult * model_channels
                if ds in attention_resolutions:
                    block.append(attention(ch))
                self.input_blocks.append(nn.ModuleList(block))
                skips.append(ch)
            if level != len(channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([res(ch, ch, "down") if resblock_updown else Downsample(ch)]))
                skips.append(ch)
                ds *= 2
        self.middle_block = nn.ModuleList([res(ch, ch), attention(ch), res(ch, ch)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                block = [res(ch + skips.pop(), mult * model_channels)]
                ch = mult * model_channels
                if ds in attention_resolutions:
                    block.append(attention(ch))
                if level and i == num_res_blocks:
                    block.append(res(ch, ch, "up") if resblock_updown else Upsample(ch))
                    ds //= 2
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        half = self.model_channels // 2
        angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1))
        if y is not None:
            emb = emb + self.label_emb(y)
        kept = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, emb, context)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, emb, context)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], dim=1)
            for layer in block:
                x = layer(x, emb, context)
        return self.out(x)


class ResnetBlock(nn.Module):
    def __init__(self, ch: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, ch, eps=1e-6), nn.Conv2d(ch, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        if ch != out:
            self.nin_shortcut = nn.Conv2d(ch, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, ch: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, ch, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(ch, ch, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weight = (torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bcj,bij->bci", v, weight).reshape(x.shape))


class Mid(nn.Module):
    def __init__(self, ch: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(ch, ch), AttnBlock(ch), ResnetBlock(ch, ch)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Decoder(nn.Module):
    def __init__(
        self,
        *,
        ch: int,
        ch_mult: list[int],
        num_res_blocks: int,
        attn_resolutions: list[int],
        resolution: int,
        z_channels: int,
        out_ch: int,
        **_training: object,
    ) -> None:
        super().__init__()
        levels, width = len(ch_mult), ch * ch_mult[-1]
        self.conv_in, self.mid = nn.Conv2d(z_channels, width, 3, padding=1), Mid(width)
        ups = []
        for level in reversed(range(levels)):
            up = nn.Module()
            up.block, up.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                up.block.append(ResnetBlock(width, ch * ch_mult[level]))
                width = ch * ch_mult[level]
                if resolution // 2**level in attn_resolutions:
                    up.attn.append(AttnBlock(width))
            if level:
                up.upsample = Upsample(width)
            ups.insert(0, up)
        self.up = nn.ModuleList(ups)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for up in reversed(self.up):
            for i, block in enumerate(up.block):
                h = block(h)
                h = up.attn[i](h) if len(up.attn) else h
            h = up.upsample(h) if hasattr(up, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))


class Quantizer(nn.Module):
    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)

    def forward(self, z: Tensor) -> Tensor:
        flat = z.permute(0, 2, 3, 1)
        distance = (flat[..., None, :] - self.embedding.weight).square().sum(-1)
        return self.embedding.weight[distance.argmin(-1)].permute(0, 3, 1, 2)


class FirstStage(nn.Module):
    """The decoding half of AutoencoderKL, or with `n_embed` of VQModelInterface, whose decode() quantizes first."""

    def __init__(self, *, embed_dim: int, ddconfig: dict, n_embed: int | None = None, **_training: object) -> None:
        super().__init__()
        self.quantize = nn.Identity() if n_embed is None else Quantizer(n_embed, embed_dim)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.decoder = Decoder(**ddconfig)

    def decode(self, latents: Tensor, scale_factor: float) -> Tensor:
        return self.decoder(self.post_quant_conv(self.quantize(latents / scale_factor)))

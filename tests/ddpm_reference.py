"""DDPM's network written again for the tests, with pesser/pytorch_diffusion's parameter names and nothing of diffusers.

An independent yardstick: the published structure (Ho et al., arXiv:2006.11239, appendix B), reduced to inference.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): sines first, the slowest frequency being exactly 1 / 10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2 - 1))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, ch: int, out: int, temb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(ch), nn.Conv2d(ch, out, 3, padding=1)
        self.temb_proj = nn.Linear(temb, out)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if ch != out:
            self.nin_shortcut = nn.Conv2d(ch, out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, ch: int) -> None:
        super().__init__()
        self.norm = norm(ch)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(ch, ch, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))
        weight = (torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(c)).softmax(dim=2)
        return x + self.proj_out(torch.einsum("nqk,nck->ncq", weight, v).reshape(n, c, height, width))


class Downsample(nn.Module):
    def __init__(self, ch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, ch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class DDPM(nn.Module):
    def __init__(
        self,
        *,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        resolution: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.ch, temb, levels = ch, 4 * ch, range(len(ch_mult))
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb), nn.Linear(temb, temb)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        widths, now, skips = [ch * mult for mult in ch_mult], ch, [ch]
        self.down = nn.ModuleList()
        for level in levels:
            part, attends = self._level(), resolution // 2**level in attn_resolutions
            for _ in range(num_res_blocks):
                part.block.append(ResnetBlock(now, widths[level], temb))
                now = widths[level]
                if attends:
                    part.attn.append(AttnBlock(now))
                skips.append(now)
            if level != levels[-1]:
                part.downsample = Downsample(now)
                skips.append(now)
            self.down.append(part)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = ResnetBlock(now, now, temb), ResnetBlock(now, now, temb)
        self.mid.attn_1 = AttnBlock(now)
        self.up = nn.ModuleList()
        for level in reversed(levels):
            part, attends = self._level(), resolution // 2**level in attn_resolutions
            for _ in range(num_res_blocks + 1):
                part.block.append(ResnetBlock(now + skips.pop(), widths[level], temb))
                now = widths[level]
                if attends:
                    part.attn.append(AttnBlock(now))
            if level:
                part.upsample = Upsample(now)
            self.up.insert(0, part)
        self.norm_out, self.conv_out = norm(now), nn.Conv2d(now, in_channels, 3, padding=1)

    @staticmethod
    def _level() -> nn.Module:
        part = nn.Module()
        part.block, part.attn = nn.ModuleList(), nn.ModuleList()
        return part

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](timestep_embedding(t, self.ch))))
        h = self.conv_in(x)
        skips = [h]
        for part in self.down:
            for i, block in enumerate(part.block):
                h = block(h, temb)
                if len(part.attn):
                    h = part.attn[i](h)
                skips.append(h)
            if hasattr(part, "downsample"):
                h = part.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        for part in reversed(self.up):
            for i, block in enumerate(part.block):
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
                if len(part.attn):
                    h = part.attn[i](h)
            if hasattr(part, "upsample"):
                h = part.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))

"""A first stage small enough to trace in a second; imports no diffusers."""

from __future__ import annotations

import torch


class Decoder(torch.nn.Module):
    """Enough of a first stage: a projection, an upsampling, a group norm in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(2, 8, 3, padding=1)
        self.norm = torch.nn.GroupNorm(4, 8)
        self.head = torch.nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.interpolate(self.stem(latents / 0.5), scale_factor=2.0)
        h = self.norm(h)
        h += 1.0  # an in-place op, which takes the long way through torch's decompositions
        return self.head(torch.nn.functional.silu(h))

"""Diffusion checkpoints to quantized, corrected, deployable engines.

    from qncd_deploy import Bundle

    with Bundle.open("export/fashion-ldm-w8a8").sampler() as sampler:
        pictures = sampler.sample(16, labels=[3], seed=0)      # .images (N, H, W, C) uint8, .latents, .labels

Reading and sampling need NumPy and one engine library; making bundles (`qncd export`) needs the `export` extra.
"""

from __future__ import annotations

from qncd_deploy.errors import QncdError
from qncd_deploy.pictures import Pictures
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler

__version__ = "0.1.0"

__all__ = ["Bundle", "Pictures", "QncdError", "Sampler", "__version__"]

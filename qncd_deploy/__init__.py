"""Diffusion checkpoints to quantized, corrected, deployable engines.

    from qncd_deploy import Bundle

    with Bundle.open("export/fashion-ldm-w8a8").sampler() as sampler:
        pictures = sampler.sample(16, labels=[3], seed=0)      # .images (N, H, W, C) uint8, .latents, .labels

QncdUNet and QncdScheduler put a bundle inside diffusers' own pipelines; they need torch and diffusers.

Reading and sampling need NumPy and one engine library; making bundles (`qncd export`) needs the `export` extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qncd_deploy.errors import QncdError
from qncd_deploy.pictures import Pictures
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler

if TYPE_CHECKING:
    from qncd_deploy.drop_in.scheduler import QncdScheduler
    from qncd_deploy.drop_in.unet import QncdUNet

__version__ = "0.1.0"

__all__ = ["Bundle", "Pictures", "QncdError", "QncdScheduler", "QncdUNet", "Sampler", "__version__"]


def __getattr__(name: str) -> Any:
    """The parts that need torch, once they are asked for."""
    if name == "QncdUNet":
        from qncd_deploy.drop_in.unet import QncdUNet

        return QncdUNet
    if name == "QncdScheduler":
        from qncd_deploy.drop_in.scheduler import QncdScheduler

        return QncdScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""LPIPS, the perceptual distance of paired pictures (Zhang et al., arXiv:1801.03924), by its authors' package.

0 for the same pictures; AlexNet's features, as the paper's published figures use
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import numpy as np

from qncd_deploy.errors import first_line
from qncd_deploy.evaluate.judge import PairMeasure

SMALLEST = 32
"""Rows or columns of a picture below which AlexNet pools it away."""

_BACKBONE = "alexnet-*.pth"
_GROUP = 16

log = logging.getLogger(__name__)


def load_lpips() -> PairMeasure | None:
    """LPIPS of (N, H, W, 1 or 3) uint8 pairs; None where the package is not installed.

    None too, and a log line that says why, where it cannot be imported or would have to download its backbone.
    """
    if importlib.util.find_spec("lpips") is None:
        return None
    try:
        import lpips
        import torch
    except (ImportError, OSError, RuntimeError) as exc:  # RuntimeError: a torchvision that is of another torch
        log.info("LPIPS is left out: its package is installed but not usable (%s).", first_line(exc))
        return None
    if not any((Path(torch.hub.get_dir()) / "checkpoints").glob(_BACKBONE)):
        log.info("LPIPS is left out: its AlexNet is not here. `python -c 'import lpips; lpips.LPIPS()'` downloads it.")
        return None
    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def measure(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
        found = []
        with torch.no_grad():
            for start in range(0, len(images), _GROUP):
                rows = slice(start, start + _GROUP)
                found.append(network(*(torch.from_numpy(_scaled(part[rows])) for part in (images, reference))))
        distances: np.ndarray = torch.cat(found).flatten().numpy().astype(np.float64)
        return distances

    return measure


def _scaled(images: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8 to (N, 3, H, W) float32 in [-1, 1], grey as three equal channels, small pictures repeated in
    larger pixels."""
    factor = -(-SMALLEST // min(images.shape[1:3]))
    larger = images.repeat(factor, axis=1).repeat(factor, axis=2)
    planes = larger.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(np.broadcast_to(planes, (len(planes), 3, *planes.shape[2:])))

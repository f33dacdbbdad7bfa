"""Sampled pictures and the three ways to write them: a PNG grid, an npz with their latents, or a folder of PNGs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from qncd_deploy.errors import BundleError, UsageError
from qncd_deploy.files import atomic_file, require_writable, save_npz

log = logging.getLogger(__name__)

_GAP = 2  # pixels between the pictures of a grid


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures by their index, which with the seed decides noise and label.

    indices, labels: (N,) int64, label -1 where the network has no classes;  latents: (N, C, H, W) float32;
    images: (N, H, W, 1 or 3) uint8, None where the latents are no picture and the bundle has no decoder;
    prompts: (N,) of strings, what the labels stand for in a text network.
    """

    indices: np.ndarray
    labels: np.ndarray
    latents: np.ndarray
    images: np.ndarray | None
    prompts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def join(cls, parts: Sequence[Pictures]) -> Pictures:
        images = [part.images for part in parts if part.images is not None]
        prompts = [part.prompts for part in parts if part.prompts is not None]
        return cls(
            indices=np.concatenate([part.indices for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            latents=np.concatenate([part.latents for part in parts]),
            images=np.concatenate(images) if images else None,
            prompts=np.concatenate(prompts) if prompts else None,
        )

    @property
    def captions(self) -> list[str]:
        """What each is of: its prompt, its class by number, or nothing."""
        if self.prompts is not None:
            return [str(prompt) for prompt in self.prompts]
        return [f"class {label}" if label >= 0 else "" for label in self.labels.tolist()]


def to_uint8(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) float in [-1, 1] to (N, H, W, C) uint8: 127.5 (x + 1), rounded to nearest, clipped to 0 .. 255."""
    return np.clip(np.floor((images + 1) * 127.5 + 0.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def check_output(out: Path, *, images: bool = True) -> None:
    """Refuse an output that save_pictures could not write, before anything is sampled. Raises as that does.

    images: whether there will be any, or latents alone.
    """
    folder = out.is_dir()
    if not images and (folder or out.suffix.lower() == ".png"):
        raise UsageError(f"{out}: the bundle has no decoder, its latents are not pictures. Write them to an .npz.")
    if folder:
        require_writable(out)
        return
    if out.suffix.lower() not in (".png", ".npz"):
        raise UsageError(f"{out}: neither .png, .npz nor an existing folder. Name one of these after -o.")
    if not out.parent.is_dir():
        raise BundleError(f"{out}: the folder {out.parent} does not exist. Make it, or name another.")
    require_writable(out.parent)


def save_pictures(out: Path, pictures: Pictures) -> None:
    """Write pictures to `out`, whole or not at all.

    .png    one square-ish grid, row by row;  one channel is written as grey
    .npz    images uint8 NHWC (where there are any), latents float32 NCHW, labels int64, of a text network prompts too
    folder  (existing) one PNG for each picture, named by its index: 000000.png, 000001.png, ...

    Raises: UsageError for another suffix, or pictures without images where only images can be written; BundleError if
    the parent is missing, the disk is full or may not be written.
    """
    check_output(out, images=pictures.images is not None)
    if out.suffix.lower() == ".npz" and not out.is_dir():
        arrays = {name: getattr(pictures, name) for name in ("images", "latents", "labels", "prompts")}
        save_npz(out, {name: array for name, array in arrays.items() if array is not None})
        return
    assert pictures.images is not None, "checked above"
    if not out.is_dir():
        _save_png(out, grid(pictures.images))
        return
    for index, image in zip(pictures.indices, pictures.images, strict=True):
        _save_png(out / f"{index:06d}.png", image)


def save_batches(out: Path, batches: Iterable[Pictures]) -> int:
    """Write all of them as save_pictures does, and say how many they were. Into a folder go those of each batch as soon
    as they are there: memory holds one batch, and what was drawn stays if the next one fails or is interrupted.
    """
    if not out.is_dir():
        pictures = Pictures.join(list(batches))
        save_pictures(out, pictures)
        return len(pictures)
    count = 0
    try:
        for batch in batches:
            save_pictures(out, batch)
            count += len(batch)
    except BaseException:
        log.info("%s: holds the %d pictures that were drawn before", out, count)
        raise
    return count


def grid(images: np.ndarray, *, columns: int | None = None) -> np.ndarray:
    """(N, H, W, C) uint8 to one picture: rows of `columns` (default: as square as may be), white gaps between them."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels), 255, np.uint8)
    for place, image in enumerate(images):
        top, left = (place // columns) * (height + _GAP), (place % columns) * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _save_png(path: Path, image: np.ndarray) -> None:
    with atomic_file(path) as partial:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial, format="PNG")

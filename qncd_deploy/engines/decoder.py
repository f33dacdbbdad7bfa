"""From latents to pictures where the engine computes: whole, or by tiles that overlap.

    picture = sum over tiles of weight(y) weight(x) decode(tile)        weights of all tiles add up to 1 at every pixel

Tiles all have the size of the graph that decodes them, so that every engine compiles it for one shape; the last ones
end where the latents do. Where two overlap, one fades into the other in a straight line, as in diffusers'
AutoencoderKL.tiled_decode; where four do, bilinearly (diffusers fades there what it has faded before), and its last
tiles are narrow ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.engines.eps_model import in_groups, row_sizes
from qncd_deploy.errors import UsageError
from qncd_deploy.specs import Array

OVERLAP = 0.25
"""The least that neighbouring tiles share, of their side: diffusers' tile_overlap_factor."""

TILED_FROM = 512
"""Pixels a side from which a picture is worth tiles."""


def tile_shape(latent_shape: Sequence[int], image_shape: Sequence[int]) -> tuple[int, ...] | None:
    """(C, h, w) of tiles for latents of this shape, to make a graph for: two a side, which share a quarter of it, so
    that activations take two fifths of the memory. None for pictures that are small.
    """
    if max(image_shape[1:]) < TILED_FROM:
        return None
    channels, *sides = latent_shape
    return (channels, *(math.ceil(5 / 8 * side) for side in sides))


def require_slices(engine: BaseEngine, bundle: Path, backend: str) -> None:
    """Raises UsageError, with how to build it, for a decoder that was built, but not for single pictures."""
    sizes = engine.row_sizes
    if sizes and 1 not in sizes:
        raise UsageError(
            f"--vae-slicing: the decoder that was built takes {' or '.join(map(str, sizes))} pictures at a time. Build "
            f"it for single ones, too, with `qncd build {bundle} --backend {backend} "
            f"--batch {','.join(map(str, (1, *sizes)))}`, or leave it out."
        )


def require_tiles(engine: BaseEngine, latent_shape: Sequence[int]) -> None:
    """Raises UsageError for latents that are smaller than an engine's tiles."""
    (spec,) = engine.inputs.values()
    if any(side < int(tile) for side, tile in zip(latent_shape[1:], spec.shape[2:], strict=True)):
        raise UsageError("--vae-tiling: pictures of this size are smaller than a tile. Leave it out.")


def decode(engine: BaseEngine, latents: Array, *, rows: int | None) -> Array:
    """(N, C, H, W) latents to (N, c, fH, fW) pictures, where the latents are.

    engine: of a graph for latents of this size, or of a smaller one, which is that of the tiles;  rows: as many at a
    time as in_groups says, None for the fewest that the engine takes.
    """
    (spec,), (name, output) = engine.inputs.values(), next(iter(engine.outputs.items()))
    sizes = row_sizes(engine, spec, 1)[:1] if rows is None else row_sizes(engine, spec, rows)

    def run(part: Array) -> Array:
        return in_groups(lambda group: engine({spec.name: group})[name], [part], rows=sizes)

    size, tile = tuple(latents.shape[2:]), spec.shape[2:]
    if tile == size or any(isinstance(side, str) for side in tile):
        return run(latents)
    scale, put = int(output.shape[2]) // int(tile[0]), engine.arrays.put
    vertical, horizontal = (spans(whole, int(part), scale) for whole, part in zip(size, tile, strict=True))
    shape = (len(latents), int(output.shape[1]), scale * size[0], scale * size[1])
    picture: Array = put(np.zeros(shape, np.float32))
    for rows_in, rows_out, fade_y in vertical:
        for columns_in, columns_out, fade_x in horizontal:
            weight = put(np.outer(fade_y, fade_x).astype(np.float32))
            picture[:, :, rows_out, columns_out] += weight * run(latents[:, :, rows_in, columns_in])
    return picture


def spans(side: int, tile: int, scale: int) -> list[tuple[slice, slice, np.ndarray]]:
    """Along one axis, the latents of each tile, its pixels, and what they weigh, (scale * tile,) float64.

    side: of all latents;  scale: pixels a latent. As many tiles as share OVERLAP at least, evenly spread.
    """
    count = 1 + math.ceil((side - tile) / (tile * (1 - OVERLAP)))
    starts = [round(number * (side - tile) / max(count - 1, 1)) for number in range(count)]
    weights = np.zeros((count, scale * side))
    covered = 0
    for number, start in enumerate(starts):
        first, end = scale * start, scale * (start + tile)
        fade = np.ones(end - first)
        fade[: covered - first] = np.arange(covered - first) / max(covered - first, 1)
        weights[:number, first:end] *= 1 - fade
        weights[number, first:end] = fade
        covered = end
    pixels = [slice(scale * start, scale * (start + tile)) for start in starts]
    return [
        (slice(start, start + tile), place, weight[place])
        for start, place, weight in zip(starts, pixels, weights, strict=True)
    ]

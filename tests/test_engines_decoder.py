"""Decoding whole, picture by picture and by tiles: what tiles weigh, and that they fade as diffusers' do."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.engines.decoder import OVERLAP, decode, require_slices, spans, tile_shape
from qncd_deploy.errors import UsageError
from qncd_deploy.specs import TensorSpec

SCALE = 8


class Fake(BaseEngine):
    """A decoder of latents (4, *tile) by a function of NumPy arrays, which counts the rows of its calls. built: for
    these numbers of rows.
    """

    def __init__(self, tile: tuple[int, int], function, built: tuple[int, ...] = ()) -> None:
        self.built = built
        latents = TensorSpec("latents", "float32", ("batch", 4, *tile))
        images = TensorSpec("images", "float32", ("batch", 3, *(SCALE * side for side in tile)))
        super().__init__("fake-f32", Path("decoder"), {"latents": latents}, {"images": images})
        self.function, self.rows = function, []

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.rows.append(len(feeds["latents"]))
        return {"images": self.function(feeds["latents"])}

    @property
    def row_sizes(self) -> tuple[int, ...]:
        return self.built

    def _close(self) -> None: ...


def pointwise(z: np.ndarray) -> np.ndarray:
    """Every pixel from its own latent."""
    return np.tanh(z[:, :3]).repeat(SCALE, axis=2).repeat(SCALE, axis=3)


@given(st.integers(1, 40), st.integers(0, 90), st.sampled_from([1, 2, 8]))
def test_weights_of_tiles_add_up_to_one_at_every_pixel(tile: int, more: int, scale: int) -> None:
    side = tile + more
    placed = spans(side, tile, scale)
    total = np.zeros(scale * side)
    for latents, pixels, weight in placed:
        assert latents.stop - latents.start == tile and (pixels.start, pixels.stop) == (
            scale * latents.start,
            scale * latents.stop,
        )
        assert weight.shape == (scale * tile,) and weight.min() >= 0
        total[pixels] += weight
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-12)
    assert placed[0][0].start == 0 and placed[-1][0].stop == side
    # Rounded starts: of each pair, one may lie half a latent further on and the other half a latent before.
    shared = [a.stop - b.start for (a, *_), (b, *_) in pairwise(placed)]
    assert all(common >= OVERLAP * tile - 1 for common in shared)


@pytest.mark.parametrize("tile", [(5, 5), (8, 5), (3, 7), (8, 8)])
def test_a_decoder_that_sees_no_neighbours_gives_the_same_by_tiles(tile: tuple[int, int]) -> None:
    z = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    engine = Fake(tile, pointwise)
    found = decode(engine, z, rows=2)
    assert found.dtype == np.float32 and set(engine.rows) == {2}
    np.testing.assert_allclose(found, pointwise(z), rtol=0, atol=3e-7)  # weights that are float32, products below 1
    assert len(engine.rows) == 2 * len(spans(8, tile[0], 1)) * len(spans(8, tile[1], 1))


def test_slices_are_single_pictures() -> None:
    z = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    for built in ((), (1, 16)):
        engine = Fake((8, 8), pointwise, built)
        np.testing.assert_array_equal(decode(engine, z, rows=None), pointwise(z))
        assert engine.rows == [1, 1, 1]
        require_slices(engine, Path("export/x"), "tensorrt")
    with pytest.raises(UsageError) as refused:
        require_slices(Fake((8, 8), pointwise, (4, 16)), Path("export/x"), "tensorrt")
    assert str(refused.value) == (
        "--vae-slicing: the decoder that was built takes 4 or 16 pictures at a time. Build it for single ones, too, "
        "with `qncd build export/x --backend tensorrt --batch 1,4,16`, or leave it out."
    )


def test_large_pictures_get_tiles_of_two_fifths() -> None:
    assert tile_shape((4, 32, 32), (3, 256, 256)) is None
    assert tile_shape((4, 64, 64), (3, 512, 512)) == (4, 40, 40)
    assert tile_shape((4, 128, 96), (3, 1024, 768)) == (4, 80, 60)
    assert [latents.start for latents, *_ in spans(64, 40, 8)] == [0, 24]


def test_tiles_fade_as_those_of_diffusers() -> None:
    """8x8 tiles of 14x14 latents: two a side for both. diffusers adds a third, of 2 latents from 12 on, and fades
    corners of four tiles otherwise: pixels from 96 on, and those of 48 to 64 in both directions, are its own.
    """
    torch = pytest.importorskip("torch", reason="diffusers' decoder runs in it")
    diffusers = pytest.importorskip("diffusers")
    from export_helpers import randomize
    from text_models import AUTOENCODER

    vae = randomize(diffusers.AutoencoderKL(**AUTOENCODER), 1)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 8 * SCALE
    z = torch.randn(2, 4, 14, 14, generator=torch.Generator().manual_seed(0))

    def plain(part: np.ndarray) -> np.ndarray:
        return vae.decoder(vae.post_quant_conv(torch.from_numpy(np.ascontiguousarray(part)))).numpy()

    with torch.no_grad():
        theirs = vae.tiled_decode(z).sample.numpy()
        ours = decode(Fake((8, 8), plain), z.numpy(), rows=2)
        whole = plain(z.numpy())
    fade = slice(6 * SCALE, 8 * SCALE)
    ours[:, :, fade, fade] = theirs[:, :, fade, fade]
    size = np.abs(theirs).max()
    # Weights and their products in float32 on both sides.
    np.testing.assert_allclose(ours[..., :96, :96], theirs[..., :96, :96], rtol=0, atol=1e-6 * size)
    assert np.abs(whole - theirs)[..., :96, :96].max() > 1e-3 * size  # tiles see no further than themselves

"""Rounding to bytes, and what lands in a grid, an npz and a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qncd_deploy.errors import BundleError, UsageError
from qncd_deploy.files import sha256_file
from qncd_deploy.pictures import Pictures, check_output, grid, save_batches, save_pictures, to_uint8


def pictures(n: int = 3, *, channels: int = 3, images: bool = True) -> Pictures:
    rng = np.random.default_rng(0)
    return Pictures(
        indices=np.arange(5, 5 + n),
        labels=np.arange(n),
        latents=rng.standard_normal((n, 4, 2, 2)).astype(np.float32),
        images=rng.integers(0, 256, (n, 6, 4, channels), dtype=np.uint8) if images else None,
    )


def test_bytes_are_the_nearest_and_come_last_channel() -> None:
    values = np.array([-2.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.0, 1 - 0.4 / 127.5, 1.0, 3.0], np.float32)
    images = np.stack([values, -values]).reshape(1, 2, 2, 4)
    found = to_uint8(images)
    assert found.dtype == np.uint8
    assert found.shape == (1, 2, 4, 2)
    np.testing.assert_array_equal(found[0, ..., 0].ravel(), [0, 0, 0, 1, 128, 255, 255, 255])
    assert [to_uint8(np.full((1, 1, 1, 1), k / 127.5 - 1, np.float32)).item() for k in range(256)] == list(range(256))


def test_a_grid_is_as_square_as_may_be_and_keeps_every_pixel() -> None:
    images = pictures(5).images
    assert images is not None
    sheet = grid(images)
    assert sheet.shape == (2 * 6 + 2, 3 * 4 + 2 * 2, 3)
    np.testing.assert_array_equal(sheet[8:14, 6:10], images[4])
    assert (sheet[8:, 12:] == 255).all()  # the place of a sixth picture
    assert (sheet[6:8] == 255).all()
    assert grid(images[:1]).shape == images[0].shape
    assert grid(images, columns=5).shape == (6, 5 * 4 + 4 * 2, 3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_holds_the_grid(tmp_path: Path, channels: int, mode: str) -> None:
    drawn = pictures(channels=channels)
    save_pictures(tmp_path / "grid.PNG", drawn)
    with Image.open(tmp_path / "grid.PNG") as image:
        assert image.format == "PNG"
        assert image.mode == mode
        found = np.asarray(image).reshape(*image.size[::-1], channels)
    np.testing.assert_array_equal(found, grid(drawn.images))


def test_an_npz_holds_images_latents_and_labels(tmp_path: Path) -> None:
    drawn = pictures()
    save_pictures(tmp_path / "a.npz", drawn)
    save_pictures(tmp_path / "b.npz", drawn)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert sorted(found.files) == ["images", "labels", "latents"]
        assert [found[name].dtype for name in ("images", "labels", "latents")] == [np.uint8, np.int64, np.float32]
        for name in found.files:
            np.testing.assert_array_equal(found[name], getattr(drawn, name))
    assert sha256_file(tmp_path / "a.npz") == sha256_file(tmp_path / "b.npz")


def test_a_folder_gets_one_file_for_each_picture_named_by_index(tmp_path: Path) -> None:
    drawn = pictures()
    save_pictures(tmp_path, drawn)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000005.png", "000006.png", "000007.png"]
    assert drawn.images is not None
    with Image.open(tmp_path / "000006.png") as image:
        np.testing.assert_array_equal(np.asarray(image), drawn.images[1])


def test_into_a_folder_batches_go_one_by_one_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def drawn() -> Iterator[Pictures]:
        yield pictures()
        assert len(list(tmp_path.iterdir())) == 3  # those of before are written before more are drawn
        raise KeyboardInterrupt

    caplog.set_level("INFO")
    with pytest.raises(KeyboardInterrupt):
        save_batches(tmp_path, drawn())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000005.png", "000006.png", "000007.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: holds the 3 pictures that were drawn before"
    ]
    with pytest.raises(KeyboardInterrupt):
        save_batches(tmp_path / "grid.png", drawn())
    assert not (tmp_path / "grid.png").exists()
    both = [replace(pictures(), indices=np.arange(start, start + 3)) for start in (0, 3)]
    assert save_batches(tmp_path, both) == 6 and (tmp_path / "000003.png").exists()
    assert save_batches(tmp_path / "all.npz", both) == 6
    with np.load(tmp_path / "all.npz") as found:
        assert len(found["images"]) == 6


def test_latents_without_a_decoder_go_into_an_npz_only(tmp_path: Path) -> None:
    drawn = pictures(images=False)
    save_pictures(tmp_path / "a.npz", drawn)
    with np.load(tmp_path / "a.npz") as found:
        assert sorted(found.files) == ["labels", "latents"]
    for out in (tmp_path / "grid.png", tmp_path):
        with pytest.raises(UsageError, match=r"has no decoder, its latents are not pictures\. Write them to an \.npz"):
            save_pictures(out, drawn)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_outputs_that_cannot_be_written_are_refused_beforehand(tmp_path: Path) -> None:
    for name in ("grid.jpg", "grid", ".png.txt"):
        with pytest.raises(UsageError, match=r"neither \.png, \.npz nor an existing folder"):
            check_output(tmp_path / name)
    with pytest.raises(BundleError, match=r"nowhere/grid\.png: the folder .*nowhere does not exist"):
        check_output(tmp_path / "nowhere" / "grid.png")
    for out in (Path("/proc"), Path("/proc/grid.png")):
        with pytest.raises(BundleError, match=r"/proc: cannot be written"):
            check_output(out)
    (tmp_path / "odd.npz").mkdir()
    check_output(tmp_path / "odd.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd.npz"]


def test_a_full_disk_leaves_the_old_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pictures(tmp_path / "grid.png", pictures())
    before = (tmp_path / "grid.png").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(BundleError, match=r"grid\.png: disk full"):
        save_pictures(tmp_path / "grid.png", pictures(5))
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    assert (tmp_path / "grid.png").read_bytes() == before


def test_batches_join_in_order() -> None:
    whole = pictures(5)
    assert whole.images is not None
    parts = [
        Pictures(whole.indices[a:b], whole.labels[a:b], whole.latents[a:b], whole.images[a:b])
        for a, b in ((0, 2), (2, 5))
    ]
    joined = Pictures.join(parts)
    assert len(joined) == 5
    for name in ("indices", "labels", "latents", "images"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert Pictures.join([pictures(images=False)]).images is None

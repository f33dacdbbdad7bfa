"""Graphs for decoding large pictures by tiles, from a checkpoint to the files of a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the decoder is a torch network")
pytest.importorskip("transformers", reason="the twins are made with it")
pytest.importorskip("onnxruntime")

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel  # noqa: E402
from export_helpers import randomize  # noqa: E402
from text_models import AUTOENCODER  # noqa: E402

from qncd_deploy.engines import decoder as decoding  # noqa: E402
from qncd_deploy.engines.base import open_engine  # noqa: E402
from qncd_deploy.export.save import save_siblings  # noqa: E402
from qncd_deploy.pipeline.export import DECODERS, _decoders  # noqa: E402
from qncd_deploy.pipeline.network import FloatNetwork, read_network  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402

UNET = {
    **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4},
    **{"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    randomize(UNet2DModel(**UNET), 0).save_pretrained(folder / "unet")
    randomize(AutoencoderKL(**AUTOENCODER), 1).save_pretrained(folder / "vae")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    return folder


def read(folder: Path, monkeypatch: pytest.MonkeyPatch, *, pixels: int) -> FloatNetwork:
    monkeypatch.setattr(decoding, "TILED_FROM", pixels)
    return read_network(ExportOptions(folder))


def test_large_pictures_come_with_a_graph_of_their_tiles(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = read(folder, monkeypatch, pixels=64)
    graphs = _decoders(network)
    assert {role: list(graph.graph.inputs[0].shape)[1:] for role, graph in graphs.items()} == {
        "decoder": [4, 8, 8],
        "decoder-tile": [4, 5, 5],
    }
    save_siblings({DECODERS[role]: graph for role, graph in graphs.items()}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "vae-decoder-tile.onnx", "vae-decoder.data", "vae-decoder.onnx",
    ]  # fmt: skip
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    z = np.random.default_rng(0).standard_normal((1, 4, 5, 5)).astype(np.float32)
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(z) / vae.config.scaling_factor).sample.numpy()
    with open_engine("onnxruntime", tmp_path / "vae-decoder-tile.onnx") as engine:
        found = decoding.decode(engine, z, rows=1)
        # Convolutions and norms in float32 in another order, through some twenty layers.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        assert decoding.decode(engine, np.zeros((1, 4, 8, 8), np.float32), rows=1).shape == (1, 3, 64, 64)


def test_small_pictures_are_decoded_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _decoders(read(folder, monkeypatch, pixels=65)).keys() == {"decoder"}

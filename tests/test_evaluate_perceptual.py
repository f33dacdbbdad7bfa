"""LPIPS is measured where its package and its backbone are, and never downloads anything."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qncd_deploy.evaluate import perceptual  # noqa: E402
from qncd_deploy.evaluate.perceptual import load_lpips  # noqa: E402


class Absolute(torch.nn.Module):
    """Stands in for the package: the mean absolute difference of pictures."""

    def __init__(self, *, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "alex" and not verbose

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == torch.float32 and a.shape[1] == 3 and min(a.shape[2:]) >= perceptual.SMALLEST
        assert a.min() >= -1 and a.max() <= 1
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    module = types.ModuleType("lpips")
    module.LPIPS = Absolute  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/alexnet-owt-7be5be79.pth").touch()
    return tmp_path


@pytest.mark.parametrize("shape", [(32, 40, 3), (28, 28, 1), (9, 16, 3)])
def test_pairs_keep_their_order_whatever_the_group(package: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    images, reference = rng.integers(0, 256, (2, 19, *shape)).astype(np.uint8)
    reference[4] = images[4]
    measure = load_lpips()
    assert measure is not None
    found = measure(images, reference)
    expected = np.abs(images.astype(int) - reference).mean(axis=(1, 2, 3)) / 127.5
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 means of a few thousand numbers
    assert found[4] == 0


def test_without_the_package_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    assert load_lpips() is None


def test_without_the_backbone_nothing_is_downloaded(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    (package / "checkpoints/alexnet-owt-7be5be79.pth").unlink()
    with caplog.at_level(logging.INFO):
        assert load_lpips() is None
    assert "import lpips; lpips.LPIPS()" in caplog.text


def test_a_package_that_does_not_import_is_left_out(
    package: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "lpips")
    (package / "lpips.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(package)
    with caplog.at_level(logging.INFO):
        assert load_lpips() is None
    assert "not usable (operator torchvision::nms does not exist)" in caplog.text

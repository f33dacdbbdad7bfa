"""Which name a checkpoint gives to what is made from it, and what comes along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qncd_deploy.errors import CheckpointError
from qncd_deploy.models.load import artifact_name, load_source

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "path, name",
    [
        ("calib_data/fashion-ldm/model.ckpt", "fashion-ldm"),
        ("runs/church/model.safetensors", "church"),
        ("runs/church/unet.onnx", "church"),
        ("runs/cin256-v2.ckpt", "cin256-v2"),
        ("runs/my.net.onnx", "my.net"),
        ("runs/models.ckpt", "models"),
    ],
)
def test_names_of_files(path: str, name: str) -> None:
    assert artifact_name(Path(path)) == name


def test_names_of_folders_and_bare_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ddpm-cifar10"
    folder.mkdir()
    assert artifact_name(folder) == artifact_name(folder / "unet.onnx") == "ddpm-cifar10"
    monkeypatch.chdir(folder)
    assert artifact_name(Path(".")) == artifact_name(Path("model.ckpt")) == "ddpm-cifar10"
    (folder / "model.ckpt").symlink_to(tmp_path / "blobs-4f3a")
    assert artifact_name(Path("model.ckpt")) == "ddpm-cifar10"


def test_naming_imports_no_torch() -> None:
    code = "import sys, qncd_deploy.models.load; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_missing_checkpoint() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/model\.ckpt: no such file or folder"):
        load_source(Path("nowhere/model.ckpt"))

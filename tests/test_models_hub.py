"""Models by hub id: which files come, what they are called, and what is said where the hub cannot help."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import qncd

hub = pytest.importorskip("huggingface_hub", reason="models come through the hub's own client")
for library in ("torch", "onnx_ir", "diffusers"):
    pytest.importorskip(library, reason=f"exporting needs {library}")

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402

from qncd_deploy.errors import CheckpointError, UsageError  # noqa: E402
from qncd_deploy.models.hub import fetch_from_hub, hub_name, wanted_files  # noqa: E402
from qncd_deploy.models.load import load_source  # noqa: E402

STABLE_DIFFUSION = [
    *("model_index.json", "README.md", "v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors", "v1-inference.yaml"),
    *("unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"),
    *("text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"),
    *("vae/config.json", "vae/diffusion_pytorch_model.bin", "scheduler/scheduler_config.json"),
    *(
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "vae_decoder/model.onnx",
        "unet/flax_model.msgpack",
    ),
]
SHARDS = [
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json"),
    *("unet/diffusion_pytorch_model-00001-of-00002.safetensors",),
    *("unet/diffusion_pytorch_model-00002-of-00002.safetensors", "unet/diffusion_pytorch_model.bin"),
]


def test_one_format_and_one_precision_of_the_parts_that_are_read() -> None:
    assert set(wanted_files(STABLE_DIFFUSION)) == {
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("text_encoder/config.json", "text_encoder/model.safetensors", "vae/config.json"),
        *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"),
        *("vae/diffusion_pytorch_model.bin", "scheduler/scheduler_config.json"),
    }
    assert set(wanted_files(SHARDS)) == {*SHARDS} - {"unet/diffusion_pytorch_model.bin"}
    half = ["unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert set(wanted_files(half)) == {*half}
    root = ["config.json", "scheduler_config.json", "diffusion_pytorch_model.bin", "pytorch_model.bin", "run.txt"]
    assert set(wanted_files(root)) == {*root[:3]}
    for other in (["model.safetensors", "config.json"], ["v1-5.ckpt"], ["unet/diffusion_pytorch_model.bin"], []):
        assert wanted_files(other) == ()


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub of one model, as files below a folder."""
    home = tmp_path / "hub/tiny/ddpm"
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    DDPMPipeline(UNet2DModel(8, **blocks, block_out_channels=(32, 32)), DDPMScheduler()).save_pretrained(home)
    (home / "whole.ckpt").write_bytes(b"another copy")

    def listed(self: Any, hub_id: str) -> list[str]:
        root = tmp_path / "hub" / hub_id
        if not root.is_dir():
            raise OSError("404 Client Error.\nRepository Not Found for url: ...")
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]

    def downloaded(hub_id: str, *, allow_patterns: list[str]) -> str:
        target = tmp_path / "cache/snapshots/8f3c2a"
        for name in listed(None, hub_id):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(tmp_path / "hub" / hub_id / name, target / name)
        return str(target)

    monkeypatch.setattr(hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(hub, "snapshot_download", downloaded)
    return home


def test_a_fetched_model_is_read_as_a_folder_is(fake_hub: Path) -> None:
    folder = fetch_from_hub("tiny/ddpm")
    assert not (folder / "whole.ckpt").exists()
    fetched, local = load_source(folder), load_source(fake_hub)
    assert fetched.latent_shape == (3, 8, 8)
    pairs = zip(fetched.unet.parameters(), local.unet.parameters(), strict=True)
    assert all((a == b).all() for a, b in pairs)


def test_an_export_from_the_hub_is_named_after_the_model(fake_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qncd_deploy.pipeline import dry_run

    seen: list[Any] = []
    monkeypatch.setattr(dry_run, "dry_run", lambda options: seen.append(options) or _stop())
    for args, name in (((), "ddpm"), (("--name", "mine"), "mine")):
        assert qncd("export", "--from-hub", "tiny/ddpm", "--int8", "--dry-run", *args).line.endswith("seen.")
        assert (seen[-1].name, seen[-1].checkpoint.name) == (name, "8f3c2a")


def _stop() -> None:
    raise UsageError("model: seen.")


def test_what_the_hub_cannot_give_is_said_in_one_line(
    fake_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub/org/single").mkdir(parents=True)
    (tmp_path / "hub/org/single/model.safetensors").write_bytes(b"")
    for hub_id, says in (
        ("org/nowhere", "cannot be downloaded (404 Client Error)"),
        ("org/single", "no UNet with its config among its files"),
    ):
        done = qncd("export", "--from-hub", hub_id, "--dry-run")
        assert done.code == 1 and f"--from-hub {hub_id}: {says}" in done.line
    for hub_id in ("ddpm", "https://hub/tiny/ddpm", "../x"):
        with pytest.raises(UsageError, match="expected ORG/NAME"):
            hub_name(hub_id)
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"tiny/ddpm: cannot be downloaded .* or give the path of a copy"
    ) as caught:
        fetch_from_hub("tiny/ddpm")
    assert "\n" not in str(caught.value)


def test_one_of_checkpoint_and_hub(tmp_path: Path) -> None:
    assert qncd("export").code == qncd("export", tmp_path, "--from-hub", "tiny/ddpm").code == 2

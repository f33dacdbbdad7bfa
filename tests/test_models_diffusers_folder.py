"""Diffusers folders: the same network as diffusers' own loader gives, its schedule and decoder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="reading checkpoints needs torch")
diffusers = pytest.importorskip("diffusers", reason="reading diffusers folders needs diffusers")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)

from qncd_deploy.errors import CheckpointError, ScheduleError, UsageError  # noqa: E402
from qncd_deploy.models.load import load_source  # noqa: E402

SMALL: dict[str, Any] = {
    **{"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64), "layers_per_block": 1},
    **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
}
AUTOENCODER: dict[str, Any] = {
    **{"block_out_channels": (32, 64), "latent_channels": 3, "layers_per_block": 1, "scaling_factor": 0.4},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}
X, T = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 800.0])


def parts(folder: Path, unet: Any = None, scheduler: Any = None, **others: Any) -> Path:
    """A folder without model_index.json."""
    torch.manual_seed(0)
    (unet or UNet2DModel(**SMALL)).save_pretrained(folder / "unet")
    (scheduler or DDIMScheduler()).save_pretrained(folder / "scheduler")
    for name, module in others.items():
        module.save_pretrained(folder / name)
    return folder


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refusal(folder: Path, error: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load_source(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pixel_pipeline(tmp_path: Path) -> None:
    unet = UNet2DModel(**SMALL).eval()
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    source = load_source(tmp_path)
    assert (source.family, source.scheduler, source.schedule.prediction) == ("diffusers", "ddpm", "v_prediction")
    assert torch.allclose(torch.tensor(source.schedule.alphas_cumprod).float(), scheduler.alphas_cumprod, rtol=1e-4)
    assert source.decoder is None and source.latent_shape == source.image_shape == (3, 8, 8)
    assert source.condition is None and [spec.name for spec in source.input_specs] == ["sample", "timestep"]
    assert torch.equal(source.unet(X, T).sample, unet(X, T).sample)
    assert set(source.files) == {
        *("pipeline-config", "unet-config", "scheduler-config", "unet/diffusion_pytorch_model.safetensors")
    }


def test_latent_pipeline_decodes_as_diffusers_does(tmp_path: Path) -> None:
    vqvae = VQModel(**AUTOENCODER, num_vq_embeddings=50).eval()
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    LDMPipeline(vqvae, UNet2DModel(**SMALL), DDIMScheduler()).save_pretrained(tmp_path)
    source = load_source(tmp_path)
    assert source.image_shape == (3, 16, 16)
    expected = vqvae.decode(X / 0.4).sample
    assert torch.allclose(source.decoder(X), expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("post", [True, False])
def test_kl_autoencoder(tmp_path: Path, post: bool) -> None:
    vae = AutoencoderKL(**AUTOENCODER, use_post_quant_conv=post).eval()
    expected = vae.decode(X / 0.4).sample
    source = load_source(parts(tmp_path, vae=vae))
    assert torch.allclose(source.decoder(X), expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "unet",
    [
        UNet2DModel(**SMALL, num_class_embeds=5),
        UNet2DConditionModel(
            **{**SMALL, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
            mid_block_type="UNetMidBlock2D",
            num_class_embeds=5,
        ),
    ],
    ids=["UNet2DModel", "UNet2DConditionModel"],
)
def test_class_labels(tmp_path: Path, unet: Any) -> None:
    source = load_source(parts(tmp_path, unet.eval()))
    assert source.condition.kind == "class-labels" and source.condition.values is None
    assert (source.condition.classes, source.condition.null_class) == (5, None)
    assert source.input_specs[-1].to_json() == {"name": "class_labels", "dtype": "int64", "shape": ["batch"]}
    labels = torch.tensor([4, 1])
    inputs = {"encoder_hidden_states": None} if isinstance(unet, UNet2DConditionModel) else {}
    expected = unet(X, T, class_labels=labels, **inputs).sample
    assert torch.equal(source.unet(X, T, class_labels=labels).sample, expected)
    assert load_source(tmp_path, null_class=4).condition.null_class == 4
    assert "classes 0 to 4" in refusal(tmp_path, UsageError, null_class=5)


def test_shards_half_precision_and_pickles(tmp_path: Path) -> None:
    unet = UNet2DModel(**SMALL).eval()
    expected = unet(X, T).sample
    unet.save_pretrained(tmp_path / "shards/unet", max_shard_size="1MB")
    unet.save_pretrained(tmp_path / "bin/unet", safe_serialization=False)
    for name in ("shards", "bin"):
        DDIMScheduler().save_pretrained(tmp_path / name / "scheduler")
        assert torch.equal(load_source(tmp_path / name).unet(X, T).sample, expected)
    assert len(list((tmp_path / "shards/unet").glob("*-of-*.safetensors"))) > 1
    unet.half().save_pretrained(tmp_path / "half/unet", variant="fp16")
    DDIMScheduler().save_pretrained(tmp_path / "half/scheduler")
    assert torch.equal(load_source(tmp_path / "half").unet(X, T).sample, unet.float()(X, T).sample)
    both = tmp_path / "half/unet/diffusion_pytorch_model"
    unet.save_pretrained(both.parent)
    Path(f"{both}.fp16.safetensors").rename(f"{both}.fp16-00001-of-00001.safetensors")
    Path(f"{both}.safetensors.index.fp16.json").write_text("{}")  # a variant in shards does not come before it
    assert torch.equal(load_source(tmp_path / "half").unet(X, T).sample, unet(X, T).sample)
    missing = sorted((tmp_path / "shards/unet").glob("*-of-*.safetensors"))[-1]
    missing.unlink()
    assert "shards are missing, 1 of" in (message := refusal(tmp_path / "shards")) and missing.name in message
    (tmp_path / "shards/unet/diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "has shards, and no diffusion_pytorch_model.safetensors.index.json" in refusal(tmp_path / "shards")


def test_old_attention_names_and_root_layout(tmp_path: Path) -> None:
    """As google/ddpm-cifar10-32: no subfolders, attention named before diffusers 0.15; diffusers reads it, so do we."""
    unet = UNet2DModel(**SMALL).eval()
    unet.save_config(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    state = unet.state_dict()
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    assert any("proj_attn" in key for key in state)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    assert torch.equal(load_source(tmp_path).unet(X, T).sample, unet(X, T).sample)


def test_another_sampler_reads_the_same_schedule(tmp_path: Path) -> None:
    parts(tmp_path, scheduler=UniPCMultistepScheduler(beta_schedule="scaled_linear"))
    assert "UniPCMultistepScheduler" in refusal(tmp_path, ScheduleError)
    assert load_source(tmp_path, scheduler="ddim").scheduler == "ddim"


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"_class_name": "DiTTransformer2DModel"}, "_class_name is 'DiTTransformer2DModel', only UNet2DModel and"),
        ({"sample_size": None}, "sample_size is missing"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier' is not supported"),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity' is not supported"),
        ({"block_out_channels": [32, 96]}, "makes it 96. Check"),
        ({"layers_per_block": 2}, "tensor 'up_blocks.0.resnets.1.norm1.weight' is 96, "),
        ({"num_class_embeds": 3}, "1 tensors missing (first: 'class_embedding.weight')"),
        ({"down_block_types": ["Nonsense", "DownBlock2D"]}, "UNet2DModel cannot be built from it (Nonsense"),
        ({"norm_num_groups": 7}, "UNet2DModel cannot be built from it"),
    ],
)
def test_wrong_unet_config_is_named(tmp_path: Path, entries: dict[str, Any], words: str) -> None:
    edit(parts(tmp_path) / "unet/config.json", **entries)
    message = refusal(tmp_path)
    assert words in message and str(tmp_path / "unet") in message


def test_learned_variance_is_refused(tmp_path: Path) -> None:
    assert "in_channels 3, out_channels 6: not supported" in refusal(
        parts(tmp_path, UNet2DModel(**{**SMALL, "out_channels": 6}))
    )


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"shift_factor": 0.1}, "shift_factor is not supported"),
        ({"latent_channels": 4}, "decodes 4 channels, the UNet has 3"),
        ({"_class_name": "AutoencoderTiny"}, "only AutoencoderKL and VQModel are supported"),
    ],
)
def test_wrong_autoencoder_config_is_named(tmp_path: Path, entries: dict[str, Any], words: str) -> None:
    edit(parts(tmp_path, vae=AutoencoderKL(**AUTOENCODER)) / "vae/config.json", **entries)
    assert words in refusal(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    parts(tmp_path)
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "not a complete safetensors file" in refusal(tmp_path)
    weights.unlink()
    assert "no weights, expected diffusion_pytorch_model.safetensors" in refusal(tmp_path)
    weights.write_bytes(whole)
    (tmp_path / "scheduler/scheduler_config.json").write_text("{")
    assert "scheduler_config.json: not readable JSON" in refusal(tmp_path)
    (tmp_path / "scheduler/scheduler_config.json").unlink()
    assert "scheduler_config.json: missing, a diffusers folder needs its scheduler" in refusal(tmp_path)
    assert "--null-class 1: " in refusal(parts(tmp_path / "whole"), UsageError, null_class=1)
    assert "brings its own" in refusal(tmp_path, UsageError, config=Path("x.yaml"))
    (tmp_path / "empty").mkdir()
    assert "needs its unet. Found here: nothing" in refusal(tmp_path / "empty")


def test_nan_weights_are_named(tmp_path: Path) -> None:
    unet = UNet2DModel(**SMALL)
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    assert "'conv_out.bias' holds NaN or infinity" in refusal(parts(tmp_path, unet))

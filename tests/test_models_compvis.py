"""CompVis checkpoints: the converted modules equal an independent implementation, and every tensor is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reading checkpoints needs torch")
pytest.importorskip("diffusers", reason="reading checkpoints needs diffusers")
yaml = pytest.importorskip("yaml", reason="CompVis configs are YAML")

from diffusers.loaders import single_file_utils  # noqa: E402
from ldm_checkpoint import STAGES, UNETS, Written  # noqa: E402
from ldm_reference import FirstStage, UNetModel, randomize  # noqa: E402

from qncd_deploy.checkpoint import load_weights  # noqa: E402
from qncd_deploy.errors import CheckpointError, UsageError  # noqa: E402
from qncd_deploy.models.first_stage import (  # noqa: E402
    build_decoder,
    decoder_sources,
    read_first_stage_params,
)
from qncd_deploy.models.ldm_config import Section  # noqa: E402
from qncd_deploy.models.ldm_unet import build_unet, read_unet_params, unet_sources  # noqa: E402
from qncd_deploy.models.load import artifact_name, load_source  # noqa: E402

DEMO = Path(__file__).parents[1] / "calib_data/fashion-ldm"

# float32 networks of about fifty layers that sum in another order: 50 * 2**-24 * sqrt(terms) is a few 1e-5.
RELATIVE = 1e-4


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and expected.abs().max() > 1e-3
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_the_original(tmp_path: Path, name: str) -> None:
    written = Written(tmp_path, UNETS[name])
    source = written.load()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 71.0])
    context = labels = None
    inputs: dict[str, torch.Tensor] = {}
    if UNETS[name].get("use_spatial_transformer"):
        context = inputs["encoder_hidden_states"] = torch.from_numpy(source.condition.values[[0, 4]])
    if UNETS[name].get("num_classes"):
        labels = inputs["class_labels"] = torch.tensor([1, 4])
    assert [spec.name for spec in source.input_specs] == ["sample", "timestep", *inputs]
    expected = written.unet(x, t, context, labels)
    assert relative_error(source.unet(x, t, **inputs).sample, expected) < RELATIVE


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("attention", [[], [8]])
def test_decoder_equals_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, attention: list[int]
) -> None:
    stage = {**STAGES[kind], "ddconfig": {**STAGES[kind]["ddconfig"], "attn_resolutions": attention}}
    monkeypatch.setitem(STAGES, kind, stage)
    written = Written(tmp_path, UNETS["attention-head-channels"], kind)
    source = written.load()
    latents = torch.randn(2, 3, 8, 8)
    expected = written.stage.decode(latents, 0.5)
    assert source.image_shape == (3, 16, 16) == tuple(expected.shape[1:])
    assert relative_error(source.decoder(latents), expected) < RELATIVE
    # The scale is part of the decoder, and a VQ decoder looks its codes up: neither may pass unnoticed.
    assert relative_error(source.decoder(latents), written.stage.decode(latents, 0.4)) > RELATIVE


def test_scale_factor_in_the_checkpoint_wins(tmp_path: Path) -> None:
    written = Written(tmp_path, UNETS["attention-head-channels"], scale_by_std=True)
    assert "scale_by_std" in "".join(written.load().notes)
    written.state["scale_factor"] = torch.tensor(0.25)
    source = written.load()
    latents = torch.randn(1, 3, 8, 8)
    assert relative_error(source.decoder(latents), written.stage.decode(latents, 0.25)) < RELATIVE
    assert source.notes == ()


def test_averaged_weights_are_preferred_and_complete(tmp_path: Path) -> None:
    written = Written(tmp_path, UNETS["attention-head-channels"])
    averaged = randomize(UNetModel(**UNETS["attention-head-channels"]), 9)
    for name, value in averaged.state_dict().items():
        written.state["model_ema." + f"diffusion_model.{name}".replace(".", "")] = value
    written.state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([3.0])
    source = written.load()
    assert relative_error(source.unet(x, t).sample, averaged(x, t)) < RELATIVE
    assert "EMA" in source.notes[0]
    written.config["model"]["params"]["use_ema"] = False
    assert relative_error(written.load().unet(x, t).sample, written.unet(x, t)) < RELATIVE
    written.config["model"]["params"]["use_ema"] = True
    written.state = {k: v for k, v in written.state.items() if not k.startswith("model.diffusion_model.")}
    assert relative_error(written.load().unet(x, t).sample, averaged(x, t)) < RELATIVE
    del written.state["model_ema.diffusion_modelout2bias"]
    with pytest.raises(CheckpointError, match=r"1 tensors missing \(first: 'model_ema\.out\.2\.bias'\)"):
        written.load()


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    written = Written(tmp_path, UNETS["attention-head-channels"])
    written.state = {name: value.to(torch.bfloat16) for name, value in written.state.items()}
    source = written.load()
    stored = written.state["model.diffusion_model.out.2.weight"]
    assert torch.equal(source.unet.conv_out.weight, stored.float())
    assert {p.dtype for m in (source.unet, source.decoder) for p in m.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in source.unet.parameters()) and not source.unet.training


def test_demo() -> None:
    source = load_source(DEMO / "model.ckpt")
    assert artifact_name(DEMO / "model.ckpt") == "fashion-ldm"
    assert (source.family, source.scheduler) == ("compvis-ldm", "ddim")
    assert (source.latent_shape, source.image_shape) == ((4, 8, 8), (1, 32, 32))
    assert source.condition.kind == "class-tokens"
    assert (source.condition.classes, source.condition.null_class) == (11, 10)
    assert source.condition.values.shape == (11, 1, 64) and source.condition.values.dtype == np.float32
    stored = torch.load(DEMO / "model.ckpt", weights_only=True)["state_dict"]
    # The buffer is a float32 product of 1000 factors: 1000 * 2**-24.
    np.testing.assert_allclose(source.schedule.alphas_cumprod, stored["alphas_cumprod"].numpy(), rtol=6e-5)
    assert source.schedule.prediction == "epsilon" and source.schedule.steps_offset == 1
    assert source.schedule.final_abar == source.schedule.alphas_cumprod[0]
    assert sum(p.numel() for p in source.unet.parameters()) == pytest.approx(6.13e6, rel=1e-3)
    assert source.decoder.scale_factor == stored["scale_factor"].item()
    assert set(source.companions) == {"features.onnx", "features-reference.npz"}
    assert source.files == {"checkpoint": DEMO / "model.ckpt", "config": DEMO / "config.yaml"}
    assert load_source(DEMO / "model.ckpt", null_class=3).condition.null_class == 3
    with pytest.raises(UsageError, match="--null-class 11: the network has classes 0 to 10"):
        load_source(DEMO / "model.ckpt", null_class=11)


@pytest.mark.parametrize("name", ["transformer-head-channels", "transformer-heads-depth-2-scale-shift"])
def test_names_agree_with_diffusers_converter(name: str) -> None:
    """Where diffusers' own converter applies (it reads names alone), it must say the same."""
    params = read_unet_params(Section(Path("config.yaml"), "params", UNETS[name]))
    sources = unet_sources(build_unet(params, 8), params)
    names = {f"model.diffusion_model.{source.key}": source.key for source in sources.values()}
    theirs = single_file_utils.convert_ldm_unet_checkpoint(names, {"layers_per_block": params.num_res_blocks})
    assert theirs == {ours: source.key for ours, source in sources.items()}


CIN256 = {
    **{"image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 192, "num_res_blocks": 2},
    **{"attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 5], "num_heads": 1},
    **{"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 512},
}
BEDROOMS = {
    **{"image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 224, "num_res_blocks": 2},
    **{"attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 4], "num_head_channels": 32},
}
CHURCHES = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 192, "num_res_blocks": 2},
    **{"attention_resolutions": [1, 2, 4, 8], "channel_mult": [1, 2, 2, 4, 4], "num_heads": 8},
    **{"use_scale_shift_norm": True, "resblock_updown": True},
}
VQ_F4 = {
    **{"double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128},
    **{"ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0},
}
KL_F8 = {**VQ_F4, "double_z": True, "z_channels": 4, "ch_mult": [1, 2, 4, 4]}
KL_F16 = {**VQ_F4, "double_z": True, "z_channels": 16, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}


@pytest.mark.parametrize(
    "config, millions",  # Rombach et al., arXiv:2112.10752, tables 12 and 13
    [(CIN256, 400), (BEDROOMS, 274), (CHURCHES, 294)],
    ids=["cin256-v2", "lsun-bedrooms", "lsun-churches"],
)
def test_published_unets_are_covered_to_the_last_tensor(config: dict[str, Any], millions: float) -> None:
    params = read_unet_params(Section(Path("config.yaml"), "params", config))
    unet = build_unet(params, config["image_size"])
    with torch.device("meta"):
        original = UNetModel(**config)
    wanted = {source.key: source.shape for source in unet_sources(unet, params).values()}
    assert wanted == {name: tuple(value.shape) for name, value in original.state_dict().items()}
    assert sum(p.numel() for p in unet.parameters()) // 10**6 == millions


@pytest.mark.parametrize(
    "stage",
    [
        {"embed_dim": 3, "n_embed": 8192, "ddconfig": VQ_F4},
        {"embed_dim": 4, "ddconfig": KL_F8},
        {"embed_dim": 16, "ddconfig": KL_F16},
    ],
    ids=["vq-f4", "kl-f8", "kl-f16"],
)
def test_published_decoders_are_covered_to_the_last_tensor(stage: dict[str, Any]) -> None:
    params = read_first_stage_params(Section(Path("config.yaml"), "params", stage), vq="n_embed" in stage)
    with torch.device("meta"):
        original = FirstStage(**stage)
    wanted = {source.key: source.shape for source in decoder_sources(build_decoder(params, 1.0)).values()}
    assert wanted == {name: tuple(value.shape) for name, value in original.state_dict().items()}


@pytest.mark.parametrize(
    "config",
    [pytest.param(CIN256, marks=pytest.mark.slow), BEDROOMS, CHURCHES],
    ids=["cin256-v2", "lsun-bedrooms", "lsun-churches"],
)
def test_published_unets_equal_the_original(config: dict[str, Any]) -> None:
    """True widths and depths; the latents are smaller, which these networks do not notice."""
    params = read_unet_params(Section(Path("config.yaml"), "params", config))
    unet, original = build_unet(params, 16), randomize(UNetModel(**config))
    sources = unet_sources(unet, params)
    load_weights(unet, sources, original.state_dict(), where="x", asked_by="x", blame=lambda key, dim: "x")
    x, t = torch.randn(1, config["in_channels"], 16, 16), torch.tensor([481.0])
    context = torch.randn(1, 1, config["context_dim"]) if "context_dim" in config else None
    inputs = {} if context is None else {"encoder_hidden_states": context}
    with torch.no_grad():
        assert relative_error(unet(x, t, **inputs).sample, original(x, t, context)) < RELATIVE


@pytest.mark.parametrize(
    "entry, value, words",
    [
        ("in_channels", 4, r"input_blocks\.0\.0\.weight' is 32x3x3x3.*makes it 32x4x3x3.*params\.in_channels"),
        (
            "model_channels",
            64,
            r"'model\.diffusion_model\.\S+' is \S+, \S+config\.yaml makes it \S+\. Check .*model_channels",
        ),
        ("channel_mult", [1, 3], r"is \S+, .* makes it \S+\. Check .*channel_mult"),
        ("use_scale_shift_norm", True, r"emb_layers.*is 32x128, .* makes it 64x128.*use_scale_shift_norm"),
        ("context_dim", 40, r"attn2\.to_k\.weight' is 32x24, .* makes it 32x40.*context_dim"),
        ("transformer_depth", 2, r"tensors missing .*transformer_blocks\.1.*transformer_depth"),
        ("attention_resolutions", [1], r"tensors without a place .*attention_resolutions"),
        ("num_heads", 3, r"num_head_channels is 5, which does not divide the channels"),
        ("n_embed", 7, r"unet_config\.params\.n_embed is not supported"),
        ("dims", 3, r"unet_config\.params\.dims is 3, only 2 is supported"),
        ("conv_resample", False, r"conv_resample is False, only True is supported"),
        ("resblock_updown", True, r"resblock_updown with use_spatial_transformer is not supported"),
        ("in_channels", None, r"unet_config\.params\.in_channels is missing"),
        ("channel_mult", "1,2", r"channel_mult is '1,2', expected a list of whole numbers"),
    ],
)
def test_wrong_config_is_named(tmp_path: Path, entry: str, value: Any, words: str) -> None:
    written = Written(tmp_path, UNETS["transformer-head-channels"])
    params = dict(UNETS["transformer-head-channels"])
    params[entry] = value
    if entry == "in_channels" and value:
        params["out_channels"] = value
    if entry == "num_heads":
        params["num_head_channels"] = 5
    if entry == "context_dim":
        written.config["model"]["params"]["cond_stage_config"]["params"]["embed_dim"] = value
    written.config["model"]["params"]["unet_config"]["params"] = params
    with pytest.raises(CheckpointError, match=words) as caught:
        written.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "params, words",
    [
        ({"linear_end": 0.02}, r"linear_end, .* disagree with 'betas' in .*model\.ckpt"),
        ({"beta_schedule": "sqrt_linear"}, r"beta_schedule disagree with 'betas'"),
        ({"beta_schedule": "sqrt"}, r"beta_schedule is 'sqrt', expected one of linear"),
        ({"timesteps": 50}, r"disagree with 'betas' in .* \(100 steps"),
        ({"parameterization": "y"}, r"parameterization is 'y', expected one of eps, x0, v"),
        ({"scale_factor": 0.0}, r"scale_factor is 0\.0, expected a positive number"),
        (
            {"first_stage_config": {"target": "ldm.X", "params": {}}},
            r"first_stage_config\.target is X, only AutoencoderKL",
        ),
        (
            {"cond_stage_config": {"target": "a.BERTEmbedder"}},
            r"is BERTEmbedder, only FrozenCLIPEmbedder, FrozenOpenCLIP",
        ),
        ({"cond_stage_config": "__is_unconditional__"}, r"yet .* holds 'cond_stage_model\.embedding\.weight'"),
        ({"conditioning_key": "hybrid"}, r"conditioning_key must be crossattn"),
        ({"unet_config": None}, r"model\.params\.unet_config is missing, expected a section"),
    ],
)
def test_unsupported_or_contradicting_config_is_named(tmp_path: Path, params: dict[str, Any], words: str) -> None:
    written = Written(tmp_path, UNETS["transformer-head-channels"])
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 100) ** 2
    written.state["betas"] = torch.from_numpy(betas).float()
    written.load()
    written.config["model"]["params"] |= params
    with pytest.raises(CheckpointError, match=words) as caught:
        written.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda s: s.pop("model.diffusion_model.out.2.bias"),
            r"1 tensors missing \(first: 'model\.diffusion_model\.out\.2",
        ),
        (
            lambda s: s.update({"model.diffusion_model.extra": torch.ones(1)}),
            r"1 tensors without a place \(first: .*extra",
        ),
        (lambda s: s.pop("first_stage_model.post_quant_conv.bias"), r"tensors missing .*post_quant_conv\.bias"),
        (lambda s: s.pop("cond_stage_model.embedding.weight"), r"misses 'cond_stage_model\.embedding\.weight'"),
        (
            lambda s: s.update({"control_model.zero.bias": torch.ones(1)}),
            r"'control_model\.zero\.bias'; a ControlNet",
        ),
        (lambda s: s["model.diffusion_model.out.2.bias"].fill_(torch.nan), r"out\.2\.bias' holds NaN or infinity"),
        (lambda s: s["cond_stage_model.embedding.weight"].fill_(torch.inf), r"embedding\.weight' holds NaN"),
        (
            lambda s: s.update({"model.diffusion_model.out.2.bias": torch.ones(3, dtype=torch.int8)}),
            r"out\.2\.bias' is torch\.int8, expected floating-point",
        ),
        (lambda s: (s.clear(), s.update({"lora_unet_a.lora_up.weight": torch.ones(2, 2)})), r"lora_unet_a.*a LoRA"),
    ],
)
def test_damaged_or_foreign_tensors_are_named(tmp_path: Path, change: Any, words: str) -> None:
    written = Written(tmp_path, UNETS["transformer-head-channels"])
    change(written.state)
    with pytest.raises(CheckpointError, match=words) as caught:
        written.load()
    assert "\n" not in str(caught.value)


def test_config_is_looked_for_beside_the_checkpoint(tmp_path: Path) -> None:
    written = Written(tmp_path, UNETS["attention-head-channels"])
    path = written.save()
    config = path.with_name("config.yaml")
    other = config.rename(tmp_path / "elsewhere.yaml")
    with pytest.raises(CheckpointError, match=r"looked for \S+config\.yaml and \S+model\.yaml\. Give it with --config"):
        load_source(path)
    assert load_source(path, config=other).files["config"] == other
    other.rename(tmp_path / "model.yaml")
    assert load_source(path).files["config"] == tmp_path / "model.yaml"
    for text, words in ((":\n -:", "not valid YAML"), ("- 1", "not a mapping"), ("a: !!python/object:os.x {}", "YAML")):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=words):
            load_source(path)
    with pytest.raises(CheckpointError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        load_source(path, config=tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match=r"--null-class 1: .* is not class-conditional"):
        load_source(written.save(), null_class=1)

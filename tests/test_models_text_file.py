"""Stable Diffusion in one file: the same network and encoders as the folder's, by YAML or by the layout alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch", reason="reading checkpoints needs torch")
pytest.importorskip("diffusers", reason="the network is built with diffusers")
pytest.importorskip("transformers", reason="text encoders are built with transformers")

from clip_words import TOKENS  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from diffusers.loaders import single_file_utils as converters  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from text_files import STAGE, UNET, UNETS, state_of, written, yaml_of  # noqa: E402
from text_models import LATENTS, TWINS  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModelWithProjection  # noqa: E402

from qncd_deploy.checkpoint import Checkpoint  # noqa: E402
from qncd_deploy.errors import CheckpointError, UsageError  # noqa: E402
from qncd_deploy.models.ldm_config import Section  # noqa: E402
from qncd_deploy.models.ldm_layout import describe  # noqa: E402
from qncd_deploy.models.ldm_text import open_clip_sources  # noqa: E402
from qncd_deploy.models.ldm_unet import build_unet, read_unet_params, unet_sources  # noqa: E402
from qncd_deploy.models.load import load_source  # noqa: E402
from qncd_deploy.models.source import SourceModel  # noqa: E402
from qncd_deploy.prompts import prompt_table  # noqa: E402

PROMPTS = ["a photo of the cat", "Astronaut riding a RED horse, 4k", "", "dog " * 100]
NAMES = ("sd15", "sd21", "sdxl")
TRUE_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sd21": {
        **{"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]},
        "use_linear_projection": True,
    },
    "sdxl": {
        **{"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20]},
        **{"block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10]},
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        **{"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256},
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""The published unet/config.json of each, where they differ from diffusers' defaults."""
TRUE_PARAMS: dict[str, dict[str, Any]] = {
    "sd15": {
        **{"model_channels": 320, "channel_mult": [1, 2, 4, 4], "attention_resolutions": [1, 2, 4], "num_heads": 8},
        **{"transformer_depth": 1, "context_dim": 768},
    },
    "sd21": {
        **{"model_channels": 320, "channel_mult": [1, 2, 4, 4], "attention_resolutions": [1, 2, 4]},
        **{"num_head_channels": 64, "transformer_depth": 1, "context_dim": 1024, "use_linear_in_transformer": True},
    },
    "sdxl": {
        **{"model_channels": 320, "channel_mult": [1, 2, 4], "attention_resolutions": [2, 4], "num_head_channels": 64},
        **{"transformer_depth": [1, 2, 10], "context_dim": 2048, "use_linear_in_transformer": True},
        **{"num_classes": "sequential", "adm_in_channels": 2816},
    },
}
"""The published YAMLs' unet_config.params."""


def table(source: SourceModel) -> dict[str, np.ndarray]:
    towers = [(encoder.tokenizer, encoder.encode) for encoder in source.text.encoders]
    return prompt_table(PROMPTS, None, towers, source.text.facts)


def close(found: Any, expected: Any) -> bool:
    """Equal but for the order of sums."""
    expected = np.asarray(expected)
    return np.allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def refusal(path: Path, error: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load_source(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    return {name: written(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_what_the_pipeline_has(name: str, files: dict[str, tuple[Any, Path]]) -> None:
    pipe, path = files[name]
    source = load_source(path, height=8 * LATENTS, width=8 * LATENTS)
    rows = table(source)
    if name == "sdxl":
        given, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, None, "cpu", 1, True)
        expected = {"text_embeds": torch.cat([pooled, null_pooled[:1]]), "time_ids": torch.tensor([[64, 64, 0, 0] * 2])}
        expected["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(5, 1)
    else:
        given, null = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
        expected = {}
    expected = {"encoder_hidden_states": torch.cat([given, null[:1]]), **expected}
    assert rows.keys() == expected.keys() and all(close(rows[key], expected[key]) for key in rows)
    x, t = torch.randn(5, 4, LATENTS, LATENTS), torch.tensor([999.0, 500, 20, 1, 0])
    found = source.unet(x, t, *map(torch.from_numpy, rows.values())).sample
    added = {key: expected[key] for key in ("text_embeds", "time_ids") if key in expected}
    assert close(found, pipe.unet(x, t, expected["encoder_hidden_states"], added_cond_kwargs=added).sample)
    assert close(source.decoder(x), pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample)
    assert source.schedule.prediction == ("v_prediction" if name == "sd21" else "epsilon")
    np.testing.assert_allclose(source.schedule.alphas_cumprod, pipe.scheduler.alphas_cumprod, rtol=1e-4)
    assert {"checkpoint", "tokenizer1/tokenizer.json"} <= source.files.keys()
    assert bool(source.notes) == (name == "sd21")
    latents = {"sd15": 64, "sd21": 96, "sdxl": 128}[name]
    assert load_source(path).latent_shape == (4, latents, latents)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_its_yaml_says_the_same(name: str, files: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    _, path = files[name]
    config = tmp_path / "model.yaml"
    config.write_text(yaml.safe_dump(yaml_of(name)))
    by_yaml, by_layout = load_source(path, config=config), load_source(path)
    assert by_yaml.unet.config == {**by_layout.unet.config, "sample_size": 8}
    assert by_yaml.schedule.sha256() == by_layout.schedule.sha256() and not by_yaml.notes
    assert by_yaml.text.facts == by_layout.text.facts
    assert close(table(by_yaml)["encoder_hidden_states"], table(by_layout)["encoder_hidden_states"])


def engine_yaml(path: Path, change: tuple[str, Any] | None = None) -> Path:
    """As sd_xl_base.yaml of generative-models has it. change: an entry, by its dotted place, and what it becomes."""
    place = "sgm.modules.diffusionmodules."
    inner = {
        "num_idx": 1000,
        "scaling_config": {"target": f"{place}denoiser_scaling.EpsScaling"},
        "discretization_config": {"target": f"{place}discretizer.LegacyDDPMDiscretization"},
    }
    denoiser = {"target": f"{place}denoiser.DiscreteDenoiser", "params": inner}
    params = {"scale_factor": 0.13025, "disable_first_stage_autocast": True, "denoiser_config": denoiser}
    model = {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}
    if change is not None:
        *sections, last = change[0].split(".")
        section = model
        for name in sections:
            section = section[name]
        section[last] = change[1]
    path.write_text(yaml.safe_dump({"model": model}))
    return path


DENOISER = "params.denoiser_config"


def test_a_yaml_of_generative_models_says_what_the_tensors_do_not(
    files: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    _, path = files["sdxl"]
    plain, size = load_source(path), {"height": 8 * LATENTS, "width": 8 * LATENTS}
    config = engine_yaml(tmp_path / "sd_xl_base.yaml")
    by_yaml = load_source(path, config=config)
    assert by_yaml.text.facts == plain.text.facts and by_yaml.schedule.sha256() == plain.schedule.sha256()
    assert by_yaml.files["config"] == config and not by_yaml.notes
    engine_yaml(config, (f"{DENOISER}.params.scaling_config.target", "sgm.denoiser_scaling.VScaling"))
    assert load_source(path, config=config).schedule.prediction == "v_prediction"
    betas = {"target": "sgm.LegacyDDPMDiscretization", "params": {"linear_end": 0.02}}
    engine_yaml(config, (f"{DENOISER}.params.discretization_config", betas))
    assert "disagree with 'alphas_cumprod'" in refusal(path, config=config)
    engine_yaml(config, ("params.scale_factor", 0.5))
    x = torch.randn(1, 4, LATENTS, LATENTS)
    exact, other = (load_source(path, config=file, **size).decoder for file in (None, config))
    assert close(other(x), exact(x / 0.5 * 0.13025))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("params.denoiser_config", None, "denoiser_config is missing"),
        (f"{DENOISER}.target", "sgm.Denoiser", "denoiser_config.target is Denoiser, only DiscreteDenoiser is"),
        (
            f"{DENOISER}.params.scaling_config.target",
            "sgm.EDMScaling",
            "is EDMScaling, expected one of EpsScaling",
        ),
        (
            f"{DENOISER}.params.discretization_config.target",
            "sgm.EDMDiscretization",
            "only LegacyDDPMDiscret",
        ),
        (f"{DENOISER}.params.discretization_config.params", {"zsnr": True}, "params.zsnr is not supported"),
        (f"{DENOISER}.params.num_idx", 100, "num_idx is 100, only all 1000 timesteps are supported"),
        (f"{DENOISER}.params.flip", False, "flip is False, only True is supported"),
    ],
)
def test_what_is_not_understood_of_it_is_refused(
    files: dict[str, tuple[Any, Path]], tmp_path: Path, place: str, value: Any, words: str
) -> None:
    config = engine_yaml(tmp_path / "model.yaml", (place, value))
    message = refusal(files["sdxl"][1], config=config)
    assert message.startswith(f"{config}: model.params.denoiser_config") and words in message


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_original_layout(name: str) -> None:
    """diffusers' converter makes its own state of ours, and leaves nothing out."""
    pipe = TWINS[name](wide=True)
    state = state_of(name, pipe)
    converted = converters.convert_ldm_unet_checkpoint(state, dict(pipe.unet.config))
    expected = pipe.unet.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_true_configurations(name: str) -> None:
    """The published UNets on the meta device: every name and shape, from the YAML's entries and from the layout."""
    section = Section(Path("model.yaml"), "", {**UNETS[name], **TRUE_PARAMS[name], "num_res_blocks": 2})
    params = read_unet_params(section)
    ours = build_unet(params, 64)
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**TRUE_UNETS[name])
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == expected
    heads = {key: (module.heads, module.scale) for key, module in theirs.named_modules() if hasattr(module, "heads")}
    assert {
        key: (module.heads, module.scale) for key, module in ours.named_modules() if hasattr(module, "heads")
    } == heads
    sources = unet_sources(ours, params)
    state = {UNET + source.key: torch.empty(source.shape, device="meta") for source in sources.values()}
    converted = converters.convert_ldm_unet_checkpoint(state, dict(theirs.config))
    assert {key: tuple(value.shape) for key, value in converted.items()} == expected
    prefix = {"sd15": "cond_stage_model.transformer.", "sd21": "cond_stage_model.model.", "sdxl": "conditioner."}[name]
    stage = state_of(name, TWINS[name](wide=True))
    state |= {key: value for key, value in stage.items() if key.startswith(STAGE)} | {f"{prefix}x": torch.empty(0)}
    described, _ = describe(Checkpoint(Path("model.ckpt"), state, {}))
    found = read_unet_params(described.section("params").section("unet_config").section("params"))
    assert found == params


@pytest.mark.parametrize(("width", "layers", "heads", "projection"), [(1024, 23, 16, 512), (1280, 32, 20, 1280)])
def test_true_open_clip_towers(width: int, layers: int, heads: int, projection: int) -> None:
    """ViT-H of Stable Diffusion 2 and ViT-bigG of XL: names and shapes as diffusers' converter takes them."""
    config = CLIPTextConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        projection_dim=projection, vocab_size=49408,
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config)
    sources = open_clip_sources(config)
    state = {f"x.{source.key}": torch.empty(source.shape, device="meta") for source in sources.values()}
    if projection == width:  # the converter takes the projection for the width
        converted = converters.convert_open_clip_checkpoint(model, state, prefix="x.")
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert {key: tuple(value.shape) for key, value in converted.items()} == shapes
    assert sources.keys() == model.state_dict().keys()


def spoiled(path: Path, folder: Path, **changes: Any) -> Path:
    """The file with tensors replaced, or left out by a prefix (None), and its tokenizer."""
    state = load_file(path)
    for key, value in changes.items():
        state = {name: tensor for name, tensor in state.items() if not name.startswith(key)}
        state |= {} if value is None else {key: value}
    save_file(state, folder / path.name)
    (folder / "tokenizer").symlink_to(path.parent / "tokenizer")
    return folder / path.name


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("sd15", {"cond_stage_model.": None}, "holds no text encoder (no 'cond_stage_model.*' and no"),
        ("sdxl", {"conditioner.embedders.1.": None}, "holds no text encoder (no 'conditioner.embedders.1.model.*')"),
        ("sd15", {"first_stage_model.": None}, "holds no 'first_stage_model.decoder.conv_in.weight'"),
        ("sd15", {"model.diffusion_model.": None}, "holds no 'model.diffusion_model."),
        (
            "sd15",
            {"cond_stage_model.other": torch.ones(1)},
            "1 tensors without a place (first: 'cond_stage_model.other')",
        ),
        ("sd15", {"model.diffusion_model.other": torch.ones(1)}, "1 tensors without a place"),
        ("sd21", {"cond_stage_model.model.positional_embedding": None}, "positional_embedding' is missing"),
        ("sd15", {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}, "an inpainting network"),
        ("sd15", {"lora_unet_mid_block.lora_up.weight": torch.ones(1)}, "a LoRA is a change to a model"),
        ("sd15", {"control_model.time_embed.0.weight": torch.ones(1)}, "a ControlNet steers a model"),
        ("sdxl", {"conditioner.embedders.0.model.ln_final.bias": torch.ones(1)}, "the refiner of SDXL"),
    ],
)
def test_what_is_missing_or_not_supported_is_named(
    name: str, changes: dict[str, Any], words: str, files: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    assert words in refusal(spoiled(files[name][1], tmp_path, **changes))


def test_every_tensor_of_a_tower_has_a_place(files: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    changes = {"cond_stage_model.model.transformer.resblocks.1.other": torch.ones(1)}
    source = load_source(spoiled(files["sd21"][1], tmp_path, **changes))
    with pytest.raises(CheckpointError, match=r"1 tensors without a place \(first: 'transformer.resblocks.1.other'"):
        table(source)


def test_a_tower_without_its_unused_layer(files: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """As diffusers' own script writes Stable Diffusion 2."""
    tower = "cond_stage_model.model."
    left_out = {f"{tower}transformer.resblocks.2.": None, f"{tower}text_projection": None, f"{tower}logit_scale": None}
    cut, whole = spoiled(files["sd21"][1], tmp_path, **left_out), files["sd21"][1]
    found, expected = (table(load_source(path))["encoder_hidden_states"] for path in (cut, whole))
    np.testing.assert_array_equal(found, expected)


def test_a_vocabulary_is_asked_for(files: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    path = spoiled(files["sd15"][1], tmp_path)
    (tmp_path / "tokenizer").unlink()
    message = refusal(path)
    assert "no tokenizer beside it" in message and f"into {tmp_path}." in message
    words = (files["sd15"][1].parent / "tokenizer/tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(words)
    source = load_source(path)
    assert source.files["tokenizer1/tokenizer.json"] == tmp_path / "tokenizer.json"
    assert source.text.facts.max_length == TOKENS
    assert "takes prompts, not classes" in refusal(path, UsageError, null_class=1)

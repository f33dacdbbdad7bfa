"""Stable Diffusion folders: network, text encoders and tokenizers as diffusers has them; what is refused, and how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reading checkpoints needs torch")
pytest.importorskip("diffusers", reason="reading diffusers folders needs diffusers")
pytest.importorskip("transformers", reason="text encoders are read with transformers")

from clip_words import TOKENS, vocabulary  # noqa: E402
from diffusers import ControlNetModel, DDIMScheduler  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from text_models import BLOCKS, LATENTS, PICTURE, TWINS, sd15  # noqa: E402

from qncd_deploy.bundle import TextFacts  # noqa: E402
from qncd_deploy.errors import CheckpointError, UsageError  # noqa: E402
from qncd_deploy.models.load import load_source  # noqa: E402
from qncd_deploy.models.source import SourceModel  # noqa: E402
from qncd_deploy.prompts import prompt_table  # noqa: E402

PROMPTS = ["a photo of the cat", "Astronaut riding a RED horse, 4k!", "", "dog " * 100]


def saved(name: str, folder: Path, **unet: Any) -> tuple[Any, Path]:
    pipe = TWINS[name](**unet)
    pipe.save_pretrained(folder)
    return pipe, folder


def table(source: SourceModel, prompts: list[str] = PROMPTS, negative: str | None = None) -> dict[str, np.ndarray]:
    towers = [(encoder.tokenizer, encoder.encode) for encoder in source.text.encoders]
    return prompt_table(prompts, negative, towers, source.text.facts)


def close(found: np.ndarray, expected: Any) -> bool:
    """Equal but for the order of sums: other batch sizes, another form of attention."""
    expected = np.asarray(expected)
    return np.allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def refusal(folder: Path, error: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load_source(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests copy what they spoil from."""
    return saved("sd15", tmp_path_factory.mktemp("sd15"))[1]


@pytest.fixture
def spoiled(sd: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sd, tmp_path / "sd15")


@pytest.mark.parametrize("name", list(TWINS))
def test_prompts_and_network_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    pipe, folder = saved(name, tmp_path)
    source = load_source(folder)
    rows = table(source)
    if source.text.facts.time_ids is None:
        given, null = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
        expected = {"encoder_hidden_states": torch.cat([given, null[:1]])}
        added = None
    else:
        given, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, None, "cpu", 1, True)
        sizes = pipe._get_add_time_ids((PICTURE, PICTURE), (0, 0), (PICTURE, PICTURE), torch.float32, 20)
        expected = {
            "encoder_hidden_states": torch.cat([given, null[:1]]),
            "text_embeds": torch.cat([pooled, null_pooled[:1]]),
            "time_ids": sizes.repeat(5, 1),
        }
        added = {key: expected[key] for key in ("text_embeds", "time_ids")}
    assert rows.keys() == expected.keys()
    assert all(close(rows[key], expected[key]) for key in rows)

    x, t = torch.randn(5, 4, LATENTS, LATENTS), torch.tensor([999.0, 500, 20, 1, 0])
    found = source.unet(x, t, *map(torch.from_numpy, rows.values())).sample
    wanted = pipe.unet(x, t, expected["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert close(found, wanted)
    assert [spec.name for spec in source.input_specs] == ["sample", "timestep", *rows]
    for spec in source.input_specs[2:]:
        assert spec.shape == ("batch", *rows[spec.name].shape[1:])
    picture = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert source.image_shape == (3, PICTURE, PICTURE) and close(source.decoder(x), picture)


def test_facts(tmp_path: Path) -> None:
    one = load_source(saved("sd21", tmp_path / "sd21")[1])
    assert one.text.facts == TextFacts(1, TOKENS) and one.condition is None and not one.few_steps
    assert (one.scheduler, one.schedule.prediction) == ("ddim", "v_prediction")
    two = load_source(saved("turbo", tmp_path / "turbo")[1])
    sizes = (PICTURE, PICTURE, 0, 0, PICTURE, PICTURE)
    assert two.text.facts == TextFacts(2, TOKENS, time_ids=sizes, zero_null=True)
    assert (two.scheduler, two.few_steps) == ("euler-a", True)
    edit(tmp_path / "turbo/model_index.json", force_zeros_for_empty_prompt=False)
    assert not load_source(tmp_path / "turbo").text.facts.zero_null
    assert {"text_encoder_2/model.safetensors", "tokenizer/tokenizer.json", "text_encoder-config"} <= set(two.files)


def test_another_size(tmp_path: Path) -> None:
    _, folder = saved("sdxl", tmp_path)
    source = load_source(folder, height=96, width=128)
    assert (source.latent_shape, source.image_shape) == ((4, 12, 16), (3, 96, 128))
    assert source.text.facts.time_ids == (96, 128, 0, 0, 96, 128)
    rows = table(source, ["the cat"])
    out = source.unet(torch.randn(2, 4, 12, 16), torch.tensor([5.0, 5]), *map(torch.from_numpy, rows.values())).sample
    assert out.shape == (2, 4, 12, 16)
    # Three levels halve twice, on an eighth of the picture.
    assert "--height 80: expected a multiple of 32, " in refusal(folder, UsageError, height=80)
    assert "--width 0: expected a multiple of 32, " in refusal(folder, UsageError, width=0)


def test_a_tokenizer_of_vocabulary_and_merges(spoiled: Path, sd: Path) -> None:
    words, merges = vocabulary()
    (spoiled / "tokenizer/tokenizer.json").unlink()
    (spoiled / "tokenizer/vocab.json").write_text(json.dumps(words))
    lines = "\n".join(" ".join(merge) for merge in merges)
    (spoiled / "tokenizer/merges.txt").write_text(f"#version: 0.2\n{lines}\n")
    made, given = (load_source(folder).text.encoders[0].tokenizer.to_str() for folder in (spoiled, sd))
    assert made == given
    (spoiled / "tokenizer/vocab.json").write_text("{")
    assert "tokenizer: not a CLIP tokenizer (" in refusal(spoiled)
    (spoiled / "tokenizer/vocab.json").unlink()
    assert "tokenizer: no tokenizer.json, and no vocab.json with merges.txt" in refusal(spoiled)


def test_names_and_precision_of_other_versions(spoiled: Path, sd: Path) -> None:
    """transformers wrote "text_model." before 5.6, and position ids before 4.31; half precision is a variant."""
    file = spoiled / "text_encoder/model.safetensors"
    tensors = {f"text_model.{name}": tensor.half() for name, tensor in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    save_file(tensors, spoiled / "text_encoder/model.fp16.safetensors")
    edit(spoiled / "text_encoder/config.json", dtype="float16", torch_dtype="float16")
    file.unlink()
    found, expected = (table(load_source(folder))["encoder_hidden_states"] for folder in (spoiled, sd))
    assert found.dtype == np.float32 and np.allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    tensors["text_model.encoder.layers.9.mlp.fc1.bias"] = torch.zeros(3)
    save_file(tensors, spoiled / "text_encoder/model.fp16.safetensors")
    source = load_source(spoiled)
    with pytest.raises(CheckpointError, match=r"1 tensors without a place \(first: 'text_model.encoder.layers.9"):
        table(source)


def test_half_of_the_shards(sd: Path, tmp_path: Path) -> None:
    pipe = sd15()
    for part in ("unet", "text_encoder"):
        folder = shutil.copytree(sd, tmp_path / part)
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        getattr(pipe, part).save_pretrained(folder / part, max_shard_size="60KB")
        shards = sorted((folder / part).glob("*-of-*.safetensors"))
        assert len(shards) > 1
        key = "encoder_hidden_states"
        assert close(table(load_source(folder))[key], table(load_source(sd))[key])
        for shard in shards[::2]:
            shard.unlink()
        message = refusal(folder)
        assert f"shards are missing, {len(shards[::2])} of {len(shards)} (first: {shards[0].name})" in message


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_missing_part_is_named(spoiled: Path, part: str) -> None:
    shutil.rmtree(spoiled / part)
    assert f"{part}/ is missing, and the UNet attends to text" in refusal(spoiled)


@pytest.mark.parametrize(
    ("channels", "words"), [(9, "in_channels 9, out_channels 4: an inpainting network"), (8, "InstructPix2Pix")]
)
def test_networks_that_are_given_pictures_are_refused_by_name(spoiled: Path, channels: int, words: str) -> None:
    edit(spoiled / "unet/config.json", in_channels=channels)
    assert words in refusal(spoiled)


def test_changes_to_a_model_are_not_one(tmp_path: Path) -> None:
    blocks = {key: BLOCKS[key] for key in ("block_out_channels", "layers_per_block", "norm_num_groups")}
    net = ControlNetModel(**blocks, down_block_types=BLOCKS["down_block_types"], cross_attention_dim=24)
    net.save_pretrained(tmp_path / "controlnet")
    assert "a ControlNet steers a model and is none" in refusal(tmp_path / "controlnet")
    (tmp_path / "lora").mkdir()
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, tmp_path / "lora/pytorch_lora_weights.safetensors")
    assert "pytorch_lora_weights.safetensors: a LoRA is a change to a model" in refusal(tmp_path / "lora")


@pytest.mark.parametrize(
    ("file", "entries", "words"),
    [
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "has 'controlnet', which is not"),
        ("model_index.json", {"requires_aesthetics_score": True}, "the refiner of SDXL"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "architecture 'T5EncoderModel' is not"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask is not supported"),
        ("text_encoder/config.json", {"hidden_size": 48}, "text encoders of 48 channels, the UNet attends to 24"),
        ("text_encoder/config.json", {"vocab_size": 100}, "a tokenizer of 558 tokens, the text encoder has 100"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "a latent consistency model"),
        (
            "unet/config.json",
            {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 8},
            "encoder_hid_dim_type 'text_proj' is not",
        ),
        (
            "unet/config.json",
            {"addition_embed_type": "image", "encoder_hid_dim": 8},
            "addition_embed_type 'image' is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_named(spoiled: Path, file: str, entries: dict[str, Any], words: str) -> None:
    edit(spoiled / file, **entries)
    assert words in refusal(spoiled)


def test_prompts_are_not_classes(sd: Path, spoiled: Path) -> None:
    assert "takes prompts, not classes" in refusal(sd, UsageError, null_class=3)
    shutil.rmtree(spoiled / "unet")
    unet = {**BLOCKS, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipe = sd15(**unet, mid_block_type="UNetMidBlock2D")
    pipe.unet.save_pretrained(spoiled / "unet")
    assert "text_encoder/ is there, and the UNet attends to nothing" in refusal(spoiled)
    shutil.rmtree(spoiled / "text_encoder")
    DDIMScheduler().save_pretrained(spoiled / "scheduler")
    assert load_source(spoiled).text is None

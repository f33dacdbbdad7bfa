"""From a Stable Diffusion folder to a bundle: what lies in it, and that it draws what diffusers draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("diffusers", reason="exporting needs diffusers")
pytest.importorskip("transformers", reason="the twins have text encoders of transformers")
onnxruntime = pytest.importorskip("onnxruntime", reason="encoders are run with ONNX Runtime")

from diffusers import EulerDiscreteScheduler  # noqa: E402
from ldm_checkpoint import UNETS, Written  # noqa: E402
from text_models import TWINS  # noqa: E402

from qncd_deploy.bundle import ConditionFacts, TextFacts  # noqa: E402
from qncd_deploy.engines.base import open_engine  # noqa: E402
from qncd_deploy.errors import CheckpointError, PromptError, ScheduleError, UsageError  # noqa: E402
from qncd_deploy.files import load_npz  # noqa: E402
from qncd_deploy.pipeline.export import Exported, export  # noqa: E402
from qncd_deploy.pipeline.network import read_network  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402
from qncd_deploy.pipeline.progress import Silent  # noqa: E402
from qncd_deploy.prompts import open_tokenizer, read_prompts, shipped_prompts, tokenize  # noqa: E402
from qncd_deploy.runtime import AS_EXPORTED, Bundle  # noqa: E402
from qncd_deploy.sample import PictureNoise  # noqa: E402

SHALLOW: dict[str, Any] = {
    **{"block_out_channels": (16,), "attention_head_dim": (2,), "transformer_layers_per_block": (1,)},
    **{"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)},
}
"""One level: tracing is what takes the time."""
PROMPTS = ("a photo of the cat", "red astronaut riding a horse on mars, 4k", "dog")


@dataclass(frozen=True)
class Made:
    pipe: Any
    exported: Exported

    @property
    def bundle(self) -> Bundle:
        return self.exported.bundle


def make(name: str, folder: Path, **options: Any) -> Made:
    pipe = TWINS[name](**SHALLOW)
    pipe.save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    given = ExportOptions(
        folder / name,
        onnx_dir=folder / "export",
        calib_dir=folder / "calib",
        prompts_file=folder / "prompts.txt",
        n_steps=5,
        calib_size=2,
        calib_steps=2,
        smooth="off",
        keep_float=0,
        correction="off",
        eval_size=1,
        **options,
    )
    return Made(pipe, export(given, Silent(), command="qncd-export"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("sd15", tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Not square, so that height and width cannot be exchanged unseen; without the noise that Turbo's sampler draws."""
    folder = tmp_path_factory.mktemp("turbo")
    made = make("turbo", folder, format="fp16", height=64, width=96, scheduler="euler")
    made.pipe.scheduler = EulerDiscreteScheduler.from_config(made.pipe.scheduler.config)
    return made


def close(found: np.ndarray, expected: Any) -> bool:
    """Equal but for the order of sums."""
    expected = np.asarray(expected)
    return np.allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_manifest_says_how_prompts_are_encoded(sd: Made, xl: Made) -> None:
    one, two = sd.bundle.manifest, xl.bundle.manifest
    assert one.model.condition == two.model.condition == ConditionFacts("text", 4, 3)
    assert one.model.text == TextFacts(1, 77)
    assert two.model.text == TextFacts(2, 77, time_ids=(64, 96, 0, 0, 64, 96), zero_null=True)
    assert (one.model.guidance_scale, one.model.sampler["scheduler"]) == (7.5, "plms")
    assert two.model.guidance_scale == 1 and "try --n-steps 4 instead of 5" in xl.exported.notes[0]
    assert two.model.latent_shape == (4, 8, 12) and two.model.image_shape == (3, 64, 96)
    assert {"text-encoder", "tokenizer", "prompts", "prompt-embedding"} <= one.roles.keys()
    assert {"text-encoder-2", "tokenizer-2"} <= two.roles.keys() - one.roles.keys()
    assert {"prompts", "text_encoder:model.safetensors", "tokenizer:tokenizer.json"} <= one.inputs.keys()
    assert (two.recipe["--height"], two.recipe["--width"], one.recipe["--height"]) == (64, 96, None)
    assert "--prompts-file" not in one.recipe  # a path; its content is among the inputs


def test_prompts_and_their_rows(sd: Made, xl: Made) -> None:
    assert read_prompts(sd.bundle.file("prompts")) == PROMPTS
    given, null = sd.pipe.encode_prompt(list(PROMPTS), "cpu", 1, True)
    rows = load_npz(sd.bundle.file("prompt-embedding"))
    assert rows.keys() == {"encoder_hidden_states"}
    assert close(rows["encoder_hidden_states"], torch.cat([given, null[:1]]))
    given, _, pooled, _ = xl.pipe.encode_prompt(list(PROMPTS), None, "cpu", 1, False)
    rows = load_npz(xl.bundle.file("prompt-embedding"))
    assert close(rows["encoder_hidden_states"][:-1], given) and close(rows["text_embeds"][:-1], pooled)
    assert (rows["encoder_hidden_states"][-1] == 0).all() and (rows["text_embeds"][-1] == 0).all()
    assert (rows["time_ids"] == [64, 96, 0, 0, 64, 96]).all()


def test_text_encoders_are_transformers(sd: Made, xl: Made) -> None:
    texts = ["dog on mars", "", "the " * 100]
    for made, role, words, part, penultimate in (
        (sd, "", sd.pipe.tokenizer, sd.pipe.text_encoder, False),
        (xl, "", xl.pipe.tokenizer, xl.pipe.text_encoder, True),
        (xl, "-2", xl.pipe.tokenizer_2, xl.pipe.text_encoder_2, True),
    ):
        ids = tokenize(open_tokenizer(made.bundle.file(f"tokenizer{role}")), texts)
        assert (ids == words(texts, padding="max_length", max_length=77, truncation=True).input_ids).all()
        with open_engine("onnxruntime", made.bundle.file(f"text-encoder{role}"), threads=1) as engine:
            found = engine({"input_ids": ids})
        out = part(torch.from_numpy(ids), output_hidden_states=True)
        assert close(found["hidden"], out.hidden_states[-2] if penultimate else out.last_hidden_state)
        assert ("pooled" in found) == (role == "-2")
        assert role != "-2" or close(found["pooled"], out.text_embeds)


def drawn_by_diffusers(made: Made, sides: Sequence[int]) -> np.ndarray:
    """Latents of the prompts, from the noise of seed 5."""
    height, width = sides
    latents = PictureNoise(5, range(3), (4, height // 8, width // 8)).initial()
    images = made.pipe(
        list(PROMPTS),
        height=height,
        width=width,
        num_inference_steps=5,
        guidance_scale=made.bundle.manifest.model.guidance_scale,
        latents=torch.from_numpy(latents),
        output_type="latent",
    ).images
    return np.asarray(images)


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_pictures_of_another_size_are_what_diffusers_draws(name: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(name)
    bundle = made.bundle.at_size(120, 72)
    assert bundle.at_size(*made.bundle.sides).manifest == made.bundle.manifest
    assert bundle.sides == (120, 72) and bundle.manifest.model.latent_shape == (4, 15, 9)
    with bundle.sampler("onnxruntime", float_twin=True, threads=1) as sampler:
        found = sampler.sample(3, seed=5)
    expected = drawn_by_diffusers(made, (120, 72))
    assert found.images.shape == (3, 120, 72, 3)
    assert np.abs(found.latents - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_correction_is_of_one_size(sd: Made) -> None:
    bundle = sd.bundle.at_size(width=96)
    assert bundle.key(AS_EXPORTED, "onnxruntime-f32").mismatch(sd.bundle.key(AS_EXPORTED, "onnxruntime-f32")) == (
        "fitted for 64 x 96 pixels (height x width), asked for 64 x 64 pixels (height x width)"
    )
    with pytest.raises(ScheduleError, match=r"Run `qncd fit .* --remainder f32 --height 64 --width 96`"):
        bundle.sampler("onnxruntime", correction="ptqd")


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_the_float_twin_draws_what_diffusers_draws(name: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(name)
    facts = made.bundle.manifest.model
    with made.bundle.sampler("onnxruntime", float_twin=True, threads=1) as sampler:
        found = sampler.sample(3, seed=5)
    expected = drawn_by_diffusers(made, facts.image_shape[1:])
    # As in test_text_pipelines, and another engine.
    assert np.abs(found.latents - expected).max() < 1e-4 * np.abs(expected).max()
    pictures = made.pipe.vae.decode(torch.from_numpy(expected) / made.pipe.vae.config.scaling_factor).sample
    rounded = (127.5 * (pictures.clamp(-1, 1) + 1)).numpy().transpose(0, 2, 3, 1)
    assert np.abs(found.images - rounded).max() <= 0.5 + 0.05  # half a level, and what the latents differ


@pytest.mark.parametrize("sides", [(8, 8), (9, 14)])
def test_int8_is_close_to_float(sd: Made, sides: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    rows = load_npz(sd.bundle.file("prompt-embedding"))["encoder_hidden_states"]
    feeds = {
        "sample": rng.standard_normal((4, 4, *sides)).astype(np.float32),
        "timestep": np.array([999, 700, 300, 1], np.float32),
        "encoder_hidden_states": rows,
    }
    outputs = []
    for role in ("float", "master"):
        with open_engine("onnxruntime", sd.bundle.file(role), threads=1) as engine:
            outputs.append(next(iter(engine(feeds).values())))
    exact, found = outputs
    snr = 10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum())
    # A grid of 8 bits is some 40 dB below what it rounds, weights and activations alike; the errors of 40 layers
    # add up along a residual network: 40 - 10 log10(2 * 40) = 21 dB if each reached the output whole.
    assert snr > 21
    assert sum(layer["weight_bits"] == 8 for layer in sd.bundle.plan["layers"]) > 30


def test_the_captions_that_ship() -> None:
    captions = shipped_prompts()
    assert len(captions) == len(set(captions)) == 32 and all(caption.isascii() for caption in captions)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"prompts_file": Path("x.txt")}, "--prompts-file x.txt: the network takes no prompts"),
        ({"height": 10}, "--height 10: expected a multiple of 4, "),
        ({"width": -4}, "--width -4: expected a multiple of 4, "),
    ],
)
def test_options_that_do_not_apply(tmp_path: Path, option: dict[str, Any], words: str) -> None:
    path = Written(tmp_path, UNETS["transformer-head-channels"]).save()
    with pytest.raises(UsageError, match=words):
        read_network(ExportOptions(path, **option))


def test_a_graph_is_quantized_as_it_is(tmp_path: Path) -> None:
    for option in ({"prompts_file": Path("x.txt")}, {"height": 64}, {"width": 64}):
        with pytest.raises(UsageError, match="a bare graph is quantized as it is"):
            read_network(ExportOptions(tmp_path / "unet.onnx", calib_data=tmp_path / "x.npz", **option))


def test_prompts_files_that_cannot_be_read(tmp_path: Path) -> None:
    TWINS["sd15"]().save_pretrained(tmp_path / "sd15")
    for content, words in ((b"\n \n", "holds no prompt"), (b"caf\xe9", "not UTF-8 at byte 3"), (None, "no such file")):
        path = tmp_path / "prompts.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PromptError, match=words):
            read_network(ExportOptions(tmp_path / "sd15", prompts_file=path))


def test_a_bundle_survives_a_broken_encoder(tmp_path: Path) -> None:
    """Nothing is left behind when the encoder's weights turn out not to fit."""
    TWINS["sd15"]().save_pretrained(tmp_path / "sd15")
    config = tmp_path / "sd15/text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"text_encoder: not the network that .*, 16 tensors missing"):
        export(ExportOptions(tmp_path / "sd15", onnx_dir=tmp_path / "export"), Silent(), command="qncd-export")
    assert not list((tmp_path / "export").glob("*"))

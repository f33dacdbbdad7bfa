"""Bundles inside diffusers' pipelines: the latents of our own loop, corrections included, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="diffusers' pipelines are torch's")
diffusers = pytest.importorskip("diffusers", reason="the pipelines are diffusers'")
onnx = pytest.importorskip("onnx", reason="the tests' networks are written with onnx")
pytest.importorskip("onnxruntime", reason="they run on ONNX Runtime")

import text_bundle  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LDMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from text_bundle import LATENT, POOLED, SIZES, write_text_bundle  # noqa: E402

from qncd_deploy import Bundle, QncdScheduler, QncdUNet  # noqa: E402
from qncd_deploy.bundle import Manifest, ModelFacts, write_manifest  # noqa: E402
from qncd_deploy.correct.record import CorrectionTable, StepFix, save_tables  # noqa: E402
from qncd_deploy.drop_in import scheduler as drop_in_scheduler  # noqa: E402
from qncd_deploy.engines.base import default_backend, make_engine_id  # noqa: E402
from qncd_deploy.errors import EngineError, ScheduleError, UsageError  # noqa: E402
from qncd_deploy.runtime import AS_EXPORTED, Sampling  # noqa: E402
from qncd_deploy.sample import PictureNoise  # noqa: E402
from qncd_deploy.schedule import Schedule  # noqa: E402
from qncd_deploy.specs import TensorSpec  # noqa: E402

BACKEND = "onnxruntime"
COUNT, SEED = 3, 5
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "ddim": DDIMScheduler(**BETAS, set_alpha_to_one=False, clip_sample=False),
    "plms": PNDMScheduler(**BETAS, set_alpha_to_one=False, skip_prk_steps=True),
    "dpmpp-2m": DPMSolverMultistepScheduler(**BETAS, timestep_spacing="leading"),
    "euler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
    "euler-a": EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="leading"),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 over a few steps with guidance 7.5, states of order 1


def arrays(call: int) -> dict[str, Any]:
    """What a correction may hold: numbers of its own for every call."""
    rng, c = np.random.default_rng(call), LATENT[0]

    def near(value: float, *shape: int) -> np.ndarray:
        return (value + 0.05 * rng.standard_normal(shape)).astype(np.float32)

    return {
        "affine": {"a": near(1, c), "b": near(0, c)},
        "mix": {"a": near(0, c, c) + np.eye(c, dtype=np.float32), "b": near(0, *LATENT), "thr": 0.5},
        "filter": {"f": near(0, c, 2 * c, 3, 3)},
        "input": {"x_add": near(0, c) if call else 0.0, "b": near(0, c)},
        "variance": {"a": near(1, c), "var": 0.01},
        "stepbaq": {"t_model": 10.0 * call + 1, "x_mul": 1.01, "x_sub": near(0, c)},
        "gain": {"gain": 1.02},
    }


def fitted(
    bundle: Bundle, kind: str, folder: Path, sampling: Sampling = AS_EXPORTED, engine_id: str = f"{BACKEND}-f32"
) -> Path:
    """A correction table made up for this way to sample, as `qncd fit` writes it."""
    key = bundle.key(sampling, engine_id)
    fixes = tuple(StepFix(**arrays(call)[kind]) for call in range(len(key.timesteps)))
    path = folder / "corrections.npz"
    save_tables(path, [CorrectionTable(kind, key, fixes)], auto={key.id: kind})
    return path


def vae(levels: int = 4, latents: int = 4) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(**blocks, block_out_channels=(32,) * levels, latent_channels=latents).eval()


def text_to_picture(bundle: Bundle, unet: Any, scheduler: Any, *, steps: int, eta: float = 0.0) -> np.ndarray:
    """The latents that StableDiffusionPipeline makes of the bundle's own prompts, from our loop's first noise."""
    pipe = StableDiffusionPipeline(
        *(vae(), None, None, unet, SCHEDULERS["ddim"], None, None), requires_safety_checker=False
    )
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    rows = {name: torch.from_numpy(table) for name, table in bundle.embedding.items()}
    told = rows["encoder_hidden_states"]
    return pipe(
        prompt_embeds=told[:COUNT],
        negative_prompt_embeds=told[-1:].repeat(COUNT, 1, 1),
        height=bundle.manifest.model.image_shape[1],
        width=bundle.manifest.model.image_shape[2],
        latents=torch.from_numpy(PictureNoise(SEED, range(COUNT), bundle.manifest.model.latent_shape).initial()),
        num_inference_steps=steps,
        guidance_scale=bundle.guidance(),
        eta=eta,
        output_type="latent",
    ).images.numpy()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_text_bundle(tmp_path_factory.mktemp("drop_in") / "words"))


@pytest.fixture
def our_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler draws what our loop draws."""
    noise = PictureNoise(SEED, range(COUNT), LATENT)
    monkeypatch.setattr(drop_in_scheduler, "randn_tensor", lambda *_, **__: torch.from_numpy(noise.step()))


@pytest.mark.parametrize("name", ["ddim", "plms", "dpmpp-2m"])
def test_the_network_alone_under_diffusers_own_schedulers(words: Bundle, name: str) -> None:
    with words.sampler(BACKEND, scheduler=name, n_steps=6, correction="off") as sampler:
        expected = sampler.sample(COUNT, seed=SEED).latents
    unet = QncdUNet.from_bundle(words, BACKEND)
    found = text_to_picture(words, unet, SCHEDULERS[name], steps=6)
    np.testing.assert_allclose(found, expected, **CLOSE)
    unet.close()
    unet.close()


@pytest.mark.parametrize("kind", arrays(0))
def test_a_pipeline_with_both_equals_our_loop(words: Bundle, kind: str, tmp_path: Path, our_noise: None) -> None:
    sampling = Sampling(eta=1.0 if kind == "variance" else 0.0)
    tables = [fitted(words, kind, tmp_path, sampling)]
    with words.sampler(BACKEND, tables=tables, eta=sampling.eta) as sampler:
        assert sampler.table.method == kind
        expected = sampler.sample(COUNT, seed=SEED).latents
    with words.sampler(BACKEND, correction="off", eta=sampling.eta) as sampler:
        assert not np.allclose(sampler.sample(COUNT, seed=SEED).latents, expected, rtol=1e-2, atol=1e-2)
    scheduler = QncdScheduler.from_bundle(words, SCHEDULERS["ddim"], backend=BACKEND, eta=sampling.eta, tables=tables)
    for _ in range(2):  # a second run starts afresh
        unet = QncdUNet.from_bundle(words, BACKEND)
        found = text_to_picture(words, unet, scheduler, steps=4, eta=sampling.eta)
        np.testing.assert_allclose(found, expected, **CLOSE)
        if sampling.eta:
            break  # the noise was drawn


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_with_its_correction(words: Bundle, name: str, tmp_path: Path, our_noise: None) -> None:
    sampling = Sampling(scheduler=name, n_steps=6)
    tables = [fitted(words, "affine", tmp_path, sampling)]
    with words.sampler(BACKEND, tables=tables, scheduler=name, n_steps=6) as sampler:
        expected = sampler.sample(COUNT, seed=SEED).latents
    scheduler = QncdScheduler.from_bundle(words.path, SCHEDULERS[name], backend=BACKEND, tables=tables)
    found = text_to_picture(words, QncdUNet.from_bundle(words.path, BACKEND), scheduler, steps=6)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_two_encoders_pooled_text_and_sizes(tmp_path: Path) -> None:
    bundle = Bundle.open(write_text_bundle(tmp_path / "xl", encoders=2))
    tables = [fitted(bundle, "affine", tmp_path)]
    with bundle.sampler(BACKEND, tables=tables) as sampler:
        expected = sampler.sample(COUNT, seed=SEED).latents
    unet = QncdUNet.from_bundle(bundle, BACKEND)
    assert unet.add_embedding.linear_1.in_features == POOLED + 6 * unet.config.addition_time_embed_dim
    pipe = StableDiffusionXLPipeline(vae(), None, None, None, None, unet, SCHEDULERS["ddim"], add_watermarker=False)
    pipe.scheduler = QncdScheduler.from_bundle(bundle, pipe.scheduler, backend=BACKEND, tables=tables)
    pipe.set_progress_bar_config(disable=True)
    rows = {name: torch.from_numpy(table) for name, table in bundle.embedding.items()}
    found = pipe(
        prompt_embeds=rows["encoder_hidden_states"][:COUNT],
        negative_prompt_embeds=rows["encoder_hidden_states"][-1:].repeat(COUNT, 1, 1),
        pooled_prompt_embeds=rows["text_embeds"][:COUNT],
        negative_pooled_prompt_embeds=rows["text_embeds"][-1:].repeat(COUNT, 1),
        height=SIZES[0],
        width=SIZES[1],
        latents=torch.from_numpy(PictureNoise(SEED, range(COUNT), LATENT).initial()),
        num_inference_steps=4,
        guidance_scale=bundle.guidance(),
        output_type="latent",
    ).images.numpy()
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_the_example_of_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its very lines, on a pipeline with few channels, and a bundle that holds a correction for it."""
    pytest.importorskip("transformers", reason="the pipeline's text encoder is transformers'")
    import text_models

    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from diffusers import .*?)```", readme, re.DOTALL)
    pipe = text_models.sd15()
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("stable-diffusion-v1-5")
    monkeypatch.setattr(text_bundle, "WIDTHS", (pipe.text_encoder.config.hidden_size, 10))
    home = write_text_bundle(tmp_path / "export/stable-diffusion-v1-5-w8a8")
    bundle = Bundle.open(home)
    engine_id = make_engine_id(default_backend())
    fitted(bundle, "affine", home, Sampling(scheduler="plms", n_steps=20), engine_id=engine_id)
    manifest = bundle.manifest
    write_manifest(home, replace(manifest, roles={**manifest.roles, "corrections": "corrections.npz"}))
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["picture"].size == (64, 64)
    assert names["pipe"].scheduler.table.method == "affine"


UNCONDITIONAL = """<ir_version: 9, opset_import: ["" : 18]>
net (float[batch,3,8,8] sample, float[batch] timestep) => (float[batch,3,8,8] out) {
    column = Unsqueeze(timestep, axes)
    late = Mul(column, thousandth)
    kept = Mul(sample, half)
    out = Add(kept, late)
}"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An unconditional network on pictures of 3x8x8: 0.5 x + t / 1000."""
    folder = tmp_path_factory.mktemp("plain") / "plain-w8a8"
    folder.mkdir()
    model = onnx.parser.parse_model(UNCONDITIONAL)
    constants = {"axes": np.array([1, 2, 3]), "thousandth": np.float32(1e-3), "half": np.float32(0.5)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    roles = {"master": "unet.onnx", "ort": "unet-ort.onnx", "float": "unet-float.onnx", "plan": "plan.json"}
    for role in ("master", "ort", "float"):
        onnx.save(model, folder / roles[role])
    (folder / "plan.json").write_text(json.dumps({"schema": 1, "format": "w8a8", "layers": []}))
    specs = (TensorSpec("sample", "float32", ("batch", 3, 8, 8)), TensorSpec("timestep", "float32", ("batch",)))
    schedule = Schedule.scaled_linear(0.00085, 0.012).to_json()
    sampler = {"scheduler": "ddim", "n_steps": 5, "eta": 0.0}
    facts = ModelFacts("plain", specs, (3, 8, 8), None, schedule, sampler, 1.0, None)
    write_manifest(folder, Manifest("plain", "w8a8", facts, roles, {"unet": "ab"}, {}, 0, {}))
    return Bundle.open(folder)


def latents_of(pipe: Any, noise: np.ndarray, monkeypatch: pytest.MonkeyPatch, shift: float = 1.0) -> np.ndarray:
    """What an unconditional pipeline, which decodes always, was about to decode."""
    seen: list[Any] = []
    module = type(pipe).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    step = pipe.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(step(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(pipe.scheduler, "step", watched)
    pipe.set_progress_bar_config(disable=True)
    pipe(batch_size=len(noise), num_inference_steps=5, output_type="np")
    return seen[-1].prev_sample.numpy()


def test_pictures_of_another_size(tmp_path: Path) -> None:
    own = Bundle.open(write_text_bundle(tmp_path / "words", any_size=True))
    wide = own.at_size(width=96)
    tables = [fitted(wide, "affine", tmp_path)]
    with wide.sampler(BACKEND, tables=tables) as sampler:
        expected = sampler.sample(COUNT, seed=SEED).latents
    assert expected.shape == (COUNT, 4, 8, 12)
    scheduler = QncdScheduler.from_bundle(wide, SCHEDULERS["ddim"], backend=BACKEND, tables=tables)
    unet = QncdUNet.from_bundle(own, BACKEND)
    np.testing.assert_allclose(text_to_picture(wide, unet, scheduler, steps=4), expected, **CLOSE)
    with pytest.raises(
        ScheduleError, match=r"the sample is \[4, 8, 8\], correction affine was fitted for \[4, 8, 12\]"
    ):
        text_to_picture(own, unet, scheduler, steps=4)
    with pytest.raises(UsageError, match=r"takes 4 channels and sides that are multiples of 2\. Ask the"):
        unet(torch.zeros(1, 4, 9, 8), 1, torch.from_numpy(own.embedding["encoder_hidden_states"][:1]))


@pytest.mark.parametrize("kind", ["DDIMPipeline", "LDMPipeline"])
@pytest.mark.parametrize("corrected", [False, True])
def test_unconditional_pipelines(
    plain: Bundle, kind: str, corrected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = plain.key(AS_EXPORTED, f"{BACKEND}-f32")
    fixes = tuple(StepFix(b=0.1 * call, x_add=0.05 * call, t_model=700.0 - call) for call in range(5))
    save_tables(tmp_path / "c.npz", [CorrectionTable("ptqd", key, fixes)], auto={key.id: "ptqd"})
    tables = [tmp_path / "c.npz"] if corrected else []
    with plain.sampler(BACKEND, tables=tables) as sampler:
        expected = sampler.sample(COUNT, seed=SEED).latents
    unet = QncdUNet.from_bundle(plain, BACKEND)
    pipe = (
        DDIMPipeline(UNet2DModel(sample_size=8, block_out_channels=(32,) * 4), SCHEDULERS["ddim"])
        if kind == "DDIMPipeline"
        else LDMPipeline(vae(levels=1, latents=3), unet, SCHEDULERS["ddim"])
    )
    pipe.unet = unet  # in place of the network that it came with
    if corrected:
        pipe.scheduler = QncdScheduler.from_bundle(plain, pipe.scheduler, backend=BACKEND, tables=tables)
    noise = PictureNoise(SEED, range(COUNT), (3, 8, 8)).initial()
    np.testing.assert_allclose(latents_of(pipe, noise, monkeypatch), expected, **CLOSE)


def test_float_twin_any_batch_and_dtype(words: Bundle) -> None:
    unet = QncdUNet.from_bundle(words, BACKEND, float_twin=True)
    x, told = torch.randn(5, *LATENT), torch.randn(5, 77, 6)
    whole = unet(x, torch.tensor(7), told).sample
    for rows in (1, 2, 5):
        torch.testing.assert_close(unet(x[:rows], 7.0, told[:rows], return_dict=False)[0], whole[:rows])
    half = unet(x.half(), torch.full((5,), 7), told.half()).sample
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), whole, rtol=5e-3, atol=5e-3)  # inputs of 11 bits
    with pytest.raises(UsageError, match="takes no remainder but f32"):
        QncdUNet.from_bundle(words, BACKEND, float_twin=True, remainder="bf16")


def test_what_the_network_cannot_take_is_named(words: Bundle) -> None:
    unet = QncdUNet.from_bundle(words, BACKEND)
    x, told = torch.zeros(2, *LATENT), torch.zeros(2, 77, 6)
    for given, words_ in (
        (dict(sample=torch.zeros(2, 4, 12, 12), timestep=1, encoder_hidden_states=told), "the sample is 4x12x12"),
        (dict(sample=x, timestep=torch.tensor([1, 2]), encoder_hidden_states=told), "at several timesteps"),
        (dict(sample=x, timestep=1, encoder_hidden_states=told, mid_block_additional_residual=x), "is no input of"),
    ):
        with pytest.raises(UsageError, match=words_):
            unet(**given)
    for told_, words_ in ((None, "needs a condition for its input 'encoder_hidden_states'"), (told[..., :3], "77, 3")):
        with pytest.raises(EngineError, match=words_):
            unet(x, 1, told_)


def scheduler_for(bundle: Bundle, tables: Sequence[Path], scheduler: Any = None, **options: Any) -> QncdScheduler:
    return QncdScheduler.from_bundle(bundle, scheduler, backend=BACKEND, tables=tables, **options)


def test_a_schedule_that_nothing_was_fitted_for_is_refused(words: Bundle, tmp_path: Path) -> None:
    tables = [fitted(words, "affine", tmp_path)]
    scheduler_for(words, tables).set_timesteps(4)
    for options, steps, says in (
        ({}, 9, "--n-steps 9 --eta 0 --guidance-scale 7.5"),
        ({"guidance_scale": 3.0}, 4, "--guidance-scale 3"),
        ({"eta": 1.0}, 4, "--eta 1"),
        ({"correction": "affine"}, 9, "no table for correction 'affine'"),
        ({"scheduler": SCHEDULERS["euler"]}, 4, "--scheduler euler"),
    ):
        with pytest.raises(ScheduleError, match="qncd fit") as caught:
            scheduler_for(words, tables, **options).set_timesteps(steps)
        assert says in str(caught.value) and "\n" not in str(caught.value)
    scheduler_for(words, (), correction="off").set_timesteps(9)
    other = DDIMScheduler(**{**BETAS, "beta_end": 0.02}, set_alpha_to_one=False, clip_sample=False)
    with pytest.raises(ScheduleError, match=r"DDIMScheduler goes from t = 751 .* in step 0, the bundle from t = 751"):
        scheduler_for(words, tables, other).set_timesteps(4)
    with pytest.raises(ScheduleError, match="'UNet2DModel' is none of"):
        scheduler_for(words, tables, UNet2DModel(sample_size=8, block_out_channels=(32,) * 4))


def test_steps_out_of_order_and_corrections_that_call_the_network_are_refused(words: Bundle, tmp_path: Path) -> None:
    scheduler, x = scheduler_for(words, (), correction="off"), torch.zeros(1, *LATENT)
    scheduler.set_timesteps(4)
    with pytest.raises(ScheduleError, match="step 0 is at t = 751, the pipeline is at t = 1"):
        scheduler.step(x, 1, x)
    with pytest.raises(ScheduleError, match="eta 1 was asked for, the correction is of eta 0"):
        scheduler.step(x, 751, x, eta=1.0)
    for t in scheduler.timesteps:
        (x,) = scheduler.step(x, t, x, return_dict=False)
    with pytest.raises(ScheduleError, match="all 4 calls were made"):
        scheduler.step(x, 1, x)
    key = words.key(AS_EXPORTED, f"{BACKEND}-f32")
    for fix, says in ((StepFix(refresh=True), "measures with network calls"), (StepFix(x_add=0.1), "the first state")):
        save_tables(tmp_path / "c.npz", [CorrectionTable("qncd", key, (fix,) * 4)], auto={key.id: "qncd"})
        with pytest.raises(ScheduleError, match=says):
            scheduler_for(words, [tmp_path / "c.npz"]).set_timesteps(4)

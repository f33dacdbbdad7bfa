"""Our float pipeline is diffusers': same prompts and first latents, same last latents, for every shared scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the twins are torch networks")
pytest.importorskip("diffusers", reason="the twins are diffusers pipelines")
pytest.importorskip("transformers", reason="the twins have text encoders of transformers")

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from text_models import BETAS, LATENTS, PICTURE, TWINS  # noqa: E402

from qncd_deploy.models.load import load_source  # noqa: E402
from qncd_deploy.prompts import prompt_table  # noqa: E402
from qncd_deploy.sample import denoise, guided  # noqa: E402
from qncd_deploy.steps import SamplerConfig, initial_scale, make_steps  # noqa: E402

PROMPTS = ["a photo of the cat", "Astronaut riding a RED horse on Mars, 4k!"]
NEGATIVE = "watercolour"
STEPS = 20
LEADING = {**BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
TRAILING = {**BETAS, "timestep_spacing": "trailing"}
V = {"prediction_type": "v_prediction"}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {**LEADING, "clip_sample": False, "set_alpha_to_one": False}),
    "ddim-eta": (DDIMScheduler, {**LEADING, "clip_sample": False, "set_alpha_to_one": False}),
    "ddim-v-zero-snr": (DDIMScheduler, {**TRAILING, **V, "clip_sample": False, "rescale_betas_zero_snr": True}),
    "ddpm": (DDPMScheduler, {**LEADING, "clip_sample": False}),
    "plms": (PNDMScheduler, {**LEADING, "skip_prk_steps": True, "set_alpha_to_one": False}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {**LEADING}),
    "dpmpp-2m-v": (DPMSolverMultistepScheduler, {**LEADING, **V}),
    "euler": (EulerDiscreteScheduler, {**LEADING}),
    "euler-trailing": (EulerDiscreteScheduler, {**TRAILING}),
    "euler-v": (EulerDiscreteScheduler, {**LEADING, **V}),
    "euler-v-zero-snr": (EulerDiscreteScheduler, {**TRAILING, **V, "rescale_betas_zero_snr": True}),
    "euler-a": (EulerAncestralDiscreteScheduler, {**LEADING}),
    "euler-a-trailing": (EulerAncestralDiscreteScheduler, {**TRAILING}),
}


class TorchNoise:
    """The noise that diffusers' schedulers draw from a generator of this seed, call after call."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self.generator, self.shape = torch.Generator().manual_seed(seed), shape

    def step(self) -> np.ndarray:
        return torch.randn(self.shape, generator=self.generator).numpy()

    def probe(self) -> np.ndarray:
        raise AssertionError("nothing is corrected")


def ours(folder: Path, latents: np.ndarray, *, scale: float, steps: int, eta: float, negative: str) -> np.ndarray:
    source = load_source(folder)
    towers = [(encoder.tokenizer, encoder.encode) for encoder in source.text.encoders]
    rows = prompt_table(PROMPTS, negative, towers, source.text.facts)

    def network(x: np.ndarray, t: float, cond: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            given = (torch.from_numpy(np.asarray(cond[name])) for name in rows)
            return source.unet(torch.from_numpy(x), torch.full((len(x),), float(t)), *given).sample.numpy()

    given, null = ({name: table[part] for name, table in rows.items()} for part in (slice(0, -1), slice(-1, None)))
    config = SamplerConfig(source.scheduler, steps, eta)
    states = denoise(
        guided(network, given, null, scale),
        np.float32(initial_scale(source.schedule, config)) * latents,
        make_steps(source.schedule, config),
        noise=TorchNoise(1, latents.shape),
        prediction=source.schedule.prediction,
    )
    *_, last = states
    return last.x


def both(
    name: str, folder: Path, *, scheduler: Any = None, scale: float = 7.5, steps: int = STEPS, eta: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Last latents, (ours, diffusers')."""
    pipe = TWINS[name]()
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.save_pretrained(folder)
    latents = np.random.default_rng(0).standard_normal((2, 4, LATENTS, LATENTS)).astype(np.float32)
    guidance = {"negative_prompt": [NEGATIVE] * 2} if scale != 1 else {}
    theirs = pipe(
        PROMPTS,
        **guidance,
        height=PICTURE,
        width=PICTURE,
        num_inference_steps=steps,
        guidance_scale=scale,
        eta=eta,
        generator=torch.Generator().manual_seed(1),
        latents=torch.from_numpy(latents.copy()),
        output_type="latent",
    ).images
    return ours(folder, latents, scale=scale, steps=steps, eta=eta, negative=NEGATIVE), theirs.numpy()


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """To 1e-4 of the latents' size: float32 sums in another order, through 20 guided steps of a network that amplifies
    what it is given, as random weights do."""
    return float(np.abs(found - expected).max() / np.abs(expected).max()) < 1e-4


@pytest.mark.parametrize("kind", list(SCHEDULERS))
def test_every_scheduler(kind: str, tmp_path: Path) -> None:
    scheduler, config = SCHEDULERS[kind]
    name = "sd21" if config.get("prediction_type") else "sd15"
    found, expected = both(name, tmp_path, scheduler=scheduler(**config), eta=0.6 if kind == "ddim-eta" else 0.0)
    assert same(found, expected), np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("name", "scale", "steps"), [("sd21", 7.5, STEPS), ("sdxl", 5.0, STEPS), ("turbo", 1.0, 4)])
def test_the_folders_own_scheduler(name: str, scale: float, steps: int, tmp_path: Path) -> None:
    found, expected = both(name, tmp_path, scale=scale, steps=steps)
    assert same(found, expected), np.abs(found - expected).max() / np.abs(expected).max()

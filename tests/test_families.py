"""Small twins of the papers' unconditional networks through the whole chain: CIFAR-10 DDPM, LSUN LDM-4 and LDM-8.

Each twin has its family's kinds of blocks and its published sampler. The float twin's pictures are compared with the
released sampling loops written again around the networks of ldm_reference and ddpm_reference; these know neither
diffusers nor ONNX nor our tables of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
for library in ("diffusers", "onnx_ir", "onnxscript", "openvino"):
    pytest.importorskip(library, reason=f"exporting and sampling need {library}")

from ddpm_reference import DDPM  # noqa: E402
from ldm_checkpoint import BASE, DDCONFIG, STAGES, Written  # noqa: E402
from ldm_reference import randomize  # noqa: E402

from qncd_deploy import Pictures, Sampler  # noqa: E402
from qncd_deploy.pipeline.export import export  # noqa: E402
from qncd_deploy.pipeline.fit import FitOptions, fit_into  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402
from qncd_deploy.pipeline.progress import Silent  # noqa: E402
from qncd_deploy.sample import PictureNoise  # noqa: E402

pytestmark = pytest.mark.slow

PICTURES = 3
BEDROOMS = {**BASE, "channel_mult": [1, 2, 3], "attention_resolutions": [4, 2], "num_head_channels": 32}
CHURCHES = {
    **{**BASE, "in_channels": 4, "out_channels": 4, "channel_mult": [1, 2, 2], "attention_resolutions": [1, 2, 4]},
    **{"num_heads": 8, "use_scale_shift_norm": True, "resblock_updown": True},
}
CIFAR = {"ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (16,), "resolution": 32}


@dataclass(frozen=True)
class Twin:
    """betas: (1000,);  first: the timestep of the last call;  last_abar: of the last target;  blocks: residual ones;
    decode: to pictures.
    """

    checkpoint: Path
    network: Any
    shape: tuple[int, int, int]
    betas: np.ndarray
    first: int
    last_abar: float
    n_steps: int
    eta: float
    blocks: int
    decode: Callable[[Any], Any] = lambda latents: latents


def bedrooms(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Twin:
    """LDM-4: additive blocks, a VQ first stage; 200 steps, eta 1."""
    written = Written(folder, BEDROOMS, "VQModelInterface", timesteps=1000)
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    decode = lambda z: written.stage.decode(z, 0.5)  # noqa: E731
    return Twin(written.save(), written.unet, (3, 8, 8), betas, 1, 1 - betas[0], 200, 1.0, 11, decode)


def churches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Twin:
    """LDM-8: scale-shift blocks that resample, a KL first stage; 500 steps, eta 0."""
    stage = {"embed_dim": 4, "ddconfig": {**DDCONFIG, "z_channels": 4}}
    monkeypatch.setitem(STAGES, "AutoencoderKL", stage)
    written = Written(folder, CHURCHES, timesteps=1000, linear_end=0.0155, channels=4)
    betas = np.linspace(0.0015**0.5, 0.0155**0.5, 1000) ** 2
    decode = lambda z: written.stage.decode(z, 0.5)  # noqa: E731
    return Twin(written.save(), written.unet, (4, 8, 8), betas, 1, 1 - betas[0], 500, 0.0, 15, decode)


def cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Twin:
    """DDPM in pixels; 100 steps, eta 0."""
    network = randomize(DDPM(**CIFAR))
    torch.save(network.state_dict(), folder / "model.ckpt")
    return Twin(folder / "model.ckpt", network, (3, 32, 32), np.linspace(1e-4, 0.02, 1000), 0, 1.0, 100, 0.0, 11)


def released_loop(twin: Twin, seed: int) -> np.ndarray:
    """p_sample_ddim of CompVis' ldm/models/diffusion/ddim.py, and generalized_steps of ermongroup/ddim, in float64."""
    abar = np.cumprod(1 - twin.betas)
    times = np.arange(0, 1000, 1000 // twin.n_steps) + twin.first
    targets = [twin.last_abar, *abar[times[:-1]]]
    noise = PictureNoise(seed, range(PICTURES), twin.shape)
    x = noise.initial().astype(np.float64)
    for t, target in reversed(list(zip(times, targets, strict=True))):
        with torch.no_grad():
            eps = twin.network(torch.from_numpy(x.astype(np.float32)), torch.full((PICTURES,), float(t)))
        x0 = (x - np.sqrt(1 - abar[t]) * eps.numpy()) / np.sqrt(abar[t])
        sigma = twin.eta * np.sqrt((1 - target) / (1 - abar[t]) * (1 - abar[t] / target))
        x = np.sqrt(target) * x0 + np.sqrt(1 - target - sigma**2) * eps.numpy()
        if sigma:
            x = x + sigma * noise.step()
    return x


def drawn(sampler: Sampler) -> Pictures:
    with sampler:
        return sampler.sample(PICTURES, seed=3)


def snr_db(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10((expected**2).mean() / ((found - expected) ** 2).mean()))


@pytest.mark.parametrize("make", [bedrooms, churches, cifar])
def test_family_through_the_whole_chain(
    make: Callable[..., Twin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = make(tmp_path, monkeypatch)
    options = ExportOptions(
        twin.checkpoint,
        name="twin",
        calib_dir=tmp_path / "calib",
        onnx_dir=tmp_path / "export",
        n_steps=twin.n_steps,
        eta=twin.eta,
        calib_size=2,
        correction="off",
        eval_size=1,
        gate=False,  # the blocks' inputs are random: whether smoothing pays is no question, whether it is exact is one
    )
    bundle = export(options, Silent(), command="").bundle
    smoothing = bundle.manifest.quality["smoothing"]
    assert len(smoothing["blocks"]) == twin.blocks and smoothing["folded"] >= twin.blocks
    assert bundle.sampler_config().n_steps == twin.n_steps and bundle.sampler_config().eta == twin.eta

    expected = released_loop(twin, seed=3)
    found = drawn(bundle.sampler("openvino", float_twin=True))
    # 1e-6 of every call's output, carried along by so many calls: less than 1e-3 of the latents
    np.testing.assert_allclose(found.latents, expected, atol=1e-3 * np.abs(expected).max())
    picture = twin.decode(torch.from_numpy(found.latents)).numpy()
    rounded = np.clip((picture.transpose(0, 2, 3, 1) + 1) * 127.5, 0, 255)
    assert np.abs(found.images - rounded).max() <= 0.5 + 1e-2  # rounded to nearest

    fit_options = FitOptions("openvino", methods=("ptqd",), size=4)
    tables, _ = fit_into(tmp_path / "engines", bundle, fit_options, lambda done, total: None)
    plain = drawn(bundle.sampler("openvino", correction="off"))
    corrected = drawn(bundle.sampler("openvino", correction="ptqd", tables=[tables]))
    assert not np.array_equal(plain.latents, corrected.latents)
    assert snr_db(plain.latents, expected) > 20 and snr_db(corrected.latents, expected) > 20

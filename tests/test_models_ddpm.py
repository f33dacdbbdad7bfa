"""DDPM checkpoints: the same network as an independent one, read with and without its YAML, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reading checkpoints needs torch")
pytest.importorskip("diffusers", reason="the networks are diffusers' modules")

import yaml  # noqa: E402
from ddpm_reference import DDPM  # noqa: E402
from ldm_reference import randomize  # noqa: E402

from qncd_deploy.errors import CheckpointError, UsageError  # noqa: E402
from qncd_deploy.models.ddpm import DDPMParams, build_unet, unet_sources  # noqa: E402
from qncd_deploy.models.load import load_source  # noqa: E402
from qncd_deploy.steps import SamplerConfig, make_steps  # noqa: E402

SMALL: dict[str, Any] = {"ch": 32, "ch_mult": (1, 2, 3), "num_res_blocks": 1, "attn_resolutions": (16,)}
RELATIVE = 1e-5  # float32 sums of a few thousand terms in another order


def written(folder: Path, **changes: Any) -> tuple[Path, Any]:
    """A checkpoint on disk and the network whose weights it holds."""
    network = randomize(DDPM(**{**SMALL, "resolution": 32, **changes}))
    path = folder / "ema_diffusion_cifar10_model-790000.ckpt"
    torch.save(network.state_dict(), path)
    return path, network


def config(**changes: Any) -> dict[str, dict[str, Any]]:
    """What ermongroup/ddim's configs/cifar10.yml says, for the small network."""
    whole = {
        "data": {"dataset": "CIFAR10", "image_size": 32, "channels": 3, "logit_transform": False, "rescaled": True},
        "model": {
            **{"type": "simple", "in_channels": 3, "out_ch": 3, "num_res_blocks": 1, "attn_resolutions": [16]},
            **{"ch": 32, "ch_mult": [1, 2, 3], "dropout": 0.1, "var_type": "fixedlarge", "ema": True},
        },
        "diffusion": {
            **{"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
        },
        "optim": {"lr": 0.0002},
    }
    for place, value in changes.items():
        section, _, entry = place.partition("__")
        whole[section][entry] = value
    return whole


def relative_error(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def outputs(source: Any, network: Any, size: int = 32) -> tuple[Any, Any]:
    x, t = torch.randn(2, 3, size, size), torch.tensor([7.0, 801.0])
    return source.unet(x, t).sample, network(x, t)


def refusal(path: Path, error: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load_source(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("parallel", [False, True])
def test_without_a_config_the_tensors_say_all(tmp_path: Path, parallel: bool) -> None:
    path, network = written(tmp_path)
    if parallel:
        torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, path)
    source = load_source(path)
    assert relative_error(*outputs(source, network)) < RELATIVE
    assert (source.family, source.scheduler, source.decoder, source.condition) == ("ddpm", "ddim", None, None)
    assert source.latent_shape == source.image_shape == (3, 32, 32)
    assert source.files == {"checkpoint": path} and "32x32" in source.notes[0]
    # inputs of ordinary size do not notice it
    assert {part.eps for part in source.unet.modules() if isinstance(part, torch.nn.GroupNorm)} == {1e-6}


@pytest.mark.parametrize("attention, size", [((16,), 16), ((16,), 64)])
def test_the_size_follows_from_where_attention_lies(tmp_path: Path, attention: tuple[int, ...], size: int) -> None:
    path, network = written(tmp_path, attn_resolutions=attention, resolution=size)
    source = load_source(path)
    assert source.latent_shape == (3, size, size)
    assert relative_error(*outputs(source, network, size)) < RELATIVE


def test_a_config_says_what_tensors_cannot(tmp_path: Path) -> None:
    path, network = written(tmp_path, attn_resolutions=(16, 8), resolution=16)
    assert "attention at 2 resolutions" in refusal(path)
    given = config(data__image_size=16, model__attn_resolutions=[16, 8], diffusion__num_diffusion_timesteps=100)
    path.with_suffix(".yml").write_text(yaml.safe_dump(given))
    source = load_source(path)
    assert source.latent_shape == (3, 16, 16) and source.notes == ()
    assert relative_error(*outputs(source, network, 16)) < RELATIVE
    assert source.schedule.alphas_cumprod.size == 100 and set(source.files) == {"checkpoint", "config"}
    moved = path.with_suffix(".yml").rename(tmp_path / "cifar10.yml")
    assert load_source(path, config=moved).latent_shape == (3, 16, 16)


def test_schedule_is_that_of_the_released_sampler(tmp_path: Path) -> None:
    """ermongroup/ddim: seq = range(0, 1000, skip), abar of t = -1 is 1, x_0 is clipped by ancestral sampling alone."""
    path, _ = written(tmp_path)
    source = load_source(path)
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    np.testing.assert_allclose(source.schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)
    steps = make_steps(source.schedule, SamplerConfig("ddim", 100))
    assert [step.t for step in steps] == list(range(990, -1, -10))
    assert steps[-1].abar_next == 1.0 and steps[0].clip is None
    ancestral = load_source(path, scheduler="ddpm").schedule
    assert (ancestral.clip_sample, ancestral.variance) == (1.0, "fixed_large")


def test_averaged_weights_of_a_training_run_are_taken(tmp_path: Path) -> None:
    """ermongroup/ddim saves [model, optimizer, epoch, step, ema], the model's names behind DataParallel's prefix."""
    path, network = written(tmp_path)
    averaged = randomize(DDPM(**SMALL, resolution=32), 5)
    model = {f"module.{name}": value for name, value in network.state_dict().items()}
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    torch.save([model, optimizer, 3, 4711, averaged.state_dict()], path)
    assert relative_error(*outputs(load_source(path), averaged)) < RELATIVE
    torch.save([model, optimizer, 3, 4711], path)
    assert relative_error(*outputs(load_source(path), network)) < RELATIVE
    torch.save({"state_dict": averaged.state_dict()}, path)
    assert relative_error(*outputs(load_source(path), averaged)) < RELATIVE


@pytest.mark.parametrize(
    "changes, size, millions",
    [
        ({"ch": 128, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 2}, 32, "35.7"),
        ({"ch": 128, "ch_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2}, 256, "114"),
    ],
    ids=["cifar10", "lsun"],
)
def test_published_networks_are_covered_to_the_last_tensor(changes: dict[str, Any], size: int, millions: str) -> None:
    """Ho et al., appendix B: 35.7 million parameters for CIFAR-10, 114 million for LSUN and CelebA-HQ."""
    params = DDPMParams(
        image_size=size,
        in_channels=3,
        channels=tuple(changes["ch"] * mult for mult in changes["ch_mult"]),
        num_res_blocks=2,
        attention=tuple(size // 2**level == 16 for level in range(len(changes["ch_mult"]))),
        variance="fixed_large",
    )
    with torch.device("meta"):
        original = DDPM(**changes, attn_resolutions=(16,), resolution=size)
    unet = build_unet(params)
    wanted = {source.key: source.shape for source in unet_sources(unet).values()}
    assert wanted == {name: tuple(value.shape) for name, value in original.state_dict().items()}
    assert f"{sum(p.numel() for p in unet.parameters()) / 1e6:.3g}" == millions


def test_the_published_cifar_network_equals_the_original(tmp_path: Path) -> None:
    path, network = written(tmp_path, ch=128, ch_mult=(1, 2, 2, 2), num_res_blocks=2)
    source = load_source(path)
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([481.0])
    assert relative_error(source.unet(x, t).sample, network(x, t)) < RELATIVE
    assert source.schedule.variance == "fixed_large"


@pytest.mark.parametrize(
    "place, value, words",
    [
        ("model__ch", 64, "Check model.ch"),
        ("model__ch_mult", [1, 2], "Check model.ch and model.ch_mult"),
        ("model__num_res_blocks", 2, "Check model.ch"),
        ("model__ch_mult", [1, 2, 4], "Check model.ch and model.ch_mult"),
        ("model__attn_resolutions", [8], "Check model.attn_resolutions and data.image_size"),
        ("model__in_channels", 1, "model.out_ch is 3, in_channels 1"),
        ("model__resamp_with_conv", False, "model.resamp_with_conv is False, only True is supported"),
        ("model__type", "bayesian", "model.type is 'bayesian', only 'simple' is supported"),
        ("model__var_type", "learned", "model.var_type is 'learned', expected one of fixedlarge, fixedsmall"),
        ("model__conditional", True, "model.conditional is not supported"),
        ("data__rescaled", False, "data.rescaled is False, only True is supported"),
        ("data__image_size", 30, "data.image_size is 30, which 2 halvings do not divide"),
        ("diffusion__beta_schedule", "jsd", "diffusion.beta_schedule is 'jsd', expected one of linear, quad"),
        ("diffusion__beta_end", 2.0, "diffusion.beta_start is 0.0001, beta_end 2"),
        ("diffusion__beta_start", None, "diffusion.beta_start is missing"),
    ],
)
def test_wrong_config_is_named(tmp_path: Path, place: str, value: Any, words: str) -> None:
    path, _ = written(tmp_path)
    (tmp_path / "cifar10.yml").write_text(yaml.safe_dump(config(**{place: value})))
    assert words in refusal(path, config=tmp_path / "cifar10.yml")


def test_damaged_or_foreign_tensors_are_named(tmp_path: Path) -> None:
    path, network = written(tmp_path)
    whole = network.state_dict()
    for change, words in (
        ({"conv_out.bias": None}, "1 tensors missing (first: 'conv_out.bias'). Check that the file is whole"),
        ({"extra": torch.ones(1)}, "1 tensors without a place (first: 'extra')"),
        ({"down.1.block.0.conv2.weight": None}, "misses 'down.1.block.0.conv2.weight'"),
        ({"down.0.block.0.conv2.weight": torch.ones(40, 40, 3, 3)}, "channels, expected multiples of 32"),
        ({"conv_out.bias": torch.full((3,), torch.nan)}, "'conv_out.bias' holds NaN"),
    ):
        state = {name: value for name, value in {**whole, **change}.items() if value is not None}
        torch.save(state, path)
        assert words in refusal(path)
    torch.save(whole, path)
    assert "--null-class 3: " in refusal(path, UsageError, null_class=3)

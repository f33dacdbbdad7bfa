"""CompVis latent diffusion and Stable Diffusion: one checkpoint file and its YAML -> SourceModel.

    model.diffusion_model.*      the UNet; model_ema.* are its averaged weights, names without dots, preferred
    first_stage_model.*          AutoencoderKL or VQModelInterface, of which the decoder is used
    cond_stage_model.embedding   ClassEmbedder: one token per class, the last class being the null class
    cond_stage_model.transformer, .model, conditioner.*     text encoders of Stable Diffusion, see ldm_text
    betas, alphas_cumprod, scale_factor, ...   buffers; the schedule is made from the config and checked against them

Source: Rombach et al., arXiv:2112.10752, ldm/models/diffusion/ddpm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qncd_deploy.checkpoint import Checkpoint, finite_float32, load_weights
from qncd_deploy.errors import CheckpointError, UsageError
from qncd_deploy.models.first_stage import (
    UNUSED_PREFIXES,
    LatentDecoder,
    build_decoder,
    decoder_entry,
    decoder_sources,
    read_first_stage_params,
)
from qncd_deploy.models.ldm_config import Section, read_config
from qncd_deploy.models.ldm_layout import describe, engine_params
from qncd_deploy.models.ldm_text import TEXT_STAGES, read_text
from qncd_deploy.models.ldm_unet import build_unet, read_unet_params, unet_entry, unet_sources
from qncd_deploy.models.source import CONTROLNET, LORA, Condition, SourceModel
from qncd_deploy.schedule import Prediction, Schedule, betas_of

_UNET, _EMA, _FIRST_STAGE, _COND = "model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model."
_CONDITIONER = "conditioner."
_EMA_COUNTERS = ("decay", "num_updates")
_BUFFERS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("lvlb_weights", "logvar", "scale_factor", "cond_ids"),
    "denoiser.sigmas",  # of SDXL, which takes the same betas
)
_PREDICTIONS: dict[str, Prediction] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}  # theirs: ours
_OTHER_TEXT_STAGES = ("BERTEmbedder", "FrozenCLIPTextEmbedder", "FrozenT5Embedder", "FrozenCLIPT5Encoder")
_SDXL_ENGINE = "DiffusionEngine"
"""What generative-models' YAML of SDXL instantiates: of its entries, which have other names, those are taken that the
tensors do not tell."""
_UNCONDITIONAL = "__is_unconditional__"


def read(checkpoint: Checkpoint, config: Path | None, *, null_class: int | None, scheduler: str | None) -> SourceModel:
    """Read a CompVis checkpoint; see `load_source` for the arguments and the errors."""
    path = checkpoint.path
    _check_family(checkpoint)
    model, files, notes = _model_section(checkpoint, config)
    if model.target() != "LatentDiffusion":
        model.fail("target", f"is {model.target()}, only LatentDiffusion is supported.")
    params = model.section("params")
    described = "its own layout" if model.file == path else str(model.file)

    unet_config = params.section("unet_config")
    if unet_config.target() != "UNetModel":
        unet_config.fail("target", f"is {unet_config.target()}, only UNetModel is supported.")
    unet_section = unet_config.section("params")
    unet_params = read_unet_params(unet_section)
    size = params.get("image_size", unet_section.get("image_size", 0))
    if size < 1:
        params.fail("image_size", f"is {size}, expected the side of the latents.")
    latent_shape = (unet_params.in_channels, size, size)
    unet = build_unet(unet_params, size)
    sources = unet_sources(unet, unet_params)
    weights, prefix = _unet_tensors(checkpoint, [s.key for s in sources.values()], ema=params.get("use_ema", True))
    load_weights(
        unet,
        sources,
        weights,
        where=str(path),
        prefix=prefix,
        asked_by=described,
        blame=lambda key, dim: f"{unet_section.place}.{unet_entry(key, dim)}",
    )
    if prefix == _EMA:
        notes.append("The averaged (EMA) weights are used.")

    decoder, image_shape = _decoder(checkpoint, params, latent_shape, described, notes)
    text, condition = None, None
    if _is_text(params):
        if null_class is not None:
            raise UsageError(f"--null-class {null_class}: {path} takes prompts, not classes. Leave it out.")
        text, words = read_text(checkpoint, params.section("cond_stage_config"), unet.config, image_shape)
        files |= words
    else:
        condition = _condition(checkpoint, params, unet_section, null_class)
    return SourceModel(
        family="compvis-ldm",
        unet=unet,
        latent_shape=latent_shape,
        image_shape=image_shape,
        schedule=_schedule(checkpoint, params),
        scheduler=scheduler or "ddim",
        condition=condition,
        decoder=decoder,
        files={"checkpoint": path, **files},
        text=text,
        notes=tuple(notes),
    )


def _model_section(checkpoint: Checkpoint, config: Path | None) -> tuple[Section, dict[str, Path], list[str]]:
    """(the `model` section, the YAML that was read if any, notes): of the YAML that was named or lies beside the file,
    or, for Stable Diffusion, of the layout of the tensors, with what a YAML of another form adds.
    """
    files: dict[str, Path] = {}
    said: dict[str, Any] = {}
    path = config or next((place for place in _places_beside(checkpoint.path) if place.is_file()), None)
    if path is not None:
        model = read_config(path).section("model")
        files = {"config": path}
        if model.target() != _SDXL_ENGINE:
            return model, files, []
        said = engine_params(model)
    found = describe(checkpoint, said)
    if found is None:
        beside = " and ".join(map(str, _places_beside(checkpoint.path)))
        attends = any(".attn2." in name for name in checkpoint.tensors)
        if attends and not checkpoint.below(_COND):
            raise CheckpointError(
                f"{checkpoint.path}: holds no text encoder (no '{_COND}*' and no '{_CONDITIONER}*'), and its UNet "
                "attends to one. Give the file of the whole model."
            )
        raise CheckpointError(f"{checkpoint.path}: no config, looked for {beside}. Give it with --config FILE.")
    section, notes = found
    return section, files, list(notes)


def _places_beside(path: Path) -> tuple[Path, Path]:
    return path.with_name("config.yaml"), path.with_suffix(".yaml")


def _check_family(checkpoint: Checkpoint) -> None:
    """Every tensor must belong to a part that is known: foreign weights would otherwise be dropped without a word."""
    known = (_UNET, _EMA, _FIRST_STAGE, _COND, _CONDITIONER)
    names = list(checkpoint.tensors)
    for name in names:
        if "lora" in name:
            raise CheckpointError(f"{checkpoint.path}: holds '{name}'; {LORA}")
        if name.startswith(("control_model.", "controlnet_")):
            raise CheckpointError(f"{checkpoint.path}: holds '{name}'; {CONTROLNET}")
    foreign = [key for key in checkpoint.tensors if not key.startswith(known) and key not in _BUFFERS]
    has_unet = any(key.startswith((_UNET, _EMA)) for key in checkpoint.tensors)
    if not has_unet or foreign:
        first = ", ".join(f"'{key}'" for key in (foreign or names)[:3])
        found = f"tensors of another kind ({first})" if foreign else f"no '{_UNET}*', but {first}"
        raise CheckpointError(
            f"{checkpoint.path}: holds {found}; not a CompVis latent-diffusion checkpoint. "
            "Give the model itself, or the folder of a diffusers model."
        )


def _is_text(params: Section) -> bool:
    """Whether prompts are the condition. Raises CheckpointError for an encoder that is not supported."""
    stage = params.entries.get("cond_stage_config")
    if not isinstance(stage, Mapping):
        return False
    kind = str(stage.get("target")).rpartition(".")[2]
    if kind in _OTHER_TEXT_STAGES:
        params.fail("cond_stage_config.target", f"is {kind}, only {', '.join(TEXT_STAGES)} read prompts here.")
    return kind in TEXT_STAGES


def _unet_tensors(checkpoint: Checkpoint, wanted: list[str], *, ema: bool) -> tuple[Mapping[str, Tensor], str]:
    """The UNet's tensors by their dotted names, and the prefix they had; the averaged ones if there are any."""
    averaged = {key: value for key, value in checkpoint.below(_EMA).items() if key not in _EMA_COUNTERS}
    if not ema or not averaged:
        return checkpoint.below(_UNET), _UNET
    # LitEma registers buffers, whose names may hold no dots: "diffusion_model.out.0.bias" -> "diffusion_modelout0bias".
    dotted = {("diffusion_model." + key).replace(".", ""): key for key in wanted}
    return {dotted.get(key, key): value for key, value in averaged.items()}, _EMA


def _condition(checkpoint: Checkpoint, params: Section, unet: Section, null_class: int | None) -> Condition | None:
    stage = params.entries.get("cond_stage_config")
    tensors = checkpoint.below(_COND)
    where, num_classes = str(checkpoint.path), unet.get("num_classes", 0)
    if stage in (None, _UNCONDITIONAL) or num_classes:
        if tensors:
            params.fail("cond_stage_config", f"is {stage!r}, yet {where} holds '{_COND}{next(iter(tensors))}'.")
        if unet.get("use_spatial_transformer", False):
            params.fail("cond_stage_config", "is missing, and a spatial transformer needs it.")
        if num_classes:
            return Condition("class-labels", num_classes, null_class)
        if null_class is not None:
            raise UsageError(f"--null-class {null_class}: {where} is not class-conditional. Leave it out.")
        return None
    section = params.section("cond_stage_config")
    if section.target() != "ClassEmbedder":
        section.fail("target", f"is {section.target()}, only ClassEmbedder is supported.")
    conditioning = params.get("conditioning_key", "crossattn")
    if conditioning != "crossattn" or not unet.get("use_spatial_transformer", False):
        params.fail("conditioning_key", "must be crossattn for a ClassEmbedder, with use_spatial_transformer: true.")
    embedder = section.section("params")
    expected = (embedder.get("n_classes", 1000), embedder.need("embed_dim", int))
    if expected[1] != unet.need("context_dim", int):
        embedder.fail("embed_dim", f"is {expected[1]}, {unet.name('context_dim')} {unet.need('context_dim', int)}.")
    table = tensors.pop("embedding.weight", None)
    if table is None or tensors:
        problem = "misses" if table is None else f"holds '{_COND}{next(iter(tensors))}' besides"
        raise CheckpointError(f"{where}: {problem} '{_COND}embedding.weight'. Check {section.name('target')}.")
    if tuple(table.shape) != expected:
        key = "n_classes" if table.shape[0] != expected[0] else "embed_dim"
        embedder.fail(key, f"does not fit: '{_COND}embedding.weight' is {tuple(table.shape)}, expected {expected}.")
    tensor = finite_float32(table, where=where, name=f"{_COND}embedding.weight")
    values = tensor.numpy()[:, None, :].copy()  # a view would keep the whole checkpoint mapped
    last = expected[0] - 1 if expected[0] > 1 else None
    return Condition("class-tokens", expected[0], last if null_class is None else null_class, values)


def _decoder(
    checkpoint: Checkpoint, params: Section, latent_shape: tuple[int, int, int], described: str, notes: list[str]
) -> tuple[LatentDecoder | None, tuple[int, int, int]]:
    stage = params.section("first_stage_config")
    kind = stage.target()
    if kind == "IdentityFirstStage":
        return None, latent_shape
    if kind not in ("AutoencoderKL", "VQModelInterface"):
        stage.fail("target", f"is {kind}, only AutoencoderKL, VQModelInterface and IdentityFirstStage are supported.")
    section = stage.section("params")
    net = read_first_stage_params(section, vq=kind == "VQModelInterface")
    channels, size, _ = latent_shape
    if net.embed_dim != channels:
        section.fail("embed_dim", f"is {net.embed_dim}, the UNet's latents have {channels} channels.")
    decoder = build_decoder(net, _scale_factor(checkpoint, params, notes))
    tensors = checkpoint.below(_FIRST_STAGE)
    load_weights(
        decoder,
        decoder_sources(decoder),
        {key: value for key, value in tensors.items() if not key.startswith(UNUSED_PREFIXES)},
        where=str(checkpoint.path),
        prefix=_FIRST_STAGE,
        asked_by=described,
        blame=lambda key, dim: f"{section.place}.{decoder_entry(key, dim)}",
    )
    return decoder, (net.out_channels, size * net.factor, size * net.factor)


def _scale_factor(checkpoint: Checkpoint, params: Section, notes: list[str]) -> float:
    """The buffer of the checkpoint, measured on its training data with scale_by_std, wins over the config."""
    value = params.get("scale_factor", 1.0)
    buffer = checkpoint.tensors.get("scale_factor")
    if buffer is not None:
        value = float(buffer)
    elif params.get("scale_by_std", False):
        notes.append(
            f"scale_by_std is set, yet the checkpoint holds no scale_factor: latents are divided by {value:g}."
        )
    if not (np.isfinite(value) and value > 0):
        raise CheckpointError(f"{checkpoint.path}: scale_factor is {value}, expected a positive number.")
    return value


def _schedule(checkpoint: Checkpoint, params: Section) -> Schedule:
    """CompVis' schedule in float64, checked against the checkpoint's buffers."""
    parameterization = params.get("parameterization", "eps")
    if parameterization not in _PREDICTIONS:
        params.fail("parameterization", f"is {parameterization!r}, expected one of {', '.join(_PREDICTIONS)}.")
    betas = _betas(params)
    for name, values in (("betas", betas), ("alphas_cumprod", np.cumprod(1.0 - betas))):
        buffer = checkpoint.tensors.get(name)
        if buffer is None:
            continue
        stored = finite_float32(buffer, where=str(checkpoint.path), name=name).numpy()
        # A pruned file may hold them in half precision: 2**-11 of the value.
        if stored.shape != values.shape or not np.allclose(stored, values, rtol=1e-3, atol=1e-6):
            params.fail(
                "linear_start, linear_end, timesteps or beta_schedule",
                f"disagree with '{name}' in {checkpoint.path} ({stored.size} steps, last {stored[-1]:.6g}; "
                f"the config gives {values.size}, {values[-1]:.6g}).",
            )
    return Schedule.from_betas(betas, prediction=_PREDICTIONS[parameterization])


def _betas(params: Section) -> np.ndarray:
    """make_beta_schedule of ldm/modules/diffusionmodules/util.py; its "linear" is linear in the square root of beta."""
    kind, steps = params.get("beta_schedule", "linear"), params.get("timesteps", 1000)
    start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
    if steps < 1 or not 0 < start <= end < 1:
        params.fail("linear_start", f"is {start:g}, linear_end {end:g}, timesteps {steps}: not a noise schedule.")
    if kind not in _BETA_SCHEDULES:
        params.fail("beta_schedule", f"is {kind!r}, expected one of {', '.join(_BETA_SCHEDULES)}.")
    if kind == "cosine" and params.get("cosine_s", 8e-3) != 8e-3:
        params.fail("cosine_s", f"is {params.entries['cosine_s']!r}, only 0.008 is supported.")
    return betas_of(_BETA_SCHEDULES[kind], start, end, steps)

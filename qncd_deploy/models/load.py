"""From a path on the command line to a SourceModel: which reader, which config, which name. Imports no torch itself."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from qncd_deploy.errors import CheckpointError, UsageError
from qncd_deploy.models.source import SourceModel
from qncd_deploy.subjects import check_sides, resized, told_size

COMPANIONS = ("features.onnx", "features-reference.npz")
"""Files that travel with a checkpoint: the feature network of the Frechet distance and its reference statistics."""

_GENERIC_STEMS = ("model", "unet")


def artifact_name(path: Path) -> str:
    """The name of what is made from `path`: its folder for `model.*` and `unet.*`, itself for a folder, else its stem.

    `calib_data/fashion-ldm/model.ckpt` -> `fashion-ldm`; `runs/cin256.safetensors` -> `cin256`; for ONNX files too.
    """
    path = Path(os.path.abspath(path))  # not resolve(): a link is named after where it lies, not where it points
    name = path.name if path.is_dir() else path.parent.name if path.stem in _GENERIC_STEMS else path.stem
    return name or path.stem or "model"  # the root of a file system has no name


def load_source(
    path: Path,
    *,
    config: Path | None = None,
    null_class: int | None = None,
    scheduler: str | None = None,
    height: int | None = None,
    width: int | None = None,
) -> SourceModel:
    """Read a CompVis or Stable Diffusion checkpoint, a DDPM checkpoint in pixels, or a diffusers folder.

    Args:   config: the YAML of a checkpoint; by default `config.yaml` beside it, else `<stem>.yaml`. Stable Diffusion
                and DDPM can do without; DDPM also finds `<stem>.yml`.
            null_class: the class of classifier-free guidance, where the config does not say or says otherwise.
            scheduler: the sampler to use, by our name; by default the folder's own, else "ddim".
            height, width: of the pictures; by default those that the model was trained for.
    Raises: CheckpointError if anything is missing, damaged or unsupported; UsageError if an argument does not apply;
            ScheduleError if the scheduler is unknown.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder. Give a checkpoint file or a diffusers folder.")
    if path.is_dir():
        if config is not None:
            raise UsageError(f"--config {config}: {path} is a diffusers folder and brings its own. Leave --config out.")
        from qncd_deploy.models import diffusers_folder

        source = diffusers_folder.read(path, null_class=null_class, scheduler=scheduler)
    else:
        from qncd_deploy.checkpoint import read_checkpoint
        from qncd_deploy.models import compvis, ddpm

        checkpoint = read_checkpoint(path)
        reader = ddpm if ddpm.is_ddpm(checkpoint) else compvis
        source = reader.read(checkpoint, config, null_class=null_class, scheduler=scheduler)
    source = _resized(source, height, width)
    home = path if path.is_dir() else path.parent
    return replace(source, companions={name: home / name for name in COMPANIONS if (home / name).is_file()})


def _resized(source: SourceModel, height: int | None, width: int | None) -> SourceModel:
    """The same network for pictures of another size. Raises UsageError for one that it would have to pad."""
    check_sides(source.image_shape, source.size_multiple, height=height, width=width)
    image_shape, latent_shape = resized(source.image_shape, source.latent_shape, height=height, width=width)
    text = source.text
    if text is not None:
        text = replace(text, facts=told_size(text.facts, image_shape))
    return replace(source, latent_shape=latent_shape, image_shape=image_shape, text=text)

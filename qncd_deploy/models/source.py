"""What every model reader hands on: network, schedule, condition or text, and decoder, free of any file layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from qncd_deploy.bundle import TextFacts
from qncd_deploy.errors import UsageError
from qncd_deploy.schedule import Schedule
from qncd_deploy.specs import SIDES, TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from qncd_deploy.models.text import TextEncoder


SIZES = 6
"""Numbers that SDXL is told of a picture's sizes."""

TAKES_PICTURES = {
    9: "an inpainting network, which is given a mask and a masked picture too",
    8: "InstructPix2Pix, which is given a picture too",
    7: "an upscaler, which is given a small picture too",
    5: "a depth-to-image network, which is given a depth map too",
}
"""Networks of 4 latent channels that attend to text and take more, by their input channels."""

LORA = "a LoRA is a change to a model. Fuse it into its base model and give that."
CONTROLNET = "a ControlNet steers a model and is none. Give the model itself."
REFINER = "the refiner of SDXL starts from a picture. Give the base model."


@dataclass(frozen=True, eq=False)
class Condition:
    """How the network is told a class.

    "class-tokens": row k of `values` (classes, L, D) float32 is fed as `encoder_hidden_states`.
    "class-labels": the int64 label itself is fed as `class_labels`; `values` is None.
    `classes` counts the null class (the one of classifier-free guidance), if there is one.
    """

    kind: Literal["class-tokens", "class-labels"]
    classes: int
    null_class: int | None = None
    values: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.null_class is not None and not 0 <= self.null_class < self.classes:
            raise UsageError(
                f"--null-class {self.null_class}: the network has classes 0 to {self.classes - 1}. Choose one of them."
            )

    @property
    def rows(self) -> Mapping[str, np.ndarray]:
        """What the network is told of every class, (classes, ...) by the name of its input."""
        if self.values is None:
            return {"class_labels": np.arange(self.classes)}
        return {"encoder_hidden_states": self.values}


@dataclass(frozen=True, eq=False)
class Text:
    """How the network is told a prompt: the encoders, in the order in which their tokens are joined, and the rule (see
    prompts.py); without sizes of a picture in `facts`, pooled text is not used.
    """

    encoders: tuple[TextEncoder, ...]
    facts: TextFacts

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The graph inputs that prompts fill."""
        width = sum(encoder.width for encoder in self.encoders)
        tokens = TensorSpec("encoder_hidden_states", "float32", ("batch", self.facts.max_length, width))
        pooled = self.encoders[-1].pooled
        if self.facts.time_ids is None or pooled is None:
            return (tokens,)
        return (
            tokens,
            TensorSpec("text_embeds", "float32", ("batch", pooled)),
            TensorSpec("time_ids", "float32", ("batch", len(self.facts.time_ids))),
        )


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A trained model, ready to calibrate and trace.

    unet: diffusers module, float32, eval; `unet(sample, timestep, ...)` with the inputs of `input_specs`.
    latent_shape: (C, H, W) of the sampled state.   image_shape: (C, H, W) of the picture, values in [-1, 1].
    decoder: (N, *latent_shape) as the sampler leaves it -> (N, *image_shape); None if the state is the picture.
    text: instead of a condition, where prompts are one.   few_steps: distilled to sample in 1 to 4 without guidance.
    companions: files beside the checkpoint that belong in the bundle, by name.   files: what was read, for hashing.
    notes: one line each on choices that were made for the user.
    """

    family: str
    unet: nn.Module
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    schedule: Schedule
    scheduler: str
    condition: Condition | None
    decoder: nn.Module | None
    files: Mapping[str, Path]
    text: Text | None = None
    few_steps: bool = False
    companions: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def any_size(self) -> bool:
        """Whether it draws pictures of other sizes than its own: what is told a prompt is used so."""
        return self.text is not None

    @property
    def size_multiple(self) -> int:
        """What the sides of a picture are multiples of, in pixels: the network halves its latents to whole numbers."""
        factor = self.image_shape[1] // self.latent_shape[1]
        return factor * int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Graph inputs in the order of the network's own arguments; the batch dimension is free, and so are the sides
        of latents of any size.
        """
        channels, *sides = self.latent_shape
        specs = [
            TensorSpec("sample", "float32", ("batch", channels, *(SIDES if self.any_size else sides))),
            TensorSpec("timestep", "float32", ("batch",)),
        ]
        if self.text is not None:
            return (*specs, *self.text.specs)
        rows = {} if self.condition is None else self.condition.rows
        specs += [TensorSpec(name, table.dtype.name, ("batch", *table.shape[1:])) for name, table in rows.items()]
        return tuple(specs)

"""A bundle's network in place of `pipe.unet`: torch tensors in and out, an engine in between.

    pipe = StableDiffusionPipeline.from_pretrained(folder, unet=None)
    pipe.unet = QncdUNet.from_bundle("export/sd15-w8a8")

The graph's inputs have the names of diffusers' arguments, so they are fed by name: sample, timestep,
encoder_hidden_states, class_labels, and of added_cond_kwargs text_embeds and time_ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from qncd_deploy.bundle import ModelFacts
from qncd_deploy.engines.base import BaseEngine, Remainder, default_backend, find_backend
from qncd_deploy.engines.eps_model import EngineModel
from qncd_deploy.engines.stepped import SteppedEngine
from qncd_deploy.errors import UsageError
from qncd_deploy.runtime import Bundle
from qncd_deploy.subjects import latent_multiple, takes_latents

_TIME_ID_WIDTH = 256
"""Of SDXL's embedding of one of its sizes. Its pipelines hold it against the network's own figure, and use it for
nothing else."""


class QncdUNet(nn.Module):
    """Called as diffusers' UNet2DModel and UNet2DConditionModel are; its weights are the engine's, torch holds none.

    A batch may have any number of rows; an engine compiles for each number that it meets. Tensors are brought to the
    host and the result goes back to where the sample was, in its dtype.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, engine: BaseEngine, facts: ModelFacts, *, place: Path) -> None:
        super().__init__()
        self.engine, self.facts, self.place = engine, facts, place
        self.config = _config(facts)
        told = {spec.name: spec.shape for spec in facts.inputs}
        if "text_embeds" in told and "time_ids" in told:
            (_, pooled), (_, sizes) = told["text_embeds"], told["time_ids"]
            self.add_embedding = SimpleNamespace(
                linear_1=SimpleNamespace(in_features=int(pooled) + int(sizes) * _TIME_ID_WIDTH)
            )

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle | Path | str,
        backend: str | None = None,
        float_twin: bool = False,
        *,
        remainder: Remainder | None = None,
        threads: int | None = None,
        blobs: Sequence[Path] = (),
    ) -> QncdUNet:
        """Open a bundle's network; close() closes it.

        backend: None for the first that this machine has.  float_twin: the float network, in float32.
        remainder, threads, blobs: as of Bundle.sampler.  Raises: BundleError or EngineError, each with what to do.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        backend = backend or default_backend()
        if float_twin and remainder not in (None, "f32"):
            raise UsageError("the float twin is the reference: it takes no remainder but f32.")
        remainder = "f32" if float_twin else remainder
        roles = bundle.network_roles("float" if float_twin else find_backend(backend).role(remainder))
        with ExitStack() as opened:
            engine = opened.enter_context(bundle.open_network(backend, roles, remainder=remainder, threads=threads))
            parts = engine.parts if isinstance(engine, SteppedEngine) else (engine,)
            bundle.load_blobs(dict(zip(roles, parts, strict=True)), blobs)
            opened.pop_all()
        return cls(engine, bundle.manifest.model, place=bundle.path)

    @torch.no_grad()
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The network's output for (N, C, H, W) of any floating dtype, at one timestep for all rows.

        Raises: UsageError for another latent size, timesteps that differ or an argument that the graph cannot take;
        EngineError for a condition that is missing or of another shape.
        """
        if ignored := [name for name, value in others.items() if value is not None and value != {}]:
            raise UsageError(f"{self.place}: {ignored[0]} is no input of the exported network. Leave it out.")
        if not takes_latents(self.facts, sample.shape[1:]):
            raise UsageError(
                f"{self.place}: the sample is {_by(sample.shape[1:])}, the network takes {_taken(self.facts)}."
            )
        told = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels}
        told |= added_cond_kwargs or {}
        conditions = {name: _on_host(value) for name, value in told.items() if value is not None}
        model = EngineModel.of(self.engine, rows=len(sample))
        out = model(_on_host(sample), self._timestep(timestep), conditions or None)
        output = torch.from_numpy(out).to(sample.device, sample.dtype)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def close(self) -> None:
        """Close the engine. Closing twice is allowed."""
        self.engine.close()

    def _timestep(self, timestep: Tensor | float) -> float:
        times = torch.as_tensor(timestep).reshape(-1)
        if not bool((times == times[0]).all()):
            raise UsageError(f"{self.place}: rows of one call at several timesteps. Call it once for each.")
        return float(times[0])


def _on_host(tensor: Tensor) -> Any:
    """As a NumPy array, in float32 if it is of another floating dtype: bfloat16 is none of NumPy's."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _taken(facts: ModelFacts) -> str:
    """Latents that the network takes, in words, and what to do."""
    step = latent_multiple(facts)
    if step is None:
        return f"{_by(facts.latent_shape)}. Ask the pipeline for that size, or export again with --height and --width"
    return f"{facts.latent_shape[0]} channels and sides that are multiples of {step}. Ask the pipeline for such a size"


def _config(facts: ModelFacts) -> FrozenDict:
    """What pipelines read of a UNet's config."""
    channels, height, width = facts.latent_shape
    told = {spec.name: spec.shape for spec in facts.inputs}
    return FrozenDict(
        in_channels=channels,
        out_channels=channels,
        sample_size=_Side(height) if height == width else (height, width),
        cross_attention_dim=told["encoder_hidden_states"][-1] if "encoder_hidden_states" in told else None,
        addition_time_embed_dim=_TIME_ID_WIDTH if "time_ids" in told else None,
        time_cond_proj_dim=None,
    )


class _Side(int):
    """The side of a square, which is also its pair of sides: StableDiffusionPipeline reads a number where it was loaded
    with a UNet of a square, and a pair where it was loaded without one.
    """

    def __getitem__(self, _axis: int) -> int:
        return int(self)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))

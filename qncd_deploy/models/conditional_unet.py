"""diffusers' conditional UNet, called by the names that its conditions have as graph inputs."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor


class ConditionalUNet(UNet2DConditionModel):
    """A UNet2DConditionModel whose conditions are arguments of their own, None where the network takes none.

    encoder_hidden_states (N, L, D): tokens to attend to;  text_embeds (N, P), time_ids (N, 6): SDXL's pooled text and
    sizes of the picture;  class_labels (N,) int64.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Any:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return super().forward(
            sample, timestep, encoder_hidden_states, class_labels=class_labels, added_cond_kwargs=added
        )

"""A bundle's correction table inside diffusers' pipelines: our steps and our loop behind a scheduler's methods.

    pipe.scheduler = QncdScheduler.from_bundle("export/sd15-w8a8", pipe.scheduler)

A pipeline calls the network itself, then `step` with its output after guidance; what the table has for that call is
applied there, as sample.denoise applies it. The state is x = a x_0 + b eps for all samplers, Euler's too: that is what
the network takes, so scale_model_input has nothing to do. What is added to the state before the next call (x_add) is
added at the end of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from qncd_deploy.correct.fitting import State
from qncd_deploy.correct.record import CorrectionTable, ScheduleKey, fixed_steps
from qncd_deploy.correct.rules import check
from qncd_deploy.engines.base import Remainder, default_backend, make_engine_id
from qncd_deploy.errors import ScheduleError, UsageError
from qncd_deploy.runtime import Bundle
from qncd_deploy.sample import denoise
from qncd_deploy.sampler import brought
from qncd_deploy.schedule import Schedule, scheduler_name_from_diffusers
from qncd_deploy.steps import SamplerConfig, Step, initial_scale, make_steps


class QncdScheduler:
    """A diffusers scheduler that corrects: pipelines use set_timesteps, timesteps, scale_model_input and step."""

    order = 1

    def __init__(
        self,
        bundle: Bundle,
        scheduler: Any | None,
        *,
        engine_id: str,
        correction: str,
        eta: float | None,
        guidance_scale: float | None,
        tables: Sequence[Path],
    ) -> None:
        name = None if scheduler is None else scheduler_name_from_diffusers(type(scheduler).__name__)
        own = bundle.sampler_config(scheduler=name, eta=eta)
        self.config = _config(bundle.schedule) if scheduler is None else scheduler.config
        self.correction = correction
        self.table: CorrectionTable | None = None
        self._bundle, self._tables, self._engine_id = bundle, tables, engine_id
        self._scheduler, self._name, self._eta = scheduler, own.scheduler, own.eta
        self._guidance_scale = bundle.guidance(guidance_scale)
        self.init_noise_sigma = initial_scale(bundle.schedule, own)  # LDMPipeline asks before it sets timesteps

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle | Path | str,
        scheduler: Any | None = None,
        *,
        backend: str | None = None,
        correction: str = "auto",
        eta: float | None = None,
        guidance_scale: float | None = None,
        remainder: Remainder | None = None,
        tables: Sequence[Path] = (),
    ) -> QncdScheduler:
        """A scheduler for the pipelines that QncdUNet is in.

        scheduler: the pipeline's own, which must step as the bundle does; None for the bundle's.
        backend, remainder: those of the QncdUNet, since a table is of one engine.  correction: "auto", "off" or a
        method's name.  eta, guidance_scale: those that the pipeline is called with; None for the bundle's own.
        tables: what `qncd fit` wrote, looked into before the bundle's own.
        Raises: ScheduleError for a scheduler that is none of ours; UsageError or BundleError as Bundle.sampler does.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return cls(
            bundle,
            scheduler,
            engine_id=make_engine_id(backend or default_backend(), remainder),
            correction=correction,
            eta=eta,
            guidance_scale=guidance_scale,
            tables=tables,
        )

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare for a run of so many steps.

        Raises ScheduleError if the pipeline's scheduler steps otherwise than the bundle does, or if no correction was
        fitted for this way to sample, with the `qncd fit` line.
        """
        config = SamplerConfig(self._name, num_inference_steps, self._eta)
        schedule = self._bundle.schedule
        if self._scheduler is not None:
            _same_steps(self._scheduler, schedule, config, self._bundle.path)
        key = ScheduleKey.of(
            schedule,
            config,
            guidance_scale=self._guidance_scale,
            backend=self._engine_id,
            plan_sha=self._bundle.plan_sha,
            sides=self._bundle.sides,
        )
        self.table = self._find(key)
        arrays = _Tensors(torch.device(device or "cpu"))
        fixes = [brought(fix, arrays) for fix in self.table.fixes]
        self._steps = fixed_steps(schedule, config, self.table.fixes)
        check(self.table.fixes, self._steps)
        self._added = [_per_pixel(fix.x_add) for fix in fixes]
        self._fixes = [replace(fix, x_add=0.0) for fix in fixes]
        self._state: State | None = None
        self._call = 0
        self.init_noise_sigma = initial_scale(schedule, config)
        self.num_inference_steps = num_inference_steps
        times = [step.t if fix.t_model is None else fix.t_model for step, fix in zip(self._steps, fixes, strict=True)]
        whole = all(t == int(t) for t in times)
        self.timesteps = torch.tensor(times, dtype=torch.int64 if whole else torch.float32, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The state is what the network takes."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From the output of the network for `sample`, after guidance, to the next state, in the dtype of `sample`.

        Raises ScheduleError after the last step, at another timestep or with another eta than the table's.
        """
        if use_clipped_model_output:
            raise UsageError("use_clipped_model_output is not supported with corrections. Leave it out.")
        if eta is not None and eta != self._eta:
            raise ScheduleError(
                f"eta {eta:g} was asked for, the correction is of eta {self._eta:g}. Give QncdScheduler.from_bundle "
                f"eta={eta:g}."
            )
        if self._call == len(self._steps):
            raise ScheduleError(f"all {len(self._steps)} calls were made. Call set_timesteps before the next run.")
        expected = float(self.timesteps[self._call])
        if float(timestep) != expected:
            raise ScheduleError(
                f"step {self._call} is at t = {expected:g}, the pipeline is at t = {float(timestep):g}: a correction "
                "takes all steps in order."
            )
        if self.table.method != "off" and tuple(sample.shape[1:]) != tuple(self._bundle.manifest.model.latent_shape):
            raise ScheduleError(
                f"the sample is {list(sample.shape[1:])}, correction {self.table.method} was fitted for "
                f"{list(self._bundle.manifest.model.latent_shape)}. Open the bundle with "
                "`Bundle.open(...).at_size(height, width)`, for which `qncd fit --height --width` fits one."
            )
        call, x = self._call, sample.float()
        noise = _Noise(x, generator)
        run = denoise(
            lambda _x, _t: model_output.float(),
            x,
            self._steps[call : call + 1],
            noise=noise,
            fixes=self._fixes[call : call + 1],
            prediction=self._bundle.schedule.prediction,
            after=self._state,
        )
        self._state = next(run)
        self._call = call + 1
        x = self._state.x
        if self._call < len(self._added):
            x = x + self._added[self._call]
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def __len__(self) -> int:
        """Of the training timesteps."""
        return int(self._bundle.schedule.alphas_cumprod.size)

    def _find(self, key: ScheduleKey) -> CorrectionTable:
        """The table for this way to sample. Raises ScheduleError if there is none or a scheduler cannot apply it."""
        chosen = [tables.choice(key) for tables in self._bundle.corrections(self._tables)]
        if self.correction == "auto" and not any(chosen):
            raise ScheduleError(
                f"{self._bundle.path}: no correction was fitted for {key.scheduler}, {key.n_steps} steps, eta "
                f"{key.eta:g}, guidance scale {key.guidance_scale:g} on {key.backend}. Run "
                f'`{key.fit_command(self._bundle.path)}` and give its file in tables=[...], or correction="off".'
            )
        table = self._bundle.correction_table(self.correction, key, self._tables)
        if any(fix.refresh for fix in table.fixes):
            raise ScheduleError(
                f"{self._bundle.path}: correction {table.method} measures with network calls of its own, which a "
                "scheduler cannot make. Sample with Bundle.sampler, or choose another correction."
            )
        if np.any(table.fixes[0].x_add):
            raise ScheduleError(
                f"{self._bundle.path}: correction {table.method} changes the first state, which a pipeline makes "
                "itself. Choose another correction."
            )
        return table


@dataclass(frozen=True)
class _Tensors:
    """Where torch's tensors are; see specs.Arrays."""

    device: torch.device

    def put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def get(self, array: Tensor) -> np.ndarray:
        return array.cpu().numpy()

    def wait(self) -> None: ...

    def used_bytes(self) -> None: ...


@dataclass(frozen=True)
class _Noise:
    """Both streams are the pipeline's own generator: a correction that draws noise shifts the sampler's."""

    like: Tensor
    generator: torch.Generator | None

    def step(self) -> Tensor:
        x = self.like
        return randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)

    probe = step


def _config(schedule: Schedule) -> FrozenDict:
    """What pipelines read of a scheduler's config."""
    return FrozenDict(
        num_train_timesteps=int(schedule.alphas_cumprod.size),
        prediction_type=schedule.prediction,
        steps_offset=schedule.steps_offset,
        clip_sample=schedule.clip_sample is not None,
    )


def _same_steps(scheduler: Any, schedule: Schedule, config: SamplerConfig, place: Path) -> None:
    """Raises ScheduleError where a diffusers scheduler does not step as the bundle does."""
    kind = type(scheduler).__name__
    theirs = Schedule.from_diffusers({**scheduler.config, "_class_name": kind})
    for i, (their, our) in enumerate(zip(make_steps(theirs, config), make_steps(schedule, config), strict=True)):
        # float32 tables of betas in a config are as near as this
        if their.clip != our.clip or not np.allclose(_numbers(their), _numbers(our), rtol=1e-5):
            raise ScheduleError(
                f"{place}: the pipeline's {kind} goes from t = {their.t:g} at alpha {their.abar:.6g} to "
                f"{their.abar_next:.6g} in step {i}, the bundle from t = {our.t:g} at {our.abar:.6g} to "
                f"{our.abar_next:.6g}. Leave the scheduler out of QncdScheduler.from_bundle to step as the bundle does."
            )


def _numbers(step: Step) -> list[float]:
    return [step.t, step.abar, step.abar_next, step.eps_weight, step.keep, step.std, *step.x0_weights, *step.mix]


def _per_pixel(added: Any) -> Any:
    """x_add to broadcast over (N, C, H, W)."""
    return added.reshape(-1, 1, 1) if getattr(added, "ndim", 0) == 1 else added

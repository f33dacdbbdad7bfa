"""Noise schedules: the forward process a network was trained on and the options that samplers read from it.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   abar_t = prod_{i <= t} (1 - beta_i)   (Ho et al., arXiv:2006.11239)

Tables are float64. Which timesteps a sampler visits, and with which weights, is the business of steps.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from qncd_deploy.errors import ScheduleError

Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace", "quad"]
Variance = Literal["fixed_small", "fixed_large"]
FinalSigma = Literal["zero", "sigma_min"]

SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
SCHEDULERS = ("ddim", "ddpm", "plms", "dpmpp-2m", "euler", "euler-a")

_DIFFUSERS_CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "plms",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
}

# For every sampler the options of its diffusers class that change the result and that we do not implement:
# name -> (what diffusers takes when the config is silent, the values that are fine).
_OFF = (False, (False, None))
_REFUSED: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "ddim": {"thresholding": _OFF},
    "ddpm": {
        "thresholding": _OFF,
        "variance_type": ("fixed_small", ("fixed_small", "fixed_small_log", "fixed_large")),
    },
    "plms": {"skip_prk_steps": (False, (True,))},
    "dpmpp-2m": {
        "thresholding": _OFF,
        "algorithm_type": ("dpmsolver++", ("dpmsolver++",)),
        "solver_order": (2, (2,)),
        "solver_type": ("midpoint", ("midpoint",)),
        "variance_type": (None, (None,)),
        "lambda_min_clipped": (-math.inf, (-math.inf,)),
        "use_karras_sigmas": _OFF,
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
        "use_lu_lambdas": _OFF,
        "use_flow_sigmas": _OFF,
        "use_dynamic_shifting": _OFF,
    },
    "euler": {
        "interpolation_type": ("linear", ("linear",)),
        "timestep_type": ("discrete", ("discrete",)),
        "use_karras_sigmas": _OFF,
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
    },
    "euler-a": {},
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """The forward process, and what a sampler needs to know beside its own name and number of steps.

    alphas_cumprod    (T,) float64, never increasing, in [0, 1]; entry t is abar_t
    prediction        what the network returns: eps, v = sqrt(abar) eps - sqrt(1 - abar) x_0, or x_0
    timestep_spacing  how n_steps are spread over T: Table 2 of Lin et al., arXiv:2305.08891; or "quad", which has more
                      of them where there is little noise (ddim on CIFAR-10, arXiv:2010.02502, appendix D.2)
    steps_offset      added to every timestep of "leading" spacing
    final_abar        last target of ddim and plms: alphas_cumprod[0] (CompVis) or 1 (ddpm always ends at 1)
    clip_sample       ddim, ddpm: clip the predicted x_0 to [-clip_sample, clip_sample]; None = off
    variance          ddpm: posterior variance ("fixed_small") or beta ("fixed_large")
    final_sigma       dpmpp-2m, euler: last target abar = 1 ("zero") or alphas_cumprod[0] ("sigma_min")
    lower_order_final, euler_at_final   dpmpp-2m: when the last step is of first order (below 15 steps; always)

    A sampler reads only its own options, as the diffusers class of that sampler would from the same config.
    Raises ScheduleError for values outside these sets. Options are changed with dataclasses.replace.
    """

    alphas_cumprod: np.ndarray
    prediction: Prediction = "epsilon"
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 1
    final_abar: float = 1.0
    clip_sample: float | None = None
    variance: Variance = "fixed_small"
    final_sigma: FinalSigma = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        abar = np.array(self.alphas_cumprod, dtype=np.float64)
        if abar.ndim != 1 or abar.size == 0:
            raise ScheduleError(f"schedule: alphas_cumprod has shape {abar.shape}, expected (T,) with T >= 1.")
        if not (np.isfinite(abar).all() and (abar >= 0).all() and (abar < 1).all() and (np.diff(abar) <= 0).all()):
            raise ScheduleError(
                "schedule: alphas_cumprod must be finite, in [0, 1) and never rise with t. Check the betas."
            )
        abar.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", abar)
        for name, kind in (
            ("prediction", Prediction),
            ("timestep_spacing", Spacing),
            ("variance", Variance),
            ("final_sigma", FinalSigma),
        ):
            _one_of(f"schedule: {name}", getattr(self, name), get_args(kind))
        if self.steps_offset < 0:
            raise ScheduleError(f"schedule: steps_offset {self.steps_offset}, expected 0 or more.")
        if not 0 < self.final_abar <= 1:
            raise ScheduleError(f"schedule: final_abar {self.final_abar}, expected a value in (0, 1].")
        if self.clip_sample is not None and not self.clip_sample > 0:
            raise ScheduleError(f"schedule: clip_sample {self.clip_sample}, expected a positive range or none.")

    @classmethod
    def from_betas(
        cls,
        betas: Sequence[float] | np.ndarray,
        *,
        prediction: Prediction = "epsilon",
        timestep_spacing: Spacing = "leading",
        steps_offset: int = 1,
        final_abar: float | None = None,
        clip_sample: float | None = None,
    ) -> Schedule:
        """A schedule with CompVis' sampling defaults; final_abar None means alphas_cumprod[0], CompVis' last target.

        betas: (T,) in (0, 1). Raises ScheduleError if they are not.
        """
        abar = _abar_from_betas(np.asarray(betas, dtype=np.float64))
        return cls(
            abar,
            prediction=prediction,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            final_abar=float(abar[0]) if final_abar is None else final_abar,
            clip_sample=clip_sample,
        )

    @classmethod
    def linear(
        cls, beta_start: float, beta_end: float, count: int = 1000, *, prediction: Prediction = "epsilon"
    ) -> Schedule:
        """Betas equally spaced: DDPM's schedule, "linear" in diffusers."""
        return cls.from_betas(betas_of("linear", beta_start, beta_end, count), prediction=prediction)

    @classmethod
    def scaled_linear(
        cls, beta_start: float, beta_end: float, count: int = 1000, *, prediction: Prediction = "epsilon"
    ) -> Schedule:
        """sqrt(beta) equally spaced: "linear" in CompVis' code, "scaled_linear" in diffusers."""
        return cls.from_betas(betas_of("scaled_linear", beta_start, beta_end, count), prediction=prediction)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], *, scheduler: str | None = None) -> Schedule:
        """Read a diffusers scheduler_config.json for `scheduler` (None: the config's own class).

        As in diffusers, options missing from the config take the defaults of the class that will sample, and options
        that this class does not know are left alone.
        Raises ScheduleError naming the field that asks for something not implemented here.
        """
        if scheduler is None:
            scheduler = scheduler_name_from_diffusers(str(config.get("_class_name")))
        elif "beta_schedule" not in config and "trained_betas" not in config:
            raise ScheduleError(
                f"scheduler_config.json: {config.get('_class_name')} names no beta_schedule; {scheduler} needs one."
            )
        _one_of("scheduler", scheduler, SCHEDULERS)
        for name, (default, fine) in _REFUSED[scheduler].items():
            value = config.get(name, default)
            if value not in fine:
                raise ScheduleError(
                    f"scheduler_config.json: {name} is {json.dumps(value)}, which {scheduler} does not implement here "
                    f"(expected {' or '.join(json.dumps(v) for v in fine)}). Change the config or choose another "
                    "--scheduler."
                )
        count = int(config.get("num_train_timesteps", 1000))
        trained = config.get("trained_betas")
        betas = (
            betas_of(
                str(config.get("beta_schedule", "linear")),
                float(config.get("beta_start", 0.0001)),
                float(config.get("beta_end", 0.02)),
                count,
            )
            if trained is None
            else np.asarray(trained, dtype=np.float64)
        )
        abar = _abar_from_betas(betas)
        if config.get("rescale_betas_zero_snr") and scheduler != "plms":  # PNDMScheduler has no such option
            abar = _zero_terminal_snr(abar)
        clips = scheduler in ("ddim", "ddpm") and config.get("clip_sample", True)
        to_one = config.get("set_alpha_to_one", scheduler != "plms")
        return cls(
            abar,
            prediction=config.get("prediction_type", "epsilon"),
            timestep_spacing=config.get(
                "timestep_spacing", "leading" if scheduler in ("ddim", "ddpm", "plms") else "linspace"
            ),
            steps_offset=int(config.get("steps_offset", 0)),
            final_abar=1.0 if to_one else float(abar[0]),
            clip_sample=float(config.get("clip_sample_range", 1.0)) if clips else None,
            variance="fixed_large" if config.get("variance_type") == "fixed_large" else "fixed_small",
            final_sigma=config.get("final_sigmas_type", "zero"),
            lower_order_final=bool(config.get("lower_order_final", True)),
            euler_at_final=bool(config.get("euler_at_final", False)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values only; from_json gives back the same schedule, bit for bit."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return data | {"alphas_cumprod": self.alphas_cumprod.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """Inverse of to_json. Raises ScheduleError if a field is missing or unknown."""
        expected = {f.name for f in fields(cls)}
        if set(data) != expected:
            raise ScheduleError(
                f"schedule: fields {sorted(set(data) ^ expected)} are missing or unknown. Export the bundle again."
            )
        return cls(**data)

    def sha256(self) -> str:
        """Hash of every field: equal exactly when the schedules are."""
        text = json.dumps(self.to_json(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def scheduler_name_from_diffusers(class_name: str) -> str:
    """Our name of a diffusers scheduler class; ScheduleError if it is none of ours."""
    if class_name not in _DIFFUSERS_CLASSES:
        raise ScheduleError(
            f"scheduler_config.json: _class_name {class_name!r} is none of {', '.join(_DIFFUSERS_CLASSES)}. "
            f"Choose one of {', '.join(SCHEDULERS)} with --scheduler."
        )
    return _DIFFUSERS_CLASSES[class_name]


def betas_of(name: str, start: float, end: float, count: int) -> np.ndarray:
    """Betas (count,) float64 by their diffusers name: linear, scaled_linear, squaredcos_cap_v2, sigmoid, laplace."""
    if count < 1:
        raise ScheduleError(f"schedule: {count} training timesteps, expected at least 1.")
    if name == "linear":
        return np.linspace(start, end, count)
    if name == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    if name == "sigmoid":  # GeoDiff
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, count))) + start
    if name in ("squaredcos_cap_v2", "laplace"):
        signal = _cosine_signal if name == "squaredcos_cap_v2" else _laplace_signal
        return np.array([min(1 - signal((i + 1) / count) / signal(i / count), 0.999) for i in range(count)])
    raise ScheduleError(
        f"schedule: beta_schedule {name!r} is unknown, expected linear, scaled_linear, squaredcos_cap_v2, sigmoid or "
        "laplace."
    )


def _cosine_signal(u: float) -> float:
    """Nichol and Dhariwal, arXiv:2102.09672, eq. 17."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_signal(u: float) -> float:
    """diffusers' "laplace": despite its name in use, the square root of the signal share."""
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _abar_from_betas(betas: np.ndarray) -> np.ndarray:
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ScheduleError("schedule: betas must be a list of numbers between 0 and 1.")
    return np.cumprod(1.0 - betas)


def _zero_terminal_snr(abar: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(abar) so that the last entry is 0 and the first stays (Lin et al., Algorithm 1)."""
    root = np.sqrt(abar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _one_of(place: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ScheduleError(f"{place} is {value!r}, expected one of {', '.join(allowed)}.")

"""Samplers as tables of scalars: one row per network call, one update for all of them.

Every sampler runs in the variance-preserving state x = a x_0 + b eps, a^2 = abar, b^2 = 1 - abar. With the newest
network output (for PLMS a mix of the newest ones) turned into x_0 and eps at the row's abar,

    x' = keep x + sum_j x0_weights[j] x_0[-j] + eps_weight eps + std z,        z ~ N(0, I).

    ddim      a' x_0 + sqrt(b'^2 - std^2) eps + std z, std = eta (b' / b) sqrt(1 - abar / abar')     arXiv:2010.02502
    ddpm      posterior mean in x_0 (clipped) and x, std of the posterior or sqrt(beta)              arXiv:2006.11239
    plms      ddim, eta 0, on an Adams-Bashforth mix of outputs; the first step is done twice        arXiv:2202.09778
    dpmpp-2m  (b' / b) x + a' (1 - e^-h) ((1 + r) x_0 - r x_0[-1]), h = log(a' b / (b' a)),          arXiv:2211.01095
              r = h / (2 h of the step before), 0 in the first and (see Schedule) the last step
    euler     in y = x / a, sigma = b / a: y' = y + (sigma' - sigma) eps, which is ddim with eta 0   arXiv:2206.00364
    euler-a   the same with ancestral noise, which is ddim with eta 1                                k-diffusion

Timesteps, targets and options follow the diffusers class of each sampler, its peculiarities included, so that
trajectories agree to rounding. Scalars are Python floats: they never widen a float32 array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from qncd_deploy.errors import ScheduleError
from qncd_deploy.schedule import SCHEDULERS, Prediction, Schedule
from qncd_deploy.specs import Array
from qncd_deploy.timesteps import timesteps_of

_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_SIGMA_SAMPLERS = ("dpmpp-2m", "euler", "euler-a")
_LEAST_ABAR = 2.0**-24  # diffusers' stand-in for abar = 0 where sigma = b / a must be finite


@dataclass(frozen=True, slots=True)
class SamplerConfig:
    """Which sampler, how many steps, and (ddim only) how much of the posterior's noise: 0 none, 1 all of it.

    Raises ScheduleError for an unknown scheduler, n_steps below 1, a negative eta, or an eta that would be ignored.
    """

    scheduler: str
    n_steps: int
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ScheduleError(f"scheduler {self.scheduler!r} is unknown, expected one of {', '.join(SCHEDULERS)}.")
        if self.n_steps < 1:
            raise ScheduleError(f"n_steps {self.n_steps}: sampling takes at least 1 step.")
        if not 0 <= self.eta < math.inf:
            raise ScheduleError(f"eta {self.eta}: the amount of noise cannot be negative. Use a value from 0 to 1.")
        if self.eta and self.scheduler != "ddim":
            raise ScheduleError(f"eta {self.eta}: {self.scheduler} has no eta, only ddim does. Leave --eta out.")


@dataclass(frozen=True, slots=True)
class Step:
    """Scalars of one network call and of the update after it (see the formula on top of this file).

    t, t_next    timestep fed to the network; timestep of the target, None past the last one
    abar         cumulative alpha of the state that is updated; abar_next that of the target
    mix          weights of the newest outputs, newest first, whose sum stands for the network's output
    base         "saved": update the state of the last remembered call, not the current one (PLMS' second call)
    push         the output, its x_0 and the state are remembered for later rows
    clip         x_0 is clipped to [-clip, clip] before it is used
    scale        factor on x' in the end, which all the rest is told without: 1 / a' for the last row of euler where
                 that ends above sigma = 0, since diffusers takes y = x / a for the result
    """

    t: float
    t_next: float | None
    abar: float
    abar_next: float
    x0_weights: tuple[float, ...]
    eps_weight: float = 0.0
    keep: float = 0.0
    std: float = 0.0
    mix: tuple[float, ...] = (1.0,)
    base: Literal["current", "saved"] = "current"
    push: bool = False
    clip: float | None = None
    scale: float = 1.0

    @property
    def a(self) -> float:
        """Signal amplitude of the updated state."""
        return math.sqrt(self.abar)

    @property
    def b(self) -> float:
        """Noise amplitude of the updated state."""
        return math.sqrt(1 - self.abar)

    @property
    def abar_call(self) -> float:
        """Cumulative alpha of the state that the network sees: PLMS' second call looks from the target."""
        return self.abar_next if self.base == "saved" else self.abar

    @property
    def eps_gain(self) -> float:
        """How far x' moves per unit of error in the newest eps, x held fixed, clip and scale aside: ddim's B."""
        return self.mix[0] * (self.eps_weight - self.x0_weights[0] * self.b / self.a)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a multistep sampler remembers: outputs (newest first), and the x_0 and the state of the newest of them."""

    outputs: tuple[Array, ...] = ()
    x0: Array = None
    base: Array = None


def make_steps(
    schedule: Schedule,
    config: SamplerConfig,
    *,
    abar: Sequence[float | None] | None = None,
    abar_next: Sequence[float | None] | None = None,
) -> tuple[Step, ...]:
    """The rows of a sampler, in order of the network calls (PLMS: n_steps + 1 of them, its second step's t twice).

    abar, abar_next: one entry per row, None = the schedule's own; the row's weights are built from these (StepbaQ's
    tau, DNS's target).
    Raises ScheduleError if the network was not trained on the timesteps, or if they repeat.
    """
    nodes = _nodes(schedule, config)
    for name, values in (("abar", abar), ("abar_next", abar_next)):
        if values is not None:
            assert len(values) == len(nodes), f"{len(values)} values of {name} for {len(nodes)} calls"
            nodes = [n if v is None else replace(n, **{name: float(v)}) for n, v in zip(nodes, values, strict=True)]
    if schedule.prediction == "epsilon" and nodes[0].abar == 0:
        raise ScheduleError(
            f"the schedule has no signal left at t = {nodes[0].t:.0f} (zero terminal SNR): a network that predicts eps "
            "cannot start there. Use another --scheduler or timestep_spacing."
        )
    if config.scheduler == "plms":
        if schedule.prediction == "sample":
            raise ScheduleError("plms mixes past eps or v, this network predicts x_0. Use another --scheduler.")
        return _plms_rows(nodes)
    if config.scheduler == "dpmpp-2m":
        return _dpmpp_rows(nodes, schedule)
    if config.scheduler == "ddpm":
        return tuple(_ddpm_row(n, schedule) for n in nodes)
    eta = {"ddim": config.eta, "euler": 0.0, "euler-a": 1.0}[config.scheduler]
    clip = schedule.clip_sample if config.scheduler == "ddim" else None
    rows = [_ddim_row(n, eta, clip) for n in nodes]
    if config.scheduler == "euler" and schedule.final_sigma == "sigma_min":
        rows[-1] = replace(rows[-1], scale=1 / math.sqrt(schedule.alphas_cumprod[0]))
    return tuple(rows)


def initial_scale(schedule: Schedule, config: SamplerConfig) -> float:
    """Factor on N(0, I) for the first state: 1, but b_T for Euler samplers with linspace or trailing timesteps,
    which start at y = sigma_max z (diffusers' init_noise_sigma)."""
    if config.scheduler in ("euler", "euler-a") and schedule.timestep_spacing != "leading":
        return math.sqrt(1 - _nodes(schedule, config)[0].abar)
    return 1.0


def absorb(step: Step, var: float, coef: Literal["s", "s_eff"] = "s") -> Step:
    """Take a residual variance `var` of eps out of the sampler's own noise: std'^2 = max(0, std^2 - eps_gain^2 var).

    PTQD's variance schedule calibration (He et al., arXiv:2305.10657). eps_gain is the one of the untouched row.
    coef "s_eff" then recomputes the weight of eps with the smaller std, as the released PTQD and D2-DPM code does;
    that raises the spread of the samples, so "s" is the default.
    """
    if var == 0 or step.std == 0:
        return step
    std = math.sqrt(max(0.0, step.std**2 - step.eps_gain**2 * var))
    if coef == "s":
        return replace(step, std=std)
    if step.keep:
        raise ScheduleError("coef 's_eff' recomputes ddim's direction weight; a ddpm row has none. Use ddim, eta 1.")
    return replace(step, std=std, eps_weight=math.sqrt(max(0.0, 1 - step.abar_next - std**2)))


def amplify(step: Step, gain: float) -> Step:
    """Multiply the row's increment in y = x / sqrt(abar) by `gain` (Q-Drift, arXiv:2603.18095):
    x' -> gain x' + (1 - gain) sqrt(abar_next / abar) x."""
    if gain == 1:
        return step
    return replace(
        step,
        keep=gain * step.keep + (1 - gain) * math.sqrt(step.abar_next / step.abar),
        x0_weights=tuple(gain * w for w in step.x0_weights),
        eps_weight=gain * step.eps_weight,
        std=gain * step.std,
    )


def x0_from_output(out: Array, x: Array, abar: float, prediction: Prediction) -> Array:
    """x_0 that an output stands for, given the state x at abar."""
    if prediction == "sample":
        return out
    a, b = math.sqrt(abar), math.sqrt(1 - abar)
    return a * x - b * out if prediction == "v_prediction" else (x - b * out) * (1 / a)


def eps_from_output(out: Array, x: Array, abar: float, prediction: Prediction) -> Array:
    """eps that an output stands for, given the state x at abar."""
    if prediction == "epsilon":
        return out
    a, b = math.sqrt(abar), math.sqrt(1 - abar)
    return a * out + b * x if prediction == "v_prediction" else (x - a * out) * (1 / b)


def output_per_eps(abar: float, prediction: Prediction) -> float:
    """d output / d eps at a given x: what turns a correction of eps into one of the output. Without signal (abar = 0)
    v says nothing about eps, and the answer is 0."""
    if prediction == "epsilon":
        return 1.0
    if abar == 0:
        return 0.0
    a, b = math.sqrt(abar), math.sqrt(1 - abar)
    return 1 / a if prediction == "v_prediction" else -b / a


def advance(
    x: Array,
    out: Array,
    step: Step,
    memory: Memory = Memory(),
    z: Array | None = None,
    *,
    prediction: Prediction = "epsilon",
) -> tuple[Array, Memory]:
    """One update: the next state and the memory for the next row. Arguments are left as they are.

    x: the network's input; out: its corrected output; z: N(0, I), needed where step.std > 0. NumPy arrays or torch
    tensors of one shape and floating dtype, which the result keeps.
    """
    base = memory.base if step.base == "saved" else x
    mixed = out
    if step.mix != (1.0,):
        mixed = step.mix[0] * out
        for weight, past in zip(step.mix[1:], memory.outputs, strict=True):
            mixed += weight * past
    x0 = x0_from_output(mixed, base, step.abar, prediction)
    if step.clip is not None:
        x0 = x0.clip(-step.clip, step.clip)
    x_next = step.x0_weights[0] * x0
    if len(step.x0_weights) == 2:
        x_next += step.x0_weights[1] * memory.x0
    if step.eps_weight:
        x_next += step.eps_weight * eps_from_output(mixed, base, step.abar, prediction)
    if step.keep:
        x_next += step.keep * base
    if step.std:
        assert z is not None, "a stochastic row needs its noise"
        x_next += step.std * z
    if step.scale != 1:
        x_next *= step.scale
    if step.push:
        memory = Memory((out, *memory.outputs[:2]), x0, x)
    return x_next, memory


@dataclass(frozen=True, slots=True)
class _Node:
    """Where one step starts and where it is aimed, before a sampler makes weights of it."""

    t: float
    t_next: float | None
    abar: float
    abar_next: float


def _nodes(schedule: Schedule, config: SamplerConfig) -> list[_Node]:
    """Start and target of each of the n_steps steps; for PLMS the doubled second call is put in."""
    table, name = schedule.alphas_cumprod, config.scheduler
    times = timesteps_of(schedule, config.scheduler, config.n_steps)
    nexts: list[tuple[float | None, float]]
    if name in _SIGMA_SAMPLERS:
        table = np.where(table > 0, table, _LEAST_ABAR)
        # diffusers interpolates sigma, not abar, at the fractional timesteps of Euler's linspace
        sigma = np.interp(times, np.arange(table.size), np.sqrt(1 / table - 1))
        abar = [float(v) for v in 1 / (1 + sigma**2)]
        keeps_noise = schedule.final_sigma == "sigma_min" and name != "euler-a"
        nexts = [(float(t), v) for t, v in zip(times[1:], abar[1:], strict=True)]
        nexts += [(None, float(table[0]) if keeps_noise else 1.0)]
    elif name == "ddpm" or schedule.timestep_spacing == "quad":
        abar = [float(table[int(t)]) for t in times]
        last = 1.0 if name == "ddpm" else schedule.final_abar
        nexts = [(float(t), v) for t, v in zip(times[1:], abar[1:], strict=True)] + [(None, last)]
    else:
        # ddim and plms aim T // n_steps below, which linspace and trailing timesteps may miss by one: as diffusers do
        abar = [float(table[int(t)]) for t in times]
        aims = [int(t) - table.size // config.n_steps for t in times]
        nexts = [(float(t), float(table[t])) if t >= 0 else (None, schedule.final_abar) for t in aims]
    if any(later >= now for now, later in itertools.pairwise(times)):
        raise ScheduleError(
            f"n_steps {config.n_steps}: {name} with {schedule.timestep_spacing} timesteps would visit one twice. "
            "Ask for fewer steps."
        )
    nodes = [_Node(float(t), t_next, now, later) for t, now, (t_next, later) in zip(times, abar, nexts, strict=True)]
    if name == "plms" and len(nodes) > 1:
        second = nodes[1]
        redo = _Node(second.t, second.t, float(table[int(second.t) + table.size // config.n_steps]), second.abar)
        nodes.insert(1, redo)
    return nodes


def _ddim_row(node: _Node, eta: float, clip: float | None = None) -> Step:
    abar, target = node.abar, node.abar_next
    std = eta * math.sqrt(max(0.0, (1 - target) / (1 - abar) * (1 - abar / target)))
    rest = 1 - target - std**2
    if rest < -1e-12:  # below that it is the rounding of eta = 1
        raise ScheduleError(
            f"eta {eta}: more noise than the state may hold at t = {node.t:.0f}. Use a value from 0 to 1."
        )
    return Step(
        node.t,
        node.t_next,
        abar,
        target,
        x0_weights=(math.sqrt(target),),
        eps_weight=math.sqrt(max(0.0, rest)),
        std=std,
        clip=clip,
    )


def _ddpm_row(node: _Node, schedule: Schedule) -> Step:
    abar, target = node.abar, node.abar_next
    beta = 1 - abar / target  # of the whole step, arXiv:2006.11239 eq. 6 and 7
    var = beta if schedule.variance == "fixed_large" else (1 - target) / (1 - abar) * beta
    return Step(
        node.t,
        node.t_next,
        abar,
        target,
        x0_weights=(math.sqrt(target) * beta / (1 - abar),),
        keep=math.sqrt(abar / target) * (1 - target) / (1 - abar),
        std=math.sqrt(max(0.0, var)) if node.t > 0 else 0.0,
        clip=schedule.clip_sample,
    )


def _plms_rows(nodes: Sequence[_Node]) -> tuple[Step, ...]:
    """Call 0 is a plain step, call 1 looks from its end and does it again with the mean of both outputs; then
    Adams-Bashforth of rising order over the remembered outputs, which call 1's is not one of."""
    rows = []
    for call, node in enumerate(nodes):
        row = _ddim_row(node, 0.0)
        if call == 1:
            rows.append(replace(row, mix=(0.5, 0.5), base="saved"))
        else:
            order = min(max(call, 1), len(_ADAMS_BASHFORTH))
            rows.append(replace(row, mix=_ADAMS_BASHFORTH[order - 1], push=True))
    return tuple(rows)


def _dpmpp_rows(nodes: Sequence[_Node], schedule: Schedule) -> tuple[Step, ...]:
    rows = []
    last = len(nodes) - 1
    first_order_end = (
        schedule.euler_at_final or schedule.final_sigma == "zero" or (schedule.lower_order_final and len(nodes) < 15)
    )
    for call, node in enumerate(nodes):
        sigma, target = (math.sqrt(1 / v - 1) for v in (node.abar, node.abar_next))
        weight = math.sqrt(node.abar_next) * (1 - target / sigma)
        if call == 0 or (call == last and first_order_end):
            weights: tuple[float, ...] = (weight,)
        else:
            before = math.sqrt(1 / nodes[call - 1].abar - 1)
            if before <= sigma:
                raise ScheduleError(
                    f"dpmpp-2m: step {call} starts no less noisy than the one before it, which its second order needs. "
                    "Fit the correction for this schedule again, or use another."
                )
            half_ratio = math.log(sigma / target) / math.log(before / sigma) / 2
            weights = (weight * (1 + half_ratio), -weight * half_ratio)
        keep = math.sqrt((1 - node.abar_next) / (1 - node.abar))
        rows.append(Step(node.t, node.t_next, node.abar, node.abar_next, weights, keep=keep, push=True))
    return tuple(rows)

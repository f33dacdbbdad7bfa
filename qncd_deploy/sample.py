"""The host loop: noise by picture, guidance, and denoising with a correction record. It knows no method and no engine.

One iteration per network call; collecting, timing and progress are ways of iterating over it. correct/record.py has
the formula of one iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from qncd_deploy.correct.fitting import State
from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import LabelError, ScheduleError, UsageError
from qncd_deploy.schedule import Prediction
from qncd_deploy.specs import Array, Conditions, EpsModel, NoiseSource
from qncd_deploy.steps import Memory, Step, absorb, advance, amplify, eps_from_output, output_per_eps


class PictureNoise:
    """Noise of a batch, picture by picture: that of picture i depends on (seed, i) alone, never on its neighbours.

    Three independent streams a picture: the first state, the sampler's steps, and probes, so that a probe more or less
    never shifts the sampler's own noise. shape: (C, H, W) of one picture.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]) -> None:
        if seed < 0:
            raise UsageError(f"seed {seed}: expected 0 or more.")
        self._shape = (len(indices), *shape)
        # spawn keys, not SeedSequence([seed, i, stream]): that one pads with zeros, so picture 0 would get the numbers
        # that default_rng(seed) gives to everybody else
        self._streams = [
            [np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(i, s)))) for i in indices]
            for s in range(3)
        ]

    def initial(self) -> np.ndarray:
        """N(0, I) for the first state, (N, C, H, W) float32."""
        return self._draw(0)

    def step(self) -> np.ndarray:
        return self._draw(1)

    def probe(self) -> np.ndarray:
        return self._draw(2)

    def _draw(self, stream: int) -> np.ndarray:
        noise = np.empty(self._shape, np.float32)
        for generator, picture in zip(self._streams[stream], noise, strict=True):
            generator.standard_normal(dtype=np.float32, out=picture)
        return noise


def labels_for(
    indices: Sequence[int], *, classes: int, null_class: int | None = None, chosen: Sequence[int] | None = None
) -> np.ndarray:
    """Class labels of pictures, (N,) int64: picture i takes label i mod classes, the null class not counted, or entry
    i mod len(chosen) of the labels asked for.

    classes: all of them, the null class included. Raises LabelError for a label the model does not know.
    """
    real = [k for k in range(classes) if k != null_class]
    labels = real if chosen is None else list(chosen)
    wrong = [k for k in labels if not 0 <= k < classes]
    if wrong or not labels:
        null = "" if null_class is None else f" ({null_class} is the null class)"
        found = f"class label {wrong[0]}" if wrong else "no class label"
        raise LabelError(f"{found}: the model knows 0 .. {classes - 1}{null}.")
    return np.array([labels[i % len(labels)] for i in indices], dtype=np.int64)


def guided(
    model: Callable[[Array, float, Conditions | None], Array],
    cond: Conditions | None,
    uncond: Conditions | None,
    scale: float,
) -> EpsModel:
    """Classifier-free guidance u + scale (c - u) (Ho and Salimans, arXiv:2207.12598) as one call on [uncond; cond].

    model(x, t, cond); cond (N, ...) by graph input; uncond the same, or (1, ...). Without uncond, or with scale 1, a
    plain call.
    """
    if uncond is None or cond is None or scale == 1:
        return lambda x, t: model(x, t, cond)
    both = {name: np.concatenate([np.broadcast_to(uncond[name], rows.shape), rows]) for name, rows in cond.items()}

    def predict(x: Array, t: float) -> Array:
        without, given = np.split(model(np.concatenate([x, x]), t, both), 2)
        out = given - without
        out *= scale
        out += without
        return out

    return predict


ModelFor = Callable[[Sequence[int]], EpsModel]
"""The network for a batch of pictures, named by index: labels and guidance are inside what it returns."""


class Rollout(Protocol):
    """The sampling loop for some pictures, from noise to latents, with noise that depends on the pictures alone."""

    def __call__(
        self, model_for: ModelFor, indices: Sequence[int], fixes: Sequence[StepFix] | None = None
    ) -> Iterator[State]: ...


def rollout(
    steps: Sequence[Step],
    *,
    seed: int,
    shape: Sequence[int],
    prediction: Prediction = "epsilon",
    scale: float = 1.0,
) -> Rollout:
    """The loop with everything but the model, the pictures and the corrections chosen.

    shape: (C, H, W); scale: steps.initial_scale.
    """

    def run(model_for: ModelFor, indices: Sequence[int], fixes: Sequence[StepFix] | None = None) -> Iterator[State]:
        noise = PictureNoise(seed, indices, shape)
        x = scale * noise.initial()
        return denoise(model_for(indices), x, steps, noise=noise, fixes=fixes, prediction=prediction)

    return run


def denoise(
    predict: EpsModel,
    x: Array,
    steps: Sequence[Step],
    *,
    noise: NoiseSource,
    fixes: Sequence[StepFix] | None = None,
    prediction: Prediction = "epsilon",
    after: State | None = None,
) -> Iterator[State]:
    """Yield the state after every network call, corrections applied.

    x: the first state (N, C, H, W), noise times initial_scale; it is not changed. steps: make_steps, or fixed_steps
    where the table says another abar. fixes: one per step; None changes nothing. after: the last state of a run over
    the steps before these, which goes on here; calls are then counted from these steps' first.
    Raises ScheduleError if the rows do not fit the steps or the network's channels.
    """
    memory, m, extra_calls = (Memory(), None, 0) if after is None else (after.memory, after.m, after.extra_calls)
    for call, row in enumerate(_rows(steps, fixes, x.shape, prediction)):
        fix, step = row.fix, row.step
        x_in = x + fix.x_add if row.adds else x
        raw = predict(x_in, row.t)
        out = _mapped(raw, x_in, fix)
        if fix.z_std:
            out = out + row.per_eps * fix.z_std * noise.probe()
        z = noise.step() if row.draws else None
        if fix.refresh:
            trial, _ = _update(x_in, out, row, memory, z, prediction)
            m = _probe(predict, trial, row, noise, prediction)
            extra_calls += 1
        if m is not None and fix.m_gain:
            out = out - row.per_eps * fix.m_gain * m
        x, memory = _update(x_in, out, row, memory, z, prediction)
        eps = eps_from_output(out, x_in, step.abar_call, prediction)
        yield State(call, step, x_in, raw, eps, x, memory, m, extra_calls)


@dataclass(frozen=True, slots=True)
class _Row:
    """One call, ready to run: the step with var and gain folded in, the fix with its arrays shaped to broadcast.

    draws: the sampler draws noise here even if a correction absorbs all of it, so that runs with and without
    corrections use the same noise. per_eps: what a change of eps is in units of the output. renoise: signal and noise
    amplitude that take the updated state back for a probe.
    """

    step: Step
    fix: StepFix
    t: float
    adds: bool
    draws: bool
    per_eps: float
    renoise: tuple[float, float] | None


def _rows(
    steps: Sequence[Step], fixes: Sequence[StepFix] | None, shape: Sequence[int], prediction: Prediction
) -> list[_Row]:
    if fixes is None:
        fixes = [StepFix()] * len(steps)
    if len(fixes) != len(steps):
        raise ScheduleError(
            f"correction table: {len(fixes)} rows, the sampler makes {len(steps)} calls. Fit it for this schedule."
        )
    rows = []
    for call, (step, fix) in enumerate(zip(steps, fixes, strict=True)):
        for name in ("abar", "abar_next"):
            wanted = getattr(fix, name)
            assert wanted in (None, getattr(step, name)), (
                f"row {call}: {name} {wanted}: make the steps with fixed_steps"
            )
        rows.append(
            _Row(
                step=amplify(absorb(step, fix.var, fix.coef), fix.gain),
                fix=_shaped(fix, call, tuple(shape[1:])),
                t=step.t if fix.t_model is None else fix.t_model,
                adds=not _is(fix.x_add, 0.0),
                draws=step.std > 0,
                per_eps=output_per_eps(step.abar_call, prediction),
                renoise=_renoise(step, fix, call) if fix.refresh else None,
            )
        )
    return rows


def _renoise(step: Step, fix: StepFix, call: int) -> tuple[float, float]:
    """x' -> sqrt(r) x' + sqrt(1 - r) e1, r = abar / abar', abar' what scale and x_mul leave of the target's signal."""
    reached = step.abar_next * (step.scale * fix.x_mul) ** 2
    if step.base == "saved" or reached <= step.abar:
        raise ScheduleError(f"correction row {call}: refresh needs an update that removes noise, this one does not.")
    ratio = step.abar / reached
    return math.sqrt(ratio), math.sqrt(1 - ratio)


def _shaped(fix: StepFix, call: int, latent: tuple[int, ...]) -> StepFix:
    """The fix with per-channel arrays as (C, 1, 1), after a check of every shape against the latent's (C, H, W)."""
    c = latent[0]
    allowed = {
        "x_add": ((c,), latent),
        "a": ((c,), (c, c)),
        "b": ((c,), latent),
        "f": ((c, 2 * c, 3, 3),),
        "x_sub": ((c,), latent),
        "m_ref": ((c,),),
    }
    changed = {}
    for name, shapes in allowed.items():
        value = getattr(fix, name)
        if getattr(value, "ndim", 0) == 0:
            continue
        if tuple(value.shape) not in shapes:
            raise ScheduleError(
                f"correction row {call}: {name} has shape {tuple(value.shape)}, a latent of {latent} takes "
                f"{' or '.join(map(str, shapes))}. Fit the table for this network."
            )
        if value.ndim == 1:
            changed[name] = value.reshape(c, 1, 1)
    return replace(fix, **changed) if changed else fix


def _mapped(raw: Array, x: Array, fix: StepFix) -> Array:
    """a q + b where the mask lets it, plus the filter over [q, x]; the raw output itself if the row has none."""
    out = raw
    if not _is(fix.a, 1.0):
        out = _mixed(fix.a, raw) if getattr(fix.a, "ndim", 0) == 2 else fix.a * raw
    if not _is(fix.b, 0.0):
        out = out + fix.b
    if fix.thr and out is not raw:
        size = abs(raw)
        level = fix.thr * size.mean(axis=(1, 2, 3), keepdims=True)
        chosen = size >= level if fix.mask == "two-sided" else raw > level
        out = chosen * out + ~chosen * raw
    if fix.f is not None:
        out = out + _filtered(fix.f, raw, x)
    return out


def _mixed(weights: Array, planes: Array) -> Array:
    """Mix channels: (C, C) on (N, C, H, W)."""
    n, c, h, w = planes.shape
    return (weights @ planes.reshape(n, c, h * w)).reshape(n, -1, h, w)


def _filtered(kernel: Array, q: Array, x: Array) -> Array:
    """3x3 convolution of [q, x] (N, 2C, H, W) with (C, 2C, 3, 3), zero padding: tap by tap over whole planes, each then
    shifted into place, so that slices and products are all it takes, on any kind of array."""
    c, (h, w) = q.shape[1], q.shape[2:]
    taps = kernel.reshape(c, 2 * c, 9)
    out = _mixed(taps[:, :c, 4], q) + _mixed(taps[:, c:, 4], x)
    for tap in (0, 1, 2, 3, 5, 6, 7, 8):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        to = (..., slice(max(0, -dy), h - max(0, dy)), slice(max(0, -dx), w - max(0, dx)))
        of = (..., slice(max(0, dy), h + min(0, dy)), slice(max(0, dx), w + min(0, dx)))
        out[to] += (_mixed(taps[:, :c, tap], q) + _mixed(taps[:, c:, tap], x))[of]
    return out


def _update(
    x: Array, out: Array, row: _Row, memory: Memory, z: Array | None, prediction: Prediction
) -> tuple[Array, Memory]:
    """The sampler's update with the corrected output, then x_sub and x_mul."""
    x_next, memory = advance(x, out, row.step, memory, z, prediction=prediction)
    if not _is(row.fix.x_sub, 0.0):
        x_next = x_next - row.fix.x_sub
    if row.fix.x_mul != 1:
        x_next = row.fix.x_mul * x_next
    return x_next, memory


def _probe(predict: EpsModel, x: Array, row: _Row, noise: NoiseSource, prediction: Prediction) -> Array | float:
    """Put known noise e1 on the updated state and see what the network makes of it: m = pool(eps - e1) - m_ref."""
    assert row.renoise is not None
    signal, amplitude = row.renoise
    pooled = {"axis": (2, 3), "keepdims": True}
    e1 = noise.probe()
    if row.fix.m_pool == "sample-channel":
        e1 = e1 - e1.mean(**pooled)
    x = signal * x + amplitude * e1
    out = _mapped(predict(x, row.t), x, row.fix)
    gap = eps_from_output(out, x, row.step.abar, prediction) - e1
    m = gap.mean(**pooled) if row.fix.m_pool == "sample-channel" else float(gap.mean())
    return m if _is(row.fix.m_ref, 0.0) else m - row.fix.m_ref


def _is(value: Array | float, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number

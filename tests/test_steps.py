"""Sampler rows against diffusers' schedulers over full trajectories, closed forms, and refusals."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from qncd_deploy.errors import ScheduleError
from qncd_deploy.schedule import SCHEDULERS, SPACINGS, Schedule
from qncd_deploy.steps import (
    Memory,
    SamplerConfig,
    absorb,
    advance,
    amplify,
    eps_from_output,
    initial_scale,
    make_steps,
    output_per_eps,
    x0_from_output,
)

CLASSES = {
    "ddim": ("scheduling_ddim", "DDIMScheduler"),
    "ddpm": ("scheduling_ddpm", "DDPMScheduler"),
    "plms": ("scheduling_pndm", "PNDMScheduler"),
    "dpmpp-2m": ("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"),
    "euler": ("scheduling_euler_discrete", "EulerDiscreteScheduler"),
    "euler-a": ("scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler"),
}
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 4, 4)


class _Double:
    """A library in which float32 means float64: diffusers' own lines, run in double precision."""

    def __init__(self, library):
        self._library = library

    def __getattr__(self, name):
        return getattr(self._library, "float64" if name == "float32" else name)


@pytest.fixture
def diffusers_in_double(monkeypatch):
    """(scheduler name, config) -> the diffusers scheduler, computing in float64, fed with our noise."""
    torch = pytest.importorskip("torch", reason="diffusers' schedulers need torch")
    pytest.importorskip("diffusers", reason="the reference is diffusers' own schedulers")
    import importlib

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)

    def make(name, config, noises=()):
        module = importlib.import_module(f"diffusers.schedulers.{CLASSES[name][0]}")
        monkeypatch.setattr(module, "torch", _Double(torch))
        monkeypatch.setattr(module, "np", _Double(np))
        queue = iter(noises)
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_a, **_k: torch.from_numpy(next(queue)))
        return getattr(module, CLASSES[name][1]).from_config(config)

    yield make
    torch.set_default_dtype(default)


def network(x, t):
    """Nonlinear, mixes channels and neighbours, depends on t; bounded, so that trajectories stay comparable."""
    return np.tanh(0.9 * x + 0.3 * np.roll(x, 1, axis=1) - 0.2 * np.roll(x, 1, axis=2)) + 0.1 * math.sin(0.01 * t)


def diffusers_trajectory(scheduler, n_steps, z, eta):
    import torch

    scheduler.set_timesteps(n_steps)
    x = torch.from_numpy(z) * scheduler.init_noise_sigma
    states, times = [], []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        out = torch.from_numpy(network(seen.numpy(), float(t)))
        x = scheduler.step(out, t, x, **({"eta": eta} if eta else {})).prev_sample
        states.append(x.numpy())
        times.append(float(t))
    return states, times


def our_trajectory(schedule, config, z, noises):
    """The state in the coordinates of diffusers: y = x / a for the Euler samplers, and the result as it is."""
    x, memory, queue = z * initial_scale(schedule, config), Memory(), iter(noises)
    states, times = [], []
    steps = make_steps(schedule, config)
    for step in steps:
        out = network(x, step.t)
        noise = next(queue) if step.std else None
        x, memory = advance(x, out, step, memory, noise, prediction=schedule.prediction)
        inside = config.scheduler.startswith("euler") and step is not steps[-1]
        states.append(x / math.sqrt(step.abar_next) if inside else x)
        times.append(step.t)
    return states, times


def compare(make, name, options, n_steps, eta=0.0):
    config = BETAS | {"_class_name": CLASSES[name][1]} | options
    if name == "plms":
        config |= {"skip_prk_steps": True}
    rng = np.random.default_rng(n_steps)
    z = rng.standard_normal(SHAPE)
    noises = list(rng.standard_normal((n_steps + 1, *SHAPE)))
    reference, reference_times = diffusers_trajectory(make(name, config, noises), n_steps, z, eta)
    schedule = Schedule.from_diffusers(config)
    ours, times = our_trajectory(schedule, SamplerConfig(name, n_steps, eta), z, noises)
    assert times == pytest.approx(reference_times, abs=1e-9)
    assert len(ours) == len(reference)
    # Both sides are float64. A rounding of 1e-16 is divided by a >= 0.06 once a step and carried by a network of
    # slope below 1.5: 1e-10 of the largest state leaves a factor of 1e4 and is far below any wrong coefficient.
    # diffusers' ddpm never lets the variance fall below 1e-20: noise of 1e-10 in a last step that should have none.
    floor = 1e-10 * np.abs(noises).max() if name == "ddpm" else 0.0
    for ours_now, reference_now in zip(ours, reference, strict=True):
        atol = floor + 1e-10 * max(1, np.abs(reference_now).max())
        np.testing.assert_allclose(ours_now, reference_now, rtol=0, atol=atol)


PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = (1, 2, 3, 7, 20, 30, 50)  # 3, 7 and 30 do not divide 1000


SUPPORTED = [  # what diffusers implements: no x_0-prediction for these two samplers
    (name, prediction)
    for name, prediction in itertools.product(CLASSES, PREDICTIONS)
    if not (prediction == "sample" and name in ("plms", "euler-a"))
]


@pytest.mark.parametrize("n_steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("name", "prediction"), SUPPORTED)
def test_trajectory_equals_diffusers(diffusers_in_double, name, prediction, spacing, n_steps):
    options = {"prediction_type": prediction, "timestep_spacing": spacing, "clip_sample": False, "steps_offset": 1}
    if name == "ddim":
        options["set_alpha_to_one"] = False
    compare(diffusers_in_double, name, options, n_steps)


@pytest.mark.parametrize("n_steps", [7, 20])
@pytest.mark.parametrize(
    ("name", "eta", "options"),
    [
        ("ddim", 1.0, {"clip_sample": False}),
        ("ddim", 0.5, {"clip_sample": True, "clip_sample_range": 0.8}),
        ("ddim", 0.0, {"clip_sample": True, "prediction_type": "sample"}),
        ("ddim", 0.7, {"clip_sample": True, "prediction_type": "v_prediction", "set_alpha_to_one": False}),
        ("ddpm", 0.0, {"clip_sample": True}),
        ("ddpm", 0.0, {"clip_sample": True, "clip_sample_range": 0.5, "prediction_type": "v_prediction"}),
        ("ddpm", 0.0, {"variance_type": "fixed_large", "clip_sample": False}),
        ("ddpm", 0.0, {"variance_type": "fixed_small_log", "clip_sample": False}),
        ("ddpm", 0.0, {"beta_schedule": "sigmoid", "beta_end": 0.01}),
        ("plms", 0.0, {"set_alpha_to_one": True}),
        ("dpmpp-2m", 0.0, {"final_sigmas_type": "sigma_min"}),
        ("dpmpp-2m", 0.0, {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmpp-2m", 0.0, {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmpp-2m", 0.0, {"beta_schedule": "squaredcos_cap_v2"}),
        ("euler", 0.0, {"final_sigmas_type": "sigma_min"}),
        ("euler", 0.0, {"beta_schedule": "squaredcos_cap_v2"}),
        ("euler-a", 0.0, {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    ],
)
def test_options_equal_diffusers(diffusers_in_double, name, eta, options, n_steps):
    compare(diffusers_in_double, name, {"steps_offset": 0} | options, n_steps, eta)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp-2m", "euler", "euler-a"])
def test_zero_terminal_snr_equals_diffusers(diffusers_in_double, name):
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    compare(diffusers_in_double, name, options, 20)


@pytest.mark.parametrize(("n_steps", "last"), [(20, 1), (50, 1), (7, 1), (1000 // 3, 1)])
def test_compvis_timesteps(n_steps, last):
    schedule = Schedule.scaled_linear(0.0015, 0.0195)
    steps = make_steps(schedule, SamplerConfig("ddim", n_steps))
    stride = 1000 // n_steps
    assert [s.t for s in steps] == [1 + stride * i for i in range(n_steps)][::-1]
    assert steps[-1].t == last
    assert steps[-1].abar_next == schedule.alphas_cumprod[0]


def test_plms_visits_its_second_timestep_twice():
    steps = make_steps(Schedule.scaled_linear(0.0015, 0.0195), SamplerConfig("plms", 20))
    assert [s.t for s in steps[:4]] == [951, 901, 901, 851]
    assert len(steps) == 21
    assert [s.push for s in steps[:3]] == [True, False, True]
    assert (steps[1].abar, steps[1].abar_next) == (steps[0].abar, steps[0].abar_next)


@pytest.mark.parametrize("n_steps", [5, 20])
def test_gaussian_data_closed_form(n_steps):
    """On N(0, I) data the ideal eps is b x, and a deterministic step turns x by cos(theta - theta'), a = cos theta."""
    schedule = Schedule.linear(0.0001, 0.02)
    rng = np.random.default_rng(0)
    for step in make_steps(schedule, SamplerConfig("ddim", n_steps)):
        x = rng.standard_normal(SHAPE)
        x_next, _ = advance(x, step.b * x, step)
        turn = math.acos(step.a) - math.acos(math.sqrt(step.abar_next))
        np.testing.assert_allclose(x_next, math.cos(turn) * x, rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_eps_gain_is_the_derivative(name):
    steps = make_steps(Schedule.scaled_linear(0.0015, 0.0195), SamplerConfig(name, 10))
    rng = np.random.default_rng(0)
    memory = Memory()
    for step in steps:
        x, eps, z = rng.standard_normal((3, *SHAPE))
        moved, _ = advance(x, eps + 1.0, step, memory, z)
        still, memory = advance(x, eps, step, memory, z)
        # differences of numbers of size 30 at most (1 / a of the first step)
        np.testing.assert_allclose(moved - still, step.eps_gain, rtol=0, atol=1e-12 * 30)


def test_absorb_keeps_the_total_variance_or_recomputes_the_direction():
    step = make_steps(Schedule.scaled_linear(0.0015, 0.0195), SamplerConfig("ddim", 20, eta=1.0))[10]
    var = 0.3 * step.std**2 / step.eps_gain**2
    paper, code = absorb(step, var), absorb(step, var, "s_eff")
    assert paper.std**2 + step.eps_gain**2 * var == pytest.approx(step.std**2, rel=1e-12)
    assert paper.eps_weight == step.eps_weight
    assert code.std == paper.std
    assert code.eps_weight**2 == pytest.approx(1 - step.abar_next - code.std**2, rel=1e-12)
    assert absorb(step, 1e9).std == 0
    assert absorb(step, 0.0) is step


def test_amplify_scales_the_increment_in_y():
    rng = np.random.default_rng(0)
    schedule = replace(Schedule.scaled_linear(0.0015, 0.0195), final_sigma="sigma_min")
    for name in ("ddim", "dpmpp-2m", "plms", "ddpm", "euler"):
        memory = Memory()
        for step in make_steps(schedule, SamplerConfig(name, 6)):
            x, eps, z = rng.standard_normal((3, *SHAPE))
            base = memory.base if step.base == "saved" else x
            scaled, _ = advance(x, eps, amplify(step, 1.25), memory, z)
            plain, memory = advance(x, eps, step, memory, z)
            a_next = math.sqrt(step.abar_next) * step.scale
            y, y_next = base / step.a, plain / a_next
            np.testing.assert_allclose(scaled / a_next, y + 1.25 * (y_next - y), rtol=0, atol=1e-12 * np.abs(y).max())
            assert amplify(step, 1.0) is step


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_outputs_say_where_the_state_lies(prediction):
    """x_0 and eps of one output make up the state again, and eps moves as output_per_eps says."""
    rng = np.random.default_rng(0)
    out, x = rng.standard_normal((2, *SHAPE))
    eps, x0 = eps_from_output(out, x, 0.3, prediction), x0_from_output(out, x, 0.3, prediction)
    np.testing.assert_allclose(math.sqrt(0.3) * x0 + math.sqrt(0.7) * eps, x, atol=1e-14)
    moved = eps_from_output(out + 0.1 * output_per_eps(0.3, prediction), x, 0.3, prediction)
    np.testing.assert_allclose(moved - eps, 0.1, atol=1e-14)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_overrides_rebuild_the_weights(name):
    """A row told to aim elsewhere equals the row of a schedule that has this value there."""
    schedule = Schedule.scaled_linear(0.0015, 0.0195)
    config = SamplerConfig(name, 5)
    plain = make_steps(schedule, config)
    same = make_steps(schedule, config, abar=[s.abar for s in plain], abar_next=[None] * len(plain))
    assert same == plain
    aims = [None, None, 0.5 * (1 + plain[2].abar_next)] + [None] * (len(plain) - 3)
    moved = make_steps(schedule, config, abar_next=aims)
    assert [i for i, (p, m) in enumerate(zip(plain, moved, strict=True)) if p != m] == [2]
    eps = np.full(SHAPE, 0.3)
    x = math.sqrt(plain[2].abar) * 0.7 + plain[2].b * eps  # x_0 = 0.7 everywhere
    memory = Memory((eps,) * (len(plain[2].mix) - 1), np.full(SHAPE, 0.7), x)
    x_next, _ = advance(x, eps, replace(moved[2], std=0.0), memory)
    if name not in ("ddpm", "euler-a"):  # without its noise a stochastic row does not stay on the line
        target = moved[2].abar_next
        np.testing.assert_allclose(x_next, math.sqrt(target) * 0.7 + math.sqrt(1 - target) * 0.3, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_torch_tensors_take_the_same_update(prediction):
    torch = pytest.importorskip("torch", reason="checks that device arrays pass")
    rng = np.random.default_rng(0)
    for step in make_steps(replace(Schedule.scaled_linear(0.0015, 0.0195), clip_sample=1.0), SamplerConfig("ddim", 4)):
        x, out = rng.standard_normal((2, *SHAPE)).astype(np.float32)
        ours, _ = advance(x, out, step, prediction=prediction)
        theirs, _ = advance(torch.from_numpy(x), torch.from_numpy(out), step, prediction=prediction)
        assert theirs.dtype == torch.float32
        np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_float32_stays_float32(name):
    x = np.ones(SHAPE, np.float32)
    memory = Memory()
    for step in make_steps(Schedule.scaled_linear(0.0015, 0.0195), SamplerConfig(name, 5)):
        x, memory = advance(x, np.zeros_like(x), amplify(absorb(step, 1e-3), 1.01), memory, np.ones_like(x))
        assert x.dtype == np.float32


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (("heun", 20), "scheduler 'heun' is unknown, expected one of ddim, ddpm"),
        (("ddim", 0), "n_steps 0: sampling takes at least 1 step"),
        (("ddim", 20, -0.1), "the amount of noise cannot be negative"),
        (("ddim", 20, math.nan), "the amount of noise cannot be negative"),
        (("euler", 20, 0.5), "euler has no eta, only ddim does"),
        (("ddpm", 20, 1.0), "ddpm has no eta, only ddim does"),
        (("ddim", 1001), "the network was trained on 1000 timesteps"),
        (("ddim", 1000), "starts at timestep 1000, the network was trained on 0 .. 999"),
        (("dpmpp-2m", 1000), "would visit one twice"),
        (("ddim", 20, 5.0), "more noise than the state may hold"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(ScheduleError, match=words):
        make_steps(Schedule.scaled_linear(0.0015, 0.0195), SamplerConfig(*config))


def test_refuses_eps_at_zero_snr_and_plms_of_x0():
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ScheduleError, match="no signal left at t = 999"):
        make_steps(Schedule.from_diffusers(config), SamplerConfig("ddim", 20))
    with pytest.raises(ScheduleError, match="this network predicts x_0"):
        make_steps(Schedule.linear(0.0001, 0.02, prediction="sample"), SamplerConfig("plms", 20))


def test_every_number_of_steps_gives_falling_timesteps_or_a_refusal():
    for name, spacing in itertools.product(SCHEDULERS, SPACINGS):
        schedule = replace(Schedule.scaled_linear(0.0015, 0.0195), timestep_spacing=spacing)
        for n_steps in (*range(1, 41), 333, 499, 500, 501, 998, 999, 1000):
            try:
                steps = make_steps(schedule, SamplerConfig(name, n_steps))
            except ScheduleError:
                assert n_steps > 498 or (name, spacing) == ("plms", "quad")
                continue
            assert len({s.t for s in steps}) == n_steps
            assert all(math.isfinite(w) for s in steps for w in (*s.x0_weights, s.eps_weight, s.keep, s.std))
            assert all(s.abar_next >= s.abar for s in steps)

"""Schedules against diffusers' tables, JSON round trip, and refusals on their words."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest

from qncd_deploy.errors import ScheduleError
from qncd_deploy.schedule import Schedule, betas_of, scheduler_name_from_diffusers

PNDM_OF_STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
        ("DDPMScheduler", {"beta_schedule": "laplace"}),
        ("PNDMScheduler", {"skip_prk_steps": True, "num_train_timesteps": 400}),
        ("EulerDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DPMSolverMultistepScheduler", {"trained_betas": [0.01, 0.02, 0.05]}),
    ],
)
def test_table_equals_diffusers(name, options):
    diffusers = pytest.importorskip("diffusers", reason="the reference is diffusers' own table")
    reference = getattr(diffusers, name)(**options)
    ours = Schedule.from_diffusers({"_class_name": name} | options)
    assert ours.alphas_cumprod.dtype == np.float64
    # diffusers multiplies up to 1000 float32 factors, each rounded by 2^-24: 1000 * 2^-24 relative at worst. With
    # zero terminal SNR the shifted roots lose this much of the first root, an absolute error instead.
    np.testing.assert_allclose(
        ours.alphas_cumprod, reference.alphas_cumprod.double().numpy(), rtol=1000 * 2.0**-24, atol=1e-6
    )


def test_compvis_linear_is_scaled_linear():
    """The recipe of CompVis' make_beta_schedule("linear"), and its DDIM's last target."""
    schedule = Schedule.scaled_linear(0.0015, 0.0195)
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=np.float64) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-13)
    assert schedule.final_abar == schedule.alphas_cumprod[0]
    assert (schedule.timestep_spacing, schedule.steps_offset, schedule.clip_sample) == ("leading", 1, None)


def test_missing_options_take_the_defaults_of_the_class_that_samples():
    ddim = Schedule.from_diffusers({"_class_name": "DDIMScheduler"})
    assert (ddim.final_abar, ddim.clip_sample, ddim.timestep_spacing) == (1.0, 1.0, "leading")
    plms = Schedule.from_diffusers(PNDM_OF_STABLE_DIFFUSION)
    assert (plms.final_abar, plms.clip_sample, plms.steps_offset) == (plms.alphas_cumprod[0], None, 1)
    euler = Schedule.from_diffusers(PNDM_OF_STABLE_DIFFUSION, scheduler="euler")
    assert (euler.timestep_spacing, euler.final_sigma) == ("linspace", "zero")
    # another sampler's unimplemented option does not stand in the way
    prk = PNDM_OF_STABLE_DIFFUSION | {"skip_prk_steps": False}
    assert Schedule.from_diffusers(prk, scheduler="ddim").steps_offset == 1


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_scheduler_names(class_name):
    diffusers = pytest.importorskip("diffusers", reason="checks that the classes exist under these names")
    assert hasattr(diffusers, class_name)
    assert scheduler_name_from_diffusers(class_name) in ("ddim", "ddpm", "plms")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding is true, which ddim does not implement"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, 'variance_type is "learned_range"'),
        ({"_class_name": "PNDMScheduler"}, r"skip_prk_steps is false.*expected true"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "algorithm_type is"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order is 3.*expected 2"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped is -5.1"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas is true"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type is"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "prediction is 'flow_prediction'"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "log"}, "timestep_spacing is 'log', expected one of"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "magic"}, "beta_schedule 'magic' is unknown"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 1.5]}, "numbers between 0 and 1"),
        ({"_class_name": "UniPCMultistepScheduler"}, "Choose one of ddim, ddpm, plms"),
        ({}, "_class_name 'None' is none of"),
    ],
)
def test_refuses_what_it_does_not_implement(config, words):
    with pytest.raises(ScheduleError, match=words):
        Schedule.from_diffusers(config)


def test_every_refused_option_exists_in_diffusers():
    """A renamed option would be ignored in silence; so each name must be an argument of its class, with our default."""
    diffusers = pytest.importorskip("diffusers", reason="reads the signatures of diffusers' schedulers")
    import inspect

    schedule = importlib.import_module("qncd_deploy.schedule")
    for class_name, name in schedule._DIFFUSERS_CLASSES.items():
        arguments = inspect.signature(getattr(diffusers, class_name)).parameters
        for option, (default, _) in schedule._REFUSED[name].items():
            assert arguments[option].default in (default, None), (class_name, option)


def test_unknown_class_needs_betas():
    with pytest.raises(ScheduleError, match="FlowMatchEulerDiscreteScheduler names no beta_schedule; ddim needs one"):
        Schedule.from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler"}, scheduler="ddim")
    unipc = {"_class_name": "UniPCMultistepScheduler", "beta_schedule": "linear"}
    assert Schedule.from_diffusers(unipc, scheduler="ddim").alphas_cumprod.size == 1000


def test_json_round_trip_and_hash():
    schedule = replace(Schedule.scaled_linear(0.0015, 0.0195, prediction="v_prediction"), clip_sample=1.5)
    again = Schedule.from_json(json.loads(json.dumps(schedule.to_json())))
    assert again.sha256() == schedule.sha256()
    np.testing.assert_array_equal(again.alphas_cumprod, schedule.alphas_cumprod)
    assert replace(schedule, clip_sample=None).sha256() != schedule.sha256()
    with pytest.raises(ScheduleError, match=r"fields \['shift'\] are missing or unknown"):
        Schedule.from_json(schedule.to_json() | {"shift": 3})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alphas_cumprod": np.array([0.5, 0.9])}, "never rise with t"),
        ({"alphas_cumprod": np.array([0.5, np.nan])}, "must be finite"),
        ({"alphas_cumprod": np.zeros((2, 2))}, r"shape \(2, 2\)"),
        ({"steps_offset": -1}, "steps_offset -1"),
        ({"final_abar": 0.0}, "final_abar 0.0"),
        ({"clip_sample": 0.0}, "clip_sample 0.0"),
        ({"prediction": "eps"}, "prediction is 'eps', expected one of epsilon, v_prediction, sample"),
    ],
)
def test_refuses_impossible_values(change, words):
    with pytest.raises(ScheduleError, match=words):
        replace(Schedule.linear(0.0001, 0.02), **change)


def test_betas_need_a_timestep():
    with pytest.raises(ScheduleError, match="0 training timesteps"):
        betas_of("linear", 0.1, 0.2, 0)

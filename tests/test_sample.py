"""The host loop: order of one iteration against a plain transcription, identity, noise by call, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qncd_deploy.correct.record import StepFix, fixed_steps
from qncd_deploy.errors import ScheduleError
from qncd_deploy.sample import PictureNoise, denoise, rollout
from qncd_deploy.schedule import SCHEDULERS, Schedule
from qncd_deploy.steps import SamplerConfig, make_steps

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
SHAPE = (3, 5, 4)
N = 2


def network(x, t):
    return np.tanh(0.8 * x + 0.2 * np.roll(x, 1, axis=1) + 0.1 * np.roll(x, 1, axis=3)) + np.float32(0.1 * math.sin(t))


def run(fixes=None, name="ddim", n_steps=12, eta=0.0, prediction="epsilon", predict=network, steps=None, seed=5):
    noise = PictureNoise(seed, range(N), SHAPE)
    if steps is None:
        config = SamplerConfig(name, n_steps, eta)
        steps = make_steps(SCHEDULE, config) if fixes is None else fixed_steps(SCHEDULE, config, fixes)
    return list(denoise(predict, noise.initial(), steps, noise=noise, fixes=fixes, prediction=prediction))


def one_row(call, count, **values):
    return [StepFix(**values) if i == call else StepFix() for i in range(count)]


# ---------------------------------------------------------------- identity and plain runs


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_default_rows_change_nothing_bit_for_bit(name, prediction):
    plain = run(name=name, prediction=prediction)
    identity = run([StepFix()] * len(plain), name=name, prediction=prediction)
    for left, right in zip(plain, identity, strict=True):
        assert left.x.dtype == np.float32
        np.testing.assert_array_equal(left.x, right.x)
        np.testing.assert_array_equal(left.eps, right.eps)
    assert plain[-1].extra_calls == 0
    assert [s.call for s in plain] == list(range(len(plain)))


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_eps_is_what_the_output_stands_for(prediction):
    """In the noise-free state x = a x_0 + b eps, an oracle of any kind leads to the same trajectory."""
    x0 = np.linspace(-1, 1, N * np.prod(SHAPE), dtype=np.float32).reshape(N, *SHAPE)
    table = {s.t: (s.a, s.b) for s in make_steps(SCHEDULE, SamplerConfig("ddim", 8))}

    def oracle(kind):
        def predict(x, t):
            a, b = table[t]
            eps = (x - a * x0) / b
            return {"epsilon": eps, "v_prediction": a * eps - b * x0, "sample": x0}[kind].astype(np.float32)

        return predict

    reference = run(predict=oracle("epsilon"), n_steps=8)
    for left, right in zip(reference, run(predict=oracle(prediction), n_steps=8, prediction=prediction), strict=True):
        # a few float32 roundings of numbers up to 4, divided by a or b (0.07 at least) once per step
        np.testing.assert_allclose(left.x, right.x, atol=8 * 4 * 2.0**-24 / 0.03)
        np.testing.assert_allclose(left.eps, right.eps, atol=8 * 4 * 2.0**-24 / 0.03**2)


# ---------------------------------------------------------------- every field, against a transcription


def filtered(kernel, planes):
    """Direct 3x3 sum with zero padding: the slow definition."""
    n, _, h, w = planes.shape
    padded = np.pad(planes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((n, kernel.shape[0], h, w))
    for y in range(h):
        for x in range(w):
            out[:, :, y, x] = np.einsum("oikl,nikl->no", kernel, padded[:, :, y : y + 3, x : x + 3])
    return out


def transcription(fixes, schedule, n_steps, eta, seed):
    """The iteration as it is published, in float64 and DDIM only, written out without any of the package's loop."""
    noise = PictureNoise(seed, range(N), SHAPE)
    x = noise.initial().astype(np.float64)
    abar = schedule.alphas_cumprod
    stride = 1000 // n_steps
    times = [1 + stride * i for i in range(n_steps)][::-1]
    m, states = 0.0, []

    def channels(v):
        return np.asarray(v, np.float64).reshape(-1, 1, 1) if np.ndim(v) == 1 else np.asarray(v, np.float64)

    for t, fix in zip(times, fixes, strict=True):
        at = abar[t] if fix.abar is None else fix.abar
        ap = (abar[t - stride] if t >= stride else abar[0]) if fix.abar_next is None else fix.abar_next
        tt = t if fix.t_model is None else fix.t_model
        s = eta * math.sqrt((1 - ap) / (1 - at) * (1 - at / ap))
        a_coef = math.sqrt(ap / at)
        b_coef = math.sqrt(1 - ap - s**2) - math.sqrt(ap * (1 - at) / at)

        def affine(q, x_in, fix=fix):
            mapped = np.einsum("dc,nchw->ndhw", fix.a, q) if np.ndim(fix.a) == 2 else channels(fix.a) * q
            mapped = mapped + channels(fix.b)
            if fix.thr:
                level = fix.thr * np.abs(q).mean(axis=(1, 2, 3), keepdims=True)
                mapped = np.where(np.abs(q) >= level if fix.mask == "two-sided" else q > level, mapped, q)
            return mapped if fix.f is None else mapped + filtered(fix.f, np.concatenate([q, x_in], axis=1))

        x_in = x + channels(fix.x_add)
        eps0 = affine(network(x_in, tt), x_in)
        if fix.z_std:
            eps0 = eps0 + fix.z_std * noise.probe()
        s_eff = math.sqrt(max(0, s**2 - b_coef**2 * fix.var))
        b_used = b_coef
        if fix.coef == "s_eff" and fix.var:
            b_used = math.sqrt(1 - ap - s_eff**2) - math.sqrt(ap * (1 - at) / at)
        z = noise.step() if s else 0.0

        def update(eps, x_in=x_in, fix=fix, at=at, ap=ap, a=a_coef, b=b_used, s=s_eff, z=z):
            y, y_next = x_in / math.sqrt(at), (a * x_in + b * eps + s * z) / math.sqrt(ap)
            return fix.x_mul * (math.sqrt(ap) * (y + fix.gain * (y_next - y)) - channels(fix.x_sub))

        if fix.refresh:
            trial = update(eps0)
            e1 = noise.probe().astype(np.float64)
            if fix.m_pool == "sample-channel":
                e1 = e1 - e1.mean(axis=(2, 3), keepdims=True)
            level = ap * fix.x_mul**2
            x_re = math.sqrt(at / level) * trial + math.sqrt(1 - at / level) * e1
            gap = affine(network(x_re, tt), x_re) - e1
            m = gap.mean() if fix.m_pool == "batch" else gap.mean(axis=(2, 3), keepdims=True)
            m = m - channels(fix.m_ref)
        eps = eps0 - fix.m_gain * m
        x = update(eps)
        states.append((x, eps))
    return states


RNG = np.random.default_rng(3)
C = SHAPE[0]
ROWS = {
    "t_model": {"t_model": 400.0},
    "abar": {"abar": 0.2},
    "abar_next": {"abar_next": 0.55},
    "x_add per channel": {"x_add": RNG.normal(size=C)},
    "x_add map": {"x_add": RNG.normal(size=SHAPE)},
    "a number": {"a": 0.9},
    "a per channel": {"a": RNG.normal(size=C)},
    "a mixing": {"a": RNG.normal(size=(C, C))},
    "b number": {"b": 0.2},
    "b per channel": {"b": RNG.normal(size=C)},
    "b map": {"b": RNG.normal(size=SHAPE)},
    "filter": {"f": 0.1 * RNG.normal(size=(C, 2 * C, 3, 3))},
    "mask two-sided": {"a": 0.8, "b": 0.1, "thr": 1.1},
    "mask one-sided": {"a": 0.8, "thr": 0.9, "mask": "one-sided"},
    "var": {"var": 0.02},
    "var, released code": {"var": 0.02, "coef": "s_eff"},
    "var above all noise": {"var": 50.0},
    "gain": {"gain": 1.3},
    "z_std": {"z_std": 0.2},
    "x_mul": {"x_mul": 0.95},
    "x_sub": {"x_sub": RNG.normal(size=C)},
    "refresh, batch": {"refresh": True, "m_pool": "batch"},
    "refresh, sample-channel": {"refresh": True, "m_ref": RNG.normal(size=C)},
    "refresh, gain": {"refresh": True, "m_gain": 0.4},
    "everything": {
        "t_model": 480.0,
        "x_add": RNG.normal(size=C),
        "a": np.eye(C) + 0.1 * RNG.normal(size=(C, C)),
        "b": RNG.normal(size=C),
        "f": 0.1 * RNG.normal(size=(C, 2 * C, 3, 3)),
        "thr": 0.5,
        "var": 0.01,
        "gain": 1.1,
        "z_std": 0.1,
        "x_mul": 0.99,
        "x_sub": 0.1,
        "refresh": True,
        "m_ref": RNG.normal(size=C),
        "m_gain": 0.7,
    },
}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_field_does_what_it_says(row, eta):
    fixes = one_row(5, 12, **row)
    ours = run(fixes, eta=eta)
    plain = run(eta=eta)
    reference = transcription(fixes, SCHEDULE, 12, eta, seed=5)
    for state, (x, eps) in zip(ours, reference, strict=True):
        # float32 against float64: a dozen operations a step, each rounding numbers of size <= 30 by 2^-24, amplified
        # by at most 15 in the first step and by about 1 later
        np.testing.assert_allclose(state.x, x, rtol=0, atol=12 * 30 * 2.0**-24 * 12)
        np.testing.assert_allclose(state.eps, eps, rtol=0, atol=12 * 30 * 2.0**-24 * 12)
    inert = eta == 0 and "var" in row and len(row) < 4  # nothing to absorb without noise
    assert inert or np.abs(ours[5].x - plain[5].x).max() > 1e-3
    assert ours[-1].extra_calls == int(bool(row.get("refresh")))


def test_m_stays_until_the_next_refresh():
    fixes = [StepFix(refresh=i in (3, 7)) for i in range(12)]
    states = run(fixes)
    assert [s.m is None for s in states] == [True] * 3 + [False] * 9
    assert all(np.array_equal(states[i].m, states[3].m) for i in range(3, 7))
    assert not np.array_equal(states[7].m, states[3].m)
    assert [s.extra_calls for s in states] == [0] * 3 + [1] * 4 + [2] * 5
    np.testing.assert_array_equal(states[5].eps, states[5].raw - states[3].m)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_m_is_subtracted_in_eps(prediction):
    """For any prediction type, the eps in use lies m below the eps of the raw output."""
    states = run([StepFix(refresh=i == 3, m_gain=0.5) for i in range(12)], prediction=prediction)
    for state in states[3:]:
        step = state.step
        if prediction == "v_prediction":
            raw_eps = step.a * state.raw + step.b * state.x_in
        else:
            raw_eps = (state.x_in - step.a * state.raw) / step.b
        # numbers up to 10, a few roundings, divided by b >= 0.07
        np.testing.assert_allclose(raw_eps - state.eps, np.broadcast_to(0.5 * state.m, raw_eps.shape), atol=1e-4)


def test_plms_history_holds_the_corrected_output_once():
    """After a refresh at call 4 the multistep mix at call 5 uses call 4's corrected eps, and only that one."""
    fixes = [StepFix(refresh=i == 4) for i in range(9)]
    states = run(fixes, name="plms", n_steps=8)
    eps = [states[i].eps.astype(np.float64) for i in (5, 4, 3, 2)]
    mixed = (55 * eps[0] - 59 * eps[1] + 37 * eps[2] - 9 * eps[3]) / 24
    step, x = states[5].step, states[5].x_in
    direction = math.sqrt(1 - step.abar_next) - math.sqrt(step.abar_next * (1 - step.abar) / step.abar)
    expected = math.sqrt(step.abar_next / step.abar) * x + direction * mixed
    np.testing.assert_allclose(states[5].x, expected, atol=100 * 2.0**-24 * 10)
    assert np.abs(states[4].eps - states[4].raw).max() > 1e-3


def test_plms_second_call_is_seen_from_the_target():
    """Its base is the saved state, but its output belongs to the state and the timestep that the network saw."""
    state = run(name="plms", n_steps=8, prediction="v_prediction")[1]
    abar = SCHEDULE.alphas_cumprod[int(state.step.t)]
    expected = math.sqrt(abar) * state.raw + math.sqrt(1 - abar) * state.x_in
    np.testing.assert_allclose(state.eps, expected, atol=4 * 8 * 2.0**-24)  # a few roundings of numbers up to 8


def test_an_absorbed_row_still_draws_its_noise():
    """Runs with and without corrections share the sampler's noise: the correction of one row leaves others' alone."""
    plain = run(eta=1.0)
    silent = run(one_row(2, 12, var=1e6), eta=1.0)
    assert silent[2].step.std == 0
    used = [
        (s.x - s.step.keep * s.x_in - s.step.x0_weights[0] * (s.x_in - s.step.b * s.eps) / s.step.a
         - s.step.eps_weight * s.eps) / s.step.std
        for s in (plain[4], silent[4])
    ]  # fmt: skip
    np.testing.assert_allclose(used[0], used[1], atol=1e-3)


def test_a_probe_does_not_shift_the_samplers_noise():
    measured = run([StepFix(refresh=True, m_gain=0.0)] * 11 + [StepFix(m_gain=0.0)], eta=1.0)
    for left, right in zip(run(eta=1.0), measured, strict=True):
        np.testing.assert_array_equal(left.x, right.x)
    assert measured[-1].extra_calls == 11


def test_arguments_are_left_alone():
    noise = PictureNoise(0, range(N), SHAPE)
    x = noise.initial()
    before = x.copy()
    list(denoise(network, x, make_steps(SCHEDULE, SamplerConfig("plms", 6)), noise=noise))
    np.testing.assert_array_equal(x, before)


def test_torch_tensors_pass_through_the_loop():
    torch = pytest.importorskip("torch", reason="checks that device arrays pass")

    class TorchNoise(PictureNoise):
        def step(self):
            return torch.from_numpy(super().step())

        def probe(self):
            return torch.from_numpy(super().probe())

    arrays = {k: v for k, v in ROWS["everything"].items() if k != "t_model"}
    fixes = one_row(4, 8, **arrays)
    on_torch = [
        replace(f, **{k: torch.from_numpy(getattr(f, k)) for k, v in arrays.items() if isinstance(v, np.ndarray)})
        if f.refresh
        else f
        for f in fixes
    ]
    noise = TorchNoise(5, range(N), SHAPE)
    steps = make_steps(SCHEDULE, SamplerConfig("ddim", 8, 1.0))
    tensors = denoise(
        lambda x, t: torch.from_numpy(network(x.numpy(), t)),
        torch.from_numpy(noise.initial()),
        steps,
        noise=noise,
        fixes=on_torch,
    )
    for ours, theirs in zip(run(fixes, n_steps=8, eta=1.0), tensors, strict=True):
        # sums in another order: the same bound as against float64
        np.testing.assert_allclose(ours.x, theirs.x.numpy(), rtol=0, atol=12 * 30 * 2.0**-24 * 12)


def test_float32_throughout():
    for row in ROWS.values():
        for state in run(one_row(5, 12, **row), eta=1.0):
            assert {state.x.dtype, state.eps.dtype, state.x_in.dtype} == {np.dtype(np.float32)}


def test_pictures_do_not_depend_on_the_batch():
    steps = make_steps(SCHEDULE, SamplerConfig("ddim", 10, 0.5))
    fixes = [StepFix(refresh=i == 6) for i in range(10)]
    loop = rollout(steps, seed=1, shape=SHAPE)
    *_, whole = loop(lambda _: network, range(5), fixes)
    *_, one = loop(lambda _: network, [3], fixes)
    np.testing.assert_array_equal(whole.x[3:4], one.x)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fixes", "words"),
    [
        ([StepFix()] * 3, "3 rows, the sampler makes 12 calls"),
        (one_row(2, 12, a=np.ones(4)), r"row 2: a has shape \(4,\), a latent of \(3, 5, 4\) takes \(3,\) or \(3, 3\)"),
        (one_row(0, 12, f=np.ones((3, 3, 3, 3))), r"row 0: f has shape \(3, 3, 3, 3\).*takes \(3, 6, 3, 3\)"),
        (one_row(1, 12, b=np.ones((3, 1, 1))), r"row 1: b has shape"),
        (one_row(4, 12, refresh=True, x_mul=0.5), "row 4: refresh needs an update that removes noise"),
    ],
)
def test_refuses_rows_that_do_not_fit(fixes, words):
    steps = make_steps(SCHEDULE, SamplerConfig("ddim", 12))
    with pytest.raises(ScheduleError, match=words):
        run(fixes, steps=steps)


def test_refuses_a_probe_in_plms_second_call():
    with pytest.raises(ScheduleError, match="row 1: refresh needs"):
        run([StepFix(refresh=i == 1) for i in range(9)], name="plms", n_steps=8)


def test_forgotten_overrides_are_a_bug():
    with pytest.raises(AssertionError, match="make the steps with fixed_steps"):
        run(one_row(2, 12, abar=0.3), steps=make_steps(SCHEDULE, SamplerConfig("ddim", 12)))

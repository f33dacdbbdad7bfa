"""Recording the float sampler's inputs, resuming after a kill, and the checks on a user's own file."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qncd_deploy.calib.trajectories import (
    FIRST_PICTURE,
    CalibSet,
    ConditionRows,
    Recipe,
    load_user_npz,
    record,
    recorded_calls,
)
from qncd_deploy.errors import CalibrationError
from qncd_deploy.files import save_npz
from qncd_deploy.sample import PictureNoise, denoise, guided
from qncd_deploy.schedule import Schedule
from qncd_deploy.specs import TensorSpec
from qncd_deploy.steps import SamplerConfig, initial_scale, make_steps

SHAPE = (2, 4, 4)
SIZE = 5
TOKENS = np.random.default_rng(0).normal(size=(SIZE, 3, 6)).astype(np.float32)
NULL = np.zeros((1, 3, 6), np.float32)


def tokens(given: np.ndarray, null: np.ndarray | None = None) -> ConditionRows:
    name = "encoder_hidden_states"
    return ConditionRows({name: given}, None if null is None else {name: null})


def recipe(**changes) -> Recipe:
    base = Recipe(
        model_sha256="0" * 64,
        schedule=Schedule.scaled_linear(0.0015, 0.0195, 1000),
        sampler=SamplerConfig("ddim", 6, eta=1.0),
        latent_shape=SHAPE,
        size=SIZE,
        calls=3,
        condition=tokens(TOKENS, NULL),
        guidance_scale=1.5,
        batch_size=2,
    )
    return replace(base, **changes)


class Network:
    """Row by row, so that results do not depend on the batch; counts its calls, and fails at one of them on request."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, x, t, cond):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        out = np.float32(0.5) * x + np.float32(1e-3 * t) * np.sin(x)
        return out if cond is None else out + cond["encoder_hidden_states"].mean(axis=(1, 2), keepdims=True)[..., None]


def test_recorded_rows_are_what_the_network_saw(tmp_path: Path) -> None:
    r = recipe()
    arrays = record(Network(), r, tmp_path).arrays
    steps = make_steps(r.schedule, r.sampler)
    calls = recorded_calls(len(steps), r.calls)
    assert calls == [1, 3, 5]
    noise = PictureNoise(r.seed, range(FIRST_PICTURE, FIRST_PICTURE + SIZE), SHAPE)
    x = noise.initial() * initial_scale(r.schedule, r.sampler)
    states = [
        *denoise(guided(Network(), r.condition.given, r.condition.null, 1.5), x, steps, noise=noise)
    ]  # all pictures in one batch
    rows = 2 * SIZE
    assert {name: array.shape for name, array in arrays.items()} == {
        "sample": (3 * rows, *SHAPE),
        "timestep": (3 * rows,),
        "encoder_hidden_states": (3 * rows, 3, 6),
    }
    assert all(array.dtype == np.float32 for array in arrays.values())
    for group, call in enumerate(calls):
        part = slice(group * rows, (group + 1) * rows)
        np.testing.assert_array_equal(arrays["sample"][part], np.concatenate([states[call].x_in] * 2))
        np.testing.assert_array_equal(arrays["timestep"][part], np.float32(steps[call].t))
        np.testing.assert_array_equal(arrays["encoder_hidden_states"][part][:SIZE], TOKENS)
        np.testing.assert_array_equal(arrays["encoder_hidden_states"][part][SIZE:], np.repeat(NULL, SIZE, axis=0))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"guidance_scale": 1.0}, {"sample", "timestep", "encoder_hidden_states"}),
        ({"condition": None}, {"sample", "timestep"}),
        (
            {"condition": tokens(TOKENS)},
            {"sample", "timestep", "encoder_hidden_states"},
        ),
    ],
)
def test_without_guidance_rows_are_not_doubled(changes: dict, names: set[str], tmp_path: Path) -> None:
    found = record(Network(), recipe(**changes), tmp_path)
    assert len(found) == 3 * SIZE and found.arrays.keys() == names


def test_class_labels_are_recorded_as_integers(tmp_path: Path) -> None:
    labels = np.arange(SIZE)

    def network(x, t, cond):
        return x * cond["class_labels"].reshape(-1, 1, 1, 1).astype(np.float32) / 10

    told = ConditionRows({"class_labels": labels}, {"class_labels": np.array([9])})
    arrays = record(network, recipe(condition=told), tmp_path).arrays
    assert arrays["class_labels"].dtype == np.int64
    np.testing.assert_array_equal(arrays["class_labels"][: 2 * SIZE], [*labels, *[9] * SIZE])


def test_conditions_of_several_inputs_are_recorded_side_by_side(tmp_path: Path) -> None:
    pooled = np.arange(2.0 * SIZE, dtype=np.float32).reshape(SIZE, 2)
    told = ConditionRows(
        {"encoder_hidden_states": TOKENS, "p": pooled}, {"encoder_hidden_states": NULL, "p": 9 + NULL[:, 0, :2]}
    )
    arrays = record(Network(), recipe(condition=told), tmp_path).arrays
    np.testing.assert_array_equal(arrays["p"][: 2 * SIZE], np.concatenate([pooled, np.full((SIZE, 2), 9)]))
    np.testing.assert_array_equal(
        arrays["encoder_hidden_states"], record(Network(), recipe(), tmp_path).arrays["encoder_hidden_states"]
    )
    assert recipe(condition=told).key != recipe().key


def test_the_key_of_a_recipe_outlives_versions() -> None:
    """Sets that were recorded before are found again."""
    assert recipe(condition=None).key == "d9ebe6db22428812"
    assert recipe(condition=tokens(np.ones((SIZE, 3, 6), np.float32), NULL)).key == "07c7c2a569df8d00"


@pytest.mark.parametrize("scheduler", ["plms", "euler", "dpmpp-2m", "ddpm"])
def test_every_kind_of_sampler_can_be_recorded(scheduler: str, tmp_path: Path) -> None:
    r = recipe(sampler=SamplerConfig(scheduler, 6))
    steps = make_steps(r.schedule, r.sampler)
    found = record(Network(), r, tmp_path)
    assert len(found) == 2 * SIZE * len(recorded_calls(len(steps), 3))


@pytest.mark.parametrize(
    ("n_calls", "wanted", "expected"),
    [(20, 20, range(20)), (20, 10, range(1, 20, 2)), (20, 50, range(20)), (20, 1, [19]), (20, 8, range(1, 20, 2))],
)
def test_recorded_calls_are_even_and_end_with_the_last(n_calls: int, wanted: int, expected: Sequence[int]) -> None:
    assert recorded_calls(n_calls, wanted) == list(expected)


def test_the_file_is_reused_and_its_bytes_are_reproducible(tmp_path: Path) -> None:
    r = recipe()
    first = record(Network(), r, tmp_path / "a")
    network = Network()
    again = record(network, r, tmp_path / "a")
    assert network.calls == 0 and again.key == first.key == r.key
    record(Network(), r, tmp_path / "b")
    one, other = (tmp_path / folder / f"calibration-{r.key}.npz" for folder in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [one.name]
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])


def test_a_broken_run_goes_on_where_it_was(tmp_path: Path) -> None:
    r, n_calls = recipe(), 6
    record(Network(), r, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        record(Network(fail_at=n_calls + 2), r, tmp_path / "broken")
    partial = tmp_path / "broken" / f"calibration-{r.key}.partial"
    assert [path.name for path in partial.iterdir()] == ["000.npz"]
    network, seen = Network(), []
    record(network, r, tmp_path / "broken", progress=lambda done, total: seen.append((done, total)))
    assert network.calls == 2 * n_calls  # of three batches, one was there
    assert seen[0] == (n_calls, 3 * n_calls) and seen[-1] == (3 * n_calls, 3 * n_calls)
    assert not partial.exists()
    name = f"calibration-{r.key}.npz"
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_killed_process_leaves_what_the_next_one_continues(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        import test_calib_trajectories as t
        class Killed(t.Network):
            def __call__(self, x, time, cond):
                if self.calls == 15:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(x, time, cond)
        t.record(Killed(), t.recipe(), Path(sys.argv[1]))
    """)
    root = Path(__file__).parents[1]
    environment = {"PYTHONPATH": f"{root}:{root / 'tests'}", "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    network = Network()
    found = record(network, recipe(), tmp_path)
    assert network.calls == 6 and len(found) == 2 * SIZE * 3
    assert [path.name for path in tmp_path.iterdir()] == [f"calibration-{recipe().key}.npz"]


def test_resume_off_starts_anew(tmp_path: Path) -> None:
    record(Network(), recipe(), tmp_path)
    network = Network()
    record(network, recipe(), tmp_path, resume=False)
    assert network.calls == 3 * 6


def test_the_key_covers_everything_that_decides_the_content() -> None:
    base = recipe()
    variants = [
        recipe(model_sha256="1" * 64),
        recipe(schedule=Schedule.linear(0.0015, 0.0195, 1000)),
        recipe(sampler=SamplerConfig("ddim", 7, eta=1.0)),
        recipe(sampler=SamplerConfig("ddim", 6)),
        recipe(sampler=SamplerConfig("ddpm", 6)),
        recipe(latent_shape=(2, 8, 8)),
        recipe(calls=2),
        recipe(guidance_scale=2.0),
        recipe(guidance_scale=1.0),
        recipe(seed=1),
        recipe(batch_size=3),
        recipe(engine="openvino-f32 2026.4"),
        recipe(condition=None),
        recipe(condition=tokens(TOKENS + 1, NULL)),
        recipe(condition=tokens(TOKENS, NULL + 1)),
        recipe(size=4, condition=tokens(TOKENS[:4], NULL)),
    ]
    assert len({base.key, *(variant.key for variant in variants)}) == 1 + len(variants)
    assert recipe().key == base.key


def test_calibration_pictures_are_not_those_that_the_same_seed_samples(tmp_path: Path) -> None:
    r = recipe(sampler=SamplerConfig("ddim", 1), calls=1)
    rows = record(Network(), r, tmp_path).arrays["sample"]
    sampled = PictureNoise(r.seed, range(SIZE), SHAPE).initial()
    assert not np.isin(rows, sampled).any()


def test_a_network_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"not finite at call 0 \(timestep \d+\)"):
        record(lambda x, t, cond: x * np.nan, recipe(), tmp_path)
    assert not any(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(("name", "flag"), [("size", "--calib-size"), ("calls", "--calib-steps")])
def test_sizes_are_checked(name: str, flag: str) -> None:
    with pytest.raises(CalibrationError, match=f"{flag} 0: expected at least 1"):
        recipe(condition=None, **{name: 0})


def test_batches_cover_the_set_in_order() -> None:
    whole = CalibSet({"sample": np.arange(7), "timestep": np.arange(7) * 10}, "k")
    parts = list(whole.batches(3))
    assert [len(part["sample"]) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([part["timestep"] for part in parts]), whole.arrays["timestep"])
    np.testing.assert_array_equal(whole.take(slice(None, None, 2)).arrays["sample"], [0, 2, 4, 6])


SPECS = (
    TensorSpec("sample", "float32", ("batch", *SHAPE)),
    TensorSpec("timestep", "float32", ("batch",)),
    TensorSpec("class_labels", "int64", ("batch",)),
)


def user_arrays(**changes) -> dict[str, np.ndarray]:
    arrays = {"sample": np.ones((6, *SHAPE)), "timestep": np.arange(6), "class_labels": np.arange(6, dtype=np.int32)}
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def test_a_user_s_file_is_cast_to_the_inputs(tmp_path: Path) -> None:
    save_npz(tmp_path / "u.npz", user_arrays())
    found = load_user_npz(tmp_path / "u.npz", SPECS)
    assert {name: str(array.dtype) for name, array in found.arrays.items()} == {s.name: s.dtype for s in SPECS}
    assert len(found) == 6
    save_npz(tmp_path / "v.npz", user_arrays(sample=np.zeros((6, *SHAPE))))
    assert load_user_npz(tmp_path / "v.npz", SPECS).key != found.key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timestep": None}, r"arrays \['class_labels', 'sample'\], the network's inputs are"),
        ({"t": np.arange(6)}, r"Name one array per input"),
        ({"sample": np.ones((6, 2, 4))}, r"sample: shape \(6, 2, 4\), expected samples x 2 x 4 x 4"),
        ({"sample": np.ones((6, 3, 4, 4))}, r"sample: shape \(6, 3, 4, 4\), expected samples x 2 x 4 x 4"),
        ({"sample": np.ones((5, *SHAPE))}, r"lengths differ \(\{'sample': 5"),
        ({"sample": np.ones((0, *SHAPE))}, r"sample: no samples"),
        ({"sample": np.full((6, *SHAPE), np.nan)}, r"sample: 192 of 192 values are not finite"),
        ({"sample": np.full((6, *SHAPE), 1e300)}, r"sample: 192 of 192 values are not finite"),
        ({"sample": np.ones((6, *SHAPE), complex)}, r"sample: complex128 values, expected float32"),
        ({"class_labels": np.arange(6.0)}, r"class_labels: float64 values, expected int64"),
    ],
)
def test_a_user_s_mistake_is_named(changes: dict, words: str, tmp_path: Path) -> None:
    save_npz(tmp_path / "mine.npz", user_arrays(**changes))
    with pytest.raises(CalibrationError, match=words) as caught:
        load_user_npz(tmp_path / "mine.npz", SPECS)
    assert str(caught.value).startswith(str(tmp_path / "mine.npz"))

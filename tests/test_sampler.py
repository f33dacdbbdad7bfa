"""Sampling with an engine whose noise prediction is known, so that the pictures have a closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qncd_deploy.bundle import ConditionFacts, ModelFacts
from qncd_deploy.correct.record import CorrectionTable, ScheduleKey, StepFix, identity_table
from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.errors import Diverged, LabelError, UsageError
from qncd_deploy.sample import PictureNoise
from qncd_deploy.sampler import Network, Sampler
from qncd_deploy.schedule import Schedule
from qncd_deploy.specs import TensorSpec
from qncd_deploy.steps import SamplerConfig
from qncd_deploy.subjects import parse_labels

SHAPE = (3, 4, 4)
SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
ABAR = SCHEDULE.alphas_cumprod
TEN = ConditionFacts("class-labels", 11, 10)


class Gaussian(BaseEngine):
    """The ideal network for pictures ~ N(0, I), eps = sqrt(1 - abar_t) x, plus 0.01 times the label."""

    def __init__(self, *, labels: bool) -> None:
        specs = [TensorSpec("sample", "float32", ("batch", *SHAPE)), TensorSpec("timestep", "float32", ("batch",))]
        specs += [TensorSpec("class_labels", "int64", ("batch",))] if labels else []
        super().__init__("fake-f32", Path("net"), {s.name: s for s in specs}, {"out": specs[0]})
        self.rows: list[int] = []
        self.closed = 0

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x, t = feeds["sample"], feeds["timestep"].astype(int)
        self.rows.append(len(x))
        eps = np.sqrt(1 - ABAR[t]).astype(np.float32)[:, None, None, None] * x
        if "class_labels" in feeds:
            eps = eps + 0.01 * feeds["class_labels"].astype(np.float32)[:, None, None, None]
        return {"out": eps}

    def _close(self) -> None:
        self.closed += 1


class Doubler(BaseEngine):
    """A decoder that doubles the latents."""

    def __init__(self) -> None:
        spec = TensorSpec("latents", "float32", ("batch", *SHAPE))
        super().__init__("fake-f32", Path("decoder"), {"latents": spec}, {"images": spec})

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"images": 2 * feeds["latents"]}

    def _close(self) -> None: ...


def make(
    condition: ConditionFacts | None = TEN,
    *,
    scale: float = 1.0,
    batch_size: int | None = None,
    decoder: BaseEngine | None = None,
    scheduler: str = "ddim",
    fixes: tuple[StepFix, ...] | None = None,
    eta: float = 0.0,
    engine: BaseEngine | None = None,
) -> Sampler:
    engine = engine or Gaussian(labels=condition is not None)
    specs = tuple(engine.inputs.values())
    facts = ModelFacts("fake", specs, SHAPE, SHAPE, SCHEDULE.to_json(), None, scale, condition)
    labels = condition and {"class_labels": np.arange(condition.classes)}
    network = Network(Path("bundle"), "00", facts, SCHEDULE, engine, decoder, labels)
    config = SamplerConfig(scheduler, 20, eta)
    key = ScheduleKey.of(SCHEDULE, config, guidance_scale=scale, backend="fake-f32", plan_sha="0")
    table = identity_table(key) if fixes is None else CorrectionTable("test", key, fixes)
    return Sampler(network, config=config, guidance_scale=scale, table=table, batch_size=batch_size)


def closed_form(indices: list[int], shifts: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """DDIM with eta 0 by hand: x' = A x + B eps with eps = b x + shift is linear in x_T and the shift."""
    x = PictureNoise(seed, indices, SHAPE).initial().astype(np.float64)
    times = [1 + 50 * i for i in reversed(range(20))]
    for t in times:
        a, target = ABAR[t], ABAR[t - 50] if t > 50 else ABAR[0]
        keep = np.sqrt(target / a)
        gain = np.sqrt(1 - target) - np.sqrt(target * (1 - a) / a)
        x = keep * x + gain * (np.sqrt(1 - a) * x + shifts[:, None, None, None])
    return x


def test_an_unconditional_sampler_has_its_closed_form() -> None:
    with make(None) as sampler:
        drawn = sampler.sample(3)
    # 20 float32 updates of a state of order 1: 20 x 6e-8, times the largest of A = 1.03.
    np.testing.assert_allclose(drawn.latents, closed_form([0, 1, 2], np.zeros(3)), rtol=0, atol=5e-6)
    assert drawn.latents.dtype == np.float32
    np.testing.assert_array_equal(drawn.labels, [-1, -1, -1])


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_guidance_shifts_by_u_plus_s_times_c_minus_u(scale: float) -> None:
    with make(scale=scale) as sampler:
        drawn = sampler.sample(12, seed=3)
    labels = np.arange(12) % 10  # the null class, 10, is not counted
    np.testing.assert_array_equal(drawn.labels, labels)
    shifts = 0.01 * (10 + scale * (labels - 10))
    np.testing.assert_allclose(drawn.latents, closed_form(list(range(12)), shifts, seed=3), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "plms", "dpmpp-2m", "euler", "euler-a"])
def test_a_picture_depends_on_seed_and_index_alone(scheduler: str) -> None:
    whole = make(scale=1.5, batch_size=7, scheduler=scheduler).sample(9, seed=5)
    alone = make(scale=1.5, scheduler=scheduler).sample([6], seed=5)
    pairs = make(scale=1.5, batch_size=2, scheduler=scheduler).sample([8, 6, 1], seed=5)
    np.testing.assert_array_equal(alone.latents[0], whole.latents[6])
    np.testing.assert_array_equal(pairs.latents, whole.latents[[8, 6, 1]])
    np.testing.assert_array_equal(pairs.labels, whole.labels[[8, 6, 1]])
    other = make(scale=1.5, scheduler=scheduler).sample([6], seed=6)
    assert np.abs(other.latents - alone.latents).max() > 0.1


def test_batches_are_filled_up_to_one_size() -> None:
    engine = Gaussian(labels=True)
    sampler = make(scale=1.5, batch_size=4, engine=engine)
    assert [len(part) for part in sampler.batches(9)] == [4, 4, 1]
    assert set(engine.rows) == {8}  # conditional and unconditional rows of four pictures, in one call
    assert len(engine.rows) == 3 * 20
    engine.rows.clear()
    sampler.sample(3)
    assert set(engine.rows) == {6}  # no more than was asked for


def test_the_default_batch_shrinks_with_the_latents() -> None:
    assert make().batch_size == 16
    large = ModelFacts("fake", (), (3, 64, 64), None, None, None, 1.0, None)
    sampler = make()
    network = Network(Path("b"), "", large, SCHEDULE, Gaussian(labels=False), None, None)
    assert Sampler(network, config=sampler.config, guidance_scale=1.0, table=sampler.table).batch_size == 5


def test_labels_take_turns_by_index() -> None:
    sampler = make()
    np.testing.assert_array_equal(sampler.sample(5, labels=[3]).labels, [3] * 5)
    np.testing.assert_array_equal(sampler.sample([4, 0, 5], labels=[3, 7, 1]).labels, [7, 3, 1])
    middle = make(ConditionFacts("class-labels", 4, 1))
    np.testing.assert_array_equal(middle.sample(6).labels, [0, 2, 3, 0, 2, 3])


def test_images_are_the_decoded_latents_as_bytes() -> None:
    decoded = make(None, decoder=Doubler()).sample(5)
    expected = np.clip(np.floor((2 * decoded.latents + 1) * 127.5 + 0.5), 0, 255).astype(np.uint8)
    assert decoded.images is not None
    np.testing.assert_array_equal(decoded.images, expected.transpose(0, 2, 3, 1))
    plain = make(None).sample(5)
    assert plain.images is not None
    assert np.abs(plain.images.astype(int) - decoded.images).max() > 1


def test_a_correction_table_is_replayed() -> None:
    fixes = tuple(StepFix(a=0.5, b=0.125) for _ in range(20))
    fixed = make(None, fixes=fixes).sample(2)
    x = PictureNoise(0, [0, 1], SHAPE).initial().astype(np.float64)
    for t in [1 + 50 * i for i in reversed(range(20))]:
        a, target = ABAR[t], ABAR[t - 50] if t > 50 else ABAR[0]
        gain = np.sqrt(1 - target) - np.sqrt(target * (1 - a) / a)
        x = np.sqrt(target / a) * x + gain * (0.5 * np.sqrt(1 - a) * x + 0.125)
    # 20 float32 updates of a state that grows to 20: 20 x 20 x 6e-8.
    np.testing.assert_allclose(fixed.latents, x, rtol=0, atol=2.4e-5)


def test_progress_is_told_after_every_call_and_extra_calls_are_counted() -> None:
    fixes = tuple(StepFix(refresh=call in (3, 8)) for call in range(20))
    states = []
    make(None, batch_size=2, fixes=fixes).sample(4, on_state=states.append)
    assert [state.call for state in states] == [*range(20), *range(20)]
    assert [states[i].extra_calls for i in (2, 3, 7, 8, 19)] == [0, 1, 1, 2, 2]


def test_the_trajectory_ends_in_the_latents() -> None:
    sampler = make(scale=1.5)
    states = list(sampler.trajectory([2, 5], seed=1))
    np.testing.assert_array_equal(states[-1].x, sampler.sample([2, 5], seed=1).latents)
    assert len(states) == len(sampler.steps) == 20


def test_pictures_that_are_not_finite_are_refused() -> None:
    class Broken(Doubler):
        def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"images": np.full_like(feeds["latents"], np.nan)}

    words = r"bundle: fake-f32 with correction off gave pictures that are not finite\. Try a float32 remainder"
    with pytest.raises(Diverged, match=words):
        make(None, decoder=Broken()).sample(1)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("shape", [(3, 4, 4), (8, 4, 4)])  # pictures themselves, or of no decoder's
def test_latents_that_are_not_finite_are_refused_whether_they_are_pictures_or_not(shape: tuple[int, ...]) -> None:
    class Wide(Gaussian):
        def __init__(self) -> None:
            super().__init__(labels=False)
            specs = {name: replace(each, shape=("batch", *shape)) for name, each in self.inputs.items()}
            self._tensors = ({**self.inputs, "sample": specs["sample"]}, {"out": specs["sample"]})

    sampler = make(None, engine=Wide(), fixes=(StepFix(b=1e38),) * 20)
    network = replace(sampler.network, facts=replace(sampler.network.facts, latent_shape=shape))
    wild = Sampler(network, config=sampler.config, guidance_scale=1.0, table=sampler.table)
    words = (
        r"bundle: fake-f32 with correction test gave latents that are not finite\. Try another --correction, a float32"
    )
    with pytest.raises(Diverged, match=words):
        wild.sample(2)


@pytest.mark.parametrize("pictures", [0, -1, [], [-1, 2]])
def test_no_pictures_and_negative_indices_are_refused(pictures: int | list[int]) -> None:
    with pytest.raises(UsageError, match=r"pictures: expected 1 or more, with indices from 0"):
        make().sample(pictures)


@pytest.mark.parametrize(
    ("text", "expected"), [("3", (3,)), ("0, 9,0", (0, 9, 0)), ("all", tuple(range(10))), (" all ", tuple(range(10)))]
)
def test_class_labels_are_a_number_several_or_all(text: str, expected: tuple[int, ...]) -> None:
    assert parse_labels(text, TEN) == expected


@pytest.mark.parametrize(
    ("text", "condition", "error", "words"),
    [
        ("11", TEN, LabelError, r"class 11: the network does not have it\. Use 0 to 9\."),
        ("3,-1", TEN, LabelError, r"class -1: the network does not have it\. Use 0 to 9\."),
        ("10", TEN, LabelError, r"class 10 is the null class of guidance, not a picture's\. Use 0 to 9\."),
        ("1", ConditionFacts("class-labels", 4, 1), LabelError, r"class 1 is the null class .* Use 0 to 3 without 1\."),
        ("4", ConditionFacts("class-labels", 4, None), LabelError, r"class 4: .* Use 0 to 3\."),
        ("shoe", TEN, UsageError, r"--class-label shoe: expected a class number, several with commas, or all"),
        ("3,", TEN, UsageError, "--class-label 3,: expected a class number"),
        ("", TEN, UsageError, "expected a class number"),
        ("3", None, UsageError, r"--class-label 3: the network has no classes\. Leave it out\."),
    ],
)
def test_wrong_class_labels_are_refused_with_the_range(
    text: str, condition: ConditionFacts, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        parse_labels(text, condition)


def test_wrong_labels_are_refused_before_the_first_call() -> None:
    engine = Gaussian(labels=True)
    with pytest.raises(LabelError, match="class 12"):
        make(engine=engine).sample(30, labels=[0] * 25 + [12])
    with pytest.raises(UsageError, match="bundle: the network has no classes"):
        make(None).sample(1, labels=[0])
    assert engine.rows == []

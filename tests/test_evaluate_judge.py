"""Figures of a variant whose error is known, so that the SNR of every call has a closed form."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from test_sampler import ABAR, SHAPE, TEN, Gaussian, make

from qncd_deploy.correct.record import StepFix
from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.evaluate.features import FeatureNetwork
from qncd_deploy.evaluate.judge import Draw, Judge, Lens
from qncd_deploy.evaluate.metrics import PSNR_CAP_DB, Moments, frechet_distance, shift
from qncd_deploy.sample import PictureNoise
from qncd_deploy.specs import TensorSpec

DELTA = 0.05


class Off(Gaussian):
    """The ideal network with a constant error."""

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"out": super()._run(feeds)["out"] + np.float32(DELTA)}


class Corner(BaseEngine):
    """Features: the first three pixels of a picture; logits: which of its first ten pixels is the brightest."""

    def __init__(self) -> None:
        images = TensorSpec("images", "float32", ("n", *SHAPE))
        outputs = {"features": TensorSpec("features", "float32", ("n", 3))}
        outputs["logits"] = TensorSpec("logits", "float32", ("n", 10))
        super().__init__("fake-f32", Path("features.onnx"), {"images": images}, outputs)
        self.closed = 0

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        flat = feeds["images"].reshape(len(feeds["images"]), -1)
        return {"features": flat[:, :3], "logits": flat[:, :10]}

    def _close(self) -> None:
        self.closed += 1


def silent(pictures: int) -> None: ...


def judge_of(draw: Draw, lens: Lens | None = None, *, traced: int = 100, labels: bool = False) -> Judge:
    exact = make(TEN if labels else None, batch_size=4)
    return Judge.of("float", exact, draw, lens or Lens(), traced=traced, tick=silent)


def test_the_same_network_is_told_apart_by_nothing() -> None:
    draw = Draw(9)
    figures, pictures = judge_of(draw).figures("same", make(None, batch_size=4), tick=silent)
    assert figures.psnr is not None and figures.ssim is not None
    assert (figures.psnr.value, figures.psnr.low, figures.psnr.high) == (PSNR_CAP_DB,) * 3
    assert figures.ssim.value == pytest.approx(1)
    assert figures.latent_snr_db == figures.output_snr_db == (math.inf,) * 20
    assert figures.to_json()["latent_snr_db"] == [None] * 20
    assert (figures.shift, figures.fid, figures.accuracy) == (None, None, None)  # no feature network
    assert (figures.name, figures.engine, figures.correction, figures.n) == ("same", "fake-f32", "off", 9)
    assert len(pictures) == 9


def test_a_constant_error_has_its_closed_form_call_by_call() -> None:
    draw = Draw(6, seed=2, first=3)
    figures, _ = judge_of(draw).figures("off", make(None, batch_size=4, engine=Off(labels=False)), tick=silent)
    x = PictureNoise(2, range(3, 9), SHAPE).initial().astype(np.float64)
    error, latent, output = 0.0, [], []
    for t in [1 + 50 * i for i in reversed(range(20))]:
        a, target = ABAR[t], ABAR[t - 50] if t > 50 else ABAR[0]
        keep, b = np.sqrt(target / a), np.sqrt(1 - a)
        gain = np.sqrt(1 - target) - np.sqrt(target * (1 - a) / a)
        output.append(10 * np.log10(np.mean((b * x) ** 2) / DELTA**2))
        x, error = (keep + gain * b) * x, (keep + gain * b) * error + gain * DELTA
        latent.append(10 * np.log10(np.mean(x**2) / error**2))
    # Differences of float32 numbers of order 1, 6e-8 each, next to an error of 1e-3 after the first call: 1e-4 of it,
    # and twice that of its power; a decibel is 26 %.
    np.testing.assert_allclose(figures.latent_snr_db, latent, rtol=0, atol=2e-3)
    np.testing.assert_allclose(figures.output_snr_db, output, rtol=0, atol=2e-3)


def test_pictures_are_those_of_the_draw_and_the_same_for_both() -> None:
    draw = Draw(5, seed=7, first=40, labels=(3, 1))
    judge = judge_of(draw, labels=True)
    figures, pictures = judge.figures("same", make(TEN, batch_size=4), teacher_forced=False, tick=silent)
    np.testing.assert_array_equal(pictures.indices, range(40, 45))
    np.testing.assert_array_equal(pictures.labels, [3, 1, 3, 1, 3])
    np.testing.assert_array_equal(pictures.latents, judge.pictures.latents)
    assert (figures.seed, figures.first) == (7, 40)
    assert figures.output_snr_db == ()
    with pytest.raises(AssertionError, match="other batches than the float twin"):
        judge.figures("same", make(TEN, batch_size=3), tick=silent)


@pytest.mark.parametrize(("traced", "batches"), [(0, 0), (1, 1), (4, 1), (5, 2), (9, 3), (100, 3)])
def test_whole_batches_are_traced_until_there_are_enough(traced: int, batches: int) -> None:
    judge = judge_of(Draw(9), traced=traced)
    assert [len(states) for states in judge.trajectories] == [20] * batches
    assert sum(len(states[0].x) for states in judge.trajectories) == min(9, 4 * batches)
    calls: list[int] = []
    figures, _ = judge.figures("off", make(None, batch_size=4, engine=Off(labels=False)), tick=calls.append)
    assert len(figures.latent_snr_db) == len(figures.output_snr_db) == (20 if batches else 0)
    assert sum(calls) == 20 * (9 + min(9, 4 * batches))


def test_labels_reach_the_network_at_the_float_inputs_too() -> None:
    judge = judge_of(Draw(9, labels=(2, 8, 5)), labels=True)
    figures, _ = judge.figures("same", make(TEN, batch_size=4), tick=silent)
    assert figures.output_snr_db == (math.inf,) * 20


def test_extra_calls_of_a_correction_are_counted_once_a_trajectory() -> None:
    fixes = tuple(StepFix(refresh=call in (3, 8)) for call in range(20))
    figures, _ = judge_of(Draw(6)).figures("probed", make(None, batch_size=4, fixes=fixes), tick=silent)
    assert (figures.calls, figures.extra_calls, figures.correction) == (20, 2, "test")


def test_feature_figures_are_of_all_pictures_and_against_the_right_side() -> None:
    data = Moments(np.array([0.1, 0.2, 0.3]), np.eye(3))
    engine = Corner()
    draw = Draw(12, labels=(4, 0, 9))
    with Lens(FeatureNetwork(engine), data) as lens:
        judge = judge_of(draw, lens, labels=True)
        figures, pictures = judge.figures("off", make(TEN, batch_size=4, engine=Off(labels=True)), tick=silent)
    assert engine.closed == 1
    assert pictures.images is not None and judge.pictures.images is not None
    found, exact = (
        images.transpose(0, 3, 1, 2).reshape(12, -1)[:, :10] / 127.5 - 1
        for images in (pictures.images, judge.pictures.images)
    )
    assert figures.fid == pytest.approx(frechet_distance(Moments.of(found[:, :3]), data), rel=1e-5)
    assert judge.own.fid == pytest.approx(frechet_distance(Moments.of(exact[:, :3]), data), rel=1e-5)
    assert figures.shift is not None
    assert figures.shift.value == pytest.approx(shift(found[:, :3], exact[:, :3]), rel=1e-4)
    assert figures.shift.low < figures.shift.value < figures.shift.high
    assert figures.accuracy == np.mean(found.argmax(axis=1) == pictures.labels)
    assert figures.inception_score is not None and figures.inception_score > 1
    assert judge.own.shift is judge.own.psnr is None


def test_a_classifier_of_other_classes_says_nothing_of_these() -> None:
    with Lens(FeatureNetwork(Corner())) as lens:
        judge = judge_of(Draw(3), lens)  # no classes at all
    assert judge.own.accuracy is None and judge.own.fid is None
    assert judge.own.inception_score is not None

"""Figures of a variant whose error is known, so that the SNR of every call has a closed form."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_sampler import ABAR, SHAPE, TEN, Gaussian, make

from qncd_deploy.correct.record import StepFix
from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.evaluate.batches import Batch, Draw, Job, draw_batch, plan_jobs
from qncd_deploy.evaluate.compare import Comparison
from qncd_deploy.evaluate.features import Description, FeatureNetwork, Lens, Reference
from qncd_deploy.evaluate.judge import Figures, Judge, Origin
from qncd_deploy.evaluate.manifold import Manifold
from qncd_deploy.evaluate.metrics import PSNR_CAP_DB, Moments, frechet_distance, shift
from qncd_deploy.evaluate.table import comparison_table
from qncd_deploy.files import canonical_json
from qncd_deploy.pictures import Pictures
from qncd_deploy.sample import PictureNoise
from qncd_deploy.sampler import Sampler
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


@dataclass
class Held:
    """A float twin, sampled, that variants are held against."""

    draw: Draw
    lens: Lens
    jobs: tuple[Job, ...]
    batches: list[Batch]
    judge: Judge
    ticks: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, draw: Draw, lens: Lens | None = None, *, traced: int = 100, labels: bool = False) -> Held:
        exact, lens = make(TEN if labels else None, batch_size=4), lens or Lens()
        jobs = plan_jobs(draw, batch_size=4, traced=traced)
        batches = [draw_batch(exact, draw, job, lens) for job in jobs]
        return cls(draw, lens, jobs, batches, Judge.of("float", Origin.of(exact), batches, draw, lens.data))

    def figures(self, name: str, sampler: Sampler, *, teacher_forced: bool = True) -> tuple[Figures, Pictures]:
        batches = [
            draw_batch(
                *(sampler, self.draw, replace(job, exact=batch.trace), self.lens),
                teacher_forced=teacher_forced,
                tick=self.ticks.append,
            )
            for job, batch in zip(self.jobs, self.batches, strict=True)
        ]
        figures = self.judge.figures(name, Origin.of(sampler), batches)
        return figures, Pictures.join([batch.pictures for batch in batches])

    @property
    def pictures(self) -> Pictures:
        return Pictures.join([batch.pictures for batch in self.batches])


def test_the_same_network_is_told_apart_by_nothing() -> None:
    draw = Draw(9)
    figures, pictures = Held.of(draw).figures("same", make(None, batch_size=4))
    assert figures.psnr is not None and figures.ssim is not None
    assert (figures.psnr.value, figures.psnr.low, figures.psnr.high) == (PSNR_CAP_DB,) * 3
    assert figures.ssim.value == pytest.approx(1)
    assert figures.latent_snr_db == figures.output_snr_db == (math.inf,) * 20
    assert figures.to_json()["latent_snr_db"] == [None] * 20
    assert (figures.shift, figures.fid, figures.accuracy) == (None, None, None)  # no feature network
    assert (figures.name, figures.engine, figures.correction, figures.n) == ("same", "fake-f32", "off", 9)
    assert len(pictures) == 9


def test_an_infinite_error_is_not_taken_for_none() -> None:
    figures = replace(Held.of(Draw(2)).judge.own, latent_snr_db=(math.inf, 3.0, -math.inf), output_snr_db=(math.nan,))
    facts = json.loads(canonical_json(figures.to_json()))
    assert (facts["latent_snr_db"], facts["output_snr_db"]) == ([None, 3.0, "-inf"], ["nan"])
    out = io.StringIO()
    Console(file=out, width=200).print(comparison_table(Comparison(Held.of(Draw(2)).judge.own, (figures,), (), {})))
    assert "exact .. -inf" in out.getvalue() and "nan .. nan" in out.getvalue()


def test_a_constant_error_has_its_closed_form_call_by_call() -> None:
    draw = Draw(6, seed=2, first=3)
    figures, _ = Held.of(draw).figures("off", make(None, batch_size=4, engine=Off(labels=False)))
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
    held = Held.of(draw, labels=True)
    figures, pictures = held.figures("same", make(TEN, batch_size=4), teacher_forced=False)
    np.testing.assert_array_equal(pictures.indices, range(40, 45))
    np.testing.assert_array_equal(pictures.labels, [3, 1, 3, 1, 3])
    np.testing.assert_array_equal(pictures.latents, held.pictures.latents)
    assert (figures.seed, figures.first) == (7, 40)
    assert figures.output_snr_db == ()
    others = [draw_batch(make(TEN, batch_size=4), draw, job, Lens()) for job in plan_jobs(draw, batch_size=3, traced=0)]
    with pytest.raises(AssertionError, match="other batches than the float twin"):
        held.judge.figures("same", Origin.of(make(TEN)), others)


@pytest.mark.parametrize(("traced", "batches"), [(0, 0), (1, 1), (4, 1), (5, 2), (9, 3), (100, 3)])
def test_whole_batches_are_traced_until_there_are_enough(traced: int, batches: int) -> None:
    held = Held.of(Draw(9), traced=traced)
    traces = [batch.trace for batch in held.batches if batch.trace is not None]
    assert [len(trace.x) for trace in traces] == [20] * batches
    assert sum(trace.x.shape[1] for trace in traces) == min(9, 4 * batches)
    figures, _ = held.figures("off", make(None, batch_size=4, engine=Off(labels=False)))
    assert len(figures.latent_snr_db) == len(figures.output_snr_db) == (20 if batches else 0)
    assert sum(held.ticks) == 20 * (9 + min(9, 4 * batches))


def test_labels_reach_the_network_at_the_float_inputs_too() -> None:
    held = Held.of(Draw(9, labels=(2, 8, 5)), labels=True)
    figures, _ = held.figures("same", make(TEN, batch_size=4))
    assert figures.output_snr_db == (math.inf,) * 20


def test_extra_calls_of_a_correction_are_counted_once_a_trajectory() -> None:
    fixes = tuple(StepFix(refresh=call in (3, 8)) for call in range(20))
    figures, _ = Held.of(Draw(6)).figures("probed", make(None, batch_size=4, fixes=fixes))
    assert (figures.calls, figures.extra_calls, figures.correction) == (20, 2, "test")


def test_feature_figures_are_of_all_pictures_and_against_the_right_side() -> None:
    data = Moments.from_cov(np.array([0.1, 0.2, 0.3]), np.eye(3))
    reference = Reference(Path("reference.npz"), data)
    engine = Corner()
    draw = Draw(12, labels=(4, 0, 9))
    with Lens(FeatureNetwork(engine), reference) as lens:
        held = Held.of(draw, lens, labels=True)
        figures, pictures = held.figures("off", make(TEN, batch_size=4, engine=Off(labels=True)))
    assert engine.closed == 1
    assert pictures.images is not None and held.pictures.images is not None
    found, exact = (
        images.transpose(0, 3, 1, 2).reshape(12, -1)[:, :10] / 127.5 - 1
        for images in (pictures.images, held.pictures.images)
    )
    assert figures.fid is not None and held.judge.own.fid is not None
    assert figures.fid.value == pytest.approx(frechet_distance(Moments.of(found[:, :3]), data), rel=1e-5)
    assert held.judge.own.fid.value == pytest.approx(frechet_distance(Moments.of(exact[:, :3]), data), rel=1e-5)
    assert figures.shift is not None
    assert figures.shift.value == pytest.approx(shift(found[:, :3], exact[:, :3]), rel=1e-4)
    assert figures.shift.low < figures.shift.value < figures.shift.high
    assert figures.accuracy is not None
    assert figures.accuracy.value == np.mean(found.argmax(axis=1) == pictures.labels)
    assert figures.inception_score is not None and figures.inception_score.value > 1
    assert held.judge.own.shift is held.judge.own.psnr is None


def test_a_classifier_of_other_classes_says_nothing_of_these() -> None:
    with Lens(FeatureNetwork(Corner())) as lens:
        held = Held.of(Draw(3), lens)  # no classes at all
    assert held.judge.own.accuracy is None and held.judge.own.fid is None
    assert held.judge.own.inception_score is not None


def test_latents_are_compared_channel_by_channel() -> None:
    held = Held.of(Draw(9))
    bias, scale = np.array([0.1, 0.0, -0.2], np.float32), np.array([1.0, 1.5, 0.5], np.float32)
    batches = [
        replace(batch, pictures=replace(batch.pictures, latents=scaled(batch.pictures.latents, scale, bias)))
        for batch in held.batches
    ]
    figures = held.judge.figures("off", Origin.of(make(None)), batches)
    exact = held.pictures.latents.astype(np.float64)
    mean, std = exact.mean(axis=(0, 2, 3)), exact.std(axis=(0, 2, 3))
    np.testing.assert_allclose(figures.latent_std_ratio, scale, rtol=1e-6)  # one float32 rounding of each latent
    np.testing.assert_allclose(figures.latent_mean_error, ((scale - 1) * mean + bias) / std, rtol=0, atol=1e-6)


def scaled(latents: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return latents * scale[:, None, None] + bias[:, None, None]


def test_features_of_the_twin_are_covered_and_near() -> None:
    data = Reference(
        Path("real.npz"), Moments.of(np.eye(3)), features=np.random.default_rng(0).standard_normal((50, 3))
    )
    with Lens(FeatureNetwork(Corner()), data) as lens:
        held = Held.of(Draw(12), lens)
        same, _ = held.figures("same", make(None, batch_size=4))
        off, pictures = held.figures("off", make(None, batch_size=4, engine=Off(labels=False)))
    assert same.precision is not None and same.recall is not None and same.feature_rms is not None
    assert (same.precision.value, same.recall.value, same.feature_rms.value) == (1, 1, 0)
    assert pictures.images is not None and held.pictures.images is not None and off.feature_rms is not None
    found, exact = (
        images.transpose(0, 3, 1, 2).reshape(12, -1)[:, :3] / 127.5 - 1
        for images in (pictures.images, held.pictures.images)
    )
    expected = np.sqrt(np.square(found - exact).sum() / np.square(exact - exact.mean(axis=0)).sum())
    assert off.feature_rms.value == pytest.approx(expected, rel=1e-5)  # float32 features of bytes
    assert off.feature_rms.low < off.feature_rms.value < off.feature_rms.high
    assert data.features is not None and off.data_precision is not None and off.data_recall is not None
    known, own = Manifold.of(data.features), Manifold.of(found.astype(np.float32))
    assert known is not None and own is not None
    assert off.data_precision.value == known.covers(found).mean() and off.data_precision.n == 12
    assert off.data_recall.value == own.covers(data.features).mean() and off.data_recall.n == 50
    assert held.judge.own.data_precision is not None and held.judge.own.precision is None


def test_a_variant_that_lost_variety_has_precision_without_recall() -> None:
    held = Held.of(Draw(40))
    features = np.random.default_rng(0).standard_normal((40, 2)).astype(np.float32)

    def described(scale: float) -> list[Batch]:
        return [
            replace(batch, description=Description(scale * features[batch.pictures.indices])) for batch in held.batches
        ]

    judge = Judge.of("float", Origin.of(make(None)), described(1), held.draw)
    figures = judge.figures("narrow", Origin.of(make(None)), described(0.3))
    exact, narrow = Manifold.of(features), Manifold.of(0.3 * features)
    assert exact is not None and narrow is not None and figures.precision is not None and figures.recall is not None
    assert figures.precision.value == exact.covers(0.3 * features).mean() > 0.9
    assert figures.recall.value == narrow.covers(features).mean() < 0.7


def test_spatial_features_have_their_own_distance() -> None:
    pytest.importorskip("scipy")
    from scipy.linalg import sqrtm

    held = Held.of(Draw(40))
    spatial = np.random.default_rng(1).standard_normal((40, 5)) @ np.random.default_rng(2).standard_normal((5, 5))
    described = [
        replace(
            batch, description=Description(np.zeros((len(batch.pictures), 2)), None, spatial[batch.pictures.indices])
        )
        for batch in held.batches
    ]
    mean, cov = np.arange(5.0), np.diag([1.0, 2, 3, 4, 5])
    flat = Moments.of(np.eye(2))
    data = Reference(Path("real.npz"), flat, Moments.from_cov(mean, cov))
    own = Judge.of("float", Origin.of(make(None)), described, held.draw, data).own
    found = np.cov(spatial.T)
    expected = np.square(spatial.mean(0) - mean).sum() + np.trace(found + cov - 2 * sqrtm(found @ cov).real)
    assert own.sfid is not None and own.sfid.value == pytest.approx(expected, rel=1e-7)  # half of sqrtm's digits
    without = Judge.of("float", Origin.of(make(None)), described, held.draw, Reference(Path("real.npz"), flat)).own
    assert without.sfid is None and without.fid is not None


def test_lpips_is_measured_pair_by_pair_where_it_is_given() -> None:
    held = Held.of(Draw(7))

    def brightness(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return images.mean(axis=(1, 2, 3)) - reference.mean(axis=(1, 2, 3))

    judge = Judge.of("float", Origin.of(make(None)), held.batches, held.draw, perceptual=brightness)
    sampler = make(None, batch_size=4, engine=Off(labels=False))
    batches = [draw_batch(sampler, held.draw, replace(job, traced=False), Lens()) for job in held.jobs]
    found = judge.figures("off", Origin.of(sampler), batches)
    images, exact = Pictures.join([batch.pictures for batch in batches]).images, held.pictures.images
    assert images is not None and exact is not None and found.lpips is not None
    assert found.lpips.value == pytest.approx(images.mean() - exact.mean(), rel=1e-9)

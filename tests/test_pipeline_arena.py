"""Held-out pictures on which corrections compete: curves against an independent run, and what a fit reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from test_evaluate_compare import with_features
from test_runtime import write_bundle

from qncd_deploy.correct.record import StepFix
from qncd_deploy.evaluate.contest import Contest
from qncd_deploy.pipeline.arena import Arena, Candidate
from qncd_deploy.pipeline.fit import FIRST_CHOICE_PICTURE, FitOptions, Fitted, fit
from qncd_deploy.pipeline.recordings import Recordings
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler

CALLS = 4
HELD_OUT = range(FIRST_CHOICE_PICTURE, FIRST_CHOICE_PICTURE + 10)
OFF = Candidate("off", (StepFix(),) * CALLS)
BIAS = Candidate("bias", (StepFix(b=np.full(8, 0.1)),) * CALLS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(with_features(write_bundle(tmp_path_factory.mktemp("export") / "net-w8a8")))


@pytest.fixture(scope="module")
def samplers(bundle: Bundle) -> Iterator[tuple[Sampler, Sampler]]:
    """Of the float twin and of the quantized network, three pictures at a time."""
    options = {"threads": 1, "batch_size": 3}
    with (
        bundle.sampler("onnxruntime", float_twin=True, **options) as exact,
        bundle.sampler("onnxruntime", correction="off", **options) as plain,
    ):
        yield exact, plain


def arena_of(samplers: tuple[Sampler, Sampler], indices: range = HELD_OUT, counts: list[int] | None = None) -> Arena:
    told = [] if counts is None else counts
    return Arena.of(*samplers, indices, None, seed=5, on_pictures=told.append)


def snr_of(samplers: tuple[Sampler, Sampler], indices: range) -> list[float]:
    """By hand, both networks run alone."""
    runs = ([state.x for state in each.trajectory(indices, seed=5, batch_size=3)] for each in samplers)
    return [10 * np.log10(np.sum(x**2.0) / np.sum((q - x) ** 2.0)) for x, q in zip(*runs, strict=True)]


def test_the_latents_are_held_against_the_float_twins_call_by_call(samplers: tuple[Sampler, Sampler]) -> None:
    arena = arena_of(samplers)
    assert [states.shape for states in arena.states] == [(3, 8, 16, 16)] * CALLS  # one batch, whatever is held out
    # the same float32 arrays, summed in float32 here
    np.testing.assert_allclose(arena.latent_snr_db(OFF), snr_of(samplers, HELD_OUT[:3]), rtol=1e-4)
    assert np.abs(np.subtract(arena.latent_snr_db(BIAS), arena.latent_snr_db(OFF))).min() > 0.1


def test_curves_are_of_the_same_pictures_whoever_is_sampled_how_far(samplers: tuple[Sampler, Sampler]) -> None:
    arena, other = arena_of(samplers), arena_of(samplers)
    arena.figure(OFF, len(arena))  # at once
    other.figure(OFF, other.half)  # in two turns
    first = other.latent_snr_db(OFF)
    other.figure(OFF, len(other))
    assert arena.latent_snr_db(OFF) == other.latent_snr_db(OFF) == first
    assert arena.figure(OFF, 10) == other.figure(OFF, 10)


def test_of_few_pictures_only_the_first_half_is_traced(samplers: tuple[Sampler, Sampler]) -> None:
    counts: list[int] = []
    arena = arena_of(samplers, HELD_OUT[:4], counts)
    assert arena.half == 2 and {len(states) for states in arena.states} == {2}
    arena.figure(OFF, arena.half)
    np.testing.assert_allclose(arena.latent_snr_db(OFF), snr_of(samplers, HELD_OUT[:2]), rtol=1e-4)
    assert counts == [3] * CALLS + [1] * CALLS + [2] * CALLS


@pytest.mark.parametrize("decoded", [True, False])  # pictures are refused if they are not finite
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_candidate_that_grows_beyond_all_numbers_is_the_worst(
    samplers: tuple[Sampler, Sampler], decoded: bool
) -> None:
    exact, plain = (
        Sampler(
            each.network if decoded else replace(each.network, decoder=None),
            config=each.config,
            guidance_scale=each.guidance_scale,
            table=each.table,
            batch_size=3,
        )
        for each in samplers
    )
    arena = arena_of((exact, plain))
    wild = Candidate("wild", (StepFix(b=np.full(8, 1e38)),) * CALLS)
    assert arena.cost(wild, 5) == np.inf > arena.cost(OFF, 5)
    assert arena.wins(wild, OFF, 5) == 0
    assert len(arena.latent_snr_db(wild)) == CALLS


@pytest.fixture(scope="module")
def fitted(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    options = FitOptions("onnxruntime", methods=("ptqd", "d2dpm", "map"), size=4, threads=1)
    with Recordings.open(tmp_path_factory.mktemp("work") / "fits", bundle) as recordings:
        return fit(bundle, options, recordings, lambda done, of: None)


@pytest.mark.parametrize("size", [2, 3])
def test_a_fit_of_hardly_any_pictures_still_has_a_distribution(bundle: Bundle, tmp_path: Path, size: int) -> None:
    options = FitOptions("onnxruntime", methods=("qdrift",), size=size, threads=1)
    with Recordings.open(tmp_path / "fits", bundle) as recordings:
        found = fit(bundle, options, recordings, lambda done, of: None)
    assert (found.objective, found.pictures, found.half) == ("shift", size, 2)
    assert found.screened.keys() == {"off", "qdrift"} | found.figures.keys()


def test_a_fit_reports_everything_that_competed(fitted: Fitted) -> None:
    assert (fitted.objective, fitted.pictures, fitted.confidence) == ("shift", 4, 0.95)
    assert {"off", "ptqd", "d2dpm"} <= fitted.screened.keys()
    assert fitted.figures.keys() <= fitted.screened.keys() == fitted.latent_snr_db.keys()
    assert fitted.confirmed.keys() == ({"off", fitted.best} if fitted.best else set())
    assert {len(curve) for curve in fitted.latent_snr_db.values()} == {CALLS}
    assert fitted.choice == "off" or fitted.significant
    assert fitted.refused.keys() == {"map"} and "4 pictures" in fitted.refused["map"]  # a number an element takes more
    assert {table.method for table in fitted.tables} == {"ptqd", "d2dpm"} | ({fitted.choice} - {"off"})


def test_a_manifest_keeps_what_a_fit_reports_but_not_the_tables(fitted: Fitted) -> None:
    held = Contest.from_json(fitted.to_json())
    assert held.choice == fitted.choice and "tables" not in fitted.to_json()
    assert held.figures == pytest.approx(fitted.figures, rel=1e-3)  # four digits
    assert held.order(held.screened) == fitted.order(fitted.screened)

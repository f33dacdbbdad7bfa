"""Fits beside each other, interrupted ones, and those that nothing is chosen in; their recordings on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from test_runtime import write_bundle

from qncd_deploy.correct.record import load_tables
from qncd_deploy.engines.base import BACKENDS
from qncd_deploy.engines.ort import OrtEngine
from qncd_deploy.engines.remembering import Answers
from qncd_deploy.errors import BundleError, UsageError
from qncd_deploy.evaluate.contest import contests_of
from qncd_deploy.pipeline.fit import Arena, FitOptions, fit, fit_into
from qncd_deploy.pipeline.recordings import Recordings
from qncd_deploy.runtime import Bundle, Sampling

OPTIONS = FitOptions("onnxruntime", take="qdrift", size=2, threads=1)
OTHER = FitOptions("onnxruntime", sampling=Sampling(n_steps=3), take="qdrift", size=2, threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("export") / "net-w8a8"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graph of every call of a network."""
    found: list[str] = []
    run = OrtEngine._run

    def noted(self: OrtEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "t" in feeds:
            found.append(self.path.name)
        return run(self, feeds)

    monkeypatch.setattr(OrtEngine, "_run", noted)
    monkeypatch.setattr("qncd_deploy.pipeline.fit.default_backend", lambda: "onnxruntime")  # the float twin's
    return found


def silent(done: int, of: int) -> None: ...


def interrupt(bundle: Bundle, folder: Path, options: FitOptions) -> set[Path]:
    """Break a fit off in the middle of what it records; returns what is left."""

    def tick(done: int, of: int) -> None:
        if done == 8:  # two pictures at a time: before the fourth network call
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_into(folder, bundle, options, tick)
    return {path.relative_to(folder) for path in folder.rglob("*.npz")}


def test_a_method_that_is_named_is_taken_without_a_contest(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    monkeypatch.setattr(Arena, "of", None)
    done: list[tuple[int, int]] = []
    path, fitted = fit_into(tmp_path, bundle, OPTIONS, lambda n, of: done.append((n, of)))
    assert [table.method for table in fitted.tables] == ["qdrift"]
    assert fitted.line() == "qdrift, asked for by name"
    tables = load_tables(path)
    (key,) = tables.keys
    assert tables.choice(key) == "qdrift" and contests_of(tables)[key].to_json() == fitted.to_json()
    assert sorted(set(calls)) == ["unet-float.onnx", "unet-ort.onnx"] and len(calls) == 2 * 4
    assert done[-1][0] <= done[-1][1] == 4 * 3 * 2  # an upper bound: qdrift runs nothing more
    with pytest.raises(UsageError, match="--correction magic: expected one of qncd"):
        FitOptions("onnxruntime", take="magic")


def test_two_fits_of_one_bundle_do_not_meet(bundle: Bundle, tmp_path: Path) -> None:
    with (
        Recordings.open(tmp_path / "fits", bundle),
        pytest.raises(BundleError, match=r"fits: process \d+ is writing it\. Wait for it"),
    ):
        fit_into(tmp_path, bundle, OPTIONS, silent)
    fit_into(tmp_path, bundle, OPTIONS, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["corrections-onnxruntime-f32.npz"]


def test_an_interrupted_fit_goes_on_even_after_another(bundle: Bundle, tmp_path: Path, calls: list[str]) -> None:
    left = interrupt(bundle, tmp_path, OPTIONS)
    assert len(left) == 3
    fit_into(tmp_path, bundle, OTHER, silent)
    assert {path.relative_to(tmp_path) for path in (tmp_path / "fits").rglob("*.npz")} == left
    calls.clear()
    fit_into(tmp_path, bundle, OPTIONS, silent)
    assert len(calls) == 2 * 4 - 3
    assert not (tmp_path / "fits").exists()
    assert {key.n_steps for key in load_tables(tmp_path / "corrections-onnxruntime-f32.npz").keys} == {3, 4}


def test_without_resume_everything_is_recorded_anew_but_once(bundle: Bundle, tmp_path: Path, calls: list[str]) -> None:
    interrupt(bundle, tmp_path, OPTIONS)
    calls.clear()
    with Recordings.open(tmp_path / "fits", bundle, resume=False) as recordings:
        for _ in range(2):  # a second engine uses what the first recorded
            fit(bundle, OPTIONS, recordings, silent)
    assert len(calls) == 2 * 4


def test_nothing_is_computed_twice_and_nothing_comes_out_otherwise(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    contest = FitOptions("onnxruntime", methods=("qdrift", "qncd", "ptqd"), size=8, threads=1)
    found, counts = [], []
    for answers in (Answers(0), Answers()):
        with Recordings.open(tmp_path / "fits", bundle) as recordings:
            recordings.answers = answers
            first = fit(bundle, contest, recordings, silent)
            calls.clear()
            again = fit(bundle, contest, recordings, silent)
        found.append((first.to_json(), again.to_json(), [list(map(asdict, table.fixes)) for table in first.tables]))
        counts.append(len(calls))
    np.testing.assert_equal(found[0], found[1])
    facts = found[0][0]
    assert facts["confirming"] == (None if facts["wins"] is None else 16)  # twice as many as were fitted on
    assert counts[0] > 50 and counts[1] == 0  # a second engine with the same float twin asks that nothing new


def test_what_is_of_a_graph_that_is_no_more_is_deleted(bundle: Bundle, tmp_path: Path) -> None:
    for name in (f"{'0' * 16}-{'1' * 16}", "notes"):
        (tmp_path / "fits" / name).mkdir(parents=True)
    fit_into(tmp_path, bundle, OPTIONS, silent)
    assert [path.name for path in (tmp_path / "fits").iterdir()] == ["notes"]


def test_a_folder_that_cannot_be_made_is_one_line(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(BundleError, match=r"engines/net/fits: cannot be written: Not a directory"):
        fit_into(tmp_path / "engines/net", bundle, OPTIONS, silent)


@pytest.mark.parametrize("resume", [True, False])
def test_an_export_fits_the_correction_that_it_is_told_and_goes_on_if_it_may(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    fits = pytest.importorskip("qncd_deploy.pipeline.fits", reason="exporting needs torch")
    from qncd_deploy.pipeline.options import ExportOptions
    from qncd_deploy.pipeline.progress import Silent

    opened: list[tuple[str, bool]] = []
    whole = Recordings.open

    def noted(folder: Path, bundle: Bundle, *, resume: bool) -> object:
        opened.append((str(folder.relative_to(tmp_path)), resume))
        return whole(folder, bundle, resume=resume)

    monkeypatch.setattr(Recordings, "open", noted)
    monkeypatch.setattr(Arena, "of", None)
    options = ExportOptions(
        Path("model.ckpt"), name="net", calib_dir=tmp_path, correction="qdrift", fit_size=2, resume=resume
    )
    engines = [backend for backend in BACKENDS.values() if backend.name == "onnxruntime"]
    found = fits.fit_engines(bundle, engines, options, tmp_path / "net/fits-w8a8", Silent())
    assert found.keys() == {"onnxruntime-f32"} and {fitted.choice for fitted in found.values()} == {"qdrift"}
    assert opened == [("net/fits-w8a8", resume)]  # its own, whatever other formats are exported meanwhile
    assert list((tmp_path / "net").iterdir()) == []

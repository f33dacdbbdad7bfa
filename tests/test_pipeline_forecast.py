"""What a large network is said to take: the calls that are counted ahead are those that an export then makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch")

from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.engines.torch_ref import TorchEngine
from qncd_deploy.pipeline import export, fits, forecast, network
from qncd_deploy.pipeline.forecast import FORMS, LARGE_FORMS, Forecast, Pace
from qncd_deploy.pipeline.options import LEAST_PICTURES, ExportOptions
from qncd_deploy.pipeline.progress import Silent, Tick

PICTURES, CALLS, RECORDED, FIT, EVAL = 4, 4, 2, 2, 3


class Listener(Silent):
    """Keeps notes, and how many rows went through the network in every stage."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self.rows: Counter[str] = Counter()
        self._title = ""
        for owner, name in ((BaseEngine, "__call__"), (TorchEngine, "stream")):
            patch.setattr(owner, name, self._counting(getattr(owner, name)))

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def stage(self, title: str) -> Iterator[Tick]:
        self._title = title
        yield lambda done, total: None

    def _counting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(engine: BaseEngine, feeds: Mapping[str, np.ndarray], *rest: Any) -> Any:
            if "timestep" in feeds:  # neither a decoder nor a feature network
                self.rows[self._title] += len(feeds["sample"])
            return run(engine, feeds, *rest)

        return counted


def options_for(checkpoint: Path, folder: Path, **more: Any) -> ExportOptions:
    return ExportOptions(
        checkpoint,
        calib_dir=folder / "calib",
        onnx_dir=folder / "export",
        n_steps=CALLS,
        calib_size=PICTURES,
        calib_steps=RECORDED,
        fit_size=FIT,
        eval_size=EVAL,
        **more,
    )


def test_calls_are_counted_ahead(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Forecast] = []
    smoothed: list[Forecast] = []

    def telling(*given: Any) -> Forecast | None:
        assert forecast.forecast(*given) is None  # what is soon done
        monkeypatch.setattr(forecast, "WORTH_TELLING", 0.0)
        told.append(forecast.forecast(*given))
        twin, options, *rest = given
        undecided = replace(options, correction="auto", fit_size=LEAST_PICTURES - 1)
        assert fits.engines_to_fit(twin, undecided) == []
        (note,) = fits.unfitted_note(tmp_path, [], undecided)
        assert note.startswith("No correction was tried: --fit-size 3 is too few")
        enough = replace(undecided, fit_size=LEAST_PICTURES)
        assert len(fits.engines_to_fit(twin, enough)) == 1 and not [*fits.unfitted_note(tmp_path, [], enough)]
        smoothed.append(forecast.forecast(twin, replace(options, smooth="qncd"), *rest))
        return told[-1]

    monkeypatch.setattr(export, "forecast", telling)
    monkeypatch.setattr(network, "LARGE_MACS", 0.0)  # so that one engine alone gets a correction
    listener = Listener(monkeypatch)
    options = options_for(checkpoint, tmp_path, correction="qdrift", smooth="off", keep_float=0.0)
    done = export.export(options, listener, command="")
    (ahead,) = told
    made = listener.rows
    assert ahead.rows["ranges"] == made["ranges"] == 2 * PICTURES * RECORDED
    assert ahead.rows["rounding"] == ahead.rows["smoothing"] == 0
    assert ahead.rows["proof"] == made["proof"] == 5 * EVAL * 2 * CALLS  # guidance doubles a call
    (fitted,) = (title for title in made if title.startswith("corrections for "))
    assert 0 < made[fitted] <= ahead.rows["corrections"] == 3 * FIT * 2 * CALLS
    # every form on rows that nothing is fitted on, half of them, and on pictures; the samples before that
    judged = FORMS * PICTURES * RECORDED + LARGE_FORMS * FIT * 2 * CALLS
    assert smoothed[0].rows["smoothing"] == 2 * PICTURES * RECORDED + judged
    assert listener.notes == [str(ahead)]
    assert done.notes[-1].startswith("Corrections are fitted for ") and "`qncd fit " in done.notes[-1]


def test_the_first_call_and_those_made_before_are_left_out_of_the_pace() -> None:
    times = iter([10.0, 12.0, 14.5])
    told: list[tuple[int, int]] = []
    pace = Pace(lambda done, total: told.append((done, total)), clock=lambda: next(times))
    assert pace.seconds is None
    pace(5, 20)  # four before an interruption, and one that pays for compiling
    assert pace.seconds is None
    pace(6, 20)
    assert pace.seconds == 20 * 2.0
    pace(7, 20)
    assert pace.seconds == 20 * 4.5 / 2
    assert told == [(5, 20), (6, 20), (7, 20)]


def test_stages_are_shown_with_what_saves_them() -> None:
    found = Forecast({"ranges": 100, "smoothing": 0, "rounding": 900, "corrections": 6000}, row_seconds=3.0)
    assert found.seconds == 21_000
    for words in (
        "3 s a picture",
        "up to 5.8 h follow",
        "ranges 5 min, rounding 45 min (--recon off saves it)",
        "5.0 h",
    ):
        assert words in str(found)
    assert "smoothing" not in str(found)

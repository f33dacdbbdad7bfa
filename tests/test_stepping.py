"""Ranges of timesteps: which bits a timestep has, their words, their file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qncd_deploy.errors import BundleError
from qncd_deploy.stepping import Stepping, StepRange, load_stepping, save_stepping

THREE = Stepping((StepRange(700.5, 4), StepRange(200.0, 6), StepRange(0.0, 8)))


def test_a_timestep_belongs_to_the_first_range_that_reaches_down_to_it() -> None:
    assert [THREE.act_bits(t) for t in (999, 700.5, 700.4, 200, 199.9, 0)] == [4, 4, 6, 6, 8, 8]
    assert THREE.suffixes == {4: "-a4", 6: "-a6", 8: ""}
    assert THREE.line() == "4 bits from t = 700.5 on, 6 from 200 on, 8 below"
    assert Stepping((StepRange(5.0, 4), StepRange(0.0, 8))).line() == "4 bits from t = 5 on, 8 below"


@pytest.mark.parametrize(
    "ranges",
    [
        (),
        ((0.0, 8),),
        ((5.0, 4), (1.0, 8)),  # nothing for t = 0
        ((5.0, 8), (0.0, 4)),  # fewer bits at the clean end
        ((5.0, 4), (5.0, 6), (0.0, 8)),
        ((5.0, 4), (0.0, 4)),
    ],
)
def test_ranges_fall_to_zero_and_bits_rise(ranges: tuple[tuple[float, int], ...]) -> None:
    with pytest.raises(ValueError, match="two ranges or more"):
        Stepping(tuple(StepRange(*each) for each in ranges))


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    edge = Stepping((StepRange(947.3684210526316, 4), StepRange(0.0, 8)))  # a timestep of Euler's
    for each in (THREE, edge):
        save_stepping(tmp_path / "stepping.json", each)
        assert load_stepping(tmp_path / "stepping.json") == each


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a list of ranges"),
        ("[]", "not a list of ranges"),
        (json.dumps({"schema": 2, "ranges": []}), "schema 2, this version of qncd-deploy reads schema 1"),
        (json.dumps({"schema": 1, "ranges": [{"from_t": 0.0, "act_bits": 8}]}), "two ranges or more"),
        (json.dumps({"schema": 1, "ranges": [{"from_t": 5.0}]}), "act_bits"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "stepping.json"
    path.write_text(text)
    with pytest.raises(BundleError) as caught:
        load_stepping(path)
    assert str(path) in str(caught.value) and words in str(caught.value)
    with pytest.raises(BundleError, match="absent"):
        load_stepping(tmp_path / "absent.json")

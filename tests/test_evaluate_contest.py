"""The record of how a correction was chosen: what it says, and that a manifest and the tables keep it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qncd_deploy.correct.methods import METHODS
from qncd_deploy.correct.record import CorrectionTable, ScheduleKey, identity_table, load_tables, save_tables
from qncd_deploy.errors import BundleError
from qncd_deploy.evaluate.contest import Contest, contests_of, half_of, kind_of
from qncd_deploy.files import canonical_json

CONTEST = Contest(
    choice="filter+ibc",
    objective="shift",
    pictures=9,
    confidence=0.95,
    figures={"off": 0.5, "tac": 0.3, "filter": 0.2, "filter+ibc": 0.1},
    screened={"off": 0.6, "ptqd": 0.35, "tac": 0.4, "filter": 0.3, "dns": math.nan, "filter+ibc": 0.2},
    best="filter+ibc",
    confirmed={"off": 0.55, "filter+ibc": 0.12},
    wins=0.97,
    confirming=18,
    refused={"d2dpm": "too few"},
    latent_snr_db={name: (10.0, 200.0) for name in ("off", "ptqd", "tac", "filter", "filter+ibc", "dns")},
)


def test_a_manifest_keeps_it() -> None:
    given = replace(CONTEST, screened={"off": 0.123456, "dns": math.nan, "tac": math.inf})
    held = Contest.from_json(json.loads(canonical_json(given.to_json())))
    assert held.screened.pop("off") == 0.1235  # four digits
    assert held.order(held.screened) == ["dns", "tac"] and all(map(math.isnan, held.screened.values()))
    same = (
        "choice",
        "objective",
        "pictures",
        "confidence",
        "figures",
        "best",
        "confirmed",
        "wins",
        "confirming",
        "refused",
    )
    for name in (*same, "latent_snr_db"):
        assert getattr(held, name) == getattr(given, name), name


def test_curves_stay_numbers_of_the_same_sign() -> None:
    given = replace(CONTEST, latent_snr_db={"off": (10.0, math.inf, -math.inf, math.nan)})
    held = Contest.from_json(json.loads(canonical_json(given.to_json())))
    assert held.latent_snr_db["off"] == (10.0, 200.0, -200.0, -200.0)


def test_ranks_all_pictures_before_half_of_them_and_numbers_before_none() -> None:
    ranked = CONTEST.ranked
    assert [each.name for each in ranked] == ["filter+ibc", "filter", "tac", "off", "ptqd", "dns"]
    assert [each.kind for each in ranked] == ["combined", "ours", "published", "none", "published", "published"]
    assert (ranked[1].half, ranked[1].whole) == (0.3, 0.2)
    assert (ranked[4].half, ranked[4].whole) == (0.35, None)
    more = replace(CONTEST, objective="psnr")
    assert [each.name for each in more.ranked] == ["off", "tac", "filter", "filter+ibc", "ptqd", "dns"]


def test_the_best_published_is_one_on_all_pictures_if_there_is_one() -> None:
    assert CONTEST.best_published == "tac"  # though ptqd did better on half of them
    assert replace(CONTEST, figures={"off": 0.5, "filter": 0.2}).best_published == "ptqd"
    assert replace(CONTEST, figures={"off": 0.5}, screened={"filter": 0.3}).best_published is None


@pytest.mark.parametrize(("choice", "significant"), [("filter+ibc", True), ("filter", False), ("off", False)])
def test_significance_is_of_the_choice(choice: str, significant: bool) -> None:
    assert replace(CONTEST, choice=choice).significant is significant
    assert not replace(CONTEST, choice=choice, wins=0.94).significant


def test_curves_are_of_what_explains_the_choice_and_combinations_come_last() -> None:
    assert list(CONTEST.curves(9)) == ["off", "filter+ibc", "tac", "filter", "ptqd", "dns"]
    assert list(CONTEST.curves(3)) == ["off", "filter+ibc", "tac"]
    assert list(replace(CONTEST, choice="off").curves(9)) == ["off", "tac", "filter", "ptqd", "dns", "filter+ibc"]


def test_every_method_is_of_a_kind_and_a_part_of_one_is_made_of_it() -> None:
    assert {kind_of(name) for name in METHODS} == {"published", "ours"}
    assert kind_of("ptqd@late") == kind_of("ibc-map") == "combined"


def test_older_files_do_not_say_how_many_pictures_confirmed() -> None:
    facts = CONTEST.to_json()
    del facts["confirming"]
    assert "instead of 0.55 on fresh pictures, better in 97%" in Contest.from_json(facts).line()


def test_half_of_nearly_nothing_is_two() -> None:
    assert [half_of(count) for count in (1, 2, 3, 4, 5, 64)] == [1, 2, 2, 2, 2, 32]
    assert CONTEST.half == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "filter+ibc: shift 0.12 instead of 0.55 on 18 fresh pictures, better in 97% of their resamples"),
        ({"choice": "tac"}, "tac, asked for by name"),
        (
            {"choice": "off", "wins": 0.894},
            "nothing: filter+ibc, the best, is better in 89% of the resamples of 18 fresh pictures, 95% are asked for",
        ),
        ({"choice": "off", "best": None, "wins": None}, "nothing: none is better by shift on 9 held-out pictures"),
    ],
)
def test_a_line_says_what_auto_takes_and_why(changes: dict[str, object], said: str) -> None:
    assert replace(CONTEST, **changes).line() == said


def test_tables_keep_it_by_the_way_to_sample(tmp_path: Path) -> None:
    key = ScheduleKey("ddim", (501.0, 1.0), 0.0, 1.5, "epsilon", "5" * 64, "openvino-f32", "7" * 64)
    other = replace(key, eta=1.0)
    tables = [CorrectionTable("ptqd", each, identity_table(each).fixes) for each in (key, other)]
    path = tmp_path / "corrections.npz"
    save_tables(path, tables, auto={}, contests={key.id: CONTEST.to_json()})
    (held,) = contests_of(load_tables(path)).items()
    assert held[0] == key and held[1].line() == CONTEST.line()
    save_tables(path, tables, auto={}, contests={key.id: {"choice": "off"}})
    with pytest.raises(BundleError, match=r"corrections\.npz: damaged corrections .*Run `qncd fit`"):
        contests_of(load_tables(path))

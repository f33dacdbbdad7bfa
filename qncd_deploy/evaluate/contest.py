"""How corrections did on held-out pictures when one was chosen: what was tried, what it gave, and what was refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from qncd_deploy.correct.methods import METHODS
from qncd_deploy.correct.record import ScheduleKey, Tables
from qncd_deploy.errors import BundleError

OBJECTIVES = ("shift", "psnr")
OFF = "off"
CAP_DB = 200.0
"""Curves end here: equal arrays have an infinite SNR, and JSON has no number for it."""

Kind = Literal["none", "published", "ours", "combined"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Contest:
    """What `--correction auto` takes on one engine, and by which figures.

    choice: a name, OFF if nothing is better beyond chance;  objective: "shift", where less is better, or "psnr", in dB;
    pictures: held out to choose by, in all, 0 where nothing competed;  screened: the objective of every candidate on
    the first half of them;  figures: on all of them, of OFF, the finalists and what was made of these;  best: of
    `figures`, None if that is OFF;  confirmed: the objective of OFF and `best` on fresh pictures, which nothing was
    chosen by;  wins: the share of bootstrap resamples of these in which `best` beats OFF;  confirming: how many they
    are, None where nobody wrote it down;  confidence: the share that is asked for;  refused: why a method could not be
    fitted;  latent_snr_db: one a network call, over the same few pictures for all; see evaluate.batches.
    """

    choice: str
    objective: str
    pictures: int
    confidence: float
    figures: Mapping[str, float]
    screened: Mapping[str, float]
    best: str | None = None
    confirmed: Mapping[str, float] = field(default_factory=dict)
    wins: float | None = None
    confirming: int | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    latent_snr_db: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """To be kept: plain values, rounded to what means anything; null for what is no finite number."""
        return {
            "choice": self.choice,
            "objective": self.objective,
            "pictures": self.pictures,
            "confidence": self.confidence,
            "best": self.best,
            "confirmed": {name: _plain(value) for name, value in self.confirmed.items()},
            "wins": self.wins,
            "confirming": self.confirming,
            "refused": dict(self.refused),
            "figures": {name: _plain(value) for name, value in self.figures.items()},
            "screened": {name: _plain(value) for name, value in self.screened.items()},
            "latent_snr_db": {
                name: [_capped(value) for value in values] for name, values in self.latent_snr_db.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Contest:
        """What to_json made. Raises KeyError if something is missing."""
        plain = {part.name: data[part.name] for part in fields(Contest) if part.name != "confirming"}
        plain["confirming"] = data.get("confirming")  # which older files do not have
        for tried in ("figures", "screened", "confirmed"):
            plain[tried] = {name: math.nan if value is None else value for name, value in data[tried].items()}
        plain["latent_snr_db"] = {name: tuple(values) for name, values in data["latent_snr_db"].items()}
        return cls(**plain)

    def line(self) -> str:
        """What auto takes and why, in a line."""
        if self.choice == OFF and self.best is None:
            return f"nothing: none is better by {self.objective} on {self.pictures} held-out pictures"
        if self.choice == OFF:
            return (
                f"nothing: {self.best}, the best, is better in {self.wins:.0%} of the resamples of "
                f"{self.fresh}, {self.confidence:.0%} are asked for"
            )
        if not self.significant:
            return f"{self.choice}, asked for by name"
        figure, plain = (f"{self.confirmed[name]:.3g}" for name in (self.choice, OFF))
        return (
            f"{self.choice}: {self.objective} {figure} instead of {plain} on {self.fresh}, better in "
            f"{self.wins:.0%} of their resamples"
        )

    @property
    def less_is_better(self) -> bool:
        return self.objective == "shift"

    @property
    def half(self) -> int:
        """How many pictures everything is tried on first."""
        return half_of(self.pictures)

    @property
    def fresh(self) -> str:
        """The pictures of `confirmed`, in words."""
        return "fresh pictures" if self.confirming is None else f"{self.confirming} fresh pictures"

    @property
    def significant(self) -> bool:
        """Whether the choice beats OFF by the share that is asked for; it need not if a user asked for it by name."""
        return self.choice == self.best and self.wins is not None and self.wins >= self.confidence

    @property
    def best_published(self) -> str | None:
        """The best single published method, on all pictures if one got so far."""
        for tried in (self.figures, self.screened):
            found = [name for name in self.order(tried) if kind_of(name) == "published"]
            if found:
                return found[0]
        return None

    def order(self, tried: Mapping[str, float]) -> list[str]:
        """Names of `figures` or `screened`, the best first and what is not a number last."""

        def cost(name: str) -> float:
            value = tried[name]
            return math.inf if math.isnan(value) else value if self.less_is_better else -value

        return sorted(tried, key=lambda name: (cost(name), name))

    @property
    def ranked(self) -> tuple[Standing, ...]:
        """Everything that competed: by what it gave on all pictures, then by what it gave on half of them."""
        screened_only = [name for name in self.order(self.screened) if name not in self.figures]
        return tuple(
            Standing(
                name=name,
                kind=kind_of(name),
                half=self.screened.get(name),
                whole=self.figures.get(name),
            )
            for name in (*self.order(self.figures), *screened_only)
        )

    def curves(self, most: int) -> dict[str, tuple[float, ...]]:
        """latent_snr_db of OFF, the choice, the best single published method and the best other ones, `most` in all;
        combinations last, since they differ little from what they are made of."""
        others = sorted((each.name for each in self.ranked), key=lambda name: kind_of(name) == "combined")
        ranked = (OFF, self.choice, self.best_published, *others)
        names = [name for name in dict.fromkeys(ranked) if name is not None and name in self.latent_snr_db]
        return {name: self.latent_snr_db[name] for name in names[:most]}


def contests_of(tables: Tables) -> dict[ScheduleKey, Contest]:
    """How the choices of a corrections file came about, where it says so. Raises BundleError if it is damaged there."""
    try:
        return {key: Contest.from_json(tables.contests[key.id]) for key in tables.keys if key.id in tables.contests}
    except (KeyError, TypeError, AttributeError) as exc:
        raise BundleError(f"{tables.path}: damaged corrections ({exc!r}). Run `qncd fit` to fit them again.") from exc


@dataclass(frozen=True)
class Standing:
    """What a candidate gave, by the objective, on half and on all of the pictures; see Contest."""

    name: str
    kind: Kind
    half: float | None
    whole: float | None


def kind_of(name: str) -> Kind:
    """Whether a candidate is a single method, of a paper or ours, or made of several or of a part of one."""
    if name == OFF:
        return "none"
    if name not in METHODS:
        return "combined"
    return "published" if METHODS[name].published else "ours"


def _plain(value: float) -> float | None:
    """To four significant digits."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _capped(value: float) -> float:
    """Decibels to four digits and within CAP_DB; what is not a number has nothing left of the signal."""
    return float(f"{min(max(value, -CAP_DB), CAP_DB):.4g}") if not math.isnan(value) else -CAP_DB


def half_of(count: int) -> int:
    """Half of so many pictures, rounded down, but two at least where there are: one alone has no distribution."""
    return max(min(2, count), count // 2)

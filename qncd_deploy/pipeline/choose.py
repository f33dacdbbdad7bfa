"""`--correction auto`: which correction, of which parts and over which calls, makes held-out pictures best.

1. Every fitted table is tried on the first half of the held-out pictures; the best few and "off" on all of them.
2. The best of them is tried without its residual variance, and on a part of the calls only.
3. The best is taken if it beats "off" in CONFIDENCE of the bootstrap resamples; else nothing is corrected.

Per-step error never decides: it prefers shrinking the output, which a deterministic sampler turns into pictures that
are too spread out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qncd_deploy.correct.combine import only, parts, without
from qncd_deploy.correct.fitting import Study
from qncd_deploy.correct.record import StepFix
from qncd_deploy.pipeline.arena import Arena, Candidate

FINALISTS = 4
CONFIDENCE = 0.95
OFF = "off"


@dataclass(frozen=True, eq=False)
class Choice:
    """taken: the candidate that wins, None for "off";  figures: the objective of every candidate tried on all held-out
    pictures;  screened: of every candidate, on the first half of them;  wins: how often each of `figures` beats "off".
    """

    taken: Candidate | None
    figures: Mapping[str, float]
    screened: Mapping[str, float]
    wins: Mapping[str, float]


def choose(study: Study, fitted: Mapping[str, tuple[StepFix, ...]], arena: Arena) -> Choice:
    """Let the fitted tables, and what can be made of the best of them, compete."""
    off = Candidate(OFF, tuple(StepFix() for _ in study.steps))
    half, whole = max(1, len(arena) // 2), len(arena)
    entrants = [Candidate(name, fixes) for name, fixes in fitted.items()]
    finalists = sorted(entrants, key=lambda each: arena.cost(each, half))[:FINALISTS]
    tried = [off, *finalists]
    best = min(tried, key=lambda each: arena.cost(each, whole))
    for kind in (_with_other_variance, _on_some_calls):
        found = list(kind(study, best))
        tried += found
        best = min([best, *found], key=lambda each: arena.cost(each, whole))
    wins = {each.name: arena.wins(each, off, whole) for each in tried if each is not off}
    return Choice(
        taken=best if wins.get(best.name, 0.0) >= CONFIDENCE else None,
        figures={each.name: arena.figure(each, whole) for each in tried},
        screened={each.name: arena.figure(each, half) for each in (off, *entrants)},
        wins=wins,
    )


def _with_other_variance(study: Study, base: Candidate) -> Iterator[Candidate]:
    if "variance" in parts(base.fixes, study.steps) and "output" in parts(base.fixes, study.steps):
        yield Candidate(f"{base.name}-var", without(base.fixes, "variance"))


def _on_some_calls(study: Study, base: Candidate) -> Iterator[Candidate]:
    """The first two thirds, the last third, the last call alone. A row that moves the noise level is tied to its
    neighbours, so such tables are not cut."""
    calls = len(study.steps)
    moves_levels = any(fix.abar is not None or fix.abar_next is not None for fix in base.fixes)
    if base.name == OFF or moves_levels or calls < 3:
        return
    cut = calls - calls // 3
    for name, some in (("early", range(cut)), ("late", range(cut, calls)), ("last", range(calls - 1, calls))):
        yield Candidate(f"{base.name}@{name}", only(base.fixes, some))

"""`--correction auto`: which correction, of which parts and over which calls, makes held-out pictures best.

1. Every fitted table is tried on the first half of the held-out pictures; the best few and "off" on all of them.
2. What the best of them lacks is put beside it, where the rules allow that: the variance it leaves over spent in
   another way, or not at all; a part of the calls only; then, since it is measured with all the rest active, the mean
   of the accumulated error taken out of the input, per channel or per element. Each stays only if it makes the
   pictures better, first half of them, then all.
3. The best of so many is lucky as well as good. So it is tried on as many pictures that nothing was chosen by, and
   taken if it beats "off" in CONFIDENCE of their bootstrap resamples; else nothing is corrected.

Per-step error never decides: it prefers shrinking the output, which a deterministic sampler turns into pictures that
are too spread out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from qncd_deploy.correct import dns, qdrift, tac
from qncd_deploy.correct.fitting import Study
from qncd_deploy.correct.record import StepFix
from qncd_deploy.correct.rules import active, only, without_variance
from qncd_deploy.errors import CalibrationError
from qncd_deploy.evaluate.contest import OFF
from qncd_deploy.pipeline.arena import Arena, Candidate

FINALISTS = 4
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Choice:
    """taken: the candidate that wins, None for "off";  the others: see Contest."""

    taken: Candidate | None
    best: str | None
    confirmed: Mapping[str, float]
    wins: float | None
    figures: Mapping[str, float]
    screened: Mapping[str, float]
    latent_snr_db: Mapping[str, tuple[float, ...]]


def choose(
    study: Study,
    fitted: Mapping[str, tuple[StepFix, ...]],
    arena: Arena,
    fresh: Callable[[], Arena],
    *,
    shortlist: Container[str] | None = None,
) -> Choice:
    """Let the fitted tables, and what can be made of the best of them, compete.

    fresh: an arena of other pictures, asked for if there is anything to confirm;  shortlist: only these enter, such as
    those that came far on another engine.
    """
    off = Candidate(OFF, tuple(StepFix() for _ in study.steps))
    half, whole = arena.half, len(arena)
    entrants = [Candidate(name, fixes) for name, fixes in fitted.items() if shortlist is None or name in shortlist]
    finite = [each for each in entrants if math.isfinite(arena.cost(each, half))]
    finalists = sorted(finite, key=lambda each: arena.cost(each, half))[:FINALISTS]
    screened, tried = [off, *entrants], [off, *finalists]
    best = min(tried, key=lambda each: arena.cost(each, whole))
    for kind in (_with_other_variance, _on_some_calls, _with_input):
        made = list(kind(study, best))
        found = [each for each in made if arena.cost(each, half) < arena.cost(best, half)]
        screened += made
        tried += found
        best = min([best, *found], key=lambda each: arena.cost(each, whole))
    confirmed: dict[str, float] = {}
    wins = None
    if best is not off:
        confirming = fresh()
        confirmed = {each.name: confirming.figure(each, len(confirming)) for each in (off, best)}
        wins = confirming.wins(best, off, len(confirming))
    return Choice(
        taken=best if wins is not None and wins >= CONFIDENCE else None,
        best=None if best is off else best.name,
        confirmed=confirmed,
        wins=wins,
        figures={each.name: arena.figure(each, whole) for each in tried},
        screened={each.name: arena.figure(each, half) for each in screened},
        latent_snr_db={each.name: arena.latent_snr_db(each) for each in screened},
    )


def _with_input(study: Study, base: Candidate) -> Iterator[Candidate]:
    """The mean of what has added up in spite of `base`, call after call, taken out of the network's input."""
    if "input" in active(base.fixes, study.steps):
        return
    for per, name in _INPUTS.items():
        try:
            yield Candidate(_joined(base, name), tac.fit_ibc(study, base.fixes, per=per))
        except CalibrationError:  # too few pictures for so many means
            continue


_INPUTS: Mapping[Literal["channel", "element"], str] = {"channel": "ibc", "element": "ibc-map"}


def _with_other_variance(study: Study, base: Candidate) -> Iterator[Candidate]:
    """What the map leaves over: not spent, or spent by Q-Drift's gain or DNS's targets where no noise could take it.
    What was measured with the rows as they are, a table's input part, is tied to them: such tables are left alone.
    """
    found = active(base.fixes, study.steps)
    if "input" in found:
        return
    if found.keys() > {"variance"}:
        yield Candidate(f"{base.name}-var", without_variance(base.fixes))
    elif "output" in found and any(fix.var for fix in base.fixes):
        for name, spend in (("qdrift", qdrift.with_gain), ("dns", dns.with_target)):
            fixes = spend(base.fixes, study.steps, prediction=study.prediction)
            if "variance" in active(fixes, study.steps):
                yield Candidate(_joined(base, name), fixes)


def _on_some_calls(study: Study, base: Candidate) -> Iterator[Candidate]:
    """The first two thirds, the last third, the last call alone. Rows that move the noise level, or take out what rows
    before them have let add up, are tied to their neighbours, so such tables are not cut."""
    calls = len(study.steps)
    moves_levels = any(fix.abar is not None or fix.abar_next is not None for fix in base.fixes)
    if base.name == OFF or moves_levels or "input" in active(base.fixes, study.steps) or calls < 3:
        return
    cut = calls - calls // 3
    for name, some in (("early", range(cut)), ("late", range(cut, calls)), ("last", range(calls - 1, calls))):
        yield Candidate(f"{base.name}@{name}", only(base.fixes, some))


def _joined(base: Candidate, name: str) -> str:
    return name if base.name == OFF else f"{base.name}+{name}"

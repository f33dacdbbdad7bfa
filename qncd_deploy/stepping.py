"""How many bits activations have at which timestep: ranges, and the file of a bundle that holds them.

    stepping.json    {"schema": 1, "ranges": [{"from_t": 751.0, "act_bits": 4}, {"from_t": 0.0, "act_bits": 8}]}

The range of a timestep is the first whose from_t is not above it, so the list goes from the noisy end to the clean one.
Ranges are of timesteps, not of calls, as PTQD's are (He et al., arXiv:2305.10657): they hold for any sampler and number
of steps. The last one has the bits of the bundle's own plan; the others' graphs go by the suffix "-aBITS".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qncd_deploy.errors import BundleError
from qncd_deploy.files import atomic_file, canonical_json

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class StepRange:
    """Timesteps of from_t and more, up to the next range, and the bits of activations there."""

    from_t: float
    act_bits: int


@dataclass(frozen=True)
class Stepping:
    """Two ranges or more: from_t falls, to 0, and bits rise."""

    ranges: tuple[StepRange, ...]

    def __post_init__(self) -> None:
        ordered = all(a.from_t > b.from_t and a.act_bits < b.act_bits for a, b in pairwise(self.ranges))
        if len(self.ranges) < 2 or not ordered or self.ranges[-1].from_t != 0:
            raise ValueError("expected two ranges or more, of falling timesteps down to 0 and of rising bits")

    def act_bits(self, t: float) -> int:
        """Of the network that a timestep >= 0 is given to."""
        return next(each.act_bits for each in self.ranges if t >= each.from_t)

    @property
    def suffixes(self) -> Mapping[int, str]:
        """Of the graphs' names and roles by their bits, "" for the bundle's own; in the order of the ranges."""
        *narrow, widest = (each.act_bits for each in self.ranges)
        return {**{bits: f"-a{bits}" for bits in narrow}, widest: ""}

    def line(self) -> str:
        """In words: 4 bits from t = 751 on, 8 below."""
        first, *others = self.ranges
        parts = [f"{first.act_bits} bits from t = {first.from_t:g} on"]
        parts += [f"{each.act_bits} from {each.from_t:g} on" for each in others[:-1]]
        return ", ".join([*parts, f"{others[-1].act_bits} below"])

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "ranges": [asdict(each) for each in self.ranges]}


def save_stepping(path: Path, stepping: Stepping) -> None:
    with atomic_file(path) as partial:
        partial.write_text(canonical_json(stepping.to_json()), encoding="utf-8")


def load_stepping(path: Path) -> Stepping:
    """Raises BundleError for a file that cannot be read or understood, and for another schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data["schema"]
        if schema != SCHEMA:
            raise BundleError(
                f"{path}: schema {schema!r}, this version of qncd-deploy reads schema {SCHEMA}. "
                "Install the version that wrote it, or run `qncd export` again."
            )
        return Stepping(tuple(StepRange(float(each["from_t"]), int(each["act_bits"])) for each in data["ranges"]))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise BundleError(f"{path}: not a list of ranges ({exc}). Run `qncd export` again.") from exc

"""The correction record: what to change at one network call; tables of such rows, and the file that holds them.

    x_in = x + x_add
    q    = network(x_in, t_model)
    out  = where(mask, a q + b, q) + conv3x3([q, x_in], f)
    eps  = eps(out) - m_gain m + z_std n,  n ~ N(0, I)
    x'   = update of steps.py with abar, abar_next, std'^2 = max(0, std^2 - B^2 var), gain on the increment in x / a
    x    = x_mul (x' - x_sub)
    refresh: with m = 0 so far, re-noise x to the level it came from with a known e1, m = pool(eps - e1) - m_ref; redo

Every published correction of the sampling loop is a choice of these numbers; none is a branch of the loop.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from qncd_deploy.errors import BundleError, ScheduleError
from qncd_deploy.files import canonical_json, load_npz, save_npz
from qncd_deploy.schedule import Schedule
from qncd_deploy.specs import Array, pixels
from qncd_deploy.steps import SamplerConfig, Step, make_steps

SCHEMA = 1

Pool = Literal["batch", "sample-channel"]
Coef = Literal["s", "s_eff"]
Mask = Literal["two-sided", "one-sided"]


@dataclass(frozen=True, slots=True, eq=False)
class StepFix:
    """What to change at one network call; the defaults change nothing, bit for bit. C: latent channels.

    Arrays become float32; they are of the kind (NumPy, device) that the loop runs on. a, b, f and thr act on the raw
    output, after guidance; m, z_std and var are in units of eps.

    t_model     timestep fed to the network; None: the sampler's own
    abar        cumulative alpha used for the update, abar_next its target; None: the schedule's (see fixed_steps)
    x_add       (C,) or (C, H, W) added to the state before the call
    a, b        a: number, (C,) or (C, C) mixing channels;  b: number, (C,) or (C, H, W)
    f           (C, 2C, 3, 3): filter over [q, x_in], zero padding; None: off
    thr, mask   a, b only where |q| >= thr mean|q| ("two-sided") or q > thr mean|q| ("one-sided"), the mean being over
                each picture; 0: everywhere
    var         residual variance of eps, taken out of the sampler's own noise;  coef: see steps.absorb
    gain        factor on the increment of the state in x / sqrt(abar)
    z_std       standard deviation of noise added to eps
    x_mul       factor on the state after the update, once x_sub, a number, (C,) or (C, H, W), is subtracted
    refresh     measure m here, at the cost of one more network call
    m_ref       (C,) the float model's own mean of this probe, subtracted from m
    m_pool      "batch": one m for all pictures, e1 as drawn;  "sample-channel": one m for each picture and channel,
                e1 made exactly zero-mean in each
    m_gain      how much of the running m is subtracted at this row
    """

    t_model: float | None = None
    abar: float | None = None
    abar_next: float | None = None
    x_add: Array | float = 0.0
    a: Array | float = 1.0
    b: Array | float = 0.0
    f: Array | None = None
    thr: float = 0.0
    mask: Mask = "two-sided"
    var: float = 0.0
    coef: Coef = "s"
    gain: float = 1.0
    z_std: float = 0.0
    x_mul: float = 1.0
    x_sub: Array | float = 0.0
    refresh: bool = False
    m_ref: Array | float = 0.0
    m_pool: Pool = "sample-channel"
    m_gain: float = 1.0

    def __post_init__(self) -> None:
        for name in _DEFAULTS:  # NumPy scalars and float64 arrays would widen the loop's float32 arrays
            value = getattr(self, name)
            if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
                object.__setattr__(self, name, value.item())
            elif isinstance(value, np.ndarray):
                object.__setattr__(self, name, value.astype(np.float32, copy=False))
        for name, kind in (("mask", Mask), ("coef", Coef), ("m_pool", Pool)):
            if getattr(self, name) not in get_args(kind):
                raise ScheduleError(
                    f"correction row: {name} is {getattr(self, name)!r}, expected one of {', '.join(get_args(kind))}."
                )
        for name in ("thr", "var", "z_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ScheduleError(f"correction row: {name} is {getattr(self, name)}, expected 0 or more.")


_DEFAULTS = {f.name: f.default for f in fields(StepFix)}


def fixed_steps(schedule: Schedule, config: SamplerConfig, fixes: Sequence[StepFix]) -> tuple[Step, ...]:
    """The sampler's rows with the table's abar and abar_next in place of the schedule's: the loop needs these."""
    return make_steps(schedule, config, abar=[f.abar for f in fixes], abar_next=[f.abar_next for f in fixes])


@dataclass(frozen=True, slots=True)
class ScheduleKey:
    """What a table was fitted for; it is valid for nothing else.

    timesteps: of every network call; prediction: what the network returns; schedule_sha: Schedule.sha256();
    backend: engine and precision of its remainder ("openvino-f32"); plan_sha: hash of the quantization plan;
    sides: (height, width) of the pictures in pixels, where the network draws any size; else None.
    """

    scheduler: str
    timesteps: tuple[float, ...]
    eta: float
    guidance_scale: float
    prediction: str
    schedule_sha: str
    backend: str
    plan_sha: str
    sides: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        config: SamplerConfig,
        *,
        guidance_scale: float,
        backend: str,
        plan_sha: str,
        sides: tuple[int, int] | None = None,
    ) -> ScheduleKey:
        """The key of one way to sample with one engine."""
        return cls(
            scheduler=config.scheduler,
            timesteps=tuple(s.t for s in make_steps(schedule, config)),
            eta=float(config.eta),
            guidance_scale=float(guidance_scale),
            prediction=schedule.prediction,
            schedule_sha=schedule.sha256(),
            backend=backend,
            plan_sha=plan_sha,
            sides=sides,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScheduleKey:
        """What to_json wrote."""
        sides = data.get("sides")
        held = {"timesteps": tuple(data["timesteps"]), "sides": None if sides is None else tuple(sides)}
        return cls(**{**data, **held})

    def to_json(self) -> dict[str, Any]:
        """Plain values; `sides` only where there are any, as files of earlier versions have none."""
        return {name: value for name, value in asdict(self).items() if name != "sides" or value is not None}

    @property
    def n_steps(self) -> int:
        """Sampling steps: PLMS' second call repeats a timestep."""
        return len(set(self.timesteps))

    @property
    def id(self) -> str:
        """Short name of this key, the same in every process."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()[:16]

    def mismatch(self, asked: ScheduleKey) -> str | None:
        """What a table of this key was fitted for and what is asked for, where they differ; None if they do not."""
        pairs = [(f, w) for f, w in zip(self._facts(), asked._facts(), strict=True) if f[0] != w[0]]
        if not pairs:
            return None
        fitted, wanted = (", ".join(words for _, words in side) for side in zip(*pairs, strict=True))
        return f"fitted for {fitted}, asked for {wanted}"

    def distance(self, asked: ScheduleKey) -> int:
        """In how many respects two keys differ."""
        return sum(f[0] != w[0] for f, w in zip(self._facts(), asked._facts(), strict=True))

    def _facts(self) -> tuple[tuple[Any, str], ...]:
        """Every value with its words for a message."""
        span = f"t = {self.timesteps[0]:g} .. {self.timesteps[-1]:g}" if self.timesteps else "no timesteps"
        return (
            (self.scheduler, f"scheduler {self.scheduler}"),
            (self.timesteps, f"n_steps {self.n_steps} ({span})"),
            (self.eta, f"eta {self.eta}"),
            (self.guidance_scale, f"guidance scale {self.guidance_scale}"),
            (self.prediction, f"{self.prediction} prediction"),
            (self.schedule_sha, f"noise schedule {self.schedule_sha[:8]}"),
            (self.backend, f"backend {self.backend}"),
            (self.plan_sha, f"plan {self.plan_sha[:8]}"),
            (self.sides, "one size" if self.sides is None else pixels(self.sides)),
        )

    def fit_command(self, bundle: Path | str) -> str:
        """The command that fits a table for this key and no other, whatever the bundle's own choices are."""
        backend, _, remainder = self.backend.rpartition("-")
        eta, scale = (np.format_float_positional(value, trim="-") for value in (self.eta, self.guidance_scale))
        noise = f" --eta {eta}" if self.scheduler == "ddim" else ""  # 0 too: the bundle's own may be another
        size = "" if self.sides is None else " --height {} --width {}".format(*self.sides)
        return (
            f"qncd fit {shlex.quote(str(bundle))} --backend {backend} --scheduler {self.scheduler} "
            f"--n-steps {self.n_steps}{noise} --guidance-scale {scale} --remainder {remainder}{size}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class CorrectionTable:
    """One method, fitted for one key: a row per network call, and the figures of the fit (plain JSON values)."""

    method: str
    key: ScheduleKey
    fixes: tuple[StepFix, ...]
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.fixes) == len(self.key.timesteps), f"{self.method}: {len(self.fixes)} rows for {self.key}"


def identity_table(key: ScheduleKey) -> CorrectionTable:
    """The table of method "off"."""
    return CorrectionTable("off", key, tuple(StepFix() for _ in key.timesteps))


@dataclass(frozen=True, slots=True)
class Tables:
    """Everything in one corrections file.

    auto: key id -> the method that `--correction auto` chose there;  contests: key id -> how it was chosen, as
    evaluate.contest keeps it (plain JSON values).
    """

    path: Path
    tables: tuple[CorrectionTable, ...]
    auto: Mapping[str, str]
    contests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[ScheduleKey, ...]:
        """The ways to sample that something was fitted for, each once, by engine."""
        return tuple(sorted({table.key for table in self.tables}, key=lambda key: (key.backend, key.id)))

    def choice(self, key: ScheduleKey) -> str | None:
        """The method that was chosen for this key; None if nothing was fitted for it."""
        return self.auto.get(key.id)

    def find(self, method: str, key: ScheduleKey) -> CorrectionTable:
        """The table of a method for exactly this key. Raises ScheduleError: what differs, and what to run."""
        if method == "off":
            return identity_table(key)
        named = [t for t in self.tables if t.method == method]
        for table in named:
            if table.key == key:
                return table
        run = f"Run `{key.fit_command(self.path.parent)}`."
        if not named:
            held = ", ".join(sorted({t.method for t in self.tables})) or "nothing"
            raise ScheduleError(f"{self.path}: no table for correction {method!r}, it holds {held}. {run}")
        nearest = min(named, key=lambda t: t.key.distance(key))
        raise ScheduleError(f"{self.path}: correction {method!r} was {nearest.key.mismatch(key)}. {run}")


def save_tables(
    path: Path,
    tables: Sequence[CorrectionTable],
    *,
    auto: Mapping[str, str],
    contests: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a corrections file, whole or not at all; its bytes depend on the tables alone, not on their order.

    Layout: `meta`, UTF-8 JSON as uint8: {"schema", "auto", "contests", "tables": [{"method", "key", "info", "rows"}]},
    where a row holds only what differs from StepFix(); an array is {"array": name, "index": i}: entry i of the float32
    array `name`, which stacks one field's values over the rows of one table that have the same shape. Files of earlier
    versions have no contests.
    """
    arrays: dict[str, np.ndarray] = {}
    entries = []
    for number, table in enumerate(sorted(tables, key=lambda t: (t.key.id, t.method))):
        stacks: dict[str, list[np.ndarray]] = {}
        rows = [_row_to_json(fix, f"{number:03d}", stacks) for fix in table.fixes]
        arrays |= {name: np.stack(values) for name, values in stacks.items()}
        entries.append({"method": table.method, "key": table.key.to_json(), "info": dict(table.info), "rows": rows})
    meta = {"schema": SCHEMA, "auto": dict(auto), "contests": dict(contests or {}), "tables": entries}
    save_npz(path, arrays | {"meta": np.frombuffer(canonical_json(meta).encode(), dtype=np.uint8)})


def load_tables(path: Path) -> Tables:
    """Read a corrections file. Raises BundleError if it is damaged, of an unknown schema, or not one of ours."""
    arrays = load_npz(path)
    try:
        meta = json.loads(arrays["meta"].tobytes())
        schema = meta["schema"]
    except (KeyError, ValueError, TypeError) as exc:
        raise BundleError(f"{path}: not a corrections file (no readable `meta`).") from exc
    if schema != SCHEMA:
        raise BundleError(
            f"{path}: corrections of schema {schema}, this program reads schema {SCHEMA}. Upgrade qncd-deploy, or run "
            "`qncd fit` to fit them again."
        )
    try:
        tables = tuple(
            CorrectionTable(
                entry["method"],
                ScheduleKey.from_json(entry["key"]),
                tuple(_row_from_json(row, arrays) for row in entry["rows"]),
                entry["info"],
            )
            for entry in meta["tables"]
        )
    except (KeyError, IndexError, TypeError, AssertionError, ScheduleError) as exc:
        raise BundleError(f"{path}: damaged corrections ({exc!r}). Run `qncd fit` to fit them again.") from exc
    return Tables(path, tables, dict(meta["auto"]), dict(meta.get("contests", {})))


def _row_to_json(fix: StepFix, table: str, stacks: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = getattr(fix, name)
        if isinstance(value, np.ndarray):
            array = f"{table}.{name}.{'x'.join(map(str, value.shape))}"
            stacks.setdefault(array, []).append(value)
            row[name] = {"array": array, "index": len(stacks[array]) - 1}
        elif value != default:
            row[name] = value
    return row


def _row_from_json(row: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> StepFix:
    values: dict[str, Any] = {
        name: arrays[value["array"]][value["index"]] if isinstance(value, dict) else value
        for name, value in row.items()
    }
    return StepFix(**values)

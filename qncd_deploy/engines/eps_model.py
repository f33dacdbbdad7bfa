"""From an engine to the network as the sampling loop sees it: model(x, t, cond), float32 in and out, any number of
rows.

Rows are fed in groups of one fixed size, the last group filled up by repeating a row, so that an engine compiled for
static shapes meets one shape only; or, where it was compiled for several, those shapes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qncd_deploy.errors import EngineError
from qncd_deploy.specs import Conditions, Engine, TensorSpec


@dataclass(frozen=True, slots=True)
class InputRoles:
    """Which graph input takes the state, which the timestep, and which are conditions."""

    sample: TensorSpec
    timestep: TensorSpec | None
    conditions: tuple[TensorSpec, ...]


def input_roles(inputs: Mapping[str, TensorSpec]) -> InputRoles:
    """Tell the inputs apart by rank, since bring-your-own graphs name them as they like: the state has rank 4, the
    timestep rank 0 or 1, and so has a class label, whose name says so. Labels and what has rank 2 (pooled text, sizes)
    or 3 (tokens) are conditions, which are fed by name.

    Raises: EngineError naming an input that fits none of these.
    """
    by_rank: dict[int, list[TensorSpec]] = {}
    for spec in inputs.values():
        by_rank.setdefault(max(1, len(spec.shape)), []).append(spec)
    times = [spec for spec in by_rank.get(1, ()) if not _is_label(spec)]
    leftover = [*by_rank.get(4, ())[1:], *times[1:]]
    leftover += [spec for rank, specs in by_rank.items() if rank > 4 for spec in specs]
    if leftover:
        raise EngineError(
            f"input {leftover[0].name!r} of shape {list(leftover[0].shape)}: sampling has nothing to feed it. "
            "A network may take a state (N, C, H, W), a timestep, and conditions: tokens (N, L, D), vectors (N, D), "
            "labels."
        )
    if 4 not in by_rank:
        raise EngineError(
            f"no input of shape (N, C, H, W) among {', '.join(inputs)}: sampling needs one for the state."
        )
    state, time = by_rank[4][0], next(iter(times), None)
    return InputRoles(state, time, tuple(spec for spec in inputs.values() if spec not in (state, time)))


def input_shapes(
    inputs: Mapping[str, TensorSpec], *, rows: int, state: Sequence[int], conditions: Conditions | None
) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's inputs for one call: `rows` of them, unless the graph fixes how many.

    state: (C, H, W) of the state;  conditions: any number of rows of them, None to go by the graph. Raises EngineError
    as input_roles does, and for an input whose sizes the graph leaves free.
    """
    roles = input_roles(inputs)
    rows = fixed_rows(roles.sample) or rows
    sizes = {name: tuple(table.shape[1:]) for name, table in (conditions or {}).items()}
    sizes[roles.sample.name] = tuple(state)
    shapes = {}
    for name, spec in inputs.items():
        row = [size for size in sizes.get(name, spec.shape[1:]) if isinstance(size, int)]
        if len(row) != len(spec.shape[1:]):
            raise EngineError(
                f"input {name!r} of shape {list(spec.shape)}: only the first size may be free. Export the network with "
                "the others fixed."
            )
        shapes[name] = (*(rows if isinstance(size, str) else size for size in spec.shape[:1]), *row)
    return shapes


@dataclass(frozen=True)
class EngineModel:
    """An engine as model(x, t, cond), called with as many rows at a time as `rows` has, as in_groups says.

    x (N, C, H, W) float32;  cond: conditions by input name, a row for a row of x, or None;  returns the raw output, as
    x. The timestep is given the shape and dtype that the graph asks for, the state and the conditions their dtypes.

    Raises: EngineError for a condition that is missing, that the network does not take or whose rows have another
    shape, or a fractional timestep where the graph wants a whole one.
    """

    engine: Engine
    roles: InputRoles
    rows: tuple[int, ...]

    @classmethod
    def of(cls, engine: Engine, *, rows: int) -> EngineModel:
        """Batch sizes that the engine was compiled for win over `rows`. Raises EngineError as input_roles does."""
        roles = input_roles(engine.inputs)
        return cls(engine, roles, row_sizes(engine, roles.sample, rows))

    def __call__(self, x: np.ndarray, t: float, cond: Conditions | None) -> np.ndarray:
        specs = [self.roles.sample, *self.roles.conditions]
        arrays = [x, *self._conditions(cond or {})]
        output = next(iter(self.engine.outputs))
        time = self._time(t)

        def run(*group: np.ndarray) -> np.ndarray:
            named = {spec.name: part.astype(spec.dtype, copy=False) for spec, part in zip(specs, group, strict=True)}
            raw: np.ndarray = self.engine({**named, **time(len(group[0]))})[output]
            return raw.astype(np.float32, copy=False)

        return in_groups(run, arrays, rows=self.rows)

    def _conditions(self, given: Conditions) -> Iterator[np.ndarray]:
        """In the order of the inputs, checked."""
        wanted = {spec.name: spec for spec in self.roles.conditions}
        for name in given.keys() - wanted.keys():
            held = ", ".join(map(repr, wanted)) or "none"
            raise EngineError(f"the network takes no condition {name!r}, but was given one; those it takes: {held}.")
        for name, spec in wanted.items():
            if name not in given:
                raise EngineError(f"the network needs a condition for its input {name!r}, but was given none.")
            row, size = given[name].shape[1:], spec.shape[1:]
            if len(row) != len(size) or any(isinstance(b, int) and a != b for a, b in zip(row, size, strict=True)):
                raise EngineError(f"input {name!r} takes rows of shape {list(size)}, but was given {list(row)}.")
            yield given[name]

    def _time(self, t: float) -> Callable[[int], dict[str, np.ndarray]]:
        """The feed of the timestep for a number of rows."""
        spec = self.roles.timestep
        if spec is None:
            return lambda rows: {}
        name, dtype, shape = spec.name, spec.dtype, spec.shape
        if not spec.dtype.startswith("float") and t != int(t):
            raise EngineError(
                f"input {spec.name!r} takes whole timesteps, the schedule visits {t:g}. Use another --scheduler."
            )
        return lambda rows: {name: np.full([rows if isinstance(size, str) else size for size in shape], t, dtype=dtype)}


def in_groups(run: Callable[..., np.ndarray], arrays: Sequence[np.ndarray], *, rows: Sequence[int]) -> np.ndarray:
    """run(*arrays), full_groups at a time."""
    results = [run(*group)[:held] for group, held in full_groups(arrays, rows=rows)]
    return results[0] if len(results) == 1 else np.concatenate(results)


def full_groups(arrays: Sequence[np.ndarray], *, rows: Sequence[int]) -> Iterator[tuple[list[np.ndarray], int]]:
    """The arrays, which share axis 0, with one of the numbers in `rows`, which rise, of rows at a time (see
    group_rows), and how many are theirs: a group with fewer repeats its last row to be full.
    """
    start, total = 0, len(arrays[0])
    while start < total:
        size = group_rows(total - start, rows)
        group = [array[start : start + size] for array in arrays]
        held = len(group[0])
        if held < size:
            group = [np.concatenate([part, np.repeat(part[-1:], size - held, axis=0)]) for part in group]
        yield group, held
        start += held


def group_rows(left: int, sizes: Sequence[int]) -> int:
    """Rows to run next: the smallest of the sizes, which rise, that takes all that are left; or the largest."""
    return next((size for size in sizes if size >= left), sizes[-1])


def row_sizes(engine: Engine, spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """The numbers of rows to feed an engine with at a time, rising: those it was compiled for, or else `rows`.

    spec: the input that has them.
    """
    fixed = fixed_rows(spec)
    return engine.row_sizes or ((fixed or rows),)


def fixed_rows(spec: TensorSpec) -> int | None:
    """The batch size that a graph was exported with, None if it is free."""
    return None if isinstance(spec.shape[0], str) else spec.shape[0]


def _is_label(spec: TensorSpec) -> bool:
    return spec.name == "y" or "label" in spec.name or "class" in spec.name

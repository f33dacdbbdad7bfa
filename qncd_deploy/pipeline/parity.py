"""Hold a new GPU engine against the float network before it is used; no torch.

    error of a call = ||q - e|| / ||e||        q: raw output of an engine, e: of the float network, for the same inputs

Inputs are those of the float sampler's own trajectory, on the engine of this machine's CPU where it has one. Two INT8
engines of one graph differ from each other about as much as either does from the float network, since rounding ties
fall apart and the difference grows on its way. So outputs of two quantized engines are never compared: their errors
are, and a new engine's may be ALLOWED times that of the CPU's, which runs the same integers and scales. Where an engine
fails, the first layer that goes wrong is looked for by making inner tensors outputs, in the float network too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qncd_deploy.engines.base import BaseEngine, Remainder, default_backend, find_backend, open_engine
from qncd_deploy.engines.trt.build import build, product_tensors
from qncd_deploy.engines.trt.cuda import open_arrays
from qncd_deploy.engines.trt.library import open_library
from qncd_deploy.engines.trt.loaded import LoadedEngine
from qncd_deploy.engines.trt.options import BuildOptions, Shapes
from qncd_deploy.errors import EngineError, GateFailed
from qncd_deploy.prompts import open_tokenizer, tokenize
from qncd_deploy.runtime import ONE_SIZE, Bundle

FIRST_PICTURE = 5 << 28
"""Pictures from here on: shared with no other use of a seed."""

ALLOWED = 2.0
"""Ours: a layer that is off by one scale or one channel is off by far more, two sound engines by far less."""

SLACK = 0.02
"""Ours: error that float16 in the layers left in float may add, and all that an engine of a float graph may have."""

ALONE = 0.5
"""Ours: what is allowed where no CPU engine tells what the graph's own error is."""

WATCHED = 8
"""Inner tensors made outputs in one build: each is written out, which changes what is fused around it."""

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Case:
    """What one graph was fed, and what the float network made of it.

    exact: its raw outputs;  expected: errors of a sound engine, one a call, None if unknown;  reference: whose;
    output: which one, None for the only one.
    """

    feeds: tuple[Feeds, ...]
    exact: tuple[np.ndarray, ...]
    expected: tuple[float, ...] | None
    reference: str
    output: str | None = None

    def rows(self, count: int) -> Case:
        """The first rows alone."""
        feeds = tuple(
            {name: array[:count] if array.ndim else array for name, array in each.items()} for each in self.feeds
        )
        return replace(self, feeds=feeds, exact=tuple(exact[:count] for exact in self.exact))


@dataclass(frozen=True)
class Parity:
    """Errors of an engine, one a call. largest: of any number in its outputs; see Case."""

    errors: tuple[float, ...]
    largest: float
    expected: tuple[float, ...] | None
    reference: str
    bound: float

    @property
    def fault(self) -> str | None:
        """What is wrong with the engine, in words; None if nothing is."""
        for call, error in enumerate(self.errors):
            if not math.isfinite(error):
                return f"call {call} returns numbers that are not finite"
            allowed = ALONE if self.expected is None else ALLOWED * self.expected[call] + SLACK
            if error > allowed:
                own = "" if self.expected is None else f", {self.reference} has {self.expected[call]:.3g}"
                return f"call {call} is off by {error:.3g} of the float network's output, {allowed:.3g} is allowed{own}"
        if self.largest > self.bound:
            return f"its largest number is {self.largest:.3g}, the float network's is {self.bound / ALLOWED:.3g}"
        return None

    def line(self) -> str:
        own = f"{ALONE:g} is allowed, as no engine for a CPU is here"
        if self.expected is not None:
            own = f"{self.reference}: {_median(self.expected):.3g}"
        return f"error against the float network {_median(self.errors):.3g}, at most {max(self.errors):.3g} ({own})"


def record(bundle: Bundle, *, rows: int, one_size: bool = True) -> dict[str, Case]:
    """Cases of the network, of `rows` rows, by "unet", and of each graph around it, by its role; of every network, by
    "unet" and its suffix, where there are several. one_size: of ONE_SIZE, too, whose inputs must fit into the pictures.

    The quantized networks' own errors are measured, too, where there is an engine for the CPU.
    """
    backend = default_backend()
    on_cpu = find_backend(backend).device == "cpu"
    with bundle.sampler(backend, float_twin=True) as sampler:
        per_picture = 1 if sampler.guidance_scale == 1 else 2
        pictures = range(FIRST_PICTURE, FIRST_PICTURE + max(1, rows // per_picture))
        recorder = _Recorder(sampler.network.unet)
        *_, last = sampler.using(replace(sampler.network, unet=recorder)).trajectory(pictures)
        case = Case(tuple(recorder.feeds), tuple(recorder.returned), None, backend)
        own = find_backend(backend).role()
        cases = {}
        for role in bundle.network_roles(own):
            part = f"unet{role.removeprefix(own)}"
            cases[part] = case
            if role not in bundle.manifest.roles:  # nothing is quantized in it
                cases[part] = replace(case, expected=(0.0,) * len(case.exact))
            elif on_cpu:
                with bundle.open_part(backend, role) as engine:
                    cases[part] = replace(case, expected=measure(engine, case).errors)
    around = (role for role in bundle.around if role not in ONE_SIZE or one_size)
    return cases | {role: _case_around(bundle, role, backend, np.asarray(last.x)) for role in around}


def _case_around(bundle: Bundle, role: str, backend: str, latents: np.ndarray) -> Case:
    """What a graph beside the network makes of these latents, or of the bundle's own prompts."""
    with bundle.open_part(backend, role) as engine:
        (spec,), output = engine.inputs.values(), next(iter(engine.outputs))
        if len(spec.shape) == 4:
            height, width = (size if isinstance(size, int) else None for size in spec.shape[2:])
            fed = latents[:, :, :height, :width]
        else:
            fed = np.resize(_prompt_ids(bundle, role), (len(latents), *spec.shape[1:]))
        feeds = {spec.name: np.ascontiguousarray(fed, dtype=spec.dtype)}
        return Case((feeds,), (engine(feeds)[output],), (0.0,), backend, output)


def _prompt_ids(bundle: Bundle, encoder: str) -> np.ndarray:
    """(prompts, L) tokens of the bundle's own prompts, as this text encoder reads them."""
    assert bundle.manifest.model.text is not None and bundle.prompts is not None
    (words,) = (words for words, role in bundle.manifest.model.text.roles if role == encoder)
    return tokenize(open_tokenizer(bundle.file(words)), bundle.prompts)


def measure(engine: BaseEngine, case: Case) -> Parity:
    """Run an engine on a case. Raises EngineError as its calls do."""
    errors, largest = [], 0.0
    for feeds, exact in zip(case.feeds, case.exact, strict=True):
        own = {name: feeds[name].astype(spec.dtype, copy=False) for name, spec in engine.inputs.items()}
        outputs = engine(own)
        found = outputs[case.output or next(iter(outputs))].astype(np.float64)
        errors.append(_error(found, exact))
        largest = max(largest, float(np.abs(found).max()))
    bound = ALLOWED * max(float(np.abs(exact).max()) for exact in case.exact)
    return Parity(tuple(errors), largest, case.expected, case.reference, bound)


Watch = Callable[[Sequence[str]], tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]
"""Inner tensors of the new engine and of the float network, by name, at the inputs of the call that went wrong."""


def first_wrong(names: Sequence[str], watch: Watch) -> str | None:
    """The first of the tensors, which are in the graph's order, that is off by more than ALONE; None if none is.

    What is wrong stays wrong downstream, so a search in WATCHED parts finds it in a few builds. A sound tensor clears
    only what it is made from: one on another branch may be wrong just before it, so the last few are looked at again.
    """

    def wrong(places: Sequence[int]) -> list[int]:
        found, exact = watch([names[place] for place in places])
        return [place for place in places if not _error(found[names[place]], exact[names[place]]) <= ALONE]

    low, high = 0, len(names)  # the first wrong one, if there is one, lies in names[low:high]
    while low < high:
        step = math.ceil((high - low) / WATCHED)
        marks = list(range(min(low + step - 1, high - 1), high, step))
        off = wrong(marks)
        if not off:
            low = marks[-1] + 1
            continue
        low = max([low, *(mark + 1 for mark in marks if mark < off[0])])
        high = off[0] + 1
        if low == off[0]:
            break
    else:
        return None
    while low and (off := wrong(range(max(0, low - WATCHED), low))):
        low = off[0]
    return names[low]


class Gate:
    """Checks what is built of a bundle for the GPU of this machine; what it is checked against is recorded once.

    Raises: BackendMissing if nothing can run here, which is better known before a long build.
    """

    def __init__(self, bundle: Bundle, *, backend: str, remainder: Remainder | None = None) -> None:
        self._bundle = bundle
        self._backend = find_backend(backend)
        self._remainder = remainder or self._backend.remainders[0]
        self._cases: dict[tuple[int, int] | None, Mapping[str, Case]] = {}
        self._arrays = open_arrays()

    def __call__(
        self, role: str, stored: Path, options: BuildOptions, *, bundles: Sequence[Bundle], place: Path
    ) -> Parity:
        """The engine's errors, the largest of its profiles'.

        role: of its graph in the bundle;  stored: where it lies, built with these options;  bundles: the bundle at the
        size of each profile;  place: where the engine is going to lie, for messages.

        Raises: GateFailed, with the first layer that goes wrong, if it must not be used;  EngineError if it cannot run,
        and whatever the float network's run raises.
        """
        # before the engine is loaded: a small board has no memory for both
        found: list[tuple[Parity, Case, Shapes]] = []
        cases = self._recorded(role, bundles, [max(shapes.values(), key=len)[0] for shapes in options.profiles])
        remainder: Remainder = "f32" if role in self._bundle.around else self._remainder
        with open_engine(self._backend.name, self._bundle.file(role), remainder=remainder) as engine:
            engine.load_blob(stored, source=self._bundle.graph_id(role))
            for case, shapes in zip(cases, options.profiles, strict=True):
                found.append((measure(engine, case), case, shapes))
        for parity, case, shapes in found:
            if (fault := parity.fault) is not None:
                first = None
                if role not in self._bundle.around:
                    with suppress(EngineError):  # it is wrong, whether or not memory suffices to find out where
                        first = self._first_wrong(role, parity, case, shapes, options)
                where = "" if first is None else f" The first layer that goes wrong is the one that makes {first!r}."
                raise GateFailed(
                    f"{place}: {fault}.{where} The engine is not kept. Build it with another --level, or leave that "
                    "layer in float with `qncd export --exclude`."
                )
        return max((parity for parity, *_ in found), key=lambda parity: max(parity.errors))

    def _recorded(self, role: str, bundles: Sequence[Bundle], rows: Sequence[int]) -> list[Case]:
        """What was recorded of each profile's bundle, cut to its rows."""
        own, around = self._backend.role(self._remainder), role in self._bundle.around
        part = role if around else f"unet{role.removeprefix(own)}"
        most = max(rows) * (2 if around and self._bundle.guidance() != 1 else 1)
        for bundle in bundles:
            held = self._cases.get(bundle.sides, {})
            if part not in held or len(held[part].exact[0]) < max(rows):
                self._cases[bundle.sides] = record(bundle, rows=most, one_size=bundle.sides == self._bundle.sides)
        return [self._cases[bundle.sides][part].rows(count) for bundle, count in zip(bundles, rows, strict=True)]

    def _first_wrong(
        self, role: str, parity: Parity, case: Case, shapes: Shapes, built_with: BuildOptions
    ) -> str | None:
        library = open_library("tensorrt" if self._backend.name == "tensorrt" else "tensorrt-rtx")
        graph, exact = self._bundle.file(role), self._bundle.file("float")
        both = set(product_tensors(library, exact))
        names = [name for name in product_tensors(library, graph) if name in both]
        feeds = case.feeds[parity.errors.index(max(parity.errors, key=_badness))]
        arrays, options = self._arrays, replace(built_with, profiles=(shapes,))

        def run(path: Path, watch: Sequence[str]) -> Mapping[str, np.ndarray]:
            plan = build(library, path, options, memory=arrays.device.memory, watch=watch).plan
            engine = LoadedEngine(library, arrays, plan, place=path, version_compatible=options.version_compatible)
            own = {name: arrays.put(feeds[name].astype(spec.dtype, copy=False)) for name, spec in engine.inputs.items()}
            results = {name: arrays.get(array) for name, array in engine(own).items()}
            engine.close()
            return results

        return first_wrong(names, lambda watch: (run(graph, watch), run(exact, watch)))


class _Recorder(BaseEngine):
    """An engine that keeps what another one is fed and returns."""

    def __init__(self, engine: BaseEngine) -> None:
        super().__init__(engine.engine_id, engine.path, engine.inputs, engine.outputs)
        self.feeds: list[Feeds] = []
        self.returned: list[np.ndarray] = []
        self._engine = engine

    @property
    def row_sizes(self) -> tuple[int, ...]:
        return self._engine.row_sizes

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._engine(feeds)
        self.feeds.append({name: array.copy() for name, array in feeds.items()})
        self.returned.append(next(iter(found.values())).copy())
        return found

    def _close(self) -> None: ...


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    found, exact = found.astype(np.float64), exact.astype(np.float64)
    size = math.sqrt(float(np.square(exact).sum()))
    return math.sqrt(float(np.square(found - exact).sum())) / max(size, np.finfo(np.float64).tiny)


def _badness(error: float) -> float:
    """Errors in the order of how bad they are: NaN is the worst."""
    return math.inf if math.isnan(error) else error


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))

"""The corrections of an export: which engines get some, and which methods compete on each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from qncd_deploy.correct.methods import METHODS
from qncd_deploy.engines.base import BACKENDS, Backend, backend_status, computing_backend, make_engine_id
from qncd_deploy.pipeline.fit import FitOptions, Fitted, fit
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import LEAST_PICTURES, ExportOptions
from qncd_deploy.pipeline.progress import Progress
from qncd_deploy.pipeline.recordings import Recordings
from qncd_deploy.quant.policy import FLOAT_FORMAT
from qncd_deploy.runtime import Bundle

ENTRANTS = 2
"""Methods that auto chooses among on the second CPU engine and those after it."""


def engines_to_fit(network: FloatNetwork, options: ExportOptions) -> list[Backend]:
    """All CPU engines of this machine, of a large network the one that exporting computes on. Where that is a GPU, that
    alone: a network that asks for one takes hours on a CPU, and engines that are built later are fitted then.
    """
    if options.correction == "off" or options.format == FLOAT_FORMAT or network.schedule is None:
        return []
    if _too_few(options):
        return []
    computing = BACKENDS[computing_backend()]
    if computing.device == "gpu" or network.is_large:
        return [computing]
    return _cpu_engines()


def _too_few(options: ExportOptions) -> bool:
    return options.correction == "auto" and options.fit_size < LEAST_PICTURES


def _cpu_engines() -> list[Backend]:
    cpu = (backend for backend in BACKENDS.values() if backend.device == "cpu" and backend.name != "torch")
    return [backend for backend in cpu if backend_status(backend).missing is None]


def unfitted_note(bundle: Path, engines: Sequence[Backend], options: ExportOptions) -> Iterator[str]:
    """What to say of engines of this machine that got no corrections, if others did, or of none having got any."""
    if _too_few(options) and options.format != FLOAT_FORMAT:
        yield (
            f"No correction was tried: --fit-size {options.fit_size} is too few pictures to choose one by, "
            f"{LEAST_PICTURES} are the least."
        )
    others = [backend.name for backend in _cpu_engines() if backend not in engines] if engines else []
    if others:
        yield (
            f"Corrections are fitted for {engines[0].name} alone. For {' and '.join(others)}: "
            f"`qncd fit {bundle} --backend {others[0]}`."
        )


def options_of(options: ExportOptions, backend: Backend, shortlist: tuple[str, ...] | None = None) -> FitOptions:
    """What an export asks of the fit for an engine. shortlist: see FitOptions."""
    return FitOptions(
        backend.name,
        shortlist=shortlist,
        take=None if options.correction == "auto" else options.correction,
        objective=options.objective,
        size=options.fit_size,
        seed=options.seed,
    )


def fit_engines(
    bundle: Bundle, engines: Sequence[Backend], options: ExportOptions, work: Path, progress: Progress
) -> dict[str, Fitted]:
    """Tables by engine id. The first one's best methods are the others' entrants: which corrections suit a network
    depends little on who runs it, how large they must be does.

    work: a folder for what a killed run should go on from. Raises: as fit does.
    """
    found: dict[str, Fitted] = {}
    if not engines:
        return found
    shortlist: tuple[str, ...] | None = None
    with Recordings.open(work, bundle, resume=options.resume) as recordings:
        for backend in engines:
            with progress.stage(f"corrections for {backend.name}") as tick:
                fitted = fit(bundle, options_of(options, backend, shortlist), recordings, tick)
            if options.correction == "auto":
                shortlist = tuple(name for name in fitted.order(fitted.figures) if name in METHODS)[:ENTRANTS]
            found[make_engine_id(backend.name)] = fitted
    return found

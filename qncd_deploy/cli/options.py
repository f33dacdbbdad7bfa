"""Options that several commands share, and the words they are explained with."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import click

from qncd_deploy.engines.base import BACKENDS, Effort
from qncd_deploy.engines.trt.library import Flavour
from qncd_deploy.errors import UsageError
from qncd_deploy.prompts import read_prompts
from qncd_deploy.runtime import Bundle, Sampling
from qncd_deploy.schedule import SCHEDULERS

PATH = click.Path(path_type=Path)  # type: ignore[type-var]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in the order they are to be listed."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


bundle_argument = click.argument("bundle", type=PATH)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
backend_option = click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    help="Inference library.  [default: the first of these that this machine has]",
)
remainder_option = click.option(
    "--remainder",
    type=click.Choice(["f32", "bf16", "f16"]),
    help="Precision of the layers left in float: f32 keeps the quality, bf16 is faster on CPUs that have it "
    "(openvino only), f16 on GPUs (tensorrt, tensorrt-rtx).  [default: f32, on GPUs f16]",
)
threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the library's choice]")
engine_dir_option = click.option(
    "--engine-dir", type=PATH, default=Path("engines"), help="Where compiled engines and their tables lie."
)
class_label_option = click.option(
    "--class-label", metavar="K|K,K,...|all", help="Classes to take turns.  [default: picture i is class i mod classes]"
)
_prompt_options = together(
    click.option(
        "--prompt", "prompts", multiple=True, metavar="TEXT", help="What to draw. Repeatable: prompts take turns."
    ),
    click.option("--prompts-file", type=PATH, help="More prompts: UTF-8 text, one a line."),
)


def prompt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The two that name prompts, which the command is handed as one tuple, `prompts`, None without any."""

    @functools.wraps(command)
    def gathered(*args: Any, prompts: tuple[str, ...], prompts_file: Path | None, **flags: Any) -> Any:
        listed = () if prompts_file is None else read_prompts(prompts_file)
        return command(*args, prompts=(*prompts, *listed) or None, **flags)

    return _prompt_options(gathered)


batch_size_option = click.option(
    "--batch-size", type=click.IntRange(1), help="Pictures at a time.  [default: 16, less for large ones]"
)
_sampling_options = together(
    click.option("--scheduler", type=click.Choice(SCHEDULERS), help="Sampler.  [default: the bundle's own]"),
    click.option("--n-steps", type=int, help="Sampling steps.  [default: the bundle's own]"),
    click.option("--eta", type=float, help="Noise of ddim, 0 to 1.  [default: the bundle's own]"),
    click.option(
        "--guidance-scale", type=float, help="Classifier-free guidance, 1 is off.  [default: the bundle's own]"
    ),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The four that say how to sample, which the command is handed as one value, `sampling`."""
    names = [field.name for field in fields(Sampling)]

    @functools.wraps(command)
    def gathered(*args: Any, **flags: Any) -> Any:
        return command(*args, sampling=Sampling(**{name: flags.pop(name) for name in names}), **flags)

    return _sampling_options(gathered)


size_options = together(
    click.option("--height", type=click.IntRange(1), help="Of the pictures, in pixels.  [default: the bundle's own]"),
    click.option("--width", type=click.IntRange(1), help="As --height."),
)
"""Of bundles that draw pictures of any size."""
effort_options = together(
    click.option(
        "--level",
        type=click.IntRange(0, 5),
        help="TensorRT: how long to search for fast kernels.  [default: the library's, 3]",
    ),
    click.option(
        "--workspace",
        "workspace_mib",
        type=click.IntRange(1),
        metavar="MIB",
        help="TensorRT: MiB that a kernel may use for scratch.  [default: all there is]",
    ),
)
"""What TensorRT may take to build what is not stored."""


def with_effort(bundle: Bundle, backends: Iterable[str], level: int | None, mib: int | None, shelf: Path) -> Bundle:
    """The bundle, whose engines are compiled for a run no dearer than effort_options allow.

    backends: that will run it;  shelf: of engines, with what was measured of kernels. Raises UsageError for options
    that none of the backends has.
    """
    names = tuple(backends)
    for flag, value in (("--level", level), ("--workspace", mib)):
        if value is not None and not set(names) & set(get_args(Flavour)):
            held = " and ".join(get_args(Flavour))
            raise UsageError(f"{flag}: it is {held} that have it, not {', '.join(names)}. Leave it out.")
    return replace(bundle, effort=Effort(level, None if mib is None else mib << 20, shelf if shelf.is_dir() else None))


def results_option(name: str) -> Decorator:
    """-o of a command that measures. name: of the file that it writes into a folder."""
    words = f"A .json, or a folder for {name} and, with the report extra, report.html."
    return click.option("-o", "--output", "out", type=PATH, help=words)


class Numbers(click.ParamType):
    """N,N,... as a tuple."""

    name = "N,N,..."

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r}: expected whole numbers from 1, with commas.", param, ctx)
        return tuple(map(int, parts))


class NumberOr(click.ParamType):
    """A number, or one of the words that stand for one."""

    name = "number or word"

    def __init__(self, *words: str) -> None:
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value in self.words:
            return str(value)
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r}: expected {', '.join(self.words)} or a number.", param, ctx)


class Size(click.ParamType):
    """A number of bytes: 12MB, 1.5GB (powers of 1000), 800KiB, 12MiB (powers of 1024), or plain bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmg])(i?))?b?", str(value).strip(), re.IGNORECASE)
        if parts is None:
            self.fail(f"{value!r} is not a size like 12MB, 800KiB or 12000000.", param, ctx)
        number, prefix, binary = parts.groups()
        power = 0 if prefix is None else "kmg".index(prefix.lower()) + 1
        return int(float(number) * (1024 if binary else 1000) ** power)


def bits_line(bits: Mapping[str, Any]) -> str:
    """How a budget of bits was spent, from what the manifest says of it."""
    layers = ", ".join(f"{count} {kind}" for kind, count in bits["layers"].items())
    least, noise = next(iter(bits["predicted_noise_uniform"].items()))
    by = "" if bits["measured"] else " (by relative weight error: too large for a backward pass)"
    return (
        f"{bits['average']:.2f} a weight on average, {bits['packed_bytes'] / 1e6:.2f} MB packed ({bits['budget']}): "
        f"{layers}; predicted error of the output {bits['predicted_noise']:.2%}, all {least} {noise:.2%}{by}"
    )


def first_token_line(found: Mapping[str, Any]) -> str:
    """What the first text token was found to do, from what the manifest says of it."""
    outliers = [
        f"token 0 of {name} is {each['times']:.3g} times as large as the others, whose error it raises from "
        f"{each['error_apart']:.2g} to {each['error_others']:.2g}"
        for name, each in found["inputs"].items()
        if each["kept_float"]
    ]
    return f"{found['kept_float']} layers that read it stay float: {'; '.join(outliers)}"


def typed_command() -> str:
    """The command line that is running, for a page that says how to make it again."""
    return shlex.join(click.get_current_context().obj)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, sort_keys=True, allow_nan=False))


def fitted_tables(engine_dir: Path, bundle: Path) -> Sequence[Path]:
    """Correction files that `qncd fit` wrote for a bundle on this machine."""
    return sorted((engine_dir / bundle.resolve().name).glob("corrections-*.npz"))


def compiled_blobs(engine_dir: Path, bundle: Path, stem: str, *, batch: int | None = None) -> Sequence[Path]:
    """Compiled networks that `qncd build` wrote for a bundle, of one engine and of what is beside it.

    batch: those for so many pictures at a time only, by their names (engines/README.md).
    """
    folder = engine_dir / bundle.resolve().name
    beside = (f"{stem.rpartition('-')[0]}-f32-*-{part}-*" for part in ("decoder", "text-encoder"))
    found = {path for pattern in (f"{stem}-*", *beside) for path in folder.glob(pattern)}
    compiled = sorted(path for path in found if path.suffix in (".blob", ".engine"))
    return [path for path in compiled if batch is None or str(batch) in _batches(path)]


def _batches(path: Path) -> Sequence[str]:
    """Of a compiled network named ...-b1+4.engine or ...-b1+4-512x512.engine."""
    found = re.search(r"-b([\d+]+)(-[\dx+]+)?$", path.stem)
    return [] if found is None else found[1].split("+")


def bits_text(weight_bits: int | None, act_bits: int | None) -> str:
    """How a layer of a plan is computed: W8A8; W4A16 with its weight alone quantized; float."""
    return "float" if weight_bits is None else f"W{weight_bits}A{act_bits or 16}"

"""How an engine is to be built, what of it each library can do, and the vendor's own command for the same build."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qncd_deploy.engines.trt.library import API, Library
from qncd_deploy.errors import UsageError

Shapes = Mapping[str, tuple[int, ...]]
"""Input name -> shape."""

Hardware = Literal["none", "ampere-plus", "same-compute-capability"]
"""Which GPUs but its own an engine may run on, at a price in speed."""

TARGETS = tuple(name.rpartition(".")[2].lower() for name in API if name.startswith("ComputeCapability."))
"""Compute capabilities that TensorRT for RTX builds for ahead of time."""

DEFAULT_LEVEL = 3
"""TensorRT's own optimization level, of 0 to 5."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    profiles: the shapes to build for;  targets: of TARGETS, none for this machine's GPU;  level: optimization level,
    None for the library's own;  workspace: bytes that a kernel may use for its scratch, None for all there is;
    hardware, version_compatible: run on other GPUs, in later versions (full TensorRT only);  timing_cache: where full
    TensorRT keeps what it measured of kernels, so that the next build takes less time.
    """

    profiles: tuple[Shapes, ...]
    targets: tuple[str, ...] = ()
    level: int | None = None
    workspace: int | None = None
    hardware: Hardware = "none"
    version_compatible: bool = False
    timing_cache: Path | None = None


def check_options(library: Library, options: BuildOptions) -> None:
    """Raises: UsageError for what this library cannot do."""
    name = library.flavour
    if not library.ahead_of_time and options.targets:
        raise UsageError(
            f"--target {','.join(options.targets)}: {name} builds for the GPU it runs on. Leave it out, or build ahead "
            "of time with --backend tensorrt-rtx."
        )
    if library.ahead_of_time and not options.targets:
        raise UsageError(f"--target: name the GPUs to build for, of {', '.join(TARGETS)}.")
    for target in options.targets:
        if target not in TARGETS:
            raise UsageError(
                f"--target {target}: tensorrt-rtx builds for {', '.join(TARGETS)}. For other GPUs use "
                "--backend tensorrt on the machine that has one."
            )
    for option, value, needed in (
        ("--hardware-compatibility", options.hardware, HARDWARE[options.hardware]),
        ("--version-compatible", options.version_compatible, "BuilderFlag.VERSION_COMPATIBLE"),
    ):
        if value not in ("none", False) and not library.uses(needed):
            raise UsageError(f"{option}: {name} {library.version_text} does not have it. Leave it out.")


HARDWARE: Mapping[Hardware, str] = {
    "none": "IBuilderConfig.builder_optimization_level",  # which every version has
    "ampere-plus": "HardwareCompatibilityLevel.AMPERE_PLUS",
    "same-compute-capability": "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
}


def trtexec_line(library: Library, path: Path, engine: Path, options: BuildOptions) -> str:
    """The vendor's own command line for the same build, to check ours by."""
    words = ["tensorrt_rtx" if library.ahead_of_time else "trtexec", f"--onnx={path}", f"--saveEngine={engine}"]
    for index, shapes in enumerate(options.profiles):
        if len(options.profiles) > 1:
            words.append(f"--profile={index}")
        text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items() if shape)
        words += [f"--{bound}Shapes={text}" for bound in ("min", "opt", "max")]
    if library.uses("NetworkDefinitionCreationFlag.STRONGLY_TYPED"):
        words.append("--stronglyTyped")
    words += ["--noTF32", "--profilingVerbosity=detailed", "--skipInference"]
    if options.targets:
        words.append(f"--computeCapabilities={','.join(target.removeprefix('sm') for target in options.targets)}")
    if options.level is not None:
        words.append(f"--builderOptimizationLevel={options.level}")
    if options.workspace is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace}B")
    if options.hardware != "none":
        words.append(f"--hardwareCompatibilityLevel={_TRTEXEC_HARDWARE[options.hardware]}")
    if options.version_compatible:
        words.append("--versionCompatible")
    if options.timing_cache is not None and library.uses("IBuilderConfig.set_timing_cache"):
        words.append(f"--timingCacheFile={options.timing_cache}")
    return shlex.join(words)


_TRTEXEC_HARDWARE = {"ampere-plus": "ampere+", "same-compute-capability": "sameComputeCapability"}

"""What `qncd export` was asked for, as one checked value."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from qncd_deploy.correct.methods import METHODS
from qncd_deploy.errors import UsageError
from qncd_deploy.evaluate.contest import OBJECTIVES
from qncd_deploy.pipeline.recipes import RECIPES
from qncd_deploy.quant.policy import BLOCK_SIZES, FLOAT_FORMAT, WEIGHT_METHODS
from qncd_deploy.reconstruct.preset import PRESETS, Preset
from qncd_deploy.schedule import SPACINGS

WEIGHT_ONLY_FORMAT = "w4a16"
FORMATS = (FLOAT_FORMAT, "w8a8", "w4a8", "w4a6", "w4a4", WEIGHT_ONLY_FORMAT)
SMOOTHING = ("qncd", "qncd:paper", "smoothquant", "off")
FIRST_TOKEN = ("auto", "off")
SPLITTING = ("auto", "off", "shortcut", "all")
RECONSTRUCTION = ("auto", "off", *PRESETS)
CORRECTIONS = ("auto", "off", *METHODS)
CALIB_METHODS = ("minmax", "percentile", "mse")
ASYMMETRIC = ("auto", "off", "all")
MIXED_FORMATS = ("w4a8", "w4a6", "w4a4")
"""Formats whose weights may get more bits, layer by layer."""
AVERAGE_BITS = ("auto", "off")
"""What --avg-bits may be beside a number."""
SPARE_BITS = 0.25
"""What a weight may take on average beyond the fewest bits where no budget is given: as much as the 16-bit scales of
w4a16's blocks of 64. (Pictures of the demo at W4A8: 40.3 dB without, 43.2 with 0.1, 45.0 with 0.25.)"""

RANGES_PICTURES = 32
LEARNING_PICTURES = 64
"""What calibration records where ranges are all that is wanted of it, and where rounding is learned, too: learning
generalises better from more. (A first study on the demo had 1 dB of latents from it at W4A8; pictures of the finished
chain came out the same.)"""

LEAST_PICTURES = 4
"""From fewer, no choice among corrections is better than chance, and most methods cannot be fitted."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class ExportOptions:
    """Every choice of an export; the defaults are those of the command line.

    checkpoint: CompVis checkpoint, diffusers folder or float ONNX graph. config: the YAML of a checkpoint, or the
    scheduler_config.json of a graph. prompts_file: what calibrates a text model and what it samples by default, one
    prompt a line; None is a list of our own. height, width: of the pictures; None is the model's. calib_size: pictures
    whose trajectories are recorded, None for as many as what learns from them needs; calib_steps: network calls
    recorded of each. exclude, include: regular expressions on weight names. keep_float: percent of the multiplications
    that may stay float where rounding costs most. first_token: "auto" leaves the layers that read the text in float
    where its first token would spoil the other tokens' range. avg_bits, max_size: budget of the weights, in bits per
    weight or in bytes of all; "auto" spends SPARE_BITS beyond the least there are, "off" nothing. block_size: weights
    of a 4-bit block, for w4a16 alone; None is BLOCK_SIZE. split: "shortcut" quantizes the shortcut convolutions of skip
    concatenations half by half, "auto" those whose held-out error that lowers by enough, "all" the blocks' main
    convolutions too. step_bits: bits of activations to choose from by timestep, the format's own among them; () for
    these throughout. alpha: None tries several. recon: "auto" learns the rounding of weights below 8 bits. gate: fold
    smoothing only where it lowers the held-out error (False is for studies of the method itself). fit_size: pictures
    that corrections are fitted on, and as many others that smoothing and step_bits are judged by; auto chooses on as
    many others.
    """

    checkpoint: Path
    config: Path | None = None
    name: str | None = None
    recipe: str | None = None
    format: str = "w8a8"
    calib_dir: Path = Path("calib_data")
    onnx_dir: Path = Path("export")
    scheduler: str | None = None
    n_steps: int = 20
    eta: float = 0.0
    timestep_spacing: str | None = None
    guidance_scale: float | None = None
    null_class: int | None = None
    prompts_file: Path | None = None
    height: int | None = None
    width: int | None = None
    calib_size: int | None = None
    calib_steps: int = 10
    calib_method: str = "mse"
    percentile: float = 99.99
    weight_method: str = "mse"
    asymmetric: str = "auto"
    calib_data: Path | None = None
    quant_level: float = 3
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    keep_float: float = 2.0
    first_token: str = "auto"
    avg_bits: float | str = "auto"
    max_size: int | None = None
    block_size: int | None = None
    split: str = "auto"
    step_bits: tuple[int, ...] = ()
    smooth: str = "qncd"
    alpha: float | None = None
    recon: str = "auto"
    correction: str = "auto"
    objective: str = "shift"
    fit_size: int = 32
    eval_size: int = 64
    seed: int = 0
    gate: bool = True
    resume: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--format", self.format, FORMATS),
            ("--first-token", self.first_token, FIRST_TOKEN),
            ("--split", self.split, SPLITTING),
            ("--smooth", self.smooth, SMOOTHING),
            ("--recon", self.recon, RECONSTRUCTION),
            ("--correction", self.correction, CORRECTIONS),
            ("--objective", self.objective, OBJECTIVES),
            ("--calib-method", self.calib_method, CALIB_METHODS),
            ("--weight-method", self.weight_method, WEIGHT_METHODS),
            ("--asymmetric", self.asymmetric, ASYMMETRIC),
            ("--timestep-spacing", self.timestep_spacing, (None, *SPACINGS)),
            ("--recipe", self.recipe, (None, *RECIPES)),
        ):
            if value not in known:
                raise UsageError(f"{flag} {value}: expected one of {', '.join(filter(None, known))}.")
        for flag, count, least in (
            ("--calib-size", self.calib_pictures, 1),
            ("--calib-steps", self.calib_steps, 1),
            ("--fit-size", self.fit_size, 2),
            ("--eval-size", self.eval_size, 1),
        ):
            if count < least:
                raise UsageError(f"{flag} {count}: expected {least} or more.")
        if not 0 <= self.keep_float <= 100:
            raise UsageError(f"--keep-float {self.keep_float:g}: expected 0 to 100, percent of the arithmetic.")
        if self.recon in PRESETS and not self.rounds_activations:
            raise UsageError(
                f"--recon {self.recon}: {self.format} rounds no activations, reconstruction is for formats that do. "
                "Leave it out."
            )
        object.__setattr__(self, "step_bits", tuple(sorted(self.step_bits)))
        self._check_step_bits()
        if self.block_size is not None and self.format != WEIGHT_ONLY_FORMAT:
            raise UsageError(
                f"--block-size {self.block_size}: {self.format} has one scale per output channel, {WEIGHT_ONLY_FORMAT} "
                "has blocks. Leave it out."
            )
        if self.block_size not in (None, *BLOCK_SIZES):
            raise UsageError(f"--block-size {self.block_size}: expected one of {', '.join(map(str, BLOCK_SIZES))}.")
        self._check_budget()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(f"--alpha {self.alpha:g}: expected 0 to 1, the share of a range that is moved.")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise UsageError(f"--guidance-scale {self.guidance_scale}: expected a number.")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: expected 0 or more.")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise UsageError(f"--name {self.name!r}: expected letters, digits, dots, dashes and underscores only.")
        if self.brings_graph and self.calib_data is None and self.format != FLOAT_FORMAT:
            raise UsageError(
                f"{self.checkpoint}: a bare graph is calibrated on your data. Give --calib-data FILE.npz, one array "
                "per graph input, first axis = samples."
            )

    def _check_step_bits(self) -> None:
        if not self.step_bits:
            return
        given = f"--step-bits {','.join(map(str, self.step_bits))}"
        if not set(self.step_bits) <= set(range(4, 9)):
            raise UsageError(f"{given}: expected bits from 4 to 8.")
        if len(set(self.step_bits)) < max(2, len(self.step_bits)):
            raise UsageError(f"{given}: expected two widths or more, all different.")
        widest = f"a{self.step_bits[-1]}"
        if not self.format.endswith(widest):
            able = " or ".join(name for name in FORMATS if name.endswith(widest))
            raise UsageError(
                f"{given}: the widest must be the activation bits of the format, which is {self.format}. "
                + (f"Give --format {able} with it." if able else "No format has these.")
            )
        if self.brings_graph and self.config is None:
            raise UsageError(
                f"{given}: a bare graph without a schedule has no steps. Give --config scheduler_config.json."
            )

    def _check_budget(self) -> None:
        average = self.avg_bits
        if isinstance(average, str) and average not in AVERAGE_BITS:
            raise UsageError(f"--avg-bits {average}: expected {', '.join(AVERAGE_BITS)} or a number.")
        given = {"--avg-bits": not isinstance(average, str), "--max-size": self.max_size is not None}
        flags = [flag for flag, there in given.items() if there]
        if len(flags) == 2:
            raise UsageError("--avg-bits and --max-size: two budgets for the same weights. Give one of them.")
        if flags and self.format not in MIXED_FORMATS:
            raise UsageError(
                f"{flags[0]}: shares 4 and 8 bits out among the layers, which --format {self.format} does not. Choose "
                f"one of {', '.join(MIXED_FORMATS)}, whose activations it keeps."
            )
        if not isinstance(average, str) and not 4 <= average <= 16:
            raise UsageError(f"--avg-bits {average:g}: expected 4 to 16, a float weight counting 16.")
        if self.max_size is not None and self.max_size < 1:
            raise UsageError(f"--max-size {self.max_size}: expected 1 byte or more.")

    @property
    def rounds_activations(self) -> bool:
        """Whether there are ranges to calibrate, and errors of activations to smooth or to keep layers in float for."""
        return self.format not in (FLOAT_FORMAT, WEIGHT_ONLY_FORMAT)

    @property
    def preset(self) -> Preset | None:
        """How the rounding of weights is learned, None if it is not."""
        name = ("fast" if self.format.startswith("w4") else "off") if self.recon == "auto" else self.recon
        return PRESETS.get(name) if self.rounds_activations else None

    @property
    def calib_pictures(self) -> int:
        """Pictures whose trajectories are recorded."""
        if self.calib_size is not None:
            return self.calib_size
        return RANGES_PICTURES if self.preset is None else LEARNING_PICTURES

    @property
    def brings_graph(self) -> bool:
        """The user's own ONNX graph instead of a checkpoint."""
        return self.checkpoint.suffix.lower() == ".onnx"

"""What the sampling loop costs outside the network, one step at a time, with every kind of correction record.

    OMP_NUM_THREADS=1 python benchmarks/host_loop.py --out benchmarks/results/host-loop.md

The network is a function that returns what it was made with, so what is timed is the loop: one update of DDIM and the
row's correction. Rounds are interleaved, A B C ... A B C ..., each a whole trajectory; a round's time is that of one
step of it, and what a correction adds is taken within rounds. Times are of the processor, not of the clock, so that
waiting for other processes does not count. STEP_MS is what a step's network call takes by
benchmarks/results/speed-unet64.md, for one row; more rows are taken for so many calls. Probes of the runtime record are
network calls as well, which are not in these times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qncd_deploy.correct.record import StepFix
from qncd_deploy.evaluate.measure import Measurement, machine
from qncd_deploy.sample import PictureNoise, denoise
from qncd_deploy.schedule import Schedule
from qncd_deploy.steps import SamplerConfig, Step, make_steps

STEP_MS = {"OpenVINO float32": 102.27, "OpenVINO INT8, rest bf16": 40.44}
"""Network calls of a 16 M-parameter UNet at 64x64, one row: the slowest of OpenVINO's and the fastest of all."""

CHANNELS, SIZE, STEPS = 4, 64, 20
PROBES = (6, 16)  # where `qncd` measures in 20 steps
LIMIT = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host-loop.md"))
    given = parser.parse_args()
    lines = [
        "# What the sampling loop costs beside the network",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/host_loop.py --rounds {given.rounds}`, {machine()['processor']}, NumPy "
        f"{np.__version__}. {STEPS} DDIM steps of latents {CHANNELS}x{SIZE}x{SIZE}; milliseconds of the processor a "
        "step, medians with half their interquartile range. Shares are of a step with the network call of the 16 M "
        "UNet of [speed-unet64.md](speed-unet64.md). The probes of the runtime record are network calls, here "
        f"{len(PROBES)} more for {STEPS} steps, which are not in these times: they are its real price.",
    ]
    for rows in (1, 4):
        lines += ["", f"## {rows} x {CHANNELS}x{SIZE}x{SIZE}", "", *table(measure(rows, given.rounds), rows)]
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def kinds() -> dict[str, tuple[StepFix, ...]]:
    """Tables that fill every row, by what they hold; their numbers are small, since only their shapes matter."""
    rng = np.random.default_rng(0)

    def small(*shape: int) -> np.ndarray:
        return 0.01 * rng.standard_normal(shape)

    c = CHANNELS
    every = {
        "nothing": StepFix(),
        "affine: a, b by channel": StepFix(a=1 + small(c), b=small(c)),
        "mix: a mixes channels": StepFix(a=np.eye(c) + small(c, c), b=small(c)),
        "map: b by element": StepFix(b=small(c, SIZE, SIZE)),
        "filter: 3x3 over output and state": StepFix(f=small(c, 2 * c, 3, 3), b=small(c)),
    }
    runtime = tuple(StepFix(refresh=call in PROBES, m_ref=small(c), m_gain=0.5) for call in range(STEPS))
    return {
        **{name: (fix,) * STEPS for name, fix in every.items()},
        "runtime: probes, their mean taken out after": runtime,
    }


def measure(rows: int, rounds: int) -> dict[str, tuple[float, ...]]:
    """Milliseconds a step, by kind, one number a round."""
    steps = make_steps(Schedule.scaled_linear(0.0015, 0.0195), SamplerConfig("ddim", STEPS))
    tables = kinds()
    found: dict[str, list[float]] = {name: [] for name in tables}
    for turn in range(1 + rounds):
        for name, fixes in tables.items():
            taken = _step_ms(steps, fixes, rows)
            if turn:  # the first round warms up
                found[name].append(taken)
    return {name: tuple(times) for name, times in found.items()}


def _step_ms(steps: Sequence[Step], fixes: Sequence[StepFix], rows: int) -> float:
    noise = PictureNoise(0, range(rows), (CHANNELS, SIZE, SIZE))
    x, output = noise.initial(), noise.initial()
    started = time.process_time()
    for _ in denoise(lambda x, t: output, x, steps, noise=noise, fixes=fixes):
        pass
    return 1e3 * (time.process_time() - started) / len(steps)


def table(times: Mapping[str, Sequence[float]], rows: int) -> list[str]:
    """What a step takes, what of it the correction adds, and its share in a step with the network."""
    plain = times["nothing"]
    heads = " | ".join(f"added, of {name}" for name in STEP_MS)
    lines = [f"| correction record | ms a step | added, ms | {heads} |", "|---|---:|---:|" + "---:|" * len(STEP_MS)]
    for name, taken in times.items():
        step = Measurement(name, "ms", tuple(taken), {})
        added = Measurement(name, "ms", tuple(own - base for own, base in zip(taken, plain, strict=True)), {})
        shares = [added.median / (rows * call + step.median) for call in STEP_MS.values()]
        cells = ["" if taken is plain else f"{share:.2%}" + (" (above 0.5 %)" * (share > LIMIT)) for share in shares]
        more = "" if taken is plain else f"{added.median:.3f} ± {added.iqr / 2:.3f}"
        lines.append(f"| {name} | {step.median:.3f} ± {step.iqr / 2:.3f} | {more} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()

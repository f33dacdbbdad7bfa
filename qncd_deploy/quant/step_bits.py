"""Step-aware mixed precision of PTQD (He et al., arXiv:2305.10657, section 3.4): activation bits by timestep.

    SNR_Q,b(t) = ||e||_2 / ||D||_2            e: float eps at x_t, D: what the network of b bits adds to it
    SNR_F(t)   = abar_t / (1 - abar_t)        alpha_t^2 / sigma_t^2 of the forward process
    bits(t)    = the smallest b with SNR_Q,b(t) > SNR_F(t), else the largest

Weights keep their bits. The paper compares a ratio of amplitudes with one of powers, gives no bound on what that does
to a picture, and its released code lacks this part: so the rule is followed as it is written, and what it costs is
measured beside it. Ours: norms are over all pictures of a call, and bits never fall again towards the clean end, so
that ranges are contiguous, as the paper's are: where the rule wavers, a call gets more bits than it says, never fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qncd_deploy.stepping import Stepping, StepRange


@dataclass(frozen=True)
class CallSNR:
    """Of one network call: its timestep, the forward process' SNR there, and the quantized networks' by their bits."""

    t: float
    forward: float
    quantized: Mapping[int, float]

    @property
    def bits(self) -> int:
        """What the rule says of this call alone."""
        enough = [bits for bits, snr in self.quantized.items() if snr > self.forward]
        return min(enough, default=max(self.quantized))

    def to_json(self) -> dict[str, Any]:
        """Rounded to what means anything; an SNR without noise is null."""
        return {
            "t": self.t,
            "snr_forward": _rounded(self.forward),
            "snr_quantized": {str(bits): _rounded(value) for bits, value in sorted(self.quantized.items())},
            "rule": self.bits,
        }


def forward_snr(abar: float) -> float:
    """abar in [0, 1]; infinite at 1, where there is no noise."""
    return abar / (1 - abar) if abar < 1 else math.inf


def quantization_snr(exact: np.ndarray, found: np.ndarray) -> float:
    """||e|| / ||q - e|| over whole arrays of eps, infinite for equal ones."""
    noise = float(np.square(found - exact, dtype=np.float64).sum())
    return math.sqrt(float(np.square(exact, dtype=np.float64).sum()) / noise) if noise else math.inf


def find_ranges(calls: Sequence[CallSNR]) -> Stepping | None:
    """Ranges of timesteps from the calls of one sampler; None where the widest network takes them all.

    A range reaches down to the timestep of its last call and no further, so that timesteps between two measured ones
    get the more of their bits; the first one reaches up to all that lie above, where the forward SNR is lower still.
    t = 0, where hardly any noise is left, has the most bits always.
    """
    wanted: dict[float, int] = {}
    for call in calls:
        wanted[call.t] = max(call.bits, wanted.get(call.t, 0))
    lowest: dict[int, float] = {}
    bits = 0
    for t in sorted(wanted, reverse=True):
        bits = max(bits, wanted[t])
        if t > 0:
            lowest[bits] = t
    widest = max(calls[0].quantized)
    narrow = [StepRange(t, bits) for bits, t in lowest.items() if bits < widest]
    return Stepping((*narrow, StepRange(0.0, widest))) if narrow else None


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None

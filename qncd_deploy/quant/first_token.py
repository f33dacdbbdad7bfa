"""The first text token: what its size costs the other tokens in the INT8 of the text that keys and values are made of.

Every prompt begins with the same token, and where a text encoder makes it many times as large as the others, one range
for all tokens leaves the others few levels. "MixDQ" (Zhao et al., arXiv:2405.17873) leaves that token out of the range
and adds its keys and values from a float table. Here the layers that read the text stay float instead: the same quality
or better, for a few dozen rows of arithmetic, and any runtime can run it. What must be gained for that is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.quant.grid import fake_quantize
from qncd_deploy.quant.layer_error import layer_output, relative_error
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.smooth import Reader

MIN_GAIN = 0.5
"""The least relative fall of the error that is worth layers in float: 3 dB, half a bit. (A choice: no trained text
model was there to measure it on.)"""


@dataclass(frozen=True)
class FirstToken:
    """times: the largest |x| of the first token over that of the others.  error_first, error_others: of the outputs of
    the layers that read them, relative, quantized with one range for all;  error_apart: of the others without the first
    token in their range.
    """

    times: float
    error_first: float
    error_others: float
    error_apart: float

    @property
    def pays(self) -> bool:
        """It is an outlier, and either the range that it forces on the others hurts, or the range that cuts it off."""
        return self.times > 1 and self.error_apart < (1 - MIN_GAIN) * max(self.error_first, self.error_others)

    def line(self, name: str) -> str:
        return (
            f"token 0 of {name} is {self.times:.3g} times as large as the others: in one range rounding makes "
            f"{self.error_first:.2g} of its output error and {self.error_others:.2g} of theirs, {self.error_apart:.2g} "
            "without it"
        )


def first_token(
    name: str, readers: Iterable[Reader], *, fit: np.ndarray, held_out: np.ndarray, policy: Policy
) -> FirstToken:
    """What the first token costs the Linears that read it and the others; name is for messages.

    fit, held_out (N, L, D) float32: rows of the text, L > 1, not all zero behind the first token. Grids are the
    policy's, of `fit`. Errors are sum (op(Q(x)) - op(x))^2 / sum op(x)^2 over `held_out` with the readers' own weights,
    averaged over the readers; a bias would cancel.
    """
    together = fake_quantize(held_out, policy.act_grid(TensorStats.of(fit, name)))
    others = held_out[:, 1:]
    apart = fake_quantize(others, policy.act_grid(TensorStats.of(fit[:, 1:], name)))
    errors = []
    for reader in readers:
        exact, found, alone = (layer_output(x, reader.site, reader.weight) for x in (held_out, together, apart))
        errors.append(
            (
                relative_error(found[:, :1], exact[:, :1]),
                relative_error(found[:, 1:], exact[:, 1:]),
                relative_error(alone, exact[:, 1:]),
            )
        )
    rows = np.concatenate([fit, held_out])
    times = np.abs(rows[:, 0]).max() / np.abs(rows[:, 1:]).max()
    return FirstToken(float(times), *map(float, np.mean(errors, axis=0)))

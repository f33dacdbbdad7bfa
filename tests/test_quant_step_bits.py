"""PTQD's rule for activation bits: SNRs with closed forms, the choice of every call, and the ranges made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qncd_deploy.quant.step_bits import CallSNR, find_ranges, forward_snr, quantization_snr
from qncd_deploy.stepping import StepRange


def call(t: float, forward: float, **quantized: float) -> CallSNR:
    return CallSNR(t, forward, {int(bits.removeprefix("a")): snr for bits, snr in quantized.items()})


def test_the_quantization_snr_is_a_ratio_of_norms() -> None:
    exact = np.full((2, 3), 4.0, np.float32)
    assert quantization_snr(exact, exact + 0.5) == 8.0  # of amplitudes: of powers it would be 64
    assert quantization_snr(exact, exact) == math.inf
    uneven = exact + np.array([[1, 0, 0], [0, 0, 0]], np.float32)
    assert quantization_snr(exact, uneven) == pytest.approx(math.sqrt(6 * 16))  # one norm over all pictures


def test_the_forward_snr_is_a_ratio_of_powers() -> None:
    assert forward_snr(0.9) == pytest.approx(9)  # alpha^2 / sigma^2 with alpha^2 = 0.9
    assert forward_snr(0.0) == 0
    assert forward_snr(1.0) == math.inf


def test_the_smallest_width_above_the_forward_snr_is_taken() -> None:
    assert call(9, 1.0, a4=2.0, a6=8.0, a8=30.0).bits == 4
    assert call(9, 2.0, a4=2.0, a6=8.0, a8=30.0).bits == 6  # above, not at
    assert call(9, 20.0, a4=2.0, a6=8.0, a8=30.0).bits == 8
    assert call(9, 99.0, a4=2.0, a6=8.0, a8=30.0).bits == 8  # the largest where none is
    assert call(9, 20.0, a4=30.0, a6=8.0, a8=9.0).bits == 4  # the smallest of those above, whatever lies between


def test_a_falling_toy_has_the_ranges_of_its_closed_form() -> None:
    """SNR_F = 1 / t^2, SNR_Q = 2^b / 100: b bits suffice from t = 10 / 2^(b/2) on, 2.5 for 4 bits and 0.625 for 8."""
    times = [4.0, 3.5, 3.0, 2.5, 2.0, 1.0, 0.7]
    toy = find_ranges([CallSNR(t, 1 / t**2, {b: 2**b / 100 for b in (4, 6, 8)}) for t in times])
    assert toy is not None
    # at t = 2.5 both are 0.16, so 4 bits are not above it; 6 bits, of 0.64, are until t = 1.25
    assert toy.ranges == (StepRange(3.0, 4), StepRange(2.0, 6), StepRange(0.0, 8))


def test_a_call_that_wavers_gets_more_bits_than_the_rule_says() -> None:
    wanted = [4, 8, 4, 6, 4, 8]
    calls = [
        call(60 - 10 * i, 1.0, **{f"a{b}": 2.0 if b >= w else 0.5 for b in (4, 6, 8)}) for i, w in enumerate(wanted)
    ]
    assert [each.bits for each in calls] == wanted
    found = find_ranges(calls)
    assert found is not None and found.ranges == (StepRange(60.0, 4), StepRange(0.0, 8))


def test_two_calls_at_one_timestep_are_one() -> None:
    """PLMS asks twice at its second timestep; what either needs, both get."""
    high, twice, low = call(90, 0.1, a4=1, a8=9), call(50, 0.1, a4=1, a8=9), call(50, 5.0, a4=1, a8=9)
    found = find_ranges([high, twice, low])
    assert found is not None and found.ranges == (StepRange(90.0, 4), StepRange(0.0, 8))


def test_the_widest_network_may_take_all_and_always_takes_the_end() -> None:
    assert find_ranges([call(9, 5.0, a4=1, a8=9), call(0, 50.0, a4=1, a8=9)]) is None
    found = find_ranges([call(9, 0.1, a4=1, a8=9), call(0, 0.2, a4=1, a8=9)])
    assert found is not None and found.ranges == (StepRange(9.0, 4), StepRange(0.0, 8))


def test_figures_are_plain_numbers() -> None:
    facts = call(7.0, math.inf, a4=1.23456, a8=math.inf).to_json()
    assert facts == {"t": 7.0, "snr_forward": None, "snr_quantized": {"4": 1.235, "8": None}, "rule": 8}


@given(st.lists(st.tuples(st.integers(0, 20), *[st.floats(0, 10)] * 4), min_size=1))
def test_no_call_gets_fewer_bits_than_the_rule_says_and_bits_never_fall(rows: list[tuple[float, ...]]) -> None:
    calls = [CallSNR(t, forward, {4: a, 5: b, 8: c}) for t, forward, a, b, c in rows]
    found = find_ranges(calls)
    taken = [(each.t, 8 if found is None else found.act_bits(each.t), each.bits) for each in calls]
    assert all(bits >= rule for _, bits, rule in taken)
    ordered = sorted(taken, key=lambda row: -row[0])
    assert [bits for _, bits, _ in ordered] == sorted(bits for _, bits, _ in ordered)
    # and none more than some call at its timestep or above needs, t = 0 aside
    for t, bits, _ in taken:
        assert t == 0 or bits == max(rule for other, _, rule in taken if other >= t)

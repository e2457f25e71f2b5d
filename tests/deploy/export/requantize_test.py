"""Tests of the integer arithmetic that computes what one rounding gives."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dr_jax.deploy.export.onnx.requantize import requantization


def codes_of(bits, *, signed=False):
  low = -(2 ** (bits - 1)) if signed else 0
  return low, low + 2**bits - 1


def wanted(gain, offset, codes, sums):
  return np.clip(np.rint(gain * sums + offset), *codes)


def computed(factor, bias, multiplier, pivot, codes, sums):
  """What QLinearConv computes in uint8, with its zero point moved by zero."""
  zero = -min(codes[0], 0)
  sums = (factor * sums + bias).astype(np.float32) * np.float32(multiplier)
  stored = np.clip(np.rint(sums) + zero + pivot, 0, 255)
  return np.clip(stored - zero, *codes)


def of_one_channel(gain, offset, codes, ends, largest_factor=1):
  found = requantization(
    np.array([gain]),
    np.array([offset]),
    codes,
    np.array(ends)[:, None],
    np.array([largest_factor]),
  )
  assert found is not None
  (factor,), (bias,), (multiplier,), pivot, (exact,) = found
  return (factor, bias, multiplier, pivot), exact


@hypothesis.given(
  bits=st.integers(2, 8),
  signed=st.booleans(),
  step=st.floats(0.01, 3000.0),
  sign=st.sampled_from([-1, 1]),
  offset=st.floats(-1.5, 1.5),
  ends=st.tuples(st.integers(-20_000, 0), st.integers(0, 20_000)),
  largest_factor=st.integers(1, 20),
)
def test_a_channel_is_exact_if_all_sums_within_reach_have_their_codes(
  bits, signed, step, sign, offset, ends, largest_factor
):
  codes = codes_of(bits, signed=signed)
  line = sign / step, offset * 2**bits
  arithmetic, exact = of_one_channel(*line, codes, ends, largest_factor)
  sums = np.arange(ends[0], ends[1] + 1)
  same = wanted(*line, codes, sums) == computed(*arithmetic, codes, sums)
  assert exact == np.all(same)
  assert abs(arithmetic[0]) <= largest_factor


def lines(number, bits, largest_step):
  """Random lines, and ends of sums that reach beyond all codes."""
  rng = np.random.default_rng(bits)
  steps = np.exp(rng.uniform(np.log(0.05), np.log(largest_step), number))
  offsets = rng.uniform(-1, 1, number) * 2**bits
  ends = np.ceil(steps * 2 ** (bits + 1)).astype(int)
  return [
    (1 / step, offset, (-end, end))
    for step, offset, end in zip(steps, offsets, ends, strict=True)
  ]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("signed", [False, True])
def test_every_channel_of_up_to_4_bits_is_exact(bits, signed):
  codes = codes_of(bits, signed=signed)
  for gain, offset, ends in lines(100, bits, largest_step=1000.0):
    _, exact = of_one_channel(gain, offset, codes, ends, 127 // 2 ** (bits - 1))
    assert exact, (gain, offset)


def test_at_8_bits_fewer_small_codes_are_wrong_than_with_a_rounded_bias():
  codes = codes_of(8)
  wrong = {"found": 0, "rounded": 0}
  for gain, offset, ends in lines(40, 8, largest_step=300.0):
    arithmetic, _ = of_one_channel(gain, offset, codes, ends)
    sums = np.arange(ends[0], ends[1] + 1)
    exact = wanted(gain, offset, codes, sums)
    rounded = 1, np.rint(offset / gain), gain, 0
    for name, parts in {"found": arithmetic, "rounded": rounded}.items():
      moved = computed(*parts, codes, sums) != exact
      wrong[name] += np.sum(moved & (exact <= 32))
  assert wrong["found"] < wrong["rounded"] / 4


@pytest.mark.parametrize(
  ("gain", "offset", "ends", "code"),
  [
    (0.0, 5.4, (-900, 900), 5),
    (0.0, -3.0, (-900, 900), 0),
    (1e-12, 9.2, (-900, 900), 9),
    (-1e-12, 99.0, (-900, 900), 15),
    (0.5, 2.0, (0, 0), 2),
  ],
)
def test_one_code_for_all_sums_needs_no_products(gain, offset, ends, code):
  codes = codes_of(4)
  (factor, *others), exact = of_one_channel(gain, offset, codes, ends)
  assert (factor, exact) == (0, True)
  assert computed(factor, *others, codes, np.array(0)) == code


@pytest.mark.parametrize("bits", [8, 4])
def test_channels_without_an_offset_are_exact(bits):
  codes = codes_of(bits, signed=True)
  for gain, _, ends in lines(20, bits, largest_step=300.0):
    arithmetic, exact = of_one_channel(gain, 0.0, codes, ends)
    assert exact
    assert computed(*arithmetic, codes, np.array(0)) == 0


def test_sums_that_leave_int32_have_no_arithmetic():
  found = requantization(
    np.array([1e-9]),
    np.array([0.0]),
    codes_of(4),
    np.array([[0], [2**33]]),
    np.array([1]),
  )
  assert found is None

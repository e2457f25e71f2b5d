"""Bit-planes against their definition, bit by bit, in Python integers."""

import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant


def codes_of(bits, shape, seed=0):
  low, high = quant.code_range(bits)
  rng = np.random.default_rng(seed)
  codes = rng.integers(low, high, shape, endpoint=True).astype(np.int8)
  codes.flat[:2] = low, high
  return codes


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_has_its_place(bits, rows):
  codes = codes_of(bits, (rows, 3))
  planes = np.asarray(quant.to_planes(codes, bits))
  words = -(-rows // 32)
  assert planes.shape == (bits, words, 3)
  for row in range(32 * words):
    word = planes[:, row % words] >> np.uint32(row // words) & np.uint32(1)
    code = word[::-1].astype(int).T @ 2 ** np.arange(bits)
    expected = codes[row].astype(int) % 2**bits if row < rows else 0
    np.testing.assert_array_equal(code, expected)
  np.testing.assert_array_equal(quant.from_planes(planes, rows), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_leading_planes_are_the_codes_rounded_down(bits):
  codes = codes_of(8, (70, 5))
  planes = quant.to_planes(codes, 8)[:bits]
  np.testing.assert_array_equal(
    quant.from_planes(planes, 70), codes >> (8 - bits)
  )


def test_planes_read_are_one_more_to_round_by_and_never_more_than_there_are():
  def reads(rounding, stored_bits=8):
    widths = range(stored_bits, 1, -1)
    options = {"stored_bits": stored_bits, "rounding": rounding}
    return [quant.planes_read(bits, **options) for bits in widths]

  assert reads("half_up") == [8, 8, 7, 6, 5, 4, 3]
  assert reads("floor") == [8, 7, 6, 5, 4, 3, 2]
  assert reads("half_up", 4) == [4, 4, 3]


def test_bytes_of_a_product_are_planes_inputs_scale_and_result():
  stored = {"stored_bits": 8, "rounding": "half_up"}
  size = quant.matmul_bytes((1, 4096, 4096), 4, jnp.bfloat16, **stored)
  assert size == 5 * 4096 * 4096 // 8 + 4 * 4096 + 2 * (4096 + 4096)
  ragged = quant.matmul_bytes((16, 33, 7), 8, jnp.float32, **stored)
  assert ragged == 8 * 2 * 4 * 7 + 4 * 7 + 16 * 4 * (33 + 7)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: quant.to_planes(np.zeros((4, 4), np.int8), 9), "bits must be"),
    (lambda: quant.to_planes(np.zeros((4, 4)), 8), "codes must be integers"),
    (lambda: quant.to_planes(np.zeros(4, np.int8), 8), r"shape \[k, n\]"),
    (
      lambda: quant.from_planes(np.zeros((8, 1, 4), np.uint32), 33),
      r"planes must be uint32 \[1..8, 2, n\] for 33 rows",
    ),
    (
      lambda: quant.to_planes(np.array([[-8, 7], [8, 0]]), 4),
      r"codes must be in -8\.\.7, of 4 bits, got values in -8\.\.8",
    ),
    (
      lambda: quant.from_planes(np.zeros((8, 1, 4), np.int32), 32),
      "planes must be uint32",
    ),
    (
      lambda: quant.planes_read(4, stored_bits=8, rounding="half_even"),
      "rounding must be one of 'half_up', 'floor'",
    ),
    (
      lambda: quant.planes_read(8, stored_bits=4, rounding="floor"),
      "bits must be an integer in 2..4",
    ),
  ],
)
def test_what_has_no_planes_is_one_clear_line(call, message):
  with pytest.raises(ValueError, match=message) as raised:
    call()
  assert "\n" not in str(raised.value)

"""Packing against an independent bit stream of Python integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant

BITS = range(1, 17)
# On the host, and in a program.
PLACES = pytest.mark.parametrize(
  "place", [lambda function: function, jax.jit], ids=["host", "jit"]
)


def exact_bytes(codes, bits: int) -> bytes:
  """The codes as one little-endian integer, first code lowest."""
  stream = sum(
    (int(code) % 2**bits) << (i * bits) for i, code in enumerate(codes)
  )
  return stream.to_bytes(-(-len(codes) * bits // 8), "little")


def codes_of(bits, signed, size, seed=0):
  low, high = quant.code_range(bits, signed=signed)
  rng = np.random.default_rng(seed)
  return rng.integers(low, high, size, endpoint=True).astype(np.int32)


@PLACES
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_round_trips_and_has_its_place_in_the_stream(
  bits, signed, place
):
  low, high = quant.code_range(bits, signed=signed)
  codes = np.arange(low, high + 1, dtype=np.int32)

  @place
  def run(codes):
    data = quant.pack(codes, bits, signed=signed)
    return data, quant.unpack(data, bits, codes.size, signed=signed)

  data, back = run(codes)
  assert data.dtype == jnp.uint8
  assert bytes(np.asarray(data)) == exact_bytes(codes, bits)
  assert back.dtype == f"{'' if signed else 'u'}int{8 if bits <= 8 else 16}"
  np.testing.assert_array_equal(back, codes)


@PLACES
@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_exact_at_every_size_and_padded_with_zeros(bits, place):
  sizes = (0, 1, 3, 8, 17)
  codes = [codes_of(bits, True, size, seed=size) for size in sizes]

  @place
  def run(codes):
    data = [quant.pack(c, bits) for c in codes]
    pairs = zip(data, sizes, strict=True)
    return [(d, quant.unpack(d, bits, size)) for d, size in pairs]

  for size, given, (data, back) in zip(sizes, codes, run(codes), strict=True):
    assert data.shape == (quant.packed_size(size, bits),)
    assert bytes(np.asarray(data)) == exact_bytes(given, bits)
    np.testing.assert_array_equal(back, given)


def test_layout_of_three_bit_codes_by_hand():
  # 001 011 111 (-1) 100 (-4): the stream, lowest bit first, is
  # 100 110 111 001 -> bytes 0b11011001, 0b00001001.
  data = quant.pack(jnp.array([1, 3, -1, -4]), 3)
  np.testing.assert_array_equal(data, [0b11011001, 0b00001001])


def test_packed_sizes_of_two_four_and_eight_bits():
  assert [quant.packed_size(1000, b) for b in (8, 4, 3, 2)] == [
    1000,
    500,
    375,
    250,
  ]
  assert [quant.packed_size(n, 3) for n in (0, 1, 2, 3, 8)] == [0, 1, 1, 2, 3]


def test_packing_accepts_any_shape_in_c_order_and_runs_under_jit():
  codes = codes_of(5, True, 24)
  flat = quant.pack(codes, 5)
  pack = jax.jit(lambda c: quant.pack(c, 5))
  np.testing.assert_array_equal(pack(codes.reshape(2, 3, 4)), flat)
  unpack = jax.jit(lambda d: quant.unpack(d, 5, 24))
  np.testing.assert_array_equal(unpack(flat), codes)
  for closed_over in (codes, jnp.asarray(codes)):
    constant = jax.jit(lambda c=closed_over: quant.pack(c, 5))
    np.testing.assert_array_equal(constant(), flat)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint8])
def test_packing_accepts_every_integer_dtype(dtype):
  codes = jnp.array([0, 1, 2, 3], dtype)
  assert bytes(np.asarray(quant.pack(codes, 3))) == exact_bytes(range(4), 3)


@pytest.mark.parametrize(
  "bits, signed, wrong",
  [
    (2, True, 2),
    (2, True, -3),
    (4, True, 8),
    (8, True, 128),
    (8, True, -129),
    (4, False, -1),
    (4, False, 16),
    (8, False, 256),
  ],
)
def test_a_code_that_does_not_fit_is_an_error(bits, signed, wrong):
  low, high = quant.code_range(bits, signed=signed)
  with pytest.raises(ValueError) as error:
    quant.pack(np.array([0, wrong], np.int32), bits, signed=signed)
  assert str(wrong) in str(error.value)
  assert f"{low}..{high}" in str(error.value)


@pytest.mark.parametrize("length", [0, 2, 4])
def test_a_wrong_number_of_bytes_is_an_error(length):
  data = jnp.zeros(length, jnp.uint8)
  with pytest.raises(ValueError, match=rf"\(3,\) for 7 codes.*\({length},\)"):
    quant.unpack(data, 3, 7)


def test_bytes_with_a_second_axis_are_an_error():
  with pytest.raises(ValueError, match=r"\(3,\).*got \(1, 3\)"):
    quant.unpack(jnp.zeros((1, 3), jnp.uint8), 3, 8)


@pytest.mark.parametrize("bits", [0, 17])
def test_bit_widths_outside_one_to_sixteen_are_an_error(bits):
  with pytest.raises(ValueError, match=rf"bits must be .* 1\.\.16, got {bits}"):
    quant.pack(jnp.zeros(4, jnp.int8), bits)
  with pytest.raises(ValueError, match=rf"bits must be .* 1\.\.16, got {bits}"):
    quant.unpack(jnp.zeros(4, jnp.uint8), bits, 4)


def test_codes_that_are_not_integers_are_an_error():
  for call in (
    lambda x: quant.pack(x, 4),
    lambda x: quant.switch_codes(x, 8, 4),
  ):
    with pytest.raises(
      ValueError, match="codes must be integers, got dtype float32"
    ):
      call(np.float32([1.7]))

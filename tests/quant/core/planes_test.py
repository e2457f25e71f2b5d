"""Bit-planes against Python integers."""

import numpy as np
import pytest

from dr_jax import quant

BITS = range(1, 9)


def exact_plane(codes, place: int) -> bytes:
  """Bit `place` of each code, the first code in the lowest bit."""
  stream = sum(((int(q) >> place) & 1) << i for i, q in enumerate(codes))
  return stream.to_bytes(-(-len(codes) // 8), "little")


def every_code(bits, signed):
  low, high = quant.code_range(bits, signed=signed)
  return np.arange(low, high + 1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_planes_have_the_most_significant_bit_first(bits, signed):
  codes = every_code(bits, signed)
  planes = quant.pack_planes(codes, bits, signed=signed)
  assert planes.dtype == np.uint8
  assert [plane.tobytes() for plane in planes] == [
    exact_plane(codes, place) for place in reversed(range(bits))
  ]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_first_planes_are_the_codes_rounded_down(bits, signed):
  codes = every_code(bits, signed)
  planes = quant.pack_planes(codes, bits, signed=signed)
  for count in range(1, bits + 1):
    found = quant.unpack_planes(planes[:count], bits, codes.size, signed=signed)
    assert found.dtype == (np.int8 if signed else np.uint8)
    dropped = bits - count
    np.testing.assert_array_equal(found, codes >> dropped << dropped)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
def test_any_number_of_codes_comes_back(size):
  codes = np.random.default_rng(0).integers(-16, 16, (size, 1))
  planes = quant.pack_planes(codes, 5)
  assert planes.shape == (5, quant.packed_size(size, 1))
  back = quant.unpack_planes(planes, 5, size)
  np.testing.assert_array_equal(back, codes[:, 0])


def test_codes_and_planes_that_do_not_fit_are_errors():
  with pytest.raises(ValueError, match=r"codes must be in -4\.\.3 for bits=3"):
    quant.pack_planes(np.array([4]), 3)
  with pytest.raises(ValueError, match=r"bits must be an integer in 1\.\.8"):
    quant.pack_planes(np.array([4]), 9)
  planes = quant.pack_planes(np.zeros(9, int), 3)
  for wrong in (planes[:, :1], planes[0]):
    with pytest.raises(ValueError, match=r"planes must have shape \(1 to 3, 2"):
      quant.unpack_planes(wrong, 3, 9)
  with pytest.raises(ValueError, match=r"number of planes must be .* 1\.\.2"):
    quant.unpack_planes(planes, 2, 9)

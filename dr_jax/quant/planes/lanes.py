"""From words of bit-planes to weights, in registers: four codes at a time.

A word is four lanes of a byte. Bit b of all four is picked at once from every
plane, so that two operations per plane serve four codes. The kernel and the
XLA program of the product share this arithmetic.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
  from jaxtyping import Array, Float32, UInt32

LANES = 4
_LANE_BITS = 8
_ONES = 0x01010101  # a one in every lane


def weights(
  planes: Sequence[UInt32[Array, "words n"]], bits: int
) -> Iterator[tuple[int, Float32[Array, "words n"]]]:
  """Yields (place, codes at that bit of every word) for all 32 places.

  Args:
    planes: the leading planes: `bits` of them, or one more to round by
      (half_up: (q + 1) >> 1 of codes q that are one bit wider).
    bits: bit-width of the codes wanted, 2..8.

  Returns:
    Integer-valued float32 in [-2^(bits-1), 2^(bits-1) - 1].
  """
  for bit in range(_LANE_BITS):
    codes = _code_bytes(planes, bit, bits)
    for lane in range(LANES):
      yield lane * _LANE_BITS + bit, _floats(codes, lane, bits)


def _code_bytes(planes, bit, bits):
  """Codes + 2^(bits-1) of bit `bit` of each lane: bytes that are not signed."""
  parts = [
    _shift_right(plane, bit - place) & _every(1 << place)
    for place, plane in zip(reversed(range(bits)), planes, strict=False)
  ]
  codes = functools.reduce(operator.or_, parts) ^ _every(1 << (bits - 1))
  if len(planes) == bits:
    return codes
  codes = codes + (_shift_right(planes[bits], bit) & _every(1))
  # Rounding up may pass the largest code by one: 2^bits, at most 128, so that
  # no lane reaches the next.
  return codes - (_shift_right(codes, bits) & _every(1))


def _floats(codes, lane, bits):
  byte = _shift_right(codes, lane * _LANE_BITS) & np.uint32(0xFF)
  # 2^23 + byte, by its bits: a conversion takes a slower unit of a GPU.
  shifted = jax.lax.bitcast_convert_type(
    byte | np.uint32(0x4B000000), jnp.float32
  )
  return shifted - np.float32(2**23 + 2 ** (bits - 1))


def _every(byte):
  return np.uint32(byte * _ONES)


def _shift_right(words, count):
  if count == 0:
    return words
  if count < 0:
    return words << np.uint32(-count)
  return words >> np.uint32(count)

"""From words of bit-planes to weights, in registers: many codes at a time.

Rounding is bitwise arithmetic on planes: 32 codes in every operation. Then a
word is four lanes of a byte, and two operations per plane put four codes
together. The kernel and the XLA program of the product share this.
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
  planes = _rounded(planes, bits)
  for bit in range(_LANE_BITS):
    codes = _code_bytes(planes, bit)
    for lane in range(LANES):
      yield lane * _LANE_BITS + bit, _floats(codes, lane, bits)


def _rounded(planes, bits):
  """Planes of codes + 2^(bits-1), which have no sign."""
  words = [~planes[0], *planes[1:bits]]
  if len(planes) == bits:
    return words
  # Adds the plane to round by, but to the largest code, which has only ones.
  carry = planes[bits] & ~functools.reduce(operator.and_, words)
  for place in reversed(range(bits)):
    words[place], carry = words[place] ^ carry, words[place] & carry
  return words


def _code_bytes(planes, bit):
  """Codes at bit `bit` of each lane, as bytes."""
  places = reversed(range(len(planes)))
  parts = (
    _shift_right(plane, bit - place) & np.uint32(_ONES << place)
    for place, plane in zip(places, planes, strict=True)
  )
  return functools.reduce(operator.or_, parts)


def _floats(codes, lane, bits):
  byte = _shift_right(codes, lane * _LANE_BITS) & np.uint32(0xFF)
  # 2^23 + byte, by its bits: a conversion takes a slower unit of a GPU.
  shifted = jax.lax.bitcast_convert_type(
    byte | np.uint32(0x4B000000), jnp.float32
  )
  return shifted - np.float32(2**23 + 2 ** (bits - 1))


def _shift_right(words, count):
  if count == 0:
    return words
  if count < 0:
    return words << np.uint32(-count)
  return words >> np.uint32(count)

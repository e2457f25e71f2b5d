"""Codes as bit-planes, the most significant first.

Plane p of codes of b bits holds bit b - 1 - p of each, in two's complement, so
that the first planes alone are the codes rounded down. Within a plane, code i
is bit i % 8 of byte i // 8; the last byte is padded with zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dr_jax.quant.core import checks, grid

if TYPE_CHECKING:
  from jaxtyping import Array, Int, UInt8


def pack_planes(
  codes: Int[Array, "..."] | np.ndarray, bits: int, *, signed: bool = True
) -> UInt8[np.ndarray, "bits bytes"]:
  """Splits integer codes into bit-planes, on the host.

  Args:
    codes: integers within the range of `bits` bits, any shape, in C order.
    bits: bit-width, 1..8.
    signed: range -2^(bits-1)..2^(bits-1)-1, else 0..2^bits-1.

  Returns:
    uint8 [bits, ceil(codes.size / 8)].

  Raises:
    ValueError: if bits is outside 1..8 or a code does not fit.

  >>> pack_planes(np.array([1, 3, -1, -4]), 3).tolist()
  [[12], [6], [7]]
  """
  bits = checks.check_integer("bits", bits, 1, 8)
  codes = np.asarray(codes)
  low, high = grid.code_range(bits, signed=signed)
  if codes.size and not low <= codes.min() <= codes.max() <= high:
    raise ValueError(
      f"codes must be in {low}..{high} for bits={bits}, got "
      f"{codes.min()}..{codes.max()}"
    )
  octets = codes.reshape(-1).astype(np.uint8)
  return np.stack(
    [np.packbits((octets >> p) & 1, bitorder="little") for p in range(bits)]
  )[::-1]


def unpack_planes(
  planes: UInt8[np.ndarray, "count bytes"],
  bits: int,
  size: int,
  *,
  signed: bool = True,
) -> Int[np.ndarray, " size"]:
  """Inverse of `pack_planes`, also of its first planes alone.

  Args:
    planes: uint8 [count, ceil(size / 8)], count in 1..bits; the bits of the
      planes that are missing are zeros.
    bits: bit-width, 1..8.
    size: number of codes.
    signed: as given to `pack_planes`.

  Returns:
    [size] codes: int8, or uint8 if not signed.

  Raises:
    ValueError: if bits is outside 1..8 or the planes have another shape.

  >>> planes = pack_planes(np.array([1, 3, -1, -4]), 3)
  >>> unpack_planes(planes, 3, 4).tolist()
  [1, 3, -1, -4]
  >>> unpack_planes(planes[:2], 3, 4).tolist()
  [0, 2, -2, -4]
  """
  bits = checks.check_integer("bits", bits, 1, 8)
  planes = np.asarray(planes)
  length = -(-size // 8)
  if planes.ndim != 2 or planes.shape[1] != length:
    raise ValueError(
      f"planes must have shape (1 to {bits}, {length}) for {size} codes of "
      f"{bits} bits, got {planes.shape}"
    )
  count = checks.check_integer("number of planes", len(planes), 1, bits)
  codes = np.zeros(size, np.uint8)
  # A signed code starts as the top bits of a byte, which a shift extends.
  top = 7 if signed else bits - 1
  for number in range(count):
    if not planes[number].any():  # As where only further planes are at hand.
      continue
    plane = np.unpackbits(planes[number], count=size, bitorder="little")
    codes |= plane << (top - number)
  return codes.view(np.int8) >> (8 - bits) if signed else codes

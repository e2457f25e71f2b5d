"""Codes of 1 to 16 bits in bytes, and the file format of encoded arrays.

Codes follow each other as a little-endian bit stream: bit j of code i is bit
(i * bits + j) % 8 of byte (i * bits + j) // 8, in two's complement. Nothing
is wasted at odd bit-widths; only the last byte is padded, with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.quant.core import checks, grid
from dr_jax.quant.core.interface import Storage
from dr_jax.quant.core.planes import pack_planes, unpack_planes

if TYPE_CHECKING:
  from jaxtyping import Array, Int, UInt8


def packed_size(size: int, bits: int) -> int:
  """Returns the bytes that packed codes take: ceil(size * bits / 8).

  Args:
    size: number of codes.
    bits: bits of a code.

  >>> packed_size(1000, 3)
  375
  """
  return -(-size * bits // 8)


def pack(
  codes: Int[Array, "..."], bits: int, *, signed: bool = True
) -> UInt8[Array, " bytes"]:
  """Packs integer codes into bytes.

  Args:
    codes: integers within the range of `bits` bits, any shape, in C order.
    bits: bit-width, 1..16.
    signed: range -2^(bits-1)..2^(bits-1)-1, else 0..2^bits-1.

  Returns:
    uint8 [ceil(codes.size * bits / 8)].

  Raises:
    ValueError: if bits is outside 1..16, codes are not integers, or, outside
      jit, a code does not fit.

  >>> pack(jnp.array([1, 3, -1, -4]), 3).tolist()
  [217, 9]
  """
  bits = checks.check_integer("bits", bits, 1, 16)
  codes = checks.check_integers("codes", codes)
  low, high = grid.code_range(bits, signed=signed)
  if not isinstance(codes, jax.core.Tracer):
    return jnp.asarray(_pack_on_host(np.asarray(codes), bits, low, high))
  planes = (
    codes.reshape(-1, 1).astype(jnp.int32) >> jnp.arange(bits)[None]
  ) & 1
  stream = jnp.pad(planes.reshape(-1), (0, -codes.size * bits % 8))
  places = jnp.left_shift(1, jnp.arange(8))[None]
  return (stream.reshape(-1, 8) * places).sum(1).astype(jnp.uint8)


def unpack(
  data: UInt8[Array, " bytes"], bits: int, size: int, *, signed: bool = True
) -> Int[Array, " size"]:
  """Inverse of `pack`.

  Args:
    data: uint8 [ceil(size * bits / 8)].
    bits: bit-width, 1..16.
    size: number of codes.
    signed: as given to `pack`.

  Returns:
    [size] codes: int8, or uint8 if not signed; 16 bits wide above 8 bits.

  Raises:
    ValueError: if bits is outside 1..16 or the number of bytes is not right.

  >>> unpack(jnp.array([217, 9], jnp.uint8), 3, 4).tolist()
  [1, 3, -1, -4]
  """
  bits = checks.check_integer("bits", bits, 1, 16)
  data = jnp.asarray(data)
  if data.shape != (packed_size(size, bits),):
    raise ValueError(
      f"data must have shape ({packed_size(size, bits)},) for {size} codes of "
      f"{bits} bits, got {data.shape}"
    )
  if not isinstance(data, jax.core.Tracer):
    return jnp.asarray(_unpack_on_host(np.asarray(data), bits, size, signed))
  stream = (data[:, None].astype(jnp.int32) >> jnp.arange(8)[None]) & 1
  planes = stream.reshape(-1)[: size * bits].reshape(size, bits)
  codes = (planes << jnp.arange(bits)[None]).sum(1)
  if signed:
    codes = jnp.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
  return codes.astype(_code_dtype(bits, signed))


# Eagerly, JAX would compile a dozen programs for each size.
def _pack_on_host(codes, bits, low, high):
  if codes.size and not low <= codes.min() <= codes.max() <= high:
    raise ValueError(
      f"codes must be in {low}..{high} for bits={bits}, got "
      f"{codes.min()}..{codes.max()}"
    )
  octets = codes.reshape(-1, 1).astype("<u2").view(np.uint8)
  planes = np.unpackbits(octets, axis=1, count=bits, bitorder="little")
  return np.packbits(planes.reshape(-1), bitorder="little")


def _unpack_on_host(data, bits, size, signed):
  planes = np.unpackbits(data, count=size * bits, bitorder="little")
  octets = np.packbits(planes.reshape(size, bits), axis=1, bitorder="little")
  codes = octets.view("<u2" if bits > 8 else np.uint8).reshape(size)
  # A signed code moves to the top bits of its integer, which a shift extends.
  unused = 8 * codes.itemsize - bits
  dtype = np.dtype(_code_dtype(bits, signed))
  return (codes << unused).view(dtype) >> unused


def storage(
  bits: tuple[int, ...],
  stored_bits: int,
  *,
  signed: bool = True,
  ranges: Mapping[str, tuple[float, float]] = {},
  planes: tuple[int, ...] = (),
) -> Storage:
  """Builds the storage of one array of the weight's shape, and small ones.

  The array is "codes", packed at `stored_bits` bits, or "weight", floats. All
  others (scales) stay as they are. A copy for a single bit-width b holds b-bit
  codes instead.

  Args:
    bits: candidate bit-widths of the quantizer.
    stored_bits: bits of a code, 1..16; 32 for floats.
    signed: whether codes are signed.
    ranges: {array: (smallest, largest value)} of what is encoded, where bits
      or floats could say more than the method's codes and scales do.
    planes: as in Storage; where it is not empty, codes are packed as planes.

  >>> files = storage((8, 4), 8)
  >>> encoded = {"codes": jnp.array([3, -4], jnp.int8)}
  >>> files.pack(encoded)["codes"].dtype
  dtype('uint8')
  >>> [files.size(encoded, i) for i in range(2)]  # bytes
  [2, 1]
  """

  def pack_all(encoded):
    packed = {name: np.asarray(value) for name, value in encoded.items()}
    if "codes" in encoded:
      split = pack_planes if planes else pack
      codes = split(encoded["codes"], stored_bits, signed=signed)
      packed["codes"] = np.asarray(codes)
    return packed

  def unpack_all(packed, shape):
    encoded = {name: jnp.asarray(value) for name, value in packed.items()}
    if "codes" in packed:
      join = unpack_planes if planes else unpack
      size = math.prod(shape)
      codes = join(packed["codes"], stored_bits, size, signed=signed)
      encoded["codes"] = jnp.asarray(codes.reshape(shape))
    return encoded

  def layout(encoded):
    packed = dict(encoded)
    if "codes" in encoded:
      size = math.prod(encoded["codes"].shape)
      shape = (packed_size(size, stored_bits),)
      if planes:
        shape = (stored_bits, packed_size(size, 1))
      packed["codes"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return packed

  def size(encoded, index):
    main = "codes" if "codes" in encoded else "weight"
    others = sum(v.nbytes for name, v in encoded.items() if name != main)
    return packed_size(encoded[main].size, bits[index]) + others

  bounds = tuple((name, *ends) for name, ends in ranges.items())
  return Storage(pack_all, unpack_all, size, layout, bounds, planes)


def integer_dtype(low: grid.Number, high: grid.Number) -> type:
  """The narrowest of int8, uint8 and int16 that holds both integers.

  >>> integer_dtype(-128, 127).dtype, integer_dtype(-255, 255).dtype
  (dtype('int8'), dtype('int16'))
  """
  if -128 <= low and high <= 127:
    return jnp.int8
  return jnp.uint8 if 0 <= low and high <= 255 else jnp.int16


def _code_dtype(bits, signed):
  if bits > 8:
    return jnp.int16 if signed else jnp.uint16
  return jnp.int8 if signed else jnp.uint8

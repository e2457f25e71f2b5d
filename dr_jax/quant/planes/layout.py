"""Integer codes as bit-planes, of which a bit-width reads the leading ones.

Plane 0 holds the most significant bit of every code, in two's complement. A
word holds 32 codes of one column of a kernel [k, n]: with K = ceil(k / 32)
words in a column,

  bit b of planes[p, r, c]  =  bit (h - 1 - p) of codes[b * K + r, c]

so that the inputs that meet bit b of neighboring words are neighbors, too.
Rows from k on are zero. Planes of l-bit codes take l bits a code: for one
bit-width alone, this is how to pack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from dr_jax.quant.core import checks

if TYPE_CHECKING:
  from jaxtyping import Array, Int, Int8, UInt32

WORD = 32  # codes

# Rules under which lower codes are made of leading planes; "half_even" needs
# all of them.
ROUNDINGS = ("half_up", "floor")


def to_planes(
  codes: Int[Array, "k n"], bits: int
) -> UInt32[Array, "bits words n"]:
  """Splits codes into bit-planes, most significant first.

  Args:
    codes: integers in [-2^(bits-1), 2^(bits-1) - 1], [k, n].
    bits: bit-width of the codes, 2..8.

  Returns:
    uint32 [bits, ceil(k / 32), n].

  Raises:
    ValueError: if bits is outside 2..8, or codes are not integers [k, n] of
      that many bits (under a trace, they are not looked at).

  >>> planes = to_planes(jnp.array([[-2], [1], [-1]], jnp.int8), 2)
  >>> planes[:, 0, 0].tolist()  # of 10, 01 and 11, the first code lowest
  [5, 6]
  """
  bits = checks.check_integer("bits", bits, 2, 8)
  codes = checks.check_integers("codes", codes)
  if codes.ndim != 2:
    raise ValueError(f"codes must have shape [k, n], got {codes.shape}")
  checks.check_codes("codes", codes, bits)
  rows, columns = codes.shape
  words = words_of(rows)
  codes = jnp.pad(codes.astype(jnp.int32), ((0, words * WORD - rows), (0, 0)))
  codes = codes.reshape(WORD, words, columns)
  places = np.arange(WORD, dtype=np.uint32)[:, None, None]
  planes = [
    jnp.sum(
      ((codes >> place) & 1).astype(jnp.uint32) << places, 0, dtype=jnp.uint32
    )
    for place in reversed(range(bits))
  ]
  return jnp.stack(planes)


def from_planes(
  planes: UInt32[Array, "bits words n"], rows: int
) -> Int8[Array, "rows n"]:
  """Inverse of `to_planes`; of leading planes alone, the codes rounded down.

  Args:
    planes: uint32 [bits, ceil(rows / 32), n].
    rows: k of the kernel.

  >>> codes = jnp.array([[-2], [1], [-1]], jnp.int8)
  >>> from_planes(to_planes(codes, 2), 3)[:, 0].tolist()
  [-2, 1, -1]
  """
  check_planes(planes, rows)
  places = np.arange(WORD, dtype=np.uint32)[:, None, None]
  codes = jnp.zeros((WORD, *planes.shape[1:]), jnp.int32)
  for plane in planes:
    bit = (plane[None] >> places) & np.uint32(1)
    codes = 2 * codes + bit.astype(jnp.int32)
  codes = codes.reshape(-1, planes.shape[2])[:rows]
  half = 2 ** (len(planes) - 1)
  return jnp.where(codes < half, codes, codes - 2 * half).astype(jnp.int8)


def planes_read(bits: int, *, stored_bits: int, rounding: str) -> int:
  """Returns how many leading planes make codes of `bits` bits.

  Args:
    bits: bit-width in use, 2..stored_bits.
    stored_bits: bit-width of the stored codes, 2..8.
    rounding: "floor" needs the codes' own planes; "half_up" the next one, too.

  Raises:
    ValueError: for a bit-width out of range or another rounding.

  >>> [planes_read(b, stored_bits=8, rounding="half_up") for b in (8, 4, 2)]
  [8, 5, 3]
  """
  checks.one_of("rounding", rounding, ROUNDINGS)
  stored_bits = checks.check_integer("stored_bits", stored_bits, 2, 8)
  bits = checks.check_integer("bits", bits, 2, stored_bits)
  return min(bits + (rounding == "half_up"), stored_bits)


def matmul_bytes(
  shape: tuple[int, int, int], bits: int, dtype: Any, **stored: Any
) -> int:
  """Returns the bytes that a product has to move: planes, x, scale, result.

  Args:
    shape: (m, k, n).
    bits: bit-width in use.
    dtype: of x and of the result.
    **stored: `stored_bits` and `rounding`, as `planes_read` takes them.

  >>> matmul_bytes((1, 64, 8), 4, "float32", stored_bits=8, rounding="half_up")
  640
  """
  m, k, n = shape
  words = planes_read(bits, **stored) * words_of(k) * n
  return 4 * words + 4 * n + m * (k + n) * np.dtype(dtype).itemsize


def words_of(rows: int) -> int:
  """Returns the number of words in a column of `rows` codes."""
  return -(-rows // WORD)


def check_planes(planes: UInt32[Array, "planes words n"], rows: int) -> None:
  """Raises ValueError unless planes are of a kernel with that many rows."""
  words = words_of(rows)
  shape = planes.shape
  fits = len(shape) == 3 and 1 <= shape[0] <= 8 and shape[1] == words
  if planes.dtype != jnp.uint32 or not fits:
    raise ValueError(
      f"planes must be uint32 [1..8, {words}, n] for {rows} rows, got "
      f"{planes.dtype} {list(shape)}"
    )

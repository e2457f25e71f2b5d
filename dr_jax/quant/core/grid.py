"""Integer grids: ranges, steps, and rounding to codes.

A quantized value is `w ~ code * step * scale`, with integer `code` in
[low, high] and `step = 2^(h - b)`: the width of one b-bit level in units of
the highest bit-width h. Methods with one rounding have step 1.

The gradients of rounding to a grid are in `straight_through`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.quant.core.checks import Index

if TYPE_CHECKING:
  from jaxtyping import Array, Float

# Learned scales are read through a clamp to this interval, which keeps them
# positive and finite whatever an optimizer does to the raw parameter. Powers
# of two, so that code * step * scale cannot overflow or turn denormal.
SCALE_MIN = 2.0**-30
SCALE_MAX = 2.0**30
SCALE_RANGE = SCALE_MIN, SCALE_MAX

# Of floats that are above 0, and of those that may be 0.
POSITIVE = float(np.finfo(np.float32).smallest_subnormal), 2.0**127
NOT_NEGATIVE = 0.0, 2.0**127

# A number that depends on the position in the candidate bit-widths.
Number: TypeAlias = float | jax.Array


class Grid(NamedTuple):
  """One bit-width of a quantizer, as Python floats or as traced scalars."""

  low: Number  # smallest code
  high: Number  # largest code
  step: Number  # 2^D, the width of a level in units of the scale
  first_low: Number  # code range of the first rounding, at step 1
  first_high: Number
  bottom: Number  # smallest and largest v = w / (scale * step) that still
  top: Number  # have a gradient


def code_range(bits: int, *, signed: bool = True) -> tuple[int, int]:
  """Returns the smallest and largest code of a bit-width.

  Args:
    bits: bit-width, at least 1.
    signed: codes -2^(bits-1)..2^(bits-1)-1, else 0..2^bits-1.

  >>> code_range(4)
  (-8, 7)
  >>> code_range(4, signed=False)
  (0, 15)
  """
  if signed:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  return 0, 2**bits - 1


def single_grids(bits: tuple[int, ...], *, signed: bool) -> tuple[Grid, ...]:
  """Grids of methods with one rounding: codes of `b` bits at step 1.

  >>> [(g.low, g.high) for g in single_grids((4, 2), signed=True)]
  [(-8, 7), (-2, 1)]
  """
  ranges = [code_range(b, signed=signed) for b in bits]
  return tuple(Grid(*ends, 1, *ends, *ends) for ends in ranges)


def nested_grids(
  bits: tuple[int, ...], rounding: str, *, symmetric: bool = False
) -> tuple[Grid, ...]:
  """Grids of a signed integer model whose lower bit-widths derive from it.

  Under "floor" the second rounding never clips, so that the gradient lives on
  the whole range of the first one: `top` is its largest code. `symmetric`
  leaves the lowest code of the highest bit-width out.

  >>> [g.step for g in nested_grids((8, 6, 4), "half_even")]
  [1, 4, 16]
  """
  first_low, first_high = code_range(bits[0])
  if symmetric:
    first_low = -first_high
  grids = []
  for b in bits:
    low, high = code_range(b)
    step = 2 ** (bits[0] - b)
    top = first_high / step if rounding == "floor" else high
    bottom = first_low / step
    grids.append(Grid(low, high, step, first_low, first_high, bottom, top))
  return tuple(grids)


Row = TypeVar("Row", bound=tuple)


def select(rows: Sequence[Row], index: Index) -> Row:
  """Returns the named tuple of numbers at `index`.

  Constants for a Python int, else look-ups in float32 tables.

  >>> select(single_grids((8, 4), signed=True), 1).high
  7.0
  """
  kind = type(rows[0])
  if isinstance(index, int | np.integer):
    return kind(*map(float, rows[index]))
  columns = np.array(rows, np.float32).T
  return kind(*(jnp.asarray(column)[index] for column in columns))


def entry(table: Sequence[int], index: Index) -> int | jax.Array:
  """Returns the integer at `index`: a constant for an int, else a look-up.

  >>> entry((6, 4, 2), 1)
  4
  """
  if isinstance(index, int | np.integer):
    return table[index]
  return jnp.asarray(table, jnp.int32)[index]


def round_by(rounding: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Rounds to integers; `rounding` says what happens to exact halves.

  >>> round_by("half_up", jnp.array([0.5, 1.5, -0.5])).tolist()
  [1.0, 2.0, 0.0]
  """
  match rounding:
    case "half_even":
      return jnp.round(x)
    case "half_up":
      return jnp.floor(x + 0.5)
    case _:
      return jnp.floor(x)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x in at least float32 (jnp.promote_types raises in strict mode)."""
  x = jnp.asarray(x)
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def positive(scale: Float[Array, "..."]) -> Float[Array, "..."]:
  """The scale that is used: clamped to [2^-30, 2^30].

  >>> positive(jnp.array([-1.0, 0.5])).tolist()
  [9.313225746154785e-10, 0.5]
  """
  return jnp.clip(scale, SCALE_MIN, SCALE_MAX)


def covering_scale(
  low: Float[Array, "..."],
  high: Float[Array, "..."],
  code_low: Number,
  code_high: Number,
) -> Float[Array, "..."]:
  """The smallest scale at which codes reach from `low` to `high`; float32.

  >>> covering_scale(jnp.array(-1.0), jnp.array(14.0), -8, 7).tolist()
  2.0
  """
  scale = jnp.maximum(high, 0) / code_high
  if code_low:
    scale = jnp.maximum(scale, low / code_low)
  return positive(scale).astype(jnp.float32)


def working_floats(
  x: Float[Array, "..."], scale: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Both in the dtype that is computed in, and the scale positive."""
  x = widened(x)
  return x, positive(scale.astype(x.dtype))


def first_codes(
  w: Float[Array, "..."],
  scale: Float[Array, "..."],
  low: Number,
  high: Number,
  rounding: str = "half_even",
) -> Float[Array, "..."]:
  """Integer-valued floats clip(round(w / scale), low, high).

  Multiplies by the reciprocal on purpose: XLA turns a division by a broadcast
  operand into that product in some programs and not in others, so that w /
  scale would round differently under jit, eagerly and with a constant scale.

  >>> first_codes(jnp.array([0.26, -9.0]), jnp.float32(0.1), -8, 7).tolist()
  [3.0, -8.0]
  """
  return jnp.clip(round_by(rounding, w * (1 / scale)), low, high)

"""Integer grids: ranges, rounding rules, and the straight-through core.

A quantized value is `w ~ code * step * scale`, with integer `code` in
[low, high] and `step = 2^(h - b)`: the width of one b-bit level in units of
the highest bit-width h. Methods with one rounding have step 1.

Every learned-scale method (Double Rounding, LSQ, ...) differentiates through
`round_straight_through`, whose gradients are those of LSQ (arXiv 1902.08153,
eq. 2 and 3), written for a scale shared by several bit-widths.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int

# Learned scales are read through a clamp to this interval, which keeps them
# positive and finite whatever an optimizer does to the raw parameter. Powers
# of two, so that code * step * scale cannot overflow or turn denormal.
SCALE_MIN = 2.0**-30
SCALE_MAX = 2.0**30

ROUNDINGS = ("half_even", "half_up", "floor")

# Position in the candidate bit-widths, and a number that depends on it.
Index: TypeAlias = int | jax.Array
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


class _Core(NamedTuple):
  """What is known at trace time; `grid` is None if the index is traced."""

  rounding: str
  double: bool
  grid: Grid | None
  first: str
  center: float


def check_bits(
  bits: Sequence[int], *, lowest: int = 2, highest: int = 8, method: str = ""
) -> tuple[int, ...]:
  """Returns candidate bit-widths as a tuple of ints.

  Args:
    bits: candidates, highest first.
    lowest, highest: what is allowed.
    method: whose bit-widths they are, for the message.

  Raises:
    ValueError: if `bits` is empty, not strictly descending, or has an entry
      that is no integer or is outside [lowest, highest].
  """
  whose = f"{method} takes" if method else "allowed are"
  allowed = f"{whose} integers from {highest} down to {lowest}, highest first"
  if lowest == highest:
    allowed = f"{whose} ({lowest},) only, candidates being highest first"
  try:
    checked = tuple(operator.index(b) for b in bits)
  except TypeError:
    raise ValueError(f"bits={bits!r}: {allowed}") from None
  descending = all(a > b for a, b in zip(checked, checked[1:], strict=False))
  inside = all(lowest <= b <= highest for b in checked)
  if not checked or not descending or not inside:
    raise ValueError(f"bits={bits!r}: {allowed}")
  return checked


def check_rounding(rounding: str) -> str:
  if rounding not in ROUNDINGS:
    raise ValueError(f"rounding={rounding!r}: allowed are {ROUNDINGS}")
  return rounding


def check_index(index: Index, bits: tuple[int, ...]) -> Index:
  """Rejects a Python index outside the candidates, which XLA would clamp."""
  if isinstance(index, int | np.integer) and not 0 <= index < len(bits):
    raise ValueError(
      f"index={index}: allowed are 0..{len(bits) - 1}, positions in bits={bits}"
    )
  return index


def check_sign(signed: bool | None) -> None:
  """Raises ValueError if the sign of an activation is still open."""
  if signed is None:
    raise ValueError(
      "signed=None: allowed are True and False; nn.quantize settles it by "
      "calibration, with_sign(True) by hand"
    )


def check_finite(name: str, x: Float[Array, ...]) -> None:
  """Raises ValueError for NaN or infinite values; under a trace, nothing."""
  if isinstance(x, jax.core.Tracer):
    return
  # A weight that a jitted function closes over is concrete: look at it now.
  with jax.ensure_compile_time_eval():
    bad = x.size - int(jnp.isfinite(x).sum())
  if bad:
    raise ValueError(
      f"{name}: {bad} of {x.size} values are NaN or infinite; "
      "allowed are finite numbers"
    )


def check_integers(name: str, codes: Int[Array, ...]) -> Int[Array, ...]:
  """Returns codes as an array; raises ValueError unless they are integers."""
  codes = jnp.asarray(codes)
  if not jnp.issubdtype(codes.dtype, jnp.integer):
    raise ValueError(f"{name}: dtype {codes.dtype}; allowed are integers")
  return codes


def code_range(bits: int, *, signed: bool = True) -> tuple[int, int]:
  """Returns the smallest and largest code of a bit-width."""
  if signed:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  return 0, 2**bits - 1


def single_grids(bits: tuple[int, ...], *, signed: bool) -> tuple[Grid, ...]:
  """Grids of methods with one rounding: codes of `b` bits at step 1."""
  ranges = [code_range(b, signed=signed) for b in bits]
  return tuple(Grid(*ends, 1, *ends, *ends) for ends in ranges)


def nested_grids(
  bits: tuple[int, ...], rounding: str, *, symmetric: bool = False
) -> tuple[Grid, ...]:
  """Grids of a signed integer model whose lower bit-widths derive from it.

  Under "floor" the second rounding never clips, so that the gradient lives on
  the whole range of the first one: `top` is its largest code. `symmetric`
  leaves the lowest code of the highest bit-width out.
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


def select(grids: tuple[Grid, ...], index: Index) -> Grid:
  """Returns the grid at `index`: constants for an int, else a table look-up."""
  if isinstance(index, int | np.integer):
    return Grid(*map(float, grids[index]))
  columns = np.array(grids, np.float32).T
  return Grid(*(jnp.asarray(column)[index] for column in columns))


def round_by(rounding: str, x: Float[Array, ...]) -> Float[Array, ...]:
  """Rounds to integers; `rounding` says what happens to exact halves."""
  match rounding:
    case "half_even":
      return jnp.round(x)
    case "half_up":
      return jnp.floor(x + 0.5)
    case _:
      return jnp.floor(x)


def widened(x: Float[Array, ...]) -> Float[Array, ...]:
  """x in at least float32 (jnp.promote_types raises in strict mode)."""
  x = jnp.asarray(x)
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def positive(scale: Float[Array, ...]) -> Float[Array, ...]:
  """The scale that is used: clamped to [2^-30, 2^30]."""
  return jnp.clip(scale, SCALE_MIN, SCALE_MAX)


def working_floats(
  x: Float[Array, ...], scale: Float[Array, ...]
) -> tuple[Float[Array, ...], Float[Array, ...]]:
  """Both in the dtype that is computed in, and the scale positive."""
  x = widened(x)
  return x, positive(scale.astype(x.dtype))


def first_codes(
  w: Float[Array, ...],
  scale: Float[Array, ...],
  low: Number,
  high: Number,
  rounding: str = "half_even",
) -> Float[Array, ...]:
  """Integer-valued floats clip(round(w / scale), low, high).

  Multiplies by the reciprocal on purpose: XLA turns a division by a broadcast
  operand into that product in some programs and not in others, so that w /
  scale would round differently under jit, eagerly and with a constant scale.
  """
  return jnp.clip(round_by(rounding, w * (1 / scale)), low, high)


def round_straight_through(
  x: Float[Array, ...],
  scale: Float[Array, ...],
  grids: tuple[Grid, ...],
  index: Index,
  *,
  rounding: str = "half_even",
  double: bool = False,
  first: str = "half_even",
  center: float = 0.0,
) -> Float[Array, ...]:
  """Fake-quantizes x with straight-through gradients for x and scale.

  With v = x / (scale * step), q the code plus `center`, and N the number of
  elements that share a scale entry:
    out = q * scale * step
    d out / d x = 1 where bottom <= v <= top, else 0
    d out / d scale = step / sqrt(N * high) * (q - v inside, q outside)
  Under shard_map, N counts the elements of one shard.

  Args:
    x: any shape, any float dtype; computed in at least float32.
    scale: broadcasts against x with the same rank, or a scalar.
    grids: one per candidate bit-width.
    index: which grid; a Python int folds all constants.
    rounding: rule of the second rounding.
    double: whether there is a second rounding.
    first: rule of the first rounding.
    center: what a code stands for beyond itself, in levels: 1/2 where codes
      are floors, so that a value lies amid those that it stands for.

  Returns:
    The quantized values, shape and dtype of x.
  """
  if isinstance(index, int | np.integer):
    grid = select(grids, index)
    double = double and bool(grid.step != 1)
    core = _Core(rounding, double, grid, first, center)
    return _round_straight_through(core, x, scale, None)
  grid = select(grids, index)
  core = _Core(rounding, double, None, first, center)
  return _round_straight_through(core, x, scale, grid)


@jax.custom_vjp
def straight_through(
  x: Float[Array, ...], x_hat: Float[Array, ...]
) -> Float[Array, ...]:
  """Returns x_hat bit for bit, and passes its gradient to x unchanged.

  (x + stop_gradient(x_hat - x) would round.)

  Args:
    x: any shape.
    x_hat: shape and dtype of x, computed from stop_gradient(x): it gets no
      gradient.
  """
  return x_hat


def _pass_through(x, g):
  # Transposing the sum adds over the axes that only x_hat varies over.
  _, transposed = jax.vjp(lambda x: x + jnp.zeros_like(g), x)
  return *transposed(g), None


straight_through.defvjp(lambda x, x_hat: (x_hat, x), _pass_through)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _round_straight_through(core, x, scale, grid):
  grid = core.grid or grid
  q, _, unit = _quantize(core, x, scale, grid)
  return (q * unit).astype(x.dtype)


def _forward(core, x, scale, grid):
  # The inputs are alive anyway; codes are cheaper to recompute than to keep.
  return _round_straight_through(core, x, scale, grid), (x, scale, grid)


def _backward(core, residuals, g):
  x, scale, grid = residuals
  numbers = core.grid or grid
  q, x32, unit = _quantize(core, x, scale, numbers)
  # Explicit masks: jnp.clip would pass half of the gradient at exact ends. On
  # x, not on v, whose rounding error would push the end codes themselves out.
  inside = (x32 >= numbers.bottom * unit) & (x32 <= numbers.top * unit)
  slope = q - jnp.where(inside, x32 * (1 / unit), 0)
  elements = max(x.size // max(jnp.size(scale), 1), 1)
  slope *= numbers.step / (math.sqrt(elements) * _sqrt(numbers.high))

  # JAX transposes this linear stand-in, and with it every broadcast: shared
  # axes, axes of a mesh, and axes that only some operands vary over.
  def stand_in(x, scale):
    x, scale = x.astype(slope.dtype), scale.astype(slope.dtype)
    return jnp.where(inside, x, 0) + scale * slope

  _, transposed = jax.vjp(stand_in, x, scale)
  return *transposed(g.astype(slope.dtype)), None


_round_straight_through.defvjp(_forward, _backward)


def _quantize(core, x, scale, grid):
  """Returns code + center, x, and unit = scale * step, all as floats."""
  x, scale = working_floats(x, scale)
  q = first_codes(x, scale, grid.first_low, grid.first_high, core.first)
  if core.double:
    q = round_by(core.rounding, q / grid.step)
    q = jnp.clip(q, grid.low, grid.high)
  if core.center:
    q = q + core.center
  return q, x, scale * grid.step


def _sqrt(x):
  return math.sqrt(x) if isinstance(x, float) else jnp.sqrt(x)

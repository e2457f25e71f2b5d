"""Rounding with a gradient: straight through, for inputs and scales.

Every learned-scale method (Double Rounding, LSQ, ...) differentiates through
`round_straight_through`, whose gradients are those of LSQ (arXiv 1902.08153,
eq. 2 and 3), written for a scale shared by several bit-widths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.quant.core.checks import Index
from dr_jax.quant.core.grid import (
  Grid,
  first_codes,
  round_by,
  select,
  working_floats,
)
from dr_jax.quant.core.rows import fewer_rows

if TYPE_CHECKING:
  from jaxtyping import Array, Float


class _Core(NamedTuple):
  """What is known at trace time; `grid` is None if the index is traced."""

  rounding: str
  double: bool
  grid: Grid | None
  first: str
  center: float


def round_straight_through(
  x: Float[Array, "..."],
  scale: Float[Array, "..."],
  grids: tuple[Grid, ...],
  index: Index,
  *,
  rounding: str = "half_even",
  double: bool = False,
  first: str = "half_even",
  center: float = 0.0,
) -> Float[Array, "..."]:
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
      are floors, so that a value is the midpoint of its bin.

  Returns:
    The quantized values, shape and dtype of x.

  >>> from dr_jax.quant.core.grid import single_grids
  >>> grids = single_grids((4, 2), signed=True)
  >>> x = jnp.array([0.24, 0.26, 9.0])
  >>> round_straight_through(x, jnp.float32(0.5), grids, 1).tolist()
  [0.0, 0.5, 0.5]
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
  x: Float[Array, "..."], x_hat: Float[Array, "..."]
) -> Float[Array, "..."]:
  """Returns x_hat bit for bit, and passes its gradient to x unchanged.

  (x + stop_gradient(x_hat - x) would round.)

  Args:
    x: any shape.
    x_hat: shape and dtype of x, computed from stop_gradient(x): it gets no
      gradient.

  >>> jax.grad(lambda x: straight_through(x, jnp.float32(2)) * 3)(1.7).tolist()
  3.0
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

  def passed(x):
    return jnp.where(inside, x, 0)

  return *gradients(x, passed, [(scale, slope)], g, slope.dtype), None


_round_straight_through.defvjp(_forward, _backward)


def gradients(
  x: jax.Array,
  passed: Callable[[jax.Array], jax.Array],
  learned: Sequence[tuple[jax.Array, jax.Array]],
  g: jax.Array,
  dtype: Any,
) -> tuple[jax.Array, ...]:
  """Cotangents where x_hat is to have the gradients of a linear function.

    x_hat = passed(x) + sum of parameter * slope

  JAX transposes it, and with it every broadcast: shared axes, axes of a mesh,
  and axes that only some operands vary over.

  Args:
    x: the input, in its own dtype.
    passed: a linear function of x in `dtype`, element by element.
    learned: parameters, in their own dtypes, each with its slope, shaped as x.
    g: cotangent of x_hat.
    dtype: what is computed in.

  Returns:
    The cotangents of x and of the parameters, in their dtypes.
  """
  g = g.astype(dtype)
  zeros = jnp.zeros_like(g)
  _, of_x = jax.vjp(lambda x: passed(x.astype(dtype)) + zeros, x)
  return *of_x(g), *(_of_parameter(p, g * slope) for p, slope in learned)


def _of_parameter(parameter, terms):
  """Sums the terms that share an entry of a parameter."""
  if all(size == 1 for size in parameter.shape[:-1]):
    terms = fewer_rows(terms, range(terms.ndim - 1))
  zeros = jnp.zeros_like(terms)
  _, transposed = jax.vjp(lambda p: p.astype(terms.dtype) + zeros, parameter)
  return transposed(terms)[0]


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

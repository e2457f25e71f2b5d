"""Reductions over leading axes, eight rows at a time.

XLA:CPU reduces more than 32 rows in windows, number by number, and out of an
array that it writes for this: ten times what a copy takes. Eight rows it
reduces in the loop that computes them, and in vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from jaxtyping import Array, Shaped

_ROWS = 8
# What has fewer elements stays in caches: a second reduction costs more.
_SMALLEST = 2**17


def fewer_rows(
  x: Shaped[Array, "... c"],
  axes: Sequence[int],
  reduce: Callable[..., jax.Array] = jnp.sum,
) -> Shaped[Array, "... c"]:
  """Reduces every eight rows to one, where that is faster.

  Whatever reduces the result over `axes`, in the same way, reduces x. Sums of
  integers and maxima are the same; those of floats have another order.

  Args:
    x: any array; a row is its last axis.
    axes: what the result is to be reduced over, from 0 on.
    reduce: `jnp.sum` or `jnp.max`.

  Returns:
    [1, ..., rows / 8, c], rank of x; x itself where rows are no multiple of
    eight or not all of them share a result, for an array that is explicitly
    sharded or has few elements, and on accelerators.

  >>> fewer_rows(jnp.ones((2, 64, 1024), jnp.int32), (0, 1)).shape
  (1, 16, 1024)
  """
  rows = math.prod(x.shape[:-1])
  if (
    x.size < _SMALLEST
    or rows % _ROWS
    or not set(range(x.ndim - 1)).issubset(axes)
    or any(axis is not None for axis in jax.typeof(x).sharding.spec)
    or jax.default_backend() != "cpu"
  ):
    return x
  width = x.shape[-1]
  # The barrier keeps XLA from merging this reduction and the next one.
  reduced = jax.lax.optimization_barrier(
    reduce(x.reshape(-1, _ROWS, width), axis=1)
  )
  return reduced.reshape(*[1] * (x.ndim - 2), -1, width)

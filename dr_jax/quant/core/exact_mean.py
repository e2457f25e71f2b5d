"""Means that every program computes to the same last bit.

A float sum depends on the order of its terms, which XLA chooses differently
under jit, vmap and each sharding. Where codes depend on a mean over the weights
(a mean magnitude, a standard deviation), what is deployed would then differ
from what was trained. Here terms become integers in units of 2^-22 of the
largest, whose sum is exact in any order; no product is followed by an addition
that a compiler may contract.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dr_jax.quant.core.rows import fewer_rows

if TYPE_CHECKING:
  from jaxtyping import Array, Float

# Integers below 2^22 in two limbs of 11 bits: 2^20 terms fit an int32 sum.
_BITS = 11
_SMALLEST, _LARGEST = 2.0**-100, 2.0**120


def mean(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
  """Returns the mean over `axes`, kept with size 1, as float32.

  The error is at most 2^-22 of the largest magnitude; the sum is exact for up
  to 2^20 entries on the last axis and 2^20 on all others together.

  >>> mean(jnp.array([[1.0, 2.0], [4.0, 6.0]]), (0, 1)).tolist()
  [[3.25]]
  """
  x = jnp.asarray(x).astype(jnp.float32)
  largest = _max_magnitude(x, axes)
  unit = _power_of_two(largest) * 2.0 ** (1 - 2 * _BITS)
  terms = jnp.round(x / unit).astype(jnp.int32)
  count = math.prod(x.shape[axis] for axis in axes)
  average = _exact_sum(terms, axes) * unit * (1 / count)
  # The bounds hold anyway; they prevent XLA from contracting the product and
  # what is added next into an FMA.
  return jnp.clip(average, -largest, largest)


def mean_and_std(
  x: Float[Array, "..."], axes: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Returns mean and unbiased standard deviation (ddof 1), as `mean` does.

  The standard deviation is positive, whatever x is.

  >>> average, std = mean_and_std(jnp.array([1.0, 2.0, 3.0]), (0,))
  >>> average.tolist(), std.tolist()
  ([2.0], [1.0])
  """
  x = jnp.asarray(x).astype(jnp.float32)
  average = mean(x, axes)
  count = math.prod(x.shape[axis] for axis in axes)
  variance = mean(jnp.square(x - average), axes) * (count / max(count - 1, 1))
  return average, jnp.sqrt(jnp.clip(variance, _SMALLEST, _LARGEST))


def largest_magnitude(
  x: Float[Array, "..."], axes: tuple[int, ...]
) -> Float[Array, "..."]:
  """Returns max|x| over `axes`, kept with size 1; positive, safe to divide.

  >>> largest_magnitude(jnp.array([1.0, -3.0]), (0,)).tolist()
  [3.0]
  """
  return jnp.maximum(_max_magnitude(x, axes), _SMALLEST)


def channel_axes(rank: int, *, per_channel: bool) -> tuple[int, ...]:
  """Axes that share one number: all, or all but the last (c_out).

  >>> channel_axes(4, per_channel=True)
  (0, 1, 2)
  """
  return tuple(range(rank - 1 if per_channel else rank))


def _max_magnitude(x, axes):
  return fewer_rows(jnp.abs(x), axes, jnp.max).max(axes, keepdims=True)


def _power_of_two(x):
  """The largest power of two up to x, from its exponent bits."""
  x = jnp.clip(x, _SMALLEST, _LARGEST)
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)


def _exact_sum(terms, axes):
  """Sums int32 terms below 2^22 exactly; rounds the result to float32."""
  last = terms.ndim - 1
  mask = (1 << _BITS) - 1
  limbs = [terms & mask, terms >> _BITS]
  first = tuple(axis for axis in axes if axis != last)
  sums = [fewer_rows(limb, axes).sum(first, keepdims=True) for limb in limbs]
  if last in axes:
    # Each sum is below 2^31: three limbs again, of equal weights merged.
    parts: list = [0, 0, 0, 0]
    for weight, total in enumerate(sums):
      for piece in range(3):
        limb = total >> (piece * _BITS)
        limb = limb & mask if piece < 2 else limb
        limb = limb.sum(last, keepdims=True)
        parts[weight + piece] = parts[weight + piece] + limb
    sums = parts
  total = jnp.zeros((), jnp.float32)
  for weight, limb in reversed(list(enumerate(sums))):
    total = limb.astype(jnp.float32) * 2.0 ** (weight * _BITS) + total
  return total

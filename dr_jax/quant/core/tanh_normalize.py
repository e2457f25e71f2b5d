"""Weights squeezed into [-1, 1] by tanh and their largest magnitude.

  t = tanh(w),   M = max|t| over the tensor,   r = t / M

  dL/dw = (1 - t^2) (g / M - 1{|t| = M} sign(t) sum(g t) / (M^2 n))

with g = dL/dr, and n the number of weights that share the maximum. From
DoReFa-Net, arXiv 1606.06160; AdaBits and Any-Precision round r to their grids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dr_jax.quant.core import exact_mean
from dr_jax.quant.core.rows import fewer_rows

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Float32

# Below the first, a tensor counts as zero. Gradients are clipped to the second,
# so that 0 * inf cannot arise where tanh is flat.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**120


def normalized(w: Float[Array, "..."]) -> Float32[Array, "..."]:
  """Returns tanh(w) / max|tanh(w)|, differentiable through the maximum too.

  Weights that share the maximum share its gradient equally. A tensor of zeros
  is divided by 1: its gradient is that of tanh.

  Args:
    w: weight, any shape; one maximum for all of it.

  Returns:
    float32 values in [-1, 1], shape of w; the same bits in every program.

  >>> normalized(jnp.array([0.0, -9.0, 9.0])).tolist()
  [0.0, -1.0, 1.0]
  """
  return _normalized(jnp.asarray(w))


@jax.custom_vjp
def _normalized(w):
  t, largest = _tanh(w)
  # Never above 1: a number times its rounded reciprocal is at most that.
  return t * (1 / largest)


def _forward(w):
  return _normalized(w), w


def _backward(w, g):
  t, largest = _tanh(w)
  inverse = 1 / largest
  g = jnp.clip(g, -_LARGEST, _LARGEST)
  axes = tuple(range(t.ndim))
  total = exact_mean.mean(g * (t * inverse), axes) * t.size
  shared = jnp.abs(t) == largest
  count = fewer_rows(shared.astype(jnp.int32), axes)
  count = count.sum(axes, keepdims=True, dtype=jnp.int32)
  share = total * (1 / jnp.maximum(count, 1).astype(t.dtype))
  # The bounds keep XLA from contracting product and difference into an FMA.
  share = jnp.clip(share, -_LARGEST, _LARGEST)
  g = (g - jnp.where(shared, jnp.sign(t) * share, 0)) * inverse
  # No product in 1 - t^2 either, and no cancellation.
  return ((g * ((1 - t) * (1 + t))).astype(w.dtype),)


_normalized.defvjp(_forward, _backward)


def _tanh(w):
  """tanh(w) in float32, and its largest magnitude with all axes of size 1."""
  # XLA folds constants with another tanh than it runs: the barrier stops that.
  t = jnp.tanh(jax.lax.optimization_barrier(w.astype(jnp.float32)))
  axes = tuple(range(t.ndim))
  largest = fewer_rows(jnp.abs(t), axes, jnp.max).max(axes, keepdims=True)
  return t, jnp.where(largest < _SMALLEST, 1, largest)

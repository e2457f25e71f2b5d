"""The order in which a compiled program computes what is independent.

XLA orders a program by its own estimate of memory. It computes early what could
wait: all forward passes of a step whose gradients are only summed, or what a
backward pass can compute again. `jax.lax.optimization_barrier` does not help,
since XLA:CPU drops barriers before it orders. A dependence that XLA cannot see
through stays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def after(x: jax.Array, earlier: jax.Array) -> jax.Array:
  """Returns x bit for bit, for uses that have to come after `earlier`.

  Args:
    x: any shape and dtype.
    earlier: floats, a scalar or in the shape of x: then row by row, so that
      devices that share rows need not communicate.

  >>> after(jnp.array([1.5, -0.0]), jnp.float32(jnp.nan)).tolist()
  [1.5, -0.0]
  """
  spec = jax.typeof(earlier).sharding.spec
  for axis in range(1, earlier.ndim):
    # An axis that is sharded in a mesh of explicit axes cannot be sliced.
    if spec[axis] is None:
      earlier = jax.lax.slice_in_dim(earlier, 0, 1, axis=axis)
  return jnp.where(_never(earlier), jnp.zeros((), x.dtype), x)


def _never(x):
  """False, as only a range analysis of integers can find out."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  return (bits & 1) > 1

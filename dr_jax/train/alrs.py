"""Adaptive Learning Rate Scaling: quantization scales learn at their own pace.

With lambda the learning rate, D = h - b, and m_b the mean over learned scales
of min(max|grad|, 1) at bit-width b, the scales' learning rate at b is

  relative      eta_b * lambda * (1 - m_b)
  paper         eta_b * max(lambda - m_b, 0)
  eta           eta_b * lambda
  none          lambda
  proportional  lambda * s, of each scale s
  eta_b         10^(-D/2) for even D, 5 * 10^(-(D+1)/2) for odd D

arXiv 2502.01199, section 3.2, but "proportional". As printed there, without the
max, "paper" goes negative: m_b lies between 1e-2 and 1, lambda near 5e-4. The
factor multiplies the update and not the gradient, whose size Adam would cancel.

Adam's updates are about as large as the learning rate, whatever they update. A
scale that is shared with 8 bits is near 2e-3: updates of 5e-4 move all of its
grids by a quarter. With "proportional" they are that fraction of the scale. A
scale at its minimum hardly leaves it: that of a kernel that starts as zeros, or
one from which SGD subtracted more than it was.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

MODES = ("relative", "paper", "eta", "none", "proportional")


def eta(bits: tuple[int, ...]) -> tuple[float, ...]:
  """Fixed factor of each bit-width: 1, 0.1, 0.01, 0.001 for (8, 6, 4, 2)."""
  factors = []
  for b in bits:
    distance = bits[0] - b
    if distance % 2:
      factors.append(5 * 10.0 ** -((distance + 1) // 2))
    else:
      factors.append(10.0 ** -(distance // 2))
  return tuple(factors)


def gradient_size(scale_gradients: Any) -> jax.Array:
  """m_b: mean over learned scales of min(max|gradient|, 1), float32 scalar."""
  leaves = jax.tree.leaves(scale_gradients)
  sizes = [jnp.minimum(jnp.abs(leaf).max(), 1) for leaf in leaves]
  return jnp.stack(sizes).mean() if sizes else jnp.float32(0)


def factor(
  mode: str,
  eta_b: float | jax.Array,
  size: jax.Array,
  learning_rate: jax.Array,
) -> jax.Array:
  """What multiplies the update of the scales at one bit-width, see `unit`.

  Args:
    mode: one of MODES.
    eta_b: the bit-width's entry of `eta`; [layers] where they differ.
    size: m_b, see `gradient_size`.
    learning_rate: lambda, what the other parameters are updated with.

  Returns:
    float32, scalar or [layers]: the scales' learning rate over lambda, 0 where
    lambda is.

  Raises:
    ValueError: for an unknown mode.
  """
  match mode:
    case "relative":
      return eta_b * (1 - size)
    case "paper":
      room = jnp.maximum(learning_rate - size, 0)
      return eta_b * room / jnp.maximum(learning_rate, 1e-30)
    case "eta":
      return jnp.float32(eta_b)
    case "none" | "proportional":
      return jnp.float32(1)
  raise ValueError(f"alrs must be one of {MODES}, got {mode!r}")


def unit(mode: str, scale: jax.Array) -> jax.Array | float:
  """What the factor of a scale counts in: the scale itself, or 1."""
  return scale if mode == "proportional" else 1.0

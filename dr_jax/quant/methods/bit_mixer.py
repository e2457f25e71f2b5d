"""Bit-Mixer's quantizer: one LSQ model, lower bit-widths by dropping bits.

  q_h = clip(round(w / s), -(2^(h-1) - 1), 2^(h-1) - 1)
  q_l = floor(q_h / 2^D) = q_h >> D,   D = h - l
  w_hat = q_l * s * 2^D

ICCV 2021, "Bit-Mixer: Mixed-precision networks with runtime bit-width
selection". The authors published no code: the gradient (straight-through, with
LSQ's for the scale) is our reading, and no parity is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence

from dr_jax.quant.core import checks, grid
from dr_jax.quant.core.interface import WeightQuantizer
from dr_jax.quant.methods.double_rounding import nested
from dr_jax.quant.methods.lsq import initial_scale
from dr_jax.quant.registry import Recipe, method


@method(bit_mixer=Recipe("bit_mixer", curriculum="bit_mixer"))
def bit_mixer(
  bits: Sequence[int] = (8, 6, 4, 2), *, per_channel: bool = True
) -> WeightQuantizer:
  """Builds the Bit-Mixer weight quantizer.

  Shared between bit-widths: the weights, the codes and the scale. Stored: codes
  of bits[0] bits without the lowest state, and float32 scales. Choose it where
  a device can only drop bits, and as the baseline that mixes bit-widths from
  layer to layer.

  Params: {"scale": float32 [1, ..., 1, c_out]}, or all ones per tensor; starts
  at 2 mean|w| / sqrt(2^(h-1) - 1), as in LSQ.

  Args:
    bits: candidate bit-widths in 2..8, highest first.
    per_channel: one scale per entry of the last axis, else one per tensor.

  Raises:
    ValueError: for bits outside 2..8 or not descending, or, outside jit, NaN
      or infinite weights.

  References:
    Bulat and Tzimiropoulos, ICCV 2021, section 3.

  >>> import jax.numpy as jnp
  >>> quantizer = bit_mixer((4, 2))
  >>> params = {"scale": jnp.ones((1, 1))}
  >>> w = jnp.array([[-9.0], [-1.0], [3.0]])
  >>> quantizer.fake_quantize(params, w, 1)[:, 0].tolist()
  [-8.0, -4.0, 0.0]
  """
  bits = checks.check_bits(bits)
  grids = grid.nested_grids(bits, "floor", symmetric=True)

  def scale_of(w):
    return initial_scale(w, grids[0].first_high, per_channel=per_channel)

  return nested(bits, grids, "floor", scale_of)

"""LSQ+: a better first scale for weights, a learned offset for activations.

  w_hat = clip(round(w / s_b), Q_N, Q_P) * s_b
  x_hat = clip(round((x - beta_b) / s_b), 0, 2^b - 1) * s_b + beta_b

An offset lets every code serve an activation that is neither symmetric nor
non-negative (Swish, GELU). CVPR workshops 2020, arXiv 2004.09576.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dr_jax.quant.core import checks, grid
from dr_jax.quant.core.interface import ActivationQuantizer, WeightQuantizer
from dr_jax.quant.core.straight_through import gradients
from dr_jax.quant.methods.double_rounding import three_sigma_scale
from dr_jax.quant.methods.lsq import scale_per_bit_width
from dr_jax.quant.registry import Recipe, method

# Offsets are read through a clamp to as many of the largest scale as 8-bit
# codes have levels, which keeps them finite whatever an optimizer does.
_OFFSET_MAX = grid.SCALE_MAX * 2.0**8


@method(lsq_plus=Recipe("lsq_plus", "lsq_plus_activation"))
def lsq_plus(
  bits: Sequence[int] = (8, 6, 4, 2), *, per_channel: bool = True
) -> WeightQuantizer:
  """Builds the LSQ+ weight quantizer: LSQ with another first scale.

  Shared between bit-widths: the float weights only. Stored: float32 weights,
  or, for a single bit-width, its codes. Choose it over LSQ as the baseline
  where weights are far from a Gaussian around zero or have few bits.

  Params: {"scale": float32 [B, 1, ..., 1, c_out]}; starts at
  max(|mean - 3 std|, |mean + 3 std|) / 2^(b-1).

  Args:
    bits: candidate bit-widths in 2..8, highest first.
    per_channel: one scale per entry of the last axis (the paper has one per
      tensor: False).

  Raises:
    ValueError: for bits outside 2..8 or not descending, or, outside jit, NaN
      or infinite weights.

  References:
    arXiv 2004.09576, section 3.3.1. Gradients as in `lsq`.

  >>> quantizer = lsq_plus((8, 4))
  >>> quantizer.init(jnp.array([[1.0], [-1.0]]))["scale"][:, 0, 0].tolist()
  [0.0234375, 0.375]
  """
  bits = checks.check_bits(bits, method="lsq_plus")

  def scale_of(w, b):
    return three_sigma_scale(w, b, per_channel=per_channel)

  return scale_per_bit_width(bits, scale_of)


@method()
def lsq_plus_activation(
  bits: Sequence[int] = (8, 6, 4, 2), *, signed: bool | None = None
) -> ActivationQuantizer:
  """Builds the LSQ+ activation quantizer: learned scales and offsets.

  With v = (x - beta_b) / s_b, q the code, Q_P = 2^b - 1, and N the number of
  elements:
    d x_hat / d x = 1 where 0 <= v <= Q_P, else 0
    d x_hat / d s_b = (q - v inside, q outside) / sqrt(N Q_P)
    d x_hat / d beta_b = (0 inside, 1 outside) / sqrt(N Q_P)

  Choose it after activations with a negative tail, and where one method must
  serve inputs of either sign.

  Params: {"scale": float32 [B], "offset": float32 [B]}; start at (max - min) /
  Q_P and at min of the calibration batch. The paper searches for the smallest
  squared error instead; no parity is claimed.

  Args:
    bits: candidate bit-widths in 2..8, highest first.
    signed: ignored, since the offset serves either sign with codes 0..2^b-1;
      the quantizer's `signed` is False.

  Raises:
    ValueError: for bits outside 2..8 or not descending, or, outside jit, NaN
      or infinite calibration inputs.

  References:
    arXiv 2004.09576, section 3.1 and 3.2.

  >>> quantizer = lsq_plus_activation((8, 2))
  >>> x = jnp.array([-1.0, 0.1, 2.0])
  >>> params = quantizer.init(x)
  >>> quantizer.fake_quantize(params, x, 1).tolist()
  [-1.0, 0.0, 2.0]
  """
  bits = checks.check_bits(bits, method="lsq_plus_activation")
  grids = grid.single_grids(bits, signed=False)

  def init(x):
    x = grid.widened(x)
    return from_range(x.min(), x.max())

  def from_range(low, high):
    scale = jnp.stack([(high - low) / g.high for g in grids])
    offset = _read_offset(jnp.stack([low] * len(bits)))
    return {
      "scale": grid.positive(scale).astype(jnp.float32),
      "offset": offset.astype(jnp.float32),
    }

  def fake_quantize(params, x, index):
    x, top = jnp.asarray(x), jnp.asarray([float(g.high) for g in grids])[index]
    return _shifted(x, params["scale"][index], params["offset"][index], top)

  return ActivationQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    signed=False,
    from_range=from_range,
  )


@jax.custom_vjp
def _shifted(x, scale, offset, top):
  _, scale, offset, _, q = _quantize(x, scale, offset, top)
  # The bound holds anyway: it prevents XLA from contracting product and sum
  # into an FMA, with one rounding, in some programs and not in others.
  return (jnp.minimum(q * scale, top * scale) + offset).astype(x.dtype)


def _forward(x, scale, offset, top):
  return _shifted(x, scale, offset, top), (x, scale, offset, top)


def _backward(residuals, g):
  x, scale, offset, top = residuals
  x32, scale32, _, shifted, q = _quantize(x, scale, offset, top)
  inside = (shifted >= 0) & (shifted <= top * scale32)
  factor = 1 / (math.sqrt(max(x.size, 1)) * jnp.sqrt(top))
  slope = (q - jnp.where(inside, shifted, 0) * (1 / scale32)) * factor
  outside = jnp.where(inside, 0, factor)

  def passed(x):
    return jnp.where(inside, x, 0)

  learned = [(scale, slope), (offset, outside)]
  return *gradients(x, passed, learned, g, x32.dtype), None


_shifted.defvjp(_forward, _backward)


def _quantize(x, scale, offset, top):
  """Returns x, scale, offset, x - offset and the code, all as floats."""
  x, scale = grid.working_floats(x, scale)
  offset = _read_offset(offset.astype(x.dtype))
  shifted = x - offset
  return x, scale, offset, shifted, grid.first_codes(shifted, scale, 0, top)


def _read_offset(offset):
  return jnp.clip(offset, -_OFFSET_MAX, _OFFSET_MAX)

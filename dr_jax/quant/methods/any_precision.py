"""Any-Precision: float weights rounded to as many levels as requested.

  r = tanh(w) / max|tanh(w)|,   u = r/2 + 1/2,   n = 2^b - 1,   E = mean|w|
  w_hat = E (2 [n u] / n - 1)
  x_hat = [n clip(x, 0, 1)] / n

[.] rounds halves to even. Yu, Li, Shi et al., "Any-Precision Deep Neural
Networks", AAAI 2021, arXiv 1911.07346.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dr_jax.quant.core import checks, exact_mean, grid
from dr_jax.quant.core.interface import (
  ActivationQuantizer,
  Integers,
  WeightQuantizer,
)
from dr_jax.quant.core.packing import integer_dtype, storage
from dr_jax.quant.core.straight_through import straight_through
from dr_jax.quant.core.tanh_normalize import normalized
from dr_jax.quant.registry import Recipe, method


class _Levels(NamedTuple):
  """One bit-width: n and 1/n."""

  top: grid.Number
  inverse: grid.Number


@method(
  any_precision=Recipe(
    "any_precision",
    "unit_activation",
    schedule="accumulate",
    distillation="recursive",
  )
)
def any_precision(bits: Sequence[int] = (8, 6, 4, 2)) -> WeightQuantizer:
  """Builds the Any-Precision weight quantizer.

  Equations as above, with one maximum and one mean per tensor. Levels are
  symmetric, without a zero: -E, ..., -E/n, E/n, ..., E. E is detached;
  gradients pass straight through [.], and through tanh and its maximum as they
  are (see `tanh_normalize`), times E.

  Shared between bit-widths: the float weights and E. Stored: r and E in
  float32, since round(n u) does not nest. Choose it as the baseline that learns
  nothing but the weights, where a float file is acceptable.

  Params: {}.

  Chosen here: weights that share the maximum share its gradient.

  Args:
    bits: candidate bit-widths in 1..8, highest first. (The published float
      branch is not a bit-width here.)

  Raises:
    ValueError: for bits outside 1..8 or not descending, or, outside jit, NaN
      or infinite weights.

  References:
    arXiv 1911.07346.

  >>> quantizer = any_precision((8, 1))
  >>> quantizer.fake_quantize({}, jnp.array([[-3.0], [1.0]]), 1)[:, 0].tolist()
  [-2.0, 2.0]
  """
  bits = checks.check_bits(bits, lowest=1, method="any_precision")
  levels = tuple(_Levels(2.0**b - 1, 1 / (2.0**b - 1)) for b in bits)

  def odd_codes(r, size, index):
    top, inverse = grid.select(levels, index)
    codes = jnp.round((r * 0.5 + 0.5) * top)
    return 2 * codes - top, size * inverse

  def values(r, size, index):
    codes, unit = odd_codes(r, size, index)
    return codes * unit

  def init(w):
    return {}

  def fake_quantize(params, w, index):
    del params
    w = jnp.asarray(w)
    r, size = normalized(w), _mean_magnitude(jax.lax.stop_gradient(w))
    w_hat = values(jax.lax.stop_gradient(r), size, index)
    return straight_through(r * size, w_hat).astype(w.dtype)

  def encode(params, w):
    del params
    w = jnp.asarray(w)
    return {"weight": normalized(w), "size": _mean_magnitude(w)}

  def decode(encoded, index):
    return values(encoded["weight"], encoded["size"], index)

  dtype = integer_dtype(-levels[0].top, levels[0].top)

  def integers(encoded, index):
    codes, unit = odd_codes(encoded["weight"], encoded["size"], index)
    return Integers(codes.astype(dtype), unit)

  return WeightQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=32,
    storage=storage(
      bits, 32, ranges={"weight": (-1, 1), "size": grid.NOT_NEGATIVE}
    ),
    integers=integers,
  )


@method()
def unit_activation(
  bits: Sequence[int] = (8, 6, 4, 2), *, signed: bool | None = None
) -> ActivationQuantizer:
  """Builds the activation quantizer of the unit range, without parameters.

    unsigned   x_hat = [n clip(x, 0, 1)] / n,    n = 2^b - 1
    signed     x_hat = [n clip(x, -1, 1)] / n,   n = 2^(b-1) - 1

  The gradient passes where x is within the range, both ends included. The
  signed form is ours, with as many levels below zero as above; published inputs
  follow a ReLU. Choose it together with `any_precision`, after a normalization:
  nothing adapts the range to the inputs.

  Params: {}.

  Args:
    bits: candidate bit-widths in 1..8, highest first; in 2..8 if signed.
    signed: range [-1, 1], or [0, 1]. None leaves it to calibration: signed
      where a calibration input is negative.

  Raises:
    ValueError: for bits outside that range or not descending, and when used
      while the sign is undecided.

  References:
    arXiv 1911.07346.

  >>> quantizer = unit_activation((8, 1), signed=False)
  >>> quantizer.fake_quantize({}, jnp.array([-1.0, 0.6, 9.0]), 1).tolist()
  [0.0, 1.0, 1.0]
  """
  if signed:
    bits = checks.check_bits(bits, method="unit_activation with signed=True")
  bits = checks.check_bits(bits, lowest=1, method="unit_activation")
  tops = [2.0 ** (b - 1 if signed else b) - 1 for b in bits]
  levels = tuple(_Levels(top, 1 / top) for top in tops)
  low = -1 if signed else 0

  def init(x):
    return {}

  def rounded(x, index):
    top, inverse = grid.select(levels, index)
    return jnp.round(jnp.clip(x, low, 1) * top), inverse

  def fake_quantize(params, x, index):
    del params
    x = jnp.asarray(x)
    fixed = jax.lax.stop_gradient(x).astype(jnp.float32)
    codes, inverse = rounded(fixed, index)
    x_hat = codes * inverse
    inside = (fixed >= low) & (fixed <= 1)
    return straight_through(jnp.where(inside, x, 0), x_hat.astype(x.dtype))

  dtype = integer_dtype(low * tops[0], tops[0])

  def integers(params, x, index):
    del params
    codes, inverse = rounded(grid.widened(x).astype(jnp.float32), index)
    return Integers(codes.astype(dtype), jnp.float32(inverse))

  return ActivationQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    signed=signed,
    integers=integers,
  )


def _mean_magnitude(w):
  axes = exact_mean.channel_axes(w.ndim, per_channel=False)
  return exact_mean.mean(jnp.abs(w), axes)

"""Inputs with a scale of their own for each row, computed while running.

  s_row = max|x| / Q_P,    x_hat = clip(round(x / s_row), Q_N, Q_P) * s_row

Nothing is calibrated or learned, and no input clips. Known as dynamic or
per-token quantization: arXiv 2206.01861 (ZeroQuant), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dr_jax.quant.core import checks, grid
from dr_jax.quant.core.interface import ActivationQuantizer, Integers
from dr_jax.quant.core.packing import integer_dtype
from dr_jax.quant.core.straight_through import straight_through
from dr_jax.quant.registry import method


class _Level(NamedTuple):
  """One bit-width: its smallest and largest code, and 1 / the latter."""

  low: grid.Number
  high: grid.Number
  inverse: grid.Number


@method()
def dynamic_activation(
  bits: Sequence[int] = (8, 6, 4, 2), *, signed: bool | None = None
) -> ActivationQuantizer:
  """Builds the activation quantizer with a scale for each row, from that row.

    x_hat = clip(round(x / s), Q_N, Q_P) * s,    s = max|x| / Q_P of the row

  A row is the last axis; a layer passes its inputs with everything that one of
  its sums runs over as that axis, so that the scale can be taken out of the
  sum: a token of a linear layer, an example of a convolution. The gradient of
  x_hat passes to x, but where unsigned codes leave out negative inputs.

  Choose it without training, and where inputs differ much from one to the next,
  as in language models. Each call reads its inputs once more than one with a
  stored scale. The two-bit codes -2..1 hold nothing but -s, 0 and s here.

  Params: {}.

  Args:
    bits: candidate bit-widths in 2..8, highest first.
    signed: codes -2^(b-1)..2^(b-1)-1, or 0..2^b-1 (after a ReLU). None leaves
      it to calibration: signed where a calibration input is negative.

  Raises:
    ValueError: for bits outside 2..8 or not descending, and when used while
      the sign is undecided.

  References:
    arXiv 2206.01861, section 4.1 (token-wise quantization of activations).

  >>> quantizer = dynamic_activation((8, 2), signed=True)
  >>> x = jnp.array([[1.0, -4.0, 1.0], [0.5, 0.2, 0.25]])
  >>> quantizer.fake_quantize({}, x, 1).tolist()
  [[0.0, -4.0, 0.0], [0.5, 0.0, 0.0]]
  """
  bits = checks.check_bits(bits)
  ranges = [grid.code_range(b, signed=bool(signed)) for b in bits]
  levels = tuple(_Level(low, high, 1 / high) for low, high in ranges)

  def rounded(x, index):
    level = grid.select(levels, index)
    x = grid.widened(x)
    size = jnp.abs(x) if signed else jnp.maximum(x, 0)
    size = size.max(axis=-1 if x.ndim else None, keepdims=True, initial=0)
    scale = grid.positive(size * level.inverse)
    return grid.first_codes(x, scale, level.low, level.high), scale

  def fake_quantize(params, x, index):
    del params
    x = jnp.asarray(x)
    codes, scale = rounded(jax.lax.stop_gradient(x), index)
    kept = x if signed else jnp.where(x >= 0, x, 0)
    return straight_through(kept, (codes * scale).astype(x.dtype))

  dtype = integer_dtype(*ranges[0])

  def integers(params, x, index):
    del params
    codes, scale = rounded(x, index)
    return Integers(codes.astype(dtype), scale)

  return ActivationQuantizer(
    bits=bits,
    init=lambda x: {},
    fake_quantize=fake_quantize,
    signed=signed,
    integers=integers,
    dynamic=True,
  )

"""Weights that stay float: w_hat = w at every bit-width.

What quantizing activations alone needs, and the first stage of curricula that
quantize weights later (Bit-Mixer, ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from dr_jax.quant.core import checks, grid
from dr_jax.quant.core.interface import WeightQuantizer
from dr_jax.quant.core.packing import storage
from dr_jax.quant.registry import method


@method()
def float_weight(bits: Sequence[int] = (8, 6, 4, 2)) -> WeightQuantizer:
  """Builds the quantizer that leaves weights alone.

    w_hat = w,   d w_hat / d w = 1

  Shared between bit-widths: everything. Stored: float32 weights, also in a
  copy for one bit-width. Choose it to quantize activations only. It has no
  learned parameters.

  Args:
    bits: candidate bit-widths in 1..8, highest first: those of the
      activations.

  Raises:
    ValueError: for bits outside 1..8 or not descending, or, outside jit, NaN
      or infinite weights.

  >>> quantizer = float_weight((8, 4))
  >>> quantizer.fake_quantize({}, jnp.array([0.5]), 1).tolist()
  [0.5]
  """
  bits = checks.check_bits(bits, lowest=1, method="float_weight")

  def init(w):
    return {}

  def fake_quantize(params, w, index):
    del params
    # Under shard_map the result varies over the mesh if the index does.
    return jnp.where(jnp.asarray(index) >= 0, w, w)

  def encode(params, w):
    del params
    return {"weight": grid.widened(w)}

  def decode(encoded, index):
    return encoded["weight"]

  return WeightQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=32,
    storage=storage((32,) * len(bits), 32),
  )

"""Learned step size quantization: a learned scale for every bit-width.

  w_hat = clip(round(w / s_b), Q_N, Q_P) * s_b

With several bit-widths this is the joint baseline whose scales share nothing;
with one it is separate quantization-aware training. arXiv 1902.08153.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from dr_jax.quant.core import checks, exact_mean, grid
from dr_jax.quant.core.interface import (
  ActivationQuantizer,
  Integers,
  WeightQuantizer,
)
from dr_jax.quant.core.packing import integer_dtype, storage
from dr_jax.quant.core.straight_through import round_straight_through
from dr_jax.quant.registry import Recipe, method

if TYPE_CHECKING:
  from jaxtyping import Array, Float


@method(lsq=Recipe("lsq"))
def lsq(
  bits: Sequence[int] = (8, 6, 4, 2), *, per_channel: bool = True
) -> WeightQuantizer:
  """Builds the LSQ weight quantizer with one scale per bit-width.

  Shared between bit-widths: the float weights only. Stored: float32 weights
  (codes of different scales do not nest), or, for a single bit-width, its
  codes. Choose it as the baseline: one run per bit-width is the accuracy that
  a multi-precision method is measured against.

  Params: {"scale": float32 [B, 1, ..., 1, c_out]}; starts at
  2 mean|w| / sqrt(Q_P).

  Args:
    bits: candidate bit-widths in 2..8, highest first.
    per_channel: one scale per entry of the last axis (the paper has one per
      tensor: False).

  Raises:
    ValueError: for bits outside 2..8 or not descending, or, outside jit, NaN
      or infinite weights.

  References:
    arXiv 1902.08153, eq. 1 to 5. Gradients pass where Q_N <= w/s <= Q_P.

  >>> quantizer = lsq((8, 4))
  >>> w = jnp.array([[0.5, -1.0], [0.25, 1.0]])
  >>> quantizer.init(w)["scale"].shape
  (2, 1, 2)
  >>> lsq((4,)).encode(lsq((4,)).init(w), w)["codes"].tolist()
  [[2, -1], [1, 1]]
  """
  bits = checks.check_bits(bits)

  def scale_of(w, b):
    high = grid.code_range(b)[1]
    return initial_scale(w, high, per_channel=per_channel)

  return scale_per_bit_width(bits, scale_of)


@method()
def lsq_activation(
  bits: Sequence[int] = (8, 6, 4, 2), *, signed: bool | None = None
) -> ActivationQuantizer:
  """Builds the LSQ activation quantizer: one learned scale per bit-width.

    x_hat = clip(round(x / s_b), Q_N, Q_P) * s_b

  Choose it unless a method says otherwise: it is the usual partner of all
  methods with learned weight scales.

  Params: {"scale": float32 [B]}; starts at 2 mean|x| / sqrt(Q_P).

  Args:
    bits: candidate bit-widths in 2..8, highest first.
    signed: codes -2^(b-1)..2^(b-1)-1, or 0..2^b-1 (after a ReLU). None leaves
      it to calibration: signed where a calibration input is negative.

  Raises:
    ValueError: for bits outside 2..8 or not descending, and when used while
      the sign is undecided.

  References:
    arXiv 1902.08153; arXiv 2502.01199, section 3.1 (a scale per bit-width).

  >>> quantizer = lsq_activation((8, 2), signed=False)
  >>> params = {"scale": jnp.array([0.01, 0.5])}
  >>> quantizer.fake_quantize(params, jnp.array([-1.0, 0.6, 9.0]), 1).tolist()
  [0.0, 0.5, 1.5]
  """
  bits = checks.check_bits(bits)
  grids = grid.single_grids(bits, signed=bool(signed))

  def init(x):
    size = 2 * jnp.abs(grid.widened(x)).mean()
    return {"scale": jnp.stack([_scale(size, g.high) for g in grids])}

  def fake_quantize(params, x, index):
    return round_straight_through(x, params["scale"][index], grids, index)

  dtype = integer_dtype(grids[0].low, grids[0].high)

  def integers(params, x, index):
    x, scale = grid.working_floats(x, params["scale"][index])
    target = grid.select(grids, index)
    codes = grid.first_codes(x, scale, target.low, target.high)
    return Integers(codes.astype(dtype), scale)

  return ActivationQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    signed=signed,
    from_range=_covering(grids),
    integers=integers,
  )


def fake_quantize(
  x: Float[Array, "..."],
  scale: Float[Array, "..."],
  bits: int,
  *,
  signed: bool = True,
) -> Float[Array, "..."]:
  """Quantizes x to one bit-width and back, differentiably.

  Args:
    x: values, any shape.
    scale: float, a scalar or the rank of x and broadcastable to it.
    bits: bit-width, 2..8.
    signed: codes -2^(bits-1)..2^(bits-1)-1, or 0..2^bits-1.

  Returns:
    clip(round(x / scale), Q_N, Q_P) * scale, shape and dtype of x. Gradients
    are LSQ's, for x and scale.

  Raises:
    ValueError: if bits is outside 2..8 or the ranks do not fit.

  References:
    arXiv 1902.08153, eq. 1 to 3.

  >>> fake_quantize(jnp.array([0.24, 0.26, 9.0]), 0.5, 2).tolist()
  [0.0, 0.5, 0.5]
  """
  bits = checks.check_integer("bits", bits, 2, 8)
  grids = grid.single_grids((bits,), signed=signed)
  x, scale = jnp.asarray(x), jnp.asarray(scale)
  pairs = zip(scale.shape, x.shape, strict=False)
  if scale.ndim not in (0, x.ndim) or any(s not in (1, n) for s, n in pairs):
    raise ValueError(
      f"scale must have shape () or, axis by axis, 1 or the size of x, "
      f"{x.shape}, got {scale.shape}"
    )
  return round_straight_through(x, scale, grids, 0)


def scale_per_bit_width(
  bits: tuple[int, ...],
  scale_of: Callable[[Float[Array, "..."], int], Float[Array, "..."]],
) -> WeightQuantizer:
  """Builds a quantizer that rounds float weights with a scale per bit-width.

  Args:
    bits: candidate bit-widths, checked.
    scale_of: `scale_of(w, b)`, initial scale of a weight at b bits.
  """
  grids = grid.single_grids(bits, signed=True)
  stored_bits = bits[0] if len(bits) == 1 else 32

  def init(w):
    return {"scale": jnp.stack([scale_of(w, b) for b in bits])}

  def fake_quantize(params, w, index):
    return round_straight_through(w, params["scale"][index], grids, index)

  def encode(params, w):
    w, scale = grid.working_floats(w, params["scale"])
    if len(bits) > 1:
      return {"weight": w, "scale": scale}
    codes = grid.first_codes(w, scale[0], *grid.code_range(bits[0]))
    return {"codes": codes.astype(jnp.int8), "scale": scale}

  def levels(encoded, index):
    scale = encoded["scale"][index]
    if "codes" in encoded:
      return encoded["codes"].astype(scale.dtype), scale
    target = grid.select(grids, index)
    w = encoded["weight"]
    return grid.first_codes(w, scale, target.low, target.high), scale

  def decode(encoded, index):
    codes, scale = levels(encoded, index)
    return codes * scale

  def integers(encoded, index):
    codes, scale = levels(encoded, index)
    return Integers(codes.astype(jnp.int8), scale)

  return WeightQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=stored_bits,
    storage=storage(bits, stored_bits, ranges={"scale": grid.SCALE_RANGE}),
    from_range=_covering(grids),
    integers=integers,
  )


def _covering(grids):
  """`from_range` of a scale per bit-width."""

  def from_range(low, high):
    scales = [grid.covering_scale(low, high, g.low, g.high) for g in grids]
    return {"scale": jnp.stack(scales)}

  return from_range


def initial_scale(
  w: Float[Array, "..."], high: grid.Number, *, per_channel: bool
) -> Float[Array, "..."]:
  """LSQ's first scale of a weight, 2 mean|w| / sqrt(high).

  Args:
    w: weight [..., c_out].
    high: the largest code, Q_P.
    per_channel: reduce over all axes but the last, else over all.

  Returns:
    float32, rank of w: [1, ..., 1, c_out], or all ones.

  >>> initial_scale(jnp.array([[1.0], [-3.0]]), 4, per_channel=True).tolist()
  [[2.0]]
  """
  axes = exact_mean.channel_axes(w.ndim, per_channel=per_channel)
  size = 2 * jnp.abs(grid.widened(w)).mean(axes, keepdims=True)
  return _scale(size, high)


def _scale(size, high):
  return grid.positive(size / math.sqrt(high)).astype(jnp.float32)

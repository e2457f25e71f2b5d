"""Truncation-ready codes: a lower bit-width is the top bits of the highest.

TruncQuant rounds down twice, so that dropping bits is all that ever happens:

  q_h = clip(floor(w / s), -2^(h-1), 2^(h-1) - 1)
  q_l = q_h >> D = clip(floor(w / (s 2^D)), -2^(l-1), 2^(l-1) - 1),   D = h - l
  w_hat = (q_l + 1/2) * s * 2^D

MatQuant slices unsigned codes between the smallest and the largest weight:

  s = (max - min) / (2^h - 1),   z = round(-min / s)
  q_h = clip(round(w / s) + z, 0, 2^h - 1)
  q_l = min([q_h / 2^D], 2^l - 1) * 2^D,   [.] to the nearest, halves to even
  w_hat = (q_l - z) * s

arXiv 2506.11431 (TruncQuant); arXiv 2502.06786, ICML 2025 (MatQuant). What the
docstring of `truncation` calls chosen is our reading: no parity is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.quant.core import checks, exact_mean, grid
from dr_jax.quant.core.interface import WeightQuantizer
from dr_jax.quant.core.packing import packed_size, storage
from dr_jax.quant.core.straight_through import straight_through
from dr_jax.quant.methods.double_rounding import (
  nested,
  shift_codes,
  three_sigma_scale,
)
from dr_jax.quant.registry import Recipe, method

SCHEMES = ("truncquant", "matquant")

# MatQuant's scale has a reciprocal that is neither denormal nor infinite, and
# a zero point that float32 holds exactly.
_SCALE_MIN, _SCALE_MAX = 2.0**-100, 2.0**125
_ZERO_POINT_MAX = 2.0**24
_LARGEST = float(np.finfo(np.float32).max)


@method(
  truncquant=Recipe("truncation", weight_options={"scheme": "truncquant"}),
  matquant=Recipe(
    "truncation",
    weight_options={"scheme": "matquant"},
    schedule="accumulate",
    lowest_loss_weight=1.0,
  ),
)
def truncation(
  bits: Sequence[int] = (8, 6, 4, 2),
  *,
  scheme: str = "truncquant",
  signed: bool | None = None,
  per_channel: bool = True,
  extra_precision: bool = False,
) -> WeightQuantizer:
  """Builds a weight quantizer whose lower bit-widths are its top bits.

  Shared between bit-widths: everything. Stored: codes of bits[0] bits, and per
  channel a float32 scale, to which MatQuant adds an int32 zero point. Choose
  it as "truncquant" where a device can only drop bits, as "matquant" where
  nothing about a quantizer is to be learned, as for models fine-tuned briefly.

  "truncquant": signed codes, equations above. Params: {"scale": float32
  [1, ..., 1, c_out]}, or all ones per tensor. Chosen here: the midpoint of a
  code's bin (with floors alone, weights would lose half a level on average,
  more at fewer bits), so that no code stands for zero; one learned scale with
  LSQ's gradient, which passes where -2^(h-1) <= w/s <= 2^(h-1); it starts at
  max(|mean - 3 std|, |mean + 3 std|) / 2^(h-1), as Double Rounding's.

  "matquant": unsigned codes, equations above. Params: {}. Chosen here: the zero
  point is an integer, so that a zero weight stays zero at bits[0]; min and max
  are detached, and the gradient passes straight through for every weight,
  clamped slices included.

  Args:
    bits: candidate bit-widths in 2..8, highest first.
    scheme: "truncquant" or "matquant".
    signed: None, or what the scheme has: True for "truncquant", False for
      "matquant".
    per_channel: a scale per entry of the last axis, else one per tensor.
    extra_precision: "matquant" without the clamp of the slice: 2^l + 1 levels
      at l < h bits. A copy for l bits then costs l + 1 bits a weight. (To
      store the rare top level apart may cost less; this does not.)

  Raises:
    ValueError: for bits outside 2..8 or not descending, an unknown scheme, a
      sign or extra precision that the scheme does not have, or, outside jit,
      NaN or infinite weights.

  References:
    arXiv 2506.11431; arXiv 2502.06786, section 3.

  >>> quantizer = truncation((4, 2))
  >>> params = {"scale": jnp.ones((1, 1))}
  >>> w = jnp.array([[-9.0], [0.0], [3.0]])
  >>> quantizer.fake_quantize(params, w, 1)[:, 0].tolist()
  [-6.0, 2.0, 2.0]
  """
  bits = checks.check_bits(bits, method="truncation")
  checks.one_of("scheme", scheme, SCHEMES)
  has_sign = scheme == "truncquant"
  if signed not in (None, has_sign):
    raise ValueError(
      f"signed must be None or {has_sign} for {scheme}, got {signed}"
    )
  if extra_precision and scheme == "truncquant":
    raise ValueError(
      "extra_precision must be False for truncquant, which has no clamp to "
      "leave out; matquant has one"
    )
  if scheme == "truncquant":
    return _truncquant(bits, per_channel)
  return _matquant(bits, per_channel, extra_precision)


def _truncquant(bits, per_channel):
  # The value of every code stays inside [low, high + 1] levels.
  grids = tuple(
    g._replace(top=g.high + 1) for g in grid.nested_grids(bits, "floor")
  )

  def scale_of(w):
    return three_sigma_scale(w, bits[0], per_channel=per_channel)

  return nested(bits, grids, "floor", scale_of, first="floor", center=0.5)


def _matquant(bits, per_channel, extra_precision):
  shifts = [bits[0] - b for b in bits]
  tops = [2**b - 1 for b in bits]
  if extra_precision:
    tops[1:] = [2**b for b in bits[1:]]

  def values(codes, scale, zero_point, index):
    shift = jnp.asarray(shifts, jnp.int32)[index]
    sliced = shift_codes(codes, shift, "half_even")
    sliced = jnp.minimum(sliced, jnp.asarray(tops, jnp.int32)[index])
    levels = (sliced << shift) - zero_point
    # A level beyond the largest weight may be beyond the largest float.
    return jnp.clip(levels.astype(scale.dtype) * scale, -_LARGEST, _LARGEST)

  def init(w):
    return {}

  def fake_quantize(params, w, index):
    w = jnp.asarray(w)
    fixed = jax.lax.stop_gradient(w)
    w_hat = values(*_min_max_codes(fixed, bits[0], per_channel), index)
    return straight_through(w, w_hat.astype(w.dtype))

  def encode(params, w):
    codes, scale, zero_point = _min_max_codes(w, bits[0], per_channel)
    codes = codes.astype(jnp.uint8)
    return {"codes": codes, "scale": scale, "zero_point": zero_point}

  def decode(encoded, index):
    scale, zero_point = encoded["scale"], encoded["zero_point"]
    return values(encoded["codes"], scale, zero_point, index)

  def size(encoded, index):
    codes = encoded["codes"].size
    others = encoded["scale"].nbytes + encoded["zero_point"].nbytes
    return packed_size(codes, tops[index].bit_length()) + others

  return WeightQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=bits[0],
    storage=storage(
      bits,
      bits[0],
      signed=False,
      ranges={
        "scale": (_SCALE_MIN, _SCALE_MAX),
        "zero_point": (-2 * _ZERO_POINT_MAX, 2 * _ZERO_POINT_MAX),
      },
    )._replace(size=size),
  )


def _min_max_codes(w, bits, per_channel):
  """Unsigned int32 codes, float32 scale, int32 zero point."""
  w = jnp.asarray(w).astype(jnp.float32)
  axes = exact_mean.channel_axes(w.ndim, per_channel=per_channel)
  smallest = w.min(axes, keepdims=True)
  largest = w.max(axes, keepdims=True)
  top = 2**bits - 1
  # Halves: their difference does not overflow. Both products are exact.
  scale = (largest * 0.5 - smallest * 0.5) * (2 / top)
  bound = jnp.maximum(jnp.abs(smallest), jnp.abs(largest)) / _ZERO_POINT_MAX
  scale = jnp.clip(jnp.maximum(scale, bound), _SCALE_MIN, _SCALE_MAX)
  inverse = 1 / scale
  zero_point = jnp.round(-smallest * inverse).astype(jnp.int32)
  codes = jnp.round(w * inverse).astype(jnp.int32) + zero_point
  return jnp.clip(codes, 0, top), scale, zero_point

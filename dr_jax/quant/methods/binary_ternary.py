"""One and two bits: binary and ternary weights, each with a computed scale.

  binary    w_hat = sign(w) s,           s = mean|w|,   sign(0) = +1
  ternary   w_hat = sign(w) [|w| > t] s, t = 0.7 mean|w|,
                                         s = mean of |w| over |w| > t

Rastegari et al., "XNOR-Net", arXiv 1603.05279, section 3.1; Li et al.,
"Ternary Weight Networks", arXiv 1605.04711, section 2.

Neither has candidates to switch between: they are the extremes against which
multi-precision methods are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dr_jax.quant.core import checks, exact_mean, grid
from dr_jax.quant.core.interface import (
  Encoded,
  Integers,
  Params,
  WeightQuantizer,
)
from dr_jax.quant.core.packing import storage
from dr_jax.quant.core.rows import fewer_rows
from dr_jax.quant.core.straight_through import straight_through
from dr_jax.quant.registry import Recipe, method

_BINARY, _TERNARY = (1,), (2,)  # the only bit-widths


@method(binary=Recipe("binary", "none", bits=_BINARY))
def binary(
  bits: Sequence[int] = _BINARY, *, per_channel: bool = True
) -> WeightQuantizer:
  """Builds the XNOR-Net weight quantizer: sign(w) mean|w|.

  Shared between bit-widths: nothing, there is one. Stored: a bit per weight (1
  for w >= 0) and float32 scales. Choose it for the smallest file and for
  arithmetic on bits, at a cost in accuracy.

  Params: {}. The scale is mean|w| per channel [1, ..., 1, c_out] (the paper's)
  or per tensor. The gradient is straight-through: that of w_hat, unchanged, the
  scale counting as a constant. The paper's own rule masks it where |w| > 1 and
  adds 1/n for the scale; here weights are not confined to [-1, 1], and one
  outside would never move again. No parity is claimed.

  Args:
    bits: (1,), the only candidate.
    per_channel: one scale per entry of the last axis, else one per tensor.

  Raises:
    ValueError: for other bits, or, outside jit, NaN or infinite weights.

  References:
    arXiv 1603.05279, section 3.1.

  >>> w = jnp.array([[-3.0], [1.0]])
  >>> binary().fake_quantize({}, w, 0)[:, 0].tolist()
  [-2.0, 2.0]
  """
  _check_only(bits, _BINARY, "binary")

  def encode(params, w):
    del params
    w = jnp.asarray(w).astype(jnp.float32)
    axes = exact_mean.channel_axes(w.ndim, per_channel=per_channel)
    return {
      "codes": (w >= 0).astype(jnp.uint8),
      "scale": exact_mean.mean(jnp.abs(w), axes),
    }

  def decode(encoded, index):
    scale = encoded["scale"]
    return jnp.where(encoded["codes"] == 1, scale, -scale)

  def integers(encoded, index):
    codes = encoded["codes"].astype(jnp.int8)
    return Integers(2 * codes - 1, encoded["scale"])

  return _fixed(_BINARY, encode, decode, integers, signed=False)


@method(ternary=Recipe("ternary", bits=_TERNARY))
def ternary(
  bits: Sequence[int] = _TERNARY, *, per_channel: bool = True
) -> WeightQuantizer:
  """Builds the TWN weight quantizer: -s, 0 or s.

  Shared between bit-widths: nothing, there is one. Stored: codes -1, 0 and 1 in
  two bits, and float32 scales. Choose it where additions replace products and
  zeros can be skipped.

  Params: {}. Threshold and scale are computed per channel [1, ..., 1, c_out]
  or per tensor. The gradient is straight-through: that of w_hat, unchanged,
  also for weights whose code is 0; threshold and scale count as constants. No
  parity is claimed.

  Args:
    bits: (2,), the only candidate.
    per_channel: one scale per entry of the last axis, else one per tensor.

  Raises:
    ValueError: for other bits, or, outside jit, NaN or infinite weights.

  References:
    arXiv 1605.04711, section 2.

  >>> w = jnp.array([[-3.0], [1.0], [3.0]])
  >>> ternary().fake_quantize({}, w, 0)[:, 0].tolist()
  [-3.0, 0.0, 3.0]
  """
  _check_only(bits, _TERNARY, "ternary")

  def encode(params, w):
    del params
    w = jnp.asarray(w).astype(jnp.float32)
    axes = exact_mean.channel_axes(w.ndim, per_channel=per_channel)
    sizes = jnp.abs(w)
    above = sizes > 0.7 * exact_mean.mean(sizes, axes)
    codes = jnp.where(above, jnp.sign(w), 0)
    return {
      "codes": codes.astype(jnp.int8),
      "scale": _mean_where(above, sizes, axes),
    }

  def decode(encoded, index):
    scale = encoded["scale"]
    return encoded["codes"].astype(scale.dtype) * scale

  def integers(encoded, index):
    return Integers(encoded["codes"], encoded["scale"])

  return _fixed(_TERNARY, encode, decode, integers, signed=True)


def _check_only(
  bits: Sequence[int], only: tuple[int, ...], method: str
) -> None:
  checks.check_bits(bits, lowest=only[0], highest=only[0], method=method)


def _fixed(
  bits: tuple[int, ...],
  encode: Callable[[Params, jax.Array], Encoded],
  decode: Callable[[Encoded, checks.Index], jax.Array],
  integers: Callable[[Encoded, checks.Index], Integers],
  *,
  signed: bool,
) -> WeightQuantizer:
  """Builds a quantizer that learns nothing, straight-through."""

  def init(w):
    return {}

  def fake_quantize(params, w, index):
    w = jnp.asarray(w)
    w_hat = decode(encode(params, jax.lax.stop_gradient(w)), index)
    return straight_through(w, w_hat.astype(w.dtype))

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
      signed=signed,
      ranges={"codes": (-1, 1), "scale": grid.NOT_NEGATIVE},
    ),
    integers=integers,
  )


def _mean_where(chosen, x, axes):
  """Mean of the chosen x >= 0, exact in any order; 0 where none is chosen."""
  total = math.prod(x.shape[axis] for axis in axes)
  count = fewer_rows(chosen.astype(jnp.int32), axes)
  count = count.sum(axes, keepdims=True).astype(jnp.float32)
  share = total * (1 / jnp.maximum(count, 1))
  mean = exact_mean.mean(jnp.where(chosen, x, 0), axes) * share
  largest = fewer_rows(x, axes, jnp.max).max(axes, keepdims=True)
  return jnp.minimum(mean, largest)

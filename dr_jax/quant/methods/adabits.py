"""AdaBits: grids without learned scales, nested bit by bit.

  r = tanh(w) / max|tanh(w)|,   u = (r + 1) / 2,   w_q = 2 q_b(u) - 1

  modified   q_b(u) = min(floor(2^b u), 2^b - 1) / 2^b
  centered   q_b(u) = (min(floor(2^b u), 2^b - 1) + 1/2) / 2^b
  original   q_b(u) = round((2^b - 1) u) / (2^b - 1)

Modified and centered codes of a lower bit-width are the top bits of those of
the highest, which are all that is stored. Activations are clipped at a learned
level (PACT). Jin, Yang and Liao, "AdaBits", CVPR 2020, arXiv 1912.09666; Choi
et al., "PACT", arXiv 1805.06085.
"""

from __future__ import annotations

import functools
import math
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
from dr_jax.quant.core.straight_through import gradients, straight_through
from dr_jax.quant.core.tanh_normalize import normalized
from dr_jax.quant.methods.double_rounding import shift_codes, top_planes
from dr_jax.quant.registry import Recipe, method

SCHEMES = ("modified", "centered", "original")
RESCALES = (False, True, "stddev")


class _Level(NamedTuple):
  """One bit-width: q_b(u) = (min([factor u], top) + center) * width."""

  factor: grid.Number
  top: grid.Number
  center: grid.Number
  width: grid.Number


@method(
  **{
    name: Recipe(
      "adabits",
      "pact_activation",
      weight_options={"scheme": scheme, "rescale": True},
      schedule="accumulate",
    )
    for name, scheme in (
      ("adabits", "modified"),
      ("adabits_centered", "centered"),
      ("adabits_original", "original"),
    )
  }
)
def adabits(
  bits: Sequence[int] = (8, 6, 4, 2),
  *,
  scheme: str = "modified",
  rescale: bool | str = False,
) -> WeightQuantizer:
  """Builds the AdaBits weight quantizer.

  Equations as above, with one maximum per tensor. In the modified scheme codes
  are q = clip(floor(2^(b-1) r), -2^(b-1), 2^(b-1) - 1) and stand for q /
  2^(b-1), in the centered one for (q + 1/2) / 2^(b-1). With `rescale`, w_hat =
  eta w_q (scale-adjusted training), else w_hat = w_q:

    True       eta = 1 / (sqrt(n) std(w_q)), n = c_out * window
    "stddev"   eta = std(w) / std(w_q)

  Standard deviations are unbiased and, as eta, detached. Gradients pass
  straight through q_b, and through tanh and its maximum as they are (see
  `tanh_normalize`), times eta.

  Shared between bit-widths: the weights and, but for "original", the codes.
  Stored: codes of bits[0] bits, for "original" r in float32; float32 eta [B]
  with `rescale`. Choose it to learn nothing but the weights themselves, with a
  normalization after each layer.

  Params: {}.

  Chosen here: weights that share the maximum share its gradient; eta is 1 where
  all codes are equal; floor(2^(b-1) r), which distinguishes -1e-9 from 0, as
  float32 u cannot.

  Args:
    bits: candidate bit-widths in 1..8, highest first.
    scheme: "modified", "centered" or "original" (DoReFa-Net's). One bit has
      the values -1 and 0 if "modified", -1/2 and 1/2 if "centered", -1 and 1
      if "original".
    rescale: False, True or "stddev".

  Raises:
    ValueError: for bits outside 1..8 or not descending, an unknown scheme or
      rescale, or, outside jit, NaN or infinite weights.

  References:
    arXiv 1912.09666; arXiv 1912.10207 (scale-adjusted training).

  >>> quantizer = adabits((8, 1))
  >>> w = jnp.array([[-9.0], [-0.1], [0.1], [9.0]])
  >>> quantizer.fake_quantize({}, w, 1)[:, 0].tolist()
  [-1.0, -1.0, 0.0, 0.0]
  >>> quantizer.encode({}, w)["codes"][:, 0].tolist()
  [-128, -13, 12, 127]
  """
  bits = checks.check_bits(bits, lowest=1, method="adabits")
  checks.one_of("scheme", scheme, SCHEMES)
  checks.one_of("rescale", rescale, RESCALES)
  main = "weight" if scheme == "original" else "codes"
  stored_bits = 32 if scheme == "original" else bits[0]
  levels = tuple(_level(b, scheme) for b in bits)

  def kept(r):
    if scheme == "original":
      return r
    low, high = grid.code_range(bits[0])
    codes = jnp.clip(jnp.floor(r * 2.0 ** (bits[0] - 1)), low, high)
    return codes.astype(jnp.int8)

  def values(array, index):
    level = grid.select(levels, index)
    if scheme == "original":
      return _value(level, _codes(level, scheme, array * 0.5 + 0.5), True)
    shifts = [bits[0] - b for b in bits]
    codes = shift_codes(array, jnp.asarray(shifts, jnp.int32)[index], "floor")
    return (codes.astype(jnp.float32) + level.center) * (2 * level.width)

  def init(w):
    return {}

  def fake_quantize(params, w, index):
    del params
    w = jnp.asarray(w)
    r = normalized(w)
    fixed = jax.lax.stop_gradient(r)
    w_q = values(kept(fixed), index)
    w_hat = straight_through(r, w_q)
    if rescale:
      w_hat = w_hat * _gain(jax.lax.stop_gradient(w), w_q, rescale)
    return w_hat.astype(w.dtype)

  def encode(params, w):
    del params
    w = jnp.asarray(w)
    array = kept(normalized(w))
    if not rescale:
      return {main: array}
    w_q = jnp.stack([values(array, i) for i in range(len(bits))])
    return {main: array, "gain": _gain(w, w_q, rescale)}

  def decode(encoded, index):
    w_q = values(encoded[main], index)
    return w_q * encoded["gain"][index] if rescale else w_q

  dtype = _integer_dtype(levels[0], scheme, True)

  def integers(encoded, index):
    level, array = grid.select(levels, index), encoded[main]
    if scheme == "original":
      codes = _codes(level, scheme, array * 0.5 + 0.5)
    else:
      shift = grid.entry([bits[0] - b for b in bits], index)
      codes = shift_codes(array, shift, "floor").astype(jnp.float32)
      codes = codes + level.factor / 2
    codes, unit = _integers(level, codes, scheme, True)
    gain = encoded["gain"][index] if rescale else jnp.float32(1)
    return Integers(codes.astype(dtype), gain * unit)

  return WeightQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=stored_bits,
    storage=storage(
      bits,
      stored_bits,
      ranges={"gain": grid.POSITIVE, "weight": (-1, 1)},
      planes=() if scheme == "original" else top_planes(bits, "floor"),
    ),
    integers=integers,
  )


@method()
def pact_activation(
  bits: Sequence[int] = (8, 6, 4, 2),
  *,
  scheme: str = "original",
  initial: float | None = 8.0,
  signed: bool | None = None,
) -> ActivationQuantizer:
  """Builds the PACT activation quantizer with the calibrated gradient.

  With a = |clip_b|, one clip level per bit-width:

    unsigned   q = q_b(clip(x, 0, a) / a),              x_hat = a q
    signed     q = 2 q_b(clip(x, -a, a) / (2a) + 1/2) - 1,   x_hat = a q

    d x_hat / d x = 1 where 0 <= x <= a (signed: -a <= x <= a), else 0
    d x_hat / d clip_b = sign(clip_b) (q - x/a inside, q outside)

  Choose it together with `adabits`, or to learn the range of inputs.

  Params: {"clip": float32 [B]}; starts at `initial`. It may take any value: a
  is read within [SCALE_MIN, SCALE_MAX], and the gradient passes that clamp.

  Chosen here: the ends of the range pass the gradient; sign(0) = 1.

  Args:
    bits: candidate bit-widths in 1..8, highest first.
    scheme: of q_b, "original", "modified" or "centered".
    initial: first clip level. Published are 8 for convolutions and 10 for
      dense layers; None for the largest |x| of the calibration batch (ours).
    signed: range [-a, a], or [0, a] (after a ReLU). None leaves it to
      calibration: signed where a calibration input is negative.

  Raises:
    ValueError: for bits outside 1..8 or not descending, an unknown scheme, an
      initial level that is not positive, and when used while the sign is
      undecided.

  References:
    arXiv 1805.06085, eq. 1 to 3; arXiv 1912.09666 (a clip level per
    bit-width); arXiv 1912.10207 (calibrated gradient).

  >>> quantizer = pact_activation((8, 2), initial=3.0, signed=False)
  >>> x = jnp.array([-1.0, 1.2, 9.0])
  >>> quantizer.fake_quantize(quantizer.init(x), x, 1).tolist()
  [0.0, 1.0, 3.0]
  """
  bits = checks.check_bits(bits, lowest=1, method="pact_activation")
  checks.one_of("scheme", scheme, SCHEMES)
  initial = _check_initial(initial)
  levels = tuple(_level(b, scheme) for b in bits)

  def init(x):
    first = initial
    if first is None:
      first = grid.positive(jnp.abs(grid.widened(x)).max()).astype(jnp.float32)
    return {"clip": jnp.full((len(bits),), first, jnp.float32)}

  def from_range(low, high):
    reach = jnp.maximum(jnp.abs(low), jnp.abs(high)) if signed else high
    clip = grid.positive(reach).astype(jnp.float32)
    return {"clip": jnp.stack([clip] * len(bits))}

  def fake_quantize(params, x, index):
    core = (scheme, signed)
    level = grid.select(levels, index)
    return _clipped(core, jnp.asarray(x), params["clip"][index], level)

  dtype = _integer_dtype(levels[0], scheme, bool(signed))

  def integers(params, x, index):
    level = grid.select(levels, index)
    clip = params["clip"][index]
    _, size, _, u = _position((scheme, signed), jnp.asarray(x), clip)
    codes = _codes(level, scheme, u)
    codes, unit = _integers(level, codes, scheme, signed)
    return Integers(codes.astype(dtype), size * unit)

  return ActivationQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    signed=signed,
    options=(("initial", initial),),
    from_range=from_range,
    integers=integers,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _clipped(core, x, clip, level):
  _, size, _, q = _quantize(core, x, clip, level)
  return (q * size).astype(x.dtype)


def _forward(core, x, clip, level):
  # The inputs are alive anyway; codes are cheaper to recompute than to keep.
  return _clipped(core, x, clip, level), (x, clip, level)


def _backward(core, residuals, g):
  x, clip, level = residuals
  x32, size, inverse, q = _quantize(core, x, clip, level)
  _, signed = core
  inside = (x32 >= (-size if signed else 0)) & (x32 <= size)
  slope = q - jnp.where(inside, x32 * inverse, 0)
  slope = jnp.where(clip < 0, -slope, slope)

  def passed(x):
    return jnp.where(inside, x, 0)

  return *gradients(x, passed, [(clip, slope)], g, slope.dtype), None


_clipped.defvjp(_forward, _backward)


def _quantize(core, x, clip, level):
  """Returns x, a, 1 / a and q in units of a, all in float32."""
  scheme, signed = core
  x, size, inverse, u = _position(core, x, clip)
  return x, size, inverse, _value(level, _codes(level, scheme, u), signed)


def _position(core, x, clip):
  """Returns x, a, 1 / a and u, the argument of q_b, all in float32."""
  _, signed = core
  x = x.astype(jnp.float32)
  size = grid.positive(jnp.abs(clip.astype(jnp.float32)))
  inverse = 1 / size
  u = jnp.clip(x * inverse, -1 if signed else 0, 1)
  if signed:
    u = u * 0.5 + 0.5
  return x, size, inverse, u


def _level(bits, scheme):
  if scheme == "original":
    top = 2.0**bits - 1
    return _Level(top, top, 0.0, 1 / top)
  center = 0.5 if scheme == "centered" else 0.0
  return _Level(2.0**bits, 2.0**bits - 1, center, 2.0**-bits)


def _codes(level, scheme, u):
  if scheme == "original":
    return jnp.round(u * level.factor)
  return jnp.minimum(jnp.floor(u * level.factor), level.top)


def _value(level, codes, signed):
  """q_b, or 2 q_b - 1 if signed; one product, the rest exact."""
  if signed:
    value = (2 * codes + (2 * level.center - level.factor)) * level.width
  else:
    value = (codes + level.center) * level.width
  # The bounds prevent XLA from contracting the product and what is subtracted
  # next into an FMA.
  return jnp.clip(value, -1, 1)


def _integers(level, codes, scheme, signed):
  """The value of codes as the smallest integers, and what one stands for."""
  if signed:
    numerator = 2 * codes + (2 * level.center - level.factor)
    if scheme == "modified":
      return numerator / 2, 2 * level.width
    return numerator, level.width
  if scheme == "centered":
    return 2 * codes + 1, level.width / 2
  return codes, level.width


def _integer_dtype(highest, scheme, signed):
  ends = (_integers(highest, c, scheme, signed)[0] for c in (0, highest.top))
  return integer_dtype(*ends)


def _gain(w, w_q, rescale):
  """eta of scale-adjusted training in float32, one for each w_q [..., *w]."""
  leading = w_q.shape[: w_q.ndim - w.ndim]
  axes = tuple(range(len(leading), w_q.ndim))
  # The clamps prevent XLA from merging square roots and quotients.
  spread = grid.positive(exact_mean.mean_and_std(w_q, axes)[1])
  if rescale == "stddev":
    w = jnp.expand_dims(w, tuple(range(len(leading))))
    target = grid.positive(exact_mean.mean_and_std(w, axes)[1])
  else:
    target = 1 / math.sqrt(math.prod(w.shape[:-2]) * w.shape[-1])
  constant = w_q.max(axes, keepdims=True) == w_q.min(axes, keepdims=True)
  return jnp.where(constant, 1, target * (1 / spread)).reshape(leading)


def _check_initial(initial):
  if initial is None:
    return None
  number = isinstance(initial, int | float) and not isinstance(initial, bool)
  if not number or not grid.SCALE_MIN <= initial <= grid.SCALE_MAX:
    raise ValueError(
      f"initial must be None or a number from 2^-30 to 2^30, got {initial!r}"
    )
  return float(initial)

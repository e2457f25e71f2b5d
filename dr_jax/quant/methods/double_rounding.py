"""Double Rounding: one integer model at h bits, every lower one derived.

  q_h = clip(round(w / s), -2^(h-1), 2^(h-1) - 1)
  q_l = clip(round(q_h / 2^D), -2^(l-1), 2^(l-1) - 1),   D = h - l
  w_hat = q_l * s * 2^D

One scale s > 0 is shared by all bit-widths, so that the h-bit codes and s are
all that is stored. arXiv 2502.01199, eq. 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from dr_jax.quant.core import checks, exact_mean, grid
from dr_jax.quant.core.interface import Integers, WeightQuantizer
from dr_jax.quant.core.packing import integer_dtype, storage
from dr_jax.quant.core.straight_through import round_straight_through
from dr_jax.quant.registry import Recipe, method

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int


@method(
  double_rounding=Recipe("double_rounding", alrs="eta"),
  double_rounding_unshared=Recipe(
    "double_rounding", weight_options={"shared": False}, alrs="eta"
  ),
)
def double_rounding(
  bits: Sequence[int] = (8, 6, 4, 2),
  *,
  rounding: str = "half_even",
  per_channel: bool = True,
  shared: bool = True,
) -> WeightQuantizer:
  """Builds the Double Rounding weight quantizer.

  Shared between bit-widths: the weights, the codes and the scale. Stored:
  codes of bits[0] bits and float32 scales. Choose it when one integer file
  must serve every bit-width with nearly the accuracy of separate training.

  Params: {"scale": float32 [1, ..., 1, c_out]}, or all ones per tensor; starts
  at max(|mean - 3 std|, |mean + 3 std|) / 2^(h-1).

  With `shared=False` only the weights are shared: b bits take the same two
  roundings with their own scale s_b. Codes of different scales do not nest, so
  that float32 weights are stored. Choose that to measure what sharing the scale
  costs. Params then: {"scale": float32 [B, 1, ..., 1, c_out]}, all in units of
  the highest bit-width and with the same initial value.

  Args:
    bits: candidate bit-widths in 2..8, highest first.
    rounding: rule of the second rounding. "half_even" (the paper's round),
      "half_up" ((q + 2^(D-1)) >> D, needs only the top l+1 bit-planes) or
      "floor" (q >> D, the top l bit-planes).
    per_channel: one scale per entry of the last axis, else one per tensor.
    shared: one scale for all bit-widths (the paper's method), else one for
      each (its "Ours*").

  Raises:
    ValueError: for bits outside 2..8 or not descending, an unknown rounding,
      or, outside jit, NaN or infinite weights.

  References:
    arXiv 2502.01199, section 3.1.

  >>> quantizer = double_rounding((8, 4))
  >>> params = {"scale": jnp.ones((1, 1))}
  >>> encoded = quantizer.encode(params, jnp.array([[100.0], [-9.0], [8.0]]))
  >>> encoded["codes"][:, 0].tolist()
  [100, -9, 8]
  >>> quantizer.decode(encoded, 1)[:, 0].tolist()  # 6, -1 and 0 times 2^4
  [96.0, -16.0, 0.0]
  """
  bits = checks.check_bits(bits)
  checks.check_rounding(rounding)

  def scale_of(w):
    return three_sigma_scale(w, bits[0], per_channel=per_channel)

  build = nested if shared else _unshared
  return build(bits, grid.nested_grids(bits, rounding), rounding, scale_of)


def nested(
  bits: tuple[int, ...],
  grids: tuple[grid.Grid, ...],
  rounding: str,
  scale_of: Callable[[Float[Array, "..."]], Float[Array, "..."]],
  *,
  first: str = "half_even",
  center: float = 0.0,
) -> WeightQuantizer:
  """Builds a quantizer whose lower codes derive from the highest ones.

  Args:
    bits: candidate bit-widths, checked.
    grids: one per bit-width, from `grid.nested_grids`.
    rounding: rule of the second rounding.
    scale_of: initial scale of a weight, float32, broadcastable to it.
    first: rule of the first rounding.
    center: added to a code when it becomes a weight, at every bit-width.
  """
  low, high = int(grids[0].first_low), int(grids[0].first_high)

  def init(w):
    return {"scale": scale_of(w)}

  def from_range(lowest, highest):
    # The value of a code is in the middle of its bin if there is a center.
    ends = low, high + 2 * center
    return {"scale": grid.covering_scale(lowest, highest, *ends)}

  def fake_quantize(params, w, index):
    return round_straight_through(
      w,
      params["scale"],
      grids,
      index,
      rounding=rounding,
      double=True,
      first=first,
      center=center,
    )

  def encode(params, w):
    w, scale = grid.working_floats(w, params["scale"])
    codes = grid.first_codes(w, scale, low, high, first)
    return {"codes": codes.astype(jnp.int8), "scale": scale}

  def levels(encoded, index):
    shift = grid.entry([bits[0] - b for b in bits], index)
    codes = shift_codes(encoded["codes"], shift, rounding)
    target = grid.select(grids, index)
    scale = encoded["scale"]
    codes = jnp.clip(codes.astype(scale.dtype), target.low, target.high)
    if center:
      codes = codes + center
    return codes, scale * target.step

  def decode(encoded, index):
    codes, unit = levels(encoded, index)
    return codes * unit

  # A center of 1/2 makes the integers odd, in units of half a level.
  parts = 2 if center else 1
  dtype = integer_dtype(parts * low, parts * (high + center))

  def integers(encoded, index):
    codes, unit = levels(encoded, index)
    return Integers((parts * codes).astype(dtype), unit / parts)

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
      ranges={"codes": (low, high), "scale": grid.SCALE_RANGE},
      planes=top_planes(bits, rounding),
    ),
    from_range=from_range,
    integers=integers,
  )


def switch_codes(
  codes: Int[Array, "..."],
  from_bits: int,
  to_bits: int,
  *,
  rounding: str = "half_even",
) -> Int[Array, "..."]:
  """Derives lower-bit codes from higher-bit ones (the second rounding).

  Args:
    codes: integers in [-2^(from_bits-1), 2^(from_bits-1) - 1], any shape.
    from_bits: bit-width of `codes`, 2..8.
    to_bits: target bit-width, 2..from_bits.
    rounding: what happens to exact halves: "half_even", "half_up" or "floor".

  Returns:
    int8 codes in [-2^(to_bits-1), 2^(to_bits-1) - 1], same shape.

  Raises:
    ValueError: if to_bits > from_bits, either is outside 2..8, the rounding is
      unknown, or codes are not integers.

  References:
    arXiv 2502.01199, eq. 2.

  >>> switch_codes(jnp.array([100, 8, -8], jnp.int8), 8, 4).tolist()
  [6, 0, 0]
  >>> switch_codes(jnp.array([8]), 8, 4, rounding="half_up").tolist()
  [1]
  """
  checks.check_rounding(rounding)
  from_bits = checks.check_integer("from_bits", from_bits, 2, 8)
  to_bits = checks.check_integer("to_bits", to_bits, 2, from_bits)
  if to_bits > from_bits:
    raise ValueError(
      f"to_bits must be in 2..{from_bits}, at most from_bits, got {to_bits}"
    )
  low, high = grid.code_range(to_bits)
  codes = checks.check_integers("codes", codes)
  shifted = shift_codes(codes, from_bits - to_bits, rounding)
  return jnp.clip(shifted, low, high).astype(jnp.int8)


def three_sigma_scale(
  w: Float[Array, "..."], bits: int, *, per_channel: bool
) -> Float[Array, "..."]:
  """Scale that lets `bits`-bit codes span three standard deviations of w.

  Args:
    w: weight [..., c_out].
    bits: the highest bit-width.
    per_channel: reduce over all axes but the last, else over all.

  Returns:
    float32, rank of w: [1, ..., 1, c_out], or all ones.

  >>> three_sigma_scale(jnp.array([1.0, -1.0]), 2, per_channel=False).tolist()
  [1.5]
  """
  w = grid.widened(w)
  axes = exact_mean.channel_axes(w.ndim, per_channel=per_channel)
  mean = w.mean(axes, keepdims=True)
  std = w.std(axes, keepdims=True)
  bound = jnp.abs(mean) + 3 * std  # = max |mean -+ 3 std|, and never inf - inf
  return grid.positive(bound / 2 ** (bits - 1)).astype(jnp.float32)


def _unshared(bits, grids, rounding, scale_of):
  """Double Rounding with a scale per bit-width on shared float weights."""

  def init(w):
    return {"scale": jnp.stack([scale_of(w)] * len(bits))}

  def from_range(lowest, highest):
    ends = int(grids[0].first_low), int(grids[0].first_high)
    scale = grid.covering_scale(lowest, highest, *ends)
    return {"scale": jnp.stack([scale] * len(bits))}

  def fake_quantize(params, w, index):
    return round_straight_through(
      w, params["scale"][index], grids, index, rounding=rounding, double=True
    )

  def encode(params, w):
    w, scale = grid.working_floats(w, params["scale"])
    return {"weight": w, "scale": scale}

  def decode(encoded, index):
    return fake_quantize(encoded, encoded["weight"], index)

  def integers(encoded, index):
    w, scale = encoded["weight"], encoded["scale"][index]
    target = grid.select(grids, index)
    codes = grid.first_codes(w, scale, target.first_low, target.first_high)
    codes = grid.round_by(rounding, codes / target.step)
    codes = jnp.clip(codes, target.low, target.high)
    return Integers(codes.astype(jnp.int8), scale * target.step)

  return WeightQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=32,
    storage=storage(bits, 32, ranges={"scale": grid.SCALE_RANGE}),
    from_range=from_range,
    integers=integers,
  )


def shift_codes(
  codes: Int[Array, "..."], shift: checks.Index, rounding: str
) -> Int[Array, "..."]:
  """Rounds codes / 2^shift in int32; `shift` is an int or an int32 scalar.

  >>> shift_codes(jnp.array([5, 6, 7]), 2, "half_even").tolist()
  [1, 2, 2]
  """
  q = codes.astype(jnp.int32)
  half = (1 << shift) >> 1
  if rounding == "half_up":
    q = q + half
  elif rounding == "half_even":
    # Half, less one unless the floor is odd; nothing when shift is 0.
    q = q + jnp.maximum(half - 1 + ((q >> shift) & 1), 0)
  return q >> shift


def top_planes(bits: tuple[int, ...], rounding: str) -> tuple[int, ...]:
  """How many top bit-planes of codes each bit-width needs in `shift_codes`.

  The floor of q / 2^D is the top bits of q; half up also needs the first bit
  that is dropped, half to even all of them.

  Returns:
    One number per bit-width; none for "half_even", or where nothing can be
    left out since there is a single bit-width.

  >>> top_planes((8, 6, 4, 2), "half_up")
  (8, 7, 5, 3)
  """
  if rounding == "half_even" or len(bits) == 1:
    return ()
  extra = 1 if rounding == "half_up" else 0
  return tuple(min(b + extra, bits[0]) for b in bits)

"""Codes as few signed powers of two, and rounding to the largest of these.

  m = sum of 2^e over the bits e of `plus` - the same of `minus`
  value = (its kept terms) * unit

Three encodings of m >= 0: plain binary, HESE, and the non-adjacent form. A
budget keeps the largest terms, of one integer or of a group of them together.
Whatever a lower budget keeps, a higher one keeps too: terms nest.

Kung, McDanel, Zhang, "Term Quantization: Furthering Quantization at Run Time",
SC 2020.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dr_jax.quant.core import grid
from dr_jax.quant.core.checks import Index
from dr_jax.quant.core.interface import Encoded
from dr_jax.quant.core.straight_through import gradients

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int

# One bit of an int32 per member of a group.
LARGEST_GROUP = 32

Masks: TypeAlias = tuple[jax.Array, jax.Array]


def binary(m: Int[Array, "..."]) -> Masks:
  """Plain binary terms of m >= 0: (plus, minus), masks of their exponents.

  >>> [m.tolist() for m in binary(jnp.array(27))]
  [27, 0]
  """
  return m, jnp.zeros_like(m)


def hese(m: Int[Array, "..."]) -> Masks:
  """HESE terms of m >= 0: each run of ones s..e, e > s, is 2^(e+1) - 2^s.

  Single ones stay. Not minimal: 27 = 0b11011 takes 32 - 8 + 4 - 1.

  Returns:
    (plus, minus): masks of the exponents of positive and negative terms.

  >>> [m.tolist() for m in hese(jnp.array(27))]  # 32 + 4 - 8 - 1
  [36, 9]
  """
  first, last = m & ~(m << 1), m & ~(m >> 1)
  single = first & last
  return single | ((last ^ single) << 1), first ^ single


def naf(m: Int[Array, "..."]) -> Masks:
  """Terms of the non-adjacent form of m >= 0: nothing has fewer.

  27 = 32 - 4 - 1. The digits are those of (3m - m) / 2, bit by bit.

  Returns:
    (plus, minus): masks of the exponents of positive and negative terms.

  >>> [m.tolist() for m in naf(jnp.array(27))]  # 32 - 4 - 1
  [32, 5]
  """
  triple = 3 * m
  return (triple & ~m) >> 1, (m & ~triple) >> 1


ENCODINGS = {"binary": binary, "hese": hese, "naf": naf}


def keep_largest(
  codes: Int[Array, "..."],
  budget: int | Int[Array, ""],
  *,
  encoding: str,
  group: int,
  largest: int,
) -> Int[Array, "..."]:
  """Keeps the largest terms of each group of codes, or of each code.

  A group is `group` consecutive entries of axis -2, the last one possibly
  shorter. Of equal terms, those of lower entries are kept first.

  Args:
    codes: int32 of any shape; [..., c_in, c_out] if there are groups.
    budget: how many terms to keep; an int32 scalar if traced.
    encoding: "binary", "hese" or "naf".
    group: 1..32; 0 for a budget per code.
    largest: the largest magnitude of a code.

  Returns:
    int32, shape of codes.

  >>> codes = jnp.array([[27], [3]])
  >>> options = {"encoding": "naf", "largest": 31}
  >>> keep_largest(codes, 2, group=0, **options).tolist()
  [[28], [3]]
  >>> keep_largest(codes, 2, group=2, **options).tolist()
  [[28], [0]]
  """
  plus, minus = ENCODINGS[encoding](jnp.abs(codes))
  exponents = range(largest.bit_length(), -1, -1)  # a carry adds one
  if group:
    kept = _largest_of_groups(plus | minus, budget, group, exponents)
  else:
    kept = _largest_of_each(plus | minus, budget, exponents)
  value = (plus & kept) - (minus & kept)
  return jnp.where(codes < 0, -value, value)


class Terms(NamedTuple):
  """How values become codes and codes terms; known at trace time."""

  top: int  # codes are -top..top, or 0..top
  steps: int  # unit = scale / steps
  encoding: str  # key in ENCODINGS
  group: int  # entries of axis -2 that share a budget; 0: one per value
  signed: bool = True
  masked: bool = False  # whether clipped values lose their gradient


def round_terms(
  terms: Terms,
  x: Float[Array, "..."],
  scale: Float[Array, "..."],
  budgets: tuple[int, ...],
  index: Index,
) -> Float[Array, "..."]:
  """Rounds x to the kept terms of its codes, with gradients for x and scale.

  With unit = scale / steps, v = x / unit, m the code, q its kept terms:
    out = q * unit
    d out / d x = 1; 0 where clipped, if terms.masked
    d out / d scale = (q - v inside, m where clipped) / steps

  Args:
    terms: codes and terms.
    x: any float dtype and shape; [..., c_in, c_out] if there are groups.
    scale: a scalar, or broadcastable to x with the same rank.
    budgets: how many terms to keep, one per candidate.
    index: which of them.

  Returns:
    Shape and dtype of x.
  """
  budget = grid.entry(budgets, index)
  if isinstance(budget, int):
    return _round_terms((terms, budget), x, scale, None)
  return _round_terms((terms, None), x, scale, budget)


def encode_terms(
  terms: Terms, x: Float[Array, "..."], scale: Float[Array, "..."]
) -> Encoded:
  """Codes before truncation, int8 where they fit, and the scale in use."""
  scale = grid.positive(scale.astype(jnp.float32))
  codes = round_codes(terms, x, _unit(terms, scale))
  dtype = jnp.int8 if terms.top <= 127 else jnp.int16
  return {"codes": codes.astype(dtype), "scale": scale}


def decode_terms(
  terms: Terms, encoded: Encoded, budgets: tuple[int, ...], index: Index
) -> Float[Array, "..."]:
  """What `round_terms` makes of the values that were encoded, float32."""
  codes = encoded["codes"].astype(jnp.int32)
  kept = kept_terms(terms, codes, grid.entry(budgets, index))
  return kept * _unit(terms, encoded["scale"])


def round_codes(
  terms: Terms, x: Float[Array, "..."], unit: Float[Array, "..."]
) -> Int[Array, "..."]:
  """Signed codes of x in int32, halves away from zero, nothing cut."""
  x = x.astype(jnp.float32)
  size = jnp.abs(x) if terms.signed else jnp.maximum(x, 0)
  # The minimum prevents XLA from contracting product and sum into an FMA.
  size = jnp.minimum(size * (1 / unit), terms.top)
  codes = jnp.floor(size + 0.5).astype(jnp.int32)
  return jnp.where(x < 0, -codes, codes)


def kept_terms(
  terms: Terms, codes: Int[Array, "..."], budget: int | Int[Array, ""]
) -> Float[Array, "..."]:
  """What a budget leaves of int32 codes, as float32."""
  kept = keep_largest(
    codes,
    budget,
    encoding=terms.encoding,
    group=terms.group,
    largest=terms.top,
  )
  return kept.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _round_terms(core, x, scale, budget):
  kept, _, unit = _quantize(core, x, scale, budget)
  return (kept * unit).astype(x.dtype)


def _forward(core, x, scale, budget):
  return _round_terms(core, x, scale, budget), (x, scale, budget)


def _backward(core, residuals, g):
  terms, _ = core
  x, scale, budget = residuals
  kept, codes, unit = _quantize(core, x, scale, budget)
  x32 = x.astype(jnp.float32)
  size = jnp.abs(x32) if terms.signed else x32
  # On x, not on v, whose rounding error would push the end codes out.
  reach = grid.positive(scale.astype(jnp.float32)) * (terms.top / terms.steps)
  inside = (size <= reach) & (terms.signed | (size >= 0))
  slope = jnp.where(inside, kept - x32 * (1 / unit), codes) * (1 / terms.steps)

  def passed(x):
    return jnp.where(inside, x, 0) if terms.masked else x

  return *gradients(x, passed, [(scale, slope)], g, jnp.float32), None


_round_terms.defvjp(_forward, _backward)


def _quantize(core, x, scale, budget):
  """Returns kept terms and codes as floats, and the unit."""
  terms, constant = core
  unit = _unit(terms, scale)
  codes = round_codes(terms, x, unit)
  kept = kept_terms(terms, codes, budget if constant is None else constant)
  return kept, codes.astype(jnp.float32), unit


def _unit(terms, scale):
  unit = grid.positive(scale.astype(jnp.float32)) * (1 / terms.steps)
  # The bound holds anyway; it prevents XLA from merging the two products.
  return jnp.maximum(unit, grid.SCALE_MIN / terms.steps / 2)


def _largest_of_each(present, budget, exponents):
  """Mask of the exponents with at most `budget` terms from them up."""
  kept = jnp.zeros_like(present)
  for e in exponents:
    fits = jax.lax.population_count(present >> e) <= budget
    kept |= jnp.where(fits, 1 << e, 0)
  return kept


def _largest_of_groups(present, budget, group, exponents):
  """Mask of the kept exponents of every member of every group.

  A group's plane of an exponent has a bit for each member with that term:
  whole planes fit from the top, the next one in part, lower members first.
  """
  channels, outputs = present.shape[-2:]
  group = min(group, channels)
  windows = [(0, 0)] * (present.ndim - 2)
  whole = _without_sharding(present, -2)
  whole = jnp.pad(whole, [*windows, (0, -channels % group), (0, 0)])
  grouped = whole.reshape(*whole.shape[:-2], -1, group, outputs)
  member = jnp.arange(group, dtype=jnp.int32).reshape(
    *[1] * (present.ndim - 1), group, 1
  )
  zero = jnp.zeros((), jnp.int32)
  room, full, cut, plane_cut, room_cut = zero + budget, zero, zero, zero, zero
  for e in exponents:
    bits = ((grouped >> e) & 1) << member
    plane = bits.sum(-2, keepdims=True, dtype=jnp.int32)
    count = jax.lax.population_count(plane)
    fits = count <= room
    partly = ~fits & (room > 0)
    full = jnp.where(fits, full | (1 << e), full)
    cut = jnp.where(partly, 1 << e, cut)
    plane_cut = jnp.where(partly, plane, plane_cut)
    room_cut = jnp.where(partly, room, room_cut)
    room = jnp.where(fits, room - count, 0)
  rank = jax.lax.population_count(plane_cut & ((2 << member) - 1))
  kept = full | jnp.where(rank <= room_cut, cut, 0)
  kept = kept.reshape(whole.shape)[..., :channels, :]
  return _sharded_as(present, kept)


def _without_sharding(x, axis):
  """x with all of `axis` on every device, where types say how it is spread."""
  spec = list(jax.typeof(x).sharding.spec)
  if spec[axis] is None:
    return x
  spec[axis] = None
  return jax.sharding.reshard(x, P(*spec))


def _sharded_as(like, x):
  """x spread as `like` is, where types say how."""
  spec = jax.typeof(like).sharding.spec
  same = spec == jax.typeof(x).sharding.spec
  return x if same else jax.sharding.reshard(x, spec)

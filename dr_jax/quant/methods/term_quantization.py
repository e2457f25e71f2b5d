"""Term quantization: the largest signed powers of two of groups of codes.

  m = round(|x| / s), with the sign of x;  x_hat = (the kept terms of m) * s

A group of weights keeps its K largest terms, an activation its T largest.
Kung, McDanel, Zhang, "Term Quantization: Furthering Quantization at Run Time",
SC 2020. Its trainable form is `multi_resolution`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dr_jax.quant.core import checks, exact_mean, grid, signed_digits
from dr_jax.quant.core.interface import ActivationQuantizer, WeightQuantizer
from dr_jax.quant.core.packing import storage
from dr_jax.quant.core.signed_digits import (
  Terms,
  decode_terms,
  encode_terms,
  kept_terms,
  round_codes,
  round_terms,
)
from dr_jax.quant.registry import Recipe, method

# Where the published search looks for an activation's scale.
_REACH, _BINS, _SCALES = 50.0, 4096, 2047
# Terms that a budget may count: no group has as many.
_MOST = 2**16


@method(
  term_quantization=Recipe(
    "term_quantization", "term_activation", curriculum="post_training"
  )
)
def term_quantization(
  bits: Sequence[int] = (8, 6, 4, 2),
  *,
  budgets: Sequence[int] | None = None,
  group: int = 8,
  weight_bits: int = 8,
) -> WeightQuantizer:
  """Builds the post-training term quantizer of weights.

    s = max|w| / 2^(B-1);  m = floor(|w| / s + 1/2), with the sign of w
    w_hat = (the K largest HESE terms of each group of m) * s

  A group is `group` consecutive input channels at one window position and
  output channel; the last one may be shorter. Of equal terms, those of lower
  channels are kept first.

  Shared between bit-widths: everything; `bits` only name the budgets. Stored:
  untruncated codes of B + 1 bits (-2^(B-1)..2^(B-1)) and the scale, the same
  for every budget: term quantization saves additions, not storage. Choose it
  to trade computation for accuracy at run time without any training, on
  hardware that adds shifted values.

  Params: {}; s is kept in [SCALE_MIN, SCALE_MAX]. The gradient for w is
  straight-through, with the scale detached: ours, as the published method is
  post-training.

  Args:
    bits: labels of the budgets in 2..8, highest first.
    budgets: K, terms per group, one for each of `bits`, strictly descending.
      None for bits * group / 4, rounded down (ours): a term costs four bits,
      its sign and an exponent of three.
    group: input channels that share a budget, 1..32.
    weight_bits: B, of the codes before truncation, 1..9.

  Raises:
    ValueError: for a value outside what is said above, or, outside jit, NaN or
      infinite weights.

  References:
    Kung, McDanel, Zhang, SC 2020.

  >>> quantizer = term_quantization((8, 2), budgets=(7, 1), group=3)
  >>> w = jnp.array([[128.0], [27.0], [-3.0]])
  >>> quantizer.fake_quantize({}, w, 1)[:, 0].tolist()  # one term
  [128.0, 0.0, 0.0]
  """
  bits = checks.check_bits(bits, method="term_quantization")
  group = checks.check_integer("group", group, 1, signed_digits.LARGEST_GROUP)
  weight_bits = checks.check_integer("weight_bits", weight_bits, 1, 9)
  budgets = check_budgets(bits, budgets, group)
  top = 2 ** (weight_bits - 1)
  terms = Terms(top, 1, "hese", group)

  def scale_of(w):
    axes = exact_mean.channel_axes(w.ndim, per_channel=False)
    return exact_mean.largest_magnitude(w, axes) * (1 / top)

  def init(w):
    return {}

  def fake_quantize(params, w, index):
    w = jnp.asarray(w)
    x = w.astype(jnp.float32)
    scale = jax.lax.stop_gradient(scale_of(x))
    return round_terms(terms, x, scale, budgets, index).astype(w.dtype)

  def encode(params, w):
    x = jnp.asarray(w).astype(jnp.float32)
    return encode_terms(terms, x, scale_of(x))

  def decode(encoded, index):
    return decode_terms(terms, encoded, budgets, index)

  return WeightQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=weight_bits + 1,
    storage=storage(
      (weight_bits + 1,) * len(bits),
      weight_bits + 1,
      ranges={"codes": (-top, top), "scale": grid.SCALE_RANGE},
    ),
    options=(("budgets", budgets),),
  )


@method()
def term_activation(
  bits: Sequence[int] = (8, 6, 4, 2),
  *,
  data_bits: int = 8,
  terms: Sequence[int] | None = None,
  signed: bool | None = None,
) -> ActivationQuantizer:
  """Builds the post-training term quantizer of activations.

    m = min(floor(|x| / s_b + 1/2), 2^D - 1), with the sign of x
    x_hat = (the T largest HESE terms of m) * s_b

  and 0 for x < 0 if not signed. Choose it together with `term_quantization`.

  Params: {"scale": float32 [B]}, found by calibration: of the multiples of 50 /
  2047, the one with the smallest squared error on a histogram of 8192 bins over
  [-50, 50]. Where inputs leave that range, or fill less than a sixteenth of it,
  all of this is scaled by a power of two (ours). Scales are detached; the
  gradient for x is straight-through where nothing is clipped (ours).

  Args:
    bits: labels of the numbers of terms in 2..8, highest first.
    data_bits: D, of a magnitude before truncation, 1..9.
    terms: T, terms per value, one for each of `bits`, never ascending. None
      for half the bits, rounded up (ours).
    signed: whether negative inputs keep their sign. None leaves it to
      calibration: signed where a calibration input is negative.

  Raises:
    ValueError: for a value outside what is said above, and when used while
      the sign is undecided.

  References:
    Kung, McDanel, Zhang, SC 2020.

  >>> quantizer = term_activation((8, 2), terms=(4, 1), signed=False)
  >>> params = {"scale": jnp.ones(2)}
  >>> quantizer.fake_quantize(params, jnp.array([-1.0, 27.0]), 1).tolist()
  [0.0, 32.0]
  """
  bits = checks.check_bits(bits, method="term_activation")
  data_bits = checks.check_integer("data_bits", data_bits, 1, 9)
  if terms is None:
    terms = [-(-b // 2) for b in bits]
  terms = check_terms(bits, terms)
  top = 2**data_bits - 1
  core = Terms(top, 1, "hese", 0, signed=bool(signed), masked=True)

  def init(x):
    return {"scale": _best_scales(core, x, terms)}

  def from_range(low, high):
    scale = grid.covering_scale(low, high, -top if signed else 0, top)
    return {"scale": jnp.stack([scale] * len(bits))}

  def fake_quantize(params, x, index):
    scale = jax.lax.stop_gradient(params["scale"][index])
    return round_terms(core, x, scale, terms, index)

  return ActivationQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    signed=signed,
    options=(("terms", terms),),
    from_range=from_range,
  )


def _best_scales(core, x, terms):
  """The scale with the smallest squared error for each number of terms, [B]."""
  x = _replicated(jnp.asarray(x).astype(jnp.float32))
  size = jnp.abs(x) if core.signed else jnp.maximum(x, 0)
  reach = _reach(size.max())
  width = reach * (1 / _BINS)
  bins = jnp.minimum(size * (1 / width), _BINS - 1).astype(jnp.int32)
  counts = jnp.zeros(_BINS, jnp.int32).at[bins].add(1).astype(jnp.float32)
  middles = (jnp.arange(_BINS, dtype=jnp.float32) + 0.5) * width
  scales = (jnp.arange(_SCALES, dtype=jnp.float32) + 1) * (reach / _SCALES)

  def errors(scale):
    codes = round_codes(core, middles, scale)
    kept = jnp.stack([kept_terms(core, codes, t) for t in terms])
    return (counts[None] * (kept * scale - middles[None]) ** 2).sum(1)

  best = jax.lax.map(errors, scales).argmin(0)
  return grid.positive(scales[best])


def _reach(largest):
  """50, or that times a power of two if it is too small or far too large."""
  # Bounded so that neither the reach nor its bins overflow.
  ratio = jnp.clip(largest, 2.0**-20, 2.0**40) * (1 / _REACH)
  _, exponent = jnp.frexp(ratio)  # 2^(exponent - 1) <= ratio < 2^exponent
  shift = jnp.where(exponent > 0, exponent, jnp.minimum(exponent + 3, 0))
  return jnp.ldexp(jnp.float32(_REACH), shift)


def _replicated(x):
  """x on every device, where types say how it is spread."""
  spread = any(axis is not None for axis in jax.typeof(x).sharding.spec)
  return jax.sharding.reshard(x, P()) if spread else x


def check_budgets(
  bits: tuple[int, ...], budgets: Sequence[int] | None, group: int
) -> tuple[int, ...]:
  """Returns budgets, by default as many terms as fit bits * group bits.

  >>> check_budgets((8, 4), None, 8)
  (16, 8)
  """
  given = budgets
  if given is None:
    given = [max(b * group // 4, 1) for b in bits]
  checked = _integers(given)
  descending = all(a > b for a, b in zip(checked, checked[1:], strict=False))
  if len(checked) != len(bits) or not descending or not _counts(checked):
    default = f" (which is {tuple(given)})" if budgets is None else ""
    raise ValueError(
      f"budgets must be {len(bits)} integers in 1..{_MOST}, strictly "
      f"descending, one for each of bits={bits}, got {budgets!r}{default}"
    )
  return checked


def check_terms(bits: tuple[int, ...], terms: Sequence[int]) -> tuple[int, ...]:
  """Returns the numbers of terms of an activation quantizer.

  >>> check_terms((8, 4), [2, 2])
  (2, 2)
  """
  checked = _integers(terms)
  ascending = any(a < b for a, b in zip(checked, checked[1:], strict=False))
  if len(checked) != len(bits) or ascending or not _counts(checked):
    raise ValueError(
      f"terms must be {len(bits)} integers in 1..{_MOST}, never ascending, one "
      f"for each of bits={bits}, got {terms!r}"
    )
  return checked


def _counts(numbers):
  return all(1 <= n <= _MOST for n in numbers)


def _integers(values):
  """The values as integers; empty if one is not an integer."""
  try:
    return tuple(operator.index(v) for v in values)
  except TypeError:
    return ()

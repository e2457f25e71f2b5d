"""Multi-resolution quantization: the trainable form of term quantization.

  v = (w - mean) / std,  z = clip(v / s, -1, 1)
  m = floor(|z| (2^M - 1) + 1/2), with the sign of z
  w_hat = (the K largest terms of each group of m) / (2^M - 1) * s

Terms are those of the non-adjacent form. The weight is normalized: w_hat stands
for v, and the normalization that follows a layer absorbs the rest. Zhang et
al., "Training for Multi-resolution Inference Using Reusable Quantization
Terms", ASPLOS 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dr_jax.quant.core import checks, exact_mean, grid, signed_digits
from dr_jax.quant.core.interface import ActivationQuantizer, WeightQuantizer
from dr_jax.quant.core.packing import storage
from dr_jax.quant.core.signed_digits import (
  Terms,
  decode_terms,
  encode_terms,
  round_terms,
)
from dr_jax.quant.methods.term_quantization import (
  check_budgets,
  check_terms,
)
from dr_jax.quant.registry import Recipe, method

# Three standard deviations of a normalized weight.
_FIRST_SCALE = 3.0
_ACTIVATION_TOP = 31


@method(
  multi_resolution=Recipe(
    "multi_resolution",
    "multi_resolution_activation",
    schedule="accumulate",
    sampling="pair",
    distillation="resolution",
  )
)
def multi_resolution(
  bits: Sequence[int] = (8, 6, 4, 2),
  *,
  budgets: Sequence[int] | None = None,
  group: int = 16,
  magnitude_bits: int = 4,
) -> WeightQuantizer:
  """Builds the multi-resolution weight quantizer.

    z = clip((w - mean) / (std s), -1, 1)
    w_hat = (the K largest terms of round(z (2^M - 1))) / (2^M - 1) * s

  Mean and standard deviation (unbiased) are those of the whole tensor, and
  detached. A group is `group` consecutive input channels at one window
  position and output channel; the last one may be shorter. Of equal terms,
  those of lower channels are kept first. Gradients: 1/std for w, also where z
  is clipped; (q - z inside, sign z where clipped) for s, q the kept terms over
  2^M - 1.

  Shared between bit-widths: the weights, the codes and the scale; `bits` only
  name the budgets. Stored: codes of sign and M bits, and the scale, the same
  for every budget. Choose it to train one network for several numbers of
  additions, with a normalization after each layer: w_hat has the spread of
  v, not of w.

  Params: {"scale": float32 [1, ..., 1]}, one for all budgets; starts at 3,
  three standard deviations (ours).

  Args:
    bits: labels of the budgets in 2..8, highest first.
    budgets: K, terms per group, one for each of `bits`, strictly descending;
      published are 20 down to 8 for 16 weights. None for bits * group / 4,
      rounded down (ours): a term costs four bits.
    group: input channels that share a budget, 1..32.
    magnitude_bits: M, of a code without its sign, 1..8.

  Raises:
    ValueError: for a value outside what is said above, or, outside jit, NaN or
      infinite weights.

  References:
    Zhang et al., ASPLOS 2021.

  >>> quantizer = multi_resolution((8, 4), group=2)
  >>> w = jnp.array([[1.0], [-1.0]])
  >>> quantizer.encode(quantizer.init(w), w)["codes"].tolist()
  [[4], [-4]]
  """
  bits = checks.check_bits(bits, method="multi_resolution")
  group = checks.check_integer("group", group, 1, signed_digits.LARGEST_GROUP)
  magnitude_bits = checks.check_integer("magnitude_bits", magnitude_bits, 1, 8)
  budgets = check_budgets(bits, budgets, group)
  top = 2**magnitude_bits - 1
  terms = Terms(top, top, "naf", group)

  def init(w):
    return {"scale": jnp.full((1,) * w.ndim, _FIRST_SCALE, jnp.float32)}

  def fake_quantize(params, w, index):
    w = jnp.asarray(w)
    out = round_terms(terms, _normalized(w), params["scale"], budgets, index)
    return out.astype(w.dtype)

  def encode(params, w):
    return encode_terms(terms, _normalized(jnp.asarray(w)), params["scale"])

  def decode(encoded, index):
    return decode_terms(terms, encoded, budgets, index)

  return WeightQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=magnitude_bits + 1,
    storage=storage(
      (magnitude_bits + 1,) * len(bits),
      magnitude_bits + 1,
      ranges={"codes": (-top, top), "scale": grid.SCALE_RANGE},
    ),
    options=(("budgets", budgets),),
  )


@method()
def multi_resolution_activation(
  bits: Sequence[int] = (8, 6, 4, 2),
  *,
  terms: Sequence[int] | None = None,
  signed: bool | None = None,
) -> ActivationQuantizer:
  """Builds the multi-resolution activation quantizer.

    z = clip(x / s, 0, 1), or -1..1 if signed
    x_hat = (the T largest terms of round(31 z)) / 31 * s

  Gradients: 1 for x where it is not clipped; (q - z inside, the bound where
  clipped) for s. Choose it together with `multi_resolution`.

  Params: {"scale": float32 [1]}, one for all budgets; starts at
  2 mean|x| sqrt(31), LSQ's first step times 31 (ours).

  Args:
    bits: labels of the numbers of terms in 2..8, highest first.
    terms: T, terms per value, one for each of `bits`, never ascending.
      Published pairs (T, K) go from (2, 8) to (3, 20); None for 3 down to 4
      bits and 2 below, as in those pairs at K = 4 bits (the values between them
      are ours).
    signed: whether negative inputs keep their sign (ours: published inputs
      follow a ReLU). None leaves it to calibration: signed where a
      calibration input is negative.

  Raises:
    ValueError: for a value outside what is said above, and when used while
      the sign is undecided.

  References:
    Zhang et al., ASPLOS 2021.

  >>> quantizer = multi_resolution_activation((8, 2), signed=False)
  >>> params = {"scale": jnp.array([31.0])}
  >>> quantizer.fake_quantize(params, jnp.array([-1.0, 21.0]), 1).tolist()
  [0.0, 20.0]
  """
  bits = checks.check_bits(bits, method="multi_resolution_activation")
  if terms is None:
    terms = [3 if b >= 4 else 2 for b in bits]
  terms = check_terms(bits, terms)
  core = Terms(
    _ACTIVATION_TOP,
    _ACTIVATION_TOP,
    "naf",
    0,
    signed=bool(signed),
    masked=True,
  )

  def init(x):
    size = jnp.abs(jnp.asarray(x).astype(jnp.float32)).mean()
    scale = grid.positive(size * (2 * _ACTIVATION_TOP**0.5))
    return {"scale": scale.reshape(1)}

  def from_range(low, high):
    reach = jnp.maximum(jnp.abs(low), jnp.abs(high)) if signed else high
    return {"scale": grid.positive(reach).astype(jnp.float32).reshape(1)}

  def fake_quantize(params, x, index):
    return round_terms(core, x, params["scale"][0], terms, index)

  return ActivationQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    signed=signed,
    from_range=from_range,
    options=(("terms", terms),),
  )


def _normalized(w):
  """(w - mean) / std in float32, both detached."""
  w = w.astype(jnp.float32)
  axes = exact_mean.channel_axes(w.ndim, per_channel=False)
  mean, std = exact_mean.mean_and_std(jax.lax.stop_gradient(w), axes)
  # XLA turns 1 / sqrt into another instruction in some programs: the clamp
  # prevents it. The bounds on v hold anyway and prevent merged products.
  v = (w - mean) * (1 / grid.positive(std))
  return jnp.clip(v, -grid.SCALE_MAX, grid.SCALE_MAX)

"""Where learned parameters start: as published, or fitted to an array."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.quant.core import checks, grid
from dr_jax.quant.core.interface import (
  ActivationQuantizer,
  Params,
  WeightQuantizer,
)

if TYPE_CHECKING:
  from jaxtyping import Array, Float

INITS = ("published", "max", "percentile", "mse")

_PERCENTILE = 99.99
# Multiples of the whole range that "mse" compares: 1.4 down to a thirtieth.
_FRACTIONS = 2.0 ** ((4 - np.arange(44, dtype=np.float32)) / 8)
# What clipping takes from a signal, the next layer takes again: errors along x
# add up over layers, where others add up in squares. As in so many layers.
_LAYERS = 30
# Where bit-widths share a scale: squared error of the highest, over the least.
_AT_THE_HIGHEST = 1.2


def fit(
  quantizer: WeightQuantizer | ActivationQuantizer,
  x: Float[Array, "..."],
  init: str = "mse",
) -> Params:
  """Returns initial parameters of a quantizer for an array.

  Args:
    quantizer: any; one without parameters that depend on the range of x
      (`from_range`) starts as published whatever `init` says.
    x: a weight [..., c_in, c_out], or inputs of any shape.
    init: "published", what the method's paper does. The others choose a range,
      of each channel where the method has a scale for each: "max", all of x;
      "percentile", from the 0.01th percentile to the 99.99th; "mse", the
      multiple of the range that has the smallest squared error at each
      bit-width, where a signal that shrinks costs what it costs in 30 layers.
      Where bit-widths share a scale, it is the smallest sum over bit-widths of
      that error relative to the best for each, at most 1.2 at the highest.

  Raises:
    ValueError: for an unknown `init`, or, outside jit, NaN or infinite x.

  >>> from dr_jax import quant
  >>> w = jnp.array([[-1.0], [0.25], [127.0]])
  >>> fit(quant.double_rounding((8, 4)), w, "max")["scale"].tolist()
  [[1.0]]
  """
  checks.one_of("init", init, INITS)
  if init == "published" or quantizer.from_range is None:
    return quantizer.init(x)
  checks.check_finite("x", x)
  x = grid.widened(x)
  if isinstance(quantizer, ActivationQuantizer):
    x, axes, keep = x.ravel(), (0,), False
  else:
    axes, keep = _reduced_axes(quantizer, x), True
  if init == "percentile":
    ends = jnp.array([100 - _PERCENTILE, _PERCENTILE])
    low, high = jnp.percentile(x, ends, axes, keepdims=keep)
  else:
    low, high = x.min(axes, keepdims=keep), x.max(axes, keepdims=keep)
  if init != "mse":
    return quantizer.from_range(low, high)
  return _least_error(quantizer, x, low, high, axes)


def _reduced_axes(quantizer, w):
  """The axes of a weight that share a scale."""
  shapes = jax.eval_shape(quantizer.init, w)
  shape = shapes["scale"].shape[-w.ndim :]
  return tuple(axis for axis, size in enumerate(shape) if size == 1)


def _least_error(quantizer, x, low, high, axes):
  keep = low.ndim > 0

  def total(values):
    return values.sum(axes, keepdims=keep)

  energy = jnp.maximum(total(jnp.square(x)), jnp.finfo(x.dtype).tiny)

  def cost(x_hat):
    error = x_hat - x
    along = jnp.square(total(error * x)) / energy
    return total(jnp.square(error)) + _LAYERS * along

  def costs(fraction):
    params = quantizer.from_range(fraction * low, fraction * high)
    indices = jnp.arange(len(quantizer.bits))
    # A loop over bit-widths too: to unroll it takes longer to compile.
    return params, jax.lax.map(
      lambda i: cost(quantizer.fake_quantize(params, x, i)), indices
    )

  params, found = jax.lax.map(costs, jnp.asarray(_FRACTIONS))
  each = found.argmin(0)  # [B, *low.shape]
  least = found.min(0, keepdims=True)
  relative = found / jnp.maximum(least, jnp.finfo(found.dtype).tiny)
  good = relative[:, 0] <= _AT_THE_HIGHEST
  shared = jnp.where(good, relative.sum(1), jnp.inf).argmin(0)

  def chosen(leaf):
    # A parameter has one entry for each bit-width, or one for all.
    best = each if leaf[0].size == each.size else shared
    best = best.reshape(1, *leaf.shape[1:])
    return jnp.take_along_axis(leaf, best, 0)[0]

  return jax.tree.map(chosen, params)

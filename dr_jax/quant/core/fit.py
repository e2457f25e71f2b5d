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
# Parts of the whole range that "mse" compares: down to a thirtieth.
_FRACTIONS = 2.0 ** (-np.arange(40, dtype=np.float32) / 8)


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
      "percentile", from the 0.01th percentile to the 99.99th; "mse", the part
      of the range that has the smallest squared error at each bit-width, or,
      where bit-widths share a scale, the smallest sum over the bit-widths of
      the error relative to the best for each.

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

  def errors(fraction):
    params = quantizer.from_range(fraction * low, fraction * high)
    hats = [
      quantizer.fake_quantize(params, x, i) for i in range(len(quantizer.bits))
    ]
    squares = [jnp.square(x_hat - x).sum(axes, keepdims=keep) for x_hat in hats]
    return params, jnp.stack(squares)

  params, squares = jax.lax.map(errors, jnp.asarray(_FRACTIONS))
  each = squares.argmin(0)  # [B, *low.shape]
  least = jnp.maximum(
    squares.min(0, keepdims=True), jnp.finfo(squares.dtype).tiny
  )
  shared = (squares / least).sum(1).argmin(0)

  def chosen(leaf):
    # A parameter has one entry for each bit-width, or one for all.
    best = each if leaf[0].size == each.size else shared
    best = best.reshape(1, *leaf.shape[1:])
    return jnp.take_along_axis(leaf, best, 0)[0]

  return jax.tree.map(chosen, params)

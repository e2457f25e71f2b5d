"""Batch norm with one set of parameters and statistics per bit-width.

With n candidate bit-widths a norm has rows, by its kind: "switchable", n rows,
the row of the layer whose output it normalizes; "transitional", n * n rows,
row previous * n + own, where previous belongs to the quantized layer called
before that one (none before the first: n rows); "shared", one row.

Statistics come from one pass over the activations (mean of x and of x^2, in
float32), unless the norm was built with use_fast_variance=False; the two-pass
form costs a quarter to a third of a training step on CPU. Lower bit-widths
have other activation statistics: arXiv 1812.08928 (switchable batch norm),
Bit-Mixer, ICCV 2021 (transitional batch norm), arXiv 2502.01199, sections 3.2
and 3.3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax.nn.bits import Bits, NormParam, is_mixture
from dr_jax.nn.integer_call import accumulators_of
from dr_jax.nn.partitioning import annotate, spec_of
from dr_jax.nn.substitute import copy_attributes

KINDS = ("switchable", "transitional", "shared")


class Rows:
  """What a norm knows of its rows: which layers select among them.

  Attributes:
    rows: how many there are.
    bits: Bits of the layer whose output is normalized.
    previous: Bits of the quantized layer called before that one, or None.
  """

  def _follow(self, orders, rows, stack=()):
    *previous, own = orders
    self.rows = rows
    self.bits = Bits.following(own, stack)
    self.previous = Bits.following(*previous) if previous else None

  @property
  def orders(self) -> tuple[int, ...]:
    """Numbers of the layers it follows: (own,) or (previous, own)."""
    return tuple(bits.order for bits in self._followed())

  @property
  def row(self) -> int | jax.Array:
    """Row of the bits in use; weights [rows] where they are a mixture."""
    index = {bits.order: bits.get_value() for bits in self._followed()}
    return row_at(self.orders, self.rows, index)

  def _followed(self):
    return [self.bits] if self.previous is None else [self.previous, self.bits]


def row_at(
  orders: Sequence[int],
  rows: int,
  index: Mapping[int, Any] | Sequence[Any],
) -> Any:
  """Row of a norm where layers are at given positions in the candidates.

  Args:
    orders: numbers of the layers it follows, (own,) or (previous, own).
    rows: how many it has.
    index: by the number of a layer, its position, or weights [candidates] of a
      mixture.

  Returns:
    The row; weights [rows] of a mixture.

  >>> row_at((0,), 4, [1, 2]), row_at((0, 1), 16, [1, 2])
  (1, 6)
  """
  if rows == 1:
    return 0
  *previous, own = (index[order] for order in orders)
  if not previous:
    return own
  if is_mixture(own):
    return jnp.outer(previous[0], own).ravel()
  return previous[0] * math.isqrt(rows) + own


class BatchNorm(Rows, nnx.BatchNorm):
  """nnx.BatchNorm whose rows are selected by the bit-widths.

  Attributes:
    kind: one of KINDS.
    scale, bias: NormParam [rows, features], or None.
    mean, var: BatchStat [rows, features], float32; var is the biased one.
    rows, bits, previous: as in Rows.
  """

  def __init__(
    self,
    norm: nnx.BatchNorm,
    *,
    kind: str,
    candidates: int,
    order: int,
    stack: tuple[int, ...] = (),
  ):
    """Starts all rows from a norm.

    Args:
      norm: a float norm, or a switchable one, whose row of the own bit-width
        every transitional row starts from.
      kind: one of KINDS.
      candidates: number of candidate bit-widths.
      order: number of the layer to follow, or of the first of a stack.
      stack: axes of the bits of that stack.

    Raises:
      ValueError: for transitional norms of a stack.
    """
    copy_attributes(
      self, norm, omit=("scale", "bias", "mean", "var", "previous")
    )
    self.kind = kind
    stacked = norm.mean[...].ndim > 1 and not isinstance(norm, BatchNorm)
    if stacked and kind == "transitional":
      raise ValueError(
        "norm must be 'switchable' or 'shared' for norms of stacked layers, "
        f"got {kind!r}"
      )
    pairs = kind == "transitional" and order > 0
    orders = (order - 1, order) if pairs else (order,)
    rows = 1 if kind == "shared" else candidates ** len(orders)
    self._follow(orders, rows, stack)
    has_rows = isinstance(norm, BatchNorm)
    spec = _spec(norm)
    for name, variable in (
      *(("scale", NormParam), ("bias", NormParam)),
      *(("mean", nnx.BatchStat), ("var", nnx.BatchStat)),
    ):
      value = getattr(norm, name)
      if value is not None:
        value = variable(_rows(value[...], rows, has_rows))
        annotate(value, spec, value.shape)
      setattr(self, name, value)

  def __call__(
    self,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Normalizes x over all axes but the feature axis; see nnx.BatchNorm."""
    if use_running_average is None:
      use_running_average = self.use_running_average
    if use_running_average is None:
      raise ValueError(
        "use_running_average must be True or False, got None: set it in the "
        "call, or by model.train() and model.eval()"
      )
    row = self.row
    scale = None if self.scale is None else _at_row(self.scale, row)
    bias = None if self.bias is None else _at_row(self.bias, row)
    mean, var = _at_row(self.mean, row), _at_row(self.var, row)
    # As in nnx.BatchNorm: without a dtype, parameters can widen the output.
    x, *_ = self.promote_dtype((x, mean, scale, bias), dtype=self.dtype)
    if not use_running_average:
      if self._is_plain(x, mask):
        y, mean, var = normalize(x, scale, bias, self.epsilon)
        self._update(row, mean, var)
        return y
      mean, var = self._batch_statistics(x, mask)
      self._update(row, mean, var)
    gain, offset = _fold(mean, var, scale, bias, self.epsilon)
    return _affine(x, gain, offset, self.axis)

  def fold(self) -> tuple[jax.Array, jax.Array]:
    """Inference as x * gain + offset: both float32 [rows, features]."""
    scale = None if self.scale is None else self.scale[...]
    bias = None if self.bias is None else self.bias[...]
    return _fold(self.mean[...], self.var[...], scale, bias, self.epsilon)

  def _is_plain(self, x, mask):
    """Whether `normalize` serves: the usual case, with its own gradient."""
    return (
      mask is None
      and self.use_fast_variance
      and self.axis_name is None
      and self.axis % x.ndim == x.ndim - 1
      and self.scale is not None
      and self.bias is not None
    )

  def _batch_statistics(self, x, mask):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axis = self.axis % x.ndim
    axes = tuple(a for a in range(x.ndim) if a != axis)
    mean = x.mean(axes, where=mask)
    if not self.use_fast_variance and self.axis_name is None:
      centered = x - jnp.expand_dims(mean, axes)
      return mean, jnp.square(centered).mean(axes, where=mask)
    square = jnp.square(x).mean(axes, where=mask)
    if self.axis_name is not None:
      mean, square = jax.lax.pmean(
        (mean, square), self.axis_name, axis_index_groups=self.axis_index_groups
      )
    return mean, jnp.maximum(square - jnp.square(mean), 0)

  def _update(self, row, mean, var):
    for statistic, value in ((self.mean, mean), (self.var, var)):
      rows = jnp.asarray(statistic[...])
      value = jax.lax.stop_gradient(value).astype(rows.dtype)
      if is_mixture(row):
        share = (1 - self.momentum) * row[:, None].astype(rows.dtype)
        statistic.set_value(rows + share * (value[None] - rows))
      else:
        # Chosen entry by entry: on a GPU updates of all norms and passes fuse
        # into a few kernels, where a scatter is one for each.
        new = self.momentum * rows + (1 - self.momentum) * value[None]
        own = jnp.arange(len(rows))[:, None] == row
        statistic.set_value(jnp.where(own, new, rows))


class FoldedNorm(Rows, nnx.Module):
  """A BatchNorm for inference: its rows as one gain and offset each.

  Attributes:
    gain, offset: BatchStat [rows, features]; NaN in rows that are not held.
    held: numbers of the rows that were read; the outputs of others are NaN, or
      an error where the row is a Python int.
    rows, bits, previous: as in Rows.
  """

  def __init__(
    self,
    norm: nnx.BatchNorm,
    gain: jax.Array,
    offset: jax.Array,
    *,
    orders: tuple[int, ...],
    held: tuple[int, ...] | None = None,
    stack: tuple[int, ...] = (),
  ):
    self.axis, self.dtype = norm.axis, norm.dtype
    self.promote_dtype = norm.promote_dtype
    self._follow(orders, gain.shape[-2], stack)
    self.held = tuple(range(self.rows)) if held is None else held
    self.gain = nnx.BatchStat(gain)
    self.offset = nnx.BatchStat(offset)
    for variable in (self.gain, self.offset):
      annotate(variable, _spec(norm), gain.shape)

  def __call__(self, x: jax.Array, *args, **kwargs) -> jax.Array:
    row = self.row
    if isinstance(row, int) and row not in self.held:
      raise ValueError(
        f"row of the norm must be one of {self.held}, which were read, got "
        f"{row}; read more with artifact.upgrade"
      )
    gain, offset = _at_row(self.gain, row), _at_row(self.offset, row)
    accumulators = accumulators_of(x)
    x, *_ = self.promote_dtype((x, gain, offset), dtype=self.dtype)
    if accumulators is not None and self.axis % x.ndim == x.ndim - 1:
      return accumulators.normalized(gain, offset).values().astype(x.dtype)
    return _affine(x, gain, offset, self.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalizes x [..., c] with its own statistics, in two passes over memory.

  The gradient is written by hand: one pass for its two sums, one for the
  result, where autodiff takes more. No gradient flows through the returned
  statistics.

  Returns:
    y (dtype of x), and float32 mean [c] and biased variance [c].
  """
  return _normalize_forward(x, scale, bias, epsilon)[0]


def _normalize_forward(x, scale, bias, epsilon):
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  count = x.size // x.shape[-1]
  total, squares = _two_sums(wide, jnp.square(wide))
  mean = total / count
  var = jnp.maximum(squares / count - jnp.square(mean), 0)
  gain, offset = _fold(mean, var, scale, bias, epsilon)
  y = _affine(x, gain, offset, -1)
  return (y, mean, var), (x, scale, bias, mean, var)


def _normalize_backward(epsilon, residuals, gradients):
  x, scale, bias, mean, var = residuals
  wide = mean.dtype
  x32, g = x.astype(wide), gradients[0].astype(wide)
  count = x.size // x.shape[-1]
  inverse = jax.lax.rsqrt(var + epsilon)
  # y = (x - mean) * inverse * scale + bias, mean and inverse functions of x.
  dbias, product = _two_sums(g, g * x32)
  dscale = (product - mean * dbias) * inverse
  gain = inverse * scale.astype(wide)
  slope = gain * inverse * dscale / count
  constant = mean * slope - gain * dbias / count
  shape = (1,) * (x.ndim - 1) + (-1,)
  dx = g * gain.reshape(shape) - x32 * slope.reshape(shape)
  dx = (dx + constant.reshape(shape)).astype(x.dtype)
  dscale, dbias = dscale.astype(scale.dtype), dbias.astype(bias.dtype)
  # Under shard_map x varies over the mesh and scale and bias do not: the
  # transpose of this addition sums their gradients over those axes.
  _, transposed = jax.vjp(lambda s, b: (s + dscale, b + dbias), scale, bias)
  return dx, *transposed((dscale, dbias))


normalize.defvjp(_normalize_forward, _normalize_backward)


def _two_sums(a, b):
  """Sums a and b over all axes but the last, reading memory once."""
  zero = jnp.zeros((), a.dtype)
  add = lambda x, y: (x[0] + y[0], x[1] + y[1])  # noqa: E731
  for axes in (tuple(range(1, a.ndim - 1)), (0,)):
    a, b = jax.lax.reduce((a, b), (zero, zero), add, axes)
  return a, b


def _fold(mean, var, scale, bias, epsilon):
  gain = jax.lax.rsqrt(var + epsilon)
  if scale is not None:
    gain = gain * scale.astype(gain.dtype)
  offset = -mean * gain
  if bias is not None:
    offset = offset + bias.astype(offset.dtype)
  return gain, offset


def _affine(x, gain, offset, axis):
  shape = [1] * x.ndim
  shape[axis] = gain.size
  wide = jnp.promote_types(x.dtype, gain.dtype)
  y = x.astype(wide) * gain.reshape(shape) + offset.reshape(shape)
  return y.astype(x.dtype)


def _spec(norm):
  """Axes of a mesh for rows, as for the features of a scale or bias."""
  spec = spec_of(norm.scale) or spec_of(norm.bias)
  if spec is None or isinstance(norm, BatchNorm):
    return spec
  return (*spec[:-1], None, spec[-1])


def _at_row(rows, row):
  """One row of [rows, features], or their sum by weights [rows]."""
  if is_mixture(row):
    return row.astype(rows.dtype) @ rows[...]
  return rows[row]


def _rows(value, rows, has_rows):
  """[..., features] or [..., present rows, features] repeated to all rows."""
  # In numpy: programs for each shape would take longer to compile.
  value = np.asarray(value)
  start = value if has_rows else value[..., None, :]
  times = (1,) * (start.ndim - 2) + (rows // start.shape[-2], 1)
  return jnp.asarray(np.tile(start, times))

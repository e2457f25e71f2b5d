"""What quantization has to know of a Flax layer: how it meets its kernel.

A layer multiplies inputs by a kernel and sums over the kernel's axes that its
output does not have. Those that it has are its output channels: a scale per
channel can be taken out of every sum. `CONTRACTIONS` says of each layer type
where its kernel is, which axes these are, and what a call costs.

Methods see every kernel in one form, the channels as its last axis: `Columns`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax.nn.own_einsum import (
  OwnEinsum,
  is_own_einsum,
  kernel_axes,
  own_kernel,
)


class Columns(NamedTuple):
  """How a kernel becomes an array [..., channels], and back.

  Attributes:
    axes: order of the kernel's axes.
    ordered: shape of the kernel in that order.
    shape: of the result.
    channels: how many of the axes, the last ones, become one.
  """

  axes: tuple[int, ...]
  ordered: tuple[int, ...]
  shape: tuple[int, ...]
  channels: int

  @classmethod
  def ending_in(
    cls, channels: tuple[int, ...], shape: tuple[int, ...], *, flat: bool
  ) -> Columns:
    """Of a kernel of some shape; `flat` makes its other axes one."""
    rest = tuple(a for a in range(len(shape)) if a not in channels)
    axes = (*rest, *channels)
    ordered = tuple(shape[a] for a in axes)
    inner, outer = ordered[: len(rest)], ordered[len(rest) :]
    inner = (math.prod(inner),) if flat else inner
    shape = (*inner, math.prod(outer))
    return cls(axes, ordered, shape, len(channels))

  @property
  def kernel_shape(self) -> tuple[int, ...]:
    """Shape of the kernel."""
    sizes = dict(zip(self.axes, self.ordered, strict=True))
    return tuple(sizes[axis] for axis in range(len(sizes)))

  def grouped(self, entries: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Entries of the kernel's axes, by the axis that theirs become."""
    ordered = tuple(entries[axis] for axis in self.axes)
    count = len(ordered) - self.channels
    inner, outer = ordered[:count], ordered[count:]
    own = len(self.shape) == count + 1
    return [*([(entry,) for entry in inner] if own else [inner]), outer]

  def of(self, kernel: jax.Array) -> jax.Array:
    """The kernel with its channels last."""
    if self._is_identity:
      return kernel
    return jnp.transpose(kernel, self.axes).reshape(self.shape)

  def back(self, columns: jax.Array) -> jax.Array:
    """The kernel again."""
    if self._is_identity:
      return columns
    axes = tuple(int(a) for a in np.argsort(self.axes))
    return jnp.transpose(columns.reshape(self.ordered), axes)

  @property
  def _is_identity(self):
    in_order = self.axes == tuple(range(len(self.axes)))
    return in_order and self.ordered == self.shape


class Contraction(NamedTuple):
  """How a layer type meets its kernel.

  Attributes:
    kind: its name in a layer table.
    rank: rank(layer), number of axes of its kernel; a kernel with more is that
      of several layers (`nnx.scan`, `nnx.vmap`).
    channels: channels(layer), the axes of its kernel that its output has.
    kernel: name of the attribute.
    flat: whether its kernel is a matrix once its channels are one axis.
    methods: those that contract; a subclass that overrides one is another.
    macs: macs(layer, x, y), multiply-accumulates of one call.
    lookups: methods whose input is not multiplied.
    summed: summed(layer, ndim), axes of an input of `ndim` that its sums run
      over; by default the last one.
  """

  kind: str
  rank: Callable[[Any], int]
  channels: Callable[[Any], tuple[int, ...]]
  macs: Callable[[Any, jax.Array, jax.Array], int]
  kernel: str = "kernel"
  flat: bool = False
  methods: tuple[str, ...] = ("__call__",)
  lookups: tuple[str, ...] = ()
  summed: Callable[[Any, int], tuple[int, ...]] = lambda layer, ndim: (
    ndim - 1,
  )

  def columns(self, layer: Any) -> Columns:
    """How the kernel of one layer becomes columns."""
    shape = getattr(layer, self.kernel).shape
    shape = tuple(shape[len(shape) - self.rank(layer) :])
    return Columns.ending_in(self.channels(layer), shape, flat=self.flat)

  def stack(self, layer: Any) -> tuple[int, ...]:
    """Leading axes of a kernel that is that of several layers."""
    shape = getattr(layer, self.kernel).shape
    return tuple(shape[: len(shape) - self.rank(layer)])


def _sums(layer, x, y):
  """Every output is one sum over what is not a channel."""
  del x
  columns = contraction_of(layer).columns(layer)
  return y.size * math.prod(columns.shape[:-1])


def _transposed_macs(layer, x, y):
  """Every input meets its whole part of the kernel."""
  del y
  return x.size * math.prod(layer.kernel_size) * layer.out_features


def _window_rank(layer):
  return len(layer.kernel_size) + 2


def _general_rank(layer):
  axes = layer.batch_axis, layer.in_features, layer.out_features
  return sum(map(len, axes))


def _general_channels(layer):
  rank, inner = _general_rank(layer), len(layer.in_features)
  batch = len(layer.batch_axis)
  return (*range(batch), *range(batch + inner, rank))


def _einsum_channels(layer):
  _, output = layer.einsum_str.split("->")
  return tuple(i for i, a in enumerate(kernel_axes(layer)) if a in output)


def _window_summed(layer, ndim):
  """A whole example: windows overlap."""
  return tuple(range(ndim - len(layer.kernel_size) - 1, ndim))


def _general_summed(layer, ndim):
  return tuple(axis % ndim for axis in layer.axis)


def _einsum_summed(layer, ndim):
  operands, output = layer.einsum_str.split("->")
  before, dots, after = operands.split(",")[0].strip().partition("...")
  axes = [i for i, a in enumerate(before) if a not in output]
  if dots:
    first = ndim - len(after)
    axes += [first + i for i, a in enumerate(after) if a not in output]
  return tuple(axes)


CONTRACTIONS: dict[type, Contraction] = {
  nnx.Conv: Contraction(
    "conv",
    _window_rank,
    lambda m: (_window_rank(m) - 1,),
    _sums,
    summed=_window_summed,
  ),
  nnx.Linear: Contraction("linear", lambda m: 2, lambda m: (1,), _sums),
  nnx.LinearGeneral: Contraction(
    "linear_general",
    _general_rank,
    _general_channels,
    _sums,
    flat=True,
    summed=_general_summed,
  ),
  nnx.Einsum: Contraction(
    "einsum",
    lambda m: len(m.kernel_shape),
    _einsum_channels,
    _sums,
    flat=True,
    summed=_einsum_summed,
  ),
  nnx.ConvTranspose: Contraction(
    "conv_transpose",
    _window_rank,
    lambda m: (_window_rank(m) - (2 if m.transpose_kernel else 1),),
    _transposed_macs,
    summed=_window_summed,
  ),
  nnx.Embed: Contraction(
    "embed",
    lambda m: 2,
    lambda m: (0,),
    _sums,
    kernel="embedding",
    flat=True,
    methods=("__call__", "attend"),
    lookups=("__call__",),
  ),
  nnx.LoRALinear: Contraction("lora", lambda m: 2, lambda m: (1,), _sums),
  OwnEinsum: Contraction(
    "einsum",
    lambda m: len(kernel_axes(m)),
    _einsum_channels,
    _sums,
    flat=True,
    summed=_einsum_summed,
  ),
}


def base_of(layer: Any) -> type | None:
  """The Flax layer type that a layer computes as, if it is one of the table.

  That is its own, or one that it inherits all of its computation from; a
  quantized layer says so itself.
  """
  if (declared := getattr(type(layer), "computes_as", None)) is not None:
    return declared
  base = next((t for t in type(layer).__mro__ if t in CONTRACTIONS), None)
  if base is None:
    return OwnEinsum if is_own_einsum(layer) else None
  return None if _reason(layer, base) else base


def contraction_of(layer: Any) -> Contraction:
  """The entry of a layer whose `base_of` is not None."""
  base: Any = base_of(layer)
  if base is OwnEinsum:
    name = getattr(layer, "kernel_name", None) or own_kernel(layer)
    return CONTRACTIONS[base]._replace(kernel=name)
  return CONTRACTIONS[base]


def why_not(layer: Any) -> str | None:
  """Why a layer is none of the table, if it is close to one of them."""
  base = next((t for t in type(layer).__mro__ if t in CONTRACTIONS), None)
  return None if base is None else _reason(layer, base)


def _reason(layer, base):
  for method in (*CONTRACTIONS[base].methods, "promote_dtype"):
    own = getattr(type(layer), method, None)
    if own is not getattr(base, method, None):
      return f"overrides {method}"
  if base is nnx.Einsum:
    if not layer.einsum_str:
      return "is given its einsum_str when it is called"
    if "." in kernel_axes(layer):
      return "has an ellipsis among the axes of its kernel"
  return None

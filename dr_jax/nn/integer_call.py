"""One call of a quantized layer in integers.

The Flax layer does what it always does (batch axes, padding modes, strides,
groups); it sees a `TrainedCall` or `StoredCall` in its place, whose operands
are codes and whose convolution or product is a backend's.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dr_jax.nn.backends import Convolution
from dr_jax.quant import straight_through


class Accumulators(NamedTuple):
  """A layer's output before its rescale: y = acc * scale + bias.

  Attributes:
    acc: integers [..., c_out], int32 or float32.
    scale: float32 [c_out], or [1].
    bias: float32 [c_out], or None.
  """

  acc: jax.Array
  scale: jax.Array
  bias: jax.Array | None

  def values(self) -> jax.Array:
    """y: one factor and one term for each channel."""
    shape = (1,) * (self.acc.ndim - 1) + (-1,)
    y = self.acc.astype(self.scale.dtype) * self.scale.reshape(shape)
    return y if self.bias is None else y + self.bias.reshape(shape)

  def normalized(self, gain: jax.Array, offset: jax.Array) -> Accumulators:
    """Those of y * gain + offset, both [c_out]."""
    if self.bias is not None:
      offset = self.bias * gain + offset
    return Accumulators(self.acc, self.scale * gain, offset)


# Outputs that are still alive, and what they were computed from.
_OUTPUTS: dict[int, tuple[weakref.ref, Accumulators]] = {}


def accumulators_of(y: Any) -> Accumulators | None:
  """What an array was rescaled from, if a layer has just returned it.

  A folded norm that is called on the very output of a layer has its factors
  merged into the layer's; the output itself is then computed by nobody.
  """
  found = _OUTPUTS.get(id(y))
  return found[1] if found is not None and found[0]() is y else None


def _remember(y, accumulators):
  key = id(y)
  forget = weakref.ref(y, lambda _: _OUTPUTS.pop(key, None))
  _OUTPUTS[key] = (forget, accumulators)


class NoKernel:
  """A kernel that is not there: codes take its place."""

  def __getitem__(self, _: Any) -> None:
    return None


class LayerCall:
  """A layer as its Flax class sees it during one call, without a kernel."""

  kernel: Any = NoKernel()

  def __init__(self, layer: Any):
    self.layer = layer

  def __getattr__(self, name: str) -> Any:
    return getattr(self.layer, name)


class StoredCall(LayerCall):
  """A call of a layer of stored codes, in integers."""

  # The bias is a part of the rescale, and codes are masked already.
  use_bias, bias, mask = False, None, None

  def promote_dtype(self, arrays: Any, /, dtype: Any = None) -> Any:
    inputs, kernel, _ = arrays
    x, w = self.operands = self.layer.integer_operands(inputs, kernel)
    # For the dtype of the result alone.
    like = inputs, w.scale.astype(self.layer.param_dtype), self.float_bias
    self.like, *_ = self.layer.promote(like, dtype=dtype)
    return x.codes, w.codes, None

  def conv_general_dilated(
    self, x: jax.Array, w: jax.Array, strides: Any, padding: Any, **options: Any
  ) -> jax.Array:
    dilation = tuple(options["rhs_dilation"])
    if isinstance(padding, str):
      sizes = zip(w.shape[:-2], dilation, strict=True)
      window = [(size - 1) * step + 1 for size, step in sizes]
      padding = lax.padtype_to_pads(x.shape[1:-1], window, strides, padding)
    convolution = Convolution(
      strides=tuple(strides),
      padding=tuple(map(tuple, padding)),
      lhs_dilation=tuple(options["lhs_dilation"]),
      rhs_dilation=dilation,
      groups=options["feature_group_count"],
      chunks=self.layer.chunks,
    )
    acc = self.layer.backend.convolve(x, w, convolution)
    return self.rescaled(acc, self.operands[0].scale)

  def dot_general(
    self, x: jax.Array, w: jax.Array, dimension_numbers: Any, **options: Any
  ) -> jax.Array:
    del options
    (axes, _), _ = dimension_numbers
    features = [x.shape[axis] for axis in axes]
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    x = x.reshape(*x.shape[: -len(axes)], math.prod(features))
    scale = self.operands[0].scale
    if scale.ndim:  # One along these axes.
      scale = scale.reshape(*x.shape[:-1], 1)
    acc = self.layer.backend.multiply(x, w, self.layer.chunks)
    y = self.rescaled(acc, scale)
    outputs = self.layer.columns.ordered[len(axes) :]
    return y if len(outputs) == 1 else y.reshape(*y.shape[:-1], *outputs)

  @property
  def float_bias(self) -> jax.Array | None:
    return self.layer.bias[...] if self.layer.use_bias else None

  def rescaled(self, acc: jax.Array, scale: jax.Array) -> jax.Array:
    """Values of accumulators; `scale` is that of the inputs, as `acc` has it.

    A factor for each row becomes part of the accumulators.
    """
    weight_scale, bias = self.operands[1].scale.reshape(-1), self.float_bias
    bias = None if bias is None else bias.reshape(-1).astype(weight_scale.dtype)
    if scale.ndim:
      acc = acc.astype(scale.dtype) * scale
      accumulators = Accumulators(acc, weight_scale, bias)
    else:
      accumulators = Accumulators(acc, scale * weight_scale, bias)
    y = accumulators.values().astype(self.like.dtype)
    _remember(y, accumulators)
    return y


class TrainedCall(StoredCall):
  """A layer in training: values from integers, gradients of the float layer."""

  def __init__(self, layer: Any):
    super().__init__(layer)
    self.kernel, self.mask = layer.kernel, getattr(layer, "mask", None)

  def promote_dtype(self, arrays: Any, /, dtype: Any = None) -> Any:
    inputs, kernel, _ = arrays
    floats = inputs, kernel, self.float_bias
    self.floats = self.layer.promote_dtype(floats, dtype=dtype)
    return super().promote_dtype(arrays, dtype=dtype)

  def conv_general_dilated(
    self, x: jax.Array, w: jax.Array, *args: Any, **options: Any
  ) -> jax.Array:
    y = super().conv_general_dilated(x, w, *args, **options)
    return self._differentiable(y, "conv_general_dilated", args, options)

  def dot_general(
    self, x: jax.Array, w: jax.Array, *args: Any, **options: Any
  ) -> jax.Array:
    y = super().dot_general(x, w, *args, **options)
    return self._differentiable(y, "dot_general", args, options)

  def rescaled(self, acc: jax.Array, scale: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(super().rescaled(acc, scale))

  def _differentiable(self, y, contraction, args, options):
    """y with the gradient of the float layer, whose value nobody computes."""
    x, w, bias = self.floats
    # An nnx.LinearGeneral may have none of its own.
    contract = getattr(self.layer, contraction) or getattr(lax, contraction)
    surrogate = contract(x, w, *args, **options)
    if bias is not None:
      surrogate += bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return straight_through(surrogate, y)

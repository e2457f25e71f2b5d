"""Quantized Flax layers: the float layer, with a quantized kernel and input.

Both sides are quantized in the `promote_dtype` hook that every Flax layer
calls on (inputs, kernel, bias) right before its convolution or product. So a
quantized layer *is* the float layer: strides, padding, dilation, groups, dtype
and parameter names are untouched, and whatever Flax adds works here too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax.nn.bits import Bits, Offset, Scale, at
from dr_jax.quant import ActivationQuantizer, WeightQuantizer


class Place(NamedTuple):
  """Where a layer stands in its model, found by calibration.

  Attributes:
    name: path with slashes.
    order: position among the quantized layers, in call order.
    macs: multiply-accumulates for one example.
  """

  name: str
  order: int
  macs: int


class Encoded(nnx.Variable):
  """Stored codes and scales of a deployed layer: not trained."""


def adopt(module: nnx.Module, source: nnx.Module, *, omit=()) -> None:
  """Gives `module` the attributes of `source`, variables included."""
  for name, value in vars(source).items():
    if not name.startswith("_pytree") and name not in omit:
      setattr(module, name, value)


class Quantized:
  """What quantized layers add to a Flax layer.

  Attributes:
    bits: Bits, position in the candidate bit-widths.
    input_params: learned parameters of the input quantizer.
    weight_params: learned parameters of the weight quantizer.
    weight_quantizer, input_quantizer: static; the latter None for float input.
  """

  _omit: tuple[str, ...] = ("promote_dtype",)

  def __init__(
    self,
    layer: nnx.Module,
    place: Place,
    weight: WeightQuantizer,
    activation: ActivationQuantizer | None,
    *,
    input_params: dict[str, jax.Array],
    weight_arrays: dict[str, jax.Array],
  ):
    adopt(self, layer, omit=self._omit)
    self.name, self.order, self.macs = place
    self.bits = Bits.following(self.order)
    self.input_quantizer = activation
    self.input_params = _learned(input_params)
    self.hold(weight, weight_arrays)
    self.promote = layer.promote_dtype

  def hold(self, weight: WeightQuantizer, arrays: dict[str, jax.Array]) -> None:
    """Takes a weight quantizer and what it keeps besides the kernel."""
    self.weight_quantizer = weight
    self.weight_params = _learned(arrays)

  def promote_dtype(self, arrays, /, dtype=None):
    inputs, kernel, bias = arrays
    index = self.bits.get_value()
    inputs = self._quantize_input(inputs, index)
    params = arrays_of(self.weight_params)
    quantize = self.weight_quantizer.fake_quantize
    kernel = at(lambda i: quantize(params, kernel, i), index)
    return self.promote((inputs, kernel, bias), dtype=dtype)

  def _quantize_input(self, inputs, index):
    if self.input_quantizer is None:
      return inputs
    if not jnp.issubdtype(inputs.dtype, jnp.inexact):
      inputs = inputs.astype(self.param_dtype)
    params = arrays_of(self.input_params)
    quantize = self.input_quantizer.fake_quantize
    return at(lambda i: quantize(params, inputs, i), index)


class Conv(Quantized, nnx.Conv):
  """nnx.Conv with quantized kernel and input: any strides, groups, padding."""


class Linear(Quantized, nnx.Linear):
  """nnx.Linear with quantized kernel and input."""


class Stored(Quantized):
  """A quantized layer that holds stored codes in place of a float kernel."""

  _omit = ("kernel", "promote_dtype")

  def hold(self, weight: WeightQuantizer, arrays: dict[str, jax.Array]) -> None:
    """Takes a weight quantizer and the encoded kernel."""
    self.weight_quantizer = weight
    self.encoded = nnx.Dict({k: Encoded(v) for k, v in arrays.items()})

  @property
  def kernel(self) -> jax.Array:
    """The kernel at the bit-width in use, from the stored codes alone."""
    index = self.bits.get_value()
    encoded = arrays_of(self.encoded)
    return at(lambda i: self.weight_quantizer.decode(encoded, i), index)

  def promote_dtype(self, arrays, /, dtype=None):
    inputs, kernel, bias = arrays
    inputs = self._quantize_input(inputs, self.bits.get_value())
    kernel = kernel.astype(self.param_dtype)
    return self.promote((inputs, kernel, bias), dtype=dtype)


class StoredConv(Stored, nnx.Conv):
  """Conv that reads its kernel from stored codes."""


class StoredLinear(Stored, nnx.Linear):
  """Linear that reads its kernel from stored codes."""


QUANTIZED = {nnx.Conv: Conv, nnx.Linear: Linear}
STORED = {nnx.Conv: StoredConv, nnx.Linear: StoredLinear}


def encode(layer: Quantized) -> dict[str, jax.Array]:
  """Returns all that a deployed model stores of a layer's kernel."""
  params = arrays_of(layer.weight_params)
  return layer.weight_quantizer.encode(params, layer.kernel[...])


def initial_params(
  weight: WeightQuantizer, found: dict[str, nnx.Module]
) -> dict[str, dict[str, jax.Array]]:
  """Returns the first parameters of a weight quantizer for each layer."""
  kernels = {name: layer.kernel[...] for name, layer in found.items()}
  # One program for all layers: eagerly, each shape compiles its own.
  return jax.jit(lambda trees: {n: weight.init(w) for n, w in trees.items()})(
    kernels
  )


def check_kernels(found: dict[str, nnx.Module]) -> None:
  """Raises ValueError for the first layer with a NaN or infinite weight."""
  for name, layer in found.items():
    bad = int((~jnp.isfinite(layer.kernel[...])).sum())
    if bad:
      raise ValueError(
        f"weight of layer {name!r} must be finite, but {bad} values are NaN or "
        "infinite"
      )


def arrays_of(variables: nnx.Dict) -> dict[str, jax.Array]:
  """The plain arrays of a dict of variables."""
  return {name: variables[name][...] for name in variables}


def _learned(arrays: dict[str, Any]) -> nnx.Dict:
  """Variables of learned parameters: only "scale" has to stay positive."""
  return nnx.Dict(
    {k: (Scale if k == "scale" else Offset)(v) for k, v in arrays.items()}
  )

"""Quantized Flax layers: the float layer, with a quantized kernel and input.

Both sides are quantized in the `promote_dtype` hook that every Flax layer
calls on (inputs, kernel, bias) right before its convolution or product. So a
quantized layer *is* the float layer: strides, padding, dilation, groups, dtype
and parameter names are untouched, and whatever Flax adds works here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax.nn.bits import Bits, Offset, Scale, quantize_at
from dr_jax.quant import ActivationQuantizer, WeightQuantizer


class LayerInfo(NamedTuple):
  """What calibration found of a layer besides its input.

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


def copy_attributes(
  module: Any, source: nnx.Module, *, omit: Sequence[str] = ()
) -> None:
  """Gives `module` the attributes of `source`, including its variables."""
  for name, value in vars(source).items():
    if not name.startswith("_pytree") and name not in omit:
      setattr(module, name, value)


class Quantized:
  """What quantized layers add to a Flax layer.

  Attributes:
    name, order, macs: as in LayerInfo.
    bits: Bits, position in the candidate bit-widths.
    input_params: learned parameters of the input quantizer.
    weight_params: learned parameters of the weight quantizer.
    weight_quantizer, input_quantizer: static; the latter None for float input.
  """

  # Of the Flax layer that a subclass also is.
  kernel: Any
  param_dtype: Any

  _omit: tuple[str, ...] = ("promote_dtype",)

  def __init__(
    self,
    layer: nnx.Conv | nnx.Linear,
    info: LayerInfo,
    weight: WeightQuantizer,
    activation: ActivationQuantizer | None,
    *,
    input_params: dict[str, jax.Array],
    weight_arrays: dict[str, jax.Array],
  ):
    copy_attributes(self, layer, omit=self._omit)
    self.name, self.order, self.macs = info
    self.bits = Bits.following(self.order)
    self.input_quantizer = activation
    self.input_params = _learned(input_params)
    self.set_weight_quantizer(weight, weight_arrays)
    self.promote = layer.promote_dtype

  def set_weight_quantizer(
    self, weight: WeightQuantizer, arrays: dict[str, jax.Array]
  ) -> None:
    """Sets the weight quantizer and its parameters."""
    self.weight_quantizer = weight
    self.weight_params = _learned(arrays)

  def promote_dtype(self, arrays: Any, /, dtype: Any = None) -> Any:
    inputs, kernel, bias = arrays
    index = self.bits.get_value()
    inputs = self._quantize_input(inputs, index)
    params = arrays_of(self.weight_params)
    quantize = self.weight_quantizer.fake_quantize
    kernel = quantize_at(lambda i: quantize(params, kernel, i), index)
    return self.promote((inputs, kernel, bias), dtype=dtype)

  def _quantize_input(self, inputs, index):
    if self.input_quantizer is None:
      return inputs
    if not jnp.issubdtype(inputs.dtype, jnp.inexact):
      inputs = inputs.astype(self.param_dtype)
    params = arrays_of(self.input_params)
    quantize = self.input_quantizer.fake_quantize
    return quantize_at(lambda i: quantize(params, inputs, i), index)


# pyrefly: ignore[inconsistent-inheritance]
class Conv(Quantized, nnx.Conv):
  """nnx.Conv with quantized kernel and input: any strides, groups, padding."""


# pyrefly: ignore[inconsistent-inheritance]
class Linear(Quantized, nnx.Linear):
  """nnx.Linear with quantized kernel and input."""


class Stored(Quantized):
  """A quantized layer that holds stored codes in place of a float kernel."""

  _omit = ("kernel", "promote_dtype")
  encoded: nnx.Dict

  def set_weight_quantizer(
    self, weight: WeightQuantizer, arrays: dict[str, jax.Array]
  ) -> None:
    """Sets the weight quantizer and the encoded kernel."""
    self.weight_quantizer = weight
    self.encoded = nnx.Dict({k: Encoded(v) for k, v in arrays.items()})

  @property
  def kernel(self) -> jax.Array:  # pyrefly: ignore[bad-override]
    """The kernel at the bit-width in use, from the stored codes alone."""
    index = self.bits.get_value()
    encoded = arrays_of(self.encoded)
    return quantize_at(
      lambda i: self.weight_quantizer.decode(encoded, i), index
    )

  def promote_dtype(self, arrays: Any, /, dtype: Any = None) -> Any:
    inputs, kernel, bias = arrays
    inputs = self._quantize_input(inputs, self.bits.get_value())
    kernel = kernel.astype(self.param_dtype)
    return self.promote((inputs, kernel, bias), dtype=dtype)


# pyrefly: ignore[inconsistent-inheritance]
class StoredConv(Stored, nnx.Conv):
  """Conv that reads its kernel from stored codes."""


# pyrefly: ignore[inconsistent-inheritance]
class StoredLinear(Stored, nnx.Linear):
  """Linear that reads its kernel from stored codes."""


QUANTIZED: dict[type, Any] = {nnx.Conv: Conv, nnx.Linear: Linear}
STORED: dict[type, Any] = {nnx.Conv: StoredConv, nnx.Linear: StoredLinear}


def quantized_layers(model: nnx.Module) -> dict[str, Quantized]:
  """Returns the quantized layers of a model by name, in call order."""
  modules = [node for _, node in nnx.iter_modules(model)]
  found = [m for m in modules if isinstance(m, Quantized)]
  return {m.name: m for m in sorted(found, key=lambda m: m.order)}


def candidates(model: nnx.Module) -> tuple[int, ...]:
  """Returns the candidate bit-widths of a quantized model, highest first.

  Raises:
    ValueError: if the model has no quantized layer.
  """
  for layer in quantized_layers(model).values():
    return layer.weight_quantizer.bits
  raise ValueError("model must have a quantized layer; call nn.quantize first")


def encode(layer: Quantized) -> dict[str, jax.Array]:
  """Returns what a deployed model stores of a layer's kernel."""
  params = arrays_of(layer.weight_params)
  return layer.weight_quantizer.encode(params, layer.kernel[...])


def initial_params(
  weight: WeightQuantizer, found: Mapping[str, Any]
) -> dict[str, dict[str, jax.Array]]:
  """Returns the initial parameters of a weight quantizer for each layer."""
  kernels = {name: layer.kernel[...] for name, layer in found.items()}
  # One program for all layers: eagerly, each shape compiles its own.
  return jax.jit(lambda trees: {n: weight.init(w) for n, w in trees.items()})(
    kernels
  )


def check_kernels(found: Mapping[str, Any]) -> None:
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

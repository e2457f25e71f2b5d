"""Quantized Flax layers: the float layer, with a quantized kernel and input.

Both sides are quantized in the `promote_dtype` hook that every Flax layer
calls on (inputs, kernel, bias) right before its convolution or product. So a
quantized layer *is* the float layer: strides, padding, dilation, groups, dtype
and parameter names are untouched, and whatever Flax adds works here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax.nn.backends import Backend, Planes
from dr_jax.nn.bits import Bits, Offset, Scale, is_mixture, quantize_at
from dr_jax.nn.contraction import StoredCall, TrainedCall
from dr_jax.nn.plane_call import PlaneCall, with_codes, with_planes
from dr_jax.nn.substitute import copy_attributes
from dr_jax.quant import (
  ActivationQuantizer,
  Integers,
  WeightQuantizer,
  fit,
)


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


class Quantized:
  """What quantized layers add to a Flax layer.

  Attributes:
    name, order, macs: as in LayerInfo.
    bits: Bits, position in the candidate bit-widths.
    input_params: learned parameters of the input quantizer.
    weight_params: learned parameters of the weight quantizer.
    weight_quantizer, input_quantizer: static; the latter None for float input.
    backend: how it computes, static; None in floats.
    chunks: parts of a sum that a backend in floats needs to be exact.
  """

  # Of the Flax layer that a subclass also is.
  kernel: Any
  param_dtype: Any

  _omit: tuple[str, ...] = ("promote_dtype",)
  # What its Flax class sees during a call, for each type of backend.
  _calls: Any = MappingProxyType({Backend: TrainedCall})
  backend: Backend | Planes | None = None
  chunks: int = 1

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

  def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    flax_call: Any = super().__call__  # pyrefly: ignore[missing-attribute]
    if self.backend is None or is_mixture(self.bits.get_value()):
      return flax_call(inputs, *args, **kwargs)
    seen = self._calls[type(self.backend)](self)
    return flax_call.__func__(seen, inputs, *args, **kwargs)

  def set_backend(self, backend: Backend | Planes | None, chunks: int) -> None:
    """Sets how it computes; `nn.set_backend` checks that it can."""
    self.backend, self.chunks = backend, chunks

  def integer_operands(
    self, inputs: Any, kernel: Any
  ) -> tuple[Integers, Integers]:
    """Inputs and kernel as integers, at the bit-width in use."""
    index = self.bits.get_value()
    quantizer: Any = self.input_quantizer
    params = arrays_of(self.input_params)
    x = quantizer.integers(params, self._floating(inputs), index)
    return x, self._kernel_integers(kernel, index)

  def _kernel_integers(self, kernel, index):
    quantizer: Any = self.weight_quantizer
    return quantizer.integers(encode(self, kernel), index)

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
    inputs = self._floating(inputs)
    params = arrays_of(self.input_params)
    quantize = self.input_quantizer.fake_quantize
    return quantize_at(lambda i: quantize(params, inputs, i), index)

  def _floating(self, inputs):
    if jnp.issubdtype(inputs.dtype, jnp.inexact):
      return inputs
    return inputs.astype(self.param_dtype)


# pyrefly: ignore[inconsistent-inheritance]
class Conv(Quantized, nnx.Conv):
  """nnx.Conv with quantized kernel and input: any strides, groups, padding."""


# pyrefly: ignore[inconsistent-inheritance]
class Linear(Quantized, nnx.Linear):
  """nnx.Linear with quantized kernel and input."""


class Stored(Quantized):
  """A quantized layer that holds stored codes in place of a float kernel.

  Attributes:
    encoded: what its method stores; planes in place of codes for a backend that
      reads planes.
    first: position of the highest bit-width that its codes serve: above 0 where
      their lower bit-planes were not read. Before it, the kernel is NaN, or an
      error where the index is a Python int.
  """

  _omit = ("kernel", "mask", "promote_dtype")
  _calls = MappingProxyType({Backend: StoredCall, Planes: PlaneCall})
  encoded: dict[str, Encoded]
  first: int = 0

  def set_weight_quantizer(
    self, weight: WeightQuantizer, arrays: dict[str, jax.Array]
  ) -> None:
    """Sets the weight quantizer and encoded kernel; it computes in floats."""
    self.weight_quantizer, self.backend = weight, None
    self._store(arrays)

  def set_backend(self, backend: Backend | Planes | None, chunks: int) -> None:
    super().set_backend(backend, chunks)
    as_planes = isinstance(backend, Planes)
    if as_planes != ("planes" in self.encoded):
      arrays = self.arrays()
      weight = self.weight_quantizer
      self._store(
        with_planes(arrays, weight, self.first) if as_planes else arrays
      )

  def arrays(self) -> dict[str, jax.Array]:
    """What its method stores, whatever its backend reads."""
    arrays = arrays_of(self.encoded)
    if "planes" not in arrays:
      return arrays
    features: Any = self.in_features  # pyrefly: ignore[missing-attribute]
    return with_codes(arrays, self.weight_quantizer, features)

  def _store(self, arrays):
    self.encoded = nnx.data({k: Encoded(v) for k, v in arrays.items()})

  @property
  def kernel(self) -> jax.Array:  # pyrefly: ignore[bad-override]
    """The kernel at the bit-width in use, from the stored codes alone."""
    index = self.bits.get_value()
    return quantize_at(self._decode, index)

  def _decode(self, index):
    kernel = self.weight_quantizer.decode(self.arrays(), index)
    return self.if_held(kernel, index)

  def if_held(self, values, index):
    """The values; NaN or an error where the codes do not serve them."""
    if isinstance(index, int):
      self.check_held(index)
    elif self.first:
      return jnp.where(index < self.first, jnp.nan, values)
    return values

  def check_held(self, index: int) -> None:
    """Raises ValueError if its codes do not serve a position."""
    if index < self.first:
      bits = self.weight_quantizer.bits
      raise ValueError(
        f"bits of {self.name} must be at most {bits[self.first]}, for which "
        f"its codes were read, got {bits[index]}; read more with "
        "artifact.upgrade"
      )

  def promote_dtype(self, arrays: Any, /, dtype: Any = None) -> Any:
    inputs, kernel, bias = arrays
    inputs = self._quantize_input(inputs, self.bits.get_value())
    kernel = kernel.astype(self.param_dtype)
    return self.promote((inputs, kernel, bias), dtype=dtype)

  def _kernel_integers(self, kernel, index):
    quantizer: Any = self.weight_quantizer
    codes, scale = quantizer.integers(self.arrays(), index)
    return Integers(codes, self.if_held(scale, index))


# pyrefly: ignore[inconsistent-inheritance]
class StoredConv(Stored, nnx.Conv):
  """Conv that reads its kernel from stored codes, which are masked already."""

  mask = None


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


def encode(layer: Quantized, kernel: jax.Array) -> dict[str, jax.Array]:
  """Returns what a deployed model stores of a kernel (`computed_kernels`)."""
  return layer.weight_quantizer.encode(arrays_of(layer.weight_params), kernel)


def initial_params(
  weight: WeightQuantizer,
  kernels: Mapping[str, jax.Array],
  init: str = "published",
) -> dict[str, dict[str, jax.Array]]:
  """Returns the initial parameters of a weight quantizer for each kernel."""

  # One program for all layers: eagerly, each shape compiles its own.
  @jax.jit
  def fitted(kernels):
    return {name: fit(weight, w, init) for name, w in kernels.items()}

  return fitted(kernels)


def arrays_of(variables: Mapping[str, nnx.Variable]) -> dict[str, jax.Array]:
  """The plain arrays of a dict of variables."""
  return {name: variable[...] for name, variable in variables.items()}


def _learned(arrays: dict[str, Any]) -> dict[str, Any]:
  """Variables of learned parameters: only "scale" has to stay positive."""
  # A plain dict: Flax gives an nnx.Dict entries of its own (nnx.capture).
  return nnx.data(
    {k: (Scale if k == "scale" else Offset)(v) for k, v in arrays.items()}
  )

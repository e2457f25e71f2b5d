"""What all quantized layers are, and those that a network has.

Both sides are quantized in the `promote_dtype` hook that every Flax layer
calls on (inputs, kernel, bias) right before its convolution or product. So a
quantized layer *is* the float layer: strides, padding, dilation, groups, dtype
and parameter names are untouched, and whatever Flax adds works here too.
"""

from __future__ import annotations

import functools
import math
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax.nn.backends import Backend, Planes
from dr_jax.nn.bits import (
  Bits,
  arrays_of,
  is_mixture,
  quantize_at,
  variables_of,
)
from dr_jax.nn.contraction import contraction_of
from dr_jax.nn.integer_call import TrainedCall
from dr_jax.nn.partitioning import annotate, columns_spec, spec_of
from dr_jax.nn.recomputed import recomputed
from dr_jax.nn.substitute import copy_attributes
from dr_jax.quant import ActivationQuantizer, Integers, WeightQuantizer


class LayerInfo(NamedTuple):
  """What calibration found of a layer besides its input.

  Attributes:
    name: path with slashes.
    order: position among the quantized layers, in call order.
    macs: multiply-accumulates for one example.
    stack: axes of its bits, where it stands for several layers and their bits
      are passed to each.
    shared: whether those layers must have the same bits.
  """

  name: str
  order: int
  macs: int
  stack: tuple[int, ...] = ()
  shared: bool = False


class Quantized:
  """What quantized layers add to a Flax layer.

  Attributes:
    computes_as: the Flax layer type that it computes as, one of `CONTRACTIONS`.
    columns: how its kernel becomes what its method quantizes.
    stack: leading axes of its parameters, where it stands for several layers.
    spec: axes of a mesh for those and the columns, if its kernel is annotated.
    name, order, macs, shared: as in LayerInfo.
    bits: Bits, position in the candidate bit-widths.
    input_params: learned parameters of the input quantizer.
    weight_params: learned parameters of the weight quantizer.
    weight_quantizer, input_quantizer: static; the latter None for float input.
    backend: how it computes, static; None in floats.
    chunks: parts of a sum that a backend in floats needs to be exact.
  """

  computes_as: type
  # Of the Flax layer that a subclass also is.
  param_dtype: Any

  _omit: tuple[str, ...] = ("promote_dtype",)
  # What its Flax class sees during a call, for each type of backend.
  _calls: Any = MappingProxyType({Backend: TrainedCall})
  backend: Backend | Planes | None = None
  chunks: int = 1

  def __init__(
    self,
    layer: nnx.Module,
    info: LayerInfo,
    weight: WeightQuantizer,
    activation: ActivationQuantizer | None,
    *,
    input_params: dict[str, jax.Array],
    weight_arrays: dict[str, jax.Array],
  ):
    copy_attributes(self, layer, omit=self._omit)
    contraction = contraction_of(layer)
    self.columns = contraction.columns(layer)
    self.stack = contraction.stack(layer)
    self.spec = columns_spec(
      spec_of(getattr(layer, contraction.kernel)), self.columns, len(self.stack)
    )
    self.name, self.order, self.macs, axes, self.shared = info
    self.bits = Bits.following(self.order, axes)
    self.input_quantizer = activation
    self.input_params = variables_of(input_params)
    self.set_weight_quantizer(weight, weight_arrays)
    self.promote: Any = getattr(layer, "promote_dtype", None)

  def set_weight_quantizer(
    self, weight: WeightQuantizer, arrays: dict[str, jax.Array]
  ) -> None:
    """Sets the weight quantizer and its parameters."""
    self.weight_quantizer = weight
    self.weight_params = variables_of(arrays)
    self._annotate(self.weight_params)

  def _annotate(self, variables):
    for variable in variables.values():
      annotate(variable, self.spec, (*self.stack, *self.columns.shape))

  @property
  def index(self) -> int | jax.Array:
    """Position of the bits in use, or weights of a mixture."""
    return self.bits.get_value()

  @property
  def numbers(self) -> np.ndarray:
    """Its number among the quantized layers; of a stack those of all."""
    count = math.prod(self.stack)
    return np.arange(self.order, self.order + count).reshape(self.stack)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    flax_call: Any = super().__call__  # pyrefly: ignore[missing-attribute]
    if self.backend is None or is_mixture(self.index):
      if self._recomputes(*args):
        call = functools.partial(flax_call.__func__, **kwargs)
        return recomputed(call, self, *args)
      return flax_call(*args, **kwargs)
    seen = self._calls[type(self.backend)](self)
    return flax_call.__func__(seen, *args, **kwargs)

  def _recomputes(self, x=None, *others):
    """Whether a call has one input, which is quantized at one bit-width."""
    return (
      self.input_quantizer is not None
      and not is_mixture(self.index)
      and isinstance(x, jax.Array)
      and jnp.issubdtype(x.dtype, jnp.inexact)
      and not others
    )

  def index_at(self, position: tuple[int, ...]) -> int:
    """The bits of one of its stack, as a position in the candidates."""
    index = np.asarray(self.bits.get_value())
    return int(index[position if self.bits.stack else ()])

  def set_backend(self, backend: Backend | Planes | None, chunks: int) -> None:
    """Sets how it computes; `nn.set_backend` checks that it can."""
    self.backend, self.chunks = backend, chunks

  def integer_operands(
    self, inputs: Any, kernel: Any
  ) -> tuple[Integers, Integers]:
    """Inputs and kernel as integers, at the bit-width in use."""
    index = self.index
    quantizer: Any = self.input_quantizer
    params = arrays_of(self.input_params)
    x = self._by_rows(
      lambda x: quantizer.integers(params, x, index), self._floating(inputs)
    )
    return x, self._kernel_integers(kernel, index)

  def _kernel_integers(self, kernel, index):
    quantizer: Any = self.weight_quantizer
    params = arrays_of(self.weight_params)
    columns = self.columns.of(kernel)
    return quantizer.integers(quantizer.encode(params, columns), index)

  def promote_dtype(self, arrays: Any, /, **options: Any) -> Any:
    inputs, kernel, bias = arrays
    inputs = self._quantize_input(inputs, self.index)
    kernel = self._quantize_kernel(kernel)
    return self.promote((inputs, kernel, bias), **options)

  def _quantize_kernel(self, kernel):
    columns = self.columns.of(kernel)
    params = arrays_of(self.weight_params)
    quantize = self.weight_quantizer.fake_quantize
    values = quantize_at(lambda i: quantize(params, columns, i), self.index)
    return self.columns.back(values)

  def _quantize_input(self, inputs, index):
    if self.input_quantizer is None:
      return inputs
    inputs = self._floating(inputs)
    params = arrays_of(self.input_params)
    quantize = self.input_quantizer.fake_quantize
    return self._by_rows(
      lambda x: quantize_at(lambda i: quantize(params, x, i), index), inputs
    )

  def _by_rows(self, quantize, inputs):
    """Quantizes inputs with what a sum runs over as their last axis."""
    if self.input_quantizer is None or not self.input_quantizer.dynamic:
      return quantize(inputs)
    axes = contraction_of(self).summed(self, inputs.ndim)
    rest = tuple(a for a in range(inputs.ndim) if a not in axes)
    moved = inputs.transpose(*rest, *axes)
    inner = moved.shape[len(rest) :]
    back = np.argsort((*rest, *axes))

    def of_inputs(y):
      shape = inner if y.shape[-1] == math.prod(inner) else (1,) * len(inner)
      return y.reshape(*y.shape[:-1], *shape).transpose(*back)

    rows = moved.reshape(*moved.shape[: len(rest)], math.prod(inner))
    return jax.tree.map(of_inputs, quantize(rows))

  def _floating(self, inputs):
    if jnp.issubdtype(inputs.dtype, jnp.inexact):
      return inputs
    return inputs.astype(self.param_dtype)


def quantized_layers(model: nnx.Module) -> dict[str, Quantized]:
  """Returns the quantized layers of a model by name, in call order.

  A stack of layers is one of them; see `layer_rows`.
  """
  modules = [node for _, node in nnx.iter_modules(model)]
  found = [m for m in modules if isinstance(m, Quantized)]
  return {m.name: m for m in sorted(found, key=lambda m: m.order)}


class Row(NamedTuple):
  """One layer: a quantized layer, or one of a stack of them.

  Attributes:
    name: path of the layer, of one of a stack with its position at the end.
    layer: the quantized layer.
    position: in the stack; () of a layer that stands for itself.
  """

  name: str
  layer: Quantized
  position: tuple[int, ...]


def layer_rows(model: nnx.Module) -> list[Row]:
  """Returns the quantized layers, those of a stack one by one, by number."""
  return [
    Row("/".join([name, *map(str, position)]), layer, position)
    for name, layer in quantized_layers(model).items()
    for position in np.ndindex(*layer.stack)
  ]


def candidates(model: nnx.Module) -> tuple[int, ...]:
  """Returns the candidate bit-widths of a quantized model, highest first.

  Raises:
    ValueError: if the model has no quantized layer.
  """
  for layer in quantized_layers(model).values():
    return layer.weight_quantizer.bits
  raise ValueError("model must have a quantized layer; call nn.quantize first")

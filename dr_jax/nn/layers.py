"""Every Flax layer type with quantized kernel and input; see `Quantized`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from dr_jax.nn import own_einsum
from dr_jax.nn.bits import arrays_of
from dr_jax.nn.contraction import base_of
from dr_jax.nn.quantized import Quantized
from dr_jax.quant import WeightQuantizer, fit


# pyrefly: ignore[inconsistent-inheritance]
class Conv(Quantized, nnx.Conv):
  """nnx.Conv with quantized kernel and input: any strides, groups, padding."""

  computes_as = nnx.Conv


# pyrefly: ignore[inconsistent-inheritance]
class Linear(Quantized, nnx.Linear):
  """nnx.Linear with quantized kernel and input."""

  computes_as = nnx.Linear


# pyrefly: ignore[inconsistent-inheritance]
class LinearGeneral(Quantized, nnx.LinearGeneral):
  """nnx.LinearGeneral with quantized kernel and input.

  A channel is one output feature, of each batch axis its own.
  """

  computes_as = nnx.LinearGeneral


# pyrefly: ignore[inconsistent-inheritance]
class Einsum(Quantized, nnx.Einsum):
  """nnx.Einsum with quantized kernel and input.

  A channel is one entry of the kernel axes that the output has.
  """

  computes_as = nnx.Einsum


# pyrefly: ignore[inconsistent-inheritance]
class ConvTranspose(Quantized, nnx.ConvTranspose):
  """nnx.ConvTranspose with quantized kernel and input."""

  computes_as = nnx.ConvTranspose


# pyrefly: ignore[inconsistent-inheritance]
class LoRALinear(Quantized, nnx.LoRALinear):
  """nnx.LoRALinear whose base is quantized; its adapters stay float."""

  computes_as = nnx.LoRALinear


# pyrefly: ignore[inconsistent-inheritance]
class Embed(Quantized, nnx.Embed):
  """nnx.Embed with quantized rows: of a method per channel, a scale per row.

  A lookup and `attend` read the same codes: the sums of `attend` run over the
  features of a row, so that its scale is that of an output channel. `attend`
  also quantizes the query.
  """

  computes_as = nnx.Embed

  # pyrefly: ignore[bad-override-mutable-attribute]
  def promote_dtype(self, arrays: Any, /, **options: Any) -> Any:
    *query, embedding = arrays
    index = self.index
    query = [self._quantize_input(x, index) for x in query]
    return self.promote((*query, self._quantize_kernel(embedding)), **options)


# pyrefly: ignore[inconsistent-inheritance]
class OwnEinsum(Quantized, own_einsum.OwnEinsum):
  """An einsum layer of another package, with quantized kernel and input."""

  computes_as = own_einsum.OwnEinsum

  def __init__(self, layer: nnx.Module, *args: Any, **options: Any):
    self.kernel_name = own_einsum.own_kernel(layer)
    self.param_dtype = getattr(layer, self.kernel_name)[...].dtype
    super().__init__(layer, *args, **options)

  def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
    x = self._quantize_input(x, self.index)
    kernel = self._quantize_kernel(self._own_kernel())
    seen = own_einsum.with_kernel(self, self.kernel_name, kernel)
    # pyrefly: ignore[missing-attribute]
    own_call: Any = super(own_einsum.OwnEinsum, self).__call__
    return own_call.__func__(seen, x, *args, **kwargs)

  def _own_kernel(self):
    return getattr(self, self.kernel_name)[...]


_QUANTIZED: dict[type, Any] = {
  kind.computes_as: kind
  for kind in (
    Conv,
    Linear,
    LinearGeneral,
    Einsum,
    ConvTranspose,
    LoRALinear,
    Embed,
    OwnEinsum,
  )
}


def quantized_class(layer: nnx.Module) -> Any:
  """The quantized class of a float layer whose `base_of` is not None."""
  return class_for(type(layer), _QUANTIZED[base_of(layer)])  # pyrefly: ignore


@functools.cache
def class_for(kind: type, known: Any) -> Any:
  """A class of ours for a Flax layer type, or for a subclass of it."""
  if kind is known.computes_as:
    return known
  return type(kind.__name__, (known, kind), {})


def encode(layer: Quantized, columns: jax.Array) -> dict[str, jax.Array]:
  """Returns what a deployed model stores of a kernel (`computed_kernels`).

  Of a stack of layers, its axes come first in every array.
  """
  encoded = layer.weight_quantizer.encode
  for _ in layer.stack:
    encoded = jax.vmap(encoded)
  return encoded(arrays_of(layer.weight_params), columns)


def initial_params(
  weights: Mapping[str, WeightQuantizer],
  kernels: Mapping[str, jax.Array],
  init: str = "published",
  *,
  stacks: Mapping[str, tuple[int, ...]],
) -> dict[str, dict[str, jax.Array]]:
  """Returns the initial parameters of the weight quantizer of each kernel.

  Args:
    weights: quantizer of every layer.
    kernels: likewise, from `computed_kernels`.
    init: where they start; see `quant.fit`.
    stacks: leading axes of those that are stacked; each layer starts alone.
  """
  return {
    name: _initial_params(weights[name], w, init, len(stacks[name]))
    for name, w in kernels.items()
  }


# Layers of one shape share a program.
@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _initial_params(weight, w, init, stack_axes):
  start = functools.partial(fit, weight, init=init)
  for _ in range(stack_axes):
    start = jax.vmap(start)
  return start(w)

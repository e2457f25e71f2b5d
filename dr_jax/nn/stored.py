"""Layers of a deployed network: stored codes in place of a float kernel."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax.nn.backends import Backend, Planes
from dr_jax.nn.bits import arrays_of, is_mixture, quantize_at
from dr_jax.nn.contraction import base_of
from dr_jax.nn.integer_call import StoredCall
from dr_jax.nn.layers import (
  Conv,
  ConvTranspose,
  Einsum,
  Embed,
  Linear,
  LinearGeneral,
  LoRALinear,
  OwnEinsum,
  class_for,
)
from dr_jax.nn.own_einsum import own_kernel
from dr_jax.nn.plane_call import PlaneCall, with_codes, with_planes
from dr_jax.nn.quantized import Quantized, quantized_layers
from dr_jax.quant import Integers, WeightQuantizer


class Encoded(nnx.Param):
  """Stored codes and scales of a deployed layer: not trained.

  A parameter, since they take the place of one: transformations that slice or
  share the parameters of layers do the same with them.
  """


class Stored(Quantized):
  """A quantized layer that holds stored codes in place of a float kernel.

  Attributes:
    encoded: what its method stores; planes in place of codes for a backend that
      reads planes.
    first: position of the highest bit-width that its codes serve (of a stack,
      all of them): above 0 where their lower bit-planes were not read. Before
      it, the kernel is NaN, or an error where the index is a Python int.
    place: number in the stack, where it stands for one.
  """

  _omit = ("kernel", "embedding", "mask", "promote_dtype")
  _calls = MappingProxyType({Backend: StoredCall, Planes: PlaneCall})
  # Codes are masked already.
  mask = None
  encoded: dict[str, Encoded]
  first: int = 0
  place: Encoded | None = None

  @property
  def index(self) -> int | jax.Array:
    """Position of the bits in use, or weights of a mixture.

    A transformation that slices parameters alone passes the bits of the whole
    stack; `place` then says which are those of the layer.
    """
    index = self.bits.get_value()
    if not self.stack or jnp.ndim(index) == is_mixture(index):
      return index
    place: Any = self.place
    return index.reshape(-1, *index.shape[len(self.stack) :])[place[...]]

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
    return with_codes(arrays, self.weight_quantizer, self.columns.shape[0])

  def _store(self, arrays):
    self.encoded = nnx.data({k: Encoded(v) for k, v in arrays.items()})
    self._annotate(self.encoded)

  @property
  def kernel(self) -> jax.Array:
    """The kernel at the bits in use, from the stored codes alone."""
    index = self.index
    decode = self._decode
    for _ in range(jnp.ndim(index) - is_mixture(index)):  # of a whole stack
      decode = jax.vmap(decode)
    return decode(self.arrays(), index)

  embedding = kernel

  def _decode(self, arrays, index):
    decode = self.weight_quantizer.decode
    columns = quantize_at(lambda i: self.if_held(decode(arrays, i), i), index)
    return self.columns.back(columns)

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

  def _quantize_kernel(self, kernel):
    return kernel.astype(self.param_dtype)

  def _kernel_integers(self, kernel, index):
    quantizer: Any = self.weight_quantizer
    codes, scale = quantizer.integers(self.arrays(), index)
    return Integers(codes, self.if_held(scale, index))


# pyrefly: ignore
class StoredConv(Stored, Conv):
  """Conv that reads its kernel from stored codes."""


# pyrefly: ignore
class StoredLinear(Stored, Linear):
  """Linear that reads its kernel from stored codes."""


# pyrefly: ignore
class StoredLinearGeneral(Stored, LinearGeneral):
  """LinearGeneral that reads its kernel from stored codes."""


# pyrefly: ignore
class StoredEinsum(Stored, Einsum):
  """Einsum that reads its kernel from stored codes."""


# pyrefly: ignore
class StoredConvTranspose(Stored, ConvTranspose):
  """ConvTranspose that reads its kernel from stored codes."""


# pyrefly: ignore
class StoredLoRALinear(Stored, LoRALinear):
  """LoRALinear that reads its base from stored codes."""


# pyrefly: ignore
class StoredEmbed(Stored, Embed):
  """Embed that reads its rows from stored codes."""


# pyrefly: ignore
class StoredOwnEinsum(Stored, OwnEinsum):
  """OwnEinsum that reads its kernel from stored codes."""

  def __init__(self, layer: nnx.Module, *args: Any, **options: Any):
    self._omit = (*Stored._omit, own_kernel(layer))
    super().__init__(layer, *args, **options)

  def _own_kernel(self):
    return self.kernel


_STORED: dict[type, Any] = {
  kind.computes_as: kind
  for kind in (
    StoredConv,
    StoredLinear,
    StoredLinearGeneral,
    StoredEinsum,
    StoredConvTranspose,
    StoredLoRALinear,
    StoredEmbed,
    StoredOwnEinsum,
  )
}


def stored_class(layer: nnx.Module) -> Any:
  """The class that computes as a float layer does, from stored codes."""
  return class_for(type(layer), _STORED[base_of(layer)])  # pyrefly: ignore


def stored_layers(model: nnx.Module) -> dict[str, Stored]:
  """Returns the quantized layers of a deployed network by name, in call order.

  Raises:
    ValueError: if one of them has a float kernel, or stands for a stack of
      layers, which can have several bit-widths.
  """
  found: dict[str, Any] = {**quantized_layers(model)}
  for name, layer in found.items():
    if not isinstance(layer, Stored):
      raise ValueError(
        f"layer {name} must hold stored codes; pass what deploy.load returned"
      )
    if layer.stack:
      raise ValueError(
        f"layer {name} must not be a stack of layers, which only StableHLO "
        "programs of all bit-widths (bits=None) can have"
      )
  return found

"""A loaded network for one assignment alone.

What `deploy.load` returns can switch to every candidate bit-width. A program
that never switches needs neither the codes of the highest bit-width nor the
norms of the others: here each layer keeps its integers at its own bit-width,
packed, and each norm one row.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import nn, quant
from dr_jax.nn.bits import all_bits
from dr_jax.nn.layers import Stored, arrays_of, quantized_layers
from dr_jax.nn.norm import FoldedNorm


def specialize(
  network: nnx.Module, bits: int | Mapping[str, int]
) -> nnx.Module:
  """Returns a copy of a network that computes with these bits and no others.

  Its outputs are those of the network, up to one rounding of each weight where
  the method does not multiply codes by their scale.

  Args:
    network: what `deploy.load` returned; it is not changed.
    bits: one bit-width for all layers, or {layer: bits}.

  Raises:
    ValueError: if the network holds no stored codes, or `bits` are not its
      layers and candidates.
  """
  network = nnx.clone(network)
  nn.set_bits(network, bits)
  for name, layer in quantized_layers(network).items():
    if not isinstance(layer, Stored):
      raise ValueError(
        f"layer {name} must hold stored codes; pass what deploy.load returned"
      )
    index = int(layer.bits.get_value())
    layer.set_weight_quantizer(*_weight_at(layer, index))
    layer.first = 0
    layer.input_quantizer = _input_at(layer.input_quantizer, index)
  for _, module in nnx.iter_modules(network):
    if isinstance(module, FoldedNorm):
      row = slice(int(module.row), int(module.row) + 1)
      module.gain = nnx.BatchStat(module.gain[row])
      module.offset = nnx.BatchStat(module.offset[row])
      module.rows, module.held = 1, (0,)
  for _, variable in all_bits(network):
    variable.set_value(jnp.int32(0))
  return network


def _weight_at(layer, index):
  """A quantizer of one bit-width, and the arrays that it decodes."""
  whole = layer.weight_quantizer
  encoded = arrays_of(layer.encoded)
  bits = whole.bits[index]
  if whole.integers is None:
    decode = lambda arrays, _: whole.decode(arrays, index)  # noqa: E731
    return whole._replace(bits=(bits,), decode=decode), encoded
  codes, scale = whole.integers(encoded, index)
  width, signed = _width(np.asarray(codes), bits)
  shape, size = codes.shape, codes.size

  def decode(arrays: dict[str, jax.Array], _: int | jax.Array) -> jax.Array:
    codes = quant.unpack(arrays["codes"], width, size, signed=signed)
    return codes.reshape(shape).astype(arrays["scale"].dtype) * arrays["scale"]

  packed = quant.pack(codes, width, signed=signed)
  return (
    whole._replace(bits=(bits,), decode=decode, integers=None),
    {"codes": packed, "scale": scale},
  )


def _width(codes, bits):
  """Bits that hold all codes, at least `bits`, and whether they are signed.

  The integers of a method whose codes have a center take one bit more.
  """
  low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
  signed = low < 0
  needed = max(high, -low - 1).bit_length() + signed
  return max(bits, needed), signed


def _input_at(quantizer, index):
  """An input quantizer of one bit-width; its parameters stay as they are."""
  if quantizer is None:
    return None
  whole = quantizer.fake_quantize
  return quantizer._replace(
    bits=quantizer.bits[index : index + 1],
    fake_quantize=lambda params, x, _: whole(params, x, index),
  )

"""A loaded network for one assignment alone.

What `deploy.load` returns can switch to every candidate bit-width. A program
that never switches needs neither the codes of the highest bit-width nor the
norms of the others: here each layer keeps its integers at its own bit-width,
packed, and each norm one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import nn, quant
from dr_jax.nn.attention import QuantizedOperand
from dr_jax.nn.backends import Backend
from dr_jax.nn.bits import all_bits
from dr_jax.nn.norm import FoldedNorm
from dr_jax.nn.stored import stored_layers


def specialize(
  network: nnx.Module, bits: int | Mapping[str, int]
) -> nnx.Module:
  """Returns a copy of a network that computes with these bits and no others.

  Its outputs are those of the network, up to one rounding of each weight where
  the method does not multiply codes by their scale. Layers whose backend reads
  bit-planes compute in floats.

  Args:
    network: what `deploy.load` returned; it is not changed.
    bits: one bit-width for all layers, or {layer: bits}.

  Raises:
    ValueError: if the network holds no stored codes, or `bits` are not its
      layers and candidates.
  """
  network = nnx.clone(network)
  nn.set_bits(network, bits)
  layers: dict[str, Any] = {**stored_layers(network)}
  weights = _weights(layers)
  for name, layer in layers.items():
    index = int(layer.bits.get_value())
    backend, chunks = layer.backend, layer.chunks
    layer.set_weight_quantizer(*weights[name])
    layer.first = 0
    if isinstance(backend, Backend):
      layer.set_backend(backend, chunks)
    layer.input_quantizer = _input_at(layer.input_quantizer, index)
  for _, module in nnx.iter_modules(network):
    if isinstance(module, FoldedNorm):
      row = int(module.row)
      for rows in (module.gain, module.offset):
        rows.set_value(jnp.asarray(np.asarray(rows[...])[row : row + 1]))
      module.rows, module.held = 1, (0,)
    elif isinstance(module, QuantizedOperand):
      index = int(module.bits.get_value())
      quantizer: Any = _input_at(module.input_quantizer, index)
      module.input_quantizer = quantizer
  for _, variable in all_bits(network):
    variable.set_value(jnp.int32(0))
  return network


def _weights(layers):
  """{layer: (quantizer of one bit-width, arrays that it decodes)}."""
  encoded = {name: layer.arrays() for name, layer in layers.items()}
  quantizers = {name: layer.weight_quantizer for name, layer in layers.items()}
  indices = {
    name: int(layer.bits.get_value()) for name, layer in layers.items()
  }

  # One program for all layers: eagerly, each shape compiles its own.
  @jax.jit
  def integers(encoded):
    return {
      name: quantizers[name].integers(arrays, indices[name])
      for name, arrays in encoded.items()
      if quantizers[name].integers is not None
    }

  found = integers(encoded)
  widths = {
    name: _width(np.asarray(codes), quantizers[name].bits[indices[name]])
    for name, (codes, _) in found.items()
  }

  @jax.jit
  def pack(found):
    return {
      name: quant.pack(codes, widths[name][0], signed=widths[name][1])
      for name, (codes, _) in found.items()
    }

  packed = pack(found)
  weights = {}
  for name, whole in quantizers.items():
    if name in found:
      codes, scale = found[name]
      quantizer = _packed(whole, indices[name], codes.shape, *widths[name])
      weights[name] = quantizer, {"codes": packed[name], "scale": scale}
    else:
      weights[name] = _fixed(whole, indices[name]), encoded[name]
  return weights


def _packed(whole, index, shape, width, signed):
  """A quantizer of one bit-width whose codes are packed."""

  def integers(arrays, _):
    codes = quant.unpack(
      arrays["codes"], width, math.prod(shape), signed=signed
    )
    return quant.Integers(codes.reshape(shape), arrays["scale"])

  def decode(arrays, _):
    codes, scale = integers(arrays, 0)
    return codes.astype(scale.dtype) * scale

  return whole._replace(
    bits=whole.bits[index : index + 1], decode=decode, integers=integers
  )


def _fixed(whole, index):
  """A quantizer of one bit-width; it decodes what it always does."""
  return whole._replace(
    bits=whole.bits[index : index + 1],
    decode=lambda arrays, _: whole.decode(arrays, index),
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
  whole, integers = quantizer.fake_quantize, quantizer.integers
  return quantizer._replace(
    bits=quantizer.bits[index : index + 1],
    fake_quantize=lambda params, x, _: whole(params, x, index),
    integers=integers and (lambda params, x, _: integers(params, x, index)),
  )

"""The bit-width as state: one int32 per quantized layer, one or two per norm.

A `Bits` variable holds a position in the candidate bit-widths. Because it is
an array and not an argument, one compiled program serves every assignment and
no model's `__call__` changes. In its place a float [n] may stand: the weights
of a mixture of all n candidates, which a search can differentiate.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Bits(nnx.Variable):
  """Position in the candidate bit-widths: an int32 scalar, not trained.

  Each says by itself which quantized layer it follows, so that a module may
  hold several: a norm for every pair of neighbouring bit-widths (transitional
  batch norm, ICCV 2021 Bit-Mixer) holds its layer's and the previous layer's.
  """

  @classmethod
  def following(cls, order: int) -> Bits:
    """The Bits of the quantized layer number `order`, at the highest."""
    return cls(jnp.int32(0), follows=order)

  @property
  def order(self) -> int:
    """Number of the layer it follows, in call order."""
    return self.get_metadata("follows")


def is_mixture(index: int | jax.Array) -> bool:
  """Whether a value of Bits holds weights [n] and not a position."""
  return jnp.issubdtype(getattr(index, "dtype", int), jnp.floating)


def at(
  quantize: Callable[[int | jax.Array], jax.Array], index: int | jax.Array
) -> jax.Array:
  """Returns quantize(index), or the weighted sum over all candidates."""
  if not is_mixture(index):
    return quantize(index)
  terms = [quantize(position) * weight for position, weight in enumerate(index)]
  return functools.reduce(operator.add, terms)


class Scale(nnx.Param):
  """A learned scale of a quantizer: trained, never decayed, kept positive."""


class Offset(nnx.Param):
  """Any other learned quantization parameter (an offset, a clipping level).

  Trained and never decayed, as scales are, but of either sign.
  """


class NormParam(nnx.Param):
  """Scale or bias of a norm with rows: one per bit-width, or pair of them."""


class LayerRow(NamedTuple):
  """One quantized layer.

  Attributes:
    name: path in the model, with slashes.
    kind: "conv" or "linear".
    shape: of the kernel, [*window, c_in / groups, c_out] or [c_in, c_out].
    stride: of the window, the largest if its axes differ; 1 if linear.
    parameters: kernel entries (biases stay float and are not counted).
    macs: multiply-accumulates for one example.
    signed: sign of the input codes; None if inputs stay float.
    bits: bit-width in use.
  """

  name: str
  kind: str
  shape: tuple[int, ...]
  stride: int
  parameters: int
  macs: int
  signed: bool | None
  bits: int


class LayerTable(tuple[LayerRow, ...]):
  """The quantized layers in call order; `print` shows them as a table."""

  __slots__ = ()

  def __str__(self) -> str:
    cells = [LayerRow._fields] + [tuple(map(str, row)) for row in self]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
      "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
      for row in cells
    )


def quantized_layers(model: nnx.Module) -> dict[str, nnx.Module]:
  """Returns the quantized layers of a model by name, in call order."""
  modules = [node for _, node in nnx.iter_modules(model)]
  found = [m for m in modules if hasattr(m, "input_params")]
  return {m.name: m for m in sorted(found, key=lambda m: m.order)}


def candidates(model: nnx.Module) -> tuple[int, ...]:
  """Returns the candidate bit-widths of a quantized model, highest first.

  Raises:
    ValueError: if the model has no quantized layer.
  """
  for layer in quantized_layers(model).values():
    return layer.weight_quantizer.bits
  raise ValueError("model must have a quantized layer; call nn.quantize first")


def layer_table(model: nnx.Module) -> LayerTable:
  """Lists the quantized layers in call order: shapes, costs, signs, bits.

  Layers that stay float are not listed, so that a budget computed from the
  table counts what is quantized and nothing else.
  """
  rows = []
  for name, layer in quantized_layers(model).items():
    shape = layer.kernel.shape
    quantizer = layer.input_quantizer
    rows.append(
      LayerRow(
        name=name,
        kind="linear" if len(shape) == 2 else "conv",
        shape=tuple(shape),
        stride=int(np.max(getattr(layer, "strides", None) or 1)),
        parameters=layer.kernel.size,
        macs=layer.macs,
        signed=None if quantizer is None else quantizer.signed,
        bits=layer.weight_quantizer.bits[int(layer.bits.get_value())],
      )
    )
  return LayerTable(rows)


def set_bits(model: nnx.Module, bits: int | Mapping[str, int]) -> None:
  """Sets the bit-width of every quantized layer, in place.

  Norms go along with the layer whose output they see, transitional ones with
  the layer before that, too. Nothing is changed if anything is wrong.

  Args:
    model: what `nn.quantize` or `deploy.load` returned.
    bits: one bit-width for all layers, or {layer name: bit-width} with exactly
      the names of `layer_table(model)`.

  Raises:
    ValueError: for a bit-width that is not a candidate, or unknown or missing
      names, which it lists.
  """
  known = candidates(model)
  layers = quantized_layers(model)
  if not isinstance(bits, Mapping):
    bits = dict.fromkeys(layers, bits)
  unknown = sorted(set(bits) - set(layers))
  missing = [name for name in layers if name not in bits]
  if unknown or missing:
    raise ValueError(
      f"bits must name exactly the layers {list(layers)}, but has unknown "
      f"layers {unknown}, missing layers {missing}"
    )
  wrong = {name: b for name, b in bits.items() if b not in known}
  if wrong:
    name, b = next(iter(wrong.items()))
    raise ValueError(f"bits of {name} must be one of {known}, got {b!r}")
  index = [known.index(bits[name]) for name in layers]
  for _, variable in all_bits(model):
    variable.set_value(jnp.int32(index[variable.order]))


def all_bits(model: nnx.Module) -> Iterator[tuple[tuple, Bits]]:
  """Yields every Bits variable with its path.

  A quantized layer follows itself; a norm follows the quantized layer whose
  output it normalizes, else the one that was called last before it (the first
  layer, if there was none). A transitional norm also follows the quantized
  layer that was called just before that one.
  """
  for path, node in nnx.iter_graph(model):
    if isinstance(node, Bits):
      yield path, node

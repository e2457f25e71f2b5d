"""Where everything of an artifact lies in its tensor file.

Arrays of one kind follow each other in one tensor, so that the header has few
entries and that what is read together lies together:

  layers/KEY   what the method's `storage.pack` makes of each weight
  inputs/KEY   parameters of the input quantizers
  operands/KEY those of the quantizers of products
  norms/T      gain and offset of one row of each norm
  planes/P     bit-plane P of each weight's codes, 0 the most significant

The last two are sections: of these, pieces are read, a piece being what one
norm or layer has in the tensor. Lengths follow from the manifest alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax import quant
from dr_jax.deploy.artifact.manifest import (
  Broken,
  guarded,
  quantizers,
  with_sign,
)
from dr_jax.nn.norm import row_at
from dr_jax.runtime import schema

# SHA-256 of every section, and of every piece of each.
CHECKSUMS, SUBCHECKSUMS = "checksums", "subchecksums"
DIGEST_BYTES = 32

# Name of a section and of a layer or norm.
Piece = tuple[str, str]


class Joined(NamedTuple):
  """A tensor [size] in which arrays follow each other.

  Attributes:
    name: of the tensor.
    dtype: of its entries; None for floats of any size.
    shapes: by layer or norm, in the order of the tensor.
  """

  name: str
  dtype: np.dtype | None
  shapes: dict[str, tuple[int, ...]]

  @property
  def size(self) -> int:
    """Number of entries."""
    return sum(map(math.prod, self.shapes.values()))

  def offsets(self) -> Iterator[tuple[str, int, int]]:
    """Yields each name with its first entry and the one after its last."""
    end = 0
    for name, shape in self.shapes.items():
      start, end = end, end + math.prod(shape)
      yield name, start, end

  def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays by layer or norm."""
    return {
      name: array[start:end].reshape(self.shapes[name])
      for name, start, end in self.offsets()
    }


class Layout(NamedTuple):
  """All tensors of an artifact but `float/...` and the checksums.

  Attributes:
    weight: weight quantizer of all layers.
    activation: input quantizer of all layers, its sign open, or None.
    products: quantizer of all operands of products, likewise.
    names: of the quantized layers, in call order.
    norms: of the manifest.
    layers, inputs, operands: {key: tensor}, read as a whole.
    sections: read piece by piece, in the order of the file.
    pairs: whether a norm follows two layers.
  """

  weight: quant.WeightQuantizer
  activation: quant.ActivationQuantizer | None
  products: quant.ActivationQuantizer | None
  names: tuple[str, ...]
  norms: Mapping[str, Any]
  layers: dict[str, Joined]
  inputs: dict[str, Joined]
  operands: dict[str, Joined]
  sections: tuple[Joined, ...]
  pairs: bool

  @property
  def pieces(self) -> list[Piece]:
    """All pieces, in the order of the file and of `SUBCHECKSUMS`."""
    return [(s.name, name) for s in self.sections for name in s.shapes]

  def pieces_for(self, bits: Mapping[str, int] | None) -> list[Piece]:
    """What must be read to serve an assignment, in the order of the file.

    Args:
      bits: {layer: bits}; None for all that is stored.
    """
    if bits is None:
      return self.pieces
    index = [self.weight.bits.index(bits[name]) for name in self.names]
    wanted = set()
    if planes := self.weight.storage.planes:
      for name, position in zip(self.names, index, strict=True):
        wanted.update(plane_pieces(name, planes[position]))
    for name, norm in self.norms.items():
      row = row_at(norm["follows"], norm["rows"], index)
      wanted.add(self.row_pieces(name)[row])
    return [piece for piece in self.pieces if piece in wanted]

  def row_pieces(self, name: str) -> list[Piece]:
    """The pieces of a norm, row after row.

    In a network with norms that follow two layers, one that follows one layer
    counts it twice: row i lies where the others have the pair (i, i).
    """
    norm = self.norms[name]
    diagonal = self.pairs and len(norm["follows"]) == 1
    step = norm["rows"] + 1 if diagonal else 1
    return [(f"norms/{row * step}", name) for row in range(norm["rows"])]


def plane_pieces(name: str, count: int) -> list[Piece]:
  """The first bit-planes of a layer's codes."""
  return [(f"planes/{p}", name) for p in range(count)]


def layout_of(manifest: Mapping[str, Any]) -> Layout:
  """Derives where everything lies from a manifest that is checked.

  Raises:
    ValueError: if there are no such quantizers, the method cannot store a
      weight of that shape, or a norm cannot have these rows.
  """
  weight, activation, products = quantizers(manifest)
  layers: dict[str, Joined] = {}
  inputs: dict[str, Joined] = {}
  operands: dict[str, Joined] = {}
  planes: dict[str, tuple[int, ...]] = {}
  streams = manifest["streams"]
  for number, layer in enumerate(manifest["layers"]):
    name, where = layer["name"], f"layer {layer['name']}"
    packed = dict(guarded(where, packed_layout, weight, tuple(layer["shape"])))
    if weight.storage.planes:
      planes[name] = packed.pop("codes").shape[1:]
    lengths = {key: lengths[number] for key, lengths in streams.items()}
    if {key for key, like in packed.items() if like is None} != {*lengths}:
      raise Broken(f"streams must be those of the method, got {[*streams]}")
    _append(layers, "layers", name, packed, lengths)
    if quantizer := with_sign(activation, layer["signed"]):
      _append(inputs, "inputs", name, guarded(where, _input_layout, quantizer))
  for name, operand in manifest.get("operands", {}).items():
    quantizer = with_sign(products, operand["signed"])
    found = guarded(f"operand {name}", _input_layout, quantizer)
    _append(operands, "operands", name, found)
  norms = manifest["norms"]
  pairs = any(len(norm["follows"]) == 2 for norm in norms.values())
  sections = _norm_sections(norms, len(weight.bits), pairs)
  if planes:
    byte = np.dtype(np.uint8)
    sections += [
      Joined(f"planes/{p}", byte, planes) for p in range(weight.bits[0])
    ]
  names = tuple(layer["name"] for layer in manifest["layers"])
  return Layout(
    weight=weight,
    activation=activation,
    products=products,
    names=names,
    norms=norms,
    layers=layers,
    inputs=inputs,
    operands=operands,
    sections=tuple(sections),
    pairs=pairs,
  )


def _append(joined, prefix, name, layout, lengths: Mapping[str, int] = {}):
  """Appends the arrays of a layer to the tensors of their keys."""
  for key, like in layout.items():
    if like is None:
      like = jax.ShapeDtypeStruct((lengths[key],), jnp.uint8)
    dtype = np.dtype(like.dtype)
    tensor = joined.setdefault(key, Joined(f"{prefix}/{key}", dtype, {}))
    tensor.shapes[name] = like.shape


def _norm_sections(norms, candidates, pairs):
  for name, norm in norms.items():
    rows = {1: (1, candidates), 2: (candidates**2,)}[len(norm["follows"])]
    if norm["rows"] not in rows:
      raise Broken(
        f"rows of norm {name} must be {' or '.join(map(str, rows))}, got "
        f"{schema.shown(norm['rows'])}"
      )
  count = max((norm["rows"] for norm in norms.values()), default=0)

  # Sections of equal norms share one dict: there are candidates^2 of them.
  @functools.cache
  def shapes(first: bool, diagonal: bool) -> dict[str, tuple[int, ...]]:
    return {
      name: (2, norm["channels"])
      for name, norm in norms.items()
      if len(norm["follows"]) == 2 or first or (norm["rows"] > 1 and diagonal)
    }

  every = candidates + 1 if pairs else 1
  return [
    Joined(f"norms/{t}", None, shapes(t == 0, t % every == 0))
    for t in range(count)
  ]


@functools.lru_cache(maxsize=256)
def packed_layout(
  weight: quant.WeightQuantizer, shape: tuple[int, ...]
) -> dict[str, Any]:
  """Names, shapes and dtypes of a packed weight of that shape."""

  def encode(w):
    return weight.encode(weight.init(w), w)

  w = jax.ShapeDtypeStruct(shape, jnp.float32)
  return weight.storage.layout(jax.eval_shape(encode, w))


@functools.lru_cache(maxsize=64)
def _input_layout(activation):
  """Names, shapes and dtypes of the parameters of a layer's inputs."""
  x = jax.ShapeDtypeStruct((2,), jnp.float32)
  return jax.eval_shape(activation.init, x)

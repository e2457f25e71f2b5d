"""Whether tensors and network fit the manifest, before anything is built.

An artifact can come from anywhere, and its checksums with it. The layout says
what dtype and shape each tensor has; here their values are checked, and become
the parts of a network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import models, quant
from dr_jax.deploy.artifact.layout import (
  Layout,
  Piece,
  plane_pieces,
)
from dr_jax.deploy.artifact.manifest import Broken, guarded, with_sign
from dr_jax.nn import deployed
from dr_jax.nn.deployed import LARGEST
from dr_jax.nn.quantized import LayerInfo


def checked_parts(
  manifest: Mapping[str, Any],
  layout: Layout,
  tensors: Mapping[str, np.ndarray],
  pieces: Mapping[Piece, np.ndarray],
) -> deployed.Parts:
  """Checks all values and returns what they are parts of.

  Args:
    manifest, layout: of the artifact.
    tensors: as in a file, but sections and checksums.
    pieces: of the sections, those that were read.

  Raises:
    ValueError: naming the layer, norm, operand or tensor that is wrong.
  """
  packed = _by_layer(layout.layers, tensors)
  inputs = _by_layer(layout.inputs, tensors)
  stored = {}
  for order, layer in enumerate(manifest["layers"]):
    name, arrays = layer["name"], packed.get(layer["name"], {})
    if layout.weight.storage.planes:
      arrays["codes"] = _planes(name, layout.weight.bits[0], pieces)
    quantizer = with_sign(layout.activation, layer["signed"])
    stored[name] = _layer(
      order, layer, layout.weight, arrays, quantizer, inputs.get(name, {})
    )
  norms = {
    name: _norm(name, norm, layout.row_pieces(name), pieces)
    for name, norm in manifest["norms"].items()
  }
  params = _by_layer(layout.operands, tensors)
  operands = {
    name: _operand(name, operand, layout.products, params.get(name, {}))
    for name, operand in manifest.get("operands", {}).items()
  }
  return deployed.Parts(stored, norms, operands, _floats(tensors))


def abstract_network(
  architecture: tuple[str, Mapping[str, Any]],
  parts: deployed.Parts,
  stored: int,
) -> nnx.Module:
  """Builds the network of an architecture without values, to hold the parts.

  It takes no memory for its parameters and draws no initial values, and is
  built no further than there are parts: a depth or a width from a file could be
  any number.

  Args:
    architecture: name and options of `models.build`.
    parts: of the artifact.
    stored: number of entries of all its tensors.

  Raises:
    ValueError: if it cannot be built, or is larger than what is stored.
  """
  name, options = architecture
  variables = len(parts.layers) + 2 * len(parts.norms) + len(parts.floats)
  model = guarded(
    "architecture",
    nnx.eval_shape,
    lambda: models.build(name, rngs=_CountedRngs(variables), **options),
  )
  wanted = sum(
    math.prod(leaf.shape)
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
  )
  stored += sum(math.prod(layer.shape) for layer in parts.layers.values())
  if wanted > stored:
    raise Broken(
      f"architecture must have at most the {stored} parameters that are "
      f"stored, got {wanted}"
    )
  return model


def check_ranges(
  weight: quant.WeightQuantizer,
  encoded: Mapping[str, jax.Array | np.ndarray],
  planes: int,
) -> None:
  """Checks encoded arrays that their method gives bounds.

  Args:
    weight: the method.
    encoded: arrays of one layer.
    planes: how many planes of its codes are there.

  Raises:
    ValueError: naming the array.
  """
  missing = weight.bits[0] - planes
  for name, smallest, largest in weight.storage.ranges:
    if name not in encoded:
      continue
    if name == "codes":  # Without their last bits they are rounded down.
      smallest -= 2**missing - 1
    array = np.asarray(encoded[name])
    if not deployed.is_within(array, smallest, largest):
      raise ValueError(
        f"{name} must be in {smallest}..{largest}, got {array.min()}.."
        f"{array.max()}"
      )


def check_norm_values(name: str, row: int, array: np.ndarray) -> None:
  """Checks gain and offset of one row of a norm.

  Raises:
    ValueError: naming both.
  """
  _check_values(f"{name} row {row}", array)


class _CountedRngs(nnx.Rngs):
  """Keys for the initial values of so many variables."""

  def __init__(self, variables: int):
    super().__init__(0)
    self.left = variables

  def params(self) -> jax.Array:
    self.left -= 1
    if self.left < 0:
      raise Broken("architecture has more variables than are stored")
    return self.default()


def _by_layer(joined, tensors):
  """{layer: {key: array}} of tensors in which layers follow each other."""
  found: dict[str, dict[str, np.ndarray]] = {}
  for key, tensor in joined.items():
    for name, array in tensor.split(tensors[tensor.name]).items():
      found.setdefault(name, {})[key] = array
  return found


def _layer(order, layer, weight, arrays, activation, inputs):
  """A layer that stores these arrays, for its weight and for its inputs."""
  name, shape = layer["name"], tuple(layer["shape"])
  for key, array in arrays.items():
    _check_values(f"{name}/{key}", array)
  return deployed.StoredLayer(
    info=LayerInfo(name, order, layer["macs"]),
    shape=shape,
    weight=weight,
    activation=activation,
    input_params=_input_params(name, inputs),
    encoded=guarded(f"layer {name}", _encoded, arrays, shape, weight),
    first=_first(weight.storage.planes, arrays),
  )


def _operand(name, operand, products, params):
  """An operand of a product."""
  quantizer: Any = with_sign(products, operand["signed"])
  inputs = _input_params(name, params)
  return deployed.StoredOperand(operand["follows"], quantizer, inputs)


def _input_params(name, arrays):
  """Parameters of an input quantizer, checked."""
  for key, array in arrays.items():
    _check_values(f"{name}/input/{key}", array)
  return {key: jnp.asarray(array) for key, array in arrays.items()}


def _planes(name, count, pieces):
  """The first planes of a layer's codes, [planes, bytes]."""
  keys = plane_pieces(name, count)
  return np.stack([pieces[key] for key in keys if key in pieces])


def _first(planes, packed):
  """Position of the highest bit-width that the planes serve."""
  if not planes:
    return 0
  held = len(packed["codes"])
  return next(i for i, count in enumerate(planes) if count <= held)


def _encoded(packed, shape, weight):
  """Unpacks a layer, and checks the values that its method gives bounds."""
  encoded = weight.storage.unpack(packed, shape)
  planes = len(packed["codes"]) if weight.storage.planes else weight.bits[0]
  check_ranges(weight, encoded, planes)
  return encoded


def _norm(name, norm, keys, pieces):
  """Gain and offset of the rows that were read, NaN in the others."""
  found = {row: pieces[key] for row, key in enumerate(keys) if key in pieces}
  for row, piece in found.items():
    check_norm_values(name, row, piece)
  like = next(iter(found.values()))
  both = np.full((2, norm["rows"], norm["channels"]), np.nan, like.dtype)
  both[:, list(found)] = np.stack(list(found.values()), 1)
  return deployed.StoredNorm(
    tuple(norm["follows"]), *map(jnp.asarray, both), held=tuple(found)
  )


def _floats(tensors):
  """What stays float, by path; of any values, since a mask can be infinite."""
  floats = {}
  for name, array in tensors.items():
    if name.startswith("float/"):
      _check_width(name, array)
      floats[name.removeprefix("float/")] = jnp.asarray(array)
  return floats


def _check_values(name, array):
  _check_width(name, array)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return
  if not deployed.is_within(array, -LARGEST, LARGEST):
    raise Broken(f"{name} must be finite, and at most 2^60 in size")
  if name.endswith("/scale") and not bool((array >= 0).all()):
    raise Broken(f"{name} must not be negative")


def _check_width(name, array):
  if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
    raise Broken(
      f"{name} must have at most 32 bits without jax_enable_x64, got "
      f"{array.dtype}"
    )

"""Whether tensors and network fit the manifest, before anything is built.

An artifact can come from anywhere, and its checksums with it. Every tensor is
checked against the manifest and against what the method would store of a weight
of that shape; no array is made before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import models, quant
from dr_jax.deploy.manifest import NAME, Broken, guarded, with_sign
from dr_jax.nn import deployed
from dr_jax.nn.deployed import LARGEST
from dr_jax.runtime import schema
from dr_jax.runtime.schema import COUNT, Where

_OFFSETS = Where([COUNT], lambda pair: len(pair) == 2, "two offsets")
_TENSOR = {"dtype": str, "shape": [COUNT], "data_offsets": _OFFSETS}
_LARGEST_HEADER = 2**22  # of forty thousand tensors


def check_header(file: BinaryIO, size: int) -> None:
  """Checks that a safetensors file has the size that its header says.

  Raises:
    ValueError: if not, before more than the header is read.
  """
  length = int.from_bytes(file.read(8), "little")
  if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
    raise Broken("is damaged: it is no safetensors file")
  try:
    header = schema.parse(file.read(length))
    schema.check(header, {...: object})
    header.pop("__metadata__", None)
    schema.check(header, {...: _TENSOR})
  except ValueError as error:
    raise Broken(f"is damaged: its header: {error}") from None
  end = max(
    (tensor["data_offsets"][1] for tensor in header.values()), default=0
  )
  if size != 8 + length + end:
    raise Broken(
      f"is damaged: it must have {8 + length + end} bytes, got {size}"
    )


def check_tensors(
  manifest: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  weight: quant.WeightQuantizer,
  activation: quant.ActivationQuantizer | None,
) -> dict[str, dict[str, jax.Array]]:
  """Checks every tensor against the manifest and its method.

  Returns:
    What each layer encodes, by name.

  Raises:
    ValueError: naming the tensor that is wrong, missing or left over.
  """
  expected: dict[str, Any] = {}
  for layer in manifest["layers"]:
    expected |= guarded(
      f"layer {layer['name']}",
      _layer_tensors,
      layer,
      weight,
      activation,
    )
  known = set(expected)
  for name, orders in manifest["norms"].items():
    known |= {f"{name}/gain", f"{name}/offset"}
    _check_norm(name, len(orders), len(weight.bits), tensors)
  for name in tensors:
    schema.check(name, NAME, "tensor")
    if name not in known and not name.startswith("float/"):
      raise Broken(f"tensor {name} belongs to no layer or norm")
  for name, like in expected.items():
    found = _tensor(tensors, name)
    if not _fits(found, like):
      wanted = "uint8 [bytes]" if like is None else f"{like.dtype} {like.shape}"
      raise Broken(
        f"tensor {name} must be {wanted}, got {found.dtype} {found.shape}"
      )
  for name, tensor in tensors.items():
    _check_values(name, tensor)
  return {
    layer["name"]: guarded(
      f"layer {layer['name']}", _encoded, layer, tensors, weight
    )
    for layer in manifest["layers"]
  }


def check_architecture(
  architecture: tuple[str, Mapping[str, Any]],
  manifest: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
) -> None:
  """Checks that a network is not larger than what is stored of it.

  It is built without memory for its parameters, and no further than there are
  tensors: a depth or a width from a file could be any number.
  """
  name, options = architecture
  norms = len(manifest["norms"])
  floats = {k: v for k, v in tensors.items() if k.startswith("float/")}
  variables = len(manifest["layers"]) + 2 * norms + len(floats)
  model = guarded(
    "architecture",
    nnx.eval_shape,
    lambda: models.build(name, rngs=_CountedRngs(variables), **options),
  )
  wanted = sum(
    math.prod(leaf.shape)
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
  )
  stored = sum(math.prod(layer["shape"]) for layer in manifest["layers"])
  stored += sum(tensor.size for tensor in tensors.values())
  if wanted > stored:
    raise Broken(
      f"architecture must have at most the {stored} parameters that are "
      f"stored, got {wanted}"
    )


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


def _layer_tensors(layer, weight, activation):
  """{tensor: what it must look like} of a layer, from its method."""
  name, shape = layer["name"], tuple(layer["shape"])

  packed = weight.storage.layout(_encoded_layout(weight, shape))
  inputs = {}
  if activation is not None:
    inputs = _input_layout(with_sign(activation, layer["signed"]))
  for field, wanted in (("packed", packed), ("input", inputs)):
    if sorted(layer[field]) != sorted(wanted):
      raise Broken(
        f"layer {name}: {field} must be {sorted(wanted)}, got "
        f"{schema.shown(layer[field])}"
      )
  tensors = {f"{name}/{key}": like for key, like in packed.items()}
  return tensors | {f"{name}/input/{key}": a for key, a in inputs.items()}


@functools.lru_cache(maxsize=256)
def _encoded_layout(weight, shape):
  """Names, shapes and dtypes of an encoded weight of that shape."""

  def encode(w):
    return weight.encode(weight.init(w), w)

  return jax.eval_shape(encode, jax.ShapeDtypeStruct(shape, jnp.float32))


@functools.lru_cache(maxsize=64)
def _input_layout(activation):
  """Names, shapes and dtypes of the parameters of a layer's inputs."""
  x = jax.ShapeDtypeStruct((2,), jnp.float32)
  return jax.eval_shape(activation.init, x)


def _encoded(layer, tensors, weight):
  """Unpacks a layer, and checks the values that its method gives bounds."""
  packed = {key: tensors[f"{layer['name']}/{key}"] for key in layer["packed"]}
  encoded = weight.storage.unpack(packed, tuple(layer["shape"]))
  for name, smallest, largest in weight.storage.ranges:
    if name not in encoded:
      continue
    array = np.asarray(encoded[name])
    if not deployed.is_within(array, smallest, largest):
      raise ValueError(
        f"{name} must be in {smallest}..{largest}, got {array.min()}.."
        f"{array.max()}"
      )
  return encoded


def _check_norm(name, follows, candidates, tensors):
  gain, offset = (
    _tensor(tensors, f"{name}/{key}") for key in ("gain", "offset")
  )
  rows = (candidates**2,) if follows == 2 else (1, candidates)
  fits = gain.ndim == 2 and gain.shape[0] in rows and gain.shape[1] >= 1
  if not fits or not _is_float(gain):
    raise Broken(
      f"tensor {name}/gain must be floats [{' or '.join(map(str, rows))}, "
      f"channels], got {gain.dtype} {gain.shape}"
    )
  if offset.shape != gain.shape or offset.dtype != gain.dtype:
    raise Broken(
      f"tensor {name}/offset must be {gain.dtype} {gain.shape}, as the gain, "
      f"got {offset.dtype} {offset.shape}"
    )


def _check_values(name, tensor):
  if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
    raise Broken(
      f"tensor {name} must have at most 32 bits without jax_enable_x64, got "
      f"{tensor.dtype}"
    )
  # Of floats only the network knows what they are: a mask can be infinite.
  if not _is_float(tensor) or name.startswith("float/"):
    return
  if not deployed.is_within(tensor, -LARGEST, LARGEST):
    raise Broken(f"tensor {name} must be finite, and at most 2^60 in size")
  if name.endswith("/scale") and not bool((tensor >= 0).all()):
    raise Broken(f"tensor {name} must not be negative")


def _tensor(tensors, name):
  if name not in tensors:
    raise Broken(f"tensor {name} is missing")
  return tensors[name]


def _fits(tensor, like):
  if like is None:
    return tensor.dtype == np.uint8 and tensor.ndim == 1
  same = tensor.dtype == like.dtype or (_is_wide(tensor) and _is_wide(like))
  return same and tensor.shape == like.shape


def _is_wide(array):
  """Whether it is what a float32 is where x64 is enabled, or not."""
  return array.dtype in (np.float32, np.float64)


def _is_float(tensor):
  return jnp.issubdtype(tensor.dtype, jnp.floating)

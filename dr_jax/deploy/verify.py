"""Whether the parts of an artifact fit each other, before anything is built.

An artifact can come from anywhere, and its checksums with it. What the manifest
says is checked on its own, then every tensor against the manifest and against
what the method would store of a weight of that shape; no array is made before.
"""

from __future__ import annotations

import collections
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import models, quant
from dr_jax.nn import deployed
from dr_jax.nn.deployed import LARGEST
from dr_jax.runtime import schema
from dr_jax.runtime.schema import COUNT, Where

# Of layers, norms and tensors: one line, also in a message.
_NAME = Where(
  str,
  lambda name: name.isprintable() and 1 <= len(name) <= 300,
  "1 to 300 printable characters",
)
_SHAPE = Where(
  [COUNT],
  lambda shape: 2 <= len(shape) <= 8 and 0 not in shape,
  "a list of 2 to 8 integers >= 1",
)
_QUANTIZER = {"name": _NAME, "options": {...: object}}
_DIGEST = Where(str, lambda s: len(s) == 64, "64 hexadecimal digits")
MANIFEST_SCHEMA = {
  "format": str,
  "version": int,
  "method": _QUANTIZER,
  "activation": (None, _QUANTIZER),
  "architecture": (
    None,
    Where(
      [object],
      lambda pair: len(pair) == 2 and list(map(type, pair)) == [str, dict],
      "a name and its options",
    ),
  ),
  "layers": Where(
    [
      {
        "name": _NAME,
        "order": COUNT,
        "macs": COUNT,
        "shape": _SHAPE,
        "signed": (None, bool),
        "packed": [_NAME],
        "input": [_NAME],
      }
    ],
    lambda layers: isinstance(layers, list) and len(layers) > 0,
    "a list of layers, not empty",
  ),
  "norms": {
    ...: Where([COUNT], lambda orders: len(orders) in (1, 2), "1 or 2")
  },
  "bfloat16": [_NAME],
  "sha256": _DIGEST,
}

_OFFSETS = Where([COUNT], lambda pair: len(pair) == 2, "two offsets")
_TENSOR = {"dtype": str, "shape": [COUNT], "data_offsets": _OFFSETS}
_LARGEST_HEADER = 2**22  # of forty thousand tensors

# Of what another error says: it can quote the file.
_LONGEST = 200

T = TypeVar("T")


class Broken(ValueError):
  """What an artifact says contradicts itself."""


def guarded(
  what: str, function: Callable[..., T], *args: Any, **kwargs: Any
) -> T:
  """Calls a function with arguments from a file: every error is the file's."""
  try:
    return function(*args, **kwargs)
  except Broken:
    raise
  # Methods and networks, also those that users register, raise what they like.
  except Exception as error:
    first = (str(error) or type(error).__name__).splitlines()[0]
    raise Broken(f"{what}: {first[:_LONGEST]}") from None


def quantizers(
  manifest: Mapping[str, Any],
) -> tuple[quant.WeightQuantizer, quant.ActivationQuantizer | None]:
  """Builds the quantizers of a manifest.

  Raises:
    ValueError: if there are no such quantizers, or not for the same bits.
  """
  weight = _quantizer(manifest, "method", quant.WeightQuantizer)
  if manifest["activation"] is None:
    return weight, None
  activation = _quantizer(manifest, "activation", quant.ActivationQuantizer)
  if activation.bits != weight.bits:
    raise Broken(
      f"activation must have the bits of the method, {weight.bits}, got "
      f"{activation.bits}"
    )
  return weight, activation


@functools.lru_cache(maxsize=64)
def with_sign(
  activation: quant.ActivationQuantizer | None, signed: bool | None
) -> quant.ActivationQuantizer | None:
  """The input quantizer of a layer: for equal signs the same one."""
  return activation and activation.with_sign(bool(signed))


def _quantizer(manifest: Mapping[str, Any], field: str, kind: type[T]) -> T:
  found = guarded(field, _built, json.dumps(manifest[field]))
  if not isinstance(found, kind):
    raise Broken(f"{field} must name a {kind.__name__}, got {found.name!r}")
  return found


# The same value again, so that networks of one method share their programs.
@functools.lru_cache(maxsize=64)
def _built(spec):
  spec = json.loads(spec)
  options = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in spec["options"].items()
  }
  return quant.get(spec["name"], **options)


def check_manifest(manifest: Mapping[str, Any]) -> None:
  """Checks what a manifest says on its own.

  Raises:
    ValueError: naming the field that is wrong.
  """
  schema.check(manifest, MANIFEST_SCHEMA)
  layers = manifest["layers"]
  names = collections.Counter(layer["name"] for layer in layers)
  name, times = names.most_common(1)[0]
  if times > 1:
    raise Broken(f"layers must have different names, got {name} twice")
  orders = sorted(layer["order"] for layer in layers)
  if orders != list(range(len(layers))):
    raise Broken(
      f"layers must have the orders 0 to {len(layers) - 1}, each once, got "
      f"{orders[:8]}"
    )
  for layer in layers:
    decided = layer["signed"] is not None
    if decided != (manifest["activation"] is not None):
      raise Broken(
        f"layer {layer['name']}: signed must be null without an activation, "
        f"true or false with one, got {layer['signed']}"
      )
  for name, follows in manifest["norms"].items():
    schema.check(name, _NAME, "norm")
    neighbors = len(follows) == 1 or follows[0] == follows[1] - 1
    if max(follows) >= len(layers) or not neighbors:
      raise Broken(
        f"norm {name} must follow a layer, or it and the one before, "
        f"got {follows}"
      )


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
    schema.check(name, _NAME, "tensor")
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

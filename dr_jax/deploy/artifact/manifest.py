"""What a manifest must say, and the quantizers that it names.

An artifact can come from anywhere, and its checksums with it: nothing of a
manifest is trusted.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dr_jax import quant
from dr_jax.runtime import command, schema
from dr_jax.runtime.schema import COUNT, Where

FORMAT = "dr_jax"
# 4 is 3 with products of attention, and written for these alone.
VERSIONS = (3, 4)
TENSORS, MANIFEST = "model.safetensors", "manifest.json"

# Of layers, norms and tensors: one line, also in a message.
NAME = Where(
  str,
  lambda name: name.isprintable() and 1 <= len(name) <= 300,
  "1 to 300 printable characters",
)
_SHAPE = Where(
  [COUNT],
  lambda shape: 2 <= len(shape) <= 8 and 0 not in shape,
  "a list of 2 to 8 integers >= 1",
)
_QUANTIZER = {"name": NAME, "options": {...: object}}
_DIGEST = Where(str, lambda s: len(s) == 64, "64 hexadecimal digits")
_MANIFEST = {
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
        "name": NAME,
        "macs": COUNT,
        "shape": _SHAPE,
        "signed": (None, bool),
      }
    ],
    lambda layers: isinstance(layers, list) and len(layers) > 0,
    "a list of layers, not empty",
  ),
  "streams": {...: [COUNT]},
  "norms": {
    ...: {
      "follows": Where(
        [COUNT], lambda orders: len(orders) in (1, 2), "a list of 1 or 2 layers"
      ),
      "rows": COUNT,
      "channels": COUNT,
    }
  },
  "sha256": _DIGEST,
}
_PRODUCTS = {
  "products": _QUANTIZER,
  "operands": Where(
    {...: {"follows": COUNT, "signed": bool}},
    lambda operands: isinstance(operands, dict) and len(operands) > 0,
    "an object of operands, not empty",
  ),
}

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
    raise Broken(f"{what}: {command.first_line(error)[:_LONGEST]}") from None


def read_manifest(text: bytes) -> dict[str, Any]:
  """Returns what a manifest says, without its own checksum.

  Raises:
    ValueError: if it is damaged, of another format, or has a wrong field.
  """
  manifest = schema.parse(text)
  schema.check(manifest, {...: object})
  found, version = manifest.get("format"), manifest.get("version")
  if found != FORMAT or type(version) is not int or version not in VERSIONS:
    raise ValueError(
      f"must have format {FORMAT!r} version {' or '.join(map(str, VERSIONS))}, "
      f"got {schema.shown(found)} version {schema.shown(version)}"
    )
  expected = manifest.pop("manifest_sha256", None)
  if manifest_digest(manifest) != expected:
    raise ValueError("is damaged: its checksum differs")
  check_manifest(manifest)
  return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
  """The SHA-256 that a manifest carries of itself."""
  return hashlib.sha256(
    json.dumps(manifest, sort_keys=True).encode()
  ).hexdigest()


def check_manifest(manifest: Mapping[str, Any]) -> None:
  """Checks what a manifest says on its own.

  Raises:
    ValueError: naming the field that is wrong.
  """
  with_products = manifest["version"] == VERSIONS[1]
  schema.check(manifest, _MANIFEST | (_PRODUCTS if with_products else {}))
  layers = manifest["layers"]
  names = collections.Counter(layer["name"] for layer in layers)
  name, times = names.most_common(1)[0]
  if times > 1:
    raise Broken(f"layers must have different names, got {name} twice")
  for layer in layers:
    if manifest["activation"] is None and layer["signed"] is not None:
      raise Broken(
        f"layer {layer['name']}: signed must be null without an activation, "
        f"got {layer['signed']}"
      )
  for key, lengths in manifest["streams"].items():
    if len(lengths) != len(layers):
      raise Broken(
        f"streams must have a length for each of {len(layers)} layers, got "
        f"{len(lengths)} of {schema.shown(key)}"
      )
  for name, norm in manifest["norms"].items():
    schema.check(name, NAME, "norm")
    follows = norm["follows"]
    neighbors = len(follows) == 1 or follows[0] == follows[1] - 1
    if max(follows) >= len(layers) or not neighbors:
      raise Broken(
        f"norm {name} must follow a layer, or it and the one before, "
        f"got {follows}"
      )
  for name, operand in manifest.get("operands", {}).items():
    schema.check(name, NAME, "operand")
    if operand["follows"] >= len(layers):
      raise Broken(
        f"operand {name} must follow a layer, one of {len(layers)}, got "
        f"{operand['follows']}"
      )


def quantizers(
  manifest: Mapping[str, Any],
) -> tuple[
  quant.WeightQuantizer,
  quant.ActivationQuantizer | None,
  quant.ActivationQuantizer | None,
]:
  """Builds the quantizers of a manifest: of weights, inputs and products.

  Raises:
    ValueError: if there are no such quantizers, or not for the same bits.
  """
  weight = _quantizer(manifest, "method", quant.WeightQuantizer)
  activation = _activation(manifest, "activation", weight)
  return weight, activation, _activation(manifest, "products", weight)


def _activation(manifest, field, weight):
  if manifest.get(field) is None:
    return None
  activation = _quantizer(manifest, field, quant.ActivationQuantizer)
  if activation.bits != weight.bits:
    raise Broken(
      f"{field} must have the bits of the method, {weight.bits}, got "
      f"{activation.bits}"
    )
  return activation


@functools.lru_cache(maxsize=64)
def with_sign(
  activation: quant.ActivationQuantizer | None, signed: bool | None
) -> quant.ActivationQuantizer | None:
  """The input quantizer of a layer, if it has one: for equal signs the same."""
  if activation is None or signed is None:
    return None
  return activation.with_sign(signed)


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

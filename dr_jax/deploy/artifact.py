"""The integer artifact: packed codes and scales, and a manifest.

An artifact is a directory:

  model.safetensors  per quantized layer what its method's `storage` packs
                     (codes, scales), input scales; folded norms; float
                     parameters
  manifest.json      format version, method and its options (tie rule,
                     candidate bits), layer table, architecture, SHA-256 of
                     the tensors and of the manifest itself

Any candidate bit-width is derived from the stored integers alone. Nothing is
pickled, and nothing is used before its checksum was verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from dr_jax import allocate, models, nn, quant
from dr_jax.nn.layers import Place

FORMAT = "dr_jax"
VERSION = 2
_TENSORS, _MANIFEST = "model.safetensors", "manifest.json"


class ArtifactError(ValueError):
  """An artifact is missing, damaged, or of another format or network."""


def save(
  path: str | os.PathLike,
  model: nnx.Module,
  *,
  architecture: tuple[str, dict[str, Any]] | None = None,
) -> None:
  """Writes the integer artifact of a quantized network.

  The directory appears complete or not at all.

  Args:
    path: directory to create.
    model: what `nn.quantize` returned, trained.
    architecture: (name, options) of `models.build`, so that `load` can build
      the network by itself; without it `load` must be given the network.

  Raises:
    FileExistsError: if the path exists; nothing is overwritten.
    ValueError: if the model is not quantized, or its method is in no registry.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise FileExistsError(f"{path}: exists; allowed is a new path")
  frozen = nn.freeze(model)
  tensors, layers = {}, []
  for name, part in frozen.layers.items():
    packed = part.weight.storage.pack(part.encoded)
    layers.append(_describe(part, packed))
    for key, value in packed.items():
      tensors[f"{name}/{key}"] = value
    for key, value in part.input_params.items():
      tensors[f"{name}/input/{key}"] = value
  for name, part in frozen.norms.items():
    tensors[f"{name}/gain"], tensors[f"{name}/offset"] = part.gain, part.offset
  for name, value in frozen.floats.items():
    tensors[f"float/{name}"] = value
  arrays = {name: np.asarray(value) for name, value in tensors.items()}
  # safetensors reads no bfloat16 into numpy: its bits travel as uint16.
  halves = [name for name, a in arrays.items() if a.dtype == jnp.bfloat16]
  data = safetensors.numpy.save(
    arrays | {name: arrays[name].view(np.uint16) for name in halves}
  )
  first = next(iter(frozen.layers.values()))
  manifest = {
    "format": FORMAT,
    "version": VERSION,
    "method": _spec(first.weight),
    "activation": _spec(first.activation),
    "architecture": architecture,
    "layers": layers,
    "norms": {name: part.orders for name, part in frozen.norms.items()},
    "bfloat16": halves,
    "sha256": hashlib.sha256(data).hexdigest(),
  }
  manifest["manifest_sha256"] = _digest(manifest)
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = pathlib.Path(tempfile.mkdtemp(prefix=path.name, dir=path.parent))
  try:
    (draft / _TENSORS).write_bytes(data)
    (draft / _MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")))
    draft.chmod(0o755)
    draft.rename(path)
  except BaseException:
    shutil.rmtree(draft)
    raise


def read(path: str | os.PathLike) -> tuple[dict, dict[str, np.ndarray]]:
  """Reads and verifies an artifact: its manifest and its tensors.

  Raises:
    ArtifactError: naming the file that is missing, damaged or of another
      format.
  """
  path = pathlib.Path(path)
  text, data = _bytes(path / _MANIFEST), _bytes(path / _TENSORS)
  try:
    manifest = json.loads(text)
    expected = manifest.pop("manifest_sha256")
  except (ValueError, KeyError, AttributeError, TypeError):
    raise ArtifactError(f"{path / _MANIFEST}: damaged, no manifest") from None
  if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
    raise ArtifactError(
      f"{path / _MANIFEST}: format {manifest.get('format')!r} version "
      f"{manifest.get('version')!r}; allowed is {FORMAT!r} version {VERSION}"
    )
  if _digest(manifest) != expected:
    raise ArtifactError(f"{path / _MANIFEST}: damaged, checksum differs")
  if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
    raise ArtifactError(f"{path / _TENSORS}: damaged, checksum differs")
  tensors = safetensors.numpy.load(data)
  for name in manifest["bfloat16"]:
    tensors[name] = tensors[name].view(jnp.bfloat16)
  return manifest, tensors


def load(
  path: str | os.PathLike,
  *,
  bits: int | dict[str, int] | None = None,
  model: nnx.Module | None = None,
) -> nnx.Module:
  """Loads an artifact as a network that switches bit-widths.

  Args:
    path: the directory.
    bits: bit-width to start with, or one per layer; the highest by default.
      `nn.set_bits` switches later, from the stored codes.
    model: the float network that was quantized, with any weights; by default
      it is built from the architecture in the manifest.

  Returns:
    The network, in inference mode.

  Raises:
    ArtifactError: if a file is missing, damaged or of another format, or the
      artifact belongs to another network; nothing is half-loaded.
    ValueError: if `bits` is no candidate.
  """
  manifest, tensors = read(path)
  if model is None:
    if manifest["architecture"] is None:
      raise ArtifactError(
        f"{path}: names no architecture; allowed is load(path, model=network)"
      )
    name, options = manifest["architecture"]
    model = models.build(name, rngs=nnx.Rngs(0), **options)
  try:
    network = nn.thaw(model, _frozen(manifest, tensors))
  except (KeyError, ValueError) as error:
    raise ArtifactError(f"{path}: {error}") from error
  if bits is not None:
    nn.set_bits(network, bits)
  return network


def sizes(path: str | os.PathLike) -> dict[int, int]:
  """Bytes that a copy of the model takes at each candidate bit-width.

  Of each quantized weight what that bit-width needs, by its method's
  `storage.size`, and everything else as it is.
  """
  layers = layer_sizes(path)
  bits = [key for key in next(iter(layers.values())) if key != "stored"]
  return {b: size(path, dict.fromkeys(layers, b)) for b in bits}


def size(path: str | os.PathLike, allocation: Mapping[str, int]) -> int:
  """Bytes that a copy takes whose weights are stored for one allocation.

  Args:
    path: the directory.
    allocation: {layer: bits}.

  Raises:
    ArtifactError: as `read`.
    ValueError: if the layers or bits are not the artifact's.
  """
  layers = layer_sizes(path)
  _, tensors = read(path)
  total = sum(tensor.nbytes for tensor in tensors.values())
  bits = [key for key in next(iter(layers.values())) if key != "stored"]
  allocate.Allocation(allocation).check(layers, bits)
  return total + sum(
    layer[allocation[name]] - layer["stored"] for name, layer in layers.items()
  )


def layer_sizes(path: str | os.PathLike) -> dict[str, dict[int | str, int]]:
  """Bytes of each quantized weight: {layer: {"stored": n, 8: n, 4: n, ...}}."""
  manifest, tensors = read(path)
  weight = _quantizer(manifest["method"])
  found = {}
  for layer in manifest["layers"]:
    packed = _packed(layer, tensors)
    encoded = weight.storage.unpack(packed, tuple(layer["shape"]))
    found[layer["name"]] = {
      "stored": sum(array.nbytes for array in packed.values()),
      **{b: weight.storage.size(encoded, i) for i, b in enumerate(weight.bits)},
    }
  return found


def _frozen(manifest, tensors) -> nn.Frozen:
  weight = _quantizer(manifest["method"])
  activation = manifest["activation"] and _quantizer(manifest["activation"])
  layers = {}
  for layer in manifest["layers"]:
    name, shape = layer["name"], tuple(layer["shape"])
    encoded = weight.storage.unpack(_packed(layer, tensors), shape)
    params = {
      key: jnp.asarray(tensors[f"{name}/input/{key}"]) for key in layer["input"]
    }
    layers[name] = nn.StoredLayer(
      place=Place(name, layer["order"], layer["macs"]),
      shape=shape,
      weight=weight,
      activation=activation and activation.with_sign(layer["signed"]),
      input_params=params,
      encoded=encoded,
    )
  norms = {
    name: nn.StoredNorm(
      tuple(orders),
      jnp.asarray(tensors[f"{name}/gain"]),
      jnp.asarray(tensors[f"{name}/offset"]),
    )
    for name, orders in manifest["norms"].items()
  }
  floats = {
    name.removeprefix("float/"): jnp.asarray(value)
    for name, value in tensors.items()
    if name.startswith("float/")
  }
  return nn.Frozen(layers, norms, floats)


def _packed(layer, tensors):
  return {key: tensors[f"{layer['name']}/{key}"] for key in layer["packed"]}


def _describe(part, packed):
  return {
    "name": part.place.name,
    "order": part.place.order,
    "macs": part.place.macs,
    "shape": part.shape,
    "signed": part.activation and part.activation.signed,
    "packed": list(packed),
    "input": list(part.input_params),
  }


def _spec(quantizer):
  if quantizer is None:
    return None
  if quantizer.name not in quant.NAMES:
    raise ValueError(
      f"quantizer {quantizer.name!r}: allowed in an artifact are "
      f"{', '.join(quant.NAMES)}; see quant.register"
    )
  options = dict(quantizer.options)
  options.pop("signed", None)
  return {"name": quantizer.name, "options": options}


def _quantizer(spec):
  options = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in spec["options"].items()
  }
  return quant.get(spec["name"], **options)


def _digest(manifest):
  return hashlib.sha256(
    json.dumps(manifest, sort_keys=True).encode()
  ).hexdigest()


def _bytes(path):
  try:
    return path.read_bytes()
  except OSError as error:
    raise ArtifactError(f"{path}: {error.strerror or error}") from None

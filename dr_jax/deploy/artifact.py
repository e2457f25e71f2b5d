"""The integer artifact, opened: manifest, tensors, sizes, the network.

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

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from dr_jax import allocate, models, nn, quant
from dr_jax.nn import deployed
from dr_jax.runtime import files

FORMAT = "dr_jax"
VERSION = 2
TENSORS, MANIFEST = "model.safetensors", "manifest.json"


class ArtifactError(ValueError):
  """An artifact is missing, damaged, or of another format or network."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """An artifact in memory, verified.

  Attributes:
    path: its directory.
    manifest: what manifest.json says, without its own checksum.
    tensors: arrays by name, as stored.
  """

  path: pathlib.Path
  manifest: dict[str, Any]
  tensors: dict[str, np.ndarray]

  @functools.cached_property
  def weight(self) -> quant.WeightQuantizer:
    """The weight quantizer of all layers."""
    weight = _quantizer(self.manifest["method"])
    if not isinstance(weight, quant.WeightQuantizer):
      raise ArtifactError(
        f"{self.path} must have a weight quantizer as method, got "
        f"{weight.name!r}"
      )
    return weight

  @property
  def activation(self) -> quant.ActivationQuantizer | None:
    """The input quantizer of all layers, its sign open, or None."""
    spec = self.manifest["activation"]
    activation = _quantizer(spec) if spec else None
    if isinstance(activation, quant.WeightQuantizer):
      raise ArtifactError(
        f"{self.path} must have an activation quantizer, got "
        f"{activation.name!r}"
      )
    return activation

  @property
  def bits(self) -> tuple[int, ...]:
    """Candidate bit-widths, highest first."""
    return self.weight.bits

  @property
  def tensor_bytes(self) -> int:
    """Bytes of all tensors, without names and manifest."""
    return sum(tensor.nbytes for tensor in self.tensors.values())

  @property
  def stored_bytes(self) -> int:
    """Bytes of the files on disk."""
    return sum(file.stat().st_size for file in self.path.iterdir())

  def load(
    self,
    *,
    bits: int | Mapping[str, int] | None = None,
    model: nnx.Module | None = None,
  ) -> nnx.Module:
    """Builds the network; see `deploy.load`."""
    if model is None:
      if self.manifest["architecture"] is None:
        raise ArtifactError(
          f"{self.path} names no architecture: pass the float network, "
          "load(path, model=network)"
        )
      name, options = self.manifest["architecture"]
      model = models.build(name, rngs=nnx.Rngs(0), **options)
    try:
      network = nn.deployed.assemble(model, self._parts())
    except (KeyError, ValueError) as error:
      raise ArtifactError(f"{self.path}: {error}") from error
    if bits is not None:
      nn.set_bits(network, bits)
    return network

  @functools.cached_property
  def layer_bytes(self) -> dict[str, dict[int | str, int]]:
    """Bytes of each quantized weight: {layer: {"stored": n, 8: n, ...}}."""
    found = {}
    for layer in self.manifest["layers"]:
      packed = self._packed(layer)
      encoded = self.weight.storage.unpack(packed, tuple(layer["shape"]))
      sizes = {
        b: self.weight.storage.size(encoded, i) for i, b in enumerate(self.bits)
      }
      stored = sum(array.nbytes for array in packed.values())
      found[layer["name"]] = {"stored": stored, **sizes}
    return found

  def bytes_at(self, bits: int | Mapping[str, int]) -> int:
    """Bytes of a copy whose weights serve one assignment and no other.

    Of each quantized weight what its bit-width needs, by its method's
    `storage.size`, and everything else as it is.

    Args:
      bits: one bit-width, or {layer: bits}.

    Raises:
      ValueError: if the layers or bits are not the artifact's.
    """
    layers = self.layer_bytes
    if isinstance(bits, int):
      bits = dict.fromkeys(layers, bits)
    allocate.Allocation(bits).check(layers, self.bits)
    return self.tensor_bytes + sum(
      layer[bits[name]] - layer["stored"] for name, layer in layers.items()
    )

  def _packed(self, layer):
    name = layer["name"]
    return {key: self.tensors[f"{name}/{key}"] for key in layer["packed"]}

  def _parts(self) -> deployed.Parts:
    activation, layers = self.activation, {}
    for layer in self.manifest["layers"]:
      name, shape = layer["name"], tuple(layer["shape"])
      layers[name] = deployed.StoredLayer(
        info=nn.layers.LayerInfo(name, layer["order"], layer["macs"]),
        shape=shape,
        weight=self.weight,
        activation=activation and activation.with_sign(layer["signed"]),
        input_params={
          key: jnp.asarray(self.tensors[f"{name}/input/{key}"])
          for key in layer["input"]
        },
        encoded=self.weight.storage.unpack(self._packed(layer), shape),
      )
    norms = {
      name: deployed.StoredNorm(
        tuple(orders),
        jnp.asarray(self.tensors[f"{name}/gain"]),
        jnp.asarray(self.tensors[f"{name}/offset"]),
      )
      for name, orders in self.manifest["norms"].items()
    }
    floats = {
      name.removeprefix("float/"): jnp.asarray(value)
      for name, value in self.tensors.items()
      if name.startswith("float/")
    }
    return deployed.Parts(layers, norms, floats)


def open(path: str | os.PathLike) -> Artifact:
  """Reads and verifies an artifact.

  Raises:
    ArtifactError: naming the file that is missing, damaged or of another
      format.
  """
  path = files.expand(path)
  text, data = _bytes(path / MANIFEST), _bytes(path / TENSORS)
  manifest = _verified_manifest(path / MANIFEST, text)
  if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
    raise ArtifactError(f"{path / TENSORS} is damaged: its checksum differs")
  tensors = safetensors.numpy.load(data)
  for name in manifest["bfloat16"]:
    tensors[name] = tensors[name].view(jnp.bfloat16)
  return Artifact(path, manifest, tensors)


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
    ValueError: if `bits` is not a candidate.
  """
  return open(path).load(bits=bits, model=model)


def manifest_digest(manifest: Mapping[str, Any]) -> str:
  """The SHA-256 that a manifest carries of itself."""
  return hashlib.sha256(
    json.dumps(manifest, sort_keys=True).encode()
  ).hexdigest()


def _verified_manifest(path, text):
  try:
    manifest = json.loads(text)
    expected = manifest.pop("manifest_sha256")
  except (ValueError, KeyError, AttributeError, TypeError):
    raise ArtifactError(f"{path} is damaged: it is not a manifest") from None
  if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
    raise ArtifactError(
      f"{path} must have format {FORMAT!r} version {VERSION}, got "
      f"{manifest.get('format')!r} version {manifest.get('version')!r}"
    )
  if manifest_digest(manifest) != expected:
    raise ArtifactError(f"{path} is damaged: its checksum differs")
  return manifest


def _quantizer(spec):
  options = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in spec["options"].items()
  }
  return quant.get(spec["name"], **options)


def _bytes(path):
  try:
    return path.read_bytes()
  except OSError as error:
    raise ArtifactError(f"{path}: {error.strerror or error}") from None

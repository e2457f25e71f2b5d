"""The integer artifact, opened: manifest, tensors, sizes, the network.

An artifact is a directory:

  model.safetensors  per quantized layer what its method's `storage` packs
                     (codes, scales), input scales; folded norms; float
                     parameters
  manifest.json      format version, method and its options (tie rule,
                     candidate bits), layer table, architecture, SHA-256 of
                     the tensors and of the manifest itself

Any candidate bit-width is derived from the stored integers alone. Nothing is
pickled, and nothing is used before it is verified: checksums, and, since
whoever changes a file can change those too, that all parts fit (`verify`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from dr_jax import allocate, models, nn, quant
from dr_jax.deploy.manifest import (
  check_manifest,
  guarded,
  quantizers,
  with_sign,
)
from dr_jax.deploy.verify import (
  check_architecture,
  check_header,
  check_tensors,
)
from dr_jax.nn import deployed
from dr_jax.runtime import files, schema

FORMAT = "dr_jax"
VERSION = 2
TENSORS, MANIFEST = "model.safetensors", "manifest.json"
# Of ten thousand layers; JSON takes a second.
_LARGEST_MANIFEST = 2**22
# A file of this size or more must not consist of holes, which read as zeros.
_SPARSE = 2**26


class ArtifactError(ValueError):
  """An artifact is missing, damaged, or of another format or network."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """An artifact in memory, verified.

  Attributes:
    path: its directory.
    manifest: what manifest.json says, without its own checksum.
    tensors: arrays by name, as stored.
    weight: the weight quantizer of all layers.
    activation: the input quantizer of all layers, its sign open, or None.
    encoded: what each quantized layer stores, unpacked.
  """

  path: pathlib.Path
  manifest: dict[str, Any]
  tensors: dict[str, np.ndarray]
  weight: quant.WeightQuantizer
  activation: quant.ActivationQuantizer | None
  encoded: dict[str, dict[str, jax.Array]]

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
      model = self._architecture(*self.manifest["architecture"])
    try:
      network = nn.deployed.assemble(model, self._parts())
    except ValueError as error:
      raise ArtifactError(f"{self.path}: {error}") from error
    if bits is not None:
      nn.set_bits(network, bits)
    return network

  @functools.cached_property
  def layer_bytes(self) -> dict[str, dict[int | str, int]]:
    """Bytes of each quantized weight: {layer: {"stored": n, 8: n, ...}}."""
    found = {}
    for layer in self.manifest["layers"]:
      encoded = self.encoded[layer["name"]]
      sizes = {
        b: self.weight.storage.size(encoded, i) for i, b in enumerate(self.bits)
      }
      stored = sum(array.nbytes for array in self._packed(layer).values())
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

  def _architecture(self, name, options):
    with _errors_of(self.path / MANIFEST):
      check_architecture((name, options), self.manifest, self.tensors)
      return guarded(
        "architecture",
        lambda: models.build(name, rngs=nnx.Rngs(0), **options),
      )

  def _parts(self) -> deployed.Parts:
    layers = {}
    for layer in self.manifest["layers"]:
      name, shape = layer["name"], tuple(layer["shape"])
      layers[name] = deployed.StoredLayer(
        info=nn.layers.LayerInfo(name, layer["order"], layer["macs"]),
        shape=shape,
        weight=self.weight,
        activation=with_sign(self.activation, layer["signed"]),
        input_params={
          key: jnp.asarray(self.tensors[f"{name}/input/{key}"])
          for key in layer["input"]
        },
        encoded=self.encoded[name],
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
      format, and the field or tensor that is wrong in it.
  """
  path = files.expand(path)
  text = _bytes(path / MANIFEST, _LARGEST_MANIFEST)
  with _errors_of(path / MANIFEST):
    manifest = _verified_manifest(text)
    weight, activation = quantizers(manifest)
  data = _bytes(path / TENSORS, _memory(), check_header)
  with _errors_of(path / TENSORS):
    tensors = _verified_tensors(data, manifest)
    encoded = check_tensors(manifest, tensors, weight, activation)
  return Artifact(path, manifest, tensors, weight, activation, encoded)


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


@contextlib.contextmanager
def _errors_of(path):
  """Makes an ArtifactError that names the file of every error of a check."""
  try:
    yield
  except ArtifactError:
    raise
  except ValueError as error:
    raise ArtifactError(f"{path}: {error}") from None


def _verified_manifest(text):
  manifest = schema.parse(text)
  schema.check(manifest, {...: object})
  if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
    raise ValueError(
      f"must have format {FORMAT!r} version {VERSION}, got "
      f"{schema.shown(manifest.get('format'))} version "
      f"{schema.shown(manifest.get('version'))}"
    )
  expected = manifest.pop("manifest_sha256", None)
  if manifest_digest(manifest) != expected:
    raise ValueError("is damaged: its checksum differs")
  check_manifest(manifest)
  return manifest


def _verified_tensors(data, manifest):
  if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
    raise ValueError("is damaged: its checksum differs")
  tensors = guarded("is no safetensors file", safetensors.numpy.load, data)
  for name in manifest["bfloat16"]:
    if name not in tensors or tensors[name].dtype != np.uint16:
      raise ValueError(f"bfloat16 must name tensors of uint16, got {name!r}")
    tensors[name] = tensors[name].view(jnp.bfloat16)
  return tensors


def _bytes(path, limit, check=None):
  """The bytes of a regular file that has at most `limit` of them.

  `check(file, size)` may look into the file before all of it is read.
  """
  try:
    with _errors_of(path), files.open_regular(path, os.O_RDONLY) as file:
      size = os.fstat(file.fileno()).st_size
      if size > limit:
        raise ValueError(f"must have at most {limit} bytes, got {size}")
      if size >= _SPARSE and _present(file, size) < size // 8:
        raise ValueError("must not be a sparse file")
      if check is not None:
        check(file, size)
        file.seek(0)
      return file.read(size)
  except OSError as error:
    raise ArtifactError(f"{path}: {error.strerror or error}") from None


def _present(file, size):
  """Bytes of a file that are stored: all but its holes."""
  if not hasattr(os, "SEEK_DATA"):
    return size
  end = present = 0
  while end < size:
    try:
      start = os.lseek(file.fileno(), end, os.SEEK_DATA)
    except OSError:  # Only a hole is left.
      break
    end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
    present += end - start
  file.seek(0)
  return present


def _memory():
  """Bytes that can be read at once: half of this machine's memory."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

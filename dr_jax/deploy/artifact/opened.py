"""The integer artifact, opened: manifest, parts, sizes, the network.

An artifact is a directory:

  model.safetensors  per quantized layer what its method's `storage` packs
                     (codes, scales), input scales; folded norms; float
                     parameters (see `layout`)
  manifest.json      format version, method and its options (tie rule,
                     candidate bits), layer table, architecture, SHA-256 of
                     the tensors and of the manifest itself

Any candidate bit-width is derived from the stored integers alone, and where
the method's codes nest, from their top bit-planes: only these are read. Nothing
is pickled, and nothing is used before it is verified: checksums, and, since
whoever changes a file can change those too, that all parts fit (`verify`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from dr_jax import allocate, nn, quant
from dr_jax.allocate.problem import integer
from dr_jax.deploy.artifact.layout import Layout, layout_of, packed_layout
from dr_jax.deploy.artifact.manifest import (
  MANIFEST,
  TENSORS,
  read_manifest,
)
from dr_jax.deploy.artifact.reader import ArtifactError, errors_of, open_file
from dr_jax.deploy.artifact.store import Store, open_store
from dr_jax.deploy.artifact.verify import abstract_network, checked_parts
from dr_jax.runtime import files

# Of ten thousand layers; JSON takes a second.
_LARGEST_MANIFEST = 2**22

# One bit-width for all layers, or {layer: bits}.
Assignment = int | Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Artifact:
  """An artifact in memory, or the part of it that some bits need; verified.

  Attributes:
    path: its directory.
    manifest: what manifest.json says, without its own checksum.
    opened: {layer: bits} that was asked for last; `load` starts there.
    parts: what was read: quantized layers, norms, float parameters.
    read_bytes: bytes read from disk so far.
    store: what was read as the file has it, and where the rest lies.
  """

  path: pathlib.Path
  manifest: dict[str, Any] = dataclasses.field(repr=False)
  opened: dict[str, int]
  parts: nn.deployed.Parts = dataclasses.field(repr=False)
  read_bytes: int
  store: Store = dataclasses.field(repr=False)

  @property
  def weight(self) -> quant.WeightQuantizer:
    """The weight quantizer of all layers."""
    return self.store.layout.weight

  @property
  def bits(self) -> tuple[int, ...]:
    """Candidate bit-widths, highest first."""
    return self.weight.bits

  @property
  def encoded(self) -> dict[str, dict[str, jax.Array]]:
    """What each quantized layer stores, unpacked; bits not read are zeros."""
    return {name: layer.encoded for name, layer in self.parts.layers.items()}

  @property
  def tensor_bytes(self) -> int:
    """Bytes of all tensors on disk, without names, checksums and manifest."""
    return self.store.tensor_bytes

  @property
  def stored_bytes(self) -> int:
    """Bytes of the files on disk."""
    return sum(file.stat().st_size for file in self.path.iterdir())

  def holds(self, bits: Assignment) -> bool:
    """Whether an assignment was read: `load` can switch to it.

    Raises:
      ValueError: if the layers or bits are not the artifact's.
    """
    layout = self.store.layout
    wanted = layout.pieces_for(_assignment(bits, layout))
    return all(piece in self.store.pieces for piece in wanted)

  def upgrade(self, bits: Assignment | None = None) -> Artifact:
    """Reads what an assignment needs and was not read yet, nothing else.

    Args:
      bits: one bit-width, {layer: bits}, or None for all that is stored.

    Returns:
      An artifact that holds what both need, opened at `bits`; this one stays
      as it is.

    Raises:
      ArtifactError: if the file is damaged, or not the one that was opened.
      ValueError: if the layers or bits are not the artifact's.
    """
    layout = self.store.layout
    opened = _assignment(bits, layout)
    wanted = layout.pieces_for(None if bits is None else opened)
    store = self.store.with_pieces(wanted)
    read = store.read_bytes - self.store.read_bytes
    parts = self.parts
    if read:
      with errors_of(store.path):
        parts = _parts(self.manifest, store)
    return dataclasses.replace(
      self,
      opened=opened,
      parts=parts,
      read_bytes=self.read_bytes + read,
      store=store,
    )

  def load(
    self,
    *,
    bits: Assignment | None = None,
    model: nnx.Module | None = None,
    backend: str = "float",
    sample: Any = None,
  ) -> nnx.Module:
    """Builds the network; see `deploy.load`.

    It holds what was read: `nn.set_bits` to anything else is a ValueError, and
    an index in a compiled program that asks for anything else gives NaN.
    """
    if model is None:
      model = self.architecture()
    try:
      network = nn.deployed.assemble(model, self.parts)
    except ValueError as error:
      raise ArtifactError(f"{self.path}: {error}") from error
    nn.set_bits(network, self.opened if bits is None else bits)
    nn.set_backend(network, backend, sample=sample)
    return network

  def architecture(self) -> nnx.Module:
    """Builds the float network that the manifest names, without values.

    Raises:
      ArtifactError: if it names none, or one that cannot hold the parts.
    """
    if self.manifest["architecture"] is None:
      raise ArtifactError(
        f"{self.path} names no architecture: pass the float network, "
        "load(path, model=network)"
      )
    with errors_of(self.path / MANIFEST):
      tensors = self.store.header.tensors.values()
      stored = sum(math.prod(tensor.shape) for tensor in tensors)
      return abstract_network(self.manifest["architecture"], self.parts, stored)

  @functools.cached_property
  def layer_bytes(self) -> dict[str, dict[int | str, int]]:
    """Bytes of each quantized weight: {layer: {"stored": n, 8: n, ...}}."""
    found = {}
    for name, layer in self.parts.layers.items():
      size = self.weight.storage.size
      sizes = {b: size(layer.encoded, i) for i, b in enumerate(self.bits)}
      found[name] = {"stored": self._stored_bytes(name, layer.shape), **sizes}
    return found

  def bytes_at(self, bits: Assignment) -> int:
    """Bytes of a copy whose weights serve one assignment and no other.

    Of each quantized weight what its bit-width needs, by its method's
    `storage.size`, and everything else as it is. What `open` reads to serve it
    is `bytes_read_at`.

    Args:
      bits: one bit-width, or {layer: bits}.

    Raises:
      ValueError: if the layers or bits are not the artifact's.
    """
    bits = _assignment(bits, self.store.layout)
    layers = self.layer_bytes
    return self.tensor_bytes + sum(
      layer[bits[name]] - layer["stored"] for name, layer in layers.items()
    )

  def bytes_read_at(self, bits: Assignment) -> int:
    """Bytes that `open` reads of both files to serve one assignment.

    Args:
      bits: one bit-width, or {layer: bits}.

    Raises:
      ValueError: if the layers or bits are not the artifact's.
    """
    layout = self.store.layout
    wanted = layout.pieces_for(_assignment(bits, layout))
    manifest = (self.path / MANIFEST).stat().st_size
    return manifest + self.store.bytes_to_read(wanted)

  def _stored_bytes(self, name, shape):
    joined = self.store.layout.layers.values()
    stored = sum(
      math.prod(tensor.shapes[name])
      * self.store.header.tensors[tensor.name].dtype.itemsize
      for tensor in joined
    )
    if self.weight.storage.planes:
      stored += math.prod(packed_layout(self.weight, shape)["codes"].shape)
    return stored


def open(path: str | os.PathLike, bits: Assignment | None = None) -> Artifact:
  """Reads and verifies an artifact, or what some bits need of it.

  Args:
    path: the directory.
    bits: bit-width to read, or one per layer. Of codes that nest only the
      bit-planes that it needs are read, of norms only its rows, the rest by
      `Artifact.upgrade`. None reads all.

  Raises:
    ArtifactError: naming the file that is missing, damaged or of another
      format, and the field or tensor that is wrong in it.
    ValueError: if the layers or bits are not the artifact's.
  """
  path = files.expand(path)
  with open_file(path / MANIFEST, _LARGEST_MANIFEST) as reader:
    manifest = read_manifest(reader.read(0, reader.size))
    layout = layout_of(manifest)
  opened = _assignment(bits, layout)
  # Of a manifest whose sections the file has: there can be many pieces.
  store = open_store(path / TENSORS, manifest["sha256"], layout)
  store = store.with_pieces(layout.pieces_for(None if bits is None else opened))
  with errors_of(path / TENSORS):
    parts = _parts(manifest, store)
  read_bytes = reader.read_bytes + store.read_bytes
  return Artifact(path, manifest, opened, parts, read_bytes, store)


def load(
  path: str | os.PathLike,
  *,
  bits: Assignment | None = None,
  model: nnx.Module | None = None,
  backend: str = "float",
  sample: Any = None,
) -> nnx.Module:
  """Loads an artifact as a network that switches bit-widths.

  Args:
    path: the directory.
    bits: bit-width to start with, or one per layer; the highest by default.
      `nn.set_bits` switches later, from the stored codes: all are read. To read
      no more than some bits need, `open(path, bits).load()`.
    model: the float network that was quantized, with any weights; by default
      it is built from the architecture in the manifest.
    backend: how layers compute: "float", "integer", "im2col", "carrier",
      "planes", or "auto" for the fastest of them on this device; see
      `nn.set_backend`.
    sample: for "auto", inputs as the network will get them.

  Returns:
    The network, in inference mode.

  Raises:
    ArtifactError: if a file is missing, damaged or of another format, or the
      artifact belongs to another network; nothing is half-loaded.
    ValueError: if `bits` is not a candidate, or the backend cannot compute a
      layer.
  """
  return open(path).load(bits=bits, model=model, backend=backend, sample=sample)


def _assignment(bits, layout: Layout) -> dict[str, int]:
  """{layer: bits} in the order of the layers, the highest for None."""
  candidates, names = layout.weight.bits, layout.names
  if bits is None:
    bits = candidates[0]
  if not isinstance(bits, Mapping):
    if integer("bits", bits) not in candidates:
      raise ValueError(f"bits must be one of {candidates}, got {bits!r}")
    return dict.fromkeys(names, bits)
  allocate.Allocation(bits).check(names, candidates)
  return {name: bits[name] for name in names}


def _parts(manifest, store):
  return checked_parts(manifest, store.layout, store.tensors, store.pieces)

"""What an artifact holds, in words: layers, sizes, metadata, checksums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flax import nnx

from dr_jax import allocate
from dr_jax.deploy.artifact.layout import CHECKSUMS, SUBCHECKSUMS
from dr_jax.deploy.artifact.manifest import MANIFEST
from dr_jax.deploy.artifact.opened import Artifact
from dr_jax.nn.contraction import base_of, contraction_of
from dr_jax.nn.layer_table import aligned

# Tensors by the first part of their names.
_CONTENTS = {
  "weights": ("layers", "planes"),
  "inputs": ("inputs", "operands"),
  "norms": ("norms",),
  "float parameters": ("float",),
  "checksums": (CHECKSUMS, SUBCHECKSUMS),
}


def describe(artifact: Artifact) -> str:
  """Returns what an artifact holds, as text of several paragraphs.

  Metadata; the layers with their bytes at the bits that it was opened at; sizes
  at every candidate bit-width; what takes how many bytes; what was verified.

  Args:
    artifact: opened at some bits, or all of it.

  Raises:
    ArtifactError: if the manifest names a network that cannot be built.
  """
  kinds = _kinds(artifact)
  paragraphs = (
    aligned(_metadata(artifact)),
    _layers(artifact, kinds),
    aligned(_sizes(artifact)),
    aligned(_contents(artifact)),
    _verified(artifact),
  )
  return "\n\n".join(paragraphs)


def contents(artifact: Artifact) -> dict[str, int]:
  """Returns the bytes of both files by what they are for."""
  tensors = artifact.store.header.tensors.items()
  found = {
    what: sum(
      tensor.end - tensor.start
      for name, tensor in tensors
      if name.split("/")[0] in prefixes
    )
    for what, prefixes in _CONTENTS.items()
  }
  manifest = (artifact.path / MANIFEST).stat().st_size
  header = len(artifact.store.header.data)
  return found | {"header": header, "manifest": manifest}


def _metadata(artifact):
  manifest = artifact.manifest
  shapes = [layer["shape"] for layer in manifest["layers"]]
  macs = sum(layer["macs"] for layer in manifest["layers"])
  yield "artifact", str(artifact.path)
  yield "format", f"{manifest['format']} version {manifest['version']}"
  for field in ("method", "activation", "products"):
    if (spec := manifest.get(field)) is not None:
      yield field, _call(spec["name"], spec["options"])
  if manifest["architecture"] is not None:
    yield "architecture", _call(*manifest["architecture"])
  yield (
    "quantized",
    f"{len(shapes)} layers of {sum(map(math.prod, shapes)):,} weights and "
    f"{macs:,} multiply-accumulates an example",
  )
  yield "bits", ", ".join(map(str, artifact.bits))


def _call(name: str, options: Mapping[str, Any]) -> str:
  given = ", ".join(f"{key}={value!r}" for key, value in options.items())
  return f"{name}({given})"


def _kinds(artifact) -> dict[str, str]:
  """The kind of each layer, as far as the manifest says what network it is."""
  if artifact.manifest["architecture"] is None:
    return {}
  return {
    "/".join(map(str, path)): contraction_of(module).kind
    for path, module in nnx.iter_modules(artifact.architecture())
    if base_of(module) is not None
  }


def _layers(artifact, kinds):
  signs = {None: "float", True: "signed", False: "unsigned"}
  columns: dict[str, dict[str, str]] = {
    title: {} for title in ("kind", "shape", "weights", "MACs", "inputs")
  }
  for layer in artifact.manifest["layers"]:
    cells = (
      kinds.get(layer["name"], ""),
      "x".join(map(str, layer["shape"])),
      f"{math.prod(layer['shape']):,}",
      f"{layer['macs']:,}",
      signs[layer["signed"]],
    )
    for column, cell in zip(columns.values(), cells, strict=True):
      column[layer["name"]] = cell
  sizes = artifact.layer_bytes
  used = {
    name: f"{sizes[name][bits]:,}" for name, bits in artifact.opened.items()
  }
  opened = allocate.Allocation(artifact.opened)
  return opened.table(**columns, bytes=used)


def _sizes(artifact):
  """Bytes at every candidate, and at an allocation that was opened."""
  yield "bits", "bytes of a copy", "bytes read", "weights alone"
  assignments: dict[str, Any] = {str(b): b for b in artifact.bits}
  if len(set(artifact.opened.values())) > 1:
    assignments["as above"] = artifact.opened
  layers = artifact.layer_bytes
  for title, bits in assignments.items():
    at = bits if isinstance(bits, Mapping) else dict.fromkeys(layers, bits)
    sizes = (
      artifact.bytes_at(bits),
      artifact.bytes_read_at(bits),
      sum(sizes[at[name]] for name, sizes in layers.items()),
    )
    yield title, *(f"{size:,}" for size in sizes)


def _contents(artifact):
  yield "content", "bytes"
  found = contents(artifact)
  for what, size in found.items():
    if size:
      yield what, f"{size:,}"
  yield "both files", f"{sum(found.values()):,}"


def _verified(artifact):
  """What was verified: an artifact that is open has no damage that was read."""
  read, all_of_it = len(artifact.store.pieces), len(artifact.store.ranges)
  pieces = f"{read} of {all_of_it} pieces" if all_of_it else "no pieces"
  kept = "" if read == all_of_it else "; the others were not read"
  return (
    f"checksums  OK: manifest, header, all whole tensors, {pieces}{kept}\n"
    f"sha256     {artifact.manifest['sha256']} (of header and whole tensors)"
  )

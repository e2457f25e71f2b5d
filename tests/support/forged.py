"""Artifacts that someone changed on purpose, with checksums that fit."""

import hashlib
import json

import numpy as np
import safetensors.numpy

from dr_jax.deploy.artifact.manifest import MANIFEST, TENSORS, manifest_digest

CHECKSUMS = ("checksums", "subchecksums")


def sizes_of(manifest, tensors):
  """{section: entries of each piece}, as far as the manifest says."""
  norms, layers = manifest["norms"], manifest["layers"]
  pairs = any(len(norm["follows"]) == 2 for norm in norms.values())
  found = {}
  for norm in norms.values():
    for row in range(norm["rows"]):
      single = pairs and len(norm["follows"]) == 1
      number = row * (norm["rows"] + 1) if single else row
      found.setdefault(number, []).append(2 * norm["channels"])
  found = {f"norms/{number}": found[number] for number in sorted(found)}
  sizes = [-(-int(np.prod(layer["shape"])) // 8) for layer in layers]
  planes = sorted(name for name in tensors if name.startswith("planes/"))
  return found | dict.fromkeys(planes, sizes)


def with_checksums(manifest, tensors):
  """Tensors with the checksums of their pieces."""
  whole, single = [], []
  for section, sizes in sizes_of(manifest, tensors).items():
    ends = np.cumsum(sizes)[:-1]
    pieces = np.split(tensors[section].reshape(-1), ends)
    digests = [hashlib.sha256(piece.tobytes()).digest() for piece in pieces]
    single += digests
    whole.append(hashlib.sha256(b"".join(digests)).digest())
  rows = zip(CHECKSUMS, (whole, single), strict=True)
  return tensors | {
    name: np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    for name, digests in rows
    if digests
  }


def whole_sha256(data):
  """SHA-256 of the header and of what every reading needs."""
  begin = 8 + int.from_bytes(data[:8], "little")
  found = hashlib.sha256(data[:begin])
  entries = json.loads(data[8:begin])
  for name, entry in sorted(
    entries.items(), key=lambda item: item[1]["data_offsets"]
  ):
    partial = name.startswith(("norms/", "planes/")) or name == "subchecksums"
    if not partial:
      start, end = entry["data_offsets"]
      found.update(data[begin + start : begin + end])
  return found.hexdigest()


def signed(manifest, data):
  """Both files with checksums that fit, as far as the header can be read."""
  manifest = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
  try:
    manifest |= {"sha256": whole_sha256(data)}
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
    pass  # It is refused.
  manifest["manifest_sha256"] = manifest_digest(manifest)
  return {MANIFEST: json.dumps(manifest).encode(), TENSORS: data}


def serialized(manifest, tensors):
  """The tensor file, with checksums of the pieces that fit if any can."""
  try:
    tensors = with_checksums(manifest, tensors)
  except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
    pass
  return safetensors.numpy.save(
    {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  )


def resign(path, **changes):
  """Changes fields of the manifest, and its checksums with them."""
  manifest = json.loads((path / MANIFEST).read_text()) | changes
  data = (path / TENSORS).read_bytes()
  for name, content in signed(manifest, data).items():
    (path / name).write_bytes(content)


def rewrite(path, **arrays):
  """Changes tensors, and the checksums with them; None removes one."""
  manifest = json.loads((path / MANIFEST).read_text())
  tensors = safetensors.numpy.load_file(path / TENSORS) | arrays
  kept = {name: a for name, a in tensors.items() if a is not None}
  (path / TENSORS).write_bytes(serialized(manifest, kept))
  resign(path)

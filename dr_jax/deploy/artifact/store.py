"""What was read of a tensor file so far, verified, and where the rest lies.

  sha256 of the manifest    header, and all tensors but sections, in file order
  checksums[s]              SHA-256 of the SHA-256 of every piece of section s
  subchecksums[p]           SHA-256 of piece p, in the order of the file

A section that is read as a whole is verified by its checksum, one that is read
in part by its subchecksums, and these by the checksum too.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dr_jax.deploy.artifact.layout import (
  CHECKSUMS,
  DIGEST_BYTES,
  SUBCHECKSUMS,
  Layout,
  Piece,
)
from dr_jax.deploy.artifact.manifest import Broken
from dr_jax.deploy.artifact.reader import Reader, open_file
from dr_jax.deploy.artifact.tensor_file import Header, parse_header, read_header


@dataclasses.dataclass(frozen=True)
class Store:
  """The part of a tensor file that is in memory.

  Attributes:
    path: of the file.
    layout: what lies where.
    header: where each tensor begins and ends.
    tensors: the ones that every reading needs, by name.
    pieces: what was read of the sections.
    read_bytes: bytes read from the file so far.
  """

  path: pathlib.Path
  layout: Layout
  header: Header
  tensors: dict[str, np.ndarray]
  pieces: dict[Piece, np.ndarray]
  read_bytes: int

  @property
  def tensor_bytes(self) -> int:
    """Bytes of all tensors of the file but the checksums."""
    return sum(
      tensor.end - tensor.start
      for name, tensor in self.header.tensors.items()
      if name not in (CHECKSUMS, SUBCHECKSUMS)
    )

  @functools.cached_property
  def ranges(self) -> dict[Piece, tuple[int, int, Any, tuple[int, ...]]]:
    """{piece: (first byte, the one after its last, dtype, shape)}."""
    found = {}
    for section in self.layout.sections:
      dtype, _, begin, _ = self.header.tensors[section.name]
      item = dtype.itemsize
      for name, start, end in section.offsets():
        ends = begin + start * item, begin + end * item
        found[section.name, name] = (*ends, dtype, section.shapes[name])
    return found

  def bytes_to_read(self, wanted: Sequence[Piece]) -> int:
    """Bytes that opening the file and reading some pieces of it takes.

    What was read before does not count.
    """
    whole = _whole(self.header, self.layout).values()
    size = len(self.header.data) + sum(t.end - t.start for t in whole)
    for start, end, *_ in map(self.ranges.__getitem__, wanted):
      size += end - start
    sections = self.layout.sections
    listed = self._listed(wanted, wanted)
    return size + sum(len(sections[n].shapes) for n in listed) * DIGEST_BYTES

  def with_pieces(self, wanted: Sequence[Piece]) -> Store:
    """Reads the pieces that are missing, and nothing else.

    Raises:
      ArtifactError: if the file, or what was read, is damaged.
    """
    missing = [piece for piece in wanted if piece not in self.pieces]
    if not missing:
      return self
    with open_file(self.path) as reader:
      return self._with_read(reader, missing)

  def _with_read(self, reader: Reader, missing: Sequence[Piece]) -> Store:
    ranges = self.ranges
    data = reader.read_all([ranges[piece][:2] for piece in missing])
    pieces = dict(self.pieces)
    for piece, content in zip(missing, data, strict=True):
      *_, dtype, shape = ranges[piece]
      pieces[piece] = np.frombuffer(content, dtype).reshape(shape)
    read = {section for section, _ in missing}
    listed = self._listed(missing, pieces)
    for number, section in enumerate(self.layout.sections):
      if section.name in read:
        self._verify(reader, number, pieces, listed=number in listed)
    return dataclasses.replace(
      self, pieces=pieces, read_bytes=self.read_bytes + reader.read_bytes
    )

  def _listed(self, read, held):
    """Numbers of the sections whose subchecksums are read with pieces.

    Those that are held in part; all of a file that is read at once, so that
    damage can be named.

    Args:
      read: the pieces that are read.
      held: these, and those that were read before.
    """
    everything = len(read) == len(self.ranges)
    touched = {section for section, _ in read}
    count = collections.Counter(section for section, _ in held)
    return {
      number
      for number, section in enumerate(self.layout.sections)
      if section.name in touched
      and (everything or count[section.name] < len(section.shapes))
    }

  def _verify(self, reader, number, pieces, listed):
    """Checks what is held of a section, by its subchecksums if `listed`."""
    section = self.layout.sections[number]
    digests = {
      name: digest(pieces[section.name, name])
      for name in section.shapes
      if (section.name, name) in pieces
    }
    rows = b"".join(digests.values())
    if listed:
      before = sum(len(s.shapes) for s in self.layout.sections[:number])
      start = self.header.tensors[SUBCHECKSUMS].start + before * DIGEST_BYTES
      rows = reader.read(start, start + len(section.shapes) * DIGEST_BYTES)
    if digest(rows) != self.tensors[CHECKSUMS][number].tobytes():
      name = SUBCHECKSUMS if listed else section.name
      raise Broken(f"{name} is damaged: its checksum differs")
    for position, name in enumerate(section.shapes):
      start = position * DIGEST_BYTES
      expected = rows[start : start + DIGEST_BYTES]
      if digests.get(name, expected) != expected:
        raise Broken(
          f"{section.name} is damaged: the checksum of {name} differs"
        )


def open_store(path: pathlib.Path, sha256: str, layout: Layout) -> Store:
  """Reads what every bit-width needs, and no pieces.

  Args:
    path: of the tensor file.
    sha256: what the manifest says.
    layout: what it says lies where.

  Raises:
    ArtifactError: naming the file, and the tensor that is damaged or is not
      what the manifest says.
  """
  with open_file(path) as reader:
    header = read_header(reader)
    tensors = _read_whole(reader, header, layout, sha256)
    _check_header(header, layout)
    return Store(path, layout, header, tensors, {}, reader.read_bytes)


def checksums_of(
  layout: Layout, pieces: Mapping[Piece, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns `checksums` and `subchecksums`, each by name; none of nothing."""
  whole, single = [], []
  for section in layout.sections:
    digests = [digest(pieces[section.name, name]) for name in section.shapes]
    single += digests
    whole.append(digest(b"".join(digests)))
  if not whole:
    return {}, {}
  both = (
    np.frombuffer(b"".join(rows), np.uint8).reshape(-1, DIGEST_BYTES)
    for rows in (whole, single)
  )
  checksums, subchecksums = both
  return {CHECKSUMS: checksums}, {SUBCHECKSUMS: subchecksums}


def sha256_of(header: bytes, data: bytes, layout: Layout) -> str:
  """SHA-256 of a header and of the tensors that every reading needs.

  Args:
    header: the first bytes of a tensor file.
    data: the others.
    layout: what it says lies where.
  """
  found = parse_header(header, len(header) + len(data))
  content = memoryview(header + data)
  return _sha256(
    found, [content[t.start : t.end] for t in _whole(found, layout).values()]
  )


def digest(content: bytes | np.ndarray) -> bytes:
  """SHA-256 of an array's bytes."""
  data = content.tobytes() if isinstance(content, np.ndarray) else content
  return hashlib.sha256(data).digest()


def _whole(header, layout):
  """The tensors that every reading needs, in the order of the file."""
  partial = {section.name for section in layout.sections} | {SUBCHECKSUMS}
  return {n: t for n, t in header.tensors.items() if n not in partial}


def _read_whole(reader, header, layout, sha256):
  whole = _whole(header, layout)
  data = reader.read_all([(t.start, t.end) for t in whole.values()])
  if _sha256(header, data) != sha256:
    raise Broken("is damaged: its checksum differs")
  return {
    name: np.frombuffer(content, tensor.dtype).reshape(tensor.shape)
    for (name, tensor), content in zip(whole.items(), data, strict=True)
  }


def _sha256(header, arrays):
  found = hashlib.sha256(header.data)
  for array in arrays:
    found.update(array)
  return found.hexdigest()


def _check_header(header, layout):
  """Checks that all tensors of the layout are there, and no others."""
  expected = _expected(layout)
  for name, (dtype, shape) in expected.items():
    tensor = header.tensors.get(name)
    if tensor is None:
      raise Broken(f"tensor {name} is missing")
    if not _has_dtype(tensor.dtype, dtype) or tensor.shape != shape:
      raise Broken(
        f"tensor {name} must be {dtype or 'floats'} {shape}, got "
        f"{tensor.dtype} {tensor.shape}"
      )
  for name in header.tensors:
    if name not in expected and not name.startswith("float/"):
      raise Broken(f"tensor {name} belongs to no layer or norm")
  floats = [s.name for s in layout.sections if s.dtype is None]
  for name in floats:
    dtype, first = (header.tensors[n].dtype for n in (name, floats[0]))
    if dtype != first:
      raise Broken(f"tensor {name} must be {first}, as others, got {dtype}")


def _expected(layout) -> dict[str, tuple[Any, tuple[int, ...]]]:
  """Dtype and shape of every tensor but `float/...`; None for any floats."""
  sections = layout.sections
  whole = (layout.layers, layout.inputs, layout.operands)
  joined = (*(t for tensors in whole for t in tensors.values()), *sections)
  expected: dict[str, tuple[Any, tuple[int, ...]]] = {
    tensor.name: (tensor.dtype, (tensor.size,)) for tensor in joined
  }
  if sections:
    byte, pieces = np.dtype(np.uint8), sum(len(s.shapes) for s in sections)
    expected[CHECKSUMS] = byte, (len(sections), DIGEST_BYTES)
    expected[SUBCHECKSUMS] = byte, (pieces, DIGEST_BYTES)
  return expected


def _has_dtype(found, expected):
  """Whether a dtype is the one that is expected, floats of any size for None.

  What is a float64 with jax_enable_x64 is a float32 without.
  """
  if expected is None:
    return jnp.issubdtype(found, jnp.floating)
  wide = (np.float32, np.float64)
  return found == expected or (found in wide and expected in wide)

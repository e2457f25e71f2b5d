"""Reads a file that can come from anywhere, and no more of it than is asked."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import IO

from dr_jax.deploy.artifact.manifest import Broken
from dr_jax.runtime import files

# A file of this size or more must not consist of holes, which read as zeros.
_SPARSE = 2**26

Range = tuple[int, int]


class ArtifactError(ValueError):
  """An artifact is missing, damaged, or of another format or network."""


@contextlib.contextmanager
def errors_of(path: pathlib.Path) -> Iterator[None]:
  """Makes an ArtifactError that names the file of every error of a check."""
  try:
    yield
  except ArtifactError:
    raise
  except OSError as error:
    raise ArtifactError(f"{path}: {error.strerror or error}") from None
  except ValueError as error:
    raise ArtifactError(f"{path}: {error}") from None


class Reader:
  """A file that is open.

  Attributes:
    size: its bytes.
    read_bytes: how many of them were read so far.
  """

  def __init__(self, file: IO[bytes]):
    self._descriptor = file.fileno()
    self.size = os.fstat(self._descriptor).st_size
    self.read_bytes = 0

  def read(self, start: int, end: int) -> bytes:
    """Reads the bytes from `start` up to `end`, and none besides."""
    pieces = []
    while start < end:
      # A file object would read ahead; one call returns at most 2 GiB.
      piece = os.pread(self._descriptor, end - start, start)
      if not piece:
        raise Broken(f"is damaged: it ends at byte {start}")
      pieces.append(piece)
      start += len(piece)
      self.read_bytes += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)

  def read_all(self, ranges: Sequence[Range]) -> list[memoryview]:
    """Reads ranges in the order of the file, neighbors in one call."""
    runs: list[list[Range]] = []
    for start, end in ranges:
      if runs and runs[-1][-1][1] == start:
        runs[-1].append((start, end))
      else:
        runs.append([(start, end)])
    found = []
    for run in runs:
      first = run[0][0]
      data = memoryview(self.read(first, run[-1][1]))
      found += [data[start - first : end - first] for start, end in run]
    return found


@contextlib.contextmanager
def open_file(path: pathlib.Path, limit: int | None = None) -> Iterator[Reader]:
  """Opens a regular file that is not sparse.

  Args:
    path: the file.
    limit: how many bytes it may have; by default half of this machine's memory.

  Raises:
    ArtifactError: naming the file, if it is anything else; also of every
      ValueError in the block.
  """
  limit = limit or _memory() // 2
  with errors_of(path), files.open_regular(path, os.O_RDONLY) as file:
    reader = Reader(file)
    if reader.size > limit:
      raise Broken(f"must have at most {limit} bytes, got {reader.size}")
    if (
      reader.size >= _SPARSE and _present(file, reader.size) < reader.size // 8
    ):
      raise Broken("must not be a sparse file")
    yield reader


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
  return present


def _memory():
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""Bytes of real text, in sequences with the byte that follows each.

Without a path the text is Python's own documentation, which every installation
has: the language reference (`pydoc_data.topics`) and the docstrings of the
standard library without its tests, 2.2 MB in Python 3.11; other versions of
Python have other texts. With one it is the .txt files in a directory per split.

A document is as long as it is; documents are joined by a zero byte, in the
order of the SHA-256 of their names, so that the first bytes of a text are a
fair sample of it. Where there are no splits, a tenth of the documents, by the
same hash, is for testing: no document is in both.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator, Mapping

import numpy as np

from dr_jax.data.sources import Batch, Example, MissingData, Source
from dr_jax.runtime import files as files_lib

VOCABULARY = 256
SEPARATOR = b"\0"
# Bytes of a file.
_LARGEST = 2**30
# One document in so many is for testing.
_FRACTION = 10
# Neither documentation nor ours to read.
_LEFT_OUT = {
  *("test", "tests", "idle_test", "lib2to3", "pydoc_data"),
  *("site-packages", "dist-packages"),
}


@dataclasses.dataclass(frozen=True)
class TextSource(Source):
  """Sequences of a text, one after the other.

  Attributes:
    text: uint8 [bytes].
    length: bytes of a sequence. Example i is {"image": int32 [length], the
      bytes from i * length on, "label": int32 [length], the byte that follows
      each of them}; what is left at the end is no example.

  >>> source = TextSource(np.frombuffer(b"abcdefgh", np.uint8), 3)
  >>> len(source), [bytes(source[1][k].tolist()) for k in ("image", "label")]
  (2, [b'def', b'efg'])
  """

  text: np.ndarray
  length: int

  def __len__(self) -> int:
    return max(len(self.text) - 1, 0) // self.length

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
    batch = self.read(np.array([index]))
    return {name: array[0] for name, array in batch.items()}

  def read(self, indices: np.ndarray) -> Batch:
    at = np.asarray(indices)[:, None] * self.length + np.arange(self.length)
    return {
      "image": self.text[at].astype(np.int32),
      "label": self.text[at + 1].astype(np.int32),
    }


def splits(
  path: str, train_split: str, test_split: str, *, length: int, size: int
) -> tuple[TextSource, TextSource]:
  """Returns the training and the test text.

  Args:
    path: a directory that holds one directory of .txt files per split; "" for
      Python's documentation.
    train_split, test_split: names of these directories.
    length: bytes of a sequence.
    size: bytes of each text to use, its first ones; 0 for all.

  Raises:
    ValueError: if there is no text, or less than one sequence.
  """
  if path:
    texts = [
      _joined(_files(path, split)) for split in (train_split, test_split)
    ]
  else:
    texts = [
      _joined({n: t for n, t in documentation().items() if _tests(n) == wanted})
      for wanted in (False, True)
    ]
  sources = [TextSource(text[: size or None], length) for text in texts]
  for split, source in zip((train_split, test_split), sources, strict=True):
    if not len(source):
      raise ValueError(
        f"length must be below the bytes of the text {split!r}, "
        f"{len(source.text)}, got {length}"
      )
  return sources[0], sources[1]


@functools.cache
def documentation() -> Mapping[str, bytes]:
  """Returns Python's own documentation, by the name of each document.

  Raises:
    ValueError: if this Python comes without it.
  """
  try:
    from pydoc_data import topics
  except ImportError:
    raise ValueError(
      "path must be a directory of texts: this Python has no documentation "
      "(pydoc_data.topics), got ''"
    ) from None
  found = {f"topics/{name}": text for name, text in topics.topics.items()}
  library = pathlib.Path(sysconfig.get_path("stdlib"))
  for file in sorted(library.rglob("*.py")):
    name = file.relative_to(library)
    if not _LEFT_OUT & set(name.parts):
      found[f"library/{name.as_posix()}"] = "\n\n".join(_docstrings(file))
  return {n: t.encode(errors="replace") for n, t in found.items() if t}


def _docstrings(file: pathlib.Path) -> Iterator[str]:
  """Docstrings of a module, its classes and its functions."""
  documented = (
    ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
  )
  try:
    tree = ast.parse(file.read_bytes())
  except (OSError, SyntaxError, ValueError):
    return  # A template, or a file that someone left there.
  for node in ast.walk(tree):
    if isinstance(node, documented) and (text := ast.get_docstring(node)):
      yield text


def _files(path, split):
  directory = pathlib.Path(path) / split
  files = sorted(directory.rglob("*.txt"))
  if not files:
    raise MissingData(
      f"path must hold a directory {split!r} with .txt files, got {path!r}"
    )
  try:
    return {
      file.relative_to(directory).as_posix(): files_lib.read_bytes(
        file, limit=_LARGEST
      )
      for file in files
    }
  except (OSError, ValueError) as error:
    raise ValueError(
      f"path must hold texts that can be read: {error}"
    ) from None


def _joined(documents):
  ordered = sorted(documents, key=_hash)
  text = SEPARATOR.join(documents[name] for name in ordered)
  return np.frombuffer(text, np.uint8)


def _tests(name):
  return int(_hash(name), 16) % _FRACTION == 0


def _hash(name):
  return hashlib.sha256(name.encode()).hexdigest()

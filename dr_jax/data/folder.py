"""Images in one directory per class: SPLIT/CLASS/NAME.png or .jpg."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable

import numpy as np

from dr_jax.data.transforms import UnreadableImage

_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclasses.dataclass(frozen=True)
class Folder:
  """The image files of one split, sorted by class and name.

  Attributes:
    path: directory of the split.
    classes: names of the classes; labels are positions in it.
    files: bytes [N], paths below `path`. One array, because a worker process
      gets its own copy: a million `str` would take three times the memory.
    labels: int32 [N].
  """

  path: pathlib.Path
  classes: tuple[str, ...]
  files: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.files)

  def read(self, index: int) -> tuple[bytes, int]:
    """Returns the bytes of a file, and its label."""
    try:
      encoded = (self.path / os.fsdecode(self.files[index])).read_bytes()
    except OSError as error:
      raise UnreadableImage(error.strerror or str(error)) from None
    return encoded, int(self.labels[index])

  def name(self, index: int) -> str:
    """Returns the path of a file."""
    return str(self.path / os.fsdecode(self.files[index]))


def scan(path: str | os.PathLike, split: str) -> Folder:
  """Finds the images of a split.

  Args:
    path: directory that holds one directory per split.
    split: the name of a directory.

  Returns:
    A `Folder`.

  Raises:
    ValueError: if the directory is missing, has no classes, or a class has no
      images.
  """
  directory = pathlib.Path(path) / split
  if not path or not directory.is_dir():
    wrong = f"has no directory {split!r}"
    if not pathlib.Path(path).is_dir():
      wrong = "does not exist"
    if not path:
      wrong = "is missing"
    raise ValueError(
      f"path must be a directory of images as {split}/CLASS/NAME.png or .jpg, "
      f"got {str(path)!r}, which {wrong}"
    )
  classes = _sorted(directory, os.DirEntry.is_dir)
  if not classes:
    raise ValueError(
      f"{directory} must have one directory per class, but has none"
    )
  files, labels = [], []
  for label, name in enumerate(classes):
    found = [
      file
      for file in _sorted(directory / name, os.DirEntry.is_file)
      if file.lower().endswith(_SUFFIXES)
    ]
    if not found:
      raise ValueError(
        f"{directory / name} must have images "
        f"({', '.join(_SUFFIXES)}), but has none"
      )
    files += [os.fsencode(os.path.join(name, file)) for file in found]
    labels += [label] * len(found)
  return Folder(
    directory, tuple(classes), np.array(files), np.array(labels, np.int32)
  )


def check_same_classes(train: Folder, test: Folder) -> None:
  """Raises ValueError unless two splits have the same classes."""
  if train.classes == test.classes:
    return
  for here, there in ((train, test), (test, train)):
    missing = [name for name in here.classes if name not in there.classes]
    if missing:
      more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
      raise ValueError(
        f"{there.path} must have the classes of {here.path}, but lacks "
        f"{', '.join(missing[:3])}{more}"
      )


def _sorted(
  directory: pathlib.Path, kind: Callable[[os.DirEntry], bool]
) -> list[str]:
  """Names of one kind, in code point order: the same on every file system."""
  with os.scandir(directory) as entries:
    names = [
      entry.name
      for entry in entries
      if kind(entry) and not entry.name.startswith(".")
    ]
  return sorted(names)

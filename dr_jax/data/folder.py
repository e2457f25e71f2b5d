"""Images in one directory per class: SPLIT/CLASS/NAME.png, .jpg and others."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import warnings
from typing import NamedTuple

import numpy as np

from dr_jax.data.decoding import UnreadableImage
from dr_jax.data.sources import MissingData
from dr_jax.runtime import files as files_lib

# Of the formats that Pillow reads, those that data sets come in.
_SUFFIXES = (
  *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"),
  *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
# Bytes of a file.
_LARGEST = 2**30


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
      encoded = files_lib.read_bytes(self.name(index), limit=_LARGEST)
    except OSError as error:
      raise UnreadableImage(error.strerror or str(error)) from None
    # A link can lead to a FIFO, which would block, or to a device.
    except ValueError as error:
      raise UnreadableImage(str(error)) from None
    return encoded, int(self.labels[index])

  def name(self, index: int) -> str:
    """Returns the path of a file."""
    return str(self.path / os.fsdecode(self.files[index]))


def scan(
  path: str | os.PathLike, split: str, *, on_decode_error: str = "raise"
) -> Folder:
  """Finds the images of a split.

  What is neither an image, by its suffix, nor hidden is left out, and one
  warning says so.

  Args:
    path: directory that holds one directory per split.
    split: the name of a directory.
    on_decode_error: what happens to links that lead nowhere: "raise" stops;
      "skip" keeps a link to an image, which cannot be read then, and leaves out
      a link to a class, with a warning.

  Returns:
    A `Folder`.

  Raises:
    ValueError: if the directory is missing, has no classes, a class has no
      images, or a link leads nowhere.
  """
  directory = pathlib.Path(path) / split
  if not path or not directory.is_dir():
    wrong = f"has no directory {split!r}"
    if not pathlib.Path(path).is_dir():
      wrong = "does not exist"
    if not path:
      wrong = "is missing"
    raise MissingData(
      f"path must be a directory of images as {split}/CLASS/NAME.png, got "
      f"{str(path)!r}, which {wrong}"
    )
  top = _list(directory)
  if not top.directories and not top.dangling:
    raise ValueError(
      f"{directory} must have one directory per class, but has none"
    )
  listed = {name: _list(directory / name) for name in top.directories}
  _check_links(directory, top, listed, on_decode_error)
  _warn_of_others(directory, top, listed)
  files, labels = [], []
  for label, (name, found) in enumerate(listed.items()):
    images = sorted(found.images + list(filter(_is_image, found.dangling)))
    if not images:
      raise ValueError(
        f"{directory / name} must have images ({', '.join(_SUFFIXES)}), but "
        "has none"
      )
    files += [os.fsencode(os.path.join(name, file)) for file in images]
    labels += [label] * len(images)
  return Folder(
    directory, tuple(listed), np.array(files), np.array(labels, np.int32)
  )


def check_same_classes(train: Folder, test: Folder) -> None:
  """Raises ValueError unless two splits have the same classes."""
  if train.classes == test.classes:
    return
  for here, there in ((train, test), (test, train)):
    missing = [name for name in here.classes if name not in there.classes]
    if missing:
      raise ValueError(
        f"{there.path} must have the classes of {here.path}, but lacks "
        f"{_some(missing)}"
      )


class _Listing(NamedTuple):
  """Names in a directory that are not hidden, in code point order.

  That order is the same on every file system. `dangling` links lead nowhere.
  """

  directories: list[str]
  images: list[str]
  others: list[str]
  dangling: list[str]


def _list(directory: pathlib.Path) -> _Listing:
  listing = _Listing([], [], [], [])
  with os.scandir(directory) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      try:
        if entry.is_dir():
          kind = listing.directories
        elif entry.is_file():
          kind = listing.images if _is_image(entry.name) else listing.others
        else:
          kind = listing.dangling if entry.is_symlink() else listing.others
      # A link to itself, through a file, or to a name that is too long.
      except OSError:
        if not entry.is_symlink():
          raise
        kind = listing.dangling
      kind.append(entry.name)
  for names in listing:
    names.sort()
  return listing


def _is_image(name: str) -> bool:
  return name.lower().endswith(_SUFFIXES)


def _check_links(
  directory: pathlib.Path,
  top: _Listing,
  listed: dict[str, _Listing],
  on_decode_error: str,
) -> None:
  classes = [str(directory / name) for name in top.dangling]
  images = [
    str(directory / name / file)
    for name, found in listed.items()
    for file in found.dangling
    if _is_image(file)
  ]
  if on_decode_error == "raise" and (classes or images):
    raise ValueError(
      f"{_some(classes + images)}: a link must lead to a file or directory; "
      "repair it, or set on_decode_error='skip'"
    )
  if classes:
    warnings.warn(
      f"{_some(classes)}: left out, since the link leads nowhere", stacklevel=4
    )


def _warn_of_others(
  directory: pathlib.Path, top: _Listing, listed: dict[str, _Listing]
) -> None:
  others = [str(directory / name) for name in top.images + top.others]
  for name, found in listed.items():
    links = [file for file in found.dangling if not _is_image(file)]
    others += [
      str(directory / name / file)
      for file in found.others + found.directories + links
    ]
  if others:
    warnings.warn(
      f"{_some(others)}: left out; images are CLASS/NAME with one of the "
      f"suffixes {', '.join(_SUFFIXES)}",
      stacklevel=4,
    )


def _some(names: list[str]) -> str:
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return f"{', '.join(names[:3])}{more}"

"""Images in the idx files of MNIST and its likes, in memory.

Two files per split, SPLIT-images-idx3-ubyte and SPLIT-labels-idx1-ubyte, plain
or as .gz. A file is the bytes 0, 0, 8 (for uint8) and the number of its
dimensions, the dimensions as big-endian int32, and the values.
"""

from __future__ import annotations

import gzip
import math
import pathlib
import zlib

import numpy as np

from dr_jax.data.sources import ArraySource, MissingData
from dr_jax.runtime import files

_UINT8 = 8
# Bytes of a file, before and after it is unpacked.
_LARGEST = 2**31


def read_split(path: str, split: str) -> ArraySource:
  """Reads the images and labels of a split.

  Args:
    path: directory of the files.
    split: what their names begin with, as "train" and "t10k".

  Returns:
    A source of float32 images [h, w, 1] in [0, 1].

  Raises:
    ValueError: naming a file that is missing, damaged, or of another shape.
  """
  images = _read(pathlib.Path(path), f"{split}-images-idx3-ubyte", 3)
  labels = _read(pathlib.Path(path), f"{split}-labels-idx1-ubyte", 1)
  if len(images) != len(labels) or not len(images):
    raise ValueError(
      f"path must hold as many labels as images of {split!r}, at least one, "
      f"got {len(labels)} and {len(images)}"
    )
  pixels = images[..., None].astype(np.float32) / 255
  return ArraySource(pixels, labels.astype(np.int32))


def _read(directory, name, dimensions):
  """The values of a file, uint8 [...]."""
  found = [directory / f"{name}{suffix}" for suffix in ("", ".gz")]
  file = next((file for file in found if file.exists()), None)
  if file is None:
    raise MissingData(
      f"path must hold {name} or {name}.gz, got {directory}; files of "
      "Fashion-MNIST: https://github.com/zalandoresearch/fashion-mnist"
    )
  try:
    content = files.read_bytes(file, limit=_LARGEST)
    if file.suffix == ".gz":
      with gzip.open(file) as unpacked:
        content = unpacked.read(_LARGEST)
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise ValueError(f"{file} cannot be read: {error}") from None
  start = 4 + 4 * dimensions
  if len(content) < start or content[:4] != bytes((0, 0, _UINT8, dimensions)):
    raise ValueError(
      f"{file} must begin as an idx file of {dimensions} dimensions of uint8"
    )
  shape = tuple(np.frombuffer(content, ">i4", dimensions, 4).tolist())
  if min(shape) < 0 or math.prod(shape) != len(content) - start:
    raise ValueError(
      f"{file} must hold {shape} values, got {len(content) - start} bytes"
    )
  return np.frombuffer(content, np.uint8, offset=start).reshape(shape)

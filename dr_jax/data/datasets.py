"""Data sets by name, each a source to train on and one to test on."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dr_jax.data import folder, idx, synthetic, text, tfds, transforms
from dr_jax.data.image_source import Examples, ImageSource
from dr_jax.data.sources import ArraySource, Source
from dr_jax.runtime import files

NAMES = ("digits", "folder", "tfds", "idx", "synthetic", "text")


class Dataset(NamedTuple):
  """A data set: what to train on, what to test on, and what it is for.

  Attributes:
    train, test: sources of examples.
    num_classes: labels are below it.
    shape: of an example's input: (height, width, channels), or (bytes,).
    task: a name of `runtime.tasks.TASKS`.
  """

  train: Source
  test: Source
  num_classes: int
  shape: tuple[int, ...]
  task: str = "classification"

  @property
  def labels(self) -> int:
    """Labels of an example: one, or one for each byte."""
    return self.shape[0] if self.task == "language" else 1

  @property
  def model_options(self) -> dict[str, Any]:
    """Sizes that the data decide, as options of `models.build`."""
    if self.task == "language":
      return {"vocabulary": self.num_classes, "context": self.shape[0]}
    height, _, channels = self.shape
    return {
      "num_classes": self.num_classes,
      "channels": channels,
      "image_size": height,
    }


class _Stored(NamedTuple):
  """Encoded images of two splits."""

  train: Examples
  test: Examples
  num_classes: int
  channels: int


def load(
  name: str,
  *,
  seed: int = 0,
  path: str = "",
  dataset: str = "",
  train_split: str = "train",
  test_split: str = "test",
  augment: str = "none",
  image_size: int = 0,
  mean: Sequence[float] = (),
  std: Sequence[float] = (),
  on_decode_error: str = "raise",
  orient: bool = True,
  classes: int = 10,
  examples: int = 64,
  channels: int = 3,
  length: int = 128,
  bytes: int = 0,
) -> Dataset:
  """Returns the data set called `name`.

  Args:
    name: one of `NAMES`: "digits"; "folder", see `folder.scan`; "tfds", see
      `tfds.open_splits`; "idx", see `idx.read_split`; "synthetic", see
      `synthetic.generate`; "text", see `text.splits`.
    seed: draws the split into train and test of "digits", and the images of
      "synthetic". It is not a training seed: runs that are to be compared, or
      resumed, share it.
    path: of a folder or a text the directory that holds one directory per
      split, "" for Python's documentation; of "idx" the directory of the files;
      of "tfds" its data directory, "" for the default of TFDS.
    dataset: name in TFDS.
    train_split: name of the split to train on.
    test_split: name of the split to test on.
    augment: see `transforms.Transform`.
    image_size: side of the images after augmentation, in pixels; 0 leaves them
      as they are ("synthetic": 32).
    mean: per channel, of images in [0, 1]; () for 0.
    std: per channel; () for 1.
    on_decode_error: at an image that cannot be read, "raise" stops, "skip"
      takes the next one.
    orient: turn images as their EXIF orientation says, as viewers show them.
    classes: of "synthetic".
    examples: of "synthetic", in each split.
    channels: of "synthetic".
    length: bytes of a sequence of "text".
    bytes: of each split of "text" to use; 0 for all.

  Returns:
    A `Dataset`. Digits and idx files are neither augmented nor normalized.

  Raises:
    ValueError: if there is no data set of that name, or what it needs is
      missing; the message says how to get it.
    UnreadableImage: if the size is to be that of the first image, and
      that cannot be read.

  >>> digits = load("digits")
  >>> len(digits.train), len(digits.test), digits.shape
  (1257, 540, (8, 8, 1))
  """
  path = path and str(files.expand(path))
  _check_one_of("name", name, NAMES)
  _check_one_of("augment", augment, transforms.AUGMENT)
  _check_one_of("on_decode_error", on_decode_error, ("raise", "skip"))
  if name == "digits":
    return _digits(seed)
  if name == "idx":
    return _idx(path, train_split, test_split)
  if name == "text":
    train, test = text.splits(
      path, train_split, test_split, length=length, size=bytes
    )
    return Dataset(train, test, text.VOCABULARY, (length,), "language")
  if name == "folder":
    stored = _folder(path, train_split, test_split, on_decode_error)
  elif name == "tfds":
    stored = _Stored(*tfds.open_splits(dataset, path, train_split, test_split))
  else:
    stored = _synthetic(classes, examples, image_size or 32, channels, seed)
  for field, values in (("mean", mean), ("std", std)):
    if values and len(values) != stored.channels:
      raise ValueError(
        f"{field} must be {stored.channels} numbers, one for each channel of "
        f"the images, got {values!r}"
      )
  train = ImageSource(
    examples=stored.train,
    transform=transforms.Transform(
      augment, image_size, tuple(mean), tuple(std)
    ),
    image_shape=(image_size, image_size, stored.channels),
    num_classes=stored.num_classes,
    on_decode_error=on_decode_error,
    orient=orient,
  ).with_shape()
  test = dataclasses.replace(
    train, examples=stored.test, skipped=collections.Counter()
  )
  return Dataset(train, test, stored.num_classes, train.image_shape)


def _check_one_of(name: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise ValueError(
      f"{name} must be one of {', '.join(choices)}, got {value!r}"
    )


def _folder(
  path: str, train_split: str, test_split: str, on_decode_error: str
) -> _Stored:
  train, test = (
    folder.scan(path, split, on_decode_error=on_decode_error)
    for split in (train_split, test_split)
  )
  folder.check_same_classes(train, test)
  return _Stored(train, test, len(train.classes), 3)


def _synthetic(
  classes: int, examples: int, size: int, channels: int, seed: int
) -> _Stored:
  train, test = (
    synthetic.generate(
      split,
      classes=classes,
      examples=examples,
      size=size,
      channels=channels,
      seed=seed,
    )
    for split in ("train", "test")
  )
  return _Stored(train, test, classes, channels)


def _idx(path: str, train_split: str, test_split: str) -> Dataset:
  train, test = (idx.read_split(path, s) for s in (train_split, test_split))
  shape = train.images.shape[1:]
  if test.images.shape[1:] != shape:
    raise ValueError(
      f"path must hold images of one size, got {shape} in {train_split!r} and "
      f"{test.images.shape[1:]} in {test_split!r}"
    )
  num_classes = int(max(train.labels.max(), test.labels.max())) + 1
  return Dataset(train, test, num_classes, shape)


def _digits(seed: int) -> Dataset:
  """Returns scikit-learn's 1,797 handwritten digits, 70 % for training."""
  # Both are slow to import and only this data set needs them.
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  images, labels = map(np.asarray, load_digits(return_X_y=True))
  images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
  labels = labels.astype(np.int32)
  train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.3, random_state=seed, stratify=labels
  )
  return Dataset(
    train=ArraySource(train_images, train_labels, num_classes=10),
    test=ArraySource(test_images, test_labels, num_classes=10),
    num_classes=10,
    shape=(8, 8, 1),
  )

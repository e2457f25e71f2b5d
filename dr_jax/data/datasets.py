"""Data sets by name, each a source to train on and one to test on."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dr_jax.data import folder, synthetic, tfds, transforms
from dr_jax.data.image_source import Examples, ImageSource
from dr_jax.data.sources import ArraySource, Source
from dr_jax.runtime import files

NAMES = ("digits", "folder", "tfds", "synthetic")


class Dataset(NamedTuple):
  """A data set: what to train on, what to test on, and its shape."""

  train: Source
  test: Source
  num_classes: int
  image_shape: tuple[int, int, int]  # height, width, channels


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
) -> Dataset:
  """Returns the data set called `name`.

  Args:
    name: one of `NAMES`: "digits"; "folder", see `folder.scan`; "tfds", see
      `tfds.open_splits`; "synthetic", see `synthetic.generate`.
    seed: draws the split into train and test of "digits", and the images of
      "synthetic". It is not a training seed: runs that are to be compared, or
      resumed, share it.
    path: of a folder the directory that holds one directory per split; of
      "tfds" its data directory, "" for the default of TFDS.
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

  Returns:
    A `Dataset`. Digits are neither augmented nor normalized.

  Raises:
    ValueError: if there is no data set of that name, or what it needs is
      missing; the message says how to get it.
    UnreadableImage: if the size is to be that of the first image, and
      that cannot be read.

  >>> digits = load("digits")
  >>> len(digits.train), len(digits.test), digits.image_shape
  (1257, 540, (8, 8, 1))
  """
  path = path and str(files.expand(path))
  _check_one_of("name", name, NAMES)
  _check_one_of("augment", augment, transforms.AUGMENT)
  _check_one_of("on_decode_error", on_decode_error, ("raise", "skip"))
  if name == "digits":
    return _digits(seed)
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
    image_shape=(8, 8, 1),
  )

"""Synthetic images: every class is a pattern, every image adds noise to it.

They are made from a seed, for runs that try something out with no data on disk.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

# Patterns have this many patches a side.
_PATCHES = 4
# Of 255: enough that neighbors differ, too little to hide a pattern.
_NOISE = 64


@dataclasses.dataclass(frozen=True)
class SyntheticImages:
  """Images in memory.

  Attributes:
    images: uint8 [N, S, S, C].
    labels: int32 [N].
    split: for messages.
  """

  images: np.ndarray
  labels: np.ndarray
  split: str

  def __len__(self) -> int:
    return len(self.images)

  def read(self, index: int) -> tuple[np.ndarray, int]:
    """Returns uint8 [S, S, C] and its label."""
    return self.images[index], int(self.labels[index])

  def name(self, index: int) -> str:
    """Returns split and number of an image."""
    return f"synthetic {self.split} {index}"


def generate(
  split: str,
  *,
  classes: int,
  examples: int,
  size: int,
  channels: int,
  seed: int,
) -> SyntheticImages:
  """Makes the images of a split.

  Args:
    split: "train" or "test"; the noise differs, the patterns do not.
    classes: number of classes, at least 1; image i is of class i % classes.
    examples: number of images.
    size: side of the images, in pixels.
    channels: of the images.
    seed: of the patterns and the noise.

  >>> made = generate(
  ...   "train", classes=2, examples=3, size=8, channels=1, seed=0
  ... )
  >>> made.images.shape, made.labels.tolist()
  ((3, 8, 8, 1), [0, 1, 0])
  """

  def words(*key, shape):
    bits = np.random.Philox(np.random.SeedSequence([seed, *key]))
    words = bits.random_raw(math.prod(shape)) >> np.uint64(32)
    return words.reshape(shape)

  side = -(-size // _PATCHES)
  shape = (_PATCHES, _PATCHES, channels)
  labels = np.arange(examples, dtype=np.int32) % classes
  images = np.empty((examples, size, size, channels), np.uint8)
  number = ("train", "test").index(split)
  for index, label in enumerate(labels.tolist()):
    patches = words(0, label, shape=shape) % np.uint64(256 - _NOISE)
    pattern = patches.repeat(side, axis=0).repeat(side, axis=1)
    noise = words(1, number, index, shape=images.shape[1:])
    images[index] = pattern[:size, :size] + noise % np.uint64(_NOISE)
  return SyntheticImages(images, labels, split)

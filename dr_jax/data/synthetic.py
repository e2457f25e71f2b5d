"""Images made from a seed: every class a pattern, every image some noise.

For runs that shall show that something works, and need nothing on disk.
"""

import dataclasses

import numpy as np

# Patterns have this many patches a side.
_PATCHES = 4
# Of 255: enough that neighbors differ, too little to hide a pattern.
_NOISE = 64


@dataclasses.dataclass(frozen=True)
class Generated:
  """Images in memory.

  Attributes:
    images: uint8 [N, S, S, C].
    labels: int32 [N].
    split: for messages.
  """

  images: np.ndarray
  labels: np.ndarray
  split: str

  def __len__(self):
    return len(self.images)

  def read(self, index):
    """Returns uint8 [S, S, C] and its label."""
    return self.images[index], int(self.labels[index])

  def name(self, index):
    """Returns split and number of an image."""
    return f"generated {self.split} {index}"


def generate(split, *, classes, examples, size, channels, seed):
  """Makes the images of a split.

  Args:
    split: "train" or "test"; the noise differs, the patterns do not.
    classes: number of classes, at least 1; labels go round.
    examples: number of images.
    size: side of the images, in pixels.
    channels: of the images.
    seed: of the patterns and the noise.

  Returns:
    A `Generated`.
  """

  def words(*key, count):
    bits = np.random.Philox(np.random.SeedSequence([seed, *key]))
    return bits.random_raw(count) >> np.uint64(32)

  side = -(-size // _PATCHES)
  shape = (_PATCHES, _PATCHES, channels)
  labels = np.arange(examples, dtype=np.int32) % classes
  images = np.empty((examples, size, size, channels), np.uint8)
  number = ("train", "test").index(split)
  for index, label in enumerate(labels.tolist()):
    patches = words(0, label, count=np.prod(shape)).reshape(shape)
    patches = patches % np.uint64(256 - _NOISE)
    pattern = patches.repeat(side, axis=0).repeat(side, axis=1)
    noise = words(1, number, index, count=size * size * channels)
    noise = (noise % np.uint64(_NOISE)).reshape(size, size, channels)
    images[index] = pattern[:size, :size] + noise
  return Generated(images, labels, split)

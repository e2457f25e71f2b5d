"""Data sets by name, each a pair of random-access sources.

A source is anything with a length and an index: `source[i]` is one example,

    {"image": float32 [H, W, C] in [0, 1], "label": int32 []}.

It may also offer `gather(indices) -> batch`, which answers for many examples
at once. Data in memory should: one numpy gather of 128 digits takes a few
microseconds, 128 separate examples and a stack about a millisecond. One that
augments offers `draw(indices, seed=, start=) -> batch`, which training takes
in place of `gather`. `pixels` in place of `gather`, and `normalized(batch)`,
leave to the training process what would make a worker's batches large; see
`ImageSource`.
"""

import collections
import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from dr_jax.data import folder, synthetic, tfds, transforms
from dr_jax.data.image_source import ImageSource

NAMES = ("digits", "folder", "tfds", "generated")


class Source(Protocol):
  """Random access to examples."""

  def __len__(self) -> int:
    """Returns the number of examples."""
    ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns {"image": float32 [H, W, C], "label": int32 []}."""
    ...


class Dataset(NamedTuple):
  """A data set: what to train on, what to test on, and its shape."""

  train: Source
  test: Source
  num_classes: int
  image_shape: tuple[int, int, int]  # height, width, channels


@dataclasses.dataclass(frozen=True)
class ArraySource:
  """A source whose examples are all in memory.

  Attributes:
    images: float32 [N, H, W, C] in [0, 1].
    labels: int32 [N].
  """

  images: np.ndarray
  labels: np.ndarray

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    return {"image": self.images[index], "label": self.labels[index]}

  def gather(self, indices):
    """Returns the examples at `indices` ([B] integers) as one batch."""
    return {"image": self.images[indices], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class Subset:
  """Some examples of a source, by their numbers [N]."""

  source: Source
  indices: np.ndarray

  def __len__(self):
    return len(self.indices)

  def __getitem__(self, index):
    return self.source[int(self.indices[index])]


@dataclasses.dataclass(frozen=True)
class ArraySubset(Subset):
  """Some examples of a source that gathers."""

  def gather(self, indices):
    """Returns the examples at `indices` ([B] integers) as one batch."""
    return self.source.gather(self.indices[indices])


def hold_out(source, fraction, *, seed=0):
  """Splits a source in two at random, for what must not see all of it.

  Args:
    source: a `Source`.
    fraction: of the examples to hold out, above 0 and below 1.
    seed: draws the split; as for `load`, not a training seed.

  Returns:
    (kept, held out), two `Source`s with at least one example each.

  Raises:
    ValueError: for another fraction, or one that leaves either side empty.
  """
  size = round(fraction * len(source)) if 0 < fraction < 1 else 0
  if not 0 < size < len(source):
    raise ValueError(
      "holdout must be > 0 and < 1 and leave examples on both sides of "
      f"{len(source)}, got {fraction!r}"
    )
  words = np.random.Philox(np.random.SeedSequence([seed, len(source)]))
  order = np.argsort(words.random_raw(len(source)), kind="stable")
  if hasattr(source, "choose"):
    return source.choose(order[size:]), source.choose(order[:size])
  kind = ArraySubset if hasattr(source, "gather") else Subset
  return kind(source, order[size:]), kind(source, order[:size])


def load(
  name,
  *,
  seed=0,
  path="",
  dataset="",
  train_split="train",
  test_split="test",
  augment="none",
  image_size=0,
  mean=(),
  std=(),
  on_decode_error="raise",
  classes=10,
  examples=64,
  channels=3,
):
  """Returns the data set called `name`.

  Args:
    name: one of `NAMES`: "digits"; "folder", see `folder.scan`; "tfds", see
      `tfds.open_splits`; "generated", see `synthetic.generate`.
    seed: draws the split into train and test where a data set has none of its
      own, and generated images. It is not a training seed: runs that are to
      be compared, or resumed, share it.
    path: of a folder the directory that holds one directory per split; of
      "tfds" its data directory, "" for TFDS's default.
    dataset: name in TFDS.
    train_split: name of the split to train on.
    test_split: name of the split to test on.
    augment: see `transforms.Transform`.
    image_size: side of the images after augmentation, in pixels; 0 leaves them
      as they are ("generated": 32).
    mean: per channel, of images in [0, 1]; () for 0.
    std: per channel; () for 1.
    on_decode_error: at an image that cannot be read, "raise" stops, "skip"
      takes the next one.
    classes: of "generated".
    examples: of "generated", in either split.
    channels: of "generated".

  Returns:
    A `Dataset`. Digits are not augmented or normalized.

  Raises:
    ValueError: if there is no data set of that name, or what it needs is not
      there; the message says how to get it.
    UnreadableImage: if the size is to be that of the first image, and
      that cannot be read.
  """
  if name not in NAMES:
    raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
  if name == "digits":
    return _digits(seed)
  if name == "folder":
    splits = [folder.scan(path, split) for split in (train_split, test_split)]
    folder.check_same_classes(*splits)
    num_classes, channels = len(splits[0].classes), 3
  elif name == "tfds":
    splits, num_classes, channels = tfds.open_splits(
      dataset, path, (train_split, test_split)
    )
  else:
    num_classes = classes
    splits = [
      synthetic.generate(
        split,
        classes=classes,
        examples=examples,
        size=image_size or 32,
        channels=channels,
        seed=seed,
      )
      for split in ("train", "test")
    ]
  for field, values in (("mean", mean), ("std", std)):
    if values and len(values) != channels:
      raise ValueError(
        f"{field} must be {channels} numbers, one for each channel of the "
        f"images, got {values!r}"
      )
  source = ImageSource(
    examples=splits[0],
    transform=transforms.Transform(
      augment, image_size, tuple(mean), tuple(std)
    ),
    image_shape=(image_size, image_size, channels),
    num_classes=num_classes,
    on_decode_error=on_decode_error,
  ).shaped()
  test = dataclasses.replace(
    source, examples=splits[1], unreadable=collections.Counter()
  )
  return Dataset(source, test, num_classes, source.image_shape)


def _digits(seed):
  """Returns scikit-learn's 1,797 handwritten digits, 70 % for training."""
  # Both are slow to import and only this data set needs them.
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  images, labels = load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
  labels = labels.astype(np.int32)
  train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.3, random_state=seed, stratify=labels
  )
  return Dataset(
    train=ArraySource(train_images, train_labels),
    test=ArraySource(test_images, test_labels),
    num_classes=10,
    image_shape=(8, 8, 1),
  )

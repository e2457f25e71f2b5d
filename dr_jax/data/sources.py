"""Sources: random access to examples, one at a time or in batches.

An example is {"image": float32 [H, W, C], "label": int32 []}, or of text
{"image": int32 [T], "label": int32 [T]}; a batch is the same with a leading
axis. `batching` decides which examples a step sees, and asks for
them in two parts: `read` or `draw`, which worker processes may call, and
`finish` in the process that trains.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import numpy as np

Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]


class MissingData(ValueError):
  """Data that a configuration names are not on this machine.

  Attributes:
    shape: of an image, as far as it is known without them: None for a side that
      differs from image to image; () if nothing is known.
    num_classes: likewise; 0 if it is not known.
  """

  def __init__(
    self,
    message: str,
    *,
    shape: tuple[int | None, ...] = (),
    num_classes: int = 0,
  ):
    super().__init__(message)
    self.shape = shape
    self.num_classes = num_classes


class Source(abc.ABC):
  """Random access to examples.

  A subclass has a length and an index. The other methods have defaults, which
  sources override that are faster in batches, that augment images, or whose
  images may be impossible to decode.

  >>> class Squares(Source):
  ...   def __len__(self):
  ...     return 4
  ...
  ...   def __getitem__(self, index):
  ...     image = np.full((1, 1, 1), index**2, np.float32)
  ...     return {"image": image, "label": np.int32(index)}
  >>> Squares().gather(np.array([3, 1]))["image"].ravel().tolist()
  [9.0, 1.0]
  """

  @abc.abstractmethod
  def __len__(self) -> int:
    """Returns the number of examples."""

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Example:
    """Returns one example as evaluation sees it."""

  def gather(self, indices: np.ndarray) -> Batch:
    """Returns the examples at `indices` ([B]) as evaluation sees them."""
    return self.finish(self.read(indices))

  def read(self, indices: np.ndarray) -> Batch:
    """Returns the examples at `indices` ([B]) for `finish`.

    The batch may also have "unreadable", bool [B]: whether another example was
    taken in place of the one asked for.
    """
    examples = [self[index] for index in indices.tolist()]
    return {
      name: np.stack([example[name] for example in examples])
      for name in ("image", "label")
    }

  def draw(self, indices: np.ndarray, *, seed: int, start: int) -> Batch:
    """Returns the examples at `indices` ([B]) augmented, as `read` does.

    Args:
      indices: of the examples.
      seed: of the run.
      start: position of the first one in the endless stream of examples. Each
        example's random choices are a function of seed and position alone.
    """
    del seed, start  # No augmentation.
    return self.read(indices)

  def finish(self, batch: Batch) -> Batch:
    """Returns what a network sees of a batch of `read` or `draw`.

    For what would make a worker's batches large to hand over, as float32.
    """
    return batch

  @property
  def unreadable(self) -> Mapping[str, int]:
    """How often each unreadable image was to be drawn, by name."""
    return {}

  def report(self, indices: np.ndarray) -> None:
    """Counts the examples at `indices` as unreadable, and warns of them."""
    raise NotImplementedError(f"{type(self).__name__} reads every example")

  def subset(self, indices: np.ndarray) -> Source:
    """Returns a source of the examples at `indices` ([N]) alone."""
    return Subset(self, indices)


@dataclasses.dataclass(frozen=True)
class ArraySource(Source):
  """A source whose examples are all in memory.

  Attributes:
    images: float32 [N, H, W, C] in [0, 1].
    labels: int32 [N], none negative. (To leave an example out, leave it out of
      both: there is no label that is ignored.)
    num_classes: labels are below it; None if it is not known.

  Raises:
    ValueError: if there are not as many labels as images, or one is no integer
      or out of range.

  >>> source = ArraySource(
  ...   np.zeros((3, 8, 8, 1), np.float32), np.arange(3, dtype=np.int32)
  ... )
  >>> source.gather(np.array([2, 0]))["label"].tolist()
  [2, 0]
  """

  images: np.ndarray
  labels: np.ndarray
  num_classes: int | None = None

  def __post_init__(self):
    if self.labels.shape != (len(self.images),):
      raise ValueError(
        f"labels must have shape ({len(self.images)},), one for each image, "
        f"got {self.labels.shape}"
      )
    if not np.issubdtype(self.labels.dtype, np.integer):
      raise ValueError(f"labels must be integers, got {self.labels.dtype}")
    wrong, allowed = self.labels < 0, ">= 0"
    if self.num_classes is not None:
      wrong = wrong | (self.labels >= self.num_classes)
      allowed = f"in 0..{self.num_classes - 1}"
    if wrong.any():
      first = np.flatnonzero(wrong)[0]
      raise ValueError(
        f"labels must be {allowed}, got {self.labels[first]} at {first}"
      )

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Example:
    return {"image": self.images[index], "label": self.labels[index]}

  def read(self, indices: np.ndarray) -> Batch:
    # One gather of 128 digits takes microseconds, 128 examples a millisecond.
    return {"image": self.images[indices], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class Subset(Source):
  """Some examples of a source.

  Attributes:
    source: of all examples.
    indices: int [N], which of them.
  """

  source: Source
  indices: np.ndarray

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Example:
    return self.source[int(self.indices[index])]

  def read(self, indices: np.ndarray) -> Batch:
    return self.source.read(self.indices[indices])

  def draw(self, indices: np.ndarray, *, seed: int, start: int) -> Batch:
    return self.source.draw(self.indices[indices], seed=seed, start=start)

  def finish(self, batch: Batch) -> Batch:
    return self.source.finish(batch)

  @property
  def unreadable(self) -> Mapping[str, int]:
    return self.source.unreadable

  def report(self, indices: np.ndarray) -> None:
    self.source.report(self.indices[indices])


def hold_out(
  source: Source, holdout: float, *, seed: int = 0
) -> tuple[Source, Source]:
  """Splits a source in two at random, for what must not see all of it.

  Args:
    source: all examples.
    holdout: the fraction of them to hold out, above 0 and below 1.
    seed: draws the split; as for `load`, not a training seed.

  Returns:
    (kept, held out), two sources with at least one example each.

  Raises:
    ValueError: for another fraction, or one that leaves either side empty.

  >>> source = ArraySource(
  ...   np.zeros((10, 8, 8, 1), np.float32), np.zeros(10, np.int32)
  ... )
  >>> kept, held_out = hold_out(source, 0.2)
  >>> len(kept), len(held_out)
  (8, 2)
  """
  size = round(holdout * len(source)) if 0 < holdout < 1 else 0
  if not 0 < size < len(source):
    raise ValueError(
      "holdout must be > 0 and < 1 and leave examples on both sides of "
      f"{len(source)}, got {holdout!r}"
    )
  words = np.random.Philox(np.random.SeedSequence([seed, len(source)]))
  order = np.argsort(words.random_raw(len(source)), kind="stable")
  return source.subset(order[size:]), source.subset(order[:size])

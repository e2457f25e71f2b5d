"""A source of images that are decoded and transformed when they are needed.

The examples behind it hand out what is stored; see `Examples`. An image that
cannot be read stops the run, or the next readable one takes its place; which
example that is depends on the data alone, not on who reads it.
"""

import collections
import dataclasses
import functools
import warnings
from typing import Protocol

import numpy as np

from dr_jax.data import images


class Examples(Protocol):
  """What is stored, in an order that is the same everywhere."""

  def __len__(self) -> int:
    """Returns the number of examples."""
    ...

  def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
    """Returns an encoded image (or uint8 [H, W, C]) and its label.

    Raises:
      images.UnreadableImage: if there is nothing to be read.
    """
    ...

  def name(self, index: int) -> str:
    """Returns the example's name in messages."""
    ...


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Some examples of others, by their numbers [N]."""

  examples: Examples
  indices: np.ndarray

  def __len__(self):
    return len(self.indices)

  def read(self, index):
    return self.examples.read(int(self.indices[index]))

  def name(self, index):
    return self.examples.name(int(self.indices[index]))


@dataclasses.dataclass(frozen=True)
class ImageSource:
  """A `Source` of encoded images.

  Attributes:
    examples: where encoded images and labels are read.
    transform: what is done to an image once it is decoded.
    image_shape: (height, width, channels) of every transformed image; height
      0: not known yet.
    num_classes: labels are below it.
    damaged: "raise" stops at an image that cannot be read; "skip" takes the
      next one that can.
    unreadable: how often each unreadable image was to be drawn, by name.
  """

  examples: Examples
  transform: images.Transform
  image_shape: tuple[int, int, int]
  num_classes: int
  damaged: str = "raise"
  unreadable: collections.Counter = dataclasses.field(
    default_factory=collections.Counter, compare=False
  )

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, index):
    """Returns one example as evaluation sees it."""
    image, label, _ = self._example(index, self.transform.test)
    return {"image": image, "label": label}

  def gather(self, indices):
    """Returns the examples at `indices` ([B]) as evaluation sees them.

    Beside "image" and "label" the batch has "unreadable", bool [B]: whether
    another example took the place.
    """
    return self._batch(
      [self._example(index, self.transform.test) for index in indices.tolist()]
    )

  def draw(self, indices, *, seed, start):
    """Returns the examples at `indices` ([B]) augmented, as `gather` does.

    Args:
      indices: of the examples.
      seed: of the run.
      start: position of the first one in the endless stream of examples. Each
        example's random choices are a function of seed and position alone.
    """
    examples = []
    for position, index in enumerate(indices.tolist(), start):
      # Three words, where the order of an epoch is drawn from two.
      bits = np.random.Philox(np.random.SeedSequence([seed, position, 1]))
      words = bits.random_raw(images.WORDS)
      transform = functools.partial(self.transform.train, words=words)
      examples.append(self._example(index, transform))
    return self._batch(examples)

  def choose(self, indices):
    """Returns a source of the examples at `indices` ([N]) alone."""
    return dataclasses.replace(self, examples=Chosen(self.examples, indices))

  def report(self, indices):
    """Counts unreadable images and warns of each once, by name."""
    for index in indices.tolist():
      name = self.examples.name(index)
      if name not in self.unreadable:
        warnings.warn(
          f"{name}: cannot be read; the next example takes its place",
          stacklevel=2,
        )
      self.unreadable[name] += 1

  def shaped(self):
    """Returns the source with the shape of its first image, if unknown."""
    if self.image_shape[0]:
      return self
    image, _, _ = self._example(0, self.transform.test)
    return dataclasses.replace(self, image_shape=image.shape)

  def _example(self, index, transform):
    """(image, label, whether another example took its place)."""
    for moved in range(len(self)):
      taken = (index + moved) % len(self)
      try:
        encoded, label = self.examples.read(taken)
        image = images.decode(encoded, self.image_shape[-1])
      except images.UnreadableImage as error:
        if self.damaged == "raise":
          raise images.UnreadableImage(
            f"{self.examples.name(taken)}: cannot be read ({error}); allowed "
            "are whole images, or data.damaged='skip'"
          ) from None
        continue
      return self._checked(transform(image), label, taken), label, moved > 0
    raise images.UnreadableImage(
      f"{self.examples.name(index)}: cannot be read, nor can any other "
      "example; allowed is at least one whole image"
    )

  def _checked(self, image, label, index):
    if self.image_shape[0] and image.shape != self.image_shape:
      raise ValueError(
        f"{self.examples.name(index)}: has shape {image.shape}, others "
        f"{self.image_shape}; allowed with data.image_size=0 is one shape"
      )
    if not 0 <= label < self.num_classes:
      raise ValueError(
        f"{self.examples.name(index)}: has label {label}; allowed are 0 to "
        f"{self.num_classes - 1}"
      )
    return image

  def _batch(self, examples):
    pixels, labels, moved = zip(*examples, strict=True)
    return {
      "image": np.stack(pixels),
      "label": np.array(labels, np.int32),
      "unreadable": np.array(moved),
    }

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

from dr_jax.data import transforms


class Examples(Protocol):
  """What is stored, in an order that is the same everywhere."""

  def __len__(self) -> int:
    """Returns the number of examples."""
    ...

  def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
    """Returns an encoded image (or uint8 [H, W, C]) and its label.

    Raises:
      transforms.UnreadableImage: if there is nothing to be read.
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
    on_decode_error: "raise" stops at an image that cannot be read; "skip" takes
      the next one that can.
    unreadable: how often each unreadable image was to be drawn, by name.
  """

  examples: Examples
  transform: transforms.Transform
  image_shape: tuple[int, int, int]
  num_classes: int
  on_decode_error: str = "raise"
  unreadable: collections.Counter = dataclasses.field(
    default_factory=collections.Counter, compare=False
  )

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, index):
    """Returns one example as evaluation sees it."""
    batch = self.gather(np.array([index]))
    return {"image": batch["image"][0], "label": batch["label"][0]}

  def gather(self, indices):
    """Returns the examples at `indices` ([B]) as evaluation sees them.

    Beside "image" and "label" the batch has "unreadable", bool [B]: whether
    another example took the place.
    """
    return self.normalized(self.pixels(indices))

  def pixels(self, indices):
    """Returns what `gather` does, but not normalized: uint8 [B, H, W, C].

    A quarter of the bytes for a worker to hand over: with float32, workers
    spent as much time on that as on decoding.
    """
    return self._batch(indices, [self.transform.test] * len(indices))

  def normalized(self, batch):
    """Returns a batch of `pixels` or `draw` with float32 images.

    Labels are copied: where a device array shares the memory of a numpy array,
    as on a CPU, it would keep what a worker handed over.
    """
    image = np.empty(batch["image"].shape, np.float32)
    self.transform.normalize(batch["image"], image)
    return batch | {"image": image, "label": batch["label"].copy()}

  def draw(self, indices, *, seed, start):
    """Returns the examples at `indices` ([B]) augmented, as `pixels` does.

    Args:
      indices: of the examples.
      seed: of the run.
      start: position of the first one in the endless stream of examples. Each
        example's random choices are a function of seed and position alone.
    """
    augmentations = []
    for position in range(start, start + len(indices)):
      # Three words, where the order of an epoch is drawn from two.
      bits = np.random.Philox(np.random.SeedSequence([seed, position, 1]))
      words = bits.random_raw(transforms.WORDS)
      augmentations.append(functools.partial(self.transform.train, words=words))
    return self._batch(indices, augmentations)

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
    pixels, _, _ = self._example(0, self.transform.test)
    return dataclasses.replace(self, image_shape=pixels.shape)

  def _example(self, index, transform):
    """(uint8 [H, W, C], label, whether another example took its place)."""
    for moved in range(len(self)):
      taken = (index + moved) % len(self)
      try:
        encoded, label = self.examples.read(taken)
        image = transforms.decode(encoded, self.image_shape[-1])
      except transforms.UnreadableImage as error:
        if self.on_decode_error == "raise":
          raise transforms.UnreadableImage(
            f"{self.examples.name(taken)} cannot be read ({error}); repair it, "
            "or set on_decode_error='skip'"
          ) from None
        continue
      return self._checked(transform(image), label, taken), label, moved > 0
    raise transforms.UnreadableImage(
      f"{self.examples.name(index)} cannot be read, nor can any other example"
    )

  def _checked(self, pixels, label, index):
    if self.image_shape[0] and pixels.shape != self.image_shape:
      raise ValueError(
        f"{self.examples.name(index)} must have the shape of the others, "
        f"{self.image_shape}, with image_size=0, got {pixels.shape}"
      )
    if not 0 <= label < self.num_classes:
      raise ValueError(
        f"{self.examples.name(index)} must have a label in "
        f"0..{self.num_classes - 1}, got {label}"
      )
    return pixels

  def _batch(self, indices, transforms):
    size = len(indices)
    batch = {
      "image": np.empty((size, *self.image_shape), np.uint8),
      "label": np.empty(size, np.int32),
      "unreadable": np.empty(size, bool),
    }
    pairs = zip(indices.tolist(), transforms, strict=True)
    for row, (index, transform) in enumerate(pairs):
      pixels, label, moved = self._example(index, transform)
      batch["image"][row] = pixels
      batch["label"][row], batch["unreadable"][row] = label, moved
    return batch

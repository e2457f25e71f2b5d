"""A source of images that are decoded and transformed when they are needed.

The examples behind it are what is stored, encoded; see `Examples`. An image
that cannot be read stops the run, or the next readable one is taken in its
place; which one that is depends on the data alone, not on who reads it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from dr_jax.data import transforms
from dr_jax.data.decoding import OpenImage, UnreadableImage
from dr_jax.data.sources import Batch, Example, Source


class Examples(Protocol):
  """What is stored, in an order that is the same everywhere."""

  def __len__(self) -> int:
    """Returns the number of examples."""
    ...

  def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
    """Returns an encoded image (or uint8 [H, W, C]) and its label.

    Raises:
      UnreadableImage: if it cannot be read.
    """
    ...

  def name(self, index: int) -> str:
    """Returns the example's name in messages."""
    ...


@dataclasses.dataclass(frozen=True)
class SomeExamples:
  """Some of other examples, by their numbers [N]."""

  examples: Examples
  indices: np.ndarray

  def __len__(self) -> int:
    return len(self.indices)

  def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
    return self.examples.read(int(self.indices[index]))

  def name(self, index: int) -> str:
    return self.examples.name(int(self.indices[index]))


@dataclasses.dataclass(frozen=True)
class ImageSource(Source):
  """A source of encoded images.

  Attributes:
    examples: where encoded images and labels are read.
    transform: what is done to an image once it is decoded.
    image_shape: (height, width, channels) of every transformed image; height
      0: not known yet.
    num_classes: labels are below it.
    on_decode_error: "raise" stops at an image that cannot be read; "skip" takes
      the next one that can.
    orient: whether EXIF orientations are applied.
    skipped: how often each unreadable image was to be drawn, by name.
  """

  examples: Examples
  transform: transforms.Transform
  image_shape: tuple[int, int, int]
  num_classes: int
  on_decode_error: str = "raise"
  orient: bool = True
  skipped: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter, compare=False
  )

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Example:
    batch = self.gather(np.array([index]))
    return {"image": batch["image"][0], "label": batch["label"][0]}

  def read(self, indices: np.ndarray) -> Batch:
    """Returns the examples at `indices` ([B]) as uint8 [B, H, W, C].

    A quarter of the bytes for a worker to hand over: with float32, workers
    spent as much time on that as on decoding.
    """
    return self._batch(indices, [self.transform.test] * len(indices))

  def draw(self, indices: np.ndarray, *, seed: int, start: int) -> Batch:
    """Returns the examples at `indices` ([B]) augmented, as `read` does."""
    augmentations = []
    for position in range(start, start + len(indices)):
      # Three words, where the order of an epoch is drawn from two.
      bits = np.random.Philox(np.random.SeedSequence([seed, position, 1]))
      words = bits.random_raw(transforms.WORDS)
      augmentations.append(functools.partial(self.transform.train, words=words))
    return self._batch(indices, augmentations)

  def finish(self, batch: Batch) -> Batch:
    """Returns a batch of `read` or `draw` with normalized float32 images.

    Labels are copied: where a device array shares the memory of a numpy array,
    as on a CPU, it would keep what a worker handed over.
    """
    image = np.empty(batch["image"].shape, np.float32)
    self.transform.normalize(batch["image"], image)
    return batch | {"image": image, "label": batch["label"].copy()}

  def subset(self, indices: np.ndarray) -> ImageSource:
    """Returns a source of some examples, which are also the next readable."""
    examples = SomeExamples(self.examples, indices)
    return dataclasses.replace(self, examples=examples)

  @property
  def unreadable(self) -> collections.Counter[str]:
    return self.skipped

  def report(self, indices: np.ndarray) -> None:
    """Counts unreadable images and warns of each once, by name."""
    for index in indices.tolist():
      name = self.examples.name(index)
      if name not in self.skipped:
        warnings.warn(
          f"{name}: cannot be read; the next example takes its place",
          stacklevel=2,
        )
      self.skipped[name] += 1

  def with_shape(self) -> ImageSource:
    """Returns the source with the shape of its first image, if unknown."""
    if self.image_shape[0]:
      return self
    pixels, _, _ = self._example(0, self.transform.test)
    height, width, channels = pixels.shape
    return dataclasses.replace(self, image_shape=(height, width, channels))

  def _example(
    self, index: int, transform: Callable[[OpenImage], np.ndarray]
  ) -> tuple[np.ndarray, int, bool]:
    """(uint8 [H, W, C], label, whether another example was taken instead)."""
    for moved in range(len(self)):
      taken = (index + moved) % len(self)
      try:
        encoded, label = self.examples.read(taken)
        channels = self.image_shape[-1]
        image = OpenImage(encoded, channels, orient=self.orient)
        pixels = transform(image)
      except UnreadableImage as error:
        if self.on_decode_error == "raise":
          raise UnreadableImage(
            f"{self.examples.name(taken)} cannot be read ({error}); repair it, "
            "or set on_decode_error='skip'"
          ) from None
        continue
      return self._checked(pixels, label, taken), label, moved > 0
    raise UnreadableImage(
      f"{self.examples.name(index)} cannot be read, nor can any other example"
    )

  def _checked(self, pixels: np.ndarray, label: int, index: int) -> np.ndarray:
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

  def _batch(
    self,
    indices: np.ndarray,
    transforms: Sequence[Callable[[OpenImage], np.ndarray]],
  ) -> Batch:
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

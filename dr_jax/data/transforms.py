"""Images to arrays: cropping, resizing, flipping, normalization.

Nothing here draws random numbers. Augmentation is a function of 64-bit words
that the caller passes, so that an example looks the same in whatever process it
is decoded.

Random resized crops are those of Szegedy et al., "Going Deeper with
Convolutions", arXiv 1409.4842 (section 6), in the usual form of ten attempts;
padding and cropping those of He et al., arXiv 1512.03385 (section 4.2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dr_jax.data.decoding import OpenImage

AUGMENT = ("none", "pad_and_crop", "random_resized_crop")
# How many words `Transform.train` takes.
WORDS = 32

_PAD = 4
_ATTEMPTS = 10
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
# Tests resize the shorter side to 256 where 224 pixels are cropped.
_MARGIN = 256 / 224


@dataclasses.dataclass(frozen=True)
class Transform:
  """From an image to what a network sees.

  Attributes:
    augment: of training images: "none"; "pad_and_crop" (4 zeros on each side,
      a random crop, a random flip); "random_resized_crop" (8 to 100 % of the
      area, ratio 3/4 to 4/3, a random flip; test images: the center of the
      image with a margin of 1/7).
    size: side of the square result; 0 leaves the image as large as it is.
    mean: of each channel, of images in [0, 1]; () is 0.
    std: of each channel; () is 1.
  """

  augment: str = "none"
  size: int = 0
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()

  def train(self, source: OpenImage, words: np.ndarray) -> np.ndarray:
    """Returns uint8 [H, W, C]; random choices are taken from `words`.

    Args:
      source: an image; a random resized crop decodes it no larger than it must.
      words: uint64 [WORDS], uniform.

    Raises:
      UnreadableImage: if it cannot be decoded.
    """
    # The top 53 bits, as every double in [0, 1) that is a multiple of 2^-53.
    chances = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    if self.augment == "none":
      return self.test(source)
    if self.augment == "pad_and_crop":
      image = self._fitted(source.decode(), 1)
      image = _crop_after_padding(image, *chances[1:3])
    else:
      box = random_box(*source.size, chances[1:])
      image = source.crop(box, (self.size, self.size))
    if chances[0] < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _pixels(image)

  def test(self, source: OpenImage) -> np.ndarray:
    """Returns uint8 [H, W, C]; nothing is random, the image decoded in full.

    >>> image = OpenImage(np.zeros((5, 8, 1), np.uint8), channels=1)
    >>> Transform(size=4).test(image).shape
    (4, 4, 1)
    """
    margin = _MARGIN if self.augment == "random_resized_crop" else 1
    return _pixels(self._fitted(source.decode(), margin))

  def normalize(self, pixels: np.ndarray, out: np.ndarray) -> None:
    """Writes (pixels / 255 - mean) / std.

    Args:
      pixels: uint8 [..., H, W, C], contiguous.
      out: float32 [..., H, W, C], contiguous.

    >>> out = np.empty((1, 1, 3), np.float32)
    >>> pixels = np.array([[[0, 51, 255]]], np.uint8)
    >>> Transform(mean=(0.5,) * 3, std=(0.5,) * 3).normalize(pixels, out)
    >>> out.tolist()
    [[[-1.0, -0.6000000238418579, 1.0]]]
    """
    width, channels = pixels.shape[-2:]
    # Rows as long as possible: numpy's loops over 3 channels are slow.
    rows = out.reshape(-1, width * channels)
    np.divide(pixels.reshape(rows.shape), np.float32(255), out=rows)
    if self.mean:
      rows -= np.tile(np.asarray(self.mean, np.float32), width)
    if self.std:
      rows /= np.tile(np.asarray(self.std, np.float32), width)

  def _fitted(self, image: Image.Image, margin: float) -> Image.Image:
    """The center of an image whose shorter side is `margin` times the size."""
    if not self.size:
      return image
    shorter, wanted = min(image.size), round(self.size * margin)
    if shorter != wanted:
      # Not rounded: the longer side as torchvision computes it.
      width, height = (side * wanted // shorter for side in image.size)
      image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((side - self.size) / 2) for side in image.size)
    return image.crop((left, top, left + self.size, top + self.size))


def random_box(
  width: int, height: int, chances: Sequence[float]
) -> tuple[int, int, int, int]:
  """Returns the box of a random resized crop.

  Args:
    width: of the image, in pixels.
    height: of the image, in pixels.
    chances: at least 22 numbers in [0, 1): two for the place, and two for
      each attempt at a size.

  Returns:
    (left, top, right, bottom). If no attempt fits into the image, the largest
    centered box of a permitted ratio.

  >>> random_box(500, 375, [0.5] * 22)
  (91, 29, 409, 347)
  """
  place = chances[:2]
  for attempt in range(_ATTEMPTS):
    first, second = chances[2 + 2 * attempt : 4 + 2 * attempt]
    area = width * height * _between(*_AREA, first)
    low, high = _RATIO
    ratio = math.exp(_between(math.log(low), math.log(high), second))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left = int(place[0] * (width - w + 1))
      top = int(place[1] * (height - h + 1))
      return left, top, left + w, top + h
  w = min(width, round(height * _RATIO[1]))
  h = min(height, round(width / _RATIO[0]))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def _pixels(image: Image.Image) -> np.ndarray:
  """uint8 [H, W, C] of a PIL image."""
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def _crop_after_padding(
  image: Image.Image, across: float, down: float
) -> Image.Image:
  """A crop as large as the image, with zeros where it sticks out."""
  left = int(across * (2 * _PAD + 1)) - _PAD
  top = int(down * (2 * _PAD + 1)) - _PAD
  return image.crop((left, top, left + image.width, top + image.height))


def _between(low: float, high: float, chance: float) -> float:
  return low + (high - low) * chance

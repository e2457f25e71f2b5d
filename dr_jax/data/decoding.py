"""Encoded images: their size, their pixels, and the pixels of a crop.

A JPEG stores blocks of 8 x 8 pixels as frequencies. Without the higher ones a
decoder makes 4 x 4, 2 x 2 or 1 x 1 pixels of a block, for less: enough where a
large crop becomes small.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from dr_jax.data import fast_images

_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112
# Of the EXIF orientations, those whose inverse is another one.
_INVERSE = {6: 8, 8: 6}
# Those that exchange width and height.
_TRANSPOSED = (5, 6, 7, 8)
# How many times smaller libjpeg decodes at full speed.
_REDUCTIONS = (8, 4, 2)
# How Pillow calls bytes in memory.
_BUFFER = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


class UnreadableImage(ValueError):
  """An image that cannot be decoded."""


def decode(
  encoded: bytes | np.ndarray, channels: int, *, orient: bool = True
) -> Image.Image:
  """Decodes an image in full; arguments and errors are those of `OpenImage`.

  >>> decode(np.zeros((2, 3, 1), np.uint8), channels=1).size
  (3, 2)
  """
  return OpenImage(encoded, channels, orient=orient).decode()


class OpenImage:
  """An image whose size is known; a JPEG is decoded when pixels are asked for.

  Args:
    encoded: the bytes of a file in a format that Pillow reads, or uint8
      [H, W, C], which is decoded already.
    channels: 1 for gray, 3 for RGB; other images are converted.
    orient: turn and flip the image as its EXIF orientation says, as viewers
      show it.

  Attributes:
    size: (width, height) of the whole image, as `decode` returns it.

  Raises:
    UnreadableImage: here or when it is decoded, if it is truncated, damaged,
      not an image, or has more than 8 bits per channel.
  """

  def __init__(
    self, encoded: bytes | np.ndarray, channels: int, *, orient: bool = True
  ):
    self._channels, self._orient = channels, orient
    self._jpeg = b""
    self._orientation = 1
    if isinstance(encoded, np.ndarray):
      gray = channels == 1
      self._image = Image.fromarray(encoded[..., 0] if gray else encoded)
    else:
      with _unreadable():
        self._image = Image.open(io.BytesIO(encoded))
        self._orientation = _orientation(self._image)
      # MPO: several JPEGs in a file, of which the first counts.
      if self._image.format in ("JPEG", "MPO"):
        self._jpeg = encoded
      else:
        self._load()
    self.size = self._image.size
    if self._jpeg and orient and self._orientation in _TRANSPOSED:
      self.size = self.size[::-1]

  def decode(self) -> Image.Image:
    """Returns the whole image, of mode L or RGB."""
    if self._jpeg:
      self._load()
    return self._image

  def crop(
    self, box: tuple[int, int, int, int], size: tuple[int, int]
  ) -> Image.Image:
    """Returns what is in a box, resized bilinearly, antialiased if it shrinks.

    A JPEG of which the box is 2, 4 or 8 times as large as the result, or more,
    is decoded so many times smaller. (Ask for one crop, and not for the whole
    image after it.) The result differs a little from that of a JPEG decoded in
    full, and by at most 1 of 255 with the extra `images` (`fast_images`).

    Args:
      box: (left, top, right, bottom) in an image of `self.size`.
      size: (width, height) of the result.
    """
    reduction = _reduction(box, size) if self._jpeg else 1
    outer, inner = _scaled(box, reduction)
    pixels = self._decode_fast(reduction)
    if pixels is not None:
      left, top, right, bottom = outer
      return fast_images.resize(pixels[top:bottom, left:right], inner, size)
    if self._jpeg:
      self._load(reduction)
    cropped = self._image.crop(outer)
    if fast_images.AVAILABLE:
      return fast_images.resize(np.asarray(cropped), inner, size)
    return cropped.resize(size, Image.Resampling.BILINEAR, box=inner)

  def _decode_fast(self, reduction: int) -> np.ndarray | None:
    """uint8 [H, W, 3], or None where Pillow must decode."""
    turned = self._orient and self._orientation != 1
    rgb = self._channels == 3
    if not fast_images.AVAILABLE or not self._jpeg or turned or not rgb:
      return None
    return fast_images.decode_jpeg(self._jpeg, self.size, reduction)

  def _load(self, reduction: int = 1) -> None:
    """Makes `_image` one that is decoded, oriented and converted."""
    image, self._jpeg = self._image, b""
    with _unreadable():
      if reduction > 1:
        width, height = image.size
        image.draft(None, (width // reduction, height // reduction))
      image.load()
      # Pillow would clip these at 255.
      if image.mode[0] in "IF":
        raise ValueError("has more than 8 bits per channel")
      if self._orient:
        _orient(image)
      elif image.format == "TIFF":
        # Pillow has turned it.
        inverse = _INVERSE.get(self._orientation, self._orientation)
        image.getexif()[_ORIENTATION] = inverse
        _orient(image)
      mode = _MODES[self._channels]
      self._image = image if image.mode == mode else image.convert(mode)


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
  """Turns what Pillow raises into `UnreadableImage`."""
  try:
    # Pillow warns of transparent palettes and of damaged EXIF data, which
    # change nothing here.
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  # Pillow's decoders raise a dozen types: OSError, SyntaxError, struct.error.
  except Exception as error:
    reason = _BUFFER.sub("", str(error)) or type(error).__name__
    raise UnreadableImage(reason) from None


def _orientation(image: Image.Image) -> int:
  """The EXIF orientation of an image that is not loaded, 1 if it has none."""
  with contextlib.suppress(Exception):
    return image.getexif().get(_ORIENTATION, 1)
  return 1


def _orient(image: Image.Image) -> None:
  # Damaged EXIF data are as none.
  with contextlib.suppress(Exception):
    ImageOps.exif_transpose(image, in_place=True)


def _reduction(box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
  """How many times smaller an image may be for a box to fill a size.

  >>> [_reduction((0, 0, side, 900), (100, 100)) for side in (199, 200, 800)]
  [1, 2, 8]
  """
  left, top, right, bottom = box
  shrinks = min((right - left) / size[0], (bottom - top) / size[1])
  return next((n for n in _REDUCTIONS if n <= shrinks), 1)


def _scaled(
  box: tuple[int, int, int, int], reduction: int
) -> tuple[tuple[int, int, int, int], tuple[float, float, float, float]]:
  """A box in a smaller image: the pixels that it touches, and it in them.

  >>> _scaled((3, 2, 9, 8), 2)
  ((1, 1, 5, 4), (0.5, 0.0, 3.5, 3.0))
  """
  edges = [edge / reduction for edge in box]
  left, top = (math.floor(edge) for edge in edges[:2])
  right, bottom = (math.ceil(edge) for edge in edges[2:])
  inner = (edges[0] - left, edges[1] - top, edges[2] - left, edges[3] - top)
  return (left, top, right, bottom), inner

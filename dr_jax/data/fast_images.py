"""What libraries do faster than Pillow, if they are installed: extra `images`.

simplejpeg decodes JPEGs to the bits that Pillow does: both hold libjpeg-turbo.
cykooz-resizer applies the same filter with 16-bit weights: pixels differ by
at most 1 of 255.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from PIL import Image

AVAILABLE = all(map(importlib.util.find_spec, ("cykooz_resizer", "simplejpeg")))

if AVAILABLE:
  import cykooz_resizer
  import simplejpeg
  from cykooz_resizer.structs import CropBox


def decode_jpeg(
  encoded: bytes, size: tuple[int, int], reduction: int
) -> np.ndarray | None:
  """Decodes a JPEG to RGB, without its EXIF orientation.

  Args:
    encoded: the bytes of a file.
    size: (width, height), as stored.
    reduction: 1, 2, 4 or 8: how many times smaller to decode it.

  Returns:
    uint8 [ceil(height / reduction), ceil(width / reduction), 3]; None for what
    should be left to Pillow: other color spaces, and files with errors, of
    which it forgives some.
  """
  width, height = (-(-side // reduction) for side in size)
  try:
    *_, colors, _ = simplejpeg.decode_jpeg_header(encoded)
    if colors != "YCbCr":
      return None
    pixels = simplejpeg.decode_jpeg(
      encoded, min_height=height, min_width=width, min_factor=reduction
    )
  except ValueError:
    return None
  return pixels if pixels.shape == (height, width, 3) else None


def resize(
  pixels: np.ndarray,
  box: tuple[float, float, float, float],
  size: tuple[int, int],
) -> Image.Image:
  """Resizes what is in a box, bilinearly and antialiased.

  Args:
    pixels: uint8 [H, W] or [H, W, 3].
    box: (left, top, right, bottom).
    size: (width, height) of the result.
  """
  kinds = cykooz_resizer.PixelType
  kind, mode = (kinds.U8x3, "RGB") if pixels.ndim == 3 else (kinds.U8, "L")
  height, width = pixels.shape[:2]
  source = cykooz_resizer.ImageData(width, height, kind, pixels.tobytes())
  result = cykooz_resizer.ImageData(*size, kind)
  left, top, right, bottom = box
  options = cykooz_resizer.ResizeOptions(
    cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear),
    crop_box=CropBox(left, top, right - left, bottom - top),
  )
  cykooz_resizer.Resizer().resize(source, result, options)
  return Image.frombytes(mode, size, result.get_buffer())

"""JPEGs like those of ImageNet, made up."""

from __future__ import annotations

import io
import pathlib

import numpy as np
from PIL import Image

from dr_jax import data

COUNT = 128
# Height and width, in pixels.
SHAPE = (375, 500)
# 63 kB. Those of ImageNet have 110 kB on average: they take longer to decode.
_QUALITY = 88


def write(root: pathlib.Path) -> list[bytes]:
  """Writes a folder of `COUNT` JPEGs of two classes; returns their bytes."""
  random = np.random.default_rng(0)
  encoded = []
  for number in range(COUNT):
    # Smooth shapes with texture, as a photograph has.
    coarse = random.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize(
      SHAPE[::-1], Image.Resampling.BICUBIC
    )
    pixels = np.asarray(image, np.int16)
    pixels = pixels + random.integers(-12, 13, (*SHAPE, 1), np.int16)
    file = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(file, "jpeg", quality=_QUALITY)
    encoded.append(file.getvalue())
    for split in ("train", "test"):
      directory = root / split / f"{number % 2}"
      directory.mkdir(parents=True, exist_ok=True)
      (directory / f"{number:04}.jpg").write_bytes(encoded[-1])
  return encoded


def batches(
  root: pathlib.Path, *, batch_size: int, image_size: int, workers: int
) -> data.batching.Batches:
  """Training batches of what `write` wrote, made as recipes for ImageNet do.

  Args:
    root: the directory.
    batch_size: images per batch.
    image_size: side of the crops, in pixels.
    workers: processes that decode.
  """
  loaded = data.load(
    "folder",
    path=str(root),
    augment="random_resized_crop",
    image_size=image_size,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
  )
  return data.batches(
    loaded.train, batch_size=batch_size, seed=0, workers=workers
  )

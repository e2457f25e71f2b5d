"""Images per second of the input pipeline, against decoding alone.

  python -m dr_jax.benchmarks.data [--workers=0,1,2] [--image-size=224]

Writes JPEGs as large as ImageNet's (500 x 375 pixels) to a temporary directory
and reads them as training does: decoding, random resized crop, flip,
normalization, batches of float32. They are compared with what one core decodes
in full with Pillow and nothing else, measured before each row, and that times
the number of cores; workers that share cores with a training process do not
reach it. The extra `images` is used if it is installed.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import statistics
import tempfile
import time

from absl import flags
from PIL import Image

from dr_jax.benchmarks import images
from dr_jax.benchmarks.rows import Rows
from dr_jax.data import fast_images
from dr_jax.runtime import command

_WORKERS = flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of workers.")
_SIZE = flags.DEFINE_integer(
  "image_size", 224, "Side of the crops, in pixels.", lower_bound=1
)
_BATCH = flags.DEFINE_integer(
  "batch_size",
  32,
  "Images per batch.",
  lower_bound=1,
  upper_bound=images.COUNT,
)
_SECONDS = flags.DEFINE_float(
  "seconds", 5, "How long each is measured.", lower_bound=0
)
flags.DEFINE_alias("image-size", "image_size")
flags.DEFINE_alias("batch-size", "batch_size")


def main():
  """Prints the table."""
  cores = len(os.sched_getaffinity(0))
  with tempfile.TemporaryDirectory() as directory:
    root = pathlib.Path(directory)
    encoded = images.write(root)
    size = statistics.mean(map(len, encoded)) / 1000
    height, width = images.SHAPE
    extra = "with" if fast_images.AVAILABLE else "without"
    rows = Rows(
      f"JPEGs of {width} x {height} pixels, {size:.0f} kB, to "
      f"{_SIZE.value} x {_SIZE.value}, {extra} the extra images",
      ("workers", "images/s", "Pillow", "of one core", f"of {cores} cores"),
      left=0,
    )
    for workers in map(int, _WORKERS.value):
      alone = decoding_speed(encoded, _SECONDS.value)
      speed = pipeline_speed(root, workers)
      rows.add(
        str(workers),
        f"{speed:.0f}",
        f"{alone:.0f}",
        f"{speed / alone:.2f}",
        f"{speed / alone / cores:.2f}",
      )
    rows.end()


def decoding_speed(encoded, seconds):
  """Images per second that Pillow decodes, in one thread."""
  count, start = 0, time.perf_counter()
  while (passed := time.perf_counter() - start) < seconds or not count:
    Image.open(io.BytesIO(encoded[count % len(encoded)])).load()
    count += 1
  return count / passed


def pipeline_speed(root, workers):
  """Images per second of training batches, once workers have begun."""
  batches = images.batches(
    root,
    batch_size=_BATCH.value,
    image_size=_SIZE.value,
    workers=workers,
  )
  with contextlib.closing(batches.stream()) as stream:
    # What workers have made ahead by then is not counted either.
    for _ in range(1 + 3 * workers):
      next(stream)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _SECONDS.value or not count:
      count += len(next(stream)["label"])
  return count / passed


if __name__ == "__main__":
  command.start(main)

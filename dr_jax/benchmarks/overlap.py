"""What a training step waits for: logging, checkpoints, images.

  python -m dr_jax.benchmarks.overlap [--model=resnet18] [--workers=8]

The same joint step, called in a row on one batch, and by the training loop
with one thing more at a time: every loss written to a file, a checkpoint every
ten steps, JPEGs as large as ImageNet's (500 x 375 pixels) decoded by workers.
If nothing waits, all take the same time. On a CPU the step computes with one
thread and leaves the other cores to the rest, as an accelerator would.
"""

from __future__ import annotations

import os
import pathlib
import tempfile

from absl import flags, logging

from dr_jax.benchmarks import concurrent_load, images, loopback, network
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command, compilation

_MODEL = flags.DEFINE_enum("model", "resnet8", network.NAMES, "Network.")
_BATCH = flags.DEFINE_integer(
  "batch_size", 32, "Images per step.", lower_bound=1, upper_bound=images.COUNT
)
_SIZE = flags.DEFINE_integer(
  "image_size", 0, "Side of the images; 0 for the network's.", lower_bound=0
)
_WORKERS = flags.DEFINE_integer("workers", 1, "That decode.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 40, "Timed steps.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Of all in turn.", lower_bound=1)
flags.DEFINE_alias("batch-size", "batch_size")
flags.DEFINE_alias("image-size", "image_size")


def main():
  """Prints the table."""
  # Orbax logs every step of a save.
  logging.set_verbosity(logging.WARNING)
  os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {loopback.ONE_THREAD}".strip()
  )
  # The size of XLA's pool of threads.
  os.environ["NPROC"] = "1"
  compilation.cache_on_disk()
  setting = network.Setting(_MODEL.value, _SIZE.value)
  trained = concurrent_load.Trained(setting, _BATCH.value, _WORKERS.value)
  with tempfile.TemporaryDirectory() as directory:
    root = pathlib.Path(directory)
    images.write(root)
    seconds = concurrent_load.measure(
      trained,
      root,
      concurrent_load.KINDS,
      steps=_STEPS.value,
      rounds=_ROUNDS.value,
    )
  title = (
    f"{setting.model}, {_BATCH.value} images of {setting.size}x{setting.size}"
    f"x3, bits {setting.bits}, {_WORKERS.value} workers"
  )
  concurrent_load.print_table(seconds, title)
  print(environment())


if __name__ == "__main__":
  command.start(main)

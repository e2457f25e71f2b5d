"""Data sets and the order in which a run sees them."""

from dr_jax.data.encoded import ImageSource
from dr_jax.data.images import AUGMENT, UnreadableImage
from dr_jax.data.pipeline import batches, epoch
from dr_jax.data.reading import WorkerError
from dr_jax.data.sources import (
  NAMES,
  ArraySource,
  Dataset,
  Source,
  hold_out,
  load,
)

__all__ = [
  "AUGMENT",
  "NAMES",
  "ArraySource",
  "Dataset",
  "ImageSource",
  "Source",
  "UnreadableImage",
  "WorkerError",
  "batches",
  "epoch",
  "hold_out",
  "load",
]

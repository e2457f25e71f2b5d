"""Data sets and the order in which a run sees them."""

from dr_jax.data.batching import batches, epoch
from dr_jax.data.image_source import ImageSource
from dr_jax.data.sources import (
  NAMES,
  ArraySource,
  Dataset,
  Source,
  hold_out,
  load,
)
from dr_jax.data.transforms import AUGMENT, UnreadableImage
from dr_jax.data.workers import WorkerError

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

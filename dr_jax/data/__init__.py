"""Data sets, and batches of them as a function of the step number."""

from dr_jax.data.batching import batches, epoch
from dr_jax.data.datasets import NAMES, Dataset, load
from dr_jax.data.decoding import UnreadableImage
from dr_jax.data.image_source import ImageSource
from dr_jax.data.sources import ArraySource, MissingData, Source, hold_out
from dr_jax.data.transforms import AUGMENT
from dr_jax.data.workers import WorkerError

__all__ = [
  "AUGMENT",
  "NAMES",
  "ArraySource",
  "Dataset",
  "ImageSource",
  "MissingData",
  "Source",
  "UnreadableImage",
  "WorkerError",
  "batches",
  "epoch",
  "hold_out",
  "load",
]
